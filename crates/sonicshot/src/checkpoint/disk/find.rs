//! Finds the pages that are on disks: by their content, whatever the guest says of them.

use super::guess::DiskGuesses;
use super::source::{DiskOffset, DiskRange, DiskSource};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::disk::DiskInfo;
use crate::checkpoint::wire::layout::{checksum, narrow, size, too_large};
use crate::to_u64;
use crate::work::{for_each_told, map_in_order};
use crate::{
    ClassSet, GuestMemory, MemoryError, PageClass, PageMap, PageSize, Pfn, PfnRange, PhaseProgress,
    Progress, PrunePlan, Tally, WorkOptions, WorkPhase,
};
use core::sync::atomic::{AtomicU64, Ordering};
use std::fmt;

/// Frames are told by the hash of so many bytes at their beginning, and disks looked through in blocks
/// of so many: file systems begin files at such.
const BLOCK: usize = 4096;
/// The piece of the guest's memory, or of a disk, that is read at once, in bytes.
const PIECE: u64 = 1 << 20;
/// No more frames are looked for: 16 TiB of them.
const MAX_FRAMES: usize = u32::MAX as usize;
/// The place where a frame was found, as one number: the disk above this bit, and the place in units of
/// `1 << PLACE_SHIFT`.
const DISK_SHIFT: u32 = 54;
const PLACE_SHIFT: u32 = 12;
/// Nowhere yet: no disk has this number.
const NOWHERE: u64 = u64::MAX;

/// A table of a guest's pages by their content, for disks to be looked through with.
///
/// It takes 28 bytes a page. An example is at
/// [`CheckpointWriter::memory_on_disks`](crate::checkpoint::CheckpointWriter::memory_on_disks).
pub struct DiskFinder {
    page_size: PageSize,
    /// Hash and frame, sorted.
    entries: Vec<(u64, u64)>,
    /// The index of the first entry whose hash has these leading bits, `bits` of them; then the end of
    /// the last ones.
    starts: Vec<u32>,
    bits: u32,
}

impl DiskFinder {
    /// The classes whose pages are likely on a disk: the page cache, and what nobody knows of. Of
    /// the others less than one in a hundred is.
    pub const LIKELY: ClassSet = ClassSet::EMPTY
        .with(PageClass::PageCacheClean)
        .with(PageClass::PageCacheDirty)
        .with(PageClass::Unknown);

    /// Looks at the pages of `classes` that `plan` keeps. Pages of zeroes, or of one word over and
    /// over, are not looked for.
    ///
    /// # Errors
    /// [`CheckpointError::Memory`] if the memory cannot be read.
    pub fn new(
        memory: &dyn GuestMemory,
        map: &PageMap,
        plan: &PrunePlan,
        classes: ClassSet,
        options: &WorkOptions,
    ) -> Result<Self, CheckpointError> {
        let pieces = pieces(memory, map, plan, classes);
        Self::of_pieces(memory, map.page_size(), pieces, options, MAX_FRAMES)
    }

    /// Of the first `most` of the frames.
    fn of_pieces(
        memory: &dyn GuestMemory,
        page_size: PageSize,
        pieces: Vec<PfnRange>,
        options: &WorkOptions,
        most: usize,
    ) -> Result<Self, CheckpointError> {
        let frames = PfnRange::total_of(&pieces);
        let mut entries = Vec::with_capacity(size(frames).min(most));
        let total = Tally::new(frames).times(page_size.bytes()).get();
        let phase = WorkPhase::SearchingDisks;
        let mut phase = PhaseProgress::begin(&options.progress, phase, total);
        map_in_order(
            options.thread_count(),
            pieces,
            Vec::new,
            |buffer, piece| (piece, hashes(memory, page_size, piece, buffer)),
            |(piece, found)| {
                phase.add(Tally::new(piece.len()).times(page_size.bytes()).get());
                entries.extend(found?);
                entries.truncate(most);
                Ok::<_, CheckpointError>(())
            },
        )?;
        phase.end();
        entries.sort_unstable();
        Self::of(entries, page_size)
    }

    fn of(entries: Vec<(u64, u64)>, page_size: PageSize) -> Result<Self, CheckpointError> {
        let count: u32 = narrow("pages to look for", to_u64(entries.len()), u32::MAX.into())?;
        // No more than 2^32, as there are no more entries.
        let bits = entries.len().next_power_of_two().trailing_zeros();
        let mut finder = Self {
            page_size,
            entries,
            starts: Vec::with_capacity(1 << bits),
            bits,
        };
        for (at, (hash, _)) in (0_u32..).zip(&finder.entries) {
            // It begins this bucket, and all before it that have none.
            while finder.starts.len() <= finder.bucket(*hash) {
                finder.starts.push(at);
            }
        }
        while finder.starts.len() <= 1 << bits {
            finder.starts.push(count);
        }
        Ok(finder)
    }

