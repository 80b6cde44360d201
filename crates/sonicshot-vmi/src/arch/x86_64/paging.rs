//! x86-64 page tables, four and five levels (Intel SDM vol. 3, 4.5).

use crate::KernelVa;
use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::paging::{Paging, Translation};
use sonicshot::{Gpa, GuestMemory, MemoryError, Mfn, P2m, PageSize, Pfn, PfnRange};
use std::collections::HashSet;

const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
const PAGE_SIZE_BIT: u64 = 1 << 7;
/// Bits 51..12: where the next table or the page is.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Page tables that begin at `root`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    root: Gpa,
    levels: u32,
}

impl Walk {
    /// `levels` is 4 or 5.
    pub(crate) fn new(root: Gpa, levels: u32) -> Self {
        Self { root, levels }
    }
}

/// Whether `value` may be an address of the kernel's half of the address space.
pub(super) fn is_pointer(value: u64) -> bool {
    value >> 63 == 1
}

impl Paging for Walk {
    fn levels(&self) -> u32 {
        self.levels
    }

    fn is_pointer(&self, value: u64) -> bool {
        is_pointer(value)
    }

    #[allow(
        clippy::arithmetic_side_effects,
        reason = "level is 1 to 5, so shift is 12 to 48 and every shifted value fits"
    )]
    fn translate(
        &self,
        memory: &dyn GuestMemory,
        at: KernelVa,
    ) -> Result<Option<Translation>, MemoryError> {
        let va = at.raw();
        let mut table = self.root.raw();
        for level in (1..=self.levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let index = (va >> shift) & 0x1ff;
            let entry = memory.read_u64(Gpa::new(table | (index << 3)))?;
            if entry & PRESENT == 0 {
                return Ok(None);
            }
            let is_page = level == 1 || (level <= 3 && entry & PAGE_SIZE_BIT != 0);
            if is_page {
                let offset_mask = (1_u64 << shift) - 1;
                let offset = va & offset_mask;
                let named = (entry & ADDRESS & !offset_mask) | offset;
                let Some(at) = guest_address(memory, named) else {
                    return Ok(None);
                };
                // Neighbours in the machine need not be neighbours in the guest.
                let page = if memory.p2m().is_some() {
                    P2m::PAGE.bytes()
                } else {
                    1 << shift
                };
                let len = page - (offset & (page - 1));
                return Ok(Some(Translation { at, len }));
            }
            let Some(next) = guest_address(memory, entry & ADDRESS) else {
                return Ok(None);
            };
            table = next.raw();
        }
        Ok(None)
    }

    fn visit_tables(
        &self,
        memory: &dyn GuestMemory,
        visit: &mut dyn FnMut(Gpa) -> bool,
    ) -> Result<(), MemoryError> {
        // Each table once, however often it is named: there are no more than pages of RAM.
        let mut seen = HashSet::from([self.root]);
        let mut left = vec![(self.root, self.levels)];
        while let Some((table, level)) = left.pop() {
            if !visit(table) {
                break;
            }
            let mut entries = [0; 4096];
            memory.read(table, &mut entries)?;
            let (entries, _) = entries.as_chunks::<8>();
            // Of the top table the upper half.
            let first = if level == self.levels { 256 } else { 0 };
            for entry in entries.iter().skip(first) {
                let entry = u64::from_le_bytes(*entry);
                let is_page = level == 1 || (level <= 3 && entry & PAGE_SIZE_BIT != 0);
                if entry & PRESENT == 0 || is_page {
                    continue;
                }
                let next = guest_address(memory, entry & ADDRESS)
                    .filter(|next| memory.layout().contains(*next, 4096));
                if let Some(next) = next
                    && seen.insert(next)
                    && let Some(below @ 1..) = level.checked_sub(1)
                {
                    left.push((next, below));
                }
            }
        }
        Ok(())
    }

    fn mapped_ranges(
        &self,
        memory: &dyn GuestMemory,
        most: usize,
        deadline: &Deadline,
    ) -> Result<Vec<KernelVa>, VmiError> {
        let mut search = MappedRanges {
            walk: self,
            memory,
            most,
            deadline,
            tables: 0,
            found: Vec::new(),
        };
        // All bits above those that the tables take are the same.
        let bits = self
            .levels
            .checked_mul(9)
            .and_then(|bits| bits.checked_add(12));
        if let Some(from) = bits.and_then(|bits| u64::MAX.checked_shl(bits)) {
            search.add((self.root, self.levels), from)?;
        }
        Ok(search.found)
    }
}

