//! Reads a checkpoint.

use super::chunk::ChunkDecoder;
use super::disks::LastRun;
use super::source::RangeSource;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::disk::given::Disks;
use crate::checkpoint::wire::footer::{Footer, footer_at};
use crate::checkpoint::wire::header::{Codec, Header, START_LEN};
use crate::checkpoint::wire::index::Index;
use crate::checkpoint::wire::info::{CheckpointInfo, PageContent, PageRun, SaveStats};
use crate::checkpoint::wire::layout::{
    FOOTER_LEN, MAGIC, behind, between, checksum, plus, size, too_large,
};
use crate::checkpoint::wire::record::BlobEntry;
use crate::{FileOffset, PageMap, PageState, Pfn, PfnRange, Tally};
use crate::{open_file, to_u64};
use core::hash::Hasher;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Mutex;
use twox_hash::XxHash3_64;

/// Longest range that is read at once for checksums.
const READ: usize = 1 << 20;

/// A checkpoint, opened: header and index are checked and in memory, page data is read when it
/// is asked for, and checked then.
///
/// It is [`GuestMemory`](crate::GuestMemory): dropped pages read as what the guest expects, absent
/// ones are an error.
///
/// ```no_run
/// use sonicshot::checkpoint::CheckpointReader;
/// let checkpoint = CheckpointReader::open("guest.sonic")?;
/// println!("{:?}", checkpoint.info());
/// # Ok::<(), sonicshot::checkpoint::CheckpointError>(())
/// ```
pub struct CheckpointReader<S> {
    pub(super) source: S,
    pub(super) header: Header,
    pub(super) index: Index,
    pub(super) footer: Footer,
    /// Chunks that stay decompressed, the least recently used first.
    pub(super) cache: Mutex<Vec<ChunkDecoder>>,
    pub(super) disks: Disks,
    pub(super) last_run: LastRun,
}

impl CheckpointReader<File> {
    /// Whether a file that begins with these bytes, 8 or more, is a checkpoint.
    ///
    /// ```
    /// use sonicshot::checkpoint::CheckpointReader;
    /// assert!(CheckpointReader::is_checkpoint(b"\x89SONIC\r\n"));
    /// assert!(!CheckpointReader::is_checkpoint(b"\x7fELF\x02\x01\x01\0"));
    /// ```
    #[must_use]
    pub fn is_checkpoint(start: &[u8]) -> bool {
        start.starts_with(&MAGIC)
    }

    /// Opens the checkpoint at `path`.
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read, is none, or is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        Self::new(open_file(path.as_ref()).map_err(CheckpointError::read(FileOffset::ZERO))?)
    }
}

impl<S: RangeSource> CheckpointReader<S> {
    /// Opens the checkpoint that `source` holds.
    ///
    /// # Errors
    /// [`CheckpointError`] if it cannot be read, is none, or is damaged.
    pub fn new(source: S) -> Result<Self, CheckpointError> {
        let file_len = source
            .len()
            .map_err(CheckpointError::read(FileOffset::ZERO))?;
        let start_len = file_len.min(START_LEN);
        let start = read_part(&source, file_len, FileOffset::ZERO, start_len, "the header")?;
        let header_len = Header::length(&start, file_len)?;
        let file_len = without_fill(&source, file_len)?;
        let read = |offset, len, what| read_part(&source, file_len, offset, len, what);
        let mut header = Header::decode(&read(FileOffset::ZERO, header_len, "the header")?)?;
        let footer = read(footer_at(file_len)?, FOOTER_LEN, "the footer")?;
        let footer = Footer::decode(&footer, file_len, header_len)?;
        check_held(&source, &footer)?;
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
        header.info.disks.clone_from(&index.disks);
        Ok(Self {
            source,
            header,
            index,
            footer,
            cache: Mutex::new(Vec::new()),
            disks: Disks::default(),
            last_run: LastRun::default(),
        })
    }

    /// The checkpoint's facts about its guest.
    #[must_use]
    pub fn info(&self) -> &CheckpointInfo {
        &self.header.info
    }

    /// The compression of page data: `none`, `lz4` or `zstd`.
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

