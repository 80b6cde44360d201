//! The command's error messages and exit codes.

use crate::inputs::STDIN;
use crate::json::{ErrorReport, OfError, Version, line, path};
use crate::report::complain;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use sonicshot::MemoryError;
use sonicshot::checkpoint::CheckpointError;
use sonicshot_dump::{
    DumpError, DumpOptions, KdumpWriteError, SizeLimit, can_leave_out_zeroes, check_not_foreign,
};
#[cfg(feature = "libvmi")]
use sonicshot_libvmi::LibVmiError;
use sonicshot_offline::OfflineError;
use sonicshot_qemu_live::QemuError;
use sonicshot_serve::ServeError;
use sonicshot_vmi::symbols::SymbolError;
use sonicshot_vmi::{Foreign, VmiError};
use sonicshot_xen_live::LiveError;
use std::borrow::Cow;
use std::error::Error;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Offline(#[from] OfflineError),
    #[error("{what}")]
    Usage { what: String },
    /// An error that names its file itself.
    #[error(transparent)]
    Symbols(#[from] SymbolError),
    #[error("the live domain")]
    Live(#[source] LiveError),
    #[error(transparent)]
    Serve(ServeError),
    #[error(transparent)]
    Qemu(QemuError),
    #[cfg(feature = "libvmi")]
    #[error(transparent)]
    LibVmi(#[from] LibVmiError),
    /// An error that says itself what it is about.
    #[error(transparent)]
    AboutDomain(LiveError),
    #[error("{action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} exists", path.display())]
    Exists { path: PathBuf },
    #[error("{} is the input itself: name another file for the output", path.display())]
    OverDump { path: PathBuf },
    #[error("the demo's check failed: {what}")]
    Demo { what: String },
    /// Inputs failed, and each was told of.
    #[error("not every input was done")]
    Reported { code: u8 },
}

impl From<DumpError> for CliError {
    fn from(error: DumpError) -> Self {
        Self::Offline(error.into())
    }
}

impl From<LiveError> for CliError {
    fn from(error: LiveError) -> Self {
        match error {
            LiveError::Image(error) => error.into(),
            LiveError::Checkpoint(error) => error.into(),
            LiveError::Io {
                action,
                path,
                source,
            } => Self::Io {
                action,
                path,
                source,
            },
            LiveError::NoNumber { .. } | LiveError::IsDom0 => Self::Usage {
                what: error.to_string(),
            },
            LiveError::Guest { .. } | LiveError::Xl { .. } => Self::AboutDomain(error),
            error => Self::Live(error),
        }
    }
}

impl From<QemuError> for CliError {
    fn from(error: QemuError) -> Self {
        match error {
            QemuError::Output(error) => error.into(),
            error => Self::Qemu(error),
        }
    }
}

impl From<ServeError> for CliError {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Snapshot(error) => error.into(),
            error => Self::Serve(error),
        }
    }
}

impl From<MemoryError> for CliError {
    fn from(error: MemoryError) -> Self {
        Self::Offline(error.into())
    }
}

impl CliError {
    pub(crate) fn code(&self) -> u8 {
        match self.code_of_kind() {
            // Not the file or its guest is at fault, but that it cannot be read or written.
            3 | 4 if self.is_of_the_system() => 1,
            code => code,
        }
    }

    /// Whether it comes of something that the operating system refused.
    fn is_of_the_system(&self) -> bool {
        let mut next: Option<&(dyn Error + 'static)> = Some(self);
        while let Some(error) = next {
            #[cfg(feature = "libvmi")]
            if error.is::<LibVmiError>() {
                return true;
            }
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return error.raw_os_error().is_some();
            }
            next = error.source();
        }
        false
    }

    fn code_of_kind(&self) -> u8 {
        match self {
            Self::Reported { code } => *code,
            Self::Offline(error) => code_of(error),
            Self::AboutDomain(LiveError::Guest { source, .. })
            | Self::Qemu(QemuError::Guest(source)) => code_of_guest(source),
            Self::Symbols(
                SymbolError::Lacks { .. }
                | SymbolError::Differ { .. }
                | SymbolError::Outdated { .. },
            ) => 4,
            Self::Usage { .. } | Self::OverDump { .. } => 2,
            Self::Symbols(_)
            | Self::Qemu(
                QemuError::NotThis { .. }
                | QemuError::Unknown { .. }
                | QemuError::NoGuest { .. }
                | QemuError::Checkpoint { .. },
            )
            | Self::Serve(
                ServeError::Set { .. }
                | ServeError::SetOfAnother { .. }
                | ServeError::NoMigration { .. }
                | ServeError::MigrationJson { .. }
                | ServeError::MigrationSlot { .. }
                | ServeError::NotInSlot { .. },
            ) => 3,
            #[cfg(feature = "libvmi")]
            Self::LibVmi(
                LibVmiError::Domain { .. }
                | LibVmiError::Name { .. }
                | LibVmiError::TooLarge { .. }
                | LibVmiError::Layout { .. },
            ) => 2,
            #[cfg(feature = "libvmi")]
            Self::LibVmi(_) => 1,
            Self::Io { .. }
            | Self::Live(_)
            | Self::Serve(_)
            | Self::Qemu(_)
            | Self::AboutDomain(_)
            | Self::Exists { .. }
            | Self::Demo { .. } => 1,
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// Advice on what the user may do.
    fn hint(&self) -> Option<Cow<'static, str>> {
        if let Self::Offline(OfflineError::Dump(DumpError::NotRead { instead, .. })) = self {
            let hint = format!("{instead}. If it is raw memory that only looks so: --format raw");
            return Some(hint.into());
        }
        if let Some(hint) = self.hint_of_other() {
            return Some(hint.into());
        }
        if let Some(hint) = self.hint_of_symbols() {
            return Some(hint.into());
        }
        let hint = match self {
            Self::Offline(error) => return with_zeroes(hint_of(error), error),
            Self::Exists { path } => Some(or_force(path)),
            Self::Live(LiveError::Library { .. } | LiveError::Open { .. }) => {
                Some("run it in dom0, as root, with Xen's libraries and tools installed")
            }
            Self::Qemu(error) => hint_of_qemu(error),
            Self::Serve(ServeError::DisksMayChange { .. }) => Some(
                "if nobody writes to the images, neither the guest (run it on an overlay) nor the host: \
                 --disk-immutable. `restore` puts all in place before",
            ),
            Self::Serve(ServeError::FewDescriptors { .. }) => Some(
                "raise the hard limit (`ulimit -Hn`, of a service LimitNOFILE=), or serve fewer at once: \
                 --max-vms N",
            ),
            Self::Serve(ServeError::Checkpoint(error)) => hint_of_disks(error),
            _ => None,
        };
        hint.map(Cow::Borrowed)
    }

    /// Of a file that is said to be raw memory, has no kernel so, and begins as something else.
    fn hint_of_other(&self) -> Option<String> {
        let Self::Offline(
            OfflineError::Guest {
                path,
                source:
                    VmiError::NoKernel { .. } | VmiError::NoTables { .. } | VmiError::BannerAlone { .. },
            }
            | OfflineError::Dump(DumpError::OddLength {
                path,
                is_said: true,
                ..
            }),
        ) = self
        else {
            return None;
        };
        match check_not_foreign(path) {
            Err(DumpError::NotRead { kind, instead, .. }) => {
                Some(format!("it begins as {kind}: {instead}"))
            }
            _ => None,
        }
    }

    /// Of a kernel as it is booted, where its symbols are wanted.
    fn hint_of_symbols(&self) -> Option<&'static str> {
        let mut cause = self.source();
        while let Some(error) = cause {
            if let Some(SymbolError::UnknownKind { path }) = error.downcast_ref() {
                return is_boot_image(path).then_some(
                    "it is a kernel as it is booted (vmlinuz): give the System.map or the vmlinux of the \
                     same build, or nothing, as symbols are found in the guest's memory too",
                );
            }
            cause = error.source();
        }
        None
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
    /// JSON, with the `input` that it is about.
    pub(crate) fn print(&self, input: Option<&Path>, json: bool) {
        if matches!(self, Self::Reported { .. }) {
            return;
        }
        if json {
            complain!("{}", line(&self.to_json(input)));
        } else {
            self.print_text();
        }
    }

    /// The same of one input; of `several` it must be told which.
    pub(crate) fn print_of(&self, input: &Path, json: bool, several: bool) {
        if json {
            complain!("{}", line(&self.to_json(Some(input))));
            return;
        }
        if several {
            complain!("failed: {}", input.display());
        }
        self.print_text();
    }

    fn to_json(&self, input: Option<&Path>) -> ErrorReport {
        ErrorReport {
            version: Version::default(),
            kind: OfError::default(),
            path: input.map(path),
            error: self.to_string(),
            causes: self.causes(),
            hint: self.hint().map(|hint| hint.to_string()),
            exit_code: self.code(),
        }
    }

    fn print_text(&self) {
        complain!("error: {self}");
        for cause in self.causes() {
            complain!("  because: {cause}");
        }
        if let Some(hint) = self.hint() {
            complain!("  hint: {hint}");
        }
    }
}

/// Tells what is wrong with the command line, or what was asked for by `--help` and `--version`:
/// with `--json` in it, what is wrong as a line of JSON.
pub(crate) fn of_command_line(mut error: clap::Error) -> ExitCode {
    if let Some(out) = output_without_option(&error) {
        let hint = format!("did you mean `-o {out}`?");
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![hint.into()]),
        );
    }
    let json = std::env::args_os().any(|arg| arg == "--json");
    if error.use_stderr() && json {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default();
        let what = first.strip_prefix("error: ").unwrap_or(first);
        let hint = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("tip: "));
        let report = ErrorReport {
            version: Version::default(),
            kind: OfError::default(),
            path: None,
            error: what.to_owned(),
            causes: Vec::new(),
            hint: hint.map(str::to_owned),
            exit_code: 2,
        };
        complain!("{}", line(&report));
    } else {
        // Nothing is left to tell it to.
        let _ = error.print();
    }
    ExitCode::from(u8::from(error.use_stderr()) * 2)
}

