//! The places of the kernel's records in a capture: by its own symbols and types, read here and not
//! by the code under test, and by the reads of a classification.

use super::capture::{Capture, Overlay, Reads};
use sonicshot::{Gpa, GuestMemory};
use sonicshot_vmi::symbols::{Btf, Kallsyms, SymbolSource, Vmcoreinfo, find_btf};
use sonicshot_vmi::{
    GuestOptions, KernelVa, LinuxGuest, OnInconsistency, VirtualMemory, VirtualReadError,
};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The kind of record that a mutation is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    StructPage,
    FreeList,
    PerCpuList,
    Zone,
    MemSection,
    PageTable,
    Btf,
    Vmcoreinfo,
    Kallsyms,
    /// A word that a classification reads, of no other kind: masks of processors, the places of
    /// their areas, nodes.
    Other,
}

impl Kind {
    pub const ALL: [Self; 10] = [
        Self::StructPage,
        Self::FreeList,
        Self::PerCpuList,
        Self::Zone,
        Self::MemSection,
        Self::PageTable,
        Self::Btf,
        Self::Vmcoreinfo,
        Self::Kallsyms,
        Self::Other,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StructPage => "struct page",
            Self::FreeList => "free list",
            Self::PerCpuList => "per-CPU list",
            Self::Zone => "zone",
            Self::MemSection => "mem_section",
            Self::PageTable => "page table",
            Self::Btf => "BTF",
            Self::Vmcoreinfo => "VMCOREINFO",
            Self::Kallsyms => "kallsyms",
            Self::Other => "other word",
        })
    }
}

/// A few bytes that say one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    pub at: Gpa,
    pub len: usize,
    /// The record's name, as an index of [`Anatomy::names`].
    pub name: usize,
}

/// A field of `struct page`.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    pub name: &'static str,
    pub offset: u64,
    pub len: usize,
}

/// The places of everything.
pub struct Anatomy {
    /// By kind; struct pages are in [`pages`](Self::pages).
    pub records: BTreeMap<Kind, Vec<Record>>,
    pub names: Vec<String>,
    /// The `struct page` of each frame.
    pub pages: Vec<(u64, Gpa)>,
    pub struct_page_size: u64,
    pub fields: Vec<Field>,
    /// The words of `_mapcount` that say buddy, offline and other types.
    pub types: Vec<u32>,
    /// Of each section its first frame, and where the struct page of frame 0 would be.
    pub sections: Vec<(u64, u64)>,
    /// Long ranges that opening reads, BTF left out.
    pub ranges: Vec<(u64, u64)>,
    /// The ranges that opening the guest reads: after a change there the guest must be opened again.
    pub read_by_open: Vec<(u64, u64)>,
}

/// The guest's memory through its own page tables.
pub struct Walker<'m> {
    pub memory: &'m dyn GuestMemory,
    root: u64,
    levels: u32,
}

impl<'m> Walker<'m> {
    pub fn new(memory: &'m dyn GuestMemory, info: &Vmcoreinfo) -> Result<Self> {
        let table = info.symbol("swapper_pg_dir").ok_or("no swapper_pg_dir")?;
        let base = info.number("phys_base").ok_or("no phys_base")?;
        let five = info.number("pgtable_l5_enabled").unwrap_or(0) != 0;
        Ok(Self {
            memory,
            root: table
                .raw()
                .wrapping_sub(START_KERNEL_MAP)
                .wrapping_add(base.cast_unsigned()),
            levels: if five { 5 } else { 4 },
        })
    }

    /// The address of the top-level table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The guest-physical address of `va`, the number of bytes from there on that the same entry
    /// maps, and the entries on the way.
    pub fn walk(&self, va: u64) -> Option<(u64, u64, Vec<u64>)> {
        let mut table = self.root;
        let mut entries = Vec::new();
        for level in (1..=self.levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let at = table | ((va >> shift) & 0x1ff) << 3;
            entries.push(at);
            let entry = self.memory.read_u64(Gpa::new(at)).ok()?;
            if entry & 1 == 0 {
                return None;
            }
            let mask = (1 << shift) - 1;
            let next = entry & 0x000f_ffff_ffff_f000;
            if level == 1 || level <= 3 && entry & 0x80 != 0 {
                let at = (next & !mask) | (va & mask);
                return Some((at, mask + 1 - (va & mask), entries));
            }
            table = next;
        }
        None
    }

