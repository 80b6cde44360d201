//! kdump-compressed dumps: what `makedumpfile` writes, and QEMU's `dump-guest-memory` with
//! `kdump-zlib`, `kdump-raw-zlib` and the like.
//!
//! The format is described by makedumpfile (`IMPLEMENTATION`, `diskdump_mod.h`), crash
//! (`diskdump.h`) and QEMU (`include/sysemu/dump.h`). In blocks of one page: a header; a
//! sub-header with VMCOREINFO and notes behind it; two bitmaps, the frames that exist and the
//! frames that are in the file; a descriptor for each of the latter, in order; the pages, each
//! compressed by itself.

use crate::DumpError;
use crate::Incomplete;
use crate::backing::Stored;
use crate::backing::paged::BlockCache;
use crate::backing::plain::{check_content, open_content};
use crate::format::kdump::content::Content;
use crate::format::kdump::header::{
    BLOCK_SIZE, Header, KdumpCompression, Places, SIGNATURE, SubHeader, machine_named,
};
use crate::format::notes::{Note, notes_in};
use sonicshot::{
    Architecture, Bytes, Cursor, CutShort, FileContent, FileOffset, Gpa, GpaRange, GuestMemory,
    MemoryError, PageSize, Pfn, PfnRange, PhaseProgress, Progress, RamLayout, Tally, WorkPhase,
    to_u64, to_usize,
};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub(crate) const DESCRIPTOR_LEN: u64 = 24;

/// The compression of a page, in its descriptor; the last two bits are of the whole dump.
pub(crate) const ZLIB: u32 = 1;
const LZO: u32 = 2;
pub(crate) const SNAPPY: u32 = 4;
pub(crate) const ZSTD: u32 = 0x20;
const INCOMPLETE: u32 = 8;
const CODECS: u32 = ZLIB | LZO | SNAPPY | ZSTD;

/// No guest has a million ranges of RAM.
const MAX_REGIONS: usize = 1 << 20;
/// The kernel gives VMCOREINFO one page, of 64 KiB at most.
const MAX_VMCOREINFO: u64 = 1 << 16;
/// Notes of tens of thousands of processors.
const MAX_NOTES: u64 = 16 << 20;
/// Frames that one number of the rank index stands for.
const RANK_FRAMES: u64 = 512;
const RANK_BYTES: usize = 64;
/// A bit for each of them.
type Presence = [u64; RANK_BYTES / 8];
/// Memory for decompressed pages.
const CACHE: usize = 8 << 20;

/// A kdump-compressed dump.
pub struct KdumpFile {
    path: PathBuf,
    content: Content,
    layout: RamLayout,
    facts: Facts,
    /// The offset of the bitmap of the frames in the file.
    dumped_at: FileOffset,
    /// The number of frames in the file below each multiple of [`RANK_FRAMES`].
    ranks: Vec<u64>,
    /// The offset of the descriptors.
    descriptors_at: FileOffset,
    /// Of one part of a dump in several: the frames that it has, and how many the parts before it.
    part: Option<(PfnRange, u64)>,
    incomplete: Option<Incomplete>,
    cache: BlockCache<Descriptor>,
    /// The range of frames that was asked for last, by number, and which of them are there.
    presence: Mutex<Option<(u64, Presence)>>,
    /// Decompressors that nobody uses at the moment.
    decoders: Mutex<Vec<Decoder>>,
}

/// The content of the headers.
#[derive(Debug, Clone)]
struct Facts {
    version: u32,
    page_size: PageSize,
    machine: Option<Architecture>,
    /// Pages may be missing that are marked as there.
    may_lack: bool,
    /// The compressions of pages, and the kinds that were left out, as the headers say.
    codec: u32,
    dump_level: u32,
    frames: u64,
    dumped: u64,
    vmcoreinfo: Option<Vec<u8>>,
    notes: Option<Vec<u8>>,
}

/// A page as it is stored.
pub(crate) struct PackedPage {
    pub bytes: Vec<u8>,
    /// Its compression; 0: none.
    pub flags: u32,
    /// It is compressed, and holds only zeroes.
    pub is_zero: bool,
}

/// The place of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Descriptor {
    offset: FileOffset,
    len: u32,
    flags: u32,
}

