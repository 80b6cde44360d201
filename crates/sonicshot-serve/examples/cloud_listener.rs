//! A Cloud Hypervisor that waits for a migration, after its sources (53.0, and main of 2026-08-20), for
//! the tests: it uses nothing but the C library, and shares no code with the server.
//!
//! ```console
//! $ cloud_listener SOCKET FORM WHAT SEED
//! ```
//!
//! FORM is `wake` (53.0: pages that are missing are asked for, and who waits is woken) or `continue`
//! (later: pages that are there but not mapped are asked for as well, and mapped), with `-huge` behind it
//! in pages of 2 MiB. WHAT is what it does:
//!
//! | | |
//! |---|---|
//! | `check` | its guest reads all of its memory, compares it, writes to it, compares that |
//! | `paused` | the same; it is not to be resumed |
//! | `balloon` | `check`, and a third of its pages are punched out meanwhile |
//! | `dribble` | `check`; its questions come byte by byte, or two at once |
//! | `fds` | `check`; descriptors come with its answers |
//! | `slow` | its guest touches a page each millisecond; `ready` is said before |
//! | `die` | it ends in the middle, without a word |
//! | `leave`, `abandon` | it closes the second connection in the middle, or says that it wants no more |
//! | `outside`, `odd`, `huge`, `garbage`, `flood` | it asks for what is not its memory; for half a page; for all there is; for nothing known; without listening |
//! | `occupied` | it writes to a page that it has not asked for |
//! | `refuse`, `silent`, `strange`, `half` | its answer to the configuration is no; none; none of the protocol; cut off |
//! | `state` | it refuses the state |
#![expect(unsafe_code, reason = "guest memory is a mapping here")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::cast_lossless,
    reason = "a test's program may stop anywhere"
)]

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int;
    fn fallocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int;
    fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64;
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn read(fd: c_int, to: *mut c_void, len: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn alarm(seconds: u32) -> u32;
    fn recvmsg(fd: c_int, message: *mut Message, flags: c_int) -> isize;
    fn sendmsg(fd: c_int, message: *const Message, flags: c_int) -> isize;
}

#[repr(C)]
struct Part {
    start: *mut c_void,
    len: usize,
}

#[repr(C)]
struct Message {
    name: *mut c_void,
    name_len: u32,
    parts: *mut Part,
    part_count: usize,
    control: *mut c_void,
    control_len: usize,
    flags: c_int,
}

#[repr(C, align(8))]
struct Control([u8; 64]);

const PAGE: usize = 4096;
/// The slots: number, guest-physical address, pages, where in its file it begins.
const SLOTS: [(u32, u64, usize, usize); 2] = [(0, 0, 1024, 0), (3, 4 << 30, 2048, 4 << 20)];
const PAGES: usize = SLOTS[0].2 + SLOTS[1].2;

