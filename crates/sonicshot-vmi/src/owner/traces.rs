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
//! | panic | `panic_cpu` or `crashing_cpu` names a processor | `panic` and `crash_kexec` set it before they jump into the crash kernel or reset (`kernel/panic.c`, `arch/x86/kernel/crash.c`); a kernel that runs on has it at -1 |
//! | the BIOS's clock | the ticks at 0x46c are of another time of day than when the kernel booted | its own page, `arch/x86_64/traces` |
//! | EFI tables | the system table or the runtime services table of an EFI firmware do not have the kernel's addresses | its own page, `arch/x86_64/traces` |
//! | firmware tables | the ACPI root pointer, the root table, or a table in it are not where and what the kernel found | ACPI memory is reserved and the tables' names and lengths never change; a BIOS that starts again writes its ROM over the segment that holds the pointer, and builds the tables again later |
//! | trampoline | the header or the page table of the real-mode trampoline are not as the kernel left them | the kernel writes it once, at boot, into memory below 1 MiB that it reserves (`arch/x86/realmode/init.c`) |
//! | per-CPU areas | `this_cpu_off` of a possible processor is not its `__per_cpu_offset` | written once, at boot, for all possible processors, also such that were never plugged in (`arch/x86/kernel/setup_percpu.c`) |
//! | tasks | the list of tasks is not closed, or the end of a task's stack has lost its mark | a kernel stopped at any instruction has at most one torn link, and one stack that is being freed, for each processor (`include/linux/rculist.h`, `kernel/fork.c`) |

use crate::arch::{self, Owner, Test, Trace, Verdict, not_made};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::zone::possible_cpus;
use crate::{KernelVa, VirtualMemory, VirtualReadError};
use sonicshot::MemoryError;
use std::collections::HashSet;

/// Each trace that is reported; more of a kind say nothing more.
const MAX_TRACES: usize = 16;

/// What any kernel leaves in its own records; the architecture's tests come between the two.
const BEFORE: [(&str, Test); 3] = [
    ("the kernel's state", state),
    ("kexec", kexec),
    ("panic", panic),
];
const AFTER: [(&str, Test); 2] = [("per-CPU areas", per_cpu), ("tasks", tasks)];

/// Every test, in the order in which a note names them.
///
/// # Errors
/// [`VmiError::Unsupported`] for an architecture of which none are known.
fn all_tests(kernel: &Kernel<'_>) -> Result<Vec<(&'static str, Test)>, VmiError> {
    let own = arch::of(kernel)?.traces();
    Ok([BEFORE.as_slice(), own, AFTER.as_slice()].concat())
}

