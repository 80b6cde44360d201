//! Which list names which frame.

use sonicshot::{PageMap, Pfn, PfnRange};

/// One byte for every frame of the map: which list names the frame as the head of a block.
pub(super) struct Marks(pub(super) Vec<(PfnRange, Vec<u8>)>);

pub(super) const LISTED: u8 = 0x80;
pub(super) const TORN: u8 = 0x40;
pub(super) const PCP: u8 = 0x20;
pub(super) const ORDER: u8 = 0x1f;

impl Marks {
    pub(super) fn new(map: &PageMap) -> Self {
        Self(
            map.ram()
                .iter()
                .filter_map(|frames| Some((*frames, vec![0; usize::try_from(frames.len()).ok()?])))
                .collect(),
        )
    }

    pub(super) fn slot(&mut self, pfn: Pfn) -> Option<&mut u8> {
        let above = self.0.partition_point(|(frames, _)| frames.start() <= pfn);
        let (frames, marks) = self.0.get_mut(above.checked_sub(1)?)?;
        marks.get_mut(usize::try_from(pfn.offset_from(frames.start())?).ok()?)
    }

    /// Whether all of `block` is in one stretch of RAM.
    pub(super) fn covers(&self, block: &PfnRange) -> bool {
        let above = self
            .0
            .partition_point(|(frames, _)| frames.start() <= block.start());
        above
            .checked_sub(1)
            .and_then(|index| self.0.get(index))
            .is_some_and(|(frames, _)| block.end() <= frames.end())
    }

    /// Whether a list names anything in `frames`.
    pub(super) fn any_in(&self, frames: PfnRange) -> bool {
        self.0.iter().any(|(region, marks)| {
            let part = region.intersection(&frames);
            let bounds = part
                .start()
                .offset_from(region.start())
                .zip(part.end().offset_from(region.start()))
                .and_then(|(a, b)| Some(usize::try_from(a).ok()?..usize::try_from(b).ok()?));
            !part.is_empty()
                && bounds
                    .and_then(|bounds| marks.get(bounds))
                    .is_none_or(|marks| marks.iter().any(|mark| *mark != 0))
        })
    }

    /// Whether none of `block` is RAM here: it is in memory that the dump does not have.
    pub(super) fn is_elsewhere(&self, block: &PfnRange) -> bool {
        let above = self
            .0
            .partition_point(|(frames, _)| frames.end() <= block.start());
        self.0
            .get(above)
            .is_none_or(|(frames, _)| block.end() <= frames.start())
    }
}

/// What a mark says, for people.
pub(super) fn describe_mark(mark: u8) -> String {
    let order = mark & ORDER;
    match mark & (LISTED | PCP | TORN) {
        0 => "on no free list".into(),
        LISTED => format!("on a free list of order {order}"),
        LISTED_PCP => format!("on a per-CPU free list of order {order}"),
        _ => format!("on a free list of order {order} that was being changed"),
    }
}

const LISTED_PCP: u8 = LISTED | PCP;
