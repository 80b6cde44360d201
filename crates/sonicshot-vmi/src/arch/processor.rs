//! What is told of a processor, and what it must share with the kernel.

use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use core::fmt;
use core::str::FromStr;
use sonicshot::{ControlRegisters, Gpa, Processor};

/// What is told of a processor that counts: it was started, and is not in the firmware's mode.
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

/// The value of a processor's `CR3`, which says where its page tables begin.
///
/// ```
/// use sonicshot_vmi::Cr3;
/// assert_eq!("0x1e20c000".parse(), Ok(Cr3::new(0x1e20_c000)));
/// assert_eq!("4096".parse(), Ok(Cr3::new(4096)));
/// assert!("1e20c000".parse::<Cr3>().is_err());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cr3(u64);

impl Cr3 {
    /// The register's value, as the processor has it.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The value as a number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Cr3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cr3({:#x})", self.0)
    }
}

impl fmt::Display for Cr3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A text is no value of `CR3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither a decimal number nor a hexadecimal one that begins with 0x")]
#[non_exhaustive]
pub struct ParseCr3Error;

impl FromStr for Cr3 {
    type Err = ParseCr3Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16),
            // QEMU writes `CR3=000000001e20c000`, which is no decimal number.
            None if text.len() > 1 && text.starts_with('0') => return Err(ParseCr3Error),
            None => text.parse(),
        };
        number.map(Self).map_err(|_| ParseCr3Error)
    }
}

/// A processor that does not run on the page tables of the kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForeignProcessor {
    /// Which, in the order of the file.
    pub number: usize,
    /// Its `CR3`, if it is told.
    pub cr3: Option<Cr3>,
    /// What tells that its page tables are others.
    pub why: Foreign,
}

/// Why a processor's page tables are not those of the kernel that was found.
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
        /// What is there by the kernel's own page tables.
        what: &'static str,
        /// The kernel-virtual address.
        at: KernelVa,
        /// Where the kernel's page tables lead.
        kernel: Gpa,
        /// Where the processor's lead, if anywhere.
        processor: Option<Gpa>,
    },
    /// It runs a guest of its own, and the registers that it has as that guest's host are not
    /// told.
    Nested,
    /// What it does is not known.
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
