//! Reads a file from front to back, and knows where it is for messages.

use crate::{Place, Within, XenError};
use sonicshot::FileBytes;

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

    /// How many bytes there are from here on.
    pub(crate) fn left(&self) -> u64 {
        (self.data.len() as u64).saturating_sub(self.at)
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: u64) -> Result<FileBytes<'a>, XenError> {
        let cut = XenError::Truncated {
            place: self.place(self.at),
            wanted: len,
            left: self.left(),
        };
        let bytes = usize::try_from(self.at)
            .ok()
            .zip(usize::try_from(len).ok())
            .and_then(|(at, len)| self.data.get(at, len));
        let bytes = bytes.ok_or(cut)?;
        self.at = self.at.saturating_add(len);
        Ok(bytes)
    }

    /// The next bytes, copied.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], XenError> {
        let mut out = [0; N];
        let copied = self.take(N as u64)?.copy_to(&mut out);
        debug_assert!(copied, "as long as asked for");
        Ok(out)
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
        let at = usize::try_from(self.at).unwrap_or(usize::MAX);
        let there = self.data.get(at, bytes.len());
        let mut copy = vec![0; bytes.len()];
        there.is_some_and(|there| there.copy_to(&mut copy) && copy == bytes)
    }

    /// The streams' headers are big-endian, whatever the rest is.
    pub(crate) fn be_u32(&mut self) -> Result<u32, XenError> {
        self.array().map(u32::from_be_bytes)
    }
}
