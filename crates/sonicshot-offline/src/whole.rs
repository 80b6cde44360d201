//! A snapshot of which nothing is dropped, and what it lacks all the same.

use crate::error::OfflineError;
use crate::note::Note;
use sonicshot::{Disposition, Fill, GuestMemory, PageClass, PageMap, PageSize, PrunePlan, Tally};
use sonicshot_dump::Dump;
use sonicshot_vmi::mark_absent_pages;

/// A plan that drops nothing, and the map that it is of, in which what the source does not have is
/// absent.
pub(crate) fn keep_everything(
    memory: &dyn GuestMemory,
    page_size: PageSize,
) -> Result<(PageMap, PrunePlan), OfflineError> {
    let mut map = PageMap::new(memory.layout(), page_size);
    mark_absent_pages(memory, &mut map)?;
    let plan = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
    Ok((map, plan))
}

/// The bytes of memory that the source does not have.
pub(crate) fn absent_bytes(map: &PageMap) -> u64 {
    let pages = map.counts().get(PageClass::Absent);
    Tally::new(pages).times(map.page_size().bytes()).get()
}

/// The note on an output in which that is filled.
pub(crate) fn filled(dump: &Dump, map: &PageMap) -> Option<Note> {
    let bytes = absent_bytes(map);
    (bytes > 0).then(|| Note::AbsentFilled {
        bytes,
        why: dump.incomplete(),
    })
}

/// The note on an output that has a guest's pages, but not which frames of the machine they are.
pub(crate) fn without_p2m(memory: &dyn GuestMemory) -> Option<Note> {
    memory.p2m().map(|_| Note::WithoutP2m)
}
