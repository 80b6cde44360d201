//! Reads a checkpoint.

use super::codec::Decompressor;
use super::error::CheckpointError;
use super::index::{ChunkInfo, Index, ram_in};
use super::info::{CheckpointInfo, PageContent, PageRun};
use super::layout::{BlobEntry, Codec, FOOTER_LEN, Footer, Header, checksum, len64};
use super::scan::read_frames;
use super::source::RangeSource;
use super::writer::{SaveStats, same_layout};
use crate::{Gpa, GpaRange, GuestMemory, MemoryError, PageMap, Pfn, PfnRange, Progress, RamLayout};
use core::hash::Hasher;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use twox_hash::{XxHash3_64, XxHash3_128};

/// Longest stretch that is read at once for checksums.
const READ: usize = 1 << 20;
/// Chunks that stay decompressed for [`GuestMemory::read`].
const CACHED: usize = 8;
/// Runs that a thread takes at once.
const RUNS: usize = 64;

/// A checkpoint, opened: header and index are checked and in memory, page data is read when it
/// is asked for, and checked then.
///
/// It is [`GuestMemory`]: dropped pages read as what the guest expects, absent ones are an error.
///
/// ```no_run
/// use sonicshot::checkpoint::CheckpointReader;
/// let checkpoint = CheckpointReader::open("guest.sonic")?;
/// println!("{:?}", checkpoint.info());
/// # Ok::<(), sonicshot::checkpoint::CheckpointError>(())
/// ```
pub struct CheckpointReader<S> {
    source: S,
    header: Header,
    index: Index,
    footer: Footer,
    /// Least recently used first.
    cache: Mutex<Vec<ChunkDecoder>>,
}

impl CheckpointReader<File> {
    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read, is none, or is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Self::new(File::open(path).map_err(CheckpointError::read(0))?)
    }
}

impl<S: RangeSource> CheckpointReader<S> {
    /// Whether a file that begins with these bytes, 8 or more, is a checkpoint.
    #[must_use]
    pub fn is_checkpoint(start: &[u8]) -> bool {
        start.starts_with(&super::layout::MAGIC)
    }

    /// Opens the checkpoint that `source` holds.
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read, is none, or is damaged.
    pub fn new(source: S) -> Result<Self, CheckpointError> {
        let file_len = source.len().map_err(CheckpointError::read(0))?;
        let read = |offset: u64, len: u64, what| {
            let truncated = CheckpointError::Truncated {
                what,
                offset,
                need: len,
                len: file_len,
            };
            let end = offset.checked_add(len);
            let Some(size) = usize::try_from(len)
                .ok()
                .filter(|_| end.is_some_and(|end| end <= file_len))
            else {
                return Err(truncated);
            };
            let mut bytes = vec![0; size];
            source
                .read_at(&mut bytes, offset)
                .map_err(CheckpointError::read(offset))?;
            Ok(bytes)
        };
        let start = read(0, file_len.min(16), "the header")?;
        let header_len = Header::length(&start, file_len)?;
        let header = Header::decode(&read(0, header_len, "the header")?)?;
        let footer_at = file_len.saturating_sub(FOOTER_LEN);
        let footer = read(footer_at, file_len.min(FOOTER_LEN), "the footer")?;
        let footer = Footer::decode(&footer, file_len, header_len)?;
        let bytes = read(footer.index_offset, footer.index_len, "the index")?;
        let computed = checksum(&bytes);
        if computed != footer.index_checksum {
            return Err(CheckpointError::Checksum {
                what: "the index",
                offset: footer.index_offset,
                stored: footer.index_checksum.into(),
                computed: computed.into(),
            });
        }
        let index = Index::decode(bytes, footer.index_offset, header_len, &header)?;
        Ok(Self {
            source,
            header,
            index,
            footer,
            cache: Mutex::new(Vec::new()),
        })
    }

    /// What the checkpoint says of its guest.
    #[must_use]
    pub fn info(&self) -> &CheckpointInfo {
        &self.header.info
    }

