//! The watcher: a process that ends the virtual machines if their server dies, however it dies.
//!
//! A virtual machine whose `userfaultfd` nobody keeps reads zero at once where its bytes are not
//! in place. So a second process has a duplicate of each, and of the descriptor of the process. If
//! the server is gone it ends them first, waits until they are gone, and only then lets go.

use crate::error::ServeError;
use crate::peer::{AGAIN, Peer};
use crate::sys;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socketpair,
};
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A number of a virtual machine, little-endian, behind one of these. An `ADD` is answered: by the
/// same, or that its descriptors did not come.
const ADD: u8 = b'+';
const FORGET: u8 = b'-';
const LOST: u8 = b'!';
const MESSAGE: usize = 9;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

fn message(what: u8, number: u64) -> [u8; MESSAGE] {
    let mut out = [what; MESSAGE];
    let (_, rest) = out.split_at_mut(1);
    rest.copy_from_slice(&number.to_le_bytes());
    out
}

/// The server's end of its watcher.
#[derive(Debug)]
pub struct Watcher {
    socket: Arc<OwnedFd>,
    next: AtomicU64,
    /// One after the other: an answer is to what was said last.
    adding: Mutex<()>,
    child: Mutex<Child>,
    state: Arc<State>,
}

/// What becomes of the other process.
#[derive(Debug, Default)]
struct State {
    /// It is to end.
    ending: AtomicBool,
    /// It is gone.
    gone: AtomicBool,
}

/// Tells when the other process is gone: nothing would end the virtual machines from then on.
fn listen(socket: &OwnedFd, state: &State) {
    loop {
        // What is said is somebody else's to read.
        let mut fds = [PollFd::new(socket, PollFlags::empty())];
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
    state.gone.store(true, Ordering::Release);
    if !state.ending.load(Ordering::Acquire) {
        tracing::error!(
            "the watcher process is gone: if this server died, nothing would end its virtual \
             machines, and no others are served"
        );
    }
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
        let (socket, state) = (Arc::new(ours), Arc::new(State::default()));
        let watcher = Self {
            socket: Arc::clone(&socket),
            next: AtomicU64::new(0),
            adding: Mutex::default(),
            child: Mutex::new(child),
            state: Arc::clone(&state),
        };
        let thread = std::thread::Builder::new().name("sonicshot-watch".into());
        let spawned = thread.spawn(move || listen(&socket, &state));
        spawned.map_err(|source| ServeError::System {
            operation: "starting a thread",
            source,
        })?;
        Ok(watcher)
    }

    /// Whether the other process is gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.state.gone.load(Ordering::Acquire)
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
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let parts = [IoSlice::new(&message)];
            match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ServeError::NoWatcher(errno.into())),
            }
        }
        // If this fails it is to be forgotten, whatever has come of it.
        let watched = Watched {
            watcher: Arc::clone(self),
            number,
        };
        self.hear(number).map_err(ServeError::NoWatcher)?;
        Ok(watched)
    }

    /// Waits until a virtual machine is watched.
    fn hear(&self, number: u64) -> io::Result<()> {
        let start = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut ready = [PollFd::new(&*self.socket, PollFlags::IN)];
            match poll(&mut ready, Some(&left)) {
                Err(Errno::INTR) => continue,
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                other => other.map(drop)?,
            }
            let mut answer = [0; MESSAGE];
            let (got, _) = recv(&*self.socket, &mut answer, RecvFlags::empty())?;
            if got == 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let [what, of @ ..] = answer;
            // One that was given up may be answered still.
            if u64::from_le_bytes(of) == number {
                if what == ADD {
                    return Ok(());
                }
                let what = "the virtual machine's descriptors did not come to it";
                return Err(io::Error::other(what));
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.state.ending.store(true, Ordering::Release);
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
        return Ok(true);
    }
    let both = (descriptors.pop(), descriptors.pop());
    let answer = if let (Some(pidfd), Some(uffd)) = both {
        let peer = Peer {
            pidfd: Arc::new(pidfd),
        };
        held.insert(number, Held { _uffd: uffd, peer });
        ADD
    } else {
        LOST
    };
    // If nobody hears it, nothing is to be read any more.
    let _ = send(socket, &message(answer, number), SendFlags::NOSIGNAL);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watcher_that_ends_is_noticed() {
        let watcher = Arc::new(Watcher::start(Command::new("true")).unwrap());
        let start = Instant::now();
        while !watcher.is_gone() {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let peer = Peer {
            pidfd: Arc::new(null.try_clone().unwrap()),
        };
        let error = watcher.add(&null, &peer).unwrap_err();
        assert!(matches!(error, ServeError::NoWatcher(_)), "{error:?}");
    }

    #[test]
    fn what_does_not_come_to_it_is_told() {
        let (near, far) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut held = HashMap::new();
        for (number, (count, expected)) in (7..).zip([(0, LOST), (1, LOST), (2, ADD)]) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors = vec![null.as_fd(); count];
            if count > 0 {
                assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            }
            let told = message(ADD, number);
            let parts = [IoSlice::new(&told)];
            sendmsg(&near, &parts, &mut control, SendFlags::empty()).unwrap();
            assert!(step(&far, &mut held).unwrap());
            let mut answer = [0; MESSAGE];
            recv(&near, &mut answer, RecvFlags::empty()).unwrap();
            assert_eq!(answer, message(expected, number));
        }
        assert_eq!(held.keys().collect::<Vec<_>>(), [&9]);
        send(&near, &message(FORGET, 9), SendFlags::empty()).unwrap();
        assert!(step(&far, &mut held).unwrap() && held.is_empty());
        drop(near);
        assert!(!step(&far, &mut held).unwrap());
    }
}
