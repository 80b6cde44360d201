//! Lengths of 64 bits in memory.

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