    /// How page data is compressed: `none`, `lz4` or `zstd`.
    #[must_use]
    pub fn codec(&self) -> &'static str {
        self.header.codec.name()
    }

    /// Page data in a chunk, in bytes.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.index.chunk_size()
    }

    /// The length of the checkpoint in bytes.
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.footer.file_len
    }

    /// The digest of the whole file, as its footer has it: XXH3-128.
    #[must_use]
    pub fn digest(&self) -> u128 {
        self.footer.digest
    }

    /// Where the bytes come from.
    #[must_use]
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The blobs: name, and length in bytes.
    pub fn blobs(&self) -> impl Iterator<Item = (&str, u64)> {
        self.index
            .blobs
            .iter()
            .map(|blob| (blob.name.as_str(), blob.len))
    }

    fn find_blob(&self, name: &str) -> Result<&BlobEntry, CheckpointError> {
        let found = self.index.blobs.iter().find(|blob| blob.name == name);
        found.ok_or_else(|| CheckpointError::NoBlob { name: name.into() })
    }

    /// The blob `name`, checked.
    ///
    /// # Errors
    /// [`CheckpointError::NoBlob`], or why it cannot be read.
    pub fn read_blob(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let mut out = Vec::new();
        self.copy_blob(name, &mut out)?;
        Ok(out)
    }

    /// Writes the blob `name` to `out`. What was written counts only if this succeeds, for a
    /// blob is checked at its end.
    ///
    /// # Errors
    /// [`CheckpointError::NoBlob`], or why it cannot be read or written.
    pub fn copy_blob(&self, name: &str, out: &mut dyn Write) -> Result<(), CheckpointError> {
        let blob = self.find_blob(name)?;
        let mut left = blob.len;
        self.check_blob(blob, &mut |bytes| {
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            left = left.saturating_sub(len64(take));
            out.write_all(bytes.get(..take).unwrap_or_default())
                .map_err(CheckpointError::write(blob.offset))
        })
    }

    fn check_blob(
        &self,
        blob: &BlobEntry,
        each: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut sum = XxHash3_64::new();
        self.stretch(blob.offset, blob.stored_len, &mut |bytes| {
            sum.write(bytes);
            each(bytes)
        })?;
        let computed = sum.finish();
        if computed == blob.checksum {
            return Ok(());
        }
        Err(CheckpointError::Checksum {
            what: "a blob",
            offset: blob.offset,
            stored: blob.checksum.into(),
            computed: computed.into(),
        })
    }

    /// Reads a stretch of the file, piece by piece.
    fn stretch(
        &self,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut buffer = vec![0; READ.min(usize::try_from(len).unwrap_or(READ))];
        let mut done = 0_u64;
        while done < len {
            let left = usize::try_from(len.saturating_sub(done)).unwrap_or(usize::MAX);
            let take = left.min(buffer.len());
            let at = offset.saturating_add(done);
            let part = buffer.get_mut(..take).unwrap_or_default();
            self.source
                .read_at(part, at)
                .map_err(CheckpointError::read(at))?;
            each(part)?;
            done = done.saturating_add(len64(take));
        }
        Ok(())
    }

    /// All runs of pages, lowest first: every frame that holds RAM once.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        self.index.runs()
    }

    /// The parts of the runs that cover `frames`, lowest first.
    pub fn runs_in(&self, frames: PfnRange) -> impl Iterator<Item = PageRun> + '_ {
        self.index.runs_in(frames)
    }

    /// The run that holds `pfn`, if that is RAM.
    #[must_use]
    pub fn run_of(&self, pfn: Pfn) -> Option<PageRun> {
        self.index.run_of(pfn)
    }

    /// What is in the checkpoint.
    #[must_use]
    pub fn stats(&self) -> SaveStats {
        let mut stats = SaveStats {
            file_len: self.footer.file_len,
            digest: self.footer.digest,
            ..SaveStats::default()
        };
        for run in self.runs() {
            let count = match run.content {
                PageContent::Data { slot } if slot == stats.data => &mut stats.data,
                PageContent::Data { .. } => &mut stats.duplicate,
                PageContent::Zero => &mut stats.zero,
                PageContent::Fill { .. } => &mut stats.fill,
                PageContent::Free { .. } => &mut stats.free,
                PageContent::Absent => &mut stats.absent,
            };
            *count = count.saturating_add(run.frames.len());
            stats.runs = stats.runs.saturating_add(1);
        }
        for number in 0..self.index.chunk_count() {
            let len = self.index.chunk(number).map(|c| c.entry.stored_len);
            stats.stored_bytes = stats.stored_bytes.saturating_add(len.unwrap_or(0).into());
        }
        stats
    }

    /// The class of every frame, as it was when the checkpoint was written. The map takes a byte
    /// for each frame of RAM, however small the file is, so that `limit` says how many frames
    /// there may be.
    ///
    /// # Errors
    /// [`CheckpointError::TooLarge`] if there are more.
    pub fn page_map(&self, limit: u64) -> Result<PageMap, CheckpointError> {
        let info = &self.header.info;
        let frames = info.layout.bytes() >> info.page_size.shift();
        if frames > limit {
            return Err(CheckpointError::TooLarge {
                what: "frames for a map",
                value: frames,
                max: limit,
            });
        }
        let mut map = PageMap::new(&info.layout, info.page_size);
        for run in self.runs() {
            map.set(run.frames, run.class);
        }
        Ok(map)
    }

    /// Checks everything: the digest of the whole file, and that every chunk and blob is what
    /// its checksum says and decompresses.
    ///
    /// # Errors
    /// [`CheckpointError`] of the first damage found.
    pub fn verify(&self, progress: Progress<'_>) -> Result<(), CheckpointError>
    where
        S: Sync,
    {
        let mut digest = XxHash3_128::new();
        let covered = self
            .footer
            .file_len
            .saturating_sub(FOOTER_LEN)
            .saturating_add(Footer::digested_len());
        let mut done = 0_u64;
        let total = covered.saturating_mul(2);
        self.stretch(0, covered, &mut |bytes| {
            digest.write(bytes);
            done = done.saturating_add(len64(bytes.len()));
            progress(done, total);
            Ok(())
        })?;
        for blob in &self.index.blobs {
            self.check_blob(blob, &mut |_| Ok(()))?;
        }
        let chunks = usize::try_from(self.index.chunk_count()).unwrap_or(usize::MAX);
        parallel(chunks, 16, None, progress, (covered, total), |numbers| {
            let mut decoder = ChunkDecoder::new(self.header.codec);
            for number in numbers {
                if let Some(chunk) = self.index.chunk(len64(number)) {
                    decoder.load(self, &chunk)?;
                }
            }
            Ok(())
        })?;
        // Last, so that damage is told by its place where it has one.
        let computed = digest.finish_128();
        if computed == self.footer.digest {
            return Ok(());
        }
        Err(CheckpointError::Checksum {
            what: "the whole file",
            offset: 0,
            stored: self.footer.digest,
            computed,
        })
    }

    /// Compares every page that is not left out with the memory it came from. Returns how many
    /// pages were compared.
    ///
    /// # Errors
    /// [`CheckpointError::Differs`] at the first frame that differs, or why one of both cannot
    /// be read.
    pub fn verify_against(
        &self,
        memory: &dyn GuestMemory,
        progress: Progress<'_>,
    ) -> Result<u64, CheckpointError>
    where
        S: Sync,
    {
        same_layout(&self.header.info.layout, memory.layout())?;
        let compared = core::sync::atomic::AtomicU64::new(0);
        let total = len64(self.index.run_count());
        parallel(
            self.index.run_count(),
            RUNS,
            None,
            progress,
            (0, total),
            |numbers| {
                let mut decoder = ChunkDecoder::new(self.header.codec);
                for run in numbers.filter_map(|number| self.index.run(number)) {
                    let skip =
                        matches!(run.content, PageContent::Free { .. } | PageContent::Absent);
                    if !skip {
                        self.compare(&mut decoder, memory, &run)?;
                        compared.fetch_add(run.frames.len(), Ordering::Relaxed);
                    }
                }
                Ok(())
            },
        )?;
        Ok(compared.into_inner())
    }

    fn compare(
        &self,
        decoder: &mut ChunkDecoder,
        memory: &dyn GuestMemory,
        run: &PageRun,
    ) -> Result<(), CheckpointError> {
        let page_size = self.header.info.page_size;
        let page = usize::try_from(page_size.bytes()).unwrap_or(usize::MAX);
        let mut start = run.frames.start();
        let mut theirs = Vec::new();
        let mut ours = Vec::new();
        while start < run.frames.end() {
            // What the source knows to be zero need not be read for a zero page.
            if run.content.word() == Some(0)
                && let Some(at) = start.gpa(page_size)
                && self.header.info.layout.contains(at, page_size.bytes())
            {
                let next = match memory.next_data(at) {
                    Some(data) => data.start().pfn(page_size),
                    None => self
                        .header
                        .info
                        .layout
                        .region_of(at)
                        .map_or(start, |region| region.whole_frames(page_size).end()),
                };
                if next > start {
                    start = next;
                    continue;
                }
            }
            let end = start.checked_add(64).unwrap_or(start).min(run.frames.end());
            let frames = PfnRange::new(start, end);
            let len = usize::try_from(frames.len())
                .unwrap_or(0)
                .saturating_mul(page);
            theirs.resize(len, 0);
            ours.resize(len, 0);
            read_frames(memory, &self.header.info, frames, &mut theirs)?;
            for (pfn, out) in frames.iter().zip(ours.chunks_exact_mut(page)) {
                self.page_into(decoder, pfn, out)?;
            }
            if ours != theirs {
                let differ = ours.iter().zip(&theirs).zip(0_u64..);
                for ((found, expected), at) in differ {
                    if found != expected {
                        let pages = at >> page_size.shift();
                        return Err(CheckpointError::Differs {
                            pfn: start.checked_add(pages).unwrap_or(start),
                            byte: at & page_size.offset_mask(),
                            found: *found,
                            expected: *expected,
                        });
                    }
                }
            }
            start = end;
        }
        Ok(())
    }

    /// The page `pfn` into `out`, one page long.
    pub(crate) fn page_into(
        &self,
        decoder: &mut ChunkDecoder,
        pfn: Pfn,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let Some(run) = self.run_of(pfn) else {
            let at = pfn.gpa(self.header.info.page_size).unwrap_or(Gpa::ZERO);
            let range = GpaRange::with_len(at, len64(out.len()));
            let range = range.unwrap_or(GpaRange::new(at, at));
            return Err(MemoryError::NotRam { range }.into());
        };
        let content = super::index::clip(&run, PfnRange::new(pfn, run.frames.end()))
            .map_or(run.content, |run| run.content);
        match content {
            PageContent::Data { slot } => {
                let bytes = decoder.page(self, slot)?;
                if bytes.len() == out.len() {
                    out.copy_from_slice(bytes);
                }
            }
            other => fill_words(out, other.word().unwrap_or(0)),
        }
        Ok(())
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn header_codec(&self) -> Codec {
        self.header.codec
    }

    /// Fills `buf` with guest memory from `at`, which lies in one RAM range.
    fn read_memory(&self, at: Gpa, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let page_size = self.header.info.page_size;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let pfn = at.pfn(page_size);
            let inside = usize::try_from(at.raw() & page_size.offset_mask()).unwrap_or(0);
            let page = usize::try_from(page_size.bytes()).unwrap_or(usize::MAX);
            let take = page.saturating_sub(inside).min(rest.len());
            let Some((now, later)) = rest.split_at_mut_checked(take) else {
                break;
            };
            let content = self
                .run_of(pfn)
                .and_then(|run| super::index::clip(&run, PfnRange::new(pfn, run.frames.end())))
                .map(|run| run.content);
            match content {
                Some(PageContent::Data { slot }) => {
                    self.cached(slot, |bytes| {
                        if let Some(bytes) = bytes.get(inside..inside.saturating_add(take)) {
                            now.copy_from_slice(bytes);
                        }
                    })?;
                }
                Some(PageContent::Absent) | None => {
                    let range = GpaRange::with_len(at, len64(take));
                    let range = range.unwrap_or(GpaRange::new(at, at));
                    return Err(MemoryError::Absent { range }.into());
                }
                Some(other) => {
                    let word = other.word().unwrap_or(0).to_le_bytes();
                    let words = word.iter().cycle().skip(inside & 7);
                    for (out, byte) in now.iter_mut().zip(words) {
                        *out = *byte;
                    }
                }
            }
            rest = later;
            at = at.checked_add(len64(take)).unwrap_or(at);
        }
        Ok(())
    }

    /// Hands out the stored page `slot`, from a chunk that is kept if there is one.
    fn cached(&self, slot: u64, each: impl FnOnce(&[u8])) -> Result<(), CheckpointError> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.index.chunk_of(slot).map(|chunk| chunk.number);
        let found = cache.iter().position(|kept| kept.number == wanted);
        let mut decoder = match found {
            Some(position) => cache.remove(position),
            None if cache.len() >= CACHED => cache.remove(0),
            None => ChunkDecoder::new(self.header.codec),
        };
        let result = decoder.page(self, slot).map(each);
        cache.push(decoder);
        result
    }
}