/// The word that stands where only `-o` would make it an output: one too many, or the last of several
/// that is no file.
fn output_without_option(error: &clap::Error) -> Option<String> {
    let usage = error.to_string();
    if !usage.contains("--output <") {
        return None;
    }
    let word = match error.kind() {
        ErrorKind::UnknownArgument => match error.get(ContextKind::InvalidArg)? {
            ContextValue::String(word) => word.clone(),
            _ => return None,
        },
        ErrorKind::MissingRequiredArgument => {
            let words: Vec<String> = std::env::args().skip(2).collect();
            let files = words.iter().filter(|word| !word.starts_with('-')).count();
            let last = words.last().filter(|_| files > 1)?;
            last.clone()
        }
        _ => return None,
    };
    let is_new = !word.starts_with('-') && !Path::new(&word).exists();
    is_new.then_some(word)
}

/// Whether a file has the magic of x86's boot protocol (`Documentation/arch/x86/boot.rst`).
fn is_boot_image(path: &Path) -> bool {
    let mut start = [0; 0x206];
    let begins = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut start));
    begins.is_ok() && start.ends_with(b"HdrS")
}

/// Whether a file takes less of the disk than it is long, and may be a diff: nothing that begins
/// as a migration file is.
fn has_holes(path: &Path) -> bool {
    let mut start = [0; 4];
    let begins = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut start));
    begins.is_ok()
        && !matches!(&start, b"QEVM" | b"Libv")
        && std::fs::metadata(path).is_ok_and(|file| file.blocks() < file.len().div_ceil(512))
}

