//! The errors of a dump file.

use crate::{DumpFormat, LayoutSpec, SizeLimit};
use sonicshot::{
    Architecture, ClassSet, FileOffset, FileStamp, Gpa, GpaRange, LayoutError, MemoryError,
    PageClass, Pfn,
};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The reason why a dump could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
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
    /// The file contradicts its own format.
    #[error("{}: {what} at offset {offset:#x} (value {value:#x})", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The fault.
        what: &'static str,
        /// The offset of the fault.
        offset: FileOffset,
        /// The value found there.
        value: u64,
    },
    /// The file contradicts its own format in one of its items, whose place in it is not told.
    #[error("{}: {what} {number} (value {value:#x})", path.display())]
    MalformedItem {
        /// The file.
        path: PathBuf,
        /// The trouble, and the kind of item that has it.
        what: &'static str,
        /// The number of the item, the first being 0.
        number: u64,
        /// The value found there.
        value: u64,
    },
    /// Two segments of an ELF core hold different bytes for the same memory.
    #[error(
        "{}: segments {first} and {second} both hold guest memory {both} ({} bytes), and differ at \
         {at}: nothing says which of them is right",
        path.display(),
        both.len()
    )]
    SegmentsDisagree {
        /// The file.
        path: PathBuf,
        /// The number of the one, the first being 0,
        first: usize,
        /// and of the other.
        second: usize,
        /// The first address at which they differ.
        at: Gpa,
        /// The memory that both of them hold.
        both: GpaRange,
    },
    /// The compressed content is damaged or cut short.
    #[error("{} cannot be decompressed", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// The decompressor's error.
        #[source]
        source: io::Error,
    },
    /// The file is of a kind that is known but not supported.
    #[error("{} is {kind}, which is not supported yet", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Its kind.
        kind: &'static str,
    },
    /// The file does not begin as one of the format that it is said to have.
    #[error("{} does not begin as a file of the format {format}", path.display())]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// The format.
        format: DumpFormat,
    },
    /// The file is of another tool's format, which is known but not read.
    #[error("{} is {kind}: it is not read here", path.display())]
    NotRead {
        /// The file.
        path: PathBuf,
        /// Its kind.
        kind: &'static str,
        /// The thing to do with it.
        instead: &'static str,
    },
    /// A disk image has several snapshots of a VM's memory.
    #[error("{} holds the memory of several snapshots: {}", path.display(), names.join(", "))]
    SeveralSnapshots {
        /// The image.
        path: PathBuf,
        /// The name of the snapshots.
        names: Vec<String>,
    },
    /// The file is no dump.
    #[error("{} is not a memory dump: {why}", path.display())]
    NotADump {
        /// The file.
        path: PathBuf,
        /// The reason against it.
        why: &'static str,
    },
    /// The file is raw memory, if anything, and ends inside a page.
    #[error(
        "{} is not a memory dump: {}its length of {len} bytes is not a multiple of 4 KiB",
        path.display(),
        if *is_said { "" } else { "it begins as no known format, and " }
    )]
    OddLength {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Whether the caller says that it is raw memory.
        is_said: bool,
    },
    /// The guest's RAM layout is invalid.
    #[error("invalid RAM layout in {}", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: LayoutError,
    },
    /// The layout does not fit the file.
    #[error("{}: the layout {layout} describes {described} bytes of RAM, the file has {actual}", path.display())]
    LayoutLength {
        /// The file.
        path: PathBuf,
        /// The layout's name or ranges.
        layout: String,
        /// The bytes that the layout describes.
        described: u64,
        /// The length of the file.
        actual: u64,
    },
    /// Nothing says where the RAM of this machine lies in the guest.
    #[error("{}: {}", path.display(), no_layout(machine))]
    NoLayout {
        /// The file.
        path: PathBuf,
        /// QEMU's name of the machine; empty if the file names none.
        machine: String,
    },
    /// A layout names a block of memory that the file does not have, or names one twice.
    #[error("{} has no block of memory `{name}` to place: it has {known}", path.display())]
    NoBlock {
        /// The file.
        path: PathBuf,
        /// The name in the layout.
        name: String,
        /// The blocks that there are.
        known: String,
    },
    /// The folder is no VMM's snapshot.
    #[error("{} is not a snapshot: it holds neither a Cloud Hypervisor snapshot (state.json, config.json, memory-ranges) nor a Firecracker VM state with its memory file; folders in it are not looked into", path.display())]
    NotASnapshot {
        /// The folder.
        path: PathBuf,
    },
    /// It cannot be told which file of a folder is meant.
    #[error("{} holds {what}: {}", path.display(), names(candidates))]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// The kind of thing that there is more than one of.
        what: &'static str,
        /// The files in question.
        candidates: Vec<PathBuf>,
    },
    /// A VMM's JSON file says nothing that can be understood.
    #[error("{} cannot be parsed", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The trouble, and where.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Diff and base do not belong together.
    #[error("{} cannot be read over {}: {why}", path.display(), base.display())]
    Base {
        /// The diff.
        path: PathBuf,
        /// The base.
        base: PathBuf,
        /// The reason.
        why: &'static str,
    },
    /// A folder cannot be written.
    #[error("{}: {why}", path.display())]
    Folder {
        /// The file in the way.
        path: PathBuf,
        /// The reason.
        why: &'static str,
    },
    /// A folder holds more than any VMM's snapshot does.
    #[error("{} holds more than {most} {what}, as no snapshot does", path.display())]
    FolderTooLarge {
        /// The folder.
        path: PathBuf,
        /// The kind of thing that it has too many of.
        what: &'static str,
        /// The most that there may be.
        most: u64,
    },
    /// A folder that would be replaced holds a file that is no part of the snapshot in it, and
    /// that would be lost.
    #[error(
        "{} is not part of the snapshot in its folder, and would be lost with it",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The output exists, and was not to be written over.
    #[error("{} exists", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output is one of the inputs.
    #[error("{} is an input: name another file for the output", path.display())]
    SameFile {
        /// The output.
        path: PathBuf,
    },
    /// The file has another length than when it was opened.
    #[error("{} had {before} bytes when it was opened, and has {now} now", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// Its length in bytes when it was opened.
        before: u64,
        /// Its length in bytes now.
        now: u64,
    },
    /// The file was written to since it was opened.
    #[error("{} was written to since it was opened", path.display())]
    Modified {
        /// The file.
        path: PathBuf,
    },
    /// A process has the file open for writing.
    #[error("{} is open for writing by {}", path.display(), name(writer.as_ref()))]
    InUse {
        /// The file.
        path: PathBuf,
        /// The process, if it can be seen.
        writer: Option<WritingProcess>,
    },
    /// Nothing tells whether a process has the file open for writing: there are no leases on it,
    /// and not every process may be looked into.
    #[error("it cannot be told whether {} is open for writing", path.display())]
    MayBeInUse {
        /// The file.
        path: PathBuf,
        /// The reason why there are no leases.
        #[source]
        source: io::Error,
    },
    /// More came out of a pipe or a compressor than is taken in.
    #[error("{} expands to more than {limit} bytes: {by}", path.display())]
    TooLong {
        /// The file that it comes of.
        path: PathBuf,
        /// The number of bytes that are taken in.
        limit: u64,
        /// The limit that says so.
        by: SizeLimit,
    },
    /// The output was written, but could not be made durable or get its name.
    #[error("{action} {}: no file was written there, and one that was there is unchanged", path.display())]
    NotFinished {
        /// The action, such as `giving its name to`.
        action: &'static str,
        /// The output.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The output has its name, but what was to follow failed.
    #[error("{} was written completely, but {what}", path.display())]
    Unsettled {
        /// The output.
        path: PathBuf,
        /// The step that failed, and what may come of it.
        what: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A prune in place did not come to its end.
    #[error("{action} {}: only a part of it was pruned; it is a valid dump all the same", path.display())]
    PrunedInPart {
        /// The action, such as `punching a hole into`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The format cannot be pruned in place.
    #[error("{} is {format}, which cannot be pruned in place", path.display())]
    NotInPlace {
        /// The file.
        path: PathBuf,
        /// Its kind.
        format: &'static str,
    },
    /// The format cannot be written from front to back.
    #[error("{} is {format}, which cannot be written into a pipe", path.display())]
    NotAStream {
        /// The file.
        path: PathBuf,
        /// Its kind.
        format: &'static str,
    },
    /// The format does not hold what another needs.
    #[error("{} is {format}, which cannot be made into {to}", path.display())]
    CannotConvert {
        /// The file.
        path: PathBuf,
        /// Its kind.
        format: &'static str,
        /// The format that it was to become.
        to: &'static str,
    },
    /// This file cannot be pruned.
    #[error("{} cannot be pruned: {why}", path.display())]
    CannotPrune {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: &'static str,
    },
    /// The guest's memory could not be read.
    #[error("reading guest memory")]
    Memory {
        /// The reason.
        #[source]
        source: MemoryError,
    },
    /// A kdump-compressed file could not be written.
    #[error("{}", path.display())]
    Kdump {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: KdumpWriteError,
    },
    /// A Xen image cannot be read.
    #[error("{}", path.display())]
    Xen {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: sonicshot_xen::XenError,
    },
    /// A Xen image cannot be put together of this memory.
    #[error("{}: frame {pfn}: {why}", path.display())]
    XenFrame {
        /// The file with what an image holds beside the memory.
        path: PathBuf,
        /// The frame.
        pfn: Pfn,
        /// The fault.
        why: &'static str,
    },
    /// A raw file lacks what every guest's memory has: it is a diff without its base.
    #[error("{} has a hole where the guest has records of its pages, at {at}", path.display())]
    NotWhole {
        /// The file.
        path: PathBuf,
        /// The guest address of the hole.
        at: Gpa,
    },
    /// Nothing shows that a raw file's memory lies where it is taken to.
    #[error(
        "{} is taken to lie as {layout}, to {end}, and its guest booted with RAM {}",
        path.display(),
        boot_end.map_or("of which it does not tell".into(), |end| format!("to {end}, in another layout"))
    )]
    LayoutNotShown {
        /// The file.
        path: PathBuf,
        /// The layout that its memory is taken to have.
        layout: LayoutSpec,
        /// The end of that layout.
        end: Gpa,
        /// The end of the RAM that the guest booted with, by its own map, if that can be read.
        boot_end: Option<Gpa>,
    },
    /// The knowledge of the guest is of another memory.
    #[error("{}: its RAM layout is not that of the guest that was analysed", path.display())]
    OtherGuest {
        /// The file.
        path: PathBuf,
    },
    /// A dump of a guest with a processor that is not read here.
    #[error("{} is a dump of a {machine} machine: only x86_64 and aarch64 are read", path.display())]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// The processor's name, as the dump has it.
        machine: String,
    },
    /// Classes that the guest uses were to be dropped.
    #[error(
        "the guest uses pages of {classes} and cannot run without them: they are dropped only for \
         analysis"
    )]
    UsedByGuest {
        /// The classes.
        classes: ClassSet,
    },
    /// Pages of this class are never dropped.
    #[error("pages of class {class} are never dropped: the guest's kernel needs them")]
    Undroppable {
        /// The class.
        class: PageClass,
    },
    /// A file of this format has no room for it.
    #[error("{}: a file of this format cannot hold {what} {value}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The part of the guest.
        what: &'static str,
        /// The amount of it.
        value: u64,
    },
    /// The pages do not lie in the file so that it can share them with a disk's image.
    #[error("{} is {format}, whose pages cannot be shared with a disk's image", path.display())]
    CannotShare {
        /// The file.
        path: PathBuf,
        /// Its kind.
        format: &'static str,
    },
    /// Two files cannot share blocks.
    #[error("{} cannot share blocks with {}", path.display(), image.display())]
    NoSharing {
        /// The file.
        path: PathBuf,
        /// The image of the disk.
        image: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A file was to share blocks with an image, and did not come to its end.
    #[error(
        "{} was shared only in part with {}: no byte of it has changed",
        path.display(),
        image.display()
    )]
    SharedInPart {
        /// The file.
        path: PathBuf,
        /// The image of the disk.
        image: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The file system cannot punch holes.
    #[error("the file system of {} cannot punch holes", path.display())]
    NoHoles {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
}

/// A process that has a file open for writing, or mapped so.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WritingProcess {
    /// Its number.
    pub pid: u32,
    /// Its name, by the kernel.
    pub command: String,
}

