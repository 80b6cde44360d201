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
//! | the BIOS's clock | the ticks at 0x46c are of another time of day than when the kernel booted | below |
//! | EFI tables | the system table or the runtime services table of an EFI firmware do not have the kernel's addresses | below |
//! | firmware tables | the ACPI root pointer, the root table, or a table in it are not where and what the kernel found | ACPI memory is reserved and the tables' names and lengths never change; a BIOS that starts again writes its ROM over the segment that holds the pointer, and builds the tables again later |
//! | trampoline | the header or the page table of the real-mode trampoline are not as the kernel left them | the kernel writes it once, at boot, into memory below 1 MiB that it reserves (`arch/x86/realmode/init.c`) |
//! | per-CPU areas | `this_cpu_off` of a possible processor is not its `__per_cpu_offset` | written once, at boot, for all possible processors, also such that were never plugged in (`arch/x86/kernel/setup_percpu.c`) |
//! | tasks | the list of tasks is not closed, or the end of a task's stack has lost its mark | a kernel stopped at any instruction has at most one torn link, and one stack that is being freed, for each processor (`include/linux/rculist.h`, `kernel/fork.c`) |
//!
//! # The BIOS's clock
//!
//! A reset leaves no word in the kernel's own memory, and what the firmware builds is byte for
//! byte what it built for the kernel found: the same tables at the same places. What differs is
//! the time. A BIOS clears its data area first (`bda_init` in `SeaBIOS`), sets the ticks since midnight
//! from the clock chip (`clock_setup`; IBM PC, INT 1Ah) and counts them on by interrupts for as
//! long as BIOS, loader and the kernel's real-mode code let it; a kernel never writes there. When
//! that kernel booted is told by the times of `anon_inode_inode`, an inode that it makes once, at
//! boot, before any process can set the clock (`fs/anon_inodes.c`), by its clock as read from the
//! same chip (`mach_get_cmos_time`). So the ticks are those of the boot or earlier, by as much as
//! a loader kept interrupts off. Later ones are of a later start of the BIOS. Not tested: kernels
//! that no BIOS started (EFI, direct boots, kexec), that have another clock, and with an inode that
//! was touched since. A kernel that has slept may have been woken up by a BIOS that set its ticks
//! (what hibernation brings back is older than the BIOS's last start): they may be of its last
//! sleep, too, which began when `timekeeping_suspend_time` says and lasted no longer than all
//! sleeps together (`timekeeper.offs_boot`). The ticks say no date: a reset so many whole days after the boot, less up to
//! two minutes, is not seen, nor one in the first three seconds.
//!
//! # EFI
//!
//! There is no such clock in a machine with an EFI firmware, but the firmware's tables hold what
//! the kernel told it: the addresses at which the kernel calls its runtime services. A firmware
//! that starts again builds both tables anew, at the same place and with addresses of its own,
//! before it hands out other memory ([`efi`]). What it writes before, it writes to places of its
//! own: free pages there are kept. Where the runtime services are off (`efi=noruntime`, kernels
//! for real-time work), and where it is not known where the firmware writes, nothing would tell of
//! a reset, and the guest is refused.

use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::mm::zone::possible_cpus;
use crate::owner::efi::{self, boot_params};
use crate::{KernelVa, VirtualMemory, VirtualReadError};
use core::fmt;
use sonicshot::{Gpa, GpaRange, MemoryError};
use std::collections::HashSet;

