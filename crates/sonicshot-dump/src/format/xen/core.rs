//! Cores of `xl dump-core`, which are only read.

use crate::DumpError;
use crate::backing::Stored;
use crate::backing::plain::{Extent, PlainDump};
use crate::format::elf_core;
use crate::format::kind::{Format, Kind, Source, boxed};
use crate::format::xen::{PAGE, failed, options, processors};
use sonicshot::{Architecture, P2m, Processors};
use sonicshot_xen::{CoreDump, DomainKind};

/// An ELF file as others, told by what is in it.
pub(crate) const KIND: Kind = Kind {
    is_one: |source| CoreDump::is_core(source.data()),
    ..Kind::by_magic("xen-core", &[b"\x7fELF"], |source| open(source).map(boxed))
};

/// A core, mapped.
#[derive(Debug)]
struct XenCore {
    mapped: PlainDump,
    core: CoreDump,
    machine: Architecture,
}

fn open(source: Source<'_>) -> Result<XenCore, DumpError> {
    let core =
        CoreDump::parse_with(source.data(), &options(&source)).map_err(failed(source.path))?;
    let machine = elf_core::wire::machine(source.path, core.machine())?;
    let extents = extents(&core);
    let mapped = source.mapped(extents)?;
    Ok(XenCore {
        mapped,
        core,
        machine,
    })
}

fn extents(core: &CoreDump) -> Vec<Extent> {
    let extent = |run: &sonicshot_xen::CoreRun| {
        let guest = run.frames.gpa_range(PAGE)?;
        let offset = Some(run.offset);
        Some(Extent { guest, offset })
    };
    core.runs().iter().filter_map(extent).collect()
}

impl Format for XenCore {
    fn name(&self) -> &'static str {
        match self.core.kind() {
            DomainKind::Pv => "Xen core (PV)",
            _ => "Xen core (HVM or PVH)",
        }
    }

    fn stored(&self) -> &dyn Stored {
        &self.mapped
    }

    fn machine(&self) -> Option<Architecture> {
        Some(self.machine)
    }

    fn processors(&self) -> Processors {
        let vcpus = self.core.vcpus(self.mapped.bytes());
        processors(vcpus, self.core.kind(), &self.mapped)
    }

    fn p2m(&self) -> Option<&P2m> {
        self.core.p2m()
    }

    fn instead(&self) -> &'static str {
        "a core of Xen is only read here: prune an image of `xl save`, or save this as a checkpoint"
    }
}
