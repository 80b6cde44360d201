//! The firmware's tables: the ACPI root pointer that the kernel found, the root table, and each table
//! that it listed (`drivers/acpi/acpica/tbutils.c`; ACPI 6.5, section 5.2).

use super::efi::boot_params;
use super::physical;
use crate::arch::{Trace, Verdict, not_made};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::owner::log::{self, Line};
use sonicshot::{Gpa, MemoryError, to_u64};

/// No machine has more.
const MAX_TABLES: usize = 256;

/// The test for a trace in them.
pub(super) fn firmware(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    let root = kernel.read_u64("boot_params", boot_params(kernel, "acpi_rsdp_addr")?)?;
    if root == 0 {
        return not_made("the kernel was not told where the ACPI tables are");
    }
    let Some(table) = root_table(kernel, Gpa::new(root))? else {
        let found = "is not there".into();
        return Ok(vec![wrong("the ACPI root pointer", Gpa::new(root), found)].into());
    };
    let mut traces = Vec::new();
    traces.extend(check_root_table(kernel, table)?);
    for listed in listed(kernel)? {
        traces.extend(listed.check(kernel)?);
    }
    Ok(traces.into())
}

/// As [`firmware`], of a kernel of which no types tell: by the lines of its log that name each table
/// (`acpi_tb_print_table_header`, `drivers/acpi/acpica/tbprint.c`).
pub(super) fn firmware_by_log(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    const ROOT: u32 = u32::from_le_bytes(*b"RSDP");
    let mut tables = Vec::new();
    log::lines(kernel, &mut |line| {
        tables.extend(Listed::of_line(&line));
        tables.len() <= MAX_TABLES
    })?;
    if tables.len() > MAX_TABLES {
        return not_made("the kernel's log names more ACPI tables than there are");
    }
    let Some(root) = tables.iter().find(|table| table.name == ROOT) else {
        return not_made("the kernel's log does not tell where the ACPI tables are");
    };
    let Some(table) = root_table(kernel, root.at)? else {
        let found = "is not there".into();
        return Ok(vec![wrong("the ACPI root pointer", root.at, found)].into());
    };
    let mut traces = Vec::new();
    traces.extend(check_root_table(kernel, table)?);
    for table in tables.iter().filter(|table| table.name != ROOT) {
        traces.extend(table.check(kernel)?);
    }
    Ok(traces.into())
}

fn wrong(what: &str, at: Gpa, found: String) -> Trace {
    Trace::Firmware {
        what: what.into(),
        at,
        found,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The little-endian word at `at` of what was read in one piece.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)
        .and_then(|word| word.first_chunk())
        .map(|word| u32::from_le_bytes(*word))
}

/// The address to which the root pointer at `at` leads, if it is one.
fn root_table(kernel: &Kernel<'_>, at: Gpa) -> Result<Option<Gpa>, VmiError> {
    let pointer: [u8; 36] = physical(kernel, at)?;
    let (v1, rest) = pointer.split_at(20);
    if !v1.starts_with(b"RSD PTR ") || sum(v1) != 0 {
        return Ok(None);
    }
    let extended = v1.get(15).is_some_and(|revision| *revision >= 2);
    let halves = word(rest, 4).zip(word(rest, 8));
    let xsdt = halves.map(|(low, high)| u64::from(low) | u64::from(high) << 32);
    let rsdt = word(v1, 16).map(u64::from);
    let root = xsdt.filter(|xsdt| extended && *xsdt != 0).or(rsdt);
    Ok(root.map(Gpa::new))
}

/// The trouble with the root table, if anything is.
fn check_root_table(kernel: &Kernel<'_>, table: Gpa) -> Result<Option<Trace>, VmiError> {
    /// A root table of more is none.
    const MAX_ROOT: u32 = 1 << 16;
    let header: [u8; 8] = physical(kernel, table)?;
    let length = word(&header, 4);
    let named = header.starts_with(b"RSDT") || header.starts_with(b"XSDT");
    if named
        && let Some(length) = length.filter(|length| (36..=MAX_ROOT).contains(length))
        && let Ok(length) = usize::try_from(length)
    {
        let mut bytes = vec![0; length];
        kernel.space.memory().read(table, &mut bytes)?;
        if sum(&bytes) == 0 {
            return Ok(None);
        }
    }
    let found = format!("is not there ({})", header.escape_ascii());
    Ok(Some(wrong("the ACPI root table", table, found)))
}

/// A table that the kernel has listed.
struct Listed {
    at: Gpa,
    name: u32,
    length: u32,
}

