//! The table of frames that a paravirtualised guest keeps: the linear list which its shared
//! information names (`p2m_cr3`, `p2m_vaddr` in `xen/include/public/arch-x86/xen.h`; Linux has it
//! since 4.3).

use crate::ffi::DomainInfo;
use crate::mappings::Mappings;
use crate::{DomainId, LiveError};
use sonicshot::{Mfn, P2m, P2mBuilder, Pfn, to_u64, to_usize};

/// The offset of the architecture's part in the shared information of a guest of 64 bits.
const ARCH: usize = 3088;
const ENTRY: usize = 8;
const PAGE: usize = P2m::PAGE.size();
const ENTRIES: u64 = 512;
/// Of an entry of a page table: where the next table or the page is.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE_SHIFT: u32 = P2m::PAGE.shift();
const PRESENT: u64 = 1;
/// Linux marks entries that are no frame of the guest by the two highest bits.
const NOT_OWN: u64 = 3 << 62;
/// A guest may have its frames spread, but not over more than this many times as many numbers,
/// beside the hole below 4 GiB.
const SPREAD: u64 = 4;
const HOLE: u64 = 1 << 20;

type Page = [u8; PAGE];

/// The content of the machine's frames, as far as they are the domain's.
pub(crate) trait MachinePages {
    /// Gives each of `frames` to `each`, in order; `None` for one that cannot be had.
    fn pages(&self, frames: &[u64], each: &mut dyn FnMut(Option<&Page>)) -> Result<(), LiveError>;
}

impl MachinePages for Mappings<'_> {
    fn pages(&self, frames: &[u64], each: &mut dyn FnMut(Option<&Page>)) -> Result<(), LiveError> {
        let mapped = self.of(frames)?;
        for index in 0..frames.len() {
            let mut copy = [0; PAGE];
            let page = mapped.frames(index, 1);
            each(
                page.is_some_and(|page| page.copy_to(&mut copy))
                    .then_some(&copy),
            );
        }
        Ok(())
    }
}

/// The fields of the shared information page.
struct Shared {
    count: u64,
    root: Mfn,
    start: u64,
    generation: u64,
}

