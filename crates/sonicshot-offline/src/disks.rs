//! The guest's disks: what of its memory is on them when it is saved, and where it is to be had when
//! it is restored.

use crate::checkpoint_file::CheckpointFile;
use crate::disk_options::{RestoreDisks, pinned};
use crate::error::OfflineError;
use crate::save::CheckpointOptions;
use sonicshot::checkpoint::{DiskFinder, DiskGuesses, DiskInfo, DiskSource};
use sonicshot::{PageMap, Progress, PrunePlan};
use sonicshot_dump::Dump;

/// The disks of a guest that is saved.
pub(crate) struct SaveDisks<'a> {
    pub infos: Vec<DiskInfo>,
    pub sources: Vec<&'a dyn DiskSource>,
    pub guesses: DiskGuesses,
}

impl<'a> SaveDisks<'a> {
    /// Looks for what `plan` keeps on the disks that the options name.
    pub(crate) fn find(
        dump: &Dump,
        map: &PageMap,
        plan: &PrunePlan,
        options: &'a CheckpointOptions,
        progress: Progress<'_>,
    ) -> Result<Self, OfflineError> {
        let mut found = Self {
            infos: Vec::new(),
            sources: Vec::new(),
            guesses: DiskGuesses::default(),
        };
        for (name, disk) in options.disks() {
            pinned(disk)?;
            found.infos.push(disk.info(name, options.disk_hash)?);
            found.sources.push(disk);
        }
        if found.infos.is_empty() {
            return Ok(found);
        }
        let threads = options.writing.threads;
        let failed = OfflineError::disks();
        let finder = DiskFinder::new(dump, map, plan, DiskFinder::LIKELY, threads);
        let finder = finder.map_err(&failed)?;
        let guesses = finder.stream(&found.infos, &found.sources, threads, progress);
        found.guesses = guesses.map_err(&failed)?;
        Ok(found)
    }
}

impl CheckpointFile {
    /// Takes the images of the disks that the checkpoint refers to. It is checked that they are those,
    /// and that they were not written to since; what is read of them later is checked when it is.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if an image cannot be opened, [`OfflineError::NotPinned`] if a process has
    /// it open for writing, [`OfflineError::Checkpoint`] if one is missing, or is not what it was.
    pub fn with_disks(self, disks: &RestoreDisks) -> Result<Self, OfflineError> {
        let (images, given) = disks.open_images()?;
        self.map_reader(images, |reader| reader.with_disks(given, disks.moved_on))
    }

    /// Checks that every page that is on a disk is still there. Returns how many there are.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] with the first that is not.
    pub fn verify_disks(&self, progress: Progress<'_>) -> Result<u64, OfflineError> {
        let checked = self.reader().verify_disks(progress);
        self.blamed(checked.map_err(OfflineError::checkpoint(self.path())))
    }
}
