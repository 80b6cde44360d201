//! Writes a checkpoint, front to back, on all cores.

use super::codec::Compressor;
use super::error::CheckpointError;
use super::index::IndexBuilder;
use super::info::{CheckpointInfo, Compression, PageContent, PageRun};
use super::layout::{
    ALIGN, BlobEntry, ChunkEntry, Codec, FOOTER_LEN, Footer, Header, MAX_BLOB_NAME, MAX_CHUNK,
    align_up, checksum, len64,
};
use super::scan::{Batch, Batches, Buffer, Buffers, Page, Part, Scanned, Stored, same};
use crate::{Gpa, GuestMemory, PageMap, Pfn, PfnRange, Progress, PrunePlan, RamLayout};
use core::hash::Hasher;
use core::num::NonZeroUsize;
use core::ops::Range;
use std::collections::VecDeque;
use std::fmt;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use twox_hash::{XxHash3_64, XxHash3_128};

/// How a checkpoint is written.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SaveOptions {
    /// How page data is stored.
    pub compression: Compression,
    /// Page data in a chunk, in bytes: what a restore decompresses for one page. A multiple of
    /// the page size, at most 16 MiB.
    pub chunk_size: u32,
    /// How many threads read and compress; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// Whether pages with the same content are stored once.
    pub deduplicate: bool,
}

impl SaveOptions {
    /// 64 KiB: on real guests 256 KiB are 1.5 % smaller, and take four times as long for a
    /// single page.
    pub const CHUNK_SIZE: u32 = 64 << 10;

    /// The defaults, with this compression.
    #[must_use]
    pub const fn new(compression: Compression) -> Self {
        Self {
            compression,
            chunk_size: Self::CHUNK_SIZE,
            threads: None,
            deduplicate: true,
        }
    }
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self::new(Compression::None)
    }
}

/// What a checkpoint holds, in pages and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SaveStats {
    /// Pages whose bytes are stored.
    pub data: u64,
    /// Pages that have the same bytes as a stored one.
    pub duplicate: u64,
    /// Pages in use that are zero.
    pub zero: u64,
    /// Pages in use that are one word, over and over.
    pub fill: u64,
    /// Pages left out.
    pub free: u64,
    /// Pages that the source has no bytes for.
    pub absent: u64,
    /// Bytes of page data, as stored.
    pub stored_bytes: u64,
    /// The length of the checkpoint in bytes.
    pub file_len: u64,
    /// Runs of pages in the index.
    pub runs: u64,
    /// The digest of the whole file.
    pub digest: u128,
}

/// Writes a checkpoint to anything that takes bytes: a file, a pipe, a socket.
///
/// Nothing is written twice and nothing is sought. Memory use is bounded: some MiB of page data a
/// thread, 24 MiB to find duplicates, and the index (24 bytes for each run of like pages and each
/// chunk).
///
/// ```
/// use sonicshot::checkpoint::*;
/// use sonicshot::*;
///
/// let ram = vec![7_u8; 16 * 4096];
/// let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
/// let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K); // from LinuxGuest::classify
/// map.set(PfnRange::new(Pfn::new(4), Pfn::new(16)), PageClass::FreeBuddy);
/// let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
///
/// let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
/// let mut writer = CheckpointWriter::new(Vec::new(), info, SaveOptions::default())?;
/// writer.blob("device-state", &b"the VMM's own"[..])?;
/// writer.memory(&guest, &map, &plan, &mut |_, _| {})?;
/// let (file, stats) = writer.finish()?;
/// assert_eq!(stats.free, 12);
///
/// let checkpoint = CheckpointReader::new(file)?;
/// assert_eq!(checkpoint.read_blob("device-state")?, b"the VMM's own");
/// assert_eq!(checkpoint.read_u64(Gpa::new(4096))?, 0x0707_0707_0707_0707);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CheckpointWriter<W> {
    sink: Sink<W>,
    header: Header,
    options: SaveOptions,
    index: IndexBuilder,
    stats: SaveStats,
    memory_times: u32,
}

