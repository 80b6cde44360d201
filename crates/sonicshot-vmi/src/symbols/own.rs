//! A symbol file's bytes, which nobody else can change.
//!
//! Parsers of ELF and DWARF want a `&[u8]`, whose bytes never change; but who may write the file
//! may do so while it is parsed, or cut it off, which ends who has it mapped by a signal. So they
//! get a copy: in memory of a small file, and else mapped from a file without a name, which
//! nobody but this process has.

use super::SymbolError;
use rustix::fs::fstatvfs;
use sonicshot::FileStamp;
use sonicshot::file::SparseWriter;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Longer files are not copied into memory: a vmlinux with DWARF has a gigabyte.
const IN_MEMORY: u64 = 8 << 20;
/// No symbol file is longer.
const MAX_LEN: u64 = 16 << 30;
/// Of what is free where the copy is put, one of so many parts may be used.
const FREE_PARTS: u64 = 2;
/// The amount that is copied at once.
const PIECE: u64 = 1 << 20;
/// The folder that may have room for the copy, unlike `/tmp`.
const FALLBACK: &str = "/var/tmp";

/// A copy of a file's bytes.
#[derive(Debug)]
pub(crate) struct OwnFile(Inner);

#[derive(Debug)]
enum Inner {
    Mapped(memmap2::Mmap),
    Owned(Vec<u8>),
}

impl OwnFile {
    /// Copies the file at `path`: into the folder that `TMPDIR` names, or `/var/tmp`, if it is
    /// long.
    pub(crate) fn open(path: &Path) -> Result<Self, SymbolError> {
        Self::copy(path, IN_MEMORY).map_err(|source| SymbolError::Io {
            path: path.to_owned(),
            source,
        })
    }

    /// The same, in memory up to so many bytes.
    fn copy(path: &Path, in_memory: u64) -> io::Result<Self> {
        let refused = |kind, why| Err(io::Error::new(kind, why));
        // What is no file may never answer.
        if !std::fs::metadata(path)?.is_file() {
            return refused(io::ErrorKind::InvalidInput, "it is not a regular file");
        }
        let file = File::open(path)?;
        let before = FileStamp::of(&file)?;
        if before.len() > MAX_LEN {
            return refused(io::ErrorKind::FileTooLarge, "no symbol file is so long");
        }
        let mut reader = (&file).take(before.len());
        let copied = if before.len() <= in_memory {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes)?;
            Inner::Owned(bytes)
        } else {
            let own = nameless()?;
            let free = fstatvfs(&own)?;
            // More than 64 bits tell of is no limit.
            let free = free.f_bavail.checked_mul(free.f_frsize);
            put(&mut reader, &own, free.map(|free| free / FREE_PARTS))?;
            Inner::Mapped(map(&own)?)
        };
        if FileStamp::of(&file)? != before {
            return refused(
                io::ErrorKind::InvalidData,
                "it was written to while it was read: stop whatever writes it",
            );
        }
        Ok(Self(copied))
    }

    #[cfg(test)]
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self(Inner::Owned(bytes.to_vec()))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Inner::Mapped(map) => map,
            Inner::Owned(bytes) => bytes,
        }
    }
}

/// Puts all of `reader` into `own`, with holes where it is zero; of the disk that takes at most
/// about `room` bytes, if that is known.
fn put(reader: &mut impl Read, own: &File, room: Option<u64>) -> io::Result<()> {
    let mut out = SparseWriter::new(own);
    loop {
        let copied = io::copy(&mut reader.by_ref().take(PIECE), &mut out)?;
        let blocks = own.metadata()?.blocks();
        if room.is_some_and(|room| blocks > room / 512) {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "a copy of it would take more than half of what is free in TMPDIR (or /var/tmp)",
            ));
        }
        if copied < PIECE {
            return out.finish().map(|_| ());
        }
    }
}

/// A file without a name, that goes with this process.
fn nameless() -> io::Result<File> {
    let folder = std::env::var_os("TMPDIR").map(PathBuf::from);
    let own = folder.map(tempfile::tempfile_in);
    match own {
        Some(Ok(file)) => Ok(file),
        _ => tempfile::tempfile_in(FALLBACK),
    }
}

#[expect(unsafe_code, reason = "the mmap edge")]
fn map(own: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: the file has no name and was opened by this process alone, which neither writes nor
    // cuts it from here on; so its bytes do not change while they are mapped.
    unsafe { memmap2::Mmap::map(own) }
}

impl AsRef<[u8]> for OwnFile {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_LEN, OwnFile, put};
    use std::fs::{self, File};
    use std::io::{self, Read};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_becomes_of_the_file_does_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinux");
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        for in_memory in [0, 1 << 20] {
            fs::write(&path, &bytes).unwrap();
            let own = OwnFile::copy(&path, in_memory).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(0).unwrap();
            fs::write(&path, b"something else").unwrap();
            assert!(own.bytes() == bytes);
        }
    }

    /// Zeroes take no room, whether they are a hole in the file or not; a file that is larger than
    /// the room is not copied to its end.
    #[test]
    fn a_copy_takes_no_more_of_the_disk_than_there_is_room() {
        let taken = |file: &File| file.metadata().unwrap().blocks() * 512;
        let own = tempfile::tempfile().unwrap();
        let mut sparse = io::repeat(0).take(256 << 20);
        put(&mut sparse, &own, Some(1 << 20)).unwrap();
        assert_eq!(own.metadata().unwrap().len(), 256 << 20);
        assert!(taken(&own) <= 1 << 20);

        let own = tempfile::tempfile().unwrap();
        let mut data = io::repeat(7).take(64 << 20);
        let error = put(&mut data, &own, Some(4 << 20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(taken(&own) <= 6 << 20, "{}", taken(&own));
    }

    #[test]
    fn what_is_no_symbol_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path| OwnFile::copy(path, 0).unwrap_err().kind();
        assert_eq!(refused(folder.path()), io::ErrorKind::InvalidInput);
        let path = folder.path().join("long");
        File::create(&path).unwrap().set_len(MAX_LEN + 1).unwrap();
        assert_eq!(refused(&path), io::ErrorKind::FileTooLarge);
        fs::write(&path, b"").unwrap();
        assert!(OwnFile::copy(&path, 0).unwrap().bytes().is_empty());
    }
}
