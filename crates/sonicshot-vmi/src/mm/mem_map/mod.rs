//! The address of the `struct page` of each frame: `mem_section`, `vmemmap`, `mem_map`.
//!
//! Sources: `include/linux/mmzone.h` (`struct mem_section`, `section_mem_map`),
//! `mm/sparse.c`, `include/asm-generic/memory_model.h`.

mod arrays;
mod flat;
mod section;
mod sparse;

use crate::deadline::Deadline;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{AddressSpace, KernelVa};
use core::sync::atomic::{AtomicU32, Ordering};
pub(crate) use section::{Section, Span};
use sonicshot::{
    Gpa, GpaRange, GuestBytes, GuestMemory, MAX_MAP, Mapped, MemoryError, PageSize, Pfn, PfnRange,
    to_u64,
};

/// `struct page` is 64 bytes almost everywhere; debugging options may add a few words.
const MAX_PAGE_STRUCT: u64 = 256;

/// A range of struct pages that is contiguous in guest-physical memory too.
struct Chunk<'m> {
    at: KernelVa,
    len: u64,
    gpa: Gpa,
    mapped: Option<Mapped<'m>>,
}

impl Chunk<'_> {
    /// Whether `len` more bytes at `at`, which lie at `gpa`, can be mapped with these.
    fn goes_on(&self, at: KernelVa, gpa: Gpa, len: u64) -> bool {
        let whole = self.len.checked_add(len);
        self.at.checked_add(self.len) == Some(at)
            && self.gpa.checked_add(self.len) == Some(gpa)
            && whole.is_some_and(|whole| whole <= to_u64(MAX_MAP))
    }
}

/// The kernel's `struct page`s.
pub(crate) struct MemMap<'m> {
    memory: &'m dyn GuestMemory,
    pub(crate) page_size: PageSize,
    /// The size of `struct page`.
    pub(crate) stride: u64,
    /// Sorted by frame, disjoint.
    spans: Vec<Span>,
    /// Lowest first; none with `FLATMEM`, which has no sections.
    sections: Vec<Section>,
    /// Indexes of `spans`, sorted by virtual address.
    by_va: Vec<Span>,
    /// Sorted by virtual address.
    chunks: Vec<Chunk<'m>>,
    /// The layout of the kernel's struct pages, for reports.
    pub(crate) model: &'static str,
    /// Single reads since the mappings were last let go.
    reads: AtomicU32,
}

/// Each single read of a mapped file may bring in 64 KiB around it: after so many, what is mapped
/// is let go, or a walk of scattered lists would keep all struct pages resident.
const READS_BETWEEN_RELEASES: u32 = 1024;

impl<'m> MemMap<'m> {
    /// Finds the struct pages of all RAM that the kernel knows, also of such that is not in the
    /// memory's layout: the free lists go through it.
    pub(crate) fn new(kernel: &Kernel<'m>) -> Result<Self, VmiError> {
        let page_size = kernel.build.page_size;
        let stride = kernel.need_type_size("page")?;
        if !(32..=MAX_PAGE_STRUCT).contains(&stride) || !stride.is_multiple_of(8) {
            return Err(VmiError::Unsupported {
                what: format!("struct page of {stride} bytes"),
            });
        }
        let (spans, sections, model) = if kernel.type_size("mem_section")?.is_some() {
            let found = sparse::find(kernel, stride)?;
            (found.spans, found.sections, "SPARSEMEM")
        } else {
            (flat::find(kernel, stride)?, Vec::new(), "FLATMEM")
        };
        if spans.is_empty() {
            return Err(VmiError::Unsupported {
                what: "a kernel without struct pages for any of the guest's RAM".into(),
            });
        }
        let mut by_va = spans.clone();
        by_va.sort_unstable_by_key(|span| span.at);
        let mut map = Self {
            memory: kernel.space.memory(),
            page_size,
            stride,
            spans,
            sections,
            by_va,
            chunks: Vec::new(),
            model,
            reads: AtomicU32::new(0),
        };
        map.find_chunks(&kernel.space)?;
        Ok(map)
    }

