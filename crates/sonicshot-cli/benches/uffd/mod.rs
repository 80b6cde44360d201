//! The plainest handler of page faults that there can be, and fresh memory to fault in.

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap_anonymous, munmap, userfaultfd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;

const PAGE: u64 = 4096;

/// Memory that nobody has touched.
pub struct Fresh {
    start: NonNull<u8>,
    len: usize,
}

impl Fresh {
    pub fn new(len: usize) -> Self {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping touches nobody's memory.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags) }.unwrap();
        let start = NonNull::new(start.cast()).unwrap();
        Self { start, len }
    }

    /// A private mapping of a file.
    #[allow(dead_code, reason = "not every bench has such")]
    pub fn of(file: &std::fs::File, len: usize) -> Self {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping touches nobody's memory.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, flags, file, 0) };
        let start = NonNull::new(start.unwrap().cast()).unwrap();
        Self { start, len }
    }

    /// Writes a word.
    #[allow(dead_code, reason = "not every bench does")]
    pub fn write(&self, at: usize) {
        assert!(at + 8 <= self.len);
        // SAFETY: inside the mapping, whole words apart.
        unsafe { self.start.as_ptr().add(at).cast::<u64>().write_volatile(7) };
    }

    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn touch(&self, at: usize) {
        assert!(at < self.len);
        // SAFETY: inside the mapping.
        std::hint::black_box(unsafe { self.start.as_ptr().add(at).read_volatile() });
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody uses any more.
        unsafe { munmap(self.start.as_ptr().cast(), self.len).unwrap() };
    }
}

#[repr(C)]
struct Api([u64; 3]);
#[repr(C)]
struct Register([u64; 4]);
#[repr(C)]
struct Copy([u64; 5]);
#[repr(C)]
struct Zero([u64; 4]);

const API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0);
const COPY: Opcode = opcode::read_write::<Copy>(0xaa, 3);
const ZERO: Opcode = opcode::read_write::<Zero>(0xaa, 4);

fn registered(memory: &Fresh) -> OwnedFd {
    // SAFETY: a new descriptor.
    let uffd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) };
    let uffd = uffd.unwrap();
    let (start, len) = (memory.start().as_ptr() as u64, memory.len() as u64);
    // SAFETY: each structure is laid out as the kernel has it.
    unsafe {
        let mut api = Api([0xaa, 0, 0]);
        ioctl(&uffd, Updater::<API, Api>::new(&mut api)).unwrap();
        let mut register = Register([start, len, 1, 0]);
        ioctl(&uffd, Updater::<REGISTER, Register>::new(&mut register)).unwrap();
    }
    uffd
}

/// Has the kernel copy ranges of pages of `ram` to where they are in `memory`, one call each: no handler
/// that fills memory ahead can cost less.
#[allow(dead_code, reason = "not every bench does")]
pub fn copy_ranges(memory: &Fresh, ram: &[u8], ranges: &[std::ops::Range<usize>]) {
    const WITHOUT_WAKING: u64 = 1;
    let uffd = registered(memory);
    let start = memory.start().as_ptr() as u64;
    for range in ranges {
        let to = start + range.start as u64 * PAGE;
        let source = &ram[range.start << 12..range.end << 12];
        let len = source.len() as u64;
        let mut copy = Copy([to, source.as_ptr() as u64, len, WITHOUT_WAKING, 0]);
        // SAFETY: laid out as the kernel has it; the source is as long as is said.
        unsafe { ioctl(&uffd, Updater::<COPY, Copy>::new(&mut copy)).unwrap() };
    }
}

pub struct PlainHandler {
    stop: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl PlainHandler {
    /// Serves each fault in `memory` with its page of `ram`, or with the first one if that has no
    /// more; or with zeroes.
    pub fn start(memory: &Fresh, zero: bool, ram: Arc<[u8]>) -> Self {
        let uffd = registered(memory);
        let start = memory.start().as_ptr() as u64;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let base = start;
            let mut message = [0; 32];
            loop {
                let mut fds = [
                    PollFd::new(&uffd, PollFlags::IN),
                    PollFd::new(&*stopped, PollFlags::IN),
                ];
                poll(&mut fds, None).unwrap();
                if !fds[1].revents().is_empty() {
                    return;
                }
                if rustix::io::read(&uffd, &mut message) != Ok(32) {
                    continue;
                }
                let at = u64::from_ne_bytes(message[16..24].try_into().unwrap()) & !(PAGE - 1);
                // SAFETY: as above; the source is a page.
                unsafe {
                    if zero {
                        let mut zero = Zero([at, PAGE, 0, 0]);
                        ioctl(&uffd, Updater::<ZERO, Zero>::new(&mut zero)).unwrap();
                    } else {
                        let from = usize::try_from(at - base).unwrap();
                        let page = ram.get(from..from + 4096).unwrap_or(&ram[..4096]);
                        let mut copy = Copy([at, page.as_ptr() as u64, PAGE, 0, 0]);
                        ioctl(&uffd, Updater::<COPY, Copy>::new(&mut copy)).unwrap();
                    }
                }
            }
        });
        Self { stop, thread }
    }

    pub fn stop(self) {
        rustix::io::write(&*self.stop, &1_u64.to_ne_bytes()).unwrap();
        self.thread.join().unwrap();
    }
}
