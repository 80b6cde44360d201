//! From a snapshot to the class of every page in it.

use crate::error::OfflineError;
use crate::guards::{check_whole, keep_what_is_in_doubt};
use crate::note::Note;
use crate::options::AnalyzeOptions;
use crate::place::{self, Placed};
use crate::snapshot::Snapshot;
use sonicshot::{
    ClassCounts, ClassSet, DropClasses, Fill, GpaRange, PageClass, PageMap, PrunePlan,
};
use sonicshot_dump::{Dump, SnapshotFiles};
use sonicshot_vmi::{
    Classification, LinuxGuest, OnInconsistency, VmiError, ZoneReport, mark_zero_pages,
};

/// What is known of a snapshot's guest: its kernel, the class of every page, and what there is to
/// say of them.
#[derive(Debug)]
pub struct Analyzed {
    dump: Dump,
    files: SnapshotFiles,
    layout_origin: &'static str,
    guest: Guest,
    counts: ClassCounts,
    notes: Vec<Note>,
}

/// What is taken of a guest.
#[derive(Debug)]
struct Guest {
    release: String,
    banner: Option<String>,
    vmcoreinfo: Option<String>,
    build_id: Option<Vec<u8>>,
    symbol_sources: Vec<String>,
    pages: Classification,
    struct_pages: Vec<GpaRange>,
}

impl Guest {
    fn look(guest: &LinuxGuest<'_>, on: OnInconsistency) -> Result<Self, VmiError> {
        Ok(Self {
            pages: guest.classify(on)?,
            struct_pages: guest.struct_page_memory()?,
            release: guest.release().to_owned(),
            banner: guest.banner().map(str::to_owned),
            vmcoreinfo: guest.vmcoreinfo().map(str::to_owned),
            build_id: guest.build_id().map(<[u8]>::to_vec),
            symbol_sources: guest.symbol_sources(),
        })
    }
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
        let on = options.on_inconsistency;
        let placed = place::with_guest(self, &|guest| Guest::look(guest, on))?;
        self.check(&placed, on)?;
        let Placed {
            dump,
            origin,
            doubts,
            notes: of_places,
            value: mut guest,
        } = placed;
        let mut notes: Vec<Note> = std::mem::take(&mut guest.pages.notes)
            .into_iter()
            .map(Note::Guest)
            .collect();
        notes.extend(keep_what_is_in_doubt(&mut guest.pages.map, &dump, &doubts));
        notes.extend(of_places);
        notes.extend(self.notes());
        if options.zero_pages {
            mark_zero_pages(&dump, &mut guest.pages.map)?;
            notes.extend(kept_for_fill(&dump, guest.pages.free_fill));
        }
        Ok(Analyzed {
            counts: guest.pages.map.counts(),
            dump,
            files: self.files().clone(),
            layout_origin: origin,
            guest,
            notes,
        })
    }

    /// Refuses a raw file that lacks what every guest's memory has, unless what contradicts itself
    /// is to be taken as well.
    fn check(&self, placed: &Placed<Guest>, on: OnInconsistency) -> Result<(), OfflineError> {
        if on == OnInconsistency::Refuse && placed.dump.layout_spec().is_some() {
            check_whole(self.memory_file(), &placed.dump, &placed.value.struct_pages)?;
        }
        Ok(())
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

    /// The kernel's release, such as `6.1.0-37-cloud-amd64`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.guest.release
    }

    /// The kernel's banner (`Linux version …`), if it could be read.
    #[must_use]
    pub fn banner(&self) -> Option<&str> {
        self.guest.banner.as_deref()
    }

    /// The kernel's VMCOREINFO.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&str> {
        self.guest.vmcoreinfo.as_deref()
    }

    /// The kernel's build ID, if it tells one.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.guest.build_id.as_deref()
    }

    /// Where VMCOREINFO came from, then every source of symbols and types in use.
    #[must_use]
    pub fn symbol_sources(&self) -> &[String] {
        &self.guest.symbol_sources
    }

    /// The class of every page.
    #[must_use]
    pub fn pages(&self) -> &PageMap {
        &self.guest.pages.map
    }

    /// How many pages there are of each class.
    #[must_use]
    pub fn counts(&self) -> &ClassCounts {
        &self.counts
    }

    /// Every zone's numbers.
    #[must_use]
    pub fn zones(&self) -> &[ZoneReport] {
        &self.guest.pages.zones
    }

    /// Blocks on which the guest's records disagree; they are kept.
    #[must_use]
    pub fn inconsistent_blocks(&self) -> u64 {
        let disagreement = self.guest.pages.disagreement.as_ref();
        disagreement.map_or(0, |disagreement| disagreement.blocks)
    }

    /// What the guest expects of free pages.
    #[must_use]
    pub fn free_fill(&self) -> Fill {
        self.guest.pages.free_fill
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
        PrunePlan::new(self.pages(), &DropClasses(classes), self.free_fill())
    }

    pub(crate) fn files(&self) -> &SnapshotFiles {
        &self.files
    }
}
