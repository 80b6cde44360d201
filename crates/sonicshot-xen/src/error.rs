//! The errors of a file.

use core::fmt;
use sonicshot::{FileOffset, P2mError};

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Within {
    /// The part before the records or sections.
    Headers,
    /// The record of that number, the first of the outermost stream being 0.
    Record(u64),
    /// The section of that name, of a core.
    Section(&'static str),
}

impl fmt::Display for Within {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Headers => f.write_str("the headers"),
            Self::Record(number) => write!(f, "record {number}"),
            Self::Section(name) => write!(f, "section {name}"),
        }
    }
}

/// A place in a file where something is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The part of the file.
    pub within: Within,
    /// The place in the file.
    pub offset: FileOffset,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in {}, at offset {:#x}", self.within, self.offset)
    }
}

/// The reason that a file cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XenError {
    /// The file, or a section of it, ends too early.
    #[error("truncated {place}: {wanted} bytes expected, {left} left")]
    Truncated {
        /// The place.
        place: Place,
        /// The bytes that should be there.
        wanted: u64,
        /// The bytes that are.
        left: u64,
    },
    /// The file contradicts its own format.
    #[error("{what} {place} (value {value:#x})")]
    Malformed {
        /// The fault.
        what: &'static str,
        /// The place.
        place: Place,
        /// The value found there.
        value: u64,
    },
    /// The file is of a kind that is known but not supported.
    #[error("{what} {place}, which is not supported")]
    Unsupported {
        /// Its kind.
        what: &'static str,
        /// The place of that statement.
        place: Place,
    },
    /// A section of a core is missing, or there is another of the same name.
    #[error("found {count} sections {name}, expected one")]
    NotOneSection {
        /// Its name.
        name: &'static str,
        /// The number.
        count: u64,
    },
    /// The table of a PV guest's frames is none.
    #[error("invalid frame numbers {place}")]
    Frames {
        /// The place of the table.
        place: Place,
        /// The reason.
        #[source]
        source: P2mError,
    },
}
