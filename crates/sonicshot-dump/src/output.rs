//! Output that appears whole or not at all.

use crate::DumpError;
use std::fs::File;
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
    temporary: NamedTempFile,
    path: PathBuf,
    overwrite: Overwrite,
}

impl Output {
    /// Begins to write `path`, which must not be `input`.
    pub(crate) fn create(
        path: &Path,
        overwrite: Overwrite,
        input: &File,
    ) -> Result<Self, DumpError> {
        if let Ok(there) = std::fs::metadata(path) {
            let ours = input.metadata().map_err(DumpError::io("reading", path))?;
            if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) {
                return Err(DumpError::SameFile { path: path.into() });
            }
            if overwrite == Overwrite::Refuse {
                return Err(DumpError::Exists { path: path.into() });
            }
        }
        let folder = folder_of(path);
        let temporary = tempfile::Builder::new()
            .prefix(".sonicshot-")
            .tempfile_in(folder)
            .map_err(DumpError::io("creating a file in", folder))?;
        // As a file that is created plainly gets its rights: those of the input, for both hold
        // the same guest's memory.
        if let Ok(metadata) = input.metadata() {
            let _ = temporary.as_file().set_permissions(metadata.permissions());
        }
        Ok(Self {
            temporary,
            path: path.into(),
            overwrite,
        })
    }

    pub(crate) fn file(&self) -> &File {
        self.temporary.as_file()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file durable, then gives it its name.
    pub(crate) fn finish(self) -> Result<(), DumpError> {
        let path = self.path;
        let file = self.temporary.as_file();
        file.sync_all().map_err(DumpError::io("writing", &path))?;
        match self.overwrite {
            Overwrite::Replace => {
                self.temporary
                    .persist(&path)
                    .map_err(|error| DumpError::io("renaming to", &path)(error.error))?;
            }
            Overwrite::Refuse => {
                self.temporary.persist_noclobber(&path).map_err(|error| {
                    if error.error.kind() == std::io::ErrorKind::AlreadyExists {
                        DumpError::Exists { path: path.clone() }
                    } else {
                        DumpError::io("renaming to", &path)(error.error)
                    }
                })?;
            }
        }
        // The name itself is durable once the folder is.
        let folder = folder_of(&path);
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(DumpError::io("writing", folder))
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
