//! Disks and archives whose marks are too short to tell them from memory: what else must be so of
//! them.
//!
//! The partition table of a PC's disk is as Intel's and Microsoft's first ones (UEFI specification,
//! 5.2.1); ext2, ext3 and ext4 as in Linux's `fs/ext4/ext4.h`, `struct ext4_super_block`; f2fs as in
//! `include/linux/f2fs_fs.h`; archives as in PKWARE's APPNOTE, 4.3.16.

use crate::format::kind::Source;
use sonicshot::{Bytes, FileBytes};

const SECTOR: u64 = 512;
/// The offset of the four entries of a partition table, and the length of each.
const TABLE: u64 = 446;
const ENTRY: u64 = 16;

/// One entry that is used.
struct Partition {
    start: u64,
    end: u64,
}

impl Partition {
    /// Reads the entry at `at`: nothing of one that is not used, `None` of what is none.
    fn read(data: FileBytes<'_>, at: u64) -> Option<Option<Self>> {
        let kind: u8 = data.le_at(at.checked_add(4)?)?;
        if kind == 0 {
            let all = data.part(at, ENTRY)?;
            return all.is_zero().then_some(None);
        }
        let is_active: u8 = data.le_at(at)?;
        let start: u32 = data.le_at(at.checked_add(8)?)?;
        let len: u32 = data.le_at(at.checked_add(12)?)?;
        let end = u64::from(start).checked_add(len.into())?;
        let is_one = matches!(is_active, 0 | 0x80) && start > 0 && len > 0;
        let start = start.into();
        is_one.then_some(Some(Self { start, end }))
    }
}

/// Whether the first sector has a partition table: every entry is one or all zero, and those that
/// are used lie apart from each other, and begin inside the disk.
pub(super) fn is_partitioned(source: &Source<'_>) -> bool {
    let data = source.data();
    let sectors = source.len() / SECTOR;
    let entries = (TABLE..).step_by(16).take(4);
    let entries: Option<Vec<_>> = entries.map(|at| Partition::read(data, at)).collect();
    let mut used: Vec<Partition> = entries.into_iter().flatten().flatten().collect();
    used.sort_unstable_by_key(|partition| partition.start);
    let apart = used.is_sorted_by(|a, b| a.end <= b.start);
    let inside = used.iter().all(|partition| partition.start < sectors);
    !used.is_empty() && apart && inside
}

/// Whether a superblock of ext2, ext3 or ext4 is one, by the fields that every one of them has.
pub(super) fn is_ext(source: &Source<'_>) -> bool {
    const SUPERBLOCK: u64 = 1024;
    let data = source.data();
    let is_one = || {
        let word = |at: u64| data.le_at::<u32>(SUPERBLOCK.checked_add(at)?);
        let half = |at: u64| data.le_at::<u16>(SUPERBLOCK.checked_add(at)?);
        let (inodes, blocks, first) = (word(0)?, word(4)?, word(20)?);
        let (log_block, per_group) = (word(24)?, word(32)?);
        let (state, errors, revision) = (half(58)?, half(60)?, word(76)?);
        let block_len = 1024_u64.checked_shl(log_block).filter(|_| log_block <= 6)?;
        let most = block_len.checked_mul(8)?;
        let is_first = first == u32::from(log_block == 0);
        // The low half of the number, of large file systems.
        let len = u64::from(blocks).checked_mul(block_len)?;
        let fits = len <= source.len().checked_add(block_len)?;
        let counts = inodes > 0 && blocks > 0 && (1..=most).contains(&per_group.into());
        let words = state <= 0x7 && (1..=3).contains(&errors) && revision <= 1;
        Some(is_first && fits && counts && words)
    };
    is_one().unwrap_or(false)
}

/// Whether a superblock of f2fs is one: its sizes are powers of two, and what they must be.
pub(super) fn is_f2fs(source: &Source<'_>) -> bool {
    let word = |at: u64| source.data().le_at::<u32>(at);
    let logs = [1032, 1036, 1040].map(word);
    matches!(logs, [Some(9..=12), Some(0..=3), Some(12..=14)])
}

/// Whether a file ends as the last part of an archive in several: what ends it says which of them
/// the archive's directory begins in.
pub(super) fn ends_an_archive(source: &Source<'_>) -> bool {
    const LEN: u64 = 22;
    let is_one = || {
        let at = source.len().checked_sub(LEN)?;
        let data = source.data();
        let mark: u32 = data.le_at(at)?;
        let number: u16 = data.le_at(at.checked_add(4)?)?;
        let directory: u16 = data.le_at(at.checked_add(6)?)?;
        let comment: u16 = data.le_at(at.checked_add(20)?)?;
        let is_end = mark == u32::from_le_bytes(*b"PK\x05\x06") && comment == 0;
        Some(is_end && (1..0x100).contains(&number) && directory <= number)
    };
    is_one().unwrap_or(false)
}
