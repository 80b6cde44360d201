//! Whether the guest's processors run on the page tables of the kernel that was found.
//!
//! The address of a top-level page table is not enough: without KASLR the next boot has its own at
//! the same one. So the tables that a processor runs on must lead to the records that were read:
//! the kernel's image, the memory map with its struct pages, nodes and zones, each processor's
//! area, the direct map. Every address space of a kernel shares these, be it a process, idle, or
//! one that calls firmware (`pgd_ctor`, `efi_sync_low_kernel_mappings`).

use super::alive;
use crate::KernelVa;
use crate::arch::x86_64::Cr3;
use crate::arch::{self, Landmark, Tables, Told};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::MemMap;
use crate::mm::zone::Zones;
use sonicshot::{Gpa, GuestMemory, Pfn, Processor, Processors, spread};

/// So many struct pages, evenly spread, are compared for each processor.
const MAX_SPANS: usize = 256;

/// The owner of the memory, as the file, the VMM or the user tells it.
#[derive(Debug, Clone)]
pub(crate) enum Owners {
    Unknown,
    /// As little, for the file's word is not to be believed: why.
    NotTold(&'static str),
    /// The kernel is dead by design.
    Crashed,
    /// Every processor that counts, with its number.
    Known(Vec<(usize, Told)>),
}

/// The verdict of the processors on a kernel that none of them contradicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// All processors run on it.
    Owner,
    /// Nothing.
    Unknown,
    /// Nothing that can be believed: why.
    NotTold(&'static str),
    /// It is the dead kernel of a crash dump.
    Crashed,
}

impl Owners {
    /// By `cr3` if it is given, else by what `memory` tells.
    pub(crate) fn new(memory: &dyn GuestMemory, cr3: Option<Cr3>) -> Self {
        if let Some(cr3) = cr3 {
            return Self::Known(vec![(0, Told::Cr3(cr3))]);
        }
        match memory.processors() {
            Processors::Known(all) => {
                let counts = |processor: &Processor| {
                    !matches!(
                        processor,
                        Processor::NotStarted | Processor::Parked | Processor::InSmm
                    )
                };
                let numbered = all.into_iter().enumerate();
                let counted = numbered.filter(|(_, processor)| counts(processor));
                let counted: Vec<_> = counted
                    .map(|(number, processor)| (number, Told::Processor(processor)))
                    .collect();
                // If none counts, nothing is said.
                if counted.is_empty() {
                    Self::Unknown
                } else {
                    Self::Known(counted)
                }
            }
            Processors::Crashed => Self::Crashed,
            Processors::NotTold(why) => Self::NotTold(why),
            _ => Self::Unknown,
        }
    }

    /// The top-level tables that processors run on, and how many levels each may have.
    pub(crate) fn roots(&self, memory: &dyn GuestMemory) -> Vec<(Gpa, u32)> {
        let Self::Known(counted) = self else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for (_, told) in counted {
            for root in arch::roots(memory, told) {
                if !found.contains(&root) {
                    found.push(root);
                }
            }
        }
        found
    }

    pub(crate) fn are_known(&self) -> bool {
        matches!(self, Self::Known(_))
    }

    /// Whether nothing is told of any processor.
    pub(crate) fn is_unknown(&self) -> bool {
        !self.are_known() && !self.are_crashed()
    }

    pub(crate) fn are_crashed(&self) -> bool {
        matches!(self, Self::Crashed)
    }

    /// Whether some processor's page tables have these at their place: reason enough to try this
    /// kernel first.
    pub(crate) fn may_run_on(&self, memory: &dyn GuestMemory, tables: &Tables) -> bool {
        let (Self::Known(counted), Ok(arch)) = (self, arch::by_name(tables.architecture)) else {
            return false;
        };
        counted
            .iter()
            .any(|(_, told)| arch.may_run_on(memory, told, tables))
    }

