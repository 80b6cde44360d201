//! What the command says when it fails, and how it exits.

use serde_json::{Value, json};
use sonicshot::checkpoint::CheckpointError;
use sonicshot::{Gpa, GpaRange, MemoryError, PageClass};
use sonicshot_dump::{DumpError, KdumpWriteError, SizeLimit};
use sonicshot_vmi::{Foreign, VmiError};
use sonicshot_xen_live::{DomainId, LiveError};
use std::error::Error;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};

#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error("{}", path.display())]
    Guest {
        path: PathBuf,
        #[source]
        source: VmiError,
    },
    #[error("{}", path.display())]
    Checkpoint {
        path: PathBuf,
        #[source]
        source: CheckpointError,
    },
    #[error("{what}")]
    Usage { what: String },
    #[error("the live domain")]
    Live(#[from] LiveError),
    #[error("domain {domain}")]
    Domain {
        domain: DomainId,
        #[source]
        source: VmiError,
    },
    /// Xen's own tool failed.
    #[error("{command} failed ({status}){}", said(output))]
    Xl {
        command: String,
        status: ExitStatus,
        output: String,
    },
    #[error("reading guest memory")]
    Memory(#[from] MemoryError),
    #[error("{action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: none of the known layouts agrees with the guest's own memory map", path.display())]
    NoLayout { path: PathBuf },
    #[error("{} has {count} blocks of memory: where each lies in the guest is not searched for", path.display())]
    ManyBlocks { path: PathBuf, count: usize },
    #[error(
        "{} cannot lie as --layout says: of the empty lists in the memory at {range}, which point to \
         themselves, {lists} belong at {place} and {here} there",
        path.display()
    )]
    Misplaced {
        path: PathBuf,
        range: GpaRange,
        /// Where it must lie.
        place: GpaRange,
        /// How many lists say so, and how many the other.
        lists: u64,
        here: u64,
    },
    #[error("{} in {count} ranges: their places cannot be checked", path.display())]
    ManyRanges { path: PathBuf, count: usize },
    #[error("{} has a hole where the guest has records of its pages, at {at}", path.display())]
    NotWhole { path: PathBuf, at: Gpa },
    #[error("pages of class {class} are never dropped: the guest's kernel needs them")]
    Undroppable { class: PageClass },
    #[error("{} is no checkpoint of a Xen image: it holds the guest's memory alone", path.display())]
    NoImage { path: PathBuf },
    #[error("{} exists", path.display())]
    Exists { path: PathBuf },
    #[error("{} is the dump itself", path.display())]
    OverDump { path: PathBuf },
    #[error("no demo dump found: looked for testdata/{name} from here upwards")]
    NoDemo { name: &'static str },
    #[error("the demo's check failed: {what}")]
    Demo { what: String },
    /// Inputs failed, and each was told of.
    #[error("not every input was done")]
    Reported { code: u8 },
}

