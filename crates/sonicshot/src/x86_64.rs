//! Registers that only x86-64 processors have.

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
