//! Guests whose page tables hold the machine's frame numbers, not their own.

use crate::{Mfn, PageSize, Pfn, PfnRange};

/// A table of a guest's frames that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum P2mError {
    /// One frame of the guest is in two places.
    #[error("guest frame {pfn} is both machine frame {first} and {second}")]
    TwoPlaces {
        /// The guest's frame.
        pfn: Pfn,
        /// The one place.
        first: Mfn,
        /// The other.
        second: Mfn,
    },
    /// Two frames of the guest are in the same place.
    #[error("machine frame {mfn} is both guest frame {first} and {second}")]
    Shared {
        /// The machine's frame.
        mfn: Mfn,
        /// The one frame.
        first: Pfn,
        /// The other.
        second: Pfn,
    },
}

/// Which frame of the machine each frame of a paravirtualised guest is (physical to machine),
/// and back.
///
/// ```
/// use sonicshot::{Mfn, P2m, Pfn};
/// let p2m = P2m::new([(Pfn::new(0), Mfn::new(0x700)), (Pfn::new(1), Mfn::new(0x500))])?;
/// assert_eq!(p2m.mfn(Pfn::new(1)), Some(Mfn::new(0x500)));
/// assert_eq!(p2m.pfn(Mfn::new(0x700)), Some(Pfn::new(0)));
/// assert_eq!(p2m.pfn(Mfn::new(0x701)), None);
/// # Ok::<(), sonicshot::P2mError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct P2m {
    /// By guest frame.
    by_pfn: Vec<Run>,
    /// The same by machine frame.
    by_mfn: Vec<Run>,
}

/// Frames that are neighbours in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    pfn: u64,
    mfn: u64,
    len: u64,
}

impl P2m {
    /// The page size of the guests that have one.
    pub const PAGE: PageSize = PageSize::SIZE_4K;

    /// A table of `frames`, in any order.
    ///
    /// # Errors
    /// [`P2mError`] if a frame of either side comes twice.
    pub fn new(frames: impl IntoIterator<Item = (Pfn, Mfn)>) -> Result<Self, P2mError> {
        let one = |(pfn, mfn)| Some((PfnRange::with_len(pfn, 1)?, mfn));
        Self::from_runs(frames.into_iter().filter_map(one))
    }

    /// A table of runs of frames, in any order, each with the machine's frame that its first is;
    /// the others follow that one.
    ///
    /// # Errors
    /// [`P2mError`] if a frame of either side comes twice.
    pub fn from_runs(runs: impl IntoIterator<Item = (PfnRange, Mfn)>) -> Result<Self, P2mError> {
        let mut by_pfn: Vec<Run> = Vec::new();
        for (frames, mfn) in runs {
            let (pfn, mfn, len) = (frames.start().raw(), mfn.raw(), frames.len());
            match by_pfn.last_mut() {
                Some(last)
                    if last.pfn.checked_add(last.len) == Some(pfn)
                        && last.mfn.checked_add(last.len) == Some(mfn) =>
                {
                    last.len = last.len.saturating_add(len);
                }
                _ if len == 0 => {}
                _ => by_pfn.push(Run { pfn, mfn, len }),
            }
        }
        by_pfn.sort_unstable_by_key(|run| run.pfn);
        if let Some((run, next)) = overlap(&by_pfn, |run| run.pfn) {
            return Err(P2mError::TwoPlaces {
                pfn: Pfn::new(next.pfn),
                first: Mfn::new(run.mfn.wrapping_add(next.pfn.wrapping_sub(run.pfn))),
                second: Mfn::new(next.mfn),
            });
        }
        // Those that came in another order.
        by_pfn.dedup_by(|next, run| {
            let follows = run.pfn.checked_add(run.len) == Some(next.pfn)
                && run.mfn.checked_add(run.len) == Some(next.mfn);
            if follows {
                run.len = run.len.saturating_add(next.len);
            }
            follows
        });
        let mut by_mfn = by_pfn.clone();
        by_mfn.sort_unstable_by_key(|run| run.mfn);
        if let Some((run, next)) = overlap(&by_mfn, |run| run.mfn) {
            return Err(P2mError::Shared {
                mfn: Mfn::new(next.mfn),
                first: Pfn::new(run.pfn.wrapping_add(next.mfn.wrapping_sub(run.mfn))),
                second: Pfn::new(next.pfn),
            });
        }
        Ok(Self { by_pfn, by_mfn })
    }

    /// The machine's frame that `pfn` is, if the guest has it.
    #[must_use]
    pub fn mfn(&self, pfn: Pfn) -> Option<Mfn> {
        let run = find(&self.by_pfn, pfn.raw(), |run| run.pfn)?;
        let offset = pfn.raw().checked_sub(run.pfn)?;
        run.mfn.checked_add(offset).map(Mfn::new)
    }

    /// The guest's frame that `mfn` is, if it is the guest's.
    #[must_use]
    pub fn pfn(&self, mfn: Mfn) -> Option<Pfn> {
        let run = find(&self.by_mfn, mfn.raw(), |run| run.mfn)?;
        let offset = mfn.raw().checked_sub(run.mfn)?;
        run.pfn.checked_add(offset).map(Pfn::new)
    }

