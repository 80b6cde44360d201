//! The headers of a kdump-compressed file, and where they say that its parts are.

use super::content::Content;
use crate::DumpError;
use sonicshot::{Architecture, Bytes, FileOffset, PageSize, Pfn, PfnRange};
use std::path::Path;

/// The compression of the pages of a kdump-compressed file, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KdumpCompression {
    /// Not at all.
    None,
    /// zlib, which every reader knows.
    #[default]
    Zlib,
    /// Snappy.
    Snappy,
    /// Zstandard.
    Zstd,
}

pub(crate) const SIGNATURE: &[u8; 8] = b"KDUMP   ";
/// The length of the header up to its last field that is read here. The layout is that of C
/// structures on a 64-bit machine.
const HEADER_LEN: usize = 464;
const VERSION: FileOffset = FileOffset::new(8);
const STATUS: FileOffset = FileOffset::new(424);
pub(super) const BLOCK_SIZE: FileOffset = FileOffset::new(428);
const SUB_BLOCKS: FileOffset = FileOffset::new(432);
const BITMAP_BLOCKS: FileOffset = FileOffset::new(436);
const MAX_MAPNR: FileOffset = FileOffset::new(440);
/// The sub-header of version 6; earlier ones are shorter, and fill their block with zeroes.
pub(crate) const SUB_HEADER_LEN: usize = 104;
/// More frames than any guest has, 16 TiB of 4 KiB each: bounds what is kept about them.
pub(crate) const MAX_FRAMES: u64 = 1 << 32;

/// The fields of use in `struct disk_dump_header`.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) status: u32,
    pub(super) page_size: PageSize,
    pub(super) sub_blocks: u32,
    pub(super) bitmap_blocks: u32,
    pub(super) max_frames: u32,
    /// The processor's name.
    pub(super) machine: Vec<u8>,
}

impl Header {
    pub(super) fn read(path: &Path, content: &Content) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let begin = FileOffset::ZERO;
        let cut = || {
            bad(
                "a header beyond the end: truncated",
                begin,
                content.end().raw(),
            )
        };
        let mut header = [0; HEADER_LEN];
        if !content.read(begin, &mut header) {
            return Err(cut());
        }
        let header = header.as_slice();
        let field = |at: FileOffset| header.le_at::<u32>(at.raw()).ok_or_else(cut);
        if header.get(..8) != Some(SIGNATURE) {
            let found = header.le_at(0).ok_or_else(cut)?;
            return Err(bad("missing KDUMP magic", begin, found));
        }
        let version = field(VERSION)?;
        let machine = header.get(272..337).ok_or_else(cut)?;
        if let Some(machine) = other_machine(machine) {
            return Err(DumpError::OtherMachine {
                path: path.to_owned(),
                machine,
            });
        }
        if !(1..=6).contains(&version) {
            return Err(match version.swap_bytes() {
                1..=6 => DumpError::Unsupported {
                    path: path.to_owned(),
                    kind: "a big-endian kdump-compressed dump",
                },
                _ => bad(
                    "an unknown version of kdump header",
                    VERSION,
                    version.into(),
                ),
            });
        }
        let block = field(BLOCK_SIZE)?;
        let page_size = PageSize::new(block.into()).ok_or_else(|| {
            bad(
                "a block size that is not a page size (of a 64-bit machine)",
                BLOCK_SIZE,
                block.into(),
            )
        })?;
        Ok(Self {
            version,
            status: field(STATUS)?,
            page_size,
            sub_blocks: field(SUB_BLOCKS)?,
            bitmap_blocks: field(BITMAP_BLOCKS)?,
            max_frames: field(MAX_MAPNR)?,
            machine: machine.to_vec(),
        })
    }

    /// The length of so many blocks, in bytes. These are 32-bit numbers of blocks of 64 KiB at most.
    pub(super) fn in_blocks(&self, blocks: u32) -> u64 {
        u64::from(blocks) << self.page_size.shift()
    }
}

/// A part of the file that the sub-header names.
pub(super) struct Part {
    /// The fault that is told if it is beyond the end or too long.
    pub(super) what: &'static str,
    /// The offset of the field that names it.
    pub(super) named_at: FileOffset,
    pub(super) offset: FileOffset,
    pub(super) len: u64,
}

