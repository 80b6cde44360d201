//! Page tables that lead from records of free blocks to records of free blocks.
//!
//! The pointers in a record are kernel addresses, and only page tables tell where they lead. With
//! the kernel's own they lead to other records, which point back; a record's address is then told
//! by its neighbour, and with it in which range of the kernel's mappings the array of struct pages
//! (vmemmap) lies. It begins where the range does (`kaslr_regions`, `arch/x86/mm/kaslr.c`: at a
//! multiple of 1 GiB). Tables of a kernel that is gone, of another, or of a nested guest lead
//! elsewhere, or to no zone. Whoever can write to the guest's memory can make records without end,
//! which lead to each other in the direct map: of tables that a processor runs on every range may
//! be the array, those first for which most records speak, and zones decide.

use super::records::{LRU, Records};
use crate::KernelVa;
use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::paging::Paging;
use sonicshot::{Gpa, GuestMemory, to_u64};
use std::collections::BTreeMap;

/// So many records are asked, evenly spread.
const ASKED: usize = 512;
/// All are gone through in so many passes, of which the first must not fail where tables are only
/// such that look so.
const PHASES: usize = 8;
const FIRST: usize = ASKED / PHASES;
/// So many records must lead to others that lead back.
const ENOUGH: u64 = 4;
/// More ranges than this in the kernel half of the address space, each from a multiple of [`STEP`] on, are no
/// kernel's: one of Linux 7.2 was seen with more than 1,024.
const MAX_RANGES: usize = 1 << 13;
/// One that is a kernel's array of struct pages does not go on for so many steps.
const MAX_STEPS: u64 = 1 << 10;
/// A range begins at a multiple of this.
const STEP: u64 = 1 << 30;

/// Page tables under which the records stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Root {
    /// The top-level table.
    pub at: Gpa,
    /// The number of levels.
    pub levels: u32,
    /// The beginning of the array of struct pages.
    pub vmemmap: KernelVa,
    /// The guest-physical address of that.
    pub there: Gpa,
    /// Whether records lead to each other there.
    pub has_records: bool,
}

/// The addresses at which vmemmap may begin by the tables at `at`, the likeliest first: of tables
/// that a processor runs on (`told`) anywhere, of others only where records lead to each other.
///
/// # Errors
/// [`VmiError::TooMany`] if the tables map more ranges than a kernel's, [`VmiError::OutOfTime`].
pub(crate) fn stand(
    memory: &dyn GuestMemory,
    walk: &dyn Paging,
    (at, told): (Gpa, bool),
    records: &Records,
    deadline: &Deadline,
) -> Result<Vec<Root>, VmiError> {
    let place = |va: u64| {
        let there = walk.translate(memory, KernelVa::new(va)).ok().flatten()?;
        Some(there.at)
    };
    let nodes = nodes(memory, &place, told, records);
    if !told {
        let begins = begins_below(&nodes, &|at| place(at).is_some(), deadline)?;
        return Ok(roots(walk, at, &place, begins, ENOUGH.min(records.found)));
    }
    let ranges = walk.mapped_ranges(memory, MAX_RANGES, deadline)?;
    if ranges.len() > MAX_RANGES {
        return Err(VmiError::TooMany {
            what: "ranges of mappings in the kernel half of a page table",
            found: to_u64(ranges.len()),
            most: to_u64(MAX_RANGES),
        });
    }
    let mut begins: Vec<(u64, KernelVa)> = ranges.into_iter().map(|begin| (0, begin)).collect();
    for node in nodes {
        let above = begins.partition_point(|(_, begin)| *begin <= node);
        let begin = above.checked_sub(1).and_then(|at| begins.get_mut(at));
        if let Some((votes, _)) = begin {
            VmiError::count("records of free pages", votes, 1)?;
        }
    }
    Ok(roots(walk, at, &place, begins, 0))
}

/// Those of `begins` for which enough records speak, most first.
fn roots(
    walk: &dyn Paging,
    at: Gpa,
    place: &dyn Fn(u64) -> Option<Gpa>,
    mut begins: Vec<(u64, KernelVa)>,
    enough: u64,
) -> Vec<Root> {
    begins.retain(|(votes, _)| *votes >= enough);
    begins.sort_by_key(|(votes, begin)| (core::cmp::Reverse(*votes), *begin));
    let root = |(votes, vmemmap): (u64, KernelVa)| {
        Some(Root {
            at,
            levels: walk.levels(),
            vmemmap,
            there: place(vmemmap.raw())?,
            has_records: votes > 0,
        })
    };
    begins.into_iter().filter_map(root).collect()
}

