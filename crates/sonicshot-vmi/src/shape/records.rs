//! Struct pages of free blocks, told by their shape alone, in all of RAM.
//!
//! `struct page` of 64 bits, 64 bytes (`include/linux/mm_types.h`, since 4.18): flags 0, lru 8,
//! private 40, `page_type` 48, `_refcount` 52. The head of a free block has no flag, no reference, the
//! buddy's type, its order in `private`, and in `lru` two kernel pointers. Whatever looks so is a
//! record; of whose struct pages it is one, or of whose copy, is not told here.

use crate::KernelVa;
use crate::arch::Arch;
use crate::error::VmiError;
use crate::symbols::there;
use sonicshot::{
    Gpa, GpaRange, GuestBytes, GuestMemory, PageSize, PhaseProgress, Progress, Tally, WorkPhase,
    to_u64, to_usize,
};

/// The size of `struct page`.
pub(crate) const STRIDE: u64 = 64;
/// The same, as a length.
const LEN: usize = 64;
/// `page.lru`.
pub(crate) const LRU: u64 = 8;
/// The words that say the buddy's type: to 6.10, in 6.11, since 6.12.
pub(crate) const BUDDY: [u32; 3] = [0xffff_ff7f, 0xbfff_ffff, 0xf000_0000];
/// The flags that every kernel has, less the two of which one is `PG_uptodate` (and
/// `PG_reported`, which a free block may have).
const FLAGS: u64 = 0x1f_ffff & !0xc;
const MAX_ORDER: u64 = 13;
/// The number of bytes that are mapped at a time.
const WINDOW: u64 = 2 << 20;
/// More pages that might be top-level page tables than this, and nothing is tried.
const MAX_TOPS: usize = 1 << 16;
/// So many records are kept: every so manyth of those that there are.
const MAX_KEPT: usize = 1 << 15;

/// A record that looks like the struct page of a free block's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Its address.
    pub at: Gpa,
    /// The list node of the next block, or the list's head.
    pub next: KernelVa,
    /// The one before.
    pub prev: KernelVa,
}

/// Records of one encoding of page types.
#[derive(Debug)]
pub(crate) struct Records {
    /// The word that says the buddy's type.
    pub buddy: u32,
    /// The number of those found.
    pub found: u64,
    /// Some of them, from everywhere: in all, of which a guest decides, there may be as many as its
    /// memory has room for.
    pub kept: Vec<Record>,
    /// One of so many is kept.
    every: u64,
}

/// The findings of one pass over RAM.
#[derive(Debug)]
pub(crate) struct Pass {
    /// By encoding, most records first; those of which there are none are left out.
    pub records: Vec<Records>,
    /// Pages that may be top-level page tables, if they were looked for.
    pub tops: Vec<Gpa>,
}

impl Records {
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self::new(BUDDY[0])
    }

    fn new(buddy: u32) -> Self {
        Self {
            buddy,
            found: 0,
            kept: Vec::new(),
            every: 1,
        }
    }

    fn push(&mut self, record: Record) {
        if self.found.is_multiple_of(self.every) {
            if self.kept.len() >= MAX_KEPT {
                let mut keep = false;
                self.kept.retain(|_| {
                    keep = !keep;
                    keep
                });
                self.every = self.every.checked_mul(2).unwrap_or(self.every);
            }
            // The capacity is even, so this one is of those that stay.
            self.kept.push(record);
        }
        self.found = self.found.saturating_add(1);
    }

    /// The record at `at`, if one is there.
    pub(crate) fn at(&self, memory: &dyn GuestMemory, at: Gpa) -> Option<Record> {
        if !at.raw().is_multiple_of(STRIDE) {
            return None;
        }
        let mut bytes = [0; LEN];
        memory.read(at, &mut bytes).ok()?;
        let bytes = GuestBytes::from_slice(&bytes);
        let is_own = bytes.u64_at(48) == Some(u64::from(self.buddy));
        record(&bytes, 0, at).filter(|_| is_own)
    }
}

/// Looks at all RAM once; for top-level page tables of `arch` too if `tables`.
///
/// # Errors
/// [`VmiError::Memory`] if it cannot be read, [`VmiError::TooMany`] if there are more page tables
/// than can be tried.
pub(crate) fn find(
    memory: &dyn GuestMemory,
    arch: &dyn Arch,
    page_size: PageSize,
    tables: bool,
    progress: &dyn Progress,
) -> Result<Pass, VmiError> {
    let mut found = BUDDY.map(Records::new);
    let mut tops = Vec::new();
    let mut buffer = Vec::new();
    let total = memory.layout().bytes();
    let mut phase = PhaseProgress::begin(progress, WorkPhase::FindingKernel, total);
    let mut before = Tally::ZERO;
    for region in memory.layout().regions() {
        let mut at = region.start();
        for data in there(memory, region) {
            at = at.max(data.start());
            while at < data.end() {
                // Whole pages, so that each record is whole.
                let start = Gpa::new(at.raw() & !page_size.offset_mask()).max(region.start());
                let end = Gpa::new(start.raw() | (WINDOW - 1)).checked_add(1);
                let end = end.map_or(region.end(), |end| end.min(region.end()));
                let window = GpaRange::new(start, end);
                let len = to_usize(window.len());
                let mapped = memory.map(start, len)?;
                let bytes = if let Some(mapped) = &mapped {
                    Some(mapped.bytes())
                } else {
                    buffer.resize(len, 0);
                    // A dump may lack pages: nothing is found there.
                    let read = memory.read(start, &mut buffer);
                    read.is_ok().then(|| GuestBytes::from_slice(&buffer))
                };
                if let Some(bytes) = bytes {
                    look(&bytes, start, &mut found);
                    if tables {
                        look_for_tables(&bytes, start, memory, (arch, page_size), &mut tops)?;
                    }
                }
                drop(mapped);
                memory.release(window);
                at = end;
                let here = at.offset_from(region.start());
                phase.reach(here.map_or(before, |here| before.and(here)).get());
            }
        }
        before.add(region.len());
    }
    phase.end();
    let mut records: Vec<Records> = found.into_iter().filter(|r| r.found > 0).collect();
    records.sort_by_key(|records| core::cmp::Reverse(records.found));
    Ok(Pass { records, tops })
}

