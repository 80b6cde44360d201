//! Writes kdump-compressed files (see [`crate::format::kdump`] for the format), which `crash`, drgn and
//! other users of libkdumpfile read: for analysis, not for restoring a guest.
//!
//! A page that the plan drops, and one that the source does not have, is marked as existing but
//! not in the file, as `makedumpfile -d` does. Pages of zeroes share one descriptor's data.

use crate::format::kdump::read::{
    DESCRIPTOR_LEN, MAX_FRAMES, Note, SIGNATURE, SNAPPY, SUB_HEADER_LEN, ZLIB, ZSTD, notes_in,
};
use sonicshot::Progress;
use sonicshot::{Architecture, Gpa, GpaRange, GuestMemory, MemoryError, PrunePlan};
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

/// What one thread reads and compresses at a time, in bytes.
const CHUNK: u64 = 1 << 20;
/// Chunks for each thread between two writes.
const CHUNKS: usize = 4;
const MAX_THREADS: usize = 64;
/// `man makedumpfile`, `-d`: free pages are left out.
const DUMP_LEVEL_FREE: u32 = 16;
/// What is not known of the guest's `struct new_utsname`. libkdumpfile believes none of the
/// names, nor that of the processor, if one of them is empty.
const UNKNOWN: &[u8] = b"(unknown)";

/// How the pages of a kdump-compressed file are compressed, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KdumpCompression {
    /// Not at all.
    None,
    /// zlib, which every reader knows.
    #[default]
    Zlib,
    /// Snappy.
    Snappy,
    /// Zstandard.
    Zstd,
}

/// What a kdump-compressed file holds beside the memory, and how it is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct KdumpOptions<'a> {
    /// How pages are compressed.
    pub compression: KdumpCompression,
    /// The guest's processor.
    pub machine: Option<Architecture>,
    /// The guest's VMCOREINFO text. Most readers cannot do without.
    pub vmcoreinfo: Option<&'a [u8]>,
    /// ELF notes: an `NT_PRSTATUS` for each processor.
    pub notes: Option<&'a [u8]>,
    /// How many threads compress; one if `None`.
    pub threads: Option<NonZeroUsize>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct KdumpWriteStats {
    /// Pages in the file, those of zeroes among them.
    pub pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages that the plan dropped.
    pub dropped_pages: u64,
    /// Pages that the source did not have.
    pub absent_pages: u64,
    /// The length of the file in bytes.
    pub file_len: u64,
}

