//! The choice of pages to drop, and the content that they must read as afterwards.

use crate::{
    ClassCounts, ClassSet, GpaRange, PageClass, PageMap, PageSize, PageState, PfnRange, Tally,
};

/// The fate of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Disposition {
    /// Its bytes are kept.
    Keep,
    /// Its bytes are left out.
    Drop,
}

/// A choice by class and content of the pages that are dropped.
///
/// Any `Fn(PageState) -> Disposition` is a policy. Whatever a policy says, pages that
/// [may not be dropped](PageState::may_be_dropped) are kept.
///
/// ```
/// use sonicshot::{DropClasses, Disposition, PageClass, PageState, PrunePolicy};
/// let policy = DropClasses::default();
/// let of = |class| policy.decide(PageState::new(class));
/// assert_eq!(of(PageClass::FreeBuddy), Disposition::Drop);
/// assert_eq!(of(PageClass::Anonymous), Disposition::Keep);
/// ```
pub trait PrunePolicy {
    /// The treatment of pages like `page`.
    fn decide(&self, page: PageState) -> Disposition;
}

impl<F: Fn(PageState) -> Disposition> PrunePolicy for F {
    fn decide(&self, page: PageState) -> Disposition {
        self(page)
    }
}

/// The policy that drops a set of classes; by default [`ClassSet::DEFAULT_DROP`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropClasses(pub ClassSet);

impl Default for DropClasses {
    fn default() -> Self {
        Self(ClassSet::DEFAULT_DROP)
    }
}

impl PrunePolicy for DropClasses {
    fn decide(&self, page: PageState) -> Disposition {
        if self.0.takes(page) {
            Disposition::Drop
        } else {
            Disposition::Keep
        }
    }
}

/// The content that a dropped page must have after a restore.
///
/// Of a page in use that was zero it is zero. Of a free page it depends on how the guest runs: most
/// write to it before they read, `init_on_free=1` trusts it to be zero, and `page_poison=1` checks
/// it for its pattern (`mm/page_poison.c`). Zero serves every guest but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Fill {
    /// Every byte zero.
    #[default]
    Zero,
    /// Every byte this value.
    Byte(u8),
    /// Anything: the guest does not read there before it writes.
    Any,
}

impl Fill {
    /// The content that `page` must have once it is dropped, in a guest that expects `free_fill` of
    /// its free pages.
    #[must_use]
    pub fn of(page: PageState, free_fill: Self) -> Self {
        match page.class() {
            PageClass::FreeBuddy | PageClass::FreePcp => free_fill,
            _ if page.is_zero() => Self::Zero,
            // Nobody reads what is offline. Of the others the content is given up.
            _ => Self::Any,
        }
    }
}

/// One range of pages to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropRun {
    /// The frames.
    pub frames: PfnRange,
    /// The content that they must have after a restore.
    pub fill: Fill,
}

/// The frames of a guest that are dropped: sorted, disjoint runs.
///
/// ```
/// use sonicshot::{DropClasses, Fill, Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange,
///     PrunePlan, RamLayout};
/// let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(8 * 4096))])?;
/// let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
/// map.set(PfnRange::new(Pfn::new(2), Pfn::new(6)), PageClass::FreeBuddy);
/// let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
/// assert_eq!(plan.dropped_pages(), 4);
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrunePlan {
    page_size: PageSize,
    runs: Vec<DropRun>,
}

impl PrunePlan {
    /// Applies `policy` to `map`. `free_fill` is what the guest expects of free pages.
    pub fn new(map: &PageMap, policy: &dyn PrunePolicy, free_fill: Fill) -> Self {
        let mut runs: Vec<DropRun> = Vec::new();
        for (frames, page) in map.states() {
            if !page.may_be_dropped() || policy.decide(page) != Disposition::Drop {
                continue;
            }
            let fill = Fill::of(page, free_fill);
            push(&mut runs, DropRun { frames, fill });
        }
        Self {
            page_size: map.page_size(),
            runs,
        }
    }

    /// The same plan for a format in which a dropped page reads as zero: runs that must read as
    /// something else are kept.
    #[must_use]
    pub fn zero_filled_only(self) -> Self {
        let mut runs = Vec::with_capacity(self.runs.len());
        for run in self.runs {
            if matches!(run.fill, Fill::Zero | Fill::Any) {
                let fill = Fill::Zero;
                push(&mut runs, DropRun { fill, ..run });
            }
        }
        Self { runs, ..self }
    }