impl<W: Write> CheckpointWriter<W> {
    /// Begins a checkpoint of the guest that `info` describes.
    ///
    /// # Errors
    /// [`CheckpointError`] if the options cannot be, or writing fails.
    pub fn new(
        out: W,
        info: CheckpointInfo,
        mut options: SaveOptions,
    ) -> Result<Self, CheckpointError> {
        let page = info.page_size.bytes();
        options.chunk_size = options
            .chunk_size
            .max(u32::try_from(page).unwrap_or(u32::MAX));
        let chunk = u64::from(options.chunk_size);
        if chunk > MAX_CHUNK || chunk & info.page_size.offset_mask() != 0 {
            return Err(CheckpointError::TooLarge {
                what: "a chunk that is not whole pages, or so long",
                value: chunk,
                max: MAX_CHUNK,
            });
        }
        // To fail now rather than after the first pages.
        let _ = Compressor::new(options.compression)?;
        let header = Header {
            codec: Codec::of(options.compression),
            chunk_size: options.chunk_size,
            compatible: 0,
            info,
        };
        let mut sink = Sink {
            out,
            offset: 0,
            digest: XxHash3_128::new(),
        };
        sink.write(&header.encode()?)?;
        Ok(Self {
            sink,
            index: IndexBuilder::new(chunk >> header.info.page_size.shift()),
            header,
            options,
            stats: SaveStats::default(),
            memory_times: 0,
        })
    }

