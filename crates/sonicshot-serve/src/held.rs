//! The descriptors that a virtual machine has sent, for as long as it may run.
//!
//! A virtual machine whose `userfaultfd` nobody keeps reads zero where its bytes are not in place.
//! So what has come is let go of in one way alone: the virtual machine is ended, and has ended.

use crate::error::ServeError;
use crate::peer::{AGAIN, Peer, pid_of};
use crate::protocol::{Received, names_another};
use crate::sys::Credentials;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The descriptors that have come from one connection. Dropping this ends the virtual machine,
/// unless that was [released](Self::release), and waits until it is gone.
#[derive(Debug)]
pub(crate) struct Held {
    descriptors: Vec<Arc<OwnedFd>>,
    /// Whether more came than could be taken in.
    lost: bool,
    /// Whom to end. If that is not known, he who has sent this has to, and is told.
    vm: Option<Peer>,
    stream: Option<Arc<UnixStream>>,
    /// Whether the sender may be here: others are not waited for.
    welcome: bool,
    released: bool,
}

impl Held {
    /// Holds on to what has come of `who`, who is `sender`. Says besides whose memory it is: the
    /// sender's, or of a process that he has named by a second descriptor.
    pub fn new(
        stream: &Arc<UnixStream>,
        received: &mut Received,
        who: Credentials,
        sender: Result<Peer, ServeError>,
        welcome: bool,
    ) -> (Self, Result<Peer, ServeError>) {
        let descriptors: Vec<_> = received.descriptors.drain(..).map(Arc::new).collect();
        let is_pidfd = |fd: &&Arc<OwnedFd>| pid_of(fd).is_ok_and(|pid| pid.is_some());
        let vm = match descriptors.iter().find(is_pidfd) {
            Some(pidfd) => Peer::of_descriptor(Arc::clone(pidfd), who),
            None if names_another(&received.message) => Err(ServeError::NoPidfd {
                found: descriptors.len(),
            }),
            None => sender,
        };
        let held = Self {
            descriptors,
            lost: received.lost,
            vm: vm.as_ref().ok().cloned(),
            stream: Some(Arc::clone(stream)),
            welcome,
            released: false,
        };
        (held, vm)
    }

    /// A virtual machine that another server has held. It is not held on to before
    /// [`hold`](Self::hold).
    pub fn given(uffd: Arc<OwnedFd>, vm: Peer) -> Self {
        Self {
            descriptors: vec![uffd],
            lost: false,
            vm: Some(vm),
            stream: None,
            welcome: true,
            released: true,
        }
    }

    /// From now on nobody else has it.
    pub fn hold(&mut self) {
        self.released = false;
    }

    pub fn descriptors(&self) -> &[Arc<OwnedFd>] {
        &self.descriptors
    }

    /// There is nothing to be held on to: the virtual machine has ended, or is served all the same.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// Whether memory may depend on what is held. What cannot be looked at may be anything.
    fn has_memory(&self) -> bool {
        let is_uffd = |fd: &Arc<OwnedFd>| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            link.map_or(true, |link| link.as_os_str() == "anon_inode:[userfaultfd]")
        };
        self.lost || self.descriptors.iter().any(is_uffd)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.released || !self.has_memory() {
            return;
        }
        match &self.vm {
            Some(vm) => {
                if !vm.end() {
                    tracing::error!("a virtual machine cannot be ended, and must not run");
                    if !self.welcome {
                        return;
                    }
                }
                // If it cannot be ended it at least waits for its pages.
                vm.wait(None);
            }
            // Until he has closed the connection, or ended.
            None if self.welcome => {
                while let Some(stream) = &self.stream {
                    let mut fds = [PollFd::new(&**stream, PollFlags::empty())];
                    match poll(&mut fds, None) {
                        Ok(_) => break,
                        Err(Errno::INTR) => {}
                        Err(_) => std::thread::sleep(AGAIN),
                    }
                }
            }
            None => {}
        }
    }
}
