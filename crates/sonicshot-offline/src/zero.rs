//! Memory without a kernel: pages of zeroes alone.

use crate::analyze::Analyzed;
use crate::error::OfflineError;
use crate::snapshot::Snapshot;
use sonicshot::Fill;
use sonicshot_dump::{DumpError, LayoutSpec, first_hole, has_zeroes_to_punch};
use sonicshot_vmi::Analysis;

impl OfflineError {
    /// Whether there is no kernel, or none that tells anything: what needs none can be done.
    #[must_use]
    pub fn is_of_the_kernel(&self) -> bool {
        matches!(
            self,
            Self::Guest { .. }
                | Self::CutOff { .. }
                | Self::NoLayout { .. }
                | Self::ManyBlocks { .. }
        )
    }
}

impl Snapshot {
    /// Tells the pages that hold only zeroes, without looking for a kernel: in every format in which
    /// a page that is dropped reads as zero, whatever lies beneath. A diff needs its base for that
    /// ([`OpenOptions::base`](crate::OpenOptions::base)), for by itself what it does not hold is as in
    /// the base; a raw file with holes may be one. Of that nothing goes, and if there are zeroes to be
    /// made holes it is refused: where a prune in place has made them there are none. A diff that came
    /// through a pipe or was compressed is not told from whole memory: it lost its holes on the way.
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
        let hole = self.hole_in_pipe(&dump).or_else(|| first_hole(&dump));
        let format = dump.format();
        let analysis = Analysis::of_zero_pages(&dump, &self.work())?;
        if let Some(at) = hole {
            // If nothing is left to be made a hole, nobody is harmed by saying so.
            let is_done = matches!(has_zeroes_to_punch(&dump, &analysis), Ok(false));
            if !is_done {
                return Err(OfflineError::MayBeDiff { path: path(), at });
            }
        }
        let found = Analyzed::without_kernel(dump, self.files().clone(), analysis, hole.is_some());
        match found.dump().restores(Fill::Zero) {
            true => Ok(found),
            false => Err(OfflineError::ZeroesKept {
                path: path(),
                format,
            }),
        }
    }
}
