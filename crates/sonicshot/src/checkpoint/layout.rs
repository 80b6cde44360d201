//! The bytes of a checkpoint, as `FORMAT.md` gives them: constants, and each record's encoding.

use super::error::CheckpointError;
use super::info::{CheckpointInfo, Compression, PageContent, PageRun};
use crate::{Architecture, Gpa, GpaRange, PageClass, PageSize, Pfn, PfnRange, RamLayout};
use twox_hash::XxHash3_64;

/// The first bytes of every checkpoint. As in PNG, a transfer as text damages them.
pub(crate) const MAGIC: [u8; 8] = *b"\x89SONIC\r\n";
pub(crate) const INDEX_MAGIC: [u8; 8] = *b"SONICIDX";
pub(crate) const END_MAGIC: [u8; 8] = *b"SONICEND";
pub(crate) const VERSION: u32 = 1;
/// The header, and uncompressed page data, are aligned to this.
pub(crate) const ALIGN: u64 = 4096;
/// A header is no longer than this.
pub(crate) const MAX_HEADER: u64 = 1 << 20;
pub(crate) const MAX_REGIONS: u64 = 4096;
pub(crate) const MAX_ATTRIBUTE: u64 = 4096;
/// A chunk has at most this much page data, in bytes.
pub(crate) const MAX_CHUNK: u64 = 16 << 20;
pub(crate) const MAX_BLOB_NAME: u64 = 255;

const FIXED_HEADER: usize = 48;
pub(crate) const FOOTER_LEN: u64 = 64;
const DIGESTED_FOOTER: usize = 32;
pub(crate) const INDEX_HEAD: usize = 32;
pub(crate) const SECTION_LEN: usize = 24;
pub(crate) const RUN_LEN: usize = 24;
pub(crate) const CHUNK_LEN: usize = 24;
pub(crate) const BLOB_HEAD: usize = 40;

pub(crate) const SECTION_RUNS: u32 = 1;
pub(crate) const SECTION_CHUNKS: u32 = 2;
pub(crate) const SECTION_BLOBS: u32 = 3;
/// A section that a reader must know.
pub(crate) const SECTION_NEEDED: u32 = 1;

const ATTRIBUTE_RELEASE: u16 = 1;
const ATTRIBUTE_BUILD_ID: u16 = 2;
const ATTRIBUTE_VMM: u16 = 3;

/// A chunk that is stored as it is.
const CHUNK_PLAIN: u32 = 1;

pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// The next multiple of `align`, a power of two; saturates.
pub(crate) const fn align_up(value: u64, align: u64) -> u64 {
    let mask = align.saturating_sub(1);
    value.saturating_add(mask) & !mask
}

/// A length as the format has it.
pub(crate) fn len64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// The header of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub info: CheckpointInfo,
    pub codec: Codec,
    /// Bytes of page data in every chunk but the last.
    pub chunk_size: u32,
    pub compatible: u64,
}

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    None,
    Lz4,
    Zstd,
}

impl Codec {
    pub(crate) const fn of(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd { .. } => Self::Zstd,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }
}

fn too_large(what: &'static str, value: u64, max: u64) -> CheckpointError {
    CheckpointError::TooLarge { what, value, max }
}

