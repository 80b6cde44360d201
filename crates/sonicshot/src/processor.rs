//! What a file or a VMM tells of a guest's processors.
//!
//! A kernel's records stay in memory when the kernel is gone: QEMU keeps RAM over a reset, and
//! kexec does everywhere. Whether a kernel still owns the memory, the processors tell: each that
//! was started runs on page tables of the kernel that owns it.

use core::fmt;

/// The control registers of an x86-64 processor, as the guest would read them (Intel SDM volume 3,
/// section 2.5; AMD APM volume 2, section 3.1).
#[derive(Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ControlRegisters {
    /// `CR0`; bit 31 says that paging is on.
    pub cr0: u64,
    /// `CR3`, with its low bits (PCID or cache control) as they are.
    pub cr3: u64,
    /// `CR4`; bit 5 is PAE, bit 12 five-level paging.
    pub cr4: u64,
    /// `IA32_EFER`, if it is told; bit 10 says that long mode is active.
    pub efer: Option<u64>,
}

impl ControlRegisters {
    /// Registers with these values.
    #[must_use]
    pub const fn new(cr0: u64, cr3: u64, cr4: u64, efer: Option<u64>) -> Self {
        Self {
            cr0,
            cr3,
            cr4,
            efer,
        }
    }

    /// Whether the processor translates addresses by four- or five-level page tables: paging, PAE
    /// and, where it is told, long mode.
    #[must_use]
    pub const fn is_in_long_mode(&self) -> bool {
        const CR0_PG: u64 = 1 << 31;
        const CR4_PAE: u64 = 1 << 5;
        const EFER_LMA: u64 = 1 << 10;
        let long = match self.efer {
            Some(efer) => efer & EFER_LMA != 0,
            None => true,
        };
        self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && long
    }
}

impl fmt::Debug for ControlRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cr0 {:#x}, cr3 {:#x}, cr4 {:#x}",
            self.cr0, self.cr3, self.cr4
        )?;
        match self.efer {
            Some(efer) => write!(f, ", efer {efer:#x}"),
            None => Ok(()),
        }
    }
}

/// One processor of a guest, as it was when the guest stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Processor {
    /// Never started, or stopped for good by an INIT: held in reset, or waiting for a start-up
    /// interrupt (SIPI). It says nothing of who owns the memory.
    NotStarted,
    /// Halted with interrupts and paging off, where firmware leaves the processors that it started
    /// itself, for a kernel to take over: only an INIT, an NMI or an SMI gets it out. Never the
    /// boot processor. It says as little of who owns the memory as [`NotStarted`](Self::NotStarted).
    Parked,
    /// In system management mode: its registers are the firmware's.
    InSmm,
    /// Runs, or is halted, with these registers.
    Started(ControlRegisters),
    /// Runs a guest of its own. `host` holds the registers that it has as that guest's host, if
    /// they are told: with those it counts.
    InNestedGuest {
        /// The host's registers.
        host: Option<ControlRegisters>,
    },
}

/// What is told of all processors of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Processors {
    /// Nothing: the memory is raw, or its file tells no registers.
    #[default]
    Unknown,
    /// The file is of a kind that tells them, but what it says of them is damaged, contradicts
    /// itself or is not known: why. No register of it is to be believed.
    NotTold(&'static str),
    /// Each processor, in the order of the file.
    Known(Vec<Processor>),
    /// The memory is that of a kernel that is dead by design: a crash kernel wrote it down from
    /// `/proc/vmcore` (its notes hold no control registers).
    Crashed,
}
