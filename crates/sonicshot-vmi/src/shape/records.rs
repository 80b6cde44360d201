//! Struct pages of free blocks, told by their shape alone, in all of RAM.
//!
//! `struct page` of x86-64, 64 bytes (`include/linux/mm_types.h`, since 4.18): flags 0, lru 8,
//! private 40, `page_type` 48, `_refcount` 52. The head of a free block has no flag, no reference, the
//! buddy's type, its order in `private`, and in `lru` two kernel pointers. Whatever looks so is a
//! record; of whose struct pages it is one, or of whose copy, is not told here.

use crate::KernelVa;
use crate::error::VmiError;
use sonicshot::{Gpa, GpaRange, GuestBytes, GuestMemory};

/// The size of `struct page`.
pub(crate) const STRIDE: u64 = 64;
/// The words that say the buddy's type: to 6.10, in 6.11, since 6.12.
pub(crate) const BUDDY: [u32; 3] = [0xffff_ff7f, 0xbfff_ffff, 0xf000_0000];
/// The flags that every kernel has, less the two of which one is `PG_uptodate` (and
/// `PG_reported`, which a free block may have).
const FLAGS: u64 = 0x1f_ffff & !0xc;
const MAX_ORDER: u64 = 13;
/// How much is mapped at a time.
const WINDOW: u64 = 2 << 20;
/// More page tables than this that might be the top one, and nothing is tried.
const MAX_TOPS: usize = 1 << 16;

/// What looks like the struct page of a free block's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    /// Where it is.
    pub at: Gpa,
    /// The list node of the next block, or the list's head.
    pub next: KernelVa,
    /// The one before.
    pub prev: KernelVa,
}

/// All records of one encoding of page types.
#[derive(Debug, Default)]
pub(crate) struct Records {
    /// The word that says the buddy's type.
    pub buddy: u32,
    /// By address.
    pub list: Vec<Record>,
}

/// What one pass over RAM found.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// By encoding, most records first; those of which there are none are left out.
    pub records: Vec<Records>,
    /// Pages that may be top-level page tables, if they were looked for.
    pub tops: Vec<Gpa>,
}

impl Records {
    /// The record at `at`.
    pub(crate) fn at(&self, at: Gpa) -> Option<&Record> {
        let index = self.list.binary_search_by_key(&at, |record| record.at);
        self.list.get(index.ok()?)
    }
}

/// Looks at all RAM once; for top-level page tables too if `tables`.
///
/// # Errors
/// [`VmiError::Memory`] if it cannot be read, [`VmiError::Unsupported`] if there are more records
/// than frames: none of them can be believed.
pub(crate) fn find(memory: &dyn GuestMemory, tables: bool) -> Result<Pass, VmiError> {
    let mut found = BUDDY.map(|buddy| Records {
        buddy,
        list: Vec::new(),
    });
    let mut tops = Vec::new();
    let most = usize::try_from(memory.layout().bytes() >> 12).unwrap_or(usize::MAX);
    let mut buffer = Vec::new();
    for region in memory.layout().regions() {
        let mut at = region.start();
        while let Some(data) = memory.next_data(at).filter(|d| d.start() < region.end()) {
            // Whole pages, so that each record is whole.
            let start = Gpa::new(data.start().raw() & !0xfff).max(region.start());
            let end = Gpa::new((start.raw() | (WINDOW - 1)).saturating_add(1)).min(region.end());
            let window = GpaRange::new(start, end);
            let len = usize::try_from(window.len()).unwrap_or(0);
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
                    look_for_tables(&bytes, start, memory, &mut tops);
                }
            }
            drop(mapped);
            memory.release(window);
            if found.iter().any(|records| records.list.len() > most) {
                return Err(VmiError::Unsupported {
                    what: "more that looks like free blocks than there are frames".into(),
                });
            }
            at = end;
        }
    }
    if tops.len() >= MAX_TOPS {
        return Err(VmiError::Unsupported {
            what: format!("more than {MAX_TOPS} pages that look like top-level page tables"),
        });
    }
    let mut records: Vec<Records> = found.into_iter().filter(|r| !r.list.is_empty()).collect();
    records.sort_by_key(|records| core::cmp::Reverse(records.list.len()));
    Ok(Pass { records, tops })
}

/// The records in `bytes`, which begin at `start`.
fn look(bytes: &GuestBytes<'_>, start: Gpa, found: &mut [Records; 3]) {
    const STEP: usize = 64;
    for offset in (0..bytes.len()).step_by(STEP) {
        // The type below, no reference above.
        let Some(word) = bytes.u64_at(offset.saturating_add(48)) else {
            break;
        };
        let Some(number) = BUDDY.iter().position(|buddy| word == u64::from(*buddy)) else {
            continue;
        };
        let field = |at: usize| bytes.u64_at(offset.saturating_add(at));
        let (Some(flags), Some(next), Some(prev), Some(order)) =
            (field(0), field(8), field(16), field(40))
        else {
            continue;
        };
        let at = start.checked_add(offset as u64);
        if flags & FLAGS == 0
            && order <= MAX_ORDER
            && is_pointer(next)
            && is_pointer(prev)
            && let Some(at) = at
            && let Some(records) = found.get_mut(number)
        {
            records.list.push(Record {
                at,
                next: KernelVa::new(next),
                prev: KernelVa::new(prev),
            });
        }
    }
}

/// A pointer of the kernel's half to something aligned.
fn is_pointer(word: u64) -> bool {
    word >> 56 == 0xff && word & 7 == 0
}

/// The pages in `bytes` that may be top-level page tables: the last entry, which maps the kernel's
/// image, leads to a table in RAM, and so do all others of the upper half that lead anywhere.
fn look_for_tables(
    bytes: &GuestBytes<'_>,
    start: Gpa,
    memory: &dyn GuestMemory,
    tops: &mut Vec<Gpa>,
) {
    const PAGE: usize = 4096;
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let leads = |entry: u64| {
        entry & LARGE == 0
            && memory
                .layout()
                .contains(Gpa::new(entry & ADDRESS), PAGE as u64)
    };
    for offset in (0..bytes.len()).step_by(PAGE) {
        let entry = |index: usize| bytes.u64_at(offset.saturating_add(index.saturating_mul(8)));
        let last = entry(511).is_some_and(|entry| entry & PRESENT != 0 && leads(entry));
        if !last {
            continue;
        }
        let plausible = (256..511)
            .filter_map(entry)
            .all(|entry| entry & PRESENT == 0 && entry & 0xfff == 0 || leads(entry));
        if plausible
            && tops.len() < MAX_TOPS
            && let Some(at) = start.checked_add(offset as u64)
        {
            tops.push(at);
        }
    }
}
