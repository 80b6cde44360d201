//! Page tables that lead from records of free blocks to records of free blocks.
//!
//! The pointers in a record are kernel addresses, and only page tables tell where they lead. With
//! the kernel's own they lead to other records, which point back; a record's address is then told
//! by its neighbour, and with it where the array of struct pages (vmemmap) begins. Tables of
//! a kernel that is gone, of another, or of a nested guest lead elsewhere, or to no zone.

use super::records::{Records, STRIDE};
use crate::KernelVa;
use crate::arch::x86_64::Walk;
use crate::paging::Paging;
use sonicshot::{Gpa, GuestMemory};

/// So many records are asked, evenly spread.
const ASKED: usize = 512;
/// So many of them must lead to others that lead back.
const ENOUGH: usize = 4;
/// `page.lru`.
const LRU: u64 = 8;
/// vmemmap begins at a multiple of this (`kaslr_regions`, `arch/x86/mm/kaslr.c`).
const ALIGNMENT: u64 = 1 << 30;
/// vmemmap is no longer than this: of 4 PiB of RAM.
const MAX_STEPS: u64 = 1 << 16;

/// Page tables under which the records stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Root {
    /// The top-level table.
    pub at: Gpa,
    /// How many levels there are.
    pub levels: u32,
    /// Where the array of struct pages begins.
    pub vmemmap: KernelVa,
    /// Where that is.
    pub there: Gpa,
}

/// Whether the tables at `at` lead from record to record, and where vmemmap then begins.
pub(crate) fn stands(
    memory: &dyn GuestMemory,
    at: Gpa,
    levels: u32,
    records: &Records,
) -> Option<Root> {
    let walk = Walk::new(at, levels);
    let place = |va: u64| {
        let there = walk.translate(memory, KernelVa::new(va)).ok().flatten()?;
        Some(there.at)
    };
    let step = records.list.len().div_ceil(ASKED).max(1);
    let (mut asked, mut mutual, mut torn) = (0_usize, 0_usize, 0_usize);
    let mut vmemmap: Option<u64> = None;
    for record in records.list.iter().step_by(step) {
        asked = asked.saturating_add(1);
        if asked > 64 && mutual == 0 {
            return None;
        }
        // The neighbour names this record: so its address is told.
        for (neighbour, is_next) in [(record.next, true), (record.prev, false)] {
            let page = neighbour.raw().wrapping_sub(LRU);
            let Some(other) = place(page).and_then(|there| records.at(there)) else {
                continue;
            };
            let back = if is_next { other.prev } else { other.next };
            let own = back.raw().wrapping_sub(LRU);
            match place(own) {
                Some(there) if there == record.at => {}
                // This one is a copy of the other.
                Some(there) if records.at(there).is_some() => continue,
                _ => {
                    torn = torn.saturating_add(1);
                    continue;
                }
            }
            mutual = mutual.saturating_add(1);
            let base = own & !(ALIGNMENT - 1);
            vmemmap = Some(vmemmap.map_or(base, |lowest| lowest.min(base)));
        }
    }
    let enough = mutual >= ENOUGH.min(records.list.len());
    let mut base = vmemmap.filter(|_| enough && torn.saturating_mul(4) <= mutual)?;
    // Of more than 64 GiB the records may all be further up.
    for _ in 0..MAX_STEPS {
        let below = base.wrapping_sub(STRIDE);
        if place(below).is_none() {
            break;
        }
        base = below & !(ALIGNMENT - 1);
    }
    Some(Root {
        at,
        levels,
        vmemmap: KernelVa::new(base),
        there: place(base)?,
    })
}
