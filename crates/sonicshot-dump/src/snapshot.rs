//! The snapshot that a path names: a dump file, or the folder that a VMM keeps a snapshot in.

use crate::DumpError;
use crate::layout::LayoutSpec;
use sonicshot::{FileId, FileStamp, Processors};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, FileType};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A folder with more files than this is no VMM's.
const MAX_FILES: usize = 1024;
/// As much of each file's beginning as it takes to tell its kind, foreign ones too.
pub(crate) const START: u64 = 32;

/// A note on a VMM's files; as text, a line for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FilesNote {
    /// The layout that was given is not that of the VMM's state.
    OtherLayout {
        /// The file with the state.
        state: &'static str,
        /// Its text.
        layout: LayoutSpec,
    },
    /// The VMM's state was not understood, and the layout that was given is believed.
    NotUnderstood {
        /// The file with the state.
        state: &'static str,
        /// The fault.
        why: String,
    },
}

impl fmt::Display for FilesNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherLayout { state, layout } => {
                write!(
                    f,
                    "the layout given is not that of {state}, which is {layout}"
                )
            }
            Self::NotUnderstood { state, why } => {
                write!(
                    f,
                    "{state} was not understood, and --layout believed: {why}"
                )
            }
        }
    }
}

/// The VMM that a snapshot is of. Each is a constant of this type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vmm(&'static str);

impl Vmm {
    pub(crate) const fn named(name: &'static str) -> Self {
        Self(name)
    }

    /// The VMM's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0
    }
}

/// The path that was given as a snapshot, for a VMM to say whether it is one of its own.
pub(crate) struct Named<'a> {
    path: &'a Path,
    is_folder: bool,
    /// A file that is not the memory though it may look so: what a diff is to.
    base: Option<&'a Path>,
    layout: Option<&'a LayoutSpec>,
    /// Whether a file that begins so is of a format that says itself what it is.
    is_known: fn(&[u8], u64) -> bool,
    entries: OnceCell<(Vec<Entry>, Option<PathBuf>)>,
}

/// A file of a folder.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub path: PathBuf,
    pub len: u64,
    /// Before anything of it was read.
    stamp: FileStamp,
    /// Its first bytes.
    pub start: Vec<u8>,
    /// Whether it is of a format that says itself what it is.
    pub is_known: bool,
}

impl<'a> Named<'a> {
    pub(crate) fn new(
        path: &'a Path,
        is_folder: bool,
        base: Option<&'a Path>,
        layout: Option<&'a LayoutSpec>,
        is_known: fn(&[u8], u64) -> bool,
    ) -> Self {
        let named = Self {
            path,
            is_folder,
            base,
            layout,
            is_known,
            entries: OnceCell::new(),
        };
        if is_folder {
            // Before anything is read of its files, so that one that changes later is told by its
            // stamp. A folder that cannot be listed is refused by the first VMM that asks.
            let _ = named.listed();
        }
        named
    }

    /// As it was given.
    pub(crate) fn path(&self) -> &Path {
        self.path
    }

    /// The folder, if it is one.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.is_folder.then_some(self.path)
    }

    /// The RAM layout, if the caller gives it.
    pub(crate) fn layout(&self) -> Option<&LayoutSpec> {
        self.layout
    }

    fn listed(&self) -> Result<&(Vec<Entry>, Option<PathBuf>), DumpError> {
        if let Some(listed) = self.entries.get() {
            return Ok(listed);
        }
        let listed = entries(self.path, self.base, self.is_known)?;
        Ok(self.entries.get_or_init(|| listed))
    }

    /// The files of the folder but the base, by their names.
    pub(crate) fn entries(&self) -> Result<&[Entry], DumpError> {
        Ok(&self.listed()?.0)
    }

    /// The snapshot with its memory in the file `memory`; `beside` are the VMM's other files.
    pub(crate) fn found(&self, memory: &Path, beside: &[&Path], vmm: Vmm) -> SnapshotFiles {
        let mut files = SnapshotFiles::file(memory, self.layout);
        let names = beside.iter().filter_map(|file| file.file_name());
        files.beside = names.map(ToOwned::to_owned).collect();
        files.folder = self.folder().map(Path::to_owned);
        files.vmm = Some(vmm);
        if let Some((entries, skipped)) = self.entries.get() {
            files.skipped.clone_from(skipped);
            let named = |entry: &Entry| Some((entry.path.file_name()?.to_owned(), entry.stamp));
            files.stamps = entries.iter().filter_map(named).collect();
        }
        files
    }
}