/// As `vm_client` has it.
fn expected(page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    let free = page / 11 % 5 == 3;
    let zero = page / 13 % 7 == 2;
    if !free && !zero {
        for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64;
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

fn system(result: c_long) -> c_long {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    result
}

/// A slot that is mapped.
struct Slot {
    file: c_int,
    offset: usize,
    gpa: u64,
    start: *mut u8,
    pages: usize,
}

struct Vm {
    slots: Vec<Slot>,
    uffd: c_int,
    /// Whether pages that are there are asked for too.
    minor: bool,
    /// Small pages in one that is asked for: 1, or 512 of huge ones.
    unit: usize,
}

// SAFETY: no page is used by two threads at a time.
unsafe impl Sync for Vm {}
// SAFETY: as above.
unsafe impl Send for Vm {}

impl Vm {
    fn new(files: &[(u32, c_int)], minor: bool, unit: usize) -> Self {
        let mut slots = Vec::new();
        for (number, gpa, pages, offset) in SLOTS {
            let file = files.iter().find(|(found, _)| *found == number);
            let file = file.expect("a file for each slot").1;
            let len = pages * PAGE;
            // MAP_SHARED, MAP_NORESERVE.
            let flags = 0x1 | 0x4000;
            // SAFETY: a new mapping.
            let start = unsafe { mmap(std::ptr::null_mut(), len, 3, flags, file, offset as i64) };
            assert_ne!(start as isize, -1, "mmap");
            // SAFETY: no pointers.
            let end = unsafe { lseek(file, 0, 2) };
            assert_eq!(end, (offset + len) as i64, "the length of slot {number}");
            // SAFETY: pages of the mapping, of which nothing is used yet. MADV_HUGEPAGE.
            unsafe { madvise(start, len, 14) };
            slots.push(Slot {
                file,
                offset,
                gpa,
                start: start.cast(),
                pages,
            });
        }
        assert_eq!(files.len(), SLOTS.len());
        Self {
            slots,
            uffd: -1,
            minor,
            unit,
        }
    }

    /// The steps before the state is taken in.
    fn register(&mut self) {
        const USERFAULTFD: c_long = if cfg!(target_arch = "aarch64") {
            282
        } else {
            323
        };
        // SAFETY: a new descriptor; O_CLOEXEC, O_NONBLOCK.
        self.uffd = system(unsafe { syscall(USERFAULTFD, 0o2_004_000) }) as c_int;
        // MISSING_SHMEM, MINOR_SHMEM, and the same of HUGETLBFS.
        let features = match (self.minor, self.unit) {
            (false, 1) => 1 << 5,
            (true, 1) => 1 << 5 | 1 << 10,
            (false, _) => 1 << 4,
            (true, _) => 1 << 4 | 1 << 9,
        };
        let mut api = [0xaa_u64, features, 0];
        assert_eq!(self.call(0xc018_aa3f, &mut api), 0);
        for slot in &self.slots {
            let mode = if self.minor { 5 } else { 1 };
            let mut register = [slot.start as u64, (slot.pages * PAGE) as u64, mode, 0];
            assert_eq!(self.call(0xc020_aa00, &mut register), 0);
        }
    }

    /// 0, or the error.
    fn call<const N: usize>(&self, request: c_ulong, argument: &mut [u64; N]) -> i32 {
        // SAFETY: the requests' structures are of so many words.
        match unsafe { ioctl(self.uffd, request, argument.as_mut_ptr()) } {
            0 => 0,
            _ => std::io::Error::last_os_error().raw_os_error().unwrap(),
        }
    }

    fn place(&self, page: usize) -> (&Slot, usize) {
        match page.checked_sub(SLOTS[0].2) {
            Some(page) => (&self.slots[1], page),
            None => (&self.slots[0], page),
        }
    }

    fn host(&self, page: usize) -> *mut u8 {
        let (slot, page) = self.place(page);
        assert!(page < slot.pages);
        // SAFETY: inside the mapping.
        unsafe { slot.start.add(page * PAGE) }
    }

    fn gpa(&self, page: usize) -> u64 {
        let (slot, page) = self.place(page);
        slot.gpa + (page * PAGE) as u64
    }

    fn page_of(&self, host: u64) -> usize {
        (0..PAGES)
            .find(|page| self.host(*page) as u64 == host & !(PAGE as u64 - 1))
            .expect("a fault in the guest's memory")
    }

    fn read(&self, page: usize) -> [u8; PAGE] {
        // SAFETY: mapped, and not written meanwhile.
        unsafe { self.host(page).cast::<[u8; PAGE]>().read_volatile() }
    }

    fn write(&self, page: usize, byte: u8) {
        // SAFETY: as above.
        unsafe {
            self.host(page)
                .cast::<[u8; PAGE]>()
                .write_volatile([byte; PAGE]);
        };
    }

    /// Punches a page out as a balloon does: out of the file, and out of the mapping.
    fn punch(&self, page: usize) {
        let (slot, inside) = self.place(page);
        let offset = (slot.offset + inside * PAGE) as i64;
        // SAFETY: no pointers; FALLOC_FL_PUNCH_HOLE and KEEP_SIZE.
        assert_eq!(unsafe { fallocate(slot.file, 3, offset, PAGE as i64) }, 0);
        // SAFETY: a page of the mapping, to which there are no references. MADV_DONTNEED.
        assert_eq!(unsafe { madvise(self.host(page).cast(), PAGE, 4) }, 0);
    }

    /// The page is in the file: has who waits for it go on.
    fn resolve(&self, page: usize) {
        let (at, len) = (self.host(page) as u64, (self.unit * PAGE) as u64);
        let mut wake = [at, len];
        if !self.minor {
            assert_eq!(self.call(0x8010_aa02, &mut wake), 0);
            return;
        }
        loop {
            let mut mapped = [at, len, 0, 0];
            match self.call(0xc020_aa07, &mut mapped) {
                0 => return,
                // EEXIST: somebody was faster. EAGAIN.
                17 => {
                    assert_eq!(self.call(0x8010_aa02, &mut wake), 0);
                    return;
                }
                11 => std::thread::yield_now(),
                // EFAULT: a hole.
                other => panic!("CONTINUE of page {page}: error {other}"),
            }
        }
    }

    /// Serves its guest's faults by asking, a page ahead whenever there is none, until it has all.
    fn handle(&self, faults: &mut UnixStream, what: &str, asked: &AtomicUsize) {
        let mut served = vec![false; PAGES];
        let mut ahead = 0;
        let mut events = 0;
        loop {
            let mut message = [0_u64; 4];
            // SAFETY: it is as long as is said.
            let got = unsafe { read(self.uffd, message.as_mut_ptr().cast(), 32) };
            let page = if got == 32 {
                events += 1;
                // One that is woken without its page would fault again without end.
                assert!(events < 8 * PAGES, "too many faults");
                // Its slot begins with a whole one.
                self.page_of(message[2]) / self.unit * self.unit
            } else {
                while ahead < PAGES && served[ahead] {
                    ahead += self.unit;
                }
                if ahead == PAGES {
                    // From now on the kernel fills what is punched out.
                    // SAFETY: nobody uses it any more.
                    unsafe { close(self.uffd) };
                    return;
                }
                ahead
            };
            self.ask(faults, page, what);
            self.resolve(page);
            served[page] = true;
            asked.fetch_add(1, Ordering::Release);
            let so_many = asked.load(Ordering::Acquire);
            match what {
                "die" if so_many > 500 => std::process::exit(7),
                "leave" if so_many > 500 => {
                    // It lets go of everything, and goes on.
                    // SAFETY: nobody uses it any more.
                    unsafe { close(self.uffd) };
                    return;
                }
                "abandon" if so_many > 500 => {
                    faults.write_all(&request(6, 0)).unwrap();
                    return;
                }
                "slow" => std::thread::sleep(Duration::from_millis(1)),
                _ => {}
            }
        }
    }

    fn ask(&self, faults: &mut UnixStream, page: usize, what: &str) {
        let question = question(self.gpa(page), (self.unit * PAGE) as u64);
        match what {
            "dribble" if page.is_multiple_of(2) => {
                for byte in &question {
                    faults.write_all(&[*byte]).unwrap();
                }
            }
            // Twice the same: a question may be repeated.
            "dribble" => {
                faults.write_all(&question.repeat(2)).unwrap();
                check(faults, 9);
            }
            _ => faults.write_all(&question).unwrap(),
        }
        check(faults, 9);
    }
}

fn request(command: u16, len: u64) -> Vec<u8> {
    let mut out = vec![0; 16];
    out[..2].copy_from_slice(&command.to_le_bytes());
    out[8..].copy_from_slice(&len.to_le_bytes());
    out
}

fn question(gpa: u64, len: u64) -> Vec<u8> {
    let mut out = request(9, 16);
    out.extend(gpa.to_le_bytes());
    out.extend(len.to_le_bytes());
    out
}

/// The server's answer: all well, and nothing follows.
fn check(stream: &mut UnixStream, command: u16) {
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer.to_vec(), request(1, 0), "the answer to {command}");
}

/// A request, and what follows it.
fn hear(stream: &mut UnixStream) -> (u16, Vec<u8>) {
    let mut head = [0; 16];
    stream.read_exact(&mut head).unwrap();
    let command = u16::from_le_bytes([head[0], head[1]]);
    assert_eq!(head[2..8], [0; 6]);
    let len = u64::from_le_bytes(head[8..].try_into().unwrap());
    // Of a file's number a descriptor comes with the bytes.
    let mut payload = vec![0; if command == 7 { 0 } else { len as usize }];
    stream.read_exact(&mut payload).unwrap();
    assert!(command != 7 || len == 4);
    (command, payload)
}

/// A slot's number and its file.
fn file(stream: &UnixStream) -> (u32, c_int) {
    let mut number = [0; 4];
    let mut part = Part {
        start: number.as_mut_ptr().cast(),
        len: 4,
    };
    let mut control = Control([0; 64]);
    let mut message = Message {
        name: std::ptr::null_mut(),
        name_len: 0,
        parts: &raw mut part,
        part_count: 1,
        control: (&raw mut control).cast(),
        control_len: 64,
        flags: 0,
    };
    // SAFETY: all of it lives for longer than the call.
    let got = unsafe { recvmsg(stream.as_raw_fd(), &raw mut message, 0) };
    assert_eq!(got, 4);
    // One descriptor, and nothing more.
    let word = |at: usize| i32::from_le_bytes(control.0[at..at + 4].try_into().unwrap());
    assert_eq!(
        (message.control_len, word(0), word(8), word(12)),
        (24, 20, 1, 1)
    );
    (u32::from_le_bytes(number), word(16))
}

/// Answers with descriptors, which nobody wants.
fn answer_with_descriptors(stream: &UnixStream) {
    let mut bytes = request(1, 0);
    let mut part = Part {
        start: bytes.as_mut_ptr().cast(),
        len: bytes.len(),
    };
    let mut control = Control([0; 64]);
    for (at, word) in [(0, 28), (8, 1), (12, 1), (16, 0), (20, 1), (24, 2)] {
        control.0[at..at + 4].copy_from_slice(&i32::to_le_bytes(word));
    }
    let message = Message {
        name: std::ptr::null_mut(),
        name_len: 0,
        parts: &raw mut part,
        part_count: 1,
        control: (&raw mut control).cast(),
        control_len: 32,
        flags: 0,
    };
    // SAFETY: all of it lives for longer than the call.
    let sent = unsafe { sendmsg(stream.as_raw_fd(), &raw const message, 0) };
    assert_eq!(sent, 16);
}

fn shuffled(pages: std::ops::Range<usize>, seed: u64) -> Vec<usize> {
    let mut pages: Vec<usize> = pages.collect();
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    for last in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.swap(last, (state % (last as u64 + 1)) as usize);
    }
    pages
}

