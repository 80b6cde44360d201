//! A guest's processors as a file or a VMM tells of them.
//!
//! A kernel's records stay in memory when the kernel is gone: QEMU keeps RAM over a reset, and
//! kexec does everywhere. Whether a kernel still owns the memory, the processors tell: each that
//! was started runs on page tables of the kernel that owns it.

use crate::x86_64::ControlRegisters;

/// One processor of a guest, as it was when the guest stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Processor {
    /// Never started, or stopped for good by an INIT: held in reset, or waiting for a start-up
    /// interrupt (SIPI). It says nothing of who owns the memory.
    NotStarted,
    /// Halted with interrupts and paging off, where firmware leaves the processors that it started
    /// itself, for a kernel to take over: only an INIT, an NMI or an SMI gets it out. Never the
    /// boot processor. It says as little of who owns the memory as
    /// [`NotStarted`](Self::NotStarted).
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

/// The state of all processors of a guest.
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
