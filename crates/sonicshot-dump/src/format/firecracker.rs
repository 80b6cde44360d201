//! Firecracker's snapshots: a file with the VM's state, and one with guest RAM.
//!
//! The memory file is the bytes of guest RAM and nothing else, so where they lie is found as for
//! any raw file. The state file tells that a folder holds such a pair, and nothing of it is
//! read but the processors (below): what else is in it changes with every version. It begins with a
//! number, `0x0710_1984_8664_0000` (arm64: `..._AAAA_0000`), whose lowest 16 bits were a version
//! once (up to 1.5); since it is written by `bitcode` (1.15) a byte stands before it
//! (`src/vmm/src/snapshot/mod.rs`).
//!
//! # What a hole reads as
//!
//! In a full snapshot, zero: `File` restores map the memory file privately
//! (`src/vmm/src/vstate/memory.rs`), and a page-fault handler that serves from the file reads
//! the same. In a diff snapshot, what the base has: see [`Dump::open_over`].
//!
//! A diff that was made of a VM that was booted, not restored, is one of all memory that was
//! ever touched; its holes are zero, and it is read as a full one.
//!
//! # The processors
//!
//! However a version packs its state (`versionize` up to 1.6, `bincode`, and now `bitcode`), it
//! holds KVM's `struct kvm_sregs` and the 1024 bytes of each processor's local APIC as they are in
//! C: as one range of bytes, or field by field in the same order and width. Both have a shape
//! that nothing else has, and are looked for at every byte. The APICs tell how many processors
//! there are, and which; as many system registers must be found, one of them of the boot
//! processor. Otherwise nothing is told: a guest's own bytes, such as those in its vector
//! registers, may have any shape.
//!
//! Where the processors have their next instruction is not looked for. There is no firmware here,
//! and nothing at the reset vector, so that one whose system registers are those of a reset waits
//! for its start.
//!
//! [`Dump::open_over`]: crate::Dump::open_over

use crate::DumpError;
use crate::format::kind::Kind;
use crate::processors::{Halted, SREGS_LEN, Sregs};
use crate::snapshot::{Entry, Named, SnapshotFiles, Vmm};
use sonicshot::{Bytes, Processor, Processors, to_u64};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

impl Vmm {
    /// Firecracker.
    pub const FIRECRACKER: Self = Self::named("Firecracker");
}

/// A state file is no memory, and says that there is a memory file in its folder.
pub(crate) const KIND: Kind = Kind {
    is_one: |source| source.start::<16>().is_some_and(|start| is_state(&start)),
    open: |source| {
        Err(DumpError::NotADump {
            path: source.path.to_owned(),
            why: NOT_MEMORY,
        })
    },
    ..Kind::by_name(snapshot)
};

/// The bytes of the number after its two lowest, on x86-64 and arm64.
const MAGIC: [[u8; 6]; 2] = [
    [0x64, 0x86, 0x84, 0x19, 0x10, 0x07],
    [0xaa, 0xaa, 0x84, 0x19, 0x10, 0x07],
];

/// The note on a state file that is taken for a memory file.
const NOT_MEMORY: &str =
    "it is a Firecracker VM's state: give the memory file, or the folder of both";

/// Guest RAM is given in MiB.
const MIB: u64 = 1 << 20;

/// Whether a file that begins with `start` is a state file.
fn is_state(start: &[u8]) -> bool {
    [2, 3].iter().any(|at| {
        let rest = start.get(*at..).unwrap_or(&[]);
        MAGIC.iter().any(|magic| rest.starts_with(magic))
    })
}

/// Whether a file may be guest RAM.
fn may_be_memory(file: &Entry) -> bool {
    let is_other = is_state(&file.start) || file.is_known;
    file.len > 0 && file.len.is_multiple_of(MIB) && !is_other
}

/// A folder with a state file and the memory that goes with it.
fn snapshot(named: &Named<'_>) -> Result<Option<SnapshotFiles>, DumpError> {
    let Some(folder) = named.folder() else {
        return Ok(None);
    };
    let Some((memory, state)) = memory_of(folder, named.entries()?)? else {
        return Ok(None);
    };
    let mut files = named.found(&memory, &[&state], Vmm::FIRECRACKER);
    files.processors = processors(&state);
    Ok(Some(files))
}

/// A state is some 10 KiB for each processor.
const MAX_STATE: u64 = 64 << 20;
/// Firecracker gives a VM 32.
const MAX_PROCESSORS: usize = 256;
/// The registers of a local APIC: each has 16 bytes, of which it takes the first 4
/// (Intel SDM volume 3, table 12-1).
const APIC_LEN: usize = 1024;
const APIC_REGISTER: usize = 16;
const APIC_ID: u64 = 0x20;
const APIC_VERSION: u64 = 0x30;
/// The version that KVM's have, and how many entries their local vector table has at most.
const APIC_KVM: u32 = 0x14;
const APIC_MAX_ENTRY: u32 = 7;
/// The address of an instruction at the reset vector.
const RESET_VECTOR: u64 = 0xfff0;
/// `IA32_APIC_BASE` begins so, at this place in the system registers.
const APIC_BASE_AT: usize = 272;

