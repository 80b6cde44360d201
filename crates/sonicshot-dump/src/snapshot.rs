//! What a path names: a dump file, or the folder that a VMM keeps a snapshot in.

use crate::format::cloud_hypervisor::{self, CONFIG, MEMORY, STATE};
use crate::format::firecracker::{self, Entry};
use crate::{DumpError, LayoutSpec};
use sonicshot::Processors;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A folder with more files than this is no VMM's.
const MAX_FILES: usize = 1024;
/// As much of each file's beginning as it takes to tell its kind.
const START: u64 = 16;

/// The VMM that a folder is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vmm {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

impl Vmm {
    /// The VMM's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Firecracker => "Firecracker",
        }
    }
}

/// Which file holds guest RAM, and what the files beside it say of it.
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
    layout: Option<LayoutSpec>,
    folder: Option<PathBuf>,
    vmm: Option<Vmm>,
    not_fresh: bool,
    /// The base, where it lies in the folder.
    skipped: Option<PathBuf>,
    processors: Processors,
    notes: Vec<String>,
}

impl SnapshotFiles {
    /// Looks at `path`: a file is the memory itself; a folder is Cloud Hypervisor's or a
    /// Firecracker pair, and nothing else. What lies deeper is not looked at.
    ///
    /// `base` is a file that is not the memory though it may look so: what a diff is to. `layout`
    /// is where RAM lies if the caller knows better; then a state that cannot be read is only
    /// noted.
    ///
    /// # Errors
    /// [`DumpError::NotASnapshot`], [`DumpError::Ambiguous`], and what is wrong with the VMM's
    /// state.
    pub fn find(
        path: impl AsRef<Path>,
        base: Option<&Path>,
        layout: Option<&LayoutSpec>,
    ) -> Result<Self, DumpError> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(DumpError::io("opening", path))?;
        if !metadata.is_dir() {
            // To open a pipe that nobody writes would take for ever.
            if !metadata.is_file() {
                return Err(DumpError::NotADump {
                    path: path.to_owned(),
                    why: "it is not a regular file; what comes through a pipe is given as `-`",
                });
            }
            let mut files = Self::file(path, layout);
            let named = path.file_name().is_some_and(|name| name == MEMORY);
            if named && path.with_file_name(STATE).is_file() {
                files.read_cloud_hypervisor(layout)?;
            }
            return Ok(files);
        }
        if path.join(STATE).is_file() && path.join(CONFIG).is_file() {
            let memory = path.join(MEMORY);
            if !memory.is_file() {
                return Err(DumpError::NotADump {
                    path: path.to_owned(),
                    why: "it is a Cloud Hypervisor snapshot without `memory-ranges`: all of its \
                          memory is in files elsewhere",
                });
            }
            let mut files = Self::file(&memory, layout);
            files.folder = Some(path.to_owned());
            files.read_cloud_hypervisor(layout)?;
            return Ok(files);
        }
        let (entries, skipped) = entries(path, base)?;
        let Some((memory, state)) = firecracker::memory_of(path, &entries)? else {
            return Err(DumpError::NotASnapshot {
                path: path.to_owned(),
            });
        };
        let mut files = Self::file(&memory, layout);
        files.folder = Some(path.to_owned());
        files.vmm = Some(Vmm::Firecracker);
        files.processors = firecracker::processors(&state);
        files.skipped = skipped;
        Ok(files)
    }

    /// The file `memory` by itself, which is not looked at.
    #[must_use]
    pub fn file(memory: &Path, layout: Option<&LayoutSpec>) -> Self {
        Self {
            memory: memory.to_owned(),
            layout: layout.cloned(),
            folder: None,
            vmm: None,
            not_fresh: false,
            skipped: None,
            processors: Processors::Unknown,
            notes: Vec::new(),
        }
    }

    fn read_cloud_hypervisor(&mut self, given: Option<&LayoutSpec>) -> Result<(), DumpError> {
        self.vmm = Some(Vmm::CloudHypervisor);
        let reading = DumpError::io("reading", &self.memory);
        let len = fs::metadata(&self.memory).map_err(reading)?.len();
        let config = self.memory.with_file_name(CONFIG);
        if config.is_file() {
            self.not_fresh = cloud_hypervisor::has_private_file(&config)?;
        }
        self.processors = cloud_hypervisor::processors(&self.memory.with_file_name(STATE));
        match cloud_hypervisor::layout(&self.memory.with_file_name(STATE), len) {
            Ok(layout) if given.is_none() => self.layout = Some(layout),
            Ok(layout) => {
                if given.is_some_and(|given| given.ranges(len) != layout.ranges(len)) {
                    let note =
                        format!("the layout given is not that of {STATE}, which is {layout}");
                    self.notes.push(note);
                }
            }
            Err(error) if given.is_some() => {
                let note = format!("{STATE} was not understood, and --layout believed: {error}");
                self.notes.push(note);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The file that holds guest RAM.
    #[must_use]
    pub fn memory(&self) -> &Path {
        &self.memory
    }

    /// Where RAM lies in the guest, as the caller or the VMM's state says; `None` if neither
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

    /// What the VMM's state tells of the processors, to go with the memory:
    /// [`Dump::with_processors`](crate::Dump::with_processors).
    #[must_use]
    pub fn processors(&self) -> &Processors {
        &self.processors
    }

    /// What is worth knowing, for people.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Refuses a snapshot whose VMM would not read a hole as zero.
    ///
    /// # Errors
    /// [`DumpError::CannotPrune`].
    pub fn check_prunable(&self) -> Result<(), DumpError> {
        if !self.not_fresh {
            return Ok(());
        }
        Err(DumpError::CannotPrune {
            path: self.memory.clone(),
            why: "by its config.json some of the guest's memory is a private mapping of a file, \
                  and Cloud Hypervisor leaves what that file holds where the snapshot has a hole",
        })
    }
}

/// The regular files of a folder, but `base`; and where that is, if it is there.
fn entries(folder: &Path, base: Option<&Path>) -> Result<(Vec<Entry>, Option<PathBuf>), DumpError> {
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let base = base.and_then(identity);
    let mut entries = Vec::new();
    let mut skipped = None;
    for entry in fs::read_dir(folder).map_err(DumpError::io("reading", folder))? {
        let path = entry.map_err(DumpError::io("reading", folder))?.path();
        let reading = || DumpError::io("reading", &path);
        let metadata = fs::metadata(&path).map_err(reading())?;
        if base == Some((metadata.dev(), metadata.ino())) {
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
            start,
            path,
        });
    }
    // In the order of their names, for messages.
    entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok((entries, skipped))
}