    fn gpa(&self, va: u64) -> Result<Gpa> {
        let (at, ..) = self
            .walk(va)
            .ok_or_else(|| format!("{va:#x} is not mapped"))?;
        Ok(Gpa::new(at))
    }
}

impl VirtualMemory for Walker<'_> {
    fn read(&self, at: KernelVa, buf: &mut [u8]) -> std::result::Result<(), VirtualReadError> {
        let mut done = 0;
        while done < buf.len() {
            let here = KernelVa::new(at.raw().wrapping_add(done as u64));
            let (gpa, len, _) = self
                .walk(here.raw())
                .ok_or(VirtualReadError::NotMapped { at: here })?;
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let end = buf.len().min(done.saturating_add(len));
            self.memory
                .read(Gpa::new(gpa), &mut buf[done..end])
                .map_err(|source| VirtualReadError::Memory { at: here, source })?;
            done = end;
        }
        Ok(())
    }
}

struct Builder<'m> {
    walker: Walker<'m>,
    symbols: Kallsyms,
    info: Vmcoreinfo,
    btf: Btf,
    names: Vec<String>,
    numbers: BTreeMap<String, usize>,
    /// Records by place; the first who claims a place has it.
    records: BTreeMap<u64, (Kind, Record)>,
}

impl<'m> Builder<'m> {
    /// Of the guest in `overlay` with this VMCOREINFO; and where its image begins.
    fn of(overlay: &'m Overlay<'m>, text: &str) -> Result<(Self, u64)> {
        let info = Vmcoreinfo::parse(text.as_bytes())?;
        let walker = Walker::new(overlay, &info)?;
        let stext = info.symbol("_stext").ok_or("no _stext")?.raw() & !0x1f_ffff;
        let image = (KernelVa::new(stext), KernelVa::new(stext + (64 << 20)));
        let symbols = Kallsyms::find(&walker, &info, image)?;
        let bounds = symbols
            .symbol("__start_BTF")?
            .zip(symbols.symbol("__stop_BTF")?);
        let btf = find_btf(&walker, bounds, image)?.ok_or("no BTF")?;
        let builder = Self {
            walker,
            symbols,
            info,
            btf,
            names: Vec::new(),
            numbers: BTreeMap::new(),
            records: BTreeMap::new(),
        };
        Ok((builder, stext))
    }

