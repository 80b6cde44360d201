//! Puts a checkpoint's pages where the guest expects them, all of them at once.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::read::chunk::{ChunkDecoder, check_chunk};
use crate::checkpoint::read::disks::Span;
use crate::checkpoint::read::reader::CheckpointReader;
use crate::checkpoint::read::source::RangeSource;
use crate::checkpoint::wire::frames::{copy_exact, fill_words, ram_in, ram_of, range_of, slice_of};
use crate::checkpoint::wire::index::{ChunkInfo, Index, clip};
use crate::checkpoint::wire::info::{CheckpointInfo, PageContent, PageRun};
use crate::checkpoint::wire::layout::{behind, checksum, plus, size};
use crate::memory::ram;
use crate::to_u64;
use crate::work::for_each_told;
use crate::{
    Gpa, GpaRange, LayoutError, MemoryError, PfnRange, Progress, RamLayout, Stop, Tally, WorkPhase,
};
use core::hash::Hasher;
use core::marker::PhantomData;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};
use std::fmt;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use twox_hash::XxHash3_64;

/// The target of restored pages: a VMM's memory, a file.
///
/// Threads fill different ranges at once.
pub trait RestoreTarget: Sync {
    /// The ranges that have room; at least the RAM of the checkpoint.
    fn layout(&self) -> &RamLayout;

    /// Whether all of it reads as zero, so that pages of zeroes need not be touched.
    fn reads_as_zero(&self) -> bool;

    /// Lets `fill` write the bytes of `range`, which lies in one region: all of them at once. If it
    /// fails, the range may hold anything.
    ///
    /// # Errors
    /// The error of `fill`, or why the target cannot take it.
    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError>;
}

/// Writes the bytes of a range of guest memory.
pub type FillWith<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<(), CheckpointError>;

/// The content of a target before a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Before {
    /// Zeroes: fresh anonymous memory, a new memfd. Pages of zeroes are not touched, and take
    /// no memory.
    Zeroes,
    /// Anything: every page is written.
    Anything,
}

/// A VMM's regions, to be filled.
///
/// ```
/// use sonicshot::checkpoint::{Before, RestoreRegions};
/// use sonicshot::Gpa;
/// let mut low = vec![0; 1 << 20];
/// let target = RestoreRegions::new(vec![(Gpa::ZERO, low.as_mut_slice())], Before::Zeroes)?;
/// # Ok::<(), sonicshot::LayoutError>(())
/// ```
pub struct RestoreRegions<'a> {
    layout: RamLayout,
    regions: Vec<(GpaRange, NonNull<u8>)>,
    before: Before,
    /// The ranges that are being filled.
    busy: Mutex<Vec<GpaRange>>,
    owner: PhantomData<&'a mut [u8]>,
}

// SAFETY: the regions are borrowed exclusively for `'a` (or promised so), and `fill` hands out
// no byte twice at the same time, whatever threads call it.
unsafe impl Send for RestoreRegions<'_> {}
// SAFETY: as above.
unsafe impl Sync for RestoreRegions<'_> {}

