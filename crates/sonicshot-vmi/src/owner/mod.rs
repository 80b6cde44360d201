//! Whether the kernel that was found owns the memory.

pub(crate) mod alive;
pub(crate) mod log;
pub(crate) mod processors;
pub(crate) mod traces;

pub(crate) use traces::look;
