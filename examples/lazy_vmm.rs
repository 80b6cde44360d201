//! A VMM that saves its guest to a checkpoint and restores it on demand: the guest runs at once,
//! and its memory comes in while it does.
//!
//! ```console
//! $ cargo run --release --example lazy_vmm
//! ```

use sonicshot::checkpoint::{
    CheckpointInfo, CheckpointReader, CheckpointWriter, Compression, SaveOptions,
};
use sonicshot::{
    DropClasses, Fill, GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange, PrunePlan,
    VmMemory,
};
use sonicshot_serve::{
    CheckpointSource, Metrics, PageSet, Prefetch, Recorder, Uffd, Vm, VmOptions, VmRegion,
};
use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Guest memory below and above the PCI hole.
const REGIONS: [(GuestAddress, usize); 2] = [
    (GuestAddress(0), 128 << 20),
    (GuestAddress(4 << 30), 128 << 20),
];
const PAGE: usize = 4096;
/// Virtual processors: threads that touch memory.
const PROCESSORS: usize = 4;
const DEVICE_STATE: &[u8] = b"registers, virtqueues and whatever else this VMM has";

/// The use that this guest has for a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Kept,
    /// Never written.
    Zero,
    /// Holds old bytes that nobody wants.
    Free,
}

fn main() -> Outcome<()> {
    let file = tempfile::NamedTempFile::new()?;
    save(file.reopen()?)?;

    let checkpoint = CheckpointReader::open(file.path())?;
    if checkpoint.read_blob("device-state")? != DEVICE_STATE {
        return Err("the device state is not what was saved".into());
    }
    // Up to 16 MiB of decompressed pages, for all guests that are restored from it.
    let metrics = Arc::new(Metrics::default());
    let source = Arc::new(CheckpointSource::new(checkpoint, 16 << 20, metrics));
    println!("on demand, and all that is left in the background:");
    let mut options = VmOptions::default();
    options.prefetch = Prefetch::Everything;
    restore(&source, options)?;

    println!("on demand alone:");
    let touched = restore(&source, VmOptions::default())?;

    println!(
        "in the background, first the {} KiB touched before:",
        touched.bytes() >> 10
    );
    let mut options = VmOptions::default();
    options.prefetch = Prefetch::Everything;
    options.set = Arc::new(touched);
    restore(&source, options)?;
    Ok(())
}

/// Runs a guest for a while, and saves it.
fn save(file: File) -> Outcome<()> {
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&REGIONS)?;
    for pfn in frames(|_, used| used != Use::Zero) {
        memory.write_slice(&pattern(pfn), address(pfn))?;
    }

    // The VMM has paused its processors and devices here.
    let guest = VmMemory::new(&memory)?;
    // sonicshot-vmi's `LinuxGuest::classify` makes this map for a guest that runs Linux.
    let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    for pfn in frames(|_, used| used == Use::Free) {
        let one = PfnRange::with_len(pfn, 1).ok_or("a frame")?;
        map.set(one, PageClass::FreeBuddy);
    }
    let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);

    let start = Instant::now();
    let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    let options = SaveOptions::new(Compression::Lz4);
    let mut writer = CheckpointWriter::new(file, info, options)?;
    writer.blob("device-state", DEVICE_STATE)?;
    writer.memory(&guest, &map, &plan)?;
    let (_, stats) = writer.finish()?;
    println!(
        "saved {} MiB of RAM in {:.1?}: {} pages kept, {} zero, {} free; {} MiB in the file",
        guest.layout().bytes() >> 20,
        start.elapsed(),
        stats.data,
        stats.zero,
        stats.free,
        stats.file_len >> 20
    );
    Ok(())
}