/// The search for ranges of mappings. How many tables there are the guest says, and one may
/// stand in for many.
struct MappedRanges<'a> {
    walk: &'a Walk,
    memory: &'a dyn GuestMemory,
    most: usize,
    deadline: &'a Deadline,
    /// So many tables were gone through.
    tables: u64,
    found: Vec<KernelVa>,
}

impl MappedRanges<'_> {
    /// Adds the ranges that the table at `table` has, whose entries begin at `from`.
    fn add(&mut self, (table, level): (Gpa, u32), from: u64) -> Result<(), VmiError> {
        /// So many bytes are mapped by an entry of a table of this level.
        const LEVEL: u32 = 3;
        let Some(below) = level.checked_sub(1) else {
            return Ok(());
        };
        let shift = below.checked_mul(9).and_then(|bits| bits.checked_add(12));
        let Some(shift) = shift.filter(|shift| *shift < u64::BITS) else {
            return Ok(());
        };
        VmiError::count("page tables", &mut self.tables, 1)?;
        let all = self.memory.layout().bytes() >> 12;
        self.deadline.check("page tables", self.tables, all)?;
        let mut entries = [0; 4096];
        match self.memory.read(table, &mut entries) {
            // The firmware's or a device's: nothing of the kernel's is found there.
            Err(MemoryError::NotRam { .. } | MemoryError::Absent { .. }) => return Ok(()),
            read => read?,
        }
        let (entries, _) = entries.as_chunks::<8>();
        let first = if level == self.walk.levels { 256 } else { 0 };
        for (index, entry) in (0_u64..).zip(entries).skip(first) {
            if self.found.len() > self.most {
                break;
            }
            let entry = u64::from_le_bytes(*entry);
            if entry & PRESENT == 0 {
                continue;
            }
            let at = from | index << shift;
            if level > LEVEL {
                if let Some(next) = guest_address(self.memory, entry & ADDRESS) {
                    self.add((next, below), at)?;
                }
                continue;
            }
            let is_mapped = |at: u64| {
                let there = self.walk.translate(self.memory, KernelVa::new(at));
                matches!(there, Ok(Some(_)))
            };
            if is_mapped(at) && !at.checked_sub(1).is_some_and(is_mapped) {
                self.found.push(KernelVa::new(at));
            }
        }
        Ok(())
    }
}

/// The frames that an entry of a page table maps for a process. An entry that leads to another
/// table counts as one that maps that table's frame.
pub(super) fn user_mapping(entry: u64, page_size: PageSize) -> Option<PfnRange> {
    /// A page of 1 GiB; one of 2 MiB begins where a table of 4 KiB pages would.
    const LARGEST: u64 = 1 << 18;
    if entry & (PRESENT | USER) != PRESENT | USER {
        return None;
    }
    let mut first = (entry & ADDRESS) >> page_size.shift();
    let is_large = entry & PAGE_SIZE_BIT != 0;
    if is_large {
        // Of a large page the lowest bit is none of the address (PAT).
        first &= !1;
    }
    let is_largest = is_large && first.is_multiple_of(LARGEST);
    PfnRange::with_len(Pfn::new(first), if is_largest { LARGEST } else { 1 })
}

