//! Whether a kernel still stands: its own records of itself, as only a kernel that runs keeps
//! them together.
//!
//! A kernel that is gone (a reset, a reboot, kexec) leaves its memory to the next one, which
//! writes over it bit by bit. What is looked at here lies in different places: its image, the page
//! with its VMCOREINFO, each processor's area, each running task.

use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::mm::cpus::{in_mask, possible_cpus};
use crate::symbols::Vmcoreinfo;
use crate::{KernelVa, VirtualMemory, VirtualReadError};
use sonicshot::MemoryError;

/// One processor that the kernel may use.
#[derive(Debug, Clone, Copy)]
struct Cpu {
    number: u64,
    /// The displacement of its per-CPU area.
    offset: u64,
    online: bool,
}

/// Refuses a kernel whose records of itself are not whole. What no symbol or type tells of is
/// passed over. `is_note` is of a kernel whose VMCOREINFO is the note of a dump, and no page of
/// memory.
pub(crate) fn check(kernel: &Kernel<'_>, is_note: bool) -> Result<(), VmiError> {
    own_copy(kernel, is_note)?;
    for cpu in cpus(kernel)? {
        own_area(kernel, cpu)?;
        if cpu.online {
            own_task(kernel, cpu)?;
        }
    }
    Ok(())
}

fn stale(what: String) -> VmiError {
    VmiError::Stale { what }
}

/// The VMCOREINFO by which the kernel was found is the one that its own variable points to.
fn own_copy(kernel: &Kernel<'_>, is_note: bool) -> Result<(), VmiError> {
    let Some(info) = &kernel.vmcoreinfo else {
        return Ok(());
    };
    let Some(variable) = kernel.symbol_from_table("vmcoreinfo_data")? else {
        return Ok(());
    };
    // VMCOREINFO is at most one page.
    let mut text = kernel.page_buffer()?;
    let at = match kernel.read_ptr("vmcoreinfo_data", variable) {
        // Its page tables have lost it.
        Err(VmiError::Read {
            source:
                VirtualReadError::NotMapped { .. }
                | VirtualReadError::Memory {
                    source: MemoryError::NotRam { .. },
                    ..
                },
            ..
        }) => {
            return Err(stale(format!(
                "its own variable vmcoreinfo_data, at {variable}, is not there"
            )));
        }
        other => other?,
    };
    match kernel.space.read(at, &mut text) {
        Ok(()) => {}
        // A kernel that crashed keeps it where the crash kernel is, which no dump has.
        Err(_) if is_note => return Ok(()),
        Err(_) => return Err(stale(format!("its VMCOREINFO at {at} is not there"))),
    }
    match Vmcoreinfo::parse(&text) {
        Ok(own) if lines(own.text()).eq(lines(info.text())) => Ok(()),
        _ => Err(stale(format!("its own VMCOREINFO, at {at}, is another"))),
    }
}

/// The lines of VMCOREINFO, without what is added when the kernel crashes
/// (`crash_save_vmcoreinfo`).
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.is_empty() && !line.starts_with("CRASHTIME="))
}

/// The first address of each processor's area that is known, with its displacement.
pub(crate) fn per_cpu_areas(kernel: &Kernel<'_>) -> Result<Vec<KernelVa>, VmiError> {
    let Some(symbol) = kernel.symbol_from_table("this_cpu_off")? else {
        return Ok(Vec::new());
    };
    Ok(cpus(kernel)?
        .into_iter()
        .map(|cpu| symbol.moved_by(cpu.offset))
        .collect())
}

fn cpus(kernel: &Kernel<'_>) -> Result<Vec<Cpu>, VmiError> {
    for name in ["__per_cpu_offset", "__cpu_possible_mask", "nr_cpu_ids"] {
        if kernel.symbol_from_table(name)?.is_none() {
            return Ok(Vec::new());
        }
    }
    let Some(online) = kernel.symbol_from_table("__cpu_online_mask")? else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for (number, offset) in possible_cpus(kernel)? {
        found.push(Cpu {
            number,
            offset,
            online: in_mask(kernel, "__cpu_online_mask", online, number)?,
        });
    }
    if !found.iter().any(|cpu| cpu.online) {
        return Err(stale("none of its processors is online".into()));
    }
    Ok(found)
}

/// Each processor's area says where it is and whose (`setup_per_cpu_areas`).
fn own_area(kernel: &Kernel<'_>, cpu: Cpu) -> Result<(), VmiError> {
    let wrong = |name: &str, value: u64| {
        stale(format!(
            "the area of its processor {} holds {name} {value:#x}",
            cpu.number
        ))
    };
    if let Some(symbol) = kernel.symbol_from_table("this_cpu_off")? {
        let value = kernel.read_u64("this_cpu_off", symbol.moved_by(cpu.offset))?;
        if value != cpu.offset {
            return Err(wrong("this_cpu_off", value));
        }
    }
    // From 6.2 to 6.14 a member of `pcpu_hot`.
    let number = match kernel.symbol_from_table("cpu_number")? {
        Some(symbol) => Some(symbol),
        None => hot(kernel, "cpu_number")?,
    };
    if let Some(symbol) = number {
        let value = kernel.read_u32("cpu_number", symbol.moved_by(cpu.offset))?;
        if u64::from(value) != cpu.number {
            return Err(wrong("cpu_number", value.into()));
        }
    }
    Ok(())
}

fn hot(kernel: &Kernel<'_>, member: &str) -> Result<Option<KernelVa>, VmiError> {
    let symbol = kernel.symbol_from_table("pcpu_hot")?;
    let member = kernel.member("pcpu_hot", member)?;
    Ok(symbol
        .zip(member)
        .map(|(symbol, member)| symbol.moved_by(member.offset)))
}

/// The task that a processor runs is of that processor (`task_cpu`), and is running (`on_cpu`,
/// which is set before a task becomes the current one, and cleared when another is).
fn own_task(kernel: &Kernel<'_>, cpu: Cpu) -> Result<(), VmiError> {
    let current = match hot(kernel, "current_task")? {
        Some(symbol) => Some(symbol),
        None => kernel.symbol_from_table("current_task")?,
    };
    let Some(current) = current else {
        return Ok(());
    };
    let task = kernel.read_ptr("current_task", current.moved_by(cpu.offset))?;
    let field = |name: &str| -> Result<Option<u64>, VmiError> {
        let Some(member) = kernel.member("task_struct", name)? else {
            return Ok(None);
        };
        let at = task.moved_by(member.offset);
        let mut bytes = [0; 4];
        // An int, or shorter (`on_cpu`).
        let len = member.size.and_then(|size| usize::try_from(size).ok());
        let Some(part) = bytes.get_mut(..len.unwrap_or(4)) else {
            return Ok(None);
        };
        kernel.space.read(at, part).map_err(|_| {
            stale(format!(
                "the task of its processor {}, at {task}, is not there",
                cpu.number
            ))
        })?;
        Ok(Some(u32::from_le_bytes(bytes).into()))
    };
    // In `thread_info` since 5.16 (bcf9033e5449).
    let number = match field("cpu")? {
        Some(number) => Some(number),
        None => field("thread_info.cpu")?,
    };
    if let Some(number) = number
        && number != cpu.number
    {
        return Err(stale(format!(
            "the task of its processor {} is one of processor {number}",
            cpu.number
        )));
    }
    if let Some(on_cpu) = field("on_cpu")?
        && on_cpu != 1
    {
        return Err(stale(format!(
            "the task of its processor {}, at {task}, is not running (on_cpu {on_cpu:#x})",
            cpu.number
        )));
    }
    Ok(())
}
