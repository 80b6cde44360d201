//! The index: which page is where. Kept as the bytes that it is in the file, and searched in place.

use super::error::CheckpointError;
use super::info::{PageContent, PageRun};
use super::layout::{
    ALIGN, BlobEntry, CHUNK_LEN, ChunkEntry, Codec, Header, INDEX_HEAD, INDEX_MAGIC, RUN_LEN,
    SECTION_BLOBS, SECTION_CHUNKS, SECTION_LEN, SECTION_NEEDED, SECTION_RUNS, decode_run,
    encode_run, len64, pad, u32_at, u64_at,
};
use crate::{GpaRange, PageSize, Pfn, PfnRange, RamLayout};
use core::ops::Range;

/// The frames that hold RAM, also those that RAM fills only in part: sorted, disjoint, with
/// holes between.
pub(crate) fn covered_frames(layout: &RamLayout, page_size: PageSize) -> Vec<PfnRange> {
    let mut out: Vec<PfnRange> = Vec::new();
    for region in layout.regions() {
        let end = Pfn::new(region.end().raw().div_ceil(page_size.bytes()));
        let frames = PfnRange::new(region.start().pfn(page_size), end);
        match out.last_mut() {
            Some(last) if frames.start() <= last.end() => {
                *last = PfnRange::new(last.start(), end);
            }
            _ => out.push(frames),
        }
    }
    out
}

/// The RAM in `range`, lowest first.
pub(crate) fn ram_in(layout: &RamLayout, range: GpaRange) -> impl Iterator<Item = GpaRange> + '_ {
    let regions = layout.regions();
    let first = regions.partition_point(|region| region.end() <= range.start());
    regions
        .iter()
        .skip(first)
        .map(move |region| region.intersection(&range))
        .take_while(|part| !part.is_empty())
}

/// Puts an index together while a checkpoint is written.
#[derive(Debug)]
pub(crate) struct IndexBuilder {
    pages_per_chunk: u64,
    runs: Vec<u8>,
    /// Not in `runs` yet: it may grow. And whether it stores pages for the first time.
    last: Option<(PageRun, bool)>,
    chunks: Vec<u8>,
    blobs: Vec<BlobEntry>,
    /// Pages stored so far.
    pub slots: u64,
    run_count: u64,
}

impl IndexBuilder {
    pub(crate) fn new(pages_per_chunk: u64) -> Self {
        Self {
            pages_per_chunk,
            runs: Vec::new(),
            last: None,
            chunks: Vec::new(),
            blobs: Vec::new(),
            slots: 0,
            run_count: 0,
        }
    }

    /// Adds the run of pages that comes next. `stores` says that its data is stored for the
    /// first time, not referred to again.
    pub(crate) fn push(&mut self, run: PageRun, stores: bool) {
        if let Some((last, last_stores)) = &mut self.last
            && *last_stores == stores
            && self.pages_per_chunk > 0
            && let Some(joined) = join(last, &run, stores, self.pages_per_chunk)
        {
            *last = joined;
            return;
        }
        self.flush();
        self.last = Some((run, stores));
    }

    fn flush(&mut self) {
        if let Some((run, _)) = self.last.take() {
            encode_run(&run, &mut self.runs);
            self.run_count = self.run_count.saturating_add(1);
        }
    }

    pub(crate) fn run_count(&self) -> u64 {
        self.run_count
            .saturating_add(u64::from(self.last.is_some()))
    }

    pub(crate) fn push_chunk(&mut self, chunk: &ChunkEntry) {
        chunk.encode(&mut self.chunks);
    }

    pub(crate) fn has_blob(&self, name: &str) -> bool {
        self.blobs.iter().any(|blob| blob.name == name)
    }

    pub(crate) fn push_blob(&mut self, blob: BlobEntry) {
        self.blobs.push(blob);
    }

