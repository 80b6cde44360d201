//! The conditions that must hold of a guest and a file before anything is dropped of it.
//!
//! [`CheckedPlan::new`] is where all of it is looked at, and the one way to a plan that a file is
//! pruned by.

use crate::format::check_holes;
use crate::layout::is_boot_ram;
use crate::may_be_diff::{may_be_diff, of_a_diff};
use crate::{Dump, DumpError};
use sonicshot::{
    ClassSet, Disposition, DropClasses, Fill, Gpa, GpaRange, GuestMemory, PageClass, PageMap, Pfn,
    PfnRange, PrunePlan, PrunePolicy,
};
use sonicshot_vmi::{Analysis, Knowledge};

/// Doubts about where a dump's memory lies in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Doubts {
    shared: Vec<Vec<GpaRange>>,
    unconfirmed: Vec<GpaRange>,
    partial: bool,
    layout_is_checked: bool,
}

impl Doubts {
    /// None: the dump itself says where everything lies. Of a raw file, which does not, the
    /// guest's own map of its RAM has to.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The word of whoever has held a layout against what lies in the guest's memory, and says
    /// here what is uncertain of it: of `sonicshot-offline` alone.
    #[cfg(feature = "__offline")]
    #[doc(hidden)]
    #[must_use]
    pub fn of_checked_layout() -> Self {
        Self {
            layout_is_checked: true,
            ..Self::default()
        }
    }

    /// Ranges of the same length that hold blocks of which it is not known which is which.
    #[must_use]
    pub fn shared(mut self, shared: Vec<Vec<GpaRange>>) -> Self {
        self.shared = shared;
        self
    }

    /// Ranges of a layout that was given of which nothing shows that they lie there.
    #[must_use]
    pub fn unconfirmed(mut self, ranges: Vec<GpaRange>) -> Self {
        self.unconfirmed = ranges;
        self
    }

    /// Whether a raw file is taken although it lacks what every guest's memory has, as it was
    /// asked for.
    #[must_use]
    pub fn partial(mut self, partial: bool) -> Self {
        self.partial = partial;
        self
    }

    /// The [unconfirmed](Self::unconfirmed) ranges.
    #[must_use]
    pub fn of_unconfirmed(&self) -> &[GpaRange] {
        &self.unconfirmed
    }

    /// Whether the file may be [partial](Self::partial).
    #[must_use]
    pub fn may_be_partial(&self) -> bool {
        self.partial
    }
}

/// Refuses a raw file that has a hole where the guest has a page full of the kernel's records of
/// its pages. Each of those says which frame of which zone it is and how it is used, and no page of
/// them was ever seen to be zero; but in a diff snapshot that is taken for a whole one, what did
/// not change is missing. Other formats say themselves what they have.
///
/// # Errors
/// [`DumpError::NotWhole`].
pub fn check_whole(dump: &Dump, guest: &Analysis) -> Result<(), DumpError> {
    let size = guest.pages().page_size();
    if dump.layout_spec().is_none() {
        return Ok(());
    }
    for range in guest.present() {
        for page in range.whole_frames(size).iter() {
            let one = PfnRange::with_len(page, 1).and_then(|one| one.gpa_range(size));
            // What is beyond the last address is in no file.
            let Some(one) = one else { continue };
            let data = dump.next_data(one.start());
            if data.is_none_or(|data| data.start() >= one.end()) {
                return Err(DumpError::NotWhole {
                    path: dump.path().to_owned(),
                    at: one.start(),
                });
            }
        }
    }
    Ok(())
}

/// Below this a guest has one piece of RAM; above it lies what a hole for devices has pushed up.
const ONE_PIECE: Gpa = Gpa::new(1 << 32);

