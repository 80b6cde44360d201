//! Putting a checkpoint's pages where a guest expects them: all at once, or by mapping the file.

#[cfg(feature = "mmap")]
#[expect(unsafe_code, reason = "the edge to mmap")]
pub(crate) mod private_map;
#[expect(
    unsafe_code,
    reason = "a VMM's regions are given as pointers, and filled by several threads"
)]
pub(crate) mod whole;
