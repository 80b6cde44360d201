//! Lazy restore against the real kernel: what a guest touches is what was saved.
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use sonicshot::checkpoint::*;
use sonicshot::*;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const PAGES: usize = 2000;

/// A page's first byte says what kind it is.
fn ram() -> Vec<u8> {
    let mut ram = vec![0; PAGES * PAGE];
    for (number, page) in ram.chunks_mut(PAGE).enumerate() {
        match number % 7 {
            0 | 1 | 5 => {
                for (at, byte) in page.iter_mut().enumerate() {
                    *byte = (number * 31 + at * 7 + at / 256) as u8;
                }
            }
            2 => page.fill(0x11),
            3 => page.fill(0xee), // garbage in a free page
            4 => page[17] = 9,    // the same page again and again
            _ => {}
        }
    }
    ram
}

fn classes(layout: &RamLayout) -> PageMap {
    let mut map = PageMap::new(layout, PageSize::SIZE_4K);
    for number in (0..PAGES as u64).filter(|n| n % 7 == 3) {
        map.set(
            PfnRange::with_len(Pfn::new(number), 1).unwrap(),
            PageClass::FreeBuddy,
        );
    }
    map
}

fn checkpoint(compression: Compression, fill: Fill) -> (Vec<u8>, Vec<u8>) {
    let mut ram = ram();
    let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
    let map = classes(guest.layout());
    let plan = PrunePlan::new(&map, &DropClasses::default(), fill);
    let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let mut writer =
        CheckpointWriter::new(Vec::new(), info, SaveOptions::new(compression)).unwrap();
    writer.memory(&guest, &map, &plan, &mut |_, _| {}).unwrap();
    let (file, stats) = writer.finish().unwrap();
    assert!(stats.duplicate > 0 && stats.free > 0 && stats.fill > 0 && stats.zero > 0);
    drop(guest);
    for page in ram.chunks_mut(PAGE).skip(3).step_by(7) {
        page.fill(match fill {
            Fill::Byte(byte) => byte,
            _ => 0,
        });
    }
    (file, ram)
}

struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping stays where it is; the tests touch it by address from several threads.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Self {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping touches nobody's memory.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags) }.unwrap();
        let start = NonNull::new(start.cast()).unwrap();
        Self { start, len }
    }

    fn byte(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.as_ptr().add(at).read_volatile() }
    }

    fn page(&self, number: usize) -> Vec<u8> {
        (0..PAGE).map(|at| self.byte(number * PAGE + at)).collect()
    }

    fn forget(&self, pages: std::ops::Range<usize>) {
        let len = (pages.end - pages.start) * PAGE;
        // SAFETY: inside the mapping; its bytes are given up on purpose.
        unsafe {
            let at = self.start.as_ptr().add(pages.start * PAGE);
            madvise(at.cast(), len, Advice::LinuxDontNeed).unwrap();
        }
    }

    /// Bytes that take memory, by the kernel's own page map.
    fn resident(&self) -> usize {
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; self.len / PAGE * 8];
        let at = (self.start.as_ptr() as u64 / PAGE as u64) * 8;
        map.read_exact_at(&mut entries, at).unwrap();
        // Bit 63 of each entry: present.
        entries
            .iter()
            .skip(7)
            .step_by(8)
            .filter(|byte| **byte & 0x80 != 0)
            .count()
            * PAGE
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody uses any more.
        unsafe { munmap(self.start.as_ptr().cast(), self.len).unwrap() };
    }
}

fn start(file: Vec<u8>, memory: &Memory, options: LazyOptions) -> LazyRestore {
    let checkpoint = Arc::new(CheckpointReader::new(file).unwrap());
    let uffd = Uffd::new().unwrap();
    // SAFETY: the memory is mapped, and only the tests' threads touch it.
    unsafe { uffd.register(memory.start, memory.len) }.unwrap();
    let region = LazyRegion {
        guest: GpaRange::with_len(Gpa::ZERO, memory.len as u64).unwrap(),
        host: HostAddress::new(memory.start.as_ptr() as usize),
        page: 4096,
    };
    LazyRestore::start(checkpoint, uffd, vec![region], options).unwrap()
}

fn shuffled(count: usize, mut seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for at in (1..count).rev() {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        order.swap(at, (seed % (at as u64 + 1)) as usize);
    }
    order
}

fn codecs() -> Vec<Compression> {
    [Compression::None, Compression::Lz4, Compression::ZSTD]
        .into_iter()
        .filter(|codec| codec.is_available())
        .collect()
}

