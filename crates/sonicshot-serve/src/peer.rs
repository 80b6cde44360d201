//! The process that has connected, held on to.

use crate::error::ServeError;
use crate::sys::{self, Credentials};
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The time between two tries of what fails because something is used up that others give back.
pub(crate) const AGAIN: Duration = Duration::from_millis(100);

/// A process that can be waited for and ended, whatever becomes of its number.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub pidfd: Arc<OwnedFd>,
}

impl Peer {
    /// The process that has connected.
    pub fn of_socket(stream: &UnixStream, who: Credentials) -> Result<Self, ServeError> {
        loop {
            match sys::peer_pidfd(stream) {
                Ok(pidfd) => return Ok(Self::new(pidfd)),
                // Before Linux 6.5.
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                    return Self::of_number(who);
                }
                // What it has sent must not be read before it can be ended.
                Err(error) if is_passing(&error) => std::thread::sleep(AGAIN),
                Err(error) => return Err(ServeError::PeerGone(error)),
            }
        }
    }

    /// The process with that number, which may be another's by now if it was that of one who has
    /// connected and ended.
    fn of_number(who: Credentials) -> Result<Self, ServeError> {
        let pid = Pid::from_raw(who.pid).ok_or_else(|| ServeError::PeerGone(gone()))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty());
        let peer = Self::new(pidfd.map_err(|errno| ServeError::PeerGone(errno.into()))?);
        peer.check_owner(&who.pid.to_string(), who.uid)?;
        Ok(peer)
    }

    /// A process that somebody has named by a descriptor: one of his own, unless he is root. Whoever
    /// may end others by what he sends here could not by himself.
    pub fn of_descriptor(pidfd: Arc<OwnedFd>, who: Credentials) -> Result<Self, ServeError> {
        let peer = Self { pidfd };
        let number = pid_of(&peer.pidfd)?.ok_or_else(|| other("there is no pidfd of it"))?;
        if who.uid != 0 {
            peer.check_owner(&number, who.uid)?;
        }
        if peer.wait(Some(&Timespec::default())) {
            return Err(ServeError::PeerGone(gone()));
        }
        Ok(peer)
    }

    /// The process that a descriptor is of.
    pub fn new(pidfd: OwnedFd) -> Self {
        Self {
            pidfd: Arc::new(pidfd),
        }
    }

    /// Refuses a process, with that number, that is another user's.
    fn check_owner(&self, number: &str, uid: u32) -> Result<(), ServeError> {
        let status = std::fs::read_to_string(format!("/proc/{number}/status"));
        let status = status.map_err(ServeError::proc)?;
        // It lives still: so what was read is of no later process with its number.
        if self.wait(Some(&Timespec::default())) {
            return Err(ServeError::PeerGone(gone()));
        }
        // Real, effective and saved; a descriptor may be of a single thread.
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let is = |text: &str, number: &str| text.trim() == number;
        if !line("Tgid:").is_some_and(|group| is(group, number)) {
            return Err(other("it is a thread, and no process"));
        }
        let uids = line("Uid:").ok_or_else(|| other("the kernel does not tell whose it is"))?;
        let mut found = uids.split_whitespace().take(3).peekable();
        let own = uid.to_string();
        if found.peek().is_none() || !found.all(|found| is(found, &own)) {
            return Err(other("it is another user's"));
        }
        Ok(())
    }

    /// Fails if it may not be ended: a server must be able to end what it serves.
    pub fn check_may_end(&self) -> Result<(), ServeError> {
        sys::may_signal(&self.pidfd).map_err(ServeError::PeerGone)
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
                // Who waits without a limit lets go of something behind it.
                Err(_) if limit.is_none() => std::thread::sleep(AGAIN),
                Ok(0) | Err(_) => return false,
                Ok(_) => return true,
            }
        }
    }
}

/// Whether a process that is ended frees what lacks.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
    )
}

/// The number of the process that a pidfd is of; `None` if it is none.
pub(crate) fn pid_of(fd: &impl AsFd) -> Result<Option<String>, ServeError> {
    let info = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(info).map_err(ServeError::proc)?;
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(line.map(|number| number.trim().to_owned()))
}

fn other(what: &'static str) -> ServeError {
    ServeError::PeerGone(io::Error::other(what))
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Ended(Child);

    impl Drop for Ended {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn pidfd(number: u32) -> Arc<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(number).unwrap()).unwrap();
        Arc::new(pidfd_open(pid, PidfdFlags::empty()).unwrap())
    }

    #[test]
    fn nobody_names_the_process_of_another() {
        let mut child = Ended(Command::new("sleep").arg("1000").spawn().unwrap());
        let number = child.0.id();
        let named = pidfd(number);
        let own = rustix::process::geteuid().as_raw();
        let by = |uid: u32| {
            let who = Credentials { uid, pid: 1 };
            Peer::of_descriptor(Arc::clone(&named), who).map(drop)
        };
        by(own).unwrap();
        by(0).unwrap();
        for other in [own + 1, 65_534] {
            let error = by(other).unwrap_err().with_causes();
            assert!(error.contains("another user's"), "{error}");
        }
        let pid = i32::try_from(number).unwrap();
        let of_number = |uid| Peer::of_number(Credentials { uid, pid }).map(drop);
        of_number(own).unwrap();
        assert!(of_number(own + 1).is_err());
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let root = Credentials { uid: 0, pid: 1 };
        let error = Peer::of_descriptor(null.into(), root).unwrap_err();
        assert!(error.with_causes().contains("no pidfd"), "{error:?}");
        // Nor one that is gone.
        child.0.kill().unwrap();
        child.0.wait().unwrap();
        assert!(by(own).is_err());
    }
}
