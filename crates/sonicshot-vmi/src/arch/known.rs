//! Every architecture of which kernels are read, and which one a kernel is of.

use super::processor::Told;
use super::seam::{Arch, KernelShape, Tables};
use super::x86_64;
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::paging::AddressSpace;
use crate::symbols::VmcoreinfoLines;
use sonicshot::{Architecture, Gpa, GuestMemory};

/// Every architecture of which kernels are read.
const ALL: [&dyn Arch; 1] = [&x86_64::X86_64];

/// As [`Arch::roots`], by whichever architecture has such registers.
pub(crate) fn roots(memory: &dyn GuestMemory, told: &Told) -> Vec<(Gpa, u32)> {
    let each = ALL.iter().map(|arch| arch.roots(memory, told));
    each.flatten().collect()
}

/// The one whose kernels can be found by what all of them look like, and what that is.
pub(crate) fn shaped() -> Option<(&'static dyn Arch, &'static KernelShape)> {
    ALL.into_iter().find_map(|arch| Some((arch, arch.shape()?)))
}

/// The one by which a kernel of `architecture` is read.
///
/// # Errors
/// [`VmiError::Unsupported`] if there is none yet.
pub(crate) fn by_name(architecture: Architecture) -> Result<&'static dyn Arch, VmiError> {
    match architecture {
        Architecture::X86_64 => Ok(&x86_64::X86_64),
        other => Err(VmiError::Unsupported {
            what: format!("a guest of architecture {other}: only x86-64 is supported so far"),
        }),
    }
}

/// The one by which `kernel` is read.
///
/// # Errors
/// As [`by_name`].
pub(crate) fn of(kernel: &Kernel<'_>) -> Result<&'static dyn Arch, VmiError> {
    by_name(kernel.build.architecture)
}

/// The page tables that a VMCOREINFO names, of whichever architecture it is.
///
/// # Errors
/// As [`Arch::tables`].
pub(crate) fn tables(
    memory: &dyn GuestMemory,
    text: VmcoreinfoLines<'_>,
) -> Result<Tables, VmiError> {
    // `arch/arm64/kernel/vmcore_info.c`; x86-64 has no such line.
    if text.value("NUMBER(VA_BITS)").is_some() {
        return Err(VmiError::OtherMachine {
            what: "an arm64 guest: only x86-64 is supported so far",
        });
    }
    by_name(Architecture::X86_64)?.tables(memory, text)
}

impl Tables {
    /// The address space that these tables make.
    ///
    /// # Errors
    /// As [`by_name`].
    pub(crate) fn space<'m>(
        &self,
        memory: &'m dyn GuestMemory,
    ) -> Result<AddressSpace<'m>, VmiError> {
        let paging = by_name(self.architecture)?.paging(self);
        Ok(AddressSpace::new(memory, paging))
    }
}
