//! Whether the guest's processors run on the page tables of the kernel that was found.
//!
//! The address of a top-level page table is not enough: without KASLR the next boot has its own at
//! the same one. So the tables that a processor runs on must lead to the records that were read:
//! the kernel's image, the memory map with its struct pages, nodes and zones, each processor's
//! area, the direct map. Every address space of a kernel shares these, be it a process, idle, or
//! one that calls firmware (`pgd_ctor`, `efi_sync_low_kernel_mappings`), with one exception: under
//! page-table isolation (PTI) user space has tables of its own, which are the twin of whole ones.

use super::alive;
use crate::arch::x86_64::X86_64;
use crate::discover::Tables;
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::mem_map::MemMap;
use crate::mm::zone::Zones;
use crate::paging::Paging;
use crate::{KernelVa, VirtualMemory};
use core::fmt;
use core::str::FromStr;
use sonicshot::{ControlRegisters, Gpa, GuestMemory, PageSize, Pfn, Processor, Processors};
use std::collections::HashSet;

/// Bits 51 to 12 of `CR3`: where the top-level table is. Below are the PCID or cache control,
/// above is how pointers may be tagged (LAM).
const ROOT: u64 = 0x000f_ffff_ffff_f000;
/// `PTI_USER_PGTABLE_BIT` (`arch/x86/include/asm/pgtable.h`): the two top-level tables are
/// neighbours, the user's is the upper one.
const PTI_USER_TABLE: u64 = 1 << 12;
/// `CPU_ENTRY_AREA_RO_IDT` (`arch/x86/include/asm/cpu_entry_area.h`): the interrupt table, which
/// is mapped in every address space, here since 4.15.
const CPU_ENTRY_AREA: KernelVa = KernelVa::new(0xffff_fe00_0000_0000);
const CR4_LA57: u64 = 1 << 12;
/// So many struct pages, evenly spread, are compared for each processor.
const MAX_SPANS: usize = 256;

/// The value of a processor's `CR3`, which says where its page tables begin.
///
/// ```
/// use sonicshot_vmi::Cr3;
/// assert_eq!("0x1e20c000".parse(), Ok(Cr3::new(0x1e20_c000)));
/// assert_eq!("4096".parse(), Ok(Cr3::new(4096)));
/// assert!("1e20c000".parse::<Cr3>().is_err());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cr3(u64);

impl Cr3 {
    /// The register's value, as the processor has it.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The value as a number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Where the top-level page table is.
    const fn root(self) -> u64 {
        self.0 & ROOT
    }
}

impl fmt::Debug for Cr3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cr3({:#x})", self.0)
    }
}

