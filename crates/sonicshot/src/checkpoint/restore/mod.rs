//! Putting a checkpoint's pages where a guest expects them: all at once, by mapping the file, or on
//! demand.

#[cfg(feature = "userfaultfd")]
pub(crate) mod lazy;
#[cfg(feature = "mmap")]
pub(crate) mod private_map;
pub(crate) mod whole;
