//! Which pages to drop, and what they must read as afterwards.

use crate::{ClassSet, GpaRange, PageClass, PageMap, PageSize, PfnRange};

/// What becomes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Disposition {
    /// Its bytes are kept.
    Keep,
    /// Its bytes are left out.
    Drop,
}

/// Decides by class which pages to drop.
///
/// Any `Fn(PageClass) -> Disposition` is a policy. Whatever a policy says, the pages of a
/// class that [may not be dropped](PageClass::may_be_dropped) are kept.
///
/// ```
/// use sonicshot::{DropClasses, Disposition, PageClass, PrunePolicy};
/// let policy = DropClasses::default();
/// assert_eq!(policy.decide(PageClass::FreeBuddy), Disposition::Drop);
/// assert_eq!(policy.decide(PageClass::Anonymous), Disposition::Keep);
/// ```
pub trait PrunePolicy {
    /// What becomes of the pages of `class`.
    fn decide(&self, class: PageClass) -> Disposition;
}

impl<F: Fn(PageClass) -> Disposition> PrunePolicy for F {
    fn decide(&self, class: PageClass) -> Disposition {
        self(class)
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
    fn decide(&self, class: PageClass) -> Disposition {
        if self.0.contains(class) {
            Disposition::Drop
        } else {
            Disposition::Keep
        }
    }
}

/// What a page that was dropped must read as after a restore.
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
    /// What a dropped page of `class` must read as, in a guest that expects `free_fill` of its free
    /// pages.
    #[must_use]
    pub const fn of(class: PageClass, free_fill: Self) -> Self {
        match class {
            PageClass::FreeBuddy | PageClass::FreePcp => free_fill,
            PageClass::Zero => Self::Zero,
            // Nobody reads what is offline. Of the others the content is given up.
            _ => Self::Any,
        }
    }
}

/// One stretch of pages to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropRun {
    /// The frames.
    pub frames: PfnRange,
    /// What they must read as after a restore.
    pub fill: Fill,
}

/// Which frames of a guest are dropped: sorted, disjoint runs.
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
        for (frames, class) in map.runs() {
            if !class.may_be_dropped() || policy.decide(class) != Disposition::Drop {
                continue;
            }
            let fill = Fill::of(class, free_fill);
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

    /// How many pages are dropped.
    #[must_use]
    pub fn dropped_pages(&self) -> u64 {
        self.runs
            .iter()
            .fold(0, |sum, run| sum.saturating_add(run.frames.len()))
    }

    /// How many bytes are dropped.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        self.dropped_pages().saturating_mul(self.page_size.bytes())
    }

    /// The dropped stretches inside `range`, lowest first, clipped to it.
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

    /// The stretches inside `range` that are kept, lowest first: what
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
        Disposition, Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout,
    };
    use proptest::prelude::*;

    fn map(classes: &[PageClass]) -> PageMap {
        let end = u64::try_from(classes.len()).unwrap() * 4096;
        let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(end))]).unwrap();
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        for (pfn, class) in (0..).zip(classes) {
            map.set(PfnRange::with_len(Pfn::new(pfn), 1).unwrap(), *class);
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
        let map = map(&[PageClass::FreeBuddy, PageClass::Zero, PageClass::Kernel]);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Byte(0xaa));
        assert_eq!(plan.runs().len(), 2);
        let plan = plan.zero_filled_only();
        assert_eq!(plan.dropped_pages(), 1);
        assert_eq!(plan.runs()[0].frames.start(), Pfn::new(1));
    }

    #[test]
    fn a_format_drops_what_it_gives_back() {
        use PageClass::{FreeBuddy, FreePcp, Kernel, Offline, Zero};
        let map = map(&[FreeBuddy, Zero, FreePcp, Offline, Kernel, Zero]);
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
