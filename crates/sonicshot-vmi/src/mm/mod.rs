//! The kernel's memory management: struct pages, zones, free lists.

pub(crate) mod classify;
pub(crate) mod cpus;
pub(crate) mod iomem;
pub(crate) mod mem_map;
pub(crate) mod offline;
pub(crate) mod page;
pub(crate) mod zone;
