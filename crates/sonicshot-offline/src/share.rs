//! A snapshot's memory that shares blocks with the images of its guest's disks.

use crate::disk_options::pinned;
use crate::error::OfflineError;
use crate::snapshot::Snapshot;
use sonicshot_dump::{DiskImage, Dump, DumpError, LayoutSpec, NewFolder, ShareOptions, ShareStats};
use std::path::{Path, PathBuf};

impl Snapshot {
    /// Lets the memory file share the blocks of the images that hold the same. Not a byte of it changes,
    /// whatever interrupts it. No kernel is looked for: the bytes decide, whoever's they are.
    ///
    /// # Errors
    /// [`OfflineError::Dump`]: its pages do not lie in it as they are, its file system cannot, an image is
    /// on another, a process has the file open for writing, or it was changed;
    /// [`OfflineError::NotPinned`] if a process has an image open for writing.
    pub fn share_in_place(
        &self,
        images: &[PathBuf],
        options: &ShareOptions,
    ) -> Result<ShareStats, OfflineError> {
        let images = opened(images)?;
        let dump = self.dump_to_share()?;
        let shared = dump.share_in_place(&images, options);
        shared.map_err(|error| self.blame(error.into()))
    }

    /// Writes a copy that shares the blocks of the images that hold the same; of a folder a folder. It
    /// appears whole or not at all.
    ///
    /// # Errors
    /// As [`share_in_place`](Self::share_in_place), or the output exists.
    pub fn share_to(
        &self,
        out: impl AsRef<Path>,
        images: &[PathBuf],
        options: &ShareOptions,
    ) -> Result<ShareStats, OfflineError> {
        let images = opened(images)?;
        let dump = self.dump_to_share()?;
        if self.files().folder().is_none() {
            return Ok(dump.share_to(out.as_ref(), &images, options)?);
        }
        let folder = NewFolder::create(out.as_ref(), options.overwrite, self.files())?;
        let stats = folder.share_memory(&dump, &images, options)?;
        folder.finish()?;
        Ok(stats)
    }

    /// It does not matter where the memory lies in the guest.
    fn dump_to_share(&self) -> Result<Dump, OfflineError> {
        let known = self.options().layout.as_ref();
        Ok(match self.dump(known) {
            Err(DumpError::NoLayout { .. }) if known.is_none() => {
                self.dump(Some(&LayoutSpec::Flat))
            }
            dump => dump,
        }?)
    }
}

fn opened(images: &[PathBuf]) -> Result<Vec<DiskImage>, OfflineError> {
    let open = |path: &PathBuf| {
        let image = DiskImage::open(path)?;
        pinned(&image)?;
        Ok(image)
    };
    images.iter().map(open).collect()
}