/// The records in `bytes`, which begin at `start`.
fn look(bytes: &GuestBytes<'_>, start: Gpa, found: &mut [Records; 3]) {
    for offset in (0..bytes.len()).step_by(LEN) {
        // The type below, no reference above.
        let word = offset.checked_add(48).and_then(|at| bytes.u64_at(at));
        let Some(word) = word else {
            break;
        };
        let Some(number) = BUDDY.iter().position(|buddy| word == u64::from(*buddy)) else {
            continue;
        };
        if let Some(at) = start.checked_add(to_u64(offset))
            && let Some(record) = record(bytes, offset, at)
            && let Some(records) = found.get_mut(number)
        {
            records.push(record);
        }
    }
}

/// The record at `offset` of `bytes`, whose type was looked at; it lies at `at`.
fn record(bytes: &GuestBytes<'_>, offset: usize, at: Gpa) -> Option<Record> {
    let field = |at: usize| bytes.u64_at(offset.checked_add(at)?);
    let (flags, next, prev, order) = (field(0)?, field(8)?, field(16)?, field(40)?);
    let looks_so = flags & FLAGS == 0 && order <= MAX_ORDER && is_pointer(next) && is_pointer(prev);
    looks_so.then(|| Record {
        at,
        next: KernelVa::new(next),
        prev: KernelVa::new(prev),
    })
}

/// A pointer of the kernel's half to something aligned.
fn is_pointer(word: u64) -> bool {
    word >> 56 == 0xff && word & 7 == 0
}

/// The pages in `bytes`, which begin at `start`, that may be top-level page tables.
fn look_for_tables(
    bytes: &GuestBytes<'_>,
    start: Gpa,
    memory: &dyn GuestMemory,
    (arch, page_size): (&dyn Arch, PageSize),
    tops: &mut Vec<Gpa>,
) -> Result<(), VmiError> {
    let len = usize::try_from(page_size.bytes()).map_err(|_| VmiError::Unsupported {
        what: format!("pages of {} bytes", page_size.bytes()),
    })?;
    for offset in (0..bytes.len()).step_by(len) {
        if bytes
            .get(offset, len)
            .is_some_and(|page| arch.may_be_top_table(&page, memory))
            && let Some(at) = start.checked_add(to_u64(offset))
        {
            tops.push(at);
        }
    }
    if tops.len() > MAX_TOPS {
        return Err(VmiError::TooMany {
            what: "pages that look like top-level page tables",
            found: to_u64(tops.len()),
            most: to_u64(MAX_TOPS),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{MAX_KEPT, MAX_ORDER, MAX_TOPS, Record, Records, look_for_tables, record};
    use crate::KernelVa;
    use crate::arch::Arch;
    use crate::arch::x86_64::X86_64;
    use crate::kernel::testing::Ram;
    use sonicshot::{Gpa, GuestBytes, PageSize};

    #[test]
    fn records_without_end_take_no_more_memory_and_are_from_everywhere() {
        for found in [1, MAX_KEPT, MAX_KEPT + 1, 9 * MAX_KEPT + 5] {
            let mut records = Records::new(0);
            for number in 0..found as u64 {
                records.push(Record {
                    at: Gpa::new(number * 64),
                    next: KernelVa::new(0),
                    prev: KernelVa::new(0),
                });
            }
            assert_eq!(records.found, found as u64);
            assert!(records.kept.len() <= MAX_KEPT);
            assert!(records.kept.capacity() <= 2 * MAX_KEPT);
            assert!(records.kept.len() * 2 >= found.min(MAX_KEPT), "{found}");
            for (number, record) in (0_u64..).zip(&records.kept) {
                assert_eq!(record.at, Gpa::new(number * records.every * 64), "{found}");
            }
        }
    }

    #[test]
    fn a_record_is_of_no_larger_block_than_there_is() {
        for (order, is_one) in [(0, true), (MAX_ORDER, true), (MAX_ORDER + 1, false)] {
            let mut page = [0; 64];
            for (at, word) in [(8, u64::MAX << 3), (16, u64::MAX << 3), (40, order)] {
                page[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            let found = record(&GuestBytes::from_slice(&page), 0, Gpa::ZERO);
            assert_eq!(found.is_some(), is_one, "{order}");
        }
    }

    #[test]
    fn of_more_top_level_tables_than_a_bound_none_is_tried() {
        const TABLE: u64 = 0x10_0000;
        let mut ram = Ram::new(8 << 20);
        ram.put(TABLE + 511 * 8, (TABLE + 0x1000) | 0x63);
        let memory = ram.memory();
        let start = Gpa::new(TABLE);
        let bytes = GuestBytes::from_slice(&ram.0[0x10_0000..0x10_1000]);
        let arch = (&X86_64 as &dyn Arch, PageSize::SIZE_4K);
        for (before, is_refused) in [(0, false), (MAX_TOPS - 1, false), (MAX_TOPS, true)] {
            let mut tops = vec![Gpa::ZERO; before];
            let found = look_for_tables(&bytes, start, &memory, arch, &mut tops);
            assert_eq!(tops.len(), before + 1);
            assert_eq!(found.is_err(), is_refused, "{before}");
        }
    }
}
