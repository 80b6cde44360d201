//! AVML dumps (Microsoft's `avml`, `src/image.rs`): records as LiME's, the data of each a Snappy
//! stream in Google's framing format, followed by the length of that stream.
//!
//! AVML leaves out blocks (of 16 MiB at most) that are all zero, and does not say so: where
//! nothing is recorded there may be RAM that is zero, or no RAM.

use crate::DumpError;
use crate::Incomplete;
use crate::backing::Stored;
use crate::backing::paged::BlockCache;
#[cfg(test)]
use crate::backing::plain::open_content;
use crate::backing::plain::{check_content, may_claim, sum_of_lens};
use crate::format::kind::{Format, Kind, Source, boxed};
use crate::format::lime::{HEADER_LEN, Record, cut_header, is_zero_from};
use crate::limit::allowed_for;
use sonicshot::{
    Bytes, FileBytes, FileContent, FileOffset, FileRange, Gpa, GpaRange, GuestMemory, MemoryError,
    PhaseProgress, Progress, RamLayout, WorkPhase, to_u64,
};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

pub(crate) const KIND: Kind = Kind::by_magic("avml", &[b"AVML"], |source| open(source).map(boxed));

const AVML_MAGIC: u32 = 0x4c4d_5641;
const LIME_MAGIC: u32 = 0x4c69_4d45;
/// The first bytes of every Snappy stream (`framing_format.txt`).
const STREAM: &[u8; 10] = b"\xff\x06\x00\x00sNaPpY";
/// The most bytes that one chunk decompresses to.
const MAX_CHUNK: u64 = 1 << 16;
/// A copy of 64 bytes takes at least 3.
const MAX_RATIO: u64 = 32;
/// A file may have so many chunks, and one more for each [`CHUNK_LEN`] bytes. (64 KiB of zeroes
/// take 3 KiB.)
const SMALL_CHUNKS: u64 = 1 << 20;
const CHUNK_LEN: u64 = 256;
/// Memory for decompressed chunks.
const CACHE: usize = 16 << 20;

/// An AVML dump's file and memory.
#[derive(Debug)]
struct AvmlDump(AvmlFile);

fn open(source: Source<'_>) -> Result<AvmlDump, DumpError> {
    AvmlFile::parse(source.path, source.content, &source.known.progress).map(AvmlDump)
}

impl Format for AvmlDump {
    fn name(&self) -> &'static str {
        "AVML"
    }

    fn stored(&self) -> &dyn Stored {
        &self.0
    }

    fn incomplete(&self) -> Option<Incomplete> {
        let (len, need) = (self.0.content.len(), self.0.cut?.need.raw());
        Some(Incomplete::CutOff { len, need })
    }
}

/// The memory in an AVML dump.
pub(crate) struct AvmlFile {
    path: PathBuf,
    content: FileContent,
    layout: RamLayout,
    /// Sorted by guest address, disjoint.
    chunks: Vec<Chunk>,
    /// The cut, if the file is cut off.
    cut: Option<Cut>,
    cache: BlockCache<FileOffset>,
}

/// The cut of a file that ends too early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// The least offset at which it should end.
    need: FileOffset,
    /// The memory that its last record should have, and does not.
    lost: GpaRange,
}

/// A range of RAM that is compressed by itself.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    guest: GpaRange,
    /// The chunk with its own header, or the bytes themselves.
    file: FileRange,
    compressed: bool,
}

impl AvmlFile {
    /// Opens the dump at `path`.
    #[cfg(test)]
    pub(crate) fn open(path: &Path) -> Result<Self, DumpError> {
        Self::parse(path, open_content(path)?, &None)
    }

    /// Makes the index of the file.
    pub(crate) fn parse(
        path: &Path,
        content: FileContent,
        progress: &dyn Progress,
    ) -> Result<Self, DumpError> {
        let (mut chunks, cut) = chunks_of(path, content.bytes(), progress)?;
        chunks.sort_unstable_by_key(|chunk| chunk.guest);
        let lost = cut.map(|cut| cut.lost).filter(|lost| !lost.is_empty());
        let ranges = chunks.iter().map(|chunk| chunk.guest).chain(lost).collect();
        let layout = RamLayout::new(ranges).map_err(|source| DumpError::Layout {
            path: path.to_owned(),
            source,
        })?;
        let block = usize::try_from(MAX_CHUNK).unwrap_or(CACHE);
        Ok(Self {
            path: path.to_owned(),
            content,
            layout,
            chunks,
            cut,
            cache: BlockCache::new(CACHE, block),
        })
    }
}

