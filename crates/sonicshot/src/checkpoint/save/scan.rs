//! The first pass over the memory to be saved: what is to be read, and what the pages hold.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::disk::guess::{DiskGuess, DiskGuesses, OnDisks};
use crate::checkpoint::wire::disk::{DiskRun, digest};
use crate::checkpoint::wire::frames::{covered_frames, read_frames};
use crate::checkpoint::wire::info::{CheckpointInfo, PageContent, PageRun};
use crate::checkpoint::wire::layout::{
    DISK_ALIGN, MAX_DISK_RUN, MAX_RUN, checksum, narrow, plus, size, too_large,
};
use crate::to_u64;
use crate::{
    DropRun, Fill, GuestMemory, PageClass, PageMap, PageSize, PageState, Pfn, PfnRange, PrunePlan,
};
use core::iter::Peekable;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

/// A batch has at most so many bytes to read.
const BATCH: u64 = 512 << 10;
/// A batch has at most so many parts, so that the index grows while the scan goes on.
const PARTS: usize = 1024;

/// A range of frames, in the order of the memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// Its content is known without reading it.
    Known(PageRun),
    /// To be read.
    Read(PfnRange, PageClass),
    /// To be read, and compared with a disk.
    Guess(DiskGuess, PageClass),
    /// Read, and found on a disk.
    OnDisk(PfnRange, PageClass, DiskRun),
}

impl Part {
    /// The frames that are to be read, or were.
    fn read(&self) -> Option<PfnRange> {
        match self {
            Self::Known(_) => None,
            Self::Read(frames, _) | Self::OnDisk(frames, ..) => Some(*frames),
            Self::Guess(guess, _) => Some(guess.frames),
        }
    }
}