impl Descriptor {
    fn read(bytes: &[u8]) -> Result<Self, CutShort> {
        let mut fields = Cursor::new(bytes);
        Ok(Self {
            offset: FileOffset::new(fields.le()?),
            len: fields.le()?,
            flags: fields.le()?,
        })
    }
}

impl KdumpFile {
    /// Whether a file that begins with `head` is of this format, flattened or not.
    #[must_use]
    pub fn is_kdump(head: &[u8]) -> bool {
        head.starts_with(SIGNATURE) || head.starts_with(b"makedumpfile")
    }

    /// Opens the dump at `path`.
    ///
    /// # Errors
    /// [`DumpError`] if the file cannot be read, is of another format, or contradicts itself.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DumpError> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(DumpError::io("opening", path))?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(DumpError::NotADump {
                path: path.to_owned(),
                why: "it is not a regular file with content",
            });
        }
        Self::parse(path, open_content(path)?, &None)
    }

    /// Reads the headers of the file.
    pub(crate) fn parse(
        path: &Path,
        file: FileContent,
        progress: &dyn Progress,
    ) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let content = Content::new(path, file, progress)?;
        let header = Header::read(path, &content)?;
        let sub = SubHeader::read(path, &content, &header)?;
        let places = Places::new(path, &content, &header, &sub)?;
        let page_size = header.page_size;
        let (layout, ranks, dumped) = index_of(path, &content, &places, page_size, progress)?;
        let notes = sub.notes.copy(path, &content, MAX_NOTES)?;
        let vmcoreinfo = sub.vmcoreinfo.copy(path, &content, MAX_VMCOREINFO)?;
        let vmcoreinfo = vmcoreinfo.or_else(|| {
            notes_in(notes.as_deref()?)
                .find(|note| note.name == b"VMCOREINFO")
                .map(|note| note.text.to_vec())
        });
        let machine =
            machine_named(&header.machine).or_else(|| machine_of_notes(notes.as_deref()?));
        let facts = Facts {
            version: header.version,
            page_size,
            machine,
            may_lack: header.status & INCOMPLETE != 0 || content.is_cut,
            codec: header.status & CODECS,
            dump_level: sub.dump_level,
            frames: places.frames,
            dumped,
            vmcoreinfo,
            notes,
        };
        let block = usize::try_from(page_size.bytes())
            .map_err(|_| bad("a block size", BLOCK_SIZE, page_size.bytes()))?;
        let mut this = Self {
            path: path.to_owned(),
            content,
            layout,
            dumped_at: places.dumped_at,
            ranks,
            descriptors_at: places.descriptors_at,
            part: None,
            incomplete: None,
            cache: BlockCache::new(CACHE, block),
            presence: Mutex::new(None),
            decoders: Mutex::new(Vec::new()),
            facts,
        };
        if let Some(part) = sub.part {
            let before = this.rank(part.start().raw())?;
            let behind = this.rank(part.end().raw())?;
            this.part = Some((part, before));
            let own = behind.checked_sub(before);
            this.facts.dumped = own.ok_or_else(|| this.bad_part(part.start().raw()))?;
        }
        let said = header.status & INCOMPLETE != 0;
        let unwritten = !said && this.is_last_unwritten();
        this.facts.may_lack |= unwritten;
        this.incomplete = this.look_for_end(said)?;
        if unwritten {
            this.incomplete = Some(Incomplete::Unwritten);
        }
        Ok(this)
    }

    /// Whether nothing was written where the last page's descriptor is: they are written with their
    /// pages, and whoever is stopped has no time left to say so.
    fn is_last_unwritten(&self) -> bool {
        let mut raw = [0; 24];
        let last = self.facts.dumped.checked_sub(1);
        let at = last.and_then(|last| last.checked_mul(DESCRIPTOR_LEN));
        let at = at.and_then(|at| self.descriptors_at.checked_add(at));
        at.is_some_and(|at| self.content.read(at, &mut raw)) && raw.iter().all(|byte| *byte == 0)
    }

    /// The number of frames below `pfn` that are marked as in the file.
    fn rank(&self, pfn: u64) -> Result<u64, DumpError> {
        let pfn = pfn.min(self.facts.frames);
        let Some(last) = pfn.checked_sub(1) else {
            return Ok(0);
        };
        let (rank, bits) = self.bits(last / RANK_FRAMES)?;
        let inside = (last % RANK_FRAMES).checked_add(1);
        let rank = inside.and_then(|inside| rank.checked_add(marked_below(&bits, inside)));
        rank.ok_or_else(|| self.bad_part(pfn))
    }

    fn bad_part(&self, frame: u64) -> DumpError {
        DumpError::malformed(&self.path, "the frames before frame", self.dumped_at, frame)
    }

    /// The end of the last of the pages with these descriptors; `None` if that is nowhere.
    fn end_of(&self, first: u64, behind: u64) -> Result<Option<FileOffset>, DumpError> {
        let Some(count) = behind.checked_sub(first) else {
            return Ok(None);
        };
        let at = first.checked_mul(DESCRIPTOR_LEN);
        let at = at.and_then(|at| self.descriptors_at.checked_add(at));
        let len = count.checked_mul(DESCRIPTOR_LEN);
        let all = at.zip(len).and_then(|(at, len)| self.content.copy(at, len));
        let Some(all) = all else { return Ok(None) };
        let mut end = FileOffset::ZERO;
        for number in first..behind {
            let Some(descriptor) = self.among(&all, first, number)? else {
                continue;
            };
            let Some(page) = descriptor.offset.checked_add(descriptor.len.into()) else {
                return Ok(None);
            };
            end = end.max(page);
        }
        Ok(Some(end))
    }

    /// The reason why pages are missing, if the headers say so or the file ends before its last pages do.
    fn look_for_end(&self, said: bool) -> Result<Option<Incomplete>, DumpError> {
        /// Of so many pages at the end it is looked where they are: zeroes are all in one place.
        const LOOKED: u64 = 1 << 16;
        let end = self.content.end();
        let cut = |need: FileOffset| {
            Some(Incomplete::CutOff {
                len: self.content.stored_len(),
                need: need.raw(),
            })
        };
        let descriptors = self.facts.dumped.checked_mul(DESCRIPTOR_LEN);
        let descriptors_end = descriptors.and_then(|len| self.descriptors_at.checked_add(len));
        let beyond = || {
            let what = "page descriptors beyond the end: truncated";
            DumpError::malformed(&self.path, what, self.descriptors_at, self.facts.dumped)
        };
        let mut need = descriptors_end.ok_or_else(beyond)?;
        if need <= end {
            let mut behind = self.facts.dumped;
            let least = behind.saturating_sub(LOOKED);
            while behind > least && need <= end {
                let first = behind.checked_sub(RANK_FRAMES);
                let first = first.map_or(least, |first| first.max(least));
                need = need.max(self.end_of(first, behind)?.ok_or_else(beyond)?);
                behind = first;
            }
        }
        Ok(if said {
            Some(Incomplete::Said)
        } else if need > end || self.content.is_cut {
            cut(need)
        } else {
            self.part.map(|(frames, _)| Incomplete::Part { frames })
        })
    }

    /// Refuses a file that was changed since it was opened, or could not be read.
    pub(crate) fn check_unchanged(&self) -> Result<(), DumpError> {
        check_content(&self.content.file, &self.path)
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        self.content.file.file()
    }

    /// Whether the file is flattened.
    #[must_use]
    pub fn is_flattened(&self) -> bool {
        self.content.is_flattened()
    }

    /// The guest's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.facts.page_size
    }

    /// The version of the header.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.facts.version
    }

    /// The guest's processor, if the dump tells.
    #[must_use]
    pub fn machine(&self) -> Option<Architecture> {
        self.facts.machine
    }

    /// The VMCOREINFO text.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.facts.vmcoreinfo.as_deref()
    }

    /// The ELF notes: the registers of the processors among them.
    #[must_use]
    pub fn notes(&self) -> Option<&[u8]> {
        self.facts.notes.as_deref()
    }

    /// The number of frames in the file.
    #[must_use]
    pub fn dumped_frames(&self) -> u64 {
        self.facts.dumped
    }

    /// The reason why it lacks pages that it should have.
    #[must_use]
    pub fn incomplete(&self) -> Option<&Incomplete> {
        self.incomplete.as_ref()
    }

    /// The compression for a page that is not yet compressed: that of the others, if it can be
    /// written. Of a dump that is not compressed, none is.
    pub(crate) fn compression(&self) -> KdumpCompression {
        match self.facts.codec {
            0 => KdumpCompression::None,
            codec if codec & ZSTD != 0 => KdumpCompression::Zstd,
            codec if codec & SNAPPY != 0 => KdumpCompression::Snappy,
            _ => KdumpCompression::Zlib,
        }
    }

    /// The compressions of pages: a bit for each way.
    pub(crate) fn codec(&self) -> u32 {
        self.facts.codec
    }

    /// The kinds of pages that were left out: a bit for each (`man makedumpfile`, `-d`).
    pub(crate) fn dump_level(&self) -> u32 {
        self.facts.dump_level
    }

    /// The bits of the `index`th range of frames, and how many are set before it.
    fn bits(&self, index: u64) -> Result<(u64, Presence), DumpError> {
        let bad =
            |offset| DumpError::malformed(&self.path, "a bitmap beyond the end", offset, index);
        let at = index
            .checked_mul(to_u64(RANK_BYTES))
            .and_then(|bytes| self.dumped_at.checked_add(bytes))
            .ok_or_else(|| bad(self.dumped_at))?;
        let mut bytes = [0; RANK_BYTES];
        let rank = usize::try_from(index).ok().and_then(|i| self.ranks.get(i));
        let Some(rank) = rank.filter(|_| self.content.read(at, &mut bytes)) else {
            return Err(bad(at));
        };
        let mut bits = [0; RANK_BYTES / 8];
        for (bits, word) in bits.iter_mut().zip(words(&bytes)) {
            *bits = word;
        }
        Ok((*rank, bits))
    }

    /// Whether it is the frame of this dump, or of another part of it.
    fn is_here(&self, pfn: u64) -> bool {
        let here = |(part, _): &(PfnRange, u64)| part.contains(Pfn::new(pfn));
        pfn < self.facts.frames && self.part.as_ref().is_none_or(here)
    }

    /// The number of the descriptor of the first frame that `rank` frames are before.
    fn number(&self, rank: u64) -> Option<u64> {
        match self.part {
            Some((_, before)) => rank.checked_sub(before),
            None => Some(rank),
        }
    }

    /// The frames of the `index`th range that are in the file.
    fn presence(&self, index: u64) -> Result<Presence, DumpError> {
        let cached = || self.presence.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, presence)) = *cached()
            && at == index
        {
            return Ok(presence);
        }
        let mut presence = [0; RANK_BYTES / 8];
        self.each_descriptor(index, &mut |bit, _| {
            let word = usize::try_from(bit >> 6).ok();
            if let Some(word) = word.and_then(|word| presence.get_mut(word)) {
                *word |= 1 << (bit & 63);
            }
        })?;
        *cached() = Some((index, presence));
        Ok(presence)
    }

    /// Gives `each` every frame of the `index`th range that is in the file, by its number there,
    /// and its descriptor.
    fn each_descriptor(
        &self,
        index: u64,
        each: &mut dyn FnMut(u64, Descriptor),
    ) -> Result<(), DumpError> {
        let (mut rank, bits) = self.bits(index)?;
        let first = index.checked_mul(RANK_FRAMES);
        let first = first.ok_or_else(|| self.bad_part(index))?;
        let all = self.descriptors(rank, &bits);
        for (bit, pfn) in (0..RANK_FRAMES).zip(first..) {
            let word = bits.get(to_usize(bit >> 6));
            if word.is_none_or(|word| word >> (bit & 63) & 1 == 0) {
                continue;
            }
            if self.is_here(pfn)
                && let Some(number) = self.number(rank)
                && let Some(descriptor) = match &all {
                    Some((first, all)) => self.among(all, *first, number)?,
                    None => self.numbered(number)?,
                }
                && self.is_inside(descriptor)
            {
                each(bit, descriptor);
            }
            rank = rank.checked_add(1).ok_or_else(|| self.bad_part(pfn))?;
        }
        Ok(())
    }

    /// The bytes of all descriptors of a range of frames, `rank` of which are before it, and the
    /// number of the first; `None` if they are not all there.
    fn descriptors(&self, rank: u64, bits: &Presence) -> Option<(u64, Vec<u8>)> {
        let count = marked_below(bits, RANK_FRAMES);
        let number = self.number(rank)?;
        let at = number.checked_mul(DESCRIPTOR_LEN)?;
        let at = self.descriptors_at.checked_add(at)?;
        let bytes = self.content.copy(at, count.checked_mul(DESCRIPTOR_LEN)?)?;
        Some((number, bytes))
    }

    /// The `number`th descriptor, among those from the `first` on.
    fn among(&self, all: &[u8], first: u64, number: u64) -> Result<Option<Descriptor>, DumpError> {
        let from = number
            .checked_sub(first)
            .and_then(|skipped| skipped.checked_mul(DESCRIPTOR_LEN));
        let raw = from.and_then(|from| all.part(from, DESCRIPTOR_LEN));
        match raw {
            Some(raw) => self.parsed(raw, number),
            None => self.numbered(number),
        }
    }

    /// Whether a page's bytes are in the file; they are not where it is cut off.
    fn is_inside(&self, descriptor: Descriptor) -> bool {
        let end = descriptor.offset.checked_add(descriptor.len.into());
        end.is_some_and(|end| end <= self.content.end())
    }

    /// The `number`th descriptor; `None` if it is not in the file, or was not written.
    fn numbered(&self, number: u64) -> Result<Option<Descriptor>, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(&self.path, what, offset, value);
        let at = number
            .checked_mul(DESCRIPTOR_LEN)
            .and_then(|bytes| self.descriptors_at.checked_add(bytes));
        let beyond = "a page descriptor beyond the end";
        let at = at.ok_or_else(|| bad(beyond, self.descriptors_at, number))?;
        let mut raw = [0; 16];
        if !self.content.read(at, &mut raw) {
            return Ok(None);
        }
        self.parsed(&raw, number)
    }

    /// The `number`th descriptor, as its bytes say.
    fn parsed(&self, raw: &[u8], number: u64) -> Result<Option<Descriptor>, DumpError> {
        let bad = |what, value| {
            let at = self.descriptors_at;
            let skipped = number.checked_mul(DESCRIPTOR_LEN);
            let at = skipped
                .and_then(|skipped| at.checked_add(skipped))
                .unwrap_or(at);
            DumpError::malformed(&self.path, what, at, value)
        };
        let descriptor =
            Descriptor::read(raw).map_err(|_| bad("a page descriptor beyond the end", number))?;
        let unwritten = descriptor.offset == FileOffset::ZERO || descriptor.len == 0;
        if self.facts.may_lack && unwritten {
            return Ok(None);
        }
        if descriptor.len == 0 || u64::from(descriptor.len) > self.facts.page_size.bytes() {
            let len = descriptor.len.into();
            return Err(bad("an invalid length of a page", len));
        }
        Ok(Some(descriptor))
    }

    /// The page at `at` as it is stored; `None` if it is not there.
    pub(crate) fn packed(&self, at: Gpa) -> Result<Option<PackedPage>, DumpError> {
        let Some(descriptor) = self.descriptor(at.pfn(self.facts.page_size).raw())? else {
            return Ok(None);
        };
        // What is compressed to less may be zeroes alone.
        let small = u64::from(descriptor.len) <= self.facts.page_size.bytes() >> 4;
        Ok(Some(PackedPage {
            bytes: self.bytes_of(descriptor)?,
            flags: descriptor.flags,
            is_zero: small && self.page(descriptor)?.iter().all(|byte| *byte == 0),
        }))
    }

    fn bytes_of(&self, descriptor: Descriptor) -> Result<Vec<u8>, DumpError> {
        let Descriptor { offset, len, .. } = descriptor;
        let what = "a page beyond the end: truncated";
        let bad = || DumpError::malformed(&self.path, what, offset, len.into());
        self.content.copy(offset, len.into()).ok_or_else(bad)
    }

    /// The descriptor of frame `pfn`; `None` if the frame is not in the file.
    fn descriptor(&self, pfn: u64) -> Result<Option<Descriptor>, DumpError> {
        if !self.is_here(pfn) {
            return Ok(None);
        }
        let (index, bit) = (pfn / RANK_FRAMES, pfn % RANK_FRAMES);
        let (rank, bits) = self.bits(index)?;
        let word = bits.get(to_usize(bit >> 6));
        if word.is_none_or(|word| word >> (bit & 63) & 1 == 0) {
            return Ok(None);
        }
        let rank = rank.checked_add(marked_below(&bits, bit));
        let rank = rank.ok_or_else(|| self.bad_part(pfn))?;
        let Some(number) = self.number(rank) else {
            return Ok(None);
        };
        Ok(self
            .numbered(number)?
            .filter(|descriptor| self.is_inside(*descriptor)))
    }

    /// The page that `descriptor` is of, decompressed.
    fn page(&self, descriptor: Descriptor) -> Result<Vec<u8>, DumpError> {
        let Descriptor { offset, len, flags } = descriptor;
        let bad = |what, value| DumpError::malformed(&self.path, what, offset, value);
        let stored = self.bytes_of(descriptor)?;
        let size = usize::try_from(self.facts.page_size.bytes())
            .map_err(|_| bad("a page too large", len.into()))?;
        if flags == 0 {
            return if stored.len() == size {
                Ok(stored)
            } else {
                Err(bad(
                    "an uncompressed page that is not a page long",
                    len.into(),
                ))
            };
        }
        let lock = || self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        let mut decoder = lock().pop().unwrap_or_default();
        let mut page = vec![0; size];
        let got = decoder.decode(flags, &stored, &mut page);
        lock().push(decoder);
        match got {
            Some(got) if got == size => Ok(page),
            Some(got) => Err(bad("a page that decompresses to another size", to_u64(got))),
            None => Err(bad("a page that cannot be decompressed", flags.into())),
        }
    }
}

