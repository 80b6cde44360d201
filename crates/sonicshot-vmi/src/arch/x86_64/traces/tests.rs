//! Each trace of a PC forged in the memory of a real guest that a BIOS started and that bears none.

use super::EFI;
use super::clock::{boot_second, slept};
use super::efi::boot_params;
use crate::arch::Trace;
use crate::kernel::element;
use crate::owner::traces::tests::{
    Is, Patch, behind, each_is_the_only_one, long, names, owner, ram, there, variable, with, word,
};

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

/// The tests that a machine with a BIOS gives rise to: all but the one of EFI's tables.
pub(crate) fn of_a_bios() -> Vec<&'static str> {
    let mut names = names();
    names.retain(|name| *name != EFI);
    names
}

#[test]
fn a_guest_that_a_bios_started_passes_every_test_of_one() {
    assert_eq!(owner(&[]).clean, of_a_bios());
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
    let clock: Is = |trace| matches!(trace, Trace::BiosClock { .. });
    let firmware: Is = |trace| matches!(trace, Trace::Firmware { .. });
    let record: Is = |trace| matches!(trace, Trace::Record { .. });
    each_is_the_only_one(vec![
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
    ]);
}

/// The kernel's boot, and the patches that concern its clock.
struct Clock {
    /// The second of the boot.
    boot: u64,
    /// A clock that KVM gives.
    kvm: Patch,
    suspended: u64,
    offs_boot: u64,
}

impl Clock {
    fn new() -> Self {
        let kvm = with(ram(), |kernel| {
            let offset = kernel.need_member("x86_platform_ops", "get_wallclock");
            let at = kernel.need_symbol("x86_platform").unwrap();
            let at = there(kernel, at.checked_add(offset.unwrap().offset).unwrap());
            let clock = kernel.need_symbol("kvm_get_wallclock").unwrap();
            (at, long(clock.raw()))
        });
        let offs_boot = with(ram(), |kernel| {
            let offset = kernel.need_member("timekeeper", "offs_boot");
            let at = kernel.need_symbol("tk_core").unwrap();
            there(kernel, at.checked_add(8 + offset.unwrap().offset).unwrap())
        });
        Self {
            boot: with(ram(), |kernel| boot_second(kernel).unwrap().ok().unwrap()),
            kvm,
            suspended: variable("timekeeping_suspend_time"),
            offs_boot,
        }
    }

    /// Gone to sleep so many seconds after the boot, for so many seconds; the BIOS's clock is an
    /// hour ahead.
    fn asleep(&self, began: u64, seconds: u64) -> Vec<Patch> {
        vec![
            ticks(3600),
            (self.suspended, long(self.boot + began)),
            (self.offs_boot, long(seconds * 1_000_000_000)),
        ]
    }
}

#[test]
fn the_bios_clock_may_be_behind() {
    for seconds in [1, -20, -110] {
        let owner = owner(&[ticks(seconds)]);
        assert_eq!(
            (owner.traces.len(), owner.not_made.len()),
            (0, 0),
            "{owner:?}"
        );
    }
    assert_eq!(with(ram(), |kernel| slept(kernel).unwrap()), Some(0));
}

#[test]
fn the_bios_clock_is_not_always_told() {
    let clock = Clock::new();
    let hour = || ticks(3600);
    let ctime = behind("anon_inode_inode", "inode", "i_ctime.tv_sec");
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
        ("not written anew", vec![hour(), (0x413, vec![0; 2])]),
        (
            "no BIOS data area",
            vec![hour(), (0x413, vec![0; 2]), (0, vec![0; 0x400])],
        ),
        (
            "no BIOS data area",
            vec![hour(), (0x413, vec![0; 2]), (0x1_0202, vec![0; 4])],
        ),
        ("no BIOS clock", vec![(0x46c, word(0x0018_00b0))]),
        ("touched", vec![hour(), (ctime, long(clock.boot + 9))]),
        ("local time", vec![hour(), clock.kvm.clone()]),
        (
            "neither",
            vec![hour(), (clock.kvm.0, long(variable("init_task")))],
        ),
        (
            "slept",
            vec![hour(), (clock.offs_boot, long(5_000_000_000))],
        ),
        ("slept", clock.asleep(3598, 5)),
        ("slept", clock.asleep(3594, 5)),
        ("slept", clock.asleep(7200, 83_000)),
    ];
    for (why, patches) in cases {
        let owner = owner(&patches);
        assert_eq!(owner.traces, [], "{why}");
        let [("the BIOS's clock", said)] = &owner.not_made[..] else {
            panic!("{why}: {owner:?}");
        };
        assert!(said.contains(why), "{why}: {said}");
    }
}

#[test]
fn a_wake_up_or_a_clock_of_its_own_does_not_hide_a_reset() {
    let clock = Clock::new();
    // A BIOS that woke the kernel up did so no later than the kernel woke up.
    let woken = [(3600 - 20, 5), (60, 3000), (3620, 5)];
    let woken = woken.map(|(began, seconds)| clock.asleep(began, seconds));
    // KVM's own clock is not set by zones' minutes.
    let by_kvm = vec![ticks(3600 + 100), clock.kvm.clone()];
    for patches in woken.into_iter().chain([by_kvm]) {
        let owner = owner(&patches);
        assert!(
            matches!(owner.traces[..], [Trace::BiosClock { .. }]),
            "{patches:?}: {owner:?}"
        );
    }
}
