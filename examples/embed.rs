//! Embeds the pruner in a VMM: guest memory in `vm-memory` regions is classified in place, and
//! only what the guest needs is written to the snapshot.
//!
//! ```console
//! $ cargo run --release --example embed -- guest.raw snapshot.raw
//! ```
//!
//! The file stands in for a running guest: its bytes are put into the VMM's regions first.

use sonicshot::{DropClasses, GuestMemory, VmMemory};
use sonicshot_vmi::{AnalysisOptions, analyze};
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// This VMM has all its RAM below the PCI hole.
const HOLE: u64 = 3 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(guest), Some(snapshot)) = (args.next(), args.next()) else {
        return Err("usage: embed GUEST.raw SNAPSHOT.raw".into());
    };
    let memory = start_guest(&guest)?;

    // The VMM has paused its processors and devices here.
    let guest = VmMemory::new(&memory)?;
    let analysis = analyze(&guest, &AnalysisOptions::new())?;
    // A hole in the snapshot reads as zero, so only what may read as zero is left out.
    let plan = analysis.plan(&DropClasses::default()).zero_filled_only();

    let out = File::create(&snapshot)?;
    out.set_len(guest.layout().bytes())?;
    let mut written = 0;
    for region in guest.layout().regions() {
        for kept in plan.kept_in(*region) {
            written += write_kept(&guest, &out, kept)?;
        }
    }
    println!(
        "Linux {}: wrote {} of {} MiB",
        analysis.facts().release,
        written >> 20,
        guest.layout().bytes() >> 20
    );
    Ok(())
}

/// Writes one kept range; the file's offset is the guest address, for this VMM has no hole.
fn write_kept(
    guest: &dyn GuestMemory,
    out: &File,
    kept: sonicshot::GpaRange,
) -> Result<u64, Box<dyn Error>> {
    let mut at = kept.start();
    let mut buffer = vec![0; 1 << 20];
    while let Some(left) = kept.end().offset_from(at).filter(|left| *left > 0) {
        let len = left.min(buffer.len() as u64);
        let part = buffer.get_mut(..usize::try_from(len)?).ok_or("a part")?;
        // A real VMM would hand `map(..).bytes().as_ptr()` to `pwritev` and copy nothing.
        guest.read(at, part)?;
        out.write_all_at(part, at.raw())?;
        at = at.checked_add(len).ok_or("the end of the address space")?;
    }
    Ok(kept.len())
}

/// Stands in for a guest that has been running.
fn start_guest(path: &str) -> Result<GuestMemoryMmap, Box<dyn Error>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    if len > HOLE {
        return Err("this example's guests have at most 3 GiB".into());
    }
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(len)?)])?;
    memory.read_exact_volatile_from(GuestAddress(0), &mut file, usize::try_from(len)?)?;
    Ok(memory)
}