impl Header {
    /// The header's bytes, its padding and checksum included.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CheckpointError> {
        let regions = self.info.layout.regions();
        if len64(regions.len()) > MAX_REGIONS {
            return Err(too_large("RAM regions", len64(regions.len()), MAX_REGIONS));
        }
        let mut out = Vec::with_capacity(4096);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]); // the length, once it is known
        out.extend(0_u64.to_le_bytes()); // incompatible features: none yet
        out.extend(self.compatible.to_le_bytes());
        let page_size = u32::try_from(self.info.page_size.bytes()).unwrap_or(0);
        out.extend(page_size.to_le_bytes());
        // ELF's EM_NONE where none is said.
        let machine = self.info.architecture.map_or(0, Architecture::elf_machine);
        out.extend(machine.to_le_bytes());
        out.extend([self.codec.number(), 0]);
        out.extend(self.chunk_size.to_le_bytes());
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        out.extend(count.to_le_bytes());
        for region in regions {
            out.extend(region.start().raw().to_le_bytes());
            out.extend(region.end().raw().to_le_bytes());
        }
        let text = |text: &Option<String>| text.clone().map(String::into_bytes);
        for (kind, value) in [
            (ATTRIBUTE_RELEASE, text(&self.info.kernel_release)),
            (ATTRIBUTE_BUILD_ID, self.info.build_id.clone()),
            (ATTRIBUTE_VMM, text(&self.info.vmm)),
        ] {
            let Some(value) = value else { continue };
            let len = len64(value.len());
            if len > MAX_ATTRIBUTE {
                return Err(too_large("bytes of an attribute", len, MAX_ATTRIBUTE));
            }
            out.extend(kind.to_le_bytes());
            out.extend([0; 2]);
            out.extend(u32::try_from(len).unwrap_or(0).to_le_bytes());
            out.extend(&value);
            pad(&mut out, 8);
        }
        out.extend([0; 8]); // no more attributes
        let len = align_up(len64(out.len()).saturating_add(8), ALIGN);
        if len > MAX_HEADER {
            return Err(too_large("bytes of header", len, MAX_HEADER));
        }
        let size = usize::try_from(len).unwrap_or(0);
        if let Some(field) = out.get_mut(12..16) {
            field.copy_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
        }
        out.resize(size.saturating_sub(8), 0);
        let sum = checksum(&out);
        out.extend(sum.to_le_bytes());
        Ok(out)
    }

    /// How long the header is that begins with `start`, the first 16 bytes or more of the file.
    pub(crate) fn length(start: &[u8], file_len: u64) -> Result<u64, CheckpointError> {
        let magic = start.get(..8).unwrap_or(start);
        if magic != MAGIC {
            return Err(CheckpointError::NotACheckpoint {
                found: magic.to_vec(),
            });
        }
        let version = u32_at(start, 8).unwrap_or(0);
        if version != VERSION {
            return Err(CheckpointError::Version {
                found: version,
                known: VERSION,
            });
        }
        let len = u64::from(u32_at(start, 12).unwrap_or(0));
        if len == 0 || len > MAX_HEADER || !len.is_multiple_of(ALIGN) {
            return Err(CheckpointError::Corrupt {
                what: "the header's length",
                offset: 12,
                value: len,
            });
        }
        if len > file_len {
            return Err(CheckpointError::Truncated {
                what: "the header",
                offset: 0,
                need: len,
                len: file_len,
            });
        }
        Ok(len)
    }

    /// Reads a whole header, its length checked already.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let corrupt = |what, offset: usize, value| CheckpointError::Corrupt {
            what,
            offset: len64(offset),
            value,
        };
        let end = bytes.len().saturating_sub(8);
        let body = bytes.get(..end).unwrap_or_default();
        let stored = u64_at(bytes, end).unwrap_or(0);
        let computed = checksum(body);
        if stored != computed {
            return Err(CheckpointError::Checksum {
                what: "the header",
                offset: 0,
                stored: stored.into(),
                computed: computed.into(),
            });
        }
        let short = || corrupt("the header's length", 12, len64(bytes.len()));
        let incompatible = u64_at(body, 16).ok_or_else(short)?;
        if incompatible != 0 {
            return Err(CheckpointError::Incompatible {
                flags: incompatible,
            });
        }
        let compatible = u64_at(body, 24).ok_or_else(short)?;
        let raw = u64::from(u32_at(body, 32).ok_or_else(short)?);
        let page_size = PageSize::new(raw).ok_or_else(|| corrupt("the page size", 32, raw))?;
        let architecture = Architecture::from_elf_machine(u16_at(body, 36).ok_or_else(short)?);
        let codec = match body.get(38).copied().ok_or_else(short)? {
            0 => Codec::None,
            1 => Codec::Lz4,
            2 => Codec::Zstd,
            other => return Err(corrupt("the codec", 38, other.into())),
        };
        let chunk_size = u32_at(body, 40).ok_or_else(short)?;
        let chunk = u64::from(chunk_size);
        if chunk == 0 || chunk > MAX_CHUNK || chunk & page_size.offset_mask() != 0 {
            return Err(corrupt("the chunk size", 40, chunk));
        }
        let count = u64::from(u32_at(body, 44).ok_or_else(short)?);
        if count == 0 || count > MAX_REGIONS {
            return Err(corrupt("the number of RAM regions", 44, count));
        }
        let mut at = FIXED_HEADER;
        let mut regions: Vec<GpaRange> = Vec::new();
        for _ in 0..count {
            let start = u64_at(body, at).ok_or_else(short)?;
            let end = u64_at(body, at.saturating_add(8)).ok_or_else(short)?;
            // Sorted, with holes between: what `RamLayout` gives back as it was.
            let above = regions.last().map_or(0, |last| last.end().raw());
            if start >= end || start < above || (start == above && !regions.is_empty()) {
                return Err(corrupt("a RAM region's start", at, start));
            }
            // The last frame must have an end, so that no frame arithmetic can wrap.
            if end > (1 << 63) {
                return Err(corrupt("a RAM region's end", at.saturating_add(8), end));
            }
            regions.push(GpaRange::new(Gpa::new(start), Gpa::new(end)));
            at = at.saturating_add(16);
        }
        let first = regions.first().map_or(0, |region| region.start().raw());
        let layout = RamLayout::new(regions)
            .map_err(|_| corrupt("a RAM region's start", FIXED_HEADER, first))?;
        let mut info = CheckpointInfo::new(layout, page_size);
        info.architecture = architecture;
        loop {
            let kind = u16_at(body, at).ok_or_else(short)?;
            let len = u32_at(body, at.saturating_add(4)).ok_or_else(short)?;
            if kind == 0 {
                break;
            }
            let start = at.saturating_add(8);
            let value = usize::try_from(len)
                .ok()
                .filter(|len| len64(*len) <= MAX_ATTRIBUTE)
                .and_then(|len| body.get(start..start.checked_add(len)?))
                .ok_or_else(|| {
                    corrupt("an attribute's length", at.saturating_add(4), len.into())
                })?;
            let text = || {
                core::str::from_utf8(value)
                    .map(|text| Some(text.to_owned()))
                    .map_err(|error| {
                        corrupt("an attribute's text", start, len64(error.valid_up_to()))
                    })
            };
            match kind {
                ATTRIBUTE_RELEASE => info.kernel_release = text()?,
                ATTRIBUTE_BUILD_ID => info.build_id = Some(value.to_vec()),
                ATTRIBUTE_VMM => info.vmm = text()?,
                _ => {} // not needed to read the rest
            }
            at = start.saturating_add(value.len()).saturating_add(7) & !7;
        }
        Ok(Self {
            info,
            codec,
            chunk_size,
            compatible,
        })
    }
}