    /// The struct pages of all RAM in an array that begins at `vmemmap`, as far as the page tables
    /// map it. How much RAM there is the file says.
    pub(crate) fn by_vmemmap(
        space: &AddressSpace<'m>,
        page_size: PageSize,
        stride: u64,
        vmemmap: KernelVa,
        deadline: &Deadline,
    ) -> Result<Self, VmiError> {
        let memory = space.memory();
        let mut spans: Vec<Span> = Vec::new();
        let mut steps = 0_u64;
        for region in memory.layout().frames(page_size) {
            let mut pfn = region.start();
            while let Some(left) = region.end().offset_from(pfn).filter(|left| *left > 0) {
                VmiError::count("pages of struct pages", &mut steps, 1)?;
                if steps.is_multiple_of(1 << 12) {
                    let last = memory.layout().end().pfn(page_size);
                    let what = "frames whose struct pages may be mapped";
                    deadline.check(what, pfn.raw(), last.raw())?;
                }
                let corrupt = || VmiError::Corrupt {
                    what: "the struct page array",
                    at: vmemmap,
                    value: pfn.raw(),
                };
                let at = element("vmemmap", vmemmap, pfn.raw(), stride, 0)?;
                let there = space.translate(at).ok();
                // What is not mapped is missing in whole pages.
                let len = there.map_or_else(|| page_size.left_in_page(at.raw()), |there| there.len);
                let frames = len
                    .checked_div(stride)
                    .filter(|n| *n > 0)
                    .ok_or_else(corrupt)?;
                let frames = PfnRange::with_len(pfn, frames.min(left)).ok_or_else(corrupt)?;
                if there.is_some() {
                    let span = Span {
                        frames,
                        at,
                        online: true,
                        early: true,
                    };
                    // All is one array: frames that follow each other do so in it, too.
                    match spans.last_mut() {
                        Some(last) if last.frames.end() == pfn => {
                            last.frames = PfnRange::new(last.frames.start(), frames.end());
                        }
                        _ => spans.push(span),
                    }
                }
                pfn = frames.end();
            }
        }
        let mut map = Self {
            memory,
            page_size,
            stride,
            by_va: spans.clone(),
            spans,
            sections: Vec::new(),
            chunks: Vec::new(),
            model: "SPARSEMEM_VMEMMAP",
            reads: AtomicU32::new(0),
        };
        map.find_chunks(space)?;
        Ok(map)
    }

    /// Resolves every span to guest-physical memory once; page tables are not walked again.
    fn find_chunks(&mut self, space: &AddressSpace<'m>) -> Result<(), VmiError> {
        let mut chunks: Vec<Chunk<'m>> = Vec::new();
        for span in &self.by_va {
            let len = span.frames.len().checked_mul(self.stride);
            let end = len
                .and_then(|len| span.at.checked_add(len))
                .ok_or(VmiError::Corrupt {
                    what: "a span of struct pages",
                    at: span.at,
                    value: span.frames.len(),
                })?;
            let mut at = span.at;
            while let Some(left) = end.offset_from(at).filter(|left| *left > 0) {
                let there = space
                    .translate(at)
                    .map_err(VmiError::read("the struct page array"))?;
                let len = there.len.min(left);
                match chunks.last_mut() {
                    Some(last) if last.goes_on(at, there.at, len) => {
                        VmiError::count("bytes of struct pages", &mut last.len, len)?;
                    }
                    _ => chunks.push(Chunk {
                        at,
                        len,
                        gpa: there.at,
                        mapped: None,
                    }),
                }
                at = at.checked_add(len).ok_or(VmiError::Corrupt {
                    what: "a span of struct pages",
                    at,
                    value: len,
                })?;
            }
        }
        for mut chunk in chunks {
            let len = usize::try_from(chunk.len).unwrap_or(MAX_MAP);
            match self.memory.map(chunk.gpa, len) {
                Ok(mapped) => chunk.mapped = mapped,
                // Struct pages in memory that the dump does not have: nothing is read there.
                Err(MemoryError::NotRam { .. }) => continue,
                Err(error) => return Err(error.into()),
            }
            self.chunks.push(chunk);
        }
        Ok(())
    }

    /// The runs of frames that have struct pages, lowest first.
    pub(crate) fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The sections that have struct pages, lowest first.
    pub(crate) fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The guest-physical memory that the struct pages themselves occupy.
    pub(crate) fn own_memory(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.chunks
            .iter()
            .filter_map(|chunk| GpaRange::with_len(chunk.gpa, chunk.len))
    }

    /// The size of `struct page`, as a length.
    pub(crate) fn stride_len(&self) -> Result<usize, VmiError> {
        usize::try_from(self.stride).map_err(|_| VmiError::Unsupported {
            what: format!("struct page of {} bytes", self.stride),
        })
    }

