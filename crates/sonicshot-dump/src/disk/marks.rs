//! The places of a disk that tell whether its file systems were written to since: their superblocks, on the
//! disk itself and in its partitions.
//!
//! Partition tables are as in the UEFI specification (5.2.1, 5.3), ext4's superblock and extents as
//! in Linux's `fs/ext4/ext4.h` and `ext4_extents.h`, its journal as in `include/linux/jbd2.h`, xfs's
//! as in `fs/xfs/libxfs/xfs_format.h`, btrfs's as in `include/uapi/linux/btrfs_tree.h`.

use sonicshot::Bytes;
use sonicshot::checkpoint::{DiskOffset, DiskSource, MarkKind};
use std::io;

/// A mark: its place, its length in bytes, and its kind.
type Mark = (DiskOffset, u32, MarkKind);

const SECTOR: u64 = 512;
/// The offset of ext4's superblock.
const SUPERBLOCK: u64 = 1024;
/// Partitions that are looked into.
const MAX_PARTITIONS: u64 = 128;
/// A GPT's entry has at least so many bytes, and no more than a sector.
const ENTRY: std::ops::RangeInclusive<u64> = 128..=512;

/// The marks of all file systems that are found.
pub(crate) fn find(disk: &dyn DiskSource) -> io::Result<Vec<Mark>> {
    let mut starts = vec![0];
    starts.extend(partitions(disk)?);
    starts.sort_unstable();
    starts.dedup();
    let mut marks = Vec::new();
    for start in starts {
        file_system(disk, start, &mut marks)?;
    }
    Ok(marks)
}

/// A file system: the name that it was given when it was made, and where it begins.
pub(crate) type FileSystem = ([u8; 16], DiskOffset);

/// The file systems of which a guest's records say where what is: ext2 to ext4.
pub(crate) fn file_systems(disk: &dyn DiskSource) -> io::Result<Vec<FileSystem>> {
    /// Of ext4's superblock, where its name is.
    const UUID: u64 = 0x68;
    let mut found = Vec::new();
    for (at, _, kind) in find(disk)? {
        let start = at.raw().checked_sub(SUPERBLOCK);
        let (Some(start), MarkKind::ExtSuperblock) = (start, kind) else {
            continue;
        };
        let superblock = read(disk, at.raw(), 1024)?.unwrap_or_default();
        let name = superblock.as_slice().array_at::<16>(UUID);
        found.extend(name.map(|name| (name, DiskOffset::new(start))));
    }
    Ok(found)
}