/// Fills up with zeroes to a multiple of `align`.
pub(crate) fn pad(out: &mut Vec<u8>, align: usize) {
    let len = out.len().next_multiple_of(align);
    out.resize(len, 0);
}

/// The last bytes of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer {
    pub index_offset: u64,
    pub index_len: u64,
    pub index_checksum: u64,
    pub file_len: u64,
    pub digest: u128,
}

impl Footer {
    /// The part that the digest covers.
    pub(crate) fn digested(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        for word in [
            self.index_offset,
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
        let offset = file_len.saturating_sub(FOOTER_LEN);
        if bytes.get(56..64) != Some(END_MAGIC.as_slice()) {
            // What is cut off has no end.
            return Err(CheckpointError::Truncated {
                what: "the footer",
                offset,
                need: FOOTER_LEN,
                len: file_len,
            });
        }
        let corrupt = |what, at: u64, value| CheckpointError::Corrupt {
            what,
            offset: offset.saturating_add(at),
            value,
        };
        let word = |at| u64_at(bytes, at).ok_or_else(|| corrupt("the footer", 0, 0));
        let stored = word(48)?;
        let computed = checksum(bytes.get(..48).unwrap_or_default());
        if stored != computed {
            return Err(CheckpointError::Checksum {
                what: "the footer",
                offset,
                stored: stored.into(),
                computed: computed.into(),
            });
        }
        let footer = Self {
            index_offset: word(0)?,
            index_len: word(8)?,
            index_checksum: word(16)?,
            file_len: word(24)?,
            digest: u128::from(word(32)?) | (u128::from(word(40)?) << 64),
        };
        if footer.file_len != file_len {
            return Err(corrupt("the file's length", 24, footer.file_len));
        }
        if footer.index_offset < header_len {
            return Err(corrupt("the index's offset", 0, footer.index_offset));
        }
        if footer.index_offset.checked_add(footer.index_len) != Some(offset) {
            return Err(corrupt("the index's length", 8, footer.index_len));
        }
        Ok(footer)
    }

    /// How many bytes of the footer the digest covers.
    pub(crate) const fn digested_len() -> u64 {
        DIGESTED_FOOTER as u64
    }
}

/// Where a chunk of page data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkEntry {
    pub offset: u64,
    pub stored_len: u32,
    /// Stored as it is.
    pub plain: bool,
    pub checksum: u64,
}

