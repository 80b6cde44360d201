//! The zones' counters, and what the processors have not folded into them yet.

use super::ZoneLayout;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{KernelVa, VirtualMemory};

/// The zone counters that processors have not folded in yet.
pub(super) struct Deltas<'a> {
    /// `None` without SMP, where there are none.
    pub diffs: Option<StatDiffs>,
    pub cpu_offsets: &'a [u64],
}

/// The offsets of a processor's unfolded zone counters.
#[derive(Debug)]
pub(super) struct StatDiffs {
    /// Offset in `struct zone` of the `__percpu` pointer.
    pointer: u64,
    vm_stat_diff: u64,
}

impl StatDiffs {
    /// `None` without SMP, where counters have no deltas.
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Option<Self>, VmiError> {
        // Since 5.14 (28f836b6777b) apart from the page lists.
        for (pointer, ty) in [
            ("per_cpu_zonestats", "per_cpu_zonestat"),
            ("pageset", "per_cpu_pageset"),
        ] {
            if let Some(pointer) = kernel.member("zone", pointer)?
                && let Some(diff) = kernel.member(ty, "vm_stat_diff")?
            {
                return Ok(Some(Self {
                    pointer: pointer.offset,
                    vm_stat_diff: diff.offset,
                }));
            }
        }
        Ok(None)
    }
}

/// `nr_free` of each order of the zone at `at`.
pub(super) fn read_nr_free(
    kernel: &Kernel<'_>,
    layout: &ZoneLayout,
    at: KernelVa,
) -> Result<Vec<u64>, VmiError> {
    let offset = layout
        .free_area
        .checked_add(layout.nr_free)
        .ok_or(VmiError::Corrupt {
            what: "zone.free_area",
            at,
            value: layout.free_area,
        })?;
    let nr_free = |order| {
        let at = element("zone.free_area", at, order, layout.free_area_size, offset)?;
        kernel.read_u64("free_area.nr_free", at)
    };
    (0..layout.orders).map(nr_free).collect()
}

/// Counter number `index` of the zone at `at`, with what the processors have not folded in yet.
pub(super) fn read_counter(
    kernel: &Kernel<'_>,
    layout: &ZoneLayout,
    at: KernelVa,
    index: u64,
    deltas: &Deltas<'_>,
) -> Result<i64, VmiError> {
    let stat = element("zone.vm_stat", at, index, 8, layout.vm_stat)?;
    let mut counter = kernel.read_u64("zone.vm_stat", stat)?.cast_signed();
    let Some(diffs) = &deltas.diffs else {
        return Ok(counter);
    };
    let pointer = element("zone", at, 0, 0, diffs.pointer)?;
    let base = kernel.read_ptr("zone's per-CPU counters", pointer)?;
    for offset in deltas.cpu_offsets {
        let delta = base
            .moved_by(*offset)
            .moved_by(diffs.vm_stat_diff)
            .moved_by(index);
        let mut byte = [0];
        kernel
            .space
            .read(delta, &mut byte)
            .map_err(VmiError::read("vm_stat_diff"))?;
        let sum = counter.checked_add(i64::from(i8::from_le_bytes(byte)));
        counter = sum.ok_or(VmiError::Corrupt {
            what: "zone.vm_stat",
            at: stat,
            value: counter.cast_unsigned(),
        })?;
    }
    Ok(counter)
}

/// The most by which `NR_FREE_PAGES` and the pages on the lists may differ in a stopped guest.
///
/// The counter changes once for an operation under the zone's lock, which moves at most one
/// block of the largest order (or one batch for a per-CPU list, which is smaller). Beside that, a
/// processor that folds its delta into the zone (`refresh_cpu_vm_stats`) has it in a register: at most
/// 127, the range of the delta's type. Where the deltas cannot be read, each processor's may be
/// as large again.
pub(crate) fn counter_bound(max_order: u64, cpus: u64, without_deltas: bool) -> Option<u64> {
    let deltas: u64 = if without_deltas { 254 } else { 127 };
    let largest = 1_u64.checked_shl(u32::try_from(max_order).ok()?)?;
    cpus.checked_mul(deltas)?.checked_add(largest)
}