/// Restores the guest, lets it run, and returns which pages it touched first.
fn restore(source: &Arc<CheckpointSource<File>>, mut options: VmOptions) -> Outcome<PageSet> {
    let start = Instant::now();
    // Before `restore` below, so that it is there for longer.
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&REGIONS)?;
    let uffd = Uffd::new()?;
    let regions = register(&uffd, &memory)?;
    let recorder = Arc::new(Recorder::new(Duration::from_secs(60), u64::MAX));
    let metrics = Arc::new(Metrics::default());
    options.recorder = Some(Arc::clone(&recorder));
    options.metrics = Arc::clone(&metrics);
    let source = Arc::clone(source);
    let restore = Vm::start(source, uffd, &regions, options)?;
    println!("  ready after {:.1?}", start.elapsed());

    // The first that the guest does, all over its memory: kept, zero and free pages.
    run(&memory, &frames(|pfn, _| pfn.raw() % 16 == 0))?;
    let touched = recorder.set();
    println!(
        "  first work done after {:.1?}, {} faults, {}",
        start.elapsed(),
        metrics.faults(),
        resident(&regions)?
    );

    let kept = frames(|_, used| used == Use::Kept);
    run(&memory, &kept)?;
    restore.finish()?;
    println!(
        "  all in place after {:.1?}, {} faults, {} MiB in the background, {}",
        start.elapsed(),
        metrics.faults(),
        metrics.prefetched_bytes() >> 20,
        resident(&regions)?
    );

    // The kernel serves the rest alone, and needs no memory for zeroes that are only read.
    run(&memory, &frames(|_, used| used != Use::Kept))?;
    println!("  zero and free pages read: {}", resident(&regions)?);
    Ok(touched)
}

#[expect(unsafe_code, reason = "who registers memory promises what it is")]
fn register(uffd: &Uffd, memory: &GuestMemoryMmap) -> Outcome<Vec<VmRegion>> {
    // SAFETY: `memory` has just mapped these bytes, nobody has touched them, and the threads
    // that will do can wait.
    Ok(unsafe { uffd.register_vm_memory(memory, PAGE as u64)? })
}

/// Stands in for a guest: touches the pages in random order, and checks what it finds.
fn run(memory: &GuestMemoryMmap, frames: &[Pfn]) -> Outcome<()> {
    let mut order = frames.to_vec();
    shuffle(&mut order);
    std::thread::scope(|scope| {
        let share = order.len().div_ceil(PROCESSORS).max(1);
        let processors: Vec<_> = order
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().try_for_each(|pfn| check(memory, *pfn))))
            .collect();
        for processor in processors {
            processor.join().map_err(|_| "a processor panicked")??;
        }
        Ok(())
    })
}

fn check(memory: &GuestMemoryMmap, pfn: Pfn) -> Outcome<()> {
    let mut found = [0; PAGE];
    memory.read_slice(&mut found, address(pfn))?;
    let expected = match used(pfn) {
        Use::Kept => pattern(pfn),
        Use::Zero | Use::Free => [0; PAGE],
    };
    if found == expected {
        Ok(())
    } else {
        Err(format!("frame {pfn} is not what was saved").into())
    }
}

fn address(pfn: Pfn) -> GuestAddress {
    GuestAddress(pfn.raw() * PAGE as u64)
}

/// The guest's frames that `wanted` takes.
fn frames(wanted: impl Fn(Pfn, Use) -> bool) -> Vec<Pfn> {
    let ranges = REGIONS.iter().map(|(start, len)| {
        let first = start.0 / PAGE as u64;
        first..first + (len / PAGE) as u64
    });
    let all = ranges.flatten().map(Pfn::new);
    all.filter(|pfn| wanted(*pfn, used(*pfn))).collect()
}

/// A quarter each is kept and free, in ranges as an allocator leaves them.
fn used(pfn: Pfn) -> Use {
    match mix(pfn.raw() / 24) % 4 {
        0 => Use::Kept,
        1 => Use::Free,
        _ => Use::Zero,
    }
}

/// A page that no other one is like.
fn pattern(pfn: Pfn) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (number, word) in (0_u64..).zip(page.chunks_exact_mut(8)) {
        // Half of it compresses.
        let value = if number % 2 == 0 {
            pfn.raw()
        } else {
            mix(pfn.raw() << 9 | number)
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// The finalizer of `SplitMix64`.
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn shuffle(pages: &mut [Pfn]) {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for last in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let other = state % (last as u64 + 1);
        pages.swap(last, usize::try_from(other).unwrap_or(last));
    }
}

/// The part of the guest's memory that takes memory of the host's.
fn resident(regions: &[VmRegion]) -> Outcome<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let (mut inside, mut kib) = (false, 0_u64);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("Rss:") if inside => kib += words.next().ok_or("no number")?.parse::<u64>()?,
            Some(range) if !range.ends_with(':') => {
                let (start, end) = range.split_once('-').ok_or("no range")?;
                let start = u64::from_str_radix(start, 16)?;
                let end = u64::from_str_radix(end, 16)?;
                inside = regions
                    .iter()
                    .any(|region| (start..end).contains(&region.host().raw()));
            }
            _ => {}
        }
    }
    Ok(format!("{} MiB resident", kib >> 10))
}
