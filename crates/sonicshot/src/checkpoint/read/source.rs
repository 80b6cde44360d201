//! Sources of a checkpoint's bytes.

use crate::to_u64;
use crate::{Bytes, FileOffset, FileStamp, GuestBytes};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Mutex, PoisonError};

/// Bytes that can be read from any place: a file, a mapping, an object in a store.
///
/// Several threads read at once, so that a restore can use all cores.
pub trait RangeSource: Send + Sync {
    /// The number of bytes. The same on every call.
    ///
    /// # Errors
    /// The operating system's error.
    fn len(&self) -> io::Result<u64>;

    /// Whether there are none.
    ///
    /// # Errors
    /// The operating system's error.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` with the bytes from `offset`.
    ///
    /// # Errors
    /// The operating system's error; `UnexpectedEof` if there are not so many.
    fn read_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()>;

    /// The file that the bytes are in, if they are in one, from its beginning: it can be mapped
    /// instead of read.
    fn as_file(&self) -> Option<&File> {
        None
    }
}

impl RangeSource for File {
    fn len(&self) -> io::Result<u64> {
        // Of a block device the metadata do not say it.
        Ok(FileStamp::of(self)?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset.raw())
    }

    fn as_file(&self) -> Option<&File> {
        Some(self)
    }
}

impl RangeSource for GuestBytes<'_> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.byte_len())
    }

    fn read_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        self.part(offset.raw(), to_u64(buf.len()))
            .filter(|bytes| bytes.copy_to(buf))
            .map(drop)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

macro_rules! slice_source {
    ($($ty:ty),*) => {$(
        impl RangeSource for $ty {
            fn len(&self) -> io::Result<u64> {
                RangeSource::len(&GuestBytes::from_slice(self))
            }

            fn read_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
                GuestBytes::from_slice(self).read_at(buf, offset)
            }
        }
    )*};
}

slice_source!(&[u8], Vec<u8>);

macro_rules! forward {
    ($($ty:ty),*) => {$(
        impl<S: RangeSource + ?Sized> RangeSource for $ty {
            fn len(&self) -> io::Result<u64> {
                (**self).len()
            }

            fn read_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
                (**self).read_at(buf, offset)
            }

            fn as_file(&self) -> Option<&File> {
                (**self).as_file()
            }
        }
    )*};
}

forward!(Box<S>, std::sync::Arc<S>);

/// Any `Read + Seek` as a source. One thread at a time reads it.
///
/// ```
/// use sonicshot::FileOffset;
/// use sonicshot::checkpoint::{RangeSource, SeekSource};
/// let source = SeekSource::new(std::io::Cursor::new(vec![1, 2, 3]));
/// let mut two = [0; 2];
/// source.read_at(&mut two, FileOffset::new(1))?;
/// assert_eq!(two, [2, 3]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct SeekSource<R>(Mutex<R>);

impl<R: Read + Seek + Send> SeekSource<R> {
    /// Reads from `inner`.
    pub const fn new(inner: R) -> Self {
        Self(Mutex::new(inner))
    }
}

impl<R: Read + Seek + Send> RangeSource for SeekSource<R> {
    fn len(&self) -> io::Result<u64> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.seek(SeekFrom::End(0))
    }

    fn read_at(&self, buf: &mut [u8], offset: FileOffset) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.seek(SeekFrom::Start(offset.raw()))?;
        inner.read_exact(buf)
    }
}
