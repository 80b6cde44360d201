//! Images of guests' disks, read as their guests read them.

mod chain;
mod marks;
mod qcow2;
mod raw;

use crate::error::DumpError;
use crate::in_use::check_not_written;
use chain::{Chain, Layer};
use sonicshot::FileStamp;
use sonicshot::checkpoint::{DiskHash, DiskInfo, DiskOffset, DiskRange, DiskSource};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

/// The image of a disk: a raw one, a block device, or a qcow2 image with those that it was written
/// over.
///
/// It is read and never mapped, and nothing of what a guest reads is kept.
pub struct DiskImage {
    chain: Chain,
    /// The image's own file.
    top: Layer,
}

impl fmt::Debug for DiskImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskImage")
            .field("top", &self.top)
            .field("below", &self.chain.below)
            .finish_non_exhaustive()
    }
}

impl DiskImage {
    /// Opens the image at `path`, and those below it. What the image says of these is followed: see
    /// [`files`](Self::files).
    ///
    /// # Errors
    /// [`DumpError::Io`] if one cannot be read, [`DumpError::NotRead`] if it is of a format that is not
    /// read, [`DumpError::Unsupported`] if it is encrypted, has its data elsewhere, or lies over what is
    /// no file, [`DumpError::Base`] if it lies over itself, [`DumpError::Malformed`] if it is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DumpError> {
        let (top, chain) = Chain::open(path.as_ref())?;
        Ok(Self { chain, top })
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        std::iter::once(&self.top).chain(&self.chain.below)
    }

    /// The files that it is in: its own, and those below it.
    #[must_use]
    pub fn files(&self) -> Vec<&File> {
        self.layers().map(|layer| &layer.file).collect()
    }

    /// Their paths.
    #[must_use]
    pub fn paths(&self) -> Vec<&Path> {
        self.layers().map(|layer| layer.path.as_path()).collect()
    }

    /// Whether it is a raw image or a block device, and not a qcow2 image.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.chain.is_raw
    }

    /// The image's own file, if that is its guest's disk byte for byte.
    pub(crate) fn raw_file(&self) -> Option<&File> {
        self.chain.is_raw.then_some(&self.top.file)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.top.path
    }

    /// Refuses an image of which a file was written to since it was opened.
    ///
    /// # Errors
    /// [`DumpError::Changed`] or [`DumpError::Modified`], or why that cannot be told.
    pub fn check_unchanged(&self) -> Result<(), DumpError> {
        self.layers().try_for_each(|layer| {
            let now = FileStamp::of(&layer.file);
            let now = now.map_err(DumpError::io("reading", &layer.path))?;
            DumpError::check_same(&layer.path, layer.stamp, now)
        })
    }

    /// Refuses an image of which a process has a file open for writing: it is not pinned.
    ///
    /// # Errors
    /// [`DumpError::InUse`]. Where that cannot be told, it is none.
    pub fn check_pinned(&self) -> Result<(), DumpError> {
        self.layers()
            .try_for_each(|layer| match check_not_written(&layer.path) {
                Err(DumpError::MayBeInUse { .. }) => Ok(()),
                checked => checked,
            })
    }

    /// The file systems of ext4 on it: the name that each was given when it was made (`s_uuid`), and where
    /// it begins.
    ///
    /// # Errors
    /// [`DumpError::Io`] if it cannot be read.
    pub fn ext4_file_systems(&self) -> Result<Vec<([u8; 16], DiskOffset)>, DumpError> {
        marks::file_systems(self).map_err(DumpError::io("reading", self.path()))
    }

    /// A checkpoint's facts about it, as the disk `name`: its length, and the file systems on it.
    ///
    /// # Errors
    /// [`DumpError::Io`] if it cannot be read; what is wrong with the name is told when it is
    /// written.
    pub fn info(&self, name: &str, hash: DiskHash) -> Result<DiskInfo, DumpError> {
        let reading = || DumpError::io("reading", self.path());
        let marks = marks::find(self).map_err(reading())?;
        let info = DiskInfo::of(name, self, hash, &marks);
        info.map_err(|error| reading()(io::Error::other(error)))
    }
}

impl DiskSource for DiskImage {
    fn disk_len(&self) -> io::Result<u64> {
        self.chain.disk.disk_len()
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        self.chain.disk.read_disk(buf, at)
    }

    fn next_disk_data(&self, at: DiskOffset) -> io::Result<Option<DiskRange>> {
        self.chain.disk.next_disk_data(at)
    }
}
