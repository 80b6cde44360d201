//! A dump that comes through a pipe or out of a compressor: it is put into a temporary file first,
//! since a guest's memory is not read from front to back.

use crate::DumpError;
use crate::backing::plain::content_of;
use crate::format::qemu::start::{MAGIC as MIGRATION, ram_of_migration};
use crate::limit::{SizeLimit, allowed_beside};
use crate::output::{check_stamp, scratch};
use rustix::fs::fstatvfs;
use sonicshot::file::write_sparse_at;
use sonicshot::{FileBytes, FileContent, FileOffset, FileStamp};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where there may be room for a guest's memory, unlike in `/tmp`.
const FALLBACK: &str = "/var/tmp";
const PIECE: usize = 1 << 20;
/// Of a content that does not say how long it is, so much of the free space is used: one of these
/// parts.
const FREE_PARTS: u64 = 2;

/// What limits how much is taken in.
#[derive(Debug, Clone, Copy)]
enum Limit {
    /// So many bytes.
    Given(u64),
    /// What the content's header tells of, or if it has none, what is free.
    Header,
    /// What is free.
    Free,
}

/// How the migration file in a libvirt image is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Zstd,
}

/// What the header of a libvirt image says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    /// `None`: the migration file is in the image as it is.
    pub compression: Option<Compression>,
    /// Where the migration file begins.
    pub payload_at: FileOffset,
}

impl Image {
    pub(crate) fn name(&self) -> &'static str {
        match self.compression {
            None => "libvirt save image",
            Some(Compression::Gzip) => "libvirt save image (gzip)",
            Some(Compression::Zstd) => "libvirt save image (zstd)",
        }
    }
}

/// The content of a dump in a file without a name, which is gone with its last user.
///
/// The file is made in the folder that the environment variable `TMPDIR` names; without it, beside
/// the dump that it is the content of, or in `/var/tmp` for a pipe or where that cannot be. It is as long as the dump is
/// without compression, with holes where that is zero.
#[derive(Debug, Clone)]
pub struct Spool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: PathBuf,
    file: File,
    /// The image that the content was compressed in.
    image: Option<(File, Image)>,
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
        Self::take_in(name.as_ref(), reader, max_size, false)
    }

    /// The same; of what is raw memory the beginning is no header.
    pub(crate) fn take_in(
        name: &Path,
        reader: impl Read,
        max_size: Option<u64>,
        is_raw: bool,
    ) -> Result<Self, DumpError> {
        let limit = match max_size {
            Some(max) => Limit::Given(max),
            None if is_raw => Limit::Free,
            None => Limit::Header,
        };
        Self::new(name, Path::new(FALLBACK), reader, None, limit)
    }

    /// Decompresses the content of the image in `file`.
    pub(crate) fn decompress(path: &Path, file: &File, image: Image) -> Result<Self, DumpError> {
        let reading = || DumpError::io("reading", path);
        let before = FileStamp::of(file).map_err(reading())?;
        let original = file.try_clone().map_err(reading())?;
        let mut packed = file.try_clone().map_err(reading())?;
        packed
            .seek(SeekFrom::Start(image.payload_at.raw()))
            .map_err(reading())?;
        let packed = io::BufReader::with_capacity(PIECE, packed);
        let beside = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let original = Some((original, image));
        let unpacked = match image.compression {
            Some(Compression::Gzip) => {
                // One stream or several, as gzip itself reads them.
                let reader = flate2::bufread::MultiGzDecoder::new(packed);
                Self::new(path, beside, reader, original, Limit::Header)
            }
            Some(Compression::Zstd) => {
                let reader = zstd::stream::read::Decoder::with_buffer(packed).map_err(reading())?;
                Self::new(path, beside, reader, original, Limit::Header)
            }
            None => Self::new(path, beside, packed, original, Limit::Header),
        };
        // Before what may come of it: bytes that do not decompress.
        check_stamp(file, path, before)?;
        unpacked
    }

    fn new(
        name: &Path,
        folder: &Path,
        mut reader: impl Read,
        image: Option<(File, Image)>,
        limit: Limit,
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
        let mut known = match limit {
            Limit::Given(max) => Some((max, SizeLimit::Given)),
            Limit::Header | Limit::Free => None,
        };
        loop {
            let len = fill(&mut reader, &mut buffer).map_err(|source| {
                let path = name.to_owned();
                // What the operating system says is not the decompressor's word.
                if image.is_some() && source.raw_os_error().is_none() {
                    return DumpError::Compressed { path, source };
                }
                DumpError::io("reading", name)(source)
            })?;
            let (piece, _) = buffer.split_at(len.min(buffer.len()));
            // Before more is taken in: what else it may be could be endless, or one in the other.
            if at == 0 && image.is_some() && !piece.starts_with(MIGRATION) {
                return Err(DumpError::NotADump {
                    path: name.to_owned(),
                    why: "what is compressed in it is no migration file of QEMU's",
                });
            }
            let writing = || DumpError::io("writing a temporary file in", &folder);
            let next = at
                .checked_add(len as u64)
                .ok_or(io::ErrorKind::FileTooLarge);
            let next = next.map_err(|kind| writing()(kind.into()))?;
            let (max, by) = match known {
                Some(known) => known,
                None => limit_of(name, piece, &file, limit)
                    .map_err(DumpError::io("asking for the free space of", &folder))?,
            };
            known = Some((max, by));
            if next > max {
                return Err(DumpError::TooLong {
                    path: name.to_owned(),
                    limit: max,
                    by,
                });
            }
            write_sparse_at(&file, piece, FileOffset::new(at)).map_err(writing())?;
            at = next;
            if len < PIECE {
                break;
            }
        }
        file.set_len(at)
            .map_err(DumpError::io("writing a temporary file in", &folder))?;
        Ok(Self(Arc::new(Inner {
            name: name.to_owned(),
            file,
            image,
        })))
    }

    pub(crate) fn name(&self) -> &Path {
        &self.0.name
    }

    /// How long the content is, in bytes.
    ///
    /// # Errors
    /// [`DumpError::Io`] if the system does not tell.
    pub fn content_len(&self) -> Result<u64, DumpError> {
        let metadata = self.0.file.metadata();
        Ok(metadata
            .map_err(DumpError::io("reading", &self.0.name))?
            .len())
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
        self.0.image.as_ref().map(|(file, image)| (file, *image))
    }
}

/// How long a content may be that begins with `start` and is put into `file`.
fn limit_of(name: &Path, start: &[u8], file: &File, limit: Limit) -> io::Result<(u64, SizeLimit)> {
    let ram = match limit {
        Limit::Free => None,
        _ => ram_of_migration(name, FileBytes::from_slice(start)),
    };
    if let Some((max, ram)) = ram.and_then(|ram| Some((allowed_beside(ram)?, ram))) {
        return Ok((max, SizeLimit::Header { ram }));
    }
    let system = fstatvfs(file)?;
    // More than 64 bits tell of is no limit.
    let free = system.f_bavail.checked_mul(system.f_frsize);
    Ok((free.unwrap_or(u64::MAX) / FREE_PARTS, SizeLimit::Free))
}

/// Reads until `buffer` is full or there is no more.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(read) => len = len.saturating_add(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
