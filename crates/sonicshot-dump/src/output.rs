//! Output that appears whole or not at all.

use crate::DumpError;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Whether an existing output may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// It is an error.
    #[default]
    Refuse,
    /// It is replaced, at the very end.
    Replace,
}

/// A file that gets its name only when it is complete and on disk.
#[derive(Debug)]
pub(crate) struct Output {
    file: Unfinished,
    path: PathBuf,
    overwrite: Overwrite,
}

#[derive(Debug)]
enum Unfinished {
    /// Without a name: whatever ends this process takes the file away.
    Nameless(File),
    /// Where the file system knows no such files.
    Named(NamedTempFile),
}

impl Output {
    /// Begins to write `path`, which must not be `input`.
    pub(crate) fn create(
        path: &Path,
        overwrite: Overwrite,
        input: &File,
    ) -> Result<Self, DumpError> {
        let ours = input.metadata().map_err(DumpError::io("reading", path))?;
        let there = std::fs::metadata(path).ok();
        if let Some(there) = &there
            && (there.dev(), there.ino()) == (ours.dev(), ours.ino())
        {
            return Err(DumpError::SameFile { path: path.into() });
        }
        let output = Self::create_new(path, overwrite)?;
        // Both hold the same guest's memory, so both are for the same eyes.
        let _ = output.file().set_permissions(ours.permissions());
        Ok(output)
    }

    /// Begins to write `path`, of something that is no file. It is for its owner's eyes alone.
    pub(crate) fn create_new(path: &Path, overwrite: Overwrite) -> Result<Self, DumpError> {
        let there = std::fs::metadata(path).ok();
        // Not followed, for it is the link itself that would be replaced.
        if overwrite == Overwrite::Refuse && std::fs::symlink_metadata(path).is_ok() {
            return Err(DumpError::Exists { path: path.into() });
        }
        // A folder, a pipe, or a device such as /dev/null, which root could replace.
        if there.is_some_and(|there| !there.is_file()) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
            return Err(DumpError::io("replacing", path)(source));
        }
        let folder = folder_of(path);
        let file = match nameless(folder) {
            Ok(file) => Unfinished::Nameless(file),
            Err(_) => Unfinished::Named(
                temporary(folder).map_err(DumpError::io("creating a file in", folder))?,
            ),
        };
        Ok(Self {
            file,
            path: path.into(),
            overwrite,
        })
    }

    pub(crate) fn file(&self) -> &File {
        match &self.file {
            Unfinished::Nameless(file) => file,
            Unfinished::Named(file) => file.as_file(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file durable, then gives it its name. Returns what it takes on disk, in bytes.
    pub(crate) fn finish(self) -> Result<u64, DumpError> {
        let path = self.path;
        let folder = folder_of(&path);
        let file = match &self.file {
            Unfinished::Nameless(file) => file,
            Unfinished::Named(file) => file.as_file(),
        };
        file.sync_all().map_err(DumpError::io("writing", &path))?;
        let metadata = file.metadata().map_err(DumpError::io("reading", &path))?;
        let named = match (self.file, self.overwrite) {
            (Unfinished::Nameless(file), Overwrite::Refuse) => link(&file, &path),
            (Unfinished::Nameless(file), Overwrite::Replace) => replace(&file, folder, &path),
            (Unfinished::Named(file), Overwrite::Refuse) => file
                .persist_noclobber(&path)
                .map(drop)
                .map_err(|error| error.error),
            (Unfinished::Named(file), Overwrite::Replace) => {
                file.persist(&path).map(drop).map_err(|error| error.error)
            }
        };
        named.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DumpError::Exists { path: path.clone() },
            _ => DumpError::io("giving its name to", &path)(error),
        })?;
        // The name itself is durable once the folder is.
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(DumpError::io("writing", folder))?;
        Ok(metadata.blocks().saturating_mul(512))
    }
}

fn nameless(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(openat(CWD, folder, flags, Mode::RUSR | Mode::WUSR)?);
    // Naming goes through /proc, which a container may lack.
    std::fs::metadata(proc_name(&file))?;
    Ok(file)
}

fn proc_name(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Gives the file a name that must be free.
fn link(file: &File, path: &Path) -> io::Result<()> {
    linkat(CWD, proc_name(file), CWD, path, AtFlags::SYMLINK_FOLLOW)?;
    Ok(())
}

/// Gives the file a name that may be taken: a link cannot replace, so by way of another name.
fn replace(file: &File, folder: &Path, path: &Path) -> io::Result<()> {
    let named = tempfile::Builder::new()
        .prefix(PREFIX)
        .make_in(folder, |name| link(file, name))?;
    named.into_temp_path().persist(path)?;
    Ok(())
}

const PREFIX: &str = ".sonicshot-";

fn temporary(folder: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().prefix(PREFIX).tempfile_in(folder)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
