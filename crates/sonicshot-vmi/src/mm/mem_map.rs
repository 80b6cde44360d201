//! Where the `struct page` of each frame is: `mem_section`, `vmemmap`, `mem_map`.
//!
//! Sources: `include/linux/mmzone.h` (`struct mem_section`, `section_mem_map`),
//! `mm/sparse.c`, `include/asm-generic/memory_model.h`.

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::{AddressSpace, KernelVa};
use core::sync::atomic::{AtomicU32, Ordering};
use sonicshot::{
    Gpa, GpaRange, GuestBytes, GuestMemory, MAX_MAP, Mapped, MemoryError, PageSize, Pfn, PfnRange,
};

/// A kernel with more sections than this has more than 8 PiB of RAM.
const MAX_SECTIONS: u64 = 1 << 26;
/// Sections of RAM that the dump does not have (memory plugged in later, in a file of its own):
/// with 128 MiB each, 8 TiB.
const MAX_SECTIONS_OUTSIDE: u64 = 1 << 16;
/// `struct page` is 64 bytes almost everywhere; debugging options may add a few words.
const MAX_PAGE_STRUCT: u64 = 256;

/// A run of frames whose `struct page`s follow each other in virtual memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub frames: PfnRange,
    /// The `struct page` of the first frame.
    pub at: KernelVa,
    /// Whether the kernel uses the memory (hotplug: the section is online).
    pub online: bool,
    /// Whether the kernel booted with it; then there may be holes in it.
    pub early: bool,
}

/// A section of memory that has struct pages (`SPARSEMEM`).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Section {
    /// Its number, `section_nr`.
    pub number: u64,
    pub frames: PfnRange,
    /// Whether its word says that the kernel uses the memory. One bit: no proof of anything alone.
    pub online: bool,
}

