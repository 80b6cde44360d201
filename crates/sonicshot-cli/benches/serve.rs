//! What a page server's engine costs, as ratios to the barest handler there can be and to copying
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
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;
use uffd::{Fresh, PlainHandler};

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

/// What `work` costs: CPU and wall time, in seconds.
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

fn source(ram: &[u8], compression: Compression) -> Arc<CheckpointSource<File>> {
    let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    let file = tempfile::tempfile().unwrap();
    let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let options = SaveOptions::new(compression);
    let mut writer = CheckpointWriter::new(file.try_clone().unwrap(), info, options).unwrap();
    writer.memory(&guest, &map, &plan, &mut |_, _| {}).unwrap();
    writer.finish().unwrap();
    let reader = CheckpointReader::new(file).unwrap();
    // All of it fits: of a template that is warm.
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

fn main() {
    let ram = ram();
    let pages: Vec<usize> = (0..TOUCHED)
        .map(|n| word(n as u64) as usize % PAGES)
        .collect();
    let touch = |memory: &Fresh| pages.iter().for_each(|page| memory.touch(page * PAGE));
    let mut bare = || {
        let memory = Fresh::new(PAGES * PAGE);
        let handler = PlainHandler::start(&memory, false);
        let took = cost(|| touch(&memory));
        handler.stop();
        took
    };
    let range = |page: &usize| GpaRange::with_len(Gpa::new((page * PAGE) as u64), PAGE as u64);
    let set = PageSet::from_ranges(pages.iter().filter_map(range).collect());
    let (none, set) = (Arc::default(), Arc::new(set));
    for compression in [Compression::None, Compression::ZSTD] {
        let source = source(&ram, compression);
        let faults = |prefetch, set: &Arc<PageSet>| {
            let memory = Fresh::new(PAGES * PAGE);
            let mut vm = None;
            let took = cost(|| {
                vm = Some(start(&source, &memory, options(prefetch, set)));
                touch(&memory);
            });
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
        let mut copied = || {
            let memory = Fresh::new(PAGES * PAGE);
            cost(|| {
                for at in (0..ram.len()).step_by(PAGE) {
                    // SAFETY: both are of this length, and nobody else uses the one.
                    unsafe {
                        let to = memory.start().as_ptr().add(at);
                        std::ptr::copy_nonoverlapping(ram.as_ptr().add(at), to, PAGE);
                    }
                }
            })
        };
        let name = compression.name();
        let [ours, first, beside, plain] = by_turns([
            &mut || faults(Prefetch::Nothing, &none),
            &mut || faults(Prefetch::Set, &set),
            &mut || faults(Prefetch::Everything, &none),
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
        // CPU includes what is prefetched.
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