/// One thing in memory that the kernel found does not leave so while it owns the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trace {
    /// `system_state` says that the kernel has gone, or is not up.
    State {
        /// Where it is.
        at: KernelVa,
        /// Its value.
        value: u32,
        /// The name of the value, if the kernel's types tell.
        name: Option<&'static str>,
    },
    /// `kexec_in_progress` is set.
    Kexec {
        /// Where it is.
        at: KernelVa,
    },
    /// The kernel has died.
    Panic {
        /// The variable that says so.
        variable: &'static str,
        /// Where it is.
        at: KernelVa,
        /// The processor that died.
        cpu: i32,
    },
    /// The BIOS started after the kernel did. Both times in seconds since midnight.
    BiosClock {
        /// Ticks in the BIOS's data area, in seconds.
        bios: u64,
        /// The kernel's clock when it booted.
        kernel: u64,
    },
    /// A table of the firmware is not where and what the kernel found.
    Firmware {
        /// Which table.
        what: String,
        /// Where the kernel found it.
        at: Gpa,
        /// What is there.
        found: String,
    },
    /// A record of the kernel's own, written once, holds something else.
    Record {
        /// Which record.
        what: &'static str,
        /// Where it is.
        at: KernelVa,
        /// What it holds.
        value: u64,
        /// What the kernel put there.
        expected: u64,
    },
    /// A record of the kernel's own cannot be followed.
    Broken {
        /// Which test could not be ended.
        test: &'static str,
        /// Why.
        why: String,
    },
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State { at, value, name } => {
                let name = name.unwrap_or("not the state of a kernel that runs");
                write!(f, "system_state at {at} is {value} ({name})")
            }
            Self::Kexec { at } => write!(f, "kexec_in_progress at {at} is set"),
            Self::Panic { variable, at, cpu } => {
                write!(f, "{variable} at {at} is {cpu}: the kernel has died")
            }
            Self::BiosClock { bios, kernel } => {
                let clock = |s: u64| format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
                write!(
                    f,
                    "the BIOS's clock at 0x46c stands at {}, and the kernel booted at {}",
                    clock(*bios),
                    clock(*kernel)
                )
            }
            Self::Firmware { what, at, found } => {
                write!(f, "{what}, which the kernel found at {at}, {found}")
            }
            Self::Record {
                what,
                at,
                value,
                expected,
            } => write!(f, "{what} at {at} is {value:#x}, not {expected:#x}"),
            Self::Broken { test, why } => write!(f, "{test}: {why}"),
        }
    }
}

