//! A dump file, mapped, served as guest memory.
//!
//! Everything that knows where each stretch of guest RAM lies in the file is the same for all
//! uncompressed formats: a format parser only makes the list of [`Extent`]s.
#![expect(unsafe_code, reason = "the mmap edge")]

use crate::DumpError;
use memmap2::Mmap;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sonicshot::{
    FileOffset, FileRange, Gpa, GpaRange, GuestBytes, GuestMemory, Mapped, MemoryError, RamLayout,
};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Mutex, OnceLock};

/// A file in more pieces than this is not asked for its holes: finding them costs as much as
/// reading.
const MAX_FILE_EXTENTS: usize = 1 << 20;

/// From this length on, the kernel copies a stretch faster than it maps it page by page. It also
/// leaves holes of files in memory alone, which a mapping that is touched fills.
const LONG_READ: usize = 4096;

/// A stretch of guest RAM and where its bytes are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub guest: GpaRange,
    /// Where the bytes begin; `None` if they are not in the file and read as zero.
    pub offset: Option<FileOffset>,
}

impl Extent {
    /// Where the bytes are; `None` if they are not in the file.
    pub(crate) fn file(&self) -> Option<FileRange> {
        FileRange::with_len(self.offset?, self.guest.len())
    }
}

/// A mapped dump.
#[derive(Debug)]
pub(crate) struct MappedDump {
    path: PathBuf,
    file: File,
    map: Mmap,
    layout: RamLayout,
    /// Sorted by guest address, disjoint.
    extents: Vec<Extent>,
    /// Whether the format itself says which pages hold data, so that the file system need not be
    /// asked for its holes.
    extents_are_data: bool,
    /// When the file was last written to, that we know of.
    written: Mutex<(i64, i64)>,
    /// The stretches of the file that are not holes, sorted.
    data: OnceLock<Option<Vec<FileRange>>>,
}

/// Opens and maps `path`.
pub(crate) fn map_file(path: &Path) -> Result<(File, Mmap), DumpError> {
    let file = File::open(path).map_err(DumpError::io("opening", path))?;
    map_open_file(path, file)
}

/// Maps `file`, which messages call `path`.
pub(crate) fn map_open_file(path: &Path, file: File) -> Result<(File, Mmap), DumpError> {
    // SAFETY: the mapping is shared and read-only, and never handed out as `&[u8]` of guest
    // memory but as `GuestBytes`, which tolerates that others write the file. A file that is
    // truncated while mapped ends the process with SIGBUS, as for every reader of mapped files.
    let map = unsafe { Mmap::map(&file) }.map_err(DumpError::io("mapping", path))?;
    Ok((file, map))
}

/// The bytes of the whole file.
pub(crate) fn whole(map: &Mmap) -> GuestBytes<'_> {
    match NonNull::new(map.as_ptr().cast_mut()) {
        // SAFETY: the mapping has exactly this length, and lives while `map` is borrowed.
        Some(base) => unsafe { GuestBytes::from_raw_parts(base, map.len()) },
        None => GuestBytes::from_slice(&[]),
    }
}

/// Refuses a file that no longer has the length that it was opened with.
pub(crate) fn check_length(file: &File, path: &Path, before: u64) -> Result<(), DumpError> {
    let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
    let now = metadata.len();
    if now == before {
        return Ok(());
    }
    let path = path.to_owned();
    Err(DumpError::Changed { path, before, now })
}

/// When the file was last written to.
fn last_written(file: &File, path: &Path) -> Result<(i64, i64), DumpError> {
    let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
    Ok((metadata.mtime(), metadata.mtime_nsec()))
}

impl MappedDump {
    /// `extents` must be disjoint, and lie inside the file.
    pub(crate) fn new(
        path: &Path,
        file: File,
        map: Mmap,
        mut extents: Vec<Extent>,
    ) -> Result<Self, DumpError> {
        // A file may hold the guest's ranges in any order.
        extents.sort_unstable_by_key(|extent| extent.guest);
        let layout = RamLayout::new(extents.iter().map(|extent| extent.guest).collect()).map_err(
            |source| DumpError::Layout {
                path: path.to_owned(),
                source,
            },
        )?;
        let written = Mutex::new(last_written(&file, path)?);
        Ok(Self {
            path: path.to_owned(),
            written,
            extents_are_data: false,
            file,
            map,
            layout,
            extents,
            data: OnceLock::new(),
        })
    }