    /// The size of so many struct pages, in bytes.
    fn bytes_of(&self, pages: u64) -> Option<usize> {
        usize::try_from(pages.checked_mul(self.stride)?).ok()
    }

    /// The address of the `struct page` of `pfn`.
    pub(crate) fn page_va(&self, pfn: Pfn) -> Option<KernelVa> {
        let above = self
            .spans
            .partition_point(|span| span.frames.start() <= pfn);
        let span = self.spans.get(above.checked_sub(1)?)?;
        if !span.frames.contains(pfn) {
            return None;
        }
        let offset = pfn
            .offset_from(span.frames.start())?
            .checked_mul(self.stride)?;
        span.at.checked_add(offset)
    }

    /// The frame whose `struct page` is at `at`.
    pub(crate) fn frame_of(&self, at: KernelVa) -> Option<Pfn> {
        let above = self.by_va.partition_point(|span| span.at <= at);
        let span = self.by_va.get(above.checked_sub(1)?)?;
        let offset = at.offset_from(span.at)?;
        if !offset.is_multiple_of(self.stride) {
            return None;
        }
        let pfn = span
            .frames
            .start()
            .checked_add(offset.checked_div(self.stride)?)?;
        span.frames.contains(pfn).then_some(pfn)
    }

    fn chunk_of(&self, at: KernelVa) -> Option<(&Chunk<'m>, u64)> {
        let above = self.chunks.partition_point(|chunk| chunk.at <= at);
        let chunk = self.chunks.get(above.checked_sub(1)?)?;
        let offset = at.offset_from(chunk.at)?;
        (offset < chunk.len).then_some((chunk, offset))
    }

    /// Whether `at` lies in the array of struct pages.
    pub(crate) fn holds(&self, at: KernelVa) -> bool {
        self.chunk_of(at).is_some()
    }

    /// The `u64` at `at`, which lies in the array of struct pages.
    pub(crate) fn u64_at(&self, at: KernelVa) -> Result<u64, VmiError> {
        let corrupt = || VmiError::Corrupt {
            what: "a pointer into the struct pages",
            at,
            value: at.raw(),
        };
        self.count_read();
        let (chunk, offset) = self.chunk_of(at).ok_or_else(corrupt)?;
        if let Some(value) = chunk
            .mapped
            .as_ref()
            .and_then(|mapped| mapped.bytes().u64_at(usize::try_from(offset).ok()?))
        {
            return Ok(value);
        }
        let gpa = chunk.gpa.checked_add(offset).ok_or_else(corrupt)?;
        Ok(self.memory.read_u64(gpa)?)
    }

    /// Lets go what is mapped, every so many reads.
    fn count_read(&self) {
        if self.reads.fetch_add(1, Ordering::Relaxed) >= READS_BETWEEN_RELEASES {
            self.reads.store(0, Ordering::Relaxed);
            for range in self.own_memory() {
                self.memory.release(range);
            }
        }
    }

