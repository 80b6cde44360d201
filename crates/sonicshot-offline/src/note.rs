//! Notes for a user on a snapshot and of what was done with it.

use crate::text::ByteSize;
use sonicshot::{Architecture, Gpa, GpaRange};
use sonicshot_dump::{DumpError, FilesNote, Incomplete, WritingProcess};
use std::fmt;
use std::path::PathBuf;

/// One thing that is worth knowing; as text, a line for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The finding in the guest.
    Guest(sonicshot_vmi::Note),
    /// A note on the files beside the memory.
    Files(FilesNote),
    /// No kernel tells of its pages: only what they hold counts.
    NoKernel,
    /// The file begins as one of another format, which it is not: it is a guest's memory.
    TakenAsRaw,
    /// A process has the file open for writing while it is read.
    InUse {
        /// The file.
        path: PathBuf,
        /// The process, if it can be seen.
        writer: Option<WritingProcess>,
    },
    /// Nothing tells whether a process has the file open for writing while it is read.
    MayBeInUse {
        /// The file.
        path: PathBuf,
    },
    /// The guest booted with other RAM than the file has.
    RamEndsElsewhere {
        /// The end of the guest's RAM by its own map.
        guest: Gpa,
        /// The end of the file's layout.
        file: Gpa,
    },
    /// The place of a block of memory is not known, so all of it is kept.
    BlockKept {
        /// Its name in the file.
        name: String,
        /// Its length in bytes.
        len: u64,
    },
    /// Blocks of one length of which it is not known which is which: only what is free in all of
    /// them is dropped.
    BlocksAlike {
        /// The number of blocks.
        count: usize,
        /// The length of each in bytes.
        len: u64,
    },
    /// Nothing shows that this memory lies where the layout that was given puts it: it is kept.
    Unconfirmed {
        /// The range where the layout puts it.
        range: GpaRange,
    },
    /// The source does not have some pages.
    Absent {
        /// The amount of RAM that they are, in bytes.
        bytes: u64,
        /// The amount of that which the guest uses, as far as its kernel says.
        in_use: u64,
        /// Whether they may have been zeroes, which whoever wrote it left out too.
        may_be_zero: bool,
        /// The reason, if that is known.
        why: Option<Incomplete>,
    },
    /// Pages that the source does not have are zeroes in what is written.
    AbsentFilled {
        /// The amount of RAM that they are, in bytes.
        bytes: u64,
        /// The reason, if that is known.
        why: Option<Incomplete>,
    },
    /// Pages that the source does not have are marked as not there in what is written, too.
    AbsentKept {
        /// The amount of RAM that they are, in bytes.
        bytes: u64,
        /// The reason, if that is known.
        why: Option<Incomplete>,
    },
    /// The source of a checkpoint did not have some pages.
    AbsentBefore {
        /// The amount of RAM that they are, in bytes.
        bytes: u64,
    },
    /// The checkpoint lacks pages that the guest uses, or may use: nobody looked which they are.
    ForAnalysis,
    /// Zero pages in use are kept, for the file may be a diff without its base.
    MayBeDiff,
    /// No kernel tells of its pages, and the file has holes, so it may be a diff: its zero pages that are
    /// none are kept. They are few, as a prune in place leaves them.
    HolesWithoutKernel,
    /// Zero pages in use are kept, for the format does not promise zeroes.
    ZeroPagesKept,
    /// So are free pages, for the guest relies on what they read as.
    FreePagesKept,
    /// The output has a guest's pages, but not the table that explains its page tables.
    WithoutP2m,
    /// The output has the memory of a migration file, but not the devices' state.
    WithoutDeviceState,
    /// Neither the file nor a kernel in it tells the guest's processor, and what is written has to
    /// name one.
    MachineAssumed {
        /// The one that it names.
        machine: Architecture,
    },
}

impl Note {
    /// Writes how much of RAM the source does not have.
    fn write_absent(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Absent { bytes, .. }
        | Self::AbsentFilled { bytes, .. }
        | Self::AbsentKept { bytes, .. }) = self
        else {
            return Ok(());
        };
        write!(f, "{} of RAM are not in the source", ByteSize(*bytes))?;
        match self {
            Self::AbsentFilled { .. } => f.write_str(": they are zeroes in the output"),
            Self::AbsentKept { .. } => f.write_str(", nor in the output"),
            Self::Absent { in_use: 0, .. } => f.write_str(", none of which the guest uses"),
            Self::Absent {
                in_use,
                may_be_zero,
                ..
            } => {
                let unless = if *may_be_zero {
                    ", unless all of them were zeroes"
                } else {
                    ""
                };
                let in_use = ByteSize(*in_use);
                write!(
                    f,
                    ", {in_use} of which the guest uses: it cannot run from this{unless}"
                )
            }
            _ => Ok(()),
        }
    }
}

