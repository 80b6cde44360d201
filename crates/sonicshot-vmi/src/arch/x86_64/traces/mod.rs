//! Traces that a later owner leaves on a PC: its firmware's, its kernel's start.
//!
//! | test | trace | why it is one |
//! |---|---|---|
//! | the BIOS's clock | the ticks at 0x46c are of another time of day than when the kernel booted | `clock.rs` |
//! | EFI tables | the system table or the runtime services table of an EFI firmware do not have the kernel's addresses | `efi.rs` |
//! | firmware tables | the ACPI root pointer, the root table, or a table in it are not where and what the kernel found | ACPI memory is reserved and the tables' names and lengths never change; a BIOS that starts again writes its ROM over the segment that holds the pointer, and builds the tables again later |
//! | trampoline | the header or the page table of the real-mode trampoline are not as the kernel left them | the kernel writes it once, at boot, into memory below 1 MiB that it reserves (`arch/x86/realmode/init.c`) |

mod acpi;
pub(crate) mod clock;
pub(crate) mod efi;
#[cfg(test)]
mod tests;
mod trampoline;

use crate::arch::{Owner, Test};
use crate::error::VmiError;
use crate::kernel::Kernel;
use sonicshot::Gpa;

pub(crate) const CLOCK: &str = "the BIOS's clock";
pub(crate) const EFI: &str = "EFI tables";
/// A machine without a BIOS: direct boots of Firecracker and Cloud Hypervisor, whose memory no
/// reset outlives; or one whose kernel no reset outlives.
const NO_BIOS: &str = "no BIOS data area";

pub(super) const TESTS: [(&str, Test); 4] = [
    (CLOCK, clock::bios_clock),
    (EFI, efi::efi_tables),
    ("firmware tables", acpi::firmware),
    ("trampoline", trampoline::trampoline),
];

pub(super) const TESTS_BY_LOG: [(&str, Test); 2] = [
    (CLOCK, clock::bios_clock_by_log),
    ("firmware tables", acpi::firmware_by_log),
];

/// Whether no other kernel need be looked for: there is no trace, and of the one thing that
/// leaves no other, a reset, the BIOS's clock would tell, or there is no BIOS to start again.
pub(super) fn are_settled(owner: &Owner) -> bool {
    let no_bios = |(test, why): &(&str, String)| *test == CLOCK && why == NO_BIOS;
    owner.traces.is_empty() && (owner.clean.contains(&CLOCK) || owner.not_made.iter().any(no_bios))
}

/// Little-endian numbers of guest-physical memory.
pub(crate) fn physical<const N: usize>(kernel: &Kernel<'_>, at: Gpa) -> Result<[u8; N], VmiError> {
    let mut bytes = [0; N];
    kernel.space.memory().read(at, &mut bytes)?;
    Ok(bytes)
}