/// The file that holds guest RAM, and what the files beside it say of it.
///
/// ```no_run
/// use sonicshot_dump::{Dump, SnapshotFiles};
/// let files = SnapshotFiles::find("snapshots/web-1", None, None)?;
/// let dump = Dump::open(files.memory(), files.layout())?;
/// # Ok::<(), sonicshot_dump::DumpError>(())
/// ```
#[derive(Debug, Clone)]
pub struct SnapshotFiles {
    memory: PathBuf,
    pub(crate) layout: Option<LayoutSpec>,
    folder: Option<PathBuf>,
    vmm: Option<Vmm>,
    /// The names of the VMM's files beside the memory.
    beside: Vec<OsString>,
    /// The stamp of each file of the folder when it was looked at.
    pub(crate) stamps: BTreeMap<OsString, FileStamp>,
    /// Whether the VMM has folders in its folder, not only files.
    pub(crate) folders: bool,
    /// The base, where it lies in the folder.
    skipped: Option<PathBuf>,
    pub(crate) processors: Processors,
    pub(crate) notes: Vec<FilesNote>,
}

impl SnapshotFiles {
    /// The file `memory` by itself, which is not looked at.
    #[must_use]
    pub fn file(memory: &Path, layout: Option<&LayoutSpec>) -> Self {
        Self {
            memory: memory.to_owned(),
            layout: layout.cloned(),
            folder: None,
            vmm: None,
            beside: Vec::new(),
            stamps: BTreeMap::new(),
            folders: false,
            skipped: None,
            processors: Processors::Unknown,
            notes: Vec::new(),
        }
    }

    /// The file that holds guest RAM.
    #[must_use]
    pub fn memory(&self) -> &Path {
        &self.memory
    }

    /// The RAM layout of the guest, as the caller or the VMM's state gives it; `None` if neither
    /// does.
    #[must_use]
    pub fn layout(&self) -> Option<&LayoutSpec> {
        self.layout.as_ref()
    }

    /// The base of a diff, if it lies in the folder: it is no part of the snapshot.
    #[must_use]
    pub fn base(&self) -> Option<&Path> {
        self.skipped.as_deref()
    }

    /// The folder, if one was given.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The VMM that made the snapshot, if its files tell.
    #[must_use]
    pub fn vmm(&self) -> Option<Vmm> {
        self.vmm
    }

    /// The processors by the VMM's state, to go with the memory:
    /// [`Dump::with_processors`](crate::Dump::with_processors).
    #[must_use]
    pub fn processors(&self) -> &Processors {
        &self.processors
    }

    /// Notes for people.
    #[must_use]
    pub fn notes(&self) -> &[FilesNote] {
        &self.notes
    }

    /// Whether a file of this name in the folder is one of the VMM's.
    pub(crate) fn is_of_vmm(&self, name: &OsStr) -> bool {
        self.memory.file_name() == Some(name) || self.beside.iter().any(|file| file == name)
    }
}

/// Refuses what is no regular file of a snapshot's folder.
pub(crate) fn check_is_file(path: &Path, is: FileType) -> Result<(), DumpError> {
    if is.is_file() {
        return Ok(());
    }
    Err(DumpError::Folder {
        path: path.to_owned(),
        why: "it is not a regular file, and a snapshot's folder holds only such",
    })
}

/// The regular files of a folder, but `base`; and where that is, if it is there.
fn entries(
    folder: &Path,
    base: Option<&Path>,
    is_known: fn(&[u8], u64) -> bool,
) -> Result<(Vec<Entry>, Option<PathBuf>), DumpError> {
    let base = base.and_then(|base| FileId::of_path(base).ok());
    let mut entries = Vec::new();
    let mut skipped = None;
    for entry in fs::read_dir(folder).map_err(DumpError::io("reading", folder))? {
        let path = entry.map_err(DumpError::io("reading", folder))?.path();
        let reading = || DumpError::io("reading", &path);
        let metadata = fs::metadata(&path).map_err(reading())?;
        if base == Some(FileId::from(&metadata)) {
            skipped = Some(path);
            continue;
        }
        if !metadata.is_file() {
            continue;
        }
        if entries.len() >= MAX_FILES {
            return Err(DumpError::NotASnapshot {
                path: folder.to_owned(),
            });
        }
        let mut start = Vec::new();
        let file = File::open(&path).map_err(reading())?;
        file.take(START)
            .read_to_end(&mut start)
            .map_err(reading())?;
        entries.push(Entry {
            len: metadata.len(),
            stamp: FileStamp::from(&metadata),
            is_known: is_known(&start, metadata.len()),
            start,
            path,
        });
    }
    // In the order of their names, for messages.
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok((entries, skipped))
}
