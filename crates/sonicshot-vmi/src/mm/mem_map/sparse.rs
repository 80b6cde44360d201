//! `SPARSEMEM`: the sections of memory and their struct pages (`struct mem_section`).

use super::arrays;
use super::section::{Found, Section, Span};
use crate::KernelVa;
use crate::arch::{self, SectionSize};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::symbols::Member;
use sonicshot::{Pfn, PfnRange, to_u64};

/// A kernel with more sections than this has more than 8 PiB of RAM.
const MAX_SECTIONS: u64 = 1 << 26;
/// Sections of RAM that the dump does not have (memory plugged in later, in a file of its own):
/// with 128 MiB each, 8 TiB.
const MAX_SECTIONS_OUTSIDE: u64 = 1 << 16;

/// All sections, and the runs of frames that they make.
pub(super) struct Sparse {
    pub spans: Vec<Span>,
    pub sections: Vec<Section>,
}

/// The bits of `section_mem_map` beside the address, by the kernel's own enumerators where it has
/// them (since 6.0) and by the values that 4.13 to 5.19 define as macros.
struct SectionBits {
    has_mem_map: u64,
    online: u64,
    early: Option<u64>,
}

impl SectionBits {
    fn new(kernel: &Kernel<'_>) -> Result<Self, VmiError> {
        let page_shift = kernel.build.page_size.shift();
        let bit = |name: &str, macro_bit: i64| -> Result<u64, VmiError> {
            let bit = kernel.constant(name)?.unwrap_or(macro_bit);
            // They lie below the address, which is that of whole pages.
            u32::try_from(bit)
                .ok()
                .filter(|bit| (1..page_shift).contains(bit))
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
        let is_early = |bit: u64| bits.early == Some(bit);
        if bits.has_mem_map == bits.online || is_early(bits.has_mem_map) || is_early(bits.online) {
            return Err(VmiError::Unsupported {
                what: format!(
                    "two bits of section_mem_map in one place: {:#x}, {:#x}, {:#x?}",
                    bits.has_mem_map, bits.online, bits.early
                ),
            });
        }
        Ok(bits)
    }
}

/// The pointer array or section array that `mem_section` is.
#[derive(Clone, Copy)]
enum Array {
    /// `SPARSEMEM_EXTREME`: roots of one page each, allocated as needed.
    Roots { roots: KernelVa, per_root: u64 },
    /// One static array.
    Flat(KernelVa),
}

impl Array {
    fn find(kernel: &Kernel<'_>, struct_size: u64, nr_sections: u64) -> Result<Self, VmiError> {
        let page = kernel.build.page_size.bytes();
        let per_root = page
            .checked_div(struct_size)
            .ok_or_else(|| VmiError::Unsupported {
                what: "struct mem_section of 0 bytes".into(),
            })?;
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

    /// The address of `struct mem_section` number `nr`, if its root exists, and the number of the
    /// next that may exist.
    fn section(
        &self,
        kernel: &Kernel<'_>,
        nr: u64,
        struct_size: u64,
    ) -> Result<(Option<KernelVa>, u64), VmiError> {
        let too_many = VmiError::TooMany {
            what: "sections of memory",
            found: nr,
            most: u64::MAX,
        };
        let next = nr.checked_add(1).ok_or(too_many)?;
        match *self {
            Self::Flat(at) => {
                let at = element("mem_section", at, nr, struct_size, 0)?;
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
                    // The first of the next root.
                    let left = per_root.checked_sub(index);
                    let behind = left.and_then(|left| nr.checked_add(left));
                    return Ok((None, behind.unwrap_or(next)));
                }
                let at = element("a mem_section root", root, index, struct_size, 0)?;
                Ok((Some(at), next))
            }
        }
    }
}

/// Finds the sections, lowest first.
pub(super) fn find(kernel: &Kernel<'_>, stride: u64) -> Result<Sparse, VmiError> {
    let layout = Layout::new(kernel, stride)?;
    let mut walk = Walk::new(kernel, layout);
    let end = walk.end()?;
    let mut number = 0;
    while number < end {
        let (at, next) = walk
            .layout
            .array
            .section(kernel, number, walk.layout.struct_size)?;
        if let Some(at) = at {
            walk.read(number, at)?;
        }
        number = next;
    }
    walk.check_places()?;
    arrays::check(kernel, &walk.found, stride, walk.layout.size)?;
    Ok(Sparse {
        spans: walk.spans,
        sections: walk.found.iter().map(|found| found.section).collect(),
    })
}

/// The layout of this kernel's sections.
struct Layout {
    size: SectionSize,
    /// Frames in a section, as a power of two.
    frame_bits: u32,
    nr_sections: u64,
    array: Array,
    /// The size of `struct mem_section`.
    struct_size: u64,
    section_mem_map: u64,
    usage: Option<Member>,
    bits: SectionBits,
    /// The size of `struct page`.
    stride: u64,
}

impl Layout {
    fn new(kernel: &Kernel<'_>, stride: u64) -> Result<Self, VmiError> {
        let struct_size = kernel.need_type_size("mem_section")?;
        let section_mem_map = kernel.need_member("mem_section", "section_mem_map")?.offset;
        let usage = kernel.member("mem_section", "usage")?;
        let bits = SectionBits::new(kernel)?;
        let page_size = kernel.build.page_size;
        let default = arch::of(kernel)?.section_size(page_size);
        let told = |name: &str, default: u32| -> Result<u32, VmiError> {
            match kernel.constant(name)? {
                Some(bits) => u32::try_from(bits).map_err(|_| VmiError::Unsupported {
                    what: format!("{name} of {bits}"),
                }),
                None => Ok(default),
            }
        };
        // The kernel tells both in VMCOREINFO.
        let size = SectionSize {
            section_bits: told("SECTION_SIZE_BITS", default.section_bits)?,
            memory_bits: told("MAX_PHYSMEM_BITS", default.memory_bits)?,
        };
        let SectionSize {
            section_bits,
            memory_bits,
        } = size;
        let unsupported = || VmiError::Unsupported {
            what: format!("sections of 2^{section_bits} bytes in 2^{memory_bits} bytes of memory"),
        };
        if !(20..=40).contains(&section_bits) || !(section_bits..=56).contains(&memory_bits) {
            return Err(unsupported());
        }
        let frame_bits = section_bits
            .checked_sub(page_size.shift())
            .ok_or_else(unsupported)?;
        let nr_sections = memory_bits
            .checked_sub(section_bits)
            .and_then(|bits| 1_u64.checked_shl(bits))
            .ok_or_else(unsupported)?;
        Ok(Self {
            size,
            frame_bits,
            nr_sections,
            array: Array::find(kernel, struct_size, nr_sections)?,
            struct_size,
            section_mem_map,
            usage,
            bits,
            stride,
        })
    }

