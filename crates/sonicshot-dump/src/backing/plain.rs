//! A dump file whose pages lie in it as they are, served as guest memory.
//!
//! Everything that knows where each range of guest RAM lies in the file is the same for all
//! uncompressed formats: a format parser only makes the list of [`Extent`]s. The file is read and
//! not mapped, for somebody else may cut it off: see [`FileContent`].

use crate::DumpError;
use crate::backing::Stored;
use crate::backing::scattered::{PagePlaces, Scattered};
use crate::output::check_stamp;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sonicshot::{
    FileBytes, FileContent, FileOffset, FileRange, FileStamp, Gpa, GpaRange, GuestMemory, Mapped,
    MemoryError, RamLayout, to_u64,
};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A file in more pieces than this is not asked for its holes: finding them costs as much as
/// reading.
const MAX_FILE_EXTENTS: usize = 1 << 20;

/// A pruned dump holds at least its guest's struct pages, a 64th of its memory; every frame of
/// memory costs the reader a few bytes, so that a short file must not claim a lot of it.
const MAX_SPARSENESS: u64 = 256;
/// Memory that any file may claim: 64 MiB.
const SMALL: u64 = 64 << 20;

/// The sum of lengths that a file claims; `None` if they are more than 64 bits hold.
pub(crate) fn sum_of_lens(lengths: impl IntoIterator<Item = u64>) -> Option<u64> {
    lengths.into_iter().try_fold(0, u64::checked_add)
}

/// Whether a file of `file_len` bytes may be of that much memory.
pub(crate) fn may_claim(claimed: u64, file_len: u64) -> bool {
    let most = file_len.checked_mul(MAX_SPARSENESS);
    let most = most.and_then(|most| most.checked_add(SMALL));
    most.is_none_or(|most| claimed <= most)
}

/// A range of guest RAM and where its bytes are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub guest: GpaRange,
    /// The offset of the bytes; `None` if they are not in the file and read as zero.
    pub offset: Option<FileOffset>,
}

impl Extent {
    /// The range of the bytes; `None` if they are not in the file.
    pub(crate) fn file(&self) -> Option<FileRange> {
        FileRange::with_len(self.offset?, self.guest.len())
    }
}

/// A dump whose pages lie in the file as they are.
#[derive(Debug)]
pub(crate) struct PlainDump {
    path: PathBuf,
    content: FileContent,
    layout: RamLayout,
    /// Sorted by guest address, disjoint.
    extents: Vec<Extent>,
    /// The ranges of the guest's RAM that the file should have, and does not: sorted, none of which touch.
    absent: Vec<GpaRange>,
    /// Instead of them where each page lies for itself.
    scattered: Option<Scattered>,
    /// Whether the format itself says which pages hold data, so that the file system need not be
    /// asked for its holes.
    extents_are_data: bool,
    /// The file's stamp when it was last written to by us, or opened.
    stamp: Mutex<FileStamp>,
    /// The ranges of the file that are not holes, sorted.
    data: OnceLock<Option<Vec<FileRange>>>,
    /// The ranges of the guest's RAM that are in none, sorted.
    guest_data: OnceLock<Vec<GpaRange>>,
}

/// Opens `path`.
pub(crate) fn open_content(path: &Path) -> Result<FileContent, DumpError> {
    let file = File::open(path).map_err(DumpError::io("opening", path))?;
    content_of(path, file)
}

/// The content of `file`, which messages call `path`.
pub(crate) fn content_of(path: &Path, file: File) -> Result<FileContent, DumpError> {
    FileContent::new(file).map_err(DumpError::io("reading", path))
}

/// Whether the file is a block device, such as a snapshot of LVM.
pub(crate) fn is_block_device(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.file_type().is_block_device())
}

/// Refuses a file that is no longer what was opened, or that could not be read.
pub(crate) fn check_content(content: &FileContent, path: &Path) -> Result<(), DumpError> {
    check_stamp(content.file(), path, content.stamp())?;
    match content.failure() {
        Some(source) => Err(DumpError::io("reading", path)(source)),
        None => Ok(()),
    }
}

