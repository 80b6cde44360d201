//! The page data of a checkpoint, chunk by chunk.

use super::source::RangeSource;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::codec::Decompressor;
use crate::checkpoint::wire::header::Codec;
use crate::checkpoint::wire::index::{ChunkInfo, Index};
use crate::checkpoint::wire::layout::{checksum, size};
use std::fmt;

/// Reads and decompresses a checkpoint's chunks, and keeps the last one; one a thread
/// ([`CheckpointReader::decoder`](super::reader::CheckpointReader::decoder)).
pub struct ChunkDecoder {
    decompressor: Decompressor,
    stored: Vec<u8>,
    data: Vec<u8>,
    number: Option<u64>,
}

impl ChunkDecoder {
    pub(crate) fn new(codec: Codec) -> Self {
        Self {
            decompressor: Decompressor::new(codec),
            stored: Vec::new(),
            data: Vec::new(),
            number: None,
        }
    }

    /// The number of the chunk that is kept.
    pub(crate) fn number(&self) -> Option<u64> {
        self.number
    }

    /// The page data of `chunk` of the checkpoint in `source`.
    pub(crate) fn load(
        &mut self,
        source: &impl RangeSource,
        chunk: &ChunkInfo,
    ) -> Result<&[u8], CheckpointError> {
        if self.number == Some(chunk.number) {
            return Ok(&self.data);
        }
        self.number = None;
        let entry = chunk.entry;
        let read = CheckpointError::read(entry.offset);
        self.data.resize(chunk.len, 0);
        // Its length was checked against the file's when the index was read.
        let stored = if entry.plain {
            &mut self.data
        } else {
            self.stored.resize(size(entry.stored_len.into()), 0);
            &mut self.stored
        };
        source.read_at(stored, entry.offset).map_err(read)?;
        check_chunk(chunk, checksum(stored))?;
        if !entry.plain {
            self.decompressor
                .decompress(&self.stored, &mut self.data, entry.offset)?;
        }
        self.number = Some(chunk.number);
        Ok(&self.data)
    }

    /// The bytes of `count` stored pages from `slot`, all in one chunk.
    pub(crate) fn pages(
        &mut self,
        source: &impl RangeSource,
        index: &Index,
        slot: u64,
        count: u64,
    ) -> Result<&[u8], CheckpointError> {
        let chunk = index.chunk_of(slot)?;
        let bytes = chunk.bytes_of(slot, count, index.page_size())?;
        let offset = chunk.entry.offset;
        let data = self.load(source, &chunk)?;
        data.get(bytes).ok_or(CheckpointError::Corrupt {
            what: "the page data of a chunk",
            offset,
            value: slot,
        })
    }
}

impl fmt::Debug for ChunkDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkDecoder")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// Page data that is stored, and read, together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Chunk {
    /// Its number in the checkpoint, from 0.
    pub number: u64,
    /// The first stored page in it.
    pub first_slot: u64,
    /// The number of stored pages in it.
    pub pages: u64,
    /// Whether it is stored as it is, without compression.
    pub plain: bool,
}

/// Refuses a chunk whose stored bytes give another checksum.
pub(crate) fn check_chunk(chunk: &ChunkInfo, computed: u64) -> Result<(), CheckpointError> {
    if computed == chunk.entry.checksum {
        return Ok(());
    }
    Err(CheckpointError::Checksum {
        what: "page data",
        offset: chunk.entry.offset,
        stored: chunk.entry.checksum.into(),
        computed: computed.into(),
    })
}