impl AvmlFile {
    fn chunk_of(&self, at: Gpa) -> Option<&Chunk> {
        let above = self.chunks.partition_point(|c| c.guest.start() <= at);
        self.chunks
            .get(above.checked_sub(1)?)
            .filter(|chunk| chunk.guest.contains(at))
    }

    fn stored(&self, range: FileRange) -> Option<FileBytes<'_>> {
        self.content.bytes().part(range.start().raw(), range.len())
    }

    /// Decompresses a chunk, and checks its sum.
    fn decompress(&self, chunk: &Chunk) -> Result<Vec<u8>, DumpError> {
        let file = chunk.file;
        let bad = |what| DumpError::malformed(&self.path, what, file.start(), file.len());
        let stored = self
            .stored(file)
            .ok_or_else(|| bad("a chunk beyond the end: truncated"))?;
        // Both lengths were bounded when the chunk was found.
        let size = usize::try_from(chunk.guest.len());
        let mut out = vec![0; size.map_err(|_| bad("a chunk of an invalid length"))?];
        let mut copy = vec![0; stored.len()];
        let mut decoder = stored
            .copy_to(&mut copy)
            .then(|| snap::read::FrameDecoder::new(STREAM.chain(copy.as_slice())))
            .ok_or_else(|| bad("a chunk beyond the end: truncated"))?;
        decoder
            .read_exact(&mut out)
            .map_err(|_| bad("a chunk that cannot be decompressed"))?;
        Ok(out)
    }
}

impl Stored for AvmlFile {
    fn file(&self) -> &File {
        self.content.file()
    }

    fn check_unchanged(&self) -> Result<(), DumpError> {
        check_content(&self.content, &self.path)
    }
}

impl GuestMemory for AvmlFile {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::of_request(at, buf.len());
        let not_ram = || MemoryError::NotRam { range };
        if !buf.is_empty() && !self.layout.contains(at, range.len()) {
            return Err(not_ram());
        }
        let lost = self.cut.map(|cut| cut.lost.intersection(&range));
        if lost.is_some_and(|lost| !lost.is_empty()) {
            return Err(MemoryError::Absent { range });
        }
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let chunk = self.chunk_of(at).ok_or_else(not_ram)?;
            let inside = at.offset_from(chunk.guest.start()).ok_or_else(not_ram)?;
            let left = chunk.guest.len().checked_sub(inside).ok_or_else(not_ram)?;
            let len = left.min(to_u64(rest.len()));
            let split = usize::try_from(len).map_err(|_| not_ram())?;
            let (now, later) = rest.split_at_mut_checked(split).ok_or_else(not_ram)?;
            let range = GpaRange::with_len(at, len).ok_or_else(not_ram)?;
            if chunk.compressed {
                let inside = usize::try_from(inside).map_err(|_| not_ram())?;
                self.cache
                    .read(chunk.file.start(), inside, now, || self.decompress(chunk))
                    .map_err(|source| MemoryError::Backend {
                        range,
                        source: Box::new(
                            check_content(&self.content, &self.path)
                                .err()
                                .unwrap_or(source),
                        ),
                    })?
                    .ok_or_else(not_ram)?;
            } else {
                let from = chunk.file.start().checked_add(inside);
                let from = from.and_then(|from| FileRange::with_len(from, len));
                let bytes = from.and_then(|from| self.stored(from));
                let bytes = bytes.ok_or_else(not_ram)?;
                if !bytes.copy_to(now) {
                    return Err(not_ram());
                }
            }
            at = range.end();
            rest = later;
        }
        Ok(())
    }

    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        let region = self.layout.region_of(at);
        let rest = region.map(|region| GpaRange::new(at, region.end()));
        let lost = rest.zip(self.cut);
        let lost = lost.map(|(rest, cut)| cut.lost.intersection(&rest));
        Ok(lost.filter(|lost| !lost.is_empty()))
    }
}

impl fmt::Debug for AvmlFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AvmlFile")
            .field("path", &self.path)
            .field("chunks", &self.chunks.len())
            .finish_non_exhaustive()
    }
}

