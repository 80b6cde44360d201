//! The costs of looking into a guest, as ratios to physical limits measured in the same run.
//!
//! ```console
//! $ testdata/lab/lab.py capture --kernel 6.1 --mem 4096
//! $ SONICSHOT_BENCH_RAM=target/lab/captures/6.1-4096-qemu64/ram.raw cargo bench -p sonicshot-cli
//! ```
//!
//! Without `SONICSHOT_BENCH_RAM` it runs on the 128 MiB guest in testdata. With
//! `SONICSHOT_BENCH_MAPPED` naming a mapped-ram file (`capture --mapped-ram`), that is pruned in
//! memory, on the file system of the temporary folder, and in every folder that
//! `SONICSHOT_BENCH_FOLDERS` names (with colons between them).
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench says so by panicking"
)]

use sonicshot::{DropClasses, GpaRange, GuestMemory, PageClass, PrunePlan, WorkOptions};
use sonicshot_dump::{CheckedPlan, Dump, LayoutSpec, PruneOptions};
use sonicshot_vmi::{GuestOptions, LinuxGuest, OnInconsistency, mark_zero_pages};
use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

const ROUNDS: usize = 9;

/// The median of the times in milliseconds that `work` measures of itself, after a run that
/// warms up.
fn median(mut work: impl FnMut() -> f64) -> f64 {
    work();
    let mut times: Vec<f64> = (0..ROUNDS).map(|_| work()).collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}

/// The time that `work` takes, in milliseconds, and its result.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = work();
    (start.elapsed().as_secs_f64() * 1e3, result)
}

fn main() {
    let scratch = tempfile::tempdir().unwrap();
    let ram = match std::env::var_os("SONICSHOT_BENCH_RAM") {
        Some(path) => PathBuf::from(path),
        None => unpack_testdata(scratch.path()),
    };
    let layout = LayoutSpec::Pc;
    let open = || Dump::open(&ram, Some(&layout)).unwrap();
    let dump = open();
    // Into the page cache, as the figures are about.
    std::io::copy(&mut File::open(&ram).unwrap(), &mut std::io::sink()).unwrap();
    let guest = LinuxGuest::open(&dump, &GuestOptions::new()).unwrap();
    let struct_pages = guest.struct_page_memory().unwrap();
    let bytes: u64 = struct_pages.iter().map(GpaRange::len).sum();
    println!(
        "guest: Linux {}, {} MiB, {} MiB of struct pages",
        guest.release(),
        dump.layout().bytes() >> 20,
        bytes >> 20
    );

    // The limit: one pass over the same bytes, mapped afresh as for the classification.
    let pass = median(|| {
        let dump = open();
        let read = || {
            for range in &struct_pages {
                let mapped = dump.map(range.start(), usize::try_from(range.len()).unwrap());
                sum(&mapped.unwrap().unwrap());
            }
        };
        timed(read).0
    });
    let opened = median(|| {
        let dump = open();
        timed(|| drop(LinuxGuest::open(&dump, &GuestOptions::new()).unwrap())).0
    });
    let classified = median(|| {
        let dump = open();
        let guest = LinuxGuest::open(&dump, &GuestOptions::new()).unwrap();
        timed(|| drop(guest.classify(OnInconsistency::Refuse).unwrap())).0
    });
    let zero = median(|| {
        let dump = open();
        let guest = LinuxGuest::open(&dump, &GuestOptions::new()).unwrap();
        let mut pages = guest.classify(OnInconsistency::Refuse).unwrap();
        timed(|| mark_zero_pages(&dump, &mut pages.map, &WorkOptions::new()).unwrap()).0
    });
    println!("one pass over the struct pages            {pass:8.1} ms");
    let ratio = classified / pass;
    println!("classify every page                       {classified:8.1} ms  {ratio:.2}x the pass");
    println!("find the kernel, its symbols and types    {opened:8.1} ms");
    println!("find the zero pages among those in use    {zero:8.1} ms");
    println!(
        "peak resident memory                      {:8} MiB",
        peak_mib()
    );
    prune_in_place(&dump, &ram, scratch.path());
    if let Some(mapped) = std::env::var_os("SONICSHOT_BENCH_MAPPED") {
        let mapped = PathBuf::from(mapped);
        let folders = std::env::var("SONICSHOT_BENCH_FOLDERS").unwrap_or_default();
        let folders = folders.split(':').filter(|folder| !folder.is_empty());
        let folders = ["/dev/shm", scratch.path().to_str().unwrap()]
            .into_iter()
            .chain(folders);
        for folder in folders {
            mapped_ram(&mapped, Path::new(folder));
        }
    }
}

