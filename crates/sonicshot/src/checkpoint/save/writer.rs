//! Writes a checkpoint, front to back, on all cores.

use super::options::SaveOptions;
use super::pages::{Output, Source, save_pages};
use super::sink::Sink;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::disk::guess::OnDisks;
use crate::checkpoint::wire::builder::IndexBuilder;
use crate::checkpoint::wire::codec::Compressor;
use crate::checkpoint::wire::disk::DiskInfo;
use crate::checkpoint::wire::footer::Footer;
use crate::checkpoint::wire::frames::same_layout;
use crate::checkpoint::wire::header::{Codec, Header};
use crate::checkpoint::wire::info::{CheckpointInfo, SaveStats};
use crate::checkpoint::wire::layout::{
    ALIGN, FOOTER_LEN, MAX_BLOB_NAME, MAX_CHUNK, MAX_DISK_LEN, MAX_DISK_NAME, MAX_DISKS, behind,
    between, checksum, plus, size, too_large,
};
use crate::checkpoint::wire::record::BlobEntry;
use crate::to_u64;
use crate::{GuestMemory, PageMap, PrunePlan, Stoppable};
use core::hash::Hasher;
use std::fmt;
use std::io::{Read, Write};
use twox_hash::XxHash3_64;

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
/// writer.memory(&guest, &map, &plan)?;
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
    /// [`CheckpointError::ChunkSize`] of one that cannot be, [`CheckpointError::CodecMissing`], or
    /// what writing gives.
    pub fn new(
        out: W,
        info: CheckpointInfo,
        options: SaveOptions,
    ) -> Result<Self, CheckpointError> {
        let chunk = u64::from(options.chunk_size);
        if chunk == 0 || chunk > MAX_CHUNK || chunk & info.page_size.offset_mask() != 0 {
            return Err(CheckpointError::ChunkSize {
                found: chunk,
                page: info.page_size.bytes(),
                max: MAX_CHUNK,
            });
        }
        // To fail now rather than after the first pages.
        let _ = Compressor::new(options.compression)?;
        let header = Header {
            codec: Codec::of(options.compression),
            chunk_size: options.chunk_size,
            on_disks: !info.disks.is_empty(),
            info,
        };
        let mut index = IndexBuilder::new(chunk >> header.info.page_size.shift());
        check_disks(&header.info.disks)?;
        index.set_disks(&header.info.disks)?;
        let mut sink = Sink::new(out);
        sink.write(&header.encode()?)?;
        Ok(Self {
            sink,
            index,
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
        add_blob(
            &mut self.sink,
            &mut self.index,
            self.header.codec,
            name,
            &mut content,
        )
    }

    /// Adds the guest's memory: the pages that `plan` keeps, and of the others what they must
    /// read as. The guest, and whatever else writes its memory, must be paused.
    ///
    /// # Errors
    /// [`CheckpointError::ForAnalysis`] if `plan` drops what the guest uses and
    /// [`CheckpointInfo::for_analysis`] does not say so; [`CheckpointError`] if `memory` or `map`
    /// are not of the guest that the checkpoint was begun for, or reading or writing fails. The
    /// checkpoint cannot be finished then.
    pub fn memory(
        &mut self,
        memory: &dyn GuestMemory,
        map: &PageMap,
        plan: &PrunePlan,
    ) -> Result<(), CheckpointError> {
        self.memory_on_disks(memory, map, plan, &OnDisks::NONE)
    }

    /// The same of a guest that has pages on its disks too ([`CheckpointInfo::disks`]): those of the
    /// guessed ones that are the same there, byte for byte, are not stored.
    ///
    /// ```
    /// use sonicshot::checkpoint::*;
    /// use sonicshot::*;
    ///
    /// // A file of the guest's is in its memory, as it is on its disk.
    /// let file: Vec<u8> = (0..8 * 4096_u32).map(|at| (at / 7) as u8).collect();
    /// let disk = [vec![0; 1 << 20], file.clone()].concat();
    /// let ram = [vec![7; 4096], file].concat();
    /// let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
    /// let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    /// map.set(PfnRange::new(Pfn::new(1), Pfn::new(9)), PageClass::PageCacheClean);
    /// let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    ///
    /// let mut info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    /// info.disks.push(DiskInfo::of("root", &disk, DiskHash::Xxh3, &[])?);
    /// let finder = DiskFinder::new(&guest, &map, &plan, DiskFinder::LIKELY, &WorkOptions::new())?;
    /// let disks: [&dyn DiskSource; 1] = [&disk];
    /// let guesses = finder.stream(&info.disks, &disks, &WorkOptions::new())?;
    ///
    /// let mut writer = CheckpointWriter::new(Vec::new(), info, SaveOptions::default())?;
    /// let on_disks = OnDisks { disks: &disks, guesses: &guesses };
    /// writer.memory_on_disks(&guest, &map, &plan, &on_disks)?;
    /// let (file, stats) = writer.finish()?;
    /// assert_eq!((stats.on_disk, stats.data), (8, 0));
    ///
    /// let checkpoint = CheckpointReader::new(file)?;
    /// assert!(checkpoint.read_u64(Gpa::new(4096)).is_err());
    /// let given = vec![GivenDisk::new("root", disk)];
    /// let checkpoint = checkpoint.with_disks(given, MovedOn::Refuse)?;
    /// let mut all = vec![0; ram.len()];
    /// checkpoint.read(Gpa::ZERO, &mut all)?;
    /// assert!(all == ram);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`memory`](Self::memory), and [`CheckpointError::DiskIo`] if a disk cannot be read.
    pub fn memory_on_disks(
        &mut self,
        memory: &dyn GuestMemory,
        map: &PageMap,
        plan: &PrunePlan,
        disks: &OnDisks<'_>,
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
        if !info.for_analysis
            && let Some((frames, class)) = plan.used_by_guest(map)
        {
            return Err(CheckpointError::ForAnalysis {
                class,
                pfn: frames.start(),
            });
        }
        let times = self.memory_times.checked_add(1);
        let again = CheckpointError::MemoryTimes {
            times: self.memory_times,
        };
        self.memory_times = times.ok_or(again)?;
        if self.memory_times != 1 {
            return Err(CheckpointError::MemoryTimes {
                times: self.memory_times,
            });
        }
        let output = Output {
            sink: &mut self.sink,
            index: &mut self.index,
            stats: &mut self.stats,
        };
        let stoppable;
        let memory = match &self.options.stop {
            Some(stop) => {
                stoppable = Stoppable::new(memory, stop.clone());
                &stoppable
            }
            None => memory,
        };
        let source = Source {
            memory,
            info: &info,
            map,
            plan,
            disks: *disks,
        };
        save_pages(output, &source, &self.options)
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
        let (out, file_len, digest) = end(self.sink, self.index)?;
        self.stats.file_len = file_len;
        self.stats.digest = digest;
        Ok((out, self.stats))
    }
}

/// Refuses disks that the format has no room for, or no names.
fn check_disks(disks: &[DiskInfo]) -> Result<(), CheckpointError> {
    let count = to_u64(disks.len());
    if count > MAX_DISKS {
        return Err(too_large("disks", count, MAX_DISKS));
    }
    let mut names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.windows(2).find(|pair| pair.first() == pair.last()) {
        let name = (*name).to_owned();
        return Err(CheckpointError::DiskTwice { name });
    }
    for disk in disks {
        let name = to_u64(disk.name.len());
        for (what, value, max) in [
            ("bytes of a disk's name", name, MAX_DISK_NAME),
            ("bytes of a disk", disk.bytes, MAX_DISK_LEN),
        ] {
            if value == 0 || value > max {
                return Err(too_large(what, value, max));
            }
        }
        if !disk.hash.is_available() {
            let codec = disk.hash.name();
            return Err(CheckpointError::CodecMissing { codec });
        }
    }
    Ok(())
}

/// Adds a blob behind what was written.
pub(super) fn add_blob<W: Write>(
    sink: &mut Sink<W>,
    index: &mut IndexBuilder,
    codec: Codec,
    name: &str,
    content: &mut dyn Read,
) -> Result<(), CheckpointError> {
    let name_len = to_u64(name.len());
    if name_len == 0 || name_len > MAX_BLOB_NAME {
        return Err(CheckpointError::TooLarge {
            what: "bytes of a blob's name",
            value: name_len,
            max: MAX_BLOB_NAME,
        });
    }
    if index.has_blob(name) {
        return Err(CheckpointError::BlobExists { name: name.into() });
    }
    let offset = sink.offset();
    let mut sum = XxHash3_64::new();
    let mut buffer = vec![0; 64 << 10];
    let mut len = 0_u64;
    loop {
        let got = match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CheckpointError::read(sink.offset())(error)),
        };
        let Some(bytes) = buffer.get(..got) else {
            let error = std::io::Error::other("a reader that gives more than there is room for");
            return Err(CheckpointError::read(sink.offset())(error));
        };
        sum.write(bytes);
        sink.write(bytes)?;
        len = plus("bytes of a blob", len, to_u64(got))?;
    }
    if codec == Codec::None {
        // What follows may be page data, to be mapped.
        let end = sink
            .offset()
            .checked_align_up(ALIGN)
            .ok_or_else(|| too_large("bytes of file", sink.offset().raw(), u64::MAX))?;
        let zeroes = vec![0; size(between(sink.offset(), end)?)];
        sum.write(&zeroes);
        sink.write(&zeroes)?;
    }
    index.push_blob(BlobEntry {
        name: name.into(),
        offset,
        stored_len: between(offset, sink.offset())?,
        len,
        checksum: sum.finish(),
    });
    Ok(())
}

/// Writes index and footer. Returns what was written to, flushed, the file's length, and its digest.
pub(super) fn end<W: Write>(
    mut sink: Sink<W>,
    index: IndexBuilder,
) -> Result<(W, u64, u128), CheckpointError> {
    let index = index.encode()?;
    let index_offset = sink.offset();
    sink.write(&index)?;
    let mut footer = Footer {
        index_offset,
        index_len: to_u64(index.len()),
        index_checksum: checksum(&index),
        file_len: behind(sink.offset(), FOOTER_LEN)?.raw(),
        digest: 0,
    };
    footer.digest = sink.digest_with(&footer.digested());
    sink.write(&footer.encode())?;
    let (out, file_len) = sink.finish()?;
    Ok((out, file_len, footer.digest))
}

impl<W> fmt::Debug for CheckpointWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointWriter")
            .field("info", &self.header.info)
            .field("offset", &self.sink.offset())
            .finish_non_exhaustive()
    }
}
