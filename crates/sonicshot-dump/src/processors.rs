//! The guest's processors as a dump tells of them, whatever its format: how registers are judged.
//!
//! Registers that are told wrong are worse than none, for by them a kernel is believed to own the
//! memory. So what contradicts itself is [`Processors::NotTold`], and never a guess.

use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Bytes, Gpa, GuestMemory, Processor, Processors};

/// Long mode is on; long mode is active (`EFER`).
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
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

/// The places of the control registers in AMD's virtual machine control block, in bytes from its
/// beginning (AMD APM volume 2, table B-2). A host's save area is laid out alike, by KVM and by
/// QEMU.
const VMCB_EFER: u64 = 0x4d0;
const VMCB_CR4: u64 = 0x548;
const VMCB_CR3: u64 = 0x550;
const VMCB_CR0: u64 = 0x558;
/// KVM's `struct vmcs12` (`arch/x86/kvm/vmx/vmcs12.h`), whose layout never changes.
const VMCS12_REVISION: u32 = 0x11e5_7ed0;
const VMCS12_HOST_EFER: u64 = 264;
const VMCS12_HOST_CR0: u64 = 584;
const VMCS12_HOST_CR3: u64 = 592;
const VMCS12_HOST_CR4: u64 = 600;
const VMCS12_EXIT_CONTROLS: u64 = 768;
/// On an exit the host is in long mode; and it gets the `EFER` that stands in the structure.
const EXIT_HOST_LONG: u32 = 1 << 9;
const EXIT_LOAD_EFER: u32 = 1 << 21;

/// KVM's `KVM_MP_STATE_...` of x86: runs; was never started; waits for a SIPI after an INIT; halted.
const RUNNABLE: u32 = 0;
const UNINITIALIZED: u32 = 1;
const INIT_RECEIVED: u32 = 2;
const HALTED: u32 = 3;

/// The mark that tells a processor that runs a kernel from one that does not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Registers {
    pub control: ControlRegisters,
    pub rip: u64,
    pub rflags: u64,
    pub cs_selector: u64,
    pub cs_base: u64,
}

/// Whether a processor is halted.
#[derive(Clone, Copy)]
pub(crate) enum Halted<'a> {
    Yes,
    No,
    /// The file does not say; the guest's memory may.
    Untold(&'a dyn GuestMemory),
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

    /// The state of a processor with these registers. `boot` is the boot processor, which runs from
    /// the reset vector at once, and which nobody parks.
    pub(crate) fn processor(&self, boot: bool, halted: Halted<'_>) -> Processor {
        if boot || matches!(halted, Halted::No) {
            return Processor::Started(self.control);
        }
        if self.are_of_reset() {
            return Processor::NotStarted;
        }
        let masked = self.control.cr0 & CR0_PG == 0 && self.rflags & RFLAGS_IF == 0;
        let parked = match halted {
            Halted::Untold(memory) => self.is_behind_hlt(memory),
            Halted::Yes | Halted::No => true,
        };
        if masked && parked {
            return Processor::Parked;
        }
        Processor::Started(self.control)
    }

    /// The same by what KVM says that the processor does; `halted` is what else is said of it.
    /// `None` if that cannot be.
    pub(crate) fn of_kvm(&self, boot: bool, mp_state: u32, halted: bool) -> Option<Processor> {
        let halted = match mp_state {
            RUNNABLE if !halted => Halted::No,
            RUNNABLE | HALTED => Halted::Yes,
            // It waits, so that nothing but reset's or INIT's can be in its registers.
            UNINITIALIZED | INIT_RECEIVED if !boot && self.are_of_reset() => Halted::Yes,
            _ => return None,
        };
        Some(self.processor(boot, halted))
    }

    /// Whether the instruction before the next one is `HLT`, where a file does not say that a
    /// processor is halted. With paging off addresses are physical.
    fn is_behind_hlt(&self, memory: &dyn GuestMemory) -> bool {
        let last = self.rip.checked_sub(1);
        let at = last.and_then(|last| self.cs_base.checked_add(last));
        let mut byte = [0];
        at.filter(|at| *at < REAL_END)
            .is_some_and(|at| memory.read(Gpa::new(at), &mut byte).is_ok() && byte == [HLT])
    }
}

