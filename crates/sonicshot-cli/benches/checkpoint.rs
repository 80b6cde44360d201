//! The costs of saving and restoring a checkpoint, as ratios to limits measured in the same run.
//!
//! ```console
//! $ testdata/lab/lab.py capture --kernel 6.1 --mem 4096
//! $ SONICSHOT_BENCH_RAM=target/lab/captures/6.1-4096-qemu64/ram.raw \
//!     cargo bench -p sonicshot-cli --bench checkpoint
//! ```
//!
//! Without `SONICSHOT_BENCH_RAM` it runs on the 128 MiB guest in testdata. Files are written to
//! `SONICSHOT_BENCH_DIR`, by default the temporary folder.
#![expect(unsafe_code, reason = "guest memory is a mapping here")]
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    reason = "a bench says so by panicking"
)]

mod uffd;

use sonicshot::checkpoint::RestoreOptions;
use sonicshot::checkpoint::*;
use sonicshot::{
    DropClasses, Fill, Gpa, GpaRange, GuestMemory, MemoryError, PageClass, PageMap, PageSize, Pfn,
    PfnRange, PrunePlan, RamLayout,
};
use sonicshot_dump::{Dump, LayoutSpec};
use sonicshot_serve::{CheckpointSource, Metrics, Prefetch, Uffd, Vm, VmOptions, VmRegion};
use sonicshot_vmi::{GuestOptions, LinuxGuest, OnInconsistency};
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use uffd::{Fresh, PlainHandler};

const ROUNDS: usize = 7;
const PAGE: usize = 4096;
/// Too small for a chunk to be found there again.
const CACHE: u64 = 1 << 20;

/// Medians of the milliseconds that each of two works measures, taken by turns so that both see
/// the same machine.
fn by_turns(mut a: impl FnMut() -> f64, mut b: impl FnMut() -> f64) -> (f64, f64) {
    a();
    b();
    let (mut times_a, mut times_b): (Vec<f64>, Vec<f64>) = (0..ROUNDS).map(|_| (a(), b())).unzip();
    times_a.sort_by(f64::total_cmp);
    times_b.sort_by(f64::total_cmp);
    (times_a[ROUNDS / 2], times_b[ROUNDS / 2])
}

fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e3
}

/// A guest that is saved.
struct Guest {
    dump: Dump,
    release: String,
    map: PageMap,
    plan: PrunePlan,
}

impl Guest {
    fn open(ram: &Path) -> Self {
        let dump = Dump::open(ram, Some(&LayoutSpec::Pc)).unwrap();
        let (release, pages) = {
            let guest = LinuxGuest::open(&dump, &GuestOptions::new()).unwrap();
            let pages = guest.classify(OnInconsistency::Refuse).unwrap();
            (guest.release().to_owned(), pages)
        };
        let plan = PrunePlan::new(&pages.map, &DropClasses::default(), pages.free_fill);
        Self {
            dump,
            release,
            map: pages.map,
            plan,
        }
    }

    fn save(&self, compression: Compression, out: impl Write) -> SaveStats {
        let info = CheckpointInfo::new(self.dump.layout().clone(), PageSize::SIZE_4K);
        let mut writer = CheckpointWriter::new(out, info, SaveOptions::new(compression)).unwrap();
        writer.memory(&self.dump, &self.map, &self.plan).unwrap();
        writer.finish().unwrap().1
    }
}

fn line(what: &str, ours: f64, limit: f64) {
    println!(
        "{what:<58} {ours:8.1} ms  limit {limit:8.1} ms  {:5.0} % of its speed",
        limit * 100.0 / ours
    );
}