/// Refuses a raw file of which nothing shows where in the guest it lies, if it may lie in several
/// pieces. With one alone, the kernel was found in it.
fn check_layout(dump: &Dump, guest: &Analysis, doubts: &Doubts) -> Result<(), DumpError> {
    let Some(layout) = dump.layout_spec() else {
        return Ok(());
    };
    let ranges = layout.ranges(dump.layout().bytes());
    // Pages that go because they are zero are so wherever they lie.
    let by_kernel = guest.facts().knowledge != Knowledge::Nothing;
    let is_one = ranges.len() <= 1 && dump.layout().end() <= ONE_PIECE;
    if doubts.layout_is_checked || !by_kernel || is_one {
        return Ok(());
    }
    let boot = guest.boot_ram();
    let shown = boot.is_some_and(|ram| is_boot_ram(dump.layout(), ram));
    if shown && ranges.is_sorted() {
        return Ok(());
    }
    Err(DumpError::LayoutNotShown {
        path: dump.path().to_owned(),
        layout: layout.clone(),
        end: dump.layout().end(),
        boot_end: boot.and_then(|ram| ram.iter().map(GpaRange::end).max()),
    })
}

/// Keeps what the doubts about its place forbid to drop, and what the format cannot be without.
///
/// Pages that turn out to be zero may go all the same: so this comes before they are
/// [looked for](Analysis::mark_zero_pages), and again by itself with every [`CheckedPlan`].
pub fn keep_in_doubt(dump: &Dump, guest: &mut Analysis, doubts: &Doubts) {
    let size = guest.pages().page_size();
    for ranges in &doubts.shared {
        let places: Vec<PfnRange> = ranges.iter().map(|r| r.whole_frames(size)).collect();
        for kept in not_free_in_all(guest.pages(), &places) {
            guest.keep(kept);
        }
    }
    for range in &doubts.unconfirmed {
        guest.keep(range.whole_frames(size));
    }
    for frames in dump.must_stay() {
        guest.keep(frames);
    }
}

/// The classes of pages that the guest does not use, whatever they hold.
const FREE: [PageClass; 3] = [PageClass::FreeBuddy, PageClass::FreePcp, PageClass::Offline];

/// The frames that are not free in all places, where blocks of one length may lie in each other's place:
/// so nothing is dropped that is in use, whichever block is where.
fn not_free_in_all(map: &PageMap, places: &[PfnRange]) -> Vec<PfnRange> {
    let shortest = places.iter().map(PfnRange::len).min();
    let mut used: Vec<(u64, u64)> = Vec::new();
    for place in places {
        // What is longer than the others is free in them nowhere.
        used.extend(shortest.map(|len| (len, place.len())));
        let mut end = place.start();
        let free = map.runs().filter(|(_, class)| FREE.contains(class));
        let free = free.map(|(frames, _)| frames.intersection(place));
        for frames in free.filter(|frames| !frames.is_empty()) {
            used.extend(between(place, end, frames.start()));
            end = frames.end();
        }
        used.extend(between(place, end, place.end()));
    }
    let in_place = |place: &PfnRange, (from, to): (u64, u64)| {
        let start = place.start().checked_add(from)?;
        let end = place.start().checked_add(to)?;
        Some(PfnRange::new(start, end).intersection(place))
    };
    let kept = places
        .iter()
        .flat_map(|place| used.iter().map(move |part| (place, *part)));
    kept.filter_map(|(place, part)| in_place(place, part))
        .filter(|frames| !frames.is_empty())
        .collect()
}

/// The frames from `start` to `end` by their numbers in `place`.
fn between(place: &PfnRange, start: Pfn, end: Pfn) -> Option<(u64, u64)> {
    let from = start.offset_from(place.start())?;
    let to = end.offset_from(place.start())?;
    (from < to).then_some((from, to))
}

/// The plan for a dump, after every guard has been through it.
///
/// There is no other way to one than [`new`](Self::new), and no way to prune a file without one.
///
/// ```no_run
/// use sonicshot::ClassSet;
/// use sonicshot_dump::{CheckedPlan, Doubts, Dump, PruneOptions};
/// use sonicshot_vmi::{AnalysisOptions, analyze};
/// let dump = Dump::open("guest.elf", None)?;
/// let guest = analyze(&dump, &AnalysisOptions::new())?;
/// let plan = CheckedPlan::new(&dump, &guest, &Doubts::none(), ClassSet::DEFAULT_DROP)?;
/// plan.prune_to("pruned.elf".as_ref(), &PruneOptions::new())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CheckedPlan<'d> {
    dump: &'d Dump,
    /// By the guest alone.
    wanted: PrunePlan,
    /// The part of that that the format can drop.
    goes: PrunePlan,
    /// The part of that that the guest uses.
    given_up: PrunePlan,
}

