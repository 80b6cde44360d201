//! Memory that is offline, and the proof of it.
//!
//! Two things are called offline: a section that the kernel does not use (hotplug), and a page
//! that says so of itself (`PageOffline`: a balloon's, or a part of a virtio-mem device that is
//! not plugged in). One word says either, and one wrong bit in it would cost up to 128 MiB in
//! use. So each needs a second record:
//!
//! - A *section* is offline if its word says so, the memory block that it belongs to says so
//!   (`drivers/base/memory.c`; persistent, device and private memory has sections but no memory
//!   blocks), and the zones' and the nodes' `present_pages` are just the frames of the others.
//!   Then nothing outside may point into it: no free or per-CPU list, no LRU list, no user's page
//!   table. What its own struct pages say is not asked: of a section that was never online they
//!   were never written.
//! - A *page* is offline if its type says so and its driver has it: the ring that its `lru` is in
//!   is closed, linked both ways, consists of such pages alone, and its head lies in the driver's
//!   structure, beside a count that is just as long (`include/linux/balloon_compaction.h`).
//!
//! What is not proved is kept, and counted in a note. It is no reason to refuse a prune: what a
//! balloon or virtio-mem gave back to the host reads as zero there, and needs no class to go.

mod blocks;
mod rings;
mod sections;

pub(crate) use rings::OfflinePages;
pub(crate) use sections::OfflineSections;

