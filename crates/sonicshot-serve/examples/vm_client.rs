//! A virtual machine's side of the protocols, for the tests and for whoever writes another: it
//! uses nothing but the C library, and shares no code with the server.
//!
//! ```console
//! $ vm_client SOCKET FORM PAGE WHAT SEED
//! ```
//!
//! FORM is `1.1`, `1.7`, `1.12` (Firecracker's versions), `twice` (the same with two descriptors,
//! which nobody serves), `stratovirt`, `own` or `again` (the same, by two connections); PAGE is
//! `4096` or `2097152`; WHAT is what it does: `check` (touch all of its memory and compare),
//! `removes` (give pages back meanwhile), `wear` (the same for some seconds), `wait` (say `ready`
//! and sleep), `block` (make its descriptor sleep, then `check`), `bad` (touch the page SEED, which
//! may not be had), `touch` (let go of its descriptor and touch page after page, slowly).
//!
//! The guest has two regions of RAM: `REGIONS`. What is in it is `expected`.
#![expect(unsafe_code, reason = "guest memory is a mapping here")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test's program may stop anywhere"
)]

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

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
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn fcntl(fd: c_int, what: c_int, ...) -> c_int;
    fn close(fd: c_int) -> c_int;
    fn sendmsg(fd: c_int, message: *const Message, flags: c_int) -> isize;
}

#[repr(C)]
struct Part {
    start: *const c_void,
    len: usize,
}

#[repr(C)]
struct Message {
    name: *const c_void,
    name_len: u32,
    parts: *const Part,
    part_count: usize,
    control: *const c_void,
    control_len: usize,
    flags: c_int,
}

/// The longest that a read of a page took, in microseconds.
static LONGEST: AtomicU64 = AtomicU64::new(0);

const PAGE: usize = 4096;
/// The start of RAM and the number of its pages: both are whole pages of 2 MiB.
const REGIONS: [(u64, usize); 2] = [(0, 1024), (4 << 30, 2048)];
const PAGES: usize = REGIONS[0].1 + REGIONS[1].1;

/// Most pages are kept; every fifth range is free, every seventh zero.
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

struct Vm {
    start: *mut u8,
    huge: usize,
    uffd: c_int,
}

// SAFETY: no page is used by two threads at a time.
unsafe impl Sync for Vm {}