/// Fills `out` with a word, as a little-endian guest has it in memory.
pub(crate) fn fill_words(out: &mut [u8], word: u64) {
    let bytes = word.to_le_bytes();
    if bytes == [bytes[0]; 8] {
        out.fill(bytes[0]);
        return;
    }
    for chunk in out.chunks_mut(8) {
        for (out, byte) in chunk.iter_mut().zip(bytes) {
            *out = byte;
        }
    }
}

impl<S: RangeSource> GuestMemory for CheckpointReader<S> {
    fn layout(&self) -> &RamLayout {
        &self.header.info.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = len64(buf.len());
        let range = GpaRange::with_len(at, len).unwrap_or(GpaRange::new(at, at));
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
        let mut found: Option<GpaRange> = None;
        for number in self.index.run_number(at.pfn(page_size))..self.index.run_count() {
            let run = self.index.run(number)?;
            let range = run.frames.gpa_range(page_size)?;
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
        let rest = GpaRange::new(at, region.end());
        found
            .map(|data| data.intersection(&rest))
            .filter(|data| !data.is_empty())
    }
}

impl<S> fmt::Debug for CheckpointReader<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointReader")
            .field("info", &self.header.info)
            .field("file_len", &self.footer.file_len)
            .finish_non_exhaustive()
    }
}

