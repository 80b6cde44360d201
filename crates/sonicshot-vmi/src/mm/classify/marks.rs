//! The free list on which each frame is named.

use super::WhichList;
use crate::error::VmiError;
use sonicshot::{PageMap, Pfn, PfnRange, to_u64};
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) const LISTED: u8 = 0x80;
pub(super) const TORN: u8 = 0x40;
pub(super) const PCP: u8 = 0x20;
pub(super) const ORDER: u8 = 0x1f;

/// Frames whose marks are held together, as a binary logarithm.
const CHUNK: u32 = 12;
/// So many frames.
const LEN: usize = 1 << CHUNK;
/// Of a frame: its place in the chunk.
const MASK: u64 = (1 << CHUNK) - 1;

/// A byte for every frame of a map: which list names the frame as the head of a block. Chunks of
/// frames that no list names take no memory: of a guest with much memory most of it is one or the
/// other.
pub(super) struct Marks {
    /// The frames that there are: sorted, disjoint.
    ram: Vec<PfnRange>,
    chunks: BTreeMap<u64, Box<[u8]>>,
}

impl Marks {
    pub(super) fn new(map: &PageMap) -> Self {
        Self {
            ram: map.ram().to_vec(),
            chunks: BTreeMap::new(),
        }
    }

    /// The range of RAM that `pfn` is in.
    fn region_of(&self, pfn: Pfn) -> Option<&PfnRange> {
        let above = self.ram.partition_point(|frames| frames.start() <= pfn);
        let region = self.ram.get(above.checked_sub(1)?)?;
        region.contains(pfn).then_some(region)
    }

    /// The mark of a frame, if that is RAM.
    pub(super) fn slot(&mut self, pfn: Pfn) -> Option<&mut u8> {
        self.region_of(pfn)?;
        let chunk = self.chunks.entry(pfn.raw() >> CHUNK);
        let chunk = chunk.or_insert_with(|| vec![0; LEN].into_boxed_slice());
        chunk.get_mut(inside(pfn.raw())?)
    }

    /// Whether all of `block` is in one range of RAM.
    pub(super) fn covers(&self, block: &PfnRange) -> bool {
        self.region_of(block.start())
            .is_some_and(|region| block.end() <= region.end())
    }

    /// The marks of `frames`, one after the other.
    pub(super) fn of(&self, frames: PfnRange) -> Result<Vec<u8>, VmiError> {
        let too_many = || VmiError::Unsupported {
            what: format!("frames {frames} at once"),
        };
        let len = usize::try_from(frames.len()).map_err(|_| too_many())?;
        let mut marks = vec![0; len];
        for (part, chunk) in self.parts(frames) {
            let from = part.start().offset_from(frames.start());
            let from = from.and_then(|from| usize::try_from(from).ok());
            let to = from.and_then(|from| marks.get_mut(from..from.checked_add(chunk.len())?));
            to.ok_or_else(too_many)?.copy_from_slice(chunk);
        }
        Ok(marks)
    }

    /// Whether a list names anything in `frames`.
    pub(super) fn any_in(&self, frames: PfnRange) -> bool {
        self.parts(frames)
            .any(|(_, marks)| marks.iter().any(|mark| *mark != 0))
    }

    /// Whether none of `block` is RAM here: it is in memory that the dump does not have.
    pub(super) fn is_elsewhere(&self, block: &PfnRange) -> bool {
        let above = self
            .ram
            .partition_point(|frames| frames.end() <= block.start());
        self.ram
            .get(above)
            .is_none_or(|frames| block.end() <= frames.start())
    }

    /// The parts of `frames` that have marks, and these.
    fn parts(&self, frames: PfnRange) -> impl Iterator<Item = (PfnRange, &[u8])> {
        let last = frames.end().raw().checked_sub(1);
        let last = last.filter(|_| !frames.is_empty());
        let numbers = last.map(|last| frames.start().raw() >> CHUNK..=last >> CHUNK);
        let chunks = numbers.map(|numbers| self.chunks.range(numbers));
        chunks
            .into_iter()
            .flatten()
            .filter_map(move |(number, marks)| {
                let whole = PfnRange::with_len(Pfn::new(number << CHUNK), to_u64(LEN))?;
                let part = whole.intersection(&frames);
                let start = inside(part.start().raw())?;
                let end = start.checked_add(usize::try_from(part.len()).ok()?)?;
                let bounds: Range<usize> = start..end;
                Some((part, marks.get(bounds)?))
            })
    }
}

/// The index of a frame's mark in its chunk.
fn inside(pfn: u64) -> Option<usize> {
    usize::try_from(pfn & MASK).ok()
}

/// The list that a mark names, for people.
pub(super) const fn list_of(mark: u8) -> WhichList {
    let order = mark & ORDER;
    match mark & (LISTED | PCP | TORN) {
        0 => WhichList::None,
        LISTED => WhichList::Zone { order },
        LISTED_PCP => WhichList::PerCpu { order },
        _ => WhichList::Changing { order },
    }
}

const LISTED_PCP: u8 = LISTED | PCP;

#[cfg(test)]
mod tests {
    use super::Marks;
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, PageMap, PageSize, Pfn, PfnRange, RamLayout};

    fn marks() -> Marks {
        let gpa = |pfn: u64| Gpa::new(pfn << 12);
        let layout = RamLayout::new(vec![
            GpaRange::new(gpa(3), gpa(5000)),
            GpaRange::new(gpa(8192), gpa(20_000)),
        ]);
        Marks::new(&PageMap::new(&layout.unwrap(), PageSize::SIZE_4K))
    }

    proptest! {
        #[test]
        fn are_a_byte_for_each_frame_of_ram(
            set in proptest::collection::vec((0_u64..21_000, 1_u8..), 0..60),
            start in 0_u64..21_000,
            len in 0_u64..9000,
        ) {
            let mut marks = marks();
            let is_ram = |pfn: u64| (3..5000).contains(&pfn) || (8192..20_000).contains(&pfn);
            let mut model = vec![0; 30_000];
            for (pfn, mark) in set {
                match marks.slot(Pfn::new(pfn)) {
                    Some(slot) => *slot = mark,
                    None => prop_assert!(!is_ram(pfn)),
                }
                if is_ram(pfn) {
                    model[usize::try_from(pfn).unwrap()] = mark;
                }
            }
            let frames = PfnRange::with_len(Pfn::new(start), len).unwrap();
            let expected = &model[usize::try_from(start).unwrap()..][..usize::try_from(len).unwrap()];
            prop_assert_eq!(marks.of(frames).unwrap(), expected);
            prop_assert_eq!(marks.any_in(frames), expected.iter().any(|mark| *mark != 0));
            if len > 0 {
                let mut all = start..start + len;
                prop_assert_eq!(marks.is_elsewhere(&frames), !all.clone().any(is_ram));
                prop_assert_eq!(marks.covers(&frames), all.all(is_ram));
            }
            let touched = model.chunks(4096).filter(|chunk| chunk.iter().any(|mark| *mark != 0));
            prop_assert_eq!(marks.chunks.len(), touched.count());
        }
    }
}
