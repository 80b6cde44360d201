//! The table of frames that a paravirtualised guest keeps: the linear list which its shared
//! information names (`p2m_cr3`, `p2m_vaddr` in `xen/include/public/arch-x86/xen.h`; Linux has it
//! since 4.3).

use crate::ffi::{DomainInfo, Foreign, Xen};
use crate::{DomainId, LiveError};
use sonicshot::{GuestBytes, Mfn, P2m, Pfn, PfnRange};

/// Where the architecture's part lies in the shared information of a guest of 64 bits.
const ARCH: usize = 3088;
const ENTRY: usize = 8;
const PAGE: usize = 4096;
const ENTRIES: u64 = 512;
/// Of an entry of a page table: where the next table or the page is.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE_SHIFT: u32 = 12;
const PRESENT: u64 = 1;
/// Linux marks entries that are no frame of the guest by the two highest bits.
const NOT_OWN: u64 = 3 << 62;
/// A guest may have its frames spread, but not over more than this many times as many numbers,
/// beside the hole below 4 GiB.
const SPREAD: u64 = 4;
const HOLE: u64 = 1 << 20;

/// What the shared information says.
struct Shared {
    count: u64,
    root: Mfn,
    start: u64,
    generation: u64,
}

impl Shared {
    fn read(xen: &Xen, domain: DomainId, info: &DomainInfo) -> Result<Self, LiveError> {
        let page = xen.map(domain, &[info.shared_info.raw()])?;
        let malformed = |what, value| LiveError::Malformed {
            domain,
            what,
            value,
        };
        let unreadable = || malformed("its shared information", info.shared_info.raw());
        let bytes = page.frames(0, 1).ok_or_else(unreadable)?;
        let word = |index: usize| {
            let at = index.checked_mul(ENTRY)?.checked_add(ARCH)?;
            bytes.u64_at(at)
        };
        let (Some(count), Some(cr3), Some(start), Some(generation)) =
            (word(0), word(3), word(4), word(5))
        else {
            return Err(unreadable());
        };
        if cr3 == 0 {
            return Err(malformed("it has no linear list of its frames", cr3));
        }
        if generation & 1 != 0 {
            return Err(malformed("its list of frames is being changed", generation));
        }
        let most = info.pages.saturating_mul(SPREAD).saturating_add(HOLE);
        if count == 0 || count > most {
            return Err(malformed("the length of its list of frames", count));
        }
        if !start.is_multiple_of(1 << PAGE_SHIFT) {
            return Err(malformed("the address of its list of frames", start));
        }
        Ok(Self {
            count,
            root: Mfn::new(cr3 >> PAGE_SHIFT),
            start,
            generation,
        })
    }
}

/// Reads the table of a domain that is suspended.
pub(crate) fn read(xen: &Xen, domain: DomainId, info: &DomainInfo) -> Result<P2m, LiveError> {
    let shared = Shared::read(xen, domain, info)?;
    let mut walk = Walk {
        xen,
        domain,
        shared: &shared,
        tables: [const { None }; 3],
    };
    let mut runs = Vec::new();
    let mut found = 0_u64;
    let mut first = 0;
    while first < shared.count {
        let leaves = walk.leaves(first)?;
        let Some(mapped) = leaves.len().checked_sub(1) else {
            return Err(walk.malformed("nothing of its list of frames", first));
        };
        let pages = xen.map(domain, &leaves)?;
        for index in 0..=mapped {
            let page = pages.frames(index, 1);
            let page = page.ok_or_else(|| walk.malformed("a page of its list of frames", first))?;
            let left = shared.count.saturating_sub(first).min(ENTRIES);
            found = found.saturating_add(own_frames(page, first, left, &mut runs));
            first = first.saturating_add(ENTRIES);
        }
        if found > info.pages {
            return Err(walk.malformed("more frames than it has pages", found));
        }
    }
    let after = Shared::read(xen, domain, info)?;
    if after.generation != shared.generation {
        return Err(walk.malformed("its list of frames was changed", after.generation));
    }
    P2m::from_runs(runs).map_err(|source| LiveError::P2m { domain, source })
}

