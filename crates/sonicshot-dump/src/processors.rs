//! What a dump tells of the guest's processors, whatever its format: how registers are judged.
//!
//! Registers that are told wrong are worse than none, for by them a kernel is believed to own the
//! memory. So what contradicts itself is [`Processors::NotTold`], and never a guess.

use sonicshot::{ControlRegisters, Gpa, GuestMemory, Processor, Processors};

/// Paging is on (`CR0.PG`).
const CR0_PG: u64 = 1 << 31;
const CR0_ET: u64 = 1 << 4;
/// Caches are off (`CR0.CD`, `CR0.NW`): what an INIT leaves as it was.
const CR0_CACHE: u64 = 3 << 29;
/// Interrupts are on (`RFLAGS.IF`).
const RFLAGS_IF: u64 = 1 << 9;
/// The instruction `HLT`.
const HLT: u8 = 0xf4;
/// Below this a processor with paging off has all of its code.
const REAL_END: u64 = 1 << 32;

/// Where AMD's virtual machine control block has the control registers, in bytes from its
/// beginning (AMD APM volume 2, table B-2). A host's save area is laid out alike, by KVM and by
/// QEMU.
const VMCB_EFER: usize = 0x4d0;
const VMCB_CR4: usize = 0x548;
const VMCB_CR3: usize = 0x550;
const VMCB_CR0: usize = 0x558;
/// KVM's `struct vmcs12` (`arch/x86/kvm/vmx/vmcs12.h`), whose layout never changes.
const VMCS12_REVISION: u32 = 0x11e5_7ed0;
const VMCS12_HOST_EFER: usize = 264;
const VMCS12_HOST_CR0: usize = 584;
const VMCS12_HOST_CR3: usize = 592;
const VMCS12_HOST_CR4: usize = 600;
const VMCS12_EXIT_CONTROLS: usize = 768;
/// On an exit the host is in long mode; and it gets the `EFER` that stands in the structure.
const EXIT_HOST_LONG: u32 = 1 << 9;
const EXIT_LOAD_EFER: u32 = 1 << 21;

/// What tells a processor that runs a kernel from one that does not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Registers {
    pub control: ControlRegisters,
    pub rip: u64,
    pub rflags: u64,
    pub cs_selector: u64,
    pub cs_base: u64,
}

/// Whether a processor is halted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Halted {
    Yes,
    No,
    /// The file does not say.
    Untold,
}

impl Registers {
    /// Whether each has the value that reset or INIT gives it (Intel SDM volume 3, table 11-1):
    /// the next instruction is the first, at `f000:fff0` in the last 64 KiB of 4 GiB; paging and
    /// all of `CR4` and `EFER` are off. `CR0` is `0x60000010` after a reset; an INIT leaves its
    /// two cache bits as they were. After one instruction it is none of this any more.
    pub(crate) fn are_of_reset(&self) -> bool {
        let control = &self.control;
        self.rip == 0xfff0
            && self.cs_selector == 0xf000
            && self.cs_base == 0xffff_0000
            && control.cr0 & !CR0_CACHE == CR0_ET
            && control.cr3 == 0
            && control.cr4 == 0
            && control.efer.is_none_or(|efer| efer == 0)
    }

    /// What a processor with these registers is. `boot` is the boot processor, which runs from
    /// the reset vector at once, and which nobody parks.
    pub(crate) fn processor(
        &self,
        boot: bool,
        halted: Halted,
        memory: &dyn GuestMemory,
    ) -> Processor {
        if !boot && halted != Halted::No && self.are_of_reset() {
            return Processor::NotStarted;
        }
        let masked = self.control.cr0 & CR0_PG == 0 && self.rflags & RFLAGS_IF == 0;
        if !boot && masked && (halted == Halted::Yes || self.is_behind_hlt(halted, memory)) {
            return Processor::Parked;
        }
        Processor::Started(self.control)
    }

    /// Where a file does not say that a processor is halted: whether the instruction before the
    /// next one is `HLT`. With paging off addresses are physical.
    fn is_behind_hlt(&self, halted: Halted, memory: &dyn GuestMemory) -> bool {
        let last = self.rip.checked_sub(1);
        let at = last.and_then(|last| self.cs_base.checked_add(last));
        let Some(at) = at.filter(|at| *at < REAL_END && halted == Halted::Untold) else {
            return false;
        };
        let mut byte = [0];
        memory.read(Gpa::new(at), &mut byte).is_ok() && byte == [HLT]
    }
}

/// A host's registers in a control block or a save area of AMD's.
pub(crate) fn host_in_vmcb(block: &[u8]) -> Option<ControlRegisters> {
    Some(ControlRegisters::new(
        u64_in(block, VMCB_CR0)?,
        u64_in(block, VMCB_CR3)?,
        u64_in(block, VMCB_CR4)?,
        Some(u64_in(block, VMCB_EFER)?),
    ))
    .filter(ControlRegisters::is_in_long_mode)
}

/// A host's registers in KVM's `struct vmcs12`.
pub(crate) fn host_in_vmcs12(vmcs: &[u8]) -> Option<ControlRegisters> {
    if u32_in(vmcs, 0)? != VMCS12_REVISION {
        return None;
    }
    let controls = u32_in(vmcs, VMCS12_EXIT_CONTROLS)?;
    if controls & EXIT_HOST_LONG == 0 {
        return None;
    }
    let efer = match controls & EXIT_LOAD_EFER {
        0 => None,
        _ => Some(u64_in(vmcs, VMCS12_HOST_EFER)?),
    };
    Some(ControlRegisters::new(
        u64_in(vmcs, VMCS12_HOST_CR0)?,
        u64_in(vmcs, VMCS12_HOST_CR3)?,
        u64_in(vmcs, VMCS12_HOST_CR4)?,
        efer,
    ))
    .filter(ControlRegisters::is_in_long_mode)
}

/// The same of a save area that lies in guest memory.
pub(crate) fn host_in_memory(memory: &dyn GuestMemory, at: u64) -> Option<ControlRegisters> {
    let mut area = [0; 0x600];
    memory.read(Gpa::new(at), &mut area).ok()?;
    host_in_vmcb(&area)
}

/// The processors, or why they are not told.
pub(crate) fn told(found: Result<Vec<Processor>, &'static str>) -> Processors {
    match found {
        Ok(processors) if processors.is_empty() => Processors::NotTold("it has no processor"),
        Ok(processors) => Processors::Known(processors),
        Err(why) => Processors::NotTold(why),
    }
}

pub(crate) fn u32_in(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u64_in(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
