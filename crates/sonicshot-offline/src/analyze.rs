//! From a snapshot to the class of every page in it.

use crate::error::OfflineError;
use crate::note::Note;
use crate::options::AnalyzeOptions;
use crate::place::{self, Placed};
use crate::snapshot::Snapshot;
use sonicshot::{ClassCounts, ClassSet, DropClasses, Fill, PageClass, PageMap, PrunePlan};
use sonicshot_dump::{
    CheckedPlan, Doubts, Dump, DumpError, SnapshotFiles, check_whole, keep_in_doubt,
};
use sonicshot_vmi::{
    Analysis, AnalysisOptions, GuestFacts, Inconsistency, OnInconsistency, ZoneReport,
};

/// What is known of a snapshot's guest: its kernel, the class of every page, and what there is to
/// say of them.
#[derive(Debug)]
pub struct Analyzed {
    dump: Dump,
    files: SnapshotFiles,
    layout_origin: &'static str,
    doubts: Doubts,
    analysis: Analysis,
    counts: ClassCounts,
    notes: Vec<Note>,
}

impl Snapshot {
    /// Opens the memory in the layout that its guest confirms, finds the kernel that owns it, and
    /// classifies every page. What is not certain to be what it seems is kept.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if the file is damaged or none that is read,
    /// [`OfflineError::NoLayout`], [`OfflineError::Misplaced`] and the like if its layout is not
    /// found or wrong, [`OfflineError::Guest`] if there is no kernel, or one that does not own the
    /// memory or contradicts itself, [`OfflineError::NotWhole`] if it is a diff without its base.
    pub fn analyze(&self, options: &AnalyzeOptions) -> Result<Analyzed, OfflineError> {
        self.look(options).map_err(|error| self.blame(error))
    }

    fn look(&self, options: &AnalyzeOptions) -> Result<Analyzed, OfflineError> {
        // Of pages whose place is in doubt it does not count what the kernel says, but that they
        // are zero does.
        let look = AnalysisOptions::new()
            .on_inconsistency(options.on_inconsistency)
            .zero_pages(false);
        let Placed {
            dump,
            origin,
            doubts,
            notes: of_places,
            value: mut analysis,
        } = place::with_guest(self, &|guest| guest.analyze(&look))?;
        let doubts = doubts.partial(options.on_inconsistency != OnInconsistency::Refuse);
        if !doubts.may_be_partial() {
            check_whole(&dump, &analysis).map_err(not_whole)?;
        }
        keep_in_doubt(&dump, &mut analysis, &doubts);
        let mut notes: Vec<Note> = analysis.notes().iter().cloned().map(Note::Guest).collect();
        let unconfirmed = doubts.of_unconfirmed().iter();
        notes.extend(unconfirmed.map(|range| Note::Unconfirmed { range: *range }));
        notes.extend(of_places);
        notes.extend(self.notes());
        if options.zero_pages {
            analysis.mark_zero_pages(&dump)?;
            notes.extend(kept_for_fill(&dump, analysis.free_fill()));
        }
        dump.check_unchanged()?;
        Ok(Analyzed {
            counts: analysis.counts(),
            dump,
            files: self.files().clone(),
            layout_origin: origin,
            doubts,
            analysis,
            notes,
        })
    }
}

/// The refusal of a diff without its base, as users of this crate see it.
fn not_whole(error: DumpError) -> OfflineError {
    match error {
        DumpError::NotWhole { path, at } => OfflineError::NotWhole { path, at },
        error => error.into(),
    }
}

/// What a format keeps because nobody knows what a dropped page reads as.
fn kept_for_fill(dump: &Dump, free_fill: Fill) -> Option<Note> {
    let can_go = |class| dump.restores(Fill::of(class, free_fill));
    match (can_go(PageClass::Zero), can_go(PageClass::FreeBuddy)) {
        (true, _) => None,
        (false, true) => Some(Note::ZeroPagesKept),
        (false, false) => Some(Note::FreePagesKept),
    }
}

impl Analyzed {
    pub(crate) fn without_kernel(dump: Dump, files: SnapshotFiles, analysis: Analysis) -> Self {
        Self {
            counts: analysis.counts(),
            dump,
            files,
            layout_origin: "no kernel confirms it, and zeroes need none",
            doubts: Doubts::none(),
            analysis,
            notes: vec![Note::NoKernel],
        }
    }

    /// The memory, and how the file holds it.
    #[must_use]
    pub fn dump(&self) -> &Dump {
        &self.dump
    }

    /// How the layout of the file was found, for people.
    #[must_use]
    pub fn layout_origin(&self) -> &'static str {
        self.layout_origin
    }

    /// Who the guest is.
    #[must_use]
    pub fn facts(&self) -> &GuestFacts {
        self.analysis.facts()
    }

    /// The class of every page.
    #[must_use]
    pub fn pages(&self) -> &PageMap {
        self.analysis.pages()
    }

    /// How many pages there are of each class.
    #[must_use]
    pub fn counts(&self) -> &ClassCounts {
        &self.counts
    }

    /// Every zone's numbers.
    #[must_use]
    pub fn zones(&self) -> &[ZoneReport] {
        self.analysis.zones()
    }

    /// Blocks on which the guest's records disagree (kept), if there are any.
    #[must_use]
    pub fn disagreement(&self) -> Option<&Inconsistency> {
        self.analysis.disagreement()
    }

    /// What the guest expects of free pages.
    #[must_use]
    pub fn free_fill(&self) -> Fill {
        self.analysis.free_fill()
    }

    /// What is worth knowing, for people.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Whether pages of `class` can go in this format: whether they read as the guest expects
    /// after a restore.
    #[must_use]
    pub fn can_go(&self, class: PageClass) -> bool {
        self.dump.restores(Fill::of(class, self.free_fill()))
    }

    /// What a prune of `classes` would drop of this format.
    #[must_use]
    pub fn droppable(&self, classes: ClassSet) -> PrunePlan {
        self.dump.restorable(&self.wanted(classes))
    }

    pub(crate) fn wanted(&self, classes: ClassSet) -> PrunePlan {
        self.analysis.plan(&DropClasses(classes))
    }

    /// The same as a plan that a file is pruned by.
    pub(crate) fn checked(&self, classes: ClassSet) -> Result<CheckedPlan<'_>, OfflineError> {
        self.files.check_prunable()?;
        let plan = CheckedPlan::new(&self.dump, &self.analysis, &self.doubts, classes);
        plan.map_err(not_whole)
    }

    pub(crate) fn files(&self) -> &SnapshotFiles {
        &self.files
    }
}