impl Stored for KdumpFile {
    fn file(&self) -> &File {
        self.file()
    }

    fn check_unchanged(&self) -> Result<(), DumpError> {
        self.check_unchanged()
    }

    /// Pages and their descriptors. All pages of zeroes have one place, which is counted once.
    fn stored_bytes(&self, range: GpaRange) -> Result<u64, DumpError> {
        let frames = range.whole_frames(self.facts.page_size);
        let (mut sum, mut end) = (Tally::ZERO, FileOffset::ZERO);
        let mut at = frames.start().raw();
        while at < frames.end().raw() {
            let index = at / RANK_FRAMES;
            let first = index.checked_mul(RANK_FRAMES).map(Pfn::new);
            let first = first.ok_or_else(|| self.bad_part(at))?;
            self.each_descriptor(index, &mut |bit, descriptor| {
                if !first
                    .checked_add(bit)
                    .is_some_and(|pfn| frames.contains(pfn))
                {
                    return;
                }
                sum.add(DESCRIPTOR_LEN);
                // Pages are written one behind the other: what lies before is shared.
                if descriptor.offset >= end {
                    sum.add(descriptor.len.into());
                    let behind = descriptor.offset.checked_add(descriptor.len.into());
                    end = behind.unwrap_or(end);
                }
            })?;
            // Beyond the last of all numbers there are no frames.
            let next = first.checked_add(RANK_FRAMES).map(Pfn::raw);
            at = next.unwrap_or(frames.end().raw());
        }
        Ok(sum.get())
    }
}

