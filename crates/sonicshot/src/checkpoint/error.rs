//! The errors of a checkpoint.

use super::disk::source::DiskOffset;
use crate::{FileOffset, Gpa, MemoryError, PageClass, Pfn};
use std::error::Error;
use std::io;

/// An error of writing, reading or restoring a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file does not begin as a checkpoint.
    #[error("not a checkpoint: {}", instead_of_magic(found))]
    NotACheckpoint {
        /// Its first bytes.
        found: Vec<u8>,
    },
    /// The file ends too early, or goes on behind its end.
    #[error("{what} at {offset:#x} needs {need} bytes, the file has {len}")]
    Truncated {
        /// The part of the format.
        what: &'static str,
        /// Its offset in the file.
        offset: FileOffset,
        /// The number of bytes that it needs.
        need: u64,
        /// The length of the file.
        len: u64,
    },
    /// The file was written for a newer reader.
    #[error("the checkpoint needs features that this reader does not have: flags {flags:#x}")]
    Incompatible {
        /// The incompatible feature flags that are not known here.
        flags: u64,
    },
    /// The format's version is not known.
    #[error("the checkpoint has format version {found}, this reader knows {known}")]
    Version {
        /// The version in the file.
        found: u32,
        /// The version read here.
        known: u32,
    },
    /// A checksum does not match: the file is damaged.
    #[error("{what} at {offset:#x} is damaged: its checksum is {computed:#x}, not {stored:#x}")]
    Checksum {
        /// The part of the format.
        what: &'static str,
        /// Its offset in the file.
        offset: FileOffset,
        /// The sum that the file has.
        stored: u128,
        /// The sum that its bytes give.
        computed: u128,
    },
    /// A field has a value that it cannot have.
    #[error("{what} at {offset:#x} has the invalid value {value:#x}")]
    Corrupt {
        /// The field.
        what: &'static str,
        /// The offset in the file of the field, or of the record that holds it.
        offset: FileOffset,
        /// Its value.
        value: u64,
    },
    /// A chunk does not decompress to what it should.
    #[error("page data at {offset:#x} does not decompress")]
    Decompress {
        /// The chunk's offset in the file.
        offset: FileOffset,
        /// The codec's error.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Page data could not be compressed.
    #[error("compressing page data")]
    Compress {
        /// The codec's error.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The codec is not part of this build.
    #[error("this build has no {codec}: enable the feature of that name")]
    CodecMissing {
        /// The codec's name.
        codec: &'static str,
    },
    /// The operating system refused.
    #[error("{action} the checkpoint at {offset:#x}")]
    Io {
        /// `reading` or `writing`.
        action: &'static str,
        /// The offset in the file.
        offset: FileOffset,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The guest's memory could not be read or written.
    #[error("reading the guest's memory")]
    Memory(#[from] MemoryError),
    /// The memory's layout is not the checkpoint's.
    #[error(
        "the RAM layout of the checkpoint is not that of the given memory: they differ from {at} on"
    )]
    Layout {
        /// The first address in one and not in the other.
        at: Gpa,
    },
    /// Something that a checkpoint cannot hold.
    #[error("a checkpoint cannot hold {what}: {value}, at most {max}")]
    TooLarge {
        /// Its kind.
        what: &'static str,
        /// The amount that there is.
        value: u64,
        /// The most that there may be.
        max: u64,
    },
    /// Chunks of a size that cannot be.
    #[error(
        "a chunk of {found} bytes: give a multiple of the page size, {page}, that is at most {max}"
    )]
    ChunkSize {
        /// The size asked for.
        found: u64,
        /// The size of a page.
        page: u64,
        /// The largest chunk.
        max: u64,
    },
    /// A plan that drops what the guest uses, for a checkpoint that does not say so.
    #[error(
        "frame {pfn} is {class}, which the guest uses, and it is to be dropped: the guest could \
         not run from the checkpoint, which does not say so (CheckpointInfo::for_analysis)"
    )]
    ForAnalysis {
        /// The page's class.
        class: PageClass,
        /// The first such frame.
        pfn: Pfn,
    },
    /// A checkpoint without pages that the guest uses, or may use, from which a guest is to be run.
    #[error(
        "the checkpoint is for analysis: pages that the guest uses are missing, or may be missing, \
         and no guest should run from it"
    )]
    CannotRun,
    /// Bytes that are to be copied are not as many as there is room for.
    #[error("{what} at {at} has {found} bytes, not {expected}")]
    Length {
        /// The part that the bytes are.
        what: &'static str,
        /// Their place in the guest.
        at: Gpa,
        /// The number of bytes that there are.
        found: u64,
        /// The number of bytes that there should be.
        expected: u64,
    },
    /// There is no blob of this name.
    #[error("the checkpoint has no blob `{name}`")]
    NoBlob {
        /// The name asked for.
        name: String,
    },
    /// The blob's name is taken.
    #[error("the checkpoint has a blob `{name}` already")]
    BlobExists {
        /// The name given twice.
        name: String,
    },
    /// The memory was not written, or twice.
    #[error("a checkpoint holds a guest's memory once, not {times} times")]
    MemoryTimes {
        /// The number of times that it was written.
        times: u32,
    },
    /// A kept page differs from the source.
    #[error(
        "frame {pfn} is not what the source holds: byte {byte} is {found:#x}, not {expected:#x}"
    )]
    Differs {
        /// The frame.
        pfn: Pfn,
        /// The first byte of it that differs.
        byte: u64,
        /// The checkpoint's byte.
        found: u8,
        /// The source's byte.
        expected: u8,
    },
    /// A mapping or a page fault could not be served.
    #[error("{operation} of {len} bytes at host address {at:#x}")]
    Host {
        /// The system call, or what it was to do.
        operation: &'static str,
        /// The address in this process, or the VMM's.
        at: usize,
        /// The number of bytes.
        len: usize,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The checkpoint refers to a disk that was not given.
    #[error("the checkpoint refers to pages on the disk `{name}`, and its image was not given")]
    NoDisk {
        /// The disk's name.
        name: String,
    },
    /// A disk was given that the checkpoint does not refer to.
    #[error("the checkpoint refers to no disk `{name}`; it knows {known:?}")]
    UnknownDisk {
        /// The name given.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A disk was named twice.
    #[error("the disk `{name}` is named twice")]
    DiskTwice {
        /// The name.
        name: String,
    },
    /// A disk is not as long as it was.
    #[error("the disk `{name}` has {found} bytes, and had {expected} when the guest was saved")]
    DiskLength {
        /// The disk's name.
        name: String,
        /// Its length in bytes.
        found: u64,
        /// Its length in bytes when the guest was saved.
        expected: u64,
    },
    /// A file system on a disk was written to since the guest was saved.
    #[error(
        "{what} at {at:#x} of the disk `{name}` is not what it was when the guest was saved: \
         somebody has written to the disk since, and the guest's memory contradicts it"
    )]
    DiskMovedOn {
        /// The disk's name.
        name: String,
        /// The thing that differs.
        what: &'static str,
        /// Its place on the disk.
        at: DiskOffset,
    },
    /// A disk does not hold any more what the checkpoint refers to.
    #[error("the disk `{name}` holds other bytes at {at:#x} than the guest had in memory")]
    DiskChanged {
        /// The disk's name.
        name: String,
        /// The place on the disk.
        at: DiskOffset,
    },
    /// A disk could not be read.
    #[error("reading the disk `{name}` at {at:#x}")]
    DiskIo {
        /// The disk's name.
        name: String,
        /// The place on the disk.
        at: DiskOffset,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A worker thread ended without a result.
    #[error("a worker thread failed")]
    Worker,
}

/// The beginning of a file that is no checkpoint, and what it should be.
fn instead_of_magic(found: &[u8]) -> String {
    const EXPECTED: &str = "expected the magic of a `.sonic` file";
    match found {
        [] => format!("the file is empty (0 bytes), {EXPECTED} at 0x0"),
        found => format!("found {found:02x?} at 0x0, {EXPECTED}"),
    }
}

impl CheckpointError {
    pub(crate) fn read(offset: FileOffset) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action: "reading",
            offset,
            source,
        }
    }

    pub(crate) fn write(offset: FileOffset) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action: "writing",
            offset,
            source,
        }
    }
}
