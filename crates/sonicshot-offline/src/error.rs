//! The errors between a file's name and what is made of it.

use crate::text::ByteSize;
use sonicshot::checkpoint::CheckpointError;
use sonicshot::{ClassSet, Gpa, GpaRange, MemoryError, PageClass};
use sonicshot_dump::{DumpError, Incomplete};
use sonicshot_vmi::VmiError;
use std::io;
use std::path::{Path, PathBuf};

/// An error of opening, analysing, pruning, saving or converting a snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfflineError {
    /// The file or folder cannot be read or written.
    #[error(transparent)]
    Dump(#[from] DumpError),
    /// The guest in it is none that can be analysed.
    #[error("{}", path.display())]
    Guest {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The trouble with the guest.
        #[source]
        source: VmiError,
    },
    /// A checkpoint cannot be read or written.
    #[error("{}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// The fault.
        #[source]
        source: CheckpointError,
    },
    /// A process has a disk's image open for writing.
    #[error("the disk's image is not pinned")]
    NotPinned {
        /// The image, and the process that writes it.
        #[source]
        source: DumpError,
    },
    /// A checkpoint is read at any place, which a pipe cannot be.
    #[error("{} is no checkpoint", path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
        /// What it is.
        #[source]
        source: io::Error,
    },
    /// Pages on the guest's disks cannot be found.
    #[error("looking through the guest's disks")]
    Disks {
        /// The fault.
        #[source]
        source: CheckpointError,
    },
    /// The guest's memory cannot be read.
    #[error("reading guest memory")]
    Memory(#[from] MemoryError),
    /// The operating system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// The action, such as `opening`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The place of the file's bytes in the guest could not be found out.
    #[error("{}: none of the known layouts agrees with the guest's own memory map", path.display())]
    NoLayout {
        /// The file with the guest's memory.
        path: PathBuf,
    },
    /// A QEMU file has more blocks than are searched.
    #[error("{} has {count} blocks of memory: where each lies in the guest is not searched for", path.display())]
    ManyBlocks {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The number of blocks.
        count: usize,
    },
    /// The memory shows that the layout that was given is wrong.
    #[error(
        "{} cannot lie as {}: of the empty lists in the memory at {range}, which point to \
         themselves, {lists} belong at {place} and {here} there",
        path.display(),
        if *guessed { "was guessed, without the guest's e820 map" } else { "--layout says" }
    )]
    Misplaced {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The range where the layout puts the memory in question.
        range: GpaRange,
        /// The range where it must lie.
        place: GpaRange,
        /// The number of lists that say so,
        lists: u64,
        /// and how many the other.
        here: u64,
        /// Whether the layout was guessed, and not given.
        guessed: bool,
    },
    /// The layout that was given is in more ranges than are checked.
    #[error("{}: a layout of {count} ranges cannot be checked against the guest's memory", path.display())]
    ManyRanges {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The number of ranges.
        count: usize,
    },
    /// A raw file lacks what every guest's memory has: it is a diff without its base, such as a
    /// Firecracker diff snapshot ([`OpenOptions::base`](crate::OpenOptions::base)).
    #[error("{} has a hole where the guest has records of its pages, at {at}", path.display())]
    NotWhole {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The first page that is missing.
        at: Gpa,
    },
    /// A raw file has holes, and no kernel tells that they are none of a diff's, which mean "as in
    /// the base": a page made a hole would read as the base has it.
    #[error(
        "{} has a hole at {at}: it may be a diff, in which a page that is dropped reads as its base has \
         it, and without a kernel nothing tells",
        path.display()
    )]
    MayBeDiff {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The first page that is missing.
        at: Gpa,
    },
    /// Pages of zeroes cannot be left out of this format.
    #[error("{} is {format}, where a page that is left out need not read as zero", path.display())]
    ZeroesKept {
        /// The file.
        path: PathBuf,
        /// Its kind.
        format: &'static str,
    },
    /// A class was to be dropped that never is.
    #[error("pages of class {class} are never dropped: the guest's kernel needs them")]
    Undroppable {
        /// The class.
        class: PageClass,
    },
    /// Classes that the guest uses were to be dropped, and not for analysis.
    #[error("the guest uses pages of {classes} and cannot run without them")]
    UsedByGuest {
        /// The classes.
        classes: ClassSet,
    },
    /// The dump lacks pages that it should have, and its guest is not found in what is there.
    #[error(
        "{} is incomplete: {why}. {} of RAM are missing, from {from} on",
        path.display(),
        ByteSize(*missing)
    )]
    Incomplete {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The reason why they are missing.
        why: Incomplete,
        /// The amount of RAM that is missing, in bytes.
        missing: u64,
        /// The first address that is missing.
        from: Gpa,
        /// The trouble with the guest.
        #[source]
        source: Box<Self>,
    },
    /// A raw file is shorter than its guest's RAM, and its guest is not found in what is there.
    #[error(
        "{} is cut off, or a part: it has {}, and its guest was told of {} of RAM",
        path.display(),
        ByteSize(*len),
        ByteSize(*told)
    )]
    CutOff {
        /// The file with the guest's memory.
        path: PathBuf,
        /// The amount of memory that it has, in bytes.
        len: u64,
        /// The amount that the guest's firmware or loader told of, in bytes.
        told: u64,
        /// The trouble with the guest.
        #[source]
        source: Box<Self>,
    },
    /// The checkpoint was made of something else than a Xen image.
    #[error("{} is not a checkpoint of a Xen image: it holds the guest's memory alone", path.display())]
    NoImage {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The parts of a Xen image beside the memory are nowhere to be had.
    #[error("a Xen image is made of a checkpoint of one, or of memory and --template IMAGE")]
    NoTemplate,
    /// A checkpoint was to become a migration file.
    #[error("a checkpoint holds no migration file to convert: restore it instead")]
    NotOfCheckpoint,
    /// Two outputs were to go into one file.
    #[error("{} is named for two outputs", path.display())]
    SameOutput {
        /// The file.
        path: PathBuf,
    },
}

impl OfflineError {
    /// A refusal of the operating system.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// An error of the checkpoint at `path`.
    pub(crate) fn checkpoint(path: &Path) -> impl Fn(CheckpointError) -> Self {
        move |source| Self::Checkpoint {
            path: path.to_owned(),
            source,
        }
    }

    /// An error of a file at `out` that is made of the checkpoint at `input`.
    pub(crate) fn made_of(input: &Path, out: &Path) -> impl Fn(CheckpointError) -> Self {
        move |error| match error {
            CheckpointError::Io {
                action: action @ "writing",
                source,
                ..
            } => Self::Io {
                action,
                path: out.to_owned(),
                source,
            },
            error => Self::checkpoint(input)(error),
        }
    }

    /// An error of what is looked for on disks.
    pub(crate) fn disks() -> impl Fn(CheckpointError) -> Self {
        |source| Self::Disks { source }
    }

    /// Whether it says that a file is no checkpoint.
    pub(crate) fn is_no_checkpoint(&self) -> bool {
        matches!(
            self,
            Self::Checkpoint {
                source: CheckpointError::NotACheckpoint { .. },
                ..
            }
        )
    }

    /// An error of the guest whose memory is at `path`.
    pub(crate) fn guest(path: &Path) -> impl Fn(VmiError) -> Self {
        move |source| Self::Guest {
            path: path.to_owned(),
            source,
        }
    }
}
