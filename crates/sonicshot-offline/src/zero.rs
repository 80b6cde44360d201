//! Memory without a kernel: pages of zeroes alone.

use crate::analyze::Analyzed;
use crate::error::OfflineError;
use crate::snapshot::Snapshot;
use sonicshot::{Fill, Gpa, GuestMemory};
use sonicshot_dump::{Dump, DumpError, LayoutSpec};
use sonicshot_vmi::Analysis;

impl OfflineError {
    /// Whether there is no kernel, or none that tells anything: what needs none can be done.
    #[must_use]
    pub fn is_of_the_kernel(&self) -> bool {
        matches!(
            self,
            Self::Guest { .. } | Self::NoLayout { .. } | Self::ManyBlocks { .. }
        )
    }
}

impl Snapshot {
    /// Tells the pages that hold only zeroes, without looking for a kernel: in every format in which
    /// a page that is dropped reads as zero, whatever lies beneath. A diff needs its base for that
    /// ([`OpenOptions::base`](crate::OpenOptions::base)), for by itself what it does not hold is as in
    /// the base; a raw file with holes may be one.
    ///
    /// # Errors
    /// [`OfflineError::MayBeDiff`] if it may be a diff without its base,
    /// [`OfflineError::ZeroesKept`] if nobody knows what a dropped page reads as,
    /// [`OfflineError::Dump`] if the file is damaged or none that is read.
    pub fn zero_pages(&self) -> Result<Analyzed, OfflineError> {
        let dump = match self.dump(self.files().layout()) {
            // Where a zero lies does not matter.
            Err(error @ DumpError::NoLayout { .. }) => {
                let mut layouts = LayoutSpec::KNOWN.iter();
                let dump = layouts.find_map(|layout| self.dump(Some(layout)).ok());
                dump.ok_or(error)?
            }
            dump => dump?,
        };
        let path = || self.memory_file().to_owned();
        if self.options().base.is_none()
            && let Some(at) = first_hole(&dump)
        {
            return Err(OfflineError::MayBeDiff { path: path(), at });
        }
        let format = dump.format();
        let analysis = Analysis::of_zero_pages(&dump)?;
        let found = Analyzed::without_kernel(dump, self.files().clone(), analysis);
        match found.dump().restores(Fill::Zero) {
            true => Ok(found),
            false => Err(OfflineError::ZeroesKept {
                path: path(),
                format,
            }),
        }
    }
}

/// The first page that a raw file does not hold; of other formats that is told by them.
fn first_hole(dump: &Dump) -> Option<Gpa> {
    dump.layout_spec()?;
    dump.layout().regions().iter().find_map(|region| {
        let mut at: Gpa = region.start();
        while at < region.end() {
            match dump.next_data(at) {
                Some(data) if data.start() <= at && data.end() > at => at = data.end(),
                _ => return Some(at),
            }
        }
        None
    })
}
