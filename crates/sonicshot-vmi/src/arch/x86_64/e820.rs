//! The firmware's map of memory, as the kernel keeps it (`arch/x86/kernel/e820.c`).

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use sonicshot::{Gpa, GpaRange};

/// As the firmware gave it: `mem=` and the like do not change it.
pub(crate) const FIRMWARE: &str = "e820_table_firmware";
/// As the kernel uses it: what is RAM here is what `present_pages` counts of boot memory.
pub(crate) const OWN: &str = "e820_table";

/// Usable RAM by the map that the variable `name` points to; `None` if no source knows it.
pub(crate) fn usable_ram(
    kernel: &Kernel<'_>,
    name: &str,
) -> Result<Option<Vec<GpaRange>>, VmiError> {
    /// `E820_MAX_ENTRIES`: 128 of the zero page, and 3 for each of 1024 nodes.
    const MAX_ENTRIES: u32 = 128 + 3 * 1024;
    const E820_TYPE_RAM: u32 = 1;
    /// To 6.14: boot data in RAM, which the kernel counts as memory (`e820__memblock_setup`).
    const E820_TYPE_RESERVED_KERN: u32 = 128;
    let Some(variable) = kernel.symbol(name)? else {
        return Ok(None);
    };
    let Some(entries) = kernel.member("e820_table", "entries")? else {
        return Ok(None);
    };
    let size = kernel.need_type_size("e820_entry")?;
    let offset = |name| kernel.need_member("e820_entry", name).map(|m| m.offset);
    let (addr, len, kind) = (offset("addr")?, offset("size")?, offset("type")?);
    let table = kernel.read_ptr("e820_table", variable)?;
    let count_at = kernel.need_member("e820_table", "nr_entries")?.offset;
    let count = kernel.read_u32("e820_table", element("e820_table", table, 0, 0, count_at)?)?;
    if count > MAX_ENTRIES {
        return Err(VmiError::Corrupt {
            what: "e820_table.nr_entries",
            at: table,
            value: u64::from(count),
        });
    }
    let first = element("e820_table", table, 0, 0, entries.offset)?;
    let mut ram = Vec::new();
    for index in 0..u64::from(count) {
        let field = |offset| element("e820_entry", first, index, size, offset);
        let kind = kernel.read_u32("e820_entry", field(kind)?)?;
        if !matches!(kind, E820_TYPE_RAM | E820_TYPE_RESERVED_KERN) {
            continue;
        }
        let start = Gpa::new(kernel.read_u64("e820_entry", field(addr)?)?);
        let len = kernel.read_u64("e820_entry", field(len)?)?;
        ram.extend(GpaRange::with_len(start, len));
    }
    Ok(Some(ram))
}

#[cfg(test)]
mod tests {
    use super::usable_ram;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};

    #[test]
    fn no_more_entries_are_read_than_a_kernel_has() {
        const MOST: u64 = 128 + 3 * 1024;
        for (count, is_read) in [(0, true), (MOST, true), (MOST + 1, false)] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, DIRECT_MAP + 0x2000);
            ram.put(0x2000, count);
            let mut facts = Facts::default();
            facts.symbols.insert("e820_table", DIRECT_MAP + 0x1000);
            facts.sizes.insert("e820_entry", 20);
            for (ty, name, offset) in [
                ("e820_table", "nr_entries", 0),
                ("e820_table", "entries", 4),
                ("e820_entry", "addr", 0),
                ("e820_entry", "size", 8),
                ("e820_entry", "type", 16),
            ] {
                facts.member(ty, name, offset);
            }
            let memory = ram.memory();
            let found = usable_ram(&kernel(&memory, facts), "e820_table");
            assert_eq!(found.is_ok(), is_read, "{count}: {found:?}");
        }
    }
}
