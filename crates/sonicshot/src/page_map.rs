//! The class of every frame of a guest.

use crate::{ClassCounts, PageClass, PageSize, Pfn, PfnRange, RamLayout};
use core::fmt;

/// The class of every frame of a guest's RAM: one byte a frame.
///
/// ```
/// use sonicshot::{Gpa, GpaRange, PageClass, PageMap, PageSize, Pfn, PfnRange, RamLayout};
/// let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(8 * 4096))])?;
/// let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
/// map.set(PfnRange::new(Pfn::new(2), Pfn::new(6)), PageClass::FreeBuddy);
/// let runs: Vec<_> = map.runs().map(|(r, c)| (r.start().raw(), r.len(), c)).collect();
/// assert_eq!(runs, [
///     (0, 2, PageClass::Unknown),
///     (2, 4, PageClass::FreeBuddy),
///     (6, 2, PageClass::Unknown),
/// ]);
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct PageMap {
    page_size: PageSize,
    regions: Vec<(PfnRange, Vec<PageClass>)>,
}

impl PageMap {
    /// A map of all whole frames of `layout`, every one [`PageClass::Unknown`].
    #[must_use]
    pub fn new(layout: &RamLayout, page_size: PageSize) -> Self {
        let regions = layout
            .frames(page_size)
            .filter_map(|frames| {
                let len = usize::try_from(frames.len()).ok()?;
                Some((frames, vec![PageClass::Unknown; len]))
            })
            .collect();
        Self { page_size, regions }
    }

    /// The page size of the guest.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// How many frames the map covers.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.regions
            .iter()
            .fold(0, |sum, (frames, _)| sum.saturating_add(frames.len()))
    }

    /// The class of `pfn`, if it is RAM.
    #[must_use]
    pub fn class(&self, pfn: Pfn) -> Option<PageClass> {
        let above = self.regions.partition_point(|(r, _)| r.start() <= pfn);
        let (frames, classes) = self.regions.get(above.checked_sub(1)?)?;
        let index = usize::try_from(pfn.offset_from(frames.start())?).ok()?;
        classes.get(index).copied()
    }

    /// Gives every RAM frame in `range` the class `class`; frames that are not RAM are passed over.
    pub fn set(&mut self, range: PfnRange, class: PageClass) {
        self.with_slices(range, |_, classes| classes.fill(class));
    }

    /// Lets `edit` change the classes of each RAM stretch of `range`; it is given the
    /// stretch's first frame.
    pub fn with_slices(&mut self, range: PfnRange, mut edit: impl FnMut(Pfn, &mut [PageClass])) {
        let first = self
            .regions
            .partition_point(|(frames, _)| frames.end() <= range.start());
        for (frames, classes) in self.regions.iter_mut().skip(first) {
            let part = frames.intersection(&range);
            if part.is_empty() {
                break;
            }
            let bounds = part
                .start()
                .offset_from(frames.start())
                .zip(part.end().offset_from(frames.start()))
                .and_then(|(a, b)| Some(usize::try_from(a).ok()?..usize::try_from(b).ok()?));
            if let Some(slice) = bounds.and_then(|bounds| classes.get_mut(bounds)) {
                edit(part.start(), slice);
            }
        }
    }

    /// Each RAM stretch with the class of every frame in it, lowest first.
    pub fn regions(&self) -> impl Iterator<Item = (PfnRange, &[PageClass])> {
        self.regions
            .iter()
            .map(|(frames, classes)| (*frames, classes.as_slice()))
    }

    /// Each RAM stretch with the class of every frame in it, to be changed (also from several
    /// threads, a stretch each).
    pub fn regions_mut(&mut self) -> impl Iterator<Item = (PfnRange, &mut [PageClass])> {
        self.regions
            .iter_mut()
            .map(|(frames, classes)| (*frames, classes.as_mut_slice()))
    }

    /// Runs of frames of the same class, lowest first, covering every RAM frame once.
    pub fn runs(&self) -> impl Iterator<Item = (PfnRange, PageClass)> + '_ {
        self.regions.iter().flat_map(|(frames, classes)| {
            let mut at = frames.start();
            classes.chunk_by(|a, b| a == b).filter_map(move |chunk| {
                let end = at.checked_add(u64::try_from(chunk.len()).ok()?)?;
                let run = PfnRange::new(at, end);
                at = end;
                Some((run, *chunk.first()?))
            })
        })
    }

    /// How many frames each class has.
    #[must_use]
    pub fn counts(&self) -> ClassCounts {
        let mut counts = ClassCounts::default();
        for (range, class) in self.runs() {
            counts.add(class, range.len());
        }
        counts
    }
}

impl fmt::Debug for PageMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageMap")
            .field("page_size", &self.page_size)
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::PageMap;
    use crate::{Gpa, GpaRange, PageClass, PageSize, Pfn, PfnRange, RamLayout};
    use proptest::prelude::*;

    fn layout() -> RamLayout {
        RamLayout::new(vec![
            GpaRange::new(Gpa::new(0x1000), Gpa::new(0x1_0000)),
            GpaRange::new(Gpa::new(0x2_0000), Gpa::new(0x3_0800)),
        ])
        .unwrap()
    }

    proptest! {
        #[test]
        fn agrees_with_one_class_a_frame(edits in proptest::collection::vec((0_u64..60, 0_u64..30, 0_u8..17), 0..20)) {
            let mut map = PageMap::new(&layout(), PageSize::SIZE_4K);
            let mut model = [None; 64];
            for pfn in (1..16).chain(32..48) {
                model[pfn] = Some(PageClass::Unknown);
            }
            for (start, len, class) in edits {
                let class = PageClass::from_u8(class).unwrap();
                map.set(PfnRange::with_len(Pfn::new(start), len).unwrap(), class);
                for pfn in start..(start + len).min(64) {
                    if let Some(slot) = model[usize::try_from(pfn).unwrap()].as_mut() {
                        *slot = class;
                    }
                }
            }
            let mut covered = 0;
            let mut last = None;
            for (run, class) in map.runs() {
                prop_assert!(!run.is_empty());
                prop_assert!(last != Some((run.start(), class)), "neighbours of one class are one run");
                last = Some((run.end(), class));
                for pfn in run.iter() {
                    prop_assert_eq!(model[usize::try_from(pfn.raw()).unwrap()], Some(class));
                    covered += 1;
                }
            }
            prop_assert_eq!(covered, 31);
            prop_assert_eq!(map.total(), 31);
            for (pfn, class) in (0_u64..).zip(model) {
                prop_assert_eq!(map.class(Pfn::new(pfn)), class);
            }
        }
    }
}
