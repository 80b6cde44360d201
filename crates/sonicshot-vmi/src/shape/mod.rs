//! The allocator's structures found by their shape, where no type tells what they look like.
//!
//! Kernels of sandboxes have no BTF, and often no symbols of data. VMCOREINFO alone tells what a
//! struct page of a free block looks like, and how a zone's array of free areas is laid out, but
//! not where a zone is, nor anything of the per-CPU lists. Both are found by the lists themselves:
//! a list of free pages leaves the struct pages at its head, and the head is in what is looked
//! for. What is found so is held against the same records as what types tell of.

mod counter;
mod cover;
mod displacements;
mod heads;
mod kernel;
mod nodes;
mod percpu;
mod records;
mod roots;
mod words;
mod zones;

use crate::KernelVa;
use crate::arch;
use crate::deadline::Deadline;
use crate::discover::image_range;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::knowledge::Knowledge;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::zone::Zones;
pub(crate) use cover::check as check_cover;
use heads::Look;
use sonicshot::Progress;
use zones::{Exits, ZoneWords};

pub(crate) use kernel::{Shaped, find};

/// The kernel's image, of a kernel of which nothing is told; `None` if nothing is mapped where one
/// may be.
///
/// # Errors
/// [`VmiError::Unsupported`] for an architecture whose kernels are not found so.
pub(crate) fn image_of(kernel: &Kernel<'_>) -> Result<Option<(KernelVa, KernelVa)>, VmiError> {
    let arch = arch::of(kernel)?;
    let start = arch
        .shape()
        .and_then(|shape| cover::first_mapped(&kernel.space, arch, shape));
    Ok(start.map(|start| image_range(arch, &kernel.space, start)))
}

/// The number of struct pages: no list is longer.
fn frames_of(map: &MemMap<'_>) -> Result<u64, VmiError> {
    map.spans()
        .iter()
        .try_fold(0_u64, |sum, span| sum.checked_add(span.frames.len()))
        .ok_or_else(|| VmiError::Unsupported {
            what: "more struct pages than there can be frames".into(),
        })
}

/// The zones and per-CPU lists of a kernel of which VMCOREINFO tells, but no types. `image` is
/// the kernel's.
///
/// # Errors
/// [`VmiError::Unsupported`] if no zone is found, or VMCOREINFO is of an unknown kind;
/// [`VmiError::Missing`] if it lacks what is needed, [`VmiError::BrokenLists`] if the lists cannot be
/// followed.
pub(crate) fn told_zones(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    layout: &PageLayout,
    image: (KernelVa, KernelVa),
    progress: &dyn Progress,
) -> Result<Zones, VmiError> {
    zones_told(kernel, map, layout, image, progress)
        .map_err(|error| error.of_lists(Knowledge::Vmcoreinfo))
}

fn zones_told(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    layout: &PageLayout,
    image: (KernelVa, KernelVa),
    progress: &dyn Progress,
) -> Result<Zones, VmiError> {
    let deadline = Deadline::new();
    let area = zones::told_area(kernel)?;
    let words = ZoneWords::told(kernel)?;
    let look = Look::new(kernel, map, layout, image, &deadline);
    let arrays = Exits::find(map, layout, progress)?.arrays(&look.heads, &area, &deadline)?;
    if arrays.is_empty() {
        return Err(VmiError::Unsupported {
            what: "no list of free pages leads to a zone: types are missing, and nothing else \
                   tells where zones are"
                .into(),
        });
    }
    let owned = nodes::owned(&look, &arrays, &area)?;
    let mut found = Vec::new();
    for array in &owned.arrays {
        found.push(zones::read(&kernel.space, *array, &area, words)?);
    }
    let per_cpu = percpu::find(&look, &mut found, &owned, words.index)?;
    Ok(Zones::by_shape(
        area,
        found,
        per_cpu.offsets,
        per_cpu.lists,
        !per_cpu.with_deltas,
    ))
}
