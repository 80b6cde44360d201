//! Lengths of 64 bits in memory, and samples of what is there.

use core::num::NonZeroUsize;

/// A length in memory as one of 64 bits, which has room for all of them.
///
/// ```
/// assert_eq!(sonicshot::to_u64(usize::MAX), u64::MAX);
/// ```
#[must_use]
pub const fn to_u64(len: usize) -> u64 {
    const { assert!(usize::BITS <= u64::BITS, "no length is cut") };
    len as u64
}

/// A length or a place of 64 bits as one in memory: all of it, on the hosts that this crate is for.
///
/// ```
/// assert_eq!(sonicshot::to_usize(u64::MAX), usize::MAX);
/// ```
#[must_use]
#[allow(
    clippy::cast_possible_truncation,
    reason = "a `usize` has 64 bits, see the crate's root"
)]
pub const fn to_usize(len: u64) -> usize {
    len as usize
}

/// At most `most` of `all`, evenly spread from the first on: all of them if they are no more, and one
/// at least.
///
/// ```
/// let numbers: Vec<usize> = (0..10).collect();
/// assert!(sonicshot::spread(&numbers, 3).eq(&[0, 4, 8]));
/// assert!(sonicshot::spread(&numbers, 0).eq(&[0]));
/// assert_eq!(sonicshot::spread(&numbers[..2], 3).count(), 2);
/// assert_eq!(sonicshot::spread::<usize>(&[], 3).count(), 0);
/// ```
pub fn spread<T>(all: &[T], most: usize) -> impl Iterator<Item = &T> {
    let most = NonZeroUsize::new(most);
    let step = most.map_or(all.len(), |most| all.len().div_ceil(most.get()));
    all.iter().step_by(step.max(1))
}