    /// Adds a blob of the VMM's own: device state, configuration. Its name has at most 255 bytes.
    ///
    /// # Errors
    /// [`CheckpointError::BlobExists`], [`CheckpointError::TooLarge`], or what reading and
    /// writing give.
    pub fn blob(&mut self, name: &str, mut content: impl Read) -> Result<(), CheckpointError> {
        let name_len = len64(name.len());
        if name_len == 0 || name_len > MAX_BLOB_NAME {
            return Err(CheckpointError::TooLarge {
                what: "bytes of a blob's name",
                value: name_len,
                max: MAX_BLOB_NAME,
            });
        }
        if self.index.has_blob(name) {
            return Err(CheckpointError::BlobExists { name: name.into() });
        }
        let offset = self.sink.offset;
        let mut sum = XxHash3_64::new();
        let mut buffer = vec![0; 64 << 10];
        let mut len = 0_u64;
        loop {
            let got = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(got) => got,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(CheckpointError::read(len)(error)),
            };
            let bytes = buffer.get(..got).unwrap_or_default();
            sum.write(bytes);
            self.sink.write(bytes)?;
            len = len.saturating_add(len64(got));
        }
        if self.header.codec == Codec::None {
            // What follows may be page data, to be mapped.
            let end = align_up(self.sink.offset, ALIGN).saturating_sub(self.sink.offset);
            let zeroes = vec![0; usize::try_from(end).unwrap_or(0)];
            sum.write(&zeroes);
            self.sink.write(&zeroes)?;
        }
        self.index.push_blob(BlobEntry {
            name: name.into(),
            offset,
            stored_len: self.sink.offset.saturating_sub(offset),
            len,
            checksum: sum.finish(),
        });
        Ok(())
    }

    /// Adds the guest's memory: the pages that `plan` keeps, and of the others what they must
    /// read as. The guest, and whatever else writes its memory, must be paused.
    ///
    /// # Errors
    /// [`CheckpointError`] if `memory` or `map` are not of the guest that the checkpoint was
    /// begun for, or reading or writing fails. The checkpoint cannot be finished then.
    pub fn memory(
        &mut self,
        memory: &dyn GuestMemory,
        map: &PageMap,
        plan: &PrunePlan,
        progress: Progress<'_>,
    ) -> Result<(), CheckpointError> {
        let info = self.header.info.clone();
        same_layout(&info.layout, memory.layout())?;
        for page_size in [map.page_size(), plan.page_size()] {
            if page_size != info.page_size {
                return Err(CheckpointError::TooLarge {
                    what: "pages of another size than the checkpoint's",
                    value: page_size.bytes(),
                    max: info.page_size.bytes(),
                });
            }
        }
        self.memory_times = self.memory_times.saturating_add(1);
        if self.memory_times != 1 {
            return Err(CheckpointError::MemoryTimes {
                times: self.memory_times,
            });
        }
        let threads = self
            .options
            .threads
            .or_else(|| std::thread::available_parallelism().ok())
            .map_or(1, NonZeroUsize::get)
            .min(256);
        let shared = Shared {
            memory,
            info: &info,
            compression: self.options.compression,
            buffers: Arc::default(),
            outputs: Arc::default(),
        };
        let kept = map.total().saturating_sub(plan.dropped_pages());
        let queue = Queue::default();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| work(&shared, &queue));
            }
            let mut saving = Saving {
                pages_per_chunk: u64::from(self.options.chunk_size) >> info.page_size.shift(),
                writer: self,
                shared: &shared,
                page: usize::try_from(info.page_size.bytes()).unwrap_or(usize::MAX),
                queue: &queue,
                depth: threads.saturating_add(1),
                scans: VecDeque::new(),
                packs: VecDeque::new(),
                chunk: Vec::new(),
                chunk_pages: 0,
                full: Vec::new(),
                full_bytes: 0,
                stored: Stored::new(kept),
                scratch: Vec::new(),
                done: 0,
            };
            saving.all(Batches::new(memory, &info, map, plan), progress)
            // Dropping `saving` closes the queue, which ends the workers.
        })
    }

    /// Writes index and footer. Returns what was written to, flushed, and what is in it.
    ///
    /// # Errors
    /// [`CheckpointError::MemoryTimes`] if there is no memory in it, or what writing gives.
    pub fn finish(mut self) -> Result<(W, SaveStats), CheckpointError> {
        if self.memory_times != 1 {
            return Err(CheckpointError::MemoryTimes {
                times: self.memory_times,
            });
        }
        self.stats.runs = self.index.run_count();
        let index = self.index.encode();
        let index_offset = self.sink.offset;
        self.sink.write(&index)?;
        let mut footer = Footer {
            index_offset,
            index_len: len64(index.len()),
            index_checksum: checksum(&index),
            file_len: self.sink.offset.saturating_add(FOOTER_LEN),
            digest: 0,
        };
        let mut digest = self.sink.digest.clone();
        digest.write(&footer.digested());
        footer.digest = digest.finish_128();
        self.sink.write(&footer.encode())?;
        let offset = self.sink.offset;
        self.sink
            .out
            .flush()
            .map_err(CheckpointError::write(offset))?;
        self.stats.file_len = offset;
        self.stats.digest = footer.digest;
        Ok((self.sink.out, self.stats))
    }
}

impl<W> fmt::Debug for CheckpointWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointWriter")
            .field("info", &self.header.info)
            .field("offset", &self.sink.offset)
            .finish_non_exhaustive()
    }
}

/// Refuses memory that is not where the checkpoint says.
pub(crate) fn same_layout(ours: &RamLayout, theirs: &RamLayout) -> Result<(), CheckpointError> {
    if ours == theirs {
        return Ok(());
    }
    let bounds = |layout: &RamLayout| {
        let regions = layout.regions().iter();
        regions
            .flat_map(|region| [region.start(), region.end()])
            .collect::<Vec<_>>()
    };
    let (ours, theirs) = (bounds(ours), bounds(theirs));
    let differ = ours.iter().zip(&theirs).find(|(a, b)| a != b);
    let at = match differ {
        Some((a, b)) => *a.min(b),
        None => *ours
            .get(theirs.len())
            .or_else(|| theirs.get(ours.len()))
            .unwrap_or(&Gpa::ZERO),
    };
    Err(CheckpointError::Layout { at })
}

