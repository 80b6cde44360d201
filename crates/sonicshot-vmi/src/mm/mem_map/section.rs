//! Runs of frames and sections of memory, as the kernel has struct pages for them.

use crate::KernelVa;
use sonicshot::PfnRange;

/// A run of frames whose `struct page`s follow each other in virtual memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub frames: PfnRange,
    /// The `struct page` of the first frame.
    pub at: KernelVa,
    /// Whether the kernel uses the memory (hotplug: the section is online).
    pub online: bool,
    /// Whether the kernel booted with it; then there may be holes in it.
    pub early: bool,
}

/// A section of memory that has struct pages (`SPARSEMEM`).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section {
    /// Its number, `section_nr`.
    pub number: u64,
    pub frames: PfnRange,
    /// Whether its word says that the kernel uses the memory. One bit: no proof of anything alone.
    pub online: bool,
}

/// A section that has struct pages.
pub(super) struct Found {
    pub section: Section,
    /// The address of its `struct mem_section`.
    pub at: KernelVa,
    /// The beginning of the array that its word names: the address for frame 0.
    pub array: KernelVa,
}
