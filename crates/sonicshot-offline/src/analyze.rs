//! From a snapshot to the class of every page in it.

use crate::error::OfflineError;
use crate::note::Note;
use crate::options::AnalyzeOptions;
use crate::place::{self, Placed};
use crate::snapshot::Snapshot;
use crate::untold::UNTOLD_PAGE;
use crate::whole::{absent_bytes, keep_everything};
use sonicshot::{
    ClassCounts, ClassSet, DropClasses, Fill, GuestMemory, PageClass, PageMap, PageState,
    PrunePlan, Tally,
};
use sonicshot_dump::{
    CheckedPlan, Doubts, Dump, DumpError, SnapshotFiles, check_whole, keep_in_doubt, may_be_diff,
    of_a_diff,
};
use sonicshot_vmi::{
    Analysis, AnalysisOptions, FilePlaces, GuestFacts, Inconsistency, OnInconsistency, ZoneReport,
};

/// A snapshot's guest as it was analyzed: its kernel, the class of every page, and what there is to
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
    /// Whether zeroes are no reason to drop a page.
    may_be_diff: bool,
    /// The places where pages of files may be on their file systems.
    file_places: FilePlaces,
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
        let looked = self.look(options);
        looked.map_err(|error| self.blame(self.for_cut_off(self.for_incomplete(error))))
    }

    /// That memory is missing behind the end of a raw file says more than what is not found in the
    /// rest.
    fn for_cut_off(&self, error: OfflineError) -> OfflineError {
        /// A guest is told of a little less than there is; of more it never is.
        const MORE: u64 = 1 << 20;
        if !matches!(error, OfflineError::Guest { .. }) {
            return error;
        }
        let dump = self.dump(self.files().layout()).ok();
        let dump = dump.filter(|dump| dump.layout_spec().is_some());
        let told = dump.and_then(|dump| Some((place::told_ram(&dump)?, dump.layout().bytes())));
        match told {
            Some((told, len)) if told.checked_sub(len).is_some_and(|more| more > MORE) => {
                OfflineError::CutOff {
                    path: self.memory_file().to_owned(),
                    len,
                    told,
                    source: Box::new(error),
                }
            }
            _ => error,
        }
    }

    /// That pages are missing says more than that the guest is not found without them.
    fn for_incomplete(&self, error: OfflineError) -> OfflineError {
        let of_guest = matches!(
            error,
            OfflineError::Guest { .. } | OfflineError::Memory(_) | OfflineError::NoLayout { .. }
        );
        let dump = self.dump(self.files().layout()).ok().filter(|_| of_guest);
        let Some((dump, why)) = dump.and_then(|dump| dump.incomplete().map(|why| (dump, why)))
        else {
            return error;
        };
        let Ok((map, _)) = keep_everything(&dump, UNTOLD_PAGE) else {
            return error;
        };
        let first = map.runs().find(|(_, class)| *class == PageClass::Absent);
        match first.and_then(|(frames, _)| frames.start().gpa(UNTOLD_PAGE)) {
            Some(from) => OfflineError::Incomplete {
                path: self.memory_file().to_owned(),
                why,
                missing: absent_bytes(&map),
                from,
                source: Box::new(error),
            },
            None => error,
        }
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
            value: (mut analysis, file_places),
        } = place::with_guest(self, &|guest| {
            let analysis = guest.analyze(&look)?;
            // Guesses: what cannot be read has none.
            let places = options
                .file_places
                .then(|| guest.file_places(analysis.pages()).ok());
            Ok((analysis, places.flatten().unwrap_or_default()))
        })?;
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
        notes.extend(lacking(&dump, &analysis));
        if options.zero_pages {
            analysis.mark_zero_pages(&dump, &self.work())?;
            notes.extend(kept_for_fill(&dump, analysis.free_fill()));
        }
        let may_be_diff = may_be_diff(&dump, &analysis);
        notes.extend(may_be_diff.then_some(Note::MayBeDiff));
        dump.check_unchanged()?;
        Ok(Analyzed {
            counts: analysis.counts(),
            dump,
            files: self.files().clone(),
            layout_origin: origin,
            doubts,
            analysis,
            notes,
            may_be_diff,
            file_places,
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

/// The note on pages that the source does not have.
fn lacking(dump: &Dump, analysis: &Analysis) -> Option<Note> {
    let page_size = analysis.pages().page_size().bytes();
    let pages = analysis.absent().total();
    (pages > 0).then(|| Note::Absent {
        bytes: Tally::new(pages).times(page_size).get(),
        in_use: Tally::new(analysis.absent_in_use()).times(page_size).get(),
        may_be_zero: dump.absent_may_be_zero(),
        why: dump.incomplete(),
    })
}

/// The size of a file before and after a prune.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Savings {
    /// The space that the file takes on disk, in bytes.
    pub disk_before: u64,
    /// The part of it that the dropped pages take. Where it is 0 a prune has nothing to do.
    pub stored_bytes: u64,
}

impl Savings {
    /// The space on disk after a prune, about: file systems count in blocks.
    #[must_use]
    pub fn disk_after(&self) -> u64 {
        // Pages may share bytes of the file, and the file system may share them too.
        Tally::new(self.disk_before)
            .without(self.stored_bytes)
            .get()
    }
}

/// The note of pages that a format keeps because nobody knows what a dropped page reads as.
fn kept_for_fill(dump: &Dump, free_fill: Fill) -> Option<Note> {
    let free = PageState::new(PageClass::FreeBuddy);
    match (
        dump.restores(Fill::Zero),
        dump.restores(Fill::of(free, free_fill)),
    ) {
        (true, _) => None,
        (false, true) => Some(Note::ZeroPagesKept),
        (false, false) => Some(Note::FreePagesKept),
    }
}

impl Analyzed {
    pub(crate) fn without_kernel(
        dump: Dump,
        files: SnapshotFiles,
        analysis: Analysis,
        may_be_diff: bool,
    ) -> Self {
        let of_diff = may_be_diff.then_some(Note::HolesWithoutKernel);
        Self {
            counts: analysis.counts(),
            dump,
            files,
            layout_origin: "no kernel confirms it, and zeroes need none",
            doubts: Doubts::none(),
            analysis,
            notes: of_diff.or(Some(Note::NoKernel)).into_iter().collect(),
            may_be_diff,
            file_places: FilePlaces::default(),
        }
    }

    /// The memory, and how the file holds it.
    #[must_use]
    pub fn dump(&self) -> &Dump {
        &self.dump
    }

    /// The way in which the file's layout was found, for people.
    #[must_use]
    pub fn layout_origin(&self) -> &'static str {
        self.layout_origin
    }

    /// The facts about the guest.
    #[must_use]
    pub fn facts(&self) -> &GuestFacts {
        self.analysis.facts()
    }

    /// The class of every page.
    #[must_use]
    pub fn pages(&self) -> &PageMap {
        self.analysis.pages()
    }

    /// The number of pages of each class.
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

    /// The content that the guest expects of free pages.
    #[must_use]
    pub fn free_fill(&self) -> Fill {
        self.analysis.free_fill()
    }

    /// Notes for people.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Whether pages of `class` can go in this format: whether they read as the guest expects
    /// after a restore.
    #[must_use]
    pub fn can_go(&self, class: PageClass) -> bool {
        self.dump
            .restores(Fill::of(PageState::new(class), self.free_fill()))
    }

    /// The plan of a prune of `classes`, as far as this format can drop them.
    #[must_use]
    pub fn droppable(&self, classes: ClassSet) -> PrunePlan {
        self.dump.restorable(&self.wanted(self.leaves_out(classes)))
    }

    /// The part of `classes` that is left out of the file: no zeroes where the format stores them,
    /// or where the file may be a diff.
    #[must_use]
    pub fn leaves_out(&self, classes: ClassSet) -> ClassSet {
        let classes = self.dump.leaves_out(classes);
        match self.may_be_diff {
            true => of_a_diff(classes, self.analysis.free_fill()),
            false => classes,
        }
    }

    /// The savings of a prune of `classes`, before it is done.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if the file cannot be read.
    pub fn savings(&self, classes: ClassSet) -> Result<Savings, OfflineError> {
        self.savings_of(&self.droppable(classes))
    }

    pub(crate) fn savings_of(&self, dropped: &PrunePlan) -> Result<Savings, OfflineError> {
        Ok(Savings {
            disk_before: self.dump.disk_bytes()?,
            stored_bytes: self.dump.stored_bytes(dropped)?,
        })
    }

    /// The number of pages that the source does not have, although the guest uses them as far as its
    /// kernel says: without them it cannot run.
    #[must_use]
    pub fn absent_in_use(&self) -> u64 {
        self.analysis.absent_in_use()
    }

    pub(crate) fn wanted(&self, classes: ClassSet) -> PrunePlan {
        self.analysis.plan(&DropClasses(classes))
    }

    /// The same as a plan that a file is pruned by.
    pub(crate) fn checked(
        &self,
        classes: ClassSet,
        for_analysis: bool,
    ) -> Result<CheckedPlan<'_>, OfflineError> {
        self.files.check_prunable()?;
        let checked = if for_analysis {
            CheckedPlan::for_analysis
        } else {
            CheckedPlan::new
        };
        checked(&self.dump, &self.analysis, &self.doubts, classes).map_err(not_whole)
    }

    pub(crate) fn file_places(&self) -> &FilePlaces {
        &self.file_places
    }

    pub(crate) fn files(&self) -> &SnapshotFiles {
        &self.files
    }
}