fn main() {
    let scratch = match std::env::var_os("SONICSHOT_BENCH_DIR") {
        Some(folder) => tempfile::tempdir_in(folder).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let ram = match std::env::var_os("SONICSHOT_BENCH_RAM") {
        Some(path) => PathBuf::from(path),
        None => unpack_testdata(scratch.path()),
    };
    std::io::copy(&mut File::open(&ram).unwrap(), &mut std::io::sink()).unwrap();
    let guest = Guest::open(&ram);
    // The pages that a checkpoint stores, for the limits to work on.
    let plain = scratch.path().join("plain.sonic");
    let stats = guest.save(Compression::None, File::create(&plain).unwrap());
    let kept = kept_bytes(&plain, &stats);
    println!(
        "guest: Linux {}, {} MiB, {:.0} MiB of page data",
        guest.release,
        guest.dump.layout().bytes() >> 20,
        mib(kept.len() as u64)
    );
    let (ours, limit) = by_turns(
        || {
            timed(|| {
                guest.save(Compression::Lz4, std::io::sink());
            })
        },
        || timed(|| lz4_on_all_cores(&kept)),
    );
    line("save with lz4; limit: liblz4 on all cores", ours, limit);
    uncompressed(&guest, &kept, scratch.path());
    restore(&guest.dump, &plain);
    for compression in [Compression::Lz4, Compression::ZSTD] {
        compressed(&guest, kept.len() as u64, compression, scratch.path());
    }
    fault(&plain, "none");
    ready(&plain, "this guest");
    for gib in [8, 64] {
        let path = scratch.path().join("sparse.sonic");
        save_sparse(gib, &path);
        ready(&path, &format!("{gib} GiB, 200 MiB used"));
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A save to a file beside `cp` of the same bytes.
fn uncompressed(guest: &Guest, kept: &[u8], scratch: &Path) {
    let copy_of = scratch.join("kept");
    fs::write(&copy_of, kept).unwrap();
    let (out, copied) = (scratch.join("out"), scratch.join("copied"));
    let (ours, limit) = by_turns(
        || {
            let _ = fs::remove_file(&out);
            timed(|| {
                guest.save(Compression::None, File::create(&out).unwrap());
            })
        },
        || {
            let _ = fs::remove_file(&copied);
            timed(|| {
                let status = std::process::Command::new("cp")
                    .args(["--reflink=never", "--sparse=never"])
                    .args([&copy_of, &copied])
                    .status();
                assert!(status.unwrap().success());
            })
        },
    );
    let what = "save uncompressed; limit: cp of the same bytes";
    line(what, ours, limit);
    for path in [&copy_of, &copied, &out] {
        fs::remove_file(path).unwrap();
    }
}

/// A compressed checkpoint of `kept` bytes of page data: its size, its save, its restore.
fn compressed(guest: &Guest, kept: u64, compression: Compression, scratch: &Path) {
    let path = scratch.join("compressed.sonic");
    let stats = guest.save(compression, File::create(&path).unwrap());
    println!(
        "-- {compression}: {:.1} MiB, {:.0} % of the page data",
        mib(stats.file_len),
        stats.stored_bytes as f64 * 100.0 / kept as f64
    );
    let took = median(|| {
        timed(|| {
            guest.save(compression, std::io::sink());
        })
    });
    println!(
        "save with {compression} {took:8.1} ms, {:.0} MiB/s",
        mib(kept) * 1e3 / took
    );
    restore(&guest.dump, &path);
    fault(&path, &compression.to_string());
}

fn median(mut work: impl FnMut() -> f64) -> f64 {
    by_turns(&mut work, || 0.0).0
}

/// The page data of an uncompressed checkpoint: one range of it.
fn kept_bytes(plain: &Path, stats: &SaveStats) -> Vec<u8> {
    let mut bytes = fs::read(plain).unwrap();
    let len = usize::try_from(stats.stored_bytes).unwrap();
    // Behind the header, which is one page.
    bytes.drain(..PAGE);
    bytes.truncate(len);
    bytes
}

fn lz4_on_all_cores(bytes: &[u8]) {
    let threads = std::thread::available_parallelism().unwrap().get();
    let blocks: Vec<&[u8]> = bytes.chunks(4 << 20).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut out = vec![0; 5 << 20];
                while let Some(block) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let len = lz4::block::compress_to_buffer(block, None, false, &mut out);
                    black_box(len.unwrap());
                }
            });
        }
    });
}

/// A full restore into fresh memory; limit: the file read into fresh memory.
fn restore(dump: &Dump, path: &Path) {
    let reader = CheckpointReader::open(path).unwrap();
    let (ours, limit) = by_turns(
        || {
            let regions: Vec<(Gpa, Fresh)> = dump
                .layout()
                .regions()
                .iter()
                .map(|r| (r.start(), Fresh::new(usize::try_from(r.len()).unwrap())))
                .collect();
            timed(|| {
                let places = regions
                    .iter()
                    .map(|(at, m)| (*at, m.start(), m.len()))
                    .collect();
                // SAFETY: the mappings are fresh, and nobody else touches them.
                let target = unsafe { RestoreRegions::from_raw_parts(places, Before::Zeroes) };
                reader
                    .restore(&target.unwrap(), &RestoreOptions::new())
                    .unwrap();
            })
        },
        || {
            let len = fs::metadata(path).unwrap().len();
            let memory = Fresh::new(usize::try_from(len).unwrap());
            let mut file = File::open(path).unwrap();
            // SAFETY: fresh memory that only this thread has.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut(memory.start().as_ptr(), memory.len()) };
            timed(|| {
                for part in bytes.chunks_mut(1 << 20) {
                    file.read_exact(part).unwrap();
                }
            })
        },
    );
    let what = format!("full restore ({}); limit: read of the file", reader.codec());
    line(&what, ours, limit);
}

