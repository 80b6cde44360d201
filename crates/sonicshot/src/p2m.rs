//! Guests whose page tables hold the machine's frame numbers, not their own.

use crate::{Mfn, PageSize, Pfn, PfnRange, Tally};

/// The reason that a table of a guest's frames is invalid.
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

/// The frame of the machine that each frame of a paravirtualised guest is (physical to machine), and
/// back.
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

/// Frames that are neighbours in both. Xen gives a domain that is created runs that go up, and one
/// that is restored runs that go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    pfn: u64,
    /// The lowest of the machine's.
    mfn: u64,
    len: u64,
    /// Whether the machine's numbers fall as the guest's rise. Not of a single frame.
    falls: bool,
}

impl Run {
    /// The machine's frame of a guest's frame in the run, or the other way round: in a run that
    /// falls the first of the one is the last of the other.
    fn across(&self, from: u64, to: u64, at: u64) -> Option<u64> {
        let offset = at.checked_sub(from)?;
        let last = self.len.checked_sub(1)?;
        let offset = if self.falls {
            last.checked_sub(offset)?
        } else {
            offset
        };
        to.checked_add(offset)
    }

    /// The frames of the guest. A run that ends beyond all numbers is none.
    fn frames(&self) -> PfnRange {
        let start = Pfn::new(self.pfn);
        PfnRange::with_len(start, self.len).unwrap_or(PfnRange::new(start, start))
    }

    fn mfn_of(&self, pfn: u64) -> Option<u64> {
        self.across(self.pfn, self.mfn, pfn)
    }

    fn pfn_of(&self, mfn: u64) -> Option<u64> {
        self.across(self.mfn, self.pfn, mfn)
    }

    /// Takes in `next`, if that only goes on.
    fn join(&mut self, next: &Self) -> bool {
        if self.pfn.checked_add(self.len) != Some(next.pfn) {
            return false;
        }
        let Some(len) = self.len.checked_add(next.len) else {
            return false;
        };
        let rises = |run: &Self| run.len == 1 || !run.falls;
        let falls = |run: &Self| run.len == 1 || run.falls;
        if rises(self) && rises(next) && self.mfn.checked_add(self.len) == Some(next.mfn) {
            self.falls = false;
        } else if falls(self) && falls(next) && next.mfn.checked_add(next.len) == Some(self.mfn) {
            (self.mfn, self.falls) = (next.mfn, true);
        } else {
            return false;
        }
        self.len = len;
        true
    }
}

impl P2m {
    /// The page size of the guests that have one.
    pub const PAGE: PageSize = PageSize::SIZE_4K;

    /// A table of `frames`, in any order; lowest first is fastest.
    ///
    /// # Errors
    /// [`P2mError`] if a frame of either side comes twice.
    pub fn new(frames: impl IntoIterator<Item = (Pfn, Mfn)>) -> Result<Self, P2mError> {
        let mut table = P2mBuilder::default();
        for (pfn, mfn) in frames {
            table.push(pfn, mfn);
        }
        table.finish()
    }

    /// The machine's frame that `pfn` is, if the guest has it.
    #[must_use]
    pub fn mfn(&self, pfn: Pfn) -> Option<Mfn> {
        let run = find(&self.by_pfn, pfn.raw(), |run| run.pfn)?;
        run.mfn_of(pfn.raw()).map(Mfn::new)
    }

    /// The guest's frame that `mfn` is, if it is the guest's.
    #[must_use]
    pub fn pfn(&self, mfn: Mfn) -> Option<Pfn> {
        let run = find(&self.by_mfn, mfn.raw(), |run| run.mfn)?;
        run.pfn_of(mfn.raw()).map(Pfn::new)
    }

    /// The guest's frames, lowest first.
    pub fn frames(&self) -> impl Iterator<Item = PfnRange> + '_ {
        self.by_pfn.iter().map(Run::frames)
    }

    /// The machine's frames that `frames` are, as far as the guest has them: the lowest of each
    /// run, and how many there are.
    pub fn machine_runs(&self, frames: PfnRange) -> impl Iterator<Item = (Mfn, u64)> + '_ {
        let (start, end) = (frames.start().raw(), frames.end().raw());
        let first = self
            .by_pfn
            .partition_point(|run| run.frames().end().raw() <= start);
        let runs = self.by_pfn.iter().skip(first);
        runs.take_while(move |run| run.pfn < end)
            .filter_map(move |run| {
                let from = run.pfn.max(start);
                let to = run.frames().end().raw().min(end);
                let (one, other) = (run.mfn_of(from)?, run.mfn_of(to.checked_sub(1)?)?);
                Some((Mfn::new(one.min(other)), to.checked_sub(from)?))
            })
    }
}

