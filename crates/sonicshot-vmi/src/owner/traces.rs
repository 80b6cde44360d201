//! Whether the kernel found still owns the memory, by what the memory itself holds.
//!
//! RAM outlives a reset (QEMU keeps it) and a kexec. In the firmware, a boot menu, a loader, the
//! next kernel's decompressor and its early boot, the records of the kernel that is gone are all
//! consistent, and say of pages which the new owner uses already that they are free. Where the
//! processors' registers are known they tell; in raw memory only traces do. Each test here looks
//! for one. None of them can fail on a kernel that runs, whatever that kernel did before; each is
//! named with what makes that so. A test whose symbols, types or memory are missing is not made,
//! and the classification's note says so.
//!
//! | test | trace | why it is one |
//! |---|---|---|
//! | the kernel's state | `system_state` is not `SYSTEM_RUNNING` or `SYSTEM_SUSPEND` | `kernel_restart`, `kernel_kexec`, `kernel_halt` and `kernel_power_off` set it before they give the machine away (`kernel/reboot.c`, `kernel/kexec_core.c`) and never back; the initial value, `SYSTEM_BOOTING`, means that the next kernel's image has been written over this one, or that the kernel is not up yet |
//! | kexec | `kexec_in_progress` | set right before the jump (`kernel/kexec_core.c`) |
//! | panic | `panic_cpu` or `crashing_cpu` names a processor | `panic` and `crash_kexec` set it before they jump into the crash kernel or reset (`kernel/panic.c`, `arch/x86/kernel/crash.c`); a kernel that runs on has it at -1. One whose log says that it stays after a panic (`panic=0`) owns its memory for good |
//! | the machine's own | what its firmware and the next kernel's start leave | in the architecture's room, `arch/NAME/traces` |
//! | the kernel's log | it says that the kernel restarts, halts, powers off, or starts another | asked where no types tell of the state: all these are said right before (`kernel/reboot.c`, `kernel/kexec_core.c`) |
//! | per-CPU areas | `this_cpu_off` of a possible processor is not its `__per_cpu_offset` | written once, at boot, for all possible processors, also such that were never plugged in (`arch/x86/kernel/setup_percpu.c`) |
//! | tasks | the list of tasks is not closed, or the end of a task's stack has lost its mark | a kernel stopped at any instruction has at most one torn link, and one stack that is being freed, for each processor (`include/linux/rculist.h`, `kernel/fork.c`) |

use crate::arch::{self, Owner, Test, Trace, Verdict, not_made};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::cpus::possible_cpus;
use crate::owner::log;
use crate::{KernelVa, VirtualMemory, VirtualReadError};
use sonicshot::MemoryError;
use std::collections::HashSet;

/// Each trace that is reported; more of a kind say nothing more.
const MAX_TRACES: usize = 16;

/// The traces that any kernel leaves in its own records; the architecture's tests come between the two.
const BEFORE: [(&str, Test); 3] = [
    ("the kernel's state", state),
    ("kexec", kexec),
    ("panic", panic),
];
const AFTER: [(&str, Test); 2] = [("per-CPU areas", per_cpu), ("tasks", tasks)];

/// The traces of a kernel without types; behind them come the architecture's tests of that kind.
const BY_LOG: [(&str, Test); 1] = [("the kernel's log", log_end)];

/// Every test, in the order in which a note names them; `types` is whether types tell of the
/// kernel.
///
/// # Errors
/// [`VmiError::Unsupported`] for an architecture of which none are known.
fn all_tests(kernel: &Kernel<'_>, types: bool) -> Result<Vec<(&'static str, Test)>, VmiError> {
    let arch = arch::of(kernel)?;
    Ok(if types {
        [BEFORE.as_slice(), arch.traces(), AFTER.as_slice()].concat()
    } else {
        [BY_LOG.as_slice(), arch.traces_by_log()].concat()
    })
}

/// Makes every test that can be made. A kernel of which no types tell (`types`) has few: where the
/// one is not made that would tell of a reset, nothing would, and its owner is untold.
///
/// # Errors
/// What reading the memory gives; a record that cannot be followed is a trace.
pub(crate) fn look(kernel: &Kernel<'_>, types: bool) -> Result<Owner, VmiError> {
    let mut owner = make(kernel, types)?;
    if !types && owner.traces.is_empty() && !arch::of(kernel)?.is_settled(&owner) {
        let not_made = owner.not_made.iter();
        let not_made: Vec<String> = not_made
            .map(|(test, why)| format!("{test}, {why}"))
            .collect();
        owner.untold.get_or_insert_with(|| {
            let why = not_made.join("; ");
            format!("types are missing, and nothing else would show a reset (not tested: {why})")
        });
    }
    Ok(owner)
}

