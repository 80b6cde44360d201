//! The shape of a kernel of x86-64 of which nothing is told.

use super::{MAX_IMAGE, START_KERNEL_MAP};
use crate::KernelVa;
use crate::arch::KernelShape;
use sonicshot::{Architecture, Gpa, GuestBytes, GuestMemory, PageSize};

/// Of every kernel since 4.18.
pub(super) const SHAPE: KernelShape = KernelShape {
    architecture: Architecture::X86_64,
    page_size: PageSize::SIZE_4K,
    image: KernelVa::new(START_KERNEL_MAP),
    image_end: KernelVa::new(START_KERNEL_MAP + MAX_IMAGE),
    levels: &[4, 5],
    // No config changes it.
    orders: 11,
};

/// Whether `page` may be a top-level page table: the last entry, which maps the kernel's image,
/// leads to a table in RAM, and so do all others of the upper half that lead anywhere.
pub(super) fn may_be_top_table(page: &GuestBytes<'_>, memory: &dyn GuestMemory) -> bool {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let table = PageSize::SIZE_4K.bytes();
    let leads = |entry: u64| {
        entry & LARGE == 0 && memory.layout().contains(Gpa::new(entry & ADDRESS), table)
    };
    let entry = |index: usize| page.u64_at(index << 3);
    entry(511).is_some_and(|entry| entry & PRESENT != 0 && leads(entry))
        && (256..511).filter_map(entry).all(|entry| {
            entry & PRESENT == 0 && entry & PageSize::SIZE_4K.offset_mask() == 0 || leads(entry)
        })
}
