//! Where the kernel's symbols and types come from.

use crate::KernelVa;
use core::fmt;
use std::io;
use std::path::PathBuf;

/// A member of a kernel structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Offset from the start of the structure that was asked for, in bytes.
    pub offset: u64,
    /// Size in bytes, if the source knows it.
    pub size: Option<u64>,
    /// The number of elements if the member is an array (of its outermost dimension).
    pub len: Option<u64>,
}

/// Whether a source's addresses are the ones of the running kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SymbolBase {
    /// As linked: the KASLR displacement must be added.
    Linked,
    /// As running: read from the guest's own memory.
    Running,
}

/// Symbols and types of one kernel build.
///
/// `None` means that this source does not have it, never that the kernel does not; `Err` means
/// that the source is damaged.
pub trait SymbolSource: Send + Sync + fmt::Debug {
    /// What the source is, for messages: a path, or such as `kallsyms in guest memory`.
    fn origin(&self) -> &str;

    /// Whether [`symbol`](Self::symbol) gives linked or running addresses.
    fn base(&self) -> SymbolBase {
        SymbolBase::Linked
    }

    /// Whether this is VMCOREINFO, which gives the value instead of the address of some
    /// variables (`mem_section`, `vmemmap`).
    fn is_vmcoreinfo(&self) -> bool {
        false
    }

    /// The address of symbol `name`.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        let _ = name;
        Ok(None)
    }

    /// The size of `struct` or `union` `name` in bytes.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        let _ = name;
        Ok(None)
    }

    /// The member `path` of `struct name`; `path` may be dotted (`a.b`), and members of
    /// anonymous structures and unions count as members of the one around them.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        let _ = (name, path);
        Ok(None)
    }

    /// The value of the enumerator `name`, of whatever enum.
    ///
    /// # Errors
    /// [`SymbolError`] if the source is damaged.
    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        let _ = name;
        Ok(None)
    }

    /// The kernel's build-id, if the source carries it.
    fn build_id(&self) -> Option<&[u8]> {
        None
    }

    /// The kernel's banner (`Linux version …`), if the source carries it.
    fn banner(&self) -> Option<&str> {
        None
    }
}

/// Why a source of symbols cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SymbolError {
    /// The file cannot be read.
    #[error("reading {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The file is no kind that is known.
    #[error("{} is neither a System.map, nor an ELF vmlinux, nor BTF", path.display())]
    UnknownKind {
        /// The file.
        path: PathBuf,
    },
    /// The source contradicts its own format.
    #[error("{origin}: {what} at offset {offset:#x} (value {value:#x})")]
    Malformed {
        /// Which source.
        origin: String,
        /// What is wrong.
        what: &'static str,
        /// Where, in bytes from the start of the source.
        offset: u64,
        /// The value found there.
        value: u64,
    },
}