fn code_of(error: &OfflineError) -> u8 {
    match error {
        OfflineError::Dump(error) => code_of_dump(error),
        OfflineError::Guest { source, .. } => code_of_guest(source),
        OfflineError::Incomplete { source, .. } | OfflineError::CutOff { source, .. } => {
            code_of(source)
        }
        OfflineError::NotPinned { source } => code_of_dump(source),
        OfflineError::Io { .. }
        | OfflineError::Checkpoint {
            source: CheckpointError::Io { .. } | CheckpointError::DiskIo { .. },
            ..
        } => 1,
        OfflineError::Undroppable { .. }
        | OfflineError::UsedByGuest { .. }
        | OfflineError::NoImage { .. }
        | OfflineError::NoTemplate
        | OfflineError::NotOfCheckpoint
        | OfflineError::SameOutput { .. }
        | OfflineError::Checkpoint {
            source:
                CheckpointError::TooLarge { .. }
                | CheckpointError::NoDisk { .. }
                | CheckpointError::UnknownDisk { .. }
                | CheckpointError::DiskTwice { .. }
                | CheckpointError::ChunkSize { .. }
                | CheckpointError::NoBlob { .. }
                | CheckpointError::BlobExists { .. },
            ..
        } => 2,
        OfflineError::NotWhole { .. }
        | OfflineError::MayBeDiff { .. }
        | OfflineError::ZeroesKept { .. } => 4,
        // What is wrong with the file, or with the layout.
        _ => 3,
    }
}

