//! The records of a stream.

use crate::{Place, Within};
use sonicshot::{FileOffset, FileRange};

/// A record of the libxc stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Its number in the file, as in messages.
    pub number: u64,
    /// Its type.
    pub kind: u32,
    /// The length of its body in bytes, without the padding.
    pub len: u32,
    /// The place of its header.
    pub offset: FileOffset,
    /// Its body and the padding, as far as they are in the file.
    pub(crate) body: FileRange,
}

impl Record {
    /// Its place, for messages.
    pub(crate) fn place(&self) -> Place {
        Place {
            within: Within::Record(self.number),
            offset: self.offset,
        }
    }
}
