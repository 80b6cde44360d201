//! The guest's own records, of what was analysed.

use crate::analyze::Analyzed;
use crate::error::OfflineError;
use crate::place;
use crate::snapshot::Snapshot;
use sonicshot::Pfn;
use sonicshot_vmi::{PageFacts, ZoneFree};

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