impl<'a> RestoreRegions<'a> {
    /// The regions, each with its guest-physical address.
    ///
    /// # Errors
    /// [`LayoutError`] if they overlap in the guest, go beyond 64 bits, or there are none.
    pub fn new(regions: Vec<(Gpa, &'a mut [u8])>, before: Before) -> Result<Self, LayoutError> {
        let regions = regions
            .into_iter()
            .map(|(at, bytes)| {
                let len = bytes.len();
                (at, NonNull::from_mut(bytes).cast(), len)
            })
            .collect();
        // SAFETY: each slice is borrowed exclusively for `'a`.
        unsafe { Self::from_raw_parts(regions, before) }
    }

    /// The regions, each with its guest-physical address, its place and its length in bytes.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// # Safety
    /// The bytes are mapped, writable and different for each region, and nobody else, not even
    /// the guest, touches them, for `'a`.
    pub unsafe fn from_raw_parts(
        regions: Vec<(Gpa, NonNull<u8>, usize)>,
        before: Before,
    ) -> Result<Self, LayoutError> {
        let regions = regions
            .into_iter()
            .map(|(at, start, len)| Ok((ram(at, to_u64(len))?, start)));
        let mut regions = regions.collect::<Result<Vec<_>, LayoutError>>()?;
        regions.sort_by_key(|(range, _)| *range);
        let layout = RamLayout::new(regions.iter().map(|(range, _)| *range).collect())?;
        Ok(Self {
            layout,
            regions,
            before,
            busy: Mutex::new(Vec::new()),
            owner: PhantomData,
        })
    }

    /// A range of one region.
    fn place(&self, range: GpaRange) -> Option<(NonNull<u8>, usize)> {
        let above = self
            .regions
            .partition_point(|(region, _)| region.start() <= range.start());
        let (region, start) = self.regions.get(above.checked_sub(1)?)?;
        if range.end() > region.end() {
            return None;
        }
        let offset = usize::try_from(range.start().offset_from(region.start())?).ok()?;
        // SAFETY: the offset is inside the region, whose bytes are one allocation.
        let at = unsafe { start.add(offset) };
        Some((at, usize::try_from(range.len()).ok()?))
    }
}

impl RestoreTarget for RestoreRegions<'_> {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn reads_as_zero(&self) -> bool {
        self.before == Before::Zeroes
    }

    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        let busy = || self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((start, len)) = self.place(range) else {
            return self.fill_parts(range, fill);
        };
        {
            let mut busy = busy();
            if busy
                .iter()
                .any(|other| !other.intersection(&range).is_empty())
            {
                return Err(CheckpointError::Worker);
            }
            busy.push(range);
        }
        // SAFETY: the bytes are inside a region that is ours alone for `'a` (the constructors),
        // and `busy` says that no other call has a slice of any of them.
        let bytes = unsafe { core::slice::from_raw_parts_mut(start.as_ptr(), len) };
        let result = fill(bytes);
        busy().retain(|other| *other != range);
        result
    }
}

impl RestoreRegions<'_> {
    /// As `fill`, for a range across regions, which touch in the guest but need not touch
    /// here: by way of a buffer.
    fn fill_parts(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        if !self.layout.contains(range.start(), range.len()) {
            return Err(MemoryError::NotRam { range }.into());
        }
        let mut buffer = vec![0; size(range.len())];
        fill(&mut buffer)?;
        for (region, _) in &self.regions {
            let part = region.intersection(&range);
            if !part.is_empty() {
                let bytes = &*slice_of(&mut buffer, range, part)?;
                self.fill(part, &mut |out| copy_exact(bytes, out, part.start()))?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for RestoreRegions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoreRegions")
            .field("layout", &self.layout)
            .field("before", &self.before)
            .finish_non_exhaustive()
    }
}

/// Options for putting a checkpoint's pages in place.
///
/// ```
/// use sonicshot::Stop;
/// use sonicshot::checkpoint::RestoreOptions;
/// use std::time::{Duration, Instant};
/// let at_most = Instant::now() + Duration::from_secs(10);
/// let options = RestoreOptions::new().stop(Stop::at(at_most));
/// # let _ = options;
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// The threads that read, decompress and fill; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// The end of the work before it is done: when somebody cancels it, or at a time. It is asked
    /// before each range that is filled; what comes of it is [`MemoryError::Stopped`], and a target
    /// that may hold anything.
    pub stop: Option<Stop>,
    /// Whoever is told how far it is, in bytes of page data.
    pub progress: Option<Arc<dyn Progress>>,
}

impl RestoreOptions {
    /// As many threads as there are cores, and no end before all is in place.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how many threads work.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Says when the work ends before it is done.
    #[must_use]
    pub fn stop(mut self, stop: Stop) -> Self {
        self.stop = Some(stop);
        self
    }
}

/// A target that is filled until `stop` says that it is over.
struct Stoppable<'a> {
    target: &'a dyn RestoreTarget,
    stop: &'a Stop,
}