    /// The leading bits of `hash`.
    fn bucket(&self, hash: u64) -> usize {
        size(hash.rotate_left(self.bits) & !(u64::MAX << self.bits))
    }

    /// The number of pages that are looked for.
    #[must_use]
    pub fn pages(&self) -> u64 {
        to_u64(self.entries.len())
    }

    /// The first of the entries with this hash.
    fn first(&self, hash: u64) -> Option<usize> {
        let bucket = self.bucket(hash);
        let start = *self.starts.get(bucket)? as usize;
        let end = *self.starts.get(bucket.checked_add(1)?)? as usize;
        let bucket = self.entries.get(start..end)?;
        let inside = bucket.partition_point(|(other, _)| *other < hash);
        let at = start.checked_add(inside)?;
        (bucket.get(inside)?.0 == hash).then_some(at)
    }

    /// Looks through all of `disks`, which `known` are. What it finds are guesses, and the same on
    /// any number of threads.
    ///
    /// # Errors
    /// [`CheckpointError::DiskIo`] if a disk cannot be read.
    pub fn stream(
        &self,
        known: &[DiskInfo],
        disks: &[&dyn DiskSource],
        options: &WorkOptions,
    ) -> Result<DiskGuesses, CheckpointError> {
        let found: Vec<AtomicU64> = self
            .entries
            .iter()
            .map(|_| AtomicU64::new(NOWHERE))
            .collect();
        let total = known.iter().map(|disk| disk.bytes).sum::<Tally>().get();
        let progress = &options.progress;
        progress.begin(WorkPhase::SearchingDisks);
        let mut before = Tally::ZERO;
        if self.entries.is_empty() {
            progress.tell(total, total);
            return Ok(DiskGuesses::default());
        }
        for ((disk, info), number) in disks.iter().zip(known).zip(0_u32..) {
            let failed = |at, source| CheckpointError::DiskIo {
                name: info.name.clone(),
                at,
                source,
            };
            let pieces = data_pieces(*disk).map_err(|(at, error)| failed(at, error))?;
            for_each_told(
                options.thread_count(),
                pieces,
                |done| {
                    // Progress is for the eye, and ends at the total.
                    let done = Tally::new(done).times(PIECE).up_to(info.bytes);
                    progress.tell(before.and(done).up_to(total), total);
                },
                Vec::new,
                |buffer: &mut Vec<u8>, piece: DiskRange| {
                    buffer.resize(size(piece.len()), 0);
                    let read = disk.read_disk(buffer, piece.start());
                    read.map_err(|error| failed(piece.start(), error))?;
                    self.look_at(buffer, number, piece.start(), &found);
                    Ok::<_, CheckpointError>(())
                },
            )?;
            before.add(info.bytes);
        }
        progress.tell(total, total);
        Ok(self.guesses(&found))
    }

    /// Notes which frames may begin as a block of a disk does.
    fn look_at(&self, bytes: &[u8], disk: u32, at: DiskOffset, found: &[AtomicU64]) {
        for (block, number) in bytes.chunks_exact(BLOCK).zip(0_u64..) {
            let Some(place) = self
                .first(checksum(block))
                .and_then(|first| found.get(first))
            else {
                continue;
            };
            // A disk is shorter than 2^63 bytes, and there are few.
            let Some(block) = (at.raw() >> PLACE_SHIFT).checked_add(number) else {
                break;
            };
            let where_it_is = (u64::from(disk) << DISK_SHIFT) | block;
            // The first of several, whoever finds it first.
            place.fetch_min(where_it_is, Ordering::Relaxed);
        }
    }

    fn guesses(&self, found: &[AtomicU64]) -> DiskGuesses {
        let mut frames = Vec::new();
        // Those of one content are told of by their first.
        let mut places = found.iter();
        for same in self.entries.chunk_by(|(a, _), (b, _)| a == b) {
            let place = places
                .next()
                .map_or(NOWHERE, |first| first.load(Ordering::Relaxed));
            let _ = same.iter().skip(1).zip(places.by_ref()).count();
            if place == NOWHERE {
                continue;
            }
            let Ok(disk) = u32::try_from(place >> DISK_SHIFT) else {
                continue;
            };
            let block = place & ((1 << DISK_SHIFT) - 1);
            let at = DiskOffset::new(block << PLACE_SHIFT);
            frames.extend(same.iter().map(|(_, pfn)| (Pfn::new(*pfn), disk, at)));
        }
        DiskGuesses::of_frames(frames, self.page_size)
    }
}