impl PlainDump {
    /// `extents` must be disjoint, and lie inside the file.
    pub(crate) fn new(
        path: &Path,
        content: FileContent,
        mut extents: Vec<Extent>,
    ) -> Result<Self, DumpError> {
        // A file may hold the guest's ranges in any order.
        extents.sort_unstable_by_key(|extent| extent.guest);
        let ranges = extents.iter().map(|extent| extent.guest).collect();
        let mut dump = Self::of_ranges(path, content, ranges)?;
        dump.extents = extents;
        Ok(dump)
    }

    /// The same of pages that lie in the file one by one.
    pub(crate) fn scattered(
        path: &Path,
        content: FileContent,
        scattered: Scattered,
    ) -> Result<Self, DumpError> {
        let mut dump = Self::of_ranges(path, content, scattered.ranges().collect())?;
        dump.scattered = Some(scattered);
        Ok(dump)
    }

    fn of_ranges(
        path: &Path,
        content: FileContent,
        ranges: Vec<GpaRange>,
    ) -> Result<Self, DumpError> {
        let layout = RamLayout::new(ranges).map_err(|source| DumpError::Layout {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            stamp: Mutex::new(content.stamp()),
            extents_are_data: false,
            content,
            layout,
            extents: Vec::new(),
            absent: Vec::new(),
            scattered: None,
            data: OnceLock::new(),
            guest_data: OnceLock::new(),
        })
    }

    /// The same of which the file does not have `absent`, ranges of RAM in any order.
    pub(crate) fn lacking(mut self, absent: Vec<GpaRange>) -> Self {
        self.absent = joined(absent);
        self
    }

    /// The ranges of the guest's RAM that the file does not have: sorted, none of which touch.
    pub(crate) fn absent(&self) -> &[GpaRange] {
        &self.absent
    }

    /// The first range that the file does not have and that ends above `at`.
    fn absent_from(&self, at: Gpa) -> Option<GpaRange> {
        let before = self.absent.partition_point(|range| range.end() <= at);
        self.absent.get(before).copied()
    }

    /// Every page that is in the file is taken for data.
    pub(crate) fn trust_extents(&mut self) {
        self.extents_are_data = true;
    }

