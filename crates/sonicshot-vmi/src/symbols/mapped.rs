//! A symbol file's bytes, mapped.

use super::SymbolError;
use std::fs::File;
use std::path::Path;

/// The bytes of a file: mapped, so that only what is looked at is read.
#[derive(Debug)]
pub(crate) struct MappedFile(Inner);

#[derive(Debug)]
enum Inner {
    Mapped(memmap2::Mmap),
    #[cfg(test)]
    Owned(Vec<u8>),
}

impl MappedFile {
    #[expect(unsafe_code, reason = "the mmap edge")]
    pub(crate) fn open(path: &Path) -> Result<Self, SymbolError> {
        let io = |source| SymbolError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the mapping is private and read-only. As with every reader of mapped files, a
        // process that truncates the file under us ends us with SIGBUS, and one that rewrites
        // it changes what is parsed: each value is checked after it was read, where it is used.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self(Inner::Mapped(map)))
    }

    #[cfg(test)]
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self(Inner::Owned(bytes.to_vec()))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Inner::Mapped(map) => map,
            #[cfg(test)]
            Inner::Owned(bytes) => bytes,
        }
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}
