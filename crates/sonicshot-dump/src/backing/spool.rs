//! A dump that comes through a pipe or out of a compressor: it is put into a temporary file first,
//! since a guest's memory is not read from front to back.

use crate::DumpError;
use crate::backing::mapped;
use crate::format::libvirt::{Compression, Image};
use crate::format::qemu::start::MAGIC as MIGRATION;
use crate::output::scratch;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where there may be room for a guest's memory, unlike in `/tmp`.
const FALLBACK: &str = "/var/tmp";
/// Zeroes of this length become a hole.
const PAGE: usize = 4096;
const PIECE: usize = 1 << 20;

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
        Self::new(name.as_ref(), Path::new(FALLBACK), reader, None)
    }

    /// Decompresses the content of the image in `file`.
    pub(crate) fn decompress(path: &Path, file: &File, image: Image) -> Result<Self, DumpError> {
        let reading = || DumpError::io("reading", path);
        let original = file.try_clone().map_err(reading())?;
        let mut packed = file.try_clone().map_err(reading())?;
        packed
            .seek(SeekFrom::Start(image.payload_at))
            .map_err(reading())?;
        let packed = io::BufReader::with_capacity(PIECE, packed);
        let beside = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let original = Some((original, image));
        match image.compression {
            Some(Compression::Gzip) => {
                // One stream or several, as gzip itself reads them.
                let reader = flate2::bufread::MultiGzDecoder::new(packed);
                Self::new(path, beside, reader, original)
            }
            Some(Compression::Zstd) => {
                let reader = zstd::stream::read::Decoder::with_buffer(packed).map_err(reading())?;
                Self::new(path, beside, reader, original)
            }
            None => Self::new(path, beside, packed, original),
        }
    }

    fn new(
        name: &Path,
        folder: &Path,
        mut reader: impl Read,
        image: Option<(File, Image)>,
    ) -> Result<Self, DumpError> {
        let mut folder =
            std::env::var_os("TMPDIR").map_or_else(|| folder.to_owned(), PathBuf::from);
        let file = scratch(&folder).or_else(|_| {
            // A folder that is only to be read.
            folder = PathBuf::from(FALLBACK);
            scratch(&folder)
        });
        let file = file.map_err(DumpError::io("creating a temporary file in", &folder))?;
        let mut buffer = vec![0; PIECE];
        let mut at = 0_u64;
        loop {
            let len = fill(&mut reader, &mut buffer).map_err(|source| {
                let path = name.to_owned();
                // What the operating system says is not the decompressor's word.
                if image.is_some() && source.raw_os_error().is_none() {
                    return DumpError::Compressed { path, source };
                }
                DumpError::io("reading", name)(source)
            })?;
            let piece = buffer.get(..len).unwrap_or_default();
            // Before more is taken in: what else it may be could be endless, or one in the other.
            if at == 0 && image.is_some() && !piece.starts_with(MIGRATION) {
                return Err(DumpError::NotADump {
                    path: name.to_owned(),
                    why: "what is compressed in it is no migration file of QEMU's",
                });
            }
            write_used(&file, piece, at)
                .map_err(DumpError::io("writing a temporary file in", &folder))?;
            at = at.saturating_add(len as u64);
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

    /// The content, mapped.
    pub(crate) fn map(&self) -> Result<(File, memmap2::Mmap), DumpError> {
        let file = self.0.file.try_clone();
        mapped::map_open_file(
            &self.0.name,
            file.map_err(DumpError::io("opening", &self.0.name))?,
        )
    }

    /// The image that the content was compressed in.
    pub(crate) fn image(&self) -> Option<(&File, Image)> {
        self.0.image.as_ref().map(|(file, image)| (file, *image))
    }
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

/// Writes what is not zero, in runs of pages.
fn write_used(file: &File, piece: &[u8], at: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let pages: Vec<&[u8]> = piece.chunks(PAGE).collect();
    let mut from = 0_usize;
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len = run
            .iter()
            .fold(0_usize, |sum, page| sum.saturating_add(page.len()));
        let end = from.saturating_add(len);
        if !run.first().is_none_or(|page| is_zero(page)) {
            let bytes = piece.get(from..end).unwrap_or_default();
            file.write_all_at(bytes, at.saturating_add(from as u64))?;
        }
        from = end;
    }
    Ok(())
}
