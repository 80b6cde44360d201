//! The watcher: a process that ends the virtual machines if their server dies, however it dies.
//!
//! A virtual machine whose `userfaultfd` nobody keeps reads zero at once where its bytes are not
//! in place. So a second process has a duplicate of each, and of the descriptor of the process. If
//! the server is gone it ends them first, waits until they are gone, and only then lets go.

use crate::error::ServeError;
use crate::peer::Peer;
use crate::sys;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU64, Ordering};
use rustix::event::Timespec;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg, socketpair,
};
use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// A number of a virtual machine, little-endian, behind one of these.
const ADD: u8 = b'+';
const FORGET: u8 = b'-';
const MESSAGE: usize = 9;

fn message(what: u8, number: u64) -> [u8; MESSAGE] {
    let mut out = [what; MESSAGE];
    let (_, rest) = out.split_at_mut(1);
    rest.copy_from_slice(&number.to_le_bytes());
    out
}

/// The server's end of its watcher.
#[derive(Debug)]
pub struct Watcher {
    socket: OwnedFd,
    next: AtomicU64,
    child: Mutex<Child>,
}

impl Watcher {
    /// Starts `command`, which must call [`watch`] with its standard input and do nothing else.
    ///
    /// # Errors
    /// [`ServeError::System`] if it cannot be started.
    pub fn start(mut command: Command) -> Result<Self, ServeError> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(ServeError::system("socketpair"))?;
        // A group of its own: what ends the server's from a terminal does not end it.
        let child = command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|source| ServeError::System {
                operation: "starting the watcher process",
                source,
            })?;
        Ok(Self {
            socket: ours,
            next: AtomicU64::new(0),
            child: Mutex::new(child),
        })
    }

    /// Has a virtual machine watched until what is returned is dropped.
    pub(crate) fn add(
        self: &Arc<Self>,
        uffd: &impl AsFd,
        peer: &Peer,
    ) -> Result<Watched, ServeError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let both = [uffd.as_fd(), peer.pidfd.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&both));
        let message = message(ADD, number);
        loop {
            let parts = [IoSlice::new(&message)];
            match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => {
                    return Ok(Watched {
                        watcher: Arc::clone(self),
                        number,
                    });
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ServeError::NoWatcher(errno.into())),
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It ends when it reads the end of this; who drops this has nothing to serve any more.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let child = self.child.get_mut();
        let _ = child.unwrap_or_else(PoisonError::into_inner).wait();
    }
}

/// A virtual machine that is watched.
#[derive(Debug)]
pub(crate) struct Watched {
    watcher: Arc<Watcher>,
    number: u64,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let message = message(FORGET, self.number);
        // If the watcher is gone there is nothing to forget.
        let _ = send(&self.watcher.socket, &message, SendFlags::NOSIGNAL);
    }
}

/// What a watcher holds of one virtual machine.
struct Held {
    _uffd: OwnedFd,
    peer: Peer,
}

/// Does a watcher's work: holds on to what comes through `socket`, and when its other end is gone
/// ends the virtual machines. Returns how many it had to end.
///
/// # Errors
/// [`ServeError::System`] if the socket cannot be read. What is held is then ended as well.
pub fn watch(socket: &impl AsFd) -> Result<usize, ServeError> {
    sys::ignore_ends();
    let mut held = HashMap::new();
    let end = loop {
        match step(socket, &mut held) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(errno) => break Err(ServeError::system("the watcher's socket")(errno)),
        }
    };
    let still: Vec<&Held> = held
        .values()
        .filter(|held| !held.peer.wait(Some(&Timespec::default())))
        .collect();
    // All at once, then wait: until a process is gone its threads may run.
    for held in &still {
        held.peer.end();
    }
    for held in &still {
        held.peer.wait(None);
    }
    end.map(|()| still.len())
}

/// Takes in one message; says whether there was one.
fn step(socket: &impl AsFd, held: &mut HashMap<u64, Held>) -> Result<bool, Errno> {
    let mut bytes = [0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = match recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Err(Errno::INTR) => return Ok(true),
        Err(Errno::CONNRESET) => return Ok(false),
        other => other?.bytes,
    };
    if got == 0 {
        return Ok(false);
    }
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let [what, number @ ..] = bytes;
    let number = u64::from_le_bytes(number);
    if what == FORGET {
        held.remove(&number);
    } else if let (Some(pidfd), Some(uffd)) = (descriptors.pop(), descriptors.pop()) {
        let peer = Peer {
            pidfd: Arc::new(pidfd),
        };
        held.insert(number, Held { _uffd: uffd, peer });
    }
    Ok(true)
}