    /// Every page that is in the file is taken for data.
    pub(crate) fn trust_extents(&mut self) {
        self.extents_are_data = true;
    }

    /// The bytes of the whole file.
    pub(crate) fn bytes(&self) -> GuestBytes<'_> {
        whole(&self.map)
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
        &self.file
    }

    /// All of the file, as it was when it was opened.
    pub(crate) fn file_range(&self) -> FileRange {
        FileRange::new(FileOffset::ZERO, FileOffset::new(self.file_len()))
    }

    /// The bytes of a stretch of the file.
    pub(crate) fn bytes_in(&self, range: FileRange) -> Option<GuestBytes<'_>> {
        let start = usize::try_from(range.start().raw()).ok()?;
        self.bytes().get(start, usize::try_from(range.len()).ok()?)
    }

    /// The length of the file in bytes, when it was opened.
    pub(crate) fn file_len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Refuses a file that has become shorter or longer since it was opened: what is missing
    /// would be taken for a hole.
    pub(crate) fn check_length(&self) -> Result<(), DumpError> {
        check_length(&self.file, &self.path, self.file_len())
    }

    /// Refuses a file that was written to since it was opened: what is known of it is outdated.
    pub(crate) fn check_unmodified(&self) -> Result<(), DumpError> {
        let now = last_written(&self.file, &self.path)?;
        if self.written.lock().is_ok_and(|written| *written == now) {
            return Ok(());
        }
        Err(DumpError::Modified {
            path: self.path.clone(),
        })
    }

    /// Takes what was written to the file so far as our own doing.
    pub(crate) fn note_change(&self) -> Result<(), DumpError> {
        let now = last_written(&self.file, &self.path)?;
        if let Ok(mut written) = self.written.lock() {
            *written = now;
        }
        Ok(())
    }

    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Where the byte at `at` of `extent` is in the file; `None` if it is not in it.
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
        let wrong = || {
            DumpError::malformed(
                &self.path,
                "memory outside its stretch",
                base.raw(),
                at.raw(),
            )
        };
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
    fn part(&self, at: Gpa, len: u64) -> Option<(Option<FileOffset>, u64)> {
        let extent = self.extent_of(at)?;
        let inside = at.offset_from(extent.guest.start())?;
        let len = extent.guest.len().checked_sub(inside)?.min(len);
        match extent.offset {
            Some(offset) => Some((Some(offset.checked_add(inside)?), len)),
            None => Some((None, len)),
        }
    }

    /// The same with its bytes.
    fn piece(&self, at: Gpa, len: u64) -> Option<(Option<GuestBytes<'_>>, u64)> {
        let (offset, len) = self.part(at, len)?;
        let Some(offset) = offset else {
            return Some((None, len));
        };
        let bytes = self.bytes_in(FileRange::with_len(offset, len)?)?;
        Some((Some(bytes), len))
    }

    /// Takes the whole pages of `bytes` out of this process's page tables; they stay in the
    /// page cache.
    fn forget(&self, bytes: GuestBytes<'_>) {
        let base = self.map.as_ptr() as usize;
        let start = (bytes.as_ptr() as usize).saturating_sub(base);
        let end = start.saturating_add(bytes.len());
        let first = start.next_multiple_of(4096);
        let len = (end & !4095).saturating_sub(first);
        if len == 0 {
            return;
        }
        // SAFETY: the mapping is shared, read-only and of a file, so dropping its page-table
        // entries loses nothing: the next access maps the same bytes again.
        let _ = unsafe {
            self.map
                .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, len)
        };
    }

    /// The stretches of the file that hold data, by the file system; `None` if it cannot tell.
    pub(crate) fn data_stretches(&self) -> Option<&[FileRange]> {
        self.data
            .get_or_init(|| {
                let len = self.map.len() as u64;
                let mut found = Vec::new();
                let mut at = 0;
                while at < len {
                    let start = match seek(&self.file, SeekFrom::Data(at)) {
                        Ok(start) => start,
                        // No more data.
                        Err(Errno::NXIO) => break,
                        Err(_) => return None,
                    };
                    let end = seek(&self.file, SeekFrom::Hole(start)).ok()?;
                    if end <= start || found.len() >= MAX_FILE_EXTENTS {
                        return None;
                    }
                    let range = (FileOffset::new(start), FileOffset::new(end.min(len)));
                    found.push(FileRange::new(range.0, range.1));
                    at = end;
                }
                Some(found)
            })
            .as_deref()
    }
}