/// Makes every test that can be made.
///
/// # Errors
/// What reading the memory gives; a record that cannot be followed is a trace.
pub(crate) fn look(kernel: &Kernel<'_>) -> Result<Owner, VmiError> {
    let mut owner = Owner::default();
    for (name, test) in all_tests(kernel)? {
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
        name => Verdict::Traces(vec![Trace::State { at, value, name }]),
    })
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
        if cpu != -1 {
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
        let at = variable.wrapping_add(offset);
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

fn tasks(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    /// `PID_MAX_LIMIT` (`include/linux/threads.h`).
    const MAX_TASKS: usize = 4 << 20;
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
        if seen.len() >= MAX_TASKS || !seen.insert(at) {
            return Err(VmiError::Corrupt {
                what: "a list of tasks that does not close",
                at: head,
                value: at.raw(),
            });
        }
        let task = KernelVa::new(at.raw().wrapping_sub(links));
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

/// Each trace forged in the memory of a real guest that bears none.
#[cfg(test)]
pub(crate) mod tests {
    use super::{all_tests, look};
    use crate::arch::x86_64::traces::EFI;
    use crate::arch::x86_64::traces::clock::{boot_second, slept};
    use crate::arch::x86_64::traces::efi::boot_params;
    use crate::arch::{Owner, Trace};
    use crate::kernel::{Kernel, element};
    use crate::{GuestOptions, KernelVa, LinuxGuest, OnInconsistency, VmiError};
    use sonicshot::{Gpa, GuestBytes, MappedRegions};
    use std::io::Read;
    use std::path::Path;
    use std::sync::OnceLock;

    pub(crate) fn ram() -> &'static [u8] {
        static RAM: OnceLock<Vec<u8>> = OnceLock::new();
        RAM.get_or_init(|| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../../testdata/guest-6.1-128m/ram.raw.zst");
            let file = std::fs::File::open(path).unwrap();
            let mut reader = zstd::stream::read::Decoder::new(file).unwrap();
            reader.window_log_max(31).unwrap();
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    pub(crate) fn with<T>(ram: &[u8], visit: impl FnOnce(&Kernel<'_>) -> T) -> T {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        visit(
            &LinuxGuest::open(&memory, &GuestOptions::new())
                .unwrap()
                .kernel,
        )
    }

    pub(crate) type Patch = (u64, Vec<u8>);

    pub(crate) fn forged(patches: &[Patch]) -> Vec<u8> {
        let mut forged = ram().to_vec();
        for (at, bytes) in patches {
            let at = usize::try_from(*at).unwrap();
            assert_ne!(&forged[at..at + bytes.len()], bytes, "nothing is forged");
            forged[at..at + bytes.len()].copy_from_slice(bytes);
        }
        forged
    }

    pub(crate) fn owner(patches: &[Patch]) -> Owner {
        with(&forged(patches), |kernel| look(kernel).unwrap())
    }

    pub(crate) fn there(kernel: &Kernel<'_>, at: KernelVa) -> u64 {
        kernel.space.translate(at).unwrap().at.raw()
    }

    pub(crate) fn variable(name: &'static str) -> u64 {
        with(ram(), |kernel| {
            there(kernel, kernel.need_symbol(name).unwrap())
        })
    }

    /// Where `member` of the object is that `pointer` points to.
    fn behind(pointer: &'static str, ty: &str, member: &str) -> u64 {
        with(ram(), |kernel| {
            let variable = kernel.need_symbol(pointer).unwrap();
            let object = kernel.read_ptr(pointer, variable).unwrap();
            let offset = kernel.need_member(ty, member).unwrap().offset;
            there(kernel, object.checked_add(offset).unwrap())
        })
    }

    pub(crate) fn param(member: &str) -> u64 {
        with(ram(), |kernel| {
            there(kernel, boot_params(kernel, member).unwrap())
        })
    }

    /// The BIOS's ticks so many seconds after the kernel's boot (before it, if negative).
    fn ticks(seconds: i64) -> Patch {
        let boot = with(ram(), |kernel| boot_second(kernel).unwrap().ok().unwrap());
        let second = boot.checked_add_signed(seconds).unwrap() % 86400;
        let ticks = u32::try_from(second * 1_193_182 / 65536 + 1).unwrap();
        (0x46c, ticks.to_le_bytes().to_vec())
    }

    fn long(value: u64) -> Vec<u8> {
        value.to_le_bytes().to_vec()
    }

    fn word(value: u32) -> Vec<u8> {
        value.to_le_bytes().to_vec()
    }

    #[test]
    fn a_guest_that_runs_bears_no_trace_by_any_test() {
        let owner = owner(&[]);
        assert_eq!(owner.traces, []);
        assert_eq!(owner.not_made, []);
        assert_eq!((owner.in_question, owner.untold), (vec![], None));
        assert_eq!(owner.clean, of_a_bios());
    }

    /// The tests that a machine with a BIOS gives rise to: all but the one of EFI's tables.
    pub(crate) fn of_a_bios() -> Vec<&'static str> {
        let tests = with(ram(), |kernel| all_tests(kernel).unwrap());
        let names = tests.into_iter().map(|(name, _)| name);
        names.filter(|name| *name != EFI).collect()
    }

    #[test]
    fn each_trace_is_seen_and_is_the_only_one() {
        let root = with(ram(), |kernel| {
            let at = boot_params(kernel, "acpi_rsdp_addr").unwrap();
            kernel.read_u64("boot_params", at).unwrap()
        });
        let pgd = with(ram(), |kernel| {
            let header = kernel.need_symbol("real_mode_header").unwrap();
            let header = kernel.read_ptr("real_mode_header", header).unwrap();
            let offset = kernel.need_member("real_mode_header", "trampoline_pgd");
            let at = header.checked_add(offset.unwrap().offset).unwrap();
            u64::from(kernel.read_u32("trampoline_pgd", at).unwrap())
        });
        let table = with(ram(), |kernel| {
            let list = kernel.need_symbol("acpi_gbl_root_table_list").unwrap();
            let tables = kernel.read_ptr("acpi_table_list", list).unwrap();
            let size = kernel.need_type_size("acpi_table_desc").unwrap();
            let offset = kernel
                .need_member("acpi_table_desc", "address")
                .unwrap()
                .offset;
            let at = element("acpi_table_desc", tables, 2, size, offset).unwrap();
            kernel.read_u64("acpi_table_desc", at).unwrap()
        });
        let rsdt = usize::try_from(root).unwrap() + 16;
        let rsdt = u64::from(u32::from_le_bytes(
            ram()[rsdt..rsdt + 4].try_into().unwrap(),
        ));
        type Is = fn(&Trace) -> bool;
        let state: Is = |trace| matches!(trace, Trace::State { .. });
        let died: Is = |trace| matches!(trace, Trace::Panic { .. });
        let clock: Is = |trace| matches!(trace, Trace::BiosClock { .. });
        let firmware: Is = |trace| matches!(trace, Trace::Firmware { .. });
        let record: Is = |trace| matches!(trace, Trace::Record { .. });
        let cases: Vec<(&str, Vec<Patch>, Is)> = vec![
            ("booting", vec![(variable("system_state"), word(0))], state),
            (
                "scheduling",
                vec![(variable("system_state"), word(1))],
                state,
            ),
            ("restart", vec![(variable("system_state"), word(5))], state),
            (
                "no state",
                vec![(variable("system_state"), word(0x9090))],
                state,
            ),
            (
                "kexec",
                vec![(variable("kexec_in_progress"), vec![1])],
                |trace| matches!(trace, Trace::Kexec { .. }),
            ),
            ("panic", vec![(variable("panic_cpu"), word(0))], died),
            ("crash", vec![(variable("crashing_cpu"), word(3))], died),
            ("the BIOS started later", vec![ticks(10)], clock),
            ("a day less some minutes later", vec![ticks(-200)], clock),
            (
                "the BIOS's data area cleared",
                vec![(0x46c, word(0))],
                clock,
            ),
            (
                "the inode written over",
                vec![(
                    behind("anon_inode_inode", "inode", "i_sb"),
                    long(variable("init_task")),
                )],
                |trace| matches!(trace, Trace::Broken { .. }),
            ),
            (
                "the ROM over its segment",
                vec![(root, vec![0; 36])],
                firmware,
            ),
            (
                "another root table",
                vec![(rsdt, b"XXXX".to_vec())],
                firmware,
            ),
            (
                "a table half built",
                vec![(table, b"XXXX".to_vec())],
                firmware,
            ),
            (
                "the trampoline's header",
                vec![(
                    behind("real_mode_header", "real_mode_header", "text_start"),
                    word(0xeb63_9090),
                )],
                record,
            ),
            (
                "the kernel half",
                vec![(pgd + 511 * 8, long(0x1234_5067))],
                record,
            ),
            ("the low half", vec![(pgd, long(0))], record),
        ];
        for (name, patches, is) in cases {
            let owner = owner(&patches);
            assert_eq!(owner.traces.len(), 1, "{name}: {owner:?}");
            assert!(is(&owner.traces[0]), "{name}: {owner:?}");
            assert_eq!(
                owner.clean.len(),
                of_a_bios().len() - 1,
                "{name}: {owner:?}"
            );
        }
    }

    /// A processor that is online is looked at before anything else is believed; the test here is
    /// left with those that are not.
    #[test]
    fn a_per_cpu_area_written_over_refuses_the_kernel() {
        let this_cpu_off = with(ram(), |kernel| {
            let (_, offset) = crate::mm::zone::possible_cpus(kernel).unwrap()[0];
            let symbol = kernel.need_symbol("this_cpu_off").unwrap();
            there(kernel, symbol.wrapping_add(offset))
        });
        let ram = forged(&[(this_cpu_off, long(7))]);
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let error = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap_err();
        assert!(error.to_string().contains("this_cpu_off"), "{error}");
    }

    #[test]
    fn the_bios_clock_may_be_behind_and_is_not_always_told() {
        let kvm = with(ram(), |kernel| {
            let offset = kernel.need_member("x86_platform_ops", "get_wallclock");
            let at = kernel.need_symbol("x86_platform").unwrap();
            let at = there(kernel, at.checked_add(offset.unwrap().offset).unwrap());
            let clock = kernel.need_symbol("kvm_get_wallclock").unwrap();
            (at, long(clock.raw()))
        });
        let ctime = behind("anon_inode_inode", "inode", "i_ctime.tv_sec");
        let boot = with(ram(), |kernel| boot_second(kernel).unwrap().ok().unwrap());
        let offs_boot = with(ram(), |kernel| {
            let offset = kernel
                .need_member("timekeeper", "offs_boot")
                .unwrap()
                .offset;
            let at = kernel.need_symbol("tk_core").unwrap();
            there(kernel, at.checked_add(8 + offset).unwrap())
        });
        let clean: Vec<Vec<Patch>> = vec![vec![ticks(1)], vec![ticks(-20)], vec![ticks(-110)]];
        for patches in clean {
            let owner = owner(&patches);
            assert_eq!(
                (owner.traces.len(), owner.not_made.len()),
                (0, 0),
                "{owner:?}"
            );
        }
        let hour = || ticks(3600);
        // Gone to sleep so many seconds after the boot, for so many seconds.
        let suspended = variable("timekeeping_suspend_time");
        let asleep = |began: u64, seconds: u64| {
            vec![
                hour(),
                (suspended, long(boot + began)),
                (offs_boot, long(seconds * 1_000_000_000)),
            ]
        };
        let cases: Vec<(&str, Vec<Patch>)> = vec![
            (
                "kexec",
                vec![hour(), (param("hdr.type_of_loader"), vec![0xd1])],
            ),
            (
                "EFI",
                vec![
                    hour(),
                    (param("efi_info.efi_loader_signature"), b"EL64".to_vec()),
                ],
            ),
            ("no BIOS data area", vec![hour(), (0x413, vec![0; 2])]),
            ("no BIOS clock", vec![(0x46c, word(0x0018_00b0))]),
            ("touched", vec![hour(), (ctime, long(boot + 9))]),
            ("local time", vec![hour(), kvm.clone()]),
            (
                "neither",
                vec![hour(), (kvm.0, long(variable("init_task")))],
            ),
            ("slept", vec![hour(), (offs_boot, long(5_000_000_000))]),
            ("slept", asleep(3598, 5)),
            ("slept", asleep(3594, 5)),
            ("slept", asleep(7200, 83_000)),
        ];
        for (why, patches) in cases {
            let owner = owner(&patches);
            assert_eq!(owner.traces, [], "{why}");
            let [("the BIOS's clock", said)] = &owner.not_made[..] else {
                panic!("{why}: {owner:?}");
            };
            assert!(said.contains(why), "{why}: {said}");
        }
        // A BIOS that woke the kernel up did so no later than the kernel woke up.
        for (began, seconds) in [(3600 - 20, 5), (60, 3000), (3620, 5)] {
            let owner = owner(&asleep(began, seconds));
            assert!(
                matches!(owner.traces[..], [Trace::BiosClock { .. }]),
                "{began}, {seconds}: {owner:?}"
            );
        }
        // KVM's own clock is not set by zones' minutes.
        let owner = owner(&[ticks(3600 + 100), kvm]);
        assert!(
            matches!(owner.traces[..], [Trace::BiosClock { .. }]),
            "{owner:?}"
        );
        assert_eq!(with(ram(), |kernel| slept(kernel).unwrap()), Some(0));
    }

    #[test]
    fn one_torn_stack_is_explained_and_two_are_not() {
        let stacks = with(ram(), |kernel| {
            let links = kernel.need_member("task_struct", "tasks").unwrap().offset;
            let stack = kernel.need_member("task_struct", "stack").unwrap().offset;
            let mut at = kernel.need_symbol("init_task").unwrap();
            let mut found = Vec::new();
            for _ in 0..6 {
                let next = at.checked_add(links).unwrap();
                let next = kernel.read_ptr("tasks", next).unwrap().raw() - links;
                at = KernelVa::new(next);
                let end = kernel
                    .read_ptr("stack", at.checked_add(stack).unwrap())
                    .unwrap();
                found.push((there(kernel, end), word(0xdead)));
            }
            found
        });
        assert_eq!(owner(&stacks[..1]).traces, []);
        assert_eq!(owner(&stacks[..2]).traces.len(), 2);
        // Cut short, and a circle that never comes back.
        let next = with(ram(), |kernel| {
            let links = kernel.need_member("task_struct", "tasks").unwrap().offset;
            let head = kernel
                .need_symbol("init_task")
                .unwrap()
                .checked_add(links)
                .unwrap();
            let first = kernel.read_ptr("tasks", head).unwrap();
            (there(kernel, first), long(first.raw()))
        });
        let owner = owner(&[next]);
        assert!(
            matches!(owner.traces[..], [Trace::Broken { .. }]),
            "{owner:?}"
        );
    }

    #[test]
    fn a_trace_refuses_the_guest_and_is_named() {
        let ram = forged(&[ticks(77)]);
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let error = guest.classify(OnInconsistency::Refuse).unwrap_err();
        assert!(matches!(error, VmiError::LaterOwner(_)), "{error}");
        assert!(
            error.to_string().contains("the BIOS's clock at 0x46c"),
            "{error}"
        );
        let kept = guest.classify(OnInconsistency::KeepInQuestion).unwrap();
        assert!(
            kept.notes
                .iter()
                .any(|note| note.to_string().contains("0x46c"))
        );
    }
}