impl<'d> CheckedPlan<'d> {
    /// Plans to drop the pages of `classes` of the `guest` that was found in `dump`, where nothing
    /// forbids it: see [`keep_in_doubt`].
    ///
    /// # Errors
    /// [`DumpError::Undroppable`] of a class that is never dropped, [`DumpError::UsedByGuest`] of
    /// one that the guest uses ([`for_analysis`](Self::for_analysis)), [`DumpError::CannotPrune`]
    /// of a snapshot whose VMM would not read a hole as zero, [`DumpError::NotWhole`] of a diff
    /// without its base, [`DumpError::OtherGuest`] if `guest` is not what is in `dump`,
    /// [`DumpError::LayoutNotShown`] of a raw file that may lie elsewhere.
    pub fn new(
        dump: &'d Dump,
        guest: &Analysis,
        doubts: &Doubts,
        classes: ClassSet,
    ) -> Result<Self, DumpError> {
        let used = classes.used_by_guest();
        if !used.is_empty() && used.iter().all(PageClass::may_be_dropped) {
            return Err(DumpError::UsedByGuest { classes: used });
        }
        Self::for_analysis(dump, guest, doubts, classes)
    }

    /// The same of classes that the guest uses too: it cannot run from the result, which is to be
    /// looked at.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), but [`DumpError::UsedByGuest`].
    pub fn for_analysis(
        dump: &'d Dump,
        guest: &Analysis,
        doubts: &Doubts,
        classes: ClassSet,
    ) -> Result<Self, DumpError> {
        if let Some(class) = classes.iter().find(|class| !class.may_be_dropped()) {
            return Err(DumpError::Undroppable { class });
        }
        check_holes(dump.path())?;
        check_is_of(dump, guest)?;
        check_layout(dump, guest, doubts)?;
        if !doubts.partial {
            check_whole(dump, guest)?;
        }
        let mut guest = guest.clone();
        keep_in_doubt(dump, &mut guest, doubts);
        let mut classes = dump.leaves_out(classes);
        if may_be_diff(dump, &guest) {
            classes = of_a_diff(classes, guest.free_fill());
        }
        let given_up = |page| match ClassSet::DEFAULT_DROP.takes(page) {
            true => Disposition::Keep,
            false => DropClasses(classes).decide(page),
        };
        let given_up = dump.restorable(&guest.plan(&given_up));
        let plan = guest.plan(&DropClasses(classes));
        Ok(Self {
            given_up,
            ..Self::of(dump, plan)
        })
    }

    /// A plan that nothing was checked of: for tests of formats, whose files hold no guest.
    #[cfg(feature = "__unchecked")]
    #[doc(hidden)]
    #[must_use]
    pub fn unchecked(dump: &'d Dump, plan: &PrunePlan) -> Self {
        Self::of(dump, plan.clone())
    }

    pub(crate) fn of(dump: &'d Dump, wanted: PrunePlan) -> Self {
        let goes = dump.restorable(&wanted);
        let map = PageMap::new(dump.layout(), wanted.page_size());
        let given_up = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
        Self {
            dump,
            wanted,
            goes,
            given_up,
        }
    }

    /// The dump that is pruned.
    #[must_use]
    pub fn dump(&self) -> &'d Dump {
        self.dump
    }

    /// The pages that would go by the guest alone. A checkpoint, which keeps for every page what it
    /// must read as, can do without all of it.
    #[must_use]
    pub fn wanted(&self) -> &PrunePlan {
        &self.wanted
    }

    /// The pages that go although the guest uses them: the output cannot run.
    pub(crate) fn given_up(&self) -> &PrunePlan {
        &self.given_up
    }

    /// The pages that go: of those, what the format can [restore](Dump::restores).
    #[must_use]
    pub fn goes(&self) -> &PrunePlan {
        &self.goes
    }
}

