//! Xen's files, which `sonicshot-xen` understands: `xl save` images, the streams in them, and
//! `xl dump-core` cores.
//!
//! Page data of an image lies in the file at any offset. A dropped page stays named, without content.

pub(crate) mod join;

use crate::backing::mapped::{Extent, MappedDump};
use crate::format::elf_core;
use crate::format::qemu::stream::Part;
use crate::processors::{Halted, Registers, told};
use crate::{DumpError, PruneStats};
use sonicshot::{GpaRange, GuestBytes, GuestMemory, PageSize, PfnRange, Processor, Processors};
use sonicshot_xen::{CoreDump, DomainKind, Dropped, Layer, Vcpu, Vcpus, XenError, XlImage};
use std::path::Path;

const PAGE: PageSize = PageSize::SIZE_4K;

pub(crate) fn parse(path: &Path, data: GuestBytes<'_>) -> Result<XlImage, DumpError> {
    XlImage::parse(data).map_err(failed(path))
}

fn failed(path: &Path) -> impl Fn(XenError) -> DumpError + use<'_> {
    move |source| DumpError::Xen {
        path: path.to_owned(),
        source,
    }
}

pub(crate) fn name(image: &XlImage) -> &'static str {
    match (image.outermost(), image.kind()) {
        (Layer::Xl, DomainKind::Pv) => "Xen save image (PV)",
        (Layer::Xl, _) => "Xen save image (HVM or PVH)",
        (_, DomainKind::Pv) => "Xen migration stream (PV)",
        _ => "Xen migration stream (HVM or PVH)",
    }
}

pub(crate) fn core_name(core: &CoreDump) -> &'static str {
    match core.kind() {
        DomainKind::Pv => "Xen core (PV)",
        _ => "Xen core (HVM or PVH)",
    }
}

pub(crate) fn parse_core(path: &Path, data: GuestBytes<'_>) -> Result<CoreDump, DumpError> {
    let core = CoreDump::parse(data).map_err(failed(path))?;
    elf_core::machine(path, core.machine())?;
    Ok(core)
}

pub(crate) fn core_extents(core: &CoreDump) -> Vec<Extent> {
    let extent = |run: &sonicshot_xen::CoreRun| {
        let guest = run.frames.gpa_range(PAGE)?;
        let offset = Some(run.offset);
        Some(Extent { guest, offset })
    };
    core.runs().iter().filter_map(extent).collect()
}

/// Where each page of the guest's RAM is in the file; neighbours in both are one extent.
pub(crate) fn extents(image: &XlImage) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for frame in image.frames() {
        let frames = PfnRange::with_len(frame.pfn(), 1);
        let Some(guest) = frames.and_then(|frames| frames.gpa_range(PAGE)) else {
            continue;
        };
        let offset = frame.data();
        if let Some(last) = extents.last_mut()
            && last.guest.end() == guest.start()
            && last.offset.map(|at| at.saturating_add(last.guest.len())) == offset
        {
            last.guest = GpaRange::new(last.guest.start(), guest.end());
            continue;
        }
        extents.push(Extent { guest, offset });
    }
    extents
}

/// Hands out the pruned image piece by piece.
pub(crate) fn pruned(
    image: &XlImage,
    dump: &MappedDump,
    dropped: &Dropped,
    mut each: impl FnMut(Part<'_>) -> Result<(), DumpError>,
) -> Result<(), DumpError> {
    image.pruned(dump.bytes(), dropped, failed(dump.path()), |part| {
        each(match part {
            sonicshot_xen::Part::Copy { from, len } => Part::Copy { from, len },
            sonicshot_xen::Part::Bytes(bytes) => Part::Bytes(bytes),
        })
    })
}

/// The processors of an image or a core: those that are down were never started or were taken
/// offline.
pub(crate) fn processors(
    vcpus: Result<Vcpus, XenError>,
    kind: DomainKind,
    memory: &dyn GuestMemory,
) -> Processors {
    let processor = |vcpu: &Vcpu| {
        let Some(cs_base) = vcpu.cs_base.filter(|_| kind == DomainKind::Hvm) else {
            return Processor::Started(vcpu.control);
        };
        let registers = Registers {
            control: vcpu.control,
            rip: vcpu.rip,
            rflags: vcpu.rflags,
            cs_selector: vcpu.cs_selector.into(),
            cs_base,
        };
        registers.processor(vcpu.id == 0, Halted::Untold(memory))
    };
    told(match vcpus {
        Ok(vcpus) => {
            let online = vcpus.online.iter().map(processor);
            let offline = std::iter::repeat_n(Processor::NotStarted, vcpus.offline);
            Ok(online.chain(offline).collect())
        }
        Err(_) => Err("its records of the processors are missing or damaged"),
    })
}

/// Of what a plan drops, what Xen lets be dropped.
pub(crate) fn count(dropped: &Dropped, stats: &mut PruneStats) {
    stats.dropped_bytes = dropped.pages().saturating_mul(PAGE.bytes());
    stats.runs = dropped.runs().len() as u64;
}