impl ChunkEntry {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.offset.to_le_bytes());
        out.extend(self.stored_len.to_le_bytes());
        out.extend((if self.plain { CHUNK_PLAIN } else { 0 }).to_le_bytes());
        out.extend(self.checksum.to_le_bytes());
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let flags = u32_at(bytes, 12)?;
        if flags & !CHUNK_PLAIN != 0 {
            return None;
        }
        Some(Self {
            offset: u64_at(bytes, 0)?,
            stored_len: u32_at(bytes, 8)?,
            plain: flags & CHUNK_PLAIN != 0,
            checksum: u64_at(bytes, 16)?,
        })
    }
}

/// The numbers of the kinds of content. 5 (a page of a base checkpoint) and 6 (a stretch of a
/// disk image) are kept free for what their names say.
const CONTENT_ABSENT: u8 = 0;
const CONTENT_DATA: u8 = 1;
const CONTENT_ZERO: u8 = 2;
const CONTENT_FILL: u8 = 3;
const CONTENT_FREE: u8 = 4;

pub(crate) fn encode_run(run: &PageRun, out: &mut Vec<u8>) {
    out.extend(run.frames.start().raw().to_le_bytes());
    let count = u32::try_from(run.frames.len()).unwrap_or(u32::MAX);
    out.extend(count.to_le_bytes());
    let (content, value) = match run.content {
        PageContent::Absent => (CONTENT_ABSENT, 0),
        PageContent::Data { slot } => (CONTENT_DATA, slot),
        PageContent::Zero => (CONTENT_ZERO, 0),
        PageContent::Fill { word } => (CONTENT_FILL, word),
        PageContent::Free { word } => (CONTENT_FREE, word),
    };
    out.extend([run.class as u8, content, 0, 0]);
    out.extend(value.to_le_bytes());
}

/// A run, or the name and value of the field that is wrong.
pub(crate) fn decode_run(bytes: &[u8]) -> Result<PageRun, (&'static str, u64)> {
    let short = || ("a run of pages", 0);
    let start = u64_at(bytes, 0).ok_or_else(short)?;
    let count = u32_at(bytes, 8).ok_or_else(short)?;
    let [class, content] = bytes
        .get(12..14)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(short)?;
    let zero = u16_at(bytes, 14).ok_or_else(short)?;
    let value = u64_at(bytes, 16).ok_or_else(short)?;
    let frames = PfnRange::with_len(Pfn::new(start), count.into())
        .filter(|frames| !frames.is_empty())
        .ok_or(("the length of a run of pages", u64::from(count)))?;
    let content = match (content, value) {
        (CONTENT_ABSENT, 0) => PageContent::Absent,
        (CONTENT_DATA, slot) => PageContent::Data { slot },
        (CONTENT_ZERO, 0) => PageContent::Zero,
        (CONTENT_FILL, word) => PageContent::Fill { word },
        (CONTENT_FREE, word) => PageContent::Free { word },
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

/// Where a blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlobEntry {
    pub name: String,
    pub offset: u64,
    /// With the zeroes that align what follows.
    pub stored_len: u64,
    pub len: u64,
    /// Of the stored bytes.
    pub checksum: u64,
}

impl BlobEntry {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        for word in [self.offset, self.stored_len, self.len, self.checksum] {
            out.extend(word.to_le_bytes());
        }
        let len = u16::try_from(self.name.len()).unwrap_or(0);
        out.extend(len.to_le_bytes());
        out.extend([0; 6]);
        out.extend(self.name.as_bytes());
        pad(out, 8);
    }

    /// A blob's record at the start of `bytes`, and how long it is.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let len = u16_at(bytes, 32)?;
        if len == 0 || u64::from(len) > MAX_BLOB_NAME {
            return None;
        }
        let end = BLOB_HEAD.checked_add(len.into())?;
        let name = core::str::from_utf8(bytes.get(BLOB_HEAD..end)?).ok()?;
        let padded = end.checked_next_multiple_of(8)?;
        bytes.get(..padded)?;
        let blob = Self {
            name: name.to_owned(),
            offset: u64_at(bytes, 0)?,
            stored_len: u64_at(bytes, 8)?,
            len: u64_at(bytes, 16)?,
            checksum: u64_at(bytes, 24)?,
        };
        Some((blob, padded))
    }
}
