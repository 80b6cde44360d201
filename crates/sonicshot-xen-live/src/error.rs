//! Errors with a live domain.

use crate::DomainId;
use sonicshot::{LayoutError, MemoryError, P2mError};
use sonicshot_dump::DumpError;
use sonicshot_offline::OfflineError;
use sonicshot_vmi::VmiError;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

/// An error of reading a live domain's memory, or of filtering its save.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LiveError {
    /// One of Xen's libraries cannot be loaded, or lacks a function.
    #[error("loading {name}")]
    Library {
        /// The library, or the function.
        name: String,
        /// The loader's error.
        #[source]
        source: libloading::Error,
    },
    /// A call to Xen failed.
    #[error("{call} of domain {domain}")]
    Call {
        /// The call.
        call: &'static str,
        /// The domain.
        domain: DomainId,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Xen cannot be reached: this is not dom0, or not with its rights.
    #[error("opening {what}")]
    Open {
        /// The file or device.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// There is no such domain.
    #[error("there is no domain {domain}")]
    NoDomain {
        /// The domain.
        domain: DomainId,
    },
    /// The domain runs, so that what is read of it is torn.
    #[error("domain {domain} is not suspended (flags {flags:#x})")]
    NotSuspended {
        /// The domain.
        domain: DomainId,
        /// `XEN_DOMINF_*`.
        flags: u32,
    },
    /// The domain's own records of its frames are invalid.
    #[error("domain {domain}: {what} (value {value:#x})")]
    Malformed {
        /// The domain.
        domain: DomainId,
        /// The fault.
        what: &'static str,
        /// The value found.
        value: u64,
    },
    /// Its table of frames contradicts itself.
    #[error("the table of frames of domain {domain}")]
    P2m {
        /// The domain.
        domain: DomainId,
        /// The contradiction.
        #[source]
        source: P2mError,
    },
    /// It has no memory.
    #[error("the memory of domain {domain}")]
    Layout {
        /// The domain.
        domain: DomainId,
        /// The fault.
        #[source]
        source: LayoutError,
    },
    /// Its memory cannot be read.
    #[error("reading the memory of domain {domain}")]
    Memory {
        /// The domain.
        domain: DomainId,
        /// The fault.
        #[source]
        source: MemoryError,
    },
    /// A pipe or a memory file cannot be used.
    #[error("{action} the save filter")]
    Filter {
        /// The action that failed.
        action: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// `xl` tells no number of a domain.
    #[error("xl does not know the number of {name}: {said}")]
    NoNumber {
        /// The domain's name.
        name: String,
        /// The message of `xl`.
        said: String,
    },
    /// The domain is the one that saves the others.
    #[error("domain 0 cannot be saved: it is the one that saves the others")]
    IsDom0,
    /// Nothing can be told of the domain's guest.
    #[error("domain {domain}")]
    Guest {
        /// The domain.
        domain: DomainId,
        /// The cause.
        #[source]
        source: VmiError,
    },
    /// `xl` failed.
    #[error("{command} failed ({status}){}", said(output))]
    Xl {
        /// The command.
        command: String,
        /// Its exit status.
        status: ExitStatus,
        /// Its message.
        output: String,
    },
    /// A file, a pipe or `xl` cannot be used.
    #[error("{action} {}", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The image cannot be written, or is none.
    #[error(transparent)]
    Image(#[from] DumpError),
    /// The checkpoint, or a disk that it refers to, cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] OfflineError),
}

/// The message of a program, for the end of an error about it.
fn said(output: &str) -> String {
    match output.trim() {
        "" => String::new(),
        output => format!(":\n{output}"),
    }
}
