//! Whether the kernel that was found owns the memory.

pub(crate) mod alive;
mod efi;
pub(crate) mod processors;
mod traces;

pub use traces::Trace;
pub(crate) use traces::{Owner, look};