/// Finds the chunks of all records, by their headers alone, and where the file is cut off.
fn chunks_of(
    path: &Path,
    data: FileBytes<'_>,
    progress: &dyn Progress,
) -> Result<(Vec<Chunk>, Option<Cut>), DumpError> {
    let file_len = to_u64(data.len());
    let file_end = FileOffset::new(file_len);
    let mut walk = Walk {
        path,
        data,
        limit: allowed_for(file_len / CHUNK_LEN, SMALL_CHUNKS),
        chunks: Vec::new(),
        cut: None,
        phase: PhaseProgress::begin(progress, WorkPhase::Opening, file_len),
    };
    let mut at = FileOffset::ZERO;
    while at < file_end && walk.cut.is_none() {
        if !walk.chunks.is_empty() {
            if let Some(need) = cut_header(data, at, &[AVML_MAGIC, LIME_MAGIC]) {
                let lost = GpaRange::new(Gpa::ZERO, Gpa::ZERO);
                walk.cut = Some(Cut { need, lost });
                break;
            }
            if is_zero_from(data, at.raw()) {
                break;
            }
        }
        let record = Record::read(path, data, at)?;
        let beyond = || walk.bad("a record beyond 64 bits", at, record.guest.len());
        let body = at.checked_add(HEADER_LEN).ok_or_else(beyond)?;
        at = match (record.magic, record.version) {
            (AVML_MAGIC, 2) => walk.stream(record.guest, body)?,
            // Uncompressed: what `avml` writes without --compress is LiME's own format.
            (LIME_MAGIC | AVML_MAGIC, 1) => {
                let file = FileRange::with_len(body, record.guest.len()).ok_or_else(beyond)?;
                walk.plain(record.guest, file)?
            }
            (AVML_MAGIC | LIME_MAGIC, version) => {
                return Err(walk.bad("an unknown version of AVML", at, version.into()));
            }
            (magic, _) => return Err(walk.bad("missing AVML or LiME magic", at, magic.into())),
        };
    }
    walk.check_cut()?;
    walk.phase.end();
    Ok((walk.chunks, walk.cut))
}

struct Walk<'a> {
    path: &'a Path,
    data: FileBytes<'a>,
    limit: u64,
    chunks: Vec<Chunk>,
    cut: Option<Cut>,
    phase: PhaseProgress<'a>,
}

