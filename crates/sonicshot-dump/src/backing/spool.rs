//! A dump that comes through a pipe or out of a compressor: it is put into a temporary file first,
//! since a guest's memory is not read from front to back.

use crate::backing::packed::{At, Reached};
use crate::backing::plain::content_of;
use crate::backing::unpack::{Compression, LONGEST_MARK};
use crate::format::qemu::start::{MAGIC as MIGRATION, ram_of_migration};
use crate::limit::{SizeLimit, allowed_beside};
use crate::output::{check_stamp, scratch};
use crate::{DumpError, DumpOptions};
use rustix::fs::fstatvfs;
use sonicshot::file::write_sparse_at;
use sonicshot::{
    FileBytes, FileContent, FileOffset, FileStamp, GuestBytes, PhaseProgress, Progress, WorkPhase,
    to_u64,
};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The folder in which there may be room for a guest's memory, unlike in `/tmp`.
const FALLBACK: &str = "/var/tmp";
const PIECE: usize = 1 << 20;
/// Blocks of this length that are zero are not written.
const BLOCK: usize = 4096;
/// Of a content that does not say how long it is, so much of the free space is used: one of these
/// parts.
const FREE_PARTS: u64 = 2;
/// Of one whose header says how long it is, all but one of these parts: a header may claim any
/// length.
const LEFT_PARTS: u64 = 16;

/// Whoever is told how much was taken in.
struct Watch<'a> {
    progress: &'a dyn Progress,
    /// The length of the file that is read, and how far it was read; 0 of a pipe, of which the bytes
    /// are told that came out of it.
    total: u64,
    reached: Reached,
}

impl<'a> Watch<'a> {
    fn of_pipe(progress: &'a dyn Progress) -> Self {
        Self::of_file(progress, 0)
    }

    fn of_file(progress: &'a dyn Progress, len: u64) -> Self {
        Self {
            progress,
            total: len,
            reached: Reached::default(),
        }
    }
}

/// The limit of how much is taken in.
#[derive(Debug, Clone, Copy)]
enum Limit {
    /// So many bytes.
    Given(u64),
    /// The length that the content's header tells of, or if it has none, the free space.
    Header,
    /// The free space.
    Free,
}

/// The fields of a libvirt image's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    /// `None`: the migration file is in the image as it is.
    pub compression: Option<Compression>,
    /// The offset of the migration file.
    pub payload_at: FileOffset,
}

impl Image {
    pub(crate) fn name(&self) -> &'static str {
        match self.compression {
            Some(Compression::Gzip) => "libvirt save image (gzip)",
            Some(Compression::Zstd) => "libvirt save image (zstd)",
            Some(Compression::Xz) => "libvirt save image (xz)",
            Some(Compression::Bzip2) => "libvirt save image (bzip2)",
            Some(Compression::Lzop) => "libvirt save image (lzop)",
            // libvirt has no others.
            None | Some(Compression::Lz4 | Compression::Zip) => "libvirt save image",
        }
    }
}

/// The image that a content was compressed in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub file: &'a File,
    pub image: Image,
    before: FileStamp,
}

impl Packed<'_> {
    /// The bytes before the content, as they were when that was decompressed. Messages call the image
    /// `path`.
    pub(crate) fn header(&self, path: &Path) -> Result<Vec<u8>, DumpError> {
        let at = self.image.payload_at;
        // At most what libvirt's header may say.
        let len = usize::try_from(at.raw());
        let len = len.map_err(|_| DumpError::malformed(path, "a header too long", at, 0))?;
        let mut header = vec![0; len];
        let read = self.file.read_exact_at(&mut header, 0);
        // Before what may come of it: a file that ends early.
        check_stamp(self.file, path, self.before)?;
        read.map_err(DumpError::io("reading", path))?;
        Ok(header)
    }
}

