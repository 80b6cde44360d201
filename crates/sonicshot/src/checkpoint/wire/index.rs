//! The index: which page is where. Kept as the bytes that it is in the file, and searched in place.

use super::disk::{DiskInfo, DiskRun};
use super::frames::covered_frames;
use super::header::{Codec, Header};
use super::info::{PageContent, PageRun};
use super::layout::{
    ALIGN, CHUNK_LEN, DISK_RUN_LEN, INDEX_HEAD, INDEX_MAGIC, MAX_DISKS, RUN_LEN, SECTION_BLOBS,
    SECTION_CHUNKS, SECTION_DISK_RUNS, SECTION_DISKS, SECTION_NEEDED, SECTION_RUNS, corrupt, plus,
    size,
};
use super::record::{BlobEntry, ChunkEntry, decode_run};
use crate::checkpoint::CheckpointError;
use crate::to_u64;
use crate::{Bytes, Cursor, CutShort, FileOffset, PageSize, Pfn, PfnRange};
use core::iter::Peekable;
use core::ops::Range;

/// A checkpoint's index, checked.
#[derive(Debug)]
pub(crate) struct Index {
    bytes: Vec<u8>,
    /// The offset of these bytes in the file.
    offset: FileOffset,
    runs: Range<usize>,
    chunks: Range<usize>,
    disk_records: Range<usize>,
    disk_runs: Range<usize>,
    pub blobs: Vec<BlobEntry>,
    /// The disks that pages are on.
    pub disks: Vec<DiskInfo>,
    /// The number of stored pages.
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
    /// The number of pages in it.
    pub pages: u64,
    /// Their length in bytes.
    pub len: usize,
}

impl ChunkInfo {
    /// The range of the `count` stored pages from `slot` in its page data: all of them are in it.
    pub(crate) fn bytes_of(
        &self,
        slot: u64,
        count: u64,
        page_size: PageSize,
    ) -> Result<Range<usize>, CheckpointError> {
        let first = slot.checked_sub(self.first_slot);
        first
            .and_then(|first| Some(first..first.checked_add(count)?))
            .filter(|pages| pages.end <= self.pages)
            // A chunk's length was checked, and these are inside.
            .map(|pages| {
                size(pages.start << page_size.shift())..size(pages.end << page_size.shift())
            })
            .ok_or(CheckpointError::Corrupt {
                what: "the stored page of a run",
                offset: self.entry.offset,
                value: slot,
            })
    }
}

impl Index {
    /// Reads the index that `bytes` are, which stand at `offset` in the file behind a header of
    /// `header_len` bytes, and checks that it covers the guest's RAM once, and the file once.
    pub(crate) fn decode(
        bytes: Vec<u8>,
        offset: FileOffset,
        header_len: u64,
        header: &Header,
    ) -> Result<Self, CheckpointError> {
        let Sections {
            slots,
            runs,
            chunks,
            blobs,
            disks,
        } = Sections::decode(&bytes, offset)?;
        if disks.is_some() != header.on_disks {
            return Err(corrupt(
                offset,
                "the sections of disks",
                0,
                u64::from(header.on_disks),
            ));
        }
        let (disk_records, disk_runs) = disks.unwrap_or((0..0, 0..0));
        let page_size = header.info.page_size;
        let mut index = Self {
            bytes,
            offset,
            runs,
            chunks,
            disk_records,
            disk_runs,
            blobs: Vec::new(),
            disks: Vec::new(),
            slots,
            page_size,
            pages_per_chunk: u64::from(header.chunk_size) >> page_size.shift(),
            chunk_size: header.chunk_size,
        };
        index.blobs = index.read_blobs(blobs)?;
        index.disks = index.read_disks()?;
        index.check_runs(header)?;
        index.check_places(header_len, header.codec)?;
        Ok(index)
    }

    /// An error of what stands at `at` in the index.
    fn corrupt(&self, what: &'static str, at: usize, value: u64) -> CheckpointError {
        corrupt(self.offset, what, to_u64(at), value)
    }