#[test]
fn threads_that_touch_pages_in_any_order_see_what_was_saved() {
    for compression in codecs() {
        for (prefetch, around, handlers) in [
            (Prefetch::Nothing, 0, 1),
            (Prefetch::Nothing, 65536, 3),
            (Prefetch::Everything, 16384, 2),
        ] {
            for fill in [Fill::Zero, Fill::Byte(0xaa)] {
                let (file, expected) = checkpoint(compression, fill);
                let memory = Memory::new(expected.len());
                let mut options = LazyOptions::default();
                options.prefetch = prefetch;
                options.around = around;
                options.threads = handlers.try_into().unwrap();
                let restore = start(file, &memory, options);
                std::thread::scope(|scope| {
                    for seed in 1..5 {
                        let (memory, expected) = (&memory, &expected);
                        scope.spawn(move || {
                            for number in shuffled(PAGES, seed) {
                                let saved = &expected[number * PAGE..][..PAGE];
                                assert!(memory.page(number) == saved, "page {number}");
                            }
                        });
                    }
                });
                assert!(restore.error().is_none());
                restore.finish().unwrap();
                assert!((0..PAGES).all(|n| memory.page(n) == expected[n * PAGE..][..PAGE]));
            }
        }
    }
}

#[test]
fn what_is_left_out_takes_no_memory_and_the_rest_comes_by_itself() {
    for compression in codecs() {
        let (file, expected) = checkpoint(compression, Fill::Zero);
        let memory = Memory::new(expected.len());
        let restore = start(file, &memory, LazyOptions::default());
        let begin = Instant::now();
        while !restore.is_complete() {
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{:?}",
                restore.stats()
            );
            std::thread::yield_now();
        }
        let stats = restore.finish().unwrap();
        let kept = expected
            .chunks(PAGE)
            .filter(|page| page.iter().any(|b| *b != 0))
            .count();
        assert_eq!(stats.faults, 0);
        assert_eq!(memory.resident(), kept * PAGE);
        assert!((0..PAGES).all(|n| memory.page(n) == expected[n * PAGE..][..PAGE]));
    }
}

#[test]
fn pages_that_are_given_back_are_zero_and_stay_so() {
    for prefetch in [Prefetch::Nothing, Prefetch::Everything] {
        for round in 0..20 {
            let (file, expected) = checkpoint(Compression::None, Fill::Zero);
            let memory = Memory::new(expected.len());
            let mut options = LazyOptions::default();
            options.prefetch = prefetch;
            options.threads = 2.try_into().unwrap();
            let restore = start(file, &memory, options);
            let gone = round * 50..round * 50 + 200;
            memory.byte(gone.start * PAGE);
            memory.forget(gone.clone());
            for number in shuffled(PAGES, 7) {
                let saved = &expected[number * PAGE..][..PAGE];
                if gone.contains(&number) {
                    assert!(
                        memory.page(number).iter().all(|byte| *byte == 0),
                        "{number}"
                    );
                } else {
                    assert!(memory.page(number) == saved, "{number}");
                }
            }
            restore.finish().unwrap();
            for number in gone {
                assert!(
                    memory.page(number).iter().all(|byte| *byte == 0),
                    "{number}"
                );
            }
        }
    }
}

#[test]
fn the_working_set_is_what_was_touched_and_comes_first() {
    let (file, expected) = checkpoint(Compression::None, Fill::Zero);
    let memory = Memory::new(expected.len());
    let mut options = LazyOptions::default();
    options.prefetch = Prefetch::Nothing;
    options.around = 0;
    let restore = start(file.clone(), &memory, options.clone());
    let touched = [5_usize, 7, 8, 700, 1400];
    for number in touched {
        memory.byte(number * PAGE);
    }
    let set = restore.touched();
    let expected_set: WorkingSet = touched.iter().map(|n| Pfn::new(*n as u64)).collect();
    assert_eq!(set, expected_set);
    restore.finish().unwrap();

    let memory = Memory::new(expected.len());
    options.prefetch = Prefetch::WorkingSet;
    options.working_set = WorkingSet::from_bytes(&set.to_bytes()).unwrap();
    let restore = start(file, &memory, options);
    let begin = Instant::now();
    while restore.stats().prefetched_bytes < (touched.len() * PAGE) as u64 {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::yield_now();
    }
    assert_eq!(memory.resident(), touched.len() * PAGE);
    for number in touched {
        assert!(memory.page(number) == expected[number * PAGE..][..PAGE]);
    }
    assert_eq!(restore.stats().faults, 0);
    restore.finish().unwrap();
}

#[test]
fn damage_is_told_and_nobody_gets_to_see_it() {
    let (mut file, expected) = checkpoint(Compression::None, Fill::Zero);
    // The first chunk's first byte.
    file[4096] ^= 1;
    let memory = Memory::new(expected.len());
    let restore = start(file, &memory, LazyOptions::default());
    let error = restore.finish().unwrap_err();
    assert!(
        matches!(*error, CheckpointError::Checksum { offset: 4096, .. }),
        "{error}"
    );
    assert_eq!(memory.resident(), 0);
    // Touching the page would end or stop this thread, for it is not restored.
    std::mem::forget(memory);
}

#[test]
fn sets_that_are_none_are_refused() {
    for bytes in [&[0_u8; 15][..], &[0; 16], &[1; 32], &[0xff; 16]] {
        assert_eq!(WorkingSet::from_bytes(bytes), None);
    }
}
