//! Memory without a kernel: pages of zeroes alone.

use crate::analyze::Analyzed;
use crate::error::OfflineError;
use crate::snapshot::Snapshot;
use sonicshot::{Gpa, GuestMemory, PageClass};
use sonicshot_dump::{Dump, DumpFormat};
use sonicshot_vmi::Analysis;

/// How files begin that hold no memory: disk images and archives.
const FOREIGN: [&[u8]; 8] = [
    b"QFI\xfb",
    b"KDMV",
    b"vhdxfile",
    b"conectix",
    b"PK\x03\x04",
    b"<<< ",
    b"hsqs",
    b"%PDF",
];

impl OfflineError {
    /// Whether there is no kernel, or none that tells anything: what needs none can be done.
    #[must_use]
    pub fn is_of_the_kernel(&self) -> bool {
        matches!(self, Self::Guest { .. } | Self::NoLayout { .. })
    }
}

impl Snapshot {
    /// Tells the pages that hold only zeroes, without looking for a kernel. `None` where a dropped
    /// page may not read as zero: of a format of which nobody knows what it reads as, of a diff
    /// (or a raw file with holes, which may be one: they mean "as in the base"), and of a file
    /// that begins as no memory does.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if the file is damaged or none that is read.
    pub fn zero_pages(&self) -> Result<Option<Analyzed>, OfflineError> {
        let dump = self.dump(self.files().layout())?;
        let is_raw = self.options().format == Some(DumpFormat::RAW);
        if self.options().base.is_some() || !is_whole(&dump) || !is_raw && is_foreign(&dump) {
            return Ok(None);
        }
        let analysis = Analysis::of_zero_pages(&dump)?;
        let found = Analyzed::without_kernel(dump, self.files().clone(), analysis);
        Ok(found.can_go(PageClass::Zero).then_some(found))
    }
}

/// Whether what is taken for raw RAM begins as a file of another kind.
fn is_foreign(dump: &Dump) -> bool {
    if dump.layout_spec().is_none() {
        return false;
    }
    let mut start = [0; 8];
    let first = dump.layout().regions().first();
    let begins = first.is_some_and(|first| dump.read(first.start(), &mut start).is_ok());
    !begins || FOREIGN.iter().any(|magic| start.starts_with(magic))
}

/// Whether the file holds all of the memory; of other formats than raw RAM that is told by them.
fn is_whole(dump: &Dump) -> bool {
    if dump.layout_spec().is_none() {
        return true;
    }
    dump.layout().regions().iter().all(|region| {
        let mut at: Gpa = region.start();
        while at < region.end() {
            match dump.next_data(at) {
                Some(data) if data.start() <= at && data.end() > at => at = data.end(),
                _ => return false,
            }
        }
        true
    })
}
