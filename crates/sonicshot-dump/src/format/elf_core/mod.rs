//! ELF core dumps: QEMU's `dump-guest-memory`, `/proc/vmcore`, and others with one `PT_LOAD`
//! for each range of RAM.

mod copy;
mod mark;
mod memory;
pub(crate) mod wire;

use crate::DumpError;
use crate::Incomplete;
use crate::backing::Stored;
use crate::backing::plain::PlainDump;
use crate::format::ability::{ByCopy, Copying};
use crate::format::core_notes;
use crate::format::kind::{Format, Kind, Source, boxed};
use memory::CoreMemory;
use sonicshot::{Architecture, PageSize, Processors};
use wire::ElfCore;

pub(crate) const KIND: Kind = Kind {
    is_one: |source| {
        let start = source.start::<18>().unwrap_or([0; 18]);
        !may_be_ram(&start, source.len())
    },
    ..Kind::by_magic("elf", &[b"\x7fELF"], |source| open(source).map(boxed))
};

/// Whether an ELF file may be a guest's RAM: QEMU's microvm, Firecracker and Cloud Hypervisor leave
/// the header of the kernel that they load at guest-physical 0. It is that of a program, no core,
/// and RAM is whole pages, more of them than a program has that loads nothing else.
pub(crate) fn may_be_ram(start: &[u8], len: u64) -> bool {
    const LEAST: u64 = 16 << 20;
    // `e_type`, behind `e_ident`.
    let kind = start.get(16..18).filter(|_| start.starts_with(b"\x7fELF"));
    let is_other = kind.is_some_and(|kind| kind != wire::ET_CORE.to_le_bytes());
    is_other && len >= LEAST && len.is_multiple_of(PageSize::SIZE_4K.bytes())
}

/// An ELF core, mapped.
#[derive(Debug)]
pub(crate) struct ElfDump {
    mapped: PlainDump,
    core: ElfCore,
    incomplete: Option<Incomplete>,
    /// Memory without bytes, of which nothing says whether it was zero.
    leaves_out: bool,
}

fn open(source: Source<'_>) -> Result<ElfDump, DumpError> {
    let mut core = ElfCore::parse(source.path, source.data())?;
    let memory = CoreMemory::new(source.path, source.data(), &mut core)?;
    let incomplete = core.cut_before.map(|need| Incomplete::CutOff {
        len: source.len(),
        need: need.raw(),
    });
    let leaves_out = memory.leaves_out;
    let mapped = source.mapped(memory.extents)?.lacking(memory.absent);
    Ok(ElfDump {
        mapped,
        core,
        incomplete,
        leaves_out,
    })
}

impl Format for ElfDump {
    fn name(&self) -> &'static str {
        "ELF core"
    }

    fn stored(&self) -> &dyn Stored {
        &self.mapped
    }

    fn machine(&self) -> Option<Architecture> {
        Some(self.core.machine)
    }

    fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.core.vmcoreinfo.as_deref()
    }

    fn notes(&self) -> Option<Vec<u8>> {
        self.core.notes(self.mapped.bytes())
    }

    fn processors(&self) -> Processors {
        core_notes::processors(self.notes().as_deref(), self.vmcoreinfo(), &self.mapped)
    }

    fn incomplete(&self) -> Option<Incomplete> {
        self.incomplete.clone()
    }

    fn absent_may_be_zero(&self) -> bool {
        self.leaves_out
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }
}

impl ByCopy for ElfDump {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        copy::copy(&self.mapped, &self.core, work)
    }
}
