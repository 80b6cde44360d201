//! Sockets that appear under their names with their rights, and take nobody's place who is there.

use crate::error::ServeError;
use core::hash::{Hash, Hasher};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{Mode, chmod};
use std::hash::DefaultHasher;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket with a name, which goes with it.
#[derive(Debug)]
pub(crate) struct Named {
    pub listener: UnixListener,
    path: PathBuf,
    /// The file that the name was given to: its device and number.
    identity: (u64, u64),
}

impl Named {
    /// Makes a socket for this user alone, to which `change` may give other rights before it has
    /// its name. It takes the place of one that nobody listens to.
    pub fn bind(
        path: &Path,
        change: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Self, ServeError> {
        check_free(path)?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let new = folder.join(format!(".s{}", std::process::id()));
        let failed = |action| ServeError::io(action, path);
        let _ = std::fs::remove_file(&new);
        let listener = UnixListener::bind(&new).map_err(failed("making the socket"))?;
        let placed = (|| {
            chmod(&new, Mode::RUSR | Mode::WUSR)?;
            change(&new)?;
            std::fs::rename(&new, path)?;
            identity(path)
        })();
        if placed.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: placed.map_err(failed("giving its rights to the socket"))?,
        })
    }

    /// Goes on with a socket that has its name still, if `hash` says that it is of that file; as
    /// [`bind`](Self::bind) does with its rights.
    pub fn take(
        listener: UnixListener,
        hash: u64,
        path: &Path,
        change: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Option<Self>, ServeError> {
        let found = identity(path).ok().filter(|found| hashed(*found) == hash);
        let Some(found) = found else {
            return Ok(None);
        };
        let changed = chmod(path, Mode::RUSR | Mode::WUSR).map_err(Into::into);
        let changed = changed.and_then(|()| change(path));
        changed.map_err(ServeError::io("giving its rights to the socket", path))?;
        Ok(Some(Self {
            listener,
            path: path.to_owned(),
            identity: found,
        }))
    }

    /// Lets go of it, and leaves the name to whoever has the socket too.
    pub fn leave(mut self) {
        self.path = PathBuf::new();
    }

    /// A number that tells its file from others.
    pub fn hash(&self) -> u64 {
        hashed(self.identity)
    }

    /// Takes the name away, if it is still this one's: nobody can connect any more.
    pub fn unname(&self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.unname();
    }
}

impl AsFd for Named {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

fn hashed(identity: (u64, u64)) -> u64 {
    let mut out = DefaultHasher::new();
    identity.hash(&mut out);
    out.finish()
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Refuses a name that something has which is in use, or is no socket.
fn check_free(path: &Path) -> Result<(), ServeError> {
    let exists = |why| ServeError::SocketExists {
        path: path.to_owned(),
        why,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ServeError::io("looking at", path)(error)),
        Ok(found) if !found.file_type().is_socket() => Err(exists("is not a socket")),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(ServeError::io("connecting to", path)(error)),
            Ok(_) => Err(exists("somebody serves there")),
        },
    }
}
