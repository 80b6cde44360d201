//! The pages of a checkpoint that are on the guest's disks.

use super::reader::CheckpointReader;
use super::source::RangeSource;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::disk::given::{Disks, GivenDisk, MovedOn, check_run};
use crate::checkpoint::disk::source::DiskRange;
use crate::checkpoint::wire::disk::DiskRun;
use crate::checkpoint::wire::layout::size;
use crate::work::for_each_told;
use crate::{PageSize, Progress, Tally, WorkOptions, WorkPhase};
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The most that is read of a disk at once, in bytes,
const SPAN: u64 = 1 << 20;
/// and so many between two runs are read and not used.
const GAP: u64 = 32 << 10;

/// The run that was read last, for who reads page by page: its number, and its bytes in the guest's
/// order.
#[derive(Debug, Default)]
pub(crate) struct LastRun(Mutex<Option<(u64, Arc<[u8]>)>>);

/// Takes a run, by its number and its bytes in the guest's order.
pub(crate) type TakeRun<'a> = &'a mut dyn FnMut(u64, &[u8]) -> Result<(), CheckpointError>;

/// Runs that are read together.
pub(crate) struct Span {
    disk: u32,
    pub range: DiskRange,
    /// The runs, and the numbers of their records.
    pub runs: Vec<(u64, DiskRun)>,
}

impl<S: RangeSource> CheckpointReader<S> {
    /// Takes the disks that the checkpoint refers to ([`CheckpointInfo::disks`]). Nothing of them is
    /// read yet but what tells whether they are still what they were.
    ///
    /// [`CheckpointInfo::disks`]: crate::checkpoint::CheckpointInfo::disks
    ///
    /// # Errors
    /// [`CheckpointError::NoDisk`] if one is missing that pages are on,
    /// [`CheckpointError::UnknownDisk`], [`CheckpointError::DiskTwice`];
    /// [`CheckpointError::DiskLength`] and [`CheckpointError::DiskMovedOn`] of one that is another,
    /// or [`CheckpointError::DiskIo`] of one that cannot be read.
    pub fn with_disks(
        mut self,
        given: Vec<GivenDisk>,
        moved_on: MovedOn,
    ) -> Result<Self, CheckpointError> {
        self.disks = Disks::check(&self.header.info.disks, given, moved_on)?;
        self.last_run = LastRun::default();
        self.check_disks()?;
        Ok(self)
    }

    /// Whether all that the checkpoint has can be had: every disk that pages are on was given.
    ///
    /// # Errors
    /// [`CheckpointError::NoDisk`] of the first that was not.
    pub fn check_disks(&self) -> Result<(), CheckpointError> {
        for record in 0..self.index.disk_run_count() {
            let run = self.index.disk_run(record)?;
            self.disks.get(&self.index.disks, run.disk)?;
        }
        Ok(())
    }

    /// The number of runs of pages that are on disks.
    #[must_use]
    pub fn disk_run_count(&self) -> u64 {
        self.index.disk_run_count()
    }

    /// The run `record` of pages on a disk.
    ///
    /// # Errors
    /// [`CheckpointError::Corrupt`] if there is none.
    pub fn disk_run(&self, record: u64) -> Result<DiskRun, CheckpointError> {
        self.index.disk_run(record)
    }

    /// Whether pages may be read from the disks while a guest runs: each that was given was declared
    /// [immutable](GivenDisk::immutable), or there are no pages on disks.
    #[must_use]
    pub fn disks_are_immutable(&self) -> bool {
        (0..self.index.disk_run_count()).all(|record| {
            let run = self.index.disk_run(record);
            let given = run.and_then(|run| self.disks.get(&self.index.disks, run.disk));
            given.is_ok_and(GivenDisk::is_immutable)
        })
    }

    /// Fills `out` with the pages of the run `record`, in the guest's order; refused unless they are
    /// what they were.
    ///
    /// # Errors
    /// [`CheckpointError::NoDisk`], [`CheckpointError::DiskChanged`], or why they cannot be read.
    pub fn read_disk_run(&self, record: u64, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let run = self.index.disk_run(record)?;
        let page_size = self.header.info.page_size;
        self.disks
            .read_run(&self.index.disks, &run, page_size, out)?;
        if run.descending {
            reverse_pages(out, page_size);
        }
        Ok(())
    }