fn make(kernel: &Kernel<'_>, types: bool) -> Result<Owner, VmiError> {
    let _tables = kernel.space.remember_tables();
    let mut owner = Owner::default();
    for (name, test) in all_tests(kernel, types)? {
        match test(kernel) {
            Ok(Verdict::Clean) => owner.clean.push(name),
            Ok(Verdict::NotMade(why)) => owner.not_made.push((name, why)),
            Ok(Verdict::Traces(traces)) => owner.traces.extend(traces),
            Ok(Verdict::CleanBut(ranges)) => {
                owner.clean.push(name);
                owner.in_question.extend(ranges);
            }
            Ok(Verdict::Untold(why)) => owner.untold = Some(why),
            Ok(Verdict::NotHere) => {}
            Err(
                VmiError::Memory(MemoryError::NotRam { .. } | MemoryError::Absent { .. })
                | VmiError::Read {
                    source:
                        VirtualReadError::Memory {
                            source: MemoryError::Absent { .. },
                            ..
                        },
                    ..
                },
            ) => owner
                .not_made
                .push((name, "the dump does not have what it looks at".into())),
            Err(
                error @ (VmiError::Memory(_)
                | VmiError::Read {
                    source:
                        VirtualReadError::Memory {
                            source: MemoryError::Io { .. } | MemoryError::Backend { .. },
                            ..
                        },
                    ..
                }),
            ) => return Err(error),
            Err(
                error @ (VmiError::Missing { .. }
                | VmiError::Disagree { .. }
                | VmiError::Unsupported { .. }
                | VmiError::Symbols(_)),
            ) => owner.not_made.push((name, error.to_string())),
            // The kernel's own objects lie in RAM, and their page tables lead there.
            Err(error) => owner.traces.push(Trace::Broken {
                test: name,
                why: with_causes(&error),
            }),
        }
    }
    owner.traces.truncate(MAX_TRACES);
    Ok(owner)
}

fn with_causes(error: &VmiError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

/// `enum system_states` (`include/linux/kernel.h`).
fn state(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    let at = kernel.need_symbol("system_state")?;
    let value = kernel.read_u32("system_state", at)?;
    let mut known = Vec::new();
    for name in [
        "SYSTEM_BOOTING",
        "SYSTEM_SCHEDULING",
        "SYSTEM_FREEING_INITMEM",
        "SYSTEM_RUNNING",
        "SYSTEM_HALT",
        "SYSTEM_POWER_OFF",
        "SYSTEM_RESTART",
        "SYSTEM_SUSPEND",
    ] {
        if let Some(number) = kernel.constant(name)? {
            known.push((number, name));
        }
    }
    if !known.iter().any(|(_, name)| *name == "SYSTEM_RUNNING") {
        return not_made("no source knows SYSTEM_RUNNING");
    }
    let name = known
        .iter()
        .find(|(number, _)| *number == i64::from(value))
        .map(|(_, name)| *name);
    Ok(match name {
        Some("SYSTEM_RUNNING" | "SYSTEM_SUSPEND") => Verdict::Clean,
        // It found no root file system, say, and never came further.
        Some("SYSTEM_SCHEDULING" | "SYSTEM_FREEING_INITMEM") if stays(kernel) => Verdict::Clean,
        name => Verdict::Traces(vec![Trace::State { at, value, name }]),
    })
}

/// The last words of a kernel.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// Nothing that ends it.
    Nothing,
    /// It gives the machine away.
    Last(String),
    /// It panicked: a restart or a crash kernel comes, unless it [stays](Said::Stays).
    Panic(String),
    /// It panicked, and neither restarts nor starts another (`panic=0`): `panic` says so where it comes
    /// to the loop that it does not leave.
    Stays,
}

/// The last words of a kernel in its log (`kernel/reboot.c`, `kernel/kexec_core.c`, `kernel/panic.c`,
/// `drivers/tty/sysrq.c`): it has stopped all else by then.
fn said(kernel: &Kernel<'_>) -> Result<Said, VmiError> {
    const LAST: [&str; 7] = [
        "reboot: Restarting system",
        "reboot: machine restart",
        "reboot: Power down",
        "reboot: System halted",
        "kexec_core: Starting new kernel",
        "kexec: Starting new kernel",
        "sysrq: Resetting",
    ];
    const PANIC: &str = "Kernel panic - not syncing";
    const STAYS: &str = "---[ end Kernel panic";
    let mut said = Said::Nothing;
    log::lines(kernel, &mut |line| {
        if LAST.iter().any(|last| line.text.starts_with(last)) {
            said = Said::Last(line.text);
        } else if line.text.starts_with(PANIC) {
            said = Said::Panic(line.text);
        } else if line.text.starts_with(STAYS) {
            said = Said::Stays;
        }
        // One is enough: a process may have written many.
        !matches!(said, Said::Last(_))
    })?;
    Ok(said)
}

fn log_end(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    Ok(match said(kernel)? {
        Said::Last(line) | Said::Panic(line) => Verdict::Traces(vec![Trace::Log { line }]),
        Said::Nothing | Said::Stays => Verdict::Clean,
    })
}