/// The processors in the state file `path`.
fn processors(path: &Path) -> Processors {
    let read = || {
        let mut state = Vec::new();
        File::open(path)?.take(MAX_STATE).read_to_end(&mut state)?;
        Ok::<_, io::Error>(state)
    };
    let found = read().ok().and_then(|state| processors_in(&state));
    found.map_or(Processors::Unknown, Processors::Known)
}

fn processors_in(state: &[u8]) -> Option<Vec<Processor>> {
    if to_u64(state.len()) >= MAX_STATE {
        return None;
    }
    let all: Vec<Sregs<'_>> = sregs_in(state).take(MAX_PROCESSORS).collect();
    let apics: Vec<u32> = apics_in(state).take(MAX_PROCESSORS).collect();
    let distinct: HashSet<u32> = apics.iter().copied().collect();
    let boot = all.iter().filter(|sregs| sregs.is_boot()).count();
    if all.len() != apics.len() || distinct.len() != apics.len() || boot != 1 {
        return None;
    }
    let processor = |sregs: &Sregs<'_>| {
        let registers = sregs.registers(RESET_VECTOR, 0)?;
        let waits = !sregs.is_boot() && registers.are_of_reset();
        let halted = if waits { Halted::Yes } else { Halted::No };
        Some(registers.processor(sregs.is_boot(), halted))
    };
    all.iter().map(processor).collect()
}

/// All that has the shape of system registers and does not overlap.
fn sregs_in(state: &[u8]) -> impl Iterator<Item = Sregs<'_>> {
    let mut rest = state;
    std::iter::from_fn(move || {
        loop {
            let window = rest.get(..SREGS_LEN)?;
            // The first look, at the two bytes that hardly anything else has.
            let near = window
                .get(APIC_BASE_AT.checked_add(2)?..)?
                .starts_with(&[0xe0, 0xfe]);
            if let Some(sregs) = near.then(|| Sregs::new(window)).flatten() {
                rest = rest.get(SREGS_LEN..)?;
                return Some(sregs);
            }
            rest = rest.get(1..)?;
        }
    })
}

/// The numbers of all that has the shape of a local APIC of KVM's and does not overlap.
fn apics_in(state: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let mut rest = state;
    std::iter::from_fn(move || {
        loop {
            let window = rest.get(..APIC_LEN)?;
            if let Some(id) = apic_id(window) {
                rest = rest.get(APIC_LEN..)?;
                return Some(id);
            }
            rest = rest.get(1..)?;
        }
    })
}

fn apic_id(apic: &[u8]) -> Option<u32> {
    let version = apic.le_at::<u32>(APIC_VERSION)?;
    if version & 0xffff != APIC_KVM || version >> 16 & 0xff > APIC_MAX_ENTRY {
        return None;
    }
    let (registers, _) = apic.as_chunks::<APIC_REGISTER>();
    let alone = |register: &[u8; APIC_REGISTER]| register.iter().skip(4).all(|byte| *byte == 0);
    if !registers.iter().all(alone) {
        return None;
    }
    apic.le_at::<u32>(APIC_ID)
}

