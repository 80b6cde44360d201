//! The facts of a guest once it was looked at: one value, which only the looking makes.

use crate::{GuestOptions, Inconsistency, Knowledge, Note, OnInconsistency, VmiError, ZoneReport};
use crate::{mark_absent_pages, mark_zero_pages, open_guest};
use sonicshot::{
    Architecture, ClassCounts, ClassSet, Fill, GpaRange, GuestMemory, MemoryError, PageClass,
    PageMap, PageSize, PageState, PfnRange, Progress, PrunePlan, PrunePolicy, Stop, Stoppable,
    Tally, WorkOptions,
};
use std::sync::Arc;

/// Options for the analysis of a guest; by default nothing is known of it, a guest that contradicts
/// itself is refused, and pages in use are looked at for zeroes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AnalysisOptions {
    guest: GuestOptions,
    on_inconsistency: OnInconsistency,
    zero_pages: bool,
    stop: Option<Stop>,
    progress: Option<Arc<dyn Progress>>,
}

impl Default for AnalysisOptions {
    fn default() -> Self {
        Self {
            guest: GuestOptions::new(),
            on_inconsistency: OnInconsistency::Refuse,
            zero_pages: true,
            stop: None,
            progress: None,
        }
    }
}

impl AnalysisOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Options for the guest.
    #[must_use]
    pub fn guest(mut self, guest: GuestOptions) -> Self {
        self.guest = guest;
        self
    }

    /// Whether a guest whose sources disagree is classified all the same.
    #[must_use]
    pub fn on_inconsistency(mut self, on: OnInconsistency) -> Self {
        self.on_inconsistency = on;
        self
    }

    /// Whether pages in use are looked at for zeroes. Without it nothing is known of them until
    /// [`Analysis::mark_zero_pages`] is called.
    #[must_use]
    pub fn zero_pages(mut self, look: bool) -> Self {
        self.zero_pages = look;
        self
    }

    /// Ends the analysis before it is done: when somebody cancels it, or at a time. That goes
    /// for [`analyze`], [`GuestOs::analyze`](crate::GuestOs::analyze) and
    /// [`OwnedGuest::analyze`](crate::OwnedGuest::analyze); all of them then give
    /// [`VmiError::Stopped`].
    #[must_use]
    pub fn stop(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        self
    }

    /// Says who is told how far the analysis is, phase by phase: in bytes of memory, by
    /// [`analyze`] of the search for the kernel, then of the classification, then of the search for
    /// zero pages. Whoever the [guest's options](GuestOptions::progress) name is told if nobody is
    /// named here.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    pub(crate) fn who_is_told(&self) -> Option<&Arc<dyn Progress>> {
        self.progress.as_ref()
    }

    pub(crate) fn ends_by(&self) -> Option<&Stop> {
        self.stop.as_ref()
    }

    pub(crate) fn inconsistency(&self) -> OnInconsistency {
        self.on_inconsistency
    }

    pub(crate) fn looks_for_zero_pages(&self) -> bool {
        self.zero_pages
    }
}

/// Facts that identify the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestFacts {
    /// The name of its operating system: `Linux`.
    pub os: &'static str,
    /// The kernel's release, such as `6.1.0-37-cloud-amd64`; `unknown` where none was found.
    pub release: String,
    /// The kernel's banner (`Linux version …`), if it could be read.
    pub banner: Option<String>,
    /// The kernel's VMCOREINFO: what a dump of this guest carries as a note.
    pub vmcoreinfo: Option<String>,
    /// The kernel's build ID, if it tells one (Linux 5.9 and later).
    pub build_id: Option<Vec<u8>>,
    /// The origin of the kernel, then every source of symbols and types in use.
    pub symbol_sources: Vec<String>,
    /// The knowledge of the kernel.
    pub knowledge: Knowledge,
    /// The architecture of its processors; `None` where no kernel was found, which alone tells.
    pub architecture: Option<Architecture>,
    /// The guest's page size; 4 KiB, the smallest there is, where no kernel was found.
    pub page_size: PageSize,
}

/// The class of every frame of a guest, and what stands behind it.
///
/// Only [`analyze`] and [`GuestOs::analyze`](crate::GuestOs::analyze) make one, so that what is
/// planned by it has been through every check of theirs. It can be changed in one direction:
/// [`keep`](Self::keep) takes frames out of what may be dropped.
#[derive(Debug, Clone)]
pub struct Analysis {
    facts: GuestFacts,
    pages: PageMap,
    free_fill: Fill,
    zones: Vec<ZoneReport>,
    disagreement: Option<Inconsistency>,
    notes: Vec<Note>,
    present: Vec<GpaRange>,
    boot_ram: Option<Vec<GpaRange>>,
    absent: ClassCounts,
}