/// Goes through the guest's RAM, lowest first, in batches of parts.
pub(crate) struct Batches<'a> {
    memory: &'a dyn GuestMemory,
    info: &'a CheckpointInfo,
    ranges: std::vec::IntoIter<PfnRange>,
    /// The rest of the current range.
    rest: PfnRange,
    states: Peekable<Box<dyn Iterator<Item = (PfnRange, PageState)> + 'a>>,
    drops: Peekable<core::slice::Iter<'a, DropRun>>,
    guesses: Peekable<core::slice::Iter<'a, DiskGuess>>,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(
        memory: &'a dyn GuestMemory,
        info: &'a CheckpointInfo,
        map: &'a PageMap,
        plan: &'a PrunePlan,
        guesses: &'a DiskGuesses,
    ) -> Self {
        let states: Box<dyn Iterator<Item = _> + 'a> = Box::new(map.states());
        Self {
            memory,
            info,
            ranges: covered_frames(&info.layout, info.page_size).into_iter(),
            rest: PfnRange::new(Pfn::new(0), Pfn::new(0)),
            states: states.peekable(),
            drops: plan.runs().iter().peekable(),
            guesses: guesses.runs().iter().peekable(),
        }
    }

    /// The next part of at most `limit` frames, if it has to be read.
    fn part(&mut self, limit: u64) -> Option<Part> {
        while self.rest.is_empty() {
            self.rest = self.ranges.next()?;
        }
        let at = self.rest.start();
        let mut end = self.rest.end();
        while self.states.next_if(|(run, _)| run.end() <= at).is_some() {}
        let state = match self.states.peek() {
            Some((run, state)) if run.contains(at) => {
                end = end.min(run.end());
                *state
            }
            // A frame that RAM fills only in part.
            Some((run, _)) => {
                end = end.min(run.start());
                PageState::new(PageClass::Hole)
            }
            None => PageState::new(PageClass::Hole),
        };
        let class = state.class();
        while self.drops.next_if(|run| run.frames.end() <= at).is_some() {}
        let dropped = match self.drops.peek() {
            Some(run) if run.frames.contains(at) => {
                end = end.min(run.frames.end());
                Some(run.fill)
            }
            Some(run) => {
                end = end.min(run.frames.start());
                None
            }
            None => None,
        };
        // A run's length has 32 bits in the file.
        end = end.min(at.checked_add(MAX_RUN).unwrap_or(end));
        let part = match dropped {
            Some(fill) => {
                let content = match fill {
                    Fill::Zero if state.is_zero() => PageContent::Zero,
                    Fill::Zero | Fill::Any => PageContent::Free { word: 0 },
                    Fill::Byte(byte) => PageContent::Free {
                        word: u64::from_ne_bytes([byte; 8]),
                    },
                };
                Part::Known(PageRun {
                    frames: PfnRange::new(at, end),
                    class,
                    content,
                })
            }
            None => self.kept(PfnRange::new(at, end), class, limit),
        };
        let part = match part {
            Part::Read(frames, class) => self.guessed(frames, class),
            part => part,
        };
        let end = match &part {
            Part::Known(run) => run.frames.end(),
            part => part.read()?.end(),
        };
        self.rest = PfnRange::new(end, self.rest.end());
        Some(part)
    }

    /// The first part of `frames`, which are to be read: of those that a guess is of, that part of
    /// it.
    fn guessed(&mut self, frames: PfnRange, class: PageClass) -> Part {
        let at = frames.start();
        while self
            .guesses
            .next_if(|guess| guess.frames.end() <= at)
            .is_some()
        {}
        match self.guesses.peek() {
            Some(guess) if guess.frames.contains(at) => {
                let frames = guess.frames.intersection(&frames);
                match guess.part(frames, self.info.page_size) {
                    Some(part) => Part::Guess(part, class),
                    None => Part::Read(frames, class),
                }
            }
            Some(guess) => {
                let end = frames.end().min(guess.frames.start());
                Part::Read(PfnRange::new(at, end), class)
            }
            None => Part::Read(frames, class),
        }
    }

    /// The first part of `frames`, none of which are dropped.
    fn kept(&self, frames: PfnRange, class: PageClass, limit: u64) -> Part {
        let page_size = self.info.page_size;
        let first = frames.start();
        let one = PfnRange::new(first, first.checked_add(1).unwrap_or(first));
        let region = first
            .gpa(page_size)
            .and_then(|at| Some((at, self.info.layout.region_of(at)?)))
            .map(|(at, region)| (at, region.whole_frames(page_size)))
            .filter(|(_, whole)| whole.contains(first));
        let Some((at, whole)) = region else {
            return Part::Read(one, class);
        };
        let frames = PfnRange::new(first, frames.end().min(whole.end()));
        let data = self.memory.next_data(at);
        let data_start = data.map_or(frames.end(), |data| data.start().pfn(page_size));
        if data_start > first {
            return Part::Known(PageRun {
                frames: PfnRange::new(first, frames.end().min(data_start)),
                class,
                content: PageContent::Zero,
            });
        }
        let data_end = data.map_or(first, |data| {
            Pfn::new(data.end().raw().div_ceil(page_size.bytes()))
        });
        let end = frames
            .end()
            .min(data_end.max(one.end()))
            .min(first.checked_add(limit).unwrap_or(frames.end()));
        Part::Read(PfnRange::new(first, end), class)
    }
}

/// Parts to be read at once.
pub(crate) struct Batch(Vec<Part>);

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let mut room = BATCH.div_ceil(self.info.page_size.bytes());
        let mut parts = Vec::new();
        while room > 0 && parts.len() < PARTS {
            let Some(part) = self.part(room) else { break };
            let read = part.read();
            parts.push(part);
            let Some(frames) = read else { continue };
            match room.checked_sub(frames.len()) {
                Some(left) => room = left,
                // It is none that was asked for, and fills the batch.
                None => break,
            }
        }
        (!parts.is_empty()).then_some(Batch(parts))
    }
}

/// The content of a page that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    /// The source has no bytes for it.
    Absent,
    /// One word, over and over.
    Word(u64),
    /// Bytes with this hash.
    Bytes(u64),
}

