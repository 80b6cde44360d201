//! Output of a checkpoint's bytes.

use crate::FileOffset;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::layout::behind;
use crate::to_u64;
use std::io::Write;
use twox_hash::XxHash3_128;

/// The output for the bytes, and the digest of all of them.
pub(super) struct Sink<W> {
    out: W,
    offset: FileOffset,
    digest: XxHash3_128,
}

impl<W> Sink<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            offset: FileOffset::ZERO,
            digest: XxHash3_128::new(),
        }
    }

    /// The offset of the next bytes.
    pub(super) fn offset(&self) -> FileOffset {
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
        let end = behind(self.offset, to_u64(bytes.len()))?;
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
        Ok((self.out, self.offset.raw()))
    }
}
