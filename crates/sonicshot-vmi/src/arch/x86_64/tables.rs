//! The place of the kernel's page tables, by its VMCOREINFO (`arch/x86/kernel/vmcore_info_64.c`).

use super::{START_KERNEL_MAP, is_in_image, levels};
use crate::arch::{Tables, need_address};
use crate::error::VmiError;
use crate::symbols::VmcoreinfoLines;
use sonicshot::{Architecture, Gpa, GuestMemory, PageSize};

/// The page tables by `swapper_pg_dir` and `phys_base`, which is what KASLR did to the image.
pub(super) fn by_vmcoreinfo(
    memory: &dyn GuestMemory,
    text: VmcoreinfoLines<'_>,
) -> Result<Tables, VmiError> {
    let unsupported = |what: &str| VmiError::Unsupported { what: what.into() };
    if text
        .number("NUMBER(sme_mask)")
        .is_some_and(|mask| mask != 0)
    {
        return Err(VmiError::OtherMachine {
            what: "a guest with encrypted memory (SME, SEV)",
        });
    }
    let page_table = need_address(text, "swapper_pg_dir")?;
    if u32::try_from(page_table.raw()).is_ok() {
        return Err(VmiError::OtherMachine {
            what: "a 32-bit x86 kernel: only x86-64 is supported",
        });
    }
    let uts = need_address(text, "init_uts_ns")?;
    let phys_base = text
        .number("NUMBER(phys_base)")
        .ok_or_else(|| unsupported("VMCOREINFO without phys_base: not an x86-64 kernel"))?;
    let mut symbol_tables = text
        .lines()
        .filter(|(key, _)| key.starts_with(b"SYMBOL(kallsyms_"));
    let outside = symbol_tables
        .any(|(_, value)| VmcoreinfoLines::hexadecimal(value).is_none_or(|at| !is_in_image(at)));
    if outside || !is_in_image(page_table.raw()) || !is_in_image(uts.raw()) {
        return Err(unsupported("VMCOREINFO with symbols outside the kernel"));
    }
    let root = page_table
        .raw()
        .checked_sub(START_KERNEL_MAP)
        .and_then(|inside| inside.checked_add_signed(phys_base))
        .ok_or_else(|| unsupported("a top-level page table outside the kernel"))?;
    let root = Gpa::new(root);
    let page = PageSize::SIZE_4K;
    if !memory.layout().contains(root, page.bytes()) || root.raw() & page.offset_mask() != 0 {
        return Err(unsupported(&format!(
            "a top-level page table at {root}, outside RAM"
        )));
    }
    let five_levels = text.number("NUMBER(pgtable_l5_enabled)");
    Ok(Tables {
        architecture: Architecture::X86_64,
        page_table,
        root,
        levels: levels(five_levels.is_some_and(|on| on != 0)),
    })
}