    fn read_blobs(&self, range: Range<usize>) -> Result<Vec<BlobEntry>, CheckpointError> {
        let mut out: Vec<BlobEntry> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let left = self.bytes.get(at..range.end);
            let Some((blob, len)) = left.and_then(BlobEntry::decode) else {
                let left = left.map_or(range.end, <[u8]>::len);
                return Err(self.corrupt("the record of a blob", at, to_u64(left)));
            };
            out.push(blob);
            at = size(plus("bytes of index", to_u64(at), to_u64(len))?);
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

    fn read_disks(&self) -> Result<Vec<DiskInfo>, CheckpointError> {
        let range = self.disk_records.clone();
        let mut out: Vec<DiskInfo> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let left = self.section(&(at..range.end));
            let (disk, len) =
                DiskInfo::decode(left).map_err(|(what, value)| self.corrupt(what, at, value))?;
            if out.iter().any(|other| other.name == disk.name) {
                return Err(CheckpointError::DiskTwice { name: disk.name });
            }
            out.push(disk);
            if to_u64(out.len()) > MAX_DISKS {
                return Err(self.corrupt("the number of disks", range.start, to_u64(out.len())));
            }
            at = size(plus("bytes of index", to_u64(at), to_u64(len))?);
        }
        Ok(out)
    }

    /// The run `record` on a disk.
    pub(crate) fn disk_run(&self, record: u64) -> Result<DiskRun, CheckpointError> {
        let place = size(record).checked_mul(DISK_RUN_LEN);
        let at = place.and_then(|place| place.checked_add(self.disk_runs.start));
        let end = at.and_then(|at| at.checked_add(DISK_RUN_LEN));
        let Some((at, end)) = at.zip(end).filter(|(_, end)| *end <= self.disk_runs.end) else {
            return Err(self.corrupt("the number of a run on a disk", self.runs.start, record));
        };
        let bytes = self.section(&(at..end));
        DiskRun::decode(bytes, &self.disks, self.page_size)
            .map_err(|(what, value)| self.corrupt(what, at, value))
    }

    /// The number of runs on disks.
    pub(crate) fn disk_run_count(&self) -> u64 {
        to_u64(self.disk_runs.len() / DISK_RUN_LEN)
    }

    /// The records of the disks as they stand in the file.
    pub(crate) fn disk_bytes(&self) -> &[u8] {
        self.section(&self.disk_records)
    }

    /// The runs on disks as they stand in the file.
    pub(crate) fn disk_run_bytes(&self) -> &[u8] {
        self.section(&self.disk_runs)
    }

    /// Every frame once, in order; every stored page once before it is referred to again; every run
    /// on a disk once, in order.
    fn check_runs(&self, header: &Header) -> Result<(), CheckpointError> {
        let count = self.run_count();
        if to_u64(count) > u64::from(u32::MAX) {
            return Err(self.corrupt("the number of runs", self.runs.start, to_u64(count)));
        }
        let mut expected = covered_frames(&header.info.layout, self.page_size).into_iter();
        let mut rest = PfnRange::new(Pfn::new(0), Pfn::new(0));
        let (mut stored, mut on_disk) = (0_u64, 0_u64);
        for number in 0..count {
            let run = self.run(number)?;
            let corrupt = |what, value| self.corrupt(what, self.place_of_run(number), value);
            if rest.is_empty() {
                rest = expected.next().unwrap_or(rest);
            }
            if run.frames.start() != rest.start() || run.frames.end() > rest.end() {
                return Err(corrupt(
                    "the first frame of a run",
                    run.frames.start().raw(),
                ));
            }
            rest = PfnRange::new(run.frames.end(), rest.end());
            if let PageContent::Data { slot } = run.content {
                stored = self
                    .stored_after(stored, slot, run.frames.len())
                    .ok_or_else(|| corrupt("the stored page of a run", slot))?;
            }
            if let PageContent::Disk { record, .. } = run.content {
                if record != on_disk {
                    return Err(corrupt("the number of a run on a disk", record));
                }
                let pages = self.disk_run(record)?.pages;
                if u64::from(pages) != run.frames.len() {
                    return Err(corrupt("the pages of a run on a disk", pages.into()));
                }
                on_disk = plus("runs on disks", on_disk, 1)?;
            }
        }
        if !rest.is_empty() || expected.next().is_some() {
            return Err(self.corrupt("the number of runs", self.runs.end, to_u64(count)));
        }
        if on_disk != self.disk_run_count() {
            let found = self.disk_run_count();
            return Err(self.corrupt("the number of runs on disks", self.disk_runs.start, found));
        }
        if stored != self.slots {
            return Err(self.corrupt("the number of stored pages", self.runs.start, self.slots));
        }
        Ok(())
    }

