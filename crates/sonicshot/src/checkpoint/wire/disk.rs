//! The records of what is on the guest's disks: the disks, and runs of pages that lie on them.

use super::layout::{
    DISK_ALIGN, DISK_HEAD, DISK_MARK_LEN, DISK_RUN_LEN, MAX_DISK_LEN, MAX_DISK_NAME, MAX_DISK_RUN,
    MAX_MARK, MAX_MARKS, narrow, pad,
};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::disk::hash::{DiskDigest, DiskHash};
use crate::checkpoint::disk::source::{DiskOffset, DiskRange};
use crate::to_u64;
use crate::{Bytes, PageSize};

/// A run whose first page is the last one on the disk.
const DESCENDING: u16 = 1;

/// A disk that a checkpoint refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskInfo {
    /// Its name, by which its image is given.
    pub name: String,
    /// Its length in bytes, as the guest sees it.
    pub bytes: u64,
    /// The hash that is kept of what is referred to.
    pub hash: DiskHash,
    /// Marks that must be on it as they were, beside what is referred to.
    pub marks: Vec<DiskMark>,
}

/// The kind of a mark on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MarkKind {
    /// The superblock of ext2, ext3 or ext4: when it was mounted and written to.
    ExtSuperblock,
    /// The superblock of ext4's journal: how far its log is.
    ExtJournal,
    /// The superblock of xfs; not its log.
    XfsSuperblock,
    /// The superblock of btrfs, with its generation.
    BtrfsSuperblock,
    /// Something else, by its number in the format.
    Other(u32),
}

impl MarkKind {
    pub(crate) const fn number(self) -> u32 {
        match self {
            Self::ExtSuperblock => 1,
            Self::ExtJournal => 2,
            Self::XfsSuperblock => 3,
            Self::BtrfsSuperblock => 4,
            Self::Other(number) => number,
        }
    }

    const fn numbered(number: u32) -> Self {
        match number {
            1 => Self::ExtSuperblock,
            2 => Self::ExtJournal,
            3 => Self::XfsSuperblock,
            4 => Self::BtrfsSuperblock,
            other => Self::Other(other),
        }
    }

    /// Its name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ExtSuperblock => "ext4's superblock",
            Self::ExtJournal => "ext4's journal",
            Self::XfsSuperblock => "xfs's superblock",
            Self::BtrfsSuperblock => "btrfs's superblock",
            Self::Other(_) => "a record of its file system",
        }
    }
}

/// A place on a disk that tells whether a file system was written to since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskMark {
    /// Its place on the disk.
    pub at: DiskOffset,
    /// Its length in bytes.
    pub len: u32,
    /// Its kind.
    pub kind: MarkKind,
    /// Their hash.
    pub digest: DiskDigest,
}

/// Pages that follow each other in the guest, and on a disk, up or down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskRun {
    /// The number of the disk.
    pub disk: u32,
    /// The place of the run's bytes on the disk.
    pub at: DiskOffset,
    /// The number of its pages.
    pub pages: u16,
    /// The first page is the last one on the disk.
    pub descending: bool,
    /// The hash of the bytes in the order of the disk.
    pub digest: DiskDigest,
}

impl DiskRun {
    /// The range of the run's bytes on the disk, unless that is beyond 64 bits.
    #[must_use]
    pub const fn range(&self, page_size: PageSize) -> Option<DiskRange> {
        DiskRange::with_len(self.at, (self.pages as u64) << page_size.shift())
    }

    /// The number, in the disk's order, of the run's page that is `number` in the guest's order.
    #[must_use]
    pub const fn on_disk(&self, number: u64) -> Option<u64> {
        let pages = self.pages as u64;
        if number >= pages {
            return None;
        }
        if !self.descending {
            return Some(number);
        }
        match pages.checked_sub(1) {
            Some(last) => last.checked_sub(number),
            None => None,
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.at.raw().to_le_bytes());
        out.extend(self.disk.to_le_bytes());
        let flags = if self.descending { DESCENDING } else { 0 };
        out.extend(flags.to_le_bytes());
        out.extend(self.pages.to_le_bytes());
        out.extend(self.digest.0);
    }

    /// A run on one of `disks`, or the name and value of the field that is wrong.
    pub(crate) fn decode(
        bytes: &[u8],
        disks: &[DiskInfo],
        page_size: PageSize,
    ) -> Result<Self, (&'static str, u64)> {
        let short = || ("a run on a disk", to_u64(bytes.len()));
        let at: u64 = bytes.le_at(0).ok_or_else(short)?;
        let disk: u32 = bytes.le_at(8).ok_or_else(short)?;
        let flags: u16 = bytes.le_at(12).ok_or_else(short)?;
        let pages: u16 = bytes.le_at(14).ok_or_else(short)?;
        let digest = bytes.get(16..DISK_RUN_LEN).and_then(<[u8]>::first_chunk);
        let digest = DiskDigest(*digest.ok_or_else(short)?);
        let known = usize::try_from(disk).ok().and_then(|disk| disks.get(disk));
        let info = known.ok_or(("the disk of a run", u64::from(disk)))?;
        if flags & !DESCENDING != 0 {
            return Err(("the flags of a run on a disk", flags.into()));
        }
        let run = Self {
            disk,
            at: DiskOffset::new(at),
            pages,
            descending: flags & DESCENDING != 0,
            digest,
        };
        let range = run.range(page_size).filter(|range| {
            range.end().raw() <= info.bytes && !range.is_empty() && range.len() <= MAX_DISK_RUN
        });
        if range.is_none() {
            return Err(("the length of a run on a disk", pages.into()));
        }
        if !at.is_multiple_of(DISK_ALIGN) {
            return Err(("the place of a run on a disk", at));
        }
        check_digest(info.hash, &digest).map(|()| run)
    }
}

