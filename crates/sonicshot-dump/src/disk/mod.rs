//! Images of guests' disks, read as their guests read them.

mod marks;
mod raw;

use crate::error::DumpError;
use crate::in_use::check_not_written;
use raw::RawDisk;
use sonicshot::FileStamp;
use sonicshot::checkpoint::{DiskHash, DiskInfo, DiskOffset, DiskRange, DiskSource};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The image of a disk: a raw one, or a block device.
///
/// It is read and never mapped, and nothing of it is kept.
#[derive(Debug)]
pub struct DiskImage {
    raw: RawDisk,
    path: PathBuf,
    /// What the file was when it was opened.
    stamp: FileStamp,
}

/// What an image begins with that is not its guest's disk itself.
const OTHERS: [(&[u8], &str); 6] = [
    (b"QFI\xfb", "a qcow2 image"),
    (b"QED\0", "a QED image"),
    (b"KDMV", "a VMDK image"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"<<< ", "a VDI image"),
];

impl DiskImage {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// [`DumpError::Io`] if it cannot be read, [`DumpError::NotRead`] if it is of a format that is
    /// not read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DumpError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(DumpError::io("opening", path))?;
        let reading = || DumpError::io("reading", path);
        let stamp = FileStamp::of(&file).map_err(reading())?;
        let raw = RawDisk::new(file).map_err(reading())?;
        let mut start = [0; 8];
        if stamp.len() >= 8 {
            raw.read_disk(&mut start, DiskOffset::ZERO)
                .map_err(reading())?;
        }
        if let Some((_, kind)) = OTHERS.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(DumpError::NotRead {
                path: path.to_owned(),
                kind,
                instead: "pages are found on disks as their guests see them: make a raw image of it \
                          (`qemu-img convert -O raw`), or a block device (`qemu-nbd -r -c`)",
            });
        }
        Ok(Self {
            raw,
            path: path.to_owned(),
            stamp,
        })
    }

    /// The files that it is in.
    #[must_use]
    pub fn files(&self) -> Vec<&File> {
        vec![self.raw.file()]
    }

    /// The image's own file.
    pub(crate) fn file(&self) -> &File {
        self.raw.file()
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses an image that was written to since it was opened.
    ///
    /// # Errors
    /// [`DumpError::Changed`] or [`DumpError::Modified`], or why that cannot be told.
    pub fn check_unchanged(&self) -> Result<(), DumpError> {
        let now = FileStamp::of(self.raw.file());
        let now = now.map_err(DumpError::io("reading", &self.path))?;
        DumpError::check_same(&self.path, self.stamp, now)
    }

    /// Refuses an image that a process has open for writing: it is not pinned.
    ///
    /// # Errors
    /// [`DumpError::InUse`]. Where that cannot be told, it is none.
    pub fn check_pinned(&self) -> Result<(), DumpError> {
        match check_not_written(&self.path) {
            Err(DumpError::MayBeInUse { .. }) => Ok(()),
            checked => checked,
        }
    }

    /// What a checkpoint says of it, as the disk `name`: its length, and the file systems on it.
    ///
    /// # Errors
    /// [`DumpError::Io`] if it cannot be read; what is wrong with the name is told when it is written.
    pub fn info(&self, name: &str, hash: DiskHash) -> Result<DiskInfo, DumpError> {
        let reading = || DumpError::io("reading", &self.path);
        let marks = marks::find(self).map_err(reading())?;
        let info = DiskInfo::of(name, self, hash, &marks);
        info.map_err(|error| reading()(io::Error::other(error)))
    }
}

impl DiskSource for DiskImage {
    fn disk_len(&self) -> io::Result<u64> {
        self.raw.disk_len()
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        self.raw.read_disk(buf, at)
    }

    fn next_disk_data(&self, at: DiskOffset) -> io::Result<Option<DiskRange>> {
        self.raw.next_disk_data(at)
    }
}