/// Buffers that are used again: fresh memory costs more than what is done with it here.
#[derive(Default)]
pub(crate) struct Buffers(Mutex<Vec<Vec<u8>>>);

/// More than are ever in use at once would only hold memory.
const KEPT_BUFFERS: usize = 64;

impl Buffers {
    /// A buffer of `len` bytes, whose content is left from before.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = free.pop().unwrap_or_default();
        drop(free);
        bytes.resize(len, 0);
        Buffer {
            bytes,
            home: Arc::clone(self),
        }
    }
}

/// A buffer that goes back where it came from.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

impl Buffer {
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Keeps the first `len` bytes.
    pub(crate) fn shorten(&mut self, len: usize) {
        self.bytes.truncate(len);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT_BUFFERS {
            free.push(core::mem::take(&mut self.bytes));
        }
    }
}

/// A batch that was read.
pub(crate) struct Scanned {
    pub parts: Vec<Part>,
    /// The bytes of all pages to be read, one behind the other.
    pub bytes: Arc<Buffer>,
    /// One for each of them.
    pub pages: Vec<Page>,
}

impl Batch {
    /// Reads the batch and looks at each page.
    pub(crate) fn scan(
        self,
        memory: &dyn GuestMemory,
        info: &CheckpointInfo,
        disks: &OnDisks<'_>,
        buffers: &Arc<Buffers>,
    ) -> Result<Scanned, CheckpointError> {
        let page_size = size(info.page_size.bytes());
        let read = self.0.iter().filter_map(Part::read);
        let count = read
            .map(|frames| frames.len())
            .try_fold(0, |sum, len| plus("frames of a batch", sum, len))?;
        let len = count.checked_mul(info.page_size.bytes());
        let len = len.ok_or_else(|| too_large("frames of a batch", count, u64::MAX))?;
        let count = size(count);
        let mut bytes = buffers.take(size(len));
        let mut pages = Vec::with_capacity(count);
        let mut parts = Vec::with_capacity(self.0.len());
        let mut rest = bytes.bytes.as_mut_slice();
        for part in self.0 {
            let Some(frames) = part.read() else {
                parts.push(part);
                continue;
            };
            let len = size(frames.len()).checked_mul(page_size);
            let split = len.and_then(|len| rest.split_at_mut_checked(len));
            let (now, later) = split.ok_or(CheckpointError::Worker)?;
            rest = later;
            let absent = read_frames(memory, info, frames, now)?;
            let first = pages.len();
            for (pfn, page) in frames.iter().zip(now.chunks_exact(page_size)) {
                pages.push(if absent.contains(&pfn) {
                    Page::Absent
                } else {
                    look_at(page)
                });
            }
            match part {
                Part::Guess(guess, class) => {
                    let found = pages.get(first..).ok_or(CheckpointError::Worker)?;
                    let guessed = Guessed {
                        guess,
                        class,
                        now,
                        pages: found,
                    };
                    guessed.compare(info, disks, &mut parts)?;
                }
                part => parts.push(part),
            }
        }
        Ok(Scanned {
            parts,
            bytes: Arc::new(bytes),
            pages,
        })
    }
}

/// Frames that were read, and what they may be on a disk.
struct Guessed<'a> {
    guess: DiskGuess,
    class: PageClass,
    /// Their bytes,
    now: &'a [u8],
    /// and what those are.
    pages: &'a [Page],
}

