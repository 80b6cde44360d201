//! The chunks of a checkpoint, for those who place pages themselves.

use super::chunk::{Chunk, ChunkDecoder};
use super::reader::CheckpointReader;
use super::source::RangeSource;
use crate::checkpoint::CheckpointError;
use crate::to_u64;

impl<S: RangeSource> CheckpointReader<S> {
    /// The number of chunks.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.index().chunk_count()
    }

    /// The chunk with the stored page `slot`.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`] if there is no such page.
    pub fn chunk_of(&self, slot: u64) -> Result<Chunk, CheckpointError> {
        let chunk = self.index().chunk_of(slot)?;
        Ok(Chunk {
            number: chunk.number,
            first_slot: chunk.first_slot,
            pages: chunk.pages,
            plain: chunk.entry.plain,
        })
    }

    /// The page data of the chunk `number`, checked, and decompressed if need be.
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read or is damaged.
    pub fn read_chunk<'d>(
        &self,
        decoder: &'d mut ChunkDecoder,
        number: u64,
    ) -> Result<&'d [u8], CheckpointError> {
        let chunk = self.index().chunk(number)?;
        decoder.load(self.source(), &chunk)
    }

    /// Fills `out` with a plain chunk's page data from byte `inside` on. Not checked: that takes
    /// the whole chunk ([`read_chunk`](Self::read_chunk)).
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read, is compressed, or has not so many bytes.
    pub fn read_plain(
        &self,
        number: u64,
        inside: u64,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let chunk = self.index().chunk(number)?;
        let end = inside.checked_add(to_u64(out.len()));
        let fits = end.is_some_and(|end| end <= to_u64(chunk.len));
        let offset = chunk.entry.offset.checked_add(inside);
        let Some(offset) = offset.filter(|_| chunk.entry.plain && fits) else {
            return Err(CheckpointError::Corrupt {
                what: "a place in a plain chunk",
                offset: chunk.entry.offset,
                value: inside,
            });
        };
        let read = CheckpointError::read(offset);
        self.source().read_at(out, offset).map_err(read)
    }
}