#[cfg(test)]
mod tests {
    use super::{OfflinePages, OfflineSections};
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel, page_facts};
    use crate::mm::mem_map::MemMap;
    use crate::mm::page::PageLayout;
    use crate::mm::zone::Zones;
    use crate::note::Note;
    use sonicshot::{GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange};

    const MIB: usize = 1 << 20;
    /// Sections of 16 MiB: 4096 frames each, two of them.
    const FRAMES: u64 = 4096;
    const ARRAY: u64 = 0x10_0000;
    const OFFLINE: u64 = 0xffff_feff;

    fn struct_page(pfn: u64) -> u64 {
        ARRAY + pfn * 64
    }

    fn ring_facts() -> Facts {
        let mut facts = page_facts();
        facts.member("page", "compound_head", 8);
        facts.constants.insert("PAGE_BUDDY_MAPCOUNT_VALUE", -129);
        facts.constants.insert("PAGE_OFFLINE_MAPCOUNT_VALUE", -257);
        facts.symbols.insert("mem_map", DIRECT_MAP + 0x1000);
        facts.symbols.insert("max_mapnr", DIRECT_MAP + 0x1008);
        facts
    }

    /// A balloon at 0x4000 with these pages in its list, in this order, and its count.
    fn balloon(pages: &[u64]) -> Ram {
        let mut ram = Ram::new(8 * MIB);
        ram.put(0x1000, DIRECT_MAP + ARRAY);
        ram.put(0x1008, 2048);
        let head = DIRECT_MAP + 0x4010;
        let nodes: Vec<u64> = pages
            .iter()
            .map(|pfn| DIRECT_MAP + struct_page(*pfn) + 8)
            .chain([head])
            .collect();
        for (number, node) in nodes.iter().enumerate() {
            let next = nodes[(number + 1) % nodes.len()];
            ram.put(node - DIRECT_MAP, next);
            ram.put(next + 8 - DIRECT_MAP, *node);
        }
        for pfn in pages {
            ram.put(struct_page(*pfn) + 40, DIRECT_MAP + 0x4000);
            // No mapcount but the type; one reference.
            ram.put(struct_page(*pfn) + 48, OFFLINE | 1 << 32);
        }
        ram.put(0x3ff8, pages.len() as u64);
        ram
    }

    fn settled(ram: &Ram, pages: &[u64]) -> (Vec<u64>, Vec<String>) {
        let memory = ram.memory();
        let kernel = kernel(&memory, ring_facts());
        let mem_map = MemMap::new(&kernel).unwrap();
        let layout = PageLayout::new(&kernel, 64).unwrap();
        let mut map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        let found = OfflinePages::new(sorted.into_iter().map(Pfn::new).collect());
        let mut notes = Vec::new();
        found
            .settle(&kernel, &mem_map, &layout, &mut map, &mut notes)
            .unwrap();
        let offline = map.runs().filter(|(_, class)| *class == PageClass::Offline);
        let frames = offline.flat_map(|(frames, _)| frames.iter().map(Pfn::raw));
        let notes = notes.iter().map(Note::to_string).collect();
        (frames.collect(), notes)
    }

    const PAGES: [u64; 4] = [700, 40, 41, 900];

    #[test]
    fn a_balloon_has_its_pages() {
        let (offline, notes) = settled(&balloon(&PAGES), &PAGES);
        assert_eq!(offline, [40, 41, 700, 900]);
        assert_eq!(notes, [""; 0]);
    }

    /// Each change is in one record alone, and none of the pages is believed any more.
    #[test]
    fn a_ring_with_one_thing_wrong_is_kept() {
        let node = |pfn| struct_page(pfn) + 8;
        let others = DIRECT_MAP + node(500);
        let changes: [(&str, u64, u64, &str); 9] = [
            ("next", node(40), others, "not linked in both directions"),
            (
                "next, self",
                node(40),
                DIRECT_MAP + node(40),
                "not linked in both",
            ),
            (
                "previous",
                node(41) + 8,
                others,
                "not linked in both directions",
            ),
            (
                "the head's next",
                0x4010,
                others,
                "not linked in both directions",
            ),
            (
                "owner",
                struct_page(41) + 40,
                DIRECT_MAP + 0x4008,
                "of another owner",
            ),
            ("a flag", struct_page(41), 1 << 5, "not as a balloon leaves"),
            (
                "references",
                struct_page(41) + 48,
                OFFLINE | 2 << 32,
                "not as a balloon",
            ),
            (
                "no type",
                struct_page(41) + 48,
                0xffff_ffff | 1 << 32,
                "not as a balloon",
            ),
            ("the count", 0x3ff8, 5, "no count says so"),
        ];
        for (what, at, value, why) in changes {
            let mut ram = balloon(&PAGES);
            ram.put(at, value);
            let (offline, notes) = settled(&ram, &PAGES);
            assert_eq!(offline, [0; 0], "{what}");
            assert!(notes[0].starts_with("4 pages"), "{what}: {notes:?}");
            assert!(notes[0].contains(why), "{what}: {notes:?}");
        }
    }

    #[test]
    fn a_page_in_use_in_no_ring_is_kept_beside_a_balloon() {
        let mut ram = balloon(&PAGES);
        // One bit in the struct page of a page in use, its list pointing anywhere or to itself.
        for next in [
            0,
            DIRECT_MAP + struct_page(300) + 8,
            DIRECT_MAP + struct_page(40) + 8,
        ] {
            ram.put(struct_page(300) + 8, next);
            ram.put(struct_page(300) + 16, next);
            ram.put(struct_page(300) + 48, OFFLINE | 1 << 32);
            let (offline, notes) = settled(&ram, &[40, 41, 300, 700, 900]);
            assert!(!offline.contains(&300), "{next:#x}");
            assert!(notes[0].contains("frame 0x12c"), "{notes:?}");
        }
    }

    #[test]
    fn of_several_rings_in_doubt_each_is_told_of() {
        let mut ram = balloon(&PAGES);
        let alone = [300, 301, 302, 303, 304];
        for pfn in alone {
            ram.put(struct_page(pfn) + 48, OFFLINE | 1 << 32);
        }
        let told = |count: usize| {
            let mut pages = [&alone[..count], &PAGES[..]].concat();
            pages.sort_unstable();
            let (offline, notes) = settled(&ram, &pages);
            assert_eq!(offline, [40, 41, 700, 900]);
            notes[0].clone()
        };
        let two = told(2);
        assert!(
            two.contains("frame 0x12c") && two.contains("; frame 0x12d") && !two.contains("more"),
            "{two}"
        );
        assert!(told(5).ends_with("; and 2 more)"), "{}", told(5));
    }

    /// Two boot sections and their kernel's records: zones, nodes, e820, memory blocks.
    struct Sections {
        ram: Ram,
        facts: Facts,
    }

    const SECTION: u64 = 0x3000;
    const ZONE: u64 = 0x5000;
    const BLOCK: u64 = 0x6000;

    fn sections() -> Sections {
        let mut facts = page_facts();
        let mut ram = Ram::new(32 * MIB);
        facts.sizes.insert("mem_section", 16);
        facts.member("mem_section", "section_mem_map", 0);
        facts.constants.insert("SECTION_SIZE_BITS", 24);
        facts.constants.insert("MAX_PHYSMEM_BITS", 36);
        facts.symbols.insert("mem_section", DIRECT_MAP + 0x1000);
        ram.put(0x1000, DIRECT_MAP + 0x2000);
        ram.put(0x2000, DIRECT_MAP + SECTION);
        ram.put(SECTION, DIRECT_MAP + ARRAY + 0b111);
        ram.put(SECTION + 16, DIRECT_MAP + ARRAY + 0b011);
        // A node with one zone.
        facts.symbols.insert("contig_page_data", DIRECT_MAP + ZONE);
        facts.member("pglist_data", "node_present_pages", 0x800);
        facts.member("pglist_data", "node_zones", 0);
        facts.sizes.insert("zone", 0x400);
        facts.sizes.insert("free_area", 0x18);
        let array = |facts: &mut Facts, ty, name, offset, len| {
            facts.member(ty, name, offset);
            let member = facts.members.get_mut(&(ty, name)).unwrap();
            (member.size, member.len) = (None, Some(len));
        };
        array(&mut facts, "pglist_data", "node_zones", 0, 1);
        array(&mut facts, "zone", "free_area", 0x100, 2);
        array(&mut facts, "free_area", "free_list", 0, 1);
        for (name, offset) in [
            ("zone_start_pfn", 0),
            ("spanned_pages", 8),
            ("present_pages", 16),
            ("name", 24),
            ("vm_stat", 32),
            ("per_cpu_pageset", 48),
        ] {
            facts.member("zone", name, offset);
        }
        facts.member("free_area", "nr_free", 16);
        facts.constants.insert("NR_FREE_PAGES", 0);
        ram.put(ZONE + 8, 2 * FRAMES);
        ram.put(ZONE + 16, FRAMES);
        ram.put(ZONE + 24, DIRECT_MAP + 0x5c00);
        ram.put(ZONE + 0x800, FRAMES);
        // The firmware's map: all of it.
        facts.symbols.insert("e820_table", DIRECT_MAP + 0x7000);
        facts.sizes.insert("e820_entry", 24);
        for (name, offset) in [("nr_entries", 0), ("entries", 8)] {
            facts.member("e820_table", name, offset);
        }
        for (name, offset) in [("addr", 0), ("size", 8), ("type", 16)] {
            facts.member("e820_entry", name, offset);
        }
        ram.put(0x7000, DIRECT_MAP + 0x7100);
        ram.put(0x7100, 1);
        for (index, value) in (0..).zip([0, 32 * MIB as u64, 1]) {
            ram.put(0x7108 + index * 8, value);
        }
        // Memory blocks of one section each: a node of the tree, slots 0 and 1.
        facts.symbols.insert("memory_blocks", DIRECT_MAP + 0x8000);
        facts
            .symbols
            .insert("sections_per_block", DIRECT_MAP + 0x8100);
        facts.member("xarray", "xa_head", 8);
        facts.member("xa_node", "shift", 0);
        array(&mut facts, "xa_node", "slots", 8, 64);
        facts.member("memory_block", "start_section_nr", 0);
        facts.member("memory_block", "state", 8);
        ram.put(0x8100, 1);
        ram.put(0x8008, DIRECT_MAP + 0x9000 + 2);
        for (number, state) in [(0, 1), (1, 4)] {
            ram.put(0x9008 + number * 8, DIRECT_MAP + BLOCK + number * 64);
            ram.put(BLOCK + number * 64, number);
            ram.put(BLOCK + number * 64 + 8, state);
        }
        Sections { ram, facts }
    }

    impl Sections {
        /// The frames that count as offline, and what is said.
        fn settled(&self, listed: bool, lru: Option<u64>, table: Option<u64>) -> (u64, String) {
            let memory = self.ram.memory();
            let kernel = kernel(&memory, self.facts.clone());
            let mem_map = MemMap::new(&kernel).unwrap();
            let zones = Zones::new(&kernel).unwrap();
            let mut map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
            let is_listed = |frames: PfnRange| listed && frames.contains(Pfn::new(FRAMES));
            let mut found = OfflineSections::find(&kernel, &mem_map, &zones, &is_listed).unwrap();
            if let Some(pfn) = lru {
                let node = KernelVa::new(DIRECT_MAP + struct_page(pfn) + 8);
                if let Some(section) = found.suspect_of(node) {
                    found.see(section, Pfn::new(1));
                }
            }
            if let Some(table) = table {
                let table = PfnRange::with_len(Pfn::new(table), 1).unwrap();
                map.set(table, PageClass::PageTable);
            }
            found.see_page_tables(&kernel, &map).unwrap();
            let mut notes = Vec::new();
            found.settle(&mem_map, &mut map, &mut notes);
            let notes: String = notes.iter().map(Note::to_string).collect();
            (map.counts().get(PageClass::Offline), notes)
        }

        fn alone(&self) -> (u64, String) {
            self.settled(false, None, None)
        }
    }

    #[test]
    fn a_section_is_offline_by_its_block_and_the_counters() {
        let mut guest = sections();
        assert_eq!(guest.alone(), (FRAMES, String::new()));
        // One that was booted with and has holes does not count them.
        guest.ram.put(0x7108, 0x3000);
        guest.ram.put(0x7110, 32 * MIB as u64 - 0x3000);
        guest.ram.put(ZONE + 16, FRAMES - 3);
        guest.ram.put(ZONE + 0x800, FRAMES - 3);
        assert_eq!(guest.alone(), (FRAMES, String::new()));
    }

    #[test]
    fn a_section_with_one_record_against_it_is_kept() {
        let changes: [(&str, u64, u64, &str); 7] = [
            (
                "the online one's bit",
                SECTION,
                DIRECT_MAP + ARRAY + 0b011,
                "the zones count 4096",
            ),
            ("zone", ZONE + 16, 2 * FRAMES, "the zones count 8192"),
            ("node", ZONE + 0x800, 2 * FRAMES, "the nodes 8192"),
            ("the block's state", BLOCK + 64 + 8, 1, "is in state 1"),
            ("the block's section", BLOCK + 64, 3, "begins at section 3"),
            ("no block", 0x9010, 0, "section 1 has no memory block"),
            (
                "no blocks at all",
                0x8008,
                0,
                "section 1 has no memory block",
            ),
        ];
        for (what, at, value, why) in changes {
            let mut guest = sections();
            guest.ram.put(at, value);
            let (offline, notes) = guest.alone();
            assert_eq!(offline, 0, "{what}");
            assert!(notes.contains(why), "{what}: {notes}");
        }
        for symbol in ["memory_blocks", "e820_table"] {
            let mut guest = sections();
            guest.facts.symbols.remove(symbol);
            assert_eq!(guest.alone().0, 0, "{symbol}");
        }
    }

    #[test]
    fn a_section_that_something_points_into_is_kept() {
        let mut guest = sections();
        let (offline, notes) = guest.settled(true, None, None);
        assert!(
            offline == 0 && notes.contains("a free list has pages"),
            "{notes}"
        );
        let (offline, notes) = guest.settled(false, Some(FRAMES + 5), None);
        assert!(
            offline == 0 && notes.contains("an LRU list goes"),
            "{notes}"
        );
        assert_eq!(guest.settled(false, Some(FRAMES - 5), None).0, FRAMES);
        // A page table of a process; the kernel's own map everything.
        guest.ram.put(0xa010, (FRAMES + 7) << 12 | 0b111);
        let (offline, notes) = guest.settled(false, None, Some(0xa));
        assert!(
            offline == 0 && notes.contains("the page table in frame"),
            "{notes}"
        );
        guest.ram.put(0xa010, (FRAMES + 7) << 12 | 0b011);
        assert_eq!(guest.settled(false, None, Some(0xa)).0, FRAMES);
        // A page of 1 GiB that reaches into it.
        guest.ram.put(0xa010, 0b1000_0111);
        assert_eq!(guest.settled(false, None, Some(0xa)).0, 0);
    }
}
