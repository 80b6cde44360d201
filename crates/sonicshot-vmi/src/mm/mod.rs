//! The kernel's memory management: struct pages, zones, free lists.

pub(crate) mod mem_map;
pub(crate) mod page;
pub(crate) mod zone;
pub(crate) mod classify;