/// A host's registers in a control block or a save area of AMD's.
pub(crate) fn host_in_vmcb(block: &[u8]) -> Option<ControlRegisters> {
    Some(ControlRegisters::new(
        block.le_at::<u64>(VMCB_CR0)?,
        block.le_at::<u64>(VMCB_CR3)?,
        block.le_at::<u64>(VMCB_CR4)?,
        Some(block.le_at::<u64>(VMCB_EFER)?),
    ))
    .filter(ControlRegisters::is_in_long_mode)
}

/// A host's registers in KVM's `struct vmcs12`.
pub(crate) fn host_in_vmcs12(vmcs: &[u8]) -> Option<ControlRegisters> {
    if vmcs.le_at::<u32>(0)? != VMCS12_REVISION {
        return None;
    }
    let controls = vmcs.le_at::<u32>(VMCS12_EXIT_CONTROLS)?;
    if controls & EXIT_HOST_LONG == 0 {
        return None;
    }
    let efer = match controls & EXIT_LOAD_EFER {
        0 => None,
        _ => Some(vmcs.le_at::<u64>(VMCS12_HOST_EFER)?),
    };
    Some(ControlRegisters::new(
        vmcs.le_at::<u64>(VMCS12_HOST_CR0)?,
        vmcs.le_at::<u64>(VMCS12_HOST_CR3)?,
        vmcs.le_at::<u64>(VMCS12_HOST_CR4)?,
        efer,
    ))
    .filter(ControlRegisters::is_in_long_mode)
}

/// KVM's `struct kvm_nested_state`, in bytes: flags, format, and behind the header the data.
const NESTED_FORMAT: u64 = 2;
const NESTED_DATA: usize = 128;
const NESTED_GUEST_MODE: u16 = 1;
const NESTED_VMX: u16 = 0;
const NESTED_SVM: u16 = 1;

/// Whether by its `struct kvm_nested_state` a processor runs a nested guest, and what it has as
/// that guest's host.
pub(crate) fn nested(state: &[u8]) -> Option<Processor> {
    let word = |at: u64| state.le_at::<u16>(at);
    if word(0)? & NESTED_GUEST_MODE == 0 {
        return None;
    }
    let data = state.get(NESTED_DATA..).unwrap_or(&[]);
    let host = match word(NESTED_FORMAT) {
        Some(NESTED_VMX) => host_in_vmcs12(data),
        Some(NESTED_SVM) => host_in_vmcb(data),
        _ => None,
    };
    Some(Processor::InNestedGuest { host })
}

/// KVM's `struct kvm_regs` and `struct kvm_sregs`, as C has them: their lengths and fields.
const REGS_LEN: usize = 144;
const REGS_RIP: u64 = 128;
const REGS_RFLAGS: u64 = 136;
pub(crate) const SREGS_LEN: usize = 312;
const SREGS_SEGMENTS: usize = 8;
const SREGS_SEGMENT: usize = 24;
const SREGS_TABLES: [usize; 2] = [192, 208];
const SREGS_CR0: u64 = 224;
const SREGS_CR3: u64 = 240;
const SREGS_CR4: u64 = 248;
const SREGS_CR8: u64 = 256;
const SREGS_EFER: u64 = 264;
const SREGS_APIC_BASE: u64 = 272;
/// Of `IA32_APIC_BASE`: the boot processor; the APIC is on, or in x2APIC mode.
const APIC_BASE_BOOT: u64 = 1 << 8;
const APIC_BASE_FLAGS: u64 = APIC_BASE_BOOT | 1 << 10 | 1 << 11;
const APIC_BASE: u64 = 0xfee0_0000;
/// The bits that Linux's own headers name in `CR0`, `CR4` and `EFER`.
const CR0_KNOWN: u64 = 0xe005_003f;
const CR4_KNOWN: u64 = 0x1_13ff_7fff;
const EFER_KNOWN: u64 = 0x0036_fd01;
/// An address of a page table, with a PCID or cache bits below, and LAM's bits above.
const CR3_KNOWN: u64 = 0x600f_ffff_ffff_ffff;

