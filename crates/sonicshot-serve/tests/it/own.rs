//! Memory of this process.
#![expect(unsafe_code, reason = "guest memory is a mapping here")]

use crate::guest::{PAGE, PAGES, REGIONS, expected, layout, open, save};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use sonicshot::checkpoint::{CheckpointError, Compression};
use sonicshot::{Gpa, GpaRange, RamLayout};
use sonicshot_serve::{
    CheckpointSource, Content, Metrics, PageSet, PageSource, Piece, Prefetch, Registered, Run,
    ServeError, Uffd, Vm, VmOptions, VmRegion,
};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const HUGE: usize = 2 << 20;

/// Fresh memory, registered.
pub struct Memory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: no page is used by two threads at a time.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(len: usize, huge: bool) -> Self {
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if huge {
            flags |= MapFlags::HUGETLB;
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, flags) };
        let start = NonNull::new(start.unwrap().cast()).unwrap();
        Self { start, len }
    }

    pub fn register(&self) -> (Uffd, Registered) {
        let uffd = Uffd::new().unwrap();
        let began = Instant::now();
        loop {
            // SAFETY: nobody has touched it, and who will can wait.
            match unsafe { uffd.register(self.start, self.len) } {
                // A process that another test has just started has the one before until it runs its
                // program.
                Err(ServeError::Uffd { source, .. })
                    if source.kind() == std::io::ErrorKind::ResourceBusy
                        && began.elapsed() < Duration::from_secs(20) =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                registered => return (uffd, registered.unwrap()),
            }
        }
    }

    fn at(&self, page: usize) -> NonNull<u8> {
        assert!(page * PAGE < self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(page * PAGE) }
    }

    pub fn read(&self, page: usize) -> [u8; PAGE] {
        // SAFETY: mapped, and not written meanwhile.
        unsafe { self.at(page).cast::<[u8; PAGE]>().read_volatile() }
    }

    fn write(&self, page: usize, byte: u8) {
        // SAFETY: as above.
        unsafe {
            self.at(page)
                .cast::<[u8; PAGE]>()
                .write_volatile([byte; PAGE]);
        };
    }

    fn remove(&self, page: usize, count: usize) {
        let (at, len) = (self.at(page).as_ptr().cast(), count * PAGE);
        // SAFETY: pages of the mapping, to which there are no references.
        unsafe { madvise(at, len, Advice::LinuxDontNeed) }.unwrap();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference.
        unsafe { munmap(self.start.as_ptr().cast(), self.len) }.unwrap();
    }
}

/// The guest's two regions, one behind the other.
pub fn regions(memory: &Registered, page: usize) -> Vec<VmRegion> {
    let mut offset = 0;
    let mut out = Vec::new();
    for (start, pages) in REGIONS {
        let len = (pages * PAGE) as u64;
        let guest = GpaRange::with_len(Gpa::new(start), len).unwrap();
        out.push(VmRegion::new(memory, offset, guest, page as u64).unwrap());
        offset += len;
    }
    out
}

fn options(prefetch: Prefetch, around: u64, metrics: &Arc<Metrics>) -> VmOptions {
    let mut options = VmOptions::default();
    options.prefetch = prefetch;
    options.around = around;
    options.metrics = Arc::clone(metrics);
    options
}

fn source(compression: Compression, metrics: &Arc<Metrics>) -> Arc<dyn PageSource> {
    let file = save(compression);
    Arc::new(CheckpointSource::new(
        open(&file),
        1 << 20,
        Arc::clone(metrics),
    ))
}

fn check(memory: &Memory) {
    std::thread::scope(|scope| {
        for thread in 0..3 {
            scope.spawn(move || {
                for step in 0..PAGES {
                    let page = (step * 1021 + thread * 1000) % PAGES;
                    assert!(memory.read(page) == expected(page), "page {page}");
                }
            });
        }
    });
}

#[test]
fn a_guest_finds_its_memory() {
    for compression in [Compression::None, Compression::Lz4, Compression::ZSTD] {
        for (prefetch, around) in [
            (Prefetch::Nothing, 0),
            (Prefetch::Nothing, 64 << 10),
            (Prefetch::Everything, 0),
        ] {
            let metrics = Arc::new(Metrics::default());
            let memory = Memory::new(PAGES * PAGE, false);
            let (uffd, registered) = memory.register();
            let source = source(compression, &metrics);
            let options = options(prefetch, around, &metrics);
            let vm = Vm::start(source, uffd, &regions(&registered, PAGE), options).unwrap();
            check(&memory);
            if prefetch == Prefetch::Nothing && around == 0 {
                assert_eq!(metrics.prefetched_bytes(), 0);
            }
            if around > 0 {
                assert!(
                    metrics.faults() < PAGES as u64 * 2 / 3,
                    "{}",
                    metrics.faults()
                );
            }
            vm.finish().unwrap();
            if prefetch == Prefetch::Nothing && around == 0 {
                assert!(metrics.faults() >= PAGES as u64);
            }
            check(&memory);
        }
    }
}

