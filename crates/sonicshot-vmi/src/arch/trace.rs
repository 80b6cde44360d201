//! The traces that a later owner of the memory leaves behind: a trace, and what a test for one comes to.

use crate::KernelVa;
use crate::error::VmiError;
use crate::kernel::Kernel;
use core::fmt;
use sonicshot::{Gpa, GpaRange};

/// One thing in memory that the kernel found does not leave so while it owns the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Trace {
    /// `system_state` says that the kernel has gone, or is not up.
    State {
        /// Its address.
        at: KernelVa,
        /// Its value.
        value: u32,
        /// The name of the value, if the kernel's types tell.
        name: Option<&'static str>,
    },
    /// `kexec_in_progress` is set.
    Kexec {
        /// Its address.
        at: KernelVa,
    },
    /// The kernel has died.
    Panic {
        /// The variable that says so.
        variable: &'static str,
        /// Its address.
        at: KernelVa,
        /// The processor that died.
        cpu: i32,
    },
    /// The kernel's log ends with its going.
    Log {
        /// Its text.
        line: String,
    },
    /// The BIOS started after the kernel did. Both times in seconds since midnight.
    BiosClock {
        /// Ticks in the BIOS's data area, in seconds.
        bios: u64,
        /// The kernel's clock when it booted.
        kernel: u64,
    },
    /// A table of the firmware is not where and what the kernel found.
    Firmware {
        /// The table.
        what: String,
        /// The address at which the kernel found it.
        at: Gpa,
        /// The content.
        found: String,
    },
    /// A record of the kernel's own, written once, holds something else.
    Record {
        /// The record.
        what: &'static str,
        /// Its address.
        at: KernelVa,
        /// Its content.
        value: u64,
        /// The value that the kernel put there.
        expected: u64,
    },
    /// A record of the kernel's own cannot be followed.
    Broken {
        /// The test that could not be finished.
        test: &'static str,
        /// The reason.
        why: String,
    },
}

impl Trace {
    /// Whether it is the kernel itself that says that it ended, in what no process of it can write.
    pub(crate) fn is_of_an_end(&self) -> bool {
        match self {
            Self::Kexec { .. } | Self::Panic { .. } => true,
            Self::State { name, .. } => name.is_some_and(|name| {
                ["SYSTEM_HALT", "SYSTEM_POWER_OFF", "SYSTEM_RESTART"].contains(&name)
            }),
            _ => false,
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State { at, value, name } => {
                let name = name.unwrap_or("not the state of a kernel that runs");
                write!(f, "system_state at {at} is {value} ({name})")
            }
            Self::Kexec { at } => write!(f, "kexec_in_progress at {at} is set"),
            Self::Panic { variable, at, cpu } => {
                write!(f, "{variable} at {at} is {cpu}: the kernel has died")
            }
            Self::Log { line } => write!(f, "the kernel's log says `{line}`"),
            Self::BiosClock { bios, kernel } => {
                let clock = |s: u64| format!("{:02}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
                write!(
                    f,
                    "the BIOS's clock at 0x46c stands at {}, and the kernel booted at {}",
                    clock(*bios),
                    clock(*kernel)
                )
            }
            Self::Firmware { what, at, found } => {
                write!(f, "{what}, which the kernel found at {at}, {found}")
            }
            Self::Record {
                what,
                at,
                value,
                expected,
            } => write!(f, "{what} at {at} is {value:#x}, not {expected:#x}"),
            Self::Broken { test, why } => write!(f, "{test}: {why}"),
        }
    }
}

/// The findings of all tests.
#[derive(Debug, Default, Clone)]
pub(crate) struct Owner {
    pub traces: Vec<Trace>,
    /// Tests that found nothing.
    pub clean: Vec<&'static str>,
    /// Tests that could not be made, and why.
    pub not_made: Vec<(&'static str, String)>,
    /// Ranges that a later owner may have written to that has not come as far as to leave a trace.
    pub in_question: Vec<GpaRange>,
    /// The reason that it cannot be told whether there is a later owner, if so.
    pub untold: Option<String>,
}

/// The result of a test.
pub(crate) enum Verdict {
    /// Nothing found.
    Clean,
    /// The test cannot be made.
    NotMade(String),
    Traces(Vec<Trace>),
    /// Nothing found, but what may have been written here.
    CleanBut(Vec<GpaRange>),
    /// Nothing can be found, and nothing else would show what this test would.
    Untold(String),
    /// There is nothing of what it looks at.
    NotHere,
}

impl From<Vec<Trace>> for Verdict {
    fn from(traces: Vec<Trace>) -> Self {
        if traces.is_empty() {
            Self::Clean
        } else {
            Self::Traces(traces)
        }
    }
}

/// A test that cannot be made, and why.
pub(crate) fn not_made(why: impl Into<String>) -> Result<Verdict, VmiError> {
    Ok(Verdict::NotMade(why.into()))
}

/// A test for a trace.
pub(crate) type Test = fn(&Kernel<'_>) -> Result<Verdict, VmiError>;