impl GuestMemory for KdumpFile {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = to_u64(buf.len());
        let range = GpaRange::of_request(at, buf.len());
        let not_ram = || MemoryError::NotRam { range };
        if !self.layout.contains(at, len) && len > 0 {
            return Err(not_ram());
        }
        let size = self.facts.page_size;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let inside = at.raw() & size.offset_mask();
            let len = size.left_in_page(at.raw()).min(to_u64(rest.len()));
            let (Ok(inside), Ok(split)) = (usize::try_from(inside), usize::try_from(len)) else {
                return Err(not_ram());
            };
            let (now, later) = rest.split_at_mut_checked(split).ok_or_else(not_ram)?;
            let range = GpaRange::with_len(at, len).ok_or_else(not_ram)?;
            let backend = |source| MemoryError::Backend {
                range,
                source: Box::new(self.check_unchanged().err().unwrap_or(source)),
            };
            let descriptor = self
                .descriptor(at.pfn(size).raw())
                .map_err(backend)?
                .ok_or(MemoryError::Absent { range })?;
            self.cache
                .read(descriptor, inside, now, || self.page(descriptor))
                .map_err(backend)?
                .ok_or_else(not_ram)?;
            at = range.end();
            rest = later;
        }
        Ok(())
    }

    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        let Some(region) = self.layout.region_of(at) else {
            return Ok(None);
        };
        let size = self.facts.page_size;
        let backend = |source| MemoryError::Backend {
            range: GpaRange::new(at, region.end()),
            source: Box::new(self.check_unchanged().err().unwrap_or(source)),
        };
        let frames = region.whole_frames(size);
        let find = |from, there| self.find(PfnRange::new(from, frames.end()), there);
        let Some(first) = find(at.pfn(size), false).map_err(backend)? else {
            return Ok(None);
        };
        let end = find(first, true).map_err(backend)?.unwrap_or(frames.end());
        let gpa = PfnRange::new(first, end).gpa_range(size);
        Ok(gpa.map(|absent| GpaRange::new(absent.start().max(at), absent.end())))
    }
}