/// Why no kdump-compressed file could be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KdumpWriteError {
    /// The operating system refused to write.
    #[error("writing the kdump file")]
    Io(#[from] io::Error),
    /// The guest's memory could not be read.
    #[error("reading the guest's memory")]
    Memory(#[from] MemoryError),
    /// The format has no room for the guest.
    #[error("a kdump file cannot hold {what} of {value}")]
    TooLarge {
        /// What of the guest.
        what: &'static str,
        /// How much of it there is.
        value: u64,
    },
}

/// Writes `memory`, without what `plan` drops, to the empty `file`. The plan's page size is the
/// file's block size.
///
/// # Errors
/// [`KdumpWriteError`] if the memory cannot be read or the file not be written. What is in the
/// file is then of no use.
pub fn write_kdump(
    memory: &dyn GuestMemory,
    plan: &PrunePlan,
    file: &File,
    options: &KdumpOptions<'_>,
    progress: Progress<'_>,
) -> Result<KdumpWriteStats, KdumpWriteError> {
    let page = plan.page_size();
    let block = page.bytes();
    let regions: Vec<GpaRange> = memory
        .layout()
        .frames(page)
        .filter_map(|frames| frames.gpa_range(page))
        .collect();
    let end = regions.last().map_or(0, |region| region.end().raw());
    let frames = end >> page.shift();
    if frames > MAX_FRAMES {
        return Err(KdumpWriteError::TooLarge {
            what: "a number of frames",
            value: frames,
        });
    }

    // Sizes are bounded by MAX_FRAMES from here on.
    let notes = options.notes.unwrap_or_default();
    let vmcoreinfo = options.vmcoreinfo.unwrap_or_default();
    let sub_len = [SUB_HEADER_LEN, notes.len(), vmcoreinfo.len()]
        .into_iter()
        .fold(0_u64, |sum, len| sum.saturating_add(len as u64));
    let sub_blocks = sub_len.div_ceil(block);
    let bitmap_blocks = frames.div_ceil(8).div_ceil(block);
    let bitmap_len = bitmap_blocks.saturating_mul(block);
    let present_at = block.saturating_mul(sub_blocks.saturating_add(1));
    let dumped_at = present_at.saturating_add(bitmap_len);
    let descriptors_at = dumped_at.saturating_add(bitmap_len);

    let mut present = Bitmap::new(bitmap_len)?;
    let mut dumped = Bitmap::new(bitmap_len)?;
    let mut kept_bytes = 0_u64;
    let mut stats = KdumpWriteStats::default();
    let mut chunks = Vec::new();
    for region in &regions {
        present.set(*region, page.shift());
        for dropped in plan.dropped_in(*region) {
            let pages = dropped.len() >> page.shift();
            stats.dropped_pages = stats.dropped_pages.saturating_add(pages);
        }
        for kept in plan.kept_in(*region) {
            kept_bytes = kept_bytes.saturating_add(kept.len());
            dumped.set(kept, page.shift());
            let mut start = kept.start();
            while let Some(at) = start.checked_add(CHUNK).filter(|at| *at < kept.end()) {
                chunks.push(GpaRange::new(start, at));
                start = at;
            }
            chunks.push(GpaRange::new(start, kept.end()));
        }
    }

    // Behind the descriptors of all pages that may come, the page of zeroes, then the others.
    let table = (kept_bytes >> page.shift()).saturating_mul(DESCRIPTOR_LEN);
    let zero_at = descriptors_at.saturating_add(table).next_multiple_of(block);
    let zeroes = vec![0; usize::try_from(block).unwrap_or(0)];
    file.write_all_at(&zeroes, zero_at)?;
    let mut data_at = zero_at.saturating_add(block);
    let mut descriptor_at = descriptors_at;
    let mut done = 0_u64;
    let threads = options
        .threads
        .map_or(1, NonZeroUsize::get)
        .min(MAX_THREADS);
    for round in chunks.chunks(threads.saturating_mul(CHUNKS)) {
        for packed in compress_all(memory, round, block, options.compression, threads) {
            let packed = packed?;
            let mut descriptors = Vec::with_capacity(packed.pages.len().saturating_mul(24));
            let mut at = data_at;
            for (gpa, stored) in &packed.pages {
                let (offset, len, flags) = match stored {
                    Stored::Absent => {
                        dumped.clear(*gpa, page.shift());
                        stats.absent_pages = stats.absent_pages.saturating_add(1);
                        continue;
                    }
                    Stored::Zero => {
                        stats.zero_pages = stats.zero_pages.saturating_add(1);
                        (zero_at, u32::try_from(block).unwrap_or(0), 0)
                    }
                    Stored::Data { len, flags } => {
                        let offset = at;
                        at = at.saturating_add((*len).into());
                        (offset, *len, *flags)
                    }
                };
                stats.pages = stats.pages.saturating_add(1);
                descriptors.extend(offset.to_le_bytes());
                descriptors.extend(len.to_le_bytes());
                descriptors.extend(flags.to_le_bytes());
                descriptors.extend(0_u64.to_le_bytes());
            }
            file.write_all_at(&packed.data, data_at)?;
            file.write_all_at(&descriptors, descriptor_at)?;
            data_at = at;
            descriptor_at = descriptor_at.saturating_add(descriptors.len() as u64);
            done = done.saturating_add(packed.source.len());
            progress(done, kept_bytes);
        }
    }
    stats.file_len = data_at;

    file.write_all_at(&present.0, present_at)?;
    file.write_all_at(&dumped.0, dumped_at)?;
    let sizes = Sizes {
        block: u32::try_from(block).unwrap_or(0),
        sub_blocks: small("notes", sub_blocks)?,
        bitmap_blocks: small("bitmaps", bitmap_blocks.saturating_mul(2))?,
        frames,
        dump_level: if stats.dropped_pages > 0 {
            DUMP_LEVEL_FREE
        } else {
            0
        },
    };
    file.write_all_at(&sub_header(&sizes, notes, vmcoreinfo), block)?;
    // Last, so that a file that is not complete is not taken for one.
    file.write_all_at(&header(&sizes, options), 0)?;
    Ok(stats)
}

fn small(what: &'static str, value: u64) -> Result<u32, KdumpWriteError> {
    u32::try_from(value).map_err(|_| KdumpWriteError::TooLarge { what, value })
}

/// The numbers in the headers.
struct Sizes {
    block: u32,
    sub_blocks: u32,
    bitmap_blocks: u32,
    frames: u64,
    dump_level: u32,
}

/// `struct disk_dump_header` of version 6.
fn header(sizes: &Sizes, options: &KdumpOptions<'_>) -> Vec<u8> {
    let info = options.vmcoreinfo.unwrap_or_default();
    let release = info
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"OSRELEASE="))
        .filter(|release| !release.is_empty())
        .unwrap_or(UNKNOWN);
    let machine: &[u8] = match options.machine {
        Some(Architecture::X86_64) => b"x86_64",
        Some(Architecture::Aarch64) => b"aarch64",
        _ => UNKNOWN,
    };
    let status = match options.compression {
        KdumpCompression::None => 0,
        KdumpCompression::Zlib => ZLIB,
        KdumpCompression::Snappy => SNAPPY,
        KdumpCompression::Zstd => ZSTD,
    };
    let processors = notes_in(options.notes.unwrap_or_default())
        .filter(Note::is_registers)
        .count();
    let mut out = SIGNATURE.to_vec();
    out.extend(6_u32.to_le_bytes());
    for name in [b"Linux", UNKNOWN, release, UNKNOWN, machine, UNKNOWN] {
        let end = out.len().saturating_add(65);
        out.extend(name.iter().take(64));
        out.resize(end, 0);
    }
    out.resize(408, 0); // the alignment of what follows
    out.extend([0; 16]); // the time of the dump
    for field in [
        status,
        sizes.block,
        sizes.sub_blocks,
        sizes.bitmap_blocks,
        u32::try_from(sizes.frames).unwrap_or(u32::MAX),
        0,
        0,
        0,
        0,
        u32::try_from(processors).unwrap_or(u32::MAX),
    ] {
        out.extend(field.to_le_bytes());
    }
    out
}

