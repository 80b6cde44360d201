//! The progress of a prune, and its results.

use crate::DumpError;
use sonicshot::{FileStamp, PrunePlan, Tally, to_u64};
use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// The counts of a prune.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PruneStats {
    /// Bytes of guest RAM that were dropped.
    pub dropped_bytes: u64,
    /// Bytes that the plan would drop, but the format keeps, for they would not read as the guest
    /// expects after a restore ([`Dump::restores`](crate::Dump::restores)).
    pub kept_for_fill: u64,
    /// Bytes that the plan would drop, but a diff keeps: without them the guest would have what
    /// the base has there, which is not zero.
    pub kept_for_base: u64,
    /// Ranges that were dropped, in the file.
    pub runs: u64,
    /// Of those, the ones that really had to be punched; the others were holes already.
    pub punched: u64,
    /// Bytes on disk that the file itself takes less than before.
    pub freed_bytes: u64,
    /// Whether the file itself was changed, which it is not where there is nothing to do.
    pub changed: bool,
    /// Ranges of an ELF core that were dropped as a hole in the file, because it would have
    /// more segments than 16 bits count.
    pub joined: u64,
    /// Bytes that were dropped and are in the file all the same: in ranges too short for a
    /// hole, or in parts of blocks.
    pub left_bytes: u64,
    /// Ranges that were too short for a hole.
    pub left_runs: u64,
    /// Bytes that the output shares with the input.
    pub cloned_bytes: u64,
    /// Ranges of data in the input file, if that is cheap to count.
    pub extents_before: Option<u64>,
    /// Ranges of data in the output file, the same.
    pub extents_after: Option<u64>,
    /// The space that the input takes on disk, in bytes.
    pub disk_before: u64,
    /// The space that the output takes on disk, in bytes.
    pub disk_after: u64,
}

impl PruneStats {
    /// The statistics of dropping `goes` of `plan`, before it is done.
    pub(crate) fn of(plan: &PrunePlan, goes: &PrunePlan) -> Self {
        Self {
            dropped_bytes: goes.dropped_bytes(),
            kept_for_fill: Tally::new(plan.dropped_bytes())
                .without(goes.dropped_bytes())
                .get(),
            runs: to_u64(goes.runs().len()),
            ..Self::default()
        }
    }
}

/// The space that a file takes on disk, in bytes.
pub(crate) fn disk_usage(file: &File, path: &Path) -> Result<u64, DumpError> {
    let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
    if metadata.file_type().is_block_device() {
        let stamp = FileStamp::of(file).map_err(DumpError::io("reading", path))?;
        return Ok(stamp.len());
    }
    Ok(bytes_of_blocks(&metadata))
}

/// The sum of the blocks of a file, in bytes: the kernel counts them in units of 512.
pub(crate) fn bytes_of_blocks(metadata: &Metadata) -> u64 {
    Tally::new(metadata.blocks()).times(512).get()
}