impl Part {
    /// A copy of it, unless there is none.
    pub(super) fn copy(
        &self,
        path: &Path,
        content: &Content,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, DumpError> {
        let bad = |value| DumpError::malformed(path, self.what, self.named_at, value);
        if self.offset == FileOffset::ZERO || self.len == 0 {
            return Ok(None);
        }
        if self.len > limit {
            return Err(bad(self.len));
        }
        let copy = content.copy(self.offset, self.len);
        copy.map(Some).ok_or_else(|| bad(self.offset.raw()))
    }
}

/// The fields of use in `struct kdump_sub_header`.
pub(super) struct SubHeader {
    pub(super) dump_level: u32,
    /// The frames that are in this part of several.
    pub(super) part: Option<PfnRange>,
    /// 0 of a version that has it in the header alone.
    pub(super) max_frames: u64,
    pub(super) vmcoreinfo: Part,
    pub(super) notes: Part,
}

impl SubHeader {
    pub(super) fn read(path: &Path, content: &Content, header: &Header) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        // The header is one block.
        let begin = FileOffset::new(header.page_size.bytes());
        let cut = || {
            bad(
                "a header beyond the end: truncated",
                begin,
                content.end().raw(),
            )
        };
        let sub_blocks = header.sub_blocks;
        if sub_blocks == 0 || header.in_blocks(sub_blocks) > content.end().raw() {
            return Err(bad("an invalid sub-header", SUB_BLOCKS, sub_blocks.into()));
        }
        let mut sub = [0; SUB_HEADER_LEN];
        if !content.read(begin, &mut sub) {
            return Err(cut());
        }
        let sub = sub.as_slice();
        let field = |at, since| match sub.le_at::<u64>(at).ok_or_else(cut) {
            Ok(_) if header.version < since => Ok(0),
            read => read,
        };
        let is_split = header.version >= 2 && sub.le_at::<u32>(12).ok_or_else(cut)? != 0;
        let frames = |start, end, since| {
            let frames =
                PfnRange::new(Pfn::new(field(start, since)?), Pfn::new(field(end, since)?));
            Ok::<_, DumpError>(frames)
        };
        let part_of = if is_split {
            // The numbers of 32 bits are too short for large machines.
            match frames(80, 88, 6)? {
                none if none.is_empty() => Some(frames(16, 24, 2)?),
                frames => Some(frames),
            }
        } else {
            None
        };
        let part = |at: u64, len_at: u64, since, what| {
            Ok::<_, DumpError>(Part {
                what,
                named_at: begin.checked_add(at).ok_or_else(cut)?,
                offset: FileOffset::new(field(at, since)?),
                len: field(len_at, since)?,
            })
        };
        Ok(Self {
            dump_level: sub.le_at(8).ok_or_else(cut)?,
            part: part_of,
            max_frames: field(96, 6)?,
            vmcoreinfo: part(32, 40, 3, "VMCOREINFO beyond the end or too long")?,
            notes: part(48, 56, 4, "notes beyond the end or too long")?,
        })
    }
}

/// The places of the parts of the file by which the pages are found.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) frames: u64,
    /// The bitmap of the frames that exist.
    pub(super) present_at: FileOffset,
    /// That of the frames in the file.
    pub(super) dumped_at: FileOffset,
    pub(super) descriptors_at: FileOffset,
}

impl Places {
    pub(super) fn new(
        path: &Path,
        content: &Content,
        header: &Header,
        sub: &SubHeader,
    ) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let block = header.page_size.bytes();
        let max_frames = match sub.max_frames {
            0 => header.max_frames.into(),
            max_frames => max_frames,
        };
        let bitmap_blocks = header.bitmap_blocks;
        let bitmaps_len = header.in_blocks(bitmap_blocks);
        let beyond = || {
            bad(
                "bitmaps beyond the end: truncated",
                BITMAP_BLOCKS,
                bitmap_blocks.into(),
            )
        };
        let present_at = FileOffset::new(block)
            .checked_add(header.in_blocks(header.sub_blocks))
            .ok_or_else(beyond)?;
        let descriptors_at = present_at.checked_add(bitmaps_len).ok_or_else(beyond)?;
        // Compared to the file itself too, for a flattened one may claim any length.
        if bitmap_blocks == 0
            || descriptors_at > content.end()
            || bitmaps_len > content.stored_len()
        {
            return Err(beyond());
        }
        // Where there is only room for one bitmap it is both (crash: dump_is_partial).
        let needed = max_frames.div_ceil(8).div_ceil(block);
        let half = u64::from(bitmap_blocks) >> 1;
        let (dumped_at, bitmap_len) = if needed <= half {
            let half = half.checked_mul(block).ok_or_else(beyond)?;
            (present_at.checked_add(half).ok_or_else(beyond)?, half)
        } else {
            (present_at, bitmaps_len)
        };
        let bits = bitmap_len.checked_mul(8);
        let frames = bits.map_or(max_frames, |bits| bits.min(max_frames));
        if needed > bitmap_blocks.into() || frames > MAX_FRAMES {
            return Err(bad("an invalid number of frames", MAX_MAPNR, max_frames));
        }
        Ok(Self {
            frames,
            present_at,
            dumped_at,
            descriptors_at,
        })
    }
}

/// The name of a processor whose dumps are not read here, in `struct new_utsname`.
fn other_machine(name: &[u8]) -> Option<String> {
    let name = name.split(|byte| *byte == 0).next()?;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    // QEMU says `Unknown`.
    let is_name =
        !name.is_empty() && name.iter().all(plain) && !name.eq_ignore_ascii_case(b"unknown");
    (is_name && machine_named(name).is_none()).then(|| String::from_utf8_lossy(name).into_owned())
}

/// The processor by its name in `struct new_utsname`.
pub(super) fn machine_named(name: &[u8]) -> Option<Architecture> {
    match name.split(|byte| *byte == 0).next()? {
        b"x86_64" => Some(Architecture::X86_64),
        b"aarch64" => Some(Architecture::Aarch64),
        _ => None,
    }
}