/// Adds the frames of one page of the list, of which `count` entries count, as runs. Returns how
/// many there are.
fn own_frames(
    page: GuestBytes<'_>,
    first: u64,
    count: u64,
    runs: &mut Vec<(PfnRange, Mfn)>,
) -> u64 {
    let mut bytes = [0; PAGE];
    if !page.copy_to(&mut bytes) {
        return 0;
    }
    let mut found = 0_u64;
    // The run that goes on: where it begins in both, and the machine's frame that would follow.
    let mut run: Option<(u64, u64, u64)> = None;
    let mut end = |run: Option<(u64, u64, u64)>| {
        if let Some((pfn, mfn, next)) = run
            && let Some(frames) = PfnRange::with_len(Pfn::new(pfn), next.saturating_sub(mfn))
        {
            found = found.saturating_add(frames.len());
            runs.push((frames, Mfn::new(mfn)));
        }
    };
    let (entries, _) = bytes.as_chunks::<ENTRY>();
    for (pfn, entry) in (first..first.saturating_add(count)).zip(entries) {
        let mfn = u64::from_le_bytes(*entry);
        match &mut run {
            Some((_, _, next)) if *next == mfn => *next = next.saturating_add(1),
            _ => {
                end(run.take());
                run = (mfn & NOT_OWN == 0).then_some((pfn, mfn, mfn.saturating_add(1)));
            }
        }
    }
    end(run);
    found
}

/// Finds where the pages of the list are.
struct Walk<'x> {
    xen: &'x Xen,
    domain: DomainId,
    shared: &'x Shared,
    /// The table of each level that was used last: the highest first, and which one it is.
    tables: [Option<(u64, Foreign<'x>)>; 3],
}

impl<'x> Walk<'x> {
    fn malformed(&self, what: &'static str, value: u64) -> LiveError {
        LiveError::Malformed {
            domain: self.domain,
            what,
            value,
        }
    }

    /// The machine's frames with the list's pages from that with entry `first` on, as far as one
    /// table of the lowest level has them.
    fn leaves(&mut self, first: u64) -> Result<Vec<u64>, LiveError> {
        let offset = first.saturating_mul(ENTRY as u64);
        let at = self.shared.start.checked_add(offset);
        let at = at.ok_or_else(|| self.malformed("the end of its list of frames", first))?;
        let mut table = self.shared.root.raw();
        for (level, shift) in [39, 30, 21].into_iter().enumerate() {
            table = self.entry(level, table, (at >> shift) & 0x1ff, at)?;
        }
        let lowest = self.xen.map(self.domain, &[table])?;
        let bytes = lowest
            .frames(0, 1)
            .ok_or_else(|| self.malformed("a page table of its list of frames", at))?;
        let pages = self.shared.count.saturating_sub(first).div_ceil(ENTRIES);
        let begin = (at >> PAGE_SHIFT) & 0x1ff;
        let end = begin.saturating_add(pages).min(ENTRIES);
        (begin..end)
            .map(|index| named(bytes, index).ok_or_else(|| self.hole(at)))
            .collect()
    }

    /// What entry `index` of a table of one of the upper levels names.
    fn entry(&mut self, level: usize, table: u64, index: u64, at: u64) -> Result<u64, LiveError> {
        let slot = self.tables.get_mut(level);
        let found = match slot {
            Some(Some((number, page))) if *number == table => {
                page.frames(0, 1).and_then(|bytes| named(bytes, index))
            }
            Some(slot) => {
                let page = self.xen.map(self.domain, &[table])?;
                let (_, page) = slot.insert((table, page));
                page.frames(0, 1).and_then(|bytes| named(bytes, index))
            }
            None => None,
        };
        found.ok_or_else(|| self.hole(at))
    }

    fn hole(&self, at: u64) -> LiveError {
        self.malformed("an address of its list of frames that is not mapped", at)
    }
}

/// The frame that entry `index` of a page table names.
fn named(table: GuestBytes<'_>, index: u64) -> Option<u64> {
    let at = usize::try_from(index).ok()?.checked_mul(ENTRY)?;
    let entry = table.u64_at(at)?;
    (entry & PRESENT != 0).then_some((entry & ADDRESS) >> PAGE_SHIFT)
}