    /// The number of pages that are stored after a run of `count` from `slot`, if `stored` are before
    /// it: it stores the next ones, or refers again to some of one chunk.
    fn stored_after(&self, stored: u64, slot: u64, count: u64) -> Option<u64> {
        let end = slot.checked_add(count)?;
        let last = end.checked_sub(1)?;
        let chunk = |slot: u64| slot.checked_div(self.pages_per_chunk);
        if slot == stored {
            return (end <= self.slots).then_some(end);
        }
        (end <= stored && chunk(slot) == chunk(last)).then_some(stored)
    }

    /// Header, chunks, blobs and index fill the file without gap or overlap.
    fn check_places(&self, header_len: u64, codec: Codec) -> Result<(), CheckpointError> {
        let count = self.chunk_count();
        let expected = match self.pages_per_chunk {
            0 => 0,
            pages => self.slots.div_ceil(pages),
        };
        if count != expected {
            return Err(self.corrupt("the number of chunks", self.chunks.start, count));
        }
        let mut parts = Parts::new(FileOffset::new(header_len), self.offset, &self.blobs);
        for number in 0..count {
            parts.take_blobs()?;
            let chunk = self.chunk(number)?;
            parts
                .take_chunk(&chunk, codec)
                .map_err(|(what, value)| self.corrupt(what, self.place_of_chunk(number), value))?;
        }
        parts.take_blobs()?;
        parts.finish()
    }

    /// The offset of a run's record in the index; its end if there is no such run.
    fn place_of_run(&self, number: usize) -> usize {
        place_of(&self.runs, number, RUN_LEN).map_or(self.runs.end, |place| place.start)
    }

    fn place_of_chunk(&self, number: u64) -> usize {
        place_of(&self.chunks, size(number), CHUNK_LEN).map_or(self.chunks.end, |place| place.start)
    }

    /// Bytes of the index, all of which are there: none if they are not.
    fn section(&self, range: &Range<usize>) -> &[u8] {
        self.bytes.get(range.clone()).unwrap_or(&[])
    }

    /// The runs as they stand in the file.
    pub(crate) fn run_bytes(&self) -> &[u8] {
        self.section(&self.runs)
    }

    pub(crate) fn run_count(&self) -> usize {
        self.runs.len() / RUN_LEN
    }

    /// The run `number`.
    pub(crate) fn run(&self, number: usize) -> Result<PageRun, CheckpointError> {
        let Some(place) = place_of(&self.runs, number, RUN_LEN) else {
            return Err(self.corrupt("the number of a run", self.runs.end, to_u64(number)));
        };
        decode_run(self.section(&place))
            .map_err(|(what, value)| self.corrupt(what, place.start, value))
    }

    /// The number of the run that holds `pfn`, or of the next above it.
    pub(crate) fn run_number(&self, pfn: Pfn) -> usize {
        let (mut low, mut high) = (0, self.run_count());
        while low < high {
            let middle = low.midpoint(high);
            if self.run(middle).is_ok_and(|run| run.frames.end() <= pfn) {
                low = middle.checked_add(1).unwrap_or(high);
            } else {
                high = middle;
            }
        }
        low
    }

    /// The run that holds `pfn`.
    pub(crate) fn run_of(&self, pfn: Pfn) -> Option<PageRun> {
        self.run(self.run_number(pfn))
            .ok()
            .filter(|run| run.frames.contains(pfn))
    }

