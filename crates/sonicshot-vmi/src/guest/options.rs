//! Options for opening and classifying a guest.

use crate::arch::x86_64::Cr3;
use crate::error::VmiError;
use crate::knowledge::Knowledge;
use crate::symbols::{Given, SymbolSource};
use sonicshot::{Gpa, Progress};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Options for looking for a guest; by default none.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct GuestOptions {
    pub(super) symbol_files: Vec<PathBuf>,
    pub(super) sources: Vec<Arc<dyn SymbolSource>>,
    /// All of them, once they were read.
    pub(super) read: Option<Arc<Given>>,
    pub(super) vmcoreinfo: Option<Vec<u8>>,
    pub(super) vmcoreinfo_at: Option<Gpa>,
    pub(super) cr3: Option<Cr3>,
    pub(super) at_most: Option<Knowledge>,
    pub(super) threads: Option<NonZeroUsize>,
    pub(crate) progress: Option<Arc<dyn Progress>>,
    pub(super) fallbacks: Vec<Arc<dyn SymbolSource>>,
}

impl GuestOptions {
    /// Nothing known: everything is found in the guest's memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a System.map, a vmlinux, raw BTF or a [small symbol file](crate::symbols::SymbolFile)
    /// of the guest's kernel; or a folder, of which those files are taken that say that they are of
    /// the guest's build. Earlier files take precedence, and all files take precedence over what is
    /// found in memory.
    #[must_use]
    pub fn symbols(mut self, path: impl AsRef<Path>) -> Self {
        self.symbol_files.push(path.as_ref().to_owned());
        self.read = None;
        self
    }

    /// Adds a source of symbols and types of the guest's kernel that the caller has, such as what a
    /// service keeps of each build. It counts as a file that was given does, and comes behind those: one
    /// of another build is refused with [`VmiError::WrongKernel`](crate::VmiError::WrongKernel), one that
    /// tells nothing with [`SymbolError::Lacks`](crate::symbols::SymbolError::Lacks), both by its
    /// [origin](SymbolSource::origin).
    ///
    /// ```
    /// use sonicshot_vmi::symbols::{SymbolError, SymbolSource};
    /// use sonicshot_vmi::{GuestOptions, KernelVa};
    /// use std::collections::HashMap;
    /// use std::sync::Arc;
    ///
    /// /// The addresses of symbols, as the kernel was linked.
    /// #[derive(Debug)]
    /// struct Table(HashMap<String, u64>);
    ///
    /// impl SymbolSource for Table {
    ///     fn origin(&self) -> &str {
    ///         "the table of builds"
    ///     }
    ///     fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
    ///         Ok(self.0.get(name).copied().map(KernelVa::new))
    ///     }
    /// }
    ///
    /// let symbols = [("init_task".to_owned(), 0xffff_ffff_8200_0000)];
    /// let options = GuestOptions::new().source(Arc::new(Table(symbols.into())));
    /// ```
    #[must_use]
    pub fn source(mut self, source: Arc<dyn SymbolSource>) -> Self {
        self.sources.push(source);
        self.read = None;
        self
    }

    /// Reads the files that were given, so that who looks at a guest that is paused, or looks
    /// several times, need not.
    ///
    /// # Errors
    /// [`VmiError::Symbols`] if one cannot be read.
    pub fn read_symbols(mut self) -> Result<Self, VmiError> {
        self.read = Some(self.given()?);
        Ok(self)
    }

    /// The files that were given, read.
    pub(super) fn given(&self) -> Result<Arc<Given>, VmiError> {
        match &self.read {
            Some(read) => Ok(Arc::clone(read)),
            None => {
                let files = Given::open(&self.symbol_files)?;
                Ok(Arc::new(files.with(&self.sources)?))
            }
        }
    }

    /// Adds a source that is asked for symbols if the kernel has no table of them in memory, such
    /// as another tool's. What it says must agree with the kernel's VMCOREINFO, else the guest is
    /// refused with [`VmiError::WrongKernel`](crate::VmiError::WrongKernel); without VMCOREINFO it
    /// is not asked.
    #[must_use]
    pub fn fallback(mut self, source: Arc<dyn SymbolSource>) -> Self {
        self.fallbacks.push(source);
        self
    }

    /// Gives the VMCOREINFO text that the dump carries.
    #[must_use]
    pub fn vmcoreinfo(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.vmcoreinfo = Some(text.into());
        self
    }

    /// Says where the kernel's VMCOREINFO was when the memory was [looked at](crate::find_vmcoreinfo)
    /// before: that page is looked at first. It is believed no more than any other, and if there is no
    /// kernel by it, all memory is searched as without it.
    #[must_use]
    pub fn vmcoreinfo_at(mut self, at: Gpa) -> Self {
        self.vmcoreinfo_at = Some(at);
        self
    }

    /// Gives the `CR3` of the guest's processor, of one that runs and is no firmware's: the kernel
    /// that owns the memory is the one whose page tables are there. It counts instead of what the
    /// memory tells of processors.
    #[must_use]
    pub fn cr3(mut self, cr3: Cr3) -> Self {
        self.cr3 = Some(cr3);
        self
    }

    /// Takes no more than this of the guest and of all files: tests hold what less knowledge finds
    /// against what more does.
    #[doc(hidden)]
    #[must_use]
    pub fn at_most(mut self, knowledge: Knowledge) -> Self {
        self.at_most = Some(knowledge);
        self
    }

    /// The number of threads that look at struct pages; by default one for each core. The findings do
    /// not depend on it.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Says who is told how far the search and what follows it are, phase by phase.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// Whether a guest whose sources disagree is classified all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnInconsistency {
    /// It is refused with [`VmiError::Inconsistent`](crate::VmiError::Inconsistent).
    #[default]
    Refuse,
    /// Every block in question is kept, the rest is believed. Only for dumps that will never
    /// run again.
    KeepInQuestion,
}

#[cfg(test)]
mod tests {
    use super::GuestOptions;

    #[test]
    fn symbol_files_are_read_once_if_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let map = folder.path().join("System.map");
        std::fs::write(
            &map,
            "ffffffff81000000 T _stext\nffffffff81000040 T other\n",
        )
        .unwrap();
        let told = GuestOptions::new().symbols(&map);
        let read = told.clone().read_symbols().unwrap();
        std::fs::remove_file(&map).unwrap();
        assert!(read.given().is_ok());
        assert!(told.given().is_err());
        assert!(told.read_symbols().is_err());
        // What comes later is read, too.
        assert!(read.symbols(&map).given().is_err());
    }
}