/// The content of a dump that came through a pipe or is compressed as a whole (gzip, zstd, xz,
/// bzip2, lzop, lz4, one file in a zip archive), in a file without a name, which is gone with its
/// last user.
///
/// The file is made in the folder that the environment variable `TMPDIR` names; without it, beside
/// the dump that it is the content of, or in `/var/tmp` for a pipe or where that cannot be. It is
/// as long as the dump is without compression, with holes where that is zero.
#[derive(Debug, Clone)]
pub struct Spool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: PathBuf,
    file: File,
    /// The image that the content was compressed in, and what it was then.
    image: Option<(File, Image, FileStamp)>,
    /// The file that was compressed as a whole, which the content came out of, and what it was then.
    packed: Option<(File, FileStamp)>,
    /// The disk image that the content is the state of a VM of.
    state_of: Option<File>,
}

impl Spool {
    /// Takes in all that `reader` gives. `name` is what messages call it.
    ///
    /// # Errors
    /// [`DumpError::Io`] if it cannot be read, or not be written.
    pub fn from_reader(name: impl AsRef<Path>, reader: impl Read) -> Result<Self, DumpError> {
        Self::from_reader_up_to(name, reader, None)
    }

    /// The same of at most `max_size` bytes. Without it, of a migration file as many as the RAM
    /// that its header tells of, and a tenth or 16 MiB more; of others half of what is free where
    /// they are put.
    ///
    /// # Errors
    /// [`DumpError::TooLong`] if there are more, and as [`from_reader`](Self::from_reader).
    pub fn from_reader_up_to(
        name: impl AsRef<Path>,
        reader: impl Read,
        max_size: Option<u64>,
    ) -> Result<Self, DumpError> {
        Self::take_in(name.as_ref(), reader, max_size, &DumpOptions::new())
    }

    /// The same; of what is raw memory by `known` the beginning is no header.
    pub(crate) fn take_in(
        name: &Path,
        reader: impl Read,
        max_size: Option<u64>,
        known: &DumpOptions,
    ) -> Result<Self, DumpError> {
        let limit = match max_size {
            Some(max) => Limit::Given(max),
            None if known.is_raw() => Limit::Free,
            None => Limit::Header,
        };
        let watch = Watch::of_pipe(&known.progress);
        Self::new((name, Path::new(FALLBACK)), reader, None, limit, &watch)
    }

    /// Decompresses the content of the image in `file`.
    pub(crate) fn decompress(
        path: &Path,
        file: &File,
        image: Image,
        known: &DumpOptions,
    ) -> Result<Self, DumpError> {
        let reading = || DumpError::io("reading", path);
        let before = FileStamp::of(file).map_err(reading())?;
        let original = file.try_clone().map_err(reading())?;
        let packed = file.try_clone().map_err(reading())?;
        let places = (path, folder_of(path));
        let original = Some((original, image, before));
        let at = image.payload_at.raw();
        let watch = Watch::of_file(&known.progress, packed.metadata().map_err(reading())?.len());
        let reached = watch.reached.clone();
        let unpacked = match image.compression {
            Some(how) => {
                let reader = how.reader(packed, at, reached);
                let reader = reader.map_err(|source| undone(path, source))?;
                Self::new(places, reader, original, Limit::Header, &watch)
            }
            None => {
                let packed = At::told(packed, at, reached);
                Self::new(places, packed, original, Limit::Header, &watch)
            }
        };
        // Before what may come of it: bytes that do not decompress.
        check_stamp(file, path, before)?;
        unpacked
    }