    /// The pages of the run `record`, in the guest's order, kept for the next who asks.
    pub(crate) fn last_disk_run(&self, record: u64) -> Result<Arc<[u8]>, CheckpointError> {
        let lock = || {
            self.last_run
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        if let Some((_, bytes)) = lock().as_ref().filter(|(kept, _)| *kept == record) {
            return Ok(Arc::clone(bytes));
        }
        let mut bytes = Vec::new();
        self.read_disk_run(record, &mut bytes)?;
        let bytes: Arc<[u8]> = bytes.into();
        *lock() = Some((record, Arc::clone(&bytes)));
        Ok(bytes)
    }

    /// Checks that every page that the checkpoint has on disks is still there. Returns how many.
    ///
    /// # Errors
    /// [`CheckpointError::NoDisk`], [`CheckpointError::DiskChanged`] of the first run that is not, or
    /// why a disk cannot be read.
    pub fn verify_disks(&self, options: &WorkOptions) -> Result<u64, CheckpointError>
    where
        S: Sync,
    {
        self.check_disks()?;
        let spans = self.disk_spans()?;
        let total = spans
            .iter()
            .map(|span| span.range.len())
            .sum::<Tally>()
            .get();
        let seen = AtomicU64::new(0);
        options.progress.begin(WorkPhase::CheckingDisks);
        for_each_told(
            options.thread_count(),
            &spans,
            |_| options.progress.tell(seen.load(Ordering::Relaxed), total),
            Vec::new,
            |buffer, span| {
                self.read_span(span, buffer, &mut |_, _| Ok(()))?;
                seen.fetch_add(span.range.len(), Ordering::Relaxed);
                Ok::<_, CheckpointError>(())
            },
        )?;
        options.progress.tell(total, total);
        let runs = spans.iter().flat_map(|span| &span.runs);
        Ok(runs.map(|(_, run)| run.pages.into()).sum::<Tally>().get())
    }

    /// All runs on disks, in the order of the disks, those together that are read together.
    pub(crate) fn disk_spans(&self) -> Result<Vec<Span>, CheckpointError> {
        let page_size = self.header.info.page_size;
        let records = 0..self.index.disk_run_count();
        let runs = records.map(|record| Ok((record, self.index.disk_run(record)?)));
        let mut runs = runs.collect::<Result<Vec<_>, CheckpointError>>()?;
        runs.sort_by_key(|(_, run)| (run.disk, run.at));
        let mut spans: Vec<Span> = Vec::new();
        for (record, run) in runs {
            // It was decoded, so it has a range. Without one its pages would be left as they are.
            let range = run.range(page_size).ok_or(CheckpointError::Worker)?;
            let joined = spans.last().and_then(|last| last.with(run.disk, range));
            match (joined, spans.last_mut()) {
                (Some(range), Some(last)) => {
                    last.range = range;
                    last.runs.push((record, run));
                }
                _ => spans.push(Span {
                    disk: run.disk,
                    range,
                    runs: vec![(record, run)],
                }),
            }
        }
        Ok(spans)
    }

    /// Reads all runs of a span at once, and hands out each, in the guest's order, once it was found
    /// to be what it was.
    pub(crate) fn read_span(
        &self,
        span: &Span,
        buffer: &mut Vec<u8>,
        each: TakeRun<'_>,
    ) -> Result<(), CheckpointError> {
        let page_size = self.header.info.page_size;
        // At most `SPAN`.
        buffer.resize(size(span.range.len()), 0);
        self.disks
            .read(&self.index.disks, span.disk, span.range.start(), buffer)?;
        let mut turned = Vec::new();
        for (record, run) in &span.runs {
            let bytes = span.bytes_of(run, buffer, page_size)?;
            check_run(&self.index.disks, run, bytes)?;
            if run.descending {
                turned.clear();
                turned.extend_from_slice(bytes);
                reverse_pages(&mut turned, page_size);
                each(*record, &turned)?;
            } else {
                each(*record, bytes)?;
            }
        }
        Ok(())
    }
}

impl Span {
    /// The range with `next` too, if both are read at once.
    fn with(&self, disk: u32, next: DiskRange) -> Option<DiskRange> {
        // A run that begins inside has no gap before it.
        let gap = next.start().offset_from(self.range.end());
        let end = next.end().max(self.range.end());
        let joined = DiskRange::new(self.range.start(), end);
        (disk == self.disk && gap.is_none_or(|gap| gap <= GAP) && joined.len() <= SPAN)
            .then_some(joined)
    }

    fn bytes_of<'b>(
        &self,
        run: &DiskRun,
        buffer: &'b [u8],
        page_size: PageSize,
    ) -> Result<&'b [u8], CheckpointError> {
        let start = run.at.offset_from(self.range.start()).map(size);
        let len = size(u64::from(run.pages) << page_size.shift());
        let bytes = start.and_then(|start| buffer.get(start..start.checked_add(len)?));
        bytes.ok_or(CheckpointError::Worker)
    }
}

/// Turns the order of pages around.
fn reverse_pages(bytes: &mut [u8], page_size: PageSize) {
    let page = size(page_size.bytes());
    let mut rest = bytes;
    while let Some((first, more)) = rest.split_at_mut_checked(page) {
        let Some((middle, last)) = more
            .len()
            .checked_sub(page)
            .and_then(|at| more.split_at_mut_checked(at))
        else {
            break;
        };
        first.swap_with_slice(last);
        rest = middle;
    }
}

#[cfg(test)]
mod tests {
    use super::reverse_pages;
    use crate::PageSize;

    #[test]
    fn pages_are_turned_around() {
        for count in 0..6_u8 {
            let page = |number: u8| [number; 4096];
            let mut bytes: Vec<u8> = (0..count).flat_map(page).collect();
            let turned: Vec<u8> = (0..count).rev().flat_map(page).collect();
            reverse_pages(&mut bytes, PageSize::SIZE_4K);
            assert!(bytes == turned, "{count}");
        }
    }
}