/// The guest-physical address of the frame that an entry names; `None` if it is not the guest's, as
/// are the frames of Xen itself that a paravirtualised guest has in its tables.
fn guest_address(memory: &dyn GuestMemory, named: u64) -> Option<Gpa> {
    let Some(p2m) = memory.p2m() else {
        return Some(Gpa::new(named));
    };
    let frame = p2m.pfn(Mfn::new(named >> P2m::PAGE.shift()))?;
    frame
        .gpa(P2m::PAGE)?
        .checked_add(named & P2m::PAGE.offset_mask())
}

#[cfg(test)]
mod tests {
    use super::Walk;
    use crate::KernelVa;
    use crate::deadline::Deadline;
    use crate::paging::{Paging, Translation};
    use sonicshot::{
        Gpa, GuestBytes, GuestMemory, MappedRegions, MemoryError, Mfn, P2m, Pfn, RamLayout,
    };

    /// Page tables from `(table, index, entry)` lines in 64 KiB of memory.
    fn tables(entries: &[(u64, u64, u64)]) -> Vec<u8> {
        let mut ram = vec![0; 0x1_0000];
        for (table, index, entry) in entries {
            let at = usize::try_from(table + index * 8).unwrap();
            ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        ram
    }

    fn translate(ram: &[u8], five: bool, va: u64) -> Option<(u64, u64)> {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        Walk::new(Gpa::new(0x1000), if five { 5 } else { 4 })
            .translate(&memory, KernelVa::new(va))
            .unwrap()
            .map(|Translation { at, len }| (at.raw(), len))
    }

    #[test]
    fn walks_four_levels_with_every_page_size() {
        let ram = tables(&[
            (0x1000, 511, 0x2063),
            (0x2000, 510, 0x3063),
            (0x3000, 0, 0x4063),
            (0x4000, 5, 0x8000_0000_0009_a163),
            (0x3000, 1, 0x0120_00e3),
            (0x2000, 511, 0x8000_00e3),
        ]);
        assert_eq!(
            translate(&ram, false, 0xffff_ffff_8000_5008),
            Some((0x9_a008, 0xff8))
        );
        assert_eq!(
            translate(&ram, false, 0xffff_ffff_8020_1234),
            Some((0x0120_1234, 0x20_0000 - 0x1234))
        );
        assert_eq!(
            translate(&ram, false, 0xffff_ffff_c000_0010),
            Some((0x8000_0010, 0x4000_0000 - 0x10))
        );
        assert_eq!(translate(&ram, false, 0xffff_ffff_8000_6000), None);
        assert_eq!(translate(&ram, false, 0xffff_8000_0000_0000), None);
    }

    #[test]
    fn each_table_of_the_kernel_half_is_visited_once() {
        let ram = tables(&[
            (0x1000, 0, 0x9063),
            (0x1000, 511, 0x2063),
            (0x1000, 510, 0x2063),
            (0x2000, 510, 0x3063),
            (0x2000, 511, 0x8000_00e3),
            (0x3000, 0, 0x4063),
            (0x3000, 1, 0x0120_00e3),
            (0x3000, 2, 0xfff_0063),
            // A loop.
            (0x3000, 3, 0x2063),
            (0x4000, 5, 0x5063),
        ]);
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let walk = Walk::new(Gpa::new(0x1000), 4);
        let mut seen = Vec::new();
        walk.visit_tables(&memory, &mut |table| {
            seen.push(table.raw());
            true
        })
        .unwrap();
        seen.sort_unstable();
        assert_eq!(seen, [0x1000, 0x2000, 0x3000, 0x4000]);
        let mut first = 0;
        walk.visit_tables(&memory, &mut |_| {
            first += 1;
            false
        })
        .unwrap();
        assert_eq!(first, 1);
    }

    #[test]
    fn ranges_of_the_kernel_half_are_told_by_their_begin() {
        let tables = tables(&[
            (0x1000, 0, 0x2063),
            (0x1000, 0x111, 0x2063),
            (0x1000, 0x1ff, 0x2063),
            // A whole GiB and the next by a table; one of which the begin is not mapped.
            (0x2000, 7, 0x8000_00e3),
            (0x2000, 8, 0x3063),
            (0x2000, 10, 0x4063),
            (0x2000, 11, 0x3063),
            (0x3000, 0, 0x0120_00e3),
            (0x4000, 1, 0x0120_00e3),
            (0x2000, 12, 0xffff_f063),
        ]);
        let memory =
            MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&tables))]).unwrap();
        let walk = Walk::new(Gpa::new(0x1000), 4);
        let found = walk.mapped_ranges(&memory, 10, &Deadline::new()).unwrap();
        let gib =
            |top: u64, number: u64| KernelVa::new(0xffff_0000_0000_0000 | top << 39 | number << 30);
        let all = [gib(0x111, 7), gib(0x111, 11), gib(0x1ff, 7), gib(0x1ff, 11)];
        assert_eq!(found, all);
        assert_eq!(
            walk.mapped_ranges(&memory, 1, &Deadline::new()).unwrap(),
            all[..2]
        );
    }

    #[test]
    fn walks_five_levels() {
        let ram = tables(&[
            (0x1000, 0x111, 0x2063),
            (0x2000, 0x1, 0x3063),
            (0x3000, 0x2, 0x1_4000_00e3),
        ]);
        let va = 0xff00_0000_0000_0000 | (0x111 << 48) | (0x1 << 39) | (0x2 << 30) | 0x77;
        assert_eq!(
            translate(&ram, true, va),
            Some((0x1_4000_0077, 0x4000_0000 - 0x77))
        );
    }

    #[test]
    fn a_table_outside_ram_is_an_error() {
        let ram = tables(&[(0x1000, 0, 0xfff_ffff_f063)]);
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let walk = Walk::new(Gpa::new(0x1000), 4).translate(&memory, KernelVa::new(0));
        assert!(walk.is_err());
    }

    /// Memory whose page tables hold frame numbers of the machine.
    struct Paravirtualised<'a>(MappedRegions<'a>, P2m);

    impl GuestMemory for Paravirtualised<'_> {
        fn layout(&self) -> &RamLayout {
            self.0.layout()
        }
        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            self.0.read(at, buf)
        }
        fn p2m(&self) -> Option<&P2m> {
            Some(&self.1)
        }
    }

    #[test]
    fn tables_of_a_paravirtualised_guest_hold_machine_frames() {
        // Guest frame n is machine frame 0x100 - n.
        let ram = tables(&[
            (0x1000, 511, 0xfe063),
            (0x2000, 510, 0xfd063),
            (0x3000, 0, 0xfc063),
            (0x3000, 1, 0x200_00e3),
            (0x4000, 5, 0xf_7163),
            (0x4000, 6, 0x7163),
        ]);
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let frames = (0..16).map(|n| (Pfn::new(n), Mfn::new(0x100 - n)));
        let large = [(Pfn::new(0x900), Mfn::new(0x2001))];
        let memory = Paravirtualised(memory, P2m::new(frames.chain(large)).unwrap());
        let translate = |va| {
            Walk::new(Gpa::new(0x1000), 4)
                .translate(&memory, KernelVa::new(va))
                .unwrap()
                .map(|Translation { at, len }| (at.raw(), len))
        };
        assert_eq!(translate(0xffff_ffff_8000_5008), Some((0x9008, 0xff8)));
        // A machine frame that is not the guest's.
        assert_eq!(translate(0xffff_ffff_8000_6000), None);
        // Of a large page each frame is somewhere else.
        assert_eq!(translate(0xffff_ffff_8020_1234), Some((0x90_0234, 0xdcc)));
        assert_eq!(translate(0xffff_ffff_8020_2000), None);
    }
}