    /// The same plan for a format in which nobody knows what a dropped page reads as: runs that
    /// must read as something are kept.
    #[must_use]
    pub fn any_filled_only(mut self) -> Self {
        self.runs.retain(|run| run.fill == Fill::Any);
        self
    }

    /// The page size of the guest.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The runs to drop, lowest first.
    #[must_use]
    pub fn runs(&self) -> &[DropRun] {
        &self.runs
    }

    /// The number of dropped pages.
    #[must_use]
    pub fn dropped_pages(&self) -> u64 {
        PfnRange::total_of(self.runs.iter().map(|run| &run.frames))
    }

    /// The number of dropped bytes.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        Tally::new(self.dropped_pages())
            .times(self.page_size.bytes())
            .get()
    }

    /// The first frames that are dropped although the guest uses them, by what `map` says of them:
    /// neither free nor offline, and not found to hold only zeroes. `None` if the guest can run
    /// without all that is dropped.
    #[must_use]
    pub fn used_by_guest(&self, map: &PageMap) -> Option<(PfnRange, PageClass)> {
        let dropped = self.runs.iter().flat_map(|run| map.states_in(run.frames));
        let mut used = dropped.filter(|(_, page)| !ClassSet::DEFAULT_DROP.takes(*page));
        used.next().map(|(frames, page)| (frames, page.class()))
    }

    /// The number of dropped pages of each class, by what `map` says of them; and the number of those
    /// that hold only zeroes.
    #[must_use]
    pub fn counts(&self, map: &PageMap) -> ClassCounts {
        let mut counts = ClassCounts::default();
        for run in &self.runs {
            for (frames, page) in map.states_in(run.frames) {
                counts.add(page, frames.len());
            }
        }
        counts
    }

    /// The dropped ranges inside `range`, lowest first, clipped to it.
    pub fn dropped_in(&self, range: GpaRange) -> impl Iterator<Item = GpaRange> + '_ {
        let page_size = self.page_size;
        let first = self.runs.partition_point(|run| {
            run.frames
                .gpa_range(page_size)
                .is_some_and(|run| run.end() <= range.start())
        });
        self.runs
            .iter()
            .skip(first)
            .map_while(move |run| run.frames.gpa_range(page_size))
            .map(move |run| run.intersection(&range))
            .take_while(|part| !part.is_empty())
    }

    /// The ranges inside `range` that are kept, lowest first: what
    /// [`dropped_in`](Self::dropped_in) leaves.
    pub fn kept_in(&self, range: GpaRange) -> impl Iterator<Item = GpaRange> + '_ {
        let tail = GpaRange::new(range.end(), range.end());
        self.dropped_in(range)
            .chain(core::iter::once(tail))
            .scan(range.start(), |at, dropped| {
                let kept = GpaRange::new(*at, dropped.start());
                *at = dropped.end();
                Some(kept)
            })
            .filter(|kept| !kept.is_empty())
    }
}

