//! Restores an uncompressed checkpoint by mapping it.

use crate::checkpoint::CheckpointError;
use crate::checkpoint::read::chunk::ChunkDecoder;
use crate::checkpoint::read::reader::CheckpointReader;
use crate::checkpoint::read::source::RangeSource;
use crate::checkpoint::wire::frames::{fill_words, ram_of, range_of};
use crate::checkpoint::wire::info::{PageContent, PageRun};
use crate::checkpoint::wire::layout::size;
use crate::to_u64;
use crate::{FileOffset, Gpa, GpaRange, MemoryError, PfnRange};
use core::ffi::c_void;
use core::ptr::NonNull;
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::fmt;
use std::fs::File;

/// Options for mapping a checkpoint.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct MapOptions {
    /// At most so many ranges of the file are mapped, the longest ones; shorter ones are
    /// read. The system allows some 65,000 mappings in a process, and each takes microseconds.
    pub max_mappings: usize,
    /// A range shorter than this, in bytes, is read rather than mapped.
    pub min_mapping: u64,
    /// The file is mapped although it is not sealed. Whoever can cut it off then ends this process
    /// by `SIGBUS`, and who can write it changes what the guest has: only for a file that none but
    /// the caller can write. Without it, what is not sealed against both (a memfd with
    /// `F_SEAL_SHRINK` and `F_SEAL_WRITE` or `F_SEAL_FUTURE_WRITE`) is read.
    pub unsealed: bool,
    /// A checkpoint that is [for analysis](crate::checkpoint::CheckpointInfo::for_analysis) is
    /// mapped too: pages that the guest uses are missing from it, and read as zero.
    pub for_analysis: bool,
}

impl Default for MapOptions {
    fn default() -> Self {
        Self {
            max_mappings: 16_384,
            min_mapping: 32 << 10,
            unsealed: false,
            for_analysis: false,
        }
    }
}

impl MapOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how many ranges of the file are mapped at most.
    #[must_use]
    pub fn max_mappings(mut self, ranges: usize) -> Self {
        self.max_mappings = ranges;
        self
    }

    /// Says how long a range is at least, in bytes, to be mapped.
    #[must_use]
    pub fn min_mapping(mut self, bytes: u64) -> Self {
        self.min_mapping = bytes;
        self
    }

    /// Says whether a file that is not sealed is mapped: see [`unsealed`](Self::unsealed).
    #[must_use]
    pub fn unsealed(mut self, may_be: bool) -> Self {
        self.unsealed = may_be;
        self
    }

    /// Says whether a checkpoint that is for analysis is mapped.
    #[must_use]
    pub fn for_analysis(mut self, may_be: bool) -> Self {
        self.for_analysis = may_be;
        self
    }
}

/// A guest's memory, mapped from an uncompressed checkpoint: private (what the guest writes stays
/// in this process), and thin (free and zero pages take no memory until they are written).
///
/// Mapped pages come in when they are touched, and are not checked:
/// [`verify`](CheckpointReader::verify) the checkpoint if it may be damaged. Only a file that stays
/// as it is can be mapped: see [`MapOptions::unsealed`].
pub struct PrivateMemory {
    regions: Vec<(GpaRange, NonNull<u8>, usize)>,
}

// SAFETY: the mappings belong to this value alone, and any thread may use or unmap them.
unsafe impl Send for PrivateMemory {}
// SAFETY: a shared reference gives out addresses only.
unsafe impl Sync for PrivateMemory {}

impl PrivateMemory {
    /// Each RAM region: its guest-physical address, where it is in this process, and its length
    /// in bytes.
    pub fn regions(&self) -> impl Iterator<Item = (Gpa, NonNull<u8>, usize)> + '_ {
        self.regions
            .iter()
            .map(|(range, start, len)| (range.start(), *start, *len))
    }

    /// The memory of the guest, to be written by the VMM's own means.
    #[must_use]
    pub fn address(&self, at: Gpa) -> Option<NonNull<u8>> {
        let (range, start, _) = self.regions.iter().find(|(range, ..)| range.contains(at))?;
        let offset = usize::try_from(at.offset_from(range.start())?).ok()?;
        // SAFETY: the address is inside the region, which is one mapping of its length.
        Some(unsafe { start.add(offset) })
    }
}

impl Drop for PrivateMemory {
    fn drop(&mut self) {
        for (_, start, len) in &self.regions {
            // SAFETY: the mapping was made by `map_private`, with this length, and nobody has
            // it any more: references into it borrow `self`, bare pointers are the caller's care.
            let _ = unsafe { munmap(start.as_ptr().cast(), *len) };
        }
    }
}

impl fmt::Debug for PrivateMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.regions.iter().map(|(range, ..)| range))
            .finish()
    }
}

/// Whether nobody can cut a file off or write to it any more.
fn is_sealed(file: &File) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| {
        seals.contains(SealFlags::SHRINK)
            && seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
    })
}

fn host(
    operation: &'static str,
    at: usize,
    len: usize,
) -> impl FnOnce(rustix::io::Errno) -> CheckpointError {
    move |errno| CheckpointError::Host {
        operation,
        at,
        len,
        source: errno.into(),
    }
}