/// Reads and decompresses chunks, and keeps the last one; one a thread.
pub(crate) struct ChunkDecoder {
    decompressor: Decompressor,
    stored: Vec<u8>,
    data: Vec<u8>,
    number: Option<u64>,
}

impl ChunkDecoder {
    pub(crate) fn new(codec: Codec) -> Self {
        Self {
            decompressor: Decompressor::new(codec),
            stored: Vec::new(),
            data: Vec::new(),
            number: None,
        }
    }

    /// The page data of `chunk`.
    pub(crate) fn load<S: RangeSource>(
        &mut self,
        reader: &CheckpointReader<S>,
        chunk: &ChunkInfo,
    ) -> Result<&[u8], CheckpointError> {
        if self.number == Some(chunk.number) {
            return Ok(&self.data);
        }
        self.number = None;
        let entry = chunk.entry;
        let read = CheckpointError::read(entry.offset);
        self.data.resize(chunk.len, 0);
        // Its length was checked against the file's when the index was read.
        let stored = if entry.plain {
            &mut self.data
        } else {
            let len = usize::try_from(entry.stored_len).unwrap_or(0);
            self.stored.resize(len, 0);
            &mut self.stored
        };
        reader.source.read_at(stored, entry.offset).map_err(read)?;
        check_chunk(chunk, checksum(stored))?;
        if !entry.plain {
            self.decompressor
                .decompress(&self.stored, &mut self.data, entry.offset)?;
        }
        self.number = Some(chunk.number);
        Ok(&self.data)
    }