impl Walk<'_> {
    fn bad(&self, what: &'static str, offset: FileOffset, value: u64) -> DumpError {
        DumpError::malformed(self.path, what, offset, value)
    }

    fn push(&mut self, chunk: Chunk) -> Result<(), DumpError> {
        if to_u64(self.chunks.len()) >= self.limit {
            return Err(self.bad("too many small chunks", chunk.file.start(), self.limit));
        }
        self.phase.reach(chunk.file.end().raw());
        self.chunks.push(chunk);
        Ok(())
    }

    /// Adds what is there of a record that is not compressed. Returns where the next begins.
    fn plain(&mut self, guest: GpaRange, file: FileRange) -> Result<FileOffset, DumpError> {
        let file_end = FileOffset::new(to_u64(self.data.len()));
        let there = FileRange::new(file.start(), file.end().min(file_end));
        let end = guest.start().checked_add(there.len());
        let beyond = || self.bad("a record beyond 64 bits", file.start(), file.len());
        let end = end.ok_or_else(beyond)?;
        if !there.is_empty() {
            self.push(Chunk {
                guest: GpaRange::new(guest.start(), end),
                file: there,
                compressed: false,
            })?;
        }
        if there.end() < file.end() {
            self.cut(file.end(), GpaRange::new(end, guest.end()));
        }
        Ok(file.end())
    }

    /// The file ends before `need`, and its record before `lost`. Returns where the next begins.
    fn cut(&mut self, need: FileOffset, lost: GpaRange) -> FileOffset {
        self.cut = Some(Cut { need, lost });
        need
    }

    /// Refuses a file that is cut off before anything is there, and a short one that claims more
    /// than it can be of.
    fn check_cut(&self) -> Result<(), DumpError> {
        let Some(Cut { need, lost }) = self.cut else {
            return Ok(());
        };
        let all = self.chunks.iter().map(|chunk| chunk.guest.len());
        let claimed = sum_of_lens(all.chain([lost.len()]));
        let file_len = to_u64(self.data.len());
        if self.chunks.is_empty() || claimed.is_none_or(|claimed| !may_claim(claimed, file_len)) {
            return Err(self.bad("a record beyond the end: truncated", need, lost.len()));
        }
        Ok(())
    }

    /// Walks the stream at `begin`, which holds `guest`. Returns where the next record begins.
    fn stream(&mut self, guest: GpaRange, begin: FileOffset) -> Result<FileOffset, DumpError> {
        let file_end = FileOffset::new(to_u64(self.data.len()));
        let mut left = guest;
        let mut at = begin;
        while !left.is_empty() {
            let beyond = || self.bad("a stream beyond 64 bits", at, left.len());
            let head_end = at.checked_add(4).ok_or_else(beyond)?;
            let Some(header) = self.data.le_at::<u32>(at.raw()) else {
                return Ok(self.cut(head_end, left));
            };
            // A byte for the kind, three for the length.
            let [kind, ..] = header.to_le_bytes();
            let len = u64::from(header >> 8);
            let body = FileRange::with_len(head_end, len).ok_or_else(beyond)?;
            if at == begin && kind != 0xff {
                return Err(self.bad("missing Snappy stream identifier", at, kind.into()));
            }
            if body.end() > file_end {
                return Ok(self.cut(body.end(), left));
            }
            // Data comes after a sum of 4 bytes.
            let data = len.checked_sub(4);
            let size = match kind {
                0x00 => body.start().checked_add(4).and_then(|at| self.claimed(at)),
                0x01 => data,
                // The begin of the stream, padding, and what may be passed over.
                0x80..=0xff => {
                    at = body.end();
                    continue;
                }
                _ => None,
            };
            let most = data.and_then(|data| data.checked_mul(MAX_RATIO));
            let most = most
                .filter(|most| *most < MAX_CHUNK)
                .or(data.map(|_| MAX_CHUNK));
            let size = size.filter(|size| most.is_some_and(|most| *size <= most));
            let size = size.ok_or_else(|| self.bad("an invalid Snappy chunk", at, kind.into()))?;
            let end = left.start().checked_add(size);
            let end = end
                .filter(|end| *end <= left.end())
                .ok_or_else(|| self.bad("more data than the record has memory", at, size))?;
            if size > 0 {
                self.push(Chunk {
                    guest: GpaRange::new(left.start(), end),
                    file: FileRange::new(at, body.end()),
                    compressed: true,
                })?;
            }
            left = GpaRange::new(end, left.end());
            at = body.end();
        }
        // Then its length.
        let beyond = || self.bad("a stream beyond 64 bits", at, guest.len());
        let end = at.checked_add(8).ok_or_else(beyond)?;
        let Some(length) = self.data.le_at::<u64>(at.raw()) else {
            return Ok(self.cut(end, left));
        };
        if at.offset_from(begin) != Some(length) {
            return Err(self.bad("a stream of another length than recorded", at, length));
        }
        Ok(end)
    }

    /// The length that a Snappy block says it has: a number in groups of 7 bits, the lowest first. More
    /// than three groups are more than any chunk has.
    fn claimed(&self, at: FileOffset) -> Option<u64> {
        let mut size = 0;
        for (group, shift) in [(0, 0), (1, 7), (2, 14)] {
            let byte: u8 = self.data.le_at(at.checked_add(group)?.raw())?;
            size |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(size);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::AvmlFile;
    use crate::DumpError;
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError};
    use std::io::Write;

    fn header(file: &mut Vec<u8>, magic: &[u8; 4], version: u32, start: u64, len: usize) {
        file.extend(magic);
        file.extend(version.to_le_bytes());
        file.extend(start.to_le_bytes());
        file.extend((start + len as u64 - 1).to_le_bytes());
        file.extend([0; 8]);
    }

    /// A record of version 2, made by the library's own encoder of streams.
    fn compressed(file: &mut Vec<u8>, start: u64, data: &[u8]) {
        header(file, b"AVML", 2, start, data.len());
        let mut encoder = snap::write::FrameEncoder::new(Vec::new());
        encoder.write_all(data).unwrap();
        let stream = encoder.into_inner().unwrap();
        file.extend(&stream);
        file.extend((stream.len() as u64).to_le_bytes());
    }

    fn open(bytes: &[u8]) -> Result<AvmlFile, DumpError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.avml");
        std::fs::write(&path, bytes).unwrap();
        AvmlFile::open(&path)
    }

    fn pattern(len: usize, compressible: bool) -> Vec<u8> {
        let mut state = 12345_u32;
        (0..len)
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                if compressible {
                    (at / 300 % 251).to_le_bytes()[0]
                } else {
                    (state >> 24) as u8
                }
            })
            .collect()
    }

    fn check(dump: &AvmlFile, start: u64, data: &[u8]) {
        for (at, len) in [
            (0, data.len()),
            (1, 70_000),
            (65_530, 12),
            (data.len() - 1, 1),
        ] {
            if at + len <= data.len() {
                let mut got = vec![0; len];
                dump.read(Gpa::new(start + at as u64), &mut got).unwrap();
                assert!(got == data[at..at + len], "{start:#x} {at}");
            }
        }
    }

    #[test]
    fn reads_what_was_recorded() {
        let (text, noise) = (pattern(300_000, true), pattern(150_000, false));
        let mut file = Vec::new();
        compressed(&mut file, 0x10_0000, &text);
        compressed(&mut file, 0x1000, &noise);
        for (magic, start) in [(b"EMiL", 0x100_0000), (b"AVML", 0x200_0000)] {
            header(&mut file, magic, 1, start, 5000);
            file.extend(&text[..5000]);
        }
        let dump = open(&file).unwrap();
        check(&dump, 0x10_0000, &text);
        check(&dump, 0x1000, &noise);
        check(&dump, 0x100_0000, &text[..5000]);
        check(&dump, 0x200_0000, &text[..5000]);
        assert_eq!(dump.layout().regions().len(), 4);
        assert!(dump.read_u32(Gpa::new(0x1000 + 149_998)).is_err());
    }

    #[test]
    fn what_is_cut_off_is_read_as_far_as_it_goes() {
        let mut file = Vec::new();
        let (text, noise) = (pattern(3000, true), pattern(100_000, false));
        compressed(&mut file, 0x1000, &text);
        compressed(&mut file, 0x8000, &noise);
        let whole = open(&file).unwrap();
        let chunks: Vec<_> = whole
            .chunks
            .iter()
            .map(|chunk| (chunk.file, chunk.guest))
            .collect();
        assert_eq!(chunks.len(), 3);
        let first_end = chunks[1].0.start().raw() - 42;
        for len in (1..file.len()).filter(|len| *len < 5000 || len % 7 == 0) {
            let dump = open(&file[..len]);
            let there = chunks
                .iter()
                .filter(|(file, _)| file.end().raw() <= len as u64);
            let there = there.clone().count();
            assert_eq!(dump.is_ok(), there > 0, "{len}");
            let Ok(dump) = dump else { continue };
            assert_eq!(dump.chunks.len(), there);
            assert_eq!(dump.cut.is_none(), len as u64 == first_end, "{len}");
            check(&dump, 0x1000, &text);
            let Some(cut) = dump.cut else { continue };
            assert!(cut.need.raw() > len as u64 && cut.need.raw() <= file.len() as u64);
            let lost = match (there, dump.layout().region_of(Gpa::new(0x8000))) {
                (1, Some(region)) => *region,
                (2, Some(region)) => GpaRange::new(chunks[1].1.end(), region.end()),
                _ => continue,
            };
            assert_eq!(cut.lost, lost, "{len}");
            assert_eq!(dump.next_absent(Gpa::new(0x8000)).unwrap(), Some(lost));
            assert_eq!(dump.next_absent(Gpa::new(0x1000)).unwrap(), None);
            assert!(matches!(
                dump.read_u32(lost.start()),
                Err(MemoryError::Absent { .. })
            ));
        }
        // Zeroes that a disk in whole blocks adds are no record.
        file.resize(file.len().next_multiple_of(4096), 0);
        let dump = open(&file).unwrap();
        assert_eq!((dump.chunks.len(), dump.cut), (3, None));
    }

    proptest! {
        /// The sum of each chunk tells of every change of its data.
        #[test]
        fn a_flipped_bit_is_an_error_or_changes_nothing(at in 0_usize..2_000, bit in 0..8) {
            let data = pattern(6_000, true);
            let mut file = Vec::new();
            compressed(&mut file, 0x1000, &data);
            let at = at % file.len();
            file[at] ^= 1_u8 << bit;
            let mut got = vec![0; data.len()];
            if let Ok(dump) = open(&file)
                && let Some(region) = dump.layout().regions().first()
                && dump.read(region.start(), &mut got).is_ok()
            {
                prop_assert!(got == data);
            }
        }
    }
}