#[test]
fn a_set_is_there_before_it_is_asked_for() {
    let metrics = Arc::new(Metrics::default());
    let memory = Memory::new(PAGES * PAGE, false);
    let (uffd, registered) = memory.register();
    let mut options = options(Prefetch::Set, 0, &metrics);
    // Ranges with kept, free and zero pages, over both regions.
    let range = |first: usize, end: usize, base: u64| {
        GpaRange::new(
            Gpa::new(base + (first * PAGE) as u64),
            Gpa::new(base + (end * PAGE) as u64),
        )
    };
    let set = PageSet::from_ranges(vec![range(10, 200, 0), range(0, 94, 4 << 30)]);
    options.set = Arc::new(set);
    let source = source(Compression::Lz4, &metrics);
    let vm = Vm::start(source, uffd, &regions(&registered, PAGE), options).unwrap();
    let start = Instant::now();
    let kept = (10..200).chain(1024..1118);
    let kept = kept.filter(|page| expected(*page) != [0; PAGE]).count() as u64;
    while metrics.prefetched_bytes() < kept * PAGE as u64 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    // Zeroes are put in place too, in order: the last page is kept.
    assert!(expected(1117) != [0; PAGE]);
    for page in (10..200).chain(1024..1118) {
        assert!(memory.read(page) == expected(page), "page {page}");
    }
    assert_eq!(metrics.faults(), 0);
    assert!(memory.read(5) == expected(5));
    // It is counted behind the guest's back.
    while metrics.faults() == 0 {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    assert_eq!(metrics.prefetched_bytes(), kept * PAGE as u64);
    drop(vm);
}

/// Whether so much memory can be had in pages of 2 MiB.
fn huge_pages(count: usize) -> bool {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = free.ok().and_then(|free| free.trim().parse::<usize>().ok());
    free.is_some_and(|free| free >= count)
}

#[test]
fn huge_pages_are_put_together_and_given_back() {
    let need = PAGES * PAGE / HUGE;
    if !sonicshot_testkit::has("six free huge pages of 2 MiB", huge_pages(need)) {
        return;
    }
    for prefetch in [Prefetch::Nothing, Prefetch::Everything] {
        let metrics = Arc::new(Metrics::default());
        let memory = Memory::new(PAGES * PAGE, true);
        let (uffd, registered) = memory.register();
        let source = source(Compression::Lz4, &metrics);
        // What was said of small pages is noticed.
        let wrong = Uffd::new().unwrap();
        let small = Vm::start(
            Arc::clone(&source),
            wrong,
            &regions(&registered, PAGE),
            VmOptions::default(),
        );
        assert!(small.is_err());
        // And of larger ones.
        let wide = Memory::new(4 * HUGE, true);
        let start = wide.start.as_ptr().addr();
        let offset = start.next_multiple_of(2 * HUGE) - start;
        let guest = GpaRange::with_len(Gpa::ZERO, 2 * HUGE as u64).unwrap();
        let (own, all) = wide.register();
        let region = VmRegion::new(&all, offset as u64, guest, 2 * HUGE as u64).unwrap();
        let large = Vm::start(Arc::clone(&source), own, &[region], VmOptions::default());
        let error = large.map(drop).unwrap_err();
        assert!(matches!(error, ServeError::PageKind { .. }), "{error:?}");
        let options = options(prefetch, 0, &metrics);
        let vm = Vm::start(source, uffd, &regions(&registered, HUGE), options).unwrap();
        // One that the source has, and one that is gone before it is touched.
        assert!(memory.read(700) == expected(700));
        memory.remove(512, 512);
        memory.remove(1024, 512);
        for page in 0..PAGES {
            let right = if (512..1536).contains(&page) {
                [0; PAGE]
            } else {
                expected(page)
            };
            assert!(memory.read(page) == right, "page {page}");
        }
        vm.finish().unwrap();
    }
}

/// Pages that say which they are, from a source that takes its time, at random.
struct Numbered {
    layout: RamLayout,
    state: AtomicU64,
}

const ROUND_PAGES: usize = 512;

fn numbered(page: usize) -> [u8; PAGE] {
    [page as u8 | 1; PAGE]
}

impl Numbered {
    fn random(&self) -> u64 {
        let next = self
            .state
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let z = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 31)
    }
}