/// Whether the kernel's own log says that it panicked and stays. Two records of different kinds so have
/// to say it: the log, and a variable that could not tell it from a panic with an end. Without a log,
/// nothing is said.
fn stays(kernel: &Kernel<'_>) -> bool {
    said(kernel).is_ok_and(|said| said == Said::Stays)
}

fn kexec(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    let Some(at) = kernel.symbol("kexec_in_progress")? else {
        return not_made("no source knows kexec_in_progress");
    };
    let mut set = [0];
    let read = kernel.space.read(at, &mut set);
    read.map_err(VmiError::read("kexec_in_progress"))?;
    Ok(match set {
        [0] => Verdict::Clean,
        _ => Verdict::Traces(vec![Trace::Kexec { at }]),
    })
}

fn panic(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    let mut traces = Vec::new();
    let mut looked = false;
    for variable in ["panic_cpu", "crashing_cpu"] {
        let Some(at) = kernel.symbol(variable)? else {
            continue;
        };
        looked = true;
        let cpu = kernel.read_u32(variable, at)?.cast_signed();
        // Into a crash kernel it goes before it says that it stays.
        let clean = variable == "panic_cpu" && cpu != -1 && stays(kernel);
        if cpu != -1 && !clean {
            traces.push(Trace::Panic { variable, at, cpu });
        }
    }
    if !looked {
        return not_made("no source knows panic_cpu or crashing_cpu");
    }
    Ok(traces.into())
}

fn per_cpu(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    let variable = kernel.need_symbol("this_cpu_off")?;
    let mut traces = Vec::new();
    let all = possible_cpus(kernel)?;
    if all.is_empty() {
        return Err(VmiError::Corrupt {
            what: "__cpu_possible_mask",
            at: kernel.need_symbol("__cpu_possible_mask")?,
            value: 0,
        });
    }
    for (_, offset) in all {
        let at = variable.moved_by(offset);
        let value = kernel.read_u64("this_cpu_off", at)?;
        if value != offset {
            traces.push(Trace::Record {
                what: "this_cpu_off",
                at,
                value,
                expected: offset,
            });
        }
    }
    Ok(traces.into())
}

/// `PID_MAX_LIMIT` (`include/linux/threads.h`).
const MAX_TASKS: usize = 4 << 20;

/// Whether a list of tasks may go on at `at`: it was not there, and they are no more than
/// `most`.
fn is_next(seen: &mut HashSet<KernelVa>, at: KernelVa, most: usize) -> bool {
    seen.len() < most && seen.insert(at)
}

fn tasks(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    /// `STACK_END_MAGIC` (`include/uapi/linux/magic.h`), at the lowest word of a stack.
    const STACK_END: u64 = 0x57ac_6e9d;
    let first = kernel.need_symbol("init_task")?;
    let links = kernel.need_member("task_struct", "tasks")?.offset;
    let stack = kernel.need_member("task_struct", "stack")?.offset;
    let processors = possible_cpus(kernel)?.len();
    let head = element("init_task", first, 0, 0, links)?;
    let mut at = head;
    let (mut torn, mut lost) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    loop {
        if !is_next(&mut seen, at, MAX_TASKS) {
            return Err(VmiError::Corrupt {
                what: "a list of tasks that does not close",
                at: head,
                value: at.raw(),
            });
        }
        let task = at.checked_sub(links).ok_or(VmiError::Corrupt {
            what: "a list of tasks",
            at: head,
            value: at.raw(),
        })?;
        let pointer = element("task_struct", task, 0, 0, stack)?;
        let end = kernel.read_ptr("task_struct.stack", pointer)?;
        // A task that has ended may have given its stack back.
        if end.raw() != 0 {
            let value = kernel.read_u64("a task's stack", end);
            let whole = match value {
                Ok(value) => value & 0xffff_ffff,
                Err(VmiError::Read {
                    source: VirtualReadError::NotMapped { .. },
                    ..
                }) => 0,
                Err(error) => return Err(error),
            };
            if whole != STACK_END {
                lost.push(Trace::Record {
                    what: "the end of a task's stack",
                    at: end,
                    value: whole,
                    expected: STACK_END,
                });
            }
        }
        let next = kernel.read_ptr("task_struct.tasks.next", at)?;
        let back = element("list_head", next, 0, 0, 8)?;
        let back_is = kernel.read_ptr("task_struct.tasks.prev", back)?;
        if back_is != at {
            torn.push(Trace::Record {
                what: "task_struct.tasks.prev",
                at: back,
                value: back_is.raw(),
                expected: at.raw(),
            });
        }
        if next == head {
            break;
        }
        at = next;
    }
    let mut traces = Vec::new();
    for found in [torn, lost] {
        if found.len() > processors {
            traces.extend(found);
        }
    }
    Ok(traces.into())
}

#[cfg(test)]
pub(crate) mod tests;
