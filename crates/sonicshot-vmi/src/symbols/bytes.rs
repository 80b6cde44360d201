//! Checked reads of little-endian values from untrusted bytes.

use sonicshot::Bytes as _;
use sonicshot::to_u64;

/// Bytes that may be anything; every read is checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) fn get(self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(at..at.checked_add(len)?)
    }

    pub(crate) fn u16(self, at: usize) -> Option<u16> {
        self.0.le_at(to_u64(at))
    }

    pub(crate) fn u32(self, at: usize) -> Option<u32> {
        self.0.le_at(to_u64(at))
    }

    pub(crate) fn u64(self, at: usize) -> Option<u64> {
        self.0.le_at(to_u64(at))
    }

    /// The bytes from `at` to the next NUL, without it.
    pub(crate) fn c_str(self, at: usize) -> Option<&'a [u8]> {
        let rest = self.0.get(at..)?;
        rest.get(..memchr::memchr(0, rest)?)
    }
}