impl fmt::Debug for DiskFinder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskFinder")
            .field("pages", &self.entries.len())
            .finish_non_exhaustive()
    }
}

/// The frames that are looked for, in pieces that are read at once.
fn pieces(
    memory: &dyn GuestMemory,
    map: &PageMap,
    plan: &PrunePlan,
    classes: ClassSet,
) -> Vec<PfnRange> {
    let page_size = map.page_size();
    let most = PIECE.div_ceil(page_size.bytes());
    let mut drops = plan.runs().iter().peekable();
    let mut out = Vec::new();
    for (frames, class) in map.runs() {
        let mut rest = frames;
        while classes.contains(class) && !rest.is_empty() {
            let at = rest.start();
            while drops.next_if(|run| run.frames.end() <= at).is_some() {}
            let dropped = drops.peek().map(|run| run.frames);
            if let Some(dropped) = dropped.filter(|dropped| dropped.contains(at)) {
                rest = PfnRange::new(dropped.end().min(rest.end()), rest.end());
                continue;
            }
            let limit = at.checked_add(most).unwrap_or(rest.end());
            let kept = dropped.map_or(rest.end(), |dropped| dropped.start());
            let end = rest.end().min(limit).min(kept);
            // What the source knows to be zero need not be read.
            let data = at.gpa(page_size).and_then(|at| memory.next_data(at));
            let zero = data.map(|data| data.start().pfn(page_size));
            match zero {
                Some(start) if start > at => rest = PfnRange::new(start.min(end), rest.end()),
                _ => {
                    out.push(PfnRange::new(at, end));
                    rest = PfnRange::new(end, rest.end());
                }
            }
        }
    }
    out
}

/// The hash and number of each of the frames that has bytes, and not one word over and over.
fn hashes(
    memory: &dyn GuestMemory,
    page_size: PageSize,
    frames: PfnRange,
    buffer: &mut Vec<u8>,
) -> Result<Vec<(u64, u64)>, CheckpointError> {
    let page = size(page_size.bytes());
    // At most `PIECE`, or one page.
    let range = frames.gpa_range(page_size);
    let range = range.ok_or_else(|| too_large("a frame", frames.end().raw(), u64::MAX))?;
    buffer.resize(size(range.len()), 0);
    let start = range.start();
    let whole = memory.read(start, buffer);
    let mut out = Vec::with_capacity(size(frames.len()));
    for (pfn, bytes) in frames.iter().zip(buffer.chunks_exact_mut(page)) {
        if whole.is_err() {
            let at = pfn.gpa(page_size);
            let at = at.ok_or_else(|| too_large("a frame", pfn.raw(), u64::MAX))?;
            match memory.read(at, bytes) {
                Ok(()) => {}
                Err(MemoryError::Absent { .. }) => continue,
                Err(error) => return Err(error.into()),
            }
        }
        let Some((first, _)) = bytes.split_first_chunk::<8>() else {
            continue;
        };
        let block = bytes.get(..BLOCK).unwrap_or(bytes);
        if !block.chunks_exact(8).all(|word| word == first) {
            out.push((checksum(block), pfn.raw()));
        }
    }
    Ok(out)
}

