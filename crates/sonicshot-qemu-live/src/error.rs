//! Errors with a running QEMU.

use sonicshot::checkpoint::CheckpointError;
use sonicshot::{LayoutError, MemoryError};
use sonicshot_dump::DumpError;
use sonicshot_serve::ServeError;
use sonicshot_vmi::VmiError;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// An error of saving a running guest, or of restoring a saved one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// The monitor cannot be reached.
    #[error("connecting to QEMU's monitor at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// QEMU is gone, or has closed its monitor.
    #[error(
        "QEMU has closed its monitor while `{command}` was under way: it has ended, or was killed"
    )]
    Gone {
        /// The command.
        command: &'static str,
    },
    /// Reading from or writing to the monitor failed.
    #[error("QEMU's monitor, at `{command}`")]
    Monitor {
        /// The command.
        command: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// QEMU did not answer in time.
    #[error("QEMU's monitor has not answered `{command}` within {waited:?}")]
    Silent {
        /// The command; of the greeting `greeting`.
        command: &'static str,
        /// The time that was waited.
        waited: Duration,
    },
    /// The message is not QMP.
    #[error("QEMU's monitor answered `{command}` with something that is not QMP: {what}")]
    NoQmp {
        /// The command.
        command: &'static str,
        /// The fault.
        what: String,
    },
    /// QEMU says no.
    #[error("QEMU refuses `{command}`: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// In QEMU's words.
        reason: String,
    },
    /// QEMU's answer is of another form than is read here.
    #[error("what QEMU says of {what}: {found}; expected was {expected}")]
    Unknown {
        /// The answer that was asked for.
        what: &'static str,
        /// Its text.
        found: String,
        /// The form that can be read.
        expected: &'static str,
    },
    /// This guest is not one that is saved or restored.
    #[error("{what}")]
    NotThis {
        /// The reason.
        what: String,
    },
    /// QEMU's process cannot be looked into.
    #[error("{action} of QEMU's process {pid}")]
    Process {
        /// The action that failed.
        action: &'static str,
        /// The process.
        pid: i32,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The system refused something else.
    #[error("{action}")]
    System {
        /// The action that failed.
        action: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A file.
    #[error("{action} {}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The guest's memory cannot be read.
    #[error("the guest's memory")]
    Memory(#[from] MemoryError),
    /// The layout of its RAM cannot be.
    #[error("where the guest's RAM lies")]
    Layout(#[from] LayoutError),
    /// The guest's kernel was not understood: it runs on, and nothing was saved.
    #[error("the guest, as it was stopped")]
    Guest(#[source] VmiError),
    /// The pause took too long: the guest runs on, and nothing was saved.
    #[error(
        "the guest was paused for more than {allowed:?} ({doing}): it runs on, and nothing was saved"
    )]
    PausedTooLong {
        /// The longest that it may be.
        allowed: Duration,
        /// The step that was under way.
        doing: &'static str,
    },
    /// There is no memory for a copy of what the guest uses.
    #[error(
        "copying the memory that the guest uses takes {needed} bytes more, and only {room} are \
         available: nothing was saved, and the guest is as it was"
    )]
    NoRoom {
        /// The bytes that are still to be copied.
        needed: u64,
        /// The bytes that there are for it: what was allowed, or what the machine or a cgroup's limit
        /// leaves.
        room: u64,
    },
    /// The process that would let the guest run on cannot be reached.
    #[error("the watchdog process, which would let the guest run on if this one died, at {action}")]
    Watchdog {
        /// The action that failed.
        action: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A save failed after the guest's disks were given overlays.
    #[error("{state}")]
    Disks {
        /// The state in which the guest and its disks are left.
        state: String,
        /// The failure.
        #[source]
        source: Box<QemuError>,
    },
    /// The output.
    #[error(transparent)]
    Output(#[from] DumpError),
    /// The checkpoint cannot be written or read.
    #[error("the checkpoint {}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: CheckpointError,
    },
    /// The checkpoint's pages cannot be read.
    #[error("reading the checkpoint's pages")]
    Pages(#[source] ServeError),
    /// The checkpoint is none of a running QEMU guest, or its record of one is damaged.
    #[error("{} cannot be restored into QEMU: {what}", path.display())]
    NoGuest {
        /// The file.
        path: PathBuf,
        /// The part that is missing or wrong.
        what: String,
    },
    /// QEMU ended instead of running the guest.
    #[error("QEMU has ended ({status}) before the guest was restored: {said}")]
    Ended {
        /// The status with which it ended.
        status: ExitStatus,
        /// The last that it said.
        said: String,
    },
}

impl QemuError {
    pub(crate) fn system(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { action, source }
    }

    pub(crate) fn checkpoint(path: &std::path::Path) -> impl Fn(CheckpointError) -> Self + '_ {
        move |source| Self::Checkpoint {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn not_this(what: impl Into<String>) -> Self {
        Self::NotThis { what: what.into() }
    }
}
