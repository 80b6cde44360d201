//! x86-64 (`arch/x86`): four- and five-level page tables, a PC's firmware, Xen's paravirtualised
//! guests.

mod cr3;
mod e820;
mod paging;
mod registers;
mod shape;
mod tables;
pub(crate) mod traces;

use super::{
    Arch, ForeignProcessor, ImageShape, KernelShape, Landmark, Owner, SectionSize, Tables, Test,
    Told,
};
use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::paging::Paging;
use crate::symbols::VmcoreinfoLines;
pub use cr3::{Cr3, ParseCr3Error};
pub(crate) use paging::Walk;
use sonicshot::{Gpa, GpaRange, GuestBytes, GuestMemory, PageSize, PfnRange};

/// `__START_KERNEL_map` (`arch/x86/include/asm/page_64_types.h`): an ABI of the kernel's own
/// linker script, the same since 2.6.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `KERNEL_IMAGE_SIZE` is 1 GiB at most.
const MAX_IMAGE: u64 = 1 << 30;

/// The architecture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct X86_64;

/// The levels of a kernel's page tables.
fn levels(five: bool) -> u32 {
    if five { 5 } else { 4 }
}

fn is_in_image(at: u64) -> bool {
    at.checked_sub(START_KERNEL_MAP)
        .is_some_and(|offset| offset < MAX_IMAGE)
}

impl Arch for X86_64 {
    fn has_page_size(&self, size: PageSize) -> bool {
        size == PageSize::SIZE_4K
    }

    fn is_pointer(&self, value: u64) -> bool {
        paging::is_pointer(value)
    }

    fn may_point_to_page(&self, value: u64) -> bool {
        PageSize::SIZE_4K.offset_mask() & value == 0
            && value >> 56 == 0xff
            && value < START_KERNEL_MAP
    }

    fn image(&self) -> ImageShape {
        ImageShape {
            // `CONFIG_PHYSICAL_ALIGN` of a relocatable kernel is 2 MiB or more.
            align: 2 << 20,
            max_len: MAX_IMAGE,
        }
    }

    /// `arch/x86/include/asm/sparsemem.h`.
    fn section_size(&self, _: PageSize) -> SectionSize {
        SectionSize {
            section_bits: 27,
            memory_bits: 52,
        }
    }

    fn tables(
        &self,
        memory: &dyn GuestMemory,
        text: VmcoreinfoLines<'_>,
    ) -> Result<Tables, VmiError> {
        tables::by_vmcoreinfo(memory, text)
    }

    fn walk(&self, root: Gpa, levels: u32) -> Box<dyn Paging> {
        Box::new(Walk::new(root, levels))
    }

    fn shape(&self) -> Option<&'static KernelShape> {
        Some(&shape::SHAPE)
    }

    fn may_be_top_table(&self, page: &GuestBytes<'_>, memory: &dyn GuestMemory) -> bool {
        shape::may_be_top_table(page, memory)
    }

    fn user_mapping(&self, entry: u64, page_size: PageSize) -> Option<PfnRange> {
        paging::user_mapping(entry, page_size)
    }

    /// `e820_table_firmware`, which `mem=` and the like do not change, or where there is none
    /// `e820_table`.
    fn boot_ram(&self, kernel: &Kernel<'_>) -> Result<Option<Vec<GpaRange>>, VmiError> {
        match e820::usable_ram(kernel, e820::FIRMWARE)? {
            None => e820::usable_ram(kernel, e820::OWN),
            found => Ok(found),
        }
    }

    fn counted_ram(&self, kernel: &Kernel<'_>) -> Result<Option<Vec<GpaRange>>, VmiError> {
        e820::usable_ram(kernel, e820::OWN)
    }

    /// `page_offset_base`, with `CONFIG_RANDOMIZE_MEMORY`.
    fn direct_map(&self, kernel: &Kernel<'_>) -> Result<Option<KernelVa>, VmiError> {
        kernel
            .symbol("page_offset_base")?
            .map(|at| kernel.read_ptr("page_offset_base", at))
            .transpose()
    }

    /// `arch/x86/include/asm/page_64_types.h`, since 4.20 and before; with five levels.
    fn fixed_direct_map(&self, kernel: &Kernel<'_>, ranges: &[GpaRange]) -> Option<KernelVa> {
        const BASES: [u64; 4] = [
            0xffff_8880_0000_0000,
            0xffff_8800_0000_0000,
            0xff11_0000_0000_0000,
            0xff10_0000_0000_0000,
        ];
        /// Behind what the firmware uses.
        const PROBE: u64 = 16 << 20;
        let probe = Gpa::new(PROBE);
        if !ranges.iter().any(|range| range.contains(probe)) {
            return None;
        }
        let maps = |base: &KernelVa| {
            let there = base.checked_add(PROBE).map(|at| kernel.space.translate(at));
            matches!(there, Some(Ok(there)) if there.at == probe)
        };
        BASES.map(KernelVa::new).into_iter().find(maps)
    }

    fn roots(&self, memory: &dyn GuestMemory, told: &Told) -> Vec<(Gpa, u32)> {
        registers::roots(memory, told)
    }

    fn may_run_on(&self, memory: &dyn GuestMemory, told: &Told, tables: &Tables) -> bool {
        registers::may_run_on(memory, told, tables)
    }

    fn first_foreign(
        &self,
        kernel: &Kernel<'_>,
        landmarks: &[Landmark],
        told: &[(usize, Told)],
    ) -> Result<Option<ForeignProcessor>, VmiError> {
        registers::first_foreign(kernel, landmarks, told)
    }

    fn traces(&self) -> &'static [(&'static str, Test)] {
        &traces::TESTS
    }

    fn traces_by_log(&self) -> &'static [(&'static str, Test)] {
        &traces::TESTS_BY_LOG
    }

    fn is_settled(&self, owner: &Owner) -> bool {
        traces::are_settled(owner)
    }
}

#[cfg(test)]
mod bounds {
    use super::{MAX_IMAGE, START_KERNEL_MAP, is_in_image};

    #[test]
    fn an_image_is_no_longer_than_what_is_mapped_of_it() {
        for (at, is_inside) in [(0, true), (MAX_IMAGE - 1, true), (MAX_IMAGE, false)] {
            assert_eq!(is_in_image(START_KERNEL_MAP + at), is_inside, "{at:#x}");
        }
        assert!(!is_in_image(START_KERNEL_MAP - 1));
    }
}