    /// Copies the `struct page` at `at`, and those behind it, into `buf`, which has the size of so
    /// many.
    pub(crate) fn copy_pages(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VmiError> {
        self.count_read();
        let mut done = 0_u64;
        let mut rest = buf;
        // They may straddle chunks.
        while !rest.is_empty() {
            let corrupt = || VmiError::Corrupt {
                what: "a struct page",
                at,
                value: done,
            };
            let here = at.checked_add(done).ok_or_else(corrupt)?;
            let (chunk, offset) = self.chunk_of(here).ok_or_else(corrupt)?;
            let left = chunk.len.checked_sub(offset).ok_or_else(corrupt)?;
            let len = left.min(to_u64(rest.len()));
            let (part, more) = usize::try_from(len)
                .ok()
                .and_then(|len| rest.split_at_mut_checked(len))
                .ok_or_else(corrupt)?;
            let mapped = chunk.mapped.as_ref().and_then(|mapped| {
                let bytes = mapped.bytes();
                bytes.get(usize::try_from(offset).ok()?, part.len())
            });
            if !mapped.is_some_and(|there| there.copy_to(part)) {
                let gpa = chunk.gpa.checked_add(offset).ok_or_else(corrupt)?;
                self.memory.read(gpa, part)?;
            }
            rest = more;
            done = done.checked_add(len).ok_or(VmiError::Corrupt {
                what: "a struct page",
                at,
                value: len,
            })?;
        }
        Ok(())
    }

    /// Calls `visit` for every range of struct pages in `span`, in order of frames, with the
    /// first frame and the bytes of whole struct pages.
    pub(crate) fn visit_span(
        &self,
        span: &Span,
        visit: &mut dyn FnMut(Pfn, GuestBytes<'_>) -> Result<(), VmiError>,
    ) -> Result<(), VmiError> {
        let corrupt = |at: KernelVa| VmiError::Corrupt {
            what: "the struct page array",
            at,
            value: span.frames.start().raw(),
        };
        let mut pfn = span.frames.start();
        let mut buffer: Vec<u8> = Vec::new();
        while let Some(left) = span.frames.end().offset_from(pfn).filter(|n| *n > 0) {
            let at = self.page_va(pfn).ok_or_else(|| corrupt(span.at))?;
            let (chunk, offset) = self.chunk_of(at).ok_or_else(|| corrupt(at))?;
            let whole = chunk
                .len
                .checked_sub(offset)
                .and_then(|len| len.checked_div(self.stride))
                .ok_or_else(|| corrupt(at))?
                .min(left);
            let pages;
            if whole == 0 {
                // This one straddles two chunks.
                pages = 1;
                buffer.resize(self.stride_len()?, 0);
                self.copy_pages(at, &mut buffer)?;
                visit(pfn, GuestBytes::from_slice(&buffer))?;
            } else if let Some(mapped) = &chunk.mapped {
                pages = whole;
                let bytes = usize::try_from(offset)
                    .ok()
                    .zip(self.bytes_of(whole))
                    .and_then(|(offset, len)| mapped.bytes().get(offset, len))
                    .ok_or_else(|| corrupt(at))?;
                visit(pfn, bytes)?;
                // Other threads may be at other parts of the chunk.
                let seen = chunk.gpa.checked_add(offset);
                if let Some(range) = seen.and_then(|at| GpaRange::with_len(at, to_u64(bytes.len())))
                {
                    self.memory.release(range);
                }
            } else {
                // 2 MiB at a time: 32,768 frames of 64-byte struct pages.
                let at_once = (2_u64 << 20).checked_div(self.stride);
                pages = at_once.ok_or_else(|| corrupt(at))?.min(whole);
                let len = self.bytes_of(pages).ok_or_else(|| corrupt(at))?;
                buffer.resize(len, 0);
                let gpa = chunk.gpa.checked_add(offset).ok_or_else(|| corrupt(at))?;
                self.memory.read(gpa, &mut buffer)?;
                visit(pfn, GuestBytes::from_slice(&buffer))?;
            }
            pfn = pfn.checked_add(pages).ok_or_else(|| corrupt(at))?;
        }
        Ok(())
    }
}

impl core::fmt::Debug for MemMap<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MemMap")
            .field("model", &self.model)
            .field("spans", &self.spans)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{Chunk, MAX_MAP, MAX_PAGE_STRUCT, MemMap};
    use crate::KernelVa;
    use crate::VmiError;
    use crate::deadline::Deadline;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel, tables};
    use sonicshot::{
        Gpa, GpaRange, GuestMemory, MappedRegions, MemoryError, PageSize, Pfn, RamLayout,
    };
    use std::time::Duration;

    #[test]
    fn a_struct_page_is_no_longer_than_any() {
        for (size, is_taken) in [
            (24, false),
            (32, true),
            (MAX_PAGE_STRUCT, true),
            (MAX_PAGE_STRUCT + 8, false),
            (60, false),
        ] {
            let mut facts = Facts::default();
            facts.sizes.insert("page", size);
            let ram = Ram::new(8 << 20);
            let memory = ram.memory();
            let error = MemMap::new(&kernel(&memory, facts)).err().unwrap();
            let refused = error
                .to_string()
                .contains(&format!("struct page of {size} bytes"));
            assert_eq!(!refused, is_taken, "{error}");
        }
    }

    const MIB: usize = 1 << 20;

