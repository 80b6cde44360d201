//! Pages that the source does not have.

use sonicshot::{ClassCounts, Gpa, GuestMemory, MemoryError, PageClass, PageMap, PfnRange};

/// Gives the class [`PageClass::Absent`] to every page that `memory` does not have
/// ([`GuestMemory::next_absent`]), and returns how many there are of each class that they had.
///
/// # Errors
/// [`MemoryError`] if the source cannot tell.
pub fn mark_absent_pages(
    memory: &dyn GuestMemory,
    map: &mut PageMap,
) -> Result<ClassCounts, MemoryError> {
    let page_size = map.page_size();
    let mut was = ClassCounts::default();
    for region in memory.layout().regions() {
        let mut at: Gpa = region.start();
        while at < region.end() {
            let Some(absent) = memory.next_absent(at)? else {
                break;
            };
            // A page of which a part is missing cannot be read.
            let first = absent.start().pfn(page_size);
            let end = absent.end().raw().div_ceil(page_size.bytes());
            let frames = PfnRange::new(first, sonicshot::Pfn::new(end));
            for (run, class) in map.runs_in(frames) {
                if class != PageClass::Absent {
                    was.add(class, run.len());
                }
            }
            map.set(frames, PageClass::Absent);
            at = absent.end().max(at.checked_add(1).unwrap_or(region.end()));
        }
    }
    Ok(was)
}

#[cfg(test)]
mod tests {
    use super::mark_absent_pages;
    use sonicshot::{
        Gpa, GpaRange, GuestMemory, MemoryError, PageClass, PageMap, PageSize, Pfn, PfnRange,
        RamLayout,
    };

    /// Has no frame whose number ends in 7 or 8.
    struct Guest(RamLayout);

    fn is_absent(pfn: u64) -> bool {
        matches!(pfn % 10, 7 | 8)
    }

    impl GuestMemory for Guest {
        fn layout(&self) -> &RamLayout {
            &self.0
        }

        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            let range = GpaRange::with_len(at, buf.len() as u64).unwrap();
            Err(MemoryError::Absent { range })
        }

        fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
            let end = self.0.region_of(at).unwrap().end();
            let mut frames = (at.raw() / 4096..end.raw() / 4096).filter(|pfn| is_absent(*pfn));
            Ok(frames.next().map(|pfn| {
                let start = Gpa::new(pfn * 4096).max(at);
                GpaRange::new(start, Gpa::new((pfn + 1) * 4096))
            }))
        }
    }

    #[test]
    fn what_is_absent_has_that_class_and_was_something() {
        let range =
            |start: u64, end: u64| GpaRange::new(Gpa::new(start * 4096), Gpa::new(end * 4096));
        let layout = RamLayout::new(vec![range(0, 100), range(200, 208)]).unwrap();
        let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
        map.set(
            PfnRange::new(Pfn::new(0), Pfn::new(50)),
            PageClass::FreeBuddy,
        );
        let was = mark_absent_pages(&Guest(layout), &mut map).unwrap();
        assert_eq!(
            (was.get(PageClass::FreeBuddy), was.get(PageClass::Unknown)),
            (10, 11)
        );
        for pfn in map.ram().iter().flat_map(PfnRange::iter) {
            let absent = map.class(pfn) == Some(PageClass::Absent);
            assert_eq!(absent, is_absent(pfn.raw()), "{pfn}");
        }
    }
}