    /// The frames of section `number`.
    fn frames(&self, number: u64) -> Option<PfnRange> {
        let len = 1_u64.checked_shl(self.frame_bits)?;
        PfnRange::with_len(Pfn::new(number.checked_mul(len)?), len)
    }
}

/// The reading of one section after the other.
struct Walk<'a, 'm> {
    kernel: &'a Kernel<'m>,
    layout: Layout,
    spans: Vec<Span>,
    found: Vec<Found>,
    /// Sections that are not in the dump's RAM, and those of them that the kernel booted with.
    outside: u64,
    early_outside: u64,
}

impl<'a, 'm> Walk<'a, 'm> {
    fn new(kernel: &'a Kernel<'m>, layout: Layout) -> Self {
        Self {
            kernel,
            layout,
            spans: Vec::new(),
            found: Vec::new(),
            outside: 0,
            early_outside: 0,
        }
    }

    /// The regions of the dump's RAM.
    fn ram(&self) -> impl Iterator<Item = PfnRange> + use<'m> {
        let memory = self.kernel.space.memory();
        memory.layout().frames(self.kernel.build.page_size)
    }

    /// The number behind that of the last section: of the dump's RAM, and beyond it as far as the
    /// kernel has found any.
    fn end(&self) -> Result<u64, VmiError> {
        let sections = || {
            let ram_end = self.ram().last()?.end().raw();
            let per_section = self.layout.frames(0)?.len();
            (per_section > 0).then(|| ram_end.div_ceil(per_section))
        };
        let ram_end = sections().ok_or_else(|| VmiError::Unsupported {
            what: format!("sections of 2^{} bytes", self.layout.size.section_bits),
        })?;
        let most = most_sections(self.layout.nr_sections);
        if ram_end > most {
            let SectionSize {
                section_bits,
                memory_bits,
            } = self.layout.size;
            return Err(VmiError::Unsupported {
                what: format!(
                    "RAM up to section {ram_end} with 2^{memory_bits} bytes of memory, sections of 2^{section_bits}"
                ),
            });
        }
        let name = "__highest_present_section_nr";
        let highest = match self.kernel.symbol(name)? {
            Some(at) => self.kernel.read_u64(name, at)?,
            None => 0,
        };
        // A number that is too high only costs time.
        let end = highest.checked_add(1).map_or(most, |end| end.min(most));
        Ok(end.max(ram_end))
    }

