//! Writes the pages of a checkpoint, front to back, on all cores.

use super::options::SaveOptions;
use super::scan::{Batches, Buffer, Buffers, Page, Part, Scanned, Stored, same};
use super::sink::Sink;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::disk::guess::{DiskGuess, OnDisks};
use crate::checkpoint::wire::builder::IndexBuilder;
use crate::checkpoint::wire::codec::Compressor;
use crate::checkpoint::wire::info::{CheckpointInfo, Compression, PageContent, PageRun, SaveStats};
use crate::checkpoint::wire::layout::{
    MAX_CHUNK, between, checksum, narrow, plus, size, too_large,
};
use crate::checkpoint::wire::record::ChunkEntry;
use crate::to_u64;
use crate::work::{Pending, Pool, threads, with_pool};
use crate::{Gpa, GuestMemory, PageMap, Pfn, PfnRange, Progress, PrunePlan, Tally, WorkPhase};
use core::hash::Hasher;
use core::num::NonZeroUsize;
use core::ops::Range;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use twox_hash::XxHash3_64;

/// Page data that is packed in one job: handing over jobs takes time too.
const GROUP: u64 = 512 << 10;

/// The guest that is saved.
pub(super) struct Source<'a> {
    pub memory: &'a dyn GuestMemory,
    pub info: &'a CheckpointInfo,
    pub map: &'a PageMap,
    pub plan: &'a PrunePlan,
    pub disks: OnDisks<'a>,
}

/// The parts that a checkpoint grows by.
pub(super) struct Output<'w, W> {
    pub sink: &'w mut Sink<W>,
    pub index: &'w mut IndexBuilder,
    pub stats: &'w mut SaveStats,
}

/// Writes all pages.
pub(super) fn save_pages<W: Write>(
    output: Output<'_, W>,
    source: &Source<'_>,
    options: &SaveOptions,
) -> Result<(), CheckpointError> {
    let page_size = source.info.page_size;
    let shared = Shared {
        memory: source.memory,
        info: source.info,
        disks: source.disks,
        compression: options.compression,
        buffers: Arc::default(),
        outputs: Arc::default(),
    };
    // More than are kept if the plan drops what is no whole frame; it is only a size.
    let kept = source.map.total().checked_sub(source.plan.dropped_pages());
    let threads = threads(options.threads);
    with_pool(threads, &Worker::default, |pool| {
        let saving = Saving {
            output,
            shared: &shared,
            pool,
            page: size(page_size.bytes()),
            pages_per_chunk: u64::from(options.chunk_size) >> page_size.shift(),
            deduplicate: options.deduplicate,
            depth: threads
                .checked_add(1)
                .map_or(threads.get(), NonZeroUsize::get),
            scans: VecDeque::new(),
            packs: VecDeque::new(),
            chunk: Vec::new(),
            chunk_pages: 0,
            full: Vec::new(),
            full_bytes: 0,
            stored: Stored::new(kept),
            scratch: Vec::new(),
            done: Tally::ZERO,
        };
        let guesses = source.disks.guesses;
        let batches = Batches::new(source.memory, source.info, source.map, source.plan, guesses);
        saving.all(batches, &options.progress)
    })
}

/// The state that all workers share.
struct Shared<'a> {
    memory: &'a dyn GuestMemory,
    info: &'a CheckpointInfo,
    disks: OnDisks<'a>,
    compression: Compression,
    buffers: Arc<Buffers>,
    /// For compressed chunks.
    outputs: Arc<Buffers>,
}

/// A worker's own.
#[derive(Default)]
struct Worker {
    compressor: Option<Compressor>,
    input: Vec<u8>,
}

/// Pages that follow each other in a batch's bytes.
struct Piece {
    /// The place of the first of them in the guest.
    at: Gpa,
    bytes: Arc<Buffer>,
    range: Range<usize>,
}

impl Piece {
    fn get(&self) -> Result<&[u8], CheckpointError> {
        let bytes = self.bytes.get(self.range.clone());
        bytes.ok_or_else(|| CheckpointError::Length {
            what: "a batch of pages",
            at: self.at,
            found: to_u64(self.bytes.len()),
            expected: to_u64(self.range.end),
        })
    }
}

/// A chunk as it goes into the file.
struct Packed {
    content: Content,
    checksum: u64,
}

