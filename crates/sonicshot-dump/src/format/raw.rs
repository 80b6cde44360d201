//! Raw guest RAM: the bytes of a memory backend file, a Firecracker memory file, a Cloud
//! Hypervisor `memory-ranges` file.

use crate::backing::mapped::{Extent, MappedDump};
use crate::format::ability::{ByCopy, Copying, InPlace, Punching};
use crate::format::{Format, Source};
use crate::prune::copy::Copier;
use crate::prune::runs::file_runs;
use crate::prune::stats::PruneStats;
use crate::{DumpError, LayoutSpec};
use sonicshot::{GuestMemory, PrunePlan};
use std::fs::File;
use std::path::Path;

/// A raw file, mapped.
#[derive(Debug)]
pub(crate) struct Raw {
    pub mapped: MappedDump,
    pub layout: LayoutSpec,
}

/// Opens a file that nothing tells the format of.
pub(crate) fn open(source: Source<'_>) -> Result<Raw, DumpError> {
    let len = source.len();
    if !len.is_multiple_of(4096) {
        return Err(DumpError::NotADump {
            path: source.path.to_owned(),
            why: "it begins as no known format, and its length is no multiple of 4 KiB",
        });
    }
    let layout = source.layout.cloned().unwrap_or(LayoutSpec::Pc);
    let extents = extents(source.path, len, &layout)?;
    let mapped = source.mapped(extents)?;
    Ok(Raw { mapped, layout })
}

impl Format for Raw {
    fn name(&self) -> &'static str {
        "raw RAM"
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
        let dump = &self.mapped;
        let Copying { goes, output, .. } = work;
        let total = dump
            .extents()
            .iter()
            .fold(0_u64, |sum, extent| sum.saturating_add(extent.guest.len()));
        output
            .file()
            .set_len(total)
            .map_err(DumpError::io("writing", output.path()))?;
        let kept_total = total.saturating_sub(goes.dropped_bytes());
        let mut copier = Copier::new(dump, output, kept_total, work.progress);
        for extent in dump.extents() {
            for kept in goes.kept_in(extent.guest) {
                if let Some(offset) = dump.offset_in(extent, kept.start())? {
                    copier.copy(offset, offset, kept.len())?;
                }
            }
        }
        work.stats.runs = file_runs(dump, goes)?.len() as u64;
        work.stats.cloned_bytes = copier.cloned();
        Ok(())
    }
}

impl InPlace for Raw {
    fn source(&self) -> &MappedDump {
        &self.mapped
    }

    fn punching(&self, goes: &PrunePlan, stats: &mut PruneStats) -> Result<Punching, DumpError> {
        let runs = file_runs(&self.mapped, goes)?;
        stats.runs = runs.len() as u64;
        let marks = Vec::new();
        Ok(Punching { marks, runs })
    }
}

/// Where the bytes of a raw file of `len` bytes lie, by `spec`.
fn extents(path: &Path, len: u64, spec: &LayoutSpec) -> Result<Vec<Extent>, DumpError> {
    let mut offset = 0_u64;
    let mut extents = Vec::new();
    for guest in spec.ranges(len) {
        extents.push(Extent {
            guest,
            offset: Some(offset),
        });
        offset = offset.saturating_add(guest.len());
    }
    if offset != len {
        return Err(DumpError::LayoutLength {
            path: path.to_owned(),
            layout: spec.to_string(),
            described: offset,
            actual: len,
        });
    }
    Ok(extents)
}
