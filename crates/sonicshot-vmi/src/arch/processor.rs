//! A processor as it is told of, and what it must share with the kernel.

use crate::KernelVa;
use crate::arch::x86_64::Cr3;
use crate::error::VmiError;
use crate::kernel::Kernel;
use core::fmt;
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{Gpa, Processor};

/// A processor that counts, as it was told: it was started, and is not in the firmware's mode.
#[derive(Debug, Clone)]
pub(crate) enum Told {
    /// By the file or the VMM.
    Processor(Processor),
    /// By the user; with as many levels as the kernel has.
    Cr3(Cr3),
}

/// A kernel-virtual address, and where it is by the kernel's own page tables.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Landmark {
    pub what: &'static str,
    pub at: KernelVa,
    pub there: Gpa,
}

impl Landmark {
    /// # Errors
    /// [`VmiError::Read`] if the kernel's own page tables do not map it.
    pub(crate) fn new(
        kernel: &Kernel<'_>,
        what: &'static str,
        at: KernelVa,
    ) -> Result<Self, VmiError> {
        let there = kernel.space.translate(at).map_err(VmiError::read(what))?;
        Ok(Self {
            what,
            at,
            there: there.at,
        })
    }
}

/// A processor that does not run on the page tables of the kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignProcessor {
    /// The number of the processor, in the order of the file.
    pub number: usize,
    /// Its `CR3`, if it is told.
    pub cr3: Option<Cr3>,
    /// The sign that its page tables are others.
    pub why: Foreign,
}

/// The reason that a processor's page tables are not those of the kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// It runs without four- or five-level page tables, as firmware and boot loaders do.
    NoPaging {
        /// Its control registers.
        registers: ControlRegisters,
    },
    /// Its page tables lead to another place than the kernel's.
    Leads {
        /// The thing that is there by the kernel's own page tables.
        what: &'static str,
        /// The kernel-virtual address.
        at: KernelVa,
        /// The address to which the kernel's page tables lead.
        kernel: Gpa,
        /// The address to which the processor's lead, if any.
        processor: Option<Gpa>,
    },
    /// It runs a guest of its own, and the registers that it has as that guest's host are not
    /// told.
    Nested,
    /// Its work is not known.
    Unknown,
}

impl fmt::Display for ForeignProcessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "processor {}", self.number)?;
        if let Some(cr3) = self.cr3 {
            write!(f, " (CR3 {cr3})")?;
        }
        match &self.why {
            Foreign::NoPaging { registers } => {
                write!(f, " runs without the kernel's page tables: {registers:?}")
            }
            Foreign::Leads {
                what,
                at,
                kernel,
                processor,
            } => {
                write!(f, " runs on other page tables: {what} at {at} is at ")?;
                match processor {
                    Some(processor) => write!(f, "{processor}, the kernel's is at {kernel}"),
                    None => write!(f, "no place, the kernel's is at {kernel}"),
                }
            }
            Foreign::Nested => f.write_str(
                " runs a guest of its own, and its CR3 as that guest's host is not told",
            ),
            Foreign::Unknown => f.write_str(" is in a state that is not known"),
        }
    }
}