impl Vm {
    /// Empty memory, as a VMM has it that restores a snapshot.
    fn new(huge: usize, features: u64) -> Self {
        const USERFAULTFD: c_long = if cfg!(target_arch = "aarch64") {
            282
        } else {
            323
        };
        let flags = 0x4022 | if huge > PAGE { 0x40000 } else { 0 };
        // SAFETY: a new mapping.
        let start = unsafe { mmap(std::ptr::null_mut(), PAGES * PAGE, 3, flags, -1, 0) };
        assert_ne!(
            start as isize,
            -1,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        // O_CLOEXEC and O_NONBLOCK; who is not root gets one for the faults of his own code.
        let flags = 0o2_004_000;
        // SAFETY: a new descriptor.
        let open = |flags: c_int| unsafe { syscall(USERFAULTFD, flags) } as c_int;
        let mut uffd = open(flags);
        if uffd < 0 {
            uffd = open(flags | 1);
        }
        assert!(
            uffd >= 0,
            "userfaultfd: {}",
            std::io::Error::last_os_error()
        );
        let vm = Self {
            start: start.cast(),
            huge,
            uffd,
        };
        let mut api = [0xaa_u64, features, 0];
        vm.call(0xc018_aa3f, &mut api);
        for (region, (_, pages)) in REGIONS.iter().enumerate() {
            let mut register = [vm.region(region) as u64, (pages * PAGE) as u64, 1, 0];
            vm.call(0xc020_aa00, &mut register);
        }
        vm
    }

    fn call<const N: usize>(&self, request: c_ulong, argument: &mut [u64; N]) {
        // SAFETY: the requests' structures are of so many words.
        let result = unsafe { ioctl(self.uffd, request, argument.as_mut_ptr()) };
        assert_eq!(result, 0, "ioctl: {}", std::io::Error::last_os_error());
    }

    /// The regions lie in the wrong order.
    fn region(&self, region: usize) -> *mut u8 {
        let offset = [REGIONS[1].1 * PAGE, 0][region];
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset) }
    }

    fn page(&self, page: usize) -> *mut u8 {
        assert!(page < PAGES);
        let low = REGIONS[0].1;
        // SAFETY: inside the region.
        unsafe {
            match page.checked_sub(low) {
                Some(page) => self.region(1).add(page * PAGE),
                None => self.region(0).add(page * PAGE),
            }
        }
    }

    fn read(&self, page: usize) -> [u8; PAGE] {
        let start = std::time::Instant::now();
        // SAFETY: mapped, and not written meanwhile.
        let bytes = unsafe { self.page(page).cast::<[u8; PAGE]>().read_volatile() };
        let took = start.elapsed().as_micros() as u64;
        LONGEST.fetch_max(took, Ordering::Relaxed);
        bytes
    }

    fn write(&self, page: usize, byte: u8) {
        // SAFETY: as above.
        unsafe {
            self.page(page)
                .cast::<[u8; PAGE]>()
                .write_volatile([byte; PAGE]);
        };
    }

    fn remove(&self, page: usize) {
        // SAFETY: pages of the mapping, to which there are no references.
        let result = unsafe { madvise(self.page(page).cast(), self.huge, 4) };
        assert_eq!(result, 0, "madvise: {}", std::io::Error::last_os_error());
    }

    fn message(&self, form: &str) -> String {
        let mut offset = 0;
        let mut regions = Vec::new();
        for (number, (gpa, pages)) in REGIONS.iter().enumerate() {
            let (host, len, page) = (self.region(number) as u64, pages * PAGE, self.huge);
            let base = format!("\"base_host_virt_addr\":{host},\"size\":{len},\"offset\":{offset}");
            regions.push(match form {
                "1.1" => format!("{{{base}}}"),
                "1.7" | "twice" => format!("{{{base},\"page_size_kib\":{page}}}"),
                "1.12" => format!("{{{base},\"page_size\":{page},\"page_size_kib\":{page}}}"),
                "stratovirt" => format!("{{\"base-host-virt-addr\":{host},\"size\":{len},\"offset\":{offset},\"page-size\":{page}}}"),
                "own" | "again" => format!("{{\"host\":{host},\"len\":{len},\"gpa\":{gpa},\"page\":{page}}}"),
                other => panic!("no form {other}"),
            });
            offset += len;
        }
        let regions = regions.join(",");
        match form {
            "stratovirt" => format!("{{\"mappings\":[{regions}]}}"),
            "own" | "again" => format!("{{\"sonicshot\":1,\"regions\":[{regions}]}}"),
            _ => format!("[{regions}]"),
        }
    }

    /// Sends the message and the descriptor in one piece, or the descriptor twice.
    fn send(&self, stream: &UnixStream, text: &str, twice: bool) {
        #[repr(C)]
        struct Control {
            len: usize,
            level: c_int,
            kind: c_int,
            fd: c_int,
            /// The same again, or nothing.
            second: c_int,
        }
        // SOL_SOCKET, SCM_RIGHTS.
        let control = Control {
            len: if twice { 24 } else { 20 },
            level: 1,
            kind: 1,
            fd: self.uffd,
            second: self.uffd,
        };
        let part = Part {
            start: text.as_ptr().cast(),
            len: text.len(),
        };
        let message = Message {
            name: std::ptr::null(),
            name_len: 0,
            parts: &raw const part,
            part_count: 1,
            control: (&raw const control).cast(),
            control_len: size_of::<Control>(),
            flags: 0,
        };
        // SAFETY: all of it lives for longer than the call.
        let sent = unsafe { sendmsg(stream.as_raw_fd(), &raw const message, 0) };
        assert_eq!(
            sent,
            text.len() as isize,
            "sendmsg: {}",
            std::io::Error::last_os_error()
        );
    }

    fn check(&self, pages: &[usize], seed: u64) {
        std::thread::scope(|scope| {
            for thread in 1..=2 {
                scope.spawn(move || {
                    for page in shuffled(pages, seed + thread) {
                        assert!(self.read(page) == expected(page), "page {page}");
                    }
                });
            }
        });
    }

    /// Gives pages back and writes to them while others are read.
    fn removes(&self, seed: u64, rounds: u32) {
        let wide = self.huge / PAGE;
        let mut random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        // What each page has been written with, or `None` if it is as it was saved.
        let mut model: Vec<Option<u8>> = vec![None; PAGES];
        for round in 0..rounds {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = (random >> 20) as usize % PAGES;
            if random.is_multiple_of(4) {
                let first = page / wide * wide;
                self.remove(first);
                model[first..first + wide].fill(Some(0));
                // Some stay away, until they are touched by chance.
                if random & 0x100 != 0 {
                    continue;
                }
            } else if random % 4 == 1 {
                self.write(page, round as u8);
                model[page] = Some(round as u8);
            }
            let found = self.read(page);
            let right = match model[page] {
                Some(byte) => [byte; PAGE],
                None => expected(page),
            };
            assert!(
                found == right,
                "page {page} in round {round}, {:?}",
                model[page]
            );
        }
    }
}

