//! Who has connected, held on to.

use crate::error::ServeError;
use crate::sys;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// A process that can be waited for and ended, whatever becomes of its number.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub pidfd: Arc<OwnedFd>,
}

impl Peer {
    /// The process that has connected.
    pub fn of_socket(stream: &UnixStream, pid: i32) -> Result<Self, ServeError> {
        let pidfd = match sys::peer_pidfd(stream) {
            Ok(pidfd) => pidfd,
            // Before Linux 6.5 its number has to do: it may be another's by now if it was ended.
            // A page that is put in place shows that somebody has its memory still.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                let pid = Pid::from_raw(pid).ok_or_else(|| ServeError::PeerGone(gone()))?;
                pidfd_open(pid, PidfdFlags::empty()).map_err(|e| ServeError::PeerGone(e.into()))?
            }
            Err(error) => return Err(ServeError::PeerGone(error)),
        };
        Self::new(pidfd)
    }

    /// A process that somebody else has named by a descriptor.
    pub fn of_descriptor(fd: OwnedFd) -> Result<Self, ServeError> {
        let info = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        let info = std::fs::read_to_string(info).map_err(ServeError::proc)?;
        if !info.lines().any(|line| line.starts_with("Pid:")) {
            let what = "the second descriptor of the message is no pidfd";
            return Err(ServeError::PeerGone(io::Error::other(what)));
        }
        Self::new(fd)
    }

    /// A server must be able to end what it serves.
    fn new(pidfd: OwnedFd) -> Result<Self, ServeError> {
        sys::may_signal(&pidfd).map_err(ServeError::PeerGone)?;
        Ok(Self {
            pidfd: Arc::new(pidfd),
        })
    }

    /// Ends it; says whether it has ended or will.
    pub fn end(&self) -> bool {
        let sent = pidfd_send_signal(&self.pidfd, Signal::KILL);
        matches!(sent, Ok(()) | Err(Errno::SRCH))
    }

    /// Waits until it has ended, at most so long. Says whether it has.
    pub fn wait(&self, limit: Option<&Timespec>) -> bool {
        loop {
            let mut fds = [PollFd::new(&*self.pidfd, PollFlags::IN)];
            match poll(&mut fds, limit) {
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ESRCH)
}
