//! Writes a dump without its dropped pages: by copy, in place, from front to back.

pub(crate) mod copy;
pub(crate) mod holes;
pub(crate) mod in_place;
pub(crate) mod runs;
pub(crate) mod stats;
pub(crate) mod stream;

use crate::format::ability::Copying;
use crate::output::{Output, Overwrite, Target};
use crate::{Dump, DumpError};
use sonicshot::Progress;
use sonicshot::PrunePlan;
use stats::{PruneStats, disk_usage};
use std::fs::File;
use std::io::Write;
use std::path::Path;

impl Dump {
    /// What every prune begins with: what of `plan` the format can drop, and what that comes to.
    /// `files` are those of which the size on disk is told.
    pub(crate) fn begin(
        &self,
        plan: &PrunePlan,
        files: &[&File],
    ) -> Result<(PrunePlan, PruneStats), DumpError> {
        let goes = self.restorable(plan);
        let mut stats = PruneStats::of(plan, &goes);
        for file in files {
            let on_disk = disk_usage(file, self.path())?;
            stats.disk_before = stats.disk_before.saturating_add(on_disk);
        }
        Ok((goes, stats))
    }

    /// Writes a dump of the same format to `out` without the pages that `plan` drops.
    ///
    /// A raw file keeps its length; dropped pages are holes and read as zero. An ELF core leaves
    /// them out of its segments' data. What the format cannot [restore](Self::restores) as the guest
    /// expects it is kept. The output appears whole or not at all.
    ///
    /// # Errors
    /// [`DumpError::Exists`], [`DumpError::SameFile`], [`DumpError::CannotPrune`] for a format
    /// that is only read, or what writing gives; `out` is then as it was.
    pub fn prune_to(
        &self,
        plan: &PrunePlan,
        out: &Path,
        overwrite: Overwrite,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        self.prune_at(plan, Target::new(out, overwrite), progress)
    }

    pub(crate) fn prune_at(
        &self,
        plan: &PrunePlan,
        out: Target<'_>,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        let format = self.by_copy()?;
        self.check_unchanged()?;
        let files = self.files();
        let (goes, mut stats) = self.begin(plan, &files)?;
        let output = Output::create(out, &files)?;
        format.copy(Copying {
            goes: &goes,
            output: &output,
            stats: &mut stats,
            progress,
        })?;
        stats.disk_after = output.finish()?;
        Ok(stats)
    }

    /// Writes a dump of the same format without the pages that `plan` drops, from front to back:
    /// into a pipe. Only migration streams, those in a libvirt image too, and Xen images can be
    /// written so.
    /// What is written is complete only if this returns without an error.
    ///
    /// # Errors
    /// [`DumpError::NotAStream`] for other formats, and what reading and writing gives.
    pub fn prune_to_writer(
        &self,
        plan: &PrunePlan,
        mut out: impl Write,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        let format = self.as_stream()?;
        self.check_unchanged()?;
        let (goes, mut stats) = self.begin(plan, &[self.file()])?;
        format.count(&goes, &mut stats);
        stats.disk_after = stream::write(format, &goes, self.path(), &mut out, progress)?;
        Ok(stats)
    }
}