    fn name(&mut self, name: &str) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        self.names.push(name.to_owned());
        self.numbers.insert(name.to_owned(), self.names.len() - 1);
        self.names.len() - 1
    }

    fn put(&mut self, kind: Kind, name: &str, at: Gpa, len: usize) {
        let record = Record {
            at,
            len,
            name: self.name(name),
        };
        self.records.entry(at.raw()).or_insert((kind, record));
    }

    /// A word at a virtual address, and the entries of page tables that lead there.
    fn word(&mut self, kind: Kind, name: &str, va: u64, len: usize) -> Result<()> {
        let at = self.walker.gpa(va)?;
        self.put(kind, name, at, len);
        self.tables(name, va);
        Ok(())
    }

    fn tables(&mut self, name: &str, va: u64) {
        let Some((_, _, entries)) = self.walker.walk(va) else {
            return;
        };
        let what = match name.split(['.', '[']).next() {
            Some("page") => "of struct pages",
            Some("image") => "of the kernel's image",
            _ => "of other kernel data",
        };
        for (level, entry) in (1..).zip(entries.iter().rev()) {
            let name = format!("entry {what}, level {level} from the last");
            self.put(Kind::PageTable, &name, Gpa::new(*entry), 8);
        }
    }

    fn symbol(&self, name: &str) -> Result<Option<u64>> {
        let by_table = self.symbols.symbol(name)?;
        Ok(by_table.or(self.info.symbol(name)).map(KernelVa::raw))
    }

    fn need(&self, name: &str) -> Result<u64> {
        Ok(self.symbol(name)?.ok_or_else(|| format!("no {name}"))?)
    }

    fn offset(&self, ty: &str, member: &str) -> Result<Option<u64>> {
        Ok(self.btf.member(ty, member)?.map(|member| member.offset))
    }

    fn need_offset(&self, ty: &str, member: &str) -> Result<u64> {
        let offset = self.offset(ty, member)?;
        Ok(offset.ok_or_else(|| format!("no {ty}.{member}"))?)
    }

    fn u64(&self, va: u64) -> Result<u64> {
        Ok(self.walker.read_u64(KernelVa::new(va))?)
    }

    fn constant(&self, name: &str) -> Result<u64> {
        let value = self.btf.constant(name)?.ok_or("no constant")?;
        Ok(u64::try_from(value)?)
    }

    /// Every node's `struct pglist_data`.
    fn nodes(&mut self) -> Result<Vec<u64>> {
        if let Some(at) = self.symbols.symbol("contig_page_data")? {
            return Ok(vec![at.raw()]);
        }
        let array = self.need("node_data")?;
        let mut nodes = Vec::new();
        for number in 0..64 {
            let at = array + number * 8;
            let Ok(node) = self.u64(at) else { break };
            // Behind the array stands something else.
            if node == 0 || self.walker.walk(node).is_none() || node >> 47 != 0x1_ffff {
                break;
            }
            self.word(Kind::Other, "node_data", at, 8)?;
            nodes.push(node);
        }
        Ok(nodes)
    }

    fn cpus(&mut self) -> Result<Vec<u64>> {
        let array = self.need("__per_cpu_offset")?;
        let mask = self.u64(self.need("__cpu_possible_mask")?)?;
        self.word(
            Kind::Other,
            "__cpu_possible_mask",
            self.need("__cpu_possible_mask")?,
            8,
        )?;
        self.word(Kind::Other, "nr_cpu_ids", self.need("nr_cpu_ids")?, 4)?;
        let mut offsets = Vec::new();
        for cpu in (0..64).filter(|cpu| mask & 1 << cpu != 0) {
            let at = array + cpu * 8;
            offsets.push(self.u64(at)?);
            self.word(Kind::Other, "__per_cpu_offset", at, 8)?;
        }
        Ok(offsets)
    }

    fn zones(&mut self) -> Result<()> {
        let cpus = self.cpus()?;
        let nodes = self.nodes()?;
        let zones = self.need_offset("pglist_data", "node_zones")?;
        let size = self.btf.type_size("zone")?.ok_or("no struct zone")?;
        let bytes = self
            .btf
            .member("pglist_data", "node_zones")?
            .ok_or("none")?;
        let count = bytes.len.ok_or("no length")?;
        for node in nodes {
            for field in [
                "node_start_pfn",
                "node_present_pages",
                "node_spanned_pages",
                "first_deferred_pfn",
                "nr_zones",
            ] {
                if let Some(offset) = self.offset("pglist_data", field)? {
                    let len = if field == "nr_zones" { 4 } else { 8 };
                    self.word(
                        Kind::Zone,
                        &format!("pglist_data.{field}"),
                        node + offset,
                        len,
                    )?;
                }
            }
            for number in 0..count {
                let zone = node + zones + number * size;
                self.zone(zone, &cpus)?;
            }
        }
        Ok(())
    }

    fn zone(&mut self, zone: u64, cpus: &[u64]) -> Result<()> {
        let is_empty = self.u64(zone + self.need_offset("zone", "spanned_pages")?)? == 0;
        for field in [
            "spanned_pages",
            "zone_start_pfn",
            "present_pages",
            "present_early_pages",
            "managed_pages",
            "name",
            "per_cpu_pageset",
            "pageset",
            "per_cpu_zonestats",
            "nr_isolate_pageblock",
            "zone_pgdat",
            "pageblock_flags",
            "node",
        ] {
            if let Some(offset) = self.offset("zone", field)? {
                self.word(Kind::Zone, &format!("zone.{field}"), zone + offset, 8)?;
            }
        }
        if is_empty {
            return Ok(());
        }
        let stat = self.need_offset("zone", "vm_stat")?;
        for name in ["NR_FREE_PAGES", "NR_UNACCEPTED", "NR_FREE_CMA_PAGES"] {
            if let Ok(index) = self.constant(name) {
                let at = zone + stat + index * 8;
                self.word(Kind::Zone, &format!("zone.vm_stat[{name}]"), at, 8)?;
            }
        }
        let area = self.btf.member("zone", "free_area")?.ok_or("none")?;
        let orders = area.len.ok_or("none")?;
        let area_size = self.btf.type_size("free_area")?.ok_or("none")?;
        let nr_free = self.need_offset("free_area", "nr_free")?;
        let lists = self.btf.member("free_area", "free_list")?.ok_or("none")?;
        for order in 0..orders {
            let at = zone + area.offset + order * area_size;
            for list in 0..lists.len.ok_or("none")? {
                let head = at + lists.offset + list * 16;
                self.word(Kind::FreeList, "free_list.next", head, 8)?;
                self.word(Kind::FreeList, "free_list.prev", head + 8, 8)?;
            }
            self.word(Kind::Zone, "free_area.nr_free", at + nr_free, 8)?;
        }
        let pageset = match self.offset("zone", "per_cpu_pageset")? {
            Some(offset) => offset,
            None => self.need_offset("zone", "pageset")?,
        };
        let pageset = self.u64(zone + pageset)?;
        let inside = self.offset("per_cpu_pageset", "pcp")?.unwrap_or(0);
        let stats = match self.offset("zone", "per_cpu_zonestats")? {
            Some(offset) => self.u64(zone + offset)?,
            None => pageset,
        };
        let diff = match self.offset("per_cpu_zonestat", "vm_stat_diff")? {
            Some(offset) => offset,
            None => self.need_offset("per_cpu_pageset", "vm_stat_diff")?,
        };
        let free_pages = self.constant("NR_FREE_PAGES")?;
        for cpu in cpus {
            let pcp = pageset.wrapping_add(*cpu) + inside;
            let count = self.need_offset("per_cpu_pages", "count")?;
            self.word(Kind::PerCpuList, "per_cpu_pages.count", pcp + count, 4)?;
            let lists = self.btf.member("per_cpu_pages", "lists")?.ok_or("none")?;
            for list in 0..lists.len.ok_or("none")? {
                let head = pcp + lists.offset + list * 16;
                self.word(Kind::PerCpuList, "per_cpu_pages.lists.next", head, 8)?;
                self.word(Kind::PerCpuList, "per_cpu_pages.lists.prev", head + 8, 8)?;
            }
            let at = stats.wrapping_add(*cpu) + diff + free_pages;
            self.word(Kind::Zone, "vm_stat_diff[NR_FREE_PAGES]", at, 1)?;
        }
        Ok(())
    }

    /// The section words; returns the frames of each section and where its struct pages begin.
    fn sections(&mut self) -> Result<Vec<(u64, u64, u64)>> {
        let variable = self.need("mem_section")?;
        let size = self.btf.type_size("mem_section")?.ok_or("none")?;
        let usage = self.need_offset("mem_section", "usage")?;
        let map = self.offset("mem_section_usage", "subsection_map")?;
        self.word(Kind::MemSection, "mem_section", variable, 8)?;
        let roots = self.u64(variable)?;
        let highest = match self.symbol("__highest_present_section_nr")? {
            Some(at) => {
                self.word(Kind::MemSection, "__highest_present_section_nr", at, 8)?;
                self.u64(at)?
            }
            None => 32,
        };
        let per_root = 4096 / size;
        let mut found = Vec::new();
        for number in 0..=highest + 2 {
            let root_at = roots + number / per_root * 8;
            self.word(Kind::MemSection, "mem_section root", root_at, 8)?;
            let root = self.u64(root_at)?;
            if root == 0 {
                continue;
            }
            let at = root + number % per_root * size;
            self.word(Kind::MemSection, "section_mem_map", at, 8)?;
            self.word(Kind::MemSection, "mem_section.usage", at + usage, 8)?;
            let coded = self.u64(at)?;
            if let Some(map) = map
                && coded & 2 != 0
            {
                let usage = self.u64(at + usage)?;
                self.word(Kind::MemSection, "subsection_map", usage + map, 8)?;
            }
            if coded & 2 != 0 {
                found.push((number << 15, 1 << 15, coded & !0xfff));
            }
        }
        Ok(found)
    }

    fn vmcoreinfo(&mut self, at: Gpa) {
        let text = self.info.text().to_owned();
        let mut offset = 0;
        for line in text.split_inclusive('\n') {
            let key = line.split('=').next().unwrap_or_default().to_owned();
            // Lines of the crash command's that no name of ours begins with are one kind.
            for (index, _) in line.bytes().enumerate() {
                let at = Gpa::new(at.raw() + offset + index as u64);
                self.put(Kind::Vmcoreinfo, &key, at, 1);
            }
            offset += line.len() as u64;
        }
    }

    /// A range at a virtual address, as runs in guest-physical memory.
    fn runs(&self, va: u64, len: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let mut done = 0;
        while done < len {
            let Some((at, mapped, _)) = self.walker.walk(va + done) else {
                break;
            };
            let step = mapped.min(len - done);
            runs.push((at, step));
            done += step;
        }
        runs
    }

    fn btf_records(&mut self) -> Result<Vec<(u64, u64)>> {
        let (start, stop) = (self.need("__start_BTF")?, self.need("__stop_BTF")?);
        let mut blob = vec![0; usize::try_from(stop - start)?];
        self.walker.read(KernelVa::new(start), &mut blob)?;
        for (name, offset, len) in btf_places(&blob)? {
            let at = self.walker.gpa(start + offset as u64)?;
            self.put(Kind::Btf, &name, at, len);
        }
        Ok(self.runs(start, stop - start))
    }

    fn kallsyms_records(&mut self) -> Result<()> {
        // What VMCOREINFO names (since 6.0).
        for (name, len) in [
            ("num_syms", 4),
            ("relative_base", 8),
            ("token_table", 1000),
            ("token_index", 512),
            ("offsets", 0),
            ("names", 0),
        ] {
            let Some(at) = self.info.symbol(&format!("kallsyms_{name}")) else {
                continue;
            };
            let step = if len > 8 { 1 } else { len };
            for offset in (0..len).step_by(step.max(1)) {
                let name = format!("kallsyms_{name}");
                self.word(Kind::Kallsyms, &name, at.raw() + offset as u64, step)?;
            }
            self.tables("image", at.raw());
        }
        Ok(())
    }

    /// The place of the offset of each symbol that the library asks for.
    fn kallsyms_offsets(&mut self) -> Result<()> {
        let Some(table) = self.info.symbol("kallsyms_offsets") else {
            return Ok(());
        };
        let count_at = self.info.symbol("kallsyms_num_syms").ok_or("none")?;
        let count = self.walker.read_u32(count_at)?;
        let mut offsets = vec![0; usize::try_from(count)? * 4];
        self.walker.read(table, &mut offsets)?;
        let base = match self.info.symbol("kallsyms_relative_base") {
            Some(at) => Some(self.u64(at.raw())?),
            None => None,
        };
        let mut by_address: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (number, raw) in offsets.chunks_exact(4).enumerate() {
            let raw = i32::from_le_bytes(raw.try_into()?);
            let at = match base {
                Some(base) if raw < 0 => base
                    .wrapping_sub(1)
                    .wrapping_add((-i64::from(raw)).cast_unsigned()),
                Some(_) => u64::from(raw.cast_unsigned()),
                None => table
                    .raw()
                    .wrapping_add(number as u64 * 4)
                    .wrapping_add(i64::from(raw).cast_unsigned()),
            };
            by_address.entry(at).or_default().push(number);
            if let Some(base) = base {
                let at = base.wrapping_add(u64::from(raw.cast_unsigned()));
                by_address.entry(at).or_default().push(number);
            }
        }
        for name in ASKED {
            let Some(at) = self.symbols.symbol(name)? else {
                continue;
            };
            for number in by_address.get(&at.raw()).cloned().unwrap_or_default() {
                let at = table.raw() + number as u64 * 4;
                self.word(Kind::Kallsyms, &format!("offset of {name}"), at, 4)?;
            }
        }
        Ok(())
    }
}

