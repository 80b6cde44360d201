//! A second record of where the struct pages are.

use super::section::Found;
use crate::KernelVa;
use crate::arch::SectionSize;
use crate::error::VmiError;
use crate::kernel::Kernel;
use sonicshot::Pfn;

/// Holds where each section has its struct pages against a second record, for a pointer that is
/// off by some frames would give every frame another's `struct page`.
///
/// With `SPARSEMEM_VMEMMAP` all sections have one array, which begins at `vmemmap_base`
/// (`arch/x86/include/asm/pgtable_64_types.h`). Without it the number of the section stands at the
/// top of `page.flags` (`set_page_section`, `include/linux/mm.h`).
pub(super) fn check(
    kernel: &Kernel<'_>,
    found: &[Found],
    stride: u64,
    size: SectionSize,
) -> Result<(), VmiError> {
    let variable = kernel.symbol_from_table("vmemmap_base")?;
    let told = variable
        .map(|at| kernel.read_ptr("vmemmap_base", at))
        .transpose()?;
    // Without `CONFIG_RANDOMIZE_MEMORY` there is no variable; VMCOREINFO has the value since 6.12.
    let told = match (&kernel.vmcoreinfo, told) {
        (Some(info), None) => info.symbol("vmemmap"),
        (_, told) => told,
    };
    let mut sorted: Vec<KernelVa> = found.iter().map(|found| found.array).collect();
    sorted.sort_unstable();
    let same = sorted.chunk_by(|a, b| a == b).max_by_key(|same| same.len());
    let shared = same.filter(|same| same.len() > 1).and_then(<[_]>::first);
    let Some(vmemmap) = told.or(shared.copied()) else {
        // One section alone: the common array begins at a whole GiB (`kaslr_regions`,
        // `arch/x86/mm/kaslr.c`), and one of its own nowhere near.
        if let [array] = sorted.as_slice()
            && array.raw() & ((1 << 30) - 1) == 0
        {
            return Ok(());
        }
        return check_numbers(kernel, found, stride, size);
    };
    match found.iter().find(|found| found.array != vmemmap) {
        None => Ok(()),
        Some(Found { at, array, .. }) => Err(VmiError::Disagree {
            what: "where the struct pages are".into(),
            first: if told.is_some() {
                "vmemmap_base".into()
            } else {
                "other sections".into()
            },
            first_value: vmemmap.raw(),
            second: format!("the section at {at}"),
            second_value: array.raw(),
        }),
    }
}

/// Holds the number of each section against the one at the top of `page.flags`.
fn check_numbers(
    kernel: &Kernel<'_>,
    found: &[Found],
    stride: u64,
    size: SectionSize,
) -> Result<(), VmiError> {
    let flags = kernel.need_member("page", "flags")?.offset;
    let shift = size
        .memory_bits
        .checked_sub(size.section_bits)
        .and_then(|width| 64_u32.checked_sub(width))
        .filter(|shift| *shift < 64);
    // Struct pages of a section that was never online hold anything.
    for Found { section, array, .. } in found.iter().filter(|found| found.section.online) {
        let last = section.frames.end().raw().checked_sub(1).map(Pfn::new);
        for pfn in [Some(section.frames.start()), last].into_iter().flatten() {
            let inside = pfn.raw().checked_mul(stride).ok_or(VmiError::Corrupt {
                what: "a frame of a section",
                at: *array,
                value: pfn.raw(),
            })?;
            let at = array.moved_by(inside).moved_by(flags);
            let number = shift.map(|shift| kernel.read_u64("page.flags", at).map(|f| f >> shift));
            if let Some(number) = number.transpose()?
                && number != section.number
            {
                return Err(VmiError::Disagree {
                    what: format!("the section of frame {pfn}"),
                    first: "mem_section".into(),
                    first_value: section.number,
                    second: "page.flags".into(),
                    second_value: number,
                });
            }
        }
    }
    Ok(())
}