/// Reads every word: no pass over the bytes can be shorter.
fn sum(mapped: &sonicshot::Mapped<'_>) {
    let bytes = mapped.bytes();
    let mut sum = 0_u64;
    for offset in (0..bytes.len()).step_by(8) {
        sum = sum.wrapping_add(bytes.u64_at(offset).unwrap_or(0));
    }
    black_box(sum);
}

/// Pruning in place against one `fallocate` for each run, on a copy each.
fn prune_in_place(dump: &Dump, ram: &Path, scratch: &Path) {
    let plan = analyze(dump);
    let copy = scratch.join("copy.raw");
    let (mut punches, mut prunes, mut analyses) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..3 {
        fs::copy(ram, &copy).unwrap();
        File::open(&copy).unwrap().sync_all().unwrap();
        let dump = Dump::open(&copy, Some(&LayoutSpec::Pc)).unwrap();
        analyses.push(timed(|| analyze(&dump)).0);
        let file = OpenOptions::new().write(true).open(&copy).unwrap();
        let start = Instant::now();
        let mut base = 0;
        for region in dump.layout().regions() {
            for run in plan.dropped_in(*region) {
                let at = base + run.start().offset_from(region.start()).unwrap();
                punch(&file, at, run.len());
            }
            base += region.len();
        }
        file.sync_all().unwrap();
        drop(file);
        punches.push(start.elapsed().as_secs_f64() * 1e3);

        fs::copy(ram, &copy).unwrap();
        File::open(&copy).unwrap().sync_all().unwrap();
        let start = Instant::now();
        let dump = Dump::open(&copy, Some(&LayoutSpec::Pc)).unwrap();
        let plan = analyze(&dump);
        CheckedPlan::unchecked(&dump, &plan)
            .prune_in_place(&PruneOptions::new())
            .unwrap();
        prunes.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let (punch, prune, analysis) = (
        middle(&mut punches),
        middle(&mut prunes),
        middle(&mut analyses),
    );
    println!(
        "prune in place, {} runs                  {prune:8.1} ms  {:.2}x classifying ({analysis:.1}) and one fallocate a run ({punch:.1})",
        plan.runs().len(),
        prune / (analysis + punch)
    );
}

fn punch(file: &File, at: u64, len: u64) {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file.as_fd(), flags, at, len).unwrap();
}

/// The plan for a dump, after a look at every page of it.
fn analyze(dump: &Dump) -> PrunePlan {
    let guest = LinuxGuest::open(dump, &GuestOptions::new()).unwrap();
    let mut pages = guest.classify(OnInconsistency::Refuse).unwrap();
    mark_zero_pages(dump, &mut pages.map, &WorkOptions::new()).unwrap();
    assert!(pages.map.counts().get(PageClass::FreeBuddy) > 0);
    PrunePlan::new(&pages.map, &DropClasses::default(), pages.free_fill)
}

