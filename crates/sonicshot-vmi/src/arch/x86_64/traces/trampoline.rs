//! The real-mode trampoline.

use crate::KernelVa;
use crate::arch::{Trace, Verdict, not_made};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};

/// `struct real_mode_header` and what it leads to (`arch/x86/realmode/init.c`).
pub(super) fn trampoline(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    const ONE_MIB: u64 = 1 << 20;
    let variable = kernel.need_symbol("real_mode_header")?;
    let init_top = kernel.need_symbol("init_top_pgt")?;
    let text = kernel.need_member("real_mode_header", "text_start")?.offset;
    let end = kernel.need_member("real_mode_header", "ro_end")?.offset;
    let pgd = kernel
        .need_member("real_mode_header", "trampoline_pgd")?
        .offset;
    let header = kernel.read_ptr("real_mode_header", variable)?;
    // A paravirtualised guest's processors are started by Xen.
    if header.raw() == 0 || kernel.space.memory().p2m().is_some() {
        return not_made("the kernel has none");
    }
    let field = |offset| element("real_mode_header", header, 0, 0, offset);
    let there = kernel
        .space
        .translate(header)
        .map_err(VmiError::read("real_mode_header"))?;
    let base = there.at.raw();
    if base >= ONE_MIB {
        return Err(VmiError::Corrupt {
            what: "real_mode_header",
            at: variable,
            value: header.raw(),
        });
    }
    let traces = check_header(
        kernel,
        header,
        base..ONE_MIB,
        [
            ("real_mode_header.text_start", text),
            ("real_mode_header.ro_end", end),
            ("real_mode_header.trampoline_pgd", pgd),
        ],
    )?;
    if !traces.is_empty() {
        return Ok(traces.into());
    }
    let table = u64::from(kernel.read_u32("real_mode_header.trampoline_pgd", field(pgd)?)?);
    // Beside the header, so mapped as that is.
    let table = table
        .checked_sub(base)
        .and_then(|offset| header.checked_add(offset))
        .ok_or(VmiError::Corrupt {
            what: "real_mode_header.trampoline_pgd",
            at: header,
            value: table,
        })?;
    Ok(check_table(kernel, table, init_top)?.into())
}

/// Whether each field of the header, an offset each, leads into `memory`.
fn check_header(
    kernel: &Kernel<'_>,
    header: KernelVa,
    memory: core::ops::Range<u64>,
    fields: [(&'static str, u64); 3],
) -> Result<Vec<Trace>, VmiError> {
    let mut traces = Vec::new();
    for (what, offset) in fields {
        let at = element("real_mode_header", header, 0, 0, offset)?;
        let value = u64::from(kernel.read_u32(what, at)?);
        if !memory.contains(&value) {
            traces.push(Trace::Record {
                what,
                at,
                value,
                expected: memory.start,
            });
        }
    }
    Ok(traces)
}

/// Whether the trampoline's page table has the entries that the kernel has put there.
fn check_table(
    kernel: &Kernel<'_>,
    table: KernelVa,
    init_top: KernelVa,
) -> Result<Vec<Trace>, VmiError> {
    /// Set by processors as they walk the table.
    const ACCESSED: u64 = 1 << 5;
    let mut traces = Vec::new();
    let mut compare = |what, index, expected: u64| {
        let at = element("trampoline_pgd", table, index, 8, 0)?;
        let value = kernel.read_u64("trampoline_pgd", at)?;
        if (value ^ expected) & !ACCESSED != 0 {
            traces.push(Trace::Record {
                what,
                at,
                value,
                expected,
            });
        }
        Ok::<_, VmiError>(())
    };
    let last = element("init_top_pgt", init_top, 511, 8, 0)?;
    let last = kernel.read_u64("init_top_pgt", last)?;
    compare("the trampoline's page table, entry 511", 511, last)?;
    if let Some(at) = kernel.symbol("trampoline_pgd_entry")? {
        let entry = kernel.read_u64("trampoline_pgd_entry", at)?;
        compare("the trampoline's page table, entry 0", 0, entry)?;
    }
    Ok(traces)
}
