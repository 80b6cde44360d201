//! ELF core dumps: QEMU's `dump-guest-memory`, `/proc/vmcore`, and others with one `PT_LOAD`
//! for each stretch of RAM.

mod copy;
pub(crate) mod wire;

use crate::DumpError;
use crate::backing::mapped::MappedDump;
use crate::format::ability::{ByCopy, Copying};
use crate::format::{Format, Kind, Source, boxed, core_notes};
use sonicshot::{Architecture, GuestMemory, Processors};
use std::fs::File;
use wire::ElfCore;

pub(crate) const KIND: Kind = Kind::by_magic(&[b"\x7fELF"], |source| open(source).map(boxed));

/// An ELF core, mapped.
#[derive(Debug)]
pub(crate) struct ElfDump {
    mapped: MappedDump,
    core: ElfCore,
}

fn open(source: Source<'_>) -> Result<ElfDump, DumpError> {
    let core = ElfCore::parse(source.path, source.data())?;
    let extents = core.extents(source.path, source.len())?;
    let mapped = source.mapped(extents)?;
    Ok(ElfDump { mapped, core })
}

impl Format for ElfDump {
    fn name(&self) -> &'static str {
        "ELF core"
    }

    fn memory(&self) -> &dyn GuestMemory {
        &self.mapped
    }

    fn file(&self) -> &File {
        self.mapped.file()
    }

    fn check_unchanged(&self) -> Result<(), DumpError> {
        self.mapped.check_length()
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

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }
}

impl ByCopy for ElfDump {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        copy::copy(&self.mapped, &self.core, work)
    }
}
