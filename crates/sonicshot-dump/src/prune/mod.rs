//! Writes a dump without its dropped pages: by copy, in place, from front to back.

pub(crate) mod copy;
pub(crate) mod holes;
pub(crate) mod in_place;
pub(crate) mod runs;
pub(crate) mod stats;
pub(crate) mod stream;

use crate::DumpError;
use crate::format::ability::Copying;
use crate::guard::CheckedPlan;
use crate::output::{Output, Target};
use holes::PruneOptions;
use sonicshot::{Progress, Tally};
use stats::{PruneStats, disk_usage};
use std::fs::File;
use std::io::Write;
use std::path::Path;

impl CheckedPlan<'_> {
    /// Begins a prune: counts what the plan comes to, and checks that the dump is what was opened.
    /// `files` are those of which the size on disk is told.
    pub(crate) fn begin(&self, files: &[&File]) -> Result<PruneStats, DumpError> {
        let stats = self.begin_with(files)?;
        self.dump().check_files_unchanged()?;
        Ok(stats)
    }

    /// The same of a file that may have been written to by who vouches for it.
    pub(crate) fn begin_with(&self, files: &[&File]) -> Result<PruneStats, DumpError> {
        let mut stats = PruneStats::of(self.wanted(), self.goes());
        for file in files {
            let on_disk = disk_usage(file, self.dump().path())?;
            stats.disk_before = Tally::new(stats.disk_before).and(on_disk).get();
        }
        Ok(stats)
    }

    /// Writes a dump of the same format to `out` without the pages that go.
    ///
    /// A raw file keeps its length; dropped pages are holes and read as zero. An ELF core leaves
    /// them out of its segments' data. What the format cannot [restore](crate::Dump::restores) as
    /// the guest expects it is kept. The output appears whole or not at all.
    ///
    /// # Errors
    /// [`DumpError::Exists`], [`DumpError::SameFile`], [`DumpError::CannotPrune`] for a format
    /// that is only read, or what writing gives; `out` is then as it was.
    pub fn prune_to(&self, out: &Path, options: &PruneOptions) -> Result<PruneStats, DumpError> {
        self.prune_at(Target::new(out, options.overwrite), &options.progress)
    }

    pub(crate) fn prune_at(
        &self,
        out: Target<'_>,
        progress: &dyn Progress,
    ) -> Result<PruneStats, DumpError> {
        let format = self.dump().by_copy()?;
        let files = self.dump().files();
        let mut stats = self.begin(&files)?;
        let output = Output::create(out, &files)?;
        let copied = format.copy(Copying {
            goes: self.goes(),
            given_up: self.given_up(),
            output: &output,
            stats: &mut stats,
            progress,
        });
        copied.map_err(|error| self.dump().blame(error))?;
        self.dump().check_unchanged()?;
        stats.disk_after = output.finish(progress)?;
        Ok(stats)
    }

    /// Writes a dump of the same format without the pages that go, from front to back: into a
    /// pipe. Only migration streams, those in a libvirt image too, and Xen images can be written
    /// so.
    /// The output is complete only if this returns without an error.
    ///
    /// # Errors
    /// [`DumpError::NotAStream`] for other formats, and what reading and writing gives.
    pub fn prune_to_writer(
        &self,
        mut out: impl Write,
        options: &PruneOptions,
    ) -> Result<PruneStats, DumpError> {
        let dump = self.dump();
        let format = dump.as_stream()?;
        let mut stats = self.begin(&[dump.file()])?;
        format.count(self.goes(), &mut stats);
        let written = stream::write(
            format,
            self.goes(),
            dump.path(),
            &mut out,
            &options.progress,
        );
        stats.disk_after = written.map_err(|error| dump.blame(error))?;
        dump.check_unchanged()?;
        Ok(stats)
    }

    /// The parts of a Xen image beside the guest's memory, without the pages that go and Xen lets
    /// be dropped: [`XlSkeleton::write`](crate::XlSkeleton::write) makes an image of it again.
    /// `None` of other formats.
    ///
    /// # Errors
    /// [`DumpError::Xen`] if the file is no longer what was opened.
    pub fn xl_skeleton(&self) -> Result<Option<Vec<u8>>, DumpError> {
        self.dump().skeleton_without(self.wanted())
    }
}
