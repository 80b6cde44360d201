//! Guest memory as Cloud Hypervisor has it: a `GuestMemoryAtomic`, in which memory may be plugged, with
//! a bitmap of the pages that were written. A machine keeps its memory and its guest, and writes diffs
//! in which neither free pages are nor those that nobody has written.
//!
//! ```console
//! $ cargo run --release --example cloud_hypervisor -- guest.raw
//! ```
//!
//! The file stands in for a running guest: its bytes are put into the VMM's regions first.

use sonicshot::{DropClasses, GpaRange, PageSize, SharedVmMemory, Stop};
use sonicshot_vmi::{AnalysisOptions, OwnedGuest};
use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, MmapRegion,
};

// Not `sonicshot::GuestMemory` and `vm_memory::GuestMemory` side by side: they have the same name.
type Memory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: PageSize = PageSize::SIZE_4K;
/// This VMM has all its RAM below the PCI hole.
const HOLE: u64 = 3 << 30;

/// The VMM's part of a machine: it is kept, and may go to another thread.
struct Machine {
    memory: GuestMemoryAtomic<Memory>,
    guest: OwnedGuest,
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args()
        .nth(1)
        .ok_or("usage: cloud_hypervisor GUEST.raw")?;
    let machine = Machine::start(&path)?;
    let (whole, first) = machine.diff()?;
    println!(
        "{}: {} MiB, all of it written",
        machine.release(),
        whole >> 20
    );
    println!("the first diff: {} MiB", first >> 20);
    // The guest runs, and writes a little.
    machine.forget();
    machine
        .memory
        .memory()
        .write_obj(7_u64, GuestAddress(0x10_0000))?;
    let (written, second) = machine.diff()?;
    println!("then {written} bytes were written, and {second} of them are in the diff");
    Ok(())
}

impl Machine {
    fn start(path: &str) -> Result<Self, Box<dyn Error>> {
        let mut file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len())?;
        if len as u64 > HOLE {
            return Err("this example's guests have at most 3 GiB".into());
        }
        let memory = Memory::from_ranges(&[(GuestAddress(0), len)])?;
        memory.read_exact_volatile_from(GuestAddress(0), &mut file, len)?;
        let memory = GuestMemoryAtomic::new(memory);
        // The regions that there are now; where memory is plugged in, this is done again.
        let now = SharedVmMemory::new(memory.memory().into_inner())?;
        let guest = OwnedGuest::open(Arc::new(now), &sonicshot_vmi::GuestOptions::new())?;
        Ok(Self { memory, guest })
    }

    fn release(&self) -> String {
        self.guest
            .with(|guest| format!("Linux {}", guest.release()))
    }

    /// The number of bytes written since the last diff, and of those that the guest needs. The VMM
    /// has paused the guest here; in a second it lets it run on, whatever came of it.
    fn diff(&self) -> Result<(u64, u64), Box<dyn Error>> {
        let stop = Stop::at(Instant::now() + Duration::from_secs(1));
        let options = AnalysisOptions::new().stop(stop);
        let analysis = self.guest.analyze(&options)?;
        let plan = analysis.plan(&DropClasses::default());
        let written = written(&self.memory.memory());
        let mut kept = 0;
        for range in &written {
            kept += plan.kept_in(*range).map(|range| range.len()).sum::<u64>();
        }
        Ok((written.iter().map(GpaRange::len).sum(), kept))
    }

    /// Nothing was written since now.
    fn forget(&self) {
        for region in self.memory.memory().iter() {
            MmapRegion::bitmap(region).reset();
        }
    }
}

/// The pages that were written, as ranges. That SonicShot read them has not marked any.
fn written(memory: &Memory) -> Vec<GpaRange> {
    let mut ranges: Vec<GpaRange> = Vec::new();
    for region in memory.iter() {
        let pages = 0..region.len() / PAGE.bytes();
        let dirty = pages.filter(|page| {
            let offset = usize::try_from(page * PAGE.bytes());
            offset.is_ok_and(|offset| region.bitmap().dirty_at(offset))
        });
        for page in dirty {
            let at = sonicshot::Gpa::new(region.start_addr().0 + page * PAGE.bytes());
            let Some(page) = GpaRange::with_len(at, PAGE.bytes()) else {
                continue;
            };
            match ranges.last_mut() {
                Some(last) if last.end() == at => *last = GpaRange::new(last.start(), page.end()),
                _ => ranges.push(page),
            }
        }
    }
    ranges
}