/// Adds a run behind the others, to the last of them if it only goes on.
fn push(runs: &mut Vec<DropRun>, run: DropRun) {
    match runs.last_mut() {
        Some(last) if last.frames.end() == run.frames.start() && last.fill == run.fill => {
            last.frames = PfnRange::new(last.frames.start(), run.frames.end());
        }
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::{DropClasses, Fill, PrunePlan};
    use crate::{
        ClassSet, Disposition, Gpa, GpaRange, PageClass, PageMap, PageSize, PageState, Pfn,
        PfnRange, RamLayout,
    };
    use proptest::prelude::*;

    fn map(pages: &[impl Into<PageState> + Copy]) -> PageMap {
        let end = u64::try_from(pages.len()).unwrap() * 4096;
        let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(end))]).unwrap();
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        for (pfn, page) in (0..).zip(pages) {
            map.set(PfnRange::with_len(Pfn::new(pfn), 1).unwrap(), *page);
        }
        map
    }

    #[test]
    fn a_policy_cannot_drop_what_the_kernel_needs() {
        let map = map(PageClass::ALL);
        let plan = PrunePlan::new(&map, &|_| Disposition::Drop, Fill::Zero);
        for run in plan.runs() {
            for pfn in run.frames.iter() {
                assert!(map.class(pfn).unwrap().may_be_dropped());
            }
        }
        assert!(plan.dropped_pages() > 0);
    }

    #[test]
    fn poisoned_free_pages_are_not_dropped_as_zero() {
        let zero = PageState::new(PageClass::Slab).with_zero();
        let map = map(&[PageClass::FreeBuddy.into(), zero, PageClass::Kernel.into()]);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Byte(0xaa));
        assert_eq!(plan.runs().len(), 2);
        let plan = plan.zero_filled_only();
        assert_eq!(plan.dropped_pages(), 1);
        assert_eq!(plan.runs()[0].frames.start(), Pfn::new(1));
    }

    #[test]
    fn a_format_drops_what_it_gives_back() {
        use PageClass::{FreeBuddy, FreePcp, Kernel, Offline, Slab, Unknown};
        let new = PageState::new;
        let map = map(&[
            new(FreeBuddy),
            new(Slab).with_zero(),
            new(FreePcp),
            new(Offline),
            new(Kernel),
            new(Unknown).with_zero(),
        ]);
        // Of each fill: the pages that go where dropped is zero, and where it is anything.
        for (fill, zero, any) in [
            (Fill::Any, vec![0, 1, 2, 3, 5], vec![0, 2, 3]),
            (Fill::Zero, vec![0, 1, 2, 3, 5], vec![3]),
            (Fill::Byte(0xaa), vec![1, 3, 5], vec![3]),
        ] {
            let plan = PrunePlan::new(&map, &DropClasses::default(), fill);
            let pages = |plan: PrunePlan| -> Vec<u64> {
                let frames = plan.runs().iter().flat_map(|run| run.frames.iter());
                frames.map(Pfn::raw).collect()
            };
            assert_eq!(pages(plan.clone().zero_filled_only()), zero, "{fill:?}");
            assert_eq!(pages(plan.any_filled_only()), any, "{fill:?}");
        }
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Any);
        assert_eq!(
            (plan.runs().len(), plan.zero_filled_only().runs().len()),
            (4, 2)
        );
    }

    /// A page that holds only zeroes goes for that, or for its class; and what the guest uses is
    /// told.
    #[test]
    fn what_the_guest_uses_is_told_of_a_plan() {
        use PageClass::{Anonymous, FreeBuddy, Slab};
        let zero = PageState::new(Anonymous).with_zero();
        let map = map(&[FreeBuddy.into(), zero, Slab.into(), Anonymous.into(), zero]);
        let dropped = |set: ClassSet| {
            let plan = PrunePlan::new(&map, &DropClasses(set), Fill::Any);
            let used = plan.used_by_guest(&map);
            (
                plan.dropped_pages(),
                used.map(|(frames, class)| (frames.start().raw(), class)),
            )
        };
        let anonymous = ClassSet::EMPTY.with(Anonymous);
        assert_eq!(dropped(ClassSet::DEFAULT_DROP), (3, None));
        assert_eq!(dropped(anonymous), (3, Some((3, Anonymous))));
        assert_eq!(dropped(anonymous.with_zero()), (3, Some((3, Anonymous))));
        assert_eq!(dropped(ClassSet::EMPTY.with(FreeBuddy)), (1, None));
    }

    proptest! {
        #[test]
        fn kept_and_dropped_tile_any_range(
            classes in proptest::collection::vec(0_u8..4, 1..40),
            start in 0_u64..0x20000, len in 1_u64..0x20000,
        ) {
            let classes: Vec<_> = classes.into_iter().map(|c| PageClass::from_u8(c).unwrap()).collect();
            let plan = PrunePlan::new(&map(&classes), &DropClasses::default(), Fill::Zero);
            let range = GpaRange::with_len(Gpa::new(start), len).unwrap();
            let mut parts: Vec<_> = plan.dropped_in(range).map(|r| (r, true))
                .chain(plan.kept_in(range).map(|r| (r, false))).collect();
            parts.sort();
            let mut at = range.start();
            for (part, dropped) in parts {
                prop_assert_eq!(part.start(), at);
                at = part.end();
                let mut byte = part.start();
                while byte < part.end() {
                    let class = classes.get(usize::try_from(byte.raw() / 4096).unwrap());
                    let free = matches!(class, Some(PageClass::FreeBuddy | PageClass::FreePcp));
                    prop_assert_eq!(free, dropped);
                    byte = byte.checked_add(512).unwrap();
                }
            }
            prop_assert_eq!(at, range.end());
        }
    }
}