    /// Whether every processor that counts runs on `kernel`, whose records were read as `map` and
    /// `zones`.
    ///
    /// # Errors
    /// [`VmiError::NotOwner`] with the first that does not.
    pub(crate) fn check(
        &self,
        kernel: &Kernel<'_>,
        map: &MemMap<'_>,
        zones: &Zones,
    ) -> Result<Verdict, VmiError> {
        let counted = match self {
            Self::Unknown => return Ok(Verdict::Unknown),
            Self::NotTold(why) => return Ok(Verdict::NotTold(why)),
            Self::Crashed => return Ok(Verdict::Crashed),
            Self::Known(counted) => counted,
        };
        let landmarks = landmarks(kernel, map, zones)?;
        match arch::of(kernel)?.first_foreign(kernel, &landmarks, counted)? {
            None => Ok(Verdict::Owner),
            Some(processor) => Err(VmiError::NotOwner {
                kernel: kernel.build.release.clone(),
                processor: Box::new(processor),
            }),
        }
    }
}

/// The addresses to which the tables of every address space must lead: the records that are read to
/// find free pages, and those that tell the place of all of it.
fn landmarks(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    zones: &Zones,
) -> Result<Vec<Landmark>, VmiError> {
    let mut found = Vec::new();
    let mut add = |what, at| -> Result<(), VmiError> {
        found.push(Landmark::new(kernel, what, at)?);
        Ok(())
    };
    for (name, what) in [
        ("swapper_pg_dir", "the kernel's top-level page table"),
        ("_stext", "the kernel's code"),
        ("init_uts_ns", "the kernel's name"),
        ("node_data", "the table of nodes"),
    ] {
        if let Some(at) = kernel.symbol(name)? {
            add(what, at)?;
        }
    }
    if let Some(at) = kernel.symbol_from_table("mem_section")? {
        add("the variable mem_section", at)?;
    }
    let spans = || sample(map.spans());
    for at in section_records(kernel, spans().map(|span| span.frames.start()))? {
        add("the records of sections", at)?;
    }
    for span in spans() {
        let frames = span.frames.len();
        let nths = [Some(0), Some(frames / 2), frames.checked_sub(1)];
        for nth in nths.into_iter().flatten() {
            let page = span.frames.start().checked_add(nth);
            if let Some(at) = page.and_then(|page| map.page_va(page)) {
                add("a struct page", at)?;
            }
        }
    }
    for zone in &zones.zones {
        add("a zone", zone.at)?;
    }
    for at in alive::per_cpu_areas(kernel)? {
        add("a processor's area", at)?;
    }
    // The direct map leaves out what is not to be touched.
    if let Some(base) = arch::of(kernel)?.direct_map(kernel)? {
        for region in kernel.space.memory().layout().regions() {
            let ends = [
                Some(region.start().raw()),
                region.end().raw().checked_sub(1),
            ];
            for offset in ends.into_iter().flatten() {
                if let Some(at) = base.checked_add(offset)
                    && let Ok(landmark) = Landmark::new(kernel, "the direct map", at)
                {
                    found.push(landmark);
                }
            }
        }
    }
    Ok(found)
}

/// The place of the array `mem_section`, and those of its records of the sections that `frames` are in.
fn section_records(
    kernel: &Kernel<'_>,
    frames: impl Iterator<Item = Pfn>,
) -> Result<Vec<KernelVa>, VmiError> {
    let array = kernel
        .vmcoreinfo
        .as_ref()
        .and_then(|info| info.symbol("mem_section"));
    let (Some(array), Some(bits), Some(size)) = (
        array,
        kernel.constant("SECTION_SIZE_BITS")?,
        kernel.type_size("mem_section")?,
    ) else {
        return Ok(Vec::new());
    };
    let page = kernel.build.page_size;
    let shift = u32::try_from(bits)
        .ok()
        .and_then(|bits| bits.checked_sub(page.shift()));
    let mut found = vec![array];
    for frame in frames {
        let Some(section) = shift.and_then(|shift| frame.raw().checked_shr(shift)) else {
            continue;
        };
        let per_root = page.bytes().checked_div(size).filter(|count| *count > 0);
        let Some(root) = per_root.and_then(|count| section.checked_div(count)) else {
            continue;
        };
        // One array of all sections has records here, not pointers to them.
        let root = kernel.read_ptr("mem_section", element("mem_section", array, root, 8, 0)?)?;
        if !found.contains(&root) && kernel.space.translate(root).is_ok() {
            found.push(root);
        }
    }
    Ok(found)
}

/// Some of them, evenly spread, and the last.
fn sample<T>(all: &[T]) -> impl Iterator<Item = &T> {
    spread(all, MAX_SPANS).chain(all.last())
}

#[cfg(test)]
mod tests {
    use super::{MAX_SPANS, sample};

    #[test]
    fn of_struct_pages_without_end_so_many_are_compared() {
        for len in [0, 1, 5, MAX_SPANS, MAX_SPANS + 1, 100 * MAX_SPANS + 7] {
            let all: Vec<usize> = (0..len).collect();
            let some: Vec<usize> = sample(&all).copied().collect();
            assert!(some.len() <= MAX_SPANS + 1, "{len}: {}", some.len());
            assert_eq!(some.first(), all.first());
            assert_eq!(some.last(), all.last());
        }
    }
}