    /// Decompresses `file`, which messages call `path`, if it is compressed as a whole; `None` if
    /// not. What is in it may be of any format.
    pub(crate) fn unpack(
        path: &Path,
        file: &File,
        known: &DumpOptions,
    ) -> Result<Option<Self>, DumpError> {
        let reading = || DumpError::io("reading", path);
        let before = FileStamp::of(file).map_err(reading())?;
        let mut start = Vec::new();
        let packed = || file.try_clone().map_err(reading());
        At::new(packed()?, 0)
            .take(to_u64(LONGEST_MARK))
            .read_to_end(&mut start)
            .map_err(reading())?;
        let Some(how) = Compression::of(&start) else {
            return Ok(None);
        };
        let len = file.metadata().map_err(reading())?.len();
        let watch = Watch::of_file(&known.progress, len);
        let unpacked = how
            .reader(packed()?, 0, watch.reached.clone())
            .map_err(|source| undone(path, source))
            .and_then(|reader| {
                let reader = Undone(reader);
                Self::new((path, folder_of(path)), reader, None, Limit::Header, &watch)
            });
        // Before what may come of it: bytes that do not decompress.
        check_stamp(file, path, before)?;
        let mut unpacked = unpacked?;
        if let Some(inner) = Arc::get_mut(&mut unpacked.0) {
            inner.packed = Some((packed()?, before));
        }
        Ok(Some(unpacked))
    }

    /// Its content, if it is compressed as a whole; not of what was decompressed already.
    pub(crate) fn unpacked(&self, known: &DumpOptions) -> Result<Option<Self>, DumpError> {
        if self.0.packed.is_some() || self.0.state_of.is_some() {
            return Ok(None);
        }
        Self::unpack(self.name(), self.file(), known)
    }

    /// Takes the `state` of a VM out of the disk image in `file` at `path`.
    pub(crate) fn of_state(
        path: &Path,
        file: &File,
        state: impl Read,
        known: &DumpOptions,
    ) -> Result<Self, DumpError> {
        let reading = || DumpError::io("reading", path);
        let before = FileStamp::of(file).map_err(reading())?;
        let image = file.try_clone().map_err(reading())?;
        let places = (path, folder_of(path));
        let watch = Watch::of_pipe(&known.progress);
        let spool = Self::new(places, Undone(state), None, Limit::Header, &watch);
        check_stamp(file, path, before)?;
        let mut spool = spool?;
        if let Some(inner) = Arc::get_mut(&mut spool.0) {
            inner.state_of = Some(image);
        }
        Ok(spool)
    }

    /// The file that was compressed as a whole, which the content came out of.
    pub(crate) fn packed(&self) -> Option<&File> {
        self.0.packed.as_ref().map(|(file, _)| file)
    }

    /// Refuses a compressed file that is no longer what the content was taken out of.
    pub(crate) fn check_packed(&self) -> Result<(), DumpError> {
        let image = self.0.image.as_ref();
        let image = image.map(|(file, _, before)| (file, *before));
        let packed = self.0.packed.as_ref();
        let packed = packed.map(|(file, before)| (file, *before));
        for (file, before) in image.into_iter().chain(packed) {
            check_stamp(file, self.name(), before)?;
        }
        Ok(())
    }