/// A stretch of struct pages that is contiguous in guest-physical memory too.
struct Chunk<'m> {
    at: KernelVa,
    len: u64,
    gpa: Gpa,
    mapped: Option<Mapped<'m>>,
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
    /// How the kernel lays out its struct pages, for reports.
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
    pub(crate) fn new(kernel: &Kernel<'m>, page_size: PageSize) -> Result<Self, VmiError> {
        let stride = kernel.need_type_size("page")?;
        if !(32..=MAX_PAGE_STRUCT).contains(&stride) || !stride.is_multiple_of(8) {
            return Err(VmiError::Unsupported {
                what: format!("struct page of {stride} bytes"),
            });
        }
        let (spans, sections, model) = if kernel.type_size("mem_section")?.is_some() {
            let (spans, sections) = sparse_spans(kernel, page_size, stride)?;
            (spans, sections, "SPARSEMEM")
        } else {
            (
                flat_spans(kernel, page_size, stride)?,
                Vec::new(),
                "FLATMEM",
            )
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
    /// map it.
    pub(crate) fn by_vmemmap(
        space: &AddressSpace<'m>,
        page_size: PageSize,
        stride: u64,
        vmemmap: KernelVa,
    ) -> Result<Self, VmiError> {
        let memory = space.memory();
        let mut spans = Vec::new();
        for region in memory.layout().frames(page_size) {
            let mut pfn = region.start();
            while let Some(left) = region.end().offset_from(pfn).filter(|left| *left > 0) {
                let corrupt = || VmiError::Corrupt {
                    what: "the struct page array",
                    at: vmemmap,
                    value: pfn.raw(),
                };
                let at = element("vmemmap", vmemmap, pfn.raw(), stride, 0)?;
                let there = space.translate(at).ok();
                // What is not mapped is missing in whole pages.
                let page = page_size.bytes();
                let len = there.map_or_else(
                    || page.saturating_sub(at.raw() & page_size.offset_mask()),
                    |there| there.len,
                );
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
                    add_span(&mut spans, span, stride);
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
                    Some(last)
                        if last.at.checked_add(last.len) == Some(at)
                            && last.gpa.checked_add(last.len) == Some(there.at)
                            && last.len.saturating_add(len) <= MAX_MAP as u64 =>
                    {
                        last.len = last.len.saturating_add(len);
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

    /// Where the `struct page` of `pfn` is.
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
        if self.reads.fetch_add(1, Ordering::Relaxed) >= READS_BETWEEN_RELEASES {
            self.reads.store(0, Ordering::Relaxed);
            for range in self.own_memory() {
                self.memory.release(range);
            }
        }
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

    /// Copies the `struct page` at `at` into `buf`, which has its size.
    pub(crate) fn copy_page(&self, at: KernelVa, buf: &mut [u8]) -> Result<(), VmiError> {
        // A struct page of a size that is no power of two may straddle two chunks.
        for (index, word) in (0_u64..).step_by(8).zip(buf.chunks_mut(8)) {
            let value = at
                .checked_add(index)
                .ok_or(VmiError::Corrupt {
                    what: "a struct page",
                    at,
                    value: index,
                })
                .and_then(|at| self.u64_at(at))?;
            let bytes = value.to_le_bytes();
            if let Some(bytes) = bytes.get(..word.len()) {
                word.copy_from_slice(bytes);
            }
        }
        Ok(())
    }

    /// Calls `visit` for every stretch of struct pages in `span`, in order of frames, with the
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
            let in_chunk = chunk.len.saturating_sub(offset);
            let whole = in_chunk.checked_div(self.stride).unwrap_or(0).min(left);
            let pages;
            if whole == 0 {
                // This one straddles two chunks.
                pages = 1;
                buffer.resize(usize::try_from(self.stride).unwrap_or(0), 0);
                self.copy_page(at, &mut buffer)?;
                visit(pfn, GuestBytes::from_slice(&buffer))?;
            } else if let Some(mapped) = &chunk.mapped {
                pages = whole;
                let bytes = usize::try_from(offset)
                    .ok()
                    .zip(usize::try_from(whole.saturating_mul(self.stride)).ok())
                    .and_then(|(offset, len)| mapped.bytes().get(offset, len))
                    .ok_or_else(|| corrupt(at))?;
                visit(pfn, bytes)?;
                if let Some(range) = GpaRange::with_len(chunk.gpa, chunk.len) {
                    self.memory.release(range);
                }
            } else {
                // 2 MiB at a time: 32,768 frames of 64-byte struct pages.
                pages = whole.min((2_u64 << 20).checked_div(self.stride).unwrap_or(1));
                let len = pages.saturating_mul(self.stride);
                buffer.resize(usize::try_from(len).unwrap_or(0), 0);
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

/// What `section_mem_map` says beside the address, by the kernel's own enumerators where it
/// has them (since 6.0) and by the values that 4.13 to 5.19 define as macros.
struct SectionBits {
    has_mem_map: u64,
    online: u64,
    early: Option<u64>,
}

impl SectionBits {
    fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let bit = |name: &str, macro_bit: i64| -> Result<u64, VmiError> {
            let bit = kernel.constant(name)?.unwrap_or(macro_bit);
            // They lie below the address, which is that of whole pages.
            u32::try_from(bit)
                .ok()
                .filter(|bit| (1..12).contains(bit))
                .and_then(|bit| 1_u64.checked_shl(bit))
                .ok_or(VmiError::Unsupported {
                    what: format!("{name} of {bit}"),
                })
        };
        // Since 5.3 (326e1b8f83a4), with `struct mem_section_usage`.
        let has_usage = kernel.member("mem_section", "usage")?.is_some();
        let bits = Self {
            has_mem_map: bit("SECTION_HAS_MEM_MAP_BIT", 1)?,
            online: bit("SECTION_IS_ONLINE_BIT", 2)?,
            early: has_usage
                .then(|| bit("SECTION_IS_EARLY_BIT", 3))
                .transpose()?,
        };
        let early = bits.early.unwrap_or(0);
        if bits.has_mem_map == bits.online || early == bits.has_mem_map || early == bits.online {
            return Err(VmiError::Unsupported {
                what: format!(
                    "two bits of section_mem_map in one place: {:#x}, {:#x}, {early:#x}",
                    bits.has_mem_map, bits.online
                ),
            });
        }
        Ok(bits)
    }
}

/// The pointer array or section array that `mem_section` is.
enum Sections {
    /// `SPARSEMEM_EXTREME`: roots of one page each, allocated as needed.
    Roots { roots: KernelVa, per_root: u64 },
    /// One static array.
    Flat(KernelVa),
}

impl Sections {
    fn find(
        kernel: &Kernel<'_>,
        page_size: PageSize,
        section_size: u64,
        nr_sections: u64,
    ) -> Result<Self, VmiError> {
        let per_root = page_size.bytes().checked_div(section_size).unwrap_or(0);
        // VMCOREINFO gives the array itself under the name; symbol tables give the address of
        // the variable, which since 4.15 is a pointer to the array under `SPARSEMEM_EXTREME`.
        let info = kernel.vmcoreinfo.as_ref();
        let array = info.and_then(|info| info.symbol("mem_section"));
        let array_len = info.and_then(|info| info.length("mem_section"));
        let variable = kernel.symbol_from_table("mem_section")?;
        let pointee = variable
            .map(|at| kernel.read_ptr("mem_section", at))
            .transpose()?;
        // Where the array has an entry a section, it is not split into roots.
        let is_flat = per_root <= 1
            || array_len.is_some_and(|len| len >= nr_sections)
            || (array.is_some() && array == variable);
        let at = match (array, pointee, variable) {
            (Some(array), Some(pointee), Some(variable))
                if array != pointee && array != variable =>
            {
                return Err(VmiError::Disagree {
                    what: "mem_section".into(),
                    first: "VMCOREINFO".into(),
                    first_value: array.raw(),
                    second: "the variable mem_section".into(),
                    second_value: pointee.raw(),
                });
            }
            (Some(array), _, _) => array,
            (None, _, Some(variable)) if is_flat => variable,
            (None, Some(pointee), _) => pointee,
            (None, None, _) => kernel.need_symbol("mem_section")?,
        };
        Ok(if is_flat {
            Self::Flat(at)
        } else {
            Self::Roots {
                roots: at,
                per_root,
            }
        })
    }

    /// Where `struct mem_section` number `nr` is, if its root exists, and the number of the next
    /// that may.
    fn section(
        &self,
        kernel: &Kernel<'_>,
        nr: u64,
        section_size: u64,
    ) -> Result<(Option<KernelVa>, u64), VmiError> {
        let next = nr.saturating_add(1);
        match *self {
            Self::Flat(at) => {
                let at = element("mem_section", at, nr, section_size, 0)?;
                Ok((Some(at), next))
            }
            Self::Roots { roots, per_root } => {
                let (Some(root), Some(index)) =
                    (nr.checked_div(per_root), nr.checked_rem(per_root))
                else {
                    return Ok((None, next));
                };
                let at = element("mem_section", roots, root, 8, 0)?;
                let root = kernel.read_ptr("mem_section", at)?;
                if root.raw() == 0 {
                    let left = per_root.saturating_sub(index).max(1);
                    return Ok((None, nr.saturating_add(left)));
                }
                let at = element("a mem_section root", root, index, section_size, 0)?;
                Ok((Some(at), next))
            }
        }
    }
}

fn sparse_spans(
    kernel: &Kernel<'_>,
    page_size: PageSize,
    stride: u64,
) -> Result<(Vec<Span>, Vec<Section>), VmiError> {
    let section_size = kernel.need_type_size("mem_section")?;
    let mem_map_offset = kernel.need_member("mem_section", "section_mem_map")?.offset;
    let usage = kernel.member("mem_section", "usage")?;
    let bits = SectionBits::new(kernel)?;
    // x86-64: arch/x86/include/asm/sparsemem.h; the kernel tells both in VMCOREINFO.
    let section_bits = match kernel.constant("SECTION_SIZE_BITS")? {
        Some(bits) => u32::try_from(bits).unwrap_or(u32::MAX),
        None => 27,
    };
    let max_bits = match kernel.constant("MAX_PHYSMEM_BITS")? {
        Some(bits) => u32::try_from(bits).unwrap_or(u32::MAX),
        None => 52,
    };
    let frame_bits = section_bits.saturating_sub(page_size.shift());
    if !(20..=40).contains(&section_bits) || !(section_bits..=56).contains(&max_bits) {
        return Err(VmiError::Unsupported {
            what: format!("sections of 2^{section_bits} bytes in 2^{max_bits} bytes of memory"),
        });
    }
    let frames_per_section = 1_u64 << frame_bits;
    let nr_sections = 1_u64 << max_bits.saturating_sub(section_bits);
    let sections = Sections::find(kernel, page_size, section_size, nr_sections)?;

    let mut spans: Vec<Span> = Vec::new();
    let mut found: Vec<Section> = Vec::new();
    let mut arrays: Vec<(KernelVa, KernelVa)> = Vec::new();
    let (mut outside, mut early_outside) = (0_u64, 0_u64);
    let layout = kernel.space.memory().layout();
    let last_ram = layout.frames(page_size).last();
    let ram_end = last_ram.map_or(0, |frames| frames.end().raw());
    let ram_end = ram_end.div_ceil(frames_per_section);
    if ram_end > nr_sections.min(MAX_SECTIONS) {
        return Err(VmiError::Unsupported {
            what: format!(
                "RAM up to section {ram_end} with 2^{max_bits} bytes of memory, sections of 2^{section_bits}"
            ),
        });
    }
    // Beyond the dump's RAM there may be more, as far as the kernel has found any.
    let highest = match kernel.symbol("__highest_present_section_nr")? {
        Some(at) => kernel.read_u64("__highest_present_section_nr", at)?,
        None => 0,
    };
    let end = highest
        .saturating_add(1)
        .min(nr_sections)
        .min(MAX_SECTIONS)
        .max(ram_end);
    let mut nr = 0;
    while nr < end {
        let this = nr;
        let (at, next) = sections.section(kernel, this, section_size)?;
        nr = next;
        let Some(at) = at else {
            continue;
        };
        let coded = kernel.read_u64(
            "section_mem_map",
            element("mem_section", at, 0, 0, mem_map_offset)?,
        )?;
        if coded & bits.has_mem_map == 0 {
            continue;
        }
        let start = Pfn::new(this << frame_bits);
        let frames =
            PfnRange::with_len(start, frames_per_section).ok_or(corrupt_section(at, coded))?;
        let in_ram = |region: PfnRange| !region.intersection(&frames).is_empty();
        if !layout.frames(page_size).any(in_ram) {
            outside = outside.saturating_add(1);
            if bits.early.is_none_or(|bit| coded & bit != 0) {
                early_outside = early_outside.saturating_add(1);
            }
            if outside > MAX_SECTIONS_OUTSIDE {
                return Err(VmiError::Unsupported {
                    what: format!(
                        "a kernel with more than {MAX_SECTIONS_OUTSIDE} sections of RAM that the dump does not have"
                    ),
                });
            }
        }
        let online = coded & bits.online != 0;
        // The low bits are flags. Section starts are multiples of 2^15 frames and the
        // array is page aligned, so the address has its low 12 bits clear.
        let base = KernelVa::new(coded & !0xfff);
        let mem_map = start
            .raw()
            .checked_mul(stride)
            .map(|bytes| base.wrapping_add(bytes))
            .ok_or(corrupt_section(at, coded))?;
        let is_early = bits.early.is_none_or(|bit| coded & bit != 0);
        arrays.push((at, base));
        found.push(Section {
            number: this,
            frames,
            online,
        });
        match (is_early, usage) {
            (false, Some(usage)) => {
                let usage_at = kernel.read_ptr(
                    "mem_section.usage",
                    element("mem_section", at, 0, 0, usage.offset)?,
                )?;
                add_subsections(
                    kernel, usage_at, frames, mem_map, stride, online, &mut spans,
                )?;
            }
            _ => add_span(
                &mut spans,
                Span {
                    frames,
                    at: mem_map,
                    online,
                    early: is_early,
                },
                stride,
            ),
        }
    }
    // Memory that is plugged in later may be missing from a dump. But RAM that the kernel booted
    // with in one place and not in another where the dump has it: then the layout is wrong.
    let unknown = layout
        .frames(page_size)
        .flat_map(|region| whole_sections(region, frame_bits))
        .filter(|section| {
            let after = spans.partition_point(|span| span.frames.end() <= section.start());
            spans
                .get(after)
                .is_none_or(|span| span.frames.intersection(section).is_empty())
        })
        .count() as u64;
    if early_outside > 0 && unknown > 0 {
        return Err(VmiError::Disagree {
            what: "where RAM lies, in sections".into(),
            first: "only the dump's layout has".into(),
            first_value: unknown,
            second: "only the kernel knows".into(),
            second_value: early_outside,
        });
    }
    check_arrays(kernel, &found, &arrays, stride, max_bits, section_bits)?;
    Ok((spans, found))
}

/// Holds where each section has its struct pages against a second record, for a pointer that is
/// off by some frames would give every frame another's `struct page`.
///
/// With `SPARSEMEM_VMEMMAP` all sections have one array, which begins at `vmemmap_base`
/// (`arch/x86/include/asm/pgtable_64_types.h`). Without it the number of the section stands at the
/// top of `page.flags` (`set_page_section`, `include/linux/mm.h`).
fn check_arrays(
    kernel: &Kernel<'_>,
    sections: &[Section],
    arrays: &[(KernelVa, KernelVa)],
    stride: u64,
    max_bits: u32,
    section_bits: u32,
) -> Result<(), VmiError> {
    let variable = kernel.symbol_from_table("vmemmap_base")?;
    let told = variable
        .map(|at| kernel.read_ptr("vmemmap_base", at))
        .transpose()?;
    // Without `CONFIG_RANDOMIZE_MEMORY` there is no variable; VMCOREINFO has the value since 6.12.
    let told = match (&kernel.vmcoreinfo, told) {
        (Some(info), None) => info.symbol("vmemmap"),
        (_, told) => told,
    };
    let mut sorted: Vec<KernelVa> = arrays.iter().map(|(_, array)| *array).collect();
    sorted.sort_unstable();
    let same = sorted.chunk_by(|a, b| a == b).max_by_key(|same| same.len());
    let shared = same.filter(|same| same.len() > 1).and_then(<[_]>::first);
    if let Some(vmemmap) = told.or(shared.copied()) {
        return match arrays.iter().find(|(_, array)| *array != vmemmap) {
            None => Ok(()),
            Some((at, array)) => Err(VmiError::Disagree {
                what: "where the struct pages are".into(),
                first: if told.is_some() {
                    "vmemmap_base".into()
                } else {
                    "other sections".into()
                },
                first_value: vmemmap.raw(),
                second: format!("the section at {at}"),
                second_value: array.raw(),
            }),
        };
    }
    // One section alone: the common array begins at a whole GiB (`kaslr_regions`,
    // `arch/x86/mm/kaslr.c`), and one of its own nowhere near, for it is less than 2^21 bytes long.
    if let [array] = sorted.as_slice()
        && array.raw() & ((1 << 30) - 1) == 0
    {
        return Ok(());
    }
    let flags = kernel.need_member("page", "flags")?.offset;
    let shift = max_bits
        .checked_sub(section_bits)
        .and_then(|width| 64_u32.checked_sub(width))
        .filter(|shift| *shift < 64);
    // Struct pages of a section that was never online hold anything.
    let online = sections.iter().zip(arrays).filter(|(s, _)| s.online);
    for (section, (_, array)) in online {
        let last = section.frames.end().raw().checked_sub(1).map(Pfn::new);
        for pfn in [Some(section.frames.start()), last].into_iter().flatten() {
            let at = array
                .wrapping_add(pfn.raw().wrapping_mul(stride))
                .wrapping_add(flags);
            let number = shift.map(|shift| kernel.read_u64("page.flags", at).map(|f| f >> shift));
            if let Some(number) = number.transpose()?
                && number != section.number
            {
                return Err(VmiError::Disagree {
                    what: format!("the section of frame {pfn}"),
                    first: "mem_section".into(),
                    first_value: section.number,
                    second: "page.flags".into(),
                    second_value: number,
                });
            }
        }
    }
    Ok(())
}

/// The sections that lie wholly in `region`.
fn whole_sections(region: PfnRange, frame_bits: u32) -> impl Iterator<Item = PfnRange> {
    let frames = 1_u64 << frame_bits;
    let first = region.start().raw().div_ceil(frames);
    let end = region.end().raw() >> frame_bits;
    (first..end).filter_map(move |nr| PfnRange::with_len(Pfn::new(nr << frame_bits), frames))
}

fn corrupt_section(at: KernelVa, coded: u64) -> VmiError {
    VmiError::Corrupt {
        what: "section_mem_map",
        at,
        value: coded,
    }
}

/// Adds the valid 2 MiB subsections of a hot-added section (`subsection_map`, since 5.3).
fn add_subsections(
    kernel: &Kernel<'_>,
    usage: KernelVa,
    frames: PfnRange,
    mem_map: KernelVa,
    stride: u64,
    online: bool,
    spans: &mut Vec<Span>,
) -> Result<(), VmiError> {
    /// `SUBSECTION_SHIFT` 21 less 12: only x86-64 and arm64 with 4 KiB pages reach here so far.
    const FRAMES: u64 = 512;
    let offset = kernel
        .need_member("mem_section_usage", "subsection_map")?
        .offset;
    let map = element("subsection_map", usage, 0, 0, offset)?;
    let count = frames.len().div_ceil(FRAMES);
    for word in 0..count.div_ceil(64) {
        let bits = kernel.read_u64(
            "subsection_map",
            element("subsection_map", map, word, 8, 0)?,
        )?;
        for bit in 0..64_u64 {
            let index = word.saturating_mul(64).saturating_add(bit);
            if index >= count || bits & (1 << bit) == 0 {
                continue;
            }
            let first = index.saturating_mul(FRAMES);
            let part = frames
                .start()
                .checked_add(first)
                .and_then(|start| PfnRange::with_len(start, FRAMES))
                .map(|part| part.intersection(&frames));
            let at = first
                .checked_mul(stride)
                .and_then(|bytes| mem_map.checked_add(bytes));
            if let (Some(frames), Some(at)) = (part, at) {
                let span = Span {
                    frames,
                    at,
                    online,
                    early: false,
                };
                add_span(spans, span, stride);
            }
        }
    }
    Ok(())
}

fn add_span(spans: &mut Vec<Span>, span: Span, stride: u64) {
    if let Some(last) = spans.last_mut()
        && last.frames.end() == span.frames.start()
        && (last.online, last.early) == (span.online, span.early)
        && last
            .frames
            .len()
            .checked_mul(stride)
            .and_then(|bytes| last.at.checked_add(bytes))
            == Some(span.at)
    {
        last.frames = PfnRange::new(last.frames.start(), span.frames.end());
    } else {
        spans.push(span);
    }
}

/// FLATMEM: one array `mem_map` from frame 0 (`include/asm-generic/memory_model.h`).
fn flat_spans(
    kernel: &Kernel<'_>,
    page_size: PageSize,
    stride: u64,
) -> Result<Vec<Span>, VmiError> {
    let mem_map = kernel.read_ptr("mem_map", kernel.need_symbol("mem_map")?)?;
    let max = kernel.read_u64("max_mapnr", kernel.need_symbol("max_mapnr")?)?;
    // The one node points to the struct page of its first frame (`alloc_node_mem_map`).
    if let Some(node) = kernel.symbol("contig_page_data")?
        && let Some(array) = kernel.member("pglist_data", "node_mem_map")?
    {
        let start = kernel.need_member("pglist_data", "node_start_pfn")?.offset;
        let field = |offset| element("contig_page_data", node, 0, 0, offset);
        let array = kernel.read_ptr("node_mem_map", field(array.offset)?)?;
        let start = kernel.read_u64("node_start_pfn", field(start)?)?;
        let first = element("mem_map", mem_map, start, stride, 0)?;
        if array != first {
            return Err(VmiError::Disagree {
                what: "where the struct pages are".into(),
                first: "mem_map".into(),
                first_value: first.raw(),
                second: "the node's node_mem_map".into(),
                second_value: array.raw(),
            });
        }
    }
    let end = kernel.space.memory().layout().end().pfn(page_size).raw();
    if max == 0 || mem_map.raw() == 0 {
        return Err(VmiError::Corrupt {
            what: "mem_map",
            at: mem_map,
            value: max,
        });
    }
    Ok(vec![Span {
        frames: PfnRange::new(Pfn::new(0), Pfn::new(max.min(end))),
        at: mem_map,
        online: true,
        early: true,
    }])
}

#[cfg(test)]
mod tests {
    use super::MemMap;
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use sonicshot::{PageSize, Pfn};

    const MIB: usize = 1 << 20;

    /// Frames, where their struct pages are, and whether they are online.
    fn spans(ram: &Ram, facts: Facts) -> Vec<(u64, u64, u64, bool)> {
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        let map = MemMap::new(&kernel, PageSize::SIZE_4K).unwrap();
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

    fn refused(ram: &Ram, facts: Facts) -> String {
        let memory = ram.memory();
        let kernel = kernel(&memory, facts);
        MemMap::new(&kernel, PageSize::SIZE_4K)
            .unwrap_err()
            .to_string()
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

    /// What `section_mem_map` holds: the array's address less what its first frame is into it.
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
            assert!(MemMap::new(&kernel, PageSize::SIZE_4K).is_err(), "{bad:#x}");
        }
    }
}
