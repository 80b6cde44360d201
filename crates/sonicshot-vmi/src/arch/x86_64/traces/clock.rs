//! The BIOS's clock.
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
//! sleeps together (`timekeeper.offs_boot`). The ticks say no date: a reset so many whole days
//! after the boot, less up to two minutes, is not seen, nor one in the first three seconds.
//!
//! `SeaBIOS` computes the ticks in 32 bits that do not hold a day (`ticks_from_ms`): from 21:50:35
//! on they are those of the first hours of a day, and each of those counts as both times.
//!
//! Where no types tell of all that, the kernel's log tells whether an EFI firmware started it, and
//! what it read from the clock chip when it set its own clock.

use super::NO_BIOS;
use super::efi::{self, boot_params};
use super::physical;
use crate::VirtualMemory;
use crate::arch::{Trace, Verdict, not_made};
use crate::error::VmiError;
use crate::kernel::{Kernel, element};
use crate::owner::log::{self, Line};
use sonicshot::Gpa;

const SECONDS_PER_DAY: u64 = 86400;

/// The second at which the kernel made `anon_inode_inode`, or why it does not tell.
pub(crate) fn boot_second(kernel: &Kernel<'_>) -> Result<Result<u64, Verdict>, VmiError> {
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

/// The time that the kernel has slept, in nanoseconds: `timekeeper.offs_boot`, which only suspend and
/// hibernation change. `None` if the place of that is not known.
pub(crate) fn slept(kernel: &Kernel<'_>) -> Result<Option<u64>, VmiError> {
    let Some(offset) = kernel.member("timekeeper", "offs_boot")? else {
        return Ok(None);
    };
    // `struct { seqcount_raw_spinlock_t seq; struct timekeeper timekeeper; }` without a name, and
    // since 6.13 `struct tk_data`, of which there are several since 6.17.
    let base = kernel.member("tk_data", "timekeeper")?;
    let base = base.map_or(8, |member| member.offset);
    for variable in ["tk_core", "timekeeper_data"] {
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
    let since = i128::from(bios).checked_sub(i128::from(began));
    let Some(since) = since.and_then(|since| since.checked_rem_euclid(i128::from(day))) else {
        return Ok(None);
    };
    Ok(Some(
        until.is_none_or(|until| since <= i128::from(until))
            || since >= i128::from(day.abs_diff(ahead)),
    ))
}

/// In the BIOS's data area: base memory in KiB, ticks since midnight.
const BASE_MEMORY: Gpa = Gpa::new(0x413);
const TICKS: Gpa = Gpa::new(0x46c);
/// The clock chip tells whole seconds, to the BIOS and to the kernel; the host's clock, from
/// which KVM tells the time, may be another second ahead of the chip's.
const AHEAD: u64 = 3;
/// The longest time, in seconds, that a loader's menu that waits with interrupts off, decompressing,
/// and the boot of a large machine may take.
const BEHIND: u64 = 120;

/// The reason that there is no BIOS's clock, of a machine without a BIOS data area. A kernel that a
/// VMM starts itself has no firmware, and nothing writes to the vectors of real mode. qboot, the
/// firmware of QEMU's `microvm`, fills them and has no data area; it starts again at a reset. If it
/// was given a kernel to be started at its entry for PVH, QEMU writes the image anew before that, so
/// the one that is gone cannot be told. A kernel with a setup header (`bzImage`) is written anew only
/// by its own decompressor, later: qboot's copy of the header stays below 1 MiB, where Linux keeps
/// everything.
fn without_data_area(kernel: &Kernel<'_>) -> Result<&'static str, VmiError> {
    const VECTORS: usize = 0x400;
    /// `SETUP_ADDR` of `hw/i386/x86-common.c`, and where `Documentation/arch/x86/boot.rst` has the
    /// header's magic.
    const SETUP_MAGIC: Gpa = Gpa::new(0x1_0000 + 0x202);
    let vectors: [u8; VECTORS] = physical(kernel, Gpa::ZERO)?;
    if vectors.iter().all(|byte| *byte == 0) {
        return Ok(NO_BIOS);
    }
    Ok(match &physical(kernel, SETUP_MAGIC)? {
        b"HdrS" => "the firmware keeps no clock, and the kernel was not written anew at its start",
        _ => NO_BIOS,
    })
}

/// The two times, in seconds of the day, at which the BIOS may have last set or counted its clock; or
/// the reason that it has none.
fn bios_seconds(kernel: &Kernel<'_>) -> Result<Result<[u64; 2], &'static str>, VmiError> {
    if u16::from_le_bytes(physical(kernel, BASE_MEMORY)?) == 0 {
        return Ok(Err(without_data_area(kernel)?));
    }
    let ticks = u32::from_le_bytes(physical(kernel, TICKS)?);
    Ok(seconds_of(ticks).ok_or("no BIOS clock"))
}

/// Whether the BIOS's clock is `most` seconds behind the kernel's boot, or less, by what they say of
/// a period of `day` seconds.
fn fits(kernel_second: u64, bios: [u64; 2], day: u64, most: u64) -> bool {
    bios.iter().any(|bios| {
        let behind = i128::from(kernel_second).checked_sub(i128::from(*bios));
        let behind = behind.and_then(|behind| behind.checked_rem_euclid(i128::from(day)));
        behind.is_some_and(|behind| {
            behind <= i128::from(most) || behind >= i128::from(day.abs_diff(AHEAD))
        })
    })
}

/// The second at which the kernel started, by the line of its log with which it sets its clock from
/// the chip (`drivers/rtc/class.c`): that is the chip which the BIOS's clock is set from.
fn start_by_line(line: &Line) -> Option<u64> {
    const NANOSECONDS: u64 = 1_000_000_000;
    let (chip, rest) = line.text.split_once(": setting system clock to ")?;
    let (_, second) = rest.rsplit_once('(')?;
    let second = second.strip_suffix(')')?.parse::<u64>().ok()?;
    let is_chips = line.of_device && chip.starts_with("rtc_cmos ");
    let before = line.time.checked_div(NANOSECONDS)?;
    second.checked_sub(before).filter(|_| is_chips)
}

/// As [`bios_clock`], of a kernel of which no types tell.
pub(super) fn bios_clock_by_log(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    let (mut first, mut start, mut by_efi) = (None, None, false);
    log::lines(kernel, &mut |line| {
        first.get_or_insert(line.seq);
        start = start.or_else(|| start_by_line(&line));
        by_efi |= line.text.starts_with("efi: EFI v");
        true
    })?;
    if by_efi {
        return not_made("the kernel was started by EFI");
    }
    let bios = match bios_seconds(kernel)? {
        Ok(bios) => bios,
        // An EFI firmware has no such data area, and the first lines tell of it.
        Err(NO_BIOS) if first != Some(0) => {
            return not_made("the kernel's log has lost its begin");
        }
        Err(why) => return not_made(why),
    };
    let Some(second) = start else {
        return not_made("the kernel's log does not tell when it set its clock from the chip");
    };
    let kernel_second = second % SECONDS_PER_DAY;
    if fits(kernel_second, bios, SECONDS_PER_DAY, BEHIND) {
        return Ok(Verdict::Clean);
    }
    let [bios, _] = bios;
    Ok(Verdict::Traces(vec![Trace::BiosClock {
        bios,
        kernel: kernel_second,
    }]))
}

/// See the top of the file.
pub(super) fn bios_clock(kernel: &Kernel<'_>) -> Result<Verdict, VmiError> {
    /// Boot loaders, `0x0d << 4` and up (`Documentation/arch/x86/boot.rst`).
    const KEXEC: u8 = 0x0d;
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
    let bios = match bios_seconds(kernel)? {
        Ok(bios) => bios,
        Err(why) => return not_made(why),
    };
    let Some(clock) = clock else {
        return not_made("the kernel has its clock from neither the clock chip nor KVM");
    };
    let second = match boot_second(kernel)? {
        Ok(second) => second,
        Err(verdict) => return Ok(verdict),
    };
    let kernel_second = second % SECONDS_PER_DAY;
    if fits(kernel_second, bios, SECONDS_PER_DAY, BEHIND) {
        return Ok(Verdict::Clean);
    }
    if clock == Clock::Kvm && fits(kernel_second, bios, ZONE, BEHIND_IN_ZONE) {
        return not_made("the clock chip may be set to local time");
    }
    if let Some(slept) = slept(kernel)?.filter(|slept| *slept != 0) {
        let day = match clock {
            Clock::Chip => SECONDS_PER_DAY,
            Clock::Kvm => ZONE,
        };
        for bios in bios {
            if asleep(kernel, bios, slept, day, AHEAD)?.unwrap_or(true) {
                return not_made("the kernel has slept, and a BIOS may have woken it up");
            }
        }
    }
    let [bios, _] = bios;
    Ok(Verdict::Traces(vec![Trace::BiosClock {
        bios,
        kernel: kernel_second,
    }]))
}

/// The seconds since midnight at which a BIOS may have set its clock to `ticks`: as they are, and
/// as `SeaBIOS` computes them late in the day. `None` if no clock has such ticks.
fn seconds_of(ticks: u32) -> Option<[u64; 2]> {
    /// A day of 65536 periods of the timer each.
    const TICKS_PER_DAY: u32 = 0x0018_00b0;
    /// The parts of a tick that `SeaBIOS` counts in 32 bits before it makes ticks of them.
    const PARTS: u64 = 3000;
    /// The timer's frequency in Hz, in those.
    const FREQUENCY: u64 = 1_193_182 * PARTS;
    let ticks = u64::from(ticks).checked_mul(PARTS);
    let whole = ticks.filter(|parts| *parts < u64::from(TICKS_PER_DAY) * PARTS)?;
    let cut = whole.checked_add(1 << 32)?;
    let seconds = |parts: u64| parts.checked_mul(65536)?.checked_div(FREQUENCY);
    Some([seconds(whole)?, seconds(cut)?])
}

/// The clock from which a kernel reads its first time.
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

#[cfg(test)]
mod tests {
    use super::seconds_of;

    #[test]
    fn ticks_are_the_seconds_that_a_bios_made_them_of() {
        for second in 0_u32..86400 {
            let parts = u64::from(second) * 1000 * 3_579_545;
            let parts = parts.div_ceil(65536);
            let whole = u32::try_from(parts.div_ceil(3000)).unwrap();
            let cut = u32::try_from(parts % (1 << 32)).unwrap().div_ceil(3000);
            assert!(seconds_of(whole).unwrap()[0].abs_diff(second.into()) <= 1);
            assert_eq!(whole == cut, second < 78_635, "{second}");
            let seconds = seconds_of(cut)
                .unwrap()
                .map(|told| told.abs_diff(second.into()));
            assert!(seconds.into_iter().any(|off| off <= 1), "{second}: {cut}");
        }
    }
}
