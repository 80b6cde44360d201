//! Places where pages may be on a disk.

use super::source::{DiskOffset, DiskSource};
use crate::checkpoint::wire::layout::MAX_DISK_RUN;
use crate::{PageSize, Pfn, PfnRange};

/// Frames that may hold what is on a disk, up or down from some place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskGuess {
    /// The frames.
    pub frames: PfnRange,
    /// The number of the disk.
    pub disk: u32,
    /// The place on the disk where their bytes may begin.
    pub at: DiskOffset,
    /// The first frame is the last one on the disk.
    pub descending: bool,
}

impl DiskGuess {
    /// The part of the guess that is of `frames`, which lie in it.
    pub(crate) fn part(&self, frames: PfnRange, page_size: PageSize) -> Option<Self> {
        let skipped = if self.descending {
            self.frames.end().offset_from(frames.end())?
        } else {
            frames.start().offset_from(self.frames.start())?
        };
        let at = self
            .at
            .checked_add(skipped.checked_mul(page_size.bytes())?)?;
        Some(Self {
            frames,
            at,
            ..*self
        })
    }
}

/// Guesses of which frames are on a disk, and where: sorted, apart, short. They need not be right,
/// for each is compared with the disk before a checkpoint refers to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskGuesses {
    runs: Vec<DiskGuess>,
}

impl DiskGuesses {
    /// Of frames one by one: the frame, the number of its disk, and where it may be there. Of a
    /// frame that is there twice the first counts. What follows each other on both sides becomes
    /// one run.
    #[must_use]
    pub fn of_frames(mut frames: Vec<(Pfn, u32, DiskOffset)>, page_size: PageSize) -> Self {
        frames.sort_by_key(|(pfn, ..)| *pfn);
        frames.dedup_by_key(|(pfn, ..)| *pfn);
        let most = MAX_DISK_RUN >> page_size.shift();
        let mut runs: Vec<DiskGuess> = Vec::new();
        for (pfn, disk, at) in frames {
            let Some(frame) = PfnRange::with_len(pfn, 1) else {
                continue;
            };
            let one = DiskGuess {
                frames: frame,
                disk,
                at,
                descending: false,
            };
            let joined = runs
                .last()
                .and_then(|last| join(last, &one, page_size, most));
            match (joined, runs.last_mut()) {
                (Some(joined), Some(last)) => *last = joined,
                _ => runs.push(one),
            }
        }
        Self { runs }
    }

    /// The runs, lowest frame first.
    #[must_use]
    pub fn runs(&self) -> &[DiskGuess] {
        &self.runs
    }

    /// The frames one by one: each with the number of its disk, and where it may be there.
    pub fn each_frame(
        &self,
        page_size: PageSize,
    ) -> impl Iterator<Item = (Pfn, u32, DiskOffset)> + '_ {
        self.runs.iter().flat_map(move |run| {
            run.frames.iter().filter_map(move |pfn| {
                let one = run.part(PfnRange::with_len(pfn, 1)?, page_size)?;
                Some((pfn, one.disk, one.at))
            })
        })
    }

    /// The number of frames.
    #[must_use]
    pub fn frames(&self) -> u64 {
        PfnRange::total_of(self.runs.iter().map(|run| &run.frames))
    }
}

/// The run with one frame more, if that follows it on both sides.
fn join(last: &DiskGuess, one: &DiskGuess, page_size: PageSize, most: u64) -> Option<DiskGuess> {
    let follows = last.disk == one.disk
        && last.frames.end() == one.frames.start()
        && last.frames.len() < most;
    if !follows {
        return None;
    }
    let bytes = last.frames.len().checked_mul(page_size.bytes())?;
    let frames = PfnRange::new(last.frames.start(), one.frames.end());
    if !last.descending && last.at.checked_add(bytes) == Some(one.at) {
        return Some(DiskGuess { frames, ..*last });
    }
    let may_descend = last.descending || last.frames.len() == 1;
    if may_descend && one.at.checked_add(page_size.bytes()) == Some(last.at) {
        return Some(DiskGuess {
            frames,
            at: one.at,
            descending: true,
            ..*last
        });
    }
    None
}

/// The disks of a guest that is saved, and guesses of what is on them. The disks must not change
/// from before the memory is read until the checkpoint is used for the last time: stop the guest,
/// pin its disks, then save.
#[derive(Clone, Copy)]
pub struct OnDisks<'a> {
    /// The disks, in the order of [`CheckpointInfo::disks`](crate::checkpoint::CheckpointInfo).
    pub disks: &'a [&'a dyn DiskSource],
    /// The pages that may be on them.
    pub guesses: &'a DiskGuesses,
}