    /// Frames, where their struct pages are, and whether they are online.
    fn spans(ram: &Ram, facts: Facts) -> Vec<(u64, u64, u64, bool)> {
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        let map = MemMap::new(&kernel).unwrap();
        for span in map.spans() {
            for pfn in [span.frames.start().raw(), span.frames.end().raw() - 1] {
                let at = map.page_va(Pfn::new(pfn)).unwrap();
                assert_eq!(map.frame_of(at), Some(Pfn::new(pfn)));
                assert_eq!(map.frame_of(KernelVa::new(at.raw() + 8)), None);
            }
        }
        map.spans()
            .iter()
            .map(|s| {
                (
                    s.frames.start().raw(),
                    s.frames.len(),
                    s.at.raw() - DIRECT_MAP,
                    s.online,
                )
            })
            .collect()
    }

    /// A file that says it has this much RAM, of which the first has something.
    struct Claims<'a>(MappedRegions<'a>, RamLayout);

    impl GuestMemory for Claims<'_> {
        fn layout(&self) -> &RamLayout {
            &self.1
        }
        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            self.0.read(at, buf)
        }
    }

    #[test]
    fn struct_pages_of_claimed_ram_are_looked_for_so_long() {
        let ram = Ram::new(8 * MIB);
        let found = |claimed: u64, deadline: Duration| {
            let layout = RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(claimed))]);
            let memory = Claims(ram.memory(), layout.unwrap());
            let space = tables(8 * MIB as u64).space(&memory).unwrap();
            let vmemmap = KernelVa::new(0xffff_ea00_0000_0000);
            let deadline = Deadline::within(deadline);
            MemMap::by_vmemmap(&space, PageSize::SIZE_4K, 64, vmemmap, &deadline).map(|_| ())
        };
        let over = Duration::ZERO;
        assert!(found(1 << 23, over).is_ok());
        assert!(found(1 << 33, Duration::from_secs(60)).is_ok());
        let error = found(1 << 50, over).unwrap_err();
        assert!(matches!(error, VmiError::OutOfTime { .. }), "{error}");
    }

    fn refused(ram: &Ram, facts: Facts) -> String {
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        MemMap::new(&kernel).unwrap_err().to_string()
    }

    /// One bit in the address of a section's struct pages gives each frame another's.
    #[test]
    fn arrays_that_are_not_where_vmemmap_begins_are_refused() {
        let mut ram = Ram::new(64 * MIB);
        ram.put(0x1000, DIRECT_MAP + 0x2000);
        ram.put(0x2000, DIRECT_MAP + 0x3000);
        ram.put(0x5000, DIRECT_MAP + 0x10_0000);
        let mut facts = sparse();
        facts.symbols.insert("mem_section", DIRECT_MAP + 0x1000);
        facts.symbols.insert("vmemmap_base", DIRECT_MAP + 0x5000);
        ram.put(0x3000, coded(0x10_0000, 0, 0b111));
        assert_eq!(spans(&ram, facts.clone()).len(), 1);
        ram.put(0x3000, coded(0x10_1000, 0, 0b111));
        assert!(refused(&ram, facts.clone()).contains("where the struct pages are"));
        // With no such variable, one section of several.
        facts.symbols.remove("vmemmap_base");
        for section in [0_u64, 2, 3] {
            ram.put(
                0x3000 + section * 16,
                coded(0x10_0000 + section * 4096 * 64, section, 0b111),
            );
        }
        assert_eq!(spans(&ram, facts.clone()).len(), 2);
        ram.put(0x3020, coded(0x10_8000 + 2 * 4096 * 64, 2, 0b111));
        assert!(refused(&ram, facts).contains("other sections"));
    }

    fn sparse() -> Facts {
        let mut facts = Facts::default();
        facts.sizes.insert("page", 64);
        facts.sizes.insert("mem_section", 16);
        facts.member("mem_section", "section_mem_map", 0);
        facts.member("page", "flags", 0);
        facts.constants.insert("SECTION_SIZE_BITS", 24); // 16 MiB: 4096 frames
        facts.constants.insert("MAX_PHYSMEM_BITS", 36);
        facts
    }

    /// The word `section_mem_map`: the array's address less the offset of the section's first frame
    /// in it.
    fn coded(array: u64, section: u64, flags: u64) -> u64 {
        (DIRECT_MAP + array).wrapping_sub(section * 4096 * 64) | flags
    }

    #[test]
    fn flatmem_is_one_array() {
        let mut ram = Ram::new(8 * MIB);
        ram.put(0x1000, DIRECT_MAP + 0x10_0000);
        ram.put(0x1008, 1800);
        let mut facts = Facts::default();
        facts.sizes.insert("page", 56);
        facts.symbols.insert("mem_map", DIRECT_MAP + 0x1000);
        facts.symbols.insert("max_mapnr", DIRECT_MAP + 0x1008);
        assert_eq!(spans(&ram, facts), [(0, 1800, 0x10_0000, true)]);
    }

    #[test]
    fn sparsemem_has_an_array_for_each_section() {
        let mut ram = Ram::new(64 * MIB);
        // Roots of one page each (SPARSEMEM_EXTREME); the second of them does not exist.
        ram.put(0x1000, DIRECT_MAP + 0x2000);
        ram.put(0x2000, DIRECT_MAP + 0x3000);
        ram.put(0x3000, coded(0x10_0000, 0, 0b111));
        // Not adjacent to the first, as without VMEMMAP.
        ram.put(0x3010, coded(0x20_0000, 1, 0b111));
        // Present without struct pages; then offline.
        ram.put(0x3020, 0b001);
        ram.put(0x3030, coded(0x30_0000, 3, 0b011));
        // Without VMEMMAP the section's number is at the top of `page.flags`.
        for page in [0, 4095] {
            ram.put(0x20_0000 + page * 64, 1 << 52);
        }
        let mut facts = sparse();
        facts.symbols.insert("mem_section", DIRECT_MAP + 0x1000);
        ram.put(0x3010, coded(0x20_1000, 1, 0b111));
        assert!(refused(&ram, facts.clone()).contains("the section of frame"));
        ram.put(0x3010, coded(0x20_0000, 1, 0b111));
        assert_eq!(
            spans(&ram, facts),
            [
                (0, 4096, 0x10_0000, true),
                (4096, 4096, 0x20_0000, true),
                (3 * 4096, 4096, 0x30_0000, false),
            ]
        );
    }

    #[test]
    fn hot_added_sections_have_valid_subsections_only() {
        let mut ram = Ram::new(32 * MIB);
        ram.put(0x1000, DIRECT_MAP + 0x2000);
        ram.put(0x2000, DIRECT_MAP + 0x3000);
        // Early: all of it is valid, whatever the map says.
        ram.put(0x3000, coded(0x10_0000, 0, 0b1111));
        ram.put(0x3010, coded(0x14_0000, 1, 0b0111));
        ram.put(0x3018, DIRECT_MAP + 0x4000);
        ram.put(0x4010, 0b1000_0011);
        let mut facts = sparse();
        facts.member("mem_section", "usage", 8);
        facts.member("mem_section_usage", "subsection_map", 16);
        facts.symbols.insert("mem_section", DIRECT_MAP + 0x1000);
        assert_eq!(
            spans(&ram, facts),
            [
                (0, 4096, 0x10_0000, true),
                (4096, 1024, 0x14_0000, true),
                (4096 + 7 * 512, 512, 0x14_0000 + 7 * 512 * 64, true),
            ]
        );
    }

    #[test]
    fn an_array_that_is_not_mapped_is_an_error() {
        let mut ram = Ram::new(16 * MIB);
        ram.put(0x1000, DIRECT_MAP + 0x2000);
        ram.put(0x2000, DIRECT_MAP + 0x3000);
        let mut facts = sparse();
        facts.symbols.insert("mem_section", DIRECT_MAP + 0x1000);
        for bad in [0, 0xffff_0000_0000_0000, 0x1000_0000_0000] {
            ram.put(0x3000, bad | 0b111);
            let memory = ram.memory();
            let kernel = kernel(&memory, facts.clone());
            assert!(MemMap::new(&kernel).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn a_range_of_struct_pages_is_no_longer_than_may_be_mapped() {
        let (va, gpa) = (KernelVa::new(DIRECT_MAP), Gpa::new(0x1000));
        let most = MAX_MAP as u64;
        for (len, more, at, there, is_one) in [
            (most - 64, 64, most - 64, most - 64, true),
            (most - 64, 65, most - 64, most - 64, false),
            (64, 64, 128, 64, false),
            (64, 64, 64, 128, false),
        ] {
            let chunk = Chunk {
                at: va,
                len,
                gpa,
                mapped: None,
            };
            let goes_on = chunk.goes_on(
                va.checked_add(at).unwrap(),
                gpa.checked_add(there).unwrap(),
                more,
            );
            assert_eq!(goes_on, is_one, "{len} and {more}");
        }
    }
}