    /// Reads the section whose `struct mem_section` is at `at`, if it has struct pages.
    fn read(&mut self, number: u64, at: KernelVa) -> Result<(), VmiError> {
        let layout = &self.layout;
        let word = element("mem_section", at, 0, 0, layout.section_mem_map)?;
        let coded = self.kernel.read_u64("section_mem_map", word)?;
        if coded & layout.bits.has_mem_map == 0 {
            return Ok(());
        }
        let corrupt = || corrupt_section(at, coded);
        let frames = layout.frames(number).ok_or_else(corrupt)?;
        let online = coded & layout.bits.online != 0;
        let early = layout.bits.early.is_none_or(|bit| coded & bit != 0);
        // The low bits are flags. The struct pages of a section take whole pages, and the array is
        // page-aligned, so the address has its low bits clear.
        let array = KernelVa::new(coded & !self.kernel.build.page_size.offset_mask());
        let mem_map = frames
            .start()
            .raw()
            .checked_mul(layout.stride)
            .map(|bytes| array.moved_by(bytes))
            .ok_or_else(corrupt)?;
        self.count_outside(frames, early)?;
        self.found.push(Found {
            section: Section {
                number,
                frames,
                online,
            },
            at,
            array,
        });
        let whole = Span {
            frames,
            at: mem_map,
            online,
            early,
        };
        match self.layout.usage {
            Some(usage) if !early => {
                let usage = element("mem_section", at, 0, 0, usage.offset)?;
                let usage = self.kernel.read_ptr("mem_section.usage", usage)?;
                self.add_subsections(usage, whole)
            }
            _ => {
                self.add(whole);
                Ok(())
            }
        }
    }

    /// Counts a section that is not in the dump's RAM.
    fn count_outside(&mut self, frames: PfnRange, early: bool) -> Result<(), VmiError> {
        if self
            .ram()
            .any(|region| !region.intersection(&frames).is_empty())
        {
            return Ok(());
        }
        let what = "sections outside of RAM";
        VmiError::count(what, &mut self.outside, 1)?;
        VmiError::count(what, &mut self.early_outside, u64::from(early))?;
        few_outside(self.outside)
    }

