//! The bytes of a file that somebody else may cut off or write to while they are read.

use crate::cursor::sealed;
use crate::to_u64;
use crate::{Bytes, FileOffset, FileStamp, GuestBytes, to_usize};
use core::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

/// Zeroes are looked for in pieces of this many bytes.
const PIECE: usize = 1 << 14;

/// An open file, read and never mapped: if somebody else truncated a file that is mapped, a signal
/// would end the process.
///
/// ```
/// use sonicshot::FileContent;
/// use std::io::Write;
/// let mut file = tempfile::tempfile()?;
/// file.write_all(&[7; 16])?;
/// let content = FileContent::new(file)?;
/// assert_eq!(content.bytes().u32_at(4), Some(0x0707_0707));
/// content.file().set_len(6)?;
/// assert_eq!(content.bytes().u32_at(4), None);
/// assert!(content.failure().is_some());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct FileContent {
    file: File,
    stamp: FileStamp,
    failed: Failure,
}

/// The first error in reading a file.
#[derive(Debug, Clone, Default)]
pub struct Failure(Arc<OnceLock<io::Error>>);

impl Failure {
    /// The error, if there was one. Its kind is `UnexpectedEof` if the file has become shorter.
    #[must_use]
    pub fn get(&self) -> Option<io::Error> {
        let error = self.0.get()?;
        // Errors of the operating system are a number; others a kind.
        Some(match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::Error::new(error.kind(), error.to_string()),
        })
    }
}

impl FileContent {
    /// The content of `file`, as long as it is now.
    ///
    /// # Errors
    /// The operating system's error.
    pub fn new(file: File) -> io::Result<Self> {
        Ok(Self {
            stamp: FileStamp::of(&file)?,
            file,
            failed: Failure::default(),
        })
    }

    /// The file.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// The stamp of the file when it was opened.
    #[must_use]
    pub const fn stamp(&self) -> FileStamp {
        self.stamp
    }

    /// The length in bytes, when it was opened.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.stamp.len()
    }

    /// Whether it had no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of its bytes.
    #[must_use]
    pub fn bytes(&self) -> FileBytes<'_> {
        FileBytes {
            from: Origin::File(self, FileOffset::ZERO),
            len: to_usize(self.len()),
        }
    }

    /// Fills `out` with the bytes from `at`.
    ///
    /// # Errors
    /// The operating system's error; `UnexpectedEof` if there are not so many any more.
    pub fn read_at(&self, out: &mut [u8], at: FileOffset) -> io::Result<()> {
        self.file.read_exact_at(out, at.raw()).inspect_err(|error| {
            let error = match error.raw_os_error() {
                Some(number) => io::Error::from_raw_os_error(number),
                None => io::Error::new(error.kind(), error.to_string()),
            };
            let _ = self.failed.0.set(error);
        })
    }

    /// Notes something else that went wrong with the file.
    pub fn fail(&self, error: io::Error) {
        let _ = self.failed.0.set(error);
    }

    /// The first error, where it could only be told as bytes that are not there.
    #[must_use]
    pub fn failure(&self) -> Option<io::Error> {
        self.failed.get()
    }

    /// The same for when the content is gone.
    #[must_use]
    pub fn watch(&self) -> Failure {
        self.failed.clone()
    }
}

/// A range of a file's bytes, or of bytes in memory: read when they are asked for, and each time
/// again.
///
/// Bytes that cannot be read are as bytes that are not there; [`FileContent::failure`] tells.
///
/// ```
/// use sonicshot::FileBytes;
/// let bytes = FileBytes::from_slice(&[7; 16]);
/// assert_eq!(bytes.u32_at(4), Some(0x0707_0707));
/// assert_eq!(bytes.u64_at(12), None); // would leave the range
/// ```
#[derive(Clone, Copy)]
pub struct FileBytes<'a> {
    from: Origin<'a>,
    len: usize,
}