impl Shared {
    fn read(pages: &dyn MachinePages, id: DomainId, info: &DomainInfo) -> Result<Self, LiveError> {
        let malformed = |what, value| LiveError::Malformed {
            domain: id,
            what,
            value,
        };
        let mut words = None;
        pages.pages(&[info.shared_info.raw()], &mut |page| {
            words = page.and_then(|page| {
                let arch = page.get(ARCH..)?.as_chunks::<ENTRY>().0;
                let word = |index: usize| arch.get(index).map(|word| u64::from_le_bytes(*word));
                Some((word(0)?, word(3)?, word(4)?, word(5)?))
            });
        })?;
        let Some((count, cr3, start, generation)) = words else {
            return Err(malformed("its shared information", info.shared_info.raw()));
        };
        if cr3 == 0 {
            return Err(malformed("it has no linear list of its frames", cr3));
        }
        if generation & 1 != 0 {
            return Err(malformed("its list of frames is being changed", generation));
        }
        let most = info.pages.checked_mul(SPREAD);
        let most = most.and_then(|most| most.checked_add(HOLE));
        if count == 0 || most.is_some_and(|most| count > most) {
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

/// Reads the table of a domain. What a domain that runs changes meanwhile may be read half.
pub(crate) fn read(
    pages: &dyn MachinePages,
    domain: DomainId,
    info: &DomainInfo,
) -> Result<P2m, LiveError> {
    let shared = Shared::read(pages, domain, info)?;
    let mut walk = Walk {
        pages,
        domain,
        shared: &shared,
        tables: [const { None }; 4],
    };
    let mut frames = P2mBuilder::default();
    let mut first = 0_u64;
    while first < shared.count {
        let leaves = walk.leaves(first)?;
        let mut missing = leaves.is_empty().then_some(first);
        pages.pages(&leaves, &mut |page| {
            let left = shared.count.checked_sub(first);
            match page.zip(left) {
                Some((page, left)) => own_frames(page, first, left.min(ENTRIES), &mut frames),
                None => missing = missing.or(Some(first)),
            }
            // Behind the last entry there are no more leaves.
            first = first.checked_add(ENTRIES).unwrap_or(shared.count);
        })?;
        if let Some(first) = missing {
            return Err(walk.malformed("a page of its list of frames", first));
        }
        if frames.frames() > info.pages {
            return Err(walk.malformed("more frames than it has pages", frames.frames()));
        }
    }
    let after = Shared::read(pages, domain, info)?;
    if after.generation != shared.generation {
        return Err(walk.malformed("its list of frames was changed", after.generation));
    }
    let p2m = frames.finish();
    p2m.map_err(|source| LiveError::P2m { domain, source })
}

/// Adds the frames of one page of the list, of which `count` entries count.
fn own_frames(page: &Page, first: u64, count: u64, frames: &mut P2mBuilder) {
    let (entries, _) = page.as_chunks::<ENTRY>();
    for (pfn, entry) in (first..).zip(entries).take(to_usize(count)) {
        let mfn = u64::from_le_bytes(*entry);
        if mfn & NOT_OWN == 0 {
            frames.push(Pfn::new(pfn), Mfn::new(mfn));
        }
    }
}

/// Finds where the pages of the list are.
struct Walk<'x> {
    pages: &'x dyn MachinePages,
    domain: DomainId,
    shared: &'x Shared,
    /// The table of each level that was used last, the highest first, and which frame it is.
    tables: [Option<(u64, Box<Page>)>; 4],
}

impl Walk<'_> {
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
        let offset = first.checked_mul(to_u64(ENTRY));
        let at = offset.and_then(|offset| self.shared.start.checked_add(offset));
        let at = at.ok_or_else(|| self.malformed("the end of its list of frames", first))?;
        let hole = self.malformed("an address of its list of frames that is not mapped", at);
        let mut table = self.shared.root.raw();
        for (level, shift) in [39, 30, 21].into_iter().enumerate() {
            let named = named(self.table(level, table)?, (at >> shift) & 0x1ff);
            table = match named {
                Some(next) => next,
                None => return Err(hole),
            };
        }
        let left = self.shared.count.checked_sub(first);
        let left = left.ok_or_else(|| self.malformed("the end of its list of frames", first))?;
        let begin = (at >> PAGE_SHIFT) & 0x1ff;
        let lowest = self.table(3, table)?;
        let indices = (begin..ENTRIES).take(to_usize(left.div_ceil(ENTRIES)));
        let leaves: Option<Vec<u64>> = indices.map(|index| named(lowest, index)).collect();
        leaves.ok_or(hole)
    }

    /// The table in frame `number`.
    fn table(&mut self, level: usize, number: u64) -> Result<&Page, LiveError> {
        let unreadable = self.malformed("a page table of its list of frames", number);
        let Some(slot) = self.tables.get_mut(level) else {
            return Err(unreadable);
        };
        if slot.as_ref().is_none_or(|(held, _)| *held != number) {
            *slot = None;
            self.pages.pages(&[number], &mut |page| {
                *slot = page.map(|page| (number, Box::new(*page)));
            })?;
        }
        match slot {
            Some((_, page)) => Ok(page),
            None => Err(unreadable),
        }
    }
}