impl RestoreTarget for Stoppable<'_> {
    fn layout(&self) -> &RamLayout {
        self.target.layout()
    }

    fn reads_as_zero(&self) -> bool {
        self.target.reads_as_zero()
    }

    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        let checked = self.stop.check();
        checked.map_err(|source| MemoryError::Stopped { range, source })?;
        self.target.fill(range, fill)
    }
}

/// Runs that a thread looks at at once: most are short.
const RUNS: usize = 1024;
/// Longest range that is filled at once with one word.
const FILL: u64 = 1 << 20;

impl<S: RangeSource> CheckpointReader<S> {
    /// Puts all pages into `target`. Pages of zeroes are not touched if the target reads as zero.
    ///
    /// # Errors
    /// [`CheckpointError`]; the target may then hold anything.
    pub fn restore(
        &self,
        target: &dyn RestoreTarget,
        options: &RestoreOptions,
    ) -> Result<(), CheckpointError> {
        match &options.stop {
            Some(stop) => self.fill(&Stoppable { target, stop }, options),
            None => self.fill(target, options),
        }
    }

    fn fill(
        &self,
        target: &dyn RestoreTarget,
        options: &RestoreOptions,
    ) -> Result<(), CheckpointError> {
        let info = self.info();
        for region in info.layout.regions() {
            if !target.layout().contains(region.start(), region.len()) {
                return Err(CheckpointError::Layout { at: region.start() });
            }
        }
        // Before a byte is filled.
        self.check_disks()?;
        let threads = crate::work::threads(options.threads);
        let index = self.index();
        let chunks = index.chunk_count();
        let chunk_size = u64::from(self.chunk_size());
        let spans = self.disk_spans()?;
        let to_fill = match target.reads_as_zero() {
            // Those of other words take no time worth telling of.
            true => 0,
            false => self.filled_bytes()?,
        };
        let in_chunks = Tally::new(chunks).times(chunk_size);
        let on_disks: Tally = spans.iter().map(|span| span.range.len()).sum();
        let total = in_chunks.and(on_disks.get()).and(to_fill).get();
        options.progress.begin(WorkPhase::Restoring);
        let tell = |before: Tally, done: u64| {
            options.progress.tell(before.and(done).up_to(total), total);
        };
        let runs = DataRuns::of(index);
        let told = |done| Tally::new(done).times(chunk_size).up_to(in_chunks.get());
        for_each_told(
            threads,
            0..chunks,
            |done| tell(Tally::ZERO, told(done)),
            || self.decoder(),
            |decoder, number| {
                let chunk = index.chunk(number)?;
                let (stores, refers) = runs.in_chunk(index, &chunk)?;
                self.restore_chunk(decoder, target, &chunk, &stores, &refers)
            },
        )?;
        self.restore_disks(target, threads, &spans, &|done| tell(in_chunks, done))?;
        let before = in_chunks.and(on_disks.get());
        self.restore_words(target, threads, &|done| tell(before, done))?;
        // Threads that nobody tells of may have had the last ones.
        options.progress.tell(total, total);
        Ok(())
    }

    /// The bytes that are one word over and over, or read as zeroes.
    fn filled_bytes(&self) -> Result<u64, CheckpointError> {
        let mut filled = Tally::ZERO;
        for number in 0..self.index().run_count() {
            let run = self.index().run(number)?;
            if run.content.word().is_some() {
                filled.add(run.frames.len());
            }
        }
        Ok(filled.times(self.info().page_size.bytes()).get())
    }

    /// Fills what is one word over and over; zeroes only where the target does not read so.
    fn restore_words(
        &self,
        target: &dyn RestoreTarget,
        threads: NonZeroUsize,
        tell: &dyn Fn(u64),
    ) -> Result<(), CheckpointError> {
        let (index, zeroed) = (self.index(), target.reads_as_zero());
        let (count, page) = (index.run_count(), self.info().page_size.bytes());
        let filled = AtomicU64::new(0);
        for_each_told(
            threads,
            (0..count).step_by(RUNS),
            |_| tell(filled.load(Ordering::Relaxed)),
            || (),
            |(), first| {
                for number in (first..count).take(RUNS) {
                    let run = index.run(number)?;
                    match run.content.word() {
                        Some(word) if word != 0 || !zeroed => {
                            self.restore_word(target, &run, word)?;
                            let bytes = Tally::new(run.frames.len()).times(page).get();
                            filled.fetch_add(bytes, Ordering::Relaxed);
                        }
                        _ => {}
                    }
                }
                Ok(())
            },
        )
    }