/// A `struct kvm_sregs`, which may be one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sregs<'a>(&'a [u8]);

impl<'a> Sregs<'a> {
    /// One that is as KVM leaves it: flags that are 0 or 1, padding of zeroes, no bit in a control
    /// register that there is not, an APIC where it always is.
    pub(crate) fn new(bytes: &'a [u8]) -> Option<Self> {
        let bytes = bytes.get(..SREGS_LEN)?;
        let apic = bytes.le_at::<u64>(SREGS_APIC_BASE)?;
        if apic & !APIC_BASE_FLAGS != APIC_BASE {
            return None;
        }
        let (segments, _) = bytes.as_chunks::<SREGS_SEGMENT>();
        let segments = segments.get(..SREGS_SEGMENTS)?;
        let sound = |segment: &[u8; SREGS_SEGMENT]| {
            // Type, present, privilege, default size, system, long, granularity, available,
            // unusable, padding.
            let [.., kind, p, dpl, db, s, l, g, avl, unusable, padding] = segment;
            *kind < 16
                && *dpl < 4
                && *padding == 0
                && [p, db, s, l, g, avl, unusable]
                    .iter()
                    .all(|flag| **flag < 2)
        };
        let tables = SREGS_TABLES.iter().all(|at| {
            let padding = at.checked_add(10).and_then(|at| bytes.get(at..)?.get(..6));
            padding.is_some_and(|padding| padding.iter().all(|byte| *byte == 0))
        });
        let sregs = Self(bytes);
        let control = sregs.control()?;
        let efer = control.efer?;
        let sound = segments.iter().all(sound)
            && tables
            && control.cr0 & !CR0_KNOWN == 0
            && control.cr0 & CR0_ET != 0
            && control.cr3 & !CR3_KNOWN == 0
            && control.cr4 & !CR4_KNOWN == 0
            && efer & !EFER_KNOWN == 0
            // Long mode is active where it is on and paging is too.
            && (efer & EFER_LMA != 0) == (efer & EFER_LME != 0 && control.cr0 & CR0_PG != 0)
            && bytes.le_at::<u64>(SREGS_CR8)? < 16;
        sound.then_some(sregs)
    }

    pub(crate) fn control(&self) -> Option<ControlRegisters> {
        Some(ControlRegisters::new(
            self.0.le_at::<u64>(SREGS_CR0)?,
            self.0.le_at::<u64>(SREGS_CR3)?,
            self.0.le_at::<u64>(SREGS_CR4)?,
            Some(self.0.le_at::<u64>(SREGS_EFER)?),
        ))
    }

    /// Whether it is the boot processor's.
    pub(crate) fn is_boot(&self) -> bool {
        self.0
            .le_at::<u64>(SREGS_APIC_BASE)
            .is_some_and(|apic| apic & APIC_BASE_BOOT != 0)
    }

    /// All that is looked at, with the next instruction and the flags from elsewhere.
    pub(crate) fn registers(&self, rip: u64, rflags: u64) -> Option<Registers> {
        Some(Registers {
            control: self.control()?,
            rip,
            rflags,
            cs_selector: (self.0.le_at::<u32>(12)? & 0xffff).into(),
            cs_base: self.0.le_at::<u64>(0)?,
        })
    }
}

/// The next instruction and the flags in a `struct kvm_regs`.
pub(crate) fn rip_and_flags(regs: &[u8]) -> Option<(u64, u64)> {
    let regs = regs.get(..REGS_LEN)?;
    Some((
        regs.le_at::<u64>(REGS_RIP)?,
        regs.le_at::<u64>(REGS_RFLAGS)?,
    ))
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