impl<S: RangeSource> CheckpointReader<S> {
    /// Maps the checkpoint's memory: an anonymous mapping for each region, and over it the file's
    /// page data where it is long enough. What is compressed, or comes from no file or from one
    /// that others might change, is read.
    ///
    /// # Errors
    /// [`CheckpointError::CannotRun`] of a checkpoint that is for analysis, unless
    /// [`MapOptions::for_analysis`] says that this is known; [`CheckpointError::NoDisk`] if pages
    /// are on a disk that was not given; [`CheckpointError`] if something cannot be mapped or read.
    pub fn map_private(&self, options: MapOptions) -> Result<PrivateMemory, CheckpointError> {
        let info = self.info();
        if info.for_analysis && !options.for_analysis {
            return Err(CheckpointError::CannotRun);
        }
        self.check_disks()?;
        let mut memory = PrivateMemory {
            regions: Vec::new(),
        };
        for region in info.layout.regions() {
            let len = size(region.len());
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let access = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping, wherever the system has room, touches nobody's memory.
            let start = unsafe { mmap_anonymous(core::ptr::null_mut(), len, access, flags) }
                .map_err(host("mmap", 0, len))?;
            if let Some(start) = NonNull::new(start.cast()) {
                memory.regions.push((*region, start, len));
            }
        }
        let host_page = to_u64(rustix::param::page_size());
        let bytes_of = |run: &PageRun| run.frames.len() << info.page_size.shift();
        // A length that leaves no more runs than may be mapped.
        let mut lengths: Vec<u64> = self
            .runs()
            .filter(|run| matches!(run.content, PageContent::Data { .. }))
            .map(|run| bytes_of(&run))
            .filter(|len| *len >= options.min_mapping)
            .collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let shortest = lengths
            .get(options.max_mappings)
            .map_or(Some(options.min_mapping), |len| len.checked_add(1));
        let mut decoder = self.decoder();
        let may_map = options.unsealed || self.source().as_file().is_some_and(is_sealed);
        for run in self.runs() {
            let mapped = match run.content {
                PageContent::Data { slot }
                    if may_map && shortest.is_some_and(|shortest| bytes_of(&run) >= shortest) =>
                {
                    self.map_run(&memory, &run, slot, host_page)?
                }
                PageContent::Data { .. } => false,
                other if other.word() == Some(0) => true,
                _ => false,
            };
            if !mapped {
                self.read_run(&mut decoder, &memory, &run)?;
            }
        }
        Ok(memory)
    }

    /// Maps one run over the memory; `false` if that cannot be done.
    fn map_run(
        &self,
        memory: &PrivateMemory,
        run: &PageRun,
        slot: u64,
        host_page: u64,
    ) -> Result<bool, CheckpointError> {
        let info = self.info();
        let Some(file) = self.source().as_file() else {
            return Ok(false);
        };
        let range = range_of(info, run.frames)?;
        if self.codec() != "none" || !info.layout.contains(range.start(), range.len()) {
            return Ok(false);
        }
        let Some(offset) = self.one_range(slot, range.len())? else {
            return Ok(false);
        };
        let Some(at) = memory.address(range.start()) else {
            return Ok(false);
        };
        let address = to_u64(at.as_ptr() as usize);
        if [offset.raw(), address, range.len()]
            .iter()
            .any(|value| !value.is_multiple_of(host_page))
        {
            return Ok(false);
        }
        let len = size(range.len());
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        let place: *mut c_void = at.as_ptr().cast();
        // SAFETY: the range lies inside a mapping of `memory`, which is ours and not handed
        // out yet, so replacing it touches nobody else's memory.
        unsafe { mmap(place, len, access, flags, file, offset.raw()) }.map_err(host(
            "mmap",
            place as usize,
            len,
        ))?;
        Ok(true)
    }

    /// The offset of the stored pages from `slot` in the file, if all `len` bytes of them follow each
    /// other there.
    fn one_range(&self, slot: u64, len: u64) -> Result<Option<FileOffset>, CheckpointError> {
        let page_size = self.info().page_size;
        let last_slot = (len >> page_size.shift())
            .checked_sub(1)
            .and_then(|more| slot.checked_add(more));
        let Some(last_slot) = last_slot else {
            return Ok(None);
        };
        let place = |slot| {
            let chunk = self.index().chunk_of(slot)?;
            let inside = chunk.bytes_of(slot, 1, page_size)?.start;
            Ok::<_, CheckpointError>(chunk.entry.offset.checked_add(to_u64(inside)))
        };
        // In a file that this crate wrote they do. Others may have a blob between two chunks.
        let (first, last) = (place(slot)?, place(last_slot)?);
        let end = last.and_then(|last| last.checked_add(page_size.bytes()));
        Ok(first.filter(|first| first.checked_add(len) == end))
    }

    fn read_run(
        &self,
        decoder: &mut ChunkDecoder,
        memory: &PrivateMemory,
        run: &PageRun,
    ) -> Result<(), CheckpointError> {
        let info = self.info();
        let mut buffer = vec![0; size(info.page_size.bytes())];
        for pfn in run.frames.iter() {
            match run.content.word() {
                Some(word) => fill_words(&mut buffer, word),
                None => self.page_into(decoder, pfn, &mut buffer)?,
            }
            let frame = PfnRange::with_len(pfn, 1).unwrap_or(run.frames);
            for ram in ram_of(info, frame)? {
                let skip = size(ram.start().raw() & info.page_size.offset_mask());
                let len = size(ram.len());
                let place = memory.address(ram.start());
                let bytes = buffer.get(skip..).and_then(|rest| rest.get(..len));
                let Some((bytes, at)) = bytes.zip(place) else {
                    return Err(MemoryError::NotRam { range: ram }.into());
                };
                // SAFETY: `ram` lies in one region of `memory`, which is not handed out
                // yet, and `bytes` are as long.
                unsafe {
                    core::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len());
                }
            }
        }
        Ok(())
    }
}