    /// All runs; each was decoded when the index was read.
    pub(crate) fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        (0..self.run_count()).map_while(|number| self.run(number).ok())
    }

    /// The parts of the runs that cover `frames`, lowest first.
    pub(crate) fn runs_in(&self, frames: PfnRange) -> impl Iterator<Item = PageRun> + '_ {
        (self.run_number(frames.start())..self.run_count())
            .map_while(|number| self.run(number).ok())
            .take_while(move |run| run.frames.start() < frames.end())
            .filter_map(move |run| clip(&run, frames))
    }

    pub(crate) fn chunk_count(&self) -> u64 {
        to_u64(self.chunks.len() / CHUNK_LEN)
    }

    /// The chunk `number`.
    pub(crate) fn chunk(&self, number: u64) -> Result<ChunkInfo, CheckpointError> {
        let at = self.place_of_chunk(number);
        self.chunk_at(number, at)
            .ok_or_else(|| self.corrupt("the record of a chunk", at, number))
    }

    fn chunk_at(&self, number: u64, at: usize) -> Option<ChunkInfo> {
        let end = at.checked_add(CHUNK_LEN)?;
        if end > self.chunks.end {
            return None;
        }
        let first_slot = number.checked_mul(self.pages_per_chunk)?;
        let pages = self
            .slots
            .checked_sub(first_slot)?
            .min(self.pages_per_chunk);
        Some(ChunkInfo {
            entry: ChunkEntry::decode(self.bytes.get(at..end)?)?,
            number,
            first_slot,
            pages,
            len: size(pages.checked_mul(self.page_size.bytes())?),
        })
    }

    /// The chunk that holds the stored page `slot`.
    pub(crate) fn chunk_of(&self, slot: u64) -> Result<ChunkInfo, CheckpointError> {
        match slot.checked_div(self.pages_per_chunk) {
            Some(number) if slot < self.slots => self.chunk(number),
            _ => Err(self.corrupt("the stored page of a run", self.runs.start, slot)),
        }
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.page_size
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
                    // The same sum as when the index was read.
                    stored = stored.checked_add(run.frames.len()).unwrap_or(self.slots);
                    stores.push(number);
                } else {
                    refers.push(number);
                }
            }
        }
        refers.sort_by_key(|number| self.slot(*number));
        (stores, refers)
    }

    /// The first slot of the data run `number`; beyond all of them if it is none.
    pub(crate) fn slot(&self, number: u32) -> u64 {
        match self.run(number as usize).map(|run| run.content) {
            Ok(PageContent::Data { slot }) => slot,
            _ => u64::MAX,
        }
    }
}

/// The place of the record `number` of those in `section`, which have `len` bytes each.
fn place_of(section: &Range<usize>, number: usize, len: usize) -> Option<Range<usize>> {
    let start = number.checked_mul(len)?.checked_add(section.start)?;
    let end = start.checked_add(len)?;
    (end <= section.end).then_some(start..end)
}

/// The places of an index's parts in its bytes.
struct Sections {
    slots: u64,
    runs: Range<usize>,
    chunks: Range<usize>,
    blobs: Range<usize>,
    /// The disks, and the runs on them.
    disks: Option<(Range<usize>, Range<usize>)>,
}

impl Sections {
    fn decode(bytes: &[u8], offset: FileOffset) -> Result<Self, CheckpointError> {
        let corrupt = |what, at, value| corrupt(offset, what, to_u64(at), value);
        let short = |_: CutShort| corrupt("the index's length", 0, to_u64(bytes.len()));
        let mut fields = Cursor::new(bytes);
        if !fields.is_at(&INDEX_MAGIC) {
            let found = fields.le().map_err(short)?;
            return Err(corrupt("the index's first word", 0, found));
        }
        fields.seek(to_u64(INDEX_MAGIC.len()));
        let count_at = size(fields.position());
        let count: u32 = fields.le().map_err(short)?;
        fields.skip(4).map_err(short)?;
        let slots = fields.le().map_err(short)?;
        let (mut runs, mut chunks, mut blobs) = (None, None, None);
        let (mut disks, mut disk_runs) = (None, None);
        fields.seek(to_u64(INDEX_HEAD));
        for _ in 0..count {
            let at = size(fields.position());
            let kind: u32 = fields.le().map_err(short)?;
            let flags: u32 = fields.le().map_err(short)?;
            let start: u64 = fields.le().map_err(short)?;
            let len_at = size(fields.position());
            let len: u64 = fields.le().map_err(short)?;
            let Some(end) = start
                .checked_add(len)
                .filter(|end| *end <= bytes.byte_len())
            else {
                return Err(corrupt("the length of a section", len_at, len));
            };
            let place = match kind {
                SECTION_RUNS => &mut runs,
                SECTION_CHUNKS => &mut chunks,
                SECTION_BLOBS => &mut blobs,
                SECTION_DISKS => &mut disks,
                SECTION_DISK_RUNS => &mut disk_runs,
                _ if flags & SECTION_NEEDED == 0 => continue,
                other => return Err(corrupt("the kind of a section", at, other.into())),
            };
            let range = size(start)..size(end);
            if place.replace(range).is_some() {
                return Err(corrupt("the kind of a second section", at, kind.into()));
            }
        }
        let (Some(runs), Some(chunks), Some(blobs)) = (runs, chunks, blobs) else {
            return Err(corrupt("the number of sections", count_at, count.into()));
        };
        if disks.is_some() != disk_runs.is_some() {
            return Err(corrupt("the number of sections", count_at, count.into()));
        }
        let disks = disks.zip(disk_runs);
        let disk_runs = disks.as_ref().map(|(_, runs)| (runs, DISK_RUN_LEN));
        for (range, record) in [(&runs, RUN_LEN), (&chunks, CHUNK_LEN)]
            .into_iter()
            .chain(disk_runs)
        {
            if !range.len().is_multiple_of(record) {
                let len = to_u64(range.len());
                return Err(corrupt("the length of a section", range.start, len));
            }
        }
        Ok(Self {
            slots,
            runs,
            chunks,
            blobs,
            disks,
        })
    }
}

