//! x86-64.

pub(crate) mod e820;
mod paging;

pub(crate) use paging::X86_64;
