//! The costs of a page server's engine, as ratios to the barest handler there can be and to copying
//! memory, in CPU time of the process: over two cores the same fault costs 17 or 60 us by chance.
//!
//! ```console
//! $ cargo bench -p sonicshot-cli --bench serve
//! ```
#![expect(unsafe_code, reason = "guest memory is a mapping here")]
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "a bench says so by panicking"
)]

mod uffd;

use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, SaveOptions,
};
use sonicshot::{
    DropClasses, Fill, Gpa, GpaRange, GuestBytes, GuestMemory, MappedRegions, PageMap, PageSize,
    PrunePlan,
};
use sonicshot_serve::{CheckpointSource, PageSet, Prefetch, Uffd, Vm, VmOptions, VmRegion};
use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use uffd::{Fresh, PlainHandler, copy_ranges};

const PAGE: usize = 4096;
/// 256 MiB.
const PAGES: usize = 1 << 16;
/// Pages that are touched.
const TOUCHED: usize = 8000;
const ROUNDS: usize = 5;

/// Seconds that this process has had a processor.
fn cpu() -> f64 {
    // SAFETY: plain data that the call fills.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it lives for longer than the call.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// The costs of `work`: CPU and wall time, in seconds.
fn cost(work: impl FnOnce()) -> [f64; 2] {
    let (start, before) = (Instant::now(), cpu());
    work();
    [cpu() - before, start.elapsed().as_secs_f64()]
}

/// The least of several rounds of each, by turns.
fn by_turns<const N: usize>(mut kinds: [&mut dyn FnMut() -> [f64; 2]; N]) -> [[f64; 2]; N] {
    let mut best = [[f64::INFINITY; 2]; N];
    for _ in 0..ROUNDS {
        for (best, kind) in best.iter_mut().zip(&mut kinds) {
            let took = kind();
            *best = [best[0].min(took[0]), best[1].min(took[1])];
        }
    }
    best
}

fn line(what: &str, ours: [f64; 2], limit: [f64; 2], count: usize) {
    let each = |seconds: f64| seconds * 1e6 / count as f64;
    println!(
        "{what}: CPU {:.2} us ({:.2} of {:.2}), wall {:.2} us ({:.2} of {:.2})",
        each(ours[0]),
        ours[0] / limit[0],
        each(limit[0]),
        each(ours[1]),
        ours[1] / limit[1],
        each(limit[1]),
    );
}

fn word(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

fn ram() -> Vec<u8> {
    let mut ram = vec![0; PAGES * PAGE];
    for (number, page) in ram.chunks_exact_mut(PAGE).enumerate() {
        for (at, out) in page.chunks_exact_mut(8).enumerate() {
            // Half of it compresses.
            let value = if at.is_multiple_of(2) {
                number
            } else {
                number << 9 | at
            };
            out.copy_from_slice(&word(value as u64).to_le_bytes());
        }
    }
    ram
}

fn checkpoint(ram: &[u8], compression: Compression) -> File {
    let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let file = tempfile::tempfile().unwrap();
    let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let options = SaveOptions::new(compression);
    let mut writer = CheckpointWriter::new(file.try_clone().unwrap(), info, options).unwrap();
    writer.memory(&guest, &map, &plan).unwrap();
    writer.finish().unwrap();
    file
}

/// All of it fits: of a template that is warm, once it was read.
fn source(file: &File) -> Arc<CheckpointSource<File>> {
    let reader = CheckpointReader::new(file.try_clone().unwrap()).unwrap();
    Arc::new(CheckpointSource::new(reader, 1 << 30, Arc::default()))
}

/// A restore over fresh memory.
fn start(source: &Arc<CheckpointSource<File>>, memory: &Fresh, options: VmOptions) -> Vm {
    let uffd = Uffd::new().unwrap();
    // SAFETY: fresh memory, which only this thread touches.
    let registered = unsafe { uffd.register(memory.start(), memory.len()).unwrap() };
    let guest = GpaRange::with_len(Gpa::ZERO, memory.len() as u64).unwrap();
    let region = VmRegion::new(&registered, 0, guest, 4096).unwrap();
    Vm::start(Arc::clone(source) as _, uffd, &[region], options).unwrap()
}

fn options(prefetch: Prefetch, set: &Arc<PageSet>) -> VmOptions {
    let mut options = VmOptions::default();
    options.prefetch = prefetch;
    options.set = Arc::clone(set);
    options
}

/// Guests that are restored at once, each until it has its first pages.
const CLONES: usize = 25;
/// 512 MiB, of which 222 are kept.
const CLONE_PAGES: usize = 1 << 17;
const KEPT: usize = 222 * 256;
const FIRST: usize = 1000;

/// KiB of this process that no file has.
fn anonymous() -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"));
    let number = line.unwrap().trim().split(' ').next().unwrap();
    number.parse().unwrap()
}

/// A guest's first pages: all are read, a third is written.
fn work(memories: &[Fresh], pages: &[usize]) {
    for memory in memories {
        for (number, page) in pages.iter().enumerate() {
            memory.touch(page * PAGE);
            if number.is_multiple_of(3) {
                memory.write(page * PAGE);
            }
        }
    }
}

/// MiB that this process and those that it has started have read from disks.
fn from_disks() -> f64 {
    let of = |who| {
        // SAFETY: plain data that the call fills.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: it lives for longer than the call.
        unsafe { libc::getrusage(who, &raw mut usage) };
        usage.ru_inblock as f64 * 512.0 / f64::from(1 << 20)
    };
    of(libc::RUSAGE_SELF) + of(libc::RUSAGE_CHILDREN)
}

/// MiB that so many clones read from the disk if nothing of `file` is in memory.
fn cold(file: &File, run: impl FnOnce()) -> f64 {
    use std::os::fd::AsRawFd;
    file.sync_all().unwrap();
    // SAFETY: a hint, of a descriptor that is open.
    let dropped = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(dropped, 0);
    let before = from_disks();
    run();
    from_disks() - before
}

/// The cost of so many clones: CPU, wall time, and memory of their own, in KiB each.
fn clones(begin: impl FnOnce() -> Vec<Fresh>, pages: &[usize]) -> [f64; 3] {
    let before = anonymous();
    let mut memories = Vec::new();
    let [cpu, wall] = cost(|| {
        memories = begin();
        work(&memories, pages);
    });
    let own = anonymous().saturating_sub(before) as f64 / CLONES as f64;
    [cpu, wall, own]
}

fn children() -> f64 {
    // SAFETY: plain data that the call fills.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: it lives for longer than the call.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// A guest's memory, and the pages that it touches first. Kept pages are runs of 64, and the first
/// ones runs of ten in them.
fn template() -> (Vec<u8>, Vec<usize>) {
    let mut ram = vec![0; CLONE_PAGES * PAGE];
    let mut runs = Vec::new();
    for (page, bytes) in ram.chunks_exact_mut(PAGE).enumerate() {
        if !is_kept(page) {
            continue;
        }
        if page.is_multiple_of(64) {
            runs.push(page);
        }
        for (at, out) in bytes.chunks_exact_mut(8).enumerate() {
            let even = at.is_multiple_of(2);
            let value = if even { page } else { (page << 9) | at };
            out.copy_from_slice(&word(value as u64).to_le_bytes());
        }
    }
    let step = runs.len() / (FIRST / 10);
    let first = runs.iter().step_by(step).take(FIRST / 10);
    let pages = first.flat_map(|page| *page..page + 10).collect();
    (ram, pages)
}

fn is_kept(page: usize) -> bool {
    word((page as u64 / 64) ^ 99) as usize % CLONE_PAGES < KEPT
}

/// The name of a clone's costs, what they are, and what was read from a disk, in MiB.
type Row = (String, [f64; 3], f64);

/// Private mappings of the raw file, and of copies of it.
fn mapped_and_copied(ram: &[u8], pages: &[usize]) -> [Row; 2] {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let file = File::create(&raw).unwrap();
    for (page, bytes) in ram.chunks_exact(PAGE).enumerate() {
        if is_kept(page) {
            file.write_all_at(bytes, (page * PAGE) as u64).unwrap();
        }
    }
    file.set_len(ram.len() as u64).unwrap();
    let open = |path: &Path| File::open(path).unwrap();
    let file = open(&raw);
    let map = || (0..CLONES).map(|_| Fresh::of(&file, ram.len())).collect();
    let read = cold(&file, || {
        clones(map, pages);
    });
    let best = (0..3).map(|_| clones(map, pages)).reduce(least).unwrap();
    let copy = |number: usize| {
        let to = folder.path().join(format!("copy-{number}"));
        let mut cp = std::process::Command::new("cp");
        cp.args(["--sparse=always", "--reflink=never"]);
        assert!(cp.arg(&raw).arg(&to).status().unwrap().success());
        Fresh::of(&open(&to), ram.len())
    };
    let before = children();
    let mut copied = [0.0; 3];
    let read_by_cp = cold(&file, || {
        copied = clones(|| (0..CLONES).map(copy).collect(), pages);
    });
    copied[0] += children() - before;
    [
        ("a private mapping of the raw file".into(), best, read),
        (
            "cp --sparse, then a private mapping".into(),
            copied,
            read_by_cp,
        ),
    ]
}

/// The time that the kernel takes to copy the recorded pages into each clone, without any server.
fn copies_alone(ram: &[u8], pages: &[usize]) -> Row {
    let ranges: Vec<_> = pages.chunk_by(|a, b| a + 1 == *b).collect();
    let ranges: Vec<_> = ranges
        .iter()
        .map(|run| run[0]..run[0] + run.len())
        .collect();
    let filled = || {
        let memory = Fresh::new(ram.len());
        copy_ranges(&memory, ram, &ranges);
        memory
    };
    let all = (0..3).map(|_| clones(|| (0..CLONES).map(|_| filled()).collect(), pages));
    let best = all.reduce(least).unwrap();
    ("UFFDIO_COPY of the set alone".into(), best, 0.0)
}

fn least(a: [f64; 3], b: [f64; 3]) -> [f64; 3] {
    [a[0].min(b[0]), a[1].min(b[1]), b[2]]
}

/// Guests of one template, lazily restored, beside private mappings of its raw file and of copies.
fn of_one_template() {
    let (ram, pages) = template();
    let range = |page: &usize| GpaRange::with_len(Gpa::new((page * PAGE) as u64), PAGE as u64);
    let set = PageSet::from_ranges(pages.iter().filter_map(range).collect());
    let set = Arc::new(set);
    let mut rows: Vec<Row> = mapped_and_copied(&ram, &pages).into();
    for compression in [Compression::None, Compression::ZSTD] {
        let file = checkpoint(&ram, compression);
        let warm = source(&file);
        let lazily = |source: &Arc<CheckpointSource<File>>, prefetch| {
            let mut vms = Vec::new();
            let begin = || {
                let memories: Vec<_> = (0..CLONES).map(|_| Fresh::new(ram.len())).collect();
                let begun = memories.iter();
                vms = begun
                    .map(|memory| start(source, memory, options(prefetch, &set)))
                    .collect();
                memories
            };
            clones(begin, &pages)
        };
        for (what, prefetch) in [
            ("the set first", Prefetch::Set),
            ("nothing first", Prefetch::Nothing),
        ] {
            // A server that has just begun.
            let read = cold(&file, || {
                lazily(&source(&file), prefetch);
            });
            let all = (0..3).map(|_| lazily(&warm, prefetch));
            let best = all.reduce(least).unwrap();
            rows.push((format!("{}, {what}", compression.name()), best, read));
        }
    }
    rows.push(copies_alone(&ram, &pages));
    let plain = rows[0].1;
    for (what, [cpu, wall, own], read) in rows {
        println!(
            "{CLONES} clones, {what}: CPU {:.0} ms ({:.2}), wall {:.0} ms ({:.2}), {own:.0} KiB each \
             of their own, {read:.1} MiB read where nothing is in memory",
            cpu * 1e3,
            cpu / plain[0],
            wall * 1e3,
            wall / plain[1],
        );
    }
}

/// `memcpy` of `ram`, page by page, into memory that nobody has touched.
fn copy_into_fresh(ram: &[u8]) -> [f64; 2] {
    let memory = Fresh::new(ram.len());
    cost(|| {
        for at in (0..ram.len()).step_by(PAGE) {
            // SAFETY: both are of this length, and nobody else uses the one.
            unsafe {
                let to = memory.start().as_ptr().add(at);
                std::ptr::copy_nonoverlapping(ram.as_ptr().add(at), to, PAGE);
            }
        }
    })
}

fn main() {
    of_one_template();
    let ram = ram();
    let pages: Vec<usize> = (0..TOUCHED)
        .map(|n| word(n as u64) as usize % PAGES)
        .collect();
    let touch = |memory: &Fresh| pages.iter().for_each(|page| memory.touch(page * PAGE));
    // It has all of the guest's memory in its own, and copies the page that is asked for.
    let whole: Arc<[u8]> = Arc::from(ram.as_slice());
    let mut bare = || {
        let memory = Fresh::new(PAGES * PAGE);
        let handler = PlainHandler::start(&memory, false, Arc::clone(&whole));
        let took = cost(|| touch(&memory));
        handler.stop();
        took
    };
    let range = |page: &usize| GpaRange::with_len(Gpa::new((page * PAGE) as u64), PAGE as u64);
    let set = PageSet::from_ranges(pages.iter().filter_map(range).collect());
    let (none, set) = (Arc::default(), Arc::new(set));
    for compression in [Compression::None, Compression::ZSTD] {
        let source = source(&checkpoint(&ram, compression));
        let ahead = Cell::new(0);
        let faults = |prefetch, set: &Arc<PageSet>| {
            let memory = Fresh::new(PAGES * PAGE);
            let (mut vm, options) = (None, options(prefetch, set));
            let metrics = Arc::clone(&options.metrics);
            let took = cost(|| {
                vm = Some(start(&source, &memory, options));
                touch(&memory);
            });
            ahead.set(metrics.prefetched_bytes() / PAGE as u64);
            drop(vm);
            took
        };
        let mut prefetch = || {
            let memory = Fresh::new(PAGES * PAGE);
            cost(|| {
                let vm = start(&source, &memory, options(Prefetch::Everything, &none));
                vm.finish().unwrap();
            })
        };
        let mut copied = || copy_into_fresh(&ram);
        let name = compression.name();
        let mut meanwhile = 0;
        let [ours, first, beside, plain] = by_turns([
            &mut || faults(Prefetch::Nothing, &none),
            &mut || faults(Prefetch::Set, &set),
            &mut || {
                let took = faults(Prefetch::Everything, &none);
                meanwhile = ahead.get();
                took
            },
            &mut bare,
        ]);
        line(
            &format!("a fault, {name}; a bare handler"),
            ours,
            plain,
            TOUCHED,
        );
        line(
            &format!("a page of a set, {name}; a bare handler's fault"),
            first,
            plain,
            TOUCHED,
        );
        println!("CPU of the next line includes the prefetch of some {meanwhile} pages");
        line(
            &format!("a fault while all is prefetched, {name}; a bare handler"),
            beside,
            plain,
            TOUCHED,
        );
        let [ours, plain] = by_turns([&mut prefetch, &mut copied]);
        line(
            &format!("a page prefetched, {name}; memcpy into fresh memory"),
            ours,
            plain,
            PAGES,
        );
    }
}