/// Symbols that decide where records are.
const ASKED: [&str; 24] = [
    "memory_blocks",
    "sections_per_block",
    "__cpu_possible_mask",
    "__per_cpu_offset",
    "__start_BTF",
    "__stop_BTF",
    "_page_poisoning_enabled",
    "_stext",
    "contig_page_data",
    "init_on_free",
    "init_uts_ns",
    "linux_banner",
    "mem_section",
    "node_data",
    "nr_cpu_ids",
    "nr_node_ids",
    "swapper_pg_dir",
    "page_offset_base",
    "vmemmap_base",
    "__highest_present_section_nr",
    "balloon_page_list",
    "init_task",
    "e820_table",
    "iomem_resource",
];

/// The structures whose every member is mutated: those that are asked for.
const TYPES: [&str; 22] = [
    "xarray",
    "xa_node",
    "virtio_device",
    "page",
    "folio",
    "zone",
    "free_area",
    "list_head",
    "per_cpu_pages",
    "per_cpu_pageset",
    "per_cpu_zonestat",
    "pglist_data",
    "mem_section",
    "mem_section_usage",
    "e820_table",
    "e820_entry",
    "resource",
    "lruvec",
    "balloon_dev_info",
    "virtio_balloon",
    "virtio_mem",
    "memory_block",
];

