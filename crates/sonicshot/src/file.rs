//! Files, as all of the crates see them: which one a file is, where something is in it, and how one
//! is written with holes.

use crate::GuestBytes;
use crate::to_u64;
use core::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

crate::address::number! {
    /// A place in a file, in bytes from its beginning.
    FileOffset, "offset"
}

crate::address::half_open_range! {
    /// A half-open range of places in a file.
    ///
    /// ```
    /// use sonicshot::{FileOffset, FileRange};
    /// let range = FileRange::with_len(FileOffset::new(0x1000), 0x200).unwrap();
    /// assert_eq!((range.end(), range.len()), (FileOffset::new(0x1200), 0x200));
    /// assert_eq!(FileRange::with_len(FileOffset::new(u64::MAX), 1), None);
    /// ```
    FileRange of FileOffset, "bytes"
}

impl FileOffset {
    /// The beginning of a file.
    pub const ZERO: Self = Self(0);

    /// The place `bytes` further on, unless that wraps.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The distance of `self` behind `base`, unless it is before.
    #[must_use]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }

    /// The first multiple of `align` (not 0) from here on, unless that is beyond 64 bits.
    #[must_use]
    pub const fn checked_align_up(self, align: u64) -> Option<Self> {
        match self.0.checked_next_multiple_of(align) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }
}

impl FileRange {
    /// The ranges of `len` bytes (not 0) that make up the range, the first at its beginning; the
    /// last is what is left.
    ///
    /// ```
    /// use sonicshot::{FileOffset, FileRange};
    /// let range = FileRange::new(FileOffset::new(1), FileOffset::new(10));
    /// let ends: Vec<u64> = range.pieces(4).map(|piece| piece.end().raw()).collect();
    /// assert_eq!(ends, [5, 9, 10]);
    /// ```
    pub fn pieces(self, len: u64) -> impl Iterator<Item = Self> + use<> {
        let mut rest = self;
        std::iter::from_fn(move || {
            let piece = rest.start().checked_add(len);
            let end = piece.map_or(rest.end(), |end| end.min(rest.end()));
            let piece = Self::new(rest.start(), end);
            rest = Self::new(end, rest.end());
            (!piece.is_empty()).then_some(piece)
        })
    }
}

impl fmt::LowerHex for FileOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// The identity of a file, whatever name it was opened by: its device, and its number there.
///
/// Only of a file that is open or has a name is it certain: the number of one that is gone is given
/// to another.
///
/// ```
/// use sonicshot::FileId;
/// let file = tempfile::NamedTempFile::new()?;
/// assert_eq!(FileId::of(file.as_file())?, FileId::of_path(file.path())?);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The file with this number on this device, as `stat` gives both.
    #[must_use]
    pub const fn new(device: u64, inode: u64) -> Self {
        Self { device, inode }
    }

    /// The identity of an open file.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(|metadata| Self::from(&metadata))
    }

    /// The identity of the file with the name `path`; a symbolic link is followed.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|metadata| Self::from(&metadata))
    }

    /// The device (`st_dev`).
    #[must_use]
    pub const fn device(self) -> u64 {
        self.device
    }

    /// The number on the device (`st_ino`).
    #[must_use]
    pub const fn inode(self) -> u64 {
        self.inode
    }
}

/// The length of a file and the time when it was last written to: they tell whether it has changed
/// since.
///
/// A process that may write the file may also set that time back; what is read is then theirs, as the
/// file is.
///
/// ```
/// use sonicshot::FileStamp;
/// let file = tempfile::NamedTempFile::new()?;
/// let before = FileStamp::of(file.as_file())?;
/// file.as_file().set_len(7)?;
/// let now = FileStamp::of(file.as_file())?;
/// assert_eq!((before.len(), now.len()), (0, 7));
/// assert_ne!(before, now);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    id: FileId,
    len: u64,
    written: (i64, i64),
}

impl FileStamp {
    /// The stamp of an open file or block device.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let mut stamp = Self::from(&metadata);
        if metadata.file_type().is_block_device() {
            // Its length is nowhere else. Where this leaves the file does not count: whoever reads
            // it says where from.
            let mut device = file;
            stamp.len = device.seek(SeekFrom::End(0))?;
        }
        Ok(stamp)
    }

    /// The stamp of the file with the name `path`; a symbolic link is followed.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path).map(|metadata| Self::from(&metadata))
    }

    /// The length in bytes.
    #[must_use]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// Whether there were no bytes.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The file's identity.
    #[must_use]
    pub const fn id(self) -> FileId {
        self.id
    }
}