    /// Puts the pages that are on disks in place, in the disks' order.
    fn restore_disks(
        &self,
        target: &dyn RestoreTarget,
        threads: NonZeroUsize,
        spans: &[Span],
        tell: &dyn Fn(u64),
    ) -> Result<(), CheckpointError> {
        if spans.is_empty() {
            return Ok(());
        }
        let frames: Vec<PfnRange> = self
            .runs()
            .filter(|run| matches!(run.content, PageContent::Disk { .. }))
            .map(|run| run.frames)
            .collect();
        let read = AtomicU64::new(0);
        let told = |_| tell(read.load(Ordering::Relaxed));
        for_each_told(threads, spans, told, Vec::new, |buffer, span| {
            read.fetch_add(span.range.len(), Ordering::Relaxed);
            self.read_span(span, buffer, &mut |record, bytes| {
                // Runs on disks are numbered as they come in the index.
                let frames = frames.get(size(record));
                let range = range_of(self.info(), *frames.ok_or(CheckpointError::Worker)?)?;
                for ram in ram_in(&self.info().layout, range) {
                    let part = part_of(Some(bytes), range, ram)?;
                    fill_all(target, ram, &mut |out| copy_exact(part, out, ram.start()))?;
                }
                Ok(())
            })
        })
    }

    fn restore_word(
        &self,
        target: &dyn RestoreTarget,
        run: &PageRun,
        word: u64,
    ) -> Result<(), CheckpointError> {
        for ram in ram_of(self.info(), run.frames)? {
            let mut at = ram.start();
            while at < ram.end() {
                // Steps end at multiples of the page size, so that the word stays in phase.
                let end = at.checked_add(FILL).unwrap_or(ram.end()).min(ram.end());
                let word = in_phase(word, at);
                fill_all(target, GpaRange::new(at, end), &mut |out| {
                    fill_words(out, word);
                    Ok(())
                })?;
                at = end;
            }
        }
        Ok(())
    }

    /// Puts one chunk's pages where they are stored for, and where they are referred to again.
    fn restore_chunk(
        &self,
        decoder: &mut ChunkDecoder,
        target: &dyn RestoreTarget,
        chunk: &ChunkInfo,
        stores: &[PageRun],
        refers: &[PageRun],
    ) -> Result<(), CheckpointError> {
        if chunk.entry.plain && refers.is_empty() {
            let whole: Option<Vec<GpaRange>> =
                stores.iter().map(|run| whole(self.info(), run)).collect();
            if let Some(ranges) = whole {
                return self.read_plain_into(target, chunk, &ranges);
            }
        }
        let info = self.info();
        let data = decoder.load(self.source(), chunk)?;
        for run in stores.iter().chain(refers) {
            let PageContent::Data { slot } = run.content else {
                continue;
            };
            let range = range_of(info, run.frames)?;
            let pages = chunk.bytes_of(slot, run.frames.len(), info.page_size)?;
            for ram in ram_of(info, run.frames)? {
                let bytes = part_of(data.get(pages.clone()), range, ram)?;
                fill_all(target, ram, &mut |out| copy_exact(bytes, out, ram.start()))?;
            }
        }
        Ok(())
    }

