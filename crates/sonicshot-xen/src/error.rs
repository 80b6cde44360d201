//! What can be wrong with an image.

use core::fmt;

/// Where in an image something is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The record's number, the first of the libxl stream being 0; `None` in a header.
    pub record: Option<u64>,
    /// Bytes from the start of the file.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.record {
            Some(record) => write!(f, "in record {record}, at offset {:#x}", self.offset),
            None => write!(f, "in the headers, at offset {:#x}", self.offset),
        }
    }
}

/// Why an image cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XenError {
    /// The file ends too early.
    #[error("the image is cut off {place}: {wanted} bytes are wanted, {left} are left")]
    Truncated {
        /// Where.
        place: Place,
        /// The bytes that should be there.
        wanted: u64,
        /// The bytes that are.
        left: u64,
    },
    /// The file contradicts its own format.
    #[error("{what} {place} (value {value:#x})")]
    Malformed {
        /// What is wrong.
        what: &'static str,
        /// Where.
        place: Place,
        /// The value found there.
        value: u64,
    },
    /// The image is of a kind that is known but not supported.
    #[error("{what} {place}, which is not supported")]
    Unsupported {
        /// What it is.
        what: &'static str,
        /// Where that is said.
        place: Place,
    },
}