fn shuffled(pages: &[usize], seed: u64) -> Vec<usize> {
    let mut pages = pages.to_vec();
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    for last in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.swap(last, (state % (last as u64 + 1)) as usize);
    }
    pages
}

/// The server's answer.
fn answer(stream: &mut UnixStream) -> String {
    let mut answer = [0; 4096];
    let got = stream.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..got]).into_owned()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, socket, form, page, what, seed] = args.as_slice() else {
        panic!("vm_client SOCKET FORM PAGE WHAT SEED");
    };
    let seed: u64 = seed.parse().unwrap();
    // Up to 1.11 Firecracker asks for EVENT_REMOVE only if it has a balloon.
    let without =
        matches!(form.as_str(), "1.1" | "1.7") && !matches!(what.as_str(), "removes" | "wear");
    let vm = Vm::new(page.parse().unwrap(), if without { 0 } else { 8 });
    let mut stream = UnixStream::connect(socket).unwrap();
    vm.send(&stream, &vm.message(form), form == "twice");
    if matches!(form.as_str(), "own" | "again") {
        assert_eq!(answer(&mut stream), "{\"ok\":true}\n");
    }
    if form == "again" {
        let mut second = UnixStream::connect(socket).unwrap();
        vm.send(&second, &vm.message(form), false);
        let answer = answer(&mut second);
        assert!(answer.contains("served already"), "{answer}");
    }
    // Up to 1.11 nothing is heard of Firecracker after its message.
    let stream = (!matches!(form.as_str(), "1.1" | "1.7" | "twice")).then_some(stream);
    let all: Vec<usize> = (0..PAGES).collect();
    let started = std::time::Instant::now();
    match what.as_str() {
        "check" => vm.check(&all, seed),
        "removes" => vm.removes(seed, 3000),
        "wear" => {
            println!("ready");
            std::io::stdout().flush().unwrap();
            vm.removes(seed, 200_000);
        }
        "wait" => {
            vm.check(&all[..64], seed);
            println!("ready");
            std::io::stdout().flush().unwrap();
            loop {
                std::thread::sleep(std::time::Duration::from_secs(1));
            }
        }
        "block" => {
            // F_SETFL: without O_NONBLOCK.
            // SAFETY: no pointers.
            assert_eq!(unsafe { fcntl(vm.uffd, 4, 0) }, 0);
            vm.check(&all, seed);
        }
        "touch" => {
            // SAFETY: nobody uses it any more.
            unsafe { close(vm.uffd) };
            println!("ready");
            std::io::stdout().flush().unwrap();
            for page in shuffled(&all, seed) {
                assert!(vm.read(page) == expected(page), "page {page}");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        "bad" => {
            println!("ready");
            std::io::stdout().flush().unwrap();
            let found = vm.read(seed as usize);
            println!("read {}", found[0]);
        }
        other => panic!("cannot {other}"),
    }
    drop(stream);
    let longest = LONGEST.load(Ordering::Relaxed);
    println!(
        "done in {} us, longest read {longest} us",
        started.elapsed().as_micros()
    );
}