impl KdumpFile {
    /// The first of `frames` that is in the file, or that is not.
    fn find(&self, frames: PfnRange, there: bool) -> Result<Option<Pfn>, DumpError> {
        let mut at = frames.start().raw();
        while at < frames.end().raw() {
            let presence = self.presence(at / RANK_FRAMES)?;
            let bit = at % RANK_FRAMES;
            let word = usize::try_from(bit >> 6).ok().and_then(|i| presence.get(i));
            let word = word.copied().ok_or_else(|| self.bad_part(at))?;
            let wanted = if there { word } else { !word } >> (bit & 63);
            if wanted != 0 {
                let found = Pfn::new(at).checked_add(wanted.trailing_zeros().into());
                return Ok(found.filter(|found| frames.contains(*found)));
            }
            let Some(next) = (at | 63).checked_add(1) else {
                break;
            };
            at = next;
        }
        Ok(None)
    }
}

impl fmt::Debug for KdumpFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KdumpFile")
            .field("path", &self.path)
            .field("version", &self.facts.version)
            .field("machine", &self.facts.machine)
            .field("page_size", &self.facts.page_size)
            .field("dumped", &self.facts.dumped)
            .finish_non_exhaustive()
    }
}

/// Decompressors, made when they are first needed.
#[derive(Default)]
struct Decoder {
    zlib: Option<flate2::Decompress>,
    snappy: Option<snap::raw::Decoder>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decoder {
    /// Decompresses a page; returns how long it is.
    fn decode(&mut self, flags: u32, stored: &[u8], page: &mut [u8]) -> Option<usize> {
        match flags {
            ZLIB => {
                let zlib = self
                    .zlib
                    .get_or_insert_with(|| flate2::Decompress::new(true));
                zlib.reset(true);
                let end = zlib
                    .decompress(stored, page, flate2::FlushDecompress::Finish)
                    .ok()?;
                (end == flate2::Status::StreamEnd).then_some(())?;
                usize::try_from(zlib.total_out()).ok()
            }
            LZO => lzokay::decompress::decompress(stored, page).ok(),
            SNAPPY => self
                .snappy
                .get_or_insert_default()
                .decompress(stored, page)
                .ok(),
            ZSTD => {
                if self.zstd.is_none() {
                    self.zstd = zstd::bulk::Decompressor::new().ok();
                }
                self.zstd.as_mut()?.decompress_to_buffer(stored, page).ok()
            }
            _ => None,
        }
    }
}

/// The guest's RAM by the first bitmap, and the rank index of the second with all that it marks.
fn index_of(
    path: &Path,
    content: &Content,
    places: &Places,
    page_size: PageSize,
    progress: &dyn Progress,
) -> Result<(RamLayout, Vec<u64>, u64), DumpError> {
    let frames = places.frames;
    let bitmaps = Tally::new(frames.div_ceil(8)).times(2).get();
    let mut phase = PhaseProgress::begin(progress, WorkPhase::Opening, bitmaps);
    let at = places.present_at;
    let layout = layout_of(path, content, at, frames, page_size, &mut phase)?;
    let ranks = ranks_of(content, places.dumped_at, frames, &mut phase);
    let (ranks, dumped) = ranks.ok_or_else(|| {
        let what = "bitmaps beyond the end: truncated";
        DumpError::malformed(path, what, places.dumped_at, frames)
    })?;
    phase.end();
    Ok((layout, ranks, dumped))
}

/// The ranges of frames whose bit is set in the bitmap at `bitmap`.
fn layout_of(
    path: &Path,
    content: &Content,
    bitmap: FileOffset,
    frames: u64,
    page_size: PageSize,
    phase: &mut PhaseProgress<'_>,
) -> Result<RamLayout, DumpError> {
    let bad = |what, value| DumpError::malformed(path, what, bitmap, value);
    let mut regions: Vec<GpaRange> = Vec::new();
    let mut add = |start: u64, end: u64| {
        let gpa = |frame: u64| Pfn::new(frame.min(frames)).gpa(page_size);
        let Some((start, end)) = gpa(start).zip(gpa(end)) else {
            return false;
        };
        match regions.last_mut() {
            Some(last) if last.end() == start => *last = GpaRange::new(last.start(), end),
            _ if start < end => regions.push(GpaRange::new(start, end)),
            _ => {}
        }
        regions.len() <= MAX_REGIONS
    };
    let few = for_words(content, bitmap, frames, phase, |base, word| {
        let mut at = 0_u32;
        while at < 64 {
            // Shifted by less than 64, as the loop says.
            let zeroes = (word >> at).trailing_zeros();
            let Some(start) = at.checked_add(zeroes).filter(|start| *start < 64) else {
                break;
            };
            let ones = (word >> start).trailing_ones();
            at = start.checked_add(ones)?;
            let frame = |bit: u32| base.checked_add(bit.into());
            if !add(frame(start)?, frame(at)?) {
                return None;
            }
        }
        Some(())
    });
    if few.is_none() {
        return Err(bad(
            "bitmaps that are cut off or mark too many ranges of RAM",
            frames,
        ));
    }
    RamLayout::new(regions).map_err(|source| DumpError::Layout {
        path: path.to_owned(),
        source,
    })
}

/// The number of marked frames below the `end`th of those in `bits`.
fn marked_below(bits: &Presence, end: u64) -> u64 {
    let words = bits.iter().zip((0_u64..).step_by(64));
    let below = words.map(|(word, base)| match end.checked_sub(base) {
        None => 0,
        Some(left @ 0..64) => word & !(u64::MAX << left),
        Some(_) => *word,
    });
    below.map(|word| u64::from(word.count_ones())).sum()
}

/// The rank index of the bitmap, and how many bits are set in all.
fn ranks_of(
    content: &Content,
    bitmap: FileOffset,
    frames: u64,
    phase: &mut PhaseProgress<'_>,
) -> Option<(Vec<u64>, u64)> {
    let mut ranks = Vec::new();
    let mut sum = 0_u64;
    for_words(content, bitmap, frames, phase, |base, word| {
        if base.is_multiple_of(RANK_FRAMES) {
            ranks.push(sum);
        }
        let word = match frames.checked_sub(base) {
            None => 0,
            Some(left @ 0..64) => word & !(u64::MAX << left),
            Some(_) => word,
        };
        sum = sum.checked_add(word.count_ones().into())?;
        Some(())
    })?;
    Some((ranks, sum))
}

/// Gives `each` the first frame and the bits of every word of a bitmap of `frames` frames, until
/// it returns `None`.
fn for_words(
    content: &Content,
    bitmap: FileOffset,
    frames: u64,
    phase: &mut PhaseProgress<'_>,
    mut each: impl FnMut(u64, u64) -> Option<()>,
) -> Option<()> {
    // A bitmap is whole blocks, the smallest of which is that long.
    let mut buffer = [0; 4096];
    let mut frame = 0_u64;
    while frame < frames {
        let at = bitmap.checked_add(frame >> 3)?;
        content.read(at, &mut buffer).then_some(())?;
        for word in words(&buffer) {
            if frame >= frames {
                break;
            }
            each(frame, word)?;
            frame = frame.checked_add(64)?;
        }
        phase.add(to_u64(buffer.len()));
    }
    Some(())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let mut words = Cursor::new(bytes);
    std::iter::from_fn(move || words.le().ok())
}

/// The processor by the size of its `struct elf_prstatus`.
fn machine_of_notes(notes: &[u8]) -> Option<Architecture> {
    let status = notes_in(notes).find(Note::is_registers)?;
    match status.text.len() {
        336 => Some(Architecture::X86_64),
        392 => Some(Architecture::Aarch64),
        _ => None,
    }
}
