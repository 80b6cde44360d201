//! A raw image, or a block device: its bytes are its guest's.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sonicshot::checkpoint::{DiskOffset, DiskRange, DiskSource};
use std::fs::File;
use std::io;

/// A raw image in a file.
#[derive(Debug)]
pub(crate) struct RawDisk {
    file: File,
    len: u64,
}

impl RawDisk {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let len = file.disk_len()?;
        Ok(Self { file, len })
    }
}

impl DiskSource for RawDisk {
    fn disk_len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        self.file.read_disk(buf, at)
    }

    fn next_disk_data(&self, at: DiskOffset) -> io::Result<Option<DiskRange>> {
        let end = DiskOffset::new(self.len);
        if at >= end {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(at.raw())) {
            Ok(start) => DiskOffset::new(start),
            Err(Errno::NXIO) => return Ok(None),
            // A block device, or a file system that does not tell.
            Err(Errno::INVAL) => return Ok(Some(DiskRange::new(at, end))),
            Err(error) => return Err(error.into()),
        };
        let stop = DiskOffset::new(seek(&self.file, SeekFrom::Hole(start.raw()))?);
        Ok(Some(DiskRange::new(start, stop.min(end))))
    }
}
