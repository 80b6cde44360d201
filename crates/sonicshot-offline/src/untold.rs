//! The values that are written where nothing tells.

use crate::note::Note;
use sonicshot::{Architecture, PageSize};

/// The guest's processor in a core where neither the file nor a kernel in it tells. It is what memory
/// that does not say where it lies is taken for, too: an x86-64 machine's.
const ASSUMED_MACHINE: Architecture = Architecture::X86_64;

/// In which units memory is written of whose guest nothing is known: in the smallest pages, which
/// every larger one is a whole number of.
pub(crate) const UNTOLD_PAGE: PageSize = PageSize::SIZE_4K;

/// The processor that a core names of a guest whose own is `told`.
pub(crate) fn named_machine(told: Option<Architecture>) -> Architecture {
    told.unwrap_or(ASSUMED_MACHINE)
}

/// The note on a core if nothing tells the guest's processor.
pub(crate) fn assumed(told: Option<Architecture>) -> Option<Note> {
    told.is_none().then_some(Note::MachineAssumed {
        machine: ASSUMED_MACHINE,
    })
}
