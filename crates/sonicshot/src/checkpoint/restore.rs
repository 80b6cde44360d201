//! Puts a checkpoint's pages where the guest expects them, all of them at once.

use super::error::CheckpointError;
use super::index::clip;
use super::info::{PageContent, PageRun};
use super::layout::{checksum, len64};
use super::reader::{CheckpointReader, ChunkDecoder, check_chunk, fill_words, parallel, ram_of};
use super::scan::slice_of;
use super::source::RangeSource;
use crate::{Gpa, GpaRange, LayoutError, MemoryError, PfnRange, Progress, RamLayout};
use core::hash::Hasher;
use core::marker::PhantomData;
use core::num::NonZeroUsize;
use core::ptr::NonNull;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use twox_hash::XxHash3_64;

/// Where restored pages go: a VMM's memory, a file.
///
/// Threads fill different stretches at once.
pub trait RestoreTarget: Sync {
    /// Where there is room; at least the RAM of the checkpoint.
    fn layout(&self) -> &RamLayout;

    /// Whether all of it reads as zero, so that pages of zeroes need not be touched.
    fn reads_as_zero(&self) -> bool;

    /// Lets `fill` write the bytes of `range`, which lies in one region. If it fails, the
    /// stretch may hold anything.
    ///
    /// # Errors
    /// What `fill` gives, or why the target cannot take it.
    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError>;
}

/// Writes the bytes of a stretch of guest memory.
pub type FillWith<'a> = &'a mut dyn FnMut(&mut [u8]) -> Result<(), CheckpointError>;

