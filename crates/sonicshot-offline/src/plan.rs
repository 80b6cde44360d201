//! What is to be dropped of an analysed snapshot, and the pruning.

use crate::analyze::Analyzed;
use crate::error::OfflineError;
use sonicshot::{ClassSet, PageSize, Progress, PrunePlan};
use sonicshot_dump::{CheckedPlan, NewFolder, Overwrite, PruneOptions, PruneStats};
use std::io::Write;
use std::path::Path;

/// Which pages of a snapshot are dropped; every way to write it without them.
#[derive(Debug)]
pub struct Plan<'a> {
    analyzed: &'a Analyzed,
    classes: ClassSet,
    /// By the classes alone.
    wanted: PrunePlan,
    /// What of that can go in this format.
    dropped: PrunePlan,
}

impl Analyzed {
    /// Plans to drop all pages of `classes`.
    ///
    /// # Errors
    /// [`OfflineError::Undroppable`] if one of them is never dropped.
    pub fn plan(&self, classes: ClassSet) -> Result<Plan<'_>, OfflineError> {
        check_droppable(classes)?;
        Ok(Plan {
            analyzed: self,
            classes,
            wanted: self.wanted(classes),
            dropped: self.droppable(classes),
        })
    }
}

/// Refuses classes that are never dropped. Every plan does so too; this is for those who want to
/// know before they look at the guest.
///
/// # Errors
/// [`OfflineError::Undroppable`] with the first of them.
pub fn check_droppable(classes: ClassSet) -> Result<(), OfflineError> {
    let mut classes = classes.iter();
    match classes.find(|class| !class.may_be_dropped()) {
        Some(class) => Err(OfflineError::Undroppable { class }),
        None => Ok(()),
    }
}

impl<'a> Plan<'a> {
    /// The guest's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.dropped.page_size()
    }

    /// How many pages are dropped. A file may keep some of them: what came of it is in the
    /// [`PruneStats`].
    #[must_use]
    pub fn dropped_pages(&self) -> u64 {
        self.dropped.dropped_pages()
    }

    /// How many bytes are dropped.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        self.dropped.dropped_bytes()
    }

    /// In how many runs they lie.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.dropped.runs().len()
    }

    /// Writes a dump of the same format without the pages; of a folder a folder. It appears whole
    /// or not at all.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: the output exists, the format or the VMM cannot be without the
    /// pages, or reading or writing fails.
    pub fn prune_to(
        &self,
        out: impl AsRef<Path>,
        overwrite: Overwrite,
        progress: Progress<'_>,
    ) -> Result<PruneStats, OfflineError> {
        let files = self.analyzed.files();
        let plan = self.checked()?;
        if files.folder().is_none() {
            return Ok(plan.prune_to(out.as_ref(), overwrite, progress)?);
        }
        let folder = NewFolder::create(out.as_ref(), overwrite, files)?;
        let stats = folder.write_memory(&plan, progress)?;
        folder.finish()?;
        Ok(stats)
    }

    /// Punches the pages out of the file itself. Whatever interrupts it leaves a valid dump.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: a process has the file open for writing, it was changed since it was
    /// read, its format or file system has no holes, or the VMM would not read them as zero.
    pub fn prune_in_place(
        &self,
        options: &PruneOptions,
        progress: Progress<'_>,
    ) -> Result<PruneStats, OfflineError> {
        Ok(self.checked()?.prune_in_place_with(options, progress)?)
    }

    /// Writes a migration stream without the pages into a pipe.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: the format is no stream, or reading or writing fails.
    pub fn prune_to_writer(
        &self,
        out: impl Write,
        progress: Progress<'_>,
    ) -> Result<PruneStats, OfflineError> {
        Ok(self.checked()?.prune_to_writer(out, progress)?)
    }

    /// The plan with every guard behind it, which refuse what cannot be pruned at all.
    pub(crate) fn checked(&self) -> Result<CheckedPlan<'a>, OfflineError> {
        self.analyzed.checked(self.classes)
    }

    pub(crate) fn analyzed(&self) -> &Analyzed {
        self.analyzed
    }

    /// By the classes alone: a checkpoint can keep for every page what it must read as.
    pub(crate) fn wanted(&self) -> &PrunePlan {
        &self.wanted
    }
}
