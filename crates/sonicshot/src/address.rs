//! Addresses and frames: one newtype for each kind, checked arithmetic only.

use crate::to_u64;
use core::fmt;

/// The size of a guest page, always a power of two between 4 KiB and 64 KiB.
///
/// ```
/// use sonicshot::PageSize;
/// assert_eq!(PageSize::new(4096), Some(PageSize::SIZE_4K));
/// assert_eq!(PageSize::new(4095), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageSize(u8);

impl PageSize {
    /// 4 KiB, the only size of x86-64 and the usual one of arm64.
    pub const SIZE_4K: Self = Self(12);
    /// 16 KiB (arm64).
    pub const SIZE_16K: Self = Self(14);
    /// 64 KiB (arm64).
    pub const SIZE_64K: Self = Self(16);

    /// The page size of `bytes` bytes, if a supported guest can have it.
    #[must_use]
    #[inline]
    pub const fn new(bytes: u64) -> Option<Self> {
        match bytes {
            0x1000 => Some(Self::SIZE_4K),
            0x4000 => Some(Self::SIZE_16K),
            0x1_0000 => Some(Self::SIZE_64K),
            _ => None,
        }
    }

    /// The size in bytes.
    #[must_use]
    #[inline]
    #[allow(clippy::arithmetic_side_effects, reason = "the shift is 12 to 16")]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The binary logarithm of the size.
    #[must_use]
    #[inline]
    pub const fn shift(self) -> u32 {
        self.0 as u32
    }

    /// The size as a length in memory.
    #[must_use]
    #[inline]
    pub const fn size(self) -> usize {
        1 << self.0
    }

    /// The number of bytes from `at` to the end of its page.
    ///
    /// ```
    /// use sonicshot::PageSize;
    /// assert_eq!(PageSize::SIZE_4K.left_in_page(0x1ff8), 8);
    /// assert_eq!(PageSize::SIZE_4K.left_in_page(0x2000), 0x1000);
    /// ```
    #[must_use]
    #[inline]
    #[allow(clippy::arithmetic_side_effects, reason = "less than a page")]
    pub const fn left_in_page(self, at: u64) -> u64 {
        self.bytes() - (at & self.offset_mask())
    }

    /// The mask of the bits inside a page.
    #[must_use]
    #[inline]
    #[allow(clippy::arithmetic_side_effects, reason = "the shift is 12 to 16")]
    pub const fn offset_mask(self) -> u64 {
        (1 << self.0) - 1
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.bytes() >> 10)
    }
}