/// The memory file among the files of the folder `path`, and the state file; `None` if that is
/// not there.
fn memory_of(path: &Path, entries: &[Entry]) -> Result<Option<(PathBuf, PathBuf)>, DumpError> {
    let several = |what, files: Vec<&Entry>| DumpError::Ambiguous {
        path: path.to_owned(),
        what,
        candidates: files.into_iter().map(|entry| entry.path.clone()).collect(),
    };
    let states: Vec<_> = entries.iter().filter(|e| is_state(&e.start)).collect();
    let state = match states.as_slice() {
        [] => return Ok(None),
        [state] => state.path.clone(),
        _ => return Err(several("several Firecracker VM states", states)),
    };
    let memory: Vec<_> = entries
        .iter()
        .filter(|entry| may_be_memory(entry))
        .collect();
    match memory.as_slice() {
        [] => Err(DumpError::NotADump {
            path: path.to_owned(),
            why: "it holds a Firecracker VM's state, and no file that may be its memory",
        }),
        [memory] => Ok(Some((memory.path.clone(), state))),
        _ => Err(several("several files that may be the VM's memory", memory)),
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_PROCESSORS, MAX_STATE, is_state, processors_in, sregs_in};
    use sonicshot::Processor;
    use sonicshot::x86_64::ControlRegisters;

    /// Four processors' structures between others, as `bitcode` 0.6 and `bincode` 2 pack them with
    /// `kvm-bindings` 0.14: two that run, two that were never started.
    const PACKED: [&[u8]; 2] = [
        include_bytes!("../../tests/data/kvm-bitcode.zst"),
        include_bytes!("../../tests/data/kvm-bincode.zst"),
    ];

    fn four() -> Vec<Processor> {
        let runs = |cr3| {
            let registers = ControlRegisters::new(0x8005_0033, cr3, 0x37_0ef0, Some(0xd01));
            Processor::Started(registers)
        };
        let never = Processor::NotStarted;
        vec![runs(0x123_4000), runs(0x123_5000), never, never]
    }

    /// The offsets of the system registers: at the base of each APIC, 272 bytes behind their beginning.
    fn sregs_at(state: &[u8]) -> Vec<usize> {
        let base = |window: &[u8]| window == [8, 0xe0, 0xfe, 0] || window == [9, 0xe0, 0xfe, 0];
        let found = state
            .windows(4)
            .enumerate()
            .filter(|(_, window)| base(window));
        found.map(|(at, _)| at - 273).collect()
    }

    #[test]
    fn registers_are_found_by_their_shape_however_they_are_packed() {
        for packed in PACKED {
            let state = zstd::decode_all(packed).unwrap();
            assert_eq!(processors_in(&state), Some(four()));
            // Wherever they are.
            for skew in 1..9 {
                let moved = [vec![0xa5; skew], state.clone()].concat();
                assert_eq!(processors_in(&moved), Some(four()));
            }
            assert_eq!(sregs_at(&state).len(), 4);
        }
    }

    #[test]
    fn one_too_many_or_too_few_tells_nothing() {
        let state = zstd::decode_all(PACKED[0]).unwrap();
        let at = sregs_at(&state);
        let forged = state[at[1]..at[1] + 312].to_vec();
        assert_eq!(processors_in(&[state.clone(), forged].concat()), None);
        assert_eq!(processors_in(&state[..at[3] + 311]), None);
        assert_eq!(processors_in(&[]), None);
        let with = |at: usize, byte: u8| {
            let mut state = state.clone();
            state[at] = byte;
            processors_in(&state)
        };
        for at in at {
            // A flag that is 2, padding, a type, bits in registers that there are not, a place of
            // the APIC, a second boot processor or none.
            for (inside, byte) in [
                (15, 2),
                (23, 1),
                (14, 16),
                (204, 1),
                (228, 1),
                (247, 1),
                (252, 2),
                (267, 1),
                (274, 0xe1),
            ] {
                assert_eq!(with(at + inside, byte), None, "{inside}");
            }
            let boot = state[at + 273];
            assert_eq!(with(at + 273, boot ^ 1), None);
        }
    }

    #[test]
    fn no_more_is_read_than_a_state_may_have() {
        let state = zstd::decode_all(PACKED[0]).unwrap();
        let most = usize::try_from(MAX_STATE).unwrap();
        let mut long = state.clone();
        long.resize(most - 1, 0);
        assert_eq!(processors_in(&long), Some(four()));
        long.push(0);
        assert_eq!(processors_in(&long), None);
        // More processors than are looked for: those that were found need not be all.
        let at = sregs_at(&state);
        let never = state[at[3]..at[3] + 312].to_vec();
        assert_eq!(
            sregs_in(&never.repeat(MAX_PROCESSORS + 8)).count(),
            MAX_PROCESSORS + 8
        );
        let more = [state.clone(), never.repeat(MAX_PROCESSORS)].concat();
        assert_eq!(processors_in(&more), None);
    }

    #[test]
    fn each_processor_has_an_apic_of_its_own() {
        let state = zstd::decode_all(PACKED[1]).unwrap();
        // The version behind the number of the second one.
        let versions = state.windows(4).enumerate();
        let at: Vec<_> = versions
            .filter(|(_, w)| *w == [0x14, 0, 5, 0])
            .map(|(at, _)| at)
            .collect();
        assert_eq!(at.len(), 4);
        let with = |at: usize, byte: u8| {
            let mut state = state.clone();
            state[at] = byte;
            processors_in(&state)
        };
        assert_eq!(with(at[1] - 13, 0), None, "the first one's number");
        assert_eq!(with(at[1], 0x15), None, "another version");
        assert_eq!(with(at[1] + 4, 1), None, "something in the padding");
        assert_eq!(with(at[1] - 13, 9), Some(four()), "another number");
    }

    #[test]
    fn a_state_file_is_told_in_every_version() {
        let x86 = 0x0710_1984_8664_0000_u64;
        let arm = 0x0710_1984_aaaa_0000_u64;
        for magic in [x86, x86 | 7, arm, arm | 1] {
            let mut start = magic.to_le_bytes().to_vec();
            start.extend([1, 0, 0, 0]);
            assert!(is_state(&start));
            // Behind the byte of `bitcode`.
            start.insert(0, 0);
            assert!(is_state(&start));
            start.insert(0, 0);
            assert!(!is_state(&start));
        }
        assert!(!is_state(&x86.to_be_bytes()));
        assert!(!is_state(&x86.to_le_bytes()[..7]));
        assert!(!is_state(&[0; 16]));
    }
}
