//! A snapshot as a path names it: its files, and the opening of its memory.

use crate::error::OfflineError;
use crate::note::Note;
use crate::options::OpenOptions;
use sonicshot::{FileStamp, Processors};
use sonicshot_dump::{Dump, DumpError, LayoutSpec, SnapshotFiles, Spool, Vmm, check_not_in_use};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A guest's memory in a file, in a VMM's folder, in a diff over its base, or from a pipe.
///
/// What is wrong with the path is told by [`open`](Self::open), what is wrong with the content by
/// what is done with it.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    files: SnapshotFiles,
    options: OpenOptions,
    /// The content of what came through a pipe or was compressed, once it is there.
    spool: OnceLock<Spool>,
    /// What the files were when it was opened.
    stamps: Vec<(PathBuf, FileStamp)>,
}

impl Snapshot {
    /// Looks at what `path` names: a file of any format that
    /// [`sonicshot-dump`](sonicshot_dump) reads, or the folder of a VMM's snapshot.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if there is no such file, or no snapshot in the folder.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self, OfflineError> {
        let path = path.as_ref();
        let files = SnapshotFiles::find(path, options.base.as_deref(), options.layout.as_ref())?;
        let names = [Some(files.memory()), options.base.as_deref()];
        let stamp = |path: &Path| Some((path.to_owned(), FileStamp::of_path(path).ok()?));
        let stamps = names.into_iter().flatten().filter_map(stamp).collect();
        Ok(Self {
            path: path.to_owned(),
            files,
            options: options.clone(),
            spool: OnceLock::new(),
            stamps,
        })
    }

    /// Takes all that comes through a pipe, which messages call `name`. It is put into a nameless
    /// temporary file, for a kernel is not read from front to back.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if it cannot be read to its end, or there is no room for it.
    pub fn from_reader(
        name: impl AsRef<Path>,
        reader: impl Read,
        options: &OpenOptions,
    ) -> Result<Self, OfflineError> {
        let name = name.as_ref();
        let spool = Spool::from_reader_up_to(name, reader, options.max_size)?;
        Ok(Self {
            path: name.to_owned(),
            files: SnapshotFiles::file(name, options.layout.as_ref()),
            options: options.clone(),
            spool: OnceLock::from(spool),
            stamps: Vec::new(),
        })
    }

    /// What it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file with the guest's memory.
    #[must_use]
    pub fn memory_file(&self) -> &Path {
        self.files.memory()
    }

    /// The VMM that made it, if its files tell.
    #[must_use]
    pub fn vmm(&self) -> Option<Vmm> {
        self.files.vmm()
    }

    /// Refuses a snapshot whose VMM would not read a hole as zero. Every prune does so too; this is
    /// for those who want to know before they look at the guest.
    ///
    /// # Errors
    /// [`DumpError::CannotPrune`] as [`OfflineError::Dump`].
    pub fn check_prunable(&self) -> Result<(), OfflineError> {
        Ok(self.files.check_prunable()?)
    }

    /// Refuses a memory file that a process has open for writing. A prune in place does so too, at
    /// its last moment.
    ///
    /// # Errors
    /// [`DumpError::InUse`] or [`DumpError::MayBeInUse`] as [`OfflineError::Dump`].
    pub fn check_not_in_use(&self) -> Result<(), OfflineError> {
        Ok(check_not_in_use(self.memory_file())?)
    }

    /// Refuses files that were changed since this was opened: what is known of them is of no use.
    ///
    /// # Errors
    /// [`DumpError::Changed`] or [`DumpError::Modified`] as [`OfflineError::Dump`].
    pub fn check_unchanged(&self) -> Result<(), OfflineError> {
        for (path, before) in &self.stamps {
            let now = FileStamp::of_path(path).map_err(OfflineError::io("reading", path))?;
            DumpError::check_same(path, *before, now)?;
        }
        Ok(())
    }

    /// What is wrong with a file that has changed says less than that it has.
    pub(crate) fn blame(&self, error: OfflineError) -> OfflineError {
        self.check_unchanged().err().unwrap_or(error)
    }

    /// What is known beforehand.
    pub(crate) fn options(&self) -> &OpenOptions {
        &self.options
    }

    pub(crate) fn files(&self) -> &SnapshotFiles {
        &self.files
    }

    /// Opens the memory, over its base if one was given, with what the VMM's state beside it tells
    /// of the processors.
    pub(crate) fn dump(&self, layout: Option<&LayoutSpec>) -> Result<Dump, DumpError> {
        let dump = self.memory(layout)?;
        Ok(match self.files.processors() {
            Processors::Unknown => dump,
            told => dump.with_processors(told.clone()),
        })
    }

    fn memory(&self, layout: Option<&LayoutSpec>) -> Result<Dump, DumpError> {
        if let Some(base) = &self.options.base {
            return Dump::open_over(self.memory_file(), base, layout);
        }
        if let Some(spool) = self.spool.get() {
            return Dump::open_spooled(spool, layout);
        }
        let dump = Dump::open(self.memory_file(), layout)?;
        if let Some(spool) = dump.spool() {
            // Another thread may have been first: one is as good as the other.
            let _ = self.spool.set(spool.clone());
        }
        Ok(dump)
    }

    /// What to say of a file that somebody may be writing while it is read.
    pub(crate) fn in_use(&self) -> Option<Note> {
        match check_not_in_use(self.memory_file()) {
            Err(DumpError::InUse { path, writer }) => Some(Note::InUse { path, writer }),
            _ => None,
        }
    }

    /// What the files beside the memory say, and whether somebody is writing it.
    pub(crate) fn notes(&self) -> Vec<Note> {
        let files = self.files.notes().iter().cloned().map(Note::Files);
        files.chain(self.in_use()).collect()
    }
}