/// An address or a number of its own kind.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(u64);

        impl $name {
            #[doc = concat!("The ", $unit, " `raw`.")]
            #[must_use]
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            #[doc = concat!("The ", $unit, " as a number.")]
            #[must_use]
            #[inline]
            pub const fn raw(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

pub(crate) use number;

number! {
    /// A guest-physical address, in bytes.
    Gpa, "address"
}

number! {
    /// A page frame number: a guest-physical address in units of the guest's page size.
    Pfn, "frame"
}

number! {
    /// A frame number of the machine. A guest has its own numbers ([`Pfn`]); only a paravirtualised
    /// one sees these too.
    Mfn, "frame"
}

impl Gpa {
    /// Guest-physical zero.
    pub const ZERO: Self = Self(0);

    /// The address `bytes` further up, unless that wraps.
    #[must_use]
    #[inline]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The distance of `self` above `base`, unless it is below.
    #[must_use]
    #[inline]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// The frame that holds this address.
    #[must_use]
    #[inline]
    pub const fn pfn(self, page_size: PageSize) -> Pfn {
        Pfn(self.0 >> page_size.0)
    }
}

impl fmt::LowerHex for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl Pfn {
    /// The frame `frames` further up, unless that wraps.
    #[must_use]
    #[inline]
    pub const fn checked_add(self, frames: u64) -> Option<Self> {
        match self.0.checked_add(frames) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The number of frames from `base` up to `self`, unless it is below.
    #[must_use]
    #[inline]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// The address of the frame, unless that is beyond 64 bits.
    #[must_use]
    #[inline]
    pub const fn gpa(self, page_size: PageSize) -> Option<Gpa> {
        match self.0.checked_mul(page_size.bytes()) {
            Some(raw) => Some(Gpa(raw)),
            None => None,
        }
    }

    /// Whether the frame number is a multiple of `2^order`.
    #[must_use]
    #[inline]
    pub const fn is_aligned(self, order: u32) -> bool {
        order < u64::BITS && self.0.trailing_zeros() >= order
    }
}

macro_rules! half_open_range {
    ($(#[$doc:meta])* $name:ident of $point:ident, $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name {
            start: $point,
            end: $point,
        }

        impl $name {
            /// The range from `start` up to, but without, `end`; empty if `end` is not above
            /// `start`.
            #[must_use]
            #[inline]
            pub const fn new(start: $point, end: $point) -> Self {
                let end = if end.0 < start.0 { start } else { end };
                Self { start, end }
            }

            /// The range from `start` up to, but without, `end`; `None` if `end` is below `start`.
            #[must_use]
            #[inline]
            pub const fn between(start: $point, end: $point) -> Option<Self> {
                if end.0 < start.0 {
                    return None;
                }
                Some(Self { start, end })
            }

            #[doc = concat!("The range of `len` ", $unit, " from `start`, unless it wraps.")]
            #[must_use]
            #[inline]
            pub const fn with_len(start: $point, len: u64) -> Option<Self> {
                match start.checked_add(len) {
                    Some(end) => Some(Self { start, end }),
                    None => None,
                }
            }

            /// The start of the range.
            #[must_use]
            #[inline]
            pub const fn start(&self) -> $point {
                self.start
            }

            /// The first point that is no longer in the range.
            #[must_use]
            #[inline]
            pub const fn end(&self) -> $point {
                self.end
            }

            #[doc = concat!("The length in ", $unit, ".")]
            #[must_use]
            #[inline]
            #[allow(clippy::arithmetic_side_effects, reason = "end is never below start")]
            pub const fn len(&self) -> u64 {
                self.end.0 - self.start.0
            }

            /// Whether nothing is in the range.
            #[must_use]
            #[inline]
            pub const fn is_empty(&self) -> bool {
                self.start.0 == self.end.0
            }

            /// Whether `point` is in the range.
            #[must_use]
            #[inline]
            pub const fn contains(&self, point: $point) -> bool {
                self.start.0 <= point.0 && point.0 < self.end.0
            }

            #[doc = concat!("How many ", $unit, " are in `ranges`, no two of which have one in common: so")]
            /// that they are not more than there are numbers.
            #[must_use]
            #[inline]
            pub fn total_of<'a>(ranges: impl IntoIterator<Item = &'a Self>) -> u64 {
                let lengths = ranges.into_iter().map(Self::len);
                lengths.fold(0, u64::saturating_add)
            }

            /// The last point in the range; `None` of an empty one.
            #[must_use]
            pub const fn last(&self) -> Option<$point> {
                match self.end.0.checked_sub(1) {
                    Some(last) if self.start.0 <= last => Some($point(last)),
                    _ => None,
                }
            }

            #[doc = concat!("The first `most` ", $unit, " of the range, or all of it if it has no more.")]
            #[must_use]
            pub const fn up_to(&self, most: u64) -> Self {
                match self.start.checked_add(most) {
                    Some(end) if end.0 < self.end.0 => Self { start: self.start, end },
                    _ => *self,
                }
            }

            /// Adds the range to `runs`, as one with the last if it begins where that ends.
            pub fn append_to(self, runs: &mut Vec<Self>) {
                match runs.last_mut() {
                    Some(last) if last.end == self.start => last.end = self.end,
                    _ => runs.push(self),
                }
            }

            /// The part that both ranges cover; empty if they do not meet.
            #[must_use]
            #[inline]
            pub fn intersection(&self, other: &Self) -> Self {
                let start = self.start.max(other.start);
                Self::new(start, self.end.min(other.end))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}..{:#x}", self.start.0, self.end.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}..{:#x}", self.start.0, self.end.0)
            }
        }
    };
}

pub(crate) use half_open_range;

half_open_range! {
    /// A half-open range of guest-physical addresses.
    GpaRange of Gpa, "bytes"
}

half_open_range! {
    /// A half-open range of page frames.
    PfnRange of Pfn, "frames"
}

impl GpaRange {
    /// The range of a request for `len` bytes from `at`, as errors tell it: empty if it ends beyond
    /// 64 bits, where there is no RAM.
    ///
    /// ```
    /// use sonicshot::{Gpa, GpaRange};
    /// assert_eq!(GpaRange::of_request(Gpa::new(0x1000), 8).len(), 8);
    /// assert!(GpaRange::of_request(Gpa::new(u64::MAX), 8).is_empty());
    /// ```
    #[must_use]
    #[inline]
    pub const fn of_request(at: Gpa, len: usize) -> Self {
        match Self::with_len(at, to_u64(len)) {
            Some(range) => range,
            None => Self { start: at, end: at },
        }
    }

    /// The frames that lie wholly inside the range.
    ///
    /// ```
    /// use sonicshot::{Gpa, GpaRange, PageSize, Pfn};
    /// let range = GpaRange::new(Gpa::new(0x1800), Gpa::new(0x4800));
    /// let frames = range.whole_frames(PageSize::SIZE_4K);
    /// assert_eq!((frames.start(), frames.end()), (Pfn::new(2), Pfn::new(4)));
    /// ```
    #[must_use]
    #[inline]
    pub fn whole_frames(&self, page_size: PageSize) -> PfnRange {
        let start = self.start.0.div_ceil(page_size.bytes());
        PfnRange::new(Pfn(start), self.end.pfn(page_size))
    }
}

impl PfnRange {
    /// The addresses that the frames cover, unless they end beyond 64 bits.
    #[must_use]
    #[inline]
    pub fn gpa_range(&self, page_size: PageSize) -> Option<GpaRange> {
        Some(GpaRange::new(
            self.start.gpa(page_size)?,
            self.end.gpa(page_size)?,
        ))
    }

    /// Every frame of the range, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + use<> {
        (self.start.0..self.end.0).map(Pfn)
    }
}

#[cfg(test)]
mod tests {
    use super::{Pfn, PfnRange};

    #[test]
    fn a_range_knows_its_last_and_its_beginning() {
        let range = |start, end| PfnRange::new(Pfn::new(start), Pfn::new(end));
        for (of, last) in [
            (range(3, 8), Some(7)),
            (range(0, 1), Some(0)),
            (range(5, u64::MAX), Some(u64::MAX - 1)),
            (range(0, 0), None),
            (range(7, 7), None),
        ] {
            assert_eq!(of.last(), last.map(Pfn::new), "{of}");
        }
        for (of, most, begins) in [
            (range(3, 8), 0, range(3, 3)),
            (range(3, 8), 2, range(3, 5)),
            (range(3, 8), 5, range(3, 8)),
            (range(3, 8), u64::MAX, range(3, 8)),
            (range(7, 7), 2, range(7, 7)),
        ] {
            assert_eq!(of.up_to(most), begins, "{of}");
        }
    }
}