    /// Adds the valid 2 MiB subsections of a hot-added section (`subsection_map`, since 5.3).
    fn add_subsections(&mut self, usage: KernelVa, whole: Span) -> Result<(), VmiError> {
        /// `SUBSECTION_SHIFT` (`include/linux/mmzone.h`).
        const SHIFT: u32 = 21;
        let kernel = self.kernel;
        let too_small = || VmiError::Unsupported {
            what: format!(
                "subsections of 2 MiB with pages of {} bytes",
                kernel.build.page_size.bytes()
            ),
        };
        let per_bit = SHIFT
            .checked_sub(kernel.build.page_size.shift())
            .and_then(|bits| 1_u64.checked_shl(bits))
            .ok_or_else(too_small)?;
        let offset = kernel
            .need_member("mem_section_usage", "subsection_map")?
            .offset;
        let map = element("subsection_map", usage, 0, 0, offset)?;
        let count = whole.frames.len().div_ceil(per_bit);
        for word in 0..count.div_ceil(64) {
            let bits = element("subsection_map", map, word, 8, 0)?;
            let bits = kernel.read_u64("subsection_map", bits)?;
            for bit in 0..64_u64 {
                let index = word << 6 | bit;
                if index >= count || bits & (1 << bit) == 0 {
                    continue;
                }
                let first = index.checked_mul(per_bit);
                let part = first
                    .and_then(|first| whole.frames.start().checked_add(first))
                    .and_then(|start| PfnRange::with_len(start, per_bit))
                    .map(|part| part.intersection(&whole.frames));
                let at = first
                    .and_then(|first| first.checked_mul(self.layout.stride))
                    .and_then(|bytes| whole.at.checked_add(bytes));
                if let (Some(frames), Some(at)) = (part, at) {
                    self.add(Span {
                        frames,
                        at,
                        ..whole
                    });
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, span: Span) {
        if let Some(last) = self.spans.last_mut()
            && last.frames.end() == span.frames.start()
            && (last.online, last.early) == (span.online, span.early)
            && last
                .frames
                .len()
                .checked_mul(self.layout.stride)
                .and_then(|bytes| last.at.checked_add(bytes))
                == Some(span.at)
        {
            last.frames = PfnRange::new(last.frames.start(), span.frames.end());
        } else {
            self.spans.push(span);
        }
    }

    /// Memory that is plugged in later may be missing from a dump. But RAM that the kernel booted
    /// with in one place and not in another where the dump has it: then the layout is wrong.
    fn check_places(&self) -> Result<(), VmiError> {
        let is_unknown = |section: &PfnRange| {
            let after = self
                .spans
                .partition_point(|span| span.frames.end() <= section.start());
            self.spans
                .get(after)
                .is_none_or(|span| span.frames.intersection(section).is_empty())
        };
        let sections = self
            .ram()
            .flat_map(|region| whole_sections(region, self.layout.frame_bits));
        let unknown = to_u64(sections.filter(is_unknown).count());
        if self.early_outside > 0 && unknown > 0 {
            return Err(VmiError::Disagree {
                what: "where RAM lies, in sections".into(),
                first: "only the dump's layout has".into(),
                first_value: unknown,
                second: "only the kernel knows".into(),
                second_value: self.early_outside,
            });
        }
        Ok(())
    }
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

/// The number of sections of a kernel that says it has so many.
const fn most_sections(told: u64) -> u64 {
    if told < MAX_SECTIONS {
        told
    } else {
        MAX_SECTIONS
    }
}

/// # Errors
/// [`VmiError::Unsupported`] if so many sections are not in the dump.
fn few_outside(outside: u64) -> Result<(), VmiError> {
    if outside <= MAX_SECTIONS_OUTSIDE {
        return Ok(());
    }
    Err(VmiError::Unsupported {
        what: format!(
            "a kernel with more than {MAX_SECTIONS_OUTSIDE} sections of RAM that the dump does not have"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::{MAX_SECTIONS, MAX_SECTIONS_OUTSIDE, few_outside, most_sections};

    #[test]
    fn sections_are_no_more_than_a_bound() {
        for (told, most) in [
            (16, 16),
            (MAX_SECTIONS, MAX_SECTIONS),
            (u64::MAX, MAX_SECTIONS),
        ] {
            assert_eq!(most_sections(told), most);
        }
        assert!(few_outside(MAX_SECTIONS_OUTSIDE).is_ok());
        assert!(few_outside(MAX_SECTIONS_OUTSIDE + 1).is_err());
    }
}