/// The frame that entry `index` of a page table names.
fn named(table: &Page, index: u64) -> Option<u64> {
    let entry = table
        .as_chunks::<ENTRY>()
        .0
        .get(usize::try_from(index).ok()?)?;
    let entry = u64::from_le_bytes(*entry);
    (entry & PRESENT != 0).then_some((entry & ADDRESS) >> PAGE_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::{ARCH, MachinePages, PAGE, Page, read};
    use crate::ffi::DomainInfo;
    use crate::{DomainId, LiveError};
    use proptest::prelude::*;
    use sonicshot::{Mfn, P2m, Pfn};
    use std::collections::BTreeMap;

    const SHARED: u64 = 0x50;
    const LIST: u64 = 0xffff_c900_0000_0000;

    /// A machine's frames.
    #[derive(Clone)]
    struct Machine(BTreeMap<u64, Page>);

    impl MachinePages for Machine {
        fn pages(
            &self,
            frames: &[u64],
            each: &mut dyn FnMut(Option<&Page>),
        ) -> Result<(), LiveError> {
            frames.iter().for_each(|frame| each(self.0.get(frame)));
            Ok(())
        }
    }

    impl Machine {
        fn put(&mut self, frame: u64, index: usize, word: u64) {
            let page = self.0.entry(frame).or_insert([0; PAGE]);
            page[index * 8..index * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }

        /// A guest whose list says `list`, with page tables at 0x100 and up, the list at 0x200.
        fn with(list: &[u64]) -> Self {
            let mut machine = Self(BTreeMap::new());
            for (index, word) in [(0, list.len() as u64), (3, 0x100 << 12), (4, LIST), (5, 4)] {
                machine.put(SHARED, ARCH / 8 + index, word);
            }
            let index = |shift: u32| usize::try_from((LIST >> shift) & 0x1ff).unwrap();
            machine.put(0x100, index(39), 0x101 << 12 | 0x67);
            machine.put(0x101, index(30), 0x102 << 12 | 0x67);
            for (number, page) in list.chunks(512).enumerate() {
                let (table, entry) = (0x103 + number as u64 / 512, number % 512);
                let leaf = 0x200 + number as u64;
                machine.put(0x102, index(21) + number / 512, table << 12 | 0x67);
                machine.put(table, entry, 1 << 63 | leaf << 12 | 0x67);
                for (at, word) in page.iter().enumerate() {
                    machine.put(leaf, at, *word);
                }
            }
            machine
        }

        fn read(&self, pages: u64) -> Result<P2m, LiveError> {
            let info = DomainInfo {
                flags: 0,
                pages,
                shared_info: Mfn::new(SHARED),
            };
            read(self, DomainId::new(1), &info)
        }

        fn refused(&self, pages: u64) -> String {
            self.read(pages).unwrap_err().to_string()
        }
    }

    #[test]
    fn reads_what_is_the_guests_own() {
        // Two tables of the lowest level; missing, identity and foreign frames between.
        let list: Vec<u64> = (0..512 * 512 + 700_u64)
            .map(|pfn| match pfn % 1000 {
                3 => u64::MAX,
                4 => 1 << 62 | pfn,
                5 => 1 << 63 | 77,
                _ => 0x100_0000 - pfn,
            })
            .collect();
        let p2m = Machine::with(&list).read(1 << 20).unwrap();
        for (pfn, mfn) in (0..).zip(list) {
            let own = (mfn >> 62 == 0).then_some(Mfn::new(mfn));
            assert_eq!(p2m.mfn(Pfn::new(pfn)), own);
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let machine = Machine::with(&[10, 11, 12]);
        assert!(machine.read(3).is_ok());
        assert!(
            machine
                .refused(2)
                .contains("more frames than it has pages (value 0x3)")
        );
        let changed = |frame, index, word| {
            let mut machine = machine.clone();
            machine.put(frame, index, word);
            machine.refused(3)
        };
        let shared = |index, word| changed(SHARED, ARCH / 8 + index, word);
        assert!(shared(0, 0).contains("length of its list"));
        assert!(shared(0, 1 << 40).contains("length of its list of frames (value 0x10000000000)"));
        assert!(shared(0, 513).contains("not mapped"));
        assert!(shared(3, 0).contains("no linear list"));
        assert!(shared(3, 0x999 << 12).contains("page table of its list of frames (value 0x999)"));
        assert!(shared(4, LIST + 8).contains("address of its list"));
        assert!(shared(4, !0xfff).contains("not mapped"));
        assert!(shared(5, 5).contains("being changed"));
        assert!(changed(0x103, 0, 0x200 << 12).contains("not mapped"));
        assert!(changed(0x103, 0, 0x999 << 12 | 1).contains("a page of its list"));
        assert!(changed(0x200, 2, 10).contains("table of frames"));
        assert!(
            Machine(BTreeMap::new())
                .refused(3)
                .contains("shared information")
        );
    }

    proptest! {
        // Whatever is in the guest's pages, it is read or refused.
        #[test]
        fn ends_whatever_the_guest_wrote(
            words in proptest::collection::vec((0_usize..8, 0_usize..512, any::<u64>()), 0..40),
            near in proptest::collection::vec((0_usize..8, 0_usize..512, 0x100_u64..0x108), 0..40),
        ) {
            let mut machine = Machine::with(&[10, 11, 12]);
            let frames = [SHARED, 0x100, 0x101, 0x102, 0x103, 0x200, 0x104, 0x105];
            for (frame, index, word) in words {
                machine.put(frames[frame], index, word);
            }
            for (frame, index, named) in near {
                machine.put(frames[frame], index, named << 12 | 1);
            }
            let _ = machine.read(1000);
        }
    }
}
