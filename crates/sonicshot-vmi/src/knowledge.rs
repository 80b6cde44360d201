//! The facts of a guest's kernel.

use core::fmt;

/// The sources of knowledge of a guest's kernel: the most there is, as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Knowledge {
    /// Types (BTF, DWARF): every class of pages is told.
    Types,
    /// VMCOREINFO alone: free pages are told, and offline ones in a driver's list. All others are
    /// unknown, and kept.
    Vmcoreinfo,
    /// Nothing: free pages are told by the shape of their records, and page tables that lead to
    /// them. All others are unknown, and kept.
    Shape,
    /// No kernel: a page is told by its content, if that is zero.
    Nothing,
}

impl Knowledge {
    /// Its name, as reports have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Types => "types",
            Self::Vmcoreinfo => "vmcoreinfo",
            Self::Shape => "shape",
            Self::Nothing => "nothing",
        }
    }
}

impl fmt::Display for Knowledge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
