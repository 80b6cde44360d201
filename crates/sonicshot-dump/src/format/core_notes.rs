//! The processors in the notes of ELF cores and kdump-compressed dumps.
//!
//! For each processor QEMU's `dump-guest-memory` writes two notes: `CORE`, the `struct
//! elf_prstatus` of Linux, and `QEMU`, a `QEMUCPUState` (`target/i386/arch_dump.c`). All of one
//! kind come first, then all of the other, both in the order of the processors. The second has
//! `CR0`, `CR3` and `CR4`. `EFER` is in neither, nor whether the processor is halted, in SMM or in
//! a nested guest: there it counts as started, with the firmware's or that guest's registers.
//!
//! What a crash kernel saves as `/proc/vmcore` has `CORE` notes alone, and a VMCOREINFO that the
//! kernel ended with the time of its crash as it died (`crash_save_vmcoreinfo`). A running
//! kernel's has no such line, and `/proc/kcore` has other `CORE` notes besides.

use crate::format::notes::{Note, notes_in};
use crate::processors::{self, Halted, Registers};
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Bytes, GuestMemory, Processor, Processors};

/// The only version of `QEMUCPUState`; what is added to it comes behind.
const VERSION: u32 = 1;
/// Its length as it was at first, in bytes.
const MIN_LEN: usize = 432;
/// Its fields, in bytes from its beginning.
const RAX: u64 = 8;
const RSP: u64 = 56;
const RIP: u64 = 136;
const RFLAGS: u64 = 144;
const CS: u64 = 152;
const CR: u64 = 392;
/// The length of `struct elf_prstatus` of a 64-bit kernel, and where it has `RAX`, `RIP`, `RFLAGS`
/// and `RSP`; and the same of a 32-bit one.
const PRSTATUS_LEN: usize = 336;
const PRSTATUS: [u64; 4] = [192, 240, 256, 264];
const PRSTATUS_32_LEN: usize = 144;
const PRSTATUS_32: [u64; 4] = [96, 120, 128, 132];
/// More processors than any VM has.
const MAX_PROCESSORS: usize = 1 << 14;

/// The processors by the notes of a dump. `vmcoreinfo` is the dump's, wherever it has it.
pub(crate) fn processors(
    notes: Option<&[u8]>,
    vmcoreinfo: Option<&[u8]>,
    memory: &dyn GuestMemory,
) -> Processors {
    let Some(notes) = notes else {
        return Processors::Unknown;
    };
    let mut status = Vec::new();
    let mut states = Vec::new();
    let mut others = false;
    for note in notes_in(notes) {
        match note.name {
            _ if status.len().max(states.len()) > MAX_PROCESSORS => {
                return Processors::NotTold("its notes are of too many processors");
            }
            b"CORE" if note.is_registers() => status.push(note.text),
            b"QEMU" => states.push(note),
            b"VMCOREINFO" | b"SONICSHOT" => {}
            _ => others = true,
        }
    }
    if !states.is_empty() {
        return processors::told(of_qemu(&status, &states, memory));
    }
    if !status.is_empty() && !others && vmcoreinfo.is_some_and(has_crashed) {
        return Processors::Crashed;
    }
    Processors::Unknown
}

/// Whether the kernel of this VMCOREINFO wrote down when it crashed.
fn has_crashed(vmcoreinfo: &[u8]) -> bool {
    let mut lines = vmcoreinfo.split(|byte| *byte == b'\n');
    lines.any(|line| {
        let time = line.strip_prefix(b"CRASHTIME=");
        time.is_some_and(|time| !time.is_empty() && time.iter().all(u8::is_ascii_digit))
    })
}

fn of_qemu(
    status: &[&[u8]],
    states: &[Note<'_>],
    memory: &dyn GuestMemory,
) -> Result<Vec<Processor>, &'static str> {
    if status.len() != states.len() {
        return Err("its notes of the two kinds are of different numbers of processors");
    }
    let mut found = Vec::with_capacity(states.len());
    for (number, (status, state)) in status.iter().zip(states).enumerate() {
        let registers = registers(state.text).ok_or("a QEMU note of another version or length")?;
        if !agree(status, state.text) {
            return Err("the two notes of a processor do not agree");
        }
        found.push(registers.processor(number == 0, Halted::Untold(memory)));
    }
    Ok(found)
}

fn registers(state: &[u8]) -> Option<Registers> {
    let len = usize::try_from(state.le_at::<u32>(4)?).ok()?;
    if state.le_at::<u32>(0)? != VERSION || len < MIN_LEN || len != state.len() {
        return None;
    }
    let control = |number: u64| state.le_at::<u64>(number.checked_mul(8)?.checked_add(CR)?);
    Some(Registers {
        control: ControlRegisters::new(control(0)?, control(3)?, control(4)?, None),
        rip: state.le_at::<u64>(RIP)?,
        rflags: state.le_at::<u64>(RFLAGS)?,
        cs_selector: state.le_at::<u32>(CS)?.into(),
        cs_base: state.le_at::<u64>(CS.checked_add(16)?)?,
    })
}

/// Whether a processor's two notes are of the same instant. Where the first processor is not in
/// long mode, QEMU writes the first note of each as a 32-bit kernel would have it.
fn agree(status: &[u8], state: &[u8]) -> bool {
    let wide = |at| status.le_at::<u64>(at);
    let narrow = |at| status.le_at::<u32>(at).map(u64::from);
    let fields = [RAX, RIP, RFLAGS, RSP].map(|at| state.le_at::<u64>(at));
    match status.len() {
        PRSTATUS_LEN => fields == PRSTATUS.map(wide),
        PRSTATUS_32_LEN => {
            fields.map(|field| Some(field? & 0xffff_ffff)) == PRSTATUS_32.map(narrow)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_PROCESSORS, processors};
    use sonicshot::{Gpa, GuestBytes, MappedRegions, Processors};

    #[test]
    fn notes_of_more_processors_than_there_are_tell_nothing() {
        let page = [0; 4096];
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&page))]).unwrap();
        // An empty note of a processor's registers.
        let mut note = [5_u32, 0, 1].map(u32::to_le_bytes).concat();
        note.extend(b"CORE\0\0\0\0");
        for (count, want) in [
            (MAX_PROCESSORS, Processors::Unknown),
            (
                MAX_PROCESSORS + 2,
                Processors::NotTold("its notes are of too many processors"),
            ),
        ] {
            assert_eq!(processors(Some(&note.repeat(count)), None, &memory), want);
        }
    }
}