    /// The index as it stands in the file.
    pub(crate) fn encode(mut self) -> Vec<u8> {
        self.flush();
        let mut blobs = Vec::new();
        for blob in &self.blobs {
            blob.encode(&mut blobs);
        }
        let sections = [
            (SECTION_RUNS, &self.runs),
            (SECTION_CHUNKS, &self.chunks),
            (SECTION_BLOBS, &blobs),
        ];
        let mut out = Vec::with_capacity(self.runs.len().saturating_add(self.chunks.len()));
        out.extend(INDEX_MAGIC);
        out.extend(u32::try_from(sections.len()).unwrap_or(0).to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.slots.to_le_bytes());
        out.extend([0; 8]);
        let mut at = INDEX_HEAD.saturating_add(sections.len().saturating_mul(SECTION_LEN));
        for (kind, bytes) in &sections {
            out.extend(kind.to_le_bytes());
            out.extend(SECTION_NEEDED.to_le_bytes());
            out.extend(len64(at).to_le_bytes());
            out.extend(len64(bytes.len()).to_le_bytes());
            at = at.saturating_add(bytes.len().next_multiple_of(8));
        }
        for (_, bytes) in sections {
            out.extend(bytes);
            pad(&mut out, 8);
        }
        out
    }
}

/// Both runs as one, if that says the same.
fn join(last: &PageRun, next: &PageRun, stores: bool, pages_per_chunk: u64) -> Option<PageRun> {
    if last.class != next.class || last.frames.end() != next.frames.start() {
        return None;
    }
    match (last.content, next.content) {
        (PageContent::Data { slot }, PageContent::Data { slot: next_slot }) => {
            if slot.checked_add(last.frames.len()) != Some(next_slot) {
                return None;
            }
            let end = next_slot.checked_add(next.frames.len())?.checked_sub(1)?;
            let chunk = |slot: u64| slot.checked_div(pages_per_chunk);
            // What refers to stored pages again stays inside one chunk, so that a restore
            // finds it by the chunk.
            if !stores && chunk(slot) != chunk(end) {
                return None;
            }
        }
        (a, b) if a == b => {}
        _ => return None,
    }
    let frames = PfnRange::new(last.frames.start(), next.frames.end());
    (frames.len() <= u64::from(u32::MAX)).then_some(PageRun { frames, ..*last })
}

/// A checkpoint's index, checked.
#[derive(Debug)]
pub(crate) struct Index {
    bytes: Vec<u8>,
    runs: Range<usize>,
    chunks: Range<usize>,
    pub blobs: Vec<BlobEntry>,
    /// How many pages are stored.
    pub slots: u64,
    page_size: PageSize,
    pages_per_chunk: u64,
    chunk_size: u32,
}

/// The chunk that holds a stored page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkInfo {
    pub entry: ChunkEntry,
    pub number: u64,
    pub first_slot: u64,
    /// How many pages are in it.
    pub pages: u64,
    /// Their length in bytes.
    pub len: usize,
}