    /// The runs of [`runs`](Self::runs) inside `frames`, clipped to it.
    pub fn runs_in(&self, frames: PfnRange) -> impl Iterator<Item = (PfnRange, Mfn)> + '_ {
        let (start, end) = (frames.start().raw(), frames.end().raw());
        let first = self
            .by_pfn
            .partition_point(|run| run.pfn.saturating_add(run.len) <= start);
        let runs = self.by_pfn.iter().skip(first);
        runs.take_while(move |run| run.pfn < end)
            .filter_map(move |run| {
                let from = run.pfn.max(start);
                let to = run.pfn.saturating_add(run.len).min(end);
                let mfn = run.mfn.checked_add(from.checked_sub(run.pfn)?)?;
                Some((PfnRange::new(Pfn::new(from), Pfn::new(to)), Mfn::new(mfn)))
            })
    }

    /// The guest's frames, lowest first: runs that are neighbours in the machine too, each with
    /// the machine's frame that the first is.
    pub fn runs(&self) -> impl Iterator<Item = (PfnRange, Mfn)> + '_ {
        self.by_pfn.iter().filter_map(|run| {
            let frames = PfnRange::with_len(Pfn::new(run.pfn), run.len)?;
            Some((frames, Mfn::new(run.mfn)))
        })
    }
}

/// The run that holds frame `at` of the side that `start` gives, by which `runs` is sorted.
fn find(runs: &[Run], at: u64, start: impl Fn(&Run) -> u64) -> Option<&Run> {
    let above = runs.partition_point(|run| start(run) <= at);
    let run = runs.get(above.checked_sub(1)?)?;
    (at.checked_sub(start(run))? < run.len).then_some(run)
}

/// Neighbours of which the first reaches into the second.
fn overlap(runs: &[Run], start: impl Fn(&Run) -> u64) -> Option<(&Run, &Run)> {
    runs.iter()
        .zip(runs.iter().skip(1))
        .find(|(run, next)| start(next).wrapping_sub(start(run)) < run.len)
}

#[cfg(test)]
mod tests {
    use super::{P2m, P2mError};
    use crate::{Mfn, Pfn, PfnRange};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn frames(numbers: &[(u64, u64)]) -> Vec<(Pfn, Mfn)> {
        let frame = |&(pfn, mfn): &(u64, u64)| (Pfn::new(pfn), Mfn::new(mfn));
        numbers.iter().map(frame).collect()
    }

    #[test]
    fn a_frame_that_comes_twice_is_refused() {
        let twice = P2m::new(frames(&[(1, 10), (2, 11), (2, 30)]));
        assert_eq!(
            twice,
            Err(P2mError::TwoPlaces {
                pfn: Pfn::new(2),
                first: Mfn::new(11),
                second: Mfn::new(30)
            })
        );
        let shared = P2m::new(frames(&[(1, 10), (2, 11), (7, 11)]));
        assert_eq!(
            shared,
            Err(P2mError::Shared {
                mfn: Mfn::new(11),
                first: Pfn::new(2),
                second: Pfn::new(7)
            })
        );
        assert!(P2m::new(frames(&[(u64::MAX, 3), (0, 4)])).is_ok());
    }

    proptest! {
        #[test]
        fn says_what_it_was_told(
            numbers in proptest::collection::vec((0_u64..64, 0_u64..64), 0..24),
            from in 0_u64..70,
            to in 0_u64..70,
        ) {
            let table: BTreeMap<u64, u64> = numbers.iter().copied().collect();
            let back: BTreeMap<u64, u64> = table.iter().map(|(pfn, mfn)| (*mfn, *pfn)).collect();
            let one_to_one = table.len() == numbers.len() && back.len() == numbers.len();
            let p2m = P2m::new(frames(&numbers));
            prop_assert_eq!(p2m.is_ok(), one_to_one);
            if let Ok(p2m) = p2m {
                for at in 0..70 {
                    prop_assert_eq!(p2m.mfn(Pfn::new(at)).map(Mfn::raw), table.get(&at).copied());
                    prop_assert_eq!(p2m.pfn(Mfn::new(at)).map(Pfn::raw), back.get(&at).copied());
                }
                let runs = p2m.runs().map(|(frames, _)| frames.len()).sum::<u64>();
                prop_assert_eq!(runs, table.len() as u64);
                let part = PfnRange::new(Pfn::new(from.min(to)), Pfn::new(from.max(to)));
                let inside: Vec<_> = p2m
                    .runs_in(part)
                    .flat_map(|(frames, mfn)| frames.iter().zip(mfn.raw()..))
                    .map(|(pfn, mfn)| (pfn.raw(), mfn))
                    .collect();
                let expected: Vec<_> = table
                    .range(part.start().raw()..part.end().raw())
                    .map(|(pfn, mfn)| (*pfn, *mfn))
                    .collect();
                prop_assert_eq!(inside, expected);
                prop_assert_eq!(&P2m::from_runs(p2m.runs()).unwrap(), &p2m);
            }
        }
    }
}
