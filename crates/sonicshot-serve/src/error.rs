//! The errors of a virtual machine that is served.

use crate::address::HostAddress;
use rustix::io::Errno;
use sonicshot::checkpoint::CheckpointError;
use sonicshot::{Gpa, LayoutError, MemoryError};
#[cfg(feature = "server")]
use sonicshot_offline::OfflineError;
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// An error of serving a virtual machine, or of starting its server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A snapshot cannot be read.
    #[cfg(feature = "server")]
    #[error(transparent)]
    Snapshot(#[from] OfflineError),
    /// A guest's memory cannot be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A guest's memory cannot lie so.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The source has no memory where the guest has.
    #[error("the snapshot has no memory at {at}")]
    NotInSnapshot {
        /// The address in the guest.
        at: Gpa,
    },
    /// Pages are on a disk that the guest, or somebody else, may write to while it runs.
    #[error(
        "the page at {at} is on a disk that was not declared immutable: pages are not read from such \
         a disk while a guest runs, which may write over them before it touches them"
    )]
    DiskMayChange {
        /// The address in the guest.
        at: Gpa,
    },
    /// The same, before anybody is served.
    #[error(
        "{} has pages on disks, and they were not declared immutable: pages are not read from such a \
         disk while a guest runs, which may write over them before it touches them",
        path.display()
    )]
    DisksMayChange {
        /// The checkpoint.
        path: PathBuf,
    },
    /// A snapshot is not what it was when it was opened.
    #[error("{} was written to while it was served", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A page cannot be brought in.
    #[error("the page at {at} cannot be brought in")]
    Page {
        /// Its address in the guest.
        at: Gpa,
        /// The cause.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The kernel refused to serve faults.
    #[error("{operation} of {len:#x} bytes at {at}")]
    Uffd {
        /// The action.
        operation: &'static str,
        /// The address, in the process whose memory it is.
        at: HostAddress,
        /// The length in bytes.
        len: u64,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The operating system refused something that is of no file.
    #[error("{operation}")]
    System {
        /// The action.
        operation: &'static str,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The operating system refused something with a file or socket.
    #[error("{action} {}", path.display())]
    Io {
        /// The action.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The descriptor that came is no `userfaultfd`.
    #[error("the descriptor that came is not a userfaultfd but {found}")]
    NoUffd {
        /// Its kind.
        found: String,
    },
    /// The `userfaultfd` has not the features that are needed, or others.
    #[error(
        "the userfaultfd has features {found:#x}: it needs to be agreed on (UFFDIO_API, \
         0x80000000){}, without EVENT_FORK (0x2) and EVENT_REMAP (0x4)",
        if *.needs_remove { " with EVENT_REMOVE (0x8)" } else { "" }
    )]
    Features {
        /// Its features, as the kernel shows them.
        found: u64,
        /// Whether it must tell of what is given back.
        needs_remove: bool,
    },
    /// The kernel does not tell of a `userfaultfd` which features it has.
    #[error("the kernel does not show the features of the userfaultfd that came")]
    FeaturesUntold,
    /// Memory whose pages are not what was said.
    #[error("the memory at {at} was said to have pages of {said:#x} bytes, and has others")]
    PageKind {
        /// Its start in the VMM.
        at: HostAddress,
        /// The size that was said.
        said: u64,
    },
    /// A fault that is not that of a missing page.
    #[error(
        "a thread waits at {at} for a page that is there: the memory is registered for more than \
         missing pages"
    )]
    FaultKind {
        /// The address, in the process whose memory it is.
        at: HostAddress,
    },
    /// The connection ended before the message did.
    #[error("the connection was closed after {len} bytes of the message")]
    Closed {
        /// The number of bytes that had come.
        len: usize,
    },
    /// The message did not come whole in time.
    #[error("{len} bytes of the message came in {limit:?}, and not the rest")]
    Slow {
        /// The number of bytes that had come.
        len: usize,
        /// The time that the whole message may take.
        limit: Duration,
    },
    /// The message had not come whole, and others had connected.
    #[error(
        "{len} bytes of the message had come, and of {} connections that waited too this one had waited \
         longest",
        crate::crowd::MAX_WAITING
    )]
    #[cfg(feature = "server")]
    Crowded {
        /// The number of bytes that had come.
        len: usize,
    },
    /// This process may not have as many descriptors as the virtual machines need.
    #[error(
        "{limit} files may be open at once (RLIMIT_NOFILE): {vms} virtual machines at once need {needed}, \
         which are {each} each and {beside} beside; there is room for {room}"
    )]
    FewDescriptors {
        /// The limit.
        limit: u64,
        /// The virtual machines that were to be served at once, at least.
        vms: u64,
        /// The descriptors that these need.
        needed: u64,
        /// The descriptors that each of them needs.
        each: u64,
        /// The descriptors that are needed beside.
        beside: u64,
        /// The virtual machines that there is room for.
        room: u64,
    },
    /// The message does not end.
    #[error("the message has more than {max} bytes")]
    TooLong {
        /// The most bytes that it may have.
        max: usize,
    },
    /// The message is of no form that is known.
    #[cfg(feature = "server")]
    #[error("the message cannot be read")]
    Json(#[from] serde_json::Error),
    /// The message is of a form that is known, and not served.
    #[error("the message is {form}, which is not served: {why}")]
    Form {
        /// The program whose form it is.
        form: &'static str,
        /// The reason why it is not served.
        why: &'static str,
    },
    /// The descriptors that came are not those of the message.
    #[error("{found} file descriptors came with the message, not {expected}")]
    Descriptors {
        /// The number of descriptors that came, at least.
        found: usize,
        /// The number that there should be.
        expected: usize,
    },
    /// Of the descriptors that came some are lost.
    #[error(
        "{found} of the file descriptors that came with the message could be taken in, and others not: more \
         came than any message has, or than this process may have open"
    )]
    DescriptorsLost {
        /// The number of descriptors that are there.
        found: usize,
    },
    /// Who was to be named by a descriptor is not.
    #[error(
        "by the message one of its file descriptors is a pidfd, and none of the {found} that came is"
    )]
    NoPidfd {
        /// The number of descriptors that came.
        found: usize,
    },
    /// There is no memory to serve, or there are too many ranges of it.
    #[error("the message has {found} regions, not 1 to {max}")]
    Regions {
        /// The number of regions.
        found: usize,
        /// The most that there may be.
        max: usize,
    },
    /// Pages of this size cannot be served.
    #[error(
        "the region at {at} has pages of {found} bytes: not a power of two from {min} to {max}"
    )]
    PageSize {
        /// The region's start in the VMM.
        at: HostAddress,
        /// The number in the message.
        found: u64,
        /// The smallest size.
        min: u64,
        /// The largest size.
        max: u64,
    },
    /// The message says two different page sizes of one region.
    #[error("the region at {at} has pages of {page_size} bytes by one field, {older} by the other")]
    PageSizes {
        /// The region's start in the VMM.
        at: HostAddress,
        /// By `page_size`.
        page_size: u64,
        /// By `page_size_kib`, which is in bytes.
        older: u64,
    },
    /// A region is not whole pages, or ends behind the last address.
    #[error(
        "the region of {len:#x} bytes at {at} is empty, not whole pages of {page:#x} bytes, or ends \
         behind the last address"
    )]
    Unaligned {
        /// Its start in the VMM.
        at: HostAddress,
        /// Its length in bytes.
        len: u64,
        /// Its pages' size in bytes.
        page: u64,
    },
    /// A region is not all in the memory that was registered.
    #[error(
        "the region of {len:#x} bytes at offset {offset:#x} is not in the {registered:#x} bytes that \
         were registered"
    )]
    NotRegistered {
        /// Its start, in bytes behind the start of what was registered.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The number of bytes that were registered.
        registered: u64,
    },
    /// A region of the VMM's memory has no place in this process.
    #[error("the guest memory of {len} bytes at {at} is not mapped in this process")]
    NoHost {
        /// Its start in the guest.
        at: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// Something was in the guest's memory before the guest's own bytes were: whoever reads it
    /// there is not told apart from the guest.
    #[error(
        "there was a page at {at} already, where the guest's memory at {gpa:#x} belongs: memory that \
         is restored to must be fresh, and untouched until it is registered"
    )]
    Occupied {
        /// The address, in this process.
        at: HostAddress,
        /// The page of the guest.
        gpa: Gpa,
    },
    /// Two regions have memory in common.
    #[error("two regions overlap {} at {at:#x}", if *.in_guest { "in the guest" } else { "in the VMM" })]
    Overlap {
        /// Whether it is the guest's memory that is there twice.
        in_guest: bool,
        /// The first address that both have.
        at: u64,
    },
    /// A region is not memory of the snapshot.
    #[error("the region of {len:#x} bytes at {what} {at:#x} is not in the snapshot's memory")]
    NotInLayout {
        /// `offset` or `address`.
        what: &'static str,
        /// Its start.
        at: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The peer that has connected has no right to the memory.
    #[error("user {uid} (process {pid}) may not have the guest's memory")]
    Peer {
        /// The user.
        uid: u32,
        /// The process.
        pid: i32,
    },
    /// The process that has connected is gone, or cannot be held on to.
    #[error("the process that has connected cannot be held on to")]
    PeerGone(#[source] io::Error),
    /// As many virtual machines as there were to be have been served.
    #[error("this server has served as many virtual machines as it was started for")]
    Late,
    /// The same `userfaultfd` came by another connection.
    #[error("the userfaultfd is served already, by another connection")]
    Twice,
    /// The thread of a virtual machine has failed.
    #[error("the thread that serves the virtual machine has failed: a bug")]
    Thread,
    /// There is something where the socket should be.
    #[error("{} exists, and {why}", path.display())]
    SocketExists {
        /// The socket's name.
        path: PathBuf,
        /// Its kind.
        why: &'static str,
    },
    /// The process that would end the virtual machines is gone, or has not taken one in.
    #[error(
        "the watcher process does not watch the virtual machine: nothing would end it if this server \
         died"
    )]
    NoWatcher(#[source] io::Error),
    /// The files that a snapshot would have to hold for Cloud Hypervisor are not there, or cannot be served.
    #[error("{} cannot be restored by Cloud Hypervisor's migration protocol: {why}", path.display())]
    NoMigration {
        /// The snapshot.
        path: PathBuf,
        /// The thing that it lacks, or has too much.
        why: &'static str,
    },
    /// Cloud Hypervisor's configuration or state is not what it writes.
    #[cfg(feature = "server")]
    #[error("Cloud Hypervisor's {what} cannot be read")]
    MigrationJson {
        /// The part: the configuration or the state.
        what: &'static str,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// A part of the guest's memory, as Cloud Hypervisor's configuration has it, cannot be.
    #[error("by Cloud Hypervisor's configuration {what} {slot} is {value:#x}, which cannot be")]
    MigrationSlot {
        /// The fault.
        what: &'static str,
        /// The slot's number.
        slot: u32,
        /// Its kind.
        value: u64,
    },
    /// Cloud Hypervisor's configuration and the snapshot's memory are of different guests.
    #[error(
        "the snapshot's memory at {at} is in no slot of Cloud Hypervisor's configuration: they are \
         of different guests"
    )]
    NotInSlot {
        /// The address.
        at: Gpa,
    },
    /// Cloud Hypervisor said no.
    #[error("Cloud Hypervisor refused the command {command}: its log says why")]
    Rejected {
        /// The command.
        command: &'static str,
    },
    /// Cloud Hypervisor's answer is none of its protocol.
    #[error("the answer to the command {command} has status {status} and {len} bytes, not 1 and 0")]
    Answer {
        /// The command.
        command: &'static str,
        /// The number that came.
        status: u16,
        /// The number of bytes that are said to follow.
        len: u64,
    },
    /// Cloud Hypervisor closed the connection, or said nothing.
    #[error("no answer to the command {command} came")]
    NoAnswer {
        /// The command.
        command: &'static str,
        /// The outcome of the connection.
        #[source]
        source: io::Error,
    },
    /// The range that was asked for is not the guest's memory.
    #[error(
        "{len:#x} bytes at {at} were asked for, which are not whole pages of the memory served"
    )]
    Asked {
        /// The start of the range.
        at: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// The message that came is no question for pages.
    #[error(
        "command {command} with {len} bytes came, where pages are asked for (command 9 with 16)"
    )]
    NoQuestion {
        /// The command.
        command: u16,
        /// The number of bytes that are said to follow.
        len: u64,
    },
    /// Another process took the second connection.
    #[error(
        "the connections came from different processes, {first} and {second}: one virtual machine is one process"
    )]
    OtherPeer {
        /// The process that took the first.
        first: i32,
        /// The process that took the second.
        second: i32,
    },
    /// The record that another server has kept of a virtual machine cannot be gone on with.
    #[error("what the previous server kept of a virtual machine cannot be used: {why}")]
    Kept {
        /// The reason.
        why: &'static str,
    },
    /// The server before served something else.
    #[error(
        "the previous server served another snapshot ({found}): its virtual machines would read \
         another guest's memory"
    )]
    OtherSource {
        /// The mark that tells that from others.
        found: String,
    },
    /// Nothing tells the snapshot from another one.
    #[error(
        "nothing would tell a successor that it serves the same snapshot: only a checkpoint or a \
         single file can be served with --keep-fds"
    )]
    NoIdentity,
    /// Whoever has the descriptors did not give them.
    #[error("{} has not given the descriptors of its virtual machines", path.display())]
    NotGiven {
        /// The socket where it listens.
        path: PathBuf,
        /// The outcome of the connection.
        #[source]
        source: io::Error,
    },
    /// A file is not a working set.
    #[error("{} is not a working set: line {line}: {what}", path.display())]
    Set {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The fault.
        what: &'static str,
    },
    /// A working set is of another guest.
    #[error("{} was recorded of another guest: its page at {at} is not in this snapshot", path.display())]
    SetOfAnother {
        /// The file.
        path: PathBuf,
        /// An address that the snapshot has not.
        at: Gpa,
    },
}

impl ServeError {
    pub(crate) fn proc(source: io::Error) -> Self {
        Self::System {
            operation: "looking into /proc",
            source,
        }
    }

    pub(crate) fn system(operation: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::System {
            operation,
            source: errno.into(),
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// The error and its causes in one line.
    #[must_use]
    pub fn with_causes(&self) -> String {
        let mut line = self.to_string();
        let mut next = self.source();
        while let Some(cause) = next {
            line.push_str(": ");
            line.push_str(&cause.to_string());
            next = cause.source();
        }
        line
    }
}