/// `len` bytes at `at`; `None` beyond the end.
fn read(disk: &dyn DiskSource, at: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
    let end = at.checked_add(len);
    if end.is_none_or(|end| disk.disk_len().is_ok_and(|disk| end > disk)) {
        return Ok(None);
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    disk.read_disk(&mut bytes, DiskOffset::new(at))?;
    Ok(Some(bytes))
}

/// The offsets of the partitions, in bytes.
fn partitions(disk: &dyn DiskSource) -> io::Result<Vec<u64>> {
    let Some(first) = read(disk, 0, 2 * SECTOR)? else {
        return Ok(Vec::new());
    };
    let first = first.as_slice();
    if first.le_at::<u16>(510) != Some(0xaa55) {
        return Ok(Vec::new());
    }
    if first.part(512, 8) == Some(b"EFI PART") {
        return gpt(disk, first);
    }
    let entries = (446_u64..).step_by(16).take(4);
    let starts = entries.filter_map(|at| {
        let kind: u8 = first.le_at(at.checked_add(4)?)?;
        let start: u32 = first.le_at(at.checked_add(8)?)?;
        let start = u64::from(start).checked_mul(SECTOR);
        start.filter(|start| kind != 0 && *start != 0)
    });
    Ok(starts.collect())
}

fn gpt(disk: &dyn DiskSource, first: &[u8]) -> io::Result<Vec<u64>> {
    let fields = (|| {
        let at: u64 = first.le_at(512 + 72)?;
        let count: u32 = first.le_at(512 + 80)?;
        let entry: u32 = first.le_at(512 + 84)?;
        Some((at.checked_mul(SECTOR)?, count, u64::from(entry)))
    })();
    let Some((at, count, entry)) = fields.filter(|(_, _, entry)| ENTRY.contains(entry)) else {
        return Ok(Vec::new());
    };
    let count = u64::from(count).min(MAX_PARTITIONS);
    let Some(len) = count.checked_mul(entry) else {
        return Ok(Vec::new());
    };
    let Some(table) = read(disk, at, len)? else {
        return Ok(Vec::new());
    };
    let table = table.as_slice();
    let starts = (0..count).filter_map(|number| {
        let record = table.part(number.checked_mul(entry)?, entry)?;
        let is_used = record.part(0, 16)?.iter().any(|byte| *byte != 0);
        let start: u64 = record.le_at(32)?;
        (is_used && start != 0).then(|| start.checked_mul(SECTOR))?
    });
    Ok(starts.collect())
}

/// The marks of the file system that begins at `start`, if it is one that is known.
fn file_system(disk: &dyn DiskSource, start: u64, marks: &mut Vec<Mark>) -> io::Result<()> {
    let at = |offset: u64| start.checked_add(offset);
    let read_at = |offset: u64, len: u64| match at(offset) {
        Some(at) => read(disk, at, len),
        None => Ok(None),
    };
    let mut mark = |offset: u64, len: u32, kind| {
        marks.extend(at(offset).map(|at| (DiskOffset::new(at), len, kind)));
    };
    if let Some(superblock) = read_at(1024, 1024)?
        && superblock.as_slice().le_at::<u16>(56) == Some(0xef53)
    {
        mark(1024, 1024, MarkKind::ExtSuperblock);
        if let Some(journal) = ext_journal(&superblock)
            && let Some(bytes) = read_at(journal, 1024)?
            && bytes.as_slice().be_at::<u32>(0) == Some(0xc03b_3998)
        {
            mark(journal, 1024, MarkKind::ExtJournal);
        }
    }
    if read_at(0, 4)?.as_deref() == Some(b"XFSB") {
        mark(0, 512, MarkKind::XfsSuperblock);
    }
    if read_at((64 << 10) + 64, 8)?.as_deref() == Some(b"_BHRfS_M") {
        mark(64 << 10, 4096, MarkKind::BtrfsSuperblock);
    }
    Ok(())
}

/// The offset of an ext4's journal, from the beginning of the file system, by the copy of the journal's
/// inode that its superblock has.
fn ext_journal(superblock: &[u8]) -> Option<u64> {
    const HAS_JOURNAL: u32 = 4;
    const BLOCKS: u64 = 0x10c;
    let has_journal = superblock.le_at::<u32>(0x5c)? & HAS_JOURNAL != 0;
    let is_copied = superblock.le_at::<u8>(0xfd)? == 1;
    let log: u32 = superblock.le_at(0x18)?;
    let block = 1024_u64.checked_shl(log).filter(|_| log <= 6)?;
    let first = if superblock.le_at::<u16>(BLOCKS)? == 0xf30a {
        // A tree of extents; of a deep one the first leaf is elsewhere.
        let depth: u16 = superblock.le_at(BLOCKS + 6)?;
        let high: u16 = superblock.le_at(BLOCKS + 12 + 6)?;
        let low: u32 = superblock.le_at(BLOCKS + 12 + 8)?;
        (depth == 0).then_some((u64::from(high) << 32) | u64::from(low))?
    } else {
        superblock.le_at::<u32>(BLOCKS)?.into()
    };
    (has_journal && is_copied).then(|| first.checked_mul(block))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// An ext4 of 4 KiB blocks whose journal begins at block 9.
    fn ext(disk: &mut [u8], at: usize) {
        put(disk, at + 1024 + 56, &0xef53_u16.to_le_bytes());
        put(disk, at + 1024 + 0x18, &2_u32.to_le_bytes());
        put(disk, at + 1024 + 0x5c, &4_u32.to_le_bytes());
        put(disk, at + 1024 + 0xfd, &[1]);
        put(disk, at + 1024 + 0x10c, &0xf30a_u16.to_le_bytes());
        put(disk, at + 1024 + 0x10c + 20, &9_u32.to_le_bytes());
        put(disk, at + 9 * 4096, &0xc03b_3998_u32.to_be_bytes());
    }

    fn found(disk: &[u8]) -> Vec<(u64, MarkKind)> {
        let marks = find(&disk.to_vec()).unwrap();
        marks
            .into_iter()
            .map(|(at, _, kind)| (at.raw(), kind))
            .collect()
    }

    #[test]
    fn file_systems_are_found_on_disks_and_in_partitions() {
        let mib = 1 << 20;
        let mut whole = vec![0; mib];
        assert_eq!(found(&whole), []);
        ext(&mut whole, 0);
        put(&mut whole, 1024 + 0x68, b"sixteen letters.");
        let named = file_systems(&whole).unwrap();
        assert_eq!(named, [(*b"sixteen letters.", DiskOffset::ZERO)]);
        let superblock = (1024, MarkKind::ExtSuperblock);
        assert_eq!(
            found(&whole),
            [superblock, (9 * 4096, MarkKind::ExtJournal)]
        );
        // A journal that is none, one whose tree is deep, one that is not there.
        let mut other = whole.clone();
        other[9 * 4096] ^= 1;
        assert_eq!(found(&other), [superblock]);
        for (at, byte) in [
            (0x10c + 6, 1),
            (0x5c, 0),
            (0xfd, 0),
            (0x18, 9),
            (0x10c + 23, 0xff),
        ] {
            let mut other = whole.clone();
            other[1024 + at] = byte;
            assert_eq!(found(&other), [superblock], "{at:#x}");
        }
        // Of the oldest kind, by a list of blocks.
        let mut old = whole.clone();
        put(&mut old, 1024 + 0x10c, &9_u32.to_le_bytes());
        assert_eq!(found(&old).len(), 2);

        // A PC's partitions, one of which begins beyond the end.
        let mut parts = vec![0; 2 * mib];
        put(&mut parts, 510, &[0x55, 0xaa]);
        for (number, sector) in [(0, 200_u32), (2, 2048), (3, 1 << 31)] {
            put(&mut parts, 446 + 16 * number + 4, &[0x83]);
            put(&mut parts, 446 + 16 * number + 8, &sector.to_le_bytes());
        }
        put(&mut parts, 200 * 512, b"XFSB");
        put(&mut parts, mib + 0x10040, b"_BHRfS_M");
        assert_eq!(
            found(&parts),
            [
                (200 * 512, MarkKind::XfsSuperblock),
                (1 << 20 | 0x10000, MarkKind::BtrfsSuperblock)
            ]
        );

        let mut gpt = vec![0; 2 * mib];
        put(&mut gpt, 510, &[0x55, 0xaa]);
        put(&mut gpt, 512, b"EFI PART");
        put(&mut gpt, 512 + 72, &2_u64.to_le_bytes());
        put(&mut gpt, 512 + 80, &128_u32.to_le_bytes());
        put(&mut gpt, 512 + 84, &128_u32.to_le_bytes());
        put(&mut gpt, 1024 + 128, &[7; 16]);
        put(&mut gpt, 1024 + 128 + 32, &2048_u64.to_le_bytes());
        put(&mut gpt, mib, b"XFSB");
        assert_eq!(found(&gpt), [(1 << 20, MarkKind::XfsSuperblock)]);
        // Entries that cannot be, and a table beyond the end.
        for (at, value) in [(84, 64_u64), (84, 4096), (72, u64::MAX), (72, 1 << 40)] {
            let mut other = gpt.clone();
            let len = if at == 72 { 8 } else { 4 };
            put(&mut other, 512 + at, &value.to_le_bytes()[..len]);
            assert_eq!(found(&other), []);
        }
        for len in [0, 1, 511, 1024, 1500, 2047, 65_600] {
            found(&whole[..len]);
            found(&gpt[..len]);
        }
    }

    #[test]
    fn no_more_partitions_are_looked_into_than_a_bound() {
        let mut gpt = vec![0; 1 << 20];
        put(&mut gpt, 510, &[0x55, 0xaa]);
        put(&mut gpt, 512, b"EFI PART");
        put(&mut gpt, 512 + 72, &2_u64.to_le_bytes());
        put(&mut gpt, 512 + 80, &u32::MAX.to_le_bytes());
        put(&mut gpt, 512 + 84, &128_u32.to_le_bytes());
        for number in 0..200 {
            put(&mut gpt, 1024 + number * 128, &[7; 16]);
            put(
                &mut gpt,
                1024 + number * 128 + 32,
                &(number as u64 + 1).to_le_bytes(),
            );
        }
        assert_eq!(partitions(&gpt).unwrap().len(), 128);
    }
}