impl fmt::Display for Cr3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A text is no value of `CR3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither a decimal number nor a hexadecimal one that begins with 0x")]
#[non_exhaustive]
pub struct ParseCr3Error;

impl FromStr for Cr3 {
    type Err = ParseCr3Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16),
            // QEMU writes `CR3=000000001e20c000`, which is no decimal number.
            None if text.len() > 1 && text.starts_with('0') => return Err(ParseCr3Error),
            None => text.parse(),
        };
        number.map(Self).map_err(|_| ParseCr3Error)
    }
}

/// A processor that does not run on the page tables of the kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignProcessor {
    /// Which, in the order of the file.
    pub number: usize,
    /// Its `CR3`, if it is told.
    pub cr3: Option<Cr3>,
    /// What tells that its page tables are others.
    pub why: Foreign,
}

/// Why a processor's page tables are not those of the kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// It runs without four- or five-level page tables, as firmware and boot loaders do.
    NoPaging {
        /// Its control registers.
        registers: ControlRegisters,
    },
    /// Its page tables lead to another place than the kernel's.
    Leads {
        /// What is there by the kernel's own page tables.
        what: &'static str,
        /// The kernel-virtual address.
        at: KernelVa,
        /// Where the kernel's page tables lead.
        kernel: Gpa,
        /// Where the processor's lead, if anywhere.
        processor: Option<Gpa>,
    },
    /// It runs a guest of its own, and the registers that it has as that guest's host are not
    /// told.
    Nested,
    /// What it does is not known.
    Unknown,
}

impl fmt::Display for ForeignProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "processor {}", self.number)?;
        if let Some(cr3) = self.cr3 {
            write!(f, " (CR3 {cr3})")?;
        }
        match &self.why {
            Foreign::NoPaging { registers } => {
                write!(f, " runs without the kernel's page tables: {registers:?}")
            }
            Foreign::Leads {
                what,
                at,
                kernel,
                processor,
            } => {
                write!(f, " runs on other page tables: {what} at {at} is at ")?;
                match processor {
                    Some(processor) => write!(f, "{processor}, the kernel's is at {kernel}"),
                    None => write!(f, "no place, the kernel's is at {kernel}"),
                }
            }
            Foreign::Nested => f.write_str(
                " runs a guest of its own, and its CR3 as that guest's host is not told",
            ),
            Foreign::Unknown => f.write_str(" is in a state that is not known"),
        }
    }
}

/// One processor that was started.
#[derive(Debug, Clone, Copy)]
pub(crate) enum State {
    /// On these page tables; `None`: with as many levels as the kernel has.
    Tables {
        cr3: Cr3,
        five_levels: Option<bool>,
    },
    NoPaging(ControlRegisters),
    Nested,
    Unknown,
}

/// What the file, the VMM or the user tells of who owns the memory.
#[derive(Debug)]
pub(crate) enum Owners {
    Unknown,
    /// As little, for the file's word is not to be believed: why.
    NotTold(&'static str),
    /// The kernel is dead by design.
    Crashed,
    /// Every processor that counts, with its number.
    Known(Vec<(usize, State)>),
}

/// What the processors say of a kernel that none of them contradicts.
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

/// A kernel-virtual address, and where it is by the kernel's own page tables.
#[derive(Debug, Clone, Copy)]
struct Landmark {
    what: &'static str,
    at: KernelVa,
    there: Gpa,
}

impl Owners {
    /// By `cr3` if it is given, else by what `memory` tells.
    pub(crate) fn new(memory: &dyn GuestMemory, cr3: Option<Cr3>) -> Self {
        if let Some(cr3) = cr3 {
            let five_levels = None;
            return Self::Known(vec![(0, State::Tables { cr3, five_levels })]);
        }
        // Xen itself keeps the paging of a paravirtualised guest.
        let paravirtualised = memory.p2m().is_some();
        let started = |registers: ControlRegisters| {
            if !paravirtualised && !registers.is_in_long_mode() {
                return State::NoPaging(registers);
            }
            State::Tables {
                cr3: Cr3::new(registers.cr3),
                five_levels: Some(!paravirtualised && registers.cr4 & CR4_LA57 != 0),
            }
        };
        match memory.processors() {
            Processors::Known(all) => {
                let counted: Vec<_> = all
                    .into_iter()
                    .enumerate()
                    .filter_map(|(number, processor)| {
                        let state = match processor {
                            Processor::NotStarted | Processor::Parked | Processor::InSmm => {
                                return None;
                            }
                            Processor::Started(registers) => started(registers),
                            Processor::InNestedGuest { host: Some(host) } => started(host),
                            Processor::InNestedGuest { host: None } => State::Nested,
                            _ => State::Unknown,
                        };
                        Some((number, state))
                    })
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

    /// The top-level tables that processors run on, of user space the kernel's twin; and whether
    /// they have five levels.
    pub(crate) fn roots(&self) -> Vec<(Gpa, bool)> {
        let Self::Known(counted) = self else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for (_, state) in counted {
            let State::Tables { cr3, five_levels } = state else {
                continue;
            };
            let levels = five_levels.map_or(vec![false, true], |five| vec![five]);
            for five_levels in levels {
                for root in [cr3.root() & !PTI_USER_TABLE, cr3.root()] {
                    let root = (Gpa::new(root), five_levels);
                    if !found.contains(&root) {
                        found.push(root);
                    }
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
        let Self::Known(counted) = self else {
            return false;
        };
        counted.iter().any(|(_, state)| {
            let State::Tables { cr3, five_levels } = state else {
                return false;
            };
            let five_levels = five_levels.unwrap_or(tables.five_levels);
            [cr3.root(), cr3.root() & !PTI_USER_TABLE]
                .into_iter()
                .any(|root| {
                    let walk = X86_64::new(Gpa::new(root), five_levels);
                    place(&walk, memory, tables.page_table) == Some(tables.root)
                })
        })
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
        let memory = kernel.space.memory();
        let landmarks = landmarks(kernel, map, zones)?;
        let entries = entries(kernel)?;
        let kernel_has_five_levels = kernel
            .vmcoreinfo
            .as_ref()
            .and_then(|info| info.number("pgtable_l5_enabled"))
            .is_some_and(|on| on != 0);
        // Many processors may run on the same tables.
        let mut passed = HashSet::new();
        for (number, state) in counted {
            let foreign = |cr3, why| {
                Err(VmiError::NotOwner {
                    kernel: kernel.release.clone(),
                    processor: Box::new(ForeignProcessor {
                        number: *number,
                        cr3,
                        why,
                    }),
                })
            };
            let (cr3, five_levels) = match *state {
                State::Tables { cr3, five_levels } => {
                    (cr3, five_levels.unwrap_or(kernel_has_five_levels))
                }
                State::NoPaging(registers) => {
                    let cr3 = Some(Cr3::new(registers.cr3));
                    return foreign(cr3, Foreign::NoPaging { registers });
                }
                State::Nested => return foreign(None, Foreign::Nested),
                State::Unknown => return foreign(None, Foreign::Unknown),
            };
            if !passed.insert((cr3.root(), five_levels)) {
                continue;
            }
            let walk = |root| X86_64::new(Gpa::new(root), five_levels);
            let Err(why) = lead_alike(&walk(cr3.root()), memory, &landmarks) else {
                continue;
            };
            // Bit 12 is a bit of the address, unless the table is the twin of a whole one.
            let is_twin = cr3.root() & PTI_USER_TABLE != 0
                && memory.p2m().is_none()
                && entries
                    .as_ref()
                    .is_some_and(|entries| lead_alike(&walk(cr3.root()), memory, entries).is_ok())
                && lead_alike(&walk(cr3.root() & !PTI_USER_TABLE), memory, &landmarks).is_ok();
            if !is_twin {
                return foreign(Some(cr3), why);
            }
        }
        Ok(Verdict::Owner)
    }
}

/// Where `at` is by these page tables; what cannot be read leads nowhere.
fn place(walk: &X86_64, memory: &dyn GuestMemory, at: KernelVa) -> Option<Gpa> {
    let there = walk.translate(memory, at).ok().flatten()?;
    Some(there.at)
}

fn lead_alike(
    walk: &X86_64,
    memory: &dyn GuestMemory,
    landmarks: &[Landmark],
) -> Result<(), Foreign> {
    for landmark in landmarks {
        let processor = place(walk, memory, landmark.at);
        if processor != Some(landmark.there) {
            return Err(Foreign::Leads {
                what: landmark.what,
                at: landmark.at,
                kernel: landmark.there,
                processor,
            });
        }
    }
    Ok(())
}

fn landmark(kernel: &Kernel<'_>, what: &'static str, at: KernelVa) -> Result<Landmark, VmiError> {
    let there = kernel.space.translate(at).map_err(VmiError::read(what))?;
    Ok(Landmark {
        what,
        at,
        there: there.at,
    })
}

/// What the tables of every address space must lead to: what is read to find free pages, and what
/// tells where all of it is.
fn landmarks(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    zones: &Zones,
) -> Result<Vec<Landmark>, VmiError> {
    let mut found = Vec::new();
    let mut add = |what, at| -> Result<(), VmiError> {
        found.push(landmark(kernel, what, at)?);
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
    let spans = map.spans();
    let step = spans.len().div_ceil(MAX_SPANS).max(1);
    let spans = || spans.iter().step_by(step).chain(spans.last());
    for at in section_records(kernel, spans().map(|span| span.frames.start()))? {
        add("the records of sections", at)?;
    }
    for span in spans() {
        let frames = span.frames.len();
        for nth in [0, frames / 2, frames.saturating_sub(1)] {
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
    if let Some(at) = kernel.symbol_from_table("page_offset_base")? {
        let base = kernel.read_ptr("page_offset_base", at)?;
        for region in kernel.space.memory().layout().regions() {
            for offset in [region.start().raw(), region.end().raw().saturating_sub(1)] {
                if let Some(at) = base.checked_add(offset)
                    && let Ok(landmark) = landmark(kernel, "the direct map", at)
                {
                    found.push(landmark);
                }
            }
        }
    }
    Ok(found)
}

/// Where the array `mem_section` is, and in it the records of the sections that `frames` are in.
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
    let page = PageSize::SIZE_4K;
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

/// What the twin tables of user space lead to as the kernel's do (`pti_clone_user_shared`,
/// `pti_clone_entry_text`); `None` if the kernel has no such thing.
fn entries(kernel: &Kernel<'_>) -> Result<Option<Vec<Landmark>>, VmiError> {
    let code = match kernel.symbol_from_table("__entry_text_start")? {
        Some(at) => Some(at),
        None => kernel.symbol_from_table("entry_SYSCALL_64")?,
    };
    // Without a symbol table the interrupt table itself tells.
    let has_table = kernel
        .sources()
        .iter()
        .any(|source| !source.is_vmcoreinfo());
    let code = code.or_else(|| page_fault_handler(kernel).filter(|_| !has_table));
    let Some(code) = code else {
        return Ok(None);
    };
    let found = [
        landmark(kernel, "the interrupt table", CPU_ENTRY_AREA),
        landmark(kernel, "the kernel's entry code", code),
    ];
    Ok(found.into_iter().collect::<Result<_, _>>().ok())
}

/// Where the kernel handles page faults, which is in its entry code: by gate 14 of its interrupt
/// table (Intel SDM vol. 3, 6.14.1).
fn page_fault_handler(kernel: &Kernel<'_>) -> Option<KernelVa> {
    const GATE: u64 = 14 * 16;
    let gate = CPU_ENTRY_AREA.checked_add(GATE)?;
    let low = kernel.space.read_u64(gate).ok()?;
    let high = kernel.space.read_u64(gate.checked_add(8)?).ok()?;
    // Bits 15 to 0, 31 to 16 (at 48), 63 to 32 of the address.
    let at = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    (at >> 63 == 1).then(|| KernelVa::new(at))
}
