//! The memory in a checkpoint, and what its source did not have of it.

use sonicshot::checkpoint::{CheckpointReader, PageContent};
use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, P2m, RamLayout};
use std::fs::File;

/// A checkpoint's memory of which absent pages are absent. Read by itself they are zeroes, which
/// would be a guest's own in what is written of it.
pub(crate) struct Lacking<'a> {
    reader: &'a CheckpointReader<File>,
    /// Sorted, none of which touch.
    absent: Vec<GpaRange>,
}

impl<'a> Lacking<'a> {
    pub(crate) fn new(reader: &'a CheckpointReader<File>) -> Self {
        let page_size = reader.info().page_size;
        let runs = reader.runs();
        let runs = runs.filter(|run| run.content == PageContent::Absent);
        let mut absent: Vec<GpaRange> = Vec::new();
        for range in runs.filter_map(|run| run.frames.gpa_range(page_size)) {
            match absent.last_mut() {
                Some(last) if last.end() == range.start() => {
                    *last = GpaRange::new(last.start(), range.end());
                }
                _ => absent.push(range),
            }
        }
        Self { reader, absent }
    }

    /// The first that ends above `at`.
    fn absent_from(&self, at: Gpa) -> Option<GpaRange> {
        let before = self.absent.partition_point(|range| range.end() <= at);
        self.absent.get(before).copied()
    }
}

impl GuestMemory for Lacking<'_> {
    fn layout(&self) -> &RamLayout {
        self.reader.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let wanted = u64::try_from(buf.len()).ok();
        if let Some(wanted) = wanted.and_then(|len| GpaRange::with_len(at, len))
            && let Some(absent) = self.absent_from(at)
            && absent.start() < wanted.end()
        {
            return Err(MemoryError::Absent { range: wanted });
        }
        self.reader.read(at, buf)
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        self.reader.next_data(at)
    }

    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        let rest = self.layout().region_of(at);
        let rest = rest.map(|region| GpaRange::new(at, region.end()));
        let absent = rest.and_then(|rest| Some(self.absent_from(at)?.intersection(&rest)));
        Ok(absent.filter(|absent| !absent.is_empty()))
    }

    fn p2m(&self) -> Option<&P2m> {
        self.reader.p2m()
    }
}
