//! Reads a file from front to back, and knows where it is for messages.

use crate::{Place, Within, XenError};
use sonicshot::{CutShort, FileBytes};

pub(crate) struct Cursor<'a> {
    data: FileBytes<'a>,
    pub at: u64,
    /// The part of the file that is being read.
    pub within: Within,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(data: FileBytes<'a>) -> Self {
        Self {
            data,
            at: 0,
            within: Within::Headers,
        }
    }

    /// Goes on to the next record; returns its number.
    pub(crate) fn next_record(&mut self) -> u64 {
        let number = match self.within {
            Within::Record(last) => last.saturating_add(1),
            _ => 0,
        };
        self.within = Within::Record(number);
        number
    }

    pub(crate) fn malformed(&self, what: &'static str, offset: u64, value: u64) -> XenError {
        XenError::Malformed {
            what,
            place: self.place(offset),
            value,
        }
    }

    pub(crate) fn unsupported(&self, what: &'static str, offset: u64) -> XenError {
        XenError::Unsupported {
            what,
            place: self.place(offset),
        }
    }

    pub(crate) fn place(&self, offset: u64) -> Place {
        Place {
            within: self.within,
            offset,
        }
    }

    fn fields(&self) -> sonicshot::Cursor<FileBytes<'a>> {
        sonicshot::Cursor::at(self.data, self.at)
    }

    fn cut(&self, cut: CutShort) -> XenError {
        XenError::Truncated {
            place: self.place(cut.offset),
            wanted: cut.wanted,
            left: cut.left,
        }
    }

    /// How many bytes there are from here on.
    pub(crate) fn left(&self) -> u64 {
        self.fields().left()
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: u64) -> Result<FileBytes<'a>, XenError> {
        let mut fields = self.fields();
        let bytes = fields.take(len).map_err(|cut| self.cut(cut))?;
        self.at = fields.position();
        Ok(bytes)
    }

    /// The next bytes, copied.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], XenError> {
        let mut fields = self.fields();
        let array = fields.array().map_err(|cut| self.cut(cut))?;
        self.at = fields.position();
        Ok(array)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, XenError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, XenError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, XenError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Whether `bytes` come next.
    pub(crate) fn is_at(&self, bytes: &[u8]) -> bool {
        self.fields().is_at(bytes)
    }

    /// The streams' headers are big-endian, whatever the rest is.
    pub(crate) fn be_u32(&mut self) -> Result<u32, XenError> {
        self.array().map(u32::from_be_bytes)
    }
}
