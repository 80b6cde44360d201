//! A file that begins as one of a format and is none: a guest's memory whose first page happens to
//! look so.
//!
//! A file that begins as an ELF core, a compressed file or anything else may be RAM: its first page is
//! the guest's. It is taken for RAM only if it cannot be read as what it seems to be, or holds no
//! kernel so, and if there is a kernel in it as RAM, whose page tables lead to where it lies.

use super::placed::Placed;
use crate::error::OfflineError;
use crate::note::Note;
use crate::snapshot::Snapshot;
use sonicshot::PageSize;
use sonicshot_dump::{DumpError, Vmm};
use sonicshot_vmi::VmiError;

/// No guest has less memory.
const LEAST: u64 = 16 << 20;

/// Whether a snapshot that cannot be read, for this error, may be raw memory.
pub(super) fn is_worth_a_try(snapshot: &Snapshot, error: &OfflineError) -> bool {
    let no_kernel = matches!(
        error,
        OfflineError::Guest {
            source: VmiError::NoKernel { .. }
                | VmiError::NoTables { .. }
                | VmiError::BannerAlone { .. },
            ..
        }
    );
    let options = snapshot.options();
    (no_kernel || is_of_the_format(error))
        && options.format.is_none()
        && options.base.is_none()
        // What lies beside it says what it is.
        && snapshot.vmm() != Some(Vmm::CROSVM)
        && snapshot
            .memory_len()
            .is_some_and(|len| len >= LEAST && len.is_multiple_of(PageSize::SIZE_4K.bytes()))
        && snapshot.begins_as_other()
}

/// Whether what the file holds is at fault, not the system or the caller.
fn is_of_the_format(error: &OfflineError) -> bool {
    matches!(
        error,
        OfflineError::Dump(
            DumpError::Malformed { .. }
                | DumpError::MalformedItem { .. }
                | DumpError::Compressed { .. }
                | DumpError::Unsupported { .. }
                | DumpError::NotADump { .. }
                | DumpError::Layout { .. }
                | DumpError::NoLayout { .. }
                | DumpError::Memory { .. }
                | DumpError::Xen { .. }
        )
    )
}

/// Lets `look` see the guest of the file as raw memory. If there is none, it is what it seemed to
/// be, with `why` it cannot be read.
pub(super) fn with_guest<T>(
    snapshot: &Snapshot,
    why: OfflineError,
    look: &dyn Fn(&Snapshot) -> Result<Placed<T>, OfflineError>,
) -> Result<Placed<T>, OfflineError> {
    match look(&snapshot.as_raw()) {
        Ok(mut placed) => {
            placed.notes.push(Note::TakenAsRaw);
            Ok(placed)
        }
        // There is a kernel: what is wrong with it says more.
        Err(error) if is_of_a_kernel(&error) => Err(error),
        Err(_) => Err(why),
    }
}

/// Whether a kernel was found that is up to date, though its memory cannot be told.
fn is_of_a_kernel(error: &OfflineError) -> bool {
    matches!(
        error,
        OfflineError::Guest {
            source: VmiError::Inconsistent(_)
                | VmiError::BrokenLists { .. }
                | VmiError::LaterOwner(_)
                | VmiError::NotOwner { .. }
                | VmiError::OwnerUntold { .. }
                | VmiError::WrongKernel { .. },
            ..
        }
    )
}
