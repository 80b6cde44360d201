//! The memory that the kernel itself uses and no free block may cover: its page tables, its code, the pages
//! that hold the zones. (That struct pages are not free is seen in every classification.)
//!
//! Records that were taken for the allocator's and are not, or are another kernel's, say of these
//! pages that they are free as of any other.

use crate::arch::{Arch, KernelShape};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::zone::Zones;
use crate::{AddressSpace, KernelVa};
use sonicshot::{Gpa, PageClass, PageMap, PageSize};

/// The code of a kernel is larger than this; behind it are parts that the kernel gives back once it
/// is up.
const CODE: u64 = 1 << 20;

/// Refuses a classification in which a page is free that the kernel runs on.
///
/// # Errors
/// [`VmiError::Covered`] with the first such page.
pub(crate) fn check(
    kernel: &Kernel<'_>,
    zones: &Zones,
    image: (KernelVa, KernelVa),
    map: &PageMap,
) -> Result<(), VmiError> {
    let space = &kernel.space;
    let refuse = |what: &'static str, at: Gpa| match map.class(at.pfn(map.page_size())) {
        Some(PageClass::FreeBuddy | PageClass::FreePcp | PageClass::Offline) => {
            Err(VmiError::Covered { what, at })
        }
        _ => Ok(()),
    };
    let mut wrong = Ok(());
    space.visit_tables(&mut |table| {
        wrong = refuse("a page table of the kernel", table);
        wrong.is_ok()
    })?;
    wrong?;
    for at in pages(image, map.page_size()) {
        if let Ok(there) = space.translate(at) {
            refuse("the kernel's code", there.at)?;
        }
    }
    for zone in &zones.zones {
        if let Ok(there) = space.translate(zone.at) {
            refuse("a zone of the kernel", there.at)?;
        }
        for offset in &zones.cpu_offsets {
            if let Ok(there) = space.translate(zone.pageset.moved_by(*offset)) {
                refuse("a per-CPU list of the kernel", there.at)?;
            }
        }
    }
    Ok(())
}

/// The pages at the beginning of the image.
fn pages(image: (KernelVa, KernelVa), page_size: PageSize) -> impl Iterator<Item = KernelVa> {
    let len = image.1.offset_from(image.0).map(|len| len.min(CODE));
    let count = len.map(|len| len.div_ceil(page_size.bytes()));
    let numbers = count.into_iter().flat_map(|count| 0..count);
    numbers.filter_map(move |number| image.0.checked_add(number.checked_mul(page_size.bytes())?))
}

/// The beginning of the kernel's image: the first mapping where one may be.
pub(crate) fn first_mapped(
    space: &AddressSpace<'_>,
    arch: &dyn Arch,
    shape: &KernelShape,
) -> Option<KernelVa> {
    let mut at = shape.image;
    while at < shape.image_end {
        if space.translate(at).is_ok() {
            return Some(at);
        }
        at = at.checked_add(arch.image().align)?;
    }
    None
}
