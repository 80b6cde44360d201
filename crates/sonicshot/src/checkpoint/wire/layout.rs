//! The common part of a checkpoint's records, as `FORMAT.md` gives it: constants, checksums,
//! padding.

use crate::checkpoint::CheckpointError;
use crate::{FileOffset, to_usize};
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
/// A run has at most so many frames.
pub(crate) const MAX_RUN: u64 = u32::MAX as u64;

/// A checkpoint refers to at most so many disks.
pub(crate) const MAX_DISKS: u64 = 256;
pub(crate) const MAX_DISK_NAME: u64 = 255;
/// A disk has at most so many bytes, so that no place on it can wrap.
pub(crate) const MAX_DISK_LEN: u64 = 1 << 63;
/// A disk has at most so many marks.
pub(crate) const MAX_MARKS: u64 = 1024;
/// A mark has at most so many bytes.
pub(crate) const MAX_MARK: u32 = 64 << 10;
/// The most that is read of a disk, and hashed, at once, in bytes.
pub(crate) const MAX_DISK_RUN: u64 = 64 << 10;
/// Pages begin at a multiple of this on a disk.
pub(crate) const DISK_ALIGN: u64 = 512;

pub(crate) const FOOTER_LEN: u64 = 64;
pub(crate) const INDEX_HEAD: usize = 32;
pub(crate) const SECTION_LEN: usize = 24;
pub(crate) const RUN_LEN: usize = 24;
pub(crate) const CHUNK_LEN: usize = 24;
pub(crate) const BLOB_HEAD: usize = 40;
pub(crate) const DISK_HEAD: usize = 16;
pub(crate) const DISK_MARK_LEN: usize = 48;
pub(crate) const DISK_RUN_LEN: usize = 48;

pub(crate) const SECTION_RUNS: u32 = 1;
pub(crate) const SECTION_CHUNKS: u32 = 2;
pub(crate) const SECTION_BLOBS: u32 = 3;
pub(crate) const SECTION_DISKS: u32 = 4;
pub(crate) const SECTION_DISK_RUNS: u32 = 5;
/// A section that a reader must know.
pub(crate) const SECTION_NEEDED: u32 = 1;

pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// A length of the format in memory.
pub(crate) const fn size(len: u64) -> usize {
    to_usize(len)
}

/// `value` in the narrower field that the format has for it.
pub(crate) fn narrow<T: TryFrom<u64>>(
    what: &'static str,
    value: u64,
    max: u64,
) -> Result<T, CheckpointError> {
    T::try_from(value).map_err(|_| too_large(what, value, max))
}

pub(crate) const fn too_large(what: &'static str, value: u64, max: u64) -> CheckpointError {
    CheckpointError::TooLarge { what, value, max }
}

/// The sum of two numbers of `what`.
pub(crate) fn plus(what: &'static str, value: u64, more: u64) -> Result<u64, CheckpointError> {
    let sum = value.checked_add(more);
    sum.ok_or_else(|| too_large(what, value, u64::MAX))
}

/// The place `bytes` behind `at`, which no file of this format reaches past 64 bits.
pub(crate) fn behind(at: FileOffset, bytes: u64) -> Result<FileOffset, CheckpointError> {
    at.checked_add(bytes)
        .ok_or_else(|| too_large("bytes of file", at.raw(), u64::MAX))
}

/// A field at `at` of the part of the file that begins at `start` cannot be `value`.
pub(crate) fn corrupt(
    start: FileOffset,
    what: &'static str,
    at: u64,
    value: u64,
) -> CheckpointError {
    match behind(start, at) {
        Ok(offset) => CheckpointError::Corrupt {
            what,
            offset,
            value,
        },
        Err(error) => error,
    }
}

/// The distance of `end` behind `start`, where both were told by what was written or checked.
pub(crate) fn between(start: FileOffset, end: FileOffset) -> Result<u64, CheckpointError> {
    end.offset_from(start)
        .ok_or_else(|| too_large("bytes of file", start.raw(), end.raw()))
}

/// Fills up with zeroes to a multiple of `align`.
pub(crate) fn pad(out: &mut Vec<u8>, align: usize) {
    let len = out.len().next_multiple_of(align);
    out.resize(len, 0);
}
