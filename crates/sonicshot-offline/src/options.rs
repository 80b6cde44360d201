//! Options: what may be known of a snapshot beforehand, and what is wanted of it.

use crate::disk_options::RestoreDisks;
use sonicshot::Progress;
use sonicshot_dump::{DumpFormat, DumpOptions, LayoutSpec};
use sonicshot_vmi::x86_64::Cr3;
use sonicshot_vmi::{Knowledge, OnInconsistency};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Options for opening a snapshot; by default none, and everything is found out.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Files with symbols and types of the guest's kernel.
    pub symbols: Vec<PathBuf>,
    /// The place of the file's bytes in the guest.
    pub layout: Option<LayoutSpec>,
    /// The format that the file is read as, whatever it begins with.
    pub format: Option<DumpFormat>,
    /// The memory that the file is a diff to.
    pub base: Option<PathBuf>,
    /// The `CR3` of a processor that ran the guest's kernel.
    pub cr3: Option<Cr3>,
    /// No more than this is taken of the guest and of all files; for tests.
    #[doc(hidden)]
    pub at_most: Option<Knowledge>,
    /// The most bytes that are taken in from a pipe.
    pub max_size: Option<u64>,
    /// The disks that a checkpoint has pages on.
    pub disks: RestoreDisks,
    /// Whoever is told how far it is.
    pub progress: Option<Arc<dyn Progress>>,
}

impl OpenOptions {
    /// Nothing known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a System.map, vmlinux, BTF or [small symbol file](sonicshot_vmi::symbols::SymbolFile)
    /// of the guest's kernel, or a folder of such, of which the one of the guest's build is taken.
    /// Without one everything is found in the guest's own memory.
    #[must_use]
    pub fn symbols(mut self, path: impl AsRef<Path>) -> Self {
        self.symbols.push(path.as_ref().to_owned());
        self
    }

    /// Gives the layout of a raw file, or the places of a QEMU file's blocks. It is believed as
    /// far as the guest's memory shows that it is right.
    #[must_use]
    pub fn layout(mut self, layout: LayoutSpec) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Says what the file is. [`DumpFormat::RAW`] may begin as it likes; any other must begin as
    /// one of its own.
    #[must_use]
    pub fn format(mut self, format: DumpFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// Gives the memory that the file is a diff to: a Firecracker diff snapshot is read over it.
    #[must_use]
    pub fn base(mut self, path: impl AsRef<Path>) -> Self {
        self.base = Some(path.as_ref().to_owned());
        self
    }

    /// Says how many bytes are taken in at most of what comes through a pipe, instead of
    /// [what its header allows](sonicshot_dump::Spool::from_reader_up_to).
    #[must_use]
    pub fn max_size(mut self, bytes: u64) -> Self {
        self.max_size = Some(bytes);
        self
    }

    /// Gives the disks that a checkpoint has pages on.
    #[must_use]
    pub fn disks(mut self, disks: RestoreDisks) -> Self {
        self.disks = disks;
        self
    }

    /// Says who is told how far it is, phase by phase: with what comes through a pipe or is
    /// compressed, then with the search for the kernel, the classification, and the search for zero
    /// pages.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Gives the `CR3` of a processor that ran the guest's kernel, which tells it from kernels
    /// that are gone.
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

    /// The options that a memory file is opened with; where RAM lies is `layout`.
    pub(crate) fn of_file(&self, layout: Option<&LayoutSpec>) -> DumpOptions {
        let mut known = DumpOptions::new();
        known.layout = layout.cloned();
        known.format = self.format;
        known.progress.clone_from(&self.progress);
        known
    }
}

/// Options for the analysis of a guest.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct AnalyzeOptions {
    /// Whether a guest whose records contradict each other is analysed all the same.
    pub on_inconsistency: OnInconsistency,
    /// Whether pages in use are looked into, so that those that are zero can go too. A checkpoint
    /// finds them as it is written.
    pub zero_pages: bool,
    /// Whether it is looked where on their disks the pages of files may be: for a checkpoint that refers
    /// to disks.
    pub file_places: bool,
}

impl Default for AnalyzeOptions {
    fn default() -> Self {
        Self {
            on_inconsistency: OnInconsistency::Refuse,
            zero_pages: true,
            file_places: false,
        }
    }
}

impl AnalyzeOptions {
    /// A guest that contradicts itself is refused, and pages in use are looked into.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says what becomes of a guest whose records contradict each other.
    #[must_use]
    pub fn on_inconsistency(mut self, on: OnInconsistency) -> Self {
        self.on_inconsistency = on;
        self
    }

    /// Says whether pages in use are looked into.
    #[must_use]
    pub fn zero_pages(mut self, look: bool) -> Self {
        self.zero_pages = look;
        self
    }

    /// Says whether it is looked where on their disks the pages of files may be.
    #[must_use]
    pub const fn file_places(mut self, look: bool) -> Self {
        self.file_places = look;
        self
    }
}
