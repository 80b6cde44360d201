//! The architectures of guests.

use core::fmt;

/// The architecture of a guest's processors.
///
/// ```
/// use sonicshot::Architecture;
/// assert_eq!(Architecture::from_elf_machine(62), Some(Architecture::X86_64));
/// assert_eq!(Architecture::from_elf_machine(0), None);
/// assert_eq!(Architecture::Aarch64.to_string(), "aarch64");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Architecture {
    /// x86-64: ELF's machine 62.
    X86_64,
    /// arm64: ELF's machine 183.
    Aarch64,
    /// Another one, by ELF's number of it (`e_machine`): its memory can be stored and restored, but
    /// not be looked into.
    Other(u16),
}

impl Architecture {
    /// The architecture with ELF's number `machine`; `None` for 0 (`EM_NONE`), which says nothing.
    #[must_use]
    pub const fn from_elf_machine(machine: u16) -> Option<Self> {
        match machine {
            0 => None,
            62 => Some(Self::X86_64),
            183 => Some(Self::Aarch64),
            other => Some(Self::Other(other)),
        }
    }

    /// ELF's number of it (`e_machine`).
    #[must_use]
    pub const fn elf_machine(self) -> u16 {
        match self {
            Self::X86_64 => 62,
            Self::Aarch64 => 183,
            Self::Other(other) => other,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::X86_64 => f.pad("x86_64"),
            Self::Aarch64 => f.pad("aarch64"),
            Self::Other(other) => write!(f, "ELF machine {other}"),
        }
    }
}