fn code_of_dump(error: &DumpError) -> u8 {
    match error {
        DumpError::Io { .. }
        | DumpError::NoHoles { .. }
        | DumpError::Changed { .. }
        | DumpError::Modified { .. }
        | DumpError::NotFinished { .. }
        | DumpError::Unsettled { .. }
        | DumpError::PrunedInPart { .. }
        | DumpError::NoSharing { .. }
        | DumpError::SharedInPart { .. }
        | DumpError::TooLong {
            by: SizeLimit::Given | SizeLimit::Free | SizeLimit::Disk,
            ..
        }
        | DumpError::Exists { .. }
        | DumpError::SameFile { .. }
        | DumpError::Kdump {
            source: KdumpWriteError::Io(_),
            ..
        } => 1,
        DumpError::NotInPlace { .. }
        | DumpError::CannotShare { .. }
        | DumpError::NotAStream { .. }
        | DumpError::CannotConvert { .. }
        | DumpError::Kdump {
            source: KdumpWriteError::Machine { .. },
            ..
        }
        | DumpError::NoBlock { .. } => 2,
        DumpError::InUse { .. } | DumpError::MayBeInUse { .. } => 6,
        _ => 3,
    }
}

fn code_of_guest(error: &VmiError) -> u8 {
    match error {
        VmiError::Inconsistent(_)
        | VmiError::BrokenLists { .. }
        | VmiError::Covered { .. }
        | VmiError::LaterOwner(_)
        | VmiError::OwnerUntold { .. }
        | VmiError::NotOwner { .. }
        | VmiError::Undecided { .. }
        | VmiError::Stale { .. } => 5,
        _ => 4,
    }
}

fn hint_of_qemu(error: &QemuError) -> Option<&'static str> {
    Some(match error {
        QemuError::Guest(source) => return hint_of_guest(source, Path::new("")),
        QemuError::Silent {
            command: "greeting",
            ..
        } => {
            "a monitor serves one client at a time: give QEMU another one (-qmp unix:SOCKET,server=on,\
             wait=off), or end whoever is connected"
        }
        QemuError::Process { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            "run it as root or as QEMU's user, with the right to look into its process \
             (CAP_SYS_PTRACE)"
        }
        QemuError::PausedTooLong { .. } => "--max-pause SECONDS allows more",
        QemuError::NoRoom { .. } => {
            "pause the guest first (`stop` at its monitor, `virsh suspend`) and save it so: a guest \
             that is found paused is not copied before it is written"
        }
        _ => return None,
    })
}