impl PageSource for Numbered {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        // Four pages at once.
        let start = Gpa::new(at.raw() & !0x3fff);
        let range = GpaRange::with_len(start, 0x4000).unwrap();
        let content = Content::Bytes;
        Ok(Run { range, content })
    }

    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
        buffer.clear();
        for page in range.start().raw() / 4096..range.end().raw() / 4096 {
            buffer.extend(numbered(page as usize));
        }
        match self.random() % 8 {
            0 => std::thread::yield_now(),
            1 => std::thread::sleep(Duration::from_micros(30)),
            _ => {}
        }
        Ok(Piece::Own(buffer))
    }

    fn by_need(&self) -> Arc<[GpaRange]> {
        self.layout.regions().into()
    }
}

/// Prefetch races removes, writes and reads: 10,000 rounds, each of a random range of pages.
#[test]
fn what_was_given_back_never_comes_again() {
    const MACHINES: u64 = 100;
    const ROUNDS: usize = 50;
    let layout = GpaRange::with_len(Gpa::ZERO, (ROUND_PAGES * PAGE) as u64).unwrap();
    let removed = AtomicU64::new(0);
    let mut raced = 0;
    for machine in 0..MACHINES {
        let memory = Memory::new(ROUND_PAGES * PAGE, false);
        let (uffd, registered) = memory.register();
        let source = Arc::new(Numbered {
            layout: RamLayout::new(vec![layout]).unwrap(),
            state: AtomicU64::new(machine * 1_000_003),
        });
        let metrics = Arc::new(Metrics::default());
        let around = if machine.is_multiple_of(2) {
            64 << 10
        } else {
            0
        };
        let options = options(Prefetch::Everything, around, &metrics);
        let region = VmRegion::new(&registered, 0, layout, PAGE as u64).unwrap();
        let vm = Vm::start(Arc::clone(&source) as _, uffd, &[region], options).unwrap();
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (memory, source, removed) = (&memory, &source, &removed);
                scope.spawn(move || half_of(memory, source, half, ROUNDS, removed));
            }
        });
        vm.finish().unwrap();
        raced += u64::from(metrics.removed_bytes() > 0);
    }
    // In others all was in place before the first was given back.
    assert!(raced > MACHINES / 4, "{raced}");
    assert!(removed.load(Ordering::Relaxed) > MACHINES * ROUNDS as u64 / 2);
}

/// Works on one half of the memory, and knows what must be in it.
fn half_of(memory: &Memory, source: &Numbered, half: usize, rounds: usize, removed: &AtomicU64) {
    let base = half * ROUND_PAGES / 2;
    let mut model: Vec<Option<u8>> = vec![None; ROUND_PAGES / 2];
    for round in 0..rounds {
        let random = source.random();
        let first = random as usize % (model.len() - 8);
        let count = 1 + (random >> 32) as usize % 8;
        if random >> 40 & 1 == 0 {
            memory.remove(base + first, count);
            model[first..first + count].fill(Some(0));
            removed.fetch_add(1, Ordering::Relaxed);
        } else if random >> 41 & 1 == 0 {
            memory.write(base + first, round as u8);
            model[first] = Some(round as u8);
        }
        for (page, model) in model.iter().enumerate().skip(first).take(count) {
            let right = model.map_or(numbered(base + page), |byte| [byte; PAGE]);
            let found = memory.read(base + page);
            assert!(found == right, "page {page}: {} {model:?}", found[0]);
        }
    }
    for (page, model) in model.iter().enumerate() {
        let right = model.map_or(numbered(base + page), |byte| [byte; PAGE]);
        assert!(memory.read(base + page) == right, "page {page} at the end");
    }
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let metrics = Arc::new(Metrics::default());
    let source = source(Compression::None, &metrics);
    let memory = Memory::new(PAGES * PAGE, false);
    let (own, registered) = memory.register();
    let good = regions(&registered, PAGE);
    drop(own);
    let start = |regions: &[VmRegion]| {
        let (uffd, _) = memory.register();
        let vm = Vm::start(Arc::clone(&source), uffd, regions, VmOptions::default());
        vm.map(drop).unwrap_err()
    };
    let page = |at: u64| GpaRange::with_len(Gpa::new(at), PAGE as u64).unwrap();
    let region = |offset, guest, page| VmRegion::new(&registered, offset, guest, page).unwrap();
    let outside = start(&[region(0, page(5 << 30), PAGE as u64)]);
    assert!(matches!(outside, ServeError::NotInLayout { .. }));
    // Nothing is there.
    let nothing = NonNull::new(core::ptr::without_provenance_mut(1 << 20)).unwrap();
    // SAFETY: no memory: nobody has it, and nobody touches it.
    let unmapped = unsafe { Uffd::new().unwrap().register(nothing, PAGE) }.unwrap_err();
    assert!(matches!(
        unmapped,
        ServeError::Uffd {
            operation: "UFFDIO_REGISTER",
            ..
        }
    ));
    for offset in [registered.len(), registered.len() - 1, u64::MAX] {
        let behind = VmRegion::new(&registered, offset, page(0), PAGE as u64).unwrap_err();
        assert!(matches!(behind, ServeError::NotRegistered { .. }));
    }
    let second = good[1].guest();
    let twice = start(&[good[0], region(0, second, PAGE as u64)]);
    assert!(matches!(
        twice,
        ServeError::Overlap {
            in_guest: false,
            ..
        }
    ));
    let odd = start(&[good[0], region(good[0].guest().len(), second, 3 << 12)]);
    assert!(matches!(odd, ServeError::PageSize { .. }));
    assert_eq!(layout().regions().len(), 2);
}