/// The beginning of the range of mappings that each of `nodes` is in, with the number of those in it.
/// Of tables that no processor is known to run on there may be more ranges than can be gone through;
/// those that no record is in say nothing.
fn begins_below(
    nodes: &[KernelVa],
    is_mapped: &dyn Fn(u64) -> bool,
    deadline: &Deadline,
) -> Result<Vec<(u64, KernelVa)>, VmiError> {
    let mut votes: BTreeMap<u64, u64> = BTreeMap::new();
    for node in nodes {
        let vote = votes.entry(node.raw() & !(STEP - 1)).or_default();
        VmiError::count("records of free pages", vote, 1)?;
    }
    let mut begins: BTreeMap<u64, u64> = BTreeMap::new();
    for (number, (from, count)) in (0_u64..).zip(&votes) {
        deadline.check("ranges of mappings", number, to_u64(votes.len()))?;
        let steps = (0..MAX_STEPS).map_while(|step| {
            let at = from.checked_sub(step.checked_mul(STEP)?)?;
            is_upper(at).then_some(at)
        });
        let begin = steps
            .into_iter()
            .find(|at| is_mapped(*at) && !at.checked_sub(1).is_some_and(is_mapped));
        if let Some(begin) = begin {
            let sum = begins.entry(begin).or_default();
            VmiError::count("records of free pages", sum, *count)?;
        }
    }
    let begins = begins.into_iter();
    Ok(begins
        .map(|(at, votes)| (votes, KernelVa::new(at)))
        .collect())
}

/// Whether `at` is in the upper half of the address space.
const fn is_upper(at: u64) -> bool {
    at >> 63 == 1
}

/// The addresses of records whose neighbours name them, of some.
fn nodes(
    memory: &dyn GuestMemory,
    place: &dyn Fn(u64) -> Option<Gpa>,
    told: bool,
    records: &Records,
) -> Vec<KernelVa> {
    let mut found = Vec::new();
    let step = records.kept.len().div_ceil(ASKED).max(1);
    // The first are from everywhere, too.
    let phases = (0..PHASES).filter_map(|phase| records.kept.get(phase.checked_mul(step)?..));
    let Some(stride) = step.checked_mul(PHASES) else {
        return found;
    };
    let spread = phases.flat_map(|rest| rest.iter().step_by(stride));
    for (asked, record) in spread.enumerate() {
        if asked >= FIRST && found.is_empty() && !told {
            break;
        }
        for (neighbour, is_next) in [(record.next, true), (record.prev, false)] {
            let page = neighbour.raw().checked_sub(LRU);
            let there = page.and_then(place);
            let Some(other) = there.and_then(|there| records.at(memory, there)) else {
                continue;
            };
            let back = if is_next { other.prev } else { other.next };
            let own = back.checked_sub(LRU);
            // If it names another, this one is a copy of that.
            found.extend(own.filter(|own| place(own.raw()) == Some(record.at)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{MAX_RANGES, MAX_STEPS, STEP, begins_below, stand};
    use crate::KernelVa;
    use crate::VmiError;
    use crate::arch::Arch;
    use crate::arch::x86_64::X86_64;
    use crate::deadline::Deadline;
    use crate::kernel::testing::Ram;
    use crate::shape::records::Records;
    use sonicshot::Gpa;

    #[test]
    fn what_records_are_in_begins_no_farther_below_than_a_bound() {
        const FIRST: u64 = 0xffff_ea00_0000_0000;
        let most = MAX_STEPS;
        // From `FIRST` on all is mapped.
        let is_mapped = |at: u64| at >= FIRST;
        for (gib, is_found) in [(0, true), (1, true), (most - 1, true), (most, false)] {
            let nodes = [8, 72, 1 << 20].map(|at| KernelVa::new(FIRST + gib * STEP + at));
            let found = begins_below(&nodes, &is_mapped, &Deadline::new()).unwrap();
            let want = is_found.then_some((3, KernelVa::new(FIRST)));
            assert_eq!(found, Vec::from_iter(want), "{gib}");
        }
        // Two ranges.
        let is_mapped = |at: u64| at >= FIRST && !(FIRST + STEP..FIRST + 2 * STEP).contains(&at);
        let nodes = [0, 64, 2 * STEP, 3 * STEP].map(|at| KernelVa::new(FIRST + at));
        let found = begins_below(&nodes, &is_mapped, &Deadline::new()).unwrap();
        let want = [(2, FIRST), (2, FIRST + 2 * STEP)];
        assert_eq!(found, want.map(|(votes, at)| (votes, KernelVa::new(at))));
    }

    #[test]
    fn more_ranges_of_mappings_than_a_bound_are_no_kernels() {
        const ROOT: u64 = 0x10_0000;
        let mut ram = Ram::new(8 << 20);
        // Every second GiB of a table is mapped.
        for entry in (0..512).step_by(2) {
            ram.put(ROOT + 0x1000 + entry * 8, 0xe3);
        }
        for (number, is_refused) in [(MAX_RANGES / 256, false), (MAX_RANGES / 256 + 1, true)] {
            for entry in 0..number as u64 {
                ram.put(ROOT + (256 + entry) * 8, (ROOT + 0x1000) | 0x63);
            }
            let memory = ram.memory();
            let walk = X86_64.walk(Gpa::new(ROOT), 4);
            let records = Records::none();
            let root = (Gpa::new(ROOT), true);
            let found = stand(&memory, walk.as_ref(), root, &records, &Deadline::new());
            let refused = matches!(found, Err(VmiError::TooMany { .. }));
            assert_eq!(
                refused,
                is_refused,
                "{number}: {:?}",
                found.map(|found| found.len())
            );
        }
    }
}