impl fmt::Display for WritingProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command.escape_debug(), self.pid)
    }
}

/// The reason why no kdump-compressed file could be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KdumpWriteError {
    /// The operating system refused to write.
    #[error("writing the kdump file")]
    Io(#[from] io::Error),
    /// The guest's memory could not be read.
    #[error("reading the guest's memory")]
    Memory(#[from] MemoryError),
    /// The format has no room for the guest.
    #[error("a kdump file cannot hold {what} of {value}")]
    TooLarge {
        /// The part of the guest.
        what: &'static str,
        /// The amount of it.
        value: u64,
    },
    /// The format names the processor as Linux does, and that name is not known.
    #[error("a kdump file says what Linux calls its processor, which is not known of {machine}")]
    Machine {
        /// The guest's processor.
        machine: Architecture,
    },
}

fn name(writer: Option<&WritingProcess>) -> String {
    writer.map_or_else(
        || "a process that cannot be seen".into(),
        WritingProcess::to_string,
    )
}

fn no_layout(machine: &str) -> String {
    match machine {
        "" => {
            "it names no machine, which would tell where its RAM lies: give its layout (--layout)"
                .to_owned()
        }
        name => format!("the RAM layout of the machine `{name}` is not known: give it (--layout)"),
    }
}

/// The names of files in one folder, for a message.
fn names(paths: &[PathBuf]) -> String {
    let name = |path: &PathBuf| {
        path.file_name()
            .unwrap_or(path.as_os_str())
            .display()
            .to_string()
    };
    let names: Vec<String> = paths.iter().map(name).collect();
    names.join(", ")
}

impl DumpError {
    /// Refuses a file, called `path`, that was cut off, made longer or written to since it was as
    /// `before`.
    ///
    /// # Errors
    /// [`Changed`](Self::Changed) or [`Modified`](Self::Modified).
    pub fn check_same(path: &Path, before: FileStamp, now: FileStamp) -> Result<(), Self> {
        let path = path.to_owned();
        if now == before {
            return Ok(());
        }
        let (before, now) = (before.len(), now.len());
        Err(match before == now {
            true => Self::Modified { path },
            false => Self::Changed { path, before, now },
        })
    }

    pub(crate) fn io<'a>(
        action: &'static str,
        path: &'a Path,
    ) -> impl Fn(io::Error) -> Self + use<'a> {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn malformed(
        path: &Path,
        what: &'static str,
        offset: FileOffset,
        value: u64,
    ) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            what,
            offset,
            value,
        }
    }
}
