//! Reads a file from front to back, and knows where it is for messages.

use crate::{Place, Within, XenError};
use sonicshot::{CutShort, FileBytes, FileOffset, Number, Tally};

/// The cursor of all formats over a file of Xen's: its errors say in which part they are.
pub(crate) struct Cursor<'a> {
    fields: sonicshot::Cursor<FileBytes<'a>>,
    /// The part of the file that is being read.
    pub within: Within,
}

impl<'a> Cursor<'a> {
    /// Reads `data` from its beginning.
    pub(crate) fn new(data: FileBytes<'a>) -> Self {
        Self::at(data, Within::Headers, FileOffset::ZERO)
    }

    /// Reads `data` from a place in one of its parts.
    pub(crate) fn at(data: FileBytes<'a>, within: Within, offset: FileOffset) -> Self {
        Self {
            fields: sonicshot::Cursor::at(data, offset.raw()),
            within,
        }
    }

    /// The place of the next field.
    pub(crate) fn offset(&self) -> FileOffset {
        FileOffset::new(self.fields.position())
    }

    /// Goes to `offset`, which may be behind the end.
    pub(crate) fn seek(&mut self, offset: FileOffset) {
        self.fields.seek(offset.raw());
    }

    /// Goes on to the next record; returns its number.
    pub(crate) fn next_record(&mut self) -> u64 {
        let number = match self.within {
            // There are no more than bytes.
            Within::Record(last) => Tally::new(last).and(1).get(),
            _ => 0,
        };
        self.within = Within::Record(number);
        number
    }

    pub(crate) fn malformed(&self, what: &'static str, offset: FileOffset, value: u64) -> XenError {
        XenError::Malformed {
            what,
            place: self.place(offset),
            value,
        }
    }

    pub(crate) fn unsupported(&self, what: &'static str, offset: FileOffset) -> XenError {
        XenError::Unsupported {
            what,
            place: self.place(offset),
        }
    }

    /// That `wanted` bytes from `offset` on cannot be read.
    pub(crate) fn cut_short(&self, offset: FileOffset, wanted: u64) -> XenError {
        XenError::Truncated {
            place: self.place(offset),
            wanted,
            left: 0,
        }
    }

    pub(crate) fn place(&self, offset: FileOffset) -> Place {
        Place {
            within: self.within,
            offset,
        }
    }

    fn told<T>(&self, read: Result<T, CutShort>) -> Result<T, XenError> {
        read.map_err(|cut| XenError::Truncated {
            place: self.place(FileOffset::new(cut.offset)),
            wanted: cut.wanted,
            left: cut.left,
        })
    }

    /// The number of bytes from here on.
    pub(crate) fn left(&self) -> u64 {
        self.fields.left()
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: u64) -> Result<FileBytes<'a>, XenError> {
        let read = self.fields.take(len);
        self.told(read)
    }

    /// The next bytes, copied.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], XenError> {
        let read = self.fields.array();
        self.told(read)
    }

    /// The next number, little-endian.
    pub(crate) fn le<T: Number>(&mut self) -> Result<T, XenError> {
        let read = self.fields.le();
        self.told(read)
    }

    /// The next number, big-endian: the streams' headers are so, whatever the rest is.
    pub(crate) fn be<T: Number>(&mut self) -> Result<T, XenError> {
        let read = self.fields.be();
        self.told(read)
    }

    /// Whether `bytes` come next.
    pub(crate) fn is_at(&self, bytes: &[u8]) -> bool {
        self.fields.is_at(bytes)
    }
}