    /// The bytes of the stored page `slot`.
    pub(crate) fn page<S: RangeSource>(
        &mut self,
        reader: &CheckpointReader<S>,
        slot: u64,
    ) -> Result<&[u8], CheckpointError> {
        self.pages(reader, slot, 1)
    }

    /// The bytes of `count` stored pages from `slot`, all in one chunk.
    pub(crate) fn pages<S: RangeSource>(
        &mut self,
        reader: &CheckpointReader<S>,
        slot: u64,
        count: u64,
    ) -> Result<&[u8], CheckpointError> {
        let corrupt = || CheckpointError::Corrupt {
            what: "the stored page of a run",
            offset: reader.footer.index_offset,
            value: slot,
        };
        let chunk = reader.index.chunk_of(slot).ok_or_else(corrupt)?;
        let shift = reader.header.info.page_size.shift();
        let start = slot.saturating_sub(chunk.first_slot) << shift;
        let start = usize::try_from(start).map_err(|_| corrupt())?;
        let len = usize::try_from(count << shift).map_err(|_| corrupt())?;
        self.load(reader, &chunk)?
            .get(start..start.saturating_add(len))
            .ok_or_else(corrupt)
    }
}

/// Refuses a chunk whose stored bytes give another checksum.
pub(crate) fn check_chunk(chunk: &ChunkInfo, computed: u64) -> Result<(), CheckpointError> {
    if computed == chunk.entry.checksum {
        return Ok(());
    }
    Err(CheckpointError::Checksum {
        what: "page data",
        offset: chunk.entry.offset,
        stored: chunk.entry.checksum.into(),
        computed: computed.into(),
    })
}

