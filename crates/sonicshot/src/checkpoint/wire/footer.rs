//! The footer: where the index is, and the digest of the whole file.

use super::layout::{END_MAGIC, FOOTER_LEN, checksum, corrupt, size};
use crate::checkpoint::CheckpointError;
use crate::{Bytes, FileOffset};

/// The digest covers so many bytes of the footer, and stands behind them.
const DIGESTED: u64 = 32;
/// The checksum covers so many, and stands behind them.
const SUMMED: u64 = 48;

/// The last bytes of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer {
    pub index_offset: FileOffset,
    pub index_len: u64,
    pub index_checksum: u64,
    pub file_len: u64,
    pub digest: u128,
}

/// The offset of the footer in a file of `file_len` bytes.
pub(crate) fn footer_at(file_len: u64) -> Result<FileOffset, CheckpointError> {
    let at = file_len.checked_sub(FOOTER_LEN).map(FileOffset::new);
    at.ok_or(CheckpointError::Truncated {
        what: "the footer",
        offset: FileOffset::ZERO,
        need: FOOTER_LEN,
        len: file_len,
    })
}

impl Footer {
    /// The part that the digest covers.
    pub(crate) fn digested(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(size(FOOTER_LEN));
        for word in [
            self.index_offset.raw(),
            self.index_len,
            self.index_checksum,
            self.file_len,
        ] {
            out.extend(word.to_le_bytes());
        }
        out
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = self.digested();
        out.extend(self.digest.to_le_bytes());
        let sum = checksum(&out);
        out.extend(sum.to_le_bytes());
        out.extend(END_MAGIC);
        out
    }

    /// Reads the last [`FOOTER_LEN`] bytes of a file of `file_len` bytes whose header takes
    /// `header_len`.
    pub(crate) fn decode(
        bytes: &[u8],
        file_len: u64,
        header_len: u64,
    ) -> Result<Self, CheckpointError> {
        let offset = footer_at(file_len)?;
        if bytes.get(56..64) != Some(END_MAGIC.as_slice()) {
            // What is cut off has no end.
            return Err(CheckpointError::Truncated {
                what: "the footer",
                offset,
                need: FOOTER_LEN,
                len: file_len,
            });
        }
        let corrupt = |what, at, value| corrupt(offset, what, at, value);
        let short = || corrupt("the footer", 0, bytes.byte_len());
        let word = |at| bytes.le_at::<u64>(at).ok_or_else(short);
        let stored = word(SUMMED)?;
        let computed = checksum(bytes.part(0, SUMMED).ok_or_else(short)?);
        if stored != computed {
            return Err(CheckpointError::Checksum {
                what: "the footer",
                offset,
                stored: stored.into(),
                computed: computed.into(),
            });
        }
        let footer = Self {
            index_offset: FileOffset::new(word(0)?),
            index_len: word(8)?,
            index_checksum: word(16)?,
            file_len: word(24)?,
            digest: bytes.le_at(DIGESTED).ok_or_else(short)?,
        };
        if footer.file_len != file_len {
            return Err(corrupt("the file's length", 24, footer.file_len));
        }
        if footer.index_offset.raw() < header_len {
            return Err(corrupt("the index's offset", 0, footer.index_offset.raw()));
        }
        if footer.index_offset.checked_add(footer.index_len) != Some(offset) {
            return Err(corrupt("the index's length", 8, footer.index_len));
        }
        Ok(footer)
    }

    /// The number of bytes of the footer that the digest covers.
    pub(crate) const fn digested_len() -> u64 {
        DIGESTED
    }
}