impl Index {
    /// Reads the index that `bytes` are, which stand at `offset` in the file behind a header of
    /// `header_len` bytes, and checks that it covers the guest's RAM once, and the file once.
    pub(crate) fn decode(
        bytes: Vec<u8>,
        offset: u64,
        header_len: u64,
        header: &Header,
    ) -> Result<Self, CheckpointError> {
        let corrupt = |what, at: usize, value| CheckpointError::Corrupt {
            what,
            offset: offset.saturating_add(len64(at)),
            value,
        };
        let short = || corrupt("the index's length", 0, len64(bytes.len()));
        if bytes.get(..8) != Some(INDEX_MAGIC.as_slice()) {
            return Err(corrupt(
                "the index's first word",
                0,
                u64_at(&bytes, 0).unwrap_or(0),
            ));
        }
        let count = u32_at(&bytes, 8).ok_or_else(short)?;
        let slots = u64_at(&bytes, 16).ok_or_else(short)?;
        let (mut runs, mut chunks, mut blobs) = (None, None, None);
        let mut at = INDEX_HEAD;
        for _ in 0..count {
            let kind = u32_at(&bytes, at).ok_or_else(short)?;
            let flags = u32_at(&bytes, at.saturating_add(4)).ok_or_else(short)?;
            let start = u64_at(&bytes, at.saturating_add(8)).ok_or_else(short)?;
            let len = u64_at(&bytes, at.saturating_add(16)).ok_or_else(short)?;
            let range = usize::try_from(start)
                .ok()
                .zip(
                    start
                        .checked_add(len)
                        .and_then(|end| usize::try_from(end).ok()),
                )
                .map(|(start, end)| start..end)
                .filter(|range| bytes.get(range.clone()).is_some())
                .ok_or_else(|| corrupt("the length of a section", at.saturating_add(16), len))?;
            let place = match kind {
                SECTION_RUNS => &mut runs,
                SECTION_CHUNKS => &mut chunks,
                SECTION_BLOBS => &mut blobs,
                _ if flags & SECTION_NEEDED == 0 => {
                    at = at.saturating_add(SECTION_LEN);
                    continue;
                }
                other => return Err(corrupt("the kind of a section", at, other.into())),
            };
            if place.replace(range).is_some() {
                return Err(corrupt("the kind of a second section", at, kind.into()));
            }
            at = at.saturating_add(SECTION_LEN);
        }
        let (Some(runs), Some(chunks), Some(blobs)) = (runs, chunks, blobs) else {
            return Err(corrupt("the number of sections", 8, count.into()));
        };
        for (range, len) in [(&runs, RUN_LEN), (&chunks, CHUNK_LEN)] {
            if !range.len().is_multiple_of(len) {
                return Err(corrupt(
                    "the length of a section",
                    range.start,
                    len64(range.len()),
                ));
            }
        }
        let page_size = header.info.page_size;
        let mut index = Self {
            runs,
            chunks,
            blobs: Vec::new(),
            slots,
            page_size,
            pages_per_chunk: u64::from(header.chunk_size) >> page_size.shift(),
            chunk_size: header.chunk_size,
            bytes,
        };
        index.blobs = index.read_blobs(blobs, offset)?;
        index.check_runs(offset, header)?;
        index.check_places(offset, header_len, header.codec)?;
        Ok(index)
    }

