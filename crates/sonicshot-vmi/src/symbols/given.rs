//! The symbol files that a caller gives: single ones, and folders of them.

use super::elf::build_id_in;
use super::file::build_id_of;
use super::{SymbolError, SymbolSource, hex, open_symbol_file};
use crate::needs::{STRUCTURES, SYMBOLS};
use crate::note::Note;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// A fleet has some tens of builds; a folder with more files than this is no folder of symbols.
const MAX_FILES: usize = 1 << 12;
/// As much of a file's beginning as it takes to tell what it is.
const START: u64 = 4096;

/// Single files, and folders.
#[derive(Debug)]
pub(crate) struct Given {
    files: Vec<(PathBuf, Arc<dyn SymbolSource>)>,
    folders: Vec<Folder>,
}

/// A folder with a file for each build.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Those that say of which build they are, by their names.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    build_id: Vec<u8>,
    /// Once it was opened: a vmlinux has a gigabyte.
    opened: OnceLock<Arc<dyn SymbolSource>>,
    /// The trouble with it, if it was to be opened and could not be.
    damaged: OnceLock<String>,
}

/// Sources that are of one build, as far as they tell.
pub(crate) type Set = Vec<Arc<dyn SymbolSource>>;

impl Given {
    /// Opens the files, and looks through the folders, at `paths`.
    pub(crate) fn open(paths: &[PathBuf]) -> Result<Self, SymbolError> {
        let mut given = Self {
            files: Vec::new(),
            folders: Vec::new(),
        };
        for path in paths {
            if path.is_dir() {
                given.folders.push(Folder::open(path)?);
            } else {
                let source = open_symbol_file(path)?;
                given.files.push((path.clone(), source.into()));
            }
        }
        Ok(given)
    }

    /// The same with `sources`, which count as single files. As an empty file is, one that tells
    /// nothing is refused.
    pub(crate) fn with(mut self, sources: &[Arc<dyn SymbolSource>]) -> Result<Self, SymbolError> {
        for source in sources {
            if !tells_anything(source.as_ref())? {
                return Err(SymbolError::Lacks {
                    origin: source.origin().to_owned(),
                    what: "any symbol or type that is read of a kernel",
                });
            }
        }
        let named = sources.iter();
        let named = named.map(|source| (PathBuf::from(source.origin()), Arc::clone(source)));
        self.files.extend(named);
        Ok(self)
    }

    /// The sources for the kernel with this build ID: the single files, and those of the folders that
    /// are of the build.
    pub(crate) fn of_build(&self, id: Option<&[u8]>) -> Result<Set, SymbolError> {
        let mut sources = self.files();
        if let Some(id) = id {
            for folder in &self.folders {
                sources.extend(folder.of_build(id)?);
            }
        }
        Ok(sources)
    }

    /// The sources that may be of a kernel that does not tell its build: the single files together,
    /// and each of the folders' that `is_there` takes for one of the memory's.
    pub(crate) fn sets(&self, is_there: &dyn Fn(&[u8]) -> bool) -> Result<Vec<Set>, SymbolError> {
        let mut sets = Vec::new();
        if !self.files.is_empty() {
            sets.push(self.files());
        }
        // A folder may have two files of a build, and a file of it may be given beside the folder: the
        // same kernel is not to be found twice.
        let mut ids: HashSet<&[u8]> = self
            .files
            .iter()
            .filter_map(|(_, source)| source.build_id())
            .collect();
        for folder in &self.folders {
            for entry in &folder.entries {
                let id = entry.build_id.as_slice();
                if is_there(id)
                    && ids.insert(id)
                    && let Some(source) = folder.of_build(id)?
                {
                    sets.push(vec![source]);
                }
            }
        }
        Ok(sets)
    }

    /// Whether none was given.
    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.folders.is_empty()
    }

    /// Whether a folder was.
    pub(crate) fn has_folders(&self) -> bool {
        !self.folders.is_empty()
    }

    /// The report on what was given, where the kernel of the build `id`, if it tells that, is
    /// read by `used`.
    pub(crate) fn notes(&self, used: &[Arc<dyn SymbolSource>], id: Option<&[u8]>) -> Vec<Note> {
        let is_used =
            |source: &Arc<dyn SymbolSource>| used.iter().any(|other| Arc::ptr_eq(other, source));
        let files = self.files.iter().filter(|(_, source)| !is_used(source));
        let files: Vec<PathBuf> = files.map(|(path, _)| path.clone()).collect();
        let mut notes = Vec::new();
        if !files.is_empty() {
            notes.push(Note::SymbolFilesNotUsed { files });
        }
        for folder in &self.folders {
            let mut opened = folder.entries.iter().filter_map(|entry| entry.opened.get());
            if !opened.any(is_used) {
                notes.push(Note::SymbolFolderNotUsed {
                    folder: folder.path.clone(),
                    files: folder.entries.len(),
                    build_id: id.map(hex),
                });
            }
            let damaged = |entry: &Entry| {
                Some(Note::SymbolFileDamaged {
                    file: entry.path.clone(),
                    why: entry.damaged.get()?.clone(),
                })
            };
            notes.extend(folder.entries.iter().filter_map(damaged));
        }
        notes
    }

    fn files(&self) -> Vec<Arc<dyn SymbolSource>> {
        self.files
            .iter()
            .map(|(_, source)| Arc::clone(source))
            .collect()
    }
}