impl Guessed<'_> {
    /// Compares them with the disk, and adds what came of it to `parts`: only what is the same
    /// there is on the disk. What is one word over and over takes no room anyway.
    fn compare(
        &self,
        info: &CheckpointInfo,
        disks: &OnDisks<'_>,
        parts: &mut Vec<Part>,
    ) -> Result<(), CheckpointError> {
        let page = size(info.page_size.bytes());
        let mut there = Vec::new();
        let is_there = self.read(info, disks, &mut there)?;
        let number = |at: usize| {
            let last = self.pages.len().checked_sub(1)?;
            if self.guess.descending {
                last.checked_sub(at)
            } else {
                Some(at)
            }
        };
        let is_same = |at: usize| {
            let here = self.now.chunks_exact(page).nth(at);
            let there = there.chunks_exact(page).nth(number(at)?);
            let is_bytes = matches!(self.pages.get(at), Some(Page::Bytes(_)));
            Some(is_there && is_bytes && here? == there?)
        };
        let same: Vec<bool> = (0..self.pages.len())
            .map(|at| is_same(at).unwrap_or(false))
            .collect();
        let mut start = self.guess.frames.start();
        for run in same.chunk_by(|a, b| a == b) {
            let frames = PfnRange::with_len(start, to_u64(run.len()));
            let Some(frames) = frames.filter(|_| !run.is_empty()) else {
                break;
            };
            start = frames.end();
            parts.push(if run.first() == Some(&true) {
                self.on_disk(info, frames, &there)?
            } else {
                Part::Read(frames, self.class)
            });
        }
        Ok(())
    }

    /// Reads what the disk has; `false` if the disk ends before.
    fn read(
        &self,
        info: &CheckpointInfo,
        disks: &OnDisks<'_>,
        there: &mut Vec<u8>,
    ) -> Result<bool, CheckpointError> {
        let number = size(self.guess.disk.into());
        let (Some(disk), Some(known)) = (disks.disks.get(number), info.disks.get(number)) else {
            return Ok(false);
        };
        there.resize(self.now.len(), 0);
        let is_aligned = self.guess.at.raw().is_multiple_of(DISK_ALIGN);
        match disk.read_disk(there, self.guess.at) {
            Ok(()) => Ok(is_aligned),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(source) => Err(CheckpointError::DiskIo {
                name: known.name.clone(),
                at: self.guess.at,
                source,
            }),
        }
    }

    /// The record of `frames`, which are what the disk has `there`.
    fn on_disk(
        &self,
        info: &CheckpointInfo,
        frames: PfnRange,
        there: &[u8],
    ) -> Result<Part, CheckpointError> {
        let page_size = info.page_size;
        let part = self.guess.part(frames, page_size);
        let start = part.and_then(|part| part.at.offset_from(self.guess.at));
        let len = size(frames.len() << page_size.shift());
        let bytes = start.and_then(|start| there.get(size(start)..size(start).checked_add(len)?));
        let known = info.disks.get(size(self.guess.disk.into()));
        let Some(((part, bytes), known)) = part.zip(bytes).zip(known) else {
            return Ok(Part::Read(frames, self.class));
        };
        let run = DiskRun {
            disk: part.disk,
            at: part.at,
            pages: narrow("pages of a run on a disk", frames.len(), MAX_DISK_RUN)?,
            descending: part.descending && frames.len() > 1,
            digest: digest(known.hash, bytes)?,
        };
        Ok(Part::OnDisk(frames, self.class, run))
    }
}

fn look_at(page: &[u8]) -> Page {
    let Some((first, _)) = page.split_first_chunk::<8>() else {
        return Page::Bytes(checksum(page));
    };
    // Mostly the second word differs already.
    if page.chunks_exact(8).all(|word| word == first) {
        return Page::Word(u64::from_le_bytes(*first));
    }
    Page::Bytes(checksum(page))
}

/// The slots of pages by their content. Of fixed size: what does not fit is stored twice, which is
/// correct too.
pub(crate) struct Stored {
    entries: Vec<Entry>,
    mask: u64,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    hash: u64,
    /// The complement of the frame's number, which is zero for none: so an empty table is zeroes.
    frame: u64,
    slot: u64,
}

/// Entries: 24 MiB, for 4 GiB of different pages.
const ENTRIES: u64 = 1 << 20;
/// Places where an entry may be.
const WAYS: u64 = 4;

