//! A checkpoint as guest memory.

use super::chunk::ChunkDecoder;
use super::reader::CheckpointReader;
use super::source::RangeSource;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::frames::{copy_exact, copy_part, fill_words, range_of};
use crate::checkpoint::wire::index::clip;
use crate::checkpoint::wire::info::{PageContent, PageRun};
use crate::checkpoint::wire::layout::{size, too_large};
use crate::to_u64;
use crate::{Gpa, GpaRange, GuestMemory, MemoryError, Pfn, PfnRange, RamLayout};
use std::sync::PoisonError;

/// Chunks that stay decompressed for [`GuestMemory::read`].
const CACHED: usize = 8;

impl<S: RangeSource> CheckpointReader<S> {
    /// The content of the page `pfn`, if it is RAM.
    fn content_of(&self, pfn: Pfn) -> Option<PageContent> {
        let run = self.run_of(pfn)?;
        clip(&run, PfnRange::with_len(pfn, 1)?).map(|page| page.content)
    }

    /// The page `pfn` into `out`, one page long. What is absent is zero.
    pub(crate) fn page_into(
        &self,
        decoder: &mut ChunkDecoder,
        pfn: Pfn,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let at = range_of(&self.header.info, PfnRange::new(pfn, pfn))?.start();
        let not_ram = || MemoryError::NotRam {
            range: GpaRange::of_request(at, out.len()),
        };
        match self.content_of(pfn).ok_or_else(not_ram)? {
            PageContent::Data { slot } => copy_exact(self.pages(decoder, slot, 1)?, out, at)?,
            PageContent::Disk { record, page } => {
                let run = self.last_disk_run(record)?;
                let start = size(page << self.header.info.page_size.shift());
                copy_part(&run, start, out, at)?;
            }
            PageContent::Absent | PageContent::Zero => out.fill(0),
            PageContent::Fill { word } | PageContent::Free { word } => fill_words(out, word),
        }
        Ok(())
    }

    /// Fills `buf` with guest memory from `at`, which lies in one RAM range.
    fn read_memory(&self, at: Gpa, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let page_size = self.header.info.page_size;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let inside = size(at.raw() & page_size.offset_mask());
            let left = size(page_size.left_in_page(at.raw()));
            let (now, later) = rest.split_at_mut(left.min(rest.len()));
            self.read_in_page(at, inside, now)?;
            let range = GpaRange::of_request(at, now.len());
            rest = later;
            at = range.end();
        }
        Ok(())
    }

    /// Fills `out` with what is at `at`, which is `inside` bytes into its page, and in that page
    /// alone.
    fn read_in_page(&self, at: Gpa, inside: usize, out: &mut [u8]) -> Result<(), CheckpointError> {
        let page_size = self.header.info.page_size;
        let word = match self.content_of(at.pfn(page_size)) {
            Some(PageContent::Data { slot }) => {
                return self.cached(slot, |page| copy_part(page, inside, out, at));
            }
            Some(PageContent::Disk { record, page }) => {
                let run = self.last_disk_run(record)?;
                let start = size(page << page_size.shift());
                let start = start.checked_add(inside);
                let start = start.ok_or_else(|| too_large("a place in a run", page, u64::MAX))?;
                return copy_part(&run, start, out, at);
            }
            Some(PageContent::Zero) => 0,
            Some(PageContent::Fill { word } | PageContent::Free { word }) => word,
            Some(PageContent::Absent) | None => {
                let range = GpaRange::of_request(at, out.len());
                return Err(MemoryError::Absent { range }.into());
            }
        };
        let word = word.to_le_bytes();
        let bytes = word.iter().cycle().skip(inside & 7);
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = *byte;
        }
        Ok(())
    }

    /// Hands out the stored page `slot`, from a chunk that is kept if there is one.
    fn cached(
        &self,
        slot: u64,
        each: impl FnOnce(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let wanted = self.index.chunk_of(slot)?.number;
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let found = cache.iter().position(|kept| kept.number() == Some(wanted));
        let mut decoder = match found {
            Some(position) => cache.remove(position),
            None if cache.len() >= CACHED => cache.remove(0),
            None => self.decoder(),
        };
        let result = self.pages(&mut decoder, slot, 1).and_then(each);
        cache.push(decoder);
        result
    }
}

impl<S: RangeSource> GuestMemory for CheckpointReader<S> {
    fn layout(&self) -> &RamLayout {
        &self.header.info.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = to_u64(buf.len());
        let range = GpaRange::of_request(at, buf.len());
        if !self.header.info.layout.contains(at, len) {
            return Err(MemoryError::NotRam { range });
        }
        self.read_memory(at, buf).map_err(|error| match error {
            CheckpointError::Memory(error) => error,
            other => MemoryError::Backend {
                range,
                source: Box::new(other),
            },
        })
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        let page_size = self.header.info.page_size;
        let region = *self.header.info.layout.region_of(at)?;
        let has_data = |run: &PageRun| {
            // What is absent is not known to be zero.
            run.content.word() != Some(0) || run.content == PageContent::Absent
        };
        let rest = GpaRange::new(at, region.end());
        let mut found: Option<GpaRange> = None;
        for number in self.index.run_number(at.pfn(page_size))..self.index.run_count() {
            let run = self.index.run(number).ok();
            let Some((run, range)) =
                run.and_then(|run| Some((run, run.frames.gpa_range(page_size)?)))
            else {
                // Nothing is known of what cannot be told.
                return Some(rest);
            };
            if range.start() >= region.end() {
                break;
            }
            match &mut found {
                None if has_data(&run) => found = Some(range),
                Some(data) if has_data(&run) && data.end() == range.start() => {
                    *data = GpaRange::new(data.start(), range.end());
                }
                None => {}
                Some(_) => break,
            }
        }
        found
            .map(|data| data.intersection(&rest))
            .filter(|data| !data.is_empty())
    }
}