/// A source with an error of its own: nobody waits for ever for what its thread was to do.
#[test]
fn a_thread_that_fails_is_told() {
    struct Broken(RamLayout);
    impl PageSource for Broken {
        fn layout(&self) -> &RamLayout {
            &self.0
        }
        fn run_at(&self, _: Gpa) -> Result<Run, ServeError> {
            panic!("a source that is broken, for a test")
        }
        fn read<'b>(&self, range: GpaRange, _: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
            let at = range.start();
            Err(ServeError::NotInSnapshot { at })
        }
        fn by_need(&self) -> Arc<[GpaRange]> {
            self.0.regions().into()
        }
    }
    let memory = Memory::new(PAGES * PAGE, false);
    let (uffd, registered) = memory.register();
    let source = Arc::new(Broken(layout()));
    let vm = Vm::start(
        source,
        uffd,
        &regions(&registered, PAGE),
        VmOptions::default(),
    );
    let error = vm.unwrap().finish().unwrap_err();
    assert!(matches!(*error, ServeError::Thread), "{error:?}");
}

/// A guest cannot run without pages that it uses: what lacks them is served only to who says that
/// he knows.
#[test]
fn a_checkpoint_for_analysis_is_not_run_unawares() {
    struct Lacking(Arc<dyn PageSource>);
    impl PageSource for Lacking {
        fn layout(&self) -> &RamLayout {
            self.0.layout()
        }
        fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
            self.0.run_at(at)
        }
        fn read<'b>(&self, at: GpaRange, to: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
            self.0.read(at, to)
        }
        fn by_need(&self) -> Arc<[GpaRange]> {
            self.0.by_need()
        }
        fn is_for_analysis(&self) -> bool {
            true
        }
    }
    let metrics = Arc::new(Metrics::default());
    for known in [false, true] {
        let memory = Memory::new(PAGES * PAGE, false);
        let source = Arc::new(Lacking(source(Compression::None, &metrics)));
        let mut options = options(Prefetch::Nothing, 0, &metrics);
        options.for_analysis = known;
        let (uffd, registered) = memory.register();
        match Vm::start(source, uffd, &regions(&registered, PAGE), options) {
            Ok(vm) => assert!(known && vm.finish().is_ok()),
            Err(error) => {
                let told = ServeError::Checkpoint(CheckpointError::CannotRun).to_string();
                assert!(!known && error.to_string() == told, "{error}");
            }
        }
    }
}

/// A reader of memory that is not registered yet gets zeroes where the guest's bytes belong: that is
/// told, whichever way the page comes in.
#[test]
fn a_page_that_was_there_before_is_told() {
    const TOUCHED: usize = 3;
    let metrics = Arc::new(Metrics::default());
    for prefetch in [Prefetch::Nothing, Prefetch::Everything] {
        let memory = Memory::new(PAGES * PAGE, false);
        assert_ne!(expected(TOUCHED), [0; PAGE]);
        memory.write(TOUCHED, 0);
        let (uffd, registered) = memory.register();
        let source = source(Compression::None, &metrics);
        let options = options(prefetch, 0, &metrics);
        let vm = Vm::start(source, uffd, &regions(&registered, PAGE), options).unwrap();
        let error = vm.finish().unwrap_err();
        let told = matches!(*error, ServeError::Occupied { gpa, .. }
            if gpa == Gpa::new((TOUCHED * PAGE) as u64));
        assert!(told, "{error}");
    }
}
