//! SonicShot leaves a guest's free memory out of its snapshots.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod address;
mod bytes;
mod class;
mod memory;
mod page_map;
mod policy;

pub use address::{Gpa, GpaRange, PageSize, Pfn, PfnRange};
pub use bytes::GuestBytes;
pub use class::{ClassCounts, ClassSet, PageClass, UnknownClass};
pub use memory::{
    GuestMemory, Hold, LayoutError, MAX_MAP, Mapped, MappedRegions, MemoryError, RamLayout,
};
pub use page_map::PageMap;
pub use policy::{Disposition, DropClasses, DropRun, Fill, PrunePlan, PrunePolicy};
