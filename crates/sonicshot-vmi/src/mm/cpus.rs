//! The processors, by the kernel's masks, and where each has its area.

use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};

/// `NR_CPUS` is 8192 at most.
const MAX_CPUS: u64 = 8192;

/// Every possible processor's number, and the displacement of its per-CPU area
/// (`__per_cpu_offset`).
pub(crate) fn possible_cpus(kernel: &Kernel<'_>) -> Result<Vec<(u64, u64)>, VmiError> {
    let array = kernel.need_symbol("__per_cpu_offset")?;
    let mask = kernel.need_symbol("__cpu_possible_mask")?;
    let variable = kernel.need_symbol("nr_cpu_ids")?;
    let ids = u64::from(kernel.read_u32("nr_cpu_ids", variable)?);
    if ids == 0 || ids > MAX_CPUS {
        return Err(VmiError::Corrupt {
            what: "nr_cpu_ids",
            at: variable,
            value: ids,
        });
    }
    let mut found = Vec::new();
    for cpu in 0..ids {
        if in_mask(kernel, "__cpu_possible_mask", mask, cpu)? {
            let at = element("__per_cpu_offset", array, cpu, 8, 0)?;
            found.push((cpu, kernel.read_u64("__per_cpu_offset", at)?));
        }
    }
    Ok(found)
}

/// Whether `struct cpumask` at `mask` has processor `cpu`.
pub(crate) fn in_mask(
    kernel: &Kernel<'_>,
    what: &'static str,
    mask: KernelVa,
    cpu: u64,
) -> Result<bool, VmiError> {
    let word = kernel.read_u64(what, element(what, mask, cpu >> 6, 8, 0)?)?;
    Ok(word & (1 << (cpu & 63)) != 0)
}

#[cfg(test)]
mod tests {
    use super::{MAX_CPUS, possible_cpus};
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};

    #[test]
    fn processors_are_no_more_than_a_kernel_has() {
        for (ids, is_read) in [
            (0, false),
            (1, true),
            (MAX_CPUS, true),
            (MAX_CPUS + 1, false),
        ] {
            let mut ram = Ram::new(8 << 20);
            ram.put(0x1000, ids);
            let mut facts = Facts::default();
            for (name, at) in [
                ("nr_cpu_ids", 0x1000),
                ("__cpu_possible_mask", 0x2000),
                ("__per_cpu_offset", 0x1_0000),
            ] {
                facts.symbols.insert(name, DIRECT_MAP + at);
            }
            let memory = ram.memory();
            let found = possible_cpus(&kernel(&memory, facts));
            assert_eq!(found.is_ok(), is_read, "{ids}: {found:?}");
        }
    }
}