/// Goes through the chunks and blobs of a file as they must follow each other.
struct Parts<'a> {
    /// The start of the next one.
    at: FileOffset,
    /// The start of the index.
    end: FileOffset,
    blobs: Peekable<std::vec::IntoIter<&'a BlobEntry>>,
}

impl<'a> Parts<'a> {
    fn new(start: FileOffset, end: FileOffset, blobs: &'a [BlobEntry]) -> Self {
        let mut blobs: Vec<&BlobEntry> = blobs.iter().collect();
        // Empty ones first: they stand where the next thing begins.
        blobs.sort_by_key(|blob| (blob.offset, blob.stored_len));
        Self {
            at: start,
            end,
            blobs: blobs.into_iter().peekable(),
        }
    }

    fn take_blobs(&mut self) -> Result<(), CheckpointError> {
        while let Some(blob) = self.blobs.next_if(|blob| blob.offset == self.at) {
            let padding = blob.stored_len.checked_sub(blob.len);
            let end = self.at.checked_add(blob.stored_len);
            let end = end.filter(|end| *end <= self.end);
            match end.filter(|_| padding.is_some_and(|padding| padding < ALIGN)) {
                Some(end) => self.at = end,
                None => {
                    return Err(CheckpointError::Corrupt {
                        what: "the length of a blob",
                        offset: self.at,
                        value: blob.stored_len,
                    });
                }
            }
        }
        Ok(())
    }

    /// The next chunk; else the field of its record that is wrong, and its value.
    fn take_chunk(&mut self, chunk: &ChunkInfo, codec: Codec) -> Result<(), (&'static str, u64)> {
        let entry = chunk.entry;
        let aligned = codec != Codec::None || self.at.raw().is_multiple_of(ALIGN);
        if entry.offset != self.at || !aligned {
            return Err(("the offset of a chunk", entry.offset.raw()));
        }
        let stored = u64::from(entry.stored_len);
        let fits = match (entry.plain, codec) {
            (true, _) => stored == to_u64(chunk.len),
            (false, Codec::None) => false,
            (false, _) => stored > 0 && stored < to_u64(chunk.len),
        };
        let end = self
            .at
            .checked_add(stored)
            .filter(|end| fits && *end <= self.end);
        self.at = end.ok_or(("the length of a chunk", stored))?;
        Ok(())
    }

    fn finish(mut self) -> Result<(), CheckpointError> {
        if let Some(blob) = self.blobs.next() {
            return Err(CheckpointError::Corrupt {
                what: "the offset of a blob",
                offset: self.at,
                value: blob.offset.raw(),
            });
        }
        if self.at != self.end {
            return Err(CheckpointError::Corrupt {
                what: "the end of the page data",
                offset: self.end,
                value: self.at.raw(),
            });
        }
        Ok(())
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
        PageContent::Disk { record, page } => PageContent::Disk {
            record,
            page: page.checked_add(skipped)?,
        },
        other => other,
    };
    Some(PageRun {
        frames: part,
        content,
        ..*run
    })
}