/// Refuses an analysis of other memory.
fn check_is_of(dump: &Dump, guest: &Analysis) -> Result<(), DumpError> {
    let size = guest.pages().page_size();
    if dump
        .layout()
        .frames(size)
        .eq(guest.pages().ram().iter().copied())
    {
        return Ok(());
    }
    let path = dump.path().to_owned();
    Err(DumpError::OtherGuest { path })
}

#[cfg(test)]
mod tests {
    use super::not_free_in_all;
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};

    fn map_of(places: &[(u64, &[PageClass])]) -> (PageMap, Vec<PfnRange>) {
        let frames = |(start, classes): &(u64, &[PageClass])| {
            PfnRange::with_len(Pfn::new(*start), classes.len() as u64).unwrap()
        };
        let frames: Vec<PfnRange> = places.iter().map(frames).collect();
        let gpa = |frames: &PfnRange| frames.gpa_range(PageSize::SIZE_4K).unwrap();
        let layout: Vec<GpaRange> = frames.iter().map(gpa).collect();
        let mut map = PageMap::new(&RamLayout::new(layout).unwrap(), PageSize::SIZE_4K);
        for (start, classes) in places {
            for (pfn, class) in (*start..).zip(*classes) {
                map.set(PfnRange::with_len(Pfn::new(pfn), 1).unwrap(), *class);
            }
        }
        (map, frames)
    }

    fn numbers(kept: &[PfnRange]) -> Vec<u64> {
        let mut all: Vec<u64> = kept.iter().flat_map(PfnRange::iter).map(Pfn::raw).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    #[test]
    fn of_blocks_in_any_order_only_what_is_free_in_all_may_go() {
        use PageClass::{Anonymous, FreeBuddy, FreePcp, Kernel, Offline};
        let first = [FreeBuddy, FreeBuddy, Kernel, Anonymous, FreePcp, Offline];
        let second = [FreeBuddy, Kernel, FreePcp, Anonymous, FreeBuddy, FreeBuddy];
        let (map, places) = map_of(&[(0, &first), (0x100, &second)]);
        let kept = numbers(&not_free_in_all(&map, &places));
        assert_eq!(kept, [1, 2, 3, 0x101, 0x102, 0x103]);
        // What one of them has more than the others is free in none.
        let (map, places) = map_of(&[(0, &first), (0x100, &second[..1])]);
        let kept = numbers(&not_free_in_all(&map, &places));
        assert_eq!(kept, [1, 2, 3, 4, 5]);
        assert!(not_free_in_all(&map, &[]).is_empty());
        assert_eq!(
            places[0].gpa_range(PageSize::SIZE_4K).unwrap().start(),
            Gpa::ZERO
        );
    }

    proptest! {
        #[test]
        fn as_frame_by_frame(
            first in proptest::collection::vec(0_usize..4, 1..40),
            second in proptest::collection::vec(0_usize..4, 40),
            third in proptest::collection::vec(0_usize..4, 40),
        ) {
            const CLASSES: [PageClass; 4] =
                [PageClass::FreeBuddy, PageClass::Offline, PageClass::Kernel, PageClass::Slab];
            let len = first.len();
            let classes = [first, second, third].map(|of| {
                of.iter().take(len).map(|class| CLASSES[*class]).collect::<Vec<_>>()
            });
            let starts = [7_u64, 1000, 2000];
            let places: Vec<_> = starts.iter().zip(&classes).map(|(at, of)| (*at, of.as_slice())).collect();
            let (map, places) = map_of(&places);
            let free = |class: &PageClass| !matches!(class, PageClass::Kernel | PageClass::Slab);
            let mut want = Vec::new();
            for start in starts {
                for number in 0..len {
                    if !classes.iter().all(|of| free(&of[number])) {
                        want.push(start + number as u64);
                    }
                }
            }
            prop_assert_eq!(numbers(&not_free_in_all(&map, &places)), want);
        }
    }
}
