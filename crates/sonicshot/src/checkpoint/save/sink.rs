//! Where a checkpoint's bytes go.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::layout::{len64, too_large};
use std::io::Write;
use twox_hash::XxHash3_128;

/// Where the bytes go, and what all of them give.
pub(super) struct Sink<W> {
    out: W,
    offset: u64,
    digest: XxHash3_128,
}

impl<W> Sink<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            offset: 0,
            digest: XxHash3_128::new(),
        }
    }

    /// How many bytes were written.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The digest of all that was written, and these bytes behind it.
    pub(super) fn digest_with(&self, last: &[u8]) -> u128 {
        let mut digest = self.digest.clone();
        digest.write(last);
        digest.finish_128()
    }
}

impl<W: Write> Sink<W> {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let end = self.offset.checked_add(len64(bytes.len()));
        let end = end.ok_or_else(|| too_large("bytes of file", self.offset, u64::MAX))?;
        self.out
            .write_all(bytes)
            .map_err(CheckpointError::write(self.offset))?;
        self.digest.write(bytes);
        self.offset = end;
        Ok(())
    }

    /// Flushes what was written. Returns where it went, and how many bytes there are.
    pub(super) fn finish(mut self) -> Result<(W, u64), CheckpointError> {
        self.out
            .flush()
            .map_err(CheckpointError::write(self.offset))?;
        Ok((self.out, self.offset))
    }
}