/// Where the bytes go, and what all of them give.
struct Sink<W> {
    out: W,
    offset: u64,
    digest: XxHash3_128,
}

impl<W: Write> Sink<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.out
            .write_all(bytes)
            .map_err(CheckpointError::write(self.offset))?;
        self.digest.write(bytes);
        self.offset = self.offset.saturating_add(len64(bytes.len()));
        Ok(())
    }
}

/// What all workers see.
struct Shared<'a> {
    memory: &'a dyn GuestMemory,
    info: &'a CheckpointInfo,
    compression: Compression,
    buffers: Arc<Buffers>,
    /// For compressed chunks.
    outputs: Arc<Buffers>,
}

/// A stretch of a batch's bytes.
struct Piece {
    bytes: Arc<Buffer>,
    range: Range<usize>,
}

impl Piece {
    fn get(&self) -> &[u8] {
        self.bytes.get(self.range.clone()).unwrap_or_default()
    }
}

/// A chunk as it goes into the file.
struct Packed {
    content: Content,
    checksum: u64,
}

enum Content {
    Plain(Vec<Piece>),
    Compressed(Buffer, usize),
}

/// Page data that is packed in one job: handing over jobs takes time too.
const GROUP: usize = 512 << 10;

type Answer<T> = Result<T, CheckpointError>;

enum Job {
    Scan(Batch, SyncSender<Answer<Scanned>>),
    Pack(Vec<Vec<Piece>>, SyncSender<Answer<Vec<Packed>>>),
}

/// Jobs for the workers, oldest first.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    ready: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, job: Job) {
        self.lock().jobs.push_back(job);
        self.ready.notify_one();
    }

    /// The next job; waits for it. `None` when there will be no more.
    fn pop(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self
                .ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }
}

fn work(shared: &Shared<'_>, queue: &Queue) {
    let mut compressor = None;
    let mut input = Vec::new();
    while let Some(job) = queue.pop() {
        // Who asked may have failed and gone; nobody needs the answer then.
        match job {
            Job::Scan(batch, answer) => {
                let _ = answer.send(batch.scan(shared.memory, shared.info, &shared.buffers));
            }
            Job::Pack(chunks, answer) => {
                let all = |compressor: &mut Compressor| {
                    chunks
                        .into_iter()
                        .map(|pieces| pack(compressor, pieces, &mut input, &shared.outputs))
                        .collect()
                };
                let packed = match &mut compressor {
                    Some(compressor) => all(compressor),
                    none => {
                        Compressor::new(shared.compression).and_then(|new| all(none.insert(new)))
                    }
                };
                let _ = answer.send(packed);
            }
        }
    }
}

fn pack(
    compressor: &mut Compressor,
    pieces: Vec<Piece>,
    input: &mut Vec<u8>,
    outputs: &Arc<Buffers>,
) -> Answer<Packed> {
    if compressor.compresses() {
        let whole = match pieces.as_slice() {
            [only] => only.get(),
            _ => {
                input.clear();
                for piece in &pieces {
                    input.extend_from_slice(piece.get());
                }
                input
            }
        };
        let mut output = outputs.take(compressor.bound(whole.len()));
        if let Some(len) = compressor.compress(whole, output.bytes_mut())? {
            return Ok(Packed {
                checksum: checksum(output.get(..len).unwrap_or_default()),
                content: Content::Compressed(output, len),
            });
        }
    }
    let sum = match pieces.as_slice() {
        [only] => checksum(only.get()),
        _ => {
            let mut sum = XxHash3_64::new();
            for piece in &pieces {
                sum.write(piece.get());
            }
            sum.finish()
        }
    };
    Ok(Packed {
        content: Content::Plain(pieces),
        checksum: sum,
    })
}