/// Of no disk.
static NO_GUESSES: DiskGuesses = DiskGuesses { runs: Vec::new() };

impl OnDisks<'_> {
    /// No disks: all pages are stored.
    pub const NONE: OnDisks<'static> = OnDisks {
        disks: &[],
        guesses: &NO_GUESSES,
    };
}

impl core::fmt::Debug for OnDisks<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("OnDisks")
            .field("disks", &self.disks.len())
            .field("guesses", &self.guesses.runs.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::{DiskGuess, DiskGuesses};
    use crate::checkpoint::DiskOffset;
    use crate::{PageSize, Pfn, PfnRange};

    const PAGE: PageSize = PageSize::SIZE_4K;

    fn guesses(frames: &[(u64, u32, u64)]) -> Vec<(u64, u64, u32, u64, bool)> {
        let frames = frames
            .iter()
            .map(|&(pfn, disk, block)| (Pfn::new(pfn), disk, DiskOffset::new(block * 4096)));
        let guesses = DiskGuesses::of_frames(frames.collect(), PAGE);
        let runs = guesses.runs().iter();
        runs.map(|run| {
            let first = run.frames.start().raw();
            (
                first,
                run.frames.len(),
                run.disk,
                run.at.raw() / 4096,
                run.descending,
            )
        })
        .collect()
    }

    #[test]
    fn frames_that_follow_each_other_become_runs() {
        for (frames, expected) in [
            (&[(5, 0, 9)][..], &[(5, 1, 0, 9, false)][..]),
            // Up, down, and neither; whatever order they come in.
            (&[(6, 0, 10), (5, 0, 9), (7, 0, 11)], &[(5, 3, 0, 9, false)]),
            (&[(5, 0, 9), (6, 0, 8), (7, 0, 7)], &[(5, 3, 0, 7, true)]),
            (
                &[(5, 0, 9), (6, 0, 9)],
                &[(5, 1, 0, 9, false), (6, 1, 0, 9, false)],
            ),
            (
                &[(5, 0, 9), (7, 0, 10)],
                &[(5, 1, 0, 9, false), (7, 1, 0, 10, false)],
            ),
            (
                &[(5, 0, 9), (6, 1, 10)],
                &[(5, 1, 0, 9, false), (6, 1, 1, 10, false)],
            ),
            (
                &[(5, 0, 9), (6, 0, 10), (7, 0, 9)],
                &[(5, 2, 0, 9, false), (7, 1, 0, 9, false)],
            ),
            // Of the same frame the first.
            (&[(5, 0, 9), (5, 0, 4)], &[(5, 1, 0, 9, false)]),
        ] {
            assert_eq!(guesses(frames), expected, "{frames:?}");
        }
        let frames = [(5, 0, 9), (6, 0, 8), (9, 1, 4), (10, 1, 5)];
        let places =
            frames.map(|(pfn, disk, block)| (Pfn::new(pfn), disk, DiskOffset::new(block * 4096)));
        let one_by_one = DiskGuesses::of_frames(places.to_vec(), PAGE);
        assert!(one_by_one.each_frame(PAGE).eq(places));
        // None is longer than a record may be.
        let long: Vec<_> = (0..40).map(|n| (n, 0, n)).collect();
        let lengths: Vec<_> = guesses(&long).iter().map(|run| run.1).collect();
        assert_eq!(lengths, [16, 16, 8]);
    }

    #[test]
    fn a_part_of_a_guess_is_where_it_was() {
        for (descending, first, len, expected) in [
            (false, 10, 4, 100),
            (false, 12, 2, 102),
            (false, 11, 1, 101),
            (true, 10, 4, 100),
            (true, 12, 2, 100),
            (true, 10, 1, 103),
        ] {
            let guess = DiskGuess {
                frames: PfnRange::new(Pfn::new(10), Pfn::new(14)),
                disk: 0,
                at: DiskOffset::new(100 * 4096),
                descending,
            };
            let frames = PfnRange::with_len(Pfn::new(first), len).unwrap();
            let part = guess.part(frames, PAGE).unwrap();
            assert_eq!(
                part.at.raw() / 4096,
                expected,
                "{descending}, {first}, {len}"
            );
            assert_eq!(part.frames, frames);
        }
    }
}