/// A [`P2m`] that is being made.
#[derive(Debug, Default)]
pub struct P2mBuilder {
    runs: Vec<Run>,
    frames: Tally,
}

impl P2mBuilder {
    /// Adds a frame of the guest, and which one of the machine it is.
    pub fn push(&mut self, pfn: Pfn, mfn: Mfn) {
        let next = Run {
            pfn: pfn.raw(),
            mfn: mfn.raw(),
            len: 1,
            falls: false,
        };
        self.frames.add(1);
        let last = self.runs.last_mut();
        if !last.is_some_and(|last| last.join(&next)) {
            self.runs.push(next);
        }
    }

    /// The number of frames so far.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames.get()
    }

    /// The table.
    ///
    /// # Errors
    /// [`P2mError`] if a frame of either side came twice.
    pub fn finish(self) -> Result<P2m, P2mError> {
        let mut by_pfn = self.runs;
        by_pfn.sort_unstable_by_key(|run| run.pfn);
        if let Some((run, next)) = overlap(&by_pfn, |run| run.pfn) {
            return Err(P2mError::TwoPlaces {
                pfn: Pfn::new(next.pfn),
                first: Mfn::new(run.mfn_of(next.pfn).unwrap_or(run.mfn)),
                second: Mfn::new(next.mfn_of(next.pfn).unwrap_or(next.mfn)),
            });
        }
        // Those that came in another order.
        by_pfn.dedup_by(|next, run| run.join(next));
        let mut by_mfn = by_pfn.clone();
        by_mfn.sort_unstable_by_key(|run| run.mfn);
        if let Some((run, next)) = overlap(&by_mfn, |run| run.mfn) {
            return Err(P2mError::Shared {
                mfn: Mfn::new(next.mfn),
                first: Pfn::new(run.pfn_of(next.mfn).unwrap_or(run.pfn)),
                second: Pfn::new(next.pfn_of(next.mfn).unwrap_or(next.pfn)),
            });
        }
        Ok(P2m { by_pfn, by_mfn })
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
    runs.iter().zip(runs.iter().skip(1)).find(|(run, next)| {
        let distance = start(next).checked_sub(start(run));
        distance.is_some_and(|distance| distance < run.len)
    })
}

#[cfg(test)]
mod tests {
    use super::{P2m, P2mError};
    use crate::{Mfn, Pfn, PfnRange};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

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
        let falling = P2m::new(frames(&[(1, 12), (2, 11), (3, 10), (9, 11)]));
        assert_eq!(
            falling,
            Err(P2mError::Shared {
                mfn: Mfn::new(11),
                first: Pfn::new(2),
                second: Pfn::new(9)
            })
        );
        assert!(P2m::new(frames(&[(u64::MAX, 3), (0, 4)])).is_ok());
    }

    #[test]
    fn runs_that_rise_and_fall_are_one_each() {
        let rising = (0..1000).map(|n| (n, 5000 + n));
        let falling = (1000..2000).map(|n| (n, 9000 - n));
        let numbers: Vec<_> = rising.chain(falling).collect();
        let p2m = P2m::new(frames(&numbers)).unwrap();
        assert_eq!((p2m.by_pfn.len(), p2m.by_mfn.len()), (2, 2));
        let machine: Vec<_> = p2m
            .machine_runs(PfnRange::new(Pfn::new(990), Pfn::new(1010)))
            .collect();
        assert_eq!(machine, [(Mfn::new(5990), 10), (Mfn::new(7991), 10)]);
    }

    proptest! {
        #[test]
        fn says_what_it_was_told(
            single in proptest::collection::vec((0_u64..64, 0_u64..64), 0..8),
            runs in proptest::collection::vec((0_u64..50, 0_u64..50, 1_u64..9, any::<bool>()), 0..4),
            from in 0_u64..70,
            to in 0_u64..70,
        ) {
            let run = |(pfn, mfn, len, falls)| {
                (0..len).map(move |n| (pfn + n, if falls { mfn + len - n } else { mfn + n }))
            };
            let numbers: Vec<_> = single.into_iter().chain(runs.into_iter().flat_map(run)).collect();
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
                let all: u64 = p2m.frames().map(|run| run.len()).sum();
                prop_assert_eq!(all, table.len() as u64);
                let part = PfnRange::new(Pfn::new(from.min(to)), Pfn::new(from.max(to)));
                let inside: BTreeSet<_> = p2m
                    .machine_runs(part)
                    .flat_map(|(mfn, len)| (mfn.raw()..).zip(0..len).map(|(mfn, _)| mfn))
                    .collect();
                let expected: BTreeSet<_> = table
                    .range(part.start().raw()..part.end().raw())
                    .map(|(_, mfn)| *mfn)
                    .collect();
                prop_assert_eq!(inside, expected);
            }
        }
    }
}
