//! A dump in its layout, and the guest in it.

use crate::error::OfflineError;
use crate::note::Note;
use crate::options::OpenOptions;
use crate::snapshot::Snapshot;
use sonicshot_dump::{Doubts, Dump};
use sonicshot_vmi::{GuestOptions, GuestOs, VmiError};
use std::sync::Arc;

/// The look at a guest once it is found.
pub(crate) type Look<'a, T> = &'a dyn Fn(&dyn GuestOs) -> Result<T, VmiError>;

/// A dump whose layout is known, and what was made of its guest.
#[derive(Debug)]
pub(crate) struct Placed<T> {
    pub dump: Dump,
    /// The way in which the layout was found, for people.
    pub origin: &'static str,
    pub doubts: Doubts,
    pub notes: Vec<Note>,
    pub value: T,
}

/// Finds the guest in a dump, by what is known beforehand.
pub(crate) fn open_guest<'d>(
    snapshot: &Snapshot,
    dump: &'d Dump,
) -> Result<Box<dyn GuestOs + 'd>, OfflineError> {
    let options = guest_options(snapshot.options(), dump.vmcoreinfo());
    sonicshot_vmi::open_guest(dump, &options).map_err(OfflineError::guest(snapshot.memory_file()))
}

/// The options for looking for a guest, by what is known beforehand and the VMCOREINFO beside its
/// memory.
pub(crate) fn guest_options(known: &OpenOptions, vmcoreinfo: Option<&[u8]>) -> GuestOptions {
    let mut options = GuestOptions::new();
    for path in &known.symbols {
        options = options.symbols(path);
    }
    if let Some(progress) = &known.progress {
        options = options.progress(Arc::clone(progress));
    }
    if let Some(cr3) = known.cr3 {
        options = options.cr3(cr3);
    }
    if let Some(most) = known.at_most {
        options = options.at_most(most);
    }
    if let Some(text) = vmcoreinfo {
        options = options.vmcoreinfo(text);
    }
    options
}