    fn read_blobs(
        &self,
        range: Range<usize>,
        offset: u64,
    ) -> Result<Vec<BlobEntry>, CheckpointError> {
        let mut out: Vec<BlobEntry> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (blob, len) = self
                .bytes
                .get(at..range.end)
                .and_then(BlobEntry::decode)
                .ok_or_else(|| CheckpointError::Corrupt {
                    what: "the record of a blob",
                    offset: offset.saturating_add(len64(at)),
                    value: len64(range.end.saturating_sub(at)),
                })?;
            out.push(blob);
            at = at.saturating_add(len);
        }
        let mut names: Vec<&str> = out.iter().map(|blob| blob.name.as_str()).collect();
        names.sort_unstable();
        if let Some([name, _]) = names.windows(2).find(|pair| pair.first() == pair.last()) {
            return Err(CheckpointError::BlobExists {
                name: (*name).to_owned(),
            });
        }
        Ok(out)
    }

    /// Every frame once, in order; every stored page once before it is referred to again.
    fn check_runs(&self, offset: u64, header: &Header) -> Result<(), CheckpointError> {
        let place = |number: usize| {
            let at = self
                .runs
                .start
                .saturating_add(number.saturating_mul(RUN_LEN));
            offset.saturating_add(len64(at))
        };
        let corrupt = |what, number, value| CheckpointError::Corrupt {
            what,
            offset: place(number),
            value,
        };
        if self.run_count() > u32::MAX as usize {
            return Err(corrupt("the number of runs", 0, len64(self.run_count())));
        }
        let mut expected = covered_frames(&header.info.layout, self.page_size).into_iter();
        let mut rest = PfnRange::new(Pfn::new(0), Pfn::new(0));
        let mut stored = 0_u64;
        for number in 0..self.run_count() {
            let run = self
                .decode_run(number)
                .map_err(|(what, value)| corrupt(what, number, value))?;
            if rest.is_empty() {
                rest = expected.next().unwrap_or(rest);
            }
            if run.frames.start() != rest.start() || run.frames.end() > rest.end() {
                let value = run.frames.start().raw();
                return Err(corrupt("the first frame of a run", number, value));
            }
            rest = PfnRange::new(run.frames.end(), rest.end());
            if let PageContent::Data { slot } = run.content {
                let end = slot.checked_add(run.frames.len());
                if slot == stored && end.is_some_and(|end| end <= self.slots) {
                    stored = end.unwrap_or(stored);
                } else if !end.is_some_and(|end| end <= stored && self.one_chunk(slot, end)) {
                    return Err(corrupt("the stored page of a run", number, slot));
                }
            }
        }
        if !rest.is_empty() || expected.next().is_some() {
            let count = len64(self.run_count());
            return Err(corrupt("the number of runs", self.run_count(), count));
        }
        if stored != self.slots {
            return Err(corrupt("the number of stored pages", 0, self.slots));
        }
        Ok(())
    }

    fn one_chunk(&self, slot: u64, end: u64) -> bool {
        let last = end.saturating_sub(1);
        slot.checked_div(self.pages_per_chunk) == last.checked_div(self.pages_per_chunk)
    }

    /// Header, chunks, blobs and index fill the file without gap or overlap.
    fn check_places(
        &self,
        offset: u64,
        header_len: u64,
        codec: Codec,
    ) -> Result<(), CheckpointError> {
        let place = |number: u64| {
            offset
                .saturating_add(len64(self.chunks.start))
                .saturating_add(number.saturating_mul(CHUNK_LEN as u64))
        };
        let corrupt = |what, number, value| CheckpointError::Corrupt {
            what,
            offset: place(number),
            value,
        };
        let count = self.chunk_count();
        let expected = match self.pages_per_chunk {
            0 => 0,
            pages => self.slots.div_ceil(pages),
        };
        if count != expected {
            return Err(corrupt("the number of chunks", 0, count));
        }
        let mut blobs: Vec<&BlobEntry> = self.blobs.iter().collect();
        // Empty ones first: they stand where the next thing begins.
        blobs.sort_by_key(|blob| (blob.offset, blob.stored_len));
        let mut blobs = blobs.into_iter().peekable();
        let mut at = header_len;
        let mut take_blobs = |at: &mut u64| {
            while let Some(blob) = blobs.next_if(|blob| blob.offset == *at) {
                let end = at.checked_add(blob.stored_len);
                if blob.len > blob.stored_len
                    || blob.stored_len.saturating_sub(blob.len) >= ALIGN
                    || end.is_none_or(|end| end > offset)
                {
                    return Err(CheckpointError::Corrupt {
                        what: "the length of a blob",
                        offset: *at,
                        value: blob.stored_len,
                    });
                }
                *at = end.unwrap_or(*at);
            }
            Ok(())
        };
        for number in 0..count {
            take_blobs(&mut at)?;
            let chunk = self
                .chunk(number)
                .ok_or_else(|| corrupt("the record of a chunk", number, number))?;
            let entry = chunk.entry;
            if entry.offset != at || (codec == Codec::None && !at.is_multiple_of(ALIGN)) {
                return Err(corrupt("the offset of a chunk", number, entry.offset));
            }
            let fits = match (entry.plain, codec) {
                (true, _) => entry.stored_len as usize == chunk.len,
                (false, Codec::None) => false,
                (false, _) => entry.stored_len > 0 && (entry.stored_len as usize) < chunk.len,
            };
            at = at.saturating_add(entry.stored_len.into());
            if !fits || at > offset {
                let value = entry.stored_len.into();
                return Err(corrupt("the length of a chunk", number, value));
            }
        }
        take_blobs(&mut at)?;
        if let Some(blob) = blobs.next() {
            return Err(CheckpointError::Corrupt {
                what: "the offset of a blob",
                offset: at,
                value: blob.offset,
            });
        }
        if at != offset {
            return Err(CheckpointError::Corrupt {
                what: "the end of the page data",
                offset,
                value: at,
            });
        }
        Ok(())
    }

    pub(crate) fn run_count(&self) -> usize {
        self.runs.len() / RUN_LEN
    }

    fn decode_run(&self, number: usize) -> Result<PageRun, (&'static str, u64)> {
        let at = number
            .checked_mul(RUN_LEN)
            .and_then(|at| at.checked_add(self.runs.start));
        let bytes = at.and_then(|at| self.bytes.get(at..at.checked_add(RUN_LEN)?));
        decode_run(bytes.unwrap_or_default())
    }

    /// The run `number`.
    pub(crate) fn run(&self, number: usize) -> Option<PageRun> {
        if number >= self.run_count() {
            return None;
        }
        self.decode_run(number).ok()
    }

    /// The number of the run that holds `pfn`, or of the next above it.
    pub(crate) fn run_number(&self, pfn: Pfn) -> usize {
        let (mut low, mut high) = (0, self.run_count());
        while low < high {
            let middle = low.midpoint(high);
            if self.run(middle).is_some_and(|run| run.frames.end() <= pfn) {
                low = middle.saturating_add(1);
            } else {
                high = middle;
            }
        }
        low
    }

    /// The run that holds `pfn`.
    pub(crate) fn run_of(&self, pfn: Pfn) -> Option<PageRun> {
        self.run(self.run_number(pfn))
            .filter(|run| run.frames.contains(pfn))
    }

    pub(crate) fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        (0..self.run_count()).filter_map(|number| self.run(number))
    }

    /// The parts of the runs that cover `frames`, lowest first.
    pub(crate) fn runs_in(&self, frames: PfnRange) -> impl Iterator<Item = PageRun> + '_ {
        (self.run_number(frames.start())..self.run_count())
            .filter_map(|number| self.run(number))
            .take_while(move |run| run.frames.start() < frames.end())
            .filter_map(move |run| clip(&run, frames))
    }

    pub(crate) fn chunk_count(&self) -> u64 {
        len64(self.chunks.len() / CHUNK_LEN)
    }

    /// The chunk `number`.
    pub(crate) fn chunk(&self, number: u64) -> Option<ChunkInfo> {
        let at = usize::try_from(number)
            .ok()?
            .checked_mul(CHUNK_LEN)?
            .checked_add(self.chunks.start)?;
        let end = at.checked_add(CHUNK_LEN)?;
        if end > self.chunks.end {
            return None;
        }
        let first_slot = number.checked_mul(self.pages_per_chunk)?;
        let pages = self
            .slots
            .checked_sub(first_slot)?
            .min(self.pages_per_chunk);
        let len = usize::try_from(pages.checked_mul(self.page_size.bytes())?).ok()?;
        Some(ChunkInfo {
            entry: ChunkEntry::decode(self.bytes.get(at..end)?)?,
            number,
            first_slot,
            pages,
            len,
        })
    }

    /// The chunk that holds the stored page `slot`.
    pub(crate) fn chunk_of(&self, slot: u64) -> Option<ChunkInfo> {
        self.chunk(slot.checked_div(self.pages_per_chunk)?)
    }

    pub(crate) fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// The runs with data: those that store pages, by their slots, and those that refer to
    /// stored pages again, sorted by slot.
    pub(crate) fn by_slot(&self) -> (Vec<u32>, Vec<u32>) {
        let (mut stores, mut refers) = (Vec::new(), Vec::new());
        let mut stored = 0_u64;
        for (number, run) in (0..).zip(self.runs()) {
            if let PageContent::Data { slot } = run.content {
                if slot == stored {
                    stored = stored.saturating_add(run.frames.len());
                    stores.push(number);
                } else {
                    refers.push(number);
                }
            }
        }
        refers.sort_by_key(|number| self.slot(*number));
        (stores, refers)
    }

    /// The first slot of the data run `number`.
    pub(crate) fn slot(&self, number: u32) -> u64 {
        match self.run(number as usize).map(|run| run.content) {
            Some(PageContent::Data { slot }) => slot,
            _ => u64::MAX,
        }
    }
}

/// The part of `run` that lies in `frames`, if any.
pub(crate) fn clip(run: &PageRun, frames: PfnRange) -> Option<PageRun> {
    let part = run.frames.intersection(&frames);
    if part.is_empty() {
        return None;
    }
    let skipped = part.start().offset_from(run.frames.start())?;
    let content = match run.content {
        PageContent::Data { slot } => PageContent::Data {
            slot: slot.checked_add(skipped)?,
        },
        other => other,
    };
    Some(PageRun {
        frames: part,
        content,
        ..*run
    })
}
