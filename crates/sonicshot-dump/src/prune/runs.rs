//! Which stretches of a file a plan drops.

use crate::DumpError;
use crate::backing::mapped::MappedDump;
use crate::prune::holes::Run;
use sonicshot::PrunePlan;

/// The dropped stretches of a raw file; neighbours in the file are joined.
pub(crate) fn file_runs(dump: &MappedDump, plan: &PrunePlan) -> Result<Vec<Run>, DumpError> {
    let mut runs: Vec<Run> = Vec::new();
    for extent in dump.extents() {
        for dropped in plan.dropped_in(extent.guest) {
            let Some(offset) = dump.offset_in(extent, dropped.start())? else {
                continue;
            };
            match runs.last_mut() {
                Some((last, len)) if last.checked_add(*len) == Some(offset) => {
                    *len = len.saturating_add(dropped.len());
                }
                _ => runs.push((offset, dropped.len())),
            }
        }
    }
    Ok(runs)
}