    /// The source of the bytes.
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
            // Behind the blob are the zeroes that align what follows.
            let (now, _) = bytes.split_at(size(left).min(bytes.len()));
            left = left
                .checked_sub(to_u64(now.len()))
                .ok_or_else(|| too_large("bytes of a blob", blob.len, u64::MAX))?;
            out.write_all(now)
                .map_err(CheckpointError::write(blob.offset))
        })
    }

    pub(in crate::checkpoint) fn check_blob(
        &self,
        blob: &BlobEntry,
        each: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut sum = XxHash3_64::new();
        self.each_part(blob.offset, blob.stored_len, &mut |bytes| {
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

    /// Reads a range of the file, piece by piece.
    pub(in crate::checkpoint) fn each_part(
        &self,
        offset: FileOffset,
        len: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut buffer = vec![0; READ.min(size(len))];
        let mut done = 0_u64;
        while let Some(left) = len.checked_sub(done).filter(|left| *left > 0) {
            let room = size(left).min(buffer.len());
            let (part, _) = buffer.split_at_mut(room);
            let at = behind(offset, done)?;
            self.source
                .read_at(part, at)
                .map_err(CheckpointError::read(at))?;
            each(part)?;
            done = plus("bytes of file", done, to_u64(part.len()))?;
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

    /// The counts of the checkpoint's content.
    #[must_use]
    pub fn stats(&self) -> SaveStats {
        let mut stats = SaveStats {
            file_len: self.footer.file_len,
            digest: self.footer.digest,
            ..SaveStats::default()
        };
        for run in self.runs() {
            let stores = run.content == PageContent::Data { slot: stats.data };
            stats.count(&run, stores);
        }
        stats.runs = to_u64(self.index.run_count());
        let mut stored = Tally::ZERO;
        for number in 0..self.index.chunk_count() {
            if let Ok(chunk) = self.index.chunk(number) {
                stored.add(chunk.entry.stored_len.into());
            }
        }
        stats.stored_bytes = stored.get();
        stats
    }

    /// The class of every frame, as it was when the checkpoint was written, and which hold only
    /// zeroes.
    #[must_use]
    pub fn page_map(&self) -> PageMap {
        let info = &self.header.info;
        let mut map = PageMap::new(&info.layout, info.page_size);
        for run in self.runs() {
            let page = PageState::new(run.class);
            map.set(
                run.frames,
                match run.content {
                    PageContent::Zero => page.with_zero(),
                    _ => page,
                },
            );
        }
        map
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    /// The offset of the index.
    pub(crate) fn index_offset(&self) -> FileOffset {
        self.footer.index_offset
    }

    pub(crate) fn header_codec(&self) -> Codec {
        self.header.codec
    }

    /// A decoder of page data; one a thread.
    #[must_use]
    pub fn decoder(&self) -> ChunkDecoder {
        ChunkDecoder::new(self.header.codec)
    }

    /// The bytes of `count` stored pages from `slot`, all in one chunk.
    pub(crate) fn pages<'d>(
        &self,
        decoder: &'d mut ChunkDecoder,
        slot: u64,
        count: u64,
    ) -> Result<&'d [u8], CheckpointError> {
        decoder.pages(&self.source, &self.index, slot, count)
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

/// The place where a file of `len` bytes ends without the zeroes behind it: a device, or a transport in
/// whole blocks, adds them, and no checkpoint ends with one. `len` where there is nothing else for very
/// long.
fn without_fill(source: &impl RangeSource, len: u64) -> Result<u64, CheckpointError> {
    /// The longest run of zeroes behind which nothing is looked for, in bytes.
    const MAX_FILL: u64 = 64 << 30;
    let mut buffer = Vec::new();
    let mut end = len;
    while end > 0 && len.abs_diff(end) < MAX_FILL {
        // At first no more than what says that there is nothing to be done.
        let most = if end == len { 8 } else { READ };
        let start = FileOffset::new(end.saturating_sub(to_u64(most)));
        buffer.resize(size(between(start, FileOffset::new(end))?), 0);
        let read = source.read_at(&mut buffer, start);
        read.map_err(CheckpointError::read(start))?;
        let is_used = |byte: &u8| *byte != 0;
        if let Some(last) = buffer.iter().rposition(is_used) {
            return Ok(behind(behind(start, to_u64(last))?, 1)?.raw());
        }
        end = start.raw();
    }
    Ok(len)
}

/// Refuses an index that is longer than the file can hold data for: who opens a file with a long
/// hole must not need memory for it.
fn check_held(source: &impl RangeSource, footer: &Footer) -> Result<(), CheckpointError> {
    /// An index of this length is read whatever the file says.
    const SMALL_INDEX: u64 = 16 << 20;
    /// btrfs compresses 128 KiB into a block of 4 KiB at best; no file system more.
    const MAX_COMPRESSION: u64 = 32;
    let Some(file) = source.as_file().filter(|_| footer.index_len > SMALL_INDEX) else {
        return Ok(());
    };
    let blocks = file
        .metadata()
        .map_err(CheckpointError::read(FileOffset::ZERO))?
        .blocks();
    // In units of 512 bytes, whatever the file system has (stat(2)).
    let held = blocks.checked_mul(512 * MAX_COMPRESSION);
    if held.is_some_and(|held| held < footer.index_len) {
        return Err(CheckpointError::Corrupt {
            what: "the index's length, of which the file holds no data",
            offset: footer.index_offset,
            value: footer.index_len,
        });
    }
    Ok(())
}

/// A part of the file, which must be that long.
fn read_part(
    source: &impl RangeSource,
    file_len: u64,
    offset: FileOffset,
    len: u64,
    what: &'static str,
) -> Result<Vec<u8>, CheckpointError> {
    let end = offset.checked_add(len);
    if end.is_none_or(|end| end.raw() > file_len) {
        return Err(CheckpointError::Truncated {
            what,
            offset,
            need: len,
            len: file_len,
        });
    }
    let mut bytes = vec![0; size(len)];
    source
        .read_at(&mut bytes, offset)
        .map_err(CheckpointError::read(offset))?;
    Ok(bytes)
}