    /// Reads what is stored as it is to where it belongs: `ranges`, one behind the other.
    fn read_plain_into(
        &self,
        target: &dyn RestoreTarget,
        chunk: &ChunkInfo,
        ranges: &[GpaRange],
    ) -> Result<(), CheckpointError> {
        let mut sum = XxHash3_64::new();
        let mut computed = None;
        let mut offset = chunk.entry.offset;
        for range in ranges {
            fill_all(target, *range, &mut |out| {
                self.source()
                    .read_at(out, offset)
                    .map_err(CheckpointError::read(offset))?;
                if ranges.len() == 1 {
                    computed = Some(checksum(out));
                } else {
                    sum.write(out);
                }
                Ok(())
            })?;
            offset = behind(offset, range.len())?;
        }
        check_chunk(chunk, computed.unwrap_or_else(|| sum.finish()))
    }
}

/// Fills a range of the target, which must give all of it at once.
fn fill_all(
    target: &dyn RestoreTarget,
    range: GpaRange,
    fill: FillWith<'_>,
) -> Result<(), CheckpointError> {
    let mut filled = false;
    target.fill(range, &mut |out| {
        if to_u64(out.len()) != range.len() {
            return Err(wrong_length(range, out.len()));
        }
        filled = true;
        fill(out)
    })?;
    if filled {
        return Ok(());
    }
    Err(wrong_length(range, 0))
}

/// A page's word as it is read from `at` on.
fn in_phase(word: u64, at: Gpa) -> u64 {
    let mut bytes = word.to_le_bytes();
    bytes.rotate_left(size(at.raw() & 7));
    u64::from_le_bytes(bytes)
}

/// The addresses of a run's frames, if all of that is RAM of one region.
fn whole(info: &CheckpointInfo, run: &PageRun) -> Option<GpaRange> {
    let range = run.frames.gpa_range(info.page_size)?;
    info.layout
        .contains(range.start(), range.len())
        .then_some(range)
}

/// The bytes of `data` that stand for `part`, when `data` stands for `whole`.
fn part_of(data: Option<&[u8]>, whole: GpaRange, part: GpaRange) -> Result<&[u8], CheckpointError> {
    let from = part.start().offset_from(whole.start());
    let to = part.end().offset_from(whole.start());
    data.and_then(|data| data.get(size(from?)..size(to?)))
        .ok_or_else(|| wrong_length(part, data.unwrap_or(&[]).len()))
}

fn wrong_length(range: GpaRange, found: usize) -> CheckpointError {
    CheckpointError::Length {
        what: "the place for page data",
        at: range.start(),
        found: to_u64(found),
        expected: range.len(),
    }
}

/// The numbers of the runs with data, by their slots: those that store pages, and those that refer
/// to stored pages again.
struct DataRuns {
    stores: Vec<u32>,
    refers: Vec<u32>,
}

impl DataRuns {
    fn of(index: &Index) -> Self {
        let (stores, refers) = index.by_slot();
        Self { stores, refers }
    }

    /// The parts of both that are in a chunk.
    fn in_chunk(
        &self,
        index: &Index,
        chunk: &ChunkInfo,
    ) -> Result<(Vec<PageRun>, Vec<PageRun>), CheckpointError> {
        let end = plus("stored pages", chunk.first_slot, chunk.pages)?;
        let of = |runs: &[u32]| {
            let first = runs.partition_point(|number| index.slot(*number) < end);
            // Backwards from the first run that begins behind the chunk.
            let mut out = Vec::new();
            for number in runs.iter().take(first).rev() {
                let run = index.run(*number as usize)?;
                let Some(part) = in_chunk(&run, chunk.first_slot, end) else {
                    break;
                };
                out.push(part);
            }
            out.reverse();
            Ok::<_, CheckpointError>(out)
        };
        Ok((of(&self.stores)?, of(&self.refers)?))
    }
}

/// The part of a data run whose slots are in `start..end`.
fn in_chunk(run: &PageRun, start: u64, end: u64) -> Option<PageRun> {
    let PageContent::Data { slot } = run.content else {
        return None;
    };
    let first = start.max(slot);
    let last = end.min(slot.checked_add(run.frames.len())?);
    let from = run.frames.start().checked_add(first.checked_sub(slot)?)?;
    let len = last.checked_sub(first).filter(|len| *len > 0)?;
    clip(run, PfnRange::with_len(from, len)?)
}