/// A mapped-ram file on one file system: in place against the punches alone, by copy against
/// copying the kept bytes, and what holes of each size cost.
fn mapped_ram(from: &Path, folder: &Path) {
    let at = |name: &str| folder.join(format!(".sonicshot-bench-{name}"));
    let (file, out) = (at("mapped"), at("out"));
    let parts = extents(&File::open(from).unwrap());
    let fresh = || copy(from, &file, &parts, true);
    println!("\n{} in {}", from.display(), folder.display());

    fresh();
    let before = extents(&File::open(&file).unwrap());
    let dump = Dump::open(&file, None).unwrap();
    let plan = analyze(&dump);
    let to = |out: &Path| {
        CheckedPlan::unchecked(&dump, &plan)
            .prune_to(out, &PruneOptions::new())
            .unwrap()
    };
    let (mut copies, mut limits) = (Vec::new(), Vec::new());
    let mut cloned = 0;
    for _ in 0..3 {
        let (took, stats) = timed(|| to(&out));
        copies.push(took);
        cloned = stats.cloned_bytes;
        let kept = extents(&File::open(&out).unwrap());
        fs::remove_file(&out).unwrap();
        // Sharing is not copying.
        limits.push(timed(|| copy(&file, &out, &kept, cloned == 0)).0);
        fs::remove_file(&out).unwrap();
    }
    let (copied, limit) = (middle(&mut copies), middle(&mut limits));
    println!(
        "prune by copy                             {copied:8.1} ms  {:.2}x copying the kept bytes ({limit:.1}); {} MiB shared",
        copied / limit,
        cloned >> 20
    );
    drop(dump);

    let (mut prunes, mut analyses, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..3 {
        if round > 0 {
            fresh();
        }
        let start = Instant::now();
        let dump = Dump::open(&file, None).unwrap();
        let plan = analyze(&dump);
        analyses.push(start.elapsed().as_secs_f64() * 1e3);
        let stats = CheckedPlan::unchecked(&dump, &plan)
            .prune_in_place(&PruneOptions::new())
            .unwrap();
        prunes.push(start.elapsed().as_secs_f64() * 1e3);
        let freed = stats.disk_before - stats.disk_after;
        let after = extents(&File::open(&file).unwrap());
        let holes = without(&before, &after);
        fresh();
        let target = OpenOptions::new().write(true).open(&file).unwrap();
        let (took, ()) = timed(|| {
            for (start, end) in &holes {
                punch(&target, *start, end - start);
            }
            target.sync_all().unwrap();
        });
        alone.push(took);
        if round == 2 {
            let (whole, analysis, alone) = (
                middle(&mut prunes),
                middle(&mut analyses),
                middle(&mut alone),
            );
            let share = freed as f64 * 100.0 / (freed + stats.left_bytes) as f64;
            println!(
                "prune in place                            {whole:8.1} ms  {:.2}x classifying ({analysis:.1}) and the punches alone ({alone:.1})",
                whole / (analysis + alone)
            );
            println!(
                "{:6} holes, of {} ranges             {:8.3} ms a hole; {share:.2} % of the droppable bytes freed",
                stats.punched,
                stats.runs,
                alone / stats.punched as f64
            );
            let largest = holes.iter().max_by_key(|(start, end)| end - start).unwrap();
            fresh();
            hole_costs(&file, *largest);
        }
    }
    fs::remove_file(&file).unwrap();
}

/// Punches holes of every size into a range of data.
fn hole_costs(file: &Path, (start, end): (u64, u64)) {
    let target = OpenOptions::new().write(true).open(file).unwrap();
    let mut at = start.next_multiple_of(4 << 20);
    for shift in [12, 13, 15, 16, 17, 18, 20, 22] {
        let len = 1_u64 << shift;
        let count = 100.min((128 << 20) / len);
        let next = at + (2 * count * len).next_multiple_of(4 << 20);
        if next > end {
            break;
        }
        let (took, ()) = timed(|| {
            for number in 0..count {
                punch(&target, at + 2 * number * len, len);
            }
            target.sync_all().unwrap();
        });
        println!(
            "a hole of {:5} KiB                       {:8.3} ms",
            len >> 10,
            took / count as f64
        );
        at = next;
    }
}

/// The ranges of data of a file: start and end.
fn extents(file: &File) -> Vec<(u64, u64)> {
    use rustix::fs::{SeekFrom, seek};
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        found.push((start, at));
    }
    found
}

/// The ranges that are in `from` and not in `other`.
fn without(from: &[(u64, u64)], other: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    for (start, end) in from {
        let mut at = *start;
        for (from, to) in other.iter().filter(|(from, to)| to > start && from < end) {
            if *from > at {
                left.push((at, *from));
            }
            at = *to;
        }
        if at < *end {
            left.push((at, *end));
        }
    }
    left
}

/// Copies ranges of a file, inside the kernel or through this process.
fn copy(from: &Path, to: &Path, parts: &[(u64, u64)], by_kernel: bool) {
    use rustix::fs::copy_file_range;
    use std::os::unix::fs::FileExt;
    let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
    to.set_len(from.metadata().unwrap().len()).unwrap();
    let mut buffer = vec![0; 1 << 20];
    for (start, end) in parts {
        let (mut source, mut target) = (*start, *start);
        while source < *end {
            let left = usize::try_from(end - source).unwrap();
            let copied = if by_kernel {
                copy_file_range(&from, Some(&mut source), &to, Some(&mut target), left).ok()
            } else {
                None
            };
            if copied.is_none_or(|copied| copied == 0) {
                let now = left.min(buffer.len());
                from.read_exact_at(&mut buffer[..now], source).unwrap();
                to.write_all_at(&buffer[..now], source).unwrap();
                source += now as u64;
                target = source;
            }
        }
    }
    to.sync_all().unwrap();
}

fn middle(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        >> 10
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