enum Content {
    Plain(Vec<Piece>),
    Compressed(Buffer),
}

type Answer<T> = Result<T, CheckpointError>;

impl Worker {
    fn pack_all(&mut self, shared: &Shared<'_>, chunks: Vec<Vec<Piece>>) -> Answer<Vec<Packed>> {
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(shared.compression)?),
        };
        let chunks = chunks.into_iter();
        chunks
            .map(|pieces| pack(compressor, pieces, &mut self.input, &shared.outputs))
            .collect()
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
            [only] => only.get()?,
            _ => {
                input.clear();
                for piece in &pieces {
                    input.extend_from_slice(piece.get()?);
                }
                input
            }
        };
        let mut output = outputs.take(compressor.bound(whole.len()));
        if let Some(len) = compressor.compress(whole, output.bytes_mut())? {
            output.shorten(len);
            return Ok(Packed {
                checksum: checksum(&output),
                content: Content::Compressed(output),
            });
        }
    }
    let sum = match pieces.as_slice() {
        [only] => checksum(only.get()?),
        _ => {
            let mut sum = XxHash3_64::new();
            for piece in &pieces {
                sum.write(piece.get()?);
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
struct Saving<'p, 'env, 'w, W> {
    output: Output<'w, W>,
    shared: &'env Shared<'env>,
    pool: &'p Pool<'env, Worker>,
    page: usize,
    pages_per_chunk: u64,
    deduplicate: bool,
    /// The most batches, and the most groups of chunks, that are under way.
    depth: usize,
    scans: VecDeque<Pending<Answer<Scanned>>>,
    packs: VecDeque<Pending<Answer<Vec<Packed>>>>,
    /// The chunk that is not full yet.
    chunk: Vec<Piece>,
    chunk_pages: u64,
    /// Full chunks, to be packed together.
    full: Vec<Vec<Piece>>,
    full_bytes: u64,
    stored: Stored,
    scratch: Vec<u8>,
    /// Pages looked at.
    done: Tally,
}

impl<W: Write> Saving<'_, '_, '_, W> {
    fn all(mut self, batches: Batches<'_>, progress: &dyn Progress) -> Result<(), CheckpointError> {
        let info = self.shared.info;
        let total = info.layout.bytes();
        progress.begin(WorkPhase::Saving);
        let mut batches = batches.fuse();
        loop {
            while self.scans.len() < self.depth
                && let Some(batch) = batches.next()
            {
                let shared = self.shared;
                let scan = move |_: &mut Worker| {
                    batch.scan(shared.memory, shared.info, &shared.disks, &shared.buffers)
                };
                self.scans.push_back(self.pool.submit(scan));
            }
            let Some(scanned) = self.scans.pop_front() else {
                break;
            };
            self.place(&scanned.wait()?)?;
            self.write_ready()?;
            // Progress is for the eye, and ends at the total.
            let done = self.done.times(info.page_size.bytes());
            progress.tell(done.up_to(total), total);
        }
        self.close_chunk()?;
        self.submit_chunks()?;
        while let Some(oldest) = self.packs.pop_front() {
            self.write_all(&oldest.wait()?)?;
        }
        progress.tell(total, total);
        Ok(())
    }

    /// Decides for each page of a batch where its content is.
    fn place(&mut self, scanned: &Scanned) -> Result<(), CheckpointError> {
        let mut pages = scanned.pages.iter().zip(0_usize..);
        for part in &scanned.parts {
            match *part {
                Part::Known(run) => self.push(run, false)?,
                Part::OnDisk(frames, class, run) => {
                    // Its pages were read, and are not needed any more.
                    for _ in frames.iter() {
                        let _ = pages.next();
                    }
                    let record = self.output.index.push_disk_run(&run);
                    let content = PageContent::Disk { record, page: 0 };
                    let run = PageRun {
                        frames,
                        class,
                        content,
                    };
                    self.push(run, false)?;
                }
                Part::Guess(DiskGuess { frames, .. }, class) | Part::Read(frames, class) => {
                    for (pfn, (page, number)) in frames.iter().zip(&mut pages) {
                        let frames = PfnRange::with_len(pfn, 1).unwrap_or(frames);
                        let (content, stores) = self.content(scanned, pfn, *page, number)?;
                        let run = PageRun {
                            frames,
                            class,
                            content,
                        };
                        self.push(run, stores)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The page's content in the checkpoint, and whether its bytes are stored now.
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
        let shared = self.shared;
        let page_size = shared.info.page_size;
        let at = pfn.gpa(page_size);
        let start = number.checked_mul(self.page);
        let end = start.and_then(|start| start.checked_add(self.page));
        let (Some(at), Some(start), Some(end)) = (at, start, end) else {
            return Err(too_large("a frame", pfn.raw(), u64::MAX));
        };
        let piece = Piece {
            at,
            bytes: Arc::clone(&scanned.bytes),
            range: start..end,
        };
        let bytes = piece.get()?;
        if self.deduplicate {
            for (twin, slot) in self.stored.candidates(hash) {
                // A guest can make pages of the same hash: only the same bytes count.
                if same(shared.memory, twin, page_size, bytes, &mut self.scratch) {
                    return Ok((PageContent::Data { slot }, false));
                }
            }
        }
        let slot = self.output.index.slots;
        self.output.index.slots = plus("stored pages", slot, 1)?;
        // A frame that RAM fills only in part cannot be compared by reading it whole.
        if self.deduplicate && shared.info.layout.has_frame(pfn, page_size) {
            self.stored.insert(hash, pfn, slot);
        }
        match self.chunk.last_mut() {
            Some(last)
                if last.range.end == piece.range.start
                    && Arc::ptr_eq(&last.bytes, &piece.bytes) =>
            {
                last.range.end = piece.range.end;
            }
            _ => self.chunk.push(piece),
        }
        self.chunk_pages = plus("pages of a chunk", self.chunk_pages, 1)?;
        if self.chunk_pages >= self.pages_per_chunk {
            self.close_chunk()?;
        }
        Ok((PageContent::Data { slot }, true))
    }

    fn push(&mut self, run: PageRun, stores: bool) -> Result<(), CheckpointError> {
        self.output.stats.count(&run, stores);
        self.done.add(run.frames.len());
        self.output.index.push(run, stores)
    }

    fn close_chunk(&mut self) -> Result<(), CheckpointError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.chunk_pages = 0;
        let pieces = core::mem::take(&mut self.chunk);
        for piece in &pieces {
            self.full_bytes = plus(
                "bytes of chunks",
                self.full_bytes,
                to_u64(piece.range.len()),
            )?;
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
        let chunks = core::mem::take(&mut self.full);
        let shared = self.shared;
        let pack = move |worker: &mut Worker| worker.pack_all(shared, chunks);
        self.packs.push_back(self.pool.submit(pack));
        if self.packs.len() / 2 >= self.depth
            && let Some(oldest) = self.packs.pop_front()
        {
            self.write_all(&oldest.wait()?)?;
        }
        Ok(())
    }

    /// Writes the chunks that are packed, as far as they come next.
    fn write_ready(&mut self) -> Result<(), CheckpointError> {
        while let Some(oldest) = self.packs.pop_front() {
            match oldest.try_wait() {
                Ok(packed) => self.write_all(&packed?)?,
                Err(pending) => {
                    self.packs.push_front(pending);
                    break;
                }
            }
        }
        Ok(())
    }

    fn write_all(&mut self, packed: &[Packed]) -> Result<(), CheckpointError> {
        packed.iter().try_for_each(|packed| self.write(packed))
    }

    fn write(&mut self, packed: &Packed) -> Result<(), CheckpointError> {
        let sink = &mut *self.output.sink;
        let offset = sink.offset();
        let plain = match &packed.content {
            Content::Plain(pieces) => {
                for piece in pieces {
                    sink.write(piece.get()?)?;
                }
                true
            }
            Content::Compressed(bytes) => {
                sink.write(bytes)?;
                false
            }
        };
        let len = between(offset, sink.offset())?;
        let stats = &mut *self.output.stats;
        stats.stored_bytes = Tally::new(stats.stored_bytes).and(len).get();
        self.output.index.push_chunk(&ChunkEntry {
            offset,
            stored_len: narrow("bytes of a chunk", len, MAX_CHUNK)?,
            plain,
            checksum: packed.checksum,
        });
        Ok(())
    }
}
