//! A folder that appears whole or not at all.

use crate::{DumpError, Overwrite, SnapshotFiles};
use rustix::fs::{CWD, RenameFlags, SeekFrom, copy_file_range, renameat_with, seek};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Longest stretch that is copied at once.
const COPY: u64 = 1 << 20;

/// A snapshot folder that is being written: a copy of another's files, all but the memory.
///
/// It is written under another name beside its own, and gets its own when everything is on disk;
/// if it is dropped before, it is removed.
#[derive(Debug)]
pub struct NewFolder {
    temporary: TempDir,
    memory: OsString,
    path: PathBuf,
    overwrite: Overwrite,
}

impl NewFolder {
    /// Begins to write the folder `path`, for a snapshot like `files`, which must have been
    /// given as a folder. A base in it is left out: what is written needs none.
    ///
    /// What is replaced by [`Overwrite::Replace`] must be a snapshot folder too.
    ///
    /// # Errors
    /// [`DumpError::Exists`], [`DumpError::SameFile`], or what copying gives; nothing is left
    /// then.
    pub fn create(
        path: &Path,
        overwrite: Overwrite,
        files: &SnapshotFiles,
    ) -> Result<Self, DumpError> {
        let refuse = |path: &Path, why| DumpError::Folder {
            path: path.to_owned(),
            why,
        };
        let (Some(input), Some(memory)) = (files.folder(), files.memory().file_name()) else {
            return Err(refuse(files.memory(), "it was not given as a folder"));
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let real = |path: &Path| fs::canonicalize(path).map_err(DumpError::io("opening", path));
        let real_input = real(input)?;
        if real(parent)?.starts_with(&real_input) {
            return Err(refuse(path, "it would lie in the folder that is copied"));
        }
        // Not followed, for it is the link itself that would be replaced.
        if let Ok(there) = fs::symlink_metadata(path) {
            if real(path).is_ok_and(|real| real == real_input) {
                return Err(DumpError::SameFile { path: path.into() });
            }
            if overwrite == Overwrite::Refuse {
                return Err(DumpError::Exists { path: path.into() });
            }
            if !there.is_dir() || SnapshotFiles::find(path, None, None).is_err() {
                return Err(refuse(path, "only a snapshot's folder is replaced by one"));
            }
            only_files(path)?;
        }
        let names = only_files(input)?;
        let temporary = tempfile::Builder::new()
            .prefix(".sonicshot-")
            .tempdir_in(parent)
            .map_err(DumpError::io("creating a folder in", parent))?;
        let base = files.base().and_then(Path::file_name);
        let others = names
            .iter()
            .filter(|name| name.as_os_str() != memory && Some(name.as_os_str()) != base);
        for name in others {
            copy(&input.join(name), &temporary.path().join(name))?;
        }
        let mode = fs::metadata(input).map(|metadata| metadata.permissions());
        let set = mode.and_then(|mode| fs::set_permissions(temporary.path(), mode));
        set.map_err(DumpError::io("writing", temporary.path()))?;
        Ok(Self {
            memory: memory.to_owned(),
            temporary,
            path: path.into(),
            overwrite,
        })
    }

    /// Where the memory is to be written, before [`finish`](Self::finish).
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.temporary.path().join(&self.memory)
    }

    /// Makes the folder durable and gives it its name.
    ///
    /// # Errors
    /// What the operating system says; the folder then has not appeared, and one that was to be
    /// replaced is there as it was.
    pub fn finish(self) -> Result<(), DumpError> {
        let naming = DumpError::io("giving its name to", &self.path);
        sync(self.temporary.path())?;
        let (from, to) = (self.temporary.path(), self.path.as_path());
        let exchanged = match self.overwrite {
            Overwrite::Replace => match renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE) {
                Ok(()) => true,
                Err(Errno::NOENT) => false,
                Err(error) => return Err(naming(error.into())),
            },
            Overwrite::Refuse => false,
        };
        if !exchanged {
            let named = renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
            named.map_err(|error| match error {
                Errno::EXIST | Errno::NOTEMPTY => DumpError::Exists {
                    path: self.path.clone(),
                },
                error => naming(error.into()),
            })?;
        }
        let parent = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // The old one has the temporary name now, and goes with it; else nothing has.
        if !exchanged {
            let _gone = self.temporary.keep();
        }
        sync(parent)
    }
}

fn sync(folder: &Path) -> Result<(), DumpError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(DumpError::io("writing", folder))
}

/// The names in a folder of which all must be regular files.
fn only_files(folder: &Path) -> Result<Vec<OsString>, DumpError> {
    let reading = || DumpError::io("reading", folder);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(reading())? {
        let entry = entry.map_err(reading())?;
        if !entry.file_type().map_err(reading())?.is_file() {
            return Err(DumpError::Folder {
                path: entry.path(),
                why: "it is no regular file, and a snapshot's folder holds only such",
            });
        }
        names.push(entry.file_name());
    }
    Ok(names)
}

/// Copies a file, its holes and its permissions, and makes it durable.
fn copy(from: &Path, to: &Path) -> Result<(), DumpError> {
    let input = File::open(from).map_err(DumpError::io("opening", from))?;
    let metadata = input.metadata().map_err(DumpError::io("reading", from))?;
    let writing = || DumpError::io("writing", to);
    let output = File::create_new(to).map_err(writing())?;
    output.set_len(metadata.size()).map_err(writing())?;
    copy_data(&input, &output, metadata.size()).map_err(writing())?;
    output
        .set_permissions(metadata.permissions())
        .map_err(writing())?;
    output.sync_all().map_err(writing())
}

fn copy_data(input: &File, output: &File, len: u64) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        // Where holes are not told, everything is data.
        let start = match seek(input, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(_) => at,
        };
        let end = seek(input, SeekFrom::Hole(start)).unwrap_or(len).min(len);
        if end <= start {
            return Ok(());
        }
        copy_stretch(input, output, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_stretch(input: &File, output: &File, mut at: u64, end: u64) -> io::Result<()> {
    let mut by_kernel = true;
    let mut buffer = Vec::new();
    while at < end {
        let now = usize::try_from(end.saturating_sub(at).min(COPY)).unwrap_or(0);
        let (mut from, mut to) = (at, at);
        if by_kernel {
            match copy_file_range(input, Some(&mut from), output, Some(&mut to), now) {
                Ok(copied) if copied > 0 => {
                    at = at.saturating_add(copied as u64);
                    continue;
                }
                Err(Errno::INTR) => continue,
                // What is really wrong the plain copy finds out too.
                Ok(_) | Err(_) => by_kernel = false,
            }
        }
        buffer.resize(now, 0);
        input.read_exact_at(&mut buffer, at)?;
        output.write_all_at(&buffer, at)?;
        at = at.saturating_add(now as u64);
    }
    Ok(())
}