/// `struct kdump_sub_header` of version 6, and what follows it.
fn sub_header(sizes: &Sizes, notes: &[u8], vmcoreinfo: &[u8]) -> Vec<u8> {
    let notes_at = u64::from(sizes.block).saturating_add(SUB_HEADER_LEN as u64);
    let info_at = notes_at.saturating_add(notes.len() as u64);
    // An empty part has no place.
    let part = |at: u64, bytes: &[u8]| match bytes.len() as u64 {
        0 => [0, 0],
        len => [at, len],
    };
    let info = part(info_at, vmcoreinfo);
    let notes_part = part(notes_at, notes);
    let words = [
        phys_base(vmcoreinfo),
        sizes.dump_level.into(), // and no split
        0,
        0,
        info[0],
        info[1],
        notes_part[0],
        notes_part[1],
        0,
        0,
        0,
        0,
        sizes.frames,
    ];
    let mut out: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    out.extend(notes);
    out.extend(vmcoreinfo);
    out
}

/// `NUMBER(phys_base)` of x86-64, which is signed.
fn phys_base(vmcoreinfo: &[u8]) -> u64 {
    vmcoreinfo
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"NUMBER(phys_base)="))
        .and_then(|text| std::str::from_utf8(text).ok()?.parse::<i64>().ok())
        .map_or(0, i64::cast_unsigned)
}

/// One bit for each frame.
struct Bitmap(Vec<u8>);

impl Bitmap {
    fn new(len: u64) -> Result<Self, KdumpWriteError> {
        let what = "bitmaps";
        let len =
            usize::try_from(len).map_err(|_| KdumpWriteError::TooLarge { what, value: len })?;
        Ok(Self(vec![0; len]))
    }

    fn byte(&mut self, frame: u64) -> Option<&mut u8> {
        self.0.get_mut(usize::try_from(frame >> 3).ok()?)
    }

    fn set(&mut self, range: GpaRange, shift: u32) {
        let mut frame = range.start().raw() >> shift;
        let end = range.end().raw() >> shift;
        while frame < end {
            let whole = frame.is_multiple_of(8) && end.saturating_sub(frame) >= 8;
            let Some(byte) = self.byte(frame) else {
                return;
            };
            if whole {
                *byte = 0xff;
                frame = frame.saturating_add(8);
            } else {
                *byte |= 1 << (frame & 7);
                frame = frame.saturating_add(1);
            }
        }
    }

    fn clear(&mut self, at: Gpa, shift: u32) {
        let frame = at.raw() >> shift;
        if let Some(byte) = self.byte(frame) {
            *byte &= !(1 << (frame & 7));
        }
    }
}

/// How a page goes into the file.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Data { len: u32, flags: u32 },
    Zero,
    Absent,
}

/// The pages of a chunk of memory.
struct Packed {
    source: GpaRange,
    pages: Vec<(Gpa, Stored)>,
    /// The data of all pages, end to end.
    data: Vec<u8>,
}

