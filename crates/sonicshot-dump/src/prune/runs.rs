//! The ranges of a file that a plan drops.

use crate::DumpError;
use crate::backing::plain::PlainDump;
use sonicshot::{FileRange, PrunePlan};

/// The dropped ranges of a raw file; neighbours in the file are joined.
pub(crate) fn file_runs(dump: &PlainDump, plan: &PrunePlan) -> Result<Vec<FileRange>, DumpError> {
    let mut runs: Vec<FileRange> = Vec::new();
    for extent in dump.extents() {
        for dropped in plan.dropped_in(extent.guest) {
            let Some(offset) = dump.offset_in(extent, dropped.start())? else {
                continue;
            };
            let run = FileRange::with_len(offset, dropped.len()).ok_or_else(|| {
                let what = "a range beyond 64 bits";
                DumpError::malformed(dump.path(), what, offset, dropped.len())
            })?;
            run.append_to(&mut runs);
        }
    }
    Ok(runs)
}