/// What a target held before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// The stretches that are being filled.
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
    /// [`LayoutError`] if they overlap in the guest, or there are none.
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
        let mut regions: Vec<(GpaRange, NonNull<u8>)> = regions
            .into_iter()
            .filter_map(|(at, start, len)| Some((GpaRange::with_len(at, len64(len))?, start)))
            .collect();
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

    /// A stretch of one region.
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
    /// As `fill`, for a stretch across regions, which touch in the guest but need not touch
    /// here: by way of a buffer.
    fn fill_parts(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        if !self.layout.contains(range.start(), range.len()) {
            return Err(MemoryError::NotRam { range }.into());
        }
        let len = usize::try_from(range.len()).unwrap_or(0);
        let mut buffer = vec![0; len];
        fill(&mut buffer)?;
        for (region, _) in &self.regions {
            let part = region.intersection(&range);
            if let (false, Some(bytes)) = (part.is_empty(), slice_of(&mut buffer, range, part)) {
                let bytes = &*bytes;
                self.fill(part, &mut |out| {
                    if out.len() == bytes.len() {
                        out.copy_from_slice(bytes);
                    }
                    Ok(())
                })?;
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

/// Chunks that a thread restores at once.
const CHUNKS: usize = 16;
/// Runs that a thread looks at at once.
const RUNS: usize = 1024;
/// Longest stretch that is filled at once with one word.
const FILL: u64 = 1 << 20;

impl<S: RangeSource> CheckpointReader<S> {
    /// Puts all pages into `target`, on `threads` threads or all cores. Pages of zeroes are
    /// not touched if the target reads as zero.
    ///
    /// # Errors
    /// [`CheckpointError`]; the target may then hold anything.
    pub fn restore(
        &self,
        target: &dyn RestoreTarget,
        threads: Option<NonZeroUsize>,
        progress: Progress<'_>,
    ) -> Result<(), CheckpointError> {
        let info = self.info();
        for region in info.layout.regions() {
            if !target.layout().contains(region.start(), region.len()) {
                return Err(CheckpointError::Layout { at: region.start() });
            }
        }
        let threads = threads.map(NonZeroUsize::get);
        let index = self.index();
        let chunks = index.chunk_count();
        let total = chunks.saturating_mul(self.chunk_size().into());
        let (stores, refers) = index.by_slot();
        let count = usize::try_from(chunks).unwrap_or(usize::MAX);
        parallel(count, CHUNKS, threads, progress, (0, total), |numbers| {
            let mut decoder = ChunkDecoder::new(self.header_codec());
            for number in numbers {
                let Some(chunk) = index.chunk(len64(number)) else {
                    continue;
                };
                let end = chunk.first_slot.saturating_add(chunk.pages);
                let of = |runs: &[u32]| {
                    let first = runs.partition_point(|number| index.slot(*number) < end);
                    // Backwards from the first run that begins behind the chunk.
                    let mut out = Vec::new();
                    for number in runs.iter().take(first).rev() {
                        let Some(run) = index.run(*number as usize) else {
                            break;
                        };
                        let Some(part) = in_chunk(&run, chunk.first_slot, end) else {
                            break;
                        };
                        out.push(part);
                    }
                    out.reverse();
                    out
                };
                let (stores, refers) = (of(&stores), of(&refers));
                self.restore_chunk(&mut decoder, target, &chunk, &stores, &refers)?;
            }
            Ok(())
        })?;
        let zeroed = target.reads_as_zero();
        let runs = index.run_count();
        parallel(runs, RUNS, threads, &mut |_, _| {}, (0, 0), |numbers| {
            for run in numbers.filter_map(|number| index.run(number)) {
                match run.content.word() {
                    Some(word) if word != 0 || !zeroed => self.restore_word(target, &run, word)?,
                    _ => {}
                }
            }
            Ok(())
        })
    }

    fn restore_word(
        &self,
        target: &dyn RestoreTarget,
        run: &PageRun,
        word: u64,
    ) -> Result<(), CheckpointError> {
        for ram in ram_of(self.info(), run.frames) {
            let mut at = ram.start();
            while at < ram.end() {
                // Steps end at multiples of the page size, so that the word stays in phase.
                let end = at.checked_add(FILL).unwrap_or(ram.end()).min(ram.end());
                let phase = u32::try_from((at.raw() & 7).saturating_mul(8)).unwrap_or(0);
                target.fill(GpaRange::new(at, end), &mut |out| {
                    fill_words(out, word.rotate_right(phase));
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
        chunk: &super::index::ChunkInfo,
        stores: &[PageRun],
        refers: &[PageRun],
    ) -> Result<(), CheckpointError> {
        let info = self.info();
        let whole = |run: &PageRun| {
            run.frames
                .gpa_range(info.page_size)
                .filter(|range| info.layout.contains(range.start(), range.len()))
        };
        // What is stored as it is, is read to where it belongs.
        if chunk.entry.plain && refers.is_empty() && stores.iter().all(|run| whole(run).is_some()) {
            let mut sum = XxHash3_64::new();
            let mut offset = chunk.entry.offset;
            let mut computed = None;
            for range in stores.iter().filter_map(whole) {
                target.fill(range, &mut |out| {
                    self.source()
                        .read_at(out, offset)
                        .map_err(CheckpointError::read(offset))?;
                    if stores.len() == 1 {
                        computed = Some(checksum(out));
                    } else {
                        sum.write(out);
                    }
                    Ok(())
                })?;
                offset = offset.saturating_add(range.len());
            }
            return check_chunk(chunk, computed.unwrap_or_else(|| sum.finish()));
        }
        let page_shift = info.page_size.shift();
        let data = decoder.load(self, chunk)?;
        for run in stores.iter().chain(refers) {
            let PageContent::Data { slot } = run.content else {
                continue;
            };
            let Some(range) = run.frames.gpa_range(info.page_size) else {
                continue;
            };
            let start = slot.saturating_sub(chunk.first_slot) << page_shift;
            for ram in ram_of(info, run.frames) {
                let skip = ram.start().offset_from(range.start()).unwrap_or(0);
                let from = usize::try_from(start.saturating_add(skip)).unwrap_or(usize::MAX);
                let len = usize::try_from(ram.len()).unwrap_or(usize::MAX);
                let bytes = data.get(from..from.saturating_add(len)).unwrap_or_default();
                target.fill(ram, &mut |out| {
                    if out.len() == bytes.len() {
                        out.copy_from_slice(bytes);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

/// The part of a data run whose slots are in `start..end`.
fn in_chunk(run: &PageRun, start: u64, end: u64) -> Option<PageRun> {
    let PageContent::Data { slot } = run.content else {
        return None;
    };
    let first = start.max(slot);
    let last = end.min(slot.saturating_add(run.frames.len()));
    if first >= last {
        return None;
    }
    let from = run.frames.start().checked_add(first.saturating_sub(slot))?;
    clip(run, PfnRange::with_len(from, last.saturating_sub(first))?)
}
