//! The pages to be dropped of an analysed snapshot, and the pruning.

use crate::analyze::{Analyzed, Savings};
use crate::error::OfflineError;
use sonicshot::{ClassSet, PageSize, PrunePlan};
use sonicshot_dump::{CheckedPlan, NewFolder, PruneOptions, PruneStats};
use std::io::Write;
use std::path::Path;

/// The pages of a snapshot that are dropped; every way to write it without them.
#[derive(Debug)]
pub struct Plan<'a> {
    analyzed: &'a Analyzed,
    classes: ClassSet,
    /// Whether pages that the guest uses may be among them.
    for_analysis: bool,
    /// By the classes alone.
    wanted: PrunePlan,
    /// The part of that that can go in this format.
    dropped: PrunePlan,
}

impl Analyzed {
    /// Plans to drop all pages of `classes`.
    ///
    /// # Errors
    /// [`OfflineError::Undroppable`] if one of them is never dropped,
    /// [`OfflineError::UsedByGuest`] if the guest uses one of them.
    pub fn plan(&self, classes: ClassSet) -> Result<Plan<'_>, OfflineError> {
        check_droppable(classes)?;
        check_unused(classes)?;
        self.plan_of(classes, false)
    }

    /// The same of classes that the guest uses too: it cannot run from the result, which is to be
    /// looked at. A checkpoint says so of itself.
    ///
    /// # Errors
    /// [`OfflineError::Undroppable`] if one of them is never dropped.
    pub fn plan_for_analysis(&self, classes: ClassSet) -> Result<Plan<'_>, OfflineError> {
        check_droppable(classes)?;
        self.plan_of(classes, true)
    }

    fn plan_of(&self, classes: ClassSet, for_analysis: bool) -> Result<Plan<'_>, OfflineError> {
        Ok(Plan {
            analyzed: self,
            classes,
            for_analysis,
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

/// Refuses classes that the guest uses. Every [`plan`](Analyzed::plan) does so too.
///
/// # Errors
/// [`OfflineError::UsedByGuest`] with all of them.
pub fn check_unused(classes: ClassSet) -> Result<(), OfflineError> {
    match classes.used_by_guest() {
        used if used.is_empty() => Ok(()),
        classes => Err(OfflineError::UsedByGuest { classes }),
    }
}

impl<'a> Plan<'a> {
    /// The pages that are dropped, by what put them there: a class, or `zero`.
    #[must_use]
    pub fn dropped_by_name(&self) -> Vec<(&'static str, u64)> {
        let counts = self.dropped.counts(self.analyzed.pages());
        counts.by_name(self.classes).collect()
    }

    /// The same of a checkpoint, which can do without all pages of the classes.
    pub(crate) fn wanted_by_name(&self) -> Vec<(&'static str, u64)> {
        let counts = self.wanted.counts(self.analyzed.pages());
        counts.by_name(self.classes).collect()
    }

    /// Whether the guest cannot run from the result: what it uses is dropped, or is not in the
    /// source.
    #[must_use]
    pub fn is_for_analysis(&self) -> bool {
        let dropped = self.wanted.used_by_guest(self.analyzed.pages());
        dropped.is_some() || self.analyzed.absent_in_use() > 0
    }

    /// The savings of a prune, before it is done.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if the file cannot be read.
    pub fn savings(&self) -> Result<Savings, OfflineError> {
        self.analyzed.savings_of(&self.dropped)
    }

    /// The guest's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.dropped.page_size()
    }

    /// The number of pages that are dropped. A file may keep some of them: what came of it is in the
    /// [`PruneStats`].
    #[must_use]
    pub fn dropped_pages(&self) -> u64 {
        self.dropped.dropped_pages()
    }

    /// The number of bytes that are dropped.
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
        options: &PruneOptions,
    ) -> Result<PruneStats, OfflineError> {
        let files = self.analyzed.files();
        let plan = self.checked()?;
        if files.folder().is_none() {
            return Ok(plan.prune_to(out.as_ref(), options)?);
        }
        let folder = NewFolder::create(out.as_ref(), options.overwrite, files)?;
        let stats = folder.write_memory(&plan, options)?;
        folder.finish()?;
        Ok(stats)
    }

    /// Punches the pages out of the file itself. Whatever interrupts it leaves a valid dump.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: a process has the file open for writing, it was changed since it was
    /// read, its format or file system has no holes, or the VMM would not read them as zero.
    pub fn prune_in_place(&self, options: &PruneOptions) -> Result<PruneStats, OfflineError> {
        Ok(self.checked()?.prune_in_place(options)?)
    }

    /// The result that [`prune_in_place`](Self::prune_in_place) would have. Nothing is changed.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: its format has no holes, or it cannot be read.
    pub fn expect_in_place(&self, options: &PruneOptions) -> Result<PruneStats, OfflineError> {
        Ok(self.checked()?.expect_in_place(options)?)
    }

    /// Writes a migration stream without the pages into a pipe.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: the format is no stream, or reading or writing fails.
    pub fn prune_to_writer(
        &self,
        out: impl Write,
        options: &PruneOptions,
    ) -> Result<PruneStats, OfflineError> {
        Ok(self.checked()?.prune_to_writer(out, options)?)
    }

    /// The plan with every guard behind it, which refuse what cannot be pruned at all.
    pub(crate) fn checked(&self) -> Result<CheckedPlan<'a>, OfflineError> {
        self.analyzed.checked(self.classes, self.for_analysis)
    }

    pub(crate) fn analyzed(&self) -> &Analyzed {
        self.analyzed
    }

    /// By the classes alone: a checkpoint can keep for every page what it must read as.
    pub(crate) fn wanted(&self) -> &PrunePlan {
        &self.wanted
    }
}