#[derive(Clone, Copy)]
enum Origin<'a> {
    Memory(GuestBytes<'a>),
    /// The file, and the offset of the bytes in it.
    File(&'a FileContent, FileOffset),
}

macro_rules! read_int {
    ($name:ident, $ty:ty, $n:literal) => {
        #[doc = concat!("The little-endian `", stringify!($ty), "` at byte `offset`, if it lies inside.")]
        #[must_use]
        pub fn $name(&self, offset: usize) -> Option<$ty> {
            self.array(offset).map(<$ty>::from_le_bytes)
        }
    };
}

impl<'a> FileBytes<'a> {
    /// Bytes in memory.
    #[must_use]
    pub const fn from_slice(bytes: &'a [u8]) -> Self {
        Self {
            from: Origin::Memory(GuestBytes::from_slice(bytes)),
            len: bytes.len(),
        }
    }

    /// The number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes from `offset`, if they lie inside.
    #[must_use]
    pub fn get(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        let from = match self.from {
            Origin::Memory(bytes) => Origin::Memory(bytes.get(offset, len)?),
            Origin::File(content, start) => {
                Origin::File(content, start.checked_add(u64::try_from(offset).ok()?)?)
            }
        };
        Some(Self { from, len })
    }

    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut out = [0; N];
        self.get(offset, N)?.copy_to(&mut out).then_some(out)
    }

    /// The byte at `offset`, if it lies inside.
    #[must_use]
    pub fn u8_at(&self, offset: usize) -> Option<u8> {
        self.array(offset).map(u8::from_le_bytes)
    }

    read_int!(u16_at, u16, 2);
    read_int!(u32_at, u32, 4);
    read_int!(u64_at, u64, 8);

    /// Copies the bytes into `out`.
    ///
    /// Returns `false` if they cannot be read, or unless `out` has exactly the same length; what is
    /// in it then is of no use.
    #[must_use]
    pub fn copy_to(&self, out: &mut [u8]) -> bool {
        if out.len() != self.len {
            return false;
        }
        match self.from {
            Origin::Memory(bytes) => bytes.copy_to(out),
            Origin::File(content, start) => content.read_at(out, start).is_ok(),
        }
    }

    /// The same of bytes that perhaps nobody needs: if they cannot be read, that is not noted as the file's
    /// [failure](FileContent::failure).
    #[must_use]
    pub fn copy_ahead(&self, out: &mut [u8]) -> bool {
        match self.from {
            Origin::File(content, start) if out.len() == self.len => {
                content.file.read_exact_at(out, start.raw()).is_ok()
            }
            _ => self.copy_to(out),
        }
    }

    /// Whether every byte can be read and is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        let mut buffer = [0; PIECE];
        let mut at = 0;
        while at < self.len {
            let Some(left) = self.len.checked_sub(at) else {
                return false;
            };
            let len = left.min(buffer.len());
            let piece = buffer.get_mut(..len).zip(self.get(at, len));
            let zero = piece.is_some_and(|(out, bytes)| {
                bytes.copy_to(out) && GuestBytes::from_slice(out).is_zero()
            });
            if !zero {
                return false;
            }
            let Some(next) = at.checked_add(len) else {
                return false;
            };
            at = next;
        }
        true
    }
}

impl<'a> From<&'a [u8]> for FileBytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::from_slice(bytes)
    }
}

impl<'a> From<GuestBytes<'a>> for FileBytes<'a> {
    fn from(bytes: GuestBytes<'a>) -> Self {
        Self {
            len: bytes.len(),
            from: Origin::Memory(bytes),
        }
    }
}

impl sealed::Sealed for FileBytes<'_> {}

impl Bytes for FileBytes<'_> {
    fn byte_len(self) -> u64 {
        to_u64(self.len)
    }

    fn part(self, offset: u64, len: u64) -> Option<Self> {
        self.get(usize::try_from(offset).ok()?, usize::try_from(len).ok()?)
    }

    fn array_at<const N: usize>(self, offset: u64) -> Option<[u8; N]> {
        self.array(usize::try_from(offset).ok()?)
    }

    fn copied(self) -> Option<Vec<u8>> {
        let mut out = vec![0; self.len];
        self.copy_to(&mut out).then_some(out)
    }
}

impl fmt::Debug for FileBytes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.from {
            Origin::Memory(_) => write!(f, "FileBytes({} bytes in memory)", self.len),
            Origin::File(_, start) => write!(f, "FileBytes({} bytes at {start:#x})", self.len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{FileBytes, FileContent};
    use crate::{Bytes, Cursor, GuestBytes};
    use proptest::prelude::*;
    use std::io::{self, Write};

    fn content(data: &[u8]) -> FileContent {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(data).unwrap();
        FileContent::new(file).unwrap()
    }

    proptest! {
        #[test]
        fn a_file_reads_as_a_slice(
            data in proptest::collection::vec(any::<u8>(), 0..80),
            at in 0_usize..90,
            len in 0_usize..90,
        ) {
            let content = content(&data);
            let slice = GuestBytes::from_slice(&data);
            for bytes in [content.bytes(), FileBytes::from_slice(&data)] {
                prop_assert_eq!(bytes.u8_at(at), slice.u8_at(at));
                prop_assert_eq!(bytes.u16_at(at), slice.u16_at(at));
                prop_assert_eq!(bytes.u32_at(at), slice.u32_at(at));
                prop_assert_eq!(bytes.u64_at(at), slice.u64_at(at));
                let (ours, theirs) = (bytes.get(at, len), slice.get(at, len));
                prop_assert_eq!(ours.map(|b| b.is_zero()), theirs.map(|b| b.is_zero()));
                prop_assert_eq!(ours.map(Bytes::copied), theirs.map(Bytes::copied));
                let mut cursor = Cursor::at(bytes, at as u64);
                prop_assert_eq!(cursor.be::<u32>().ok(), slice.be_at(at as u64));
            }
            prop_assert!(content.failure().is_none());
        }
    }

    #[test]
    fn what_is_cut_off_is_not_there_and_is_told() {
        let content = content(&[0; 100]);
        let bytes = content.bytes();
        assert!(bytes.is_zero());
        content.file().set_len(50).unwrap();
        assert_eq!(bytes.u8_at(49), Some(0));
        assert!(content.failure().is_none());
        assert_eq!((bytes.u8_at(50), bytes.u32_at(48)), (None, None));
        assert!(!bytes.is_zero());
        let kind = content.watch().get().unwrap().kind();
        assert_eq!(kind, io::ErrorKind::UnexpectedEof);
        assert_eq!((content.len(), bytes.len()), (100, 100));
    }
}