impl From<&Metadata> for FileStamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            id: FileId::from(metadata),
            len: metadata.len(),
            written: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl From<&Metadata> for FileId {
    fn from(metadata: &Metadata) -> Self {
        Self::new(metadata.dev(), metadata.ino())
    }
}

/// The block in which holes are made: the block of most file systems, and of all of them a part or
/// a multiple.
const BLOCK: usize = 4096;

/// Writes those blocks (of 4 KiB, as they lie in the file) of `bytes` that are not all zero to
/// their place from `at`. A file that reads as zero there reads as `bytes` then, with holes where
/// that is zero; its length is only as far as it was written.
///
/// # Errors
/// The operating system's error; also if the bytes would end beyond 64 bits.
pub fn write_sparse_at(file: &File, bytes: &[u8], at: FileOffset) -> io::Result<()> {
    let at = at.raw();
    let len = u64::try_from(bytes.len()).map_err(io::Error::other)?;
    if at.checked_add(len).is_none() {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    const IN_BLOCK: u64 = to_u64(BLOCK) - 1;
    let into = usize::try_from(at & IN_BLOCK).map_err(io::Error::other)?;
    let (head, body) = BLOCK
        .checked_sub(into)
        .and_then(|left| bytes.split_at_checked(left))
        .filter(|_| into != 0)
        .unwrap_or(if into == 0 {
            (&[], bytes)
        } else {
            (bytes, &[])
        });
    let blocks = [head].into_iter().filter(|head| !head.is_empty());
    let mut run = 0_usize..0;
    let write = |run: core::ops::Range<usize>| match bytes.get(run.clone()) {
        Some([]) | None => Ok(()),
        Some(used) => {
            let at = at.checked_add(to_u64(run.start));
            file.write_all_at(used, at.ok_or(io::ErrorKind::FileTooLarge)?)
        }
    };
    for part in blocks.chain(body.chunks(BLOCK)) {
        let end = run.end.checked_add(part.len());
        let end = end.ok_or(io::ErrorKind::FileTooLarge)?;
        if GuestBytes::from_slice(part).is_zero() {
            write(run)?;
            run = end..end;
        } else {
            run.end = end;
        }
    }
    write(run)
}

/// A writer that fills a file front to back, with holes where it is zero.
///
/// ```
/// use sonicshot::file::SparseWriter;
/// use std::io::Write;
/// let file = tempfile::tempfile()?;
/// let mut out = SparseWriter::new(&file);
/// out.write_all(&[1; 4096])?;
/// out.write_all(&[0; 1 << 20])?;
/// assert_eq!(out.finish()?.raw(), 4096 + (1 << 20));
/// assert_eq!(file.metadata()?.len(), 4096 + (1 << 20));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct SparseWriter<'a> {
    file: &'a File,
    at: FileOffset,
    /// The bytes that come at `at`.
    pending: Vec<u8>,
    /// The end of those bytes.
    end: FileOffset,
}

impl<'a> SparseWriter<'a> {
    /// The amount that is written at once.
    const PIECE: usize = 1 << 20;

    /// Writes `file`, which is empty, from its beginning.
    #[must_use]
    pub const fn new(file: &'a File) -> Self {
        Self {
            file,
            at: FileOffset::ZERO,
            pending: Vec::new(),
            end: FileOffset::ZERO,
        }
    }

    /// The offset of the next byte.
    #[must_use]
    pub const fn position(&self) -> FileOffset {
        self.end
    }

    /// Writes what is left, and gives the file its length, which it returns.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn finish(mut self) -> io::Result<FileOffset> {
        self.write_pending()?;
        self.file.set_len(self.at.raw())?;
        Ok(self.at)
    }

    fn write_pending(&mut self) -> io::Result<()> {
        write_sparse_at(self.file, &self.pending, self.at)?;
        self.at = self.end;
        self.pending.clear();
        Ok(())
    }
}

impl io::Write for SparseWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = Self::PIECE.checked_sub(self.pending.len());
        let room = room.ok_or(io::ErrorKind::FileTooLarge)?;
        let (now, _) = bytes.split_at(room.min(bytes.len()));
        let end = self.end.checked_add(to_u64(now.len()));
        self.end = end.ok_or(io::ErrorKind::FileTooLarge)?;
        self.pending.extend_from_slice(now);
        if self.pending.len() >= Self::PIECE {
            self.write_pending()?;
        }
        Ok(now.len())
    }

    /// Writes what is there. The file gets its length only at the [end](SparseWriter::finish).
    fn flush(&mut self) -> io::Result<()> {
        self.write_pending()
    }
}