impl CliError {
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Reported { code } => *code,
            Self::Dump(
                DumpError::Io { .. }
                | DumpError::NoHoles { .. }
                | DumpError::Changed { .. }
                | DumpError::Modified { .. }
                | DumpError::NotFinished { .. }
                | DumpError::Unsettled { .. }
                | DumpError::PrunedInPart { .. }
                | DumpError::TooLong {
                    by: SizeLimit::Given | SizeLimit::Free,
                    ..
                }
                | DumpError::Exists { .. }
                | DumpError::SameFile { .. }
                | DumpError::Kdump {
                    source: KdumpWriteError::Io(_),
                    ..
                },
            )
            | Self::Io { .. }
            | Self::Live(_)
            | Self::Xl { .. }
            | Self::Exists { .. }
            | Self::NoDemo { .. }
            | Self::Demo { .. }
            | Self::Checkpoint {
                source: CheckpointError::Io { .. },
                ..
            } => 1,
            Self::Undroppable { .. }
            | Self::Usage { .. }
            | Self::Checkpoint {
                source:
                    CheckpointError::TooLarge { .. }
                    | CheckpointError::NoBlob { .. }
                    | CheckpointError::BlobExists { .. },
                ..
            }
            | Self::OverDump { .. }
            | Self::NoImage { .. }
            | Self::Dump(
                DumpError::NotInPlace { .. }
                | DumpError::NotAStream { .. }
                | DumpError::CannotConvert { .. }
                | DumpError::NoBlock { .. },
            ) => 2,
            Self::Dump(DumpError::InUse { .. } | DumpError::MayBeInUse { .. }) => 6,
            Self::Dump(_)
            | Self::Memory(_)
            | Self::Checkpoint { .. }
            | Self::NoLayout { .. }
            | Self::Misplaced { .. }
            | Self::ManyRanges { .. }
            | Self::ManyBlocks { .. } => 3,
            Self::NotWhole { .. } => 4,
            Self::Guest { source, .. } | Self::Domain { source, .. } => match source {
                VmiError::Inconsistent(_)
                | VmiError::LaterOwner(_)
                | VmiError::NotOwner { .. }
                | VmiError::Undecided { .. }
                | VmiError::Stale { .. } => 5,
                _ => 4,
            },
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// What the user may do about it.
    fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Dump(DumpError::Exists { .. }) | Self::Exists { .. } => {
                "give another name, or --force to write over it"
            }
            Self::Dump(DumpError::SameFile { .. }) => "use --in-place to prune the file itself",
            Self::Dump(DumpError::NoHoles { .. } | DumpError::NotInPlace { .. }) => {
                "prune by copy instead: -o OUT"
            }
            Self::Dump(DumpError::InUse { .. } | DumpError::MayBeInUse { .. }) => {
                "end what writes it, or prune by copy: -o OUT. --live-ok prunes it all the same: \
                 only if its guest is stopped, and was before this command began"
            }
            Self::Dump(DumpError::Changed { .. } | DumpError::Modified { .. }) => {
                "stop whatever writes the dump, then run this again"
            }
            Self::Dump(DumpError::Io { action, .. }) if action.contains("temporary file") => {
                "name a folder with room for the guest's memory in TMPDIR"
            }
            Self::Dump(DumpError::NotAStream { .. }) => "give a file: -o OUT",
            Self::Dump(DumpError::Compressed { .. }) => {
                "the file is damaged or was cut short: take another copy of it"
            }
            Self::Dump(DumpError::NoBlock { .. }) => {
                "name the blocks as the file does: --layout BLOCK=START-END,...;BLOCK=..."
            }
            Self::Dump(DumpError::LayoutLength { .. }) => {
                "the ranges of --layout must add up to the length of the file"
            }
            Self::NoImage { .. } => {
                "`sonicshot convert --to xl --template IMAGE` takes the rest from an image of that guest"
            }
            Self::Dump(DumpError::XenFrame { .. }) => {
                "the memory and the image must be of the same guest, of the same moment"
            }
            Self::NotWhole { .. } => {
                "it may be a Firecracker diff snapshot: give --base, the memory that it is a diff to"
            }
            Self::Dump(DumpError::Ambiguous { .. }) => {
                "give the memory file itself; a base that lies in the folder with --base"
            }
            Self::Live(LiveError::Library { .. } | LiveError::Open { .. }) => {
                "run it in dom0, as root, with Xen's libraries and tools installed"
            }
            Self::Checkpoint {
                source: CheckpointError::Differs { .. },
                ..
            } => "the checkpoint was made of another dump, or the dump was changed since",
            Self::Checkpoint {
                source: CheckpointError::Checksum { .. } | CheckpointError::Truncated { .. },
                ..
            } => "the file was damaged after it was written: take another copy of it",
            Self::Misplaced { .. } => {
                "give the ranges in the order in which the file has them, or no --layout"
            }
            Self::NoLayout { .. }
            | Self::ManyBlocks { .. }
            | Self::Dump(DumpError::NoLayout { .. } | DumpError::Json { .. }) => {
                "say where RAM lies with --layout"
            }
            Self::Guest { source, path } => match source {
                VmiError::NoKernel { .. } if has_holes(path) => {
                    "is this a Linux guest's memory? The file has holes: if it is a Firecracker \
                     diff snapshot, give --base, the memory that it is a diff to. For a raw file \
                     of over 2 GiB, try --layout"
                }
                VmiError::NoKernel { .. } => {
                    "is this a Linux guest's memory? For a raw file of over 2 GiB, try --layout"
                }
                VmiError::Missing { .. } => "give the kernel's vmlinux with --symbols",
                VmiError::WrongKernel { .. } => {
                    "give the files of exactly the guest's build, or none at all"
                }
                VmiError::NotOwner { processor, .. }
                    if matches!(processor.why, Foreign::Nested) =>
                {
                    "give the processor's CR3 as the nested guest's host: --cr3 N"
                }
                VmiError::NotOwner { .. } => {
                    "the guest was in firmware, a boot loader, another kernel or early boot: take \
                     the snapshot once it runs. If the processor is none of the guest's kernel, \
                     give the CR3 of one that is: --cr3 N"
                }
                VmiError::Undecided { .. } | VmiError::Stale { .. } => {
                    "an earlier kernel may have left its memory behind. If you know the CR3 of a \
                     processor of the guest: --cr3 N"
                }
                VmiError::LaterOwner(_) => {
                    "the guest was reset, or has started another kernel, and is not up again: \
                     take the memory when it is. If a register CR3 of the running guest is known, \
                     --cr3 settles it"
                }
                VmiError::Inconsistent(_) => {
                    "the guest may have been running while it was dumped. --allow-inconsistent \
                     keeps every page in question; do not run a guest from the result"
                }
                _ => return None,
            },
            _ => return None,
        })
    }

    fn causes(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut next = self.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        causes
    }

    /// The error and its causes in one line.
    pub(crate) fn with_causes(&self) -> String {
        let mut line = self.to_string();
        for cause in self.causes() {
            line.push_str(": ");
            line.push_str(&cause);
        }
        line
    }

    /// Prints the error, its causes and the hint to standard error, with `json` as one line of
    /// JSON.
    pub(crate) fn print(&self, json: bool) {
        if matches!(self, Self::Reported { .. }) {
            return;
        }
        if json {
            eprintln!("{}", self.to_json());
        } else {
            self.print_text();
        }
    }

    /// The same of one input; of `several` it must be told which.
    pub(crate) fn print_of(&self, input: &Path, json: bool, several: bool) {
        if json {
            let mut value = self.to_json();
            if let Some(value) = value.as_object_mut() {
                value.insert("path".into(), input.display().to_string().into());
            }
            eprintln!("{value}");
            return;
        }
        if several {
            eprintln!("failed: {}", input.display());
        }
        self.print_text();
    }

    fn to_json(&self) -> Value {
        json!({
            "error": self.to_string(),
            "causes": self.causes(),
            "hint": self.hint(),
            "exit_code": self.code(),
        })
    }

    fn print_text(&self) {
        eprintln!("error: {self}");
        for cause in self.causes() {
            eprintln!("  because: {cause}");
        }
        if let Some(hint) = self.hint() {
            eprintln!("  hint: {hint}");
        }
    }
}

/// What a program said, to go behind what is said of it.
fn said(output: &str) -> String {
    match output.trim() {
        "" => String::new(),
        output => format!(":\n{output}"),
    }
}

/// Whether a file takes less of the disk than it is long, and may be a diff: nothing that begins
/// as a migration file is.
fn has_holes(path: &Path) -> bool {
    let mut start = [0; 4];
    let begins = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut start));
    begins.is_ok()
        && !matches!(&start, b"QEVM" | b"Libv")
        && std::fs::metadata(path).is_ok_and(|file| file.blocks().saturating_mul(512) < file.len())
}