impl Stored {
    /// For at most `pages` pages.
    pub(crate) fn new(pages: Option<u64>) -> Self {
        // Twice as many entries, as far as there may be: it is only a size.
        let wanted = pages
            .and_then(|pages| pages.checked_mul(2)?.checked_next_power_of_two())
            .map_or(ENTRIES.trailing_zeros(), u64::trailing_zeros);
        let bits = wanted.clamp(6, ENTRIES.trailing_zeros());
        Self {
            entries: vec![Entry::default(); 1 << bits],
            mask: !(u64::MAX << bits),
        }
    }

    /// The stored pages that may have the bytes with this hash: frame and slot.
    pub(crate) fn candidates(&self, hash: u64) -> impl Iterator<Item = (Pfn, u64)> + '_ {
        (0..WAYS).filter_map(move |way| {
            let entry = self.entries.get(self.place(hash, way))?;
            let is_it = entry.frame != 0 && entry.hash == hash;
            is_it.then_some((Pfn::new(!entry.frame), entry.slot))
        })
    }

    fn place(&self, hash: u64, way: u64) -> usize {
        size((hash ^ way) & self.mask)
    }

    /// Remembers a page. The place of an older one is taken if there is no other.
    pub(crate) fn insert(&mut self, hash: u64, pfn: Pfn, slot: u64) {
        let way = (0..WAYS)
            .find(|way| {
                let entry = self.entries.get(self.place(hash, *way));
                entry.is_some_and(|entry| entry.frame == 0)
            })
            .unwrap_or((hash >> 62) % WAYS);
        let place = self.place(hash, way);
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = Entry {
                hash,
                frame: !pfn.raw(),
                slot,
            };
        }
    }
}

/// Whether the frame `pfn` of the source holds `page`.
pub(crate) fn same(
    memory: &dyn GuestMemory,
    pfn: Pfn,
    page_size: PageSize,
    page: &[u8],
    scratch: &mut Vec<u8>,
) -> bool {
    scratch.resize(page.len(), 0);
    pfn.gpa(page_size)
        .is_some_and(|at| memory.read(at, scratch).is_ok() && scratch == page)
}

#[cfg(test)]
mod tests {
    use super::{Buffers, KEPT_BUFFERS, Page, Stored, look_at};
    use crate::Pfn;
    use std::sync::Arc;

    #[test]
    fn pages_are_told_apart() {
        assert_eq!(look_at(&[0; 4096]), Page::Word(0));
        assert_eq!(look_at(&[0xaa; 4096]), Page::Word(0xaaaa_aaaa_aaaa_aaaa));
        let words: Vec<u8> = (0..8).cycle().take(4096).collect();
        assert_eq!(look_at(&words), Page::Word(0x0706_0504_0302_0100));
        let mut page = [0; 4096];
        page[4095] = 1;
        assert!(matches!(look_at(&page), Page::Bytes(_)));
    }

    #[test]
    fn what_is_kept_for_later_is_bounded() {
        for (pages, entries) in [(0, 64), (1000, 2048), (u64::MAX, 1 << 20)] {
            assert_eq!(Stored::new(Some(pages)).entries.len() as u64, entries);
        }
    }

    #[test]
    fn no_more_buffers_are_kept_than_a_bound() {
        for (used, kept) in [
            (3, 3),
            (KEPT_BUFFERS, KEPT_BUFFERS),
            (KEPT_BUFFERS + 9, KEPT_BUFFERS),
        ] {
            let buffers = Arc::new(Buffers::default());
            let all: Vec<_> = (0..used).map(|_| buffers.take(8)).collect();
            drop(all);
            assert_eq!(buffers.0.lock().unwrap().len(), kept, "{used}");
        }
    }

    #[test]
    fn stored_pages_are_found_again_and_make_room() {
        let mut stored = Stored::new(Some(1));
        for slot in 0..1000 {
            stored.insert(slot << 3, Pfn::new(slot + 5), slot);
            let found: Vec<_> = stored.candidates(slot << 3).collect();
            assert_eq!(found, [(Pfn::new(slot + 5), slot)]);
        }
        assert_eq!(stored.candidates(1 << 60).count(), 0);
    }
}