/// The parts of a disk that may hold anything but zeroes, in whole blocks, as they are read.
fn data_pieces(disk: &dyn DiskSource) -> Result<Vec<DiskRange>, (DiskOffset, std::io::Error)> {
    const LEN: u64 = to_u64(BLOCK);
    const IN_BLOCK: u64 = LEN - 1;
    let down = |at: u64| at & !IN_BLOCK;
    let len = disk.disk_len().map_err(|error| (DiskOffset::ZERO, error))?;
    let end = down(len);
    let mut out = Vec::new();
    let mut at = 0_u64;
    while at < end {
        let here = DiskOffset::new(at);
        let data = disk.next_disk_data(here).map_err(|error| (here, error))?;
        let Some(data) = data.filter(|data| data.end() > here) else {
            break;
        };
        // Beyond the last whole block nothing is looked at.
        let stop = data.end().raw().checked_next_multiple_of(LEN);
        let stop = stop.map_or(end, |stop| stop.min(end));
        let mut from = down(data.start().raw().max(at));
        while from < stop {
            let to = from.checked_add(PIECE).map_or(stop, |to| to.min(stop));
            out.push(DiskRange::new(DiskOffset::new(from), DiskOffset::new(to)));
            from = to;
        }
        // Data that ends in the block that it was asked for is no step back.
        at = at.checked_add(LEN).map_or(end, |next| next.max(stop));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DropClasses, Fill, GuestBytes, MappedRegions};
    use core::num::NonZeroUsize;
    use std::sync::{Arc, Mutex};

    const PAGE: usize = 4096;

    /// A page that no other is like.
    fn page(number: u64) -> Vec<u8> {
        let word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..PAGE as u64 / 8)
            .flat_map(|at| (word ^ at.wrapping_mul(at)).to_le_bytes())
            .collect()
    }

    fn find(ram: &[u8], disks: &[Vec<u8>], threads: usize) -> Vec<(u64, u32, u64)> {
        let guest =
            MappedRegions::new(vec![(crate::Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        let set = |map: &mut PageMap, at, class| {
            map.set(PfnRange::new(Pfn::new(at), Pfn::new(at + 1)), class);
        };
        // Neither free pages nor the kernel's are looked for.
        set(&mut map, 1, PageClass::FreeBuddy);
        set(&mut map, 2, PageClass::Kernel);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let threads = NonZeroUsize::new(threads);
        let mut work = WorkOptions::new();
        work.threads = threads;
        let finder = DiskFinder::new(&guest, &map, &plan, DiskFinder::LIKELY, &work).unwrap();
        let infos: Vec<_> = disks
            .iter()
            .map(|disk| DiskInfo::of("disk", disk, crate::checkpoint::DiskHash::Xxh3, &[]).unwrap())
            .collect();
        let sources: Vec<_> = disks.iter().map(|disk| disk as &dyn DiskSource).collect();
        let last = Arc::new(Mutex::new((0, 0)));
        let mut options = WorkOptions::new();
        options.threads = threads;
        let telling = Arc::clone(&last);
        let tell = move |done, total| *telling.lock().unwrap() = (done, total);
        let options = options.progress(Arc::new(tell));
        let guesses = finder.stream(&infos, &sources, &options).unwrap();
        let total = disks.iter().map(|disk| disk.len() as u64).sum();
        assert_eq!(*last.lock().unwrap(), (total, total));
        let runs = guesses.runs().iter();
        runs.flat_map(|run| {
            let frames = run.frames.iter().zip(0_u64..);
            frames.map(move |(pfn, number)| {
                let number = if run.descending {
                    run.frames.len() - 1 - number
                } else {
                    number
                };
                (pfn.raw(), run.disk, run.at.raw() / 4096 + number)
            })
        })
        .collect()
    }

    #[test]
    fn pages_are_found_where_they_are_on_disks() {
        let ram = [
            page(0),
            page(1),
            page(2),
            page(3),
            vec![0; PAGE],
            page(5),
            page(6),
            page(5),
        ];
        let ram = ram.concat();
        let first = [page(9), page(3), page(1), page(2), vec![0; PAGE], page(6)].concat();
        // The end is no whole block.
        let second = [page(5), page(5), page(6), page(0)[..1000].to_vec()].concat();
        let expected = [(3, 0, 1), (5, 1, 0), (6, 0, 5), (7, 1, 0)];
        for threads in [1, 2, 5] {
            let found = find(&ram, &[first.clone(), second.clone()], threads);
            assert_eq!(found, expected);
        }
        assert_eq!(find(&ram, &[], 1), []);
        assert_eq!(find(&vec![0; 8 * PAGE], &[first], 1), []);
    }

    #[test]
    fn a_large_table_finds_every_page() {
        let ram: Vec<u8> = (0..3000).flat_map(page).collect();
        let disk: Vec<u8> = (0..3000).rev().flat_map(page).collect();
        let found = find(&ram, &[disk], 2);
        assert_eq!(found.len(), 2998);
        assert!(
            found
                .iter()
                .all(|&(pfn, disk, block)| disk == 0 && block == 2999 - pfn)
        );
    }

    #[test]
    fn no_more_pages_are_looked_for_than_a_bound() {
        let ram: Vec<u8> = (0..20).flat_map(page).collect();
        let guest =
            MappedRegions::new(vec![(crate::Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        for (most, pages) in [(3, 3), (20, 20), (MAX_FRAMES, 20)] {
            let pieces = vec![PfnRange::new(Pfn::new(0), Pfn::new(20))];
            let finder =
                DiskFinder::of_pieces(&guest, PageSize::SIZE_4K, pieces, &WorkOptions::new(), most);
            assert_eq!(finder.unwrap().pages(), pages);
        }
    }
}