/// A save under way. Workers scan batches and pack chunks; this thread decides, in the order of
/// the memory, what is stored where, and writes.
struct Saving<'a, 'w, W> {
    writer: &'w mut CheckpointWriter<W>,
    shared: &'a Shared<'a>,
    page: usize,
    pages_per_chunk: u64,
    queue: &'a Queue,
    /// How many batches, and how many groups of chunks, are under way at most.
    depth: usize,
    scans: VecDeque<Receiver<Answer<Scanned>>>,
    packs: VecDeque<Receiver<Answer<Vec<Packed>>>>,
    /// The chunk that is not full yet.
    chunk: Vec<Piece>,
    chunk_pages: u64,
    /// Full chunks, to be packed together.
    full: Vec<Vec<Piece>>,
    full_bytes: usize,
    stored: Stored,
    scratch: Vec<u8>,
    /// Pages looked at.
    done: u64,
}

impl<W> Drop for Saving<'_, '_, W> {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl<W: Write> Saving<'_, '_, W> {
    fn all(&mut self, batches: Batches<'_>, progress: Progress<'_>) -> Result<(), CheckpointError> {
        let info = self.shared.info;
        let total = info.layout.bytes();
        let mut batches = batches.fuse();
        loop {
            while self.scans.len() < self.depth
                && let Some(batch) = batches.next()
            {
                let (answer, scanned) = sync_channel(1);
                self.queue.push(Job::Scan(batch, answer));
                self.scans.push_back(scanned);
            }
            let Some(scanned) = self.scans.pop_front() else {
                break;
            };
            let scanned = scanned.recv().map_err(|_| CheckpointError::Worker)??;
            self.place(&scanned)?;
            self.write_ready()?;
            let done = self.done.saturating_mul(info.page_size.bytes());
            progress(done.min(total), total);
        }
        self.close_chunk()?;
        self.submit_chunks()?;
        while !self.packs.is_empty() {
            self.write_oldest()?;
        }
        progress(total, total);
        Ok(())
    }