/// Opens what is to be read at any place: a regular file or a block device.
///
/// # Errors
/// Those of the system; of anything else [`io::ErrorKind::InvalidInput`], at once: to open a pipe that
/// nobody writes to would take for ever.
pub fn open_file(path: &Path) -> io::Result<File> {
    let is = std::fs::metadata(path)?.file_type();
    let why = if is.is_file() || is.is_block_device() {
        return File::open(path);
    } else if is.is_dir() {
        "it is a folder"
    } else if is.is_fifo() {
        "it is a pipe, and neither a regular file nor a block device: what comes through a pipe is given \
         as `-`, where that is possible"
    } else {
        "it is neither a regular file nor a block device"
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

#[cfg(test)]
mod tests {
    use super::{FileId, FileOffset, SparseWriter, open_file, write_sparse_at};
    use proptest::prelude::*;
    use std::fs::{self, File};
    use std::io::{Read, Seek, Write};

    fn content(mut file: &File) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        open_file(&at("file")).unwrap();
        open_file(&at("link")).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(at("pipe"))
            .status();
        assert!(made.unwrap().success());
        for (path, what) in [
            (at("pipe"), "it is a pipe"),
            (folder.path().to_owned(), "a folder"),
            ("/dev/null".into(), "nor a block device"),
        ] {
            let error = open_file(&path).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains(what), "{error}");
        }
        assert_eq!(
            open_file(&at("none")).unwrap_err().kind(),
            std::io::ErrorKind::NotFound
        );
    }

    #[test]
    fn a_file_is_the_same_by_each_of_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two, link, other] = ["a", "b", "c", "d"].map(|name| folder.path().join(name));
        fs::write(&one, "1").unwrap();
        fs::write(&other, "1").unwrap();
        fs::hard_link(&one, &two).unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let id = FileId::of_path(&one).unwrap();
        assert_eq!(FileId::of_path(&two).unwrap(), id);
        assert_eq!(FileId::of_path(&link).unwrap(), id);
        assert_eq!(FileId::of(&File::open(&two).unwrap()).unwrap(), id);
        assert_ne!(FileId::of_path(&other).unwrap(), id);
        assert!(FileId::of_path(&folder.path().join("e")).is_err());
    }

    #[test]
    fn zero_takes_no_room() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        let mut out = SparseWriter::new(&file);
        out.write_all(&vec![0; 8 << 20]).unwrap();
        out.write_all(&[7; 4096]).unwrap();
        out.write_all(&vec![0; 8 << 20]).unwrap();
        assert_eq!(out.finish().unwrap().raw(), (16 << 20) + 4096);
        assert_eq!(file.metadata().unwrap().len(), (16 << 20) + 4096);
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn bytes_beyond_64_bits_are_refused() {
        let file = tempfile::tempfile().unwrap();
        assert!(write_sparse_at(&file, &[0; 8], FileOffset::new(u64::MAX - 7)).is_err());
    }

    proptest! {
        #[test]
        fn a_sparse_file_reads_as_what_was_written(
            parts in proptest::collection::vec((0_usize..20_000, any::<bool>()), 0..8),
            at in 0_u64..10_000,
        ) {
            let mut whole = Vec::new();
            for (len, zero) in &parts {
                whole.resize(whole.len() + len, if *zero { 0 } else { 0x5a });
            }
            let file = tempfile::tempfile().unwrap();
            file.set_len(at + whole.len() as u64).unwrap();
            write_sparse_at(&file, &whole, FileOffset::new(at)).unwrap();
            let mut expected = vec![0; usize::try_from(at).unwrap()];
            expected.extend(&whole);
            prop_assert_eq!(content(&file), expected);

            let file = tempfile::tempfile().unwrap();
            let mut out = SparseWriter::new(&file);
            let mut start = 0;
            for (number, (len, _)) in parts.iter().enumerate() {
                out.write_all(&whole[start..start + len]).unwrap();
                start += len;
                if number.is_multiple_of(2) {
                    out.flush().unwrap();
                }
            }
            prop_assert_eq!(out.finish().unwrap().raw(), whole.len() as u64);
            prop_assert_eq!(content(&file), whole);
        }
    }
}