    /// The bytes of the whole file.
    pub(crate) fn bytes(&self) -> FileBytes<'_> {
        self.content.bytes()
    }

    /// Whether the file holds `bytes` at `offset`.
    pub(crate) fn holds(&self, offset: FileOffset, bytes: &[u8]) -> bool {
        let mut there = vec![0; bytes.len()];
        usize::try_from(offset.raw())
            .ok()
            .and_then(|offset| self.bytes().get(offset, bytes.len()))
            .is_some_and(|found| found.copy_to(&mut there) && there == bytes)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        self.content.file()
    }

    /// All of the file, as it was when it was opened.
    pub(crate) fn file_range(&self) -> FileRange {
        FileRange::new(FileOffset::ZERO, FileOffset::new(self.file_len()))
    }

    /// The bytes of a range of the file.
    pub(crate) fn bytes_in(&self, range: FileRange) -> Option<FileBytes<'_>> {
        let start = usize::try_from(range.start().raw()).ok()?;
        self.bytes().get(start, usize::try_from(range.len()).ok()?)
    }

    /// The length of the file in bytes, when it was opened.
    pub(crate) fn file_len(&self) -> u64 {
        self.content.len()
    }

    /// Refuses a file that has become shorter or longer since it was opened: what is missing
    /// would be taken for a hole.
    pub(crate) fn check_length(&self) -> Result<(), DumpError> {
        let metadata = self.file().metadata();
        let metadata = metadata.map_err(DumpError::io("reading", &self.path))?;
        let (before, now) = (self.file_len(), metadata.len());
        if now == before {
            return Ok(());
        }
        let path = self.path.clone();
        Err(DumpError::Changed { path, before, now })
    }

    /// Refuses a file that was changed since it was opened: what is known of it is outdated; and
    /// one that could not be read.
    pub(crate) fn check_unchanged(&self) -> Result<(), DumpError> {
        let stamp = *self.stamp.lock().unwrap_or_else(PoisonError::into_inner);
        check_stamp(self.file(), &self.path, stamp)?;
        match self.content.failure() {
            Some(source) => Err(DumpError::io("reading", &self.path)(source)),
            None => Ok(()),
        }
    }

    /// Takes what was written to the file so far as our own doing: it has this stamp now.
    pub(crate) fn note_change(&self, now: FileStamp) {
        *self.stamp.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// The extents of the guest's RAM; none if the pages are [scattered](Self::pages_of_block).
    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The places of the pages of a block, by its number, if they lie in the file one by one.
    pub(crate) fn pages_of_block(&self, number: usize) -> Option<&PagePlaces> {
        self.scattered.as_ref()?.block(number)
    }

    /// The offset in the file of the byte at `at` of `extent`; `None` if it is not in it.
    pub(crate) fn offset_in(
        &self,
        extent: &Extent,
        at: Gpa,
    ) -> Result<Option<FileOffset>, DumpError> {
        let Some(base) = extent.offset else {
            return Ok(None);
        };
        let inside = at.offset_from(extent.guest.start());
        let offset = inside.and_then(|inside| base.checked_add(inside));
        let wrong =
            || DumpError::malformed(&self.path, "memory outside its extent", base, at.raw());
        offset.map(Some).ok_or_else(wrong)
    }

    fn extent_of(&self, at: Gpa) -> Option<&Extent> {
        let above = self
            .extents
            .partition_point(|extent| extent.guest.start() <= at);
        self.extents
            .get(above.checked_sub(1)?)
            .filter(|extent| extent.guest.contains(at))
    }

    /// The part of `at..at+len` that one extent holds: where it is in the file, unless it is
    /// zeroes, and its length.
    pub(crate) fn part(&self, at: Gpa, len: u64) -> Option<(Option<FileOffset>, u64)> {
        if let Some(scattered) = &self.scattered {
            return scattered.part(at, len);
        }
        let extent = self.extent_of(at)?;
        let inside = at.offset_from(extent.guest.start())?;
        let len = extent.guest.len().checked_sub(inside)?.min(len);
        match extent.offset {
            Some(offset) => Some((Some(offset.checked_add(inside)?), len)),
            None => Some((None, len)),
        }
    }

    /// The ranges of the guest's RAM that may be something else than zero, sorted: found once,
    /// for there may be millions of extents, and the holes be asked for at each of them.
    fn guest_data(&self) -> &[GpaRange] {
        self.guest_data.get_or_init(|| {
            let data = match self.extents_are_data {
                true => None,
                false => self.data_extents(),
            };
            // Extents may be of the same bytes: then each cannot have all of their ranges.
            let lens = [
                data.map(<[_]>::len),
                Some(self.extents.len()),
                Some(self.absent.len()),
            ];
            let most: usize = lens.into_iter().flatten().sum();
            let mut found: Vec<GpaRange> = self.absent.clone();
            for extent in self.extents.iter().filter(|extent| extent.offset.is_some()) {
                let parts = data.filter(|_| found.len() < most);
                let parts = parts.and_then(|data| data_of(extent, data));
                found.extend(parts.unwrap_or_else(|| vec![extent.guest]));
            }
            joined(found)
        })
    }

    /// Some file systems do not tell of holes; others fail.
    fn cannot_tell<T>(&self, error: Errno) -> Option<T> {
        if ![Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS].contains(&error) {
            self.content.fail(error.into());
        }
        None
    }

    /// The ranges of the file that hold data, by the file system; `None` if it cannot tell.
    pub(crate) fn data_extents(&self) -> Option<&[FileRange]> {
        self.data
            .get_or_init(|| {
                let file = self.file();
                let mut next = |at| match seek(file, SeekFrom::Data(at)) {
                    Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?))),
                    // No more data.
                    Err(Errno::NXIO) => Ok(None),
                    Err(error) => Err(error),
                };
                match data_extents(self.file_len(), &mut next) {
                    Ok(found) => found,
                    Err(error) => self.cannot_tell(error),
                }
            })
            .as_deref()
    }
}

/// The same ranges, sorted, those that touch as one.
pub(crate) fn joined(mut ranges: Vec<GpaRange>) -> Vec<GpaRange> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable();
    let mut joined: Vec<GpaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end() >= range.start() => {
                *last = GpaRange::new(last.start(), last.end().max(range.end()));
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// The ranges of a file of `len` bytes that hold data; `next` gives the first one from a place
/// on. `None` if they are too many, or do not go on.
fn data_extents(
    len: u64,
    next: &mut dyn FnMut(u64) -> Result<Option<(u64, u64)>, Errno>,
) -> Result<Option<Vec<FileRange>>, Errno> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < len {
        let Some((start, end)) = next(at)? else { break };
        if end <= start || found.len() >= MAX_FILE_EXTENTS {
            return Ok(None);
        }
        let range = (FileOffset::new(start), FileOffset::new(end.min(len)));
        found.push(FileRange::new(range.0, range.1));
        at = end;
    }
    Ok(Some(found))
}