/// Reads and compresses `chunks`; gives the results in the same order.
fn compress_all(
    memory: &dyn GuestMemory,
    chunks: &[GpaRange],
    block: u64,
    compression: KdumpCompression,
    threads: usize,
) -> Vec<Result<Packed, KdumpWriteError>> {
    let share = chunks.len().div_ceil(threads).max(1);
    let work = |chunks: &[GpaRange]| {
        let mut encoder = Encoder::new(compression);
        chunks
            .iter()
            .map(|chunk| pack(memory, *chunk, block, &mut encoder))
            .collect::<Vec<_>>()
    };
    if share >= chunks.len() {
        return work(chunks);
    }
    std::thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = chunks
            .chunks(share)
            .map(|chunks| (chunks, scope.spawn(move || work(chunks))))
            .collect();
        running
            .into_iter()
            .flat_map(|(chunks, thread)| {
                thread.join().unwrap_or_else(|_| {
                    // What such a thread had to say, the panic itself has said.
                    let error = || io::Error::other("a thread that compresses panicked");
                    chunks.iter().map(|_| Err(error().into())).collect()
                })
            })
            .collect()
    })
}

/// Reads and compresses one chunk, page by page.
fn pack(
    memory: &dyn GuestMemory,
    source: GpaRange,
    block: u64,
    encoder: &mut Encoder,
) -> Result<Packed, KdumpWriteError> {
    let size = usize::try_from(block).unwrap_or(0);
    let mut packed = Packed {
        source,
        pages: Vec::new(),
        data: Vec::new(),
    };
    let mut buffer = vec![0; usize::try_from(source.len()).unwrap_or(0)];
    // Zeroes that the source knows of need not be read.
    let data = memory.next_data(source.start());
    let all_zero = data.is_none_or(|data| data.start() >= source.end());
    let whole = if all_zero {
        Ok(())
    } else {
        memory.read(source.start(), &mut buffer)
    };
    let by_page = match whole {
        Ok(()) => false,
        Err(MemoryError::Absent { .. }) => true,
        Err(error) => return Err(error.into()),
    };
    let mut at = source.start();
    for page in buffer.chunks_exact_mut(size.max(1)) {
        let stored = match by_page.then(|| memory.read(at, page)) {
            Some(Err(MemoryError::Absent { .. })) => Stored::Absent,
            Some(Err(error)) => return Err(error.into()),
            None | Some(Ok(())) if is_zero(page) => Stored::Zero,
            None | Some(Ok(())) => encoder.encode(page, &mut packed.data)?,
        };
        packed.pages.push((at, stored));
        at = at.checked_add(block).unwrap_or(source.end());
    }
    Ok(packed)
}

fn is_zero(page: &[u8]) -> bool {
    page.as_chunks::<64>().0.iter().all(|part| *part == [0; 64])
}

/// A compressor with what it needs to keep.
enum Encoder {
    None,
    Zlib(flate2::Compress, Vec<u8>),
    Snappy(Box<snap::raw::Encoder>, Vec<u8>),
    Zstd(Option<zstd::bulk::Compressor<'static>>, Vec<u8>),
}

impl Encoder {
    fn new(compression: KdumpCompression) -> Self {
        match compression {
            KdumpCompression::None => Self::None,
            // As fast as each can, like makedumpfile.
            KdumpCompression::Zlib => Self::Zlib(
                flate2::Compress::new(flate2::Compression::fast(), true),
                Vec::new(),
            ),
            KdumpCompression::Snappy => {
                Self::Snappy(Box::new(snap::raw::Encoder::new()), Vec::new())
            }
            KdumpCompression::Zstd => Self::Zstd(None, Vec::new()),
        }
    }

    /// Adds the page to `data`, compressed if that is shorter.
    fn encode(&mut self, page: &[u8], data: &mut Vec<u8>) -> io::Result<Stored> {
        let (bytes, flags) = match self {
            Self::None => (None, 0),
            Self::Zlib(zlib, out) => {
                zlib.reset();
                // What does not fit is stored as it is.
                out.resize(page.len(), 0);
                let end = zlib.compress(page, out, flate2::FlushCompress::Finish)?;
                let len = usize::try_from(zlib.total_out()).unwrap_or(usize::MAX);
                let whole = end == flate2::Status::StreamEnd;
                (out.get(..len).filter(|_| whole), ZLIB)
            }
            Self::Snappy(snappy, out) => {
                out.resize(snap::raw::max_compress_len(page.len()), 0);
                let len = snappy.compress(page, out)?;
                (out.get(..len), SNAPPY)
            }
            Self::Zstd(zstd, out) => {
                let zstd = match zstd {
                    Some(zstd) => zstd,
                    None => zstd.insert(zstd::bulk::Compressor::new(1)?),
                };
                out.resize(zstd::compress_bound(page.len()), 0);
                let len = zstd.compress_to_buffer(page, out.as_mut_slice())?;
                (out.get(..len), ZSTD)
            }
        };
        let (bytes, flags) = match bytes {
            Some(bytes) if bytes.len() < page.len() => (bytes, flags),
            _ => (page, 0),
        };
        data.extend_from_slice(bytes);
        Ok(Stored::Data {
            len: u32::try_from(bytes.len()).unwrap_or(0),
            flags,
        })
    }
}
