//! What looking into a guest costs, as ratios to physical limits measured in the same run.
//!
//! ```console
//! $ testdata/lab/lab.py capture --kernel 6.1 --mem 4096
//! $ SONICSHOT_BENCH_RAM=target/lab/captures/6.1-4096-qemu64/ram.raw cargo bench -p sonicshot-cli
//! ```
//!
//! Without `SONICSHOT_BENCH_RAM` it runs on the 128 MiB guest in testdata.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench says so by panicking"
)]

use sonicshot::{DropClasses, GpaRange, GuestMemory, PageClass, PrunePlan};
use sonicshot_dump::{Dump, LayoutSpec};
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

/// How long `work` takes, in milliseconds, and what it gives.
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
        timed(|| mark_zero_pages(&dump, &mut pages.map).unwrap()).0
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
    let analyze = |dump: &Dump| {
        let guest = LinuxGuest::open(dump, &GuestOptions::new()).unwrap();
        let mut pages = guest.classify(OnInconsistency::Refuse).unwrap();
        mark_zero_pages(dump, &mut pages.map).unwrap();
        assert!(pages.map.counts().get(PageClass::FreeBuddy) > 0);
        PrunePlan::new(&pages.map, &DropClasses::default(), pages.free_fill)
    };
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
        punches.push(start.elapsed().as_secs_f64() * 1e3);

        fs::copy(ram, &copy).unwrap();
        File::open(&copy).unwrap().sync_all().unwrap();
        let start = Instant::now();
        let dump = Dump::open(&copy, Some(&LayoutSpec::Pc)).unwrap();
        let plan = analyze(&dump);
        dump.prune_in_place(&plan, &mut |_, _| {}).unwrap();
        prunes.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let mid = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[1]
    };
    let (punch, prune, analysis) = (mid(&mut punches), mid(&mut prunes), mid(&mut analyses));
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
