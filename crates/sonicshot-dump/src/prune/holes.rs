//! The ranges of a file that are worth a hole.

use crate::output::Overwrite;
use rustix::fs::StatFs;
use sonicshot::{FileOffset, FileRange, Progress, Tally};
use std::iter;
use std::sync::Arc;

/// The block of a file system that does not say.
const BLOCK: u64 = 4096;
/// The largest that is believed: a huge page of hugetlbfs.
const MAX_BLOCK: u64 = 1 << 30;

/// Options for a prune; by default an output that exists is an error, and nobody is told how far it
/// is.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct PruneOptions {
    /// Whether an output that exists is replaced; in place there is none.
    pub overwrite: Overwrite,
    /// The smallest hole of a prune in place, in bytes; by default [`MIN_HOLE`](Self::MIN_HOLE), or less in a guest
    /// whose free memory is in pieces, so that 97 % of what can be freed is.
    pub min_hole: Option<u64>,
    /// Whether a file that another process has open for writing is pruned in place all the same.
    pub live_ok: bool,
    /// Whoever is told how far it is, in bytes of the files.
    pub progress: Option<Arc<dyn Progress>>,
}

impl PruneOptions {
    /// The smallest hole, by default: 32 KiB.
    ///
    /// A hole costs about the same however long it is, and each is one more extent for the file
    /// system to keep. Measured on a mapped-ram file of a guest of 4 GiB, in microseconds, in
    /// three runs on a busy machine:
    ///
    /// | hole | tmpfs | xfs | ext4 with `discard` |
    /// |---|---:|---:|---:|
    /// | 4 KiB | 2-11 | 40-55 | 130-520 |
    /// | 8 KiB | 3-4 | 17-44 | 180-1,600 |
    /// | 32 KiB | 6-23 | 15-62 | 650-2,600 |
    /// | 128 KiB | 21-158 | 19-44 | 520-2,800 |
    /// | 1 MiB | 220-530 | 53-170 | 810-3,500 |
    /// | 4 MiB | 1,400-2,200 | 43-511 | 1,250-2,600 |
    ///
    /// On tmpfs the pages are what costs. Two guests, of 4 GiB and of 128 MiB, have 232 and 183
    /// droppable ranges; 169 and 138 of them are shorter than 32 KiB, which are 0.03 % and
    /// 1.9 % of the bytes. With 64 KiB 3.1 % of the smaller guest would be left.
    pub const MIN_HOLE: u64 = 32 << 10;

    /// The defaults.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            overwrite: Overwrite::Refuse,
            min_hole: None,
            live_ok: false,
            progress: None,
        }
    }

    /// Says whether an output that exists is replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Leaves ranges shorter than `bytes` in the file; 0 leaves none.
    #[must_use]
    pub fn min_hole(mut self, bytes: u64) -> Self {
        self.min_hole = Some(bytes);
        self
    }

    /// Prunes a file although another process has it open for writing.
    ///
    /// Only for one that does not write now, and keeps nothing of the file elsewhere: a VMM
    /// whose guest is stopped, from before the dump is opened until the prune is done.
    #[must_use]
    pub fn live_ok(mut self, ok: bool) -> Self {
        self.live_ok = ok;
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// The length of all runs together, in bytes.
pub(crate) fn sum_of<'a>(runs: impl IntoIterator<Item = &'a FileRange>) -> u64 {
    FileRange::total_of(runs)
}

/// The length of the part of `data` (sorted) that is in `holes` (sorted), in bytes.
pub(crate) fn sum_in(data: &[FileRange], holes: &[FileRange]) -> u64 {
    let mut sum = Tally::ZERO;
    for hole in holes {
        let first = data.partition_point(|data| data.end() <= hole.start());
        let inside = data.iter().skip(first);
        for data in inside.take_while(|data| data.start() < hole.end()) {
            let (start, end) = (data.start().max(hole.start()), data.end().min(hole.end()));
            sum.add(FileRange::new(start, end).len());
        }
    }
    sum.get()
}

/// The smallest hole for these runs.
pub(crate) fn smallest_hole(runs: &[FileRange]) -> u64 {
    /// Of 100 bytes that can be freed, so many may be left.
    const LEFT: u64 = 3;
    let sum = |below: u64| sum_of(runs.iter().filter(|run| run.len() < below));
    let most = (sum(u64::MAX) / 100).checked_mul(LEFT);
    let mut hole = PruneOptions::MIN_HOLE;
    while hole > 1 && most.is_some_and(|most| sum(hole) > most) {
        hole >>= 1;
    }
    hole
}

