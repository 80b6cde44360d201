//! Whether a processor runs on the page tables of the kernel that was found, by its `CR3`.
//!
//! Every address space of a kernel leads to the landmarks, with one exception: under page-table
//! isolation (PTI) user space has tables of its own, which are the twin of whole ones.

use super::paging::Walk;
use crate::arch::x86_64::Cr3;
use crate::arch::{Foreign, ForeignProcessor, Landmark, Tables, Told};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::paging::Paging;
use crate::{KernelVa, VirtualMemory};
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Gpa, GuestMemory, Processor};
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

/// The paging state of a processor.
#[derive(Debug, Clone, Copy)]
enum State {
    /// On these page tables; `None`: with as many levels as the kernel has.
    Tables {
        cr3: Cr3,
        levels: Option<u32>,
    },
    NoPaging(ControlRegisters),
    Nested,
    Unknown,
}

impl State {
    fn of(memory: &dyn GuestMemory, told: &Told) -> Self {
        // Xen itself keeps the paging of a paravirtualised guest.
        let paravirtualised = memory.p2m().is_some();
        let started = |registers: ControlRegisters| {
            if !paravirtualised && !registers.is_in_long_mode() {
                return Self::NoPaging(registers);
            }
            let five_levels = !paravirtualised && registers.cr4 & CR4_LA57 != 0;
            Self::Tables {
                cr3: Cr3::new(registers.cr3),
                levels: Some(super::levels(five_levels)),
            }
        };
        match told {
            Told::Cr3(cr3) => Self::Tables {
                cr3: *cr3,
                levels: None,
            },
            Told::Processor(Processor::Started(registers)) => started(*registers),
            Told::Processor(Processor::InNestedGuest { host: Some(host) }) => started(*host),
            Told::Processor(Processor::InNestedGuest { host: None }) => Self::Nested,
            Told::Processor(_) => Self::Unknown,
        }
    }
}

/// The address of the top-level table.
fn root(cr3: Cr3) -> u64 {
    cr3.raw() & ROOT
}

/// The guest-physical address of `at` by these page tables; `None` if it is not mapped or cannot be read.
fn place(walk: &Walk, memory: &dyn GuestMemory, at: KernelVa) -> Option<Gpa> {
    let there = walk.translate(memory, at).ok().flatten()?;
    Some(there.at)
}

/// The top-level tables that a processor runs on, of user space the kernel's twin first; and how
/// many levels each may have.
pub(super) fn roots(memory: &dyn GuestMemory, told: &Told) -> Vec<(Gpa, u32)> {
    let State::Tables { cr3, levels } = State::of(memory, told) else {
        return Vec::new();
    };
    let levels = levels.map_or(vec![4, 5], |levels| vec![levels]);
    let mut found = Vec::new();
    for levels in levels {
        for root in [root(cr3) & !PTI_USER_TABLE, root(cr3)] {
            let root = (Gpa::new(root), levels);
            if !found.contains(&root) {
                found.push(root);
            }
        }
    }
    found
}

/// Whether the processor's page tables have `tables` at their place.
pub(super) fn may_run_on(memory: &dyn GuestMemory, told: &Told, tables: &Tables) -> bool {
    let State::Tables { cr3, levels } = State::of(memory, told) else {
        return false;
    };
    let levels = levels.unwrap_or(tables.levels);
    [root(cr3), root(cr3) & !PTI_USER_TABLE]
        .into_iter()
        .any(|root| {
            let walk = Walk::new(Gpa::new(root), levels);
            place(&walk, memory, tables.page_table) == Some(tables.root)
        })
}

/// The first processor that does not run on `kernel`.
pub(super) fn first_foreign(
    kernel: &Kernel<'_>,
    landmarks: &[Landmark],
    told: &[(usize, Told)],
) -> Result<Option<ForeignProcessor>, VmiError> {
    let memory = kernel.space.memory();
    let entries = entries(kernel)?;
    let kernel_levels = kernel.space.levels();
    // Many processors may run on the same tables.
    let mut passed = HashSet::new();
    for (number, told) in told {
        let foreign = |cr3, why| {
            Ok(Some(ForeignProcessor {
                number: *number,
                cr3,
                why,
            }))
        };
        let (cr3, levels) = match State::of(memory, told) {
            State::Tables { cr3, levels } => (cr3, levels.unwrap_or(kernel_levels)),
            State::NoPaging(registers) => {
                let cr3 = Some(Cr3::new(registers.cr3));
                return foreign(cr3, Foreign::NoPaging { registers });
            }
            State::Nested => return foreign(None, Foreign::Nested),
            State::Unknown => return foreign(None, Foreign::Unknown),
        };
        let root = root(cr3);
        if !passed.insert((root, levels)) {
            continue;
        }
        let walk = |root| Walk::new(Gpa::new(root), levels);
        let Err(why) = lead_alike(&walk(root), memory, landmarks) else {
            continue;
        };
        // Bit 12 is a bit of the address, unless the table is the twin of a whole one.
        let is_twin = root & PTI_USER_TABLE != 0
            && memory.p2m().is_none()
            && entries
                .as_ref()
                .is_some_and(|entries| lead_alike(&walk(root), memory, entries).is_ok())
            && lead_alike(&walk(root & !PTI_USER_TABLE), memory, landmarks).is_ok();
        if !is_twin {
            return foreign(Some(cr3), why);
        }
    }
    Ok(None)
}

fn lead_alike(
    walk: &Walk,
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

/// The addresses that the twin tables of user space map as the kernel's do (`pti_clone_user_shared`,
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
        Landmark::new(kernel, "the interrupt table", CPU_ENTRY_AREA),
        Landmark::new(kernel, "the kernel's entry code", code),
    ];
    Ok(found.into_iter().collect::<Result<_, _>>().ok())
}

/// The address at which the kernel handles page faults, which is in its entry code: by gate 14 of its
/// interrupt table (Intel SDM vol. 3, 6.14.1).
fn page_fault_handler(kernel: &Kernel<'_>) -> Option<KernelVa> {
    const GATE: u64 = 14 * 16;
    let gate = CPU_ENTRY_AREA.checked_add(GATE)?;
    let low = kernel.space.read_u64(gate).ok()?;
    let high = kernel.space.read_u64(gate.checked_add(8)?).ok()?;
    // Bits 15 to 0, 31 to 16 (at 48), 63 to 32 of the address.
    let at = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
    (at >> 63 == 1).then(|| KernelVa::new(at))
}