/// Beginnings of the names of enumerators that are mutated.
const ENUMERATORS: [&str; 27] = [
    "MEM_OFFLINE",
    "PGTY_",
    "PG_lru",
    "PG_dirty",
    "PG_writeback",
    "PG_uptodate",
    "PG_locked",
    "PG_private",
    "PG_swapbacked",
    "PG_reserved",
    "PG_head",
    "PG_slab",
    "PG_hwpoison",
    "PG_hugetlb",
    "PG_buddy",
    "PG_offline",
    "__NR_PAGEFLAGS",
    "NR_FREE_PAGES",
    "NR_UNACCEPTED",
    "MIGRATE_ISOLATE",
    "MIGRATE_PCPTYPES",
    "MIGRATE_TYPES",
    "SECTION_",
    "HUGETLB_PAGE_DTOR",
    "MAX_NR_ZONES",
    "ZONE_",
    "NR_LRU_LISTS",
];

/// Places in BTF that say something of the allocator, and every byte of the header.
fn btf_places(blob: &[u8]) -> Result<Vec<(String, usize, usize)>> {
    let mut btf = BtfPlaces::new(blob)?;
    let starts = btf.starts()?;
    let wanted = btf.enumerators_and_wanted(&starts)?;
    btf.structures(&starts, wanted)?;
    btf.strings();
    Ok(btf.places)
}