/// Whether a source has any of what is read of a kernel.
fn tells_anything(source: &dyn SymbolSource) -> Result<bool, SymbolError> {
    for symbol in SYMBOLS {
        if source.symbol(symbol.name)?.is_some() {
            return Ok(true);
        }
    }
    for structure in STRUCTURES {
        if source.type_size(structure.name)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Folder {
    fn open(path: &Path) -> Result<Self, SymbolError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| SymbolError::Io { path, source }
        };
        let mut entries = Vec::new();
        for (number, entry) in fs::read_dir(path).map_err(failed(path))?.enumerate() {
            if number >= MAX_FILES {
                return Err(SymbolError::Folder {
                    path: path.to_owned(),
                    most: MAX_FILES,
                });
            }
            let file = entry.map_err(failed(path))?.path();
            // A link may lead to one; what is no file may never answer.
            if !file.is_file() {
                continue;
            }
            // One that is not to be read, or whose build is not told, is none that can be picked.
            if let Some(build_id) = build_id_at(&file) {
                entries.push(Entry {
                    path: file,
                    build_id,
                    opened: OnceLock::new(),
                    damaged: OnceLock::new(),
                });
            }
        }
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(Self {
            path: path.to_owned(),
            entries,
        })
    }

    /// Those of a build: of several the smallest is read that can be, which is no vmlinux.
    fn of_build(&self, id: &[u8]) -> Result<Option<Arc<dyn SymbolSource>>, SymbolError> {
        let entries = self.entries.iter().filter(|entry| entry.build_id == id);
        let mut entries: Vec<&Entry> = entries.collect();
        entries.sort_by_key(|entry| {
            let len = fs::metadata(&entry.path).map(|file| file.len()).ok();
            (len.is_none(), len)
        });
        let mut why = None;
        for entry in entries {
            match entry.open() {
                Ok(source) => return Ok(Some(source)),
                Err(error) => {
                    entry.damaged.get_or_init(|| error.to_string());
                    why.get_or_insert(error);
                }
            }
        }
        why.map_or(Ok(None), Err)
    }
}

impl Entry {
    fn open(&self) -> Result<Arc<dyn SymbolSource>, SymbolError> {
        if let Some(opened) = self.opened.get() {
            return Ok(Arc::clone(opened));
        }
        let source: Arc<dyn SymbolSource> = open_symbol_file(&self.path)?.into();
        Ok(Arc::clone(self.opened.get_or_init(|| source)))
    }
}

/// The build ID that the file at `path` names, without reading much of it.
fn build_id_at(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    let mut start = Vec::new();
    (&file).take(START).read_to_end(&mut start).ok()?;
    match start.as_slice() {
        [0x7f, b'E', b'L', b'F', ..] => build_id_in(&file, &start),
        start => build_id_of(start),
    }
}

#[cfg(test)]
mod tests {
    use super::{Given, MAX_FILES};
    use crate::note::Note;
    use crate::symbols::{MAX_NOTES, SymbolError};
    use std::fs;

    fn text(id: &str) -> String {
        format!("SonicShot symbols 1\nbuild-id {id}\nend 0\n")
    }

    /// An ELF file with one section, of notes that begin with a build ID.
    fn elf(notes: usize) -> Vec<u8> {
        let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        out.resize(58, 0);
        out[40] = 64;
        out.extend([64_u16, 1, 0].map(u16::to_le_bytes).concat());
        let mut section = vec![0; 64];
        section[4] = 7;
        section[24] = 128;
        section[32..40].copy_from_slice(&(notes as u64).to_le_bytes());
        out.extend(section);
        out.extend([4_u32, 4, 3].map(u32::to_le_bytes).concat());
        out.extend(b"GNU\0\x01\x02\x03\x04");
        out.resize(128 + notes, 0);
        out
    }

    #[test]
    fn of_a_vmlinux_no_more_notes_are_read_than_a_kernel_has() {
        let folder = tempfile::tempdir().unwrap();
        let most = usize::try_from(MAX_NOTES).unwrap();
        for (name, notes) in [("a", most), ("b", most + 1)] {
            fs::write(folder.path().join(name), elf(notes)).unwrap();
        }
        let given = Given::open(&[folder.path().to_owned()]).unwrap();
        let entries = &given.folders[0].entries;
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].build_id, [1, 2, 3, 4]);
        assert!(entries[0].path.ends_with("a"));
    }

    #[test]
    fn a_folder_of_more_files_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..=MAX_FILES {
            fs::write(folder.path().join(number.to_string()), "").unwrap();
        }
        let error = Given::open(&[folder.path().to_owned()]).unwrap_err();
        assert!(matches!(error, SymbolError::Folder { .. }), "{error}");
        fs::remove_file(folder.path().join("0")).unwrap();
        assert!(Given::open(&[folder.path().to_owned()]).is_ok());
    }

    #[test]
    fn a_folder_has_those_files_that_name_their_build() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        put("a", &text("0a0b"));
        put("b", &text("0c"));
        put("System.map", "ffffffff81000000 T _stext\n");
        put("notes.txt", "SonicShot symbols 1\nbanner x\n");
        fs::create_dir(folder.path().join("deeper")).unwrap();
        let given = Given::open(&[folder.path().to_owned()]).unwrap();
        let ids: Vec<_> = given.folders[0]
            .entries
            .iter()
            .map(|e| e.build_id.clone())
            .collect();
        assert_eq!(ids, [vec![0x0a, 0x0b], vec![0x0c]]);
        // None is opened that is not of the build: these are damaged.
        assert!(given.of_build(Some(&[0x0d])).unwrap().is_empty());
        assert!(given.of_build(None).unwrap().is_empty());
        assert!(given.of_build(Some(&[0x0c])).is_err());
        let note = |id: Option<&[u8]>| given.notes(&[], id).remove(0);
        for (id, build_id) in [(Some(&[0x0d][..]), Some("0d".into())), (None, None)] {
            let folder = folder.path().to_owned();
            let files = 2;
            assert_eq!(
                note(id),
                Note::SymbolFolderNotUsed {
                    folder,
                    files,
                    build_id
                }
            );
        }
    }
}