const IN_TMPDIR: &str = "name a folder with room for the guest's memory in TMPDIR";

/// The advice about an output that exists: a device, a pipe or a socket is not written over.
fn or_force(path: &Path) -> &'static str {
    let is_replaced = |found: &std::fs::Metadata| found.is_file() || found.is_dir();
    match std::fs::metadata(path) {
        Ok(found) if !is_replaced(&found) => {
            "it is no regular file, and no place for an output: give a file"
        }
        _ => OR_FORCE,
    }
}

const OR_FORCE: &str = "give another name, or --force to write over it";
const OR_RAW: &str =
    "if it is a guest's memory and nothing else, whatever it begins with: --format raw";
const TAKE_ANOTHER: &str = "the file is damaged or was cut short: take another copy of it";
const NO_KERNEL_NEEDED: &str =
    "prune --drop zero leaves out pages of zeroes alone, and needs no kernel";

/// The `hint`, and what can be done without a kernel, if it can be done with this file.
fn with_zeroes(hint: Option<&'static str>, error: &OfflineError) -> Option<Cow<'static, str>> {
    let path = match error {
        OfflineError::Guest { source, path } if may_go_without(source) => path,
        OfflineError::NoLayout { path, .. } | OfflineError::CutOff { path, .. } => path,
        _ => return hint.map(Cow::Borrowed),
    };
    match hint {
        hint if !can_leave_out_zeroes(path) => hint.map(Cow::Borrowed),
        Some(hint) => Some(format!("{hint}. {NO_KERNEL_NEEDED}").into()),
        None => Some(NO_KERNEL_NEEDED.into()),
    }
}

/// Whether a guest is not read whose zeroes may go all the same.
fn may_go_without(error: &VmiError) -> bool {
    matches!(
        error,
        VmiError::NoKernel { .. }
            | VmiError::NoTables { .. }
            | VmiError::BannerAlone { .. }
            | VmiError::OtherMachine { .. }
            | VmiError::Covered { .. }
            | VmiError::BrokenLists { .. }
            | VmiError::Unsupported { .. }
            | VmiError::TooMany { .. }
            | VmiError::OutOfTime { .. }
    )
}
const SAY_LAYOUT: &str = "say where RAM lies with --layout";

fn hint_of(error: &OfflineError) -> Option<&'static str> {
    Some(match error {
        OfflineError::Dump(error) => return hint_of_dump(error),
        OfflineError::Guest { source, path } => return hint_of_guest(source, path),
        OfflineError::UsedByGuest { .. } => {
            "--for-analysis drops it all the same: for a look at the rest, not for a guest that runs"
        }
        OfflineError::Incomplete { .. } => {
            "`sonicshot convert` writes what is there; what is missing reads as zero"
        }
        OfflineError::CutOff { .. } => "take the whole file: what is missing may be in use",
        OfflineError::NoImage { .. } => {
            "`sonicshot convert --to xl --template IMAGE` takes the rest from an image of that guest"
        }
        OfflineError::MayBeDiff { .. } => {
            "give --base, the memory that it is a diff to. Of a full snapshot, whose holes are zeroes, \
             prune a copy without holes (cp --sparse=never)"
        }
        OfflineError::NotWhole { .. } => {
            "it may be a Firecracker diff snapshot: give --base, the memory that it is a diff to"
        }
        OfflineError::Checkpoint {
            source: CheckpointError::Differs { .. },
            ..
        } => "the checkpoint was made of another dump, or the dump was changed since",
        OfflineError::Checkpoint {
            source: CheckpointError::Checksum { .. } | CheckpointError::Truncated { .. },
            ..
        } => "the file was damaged after it was written: take another copy of it",
        OfflineError::Checkpoint {
            source: CheckpointError::NotACheckpoint { found },
            ..
        } if found.is_empty() => TAKE_ANOTHER,
        OfflineError::Checkpoint {
            source: CheckpointError::NotACheckpoint { .. },
            ..
        } => {
            "a dump is not a checkpoint: `inspect` tells what it is, `save` makes a checkpoint of it"
        }
        OfflineError::NotPinned { .. } => {
            "a guest goes on writing to it: stop it, pin the disk (QEMU's blockdev-snapshot-sync, or \
             cp --reflink), and name the image that is not written to any more"
        }
        OfflineError::Checkpoint { source, .. } | OfflineError::Disks { source } => {
            return hint_of_disks(source);
        }
        OfflineError::Misplaced { guessed: false, .. } => {
            "give the ranges in the order in which the file has them, or no --layout"
        }
        OfflineError::NoLayout { .. }
        | OfflineError::ManyBlocks { .. }
        | OfflineError::Misplaced { guessed: true, .. } => SAY_LAYOUT,
        _ => return None,
    })
}

