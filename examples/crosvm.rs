//! Guest memory as crosvm has it: mappings of its own, and no `vm-memory`. `MappedRegions` takes where
//! they are, and is all that is needed.
//!
//! ```console
//! $ cargo run --release --example crosvm -- guest.raw
//! ```
//!
//! The file stands in for a running guest: it is mapped where crosvm would have the guest's RAM.

use sonicshot::{DropClasses, Gpa, GuestBytes, GuestMemory, MappedRegions};
use sonicshot_vmi::{GuestOptions, OwnedGuest};
use std::error::Error;
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

/// This VMM has all its RAM below the PCI hole.
const HOLE: u64 = 3 << 30;

/// A mapping of the VMM's, which is unmapped when the machine ends.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

/// The VMM's part of a machine. Whatever looks at memory is dropped before the memory.
struct Machine {
    guest: OwnedGuest,
    _mapping: Mapping,
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: crosvm GUEST.raw")?;
    let machine = Machine::start(&path)?;
    // The VMM has paused its processors and devices here.
    let analysis = machine
        .guest
        .analyze(&sonicshot_vmi::AnalysisOptions::new())?;
    let plan = analysis.plan(&DropClasses::default());
    let facts = analysis.facts();
    println!(
        "Linux {}: {} MiB can go",
        facts.release,
        plan.dropped_bytes() >> 20
    );
    Ok(())
}

impl Machine {
    fn start(path: &str) -> Result<Self, Box<dyn Error>> {
        let mapping = Mapping::of(&File::open(path)?)?;
        let memory: Arc<dyn GuestMemory> = Arc::new(mapping.memory()?);
        let guest = OwnedGuest::open(memory, &GuestOptions::new())?;
        Ok(Self {
            guest,
            _mapping: mapping,
        })
    }
}

impl Mapping {
    #[expect(unsafe_code, reason = "a VMM maps its guest's memory itself")]
    fn of(file: &File) -> Result<Self, Box<dyn Error>> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let len = usize::try_from(file.metadata()?.len().min(HOLE))?;
        // SAFETY: a new mapping, of which no reference is made.
        let start = unsafe {
            let (read, private) = (ProtFlags::READ, MapFlags::PRIVATE);
            mmap(std::ptr::null_mut(), len, read, private, file, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or("a mapping at address zero")?;
        Ok(Self { start, len })
    }

    /// The guest's view of it: of a guest with a PCI hole, two parts.
    #[expect(unsafe_code, reason = "what is mapped is lent by its address")]
    fn memory(&self) -> Result<MappedRegions<'static>, Box<dyn Error>> {
        // SAFETY: these bytes are mapped until the machine ends, which drops the guest first, and with
        // it what is made here. The guest may write to them: no reference to them is made.
        let bytes = unsafe { GuestBytes::from_raw_parts(self.start, self.len) };
        Ok(MappedRegions::new(vec![(Gpa::ZERO, bytes)])?)
    }
}

impl Drop for Mapping {
    #[expect(unsafe_code, reason = "a VMM unmaps its guest's memory itself")]
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, and nothing looks at it any more. That it fails helps nobody.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