/// Measures the time until the guest may run.
fn ready(path: &Path, what: &str) {
    let took = median(|| {
        let start = Instant::now();
        let reader = CheckpointReader::open(path).unwrap();
        let layout = reader.info().layout.clone();
        let source = Arc::new(CheckpointSource::new(reader, CACHE, Arc::default()));
        let uffd = Uffd::new().unwrap();
        let mut memory = Vec::new();
        let mut regions = Vec::new();
        for region in layout.regions() {
            let fresh = Fresh::new(usize::try_from(region.len()).unwrap());
            // SAFETY: fresh memory that nobody touches.
            let registered = unsafe { uffd.register(fresh.start(), fresh.len()).unwrap() };
            regions.push(VmRegion::new(&registered, 0, *region, 4096).unwrap());
            memory.push(fresh);
        }
        let mut options = VmOptions::default();
        options.prefetch = Prefetch::Everything;
        let restore = Vm::start(source, uffd, &regions, options).unwrap();
        let took = start.elapsed().as_secs_f64() * 1e3;
        restore.finish().unwrap();
        took
    });
    println!("lazy restore of {what}: ready to run in {took:.2} ms (at most 20)");
}

/// A page's first touch against a plain handler that copies from memory, and one that only maps
/// the zero page: the shortest fault that there is.
fn fault(path: &Path, what: &str) {
    let reader = CheckpointReader::open(path).unwrap();
    let metrics = Arc::new(Metrics::default());
    let source = Arc::new(CheckpointSource::new(reader, CACHE, metrics));
    let reader = source.reader();
    // Pages of data, far from each other, in random order.
    let mut pages: Vec<Gpa> = reader
        .runs()
        .filter(|run| matches!(run.content, PageContent::Data { .. }))
        .filter_map(|run| run.frames.start().gpa(PageSize::SIZE_4K))
        .collect();
    let mut seed = 0x1234_5678_9abc_def1_u64;
    for at in (1..pages.len()).rev() {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        pages.swap(at, usize::try_from(seed % (at as u64 + 1)).unwrap());
    }
    pages.truncate(4000);
    let region = reader.info().layout.regions()[0];
    pages.retain(|at| region.contains(*at));
    let len = usize::try_from(region.len()).unwrap();
    let touch = |memory: &Fresh| {
        let mut times: Vec<f64> = pages
            .iter()
            .map(|at| {
                let place = usize::try_from(at.raw() - region.start().raw()).unwrap();
                let start = Instant::now();
                memory.touch(place);
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let ours = || {
        let memory = Fresh::new(len);
        let uffd = Uffd::new().unwrap();
        // SAFETY: fresh memory, touched by this thread alone.
        let registered = unsafe { uffd.register(memory.start(), len).unwrap() };
        let at = VmRegion::new(&registered, 0, region, 4096).unwrap();
        let mut options = VmOptions::default();
        options.prefetch = Prefetch::Nothing;
        let source = Arc::clone(&source);
        let restore = Vm::start(source, uffd, &[at], options).unwrap();
        let took = touch(&memory);
        restore.finish().unwrap();
        took
    };
    for (zero, name) in [
        (false, "UFFDIO_COPY from memory"),
        (true, "UFFDIO_ZEROPAGE"),
    ] {
        let (ours, plain) = by_turns(ours, || {
            let memory = Fresh::new(len);
            let handler = PlainHandler::start(&memory, zero, Arc::from([7; 4096]));
            let took = touch(&memory);
            handler.stop();
            took
        });
        println!(
            "first touch ({what}) {ours:6.1} us; plain handler, {name} {plain:6.1} us: {:.2}x (at most 3)",
            ours / plain
        );
    }
}

/// A guest of many GiB that uses 200 MiB, here and there.
struct Sparse(RamLayout);

impl GuestMemory for Sparse {
    fn layout(&self) -> &RamLayout {
        &self.0
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        for (number, word) in (at.raw()..).step_by(8).zip(buf.chunks_mut(8)) {
            let value = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
        Ok(())
    }
}

fn save_sparse(gib: u64, path: &Path) {
    let gpa = |gib: u64| Gpa::new(gib << 30);
    let layout = RamLayout::new(vec![
        GpaRange::new(Gpa::ZERO, gpa(3)),
        GpaRange::new(gpa(4), gpa(gib + 1)),
    ]);
    let guest = Sparse(layout.unwrap());
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    let total = map.total();
    // Free but for runs of 8 pages.
    let runs = (200 << 20) / (8 * 4096);
    let step = total / runs;
    let all = PfnRange::new(Pfn::new(0), Pfn::new(u64::MAX));
    map.with_slices(all, |first, pages| {
        for (pfn, page) in (first.raw()..).zip(pages) {
            *page = if pfn % step < 8 {
                PageClass::Kernel.into()
            } else {
                PageClass::FreeBuddy.into()
            };
        }
    });
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let out = File::create(path).unwrap();
    let mut writer = CheckpointWriter::new(out, info, SaveOptions::default()).unwrap();
    writer.memory(&guest, &map, &plan).unwrap();
    writer.finish().unwrap();
}

fn unpack_testdata(into: &Path) -> PathBuf {
    let from =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m/ram.raw.zst");
    let to = into.join("guest.raw");
    let mut reader = zstd::stream::read::Decoder::new(File::open(from).unwrap()).unwrap();
    reader.window_log_max(31).unwrap();
    std::io::copy(&mut reader, &mut File::create(&to).unwrap()).unwrap();
    to
}
