//! Each trace forged in the memory of a real guest that bears none.

use super::{MAX_TASKS, MAX_TRACES, all_tests, is_next, look};
use crate::arch::{Owner, Trace};
use crate::kernel::Kernel;
use crate::{GuestOptions, KernelVa, LinuxGuest, OnInconsistency, VmiError};
use sonicshot::{Gpa, GuestBytes, MappedRegions};
use std::collections::HashSet;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

pub(crate) fn ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m/ram.raw.zst");
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
    with(&forged(patches), |kernel| look(kernel, true).unwrap())
}

pub(crate) fn there(kernel: &Kernel<'_>, at: KernelVa) -> u64 {
    kernel.space.translate(at).unwrap().at.raw()
}

pub(crate) fn variable(name: &'static str) -> u64 {
    with(ram(), |kernel| {
        there(kernel, kernel.need_symbol(name).unwrap())
    })
}

/// The address of `member` of the object that `pointer` points to.
pub(crate) fn behind(pointer: &'static str, ty: &str, member: &str) -> u64 {
    with(ram(), |kernel| {
        let variable = kernel.need_symbol(pointer).unwrap();
        let object = kernel.read_ptr(pointer, variable).unwrap();
        let offset = kernel.need_member(ty, member).unwrap().offset;
        there(kernel, object.checked_add(offset).unwrap())
    })
}

pub(crate) fn long(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

pub(crate) fn word(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

#[test]
fn a_guest_that_runs_bears_no_trace_by_any_test() {
    let owner = owner(&[]);
    assert_eq!(owner.traces, []);
    assert_eq!(owner.not_made, []);
    assert_eq!((owner.in_question, owner.untold), (vec![], None));
}

/// The names of all tests that are made of the guest.
pub(crate) fn names() -> Vec<&'static str> {
    let tests = with(ram(), |kernel| all_tests(kernel, true).unwrap());
    tests.into_iter().map(|(name, _)| name).collect()
}

/// A trace of a kind.
pub(crate) type Is = fn(&Trace) -> bool;

/// Forges what each case says, and looks for one trace of its kind, which no other test sees.
pub(crate) fn each_is_the_only_one(cases: Vec<(&str, Vec<Patch>, Is)>) {
    let tests = owner(&[]).clean.len();
    for (name, patches, is) in cases {
        let owner = owner(&patches);
        assert_eq!(owner.traces.len(), 1, "{name}: {owner:?}");
        assert!(is(&owner.traces[0]), "{name}: {owner:?}");
        assert_eq!(owner.clean.len(), tests - 1, "{name}: {owner:?}");
    }
}

#[test]
fn each_trace_is_seen_and_is_the_only_one() {
    let state: Is = |trace| matches!(trace, Trace::State { .. });
    let died: Is = |trace| matches!(trace, Trace::Panic { .. });
    each_is_the_only_one(vec![
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
    ]);
}

/// A processor that is online is looked at before anything else is believed; the test here is
/// left with those that are not.
#[test]
fn a_per_cpu_area_written_over_refuses_the_kernel() {
    let this_cpu_off = with(ram(), |kernel| {
        let (_, offset) = crate::mm::cpus::possible_cpus(kernel).unwrap()[0];
        let symbol = kernel.need_symbol("this_cpu_off").unwrap();
        there(kernel, symbol.moved_by(offset))
    });
    let ram = forged(&[(this_cpu_off, long(7))]);
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
    let error = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap_err();
    assert!(error.to_string().contains("this_cpu_off"), "{error}");
}

#[test]
fn one_torn_stack_is_explained_and_two_are_not() {
    let stacks = with(ram(), |kernel| {
        let links = kernel.need_member("task_struct", "tasks").unwrap().offset;
        let stack = kernel.need_member("task_struct", "stack").unwrap().offset;
        let mut at = kernel.need_symbol("init_task").unwrap();
        let mut found = Vec::new();
        for _ in 0..=MAX_TRACES {
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
    // No more are told of.
    assert_eq!(owner(&stacks).traces.len(), MAX_TRACES);
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
    let ram = forged(&[(variable("kexec_in_progress"), vec![1])]);
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let error = guest.classify(OnInconsistency::Refuse).unwrap_err();
    assert!(matches!(error, VmiError::LaterOwner(_)), "{error}");
    let named = |text: String| text.contains("kexec_in_progress");
    assert!(named(error.to_string()), "{error}");
    let kept = guest.classify(OnInconsistency::KeepInQuestion).unwrap();
    assert!(kept.notes.iter().any(|note| named(note.to_string())));
}

#[test]
fn a_list_of_tasks_is_no_longer_than_a_bound_and_comes_nowhere_twice() {
    const FEW: usize = 8;
    let mut seen = HashSet::new();
    let mut next = |at: usize| is_next(&mut seen, KernelVa::new(at as u64), FEW);
    assert!(next(0) && !next(0));
    assert!((1..FEW).all(&mut next));
    assert!(!next(FEW), "more than the bound");
    // What Linux itself allows.
    assert_eq!(MAX_TASKS, 1 << 22);
}

/// With `panic=0` a kernel neither restarts nor starts another, and its log says so last.
#[test]
fn a_kernel_that_panicked_and_stays_is_the_owner_if_its_log_says_so() {
    let (panic, stays) = (
        "Kernel panic - not syncing: a test",
        "---[ end Kernel panic",
    );
    let line = |number: usize, words: &str| -> Patch {
        let there = [
            "BIOS-e820: [mem 0x0000000000000000-0",
            "BIOS-e820: [mem 0x000000000009fc00-0",
        ][number];
        let mut places = ram().windows(there.len()).enumerate();
        let found = places.find(|(_, bytes)| *bytes == there.as_bytes());
        (found.unwrap().0 as u64, format!("{words:<36}").into_bytes())
    };
    let set = |name, value| (variable(name), word(value));
    let (scheduling, died) = (set("system_state", 1), set("panic_cpu", 0));
    for (lines, patches, traces) in [
        ([panic, stays], vec![died.clone()], 0),
        ([panic, stays], vec![scheduling.clone(), died.clone()], 0),
        ([stays, panic], vec![scheduling.clone(), died.clone()], 2),
        ([stays, "sysrq: Resetting"], vec![died.clone()], 1),
        // It has gone on to another kernel, or to its end.
        ([panic, stays], vec![set("crashing_cpu", 0)], 1),
        ([panic, stays], vec![set("system_state", 5), died], 1),
        ([panic, stays], vec![set("system_state", 0)], 1),
        (
            [panic, stays],
            vec![(variable("kexec_in_progress"), vec![1])],
            1,
        ),
    ] {
        let mut all = patches.clone();
        all.extend((0..).zip(lines).map(|(number, words)| line(number, words)));
        let owner = owner(&all);
        assert_eq!(
            owner.traces.len(),
            traces,
            "{lines:?}, {patches:x?}: {owner:?}"
        );
    }
}