/// Of a raw file that may be a diff.
const MAY_BE_DIFF: &str = "pages in use that are zero are kept: others that the guest has written \
     to are holes in the file, so it may be a diff to another memory file (--base), where a hole is \
     what that one has";

/// Of a raw file with holes, without a kernel.
const HOLES_WITHOUT_KERNEL: &str = "no kernel tells of its pages, and those of zeroes are holes already, but for such as are too \
     short for one. These stay: the file may be a diff, in which a hole is what its base has";

/// The note on a checkpoint that lacks what its guest uses, or may use.
const FOR_ANALYSIS: &str = "the checkpoint is for analysis: pages that the guest uses are missing, \
                            or may be missing, and no guest should run from it";

/// Writes how much of RAM the source of a checkpoint did not have.
fn write_absent_before(f: &mut fmt::Formatter<'_>, bytes: u64) -> fmt::Result {
    let bytes = ByteSize(bytes);
    write!(
        f,
        "{bytes} of RAM were not in what the checkpoint was made of: they read as zero"
    )
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(note) => note.fmt(f),
            Self::Files(note) => note.fmt(f),
            Self::NoKernel => {
                f.write_str("no kernel tells of its pages: those of zeroes go, all others are kept")
            }
            Self::TakenAsRaw => f.write_str(
                "the file begins as one of another format, but it is none: it is taken for raw \
                 memory, whose guest shows that it is",
            ),
            Self::InUse { path, writer } => {
                let (path, writer) = (path.clone(), writer.clone());
                write!(
                    f,
                    "{}: what is read of it is torn unless its guest is stopped",
                    DumpError::InUse { path, writer }
                )
            }
            Self::MayBeInUse { path } => write!(
                f,
                "it cannot be told whether {} is open for writing: what is read of it is torn if a \
                 guest runs on it",
                path.display()
            ),
            Self::RamEndsElsewhere { guest, file } => write!(
                f,
                "the guest booted with RAM up to {guest:#x}, the file's layout ends at {file:#x}: is \
                 the layout right? What the guest's kernel does not know is kept"
            ),
            Self::BlockKept { name, len } => write!(
                f,
                "memory block {name} ({}) is kept as it is: where it lies in the guest is not known \
                 (--layout can tell)",
                ByteSize(*len)
            ),
            Self::BlocksAlike { count, len } => write!(
                f,
                "{count} memory blocks of {} cannot be told from each other: what is not free in \
                 all of them is kept",
                ByteSize(*len)
            ),
            Self::Unconfirmed { range } => write!(
                f,
                "memory at {range} ({}) is kept as it is: nothing in it shows that it lies there, \
                 as the layout says",
                ByteSize(range.len())
            ),
            Self::Absent { why, .. }
            | Self::AbsentFilled { why, .. }
            | Self::AbsentKept { why, .. } => {
                if let Some(why) = why {
                    write!(f, "the dump is incomplete: {why}: ")?;
                }
                self.write_absent(f)
            }
            Self::AbsentBefore { bytes } => write_absent_before(f, *bytes),
            Self::ForAnalysis => f.write_str(FOR_ANALYSIS),
            Self::MayBeDiff => f.write_str(MAY_BE_DIFF),
            Self::HolesWithoutKernel => f.write_str(HOLES_WITHOUT_KERNEL),
            Self::ZeroPagesKept => f.write_str(
                "pages in use that are zero are kept: Xen does not promise zeroes after a restore",
            ),
            Self::FreePagesKept => f.write_str(
                "free pages are kept: the guest relies on what they read as, and Xen gives it \
                 others after a restore",
            ),
            Self::WithoutP2m => f.write_str(
                "the page tables hold frame numbers of the machine, which only the core explains: \
                 no kernel will be found in the output",
            ),
            Self::WithoutDeviceState => f.write_str(
                "the devices' state is not in the output: a guest cannot be restored from it",
            ),
            Self::MachineAssumed { machine } => write!(
                f,
                "neither the file nor a kernel in it tells the guest's processor: the output says \
                 {machine}"
            ),
        }
    }
}
