//! The guest's own records, of what was analysed.

use crate::analyze::Analyzed;
use crate::blobs::Beside;
use crate::checkpoint_file::CheckpointFile;
use crate::error::OfflineError;
use crate::options::OpenOptions;
use crate::place;
use crate::snapshot::Snapshot;
use sonicshot::Pfn;
use sonicshot_vmi::{GuestOs, PageFacts, VmiError, ZoneFree};

impl Snapshot {
    /// The kernel's records of one frame of `analyzed`, which was made of this snapshot, and
    /// which of them say that it is free.
    ///
    /// # Errors
    /// [`OfflineError::Guest`] if the records cannot be read.
    pub fn page_facts(&self, analyzed: &Analyzed, pfn: Pfn) -> Result<PageFacts, OfflineError> {
        let guest = place::open_guest(self, analyzed.dump())?;
        guest
            .page_facts(pfn)
            .map_err(OfflineError::guest(self.memory_file()))
    }

    /// The kernel's lists of free blocks, with the first `most` blocks of each, and the counters beside
    /// them.
    ///
    /// # Errors
    /// [`OfflineError::Guest`] if a list is none.
    pub fn free_lists(
        &self,
        analyzed: &Analyzed,
        most: usize,
    ) -> Result<Vec<ZoneFree>, OfflineError> {
        let guest = place::open_guest(self, analyzed.dump())?;
        guest
            .free_lists(most)
            .map_err(OfflineError::guest(self.memory_file()))
    }
}

impl CheckpointFile {
    /// Lets `look` see the guest in a checkpoint: one that has all that its kernel uses can be looked
    /// into as a dump can. Of `options` counts what is known of the guest. Pages that were left out
    /// read as what they are restored as, and what a process or a file had of them may be gone.
    ///
    /// # Errors
    /// [`OfflineError::Guest`] if the kernel is not found, or its records were left out or are on a
    /// disk that was not given.
    fn with_guest<T>(
        &self,
        options: &OpenOptions,
        look: impl FnOnce(&dyn GuestOs) -> Result<T, VmiError>,
    ) -> Result<T, OfflineError> {
        let vmcoreinfo = Beside::of_checkpoint(self.reader(), self.path())?.vmcoreinfo;
        let options = place::guest_options(options, vmcoreinfo.as_deref());
        let guest = sonicshot_vmi::open_guest(self.reader(), &options);
        let looked = guest.and_then(|guest| look(&*guest));
        self.check_unchanged()?;
        looked.map_err(OfflineError::guest(self.path()))
    }

    /// The kernel's records of one frame in the checkpoint, and which of them say that it is free.
    ///
    /// # Errors
    /// [`OfflineError::Guest`] if the kernel is not found or its records cannot be read.
    pub fn page_facts(&self, options: &OpenOptions, pfn: Pfn) -> Result<PageFacts, OfflineError> {
        self.with_guest(options, |guest| guest.page_facts(pfn))
    }

    /// The kernel's lists of free blocks in the checkpoint, with the first `most` blocks of each, and
    /// the counters beside them.
    ///
    /// # Errors
    /// [`OfflineError::Guest`] if the kernel is not found or a list is none.
    pub fn free_lists(
        &self,
        options: &OpenOptions,
        most: usize,
    ) -> Result<Vec<ZoneFree>, OfflineError> {
        self.with_guest(options, |guest| guest.free_lists(most))
    }
}