/// All that an [`Analysis`] is made of.
pub(crate) struct Parts {
    pub facts: GuestFacts,
    pub pages: crate::Classification,
    pub present: Vec<GpaRange>,
    pub boot_ram: Option<Vec<GpaRange>>,
    /// The classes that the pages would have that the source does not have.
    pub absent: ClassCounts,
}

impl Analysis {
    pub(crate) fn new(parts: Parts) -> Self {
        let crate::Classification {
            map,
            free_fill,
            zones,
            disagreement,
            notes,
        } = parts.pages;
        Self {
            facts: parts.facts,
            pages: map,
            free_fill,
            zones,
            disagreement,
            notes,
            present: parts.present,
            boot_ram: parts.boot_ram,
            absent: parts.absent,
        }
    }

    /// Of memory of which no kernel is known: each page is [`Unknown`](PageClass::Unknown), and
    /// those that hold only zeroes are found. A page that is dropped of it must read as zero
    /// whatever lies beneath.
    ///
    /// # Errors
    /// [`MemoryError`] if a page cannot be read.
    pub fn of_zero_pages(
        memory: &dyn GuestMemory,
        options: &WorkOptions,
    ) -> Result<Self, MemoryError> {
        // What is zero in units of the smallest page is so in any.
        let page_size = PageSize::SIZE_4K;
        let mut pages = PageMap::new(memory.layout(), page_size);
        let absent = mark_absent_pages(memory, &mut pages)?;
        mark_zero_pages(memory, &mut pages, options)?;
        Ok(Self {
            facts: GuestFacts {
                os: "unknown",
                release: "unknown".into(),
                banner: None,
                vmcoreinfo: None,
                build_id: None,
                symbol_sources: Vec::new(),
                knowledge: Knowledge::Nothing,
                architecture: None,
                page_size,
            },
            pages,
            free_fill: Fill::Zero,
            zones: Vec::new(),
            disagreement: None,
            notes: Vec::new(),
            present: Vec::new(),
            boot_ram: None,
            absent,
        })
    }

    /// Facts that identify the guest.
    #[must_use]
    pub fn facts(&self) -> &GuestFacts {
        &self.facts
    }

    /// The class of every RAM frame.
    #[must_use]
    pub fn pages(&self) -> &PageMap {
        &self.pages
    }

    /// The number of frames of each class.
    #[must_use]
    pub fn counts(&self) -> ClassCounts {
        self.pages.counts()
    }

    /// The classes of pages that are [`Absent`](PageClass::Absent), by the kernel's records.
    #[must_use]
    pub fn absent(&self) -> &ClassCounts {
        &self.absent
    }

    /// The number of absent pages that the guest uses, as far as its kernel says: without them it
    /// cannot run.
    #[must_use]
    pub fn absent_in_use(&self) -> u64 {
        let unused = ClassSet::DEFAULT_DROP.with(PageClass::Hole);
        let in_use = self
            .absent
            .iter()
            .filter(|(class, _)| !unused.contains(*class));
        in_use.map(|(_, pages)| pages).sum::<Tally>().get()
    }

    /// The content that the guest expects of free pages; [`Fill::Any`] of most: they write to a
    /// page before they trust it.
    #[must_use]
    pub fn free_fill(&self) -> Fill {
        self.free_fill
    }

    /// Every zone's numbers.
    #[must_use]
    pub fn zones(&self) -> &[ZoneReport] {
        &self.zones
    }

    /// Blocks on which the sources disagree (kept), if there are any.
    #[must_use]
    pub fn disagreement(&self) -> Option<&Inconsistency> {
        self.disagreement.as_ref()
    }

    /// Notes for the user.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Memory that is never zero in a guest of this kind: its records of its pages. A file that
    /// has a hole there is no whole one (a diff snapshot without what it is a diff to).
    #[must_use]
    pub fn present(&self) -> &[GpaRange] {
        &self.present
    }

    /// The usable RAM that the guest booted with, by its own map of it; `None` if that cannot be
    /// read. Memory that was taken to lie elsewhere is not where this says.
    #[must_use]
    pub fn boot_ram(&self) -> Option<&[GpaRange]> {
        self.boot_ram.as_deref()
    }

    /// The plan of what `policy` drops of this guest.
    pub fn plan(&self, policy: &dyn PrunePolicy) -> PrunePlan {
        PrunePlan::new(&self.pages, policy, self.free_fill)
    }

    /// Takes back what the guest's kernel says of `frames`: those that might be dropped for it are
    /// [`Unknown`](PageClass::Unknown) from now on. Frames that were found to hold only zeroes do
    /// so whatever they are.
    pub fn keep(&mut self, frames: PfnRange) {
        self.pages.with_slices(frames, |_, pages| {
            for page in pages.iter_mut() {
                if page.class().may_be_dropped() {
                    *page = page.with_class(PageClass::Unknown);
                }
            }
        });
    }

