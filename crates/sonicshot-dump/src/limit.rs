//! The limit of what is taken in through a pipe or decompressed.

use sonicshot::Tally;
use std::fmt;

/// The bytes that may come of a migration file beside the guest's RAM: a tenth of the RAM, for pages that
/// come twice, or so much for the devices' state.
const BESIDE_RAM: u64 = 16 << 20;

/// The source of the limit on how much of a content is taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SizeLimit {
    /// The content's own header, which tells how much RAM the guest has: in bytes.
    Header {
        /// The guest's RAM.
        ram: u64,
    },
    /// The caller.
    Given,
    /// The room where it is put: half of that.
    Free,
    /// The same, but a sixteenth of it: of what is not zero in a content whose header allows more.
    Disk,
}

impl fmt::Display for SizeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header { ram } => write!(
                f,
                "its header tells of {ram} bytes of RAM, and beside them a tenth of that or \
                 {BESIDE_RAM} bytes are allowed"
            ),
            Self::Given => f.write_str("no more were allowed"),
            Self::Free => f.write_str("that is half of what is free where it is put"),
            Self::Disk => f.write_str("that is what is free where it is put, but a sixteenth"),
        }
    }
}

/// The number of things that a file may have that has room for `room` of them: `small` more. Where that is
/// beyond 64 bits, as many as those hold.
pub(crate) fn allowed_for(room: u64, small: u64) -> u64 {
    Tally::new(room).and(small).get()
}

/// The number of bytes that a content may have whose guest has `ram` bytes of RAM: 1.1 times that, and of a
/// small guest some more.
pub(crate) fn allowed_beside(ram: u64) -> Option<u64> {
    ram.checked_add((ram / 10).max(BESIDE_RAM))
}
