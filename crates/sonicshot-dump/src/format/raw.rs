//! Raw guest RAM: the bytes of a memory backend file, a Firecracker memory file, a Cloud
//! Hypervisor `memory-ranges` file.

use crate::backing::Stored;
use crate::backing::plain::{Extent, PlainDump};
use crate::format::ability::{ByCopy, Copying, InPlace, Punching};
use crate::format::kind::{Format, Source};
use crate::prune::copy::Copier;
use crate::prune::holes::sum_of;
use crate::prune::runs::file_runs;
use crate::prune::stats::PruneStats;
use crate::{DumpError, LayoutSpec};
use sonicshot::{FileOffset, FileRange, PrunePlan, Tally, to_u64};
use std::path::Path;

/// A raw file, mapped.
#[derive(Debug)]
pub(crate) struct Raw {
    pub mapped: PlainDump,
    pub layout: LayoutSpec,
}

/// Opens a file that nothing tells the format of.
pub(crate) fn open(source: Source<'_>) -> Result<Raw, DumpError> {
    let len = source.len();
    // Whoever gives a layout knows of memory that ends inside a page. What is shorter than one is
    // what is left of another file.
    if !len.is_multiple_of(4096) && (source.layout().is_none() || len < 4096) {
        return Err(DumpError::OddLength {
            path: source.path.to_owned(),
            len,
            is_said: source.known.format.is_some(),
        });
    }
    let layout = source.layout().cloned().unwrap_or(LayoutSpec::Pc);
    let extents = extents(source.path, len, &layout)?;
    let mapped = source.mapped(extents)?;
    Ok(Raw { mapped, layout })
}

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw RAM"
    }

    fn stored(&self) -> &dyn Stored {
        &self.mapped
    }

    fn layout(&self) -> Option<&LayoutSpec> {
        Some(&self.layout)
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }

    fn in_place(&self) -> Option<&dyn InPlace> {
        Some(self)
    }
}

impl ByCopy for Raw {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        copy_kept(&self.mapped, work)
    }
}

impl InPlace for Raw {
    fn source(&self) -> &PlainDump {
        &self.mapped
    }

    fn punching(&self, goes: &PrunePlan, stats: &mut PruneStats) -> Result<Punching, DumpError> {
        punch_dropped(&self.mapped, goes, stats)
    }
}

/// Copies the pages that are kept of a file that is nothing but pages, each to its own place.
pub(crate) fn copy_kept(dump: &PlainDump, work: Copying<'_>) -> Result<(), DumpError> {
    let Copying {
        goes,
        output,
        stats,
        progress,
        ..
    } = work;
    let total = dump.file_len();
    let sized = output.file().set_len(total);
    sized.map_err(DumpError::io("writing", output.path()))?;
    let runs = file_runs(dump, goes)?;
    let kept_total = Tally::new(total).without(sum_of(&runs)).get();
    let mut copier = Copier::new(dump, output, kept_total, progress);
    for extent in dump.extents() {
        for kept in goes.kept_in(extent.guest) {
            if let Some(offset) = dump.offset_in(extent, kept.start())? {
                let from = FileRange::with_len(offset, kept.len());
                copier.copy(from.ok_or_else(|| beyond(dump, offset))?, offset)?;
            }
        }
    }
    stats.runs = to_u64(runs.len());
    stats.cloned_bytes = copier.cloned();
    Ok(())
}

fn beyond(dump: &PlainDump, at: FileOffset) -> DumpError {
    DumpError::malformed(dump.path(), "a range beyond 64 bits", at, 0)
}

/// The ranges of such a file to be punched.
pub(crate) fn punch_dropped(
    dump: &PlainDump,
    goes: &PrunePlan,
    stats: &mut PruneStats,
) -> Result<Punching, DumpError> {
    let runs = file_runs(dump, goes)?;
    stats.runs = to_u64(runs.len());
    let marks = Vec::new();
    Ok(Punching { marks, runs })
}

/// The extents of a raw file of `len` bytes, by `spec`.
fn extents(path: &Path, len: u64, spec: &LayoutSpec) -> Result<Vec<Extent>, DumpError> {
    let mut offset = FileOffset::ZERO;
    let mut extents = Vec::new();
    for guest in spec.ranges(len) {
        extents.push(Extent {
            guest,
            offset: Some(offset),
        });
        offset = offset
            .checked_add(guest.len())
            .ok_or_else(|| DumpError::malformed(path, "a layout beyond 64 bits", offset, len))?;
    }
    if offset.raw() != len {
        return Err(DumpError::LayoutLength {
            path: path.to_owned(),
            layout: spec.to_string(),
            described: offset.raw(),
            actual: len,
        });
    }
    Ok(extents)
}