fn hint_of_disks(error: &CheckpointError) -> Option<&'static str> {
    Some(match error {
        CheckpointError::NoDisk { .. } => {
            "where pages are on disks, `restore` makes a dump of all of it: --disk NAME=IMAGE"
        }
        CheckpointError::DiskMovedOn { .. } | CheckpointError::DiskLength { .. } => {
            "give the image as it was when the guest was saved. --disk-moved-on goes on all the same: \
             for a look at the memory, not for a guest that runs"
        }
        CheckpointError::DiskChanged { .. } => {
            "give the image as it was when the guest was saved: its pages are nowhere else"
        }
        _ => return None,
    })
}

fn hint_of_dump(error: &DumpError) -> Option<&'static str> {
    Some(match error {
        DumpError::Exists { path } => or_force(path),
        DumpError::SameFile { .. } => {
            "name another output; `prune --in-place` prunes the file itself"
        }
        DumpError::NoHoles { .. } | DumpError::NotInPlace { .. } => "prune by copy instead: -o OUT",
        DumpError::NoSharing { .. } | DumpError::SharedInPart { .. } => {
            "put the memory and the image on one xfs or btrfs; or leave the pages out of a checkpoint: \
             `save --disk` needs nothing of the file system"
        }
        DumpError::CannotShare { .. } => {
            "`convert --to raw` or `--to mapped-ram` makes a file with its pages as they are"
        }
        DumpError::InUse { .. } | DumpError::MayBeInUse { .. } => {
            "end what writes it, or prune by copy: -o OUT. --live-ok prunes it all the same: \
             only if its guest is stopped, and was before this command began"
        }
        DumpError::Changed { .. } | DumpError::Modified { .. } => {
            "stop whatever writes the dump, then run this again"
        }
        DumpError::Io { action, .. } if action.contains("temporary file") => IN_TMPDIR,
        DumpError::TooLong { path, by, .. } => hint_of_length(path, *by),
        DumpError::NotAStream { .. } => "give a file: -o OUT",
        DumpError::Compressed { source, .. } if source.kind() == io::ErrorKind::Unsupported => {
            "unpack it with its own tool, and give the memory that is in it"
        }
        DumpError::Compressed { .. } => TAKE_ANOTHER,
        DumpError::OddLength {
            is_said: true,
            path,
            ..
        } if DumpOptions::begins_as_other(path).unwrap_or(false) => {
            "without --format it is read as what it begins as. Memory that ends inside a page needs \
             its --layout"
        }
        DumpError::OddLength { .. } => {
            "raw memory that ends inside a page needs its layout: --layout START-END,..."
        }
        DumpError::Malformed { what, .. } if what.ends_with("truncated") => TAKE_ANOTHER,
        DumpError::SegmentsDisagree { .. } => {
            "dump the guest again while it is stopped: its memory changed while this was written"
        }
        DumpError::NoBlock { .. } => {
            "name the blocks as the file does: --layout BLOCK=START-END,...;BLOCK=..."
        }
        DumpError::LayoutLength { .. } => {
            "the ranges of --layout must add up to the length of the file"
        }
        DumpError::SeveralSnapshots { .. } => {
            "copy the image, and delete all but one of them from the copy: `qemu-img snapshot -d`"
        }
        DumpError::XenFrame { .. } => {
            "the memory and the image must be of the same guest, of the same moment"
        }
        DumpError::Ambiguous { .. } => {
            "give the memory file itself; a base that lies in the folder with --base"
        }
        DumpError::Malformed { path, .. }
        | DumpError::NotADump { path, .. }
        | DumpError::Unsupported { path, .. }
        | DumpError::Xen { path, .. }
        | DumpError::OtherFormat { path, .. }
            if DumpOptions::begins_as_other(path).unwrap_or(false) =>
        {
            OR_RAW
        }
        DumpError::NoLayout { .. } | DumpError::Json { .. } => SAY_LAYOUT,
        _ => return None,
    })
}

