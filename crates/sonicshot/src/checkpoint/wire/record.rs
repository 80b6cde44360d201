//! The records of the index: runs of pages, chunks, blobs.

use super::info::{PageContent, PageRun};
use super::layout::{BLOB_HEAD, MAX_BLOB_NAME, MAX_RUN, narrow, pad};
use crate::checkpoint::CheckpointError;
use crate::to_u64;
use crate::{Bytes, Cursor, CutShort, FileOffset, PageClass, Pfn, PfnRange};

/// A chunk that is stored as it is.
const CHUNK_PLAIN: u32 = 1;

/// The place of a chunk of page data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkEntry {
    pub offset: FileOffset,
    pub stored_len: u32,
    /// Stored as it is.
    pub plain: bool,
    pub checksum: u64,
}

impl ChunkEntry {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.offset.raw().to_le_bytes());
        out.extend(self.stored_len.to_le_bytes());
        out.extend((if self.plain { CHUNK_PLAIN } else { 0 }).to_le_bytes());
        out.extend(self.checksum.to_le_bytes());
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let flags: u32 = bytes.le_at(12)?;
        if flags & !CHUNK_PLAIN != 0 {
            return None;
        }
        Some(Self {
            offset: FileOffset::new(bytes.le_at(0)?),
            stored_len: bytes.le_at(8)?,
            plain: flags & CHUNK_PLAIN != 0,
            checksum: bytes.le_at(16)?,
        })
    }
}

/// The numbers of the kinds of content. 5 is kept free for a page of a base checkpoint.
const CONTENT_ABSENT: u8 = 0;
const CONTENT_DATA: u8 = 1;
const CONTENT_ZERO: u8 = 2;
const CONTENT_FILL: u8 = 3;
const CONTENT_FREE: u8 = 4;
const CONTENT_DISK: u8 = 6;

pub(crate) fn encode_run(run: &PageRun, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
    let count: u32 = narrow("frames in a run", run.frames.len(), MAX_RUN)?;
    out.extend(run.frames.start().raw().to_le_bytes());
    out.extend(count.to_le_bytes());
    let (content, value) = match run.content {
        PageContent::Absent => (CONTENT_ABSENT, 0),
        PageContent::Data { slot } => (CONTENT_DATA, slot),
        PageContent::Zero => (CONTENT_ZERO, 0),
        PageContent::Fill { word } => (CONTENT_FILL, word),
        PageContent::Free { word } => (CONTENT_FREE, word),
        // A run in the index is whole.
        PageContent::Disk { record, .. } => (CONTENT_DISK, record),
    };
    out.extend([run.class as u8, content, 0, 0]);
    out.extend(value.to_le_bytes());
    Ok(())
}

/// A run, or the name and value of the field that is wrong.
pub(crate) fn decode_run(bytes: &[u8]) -> Result<PageRun, (&'static str, u64)> {
    let short = |cut: CutShort| ("a run of pages", cut.left);
    let mut fields = Cursor::new(bytes);
    let start: u64 = fields.le().map_err(short)?;
    let count: u32 = fields.le().map_err(short)?;
    let [class, content] = fields.array().map_err(short)?;
    let zero: u16 = fields.le().map_err(short)?;
    let value: u64 = fields.le().map_err(short)?;
    let frames = PfnRange::with_len(Pfn::new(start), count.into())
        .filter(|frames| !frames.is_empty())
        .ok_or(("the length of a run of pages", u64::from(count)))?;
    let content = match (content, value) {
        (CONTENT_ABSENT, 0) => PageContent::Absent,
        (CONTENT_DATA, slot) => PageContent::Data { slot },
        (CONTENT_ZERO, 0) => PageContent::Zero,
        (CONTENT_FILL, word) => PageContent::Fill { word },
        (CONTENT_FREE, word) => PageContent::Free { word },
        (CONTENT_DISK, record) => PageContent::Disk { record, page: 0 },
        (CONTENT_ABSENT | CONTENT_ZERO, value) => {
            return Err(("the value of a run without data", value));
        }
        (other, _) => return Err(("the content of a run of pages", other.into())),
    };
    if zero != 0 {
        return Err(("the reserved field of a run of pages", zero.into()));
    }
    Ok(PageRun {
        frames,
        // A class that a later version knows is unknown here, and restores all the same.
        class: PageClass::from_u8(class).unwrap_or(PageClass::Unknown),
        content,
    })
}

/// The place of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlobEntry {
    pub name: String,
    pub offset: FileOffset,
    /// With the zeroes that align what follows.
    pub stored_len: u64,
    pub len: u64,
    /// Of the stored bytes.
    pub checksum: u64,
}

impl BlobEntry {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let what = "bytes of a blob's name";
        let len: u16 = narrow(what, to_u64(self.name.len()), MAX_BLOB_NAME)?;
        for word in [self.offset.raw(), self.stored_len, self.len, self.checksum] {
            out.extend(word.to_le_bytes());
        }
        out.extend(len.to_le_bytes());
        out.extend([0; 6]);
        out.extend(self.name.as_bytes());
        pad(out, 8);
        Ok(())
    }

    /// A blob's record at the start of `bytes`, and how long it is.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let len: u16 = bytes.le_at(32)?;
        if len == 0 || u64::from(len) > MAX_BLOB_NAME {
            return None;
        }
        let end = BLOB_HEAD.checked_add(len.into())?;
        let name = core::str::from_utf8(bytes.get(BLOB_HEAD..end)?).ok()?;
        let padded = end.checked_next_multiple_of(8)?;
        bytes.get(..padded)?;
        let blob = Self {
            name: name.to_owned(),
            offset: FileOffset::new(bytes.le_at(0)?),
            stored_len: bytes.le_at(8)?,
            len: bytes.le_at(16)?,
            checksum: bytes.le_at(24)?,
        };
        Some((blob, padded))
    }
}
