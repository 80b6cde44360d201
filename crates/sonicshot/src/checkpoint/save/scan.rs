//! The first pass over the memory to be saved: what is to be read, and what the pages hold.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::frames::{covered_frames, read_frames};
use crate::checkpoint::wire::info::{CheckpointInfo, PageContent, PageRun};
use crate::checkpoint::wire::layout::{MAX_RUN, checksum, size};
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

/// A stretch of frames, in the order of the memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// Its content is known without reading it.
    Known(PageRun),
    /// To be read.
    Read(PfnRange, PageClass),
}

/// Goes through the guest's RAM, lowest first, in batches of parts.
pub(crate) struct Batches<'a> {
    memory: &'a dyn GuestMemory,
    info: &'a CheckpointInfo,
    ranges: std::vec::IntoIter<PfnRange>,
    /// What is left of the current range.
    rest: PfnRange,
    states: Peekable<Box<dyn Iterator<Item = (PfnRange, PageState)> + 'a>>,
    drops: Peekable<core::slice::Iter<'a, DropRun>>,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(
        memory: &'a dyn GuestMemory,
        info: &'a CheckpointInfo,
        map: &'a PageMap,
        plan: &'a PrunePlan,
    ) -> Self {
        let states: Box<dyn Iterator<Item = _> + 'a> = Box::new(map.states());
        Self {
            memory,
            info,
            ranges: covered_frames(&info.layout, info.page_size).into_iter(),
            rest: PfnRange::new(Pfn::new(0), Pfn::new(0)),
            states: states.peekable(),
            drops: plan.runs().iter().peekable(),
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
        let (Part::Known(PageRun { frames, .. }) | Part::Read(frames, _)) = part;
        self.rest = PfnRange::new(frames.end(), self.rest.end());
        Some(part)
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
        let mut room = (BATCH >> self.info.page_size.shift()).max(1);
        let mut parts = Vec::new();
        while room > 0 && parts.len() < PARTS {
            let Some(part) = self.part(room) else { break };
            if let Part::Read(frames, _) = part {
                room = room.saturating_sub(frames.len());
            }
            parts.push(part);
        }
        (!parts.is_empty()).then_some(Batch(parts))
    }
}

/// What a page that was read holds.
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
        buffers: &Arc<Buffers>,
    ) -> Result<Scanned, CheckpointError> {
        let page_size = size(info.page_size.bytes());
        // A batch is small.
        let count = self.0.iter().fold(0_u64, |sum, part| match part {
            Part::Read(frames, _) => sum.saturating_add(frames.len()),
            Part::Known(_) => sum,
        });
        let count = size(count);
        let mut bytes = buffers.take(count.saturating_mul(page_size));
        let mut pages = Vec::with_capacity(count);
        let mut rest = bytes.bytes.as_mut_slice();
        for part in &self.0 {
            let Part::Read(frames, _) = part else {
                continue;
            };
            // Of one length with the frames, or they are not read.
            let len = size(frames.len()).saturating_mul(page_size);
            let (now, later) = rest.split_at_mut_checked(len).unwrap_or_default();
            rest = later;
            let absent = read_frames(memory, info, *frames, now)?;
            for (pfn, page) in frames.iter().zip(now.chunks_exact(page_size)) {
                pages.push(if absent.contains(&pfn) {
                    Page::Absent
                } else {
                    look_at(page)
                });
            }
        }
        Ok(Scanned {
            parts: self.0,
            bytes: Arc::new(bytes),
            pages,
        })
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

/// Where pages with some content are stored already. Of fixed size: what does not fit is stored
/// twice, which is correct too.
pub(crate) struct Stored {
    entries: Vec<Entry>,
    mask: u64,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    hash: u64,
    /// Frame and slot are one more than they are; 0 is empty.
    pfn: u64,
    slot: u64,
}

/// Entries: 24 MiB, for 4 GiB of different pages.
const ENTRIES: u64 = 1 << 20;
/// Places where an entry may be.
const WAYS: u64 = 4;

impl Stored {
    /// For at most `pages` pages.
    pub(crate) fn new(pages: u64) -> Self {
        let len = pages
            .saturating_mul(2)
            .clamp(64, ENTRIES)
            .next_power_of_two();
        Self {
            entries: vec![Entry::default(); size(len)],
            mask: len.saturating_sub(1),
        }
    }

    /// The stored pages that may have the bytes with this hash: frame and slot.
    pub(crate) fn candidates(&self, hash: u64) -> impl Iterator<Item = (Pfn, u64)> + '_ {
        (0..WAYS).filter_map(move |way| {
            let entry = self.entries.get(self.place(hash, way))?;
            if entry.hash != hash {
                return None;
            }
            Some((
                Pfn::new(entry.pfn.checked_sub(1)?),
                entry.slot.checked_sub(1)?,
            ))
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
                entry.is_some_and(|entry| entry.pfn == 0)
            })
            .unwrap_or((hash >> 62) % WAYS);
        let place = self.place(hash, way);
        if let Some(entry) = self.entries.get_mut(place) {
            *entry = Entry {
                hash,
                pfn: pfn.raw().saturating_add(1),
                slot: slot.saturating_add(1),
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
    use super::{Buffers, ENTRIES, KEPT_BUFFERS, Page, Stored, look_at};
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
        for (pages, entries) in [(0, 64), (1000, 2048), (u64::MAX, ENTRIES)] {
            assert_eq!(Stored::new(pages).entries.len() as u64, entries);
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
        let mut stored = Stored::new(1);
        for slot in 0..1000 {
            stored.insert(slot << 3, Pfn::new(slot + 5), slot);
            let found: Vec<_> = stored.candidates(slot << 3).collect();
            assert_eq!(found, [(Pfn::new(slot + 5), slot)]);
        }
        assert_eq!(stored.candidates(1 << 60).count(), 0);
    }
}
