//! Finds out where in the guest the bytes of a dump lie, where the dump itself does not say:
//! raw files, and QEMU's files with several blocks of memory. The guest's own memory maps decide.

mod candidates;
mod given;
mod placed;
mod plugged;
mod search;
mod trial;

use crate::error::OfflineError;
use crate::snapshot::Snapshot;
pub(crate) use placed::{Look, Placed};
use sonicshot_dump::Dump;

/// Opens the dump in the layout that its guest confirms and lets `look` see the guest.
pub(crate) fn with_guest<T>(
    snapshot: &Snapshot,
    look: Look<'_, T>,
) -> Result<Placed<T>, OfflineError> {
    match snapshot.files().layout() {
        Some(layout) => given::with_guest(snapshot, layout, look),
        None => search::with_guest(snapshot, look),
    }
}

/// Opens the dump alone, in the layout that its guest confirms if the dump does not say.
pub(crate) fn open(snapshot: &Snapshot) -> Result<Dump, OfflineError> {
    let layout = snapshot.files().layout();
    if layout.is_some() || search::is_certain(snapshot)? {
        return Ok(snapshot.dump(layout)?);
    }
    Ok(search::with_guest(snapshot, &|_| Ok(()))?.dump)
}