/// Of more than is taken in.
fn hint_of_length(path: &Path, by: SizeLimit) -> &'static str {
    match by {
        SizeLimit::Header { .. } | SizeLimit::Given | SizeLimit::Free
            if path == Path::new(STDIN) =>
        {
            "--max-size SIZE allows more, of standard input: the memory of a guest that ran while it \
             was sent may have come several times"
        }
        SizeLimit::Header { .. } => {
            "its header does not tell of what it holds: unpack it with its own tool, and give the \
             memory that is in it"
        }
        _ => IN_TMPDIR,
    }
}

fn hint_of_guest(error: &VmiError, path: &Path) -> Option<&'static str> {
    Some(match error {
        VmiError::NoKernel { .. } | VmiError::NoTables { .. } | VmiError::BannerAlone { .. }
            if has_holes(path) =>
        {
            "is this a Linux guest's memory? The file has holes: if it is a Firecracker \
             diff snapshot, give --base, the memory that it is a diff to. For a raw file \
             of over 2 GiB, try --layout"
        }
        VmiError::NoTables { .. } => {
            "is the layout right (--layout), and --cr3, if it was given, a processor's that runs \
             the guest's kernel?"
        }
        VmiError::BannerAlone { .. } => "is it an x86-64 kernel, and the layout right (--layout)?",
        VmiError::NoKernel { .. } => {
            "is this a Linux guest's memory? For a raw file of over 2 GiB, try --layout"
        }
        VmiError::Missing { .. } => "give the kernel's vmlinux with --symbols",
        VmiError::WrongKernel { .. } => {
            "give the files of exactly the guest's build, or none at all"
        }
        VmiError::NotOwner { processor, .. } if matches!(processor.why, Foreign::Nested) => {
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
        VmiError::OwnerUntold { .. } => {
            "take the memory in a format that has the processors' registers, or give the CR3 of a \
             processor of the guest: --cr3 N"
        }
        VmiError::Covered { .. } => {
            "what was found of the kernel without its types is not its own: give its vmlinux with \
             --symbols, or a format that has the processors' registers"
        }
        VmiError::BrokenLists { .. } => {
            "the guest may have been running while its memory was written down, or it is damaged: take \
             another copy while it is stopped"
        }
        VmiError::Unsupported { .. } | VmiError::TooMany { .. } | VmiError::OutOfTime { .. } => {
            "if the kernel has no types, its vmlinux or a symbol file of it (--symbols) tells more, and the \
             VMM's state file beside the memory or --cr3 which page tables are its own"
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
    })
}
