//! Images of `xl save`, and the streams in them.
//!
//! Page data of an image lies in the file at any offset. A dropped page stays named, without
//! content.

use crate::DumpError;
use crate::backing::Stored;
use crate::backing::plain::{Extent, PlainDump};
use crate::format::ability::{AsStream, ByCopy, Copying, EachPart, Part, Skeletal};
use crate::format::kind::{Format, Kind, Source, boxed};
use crate::format::xen::{PAGE, failed, options, processors};
use crate::prune::stats::PruneStats;
use crate::prune::stream;
use sonicshot::{Fill, GpaRange, PfnRange, Processors, PrunePlan, Tally, to_u64};
use sonicshot_xen::{DomainKind, Layer, XlImage};

pub(crate) const KIND: Kind = Kind::by_magic(
    "xen",
    &[
        b"Xen saved domain",
        b"LibxlFmt",
        b"\xff\xff\xff\xff\xff\xff\xff\xffXENF",
    ],
    |source| open(source).map(boxed),
);

/// An image, mapped.
#[derive(Debug)]
struct XlDump {
    mapped: PlainDump,
    image: XlImage,
}

fn open(source: Source<'_>) -> Result<XlDump, DumpError> {
    let image =
        XlImage::parse_with(source.data(), &options(&source)).map_err(failed(source.path))?;
    let extents = extents(&image);
    let mut mapped = source.mapped(extents)?;
    mapped.trust_extents();
    Ok(XlDump { mapped, image })
}

impl Format for XlDump {
    fn name(&self) -> &'static str {
        match (self.image.outermost(), self.image.kind()) {
            (Layer::Xl, DomainKind::Pv) => "Xen save image (PV)",
            (Layer::Xl, _) => "Xen save image (HVM or PVH)",
            (_, DomainKind::Pv) => "Xen migration stream (PV)",
            _ => "Xen migration stream (HVM or PVH)",
        }
    }

    fn stored(&self) -> &dyn Stored {
        &self.mapped
    }

    /// Xen gives the guest pages of which nobody knows what is in them.
    fn dropped_reads_as(&self) -> Fill {
        Fill::Any
    }

    /// The frames that Xen holds to be page tables of a PV guest.
    fn must_stay(&self) -> Vec<PfnRange> {
        let mut runs: Vec<PfnRange> = Vec::new();
        let stay = self.image.frames().iter();
        for frame in stay.filter(|frame| !frame.may_be_dropped()) {
            let Some(one) = PfnRange::with_len(frame.pfn(), 1) else {
                continue;
            };
            one.append_to(&mut runs);
        }
        runs
    }

    fn holds_device_state(&self) -> bool {
        true
    }

    fn processors(&self) -> Processors {
        let vcpus = self.image.vcpus(self.mapped.bytes());
        processors(vcpus, self.image.kind(), &self.mapped)
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }

    fn as_stream(&self) -> Option<&dyn AsStream> {
        Some(self)
    }

    fn as_skeletal(&self) -> Option<&dyn Skeletal> {
        Some(self)
    }
}

impl ByCopy for XlDump {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        stream::copy(self, work)
    }
}

impl AsStream for XlDump {
    fn source(&self) -> &PlainDump {
        &self.mapped
    }

    fn pruned(&self, goes: &PrunePlan, each: EachPart<'_>) -> Result<(), DumpError> {
        let dropped = self.image.dropped(goes);
        let failed = failed(self.mapped.path());
        self.image
            .pruned(self.mapped.bytes(), &dropped, failed, |part| {
                each(match part {
                    sonicshot_xen::Part::Copy(range) => Part::Copy(range),
                    sonicshot_xen::Part::Bytes(bytes) => Part::Bytes(bytes),
                })
            })
    }

    /// Of what a plan drops, what Xen lets be dropped.
    fn count(&self, goes: &PrunePlan, stats: &mut PruneStats) {
        let dropped = self.image.dropped(goes);
        stats.dropped_bytes = Tally::new(dropped.pages()).times(PAGE.bytes()).get();
        stats.runs = to_u64(dropped.runs().len());
    }
}

impl Skeletal for XlDump {
    fn skeleton(&self, plan: &PrunePlan) -> Result<Vec<u8>, DumpError> {
        let skeleton = self
            .image
            .skeleton(self.mapped.bytes(), &self.image.dropped(plan));
        skeleton.map_err(failed(self.mapped.path()))
    }
}

/// The extents of the guest's RAM in the file; neighbours in both are one extent.
fn extents(image: &XlImage) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for frame in image.frames() {
        let frames = PfnRange::with_len(frame.pfn(), 1);
        let Some(guest) = frames.and_then(|frames| frames.gpa_range(PAGE)) else {
            continue;
        };
        let offset = frame.data();
        if let Some(last) = extents.last_mut()
            && last.guest.end() == guest.start()
            && last.file().map(|file| file.end()) == offset
        {
            last.guest = GpaRange::new(last.guest.start(), guest.end());
            continue;
        }
        extents.push(Extent { guest, offset });
    }
    extents
}