impl GuestMemory for MappedDump {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::with_len(at, buf.len() as u64).unwrap_or(GpaRange::new(at, at));
        let not_ram = || MemoryError::NotRam { range };
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (offset, len) = self.part(at, rest.len() as u64).ok_or_else(not_ram)?;
            let size = usize::try_from(len).map_err(|_| not_ram())?;
            let (now, later) = rest.split_at_mut_checked(size).ok_or_else(not_ram)?;
            match offset {
                None => now.fill(0),
                Some(offset) if size >= LONG_READ => self
                    .file
                    .read_exact_at(now, offset.raw())
                    .map_err(|source| MemoryError::Io { range, source })?,
                Some(offset) => {
                    let range = FileRange::with_len(offset, len).ok_or_else(not_ram)?;
                    let copied = self.bytes_in(range);
                    if !copied.is_some_and(|bytes| bytes.copy_to(now)) {
                        return Err(not_ram());
                    }
                }
            }
            rest = later;
            if !rest.is_empty() {
                at = at.checked_add(len).ok_or_else(not_ram)?;
            }
        }
        Ok(())
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let range = GpaRange::with_len(at, len as u64).unwrap_or(GpaRange::new(at, at));
        match self.piece(at, len as u64) {
            Some((Some(bytes), got)) if got == len as u64 => Ok(Some(Mapped::borrowed(bytes))),
            // Zeroes that are not in the file, or a stretch across extents.
            Some(_) if self.layout.contains(at, len as u64) => Ok(None),
            _ => Err(MemoryError::NotRam { range }),
        }
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        let first = self
            .extents
            .partition_point(|extent| extent.guest.end() <= at);
        let region = *self.layout.region_of(at)?;
        for extent in self.extents.get(first..)? {
            if extent.guest.start() >= region.end() {
                break;
            }
            let Some(offset) = extent.offset else {
                continue;
            };
            let from = extent.guest.start().max(at);
            let data = if self.extents_are_data {
                None
            } else {
                self.data_stretches()
            };
            let Some(data) = data else {
                return Some(GpaRange::new(from, extent.guest.end()));
            };
            let start = offset.checked_add(from.offset_from(extent.guest.start())?)?;
            let here = FileRange::new(start, offset.checked_add(extent.guest.len())?);
            let index = data.partition_point(|data| data.end() <= start);
            let data = data.get(index).map(|data| data.intersection(&here));
            if let Some(data) = data.filter(|data| !data.is_empty()) {
                let to_guest = |at: FileOffset| {
                    let inside = at.offset_from(offset)?;
                    extent.guest.start().checked_add(inside)
                };
                return Some(GpaRange::new(
                    to_guest(data.start())?,
                    to_guest(data.end())?,
                ));
            }
        }
        None
    }

    fn release(&self, range: GpaRange) {
        let mut rest = range;
        // Each piece is one extent's part, and none is empty, so this ends.
        while !rest.is_empty() {
            let Some((bytes, len)) = self.piece(rest.start(), rest.len()) else {
                return;
            };
            if let Some(bytes) = bytes {
                self.forget(bytes);
            }
            let Some(next) = rest.start().checked_add(len) else {
                return;
            };
            rest = GpaRange::new(next, rest.end());
        }
    }

    fn prefers_read(&self) -> bool {
        true
    }
}
