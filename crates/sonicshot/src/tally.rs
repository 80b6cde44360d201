//! Numbers that are shown, and by which nothing is decided.

use core::fmt;

/// A count of pages, bytes or steps for a report or a progress bar.
///
/// No page is kept or dropped by it, nothing is allocated and no place is found by it: what is, is
/// checked and an error where it leaves 64 bits. So this is the one number that stays at its largest
/// value instead. A bound on work may be one too: at its largest it bounds nothing that could be there.
///
/// ```
/// use sonicshot::Tally;
/// let mut pages = Tally::new(3);
/// pages.add(4);
/// assert_eq!(pages.get(), 7);
/// assert_eq!(pages.times(4096).get(), 28_672);
/// assert_eq!([1, 2, 3].into_iter().sum::<Tally>().get(), 6);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tally(u64);

impl Tally {
    /// Nothing yet.
    pub const ZERO: Self = Self(0);

    /// The count `count`.
    #[must_use]
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// The number itself.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Counts `more` of them.
    pub const fn add(&mut self, more: u64) {
        self.0 = self.0.saturating_add(more);
    }

    /// The count with `more` of them.
    #[must_use]
    pub const fn and(mut self, more: u64) -> Self {
        self.add(more);
        self
    }

    /// The count without `others`, as far as there are so many.
    #[must_use]
    pub const fn without(self, others: u64) -> Self {
        Self(self.0.saturating_sub(others))
    }

    /// The count in units of which each holds `factor`.
    #[must_use]
    pub const fn times(self, factor: u64) -> Self {
        Self(self.0.saturating_mul(factor))
    }

    /// The count as far as it is part of `total`: a bar ends at its end.
    #[must_use]
    pub fn up_to(self, total: u64) -> u64 {
        self.0.min(total)
    }
}

impl From<u64> for Tally {
    fn from(count: u64) -> Self {
        Self(count)
    }
}

impl core::iter::Sum<u64> for Tally {
    fn sum<I: Iterator<Item = u64>>(counts: I) -> Self {
        counts.fold(Self::ZERO, Self::and)
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