/// The tables in memory that the kernel has listed (`acpi_gbl_root_table_list`).
fn listed(kernel: &Kernel<'_>) -> Result<Vec<Listed>, VmiError> {
    /// `ACPI_TABLE_ORIGIN_MASK` and `ACPI_TABLE_ORIGIN_INTERNAL_PHYSICAL`.
    const ORIGIN: u32 = 3;
    const PHYSICAL: u32 = 1;
    let list = kernel.need_symbol("acpi_gbl_root_table_list")?;
    let list_at = |name| {
        let offset = kernel.need_member("acpi_table_list", name)?.offset;
        element("acpi_gbl_root_table_list", list, 0, 0, offset)
    };
    let tables = kernel.read_ptr("acpi_table_list.tables", list_at("tables")?)?;
    let count_at = list_at("current_table_count")?;
    let count = kernel.read_u32("acpi_table_list.current_table_count", count_at)?;
    if u64::from(count) > to_u64(MAX_TABLES) {
        return Err(VmiError::Corrupt {
            what: "acpi_table_list.current_table_count",
            at: count_at,
            value: u64::from(count),
        });
    }
    let size = kernel.need_type_size("acpi_table_desc")?;
    let offset = |name| {
        kernel
            .need_member("acpi_table_desc", name)
            .map(|member| member.offset)
    };
    let (address, signature) = (offset("address")?, offset("signature")?);
    let (length, flags) = (offset("length")?, offset("flags")?);
    let mut found = Vec::new();
    for index in 0..u64::from(count) {
        let field = |offset| element("acpi_table_desc", tables, index, size, offset);
        let origin = kernel.read_u32("acpi_table_desc.flags", field(flags)?)? & ORIGIN;
        let at = kernel.read_u64("acpi_table_desc.address", field(address)?)?;
        if origin != PHYSICAL || at == 0 {
            continue;
        }
        found.push(Listed {
            at: Gpa::new(at),
            name: kernel.read_u32("acpi_table_desc.signature", field(signature)?)?,
            length: kernel.read_u32("acpi_table_desc.length", field(length)?)?,
        });
    }
    Ok(found)
}

impl Listed {
    /// The table that a line of the log is of: `ACPI: FACP 0x000000000FFE2147 000074 (v01 …`.
    fn of_line(line: &Line) -> Option<Self> {
        let rest = line.text.strip_prefix("ACPI: ")?;
        let (name, rest) = rest.split_once(" 0x")?;
        let (at, rest) = rest.split_once(' ')?;
        let (length, _) = rest.split_once(' ').unwrap_or((rest, ""));
        Some(Self {
            at: Gpa::new(u64::from_str_radix(at, 16).ok()?),
            name: u32::from_le_bytes(name.as_bytes().try_into().ok()?),
            length: u32::from_str_radix(length, 16).ok()?,
        })
    }

    /// The trouble with the table, if anything is; one that is in no RAM is passed over.
    fn check(&self, kernel: &Kernel<'_>) -> Result<Option<Trace>, VmiError> {
        let header: [u8; 8] = match physical(kernel, self.at) {
            Err(VmiError::Memory(MemoryError::NotRam { .. } | MemoryError::Absent { .. })) => {
                return Ok(None);
            }
            other => other?,
        };
        if word(&header, 0) == Some(self.name) && word(&header, 4) == Some(self.length) {
            return Ok(None);
        }
        let name = self.name.to_le_bytes();
        let what = format!("the ACPI table {}", name.escape_ascii());
        let found = format!("is not there ({})", header.escape_ascii());
        Ok(Some(wrong(&what, self.at, found)))
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_TABLES, check_root_table, listed};
    use crate::VmiError;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use sonicshot::Gpa;

    #[test]
    fn no_more_tables_are_listed_than_there_are() {
        let mut facts = Facts::default();
        let list = DIRECT_MAP + 0x1000;
        facts.symbols.insert("acpi_gbl_root_table_list", list);
        facts.member("acpi_table_list", "tables", 0);
        facts.member("acpi_table_list", "current_table_count", 8);
        facts.sizes.insert("acpi_table_desc", 32);
        for (name, offset) in [
            ("address", 0),
            ("signature", 8),
            ("length", 12),
            ("flags", 16),
        ] {
            facts.member("acpi_table_desc", name, offset);
        }
        let most = MAX_TABLES as u64;
        for (count, is_refused) in [(0, false), (most, false), (most + 1, true)] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, DIRECT_MAP + 0x2000);
            ram.put(0x1008, count);
            let memory = ram.memory();
            let found = listed(&kernel(&memory, facts.clone()));
            let refused = matches!(found, Err(VmiError::Corrupt { .. }));
            assert_eq!(refused, is_refused, "{count}");
        }
    }

    #[test]
    fn a_root_table_is_no_longer_than_any() {
        for (len, is_one) in [
            (35, false),
            (36, true),
            (1 << 16, true),
            ((1 << 16) + 1, false),
        ] {
            let mut ram = Ram::new(8 << 20);
            let header = [&b"XSDT"[..], &u32::to_le_bytes(len)].concat();
            ram.0[0x1000..0x1008].copy_from_slice(&header);
            let sum = header
                .iter()
                .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            ram.0[0x1008] = sum.wrapping_neg();
            let memory = ram.memory();
            let kernel = kernel(&memory, Facts::default());
            let trace = check_root_table(&kernel, Gpa::new(0x1000)).unwrap();
            assert_eq!(trace.is_none(), is_one, "{len}");
        }
    }
}