/// What all tests found.
#[derive(Debug, Default)]
pub(crate) struct Owner {
    pub traces: Vec<Trace>,
    /// Tests that found nothing.
    pub clean: Vec<&'static str>,
    /// Tests that could not be made, and why.
    pub not_made: Vec<(&'static str, String)>,
    /// Where a later owner may have written that has not come as far as to leave a trace.
    pub in_question: Vec<GpaRange>,
    /// Why it cannot be told whether there is a later owner, if so.
    pub untold: Option<String>,
}

impl Owner {
    /// Whether no other kernel need be looked for: there is no trace, and of the one thing that
    /// leaves no other, a reset, the BIOS's clock would tell, or there is no BIOS to start again.
    pub(crate) fn is_settled(&self) -> bool {
        let no_bios = |(test, why): &(&str, String)| *test == CLOCK && why == NO_BIOS;
        self.traces.is_empty() && (self.clean.contains(&CLOCK) || self.not_made.iter().any(no_bios))
    }
}

/// Each trace that is reported; more of a kind say nothing more.
const MAX_TRACES: usize = 16;

enum Verdict {
    /// Nothing found.
    Clean,
    /// The test cannot be made.
    NotMade(String),
    Traces(Vec<Trace>),
    /// Nothing found, but what may have been written here.
    CleanBut(Vec<GpaRange>),
    /// Nothing can be found, and nothing else would show what this test would.
    Untold(String),
    /// There is nothing of what it looks at.
    NotHere,
}

impl From<Vec<Trace>> for Verdict {
    fn from(traces: Vec<Trace>) -> Self {
        if traces.is_empty() {
            Self::Clean
        } else {
            Self::Traces(traces)
        }
    }
}

fn not_made(why: impl Into<String>) -> Result<Verdict, VmiError> {
    Ok(Verdict::NotMade(why.into()))
}

type Test = fn(&Kernel<'_>) -> Result<Verdict, VmiError>;

pub(crate) const CLOCK: &str = "the BIOS's clock";
pub(crate) const EFI: &str = "EFI tables";
/// A machine without a BIOS: direct boots of Firecracker and Cloud Hypervisor, whose memory no
/// reset outlives.
const NO_BIOS: &str = "no BIOS data area";

const TESTS: [(&str, Test); 9] = [
    ("the kernel's state", state),
    ("kexec", kexec),
    ("panic", panic),
    (CLOCK, bios_clock),
    (EFI, efi_tables),
    ("firmware tables", firmware),
    ("trampoline", trampoline),
    ("per-CPU areas", per_cpu),
    ("tasks", tasks),
];

/// Makes every test that can be made.
///
/// # Errors
/// What reading the memory gives; a record that cannot be followed is a trace.
pub(crate) fn look(kernel: &Kernel<'_>) -> Result<Owner, VmiError> {
    let mut owner = Owner::default();
    for (name, test) in TESTS {
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

/// Little-endian numbers of guest-physical memory.
fn physical<const N: usize>(kernel: &Kernel<'_>, at: Gpa) -> Result<[u8; N], VmiError> {
    let mut bytes = [0; N];
    kernel.space.memory().read(at, &mut bytes)?;
    Ok(bytes)
}

const SECONDS_PER_DAY: u64 = 86400;

/// The second at which the kernel made `anon_inode_inode`, or why it does not tell.
fn boot_second(kernel: &Kernel<'_>) -> Result<Result<u64, Verdict>, VmiError> {
    /// `include/uapi/linux/magic.h`.
    const ANON_INODE_FS_MAGIC: u64 = 0x0904_1934;
    /// 2000-01-01: the clock was not set.
    const EARLIEST: u64 = 946_684_800;
    let variable = kernel.need_symbol("anon_inode_inode")?;
    let super_block = kernel.need_member("inode", "i_sb")?.offset;
    let magic = kernel.need_member("super_block", "s_magic")?.offset;
    let mut offsets = Vec::new();
    for time in ["atime", "mtime", "ctime"] {
        // Since 6.11, since 6.6 (6.7), and before.
        let names = [
            format!("i_{time}_sec"),
            format!("__i_{time}.tv_sec"),
            format!("i_{time}.tv_sec"),
        ];
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match kernel.first_member("inode", &names)? {
            Some(member) => offsets.push(member.offset),
            None => {
                return Ok(Err(Verdict::NotMade(
                    "no source knows where an inode's times are".into(),
                )));
            }
        }
    }
    let inode = kernel.read_ptr("anon_inode_inode", variable)?;
    if inode.raw() == 0 {
        return Err(VmiError::Corrupt {
            what: "anon_inode_inode",
            at: variable,
            value: 0,
        });
    }
    let field = |offset| element("anon_inode_inode", inode, 0, 0, offset);
    let super_block = kernel.read_ptr("anon_inode_inode.i_sb", field(super_block)?)?;
    let at = element("super_block", super_block, 0, 0, magic)?;
    let value = kernel.read_u64("super_block.s_magic", at)?;
    if value != ANON_INODE_FS_MAGIC {
        return Ok(Err(Verdict::Traces(vec![Trace::Record {
            what: "the magic number of anon_inodefs",
            at,
            value,
            expected: ANON_INODE_FS_MAGIC,
        }])));
    }
    let mut times = Vec::new();
    for offset in offsets {
        times.push(kernel.read_u64("anon_inode_inode's times", field(offset)?)?);
    }
    let Some(first) = times.first().copied() else {
        return Ok(Err(Verdict::NotMade("an inode has no times".into())));
    };
    if times.iter().any(|time| *time != first) {
        return Ok(Err(Verdict::NotMade(
            "anon_inode_inode was touched since it was made".into(),
        )));
    }
    if first < EARLIEST {
        return Ok(Err(Verdict::NotMade(
            "the kernel had no clock when it booted".into(),
        )));
    }
    Ok(Ok(first))
}

/// How long the kernel has slept, in nanoseconds: `timekeeper.offs_boot`, which only suspend and
/// hibernation change. `None` if it is not known where that is.
fn slept(kernel: &Kernel<'_>) -> Result<Option<u64>, VmiError> {
    let Some(offset) = kernel.member("timekeeper", "offs_boot")? else {
        return Ok(None);
    };
    // `struct { seqcount_raw_spinlock_t seq; struct timekeeper timekeeper; }` without a name, and
    // since 6.13 `struct tk_data`, of which there are several since 6.17.
    for (variable, base) in [
        (
            "tk_core",
            kernel
                .member("tk_data", "timekeeper")?
                .map_or(8, |m| m.offset),
        ),
        (
            "timekeeper_data",
            kernel
                .member("tk_data", "timekeeper")?
                .map_or(8, |m| m.offset),
        ),
    ] {
        if let Some(at) = kernel.symbol(variable)? {
            let at = element("timekeeper", at, 0, base, 0)?;
            let at = element("timekeeper", at, 1, base, offset.offset)?;
            return kernel.read_u64("timekeeper.offs_boot", at).map(Some);
        }
    }
    Ok(None)
}

/// Whether a BIOS that set its clock to second `bios` may have woken the kernel up: it did so
/// between the kernel's last going to sleep, which the kernel notes by the clock chip
/// (`timekeeping_suspend`, `kernel/time/timekeeping.c`), and that second and all the time that it
/// ever slept, `slept` nanoseconds. `None` if it is not known when it went to sleep.
fn asleep(
    kernel: &Kernel<'_>,
    bios: u64,
    slept: u64,
    day: u64,
    ahead: u64,
) -> Result<Option<bool>, VmiError> {
    const NANOSECONDS: u64 = 1_000_000_000;
    let Some(at) = kernel.symbol("timekeeping_suspend_time")? else {
        return Ok(None);
    };
    let began = kernel.read_u64("timekeeping_suspend_time", at)?;
    if began == 0 {
        return Ok(None);
    }
    // The chip tells whole seconds, both times.
    let until = slept.div_ceil(NANOSECONDS).checked_add(ahead);
    let since = i128::from(bios)
        .wrapping_sub(i128::from(began))
        .rem_euclid(i128::from(day));
    Ok(Some(
        until.is_none_or(|until| since <= i128::from(until))
            || since >= i128::from(day.abs_diff(ahead)),
    ))
}

fn bios_clock(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    /// In the BIOS's data area: base memory in KiB, ticks since midnight.
    const BASE_MEMORY: Gpa = Gpa::new(0x413);
    const TICKS: Gpa = Gpa::new(0x46c);
    /// A day of 65536 periods of the 1.193182 MHz timer each.
    const TICKS_PER_DAY: u32 = 0x0018_00b0;
    /// Boot loaders, `0x0d << 4` and up (`Documentation/arch/x86/boot.rst`).
    const KEXEC: u8 = 0x0d;
    /// The clock chip tells whole seconds, to the BIOS and to the kernel; the host's clock, from
    /// which KVM tells the time, may be another second ahead of the chip's.
    const AHEAD: u64 = 3;
    /// What a loader's menu that waits with interrupts off, decompressing, and the boot of a
    /// large machine may take.
    const BEHIND: u64 = 120;
    /// A virtual machine's clock chip may be set to local time, by quarters of an hour.
    const ZONE: u64 = 900;
    const BEHIND_IN_ZONE: u64 = 10;
    let loader = boot_params(kernel, "hdr.type_of_loader")?;
    let mut byte = [0];
    let read = kernel.space.read(loader, &mut byte);
    read.map_err(VmiError::read("boot_params"))?;
    let [loader] = byte;
    if loader >> 4 == KEXEC {
        return not_made("the kernel was started by kexec");
    }
    if efi::is_started_by(kernel)? {
        return not_made("the kernel was started by EFI");
    }
    let clock = boot_params_clock(kernel)?;
    if u16::from_le_bytes(physical(kernel, BASE_MEMORY)?) == 0 {
        return not_made(NO_BIOS);
    }
    let ticks = u32::from_le_bytes(physical(kernel, TICKS)?);
    if ticks >= TICKS_PER_DAY {
        return not_made("no BIOS clock");
    }
    let bios = u64::from(ticks) * 65536 / 1_193_182;
    let Some(clock) = clock else {
        return not_made("the kernel has its clock from neither the clock chip nor KVM");
    };
    let second = match boot_second(kernel)? {
        Ok(second) => second,
        Err(verdict) => return Ok(verdict),
    };
    let kernel_second = second % SECONDS_PER_DAY;
    // How far the BIOS's clock is behind the kernel's boot.
    let behind = i128::from(kernel_second).wrapping_sub(i128::from(bios));
    let fits = |day: u64, most: u64| {
        let behind = behind.rem_euclid(i128::from(day));
        behind <= i128::from(most) || behind >= i128::from(day.abs_diff(AHEAD))
    };
    if fits(SECONDS_PER_DAY, BEHIND) {
        return Ok(Verdict::Clean);
    }
    if clock == Clock::Kvm && fits(ZONE, BEHIND_IN_ZONE) {
        return not_made("the clock chip may be set to local time");
    }
    if let Some(slept) = slept(kernel)?.filter(|slept| *slept != 0) {
        let day = match clock {
            Clock::Chip => SECONDS_PER_DAY,
            Clock::Kvm => ZONE,
        };
        if asleep(kernel, bios, slept, day, AHEAD)?.unwrap_or(true) {
            return not_made("the kernel has slept, and a BIOS may have woken it up");
        }
    }
    Ok(Verdict::Traces(vec![Trace::BiosClock {
        bios,
        kernel: kernel_second,
    }]))
}

/// What a kernel reads its first time from.
#[derive(PartialEq, Eq)]
enum Clock {
    Chip,
    Kvm,
}

fn boot_params_clock(kernel: &Kernel<'_>) -> Result<Option<Clock>, VmiError> {
    let offset = kernel
        .need_member("x86_platform_ops", "get_wallclock")?
        .offset;
    let at = element(
        "x86_platform",
        kernel.need_symbol("x86_platform")?,
        0,
        0,
        offset,
    )?;
    let function = kernel.read_ptr("x86_platform.get_wallclock", at)?;
    for (name, clock) in [
        ("mach_get_cmos_time", Clock::Chip),
        ("kvm_get_wallclock", Clock::Kvm),
    ] {
        if kernel.symbol(name)? == Some(function) {
            return Ok(Some(clock));
        }
    }
    Ok(None)
}

fn efi_tables(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    if !efi::is_started_by(kernel)? {
        return Ok(Verdict::NotHere);
    }
    Ok(match efi::tables(kernel)? {
        efi::Tables::Kept(ranges) => Verdict::CleanBut(ranges),
        efi::Tables::Gone(traces) => Verdict::Traces(traces),
        efi::Tables::Untold(why) => Verdict::Untold(why),
    })
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The ACPI root pointer that the kernel found, the root table, and each table that it listed
/// (`drivers/acpi/acpica/tbutils.c`; ACPI 6.5, section 5.2).
fn firmware(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    const MAX_TABLES: u32 = 256;
    /// A root table of more is none.
    const MAX_ROOT: u32 = 1 << 16;
    let root = kernel.read_u64("boot_params", boot_params(kernel, "acpi_rsdp_addr")?)?;
    if root == 0 {
        return not_made("the kernel was not told where the ACPI tables are");
    }
    let root = Gpa::new(root);
    let mut traces = Vec::new();
    let wrong = |what: &str, at, found: String| Trace::Firmware {
        what: what.into(),
        at,
        found,
    };
    let pointer: [u8; 36] = physical(kernel, root)?;
    let (v1, rest) = pointer.split_at(20);
    let good = v1.starts_with(b"RSD PTR ") && sum(v1) == 0;
    let word = |bytes: &[u8], at: usize| {
        bytes
            .get(at..at.saturating_add(4))
            .and_then(|word| word.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    };
    if !good {
        traces.push(wrong("the ACPI root pointer", root, "is not there".into()));
        return Ok(traces.into());
    }
    let extended = v1.get(15).is_some_and(|revision| *revision >= 2);
    let xsdt = u64::from(word(rest, 4)) | u64::from(word(rest, 8)) << 32;
    let table = if extended && xsdt != 0 {
        xsdt
    } else {
        u64::from(word(v1, 16))
    };
    let table = Gpa::new(table);
    let header: [u8; 8] = physical(kernel, table)?;
    let length = word(&header, 4);
    let named = header.starts_with(b"RSDT") || header.starts_with(b"XSDT");
    let mut good = named && (36..=MAX_ROOT).contains(&length);
    if good {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        kernel.space.memory().read(table, &mut bytes)?;
        good = sum(&bytes) == 0;
    }
    if !good {
        let found = format!("is not there ({})", header.escape_ascii());
        traces.push(wrong("the ACPI root table", table, found));
    }
    let list = kernel.need_symbol("acpi_gbl_root_table_list")?;
    let member = |name| {
        kernel
            .need_member("acpi_table_list", name)
            .map(|m| m.offset)
    };
    let list_at = |offset| element("acpi_gbl_root_table_list", list, 0, 0, offset);
    let tables = kernel.read_ptr("acpi_table_list.tables", list_at(member("tables")?)?)?;
    let count = list_at(member("current_table_count")?)?;
    let count_is = kernel.read_u32("acpi_table_list.current_table_count", count)?;
    if count_is > MAX_TABLES {
        return Err(VmiError::Corrupt {
            what: "acpi_table_list.current_table_count",
            at: count,
            value: u64::from(count_is),
        });
    }
    let size = kernel.need_type_size("acpi_table_desc")?;
    let member = |name| {
        kernel
            .need_member("acpi_table_desc", name)
            .map(|m| m.offset)
    };
    let (address, signature, len, flags) = (
        member("address")?,
        member("signature")?,
        member("length")?,
        member("flags")?,
    );
    for index in 0..u64::from(count_is) {
        /// `ACPI_TABLE_ORIGIN_MASK` and `ACPI_TABLE_ORIGIN_INTERNAL_PHYSICAL`.
        const ORIGIN: u32 = 3;
        const PHYSICAL: u32 = 1;
        let field = |offset| element("acpi_table_desc", tables, index, size, offset);
        let origin = kernel.read_u32("acpi_table_desc.flags", field(flags)?)? & ORIGIN;
        let at = kernel.read_u64("acpi_table_desc.address", field(address)?)?;
        if origin != PHYSICAL || at == 0 {
            continue;
        }
        let name = kernel.read_u32("acpi_table_desc.signature", field(signature)?)?;
        let long = kernel.read_u32("acpi_table_desc.length", field(len)?)?;
        let header: [u8; 8] = match physical(kernel, Gpa::new(at)) {
            Err(VmiError::Memory(MemoryError::NotRam { .. } | MemoryError::Absent { .. })) => {
                continue;
            }
            other => other?,
        };
        if word(&header, 0) != name || word(&header, 4) != long {
            let what = format!("the ACPI table {}", name.to_le_bytes().escape_ascii());
            let found = format!("is not there ({})", header.escape_ascii());
            traces.push(wrong(&what, Gpa::new(at), found));
        }
    }
    Ok(traces.into())
}

/// `struct real_mode_header` and what it leads to (`arch/x86/realmode/init.c`).
fn trampoline(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    /// Set by processors as they walk the table.
    const ACCESSED: u64 = 1 << 5;
    const ONE_MIB: u64 = 1 << 20;
    let variable = kernel.need_symbol("real_mode_header")?;
    let init_top = kernel.need_symbol("init_top_pgt")?;
    let text = kernel.need_member("real_mode_header", "text_start")?.offset;
    let end = kernel.need_member("real_mode_header", "ro_end")?.offset;
    let pgd = kernel
        .need_member("real_mode_header", "trampoline_pgd")?
        .offset;
    let header = kernel.read_ptr("real_mode_header", variable)?;
    // A paravirtualised guest's processors are started by Xen.
    if header.raw() == 0 || kernel.space.memory().p2m().is_some() {
        return not_made("the kernel has none");
    }
    let field = |offset| element("real_mode_header", header, 0, 0, offset);
    let there = kernel
        .space
        .translate(header)
        .map_err(VmiError::read("real_mode_header"))?;
    let base = there.at.raw();
    if base >= ONE_MIB {
        return Err(VmiError::Corrupt {
            what: "real_mode_header",
            at: variable,
            value: header.raw(),
        });
    }
    let mut traces = Vec::new();
    for (what, offset) in [
        ("real_mode_header.text_start", text),
        ("real_mode_header.ro_end", end),
        ("real_mode_header.trampoline_pgd", pgd),
    ] {
        let at = field(offset)?;
        let value = u64::from(kernel.read_u32(what, at)?);
        if !(base..ONE_MIB).contains(&value) {
            traces.push(Trace::Record {
                what,
                at,
                value,
                expected: base,
            });
        }
    }
    if !traces.is_empty() {
        return Ok(traces.into());
    }
    let table = u64::from(kernel.read_u32("real_mode_header.trampoline_pgd", field(pgd)?)?);
    // Beside the header, so mapped as that is.
    let table = table
        .checked_sub(base)
        .and_then(|offset| header.checked_add(offset))
        .ok_or(VmiError::Corrupt {
            what: "real_mode_header.trampoline_pgd",
            at: header,
            value: table,
        })?;
    let mut compare = |what, index, expected: u64| {
        let at = element("trampoline_pgd", table, index, 8, 0)?;
        let value = kernel.read_u64("trampoline_pgd", at)?;
        if (value ^ expected) & !ACCESSED != 0 {
            traces.push(Trace::Record {
                what,
                at,
                value,
                expected,
            });
        }
        Ok::<_, VmiError>(())
    };
    let last = element("init_top_pgt", init_top, 511, 8, 0)?;
    let last = kernel.read_u64("init_top_pgt", last)?;
    compare("the trampoline's page table, entry 511", 511, last)?;
    if let Some(at) = kernel.symbol("trampoline_pgd_entry")? {
        let entry = kernel.read_u64("trampoline_pgd_entry", at)?;
        compare("the trampoline's page table, entry 0", 0, entry)?;
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
    use super::{Owner, Trace, boot_params, boot_second, look, slept};
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
        let names = super::TESTS.iter().map(|(name, _)| *name);
        names.filter(|name| *name != super::EFI).collect()
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
            let (_, offset) = super::possible_cpus(kernel).unwrap()[0];
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