/// The places that were found so far, and the blob in which they are looked for.
struct BtfPlaces<'a> {
    blob: &'a [u8],
    strings: usize,
    places: Vec<(String, usize, usize)>,
    /// Offsets of names.
    names: BTreeSet<usize>,
}

impl<'a> BtfPlaces<'a> {
    fn new(blob: &'a [u8]) -> Result<Self> {
        let mut this = Self {
            blob,
            strings: 0,
            places: (0..24).map(|at| ("header".into(), at, 1)).collect(),
            names: BTreeSet::new(),
        };
        this.strings = this.word(4)? + this.word(16)?;
        Ok(this)
    }

    fn word(&self, at: usize) -> Result<usize> {
        let bytes = self.blob.get(at..at + 4).ok_or("cut off")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    }

    fn text(&self, offset: usize) -> String {
        let tail = self.blob.get(self.strings + offset..).unwrap_or_default();
        let len = tail.iter().position(|byte| *byte == 0).unwrap_or(0);
        String::from_utf8_lossy(&tail[..len]).into_owned()
    }

    /// The beginning of each type, by its number.
    fn starts(&self) -> Result<Vec<usize>> {
        let (types, types_len) = (self.word(4)? + self.word(8)?, self.word(12)?);
        let mut starts = vec![0];
        let mut at = types;
        while at < types + types_len {
            starts.push(at);
            let info = self.word(at + 4)?;
            let (kind, vlen) = (info >> 24 & 0x1f, info & 0xffff);
            at += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    4 | 5 | 15 | 19 => vlen * 12,
                    6 | 13 => vlen * 8,
                    _ => 0,
                };
        }
        Ok(starts)
    }

    /// Adds the enumerators, and returns where the structures are.
    fn enumerators_and_wanted(&mut self, starts: &[usize]) -> Result<Vec<(usize, String)>> {
        let mut wanted: Vec<(usize, String)> = Vec::new();
        for start in &starts[1..] {
            let kind = self.word(start + 4)? >> 24 & 0x1f;
            let name = self.text(self.word(*start)?);
            if matches!(kind, 4 | 5) && TYPES.contains(&name.as_str()) {
                wanted.push((*start, name));
            } else if matches!(kind, 6 | 19) {
                let step = if kind == 6 { 8 } else { 12 };
                for number in 0..self.word(start + 4)? & 0xffff {
                    let entry = start + 12 + number * step;
                    let name = self.text(self.word(entry)?);
                    if ENUMERATORS.iter().any(|begin| name.starts_with(begin)) {
                        let places = &mut self.places;
                        places.push((format!("enumerator {name}, name"), entry, 4));
                        places.push((format!("enumerator {name}"), entry + 4, step - 4));
                        let name = self.word(entry)?;
                        self.names.insert(name);
                    }
                }
            }
        }
        Ok(wanted)
    }

    /// Adds the structures with their members, and those without a name inside.
    fn structures(&mut self, starts: &[usize], mut wanted: Vec<(usize, String)>) -> Result<()> {
        let mut seen = BTreeSet::new();
        while let Some((start, name)) = wanted.pop() {
            if !seen.insert(start) {
                continue;
            }
            let places = &mut self.places;
            places.push((format!("struct {name}, name"), start, 4));
            places.push((format!("struct {name}, info"), start + 4, 4));
            places.push((format!("struct {name}, size"), start + 8, 4));
            let own = self.word(start)?;
            self.names.insert(own);
            for number in 0..self.word(start + 4)? & 0xffff {
                let member = start + 12 + number * 12;
                let of = format!("{name}.{}", self.text(self.word(member)?));
                let places = &mut self.places;
                places.push((format!("{of}, name"), member, 4));
                places.push((format!("{of}, type"), member + 4, 4));
                places.push((format!("{of}, offset"), member + 8, 4));
                let own = self.word(member)?;
                self.names.insert(own);
                // The type of the member: arrays, and structures without a name.
                let id = self.word(member + 4)?;
                let Some(inner) = starts.get(id).copied().filter(|_| id != 0) else {
                    continue;
                };
                match self.word(inner + 4)? >> 24 & 0x1f {
                    3 => self.places.push((format!("{of}, length"), inner + 20, 4)),
                    4 | 5 if self.word(inner)? == 0 => wanted.push((inner, name.clone())),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Adds every byte of the names.
    fn strings(&mut self) {
        self.names.remove(&0);
        for offset in core::mem::take(&mut self.names) {
            let name = self.text(offset);
            for (index, _) in name.bytes().enumerate() {
                let at = self.strings + offset + index;
                self.places.push((format!("string {name}"), at, 1));
            }
        }
    }
}

impl Anatomy {
    pub fn new(capture: &Capture, options: &GuestOptions) -> Result<Self> {
        let traced = Overlay::traced(capture);
        let guest = LinuxGuest::open(&traced, options)?;
        let by_open = traced.take_reads();
        guest.classify(OnInconsistency::Refuse)?;
        let by_classify = traced.take_reads();
        let text = guest.vmcoreinfo().ok_or("no VMCOREINFO")?.to_owned();
        let at = capture
            .find_page(text.as_bytes())
            .ok_or("no VMCOREINFO page")?;
        let overlay = Overlay::new(capture);
        let (mut builder, stext) = Builder::of(&overlay, &text)?;
        builder.vmcoreinfo(at);
        builder.zones()?;
        let sections = builder.sections()?;
        let btf_runs = builder.btf_records()?;
        builder.kallsyms_offsets()?;
        builder.kallsyms_records()?;
        // As far as the image is mapped: what finding its end and its tables walks.
        for va in (stext..stext + (64 << 20)).step_by(4096) {
            builder.tables("image", va);
        }
        let size = builder.btf.type_size("page")?.ok_or("no struct page")?;
        let pages = builder.struct_pages(&sections, size);
        let fields = builder.fields()?;
        let types = builder.types()?;
        builder.traced(&by_classify, &pages, size);
        builder.traced(&by_open, &pages, size);
        let (ranges, read_by_open) = ranges(&by_open, &btf_runs);
        let mut records: BTreeMap<Kind, Vec<Record>> = BTreeMap::new();
        for (kind, record) in builder.records.into_values() {
            records.entry(kind).or_default().push(record);
        }
        Ok(Self {
            records,
            names: builder.names,
            pages,
            struct_page_size: size,
            fields,
            types,
            sections: sections
                .iter()
                .map(|(first, _, base)| (*first, *base))
                .collect(),
            ranges,
            read_by_open,
        })
    }

    /// Whether opening the guest reads one of the `len` bytes from `at`.
    pub fn is_read_by_open(&self, at: Gpa, len: usize) -> bool {
        let end = at.raw() + len as u64;
        let before = self.read_by_open.partition_point(|(start, _)| *start < end);
        before
            .checked_sub(1)
            .and_then(|index| self.read_by_open.get(index))
            .is_some_and(|(start, len)| start + len > at.raw())
    }
}

/// The beginning and the length of each.
type Ranges = Vec<(u64, u64)>;

/// The longer ranges that opening the guest reads, without BTF; and all that it reads.
fn ranges(by_open: &Reads, btf_runs: &[(u64, u64)]) -> (Ranges, Ranges) {
    let is_btf = |at: u64| {
        let mut runs = btf_runs.iter();
        runs.any(|(start, len)| at.wrapping_sub(*start) < *len)
    };
    let reads = || by_open.reads.iter().filter(|(_, len)| **len < 2 << 20);
    let long = reads().filter(|(_, len)| **len > 16);
    let ranges: Vec<_> = long
        .map(|(at, len)| (*at, *len as u64))
        .filter(|(at, _)| !is_btf(*at))
        .collect();
    let mut all = btf_runs.to_vec();
    all.extend(reads().map(|(at, len)| (*at, *len as u64)));
    all.sort_unstable();
    (joined(&ranges), joined(&all))
}

fn joined(sorted: &[(u64, u64)]) -> Ranges {
    let mut runs = Ranges::new();
    for (start, len) in sorted {
        match runs.last_mut() {
            Some((first, run)) if *start <= *first + *run => {
                *run = (*run).max(start + len - *first);
            }
            _ => runs.push((*start, *len)),
        }
    }
    runs
}

impl Builder<'_> {
    /// The frames of `sections` that have a struct page of `size` bytes, and where it is.
    fn struct_pages(&mut self, sections: &[(u64, u64, u64)], size: u64) -> Vec<(u64, Gpa)> {
        let mut pages = Vec::new();
        for (first, count, base) in sections {
            for number in 0..*count {
                let va = base.wrapping_add((first + number) * size);
                let Ok(at) = self.walker.gpa(va) else {
                    break;
                };
                if number % 512 == 0 {
                    self.tables("page", va);
                }
                pages.push((first + number, at));
            }
        }
        pages
    }

    fn fields(&self) -> Result<Vec<Field>> {
        let mut fields = Vec::new();
        for (name, len) in [
            ("flags", 8),
            ("lru.next", 8),
            ("lru.prev", 8),
            ("mapping", 8),
            ("index", 8),
            ("private", 8),
            ("_mapcount", 4),
            ("_refcount", 4),
            ("memcg_data", 8),
        ] {
            if let Some(offset) = self.offset("page", name)? {
                fields.push(Field { name, offset, len });
            }
        }
        Ok(fields)
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "VMCOREINFO prints a 32-bit word as a signed number"
    )]
    fn types(&self) -> Result<Vec<u32>> {
        let mut types = Vec::new();
        for name in ["BUDDY", "OFFLINE", "SLAB", "HUGETLB", "TABLE"] {
            let lower = name.to_lowercase();
            if let Some(ty) = self.btf.constant(&format!("PGTY_{lower}"))? {
                types.push((ty as u32) << 24);
                types.push((ty as u32) << 24 | 0xff_ffff);
            } else if let Some(ty) = self.info.number(&format!("PAGE_{name}_MAPCOUNT_VALUE")) {
                types.push(ty as u32);
            }
        }
        Ok(types)
    }

    /// Words that were read and are none of those above.
    fn traced(&mut self, reads: &Reads, pages: &[(u64, Gpa)], size: u64) {
        let mut places: Vec<u64> = pages.iter().map(|(_, at)| at.raw()).collect();
        places.sort_unstable();
        let is_page = |at: u64| {
            let above = places.partition_point(|start| *start <= at);
            above
                .checked_sub(1)
                .and_then(|index| places.get(index))
                .is_some_and(|start| at - start < size)
        };
        let tables: BTreeSet<u64> = self
            .records
            .values()
            .filter(|(kind, _)| *kind == Kind::PageTable)
            .map(|(_, record)| record.at.raw() >> 12)
            .collect();
        for (at, len) in &reads.reads {
            if *len > 16 || is_page(*at) {
                continue;
            }
            let (kind, name) = if tables.contains(&(at >> 12)) {
                (Kind::PageTable, "another entry")
            } else {
                (Kind::Other, "another word")
            };
            self.put(kind, name, Gpa::new(*at), *len);
        }
    }
}