    /// The same, made of what is in `outer`: if that was compressed as a whole, so was this.
    pub(crate) fn within(mut self, outer: Option<&Self>) -> Result<Self, DumpError> {
        let packed = match outer.and_then(|outer| outer.0.packed.as_ref()) {
            Some((file, before)) => {
                let file = file.try_clone();
                Some((
                    file.map_err(DumpError::io("reading", self.name()))?,
                    *before,
                ))
            }
            None => None,
        };
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.packed = packed;
        }
        Ok(self)
    }

    /// The disk image that the content is the state of a VM of.
    pub(crate) fn state_of(&self) -> Option<&File> {
        self.0.state_of.as_ref()
    }

    fn new(
        (name, folder): (&Path, &Path),
        mut reader: impl Read,
        image: Option<(File, Image, FileStamp)>,
        limit: Limit,
        watch: &Watch<'_>,
    ) -> Result<Self, DumpError> {
        let mut folder =
            std::env::var_os("TMPDIR").map_or_else(|| folder.to_owned(), PathBuf::from);
        let file = scratch(&folder).or_else(|_| {
            // A folder that is only to be read.
            folder = PathBuf::from(FALLBACK);
            scratch(&folder)
        });
        let file = file.map_err(DumpError::io("creating a temporary file in", &folder))?;
        let file = file.map_err(|(path, source)| DumpError::Io {
            action: "removing the temporary file",
            path,
            source,
        })?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0_u64;
        let mut room = None;
        let mut phase = PhaseProgress::begin(watch.progress, WorkPhase::TakingIn, watch.total);
        loop {
            let len = fill(&mut reader, &mut buffer).map_err(|source| {
                if image.is_some() || Undone::is_one(&source) {
                    return undone(name, source);
                }
                DumpError::io("reading", name)(source)
            })?;
            let (piece, _) = buffer.split_at(len.min(buffer.len()));
            // Before more is taken in: what else it may be could be endless, or one in the other.
            if at == 0 && image.is_some() && !piece.starts_with(MIGRATION) {
                return Err(DumpError::NotADump {
                    path: name.to_owned(),
                    why: "what is compressed in it is not a migration file of QEMU's",
                });
            }
            let writing = || DumpError::io("writing a temporary file in", &folder);
            let next = at
                .checked_add(to_u64(len))
                .ok_or(io::ErrorKind::FileTooLarge);
            let next = next.map_err(|kind| writing()(kind.into()))?;
            let asking = || DumpError::io("asking for the free space of", &folder);
            let mut left = match room {
                Some(room) => room,
                None => Room::of(name, piece, &file, limit).map_err(asking())?,
            };
            left.take(piece).map_err(|(limit, by)| {
                let path = name.to_owned();
                DumpError::TooLong { path, limit, by }
            })?;
            room = Some(left);
            write_sparse_at(&file, piece, FileOffset::new(at)).map_err(writing())?;
            at = next;
            phase.reach(match watch.total {
                0 => at,
                _ => watch.reached.load(Ordering::Relaxed),
            });
            if len < PIECE {
                break;
            }
        }
        file.set_len(at)
            .map_err(DumpError::io("writing a temporary file in", &folder))?;
        phase.end();
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            file,
            image,
            packed: None,
            state_of: None,
        })))
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> &Path {
        &self.0.name
    }

    /// The length of the content, in bytes.
    ///
    /// # Errors
    /// [`DumpError::Io`] if the system does not tell.
    pub fn content_len(&self) -> Result<u64, DumpError> {
        let metadata = self.0.file.metadata();
        Ok(metadata
            .map_err(DumpError::io("reading", &self.0.name))?
            .len())
    }

    /// The temporary file with the content.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.0.file
    }

    /// The content.
    pub(crate) fn content(&self) -> Result<FileContent, DumpError> {
        let file = self.0.file.try_clone();
        content_of(
            &self.0.name,
            file.map_err(DumpError::io("opening", &self.0.name))?,
        )
    }

    /// The image that the content was compressed in.
    pub(crate) fn image(&self) -> Option<(&File, Image)> {
        self.0.image.as_ref().map(|(file, image, _)| (file, *image))
    }

    /// The same, with all that is to be known of it.
    pub(crate) fn original(&self) -> Option<Packed<'_>> {
        let (file, image, before) = self.0.image.as_ref()?;
        Some(Packed {
            file,
            image: *image,
            before: *before,
        })
    }
}

/// The folder in which there may be room for a file's content: that of the file.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The error for a failure to decompress `path`.
fn undone(path: &Path, source: io::Error) -> DumpError {
    let path = path.to_owned();
    // What the operating system says is not the decompressor's word.
    if source.raw_os_error().is_none() {
        return DumpError::Compressed { path, source };
    }
    DumpError::io("reading", &path)(source)
}

/// A decompressor, whose errors are told from those of other readers.
struct Undone<R>(R);

/// The decompressor's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UndoneError(io::Error);