/// The parts of `extent` that lie in the ranges `data` of its file; `None` if that cannot be told.
fn data_of(extent: &Extent, data: &[FileRange]) -> Option<Vec<GpaRange>> {
    let file = extent.file()?;
    let to_guest = |at: FileOffset| {
        let inside = at.offset_from(file.start())?;
        extent.guest.start().checked_add(inside)
    };
    let first = data.partition_point(|data| data.end() <= file.start());
    let inside = data.get(first..)?.iter();
    let inside = inside.take_while(|data| data.start() < file.end());
    inside
        .map(|data| {
            let part = data.intersection(&file);
            Some(GpaRange::new(
                to_guest(part.start())?,
                to_guest(part.end())?,
            ))
        })
        .collect()
}

impl Stored for PlainDump {
    fn file(&self) -> &File {
        self.file()
    }

    fn check_unchanged(&self) -> Result<(), DumpError> {
        self.check_unchanged()
    }
}

impl GuestMemory for PlainDump {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::of_request(at, buf.len());
        let not_ram = || MemoryError::NotRam { range };
        if !buf.is_empty() && !self.layout.contains(at, range.len()) {
            return Err(not_ram());
        }
        if let Some(absent) = self.absent_from(at)
            && absent.start() < range.end()
        {
            return Err(MemoryError::Absent { range });
        }
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (offset, len) = self.part(at, to_u64(rest.len())).ok_or_else(not_ram)?;
            let size = usize::try_from(len).map_err(|_| not_ram())?;
            let (now, later) = rest.split_at_mut_checked(size).ok_or_else(not_ram)?;
            match offset {
                None => now.fill(0),
                Some(offset) => self
                    .content
                    .read_at(now, offset)
                    .map_err(|source| MemoryError::Io { range, source })?,
            }
            rest = later;
            if !rest.is_empty() {
                at = at.checked_add(len).ok_or_else(not_ram)?;
            }
        }
        Ok(())
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let range = GpaRange::of_request(at, len);
        if self.layout.contains(at, to_u64(len)) {
            return Ok(None);
        }
        Err(MemoryError::NotRam { range })
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        let region = *self.layout.region_of(at)?;
        if let Some(scattered) = &self.scattered {
            return scattered.next_data(at, region.end());
        }
        let data = self.guest_data();
        let next = data.partition_point(|data| data.end() <= at);
        let next = data.get(next)?;
        let here = GpaRange::new(next.start().max(at), next.end().min(region.end()));
        (!here.is_empty()).then_some(here)
    }

    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        let region = self.layout.region_of(at);
        let rest = region.map(|region| GpaRange::new(at, region.end()));
        let absent = rest.and_then(|rest| Some(self.absent_from(at)?.intersection(&rest)));
        Ok(absent.filter(|absent| !absent.is_empty()))
    }

    fn prefers_read(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_FILE_EXTENTS, data_extents};
    use rustix::io::Errno;

    /// As every second page of a file would be.
    fn found(count: usize) -> Option<usize> {
        let len = count as u64 * 0x2000;
        let mut next = |at: u64| {
            let start = at.next_multiple_of(0x2000);
            Ok((start < len).then_some((start, start + 0x1000)))
        };
        data_extents(len, &mut next)
            .unwrap()
            .map(|found| found.len())
    }

    #[test]
    fn a_file_in_too_many_pieces_is_not_asked_for_its_holes() {
        assert_eq!(found(3), Some(3));
        assert_eq!(found(MAX_FILE_EXTENTS), Some(MAX_FILE_EXTENTS));
        assert_eq!(found(MAX_FILE_EXTENTS + 1), None);
        // One that has no length would never end.
        assert_eq!(data_extents(9, &mut |at| Ok(Some((at, at)))), Ok(None));
        let failed = data_extents(9, &mut |_| Err(Errno::IO));
        assert_eq!(failed, Err(Errno::IO));
    }
}
