//! A guest's disk, as whoever has its image reads it.

use crate::FileStamp;
use crate::to_u64;
use core::fmt;
use std::fs::File;
use std::io;

crate::address::number! {
    /// A place on a guest's disk, as the guest sees it, in bytes from the disk's beginning.
    DiskOffset, "place on a disk"
}

crate::address::half_open_range! {
    /// A half-open range of places on a guest's disk.
    DiskRange of DiskOffset, "bytes of a disk"
}

impl DiskOffset {
    /// The beginning of a disk.
    pub const ZERO: Self = Self(0);

    /// The place `bytes` further on, unless that wraps.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The distance of `self` behind `base`, unless it is before.
    #[must_use]
    pub const fn offset_from(self, base: Self) -> Option<u64> {
        self.0.checked_sub(base.0)
    }
}

impl fmt::LowerHex for DiskOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// A guest's disk: the bytes that the guest reads of it, whatever format its image has.
///
/// Several threads read at once. What is read must not be kept for later by the source: a page is
/// compared, or its hash taken, of the very bytes that are used.
///
/// ```
/// use sonicshot::checkpoint::{DiskOffset, DiskSource};
/// let image = tempfile::NamedTempFile::new()?;
/// image.as_file().set_len(1 << 20)?; // a raw image is its guest's disk
/// let mut sector = [1; 512];
/// image.as_file().read_disk(&mut sector, DiskOffset::new(4096))?;
/// assert_eq!((image.as_file().disk_len()?, sector), (1 << 20, [0; 512]));
/// # Ok::<(), std::io::Error>(())
/// ```
pub trait DiskSource: Send + Sync {
    /// The length that the guest sees, in bytes. The same on every call.
    ///
    /// # Errors
    /// The operating system's error.
    fn disk_len(&self) -> io::Result<u64>;

    /// Fills `buf` with what the guest reads from `at` on.
    ///
    /// # Errors
    /// The operating system's error; `UnexpectedEof` if the disk ends before.
    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()>;

    /// The first range from `at` on that may hold anything but zeroes, for who looks through all of
    /// it; `None` if there is none. All of the rest, where that is not known.
    ///
    /// # Errors
    /// The operating system's error.
    fn next_disk_data(&self, at: DiskOffset) -> io::Result<Option<DiskRange>> {
        let end = DiskOffset::new(self.disk_len()?);
        Ok((at < end).then(|| DiskRange::new(at, end)))
    }
}

/// A raw image, or a block device.
impl DiskSource for File {
    fn disk_len(&self) -> io::Result<u64> {
        // Of a block device the metadata do not say it.
        Ok(FileStamp::of(self)?.len())
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, at.raw())
    }
}

impl DiskSource for Vec<u8> {
    fn disk_len(&self) -> io::Result<u64> {
        Ok(to_u64(self.len()))
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        let start = usize::try_from(at.raw()).ok();
        let part = start.and_then(|start| self.get(start..start.checked_add(buf.len())?));
        let part = part.ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(part);
        Ok(())
    }
}

impl<S: DiskSource + ?Sized> DiskSource for std::sync::Arc<S> {
    fn disk_len(&self) -> io::Result<u64> {
        (**self).disk_len()
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        (**self).read_disk(buf, at)
    }

    fn next_disk_data(&self, at: DiskOffset) -> io::Result<Option<DiskRange>> {
        (**self).next_disk_data(at)
    }
}
