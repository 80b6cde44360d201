//! A second process that ends a QEMU whose restore died: a guest that waits for pages that nobody has,
//! and a QEMU that waits for its guest, would wait for ever.

use crate::error::QemuError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// The guest has all its pages.
const DONE: u8 = b'D';

/// The serving process's end.
#[derive(Debug)]
pub(crate) struct Guard {
    socket: UnixStream,
    child: Child,
}

impl Guard {
    /// Starts `command`, which must call [`guard`] and do nothing else, for the process `qemu`.
    pub(crate) fn start(mut command: Command, qemu: &OwnedFd) -> Result<Self, QemuError> {
        let failed = |action| move |source: io::Error| QemuError::Watchdog { action, source };
        let (ours, theirs) = UnixStream::pair().map_err(failed("socketpair"))?;
        let qemu = qemu.try_clone().map_err(failed("QEMU's descriptor"))?;
        // A group of its own: what ends the serving process from a terminal does not end it.
        let child = command
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(qemu))
            .process_group(0)
            .spawn()
            .map_err(failed("starting it"))?;
        Ok(Self {
            socket: ours,
            child,
        })
    }

    /// Says that the guest needs nobody any more.
    pub(crate) fn done(mut self) {
        let _ = self.socket.write_all(&[DONE]);
        drop(self.socket);
        let _ = self.child.wait();
    }
}

/// A descriptor of the process with the number `pid`, a child that was not waited for.
pub(crate) fn descriptor(pid: i32) -> Result<OwnedFd, QemuError> {
    let failed = |source| QemuError::Process {
        action: "opening",
        pid,
        source,
    };
    let number = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw);
    let number = number.ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    pidfd_open(number, PidfdFlags::empty()).map_err(|error| failed(error.into()))
}

/// Ends a process.
pub(crate) fn kill(qemu: BorrowedFd<'_>) {
    // One that has ended needs none.
    let _ = pidfd_send_signal(qemu, Signal::KILL);
}

/// The second process's work: `control` is its standard input, `qemu`, a descriptor of QEMU's
/// process, its standard output. Whether QEMU had to be ended.
///
/// # Errors
/// [`QemuError::Watchdog`] if the socket cannot be read.
pub fn guard(control: &impl AsFd, qemu: &impl AsFd) -> Result<bool, QemuError> {
    let failed = |source| QemuError::Watchdog {
        action: "its socket",
        source,
    };
    let control = control.as_fd().try_clone_to_owned().map_err(failed)?;
    let mut control = UnixStream::from(control);
    let mut byte = [0];
    let said = match control.read(&mut byte) {
        Ok(1) => byte == [DONE],
        Ok(_) | Err(_) => false,
    };
    if said || has_ended(qemu.as_fd()) {
        return Ok(false);
    }
    kill(qemu.as_fd());
    Ok(true)
}

fn has_ended(qemu: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(qemu, PollFlags::IN)];
    let now = rustix::event::Timespec::default();
    loop {
        match poll(&mut fds, Some(&now)) {
            Err(Errno::INTR) => {}
            found => return found.is_ok_and(|ready| ready > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{descriptor, guard};
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn a_guest_without_a_server_is_ended() {
        for (said, ended) in [(&b""[..], true), (b"x", true), (b"D", false)] {
            let mut qemu = Command::new("sleep").arg("600").spawn().unwrap();
            let fd = descriptor(qemu.id().try_into().unwrap()).unwrap();
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(said).unwrap();
            drop(ours);
            assert_eq!(guard(&theirs, &fd).unwrap(), ended, "{said:?}");
            if !ended {
                qemu.kill().unwrap();
            }
            assert_eq!(qemu.wait().unwrap().signal(), Some(9));
            // One that is gone is not ended again.
            let (ours, theirs) = UnixStream::pair().unwrap();
            drop(ours);
            assert!(!guard(&theirs, &fd).unwrap());
        }
    }
}