/// The guest: two processors, each with half of the memory.
fn guest(vm: &Vm, what: &str, seed: u64) {
    std::thread::scope(|scope| {
        for cpu in 0..2 {
            scope.spawn(move || {
                let half = cpu * PAGES / 2..(cpu + 1) * PAGES / 2;
                let pages = shuffled(half, seed + cpu as u64);
                for page in &pages {
                    assert!(vm.read(*page) == expected(*page), "page {page}");
                    if page.is_multiple_of(3) {
                        vm.write(*page, *page as u8);
                    }
                    if page % 3 == 1 && what == "balloon" {
                        vm.punch(*page);
                        if page.is_multiple_of(2) {
                            assert!(vm.read(*page) == [0; PAGE], "page {page} is back");
                        }
                    }
                    if what == "slow" {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                // What it wrote stays, whatever has been put in place since.
                for page in &pages {
                    let right = match page % 3 {
                        0 => [*page as u8; PAGE],
                        1 if what == "balloon" => [0; PAGE],
                        _ => expected(*page),
                    };
                    assert!(vm.read(*page) == right, "page {page} later");
                }
            });
        }
    });
}

/// Asks for what nobody should ask for. It is ended for it, and never sees an answer.
fn ask_what_is_not_there(vm: &Vm, faults: &mut UnixStream, what: &str) {
    let bytes = match what {
        "outside" => question(3 << 30, PAGE as u64),
        "odd" => question(0x1000, 100),
        "huge" => question(0, 1 << 62),
        "garbage" => vec![0xff; 32],
        "occupied" => {
            let page = (0..PAGES).find(|page| expected(*page)[8] != 0).unwrap();
            let (slot, inside) = vm.place(page);
            let offset = (slot.offset + inside * PAGE) as i64;
            // A page of zeroes, by the file.
            // SAFETY: no pointers.
            assert_eq!(unsafe { fallocate(slot.file, 0, offset, PAGE as i64) }, 0);
            question(vm.gpa(page), PAGE as u64)
        }
        _ => {
            // Nobody reads the answers.
            let one = question(0, PAGE as u64);
            loop {
                if faults.write_all(&one).is_err() {
                    std::thread::sleep(Duration::from_secs(60));
                    return;
                }
            }
        }
    };
    faults.write_all(&bytes).unwrap();
    std::thread::sleep(Duration::from_secs(60));
    println!("it was not ended");
}

fn answer(stream: &mut UnixStream, what: &str, command: u16) {
    let refused = matches!((what, command), ("refuse", 2) | ("state", 3));
    match what {
        _ if refused => {
            stream.write_all(&request(2, 0)).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            println!("refused");
            std::process::exit(0);
        }
        "silent" if command == 2 => {
            std::thread::sleep(Duration::from_secs(2));
            std::process::exit(0);
        }
        "strange" if command == 2 => {
            stream.write_all(&request(9, 1 << 60)).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            std::process::exit(0);
        }
        "half" if command == 2 => {
            stream.write_all(&[1, 0, 0]).unwrap();
            std::process::exit(0);
        }
        "fds" => answer_with_descriptors(stream),
        _ => stream.write_all(&request(1, 0)).unwrap(),
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, form, what, seed] = args.as_slice() else {
        panic!("cloud_listener SOCKET FORM WHAT SEED");
    };
    let seed: u64 = seed.parse().unwrap();
    // A test that fails must not wait for ever.
    // SAFETY: no pointers.
    unsafe { alarm(120) };
    let listener = UnixListener::bind(socket).unwrap();
    println!("listening");
    std::io::stdout().flush().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(hear(&mut stream), (1, Vec::new()));
    answer(&mut stream, what, 1);
    let mut files = Vec::new();
    let config = loop {
        match hear(&mut stream) {
            (7, _) => {
                files.push(file(&stream));
                answer(&mut stream, what, 7);
            }
            (2, config) => break config,
            other => panic!("{other:?}"),
        }
    };
    let config = String::from_utf8(config).unwrap();
    assert!(config.contains("\"guest_ram_mappings\":["), "{config}");
    let unit = if form.ends_with("-huge") { 512 } else { 1 };
    let mut vm = Vm::new(&files, form.starts_with("continue"), unit);
    // From here on others may connect.
    answer(&mut stream, what, 2);
    let (mut faults, _) = listener.accept().unwrap();
    faults
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let mut role = [0; 2];
    faults.read_exact(&mut role).unwrap();
    assert_eq!(role, [2, 0]);
    let (command, state) = hear(&mut stream);
    assert_eq!(command, 3);
    assert_eq!(state, b"{\"id\":\"\",\"snapshots\":{}}");
    vm.register();
    let (vm, asked, over) = (&vm, &AtomicUsize::new(0), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (what, odd) = (
            what.as_str(),
            ["outside", "odd", "huge", "garbage", "occupied", "flood"],
        );
        if odd.contains(&what) {
            answer(&mut stream, what, 3);
            let (command, _) = hear(&mut stream);
            answer(&mut stream, what, command);
            return ask_what_is_not_there(vm, &mut faults, what);
        }
        scope.spawn(move || {
            vm.handle(&mut faults, what, asked);
            over.store(true, Ordering::Release);
            if matches!(what, "leave" | "abandon") {
                drop(faults);
                std::thread::sleep(Duration::from_secs(60));
                println!("it was not ended");
            }
        });
        // Devices read memory while they are restored.
        assert!(vm.read(PAGES - 1) == expected(PAGES - 1));
        answer(&mut stream, what, 3);
        let (command, _) = hear(&mut stream);
        assert_eq!(command, if what == "paused" { 8 } else { 5 });
        answer(&mut stream, what, command);
        drop(stream);
        if what == "slow" {
            println!("ready");
            std::io::stdout().flush().unwrap();
        }
        guest(vm, what, seed);
        while !over.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    println!("done after {} questions", asked.load(Ordering::Acquire));
}
