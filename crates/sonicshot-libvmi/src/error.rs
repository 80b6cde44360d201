//! The errors of LibVMI.

use crate::Domain;
use core::fmt;
use libvmi_sys::{self as sys, LoadError};
use sonicshot::{Gpa, LayoutError};
use std::io;
use std::path::PathBuf;

/// The reason that a guest cannot be read through LibVMI.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LibVmiError {
    /// LibVMI cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// That is no guest's name.
    #[error("`{text}` is not a guest of LibVMI's: say xen:NAME, kvm:NAME or file:PATH")]
    Domain {
        /// The text that was given.
        text: String,
    },
    /// LibVMI cannot be given this name.
    #[error("LibVMI takes no name {what}: {domain}")]
    Name {
        /// The guest.
        domain: Domain,
        /// The fault.
        what: &'static str,
    },
    /// The file cannot be opened.
    #[error("opening {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// LibVMI does not open the guest.
    #[error("LibVMI does not open {domain}: {why}")]
    Open {
        /// The guest.
        domain: Domain,
        /// The reason.
        why: InitFailure,
    },
    /// Nothing of the guest's memory can be read.
    #[error("LibVMI reports no memory of {domain} (size {bytes} bytes, end {end})")]
    NoMemory {
        /// The guest.
        domain: Domain,
        /// The amount that it says there is.
        bytes: u64,
        /// The end that it reports.
        end: Gpa,
    },
    /// The guest has more addresses than are tried.
    #[error(
        "LibVMI says that the memory of {domain} ends at {end}; at most {most} is tried for where RAM \
         lies: say it (--layout START-END,...)"
    )]
    TooLarge {
        /// The guest.
        domain: Domain,
        /// The end of memory that it reports.
        end: Gpa,
        /// The address up to which is tried.
        most: Gpa,
    },
    /// The layout of RAM is impossible.
    #[error("the memory of {domain}")]
    Layout {
        /// The guest.
        domain: Domain,
        /// The fault.
        #[source]
        source: LayoutError,
    },
    /// The guest is not paused: it runs.
    #[error("LibVMI cannot pause {domain}: it runs on, and was not read")]
    Pause {
        /// The guest.
        domain: Domain,
    },
    /// The guest does not run on.
    #[error(
        "LibVMI cannot let {domain} run on: if it is still there, resume it by hand (xl unpause, virsh \
         resume)"
    )]
    Resume {
        /// The guest.
        domain: Domain,
    },
    /// Memory cannot be read.
    #[error(
        "LibVMI read {read} of {wanted} bytes of {domain} at {at}: the guest is gone, or no longer \
         has this page"
    )]
    Read {
        /// The guest.
        domain: Domain,
        /// The address.
        at: Gpa,
        /// The number of bytes that were asked for.
        wanted: usize,
        /// The number of bytes that came.
        read: usize,
    },
    /// The process that lets the guest run on if this one is killed.
    #[error("the process that watches over the pause: {action}")]
    Watchdog {
        /// The action.
        action: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The reason that LibVMI does not open a guest, as it says itself (`vmi_init_error_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitFailure {
    /// It does not say.
    NotSaid,
    /// No hypervisor was found.
    NoHypervisor,
    /// Its driver for the hypervisor does not start.
    Driver,
    /// There is no such guest.
    NotFound,
    /// The guest's page tables were not understood.
    Paging,
    /// The guest's system was not recognised.
    System,
    /// Its events do not work.
    Events,
    /// LibVMI has no configuration.
    NoConfig,
    /// The configuration has nothing of this guest.
    NoConfigEntry,
    /// A number that is not known here.
    Other(u32),
}

impl InitFailure {
    pub(crate) const fn of(error: sys::InitError) -> Self {
        match error {
            sys::INIT_ERROR_NONE => Self::NotSaid,
            sys::INIT_ERROR_DRIVER_NOT_DETECTED => Self::NoHypervisor,
            sys::INIT_ERROR_DRIVER => Self::Driver,
            sys::INIT_ERROR_VM_NOT_FOUND => Self::NotFound,
            sys::INIT_ERROR_PAGING => Self::Paging,
            sys::INIT_ERROR_OS => Self::System,
            sys::INIT_ERROR_EVENTS => Self::Events,
            sys::INIT_ERROR_NO_CONFIG => Self::NoConfig,
            sys::INIT_ERROR_NO_CONFIG_ENTRY => Self::NoConfigEntry,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for InitFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotSaid => {
                "it does not say why; mostly because it was built without a driver for such guests"
            }
            Self::NoHypervisor => "it finds no hypervisor here",
            Self::Driver => {
                "its driver does not start (for Xen run it in dom0, for KVM on the host, as root; \
                 KVM with introspection needs its socket)"
            }
            Self::NotFound => "there is no such guest",
            Self::Paging => "the guest's page tables are not what it knows",
            Self::System => "it does not recognise the guest's system",
            Self::Events => "its events do not work here",
            Self::NoConfig => "it has no configuration (/etc/libvmi.conf)",
            Self::NoConfigEntry => "its configuration has no entry of this guest",
            Self::Other(number) => return write!(f, "it gives the error {number}, not known here"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::InitFailure;
    use std::collections::HashSet;

    #[test]
    fn every_error_has_words_of_its_own() {
        let words: HashSet<String> = (0..10).map(|n| InitFailure::of(n).to_string()).collect();
        assert_eq!(words.len(), 10);
        assert_eq!(InitFailure::of(3), InitFailure::NotFound);
        assert_eq!(InitFailure::of(9), InitFailure::Other(9));
    }
}
