//! The blobs of a checkpoint beside the memory, by name.

use crate::error::OfflineError;
use sonicshot::checkpoint::{CheckpointError, CheckpointReader};
use sonicshot_dump::Dump;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// The guest kernel's VMCOREINFO.
const VMCOREINFO: &str = "vmcoreinfo";
/// The notes of an ELF core.
const CORE_NOTES: &str = "elf-notes";
/// A Xen save image: all but the content of its pages.
const XEN_IMAGE: &str = "xen-image";

/// A blob's name and content.
pub(crate) type Blob = (String, Vec<u8>);

/// The parts that a core's reader wants beside the memory.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    pub vmcoreinfo: Option<Vec<u8>>,
    /// The notes of an ELF core.
    pub notes: Option<Vec<u8>>,
}

impl Beside {
    pub(crate) fn of_dump(dump: &Dump) -> Self {
        Self {
            vmcoreinfo: dump.vmcoreinfo().map(<[u8]>::to_vec),
            notes: dump.core_notes(),
        }
    }

    pub(crate) fn of_checkpoint(
        reader: &CheckpointReader<File>,
        path: &Path,
    ) -> Result<Self, OfflineError> {
        Ok(Self {
            vmcoreinfo: read(reader, path, VMCOREINFO)?,
            notes: read(reader, path, CORE_NOTES)?,
        })
    }

    /// The blobs that hold it, and what a Xen image is beside its memory.
    pub(crate) fn into_blobs(self, xen_image: Option<Vec<u8>>) -> Vec<Blob> {
        let all = [
            (VMCOREINFO, self.vmcoreinfo),
            (CORE_NOTES, self.notes),
            (XEN_IMAGE, xen_image),
        ];
        let there = all.into_iter();
        let there = there.filter_map(|(name, bytes)| Some((name.to_owned(), bytes?)));
        there.collect()
    }
}

/// All but the pages' content of the Xen image that the checkpoint was made of.
pub(crate) fn xen_image(
    reader: &CheckpointReader<File>,
    path: &Path,
) -> Result<Vec<u8>, OfflineError> {
    read(reader, path, XEN_IMAGE)?.ok_or_else(|| OfflineError::NoImage { path: path.into() })
}

/// Every blob of a checkpoint.
pub(crate) fn all(reader: &CheckpointReader<File>, path: &Path) -> Result<Vec<Blob>, OfflineError> {
    let blobs = reader.blobs();
    let read = |(name, _): (&str, u64)| Ok((name.to_owned(), reader.read_blob(name)?));
    let blobs: Result<Vec<Blob>, CheckpointError> = blobs.map(read).collect();
    blobs.map_err(OfflineError::checkpoint(path))
}

fn read(
    reader: &CheckpointReader<File>,
    path: &Path,
    name: &str,
) -> Result<Option<Vec<u8>>, OfflineError> {
    match reader.read_blob(name) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(CheckpointError::NoBlob { .. }) => Ok(None),
        Err(error) => Err(OfflineError::checkpoint(path)(error)),
    }
}

/// Opens a file that becomes a blob. A terminal or `/dev/zero` may have no end.
pub(crate) fn open_blob(path: &Path) -> Result<File, OfflineError> {
    let file = File::open(path).map_err(OfflineError::io("opening", path))?;
    let kind = file.metadata().map_err(OfflineError::io("reading", path))?;
    let (error, why) = if kind.is_dir() {
        (io::ErrorKind::IsADirectory, "it is a folder: give a file")
    } else if kind.file_type().is_char_device() {
        let why = "it is a character device, which may have no end: give a file or a pipe";
        (io::ErrorKind::InvalidInput, why)
    } else {
        return Ok(file);
    };
    Err(OfflineError::io("reading", path)(io::Error::new(
        error, why,
    )))
}
