//! Finds out where in the guest the bytes of a dump lie, where the dump itself does not say:
//! raw files, and QEMU's files with several blocks of memory. The guest's own memory maps decide.

mod as_raw;
mod candidates;
mod firmware;
mod given;
mod placed;
mod plugged;
mod search;
mod trial;

use crate::error::OfflineError;
use crate::snapshot::Snapshot;
pub(crate) use placed::{Look, Placed, guest_options, open_guest};
use sonicshot::{GpaRange, GuestMemory};
use sonicshot_dump::Dump;

impl Snapshot {
    /// The guest's memory, where it lies in the guest: where the files do not say, by the guest's
    /// own memory map.
    ///
    /// # Errors
    /// What [`analyze`](Self::analyze) gives for a layout that is not found, and
    /// [`OfflineError::Dump`] if the files cannot be read.
    pub fn guest_memory(&self) -> Result<Dump, OfflineError> {
        open(self).map_err(|error| self.blame(error))
    }
}

/// Opens the dump in the layout that its guest confirms and lets `look` see the guest. A file that
/// begins as one of another format may be RAM all the same, whose first page may hold anything.
pub(crate) fn with_guest<T>(
    snapshot: &Snapshot,
    look: Look<'_, T>,
) -> Result<Placed<T>, OfflineError> {
    let why = match in_format(snapshot, look) {
        Err(error) if as_raw::is_worth_a_try(snapshot, &error) => error,
        result => return result,
    };
    as_raw::with_guest(snapshot, why, &|raw| in_format(raw, look))
}

/// The same in the format that the file seems to have.
fn in_format<T>(snapshot: &Snapshot, look: Look<'_, T>) -> Result<Placed<T>, OfflineError> {
    match snapshot.files().layout() {
        Some(layout) => given::with_guest(snapshot, layout, look),
        None => search::with_guest(snapshot, look),
    }
}

/// The amount of RAM that the guest was told of, in bytes, by the largest map that its firmware or
/// loader has left in `memory`.
pub(crate) fn told_ram(memory: &dyn GuestMemory) -> Option<u64> {
    // A map of more than 64 bits is none.
    let sums = firmware::maps(memory).into_iter().filter_map(|map| {
        let mut lengths = map.iter().map(GpaRange::len);
        lengths.try_fold(0, u64::checked_add)
    });
    sums.max()
}

/// Opens the dump alone, in the layout that its guest confirms if the dump does not say.
pub(crate) fn open(snapshot: &Snapshot) -> Result<Dump, OfflineError> {
    let why = match open_in_format(snapshot) {
        Err(error) if as_raw::is_worth_a_try(snapshot, &error) => error,
        result => return result,
    };
    let open = |raw: &Snapshot| in_format(raw, &|_| Ok(()));
    Ok(as_raw::with_guest(snapshot, why, &open)?.dump)
}

fn open_in_format(snapshot: &Snapshot) -> Result<Dump, OfflineError> {
    let layout = snapshot.files().layout();
    if layout.is_some() || search::is_certain(snapshot)? {
        return Ok(snapshot.dump(layout)?);
    }
    search::open(snapshot)
}
