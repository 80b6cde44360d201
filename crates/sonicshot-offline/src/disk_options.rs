//! The images of the disks that a checkpoint has pages on.

use crate::error::OfflineError;
use sonicshot::checkpoint::{GivenDisk, MovedOn};
use sonicshot_dump::DiskImage;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Images, and the same as a reader of checkpoints takes them.
pub(crate) type Opened = (Vec<Arc<DiskImage>>, Vec<GivenDisk>);

/// Refuses an image that a process has open for writing.
pub(crate) fn pinned(image: &DiskImage) -> Result<(), OfflineError> {
    image
        .check_pinned()
        .map_err(|source| OfflineError::NotPinned { source })
}

/// The images of the disks that a checkpoint refers to.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RestoreDisks {
    /// The name of each, and its image.
    pub images: Vec<(String, PathBuf)>,
    /// Nobody writes to the images, neither a guest nor the host, for as long as a guest runs from
    /// the checkpoint: pages may be read of them when they are touched.
    pub immutable: bool,
    /// The treatment of a disk that was written to since the guest was saved.
    pub moved_on: MovedOn,
}

impl RestoreDisks {
    /// No disks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says whether nobody writes to the images: see [`immutable`](Self::immutable).
    #[must_use]
    pub fn immutable(mut self, they_are: bool) -> Self {
        self.immutable = they_are;
        self
    }

    /// Says what becomes of a disk that was written to since.
    #[must_use]
    pub fn moved_on(mut self, treatment: MovedOn) -> Self {
        self.moved_on = treatment;
        self
    }

    /// The disk `name` has its image at `path`.
    #[must_use]
    pub fn image(mut self, name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        self.images.push((name.into(), path.as_ref().to_owned()));
        self
    }

    /// Opens the images, for a reader of checkpoints.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if one cannot be opened, [`OfflineError::NotPinned`] if a process has
    /// it open for writing.
    pub fn open(&self) -> Result<Vec<GivenDisk>, OfflineError> {
        Ok(self.open_images()?.1)
    }

    pub(crate) fn open_images(&self) -> Result<Opened, OfflineError> {
        let mut images = Vec::new();
        let mut given = Vec::new();
        for (name, path) in &self.images {
            let image = Arc::new(DiskImage::open(path)?);
            if self.moved_on == MovedOn::Refuse {
                pinned(&image)?;
            }
            let disk = GivenDisk::new(name, Arc::clone(&image));
            given.push(if self.immutable {
                disk.immutable()
            } else {
                disk
            });
            images.push(image);
        }
        Ok((images, given))
    }
}