    /// Decides for each page of a batch where its content is.
    fn place(&mut self, scanned: &Scanned) -> Result<(), CheckpointError> {
        let mut pages = scanned.pages.iter().zip(0_usize..);
        for part in &scanned.parts {
            match *part {
                Part::Known(run) => self.push(run, false),
                Part::Read(frames, class) => {
                    for (pfn, (page, number)) in frames.iter().zip(&mut pages) {
                        let frames = PfnRange::with_len(pfn, 1).unwrap_or(frames);
                        let (content, stores) = self.content(scanned, pfn, *page, number)?;
                        self.push(
                            PageRun {
                                frames,
                                class,
                                content,
                            },
                            stores,
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// What the page is in the checkpoint, and whether its bytes are stored now.
    fn content(
        &mut self,
        scanned: &Scanned,
        pfn: Pfn,
        page: Page,
        number: usize,
    ) -> Result<(PageContent, bool), CheckpointError> {
        let hash = match page {
            Page::Absent => return Ok((PageContent::Absent, false)),
            Page::Word(0) => return Ok((PageContent::Zero, false)),
            Page::Word(word) => return Ok((PageContent::Fill { word }, false)),
            Page::Bytes(hash) => hash,
        };
        let start = number.saturating_mul(self.page);
        let range = start..start.saturating_add(self.page);
        if self.writer.options.deduplicate {
            let bytes = scanned.bytes.get(range.clone()).unwrap_or_default();
            let Shared { memory, info, .. } = self.shared;
            for (twin, slot) in self.stored.candidates(hash) {
                // A guest can make pages of the same hash: only the same bytes count.
                if same(*memory, twin, info.page_size, bytes, &mut self.scratch) {
                    return Ok((PageContent::Data { slot }, false));
                }
            }
        }
        let slot = self.writer.index.slots;
        self.writer.index.slots = slot.saturating_add(1);
        // A frame that RAM fills only in part cannot be compared by reading it whole.
        if self.writer.options.deduplicate
            && self
                .shared
                .info
                .layout
                .has_frame(pfn, self.shared.info.page_size)
        {
            self.stored.insert(hash, pfn, slot);
        }
        match self.chunk.last_mut() {
            Some(last)
                if last.range.end == range.start && Arc::ptr_eq(&last.bytes, &scanned.bytes) =>
            {
                last.range.end = range.end;
            }
            _ => self.chunk.push(Piece {
                bytes: Arc::clone(&scanned.bytes),
                range,
            }),
        }
        self.chunk_pages = self.chunk_pages.saturating_add(1);
        if self.chunk_pages >= self.pages_per_chunk {
            self.close_chunk()?;
        }
        Ok((PageContent::Data { slot }, true))
    }

    fn push(&mut self, run: PageRun, stores: bool) {
        let stats = &mut self.writer.stats;
        let count = match run.content {
            PageContent::Data { .. } if stores => &mut stats.data,
            PageContent::Data { .. } => &mut stats.duplicate,
            PageContent::Zero => &mut stats.zero,
            PageContent::Fill { .. } => &mut stats.fill,
            PageContent::Free { .. } => &mut stats.free,
            PageContent::Absent => &mut stats.absent,
        };
        *count = count.saturating_add(run.frames.len());
        self.done = self.done.saturating_add(run.frames.len());
        self.writer.index.push(run, stores);
    }

    fn close_chunk(&mut self) -> Result<(), CheckpointError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.chunk_pages = 0;
        let pieces = core::mem::take(&mut self.chunk);
        for piece in &pieces {
            self.full_bytes = self.full_bytes.saturating_add(piece.range.len());
        }
        self.full.push(pieces);
        if self.full_bytes >= GROUP {
            self.submit_chunks()?;
        }
        Ok(())
    }

    fn submit_chunks(&mut self) -> Result<(), CheckpointError> {
        if self.full.is_empty() {
            return Ok(());
        }
        self.full_bytes = 0;
        let (answer, packed) = sync_channel(1);
        let chunks = core::mem::take(&mut self.full);
        self.queue.push(Job::Pack(chunks, answer));
        self.packs.push_back(packed);
        if self.packs.len() > self.depth.saturating_mul(2) {
            self.write_oldest()?;
        }
        Ok(())
    }

    /// Writes the chunks that are packed, as far as they come next.
    fn write_ready(&mut self) -> Result<(), CheckpointError> {
        while let Some(oldest) = self.packs.front() {
            match oldest.try_recv() {
                Ok(packed) => {
                    self.packs.pop_front();
                    for packed in packed? {
                        self.write(&packed)?;
                    }
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(CheckpointError::Worker),
            }
        }
        Ok(())
    }

    fn write_oldest(&mut self) -> Result<(), CheckpointError> {
        match self.packs.pop_front() {
            Some(oldest) => {
                for packed in oldest.recv().map_err(|_| CheckpointError::Worker)?? {
                    self.write(&packed)?;
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn write(&mut self, packed: &Packed) -> Result<(), CheckpointError> {
        let sink = &mut self.writer.sink;
        let offset = sink.offset;
        let plain = match &packed.content {
            Content::Plain(pieces) => {
                for piece in pieces {
                    sink.write(piece.get())?;
                }
                true
            }
            Content::Compressed(bytes, len) => {
                sink.write(bytes.get(..*len).unwrap_or_default())?;
                false
            }
        };
        let len = sink.offset.saturating_sub(offset);
        let stats = &mut self.writer.stats;
        stats.stored_bytes = stats.stored_bytes.saturating_add(len);
        self.writer.index.push_chunk(&ChunkEntry {
            offset,
            stored_len: u32::try_from(len).unwrap_or(u32::MAX),
            plain,
            checksum: packed.checksum,
        });
        Ok(())
    }
}