    /// Gives up pages that a process's owner can do without, as
    /// [`LinuxGuest::give_up`](crate::LinuxGuest::give_up) has found them in the same memory: they count
    /// as pages of zeroes, and read so after a restore. Pages that are no anonymous memory by this
    /// analysis are kept.
    pub fn give_up(&mut self, pages: &crate::GivenUp) {
        for frames in pages.frames() {
            self.pages.with_slices(*frames, |_, pages| {
                let anonymous = |page: &&mut PageState| page.class() == PageClass::Anonymous;
                for page in pages.iter_mut().filter(anonymous) {
                    *page = page.with_zero();
                }
            });
        }
    }

    /// Notes of every page of `memory`, which is that of the guest, that is in use or was
    /// [kept](Self::keep) whether it holds only zeroes.
    ///
    /// # Errors
    /// [`MemoryError`] if a page cannot be read.
    pub fn mark_zero_pages(
        &mut self,
        memory: &dyn GuestMemory,
        options: &WorkOptions,
    ) -> Result<(), MemoryError> {
        mark_zero_pages(memory, &mut self.pages, options)
    }
}

/// Finds the kernel in a guest's memory, and gives every frame its class.
///
/// ```no_run
/// use sonicshot::{DropClasses, GuestMemory, PrunePlan};
/// use sonicshot_vmi::{AnalysisOptions, VmiError, analyze};
///
/// fn plan(memory: &dyn GuestMemory) -> Result<PrunePlan, VmiError> {
///     let analysis = analyze(memory, &AnalysisOptions::new())?;
///     Ok(analysis.plan(&DropClasses::default()))
/// }
/// ```
///
/// # Errors
/// What [`open_guest`] and [`GuestOs::analyze`](crate::GuestOs::analyze) give, and
/// [`VmiError::Stopped`] if the work was [ended](AnalysisOptions::stop).
pub fn analyze(memory: &dyn GuestMemory, options: &AnalysisOptions) -> Result<Analysis, VmiError> {
    let mut known = options.guest.clone();
    if let Some(progress) = &options.progress {
        known.progress = Some(Arc::clone(progress));
    }
    let Some(stop) = &options.stop else {
        return open_guest(memory, &known)?.analyze(options);
    };
    let stoppable = Stoppable::new(memory, stop.clone());
    // Its memory ends already.
    let whole = AnalysisOptions {
        stop: None,
        ..options.clone()
    };
    let analysis = open_guest(&stoppable, &known).and_then(|guest| guest.analyze(&whole));
    // What could not be read for it may have been passed over: whatever came of it does not count.
    stop.check().map_err(VmiError::Stopped)?;
    analysis
}

#[cfg(test)]
mod tests {
    use super::{Analysis, GuestFacts, Parts};
    use crate::Classification;
    use sonicshot::{
        Architecture, ClassCounts, Fill, Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn,
        PfnRange, RamLayout,
    };

    #[test]
    fn keep_takes_back_the_kernels_word_and_nothing_else() {
        let ram = GpaRange::with_len(Gpa::ZERO, 32 * 4096).unwrap();
        let mut map = PageMap::new(&RamLayout::new(vec![ram]).unwrap(), PageSize::SIZE_4K);
        let one = |pfn| PfnRange::with_len(Pfn::new(pfn), 1).unwrap();
        for (pfn, class) in (0..).zip(PageClass::ALL) {
            map.set(one(pfn), *class);
        }
        let mut analysis = Analysis::new(Parts {
            facts: GuestFacts {
                os: "Linux",
                release: String::new(),
                banner: None,
                vmcoreinfo: None,
                build_id: None,
                symbol_sources: Vec::new(),
                knowledge: crate::Knowledge::Types,
                architecture: Some(Architecture::X86_64),
                page_size: PageSize::SIZE_4K,
            },
            pages: Classification {
                map: map.clone(),
                free_fill: Fill::Any,
                zones: Vec::new(),
                disagreement: None,
                notes: Vec::new(),
            },
            present: Vec::new(),
            boot_ram: None,
            absent: ClassCounts::default(),
        });
        let zero = PfnRange::new(Pfn::new(4), Pfn::new(11));
        analysis.pages.with_slices(zero, |_, pages| {
            for page in pages {
                *page = page.with_zero();
            }
        });
        let first_half = PfnRange::new(Pfn::new(0), Pfn::new(9));
        analysis.keep(first_half);
        for (pfn, class) in (0..).map(Pfn::new).zip(PageClass::ALL) {
            let lowered = first_half.contains(pfn) && class.may_be_dropped();
            let expected = if lowered { PageClass::Unknown } else { *class };
            assert_eq!(analysis.pages().class(pfn), Some(expected), "{class}");
            let is_zero = analysis.pages().state(pfn).unwrap().is_zero();
            assert_eq!(is_zero, zero.contains(pfn), "{class}");
        }
    }
}