/// The hash of `bytes`.
pub(crate) fn digest(hash: DiskHash, bytes: &[u8]) -> Result<DiskDigest, CheckpointError> {
    hash.of(bytes)
        .ok_or(CheckpointError::CodecMissing { codec: hash.name() })
}

/// Of a hash with 128 bits the rest is zero.
fn check_digest(hash: DiskHash, digest: &DiskDigest) -> Result<(), (&'static str, u64)> {
    let (_, rest) = digest.0.split_at(16);
    let stray = rest.iter().find(|byte| **byte != 0);
    if let (DiskHash::Xxh3, Some(found)) = (hash, stray) {
        return Err(("the end of a hash of 128 bits", u64::from(*found)));
    }
    Ok(())
}

impl DiskInfo {
    /// The most bytes that a mark may have.
    pub const LONGEST_MARK: u32 = MAX_MARK;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let name: u16 = narrow(
            "bytes of a disk's name",
            to_u64(self.name.len()),
            MAX_DISK_NAME,
        )?;
        let marks: u32 = narrow("marks on a disk", to_u64(self.marks.len()), MAX_MARKS)?;
        out.extend(self.bytes.to_le_bytes());
        out.extend(name.to_le_bytes());
        out.extend([
            match self.hash {
                DiskHash::Xxh3 => 1,
                DiskHash::Sha256 => 2,
            },
            0,
        ]);
        out.extend(marks.to_le_bytes());
        for mark in &self.marks {
            out.extend(mark.at.raw().to_le_bytes());
            out.extend(mark.len.to_le_bytes());
            out.extend(mark.kind.number().to_le_bytes());
            out.extend(mark.digest.0);
        }
        out.extend(self.name.as_bytes());
        pad(out, 8);
        Ok(())
    }

    /// A disk's record at the start of `bytes`, and how long it is; or the name and value of the
    /// field that is wrong.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, usize), (&'static str, u64)> {
        let short = || ("the record of a disk", to_u64(bytes.len()));
        let len: u64 = bytes.le_at(0).ok_or_else(short)?;
        let name_len: u16 = bytes.le_at(8).ok_or_else(short)?;
        let hash: u8 = bytes.le_at(10).ok_or_else(short)?;
        let zero: u8 = bytes.le_at(11).ok_or_else(short)?;
        let count: u32 = bytes.le_at(12).ok_or_else(short)?;
        if len == 0 || len > MAX_DISK_LEN {
            return Err(("the length of a disk", len));
        }
        let hash = match (hash, zero) {
            (1, 0) => DiskHash::Xxh3,
            (2, 0) => DiskHash::Sha256,
            _ => return Err(("the hash of a disk", hash.into())),
        };
        if u64::from(count) > MAX_MARKS {
            return Err(("the number of marks on a disk", count.into()));
        }
        let mut at = DISK_HEAD;
        let mut marks = Vec::new();
        for _ in 0..count {
            let record = bytes.get(at..).ok_or_else(short)?;
            let mark = DiskMark::decode(record).ok_or_else(short)?;
            let range = DiskRange::with_len(mark.at, mark.len.into());
            let fits = range.is_some_and(|range| !range.is_empty() && range.end().raw() <= len);
            if !fits || mark.len > MAX_MARK {
                return Err(("the length of a mark on a disk", mark.len.into()));
            }
            check_digest(hash, &mark.digest)?;
            marks.push(mark);
            at = at.checked_add(DISK_MARK_LEN).ok_or_else(short)?;
        }
        let end = at.checked_add(name_len.into()).ok_or_else(short)?;
        let name = bytes
            .get(at..end)
            .and_then(|name| core::str::from_utf8(name).ok());
        let name = name.filter(|name| (1..=MAX_DISK_NAME).contains(&to_u64(name.len())));
        let name = name
            .ok_or(("the name of a disk", u64::from(name_len)))?
            .to_owned();
        let padded = end.checked_next_multiple_of(8).ok_or_else(short)?;
        bytes.get(..padded).ok_or_else(short)?;
        let disk = Self {
            name,
            bytes: len,
            hash,
            marks,
        };
        Ok((disk, padded))
    }
}