impl Undone<()> {
    fn is_one(error: &io::Error) -> bool {
        error
            .get_ref()
            .is_some_and(<dyn std::error::Error + Send + Sync>::is::<UndoneError>)
    }
}

impl<R: Read> Read for Undone<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out).map_err(|error| {
            // An interruption is no error of the content.
            if error.raw_os_error().is_some() || error.kind() == io::ErrorKind::Interrupted {
                return error;
            }
            io::Error::new(error.kind(), UndoneError(error))
        })
    }
}

/// The room that is left for what is taken in.
#[derive(Debug, Clone, Copy)]
struct Room {
    /// So many bytes at most, and who says so; what is left of them.
    max: u64,
    by: SizeLimit,
    left: u64,
    /// The same of the bytes that take room on the disk.
    max_stored: u64,
    left_stored: u64,
}

impl Room {
    /// As many bytes as any file can have.
    const NO_LIMIT: u64 = u64::MAX;

    /// For a content that begins with `start` and is put into `file`.
    fn of(name: &Path, start: &[u8], file: &File, limit: Limit) -> io::Result<Self> {
        let ram = match limit {
            Limit::Given(max) => return Ok(Self::new(max, SizeLimit::Given, Self::NO_LIMIT)),
            Limit::Free => None,
            Limit::Header => ram_of_migration(name, FileBytes::from_slice(start)),
        };
        let system = fstatvfs(file)?;
        // More than 64 bits tell of is no limit.
        let free = system.f_bavail.checked_mul(system.f_frsize);
        if let Some((max, ram)) = ram.and_then(|ram| Some((allowed_beside(ram)?, ram))) {
            let most = free.and_then(|free| free.checked_sub(free.div_ceil(LEFT_PARTS)));
            let most = most.unwrap_or(Self::NO_LIMIT);
            return Ok(Self::new(max, SizeLimit::Header { ram }, most));
        }
        let max = free.map_or(Self::NO_LIMIT, |free| free / FREE_PARTS);
        Ok(Self::new(max, SizeLimit::Free, Self::NO_LIMIT))
    }

    fn new(max: u64, by: SizeLimit, max_stored: u64) -> Self {
        Self {
            max,
            by,
            left: max,
            max_stored,
            left_stored: max_stored,
        }
    }

    /// Takes in a piece.
    fn take(&mut self, piece: &[u8]) -> Result<(), (u64, SizeLimit)> {
        let left = self.left.checked_sub(to_u64(piece.len()));
        self.left = left.ok_or((self.max, self.by))?;
        for block in piece.chunks(BLOCK) {
            if !GuestBytes::from_slice(block).is_zero() {
                let left = self.left_stored.checked_sub(to_u64(block.len()));
                self.left_stored = left.ok_or((self.max_stored, SizeLimit::Disk))?;
            }
        }
        Ok(())
    }
}

/// Reads until `buffer` is full or there is no more.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(read) => len = len.checked_add(read).ok_or(io::ErrorKind::FileTooLarge)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Room};
    use crate::SizeLimit;

    /// A header may claim more than there is room for: what is zero takes none.
    #[test]
    fn a_content_fills_no_disk_whatever_its_header_says() {
        let by = SizeLimit::Header { ram: 1 << 40 };
        let mut room = Room::new(9 * BLOCK as u64, by, 2 * BLOCK as u64);
        let (zero, used) = (vec![0; 3 * BLOCK], vec![7; BLOCK]);
        for piece in [&zero, &used, &zero, &used] {
            assert_eq!(room.take(piece), Ok(()));
        }
        let mut full = room;
        assert_eq!(
            full.take(&used[..1]),
            Err((2 * BLOCK as u64, SizeLimit::Disk))
        );
        assert_eq!(room.take(&zero[..BLOCK]), Ok(()));
        assert_eq!(room.take(&[0]), Err((9 * BLOCK as u64, by)));
    }
}