/// Sorts runs, and joins those that touch.
pub(crate) fn join(mut runs: Vec<FileRange>) -> Vec<FileRange> {
    runs.sort_unstable();
    let mut joined: Vec<FileRange> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.end() >= run.start() => {
                *last = FileRange::new(last.start(), last.end().max(run.end()));
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// The whole blocks inside a run. A file system gives back nothing smaller: of a part of a block
/// it would only write zeroes.
pub(crate) fn whole_blocks(run: FileRange, block: u64) -> FileRange {
    let start = run.start().checked_align_up(block).unwrap_or(run.end());
    let end = run.end().raw();
    let behind = end.checked_rem(block);
    let end = behind.map_or(Some(end), |behind| end.checked_sub(behind));
    FileRange::new(start, end.map_or(start, FileOffset::new))
}

/// The unit that the file system gives back at once, in bytes. Not `st_blksize`, which is what it
/// likes to read.
pub(crate) fn block_size(system: &StatFs) -> u64 {
    believed_block(u64::try_from(system.f_bsize).unwrap_or(BLOCK))
}

fn believed_block(block: u64) -> u64 {
    if block.is_power_of_two() && block <= MAX_BLOCK {
        block
    } else {
        BLOCK
    }
}

/// The number of ranges of data that are left of `data` (sorted) when `holes` are punched.
pub(crate) fn extents_without(data: &[FileRange], holes: &[FileRange]) -> u64 {
    let mut count = Tally::ZERO;
    for data in data {
        let first = holes.partition_point(|hole| hole.end() <= data.start());
        let inside = holes.iter().skip(first);
        let inside = inside.take_while(|hole| hole.start() < data.end());
        let end = FileRange::new(data.end(), data.end());
        let mut from = data.start();
        for hole in inside.copied().chain(iter::once(end)) {
            count.add(u64::from(hole.start() > from));
            from = hole.end();
        }
    }
    count.get()
}

#[cfg(test)]
mod tests {
    use super::{
        BLOCK, MAX_BLOCK, PruneOptions, believed_block, extents_without, join, smallest_hole,
        sum_in, whole_blocks,
    };
    use proptest::prelude::*;
    use sonicshot::{FileOffset, FileRange};

    /// A run by its offset and length.
    fn run((offset, len): (u64, u64)) -> FileRange {
        FileRange::with_len(FileOffset::new(offset), len).unwrap()
    }

    fn runs(list: Vec<(u64, u64)>) -> Vec<FileRange> {
        list.into_iter().map(run).collect()
    }

    #[test]
    fn runs_that_touch_are_one() {
        for (list, want) in [
            (vec![], vec![]),
            (vec![(8, 4), (0, 8)], vec![(0, 12)]),
            (vec![(0, 8), (9, 1)], vec![(0, 8), (9, 1)]),
            (vec![(0, 9), (4, 2), (20, 1)], vec![(0, 9), (20, 1)]),
        ] {
            assert_eq!(join(runs(list)), runs(want));
        }
    }

    #[test]
    fn a_file_system_is_believed_a_block_that_there_may_be() {
        for (said, believed) in [
            (512, 512),
            (2 << 20, 2 << 20),
            (MAX_BLOCK, MAX_BLOCK),
            (MAX_BLOCK << 1, BLOCK),
            (1 << 63, BLOCK),
            (6000, BLOCK),
            (0, BLOCK),
        ] {
            assert_eq!(believed_block(said), believed, "{said}");
        }
    }

    #[test]
    fn of_a_guest_in_pieces_97_percent_goes() {
        const K: u64 = 1 << 10;
        let runs = |runs: &[(u64, u64)]| {
            let lengths = runs
                .iter()
                .flat_map(|(len, count)| (0..*count).map(|_| *len));
            lengths.map(|len| run((0, len))).collect::<Vec<_>>()
        };
        for (few, many, want) in [
            ((1000 * K, 1), (4 * K, 7), PruneOptions::MIN_HOLE),
            ((1000 * K, 1), (4 * K, 8), 4 * K),
            ((1000 * K, 1), (12 * K, 3), 8 * K),
            ((16 * K, 0), (4 * K, 900), 4 * K),
            ((16 * K, 1000), (4 * K, 10), 16 * K),
            ((16 * K, 0), (4 * K, 0), PruneOptions::MIN_HOLE),
        ] {
            assert_eq!(smallest_hole(&runs(&[few, many])), want, "{few:?} {many:?}");
        }
    }

    #[test]
    fn parts_of_blocks_are_left() {
        for (part, block, want) in [
            ((0, 8192), 4096, (0, 8192)),
            ((1, 8192), 4096, (4096, 4096)),
            ((100, 4096), 4096, (4096, 0)),
            ((4096, 1 << 20), 1 << 16, (1 << 16, 15 << 16)),
            ((u64::MAX - 5, 5), 4096, (u64::MAX, 0)),
        ] {
            assert_eq!(whole_blocks(run(part), block), run(want), "{part:?}");
        }
    }

    proptest! {
        #[test]
        fn ranges_are_counted_as_bit_by_bit(
            data in proptest::collection::vec(any::<bool>(), 0..60),
            holes in proptest::collection::vec((0_u64..60, 1_u64..9), 0..8),
        ) {
            let ranges = |bits: &[bool]| {
                let bits = (0..).zip(bits).filter(|(_, bit)| **bit);
                join(bits.map(|(at, _)| run((at, 1))).collect())
            };
            let holes = join(runs(holes));
            let before = ranges(&data);
            let inside = (0..).zip(&data).filter(|(at, bit)| {
                **bit && holes.iter().any(|hole| hole.contains(FileOffset::new(*at)))
            });
            prop_assert_eq!(sum_in(&before, &holes), inside.count() as u64);
            let mut after = data;
            for (at, bit) in (0..).zip(&mut after) {
                *bit &= !holes.iter().any(|hole| hole.contains(FileOffset::new(at)));
            }
            prop_assert_eq!(extents_without(&before, &holes), ranges(&after).len() as u64);
        }
    }
}