/// The RAM in `frames`, lowest first.
pub(crate) fn ram_of(info: &CheckpointInfo, frames: PfnRange) -> impl Iterator<Item = GpaRange> {
    let none = GpaRange::new(Gpa::ZERO, Gpa::ZERO);
    ram_in(
        &info.layout,
        frames.gpa_range(info.page_size).unwrap_or(none),
    )
}

/// Does `count` things on all cores, `step` of them at a time; the first error ends it.
/// `progress` is told how far along the way from `.0` to `.1` the work is.
pub(crate) fn parallel(
    count: usize,
    step: usize,
    threads: Option<usize>,
    progress: Progress<'_>,
    (from, to): (u64, u64),
    each: impl Fn(core::ops::Range<usize>) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    let step = step.max(1);
    let threads = threads
        .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
        .unwrap_or(1)
        .clamp(1, 256)
        .min(count.div_ceil(step).max(1));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let one = |report: &mut dyn FnMut(usize)| {
        while !failed.load(Ordering::Relaxed) {
            let start = next.fetch_add(step, Ordering::Relaxed);
            if start >= count {
                break;
            }
            let end = start.saturating_add(step).min(count);
            if let Err(error) = each(start..end) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
            report(end);
        }
        Ok(())
    };
    let mut report = |done: usize| {
        let way = u128::from(to.saturating_sub(from));
        let part = way
            .saturating_mul(u128::from(len64(done)))
            .checked_div(u128::from(len64(count)))
            .unwrap_or(way);
        progress(
            from.saturating_add(u64::try_from(part).unwrap_or(u64::MAX)),
            to,
        );
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map(|_| scope.spawn(|| one(&mut |_| {})))
            .collect();
        let mut result = one(&mut report);
        for other in others {
            let theirs = other.join().unwrap_or(Err(CheckpointError::Worker));
            result = result.and(theirs);
        }
        result
    })
}