impl DiskMark {
    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            at: DiskOffset::new(bytes.le_at(0)?),
            len: bytes.le_at(8)?,
            kind: MarkKind::numbered(bytes.le_at(12)?),
            digest: DiskDigest(*bytes.get(16..DISK_MARK_LEN)?.first_chunk()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: u64, marks: u64, mark: u32) -> DiskInfo {
        let mark = DiskMark {
            at: DiskOffset::new(4096),
            len: mark,
            kind: MarkKind::Other(77),
            digest: DiskHash::Xxh3.of(b"mark").unwrap(),
        };
        DiskInfo {
            name: "d".repeat(usize::try_from(name).unwrap()),
            bytes: 1 << 20,
            hash: DiskHash::Xxh3,
            marks: vec![mark; usize::try_from(marks).unwrap()],
        }
    }

    fn run(at: u64, pages: u16) -> DiskRun {
        DiskRun {
            disk: 1,
            at: DiskOffset::new(at),
            pages,
            descending: true,
            digest: DiskHash::Xxh3.of(b"run").unwrap(),
        }
    }

    #[test]
    fn what_is_said_of_disks_is_bounded() {
        for (name, marks, mark, is_written, is_read) in [
            (1, 0, 1, true, true),
            (MAX_DISK_NAME, MAX_MARKS, MAX_MARK, true, true),
            (0, 0, 1, true, false),
            (MAX_DISK_NAME + 1, 0, 1, true, false),
            (1, MAX_MARKS + 1, 1, true, false),
            (1, 1, MAX_MARK + 1, true, false),
            (1, 1, 0, true, false),
            (1 << 16, 0, 1, false, false),
        ] {
            let disk = disk(name, marks, mark);
            let mut bytes = Vec::new();
            assert_eq!(
                disk.encode(&mut bytes).is_ok(),
                is_written,
                "{name}, {marks}, {mark}"
            );
            if is_written {
                let read = DiskInfo::decode(&bytes);
                assert_eq!(read.is_ok(), is_read, "{name}, {marks}, {mark}: {read:?}");
                if let Ok((read, len)) = read {
                    assert_eq!((read, len), (disk, bytes.len()));
                }
                // And cut off anywhere it is none.
                for len in (0..bytes.len()).step_by(bytes.len().div_ceil(64)) {
                    assert!(DiskInfo::decode(&bytes[..len]).is_err(), "{len}");
                }
            }
        }
        let mut whole = Vec::new();
        disk(8, 1, 512).encode(&mut whole).unwrap();
        for (at, field, is_read) in [
            (0, &MAX_DISK_LEN.to_le_bytes()[..], true),
            (0, &(MAX_DISK_LEN + 1).to_le_bytes(), false),
            (0, &0_u64.to_le_bytes(), false),
            // The mark does not end on it.
            (0, &4607_u64.to_le_bytes(), false),
            (10, &[2, 0], true),
            (10, &[3, 0], false),
            (10, &[1, 1], false),
            (16, &u64::MAX.to_le_bytes(), false),
            // The end of its hash of 128 bits.
            (16 + 40, &[1], false),
            (64, &[0xff], false),
        ] {
            let mut bytes = whole.clone();
            bytes[at..at + field.len()].copy_from_slice(field);
            assert_eq!(DiskInfo::decode(&bytes).is_ok(), is_read, "{at}: {field:?}");
        }
    }

    #[test]
    fn a_run_on_a_disk_lies_on_it() {
        let disks = [disk(1, 0, 1), disk(2, 0, 1)];
        let most = u16::try_from(MAX_DISK_RUN >> 12).unwrap();
        let end = 1 << 20;
        for (run, is_read) in [
            (run(0, 1), true),
            (run(end - MAX_DISK_RUN, most), true),
            (run(end - MAX_DISK_RUN + 512, most), false),
            (run(0, most + 1), false),
            (run(0, 0), false),
            (run(511, 1), false),
            (run(u64::MAX, 1), false),
            (
                DiskRun {
                    disk: 2,
                    ..run(0, 1)
                },
                false,
            ),
            (
                DiskRun {
                    digest: DiskDigest([1; 32]),
                    ..run(0, 1)
                },
                false,
            ),
        ] {
            let mut bytes = Vec::new();
            run.encode(&mut bytes);
            let read = DiskRun::decode(&bytes, &disks, PageSize::SIZE_4K);
            assert_eq!(read.ok(), is_read.then_some(run), "{run:?}");
        }
        let mut bytes = Vec::new();
        run(0, 1).encode(&mut bytes);
        assert!(DiskRun::decode(&bytes[..47], &disks, PageSize::SIZE_4K).is_err());
        bytes[12] = 2;
        assert!(DiskRun::decode(&bytes, &disks, PageSize::SIZE_4K).is_err());
        for (descending, found) in [
            (false, [Some(0), Some(2), None]),
            (true, [Some(2), Some(0), None]),
        ] {
            let run = DiskRun {
                descending,
                ..run(0, 3)
            };
            assert_eq!([0, 2, 3].map(|page| run.on_disk(page)), found);
        }
    }
}
