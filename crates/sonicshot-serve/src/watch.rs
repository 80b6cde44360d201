//! The watcher: a process that ends the virtual machines if their server dies, however it dies.
//!
//! A virtual machine whose `userfaultfd` nobody keeps reads zero at once where its bytes are not
//! in place. So a second process has a duplicate of each, and of the descriptor of the process. If
//! the server is gone it ends them first, waits until they are gone, and only then lets go.
//!
//! Or it gives them to another server, if it was told to wait for one: that connects to a socket
//! which the watcher got from its own server, and goes on with what that has kept
//! (`engine/kept.rs`). The socket that virtual machines come to is handed on with them: who comes
//! meanwhile waits. A server that lives still is ended first: at no moment two serve the same
//! memory. Whoever waits for a page waits meanwhile.

use crate::error::ServeError;
use crate::peer::{AGAIN, Peer};
use crate::protocol::{Received, is_documented, receive_rest};
use crate::sys;
use crate::until::Until;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg,
    socketpair,
};
use sonicshot::{Tally, to_u64};
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// A number of a virtual machine, little-endian, behind one of these. An `ADD` is answered: by the
/// same, or that its descriptors did not come.
const ADD: u8 = b'+';
const FORGET: u8 = b'-';
const LOST: u8 = b'!';
/// A socket to wait at for another server, and how many milliseconds.
const KEEP: u8 = b'k';
/// The socket that virtual machines come to, and which file it is.
const PAGES: u8 = b'p';
/// To another server: these were all, so many. From it: it has them.
const ALL: u8 = b'.';
const TAKEN: u8 = b't';
/// Descriptors of a virtual machine: its `userfaultfd`, its process, and what is kept.
const DESCRIPTORS: usize = 3;
const MESSAGE: usize = 9;
/// The time that an answer may take.
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

/// The treatment of the other process.
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
        kept: Option<&OwnedFd>,
    ) -> Result<Watched, ServeError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut descriptors = vec![uffd.as_fd(), peer.pidfd.as_fd()];
        descriptors.extend(kept.map(AsFd::as_fd));
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        say(&self.socket, ADD, number, &descriptors).map_err(ServeError::NoWatcher)?;
        // If this fails it is to be forgotten, whatever has come of it.
        let watched = Watched {
            watcher: Arc::clone(self),
            number,
        };
        self.hear(number).map_err(ServeError::NoWatcher)?;
        Ok(watched)
    }

    /// Has it wait for another server, so long, at `socket` if this one is gone.
    pub(crate) fn keep(&self, socket: &impl AsFd, limit: Duration) -> Result<(), ServeError> {
        let millis = Tally::new(limit.as_secs()).times(1000);
        let limit = millis.and(limit.subsec_millis().into()).get();
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let said = say(&self.socket, KEEP, limit, &[socket.as_fd()]);
        said.and_then(|()| self.hear(limit))
            .map_err(ServeError::NoWatcher)
    }

    /// Has it hold on to the socket that virtual machines come to, of the file `identity`: who
    /// comes while there is no server waits for the next one.
    pub(crate) fn hold(&self, socket: &impl AsFd, identity: u64) -> Result<(), ServeError> {
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let said = say(&self.socket, PAGES, identity, &[socket.as_fd()]);
        said.and_then(|()| self.hear(identity))
            .map_err(ServeError::NoWatcher)
    }

    /// Waits until a virtual machine is watched.
    fn hear(&self, number: u64) -> io::Result<()> {
        let until = Until::new(PATIENCE);
        loop {
            let left = Timespec::try_from(until.left()).map_err(io::Error::other)?;
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
                if matches!(what, ADD | KEEP | PAGES) {
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

/// The descriptors that a watcher holds of one virtual machine.
#[derive(Debug)]
pub(crate) struct Held {
    pub uffd: OwnedFd,
    pub peer: Peer,
    /// The descriptor that another server needs beside.
    pub kept: Option<OwnedFd>,
}

impl Held {
    fn is_over(&self) -> bool {
        self.peer.wait(Some(&Timespec::default()))
    }
}

/// The socket that another server may come to, and the time for which it is waited for.
struct Door {
    socket: UnixListener,
    limit: Duration,
}

/// The socket that virtual machines come to.
#[derive(Debug)]
pub(crate) struct Pages {
    pub socket: UnixListener,
    /// The identity of its file.
    pub identity: u64,
}

impl Pages {
    fn new(socket: OwnedFd, identity: u64) -> Self {
        let socket = UnixListener::from(socket);
        Self { socket, identity }
    }

    /// Refuses who has come while there was no server, as that would: a virtual machine that has
    /// sent its memory and waits for no answer is ended. Who waits for one hears that there is
    /// none.
    fn turn_away(self) {
        let _ = self.socket.set_nonblocking(true);
        while let Ok((stream, _)) = self.socket.accept() {
            let peer = sys::credentials(&stream).map_err(ServeError::proc);
            let Ok(peer) = peer.and_then(|who| Peer::of_socket(&stream, who)) else {
                continue;
            };
            let mut received = Received::default();
            receive_rest(&stream, &mut received);
            if !received.descriptors.is_empty() && !is_documented(&received.message) {
                peer.end();
                peer.wait(None);
            }
        }
    }
}

/// All that a watcher has.
#[derive(Default)]
struct Work {
    held: HashMap<u64, Held>,
    // Let go of before whoever stands at the door hears of it: he takes the name then.
    pages: Option<Pages>,
    door: Option<Door>,
}

/// Does a watcher's work: holds on to what comes through `socket`, and when its other end is gone
/// gives it to another server, if there is to be one, or ends the virtual machines. Returns how
/// many it had to end.
///
/// # Errors
/// [`ServeError::System`] if the socket cannot be read. What is held is then ended as well.
pub fn watch(socket: &impl AsFd) -> Result<usize, ServeError> {
    sys::ignore_ends();
    // That of who has made both ends.
    let server = sys::peer_pidfd(socket).ok().map(Peer::new);
    let mut work = Work::default();
    let mut successor = None;
    let end = loop {
        // What the server has said before it is ended is heard all the same.
        if successor.is_none()
            && let Some(door) = &work.door
        {
            match door.wait_beside(socket) {
                Beside::Message => {}
                Beside::Nobody => continue,
                Beside::Successor(stream) => {
                    if server.as_ref().is_some_and(Peer::end) {
                        successor = Some(stream);
                    }
                    continue;
                }
            }
        }
        match step(socket, &mut work) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(errno) => break Err(ServeError::system("the watcher's socket")(errno)),
        }
    };
    // Its end of the socket may be closed before its threads are gone.
    if let Some(server) = server.filter(|_| !work.held.is_empty()) {
        server.end();
        server.wait(None);
    }
    if end.is_ok() && work.give(successor) {
        return Ok(0);
    }
    let still: Vec<&Held> = work.held.values().filter(|held| !held.is_over()).collect();
    // All at once, then wait: until a process is gone its threads may run.
    for held in &still {
        held.peer.end();
    }
    for held in &still {
        held.peer.wait(None);
    }
    let ended = still.len();
    if let Some(pages) = work.pages.take() {
        pages.turn_away();
    }
    end.map(|()| ended)
}

impl Work {
    /// Gives all to another server; says whether it has them.
    fn give(&mut self, mut successor: Option<UnixStream>) -> bool {
        self.held.retain(|_, held| !held.is_over());
        let Some(door) = &self.door else { return false };
        // One that waited for its turn has no record by which another could go on with it.
        self.held.retain(|_, held| {
            let is_kept = held.kept.is_some();
            if !is_kept {
                held.peer.end();
                held.peer.wait(None);
            }
            is_kept
        });
        let until = Until::new(door.limit);
        while !self.held.is_empty() || successor.is_some() {
            if let Some(stream) = successor.take() {
                match offer(&stream, &self.held, self.pages.as_ref()) {
                    Ok(true) => return true,
                    Ok(false) => {}
                    Err(error) => tracing::warn!("another server has not taken over: {error}"),
                }
            }
            let left = until.left();
            if left.is_zero() {
                return false;
            }
            let limit = Timespec::try_from(left.min(AGAIN)).ok();
            let mut ready = [PollFd::new(&door.socket, PollFlags::IN)];
            let _ = poll(&mut ready, limit.as_ref());
            successor = door.open();
        }
        false
    }
}

/// The first that came.
enum Beside {
    Message,
    Successor(UnixStream),
    Nobody,
}

impl Door {
    /// Waits until there is something to be read, or somebody comes.
    fn wait_beside(&self, socket: &impl AsFd) -> Beside {
        let mut ready = [
            PollFd::new(socket, PollFlags::IN),
            PollFd::new(&self.socket, PollFlags::IN),
        ];
        if poll(&mut ready, None).is_err() {
            return Beside::Nobody;
        }
        match ready.each_ref().map(|fd| !fd.revents().is_empty()) {
            [true, _] => Beside::Message,
            [false, true] => self.open().map_or(Beside::Nobody, Beside::Successor),
            [false, false] => Beside::Nobody,
        }
    }

    /// The process that has come, if it is of this user, or root.
    fn open(&self) -> Option<UnixStream> {
        let (stream, _) = self.socket.accept().ok()?;
        let who = sys::credentials(&stream).ok()?;
        let own = rustix::process::geteuid().as_raw();
        (who.uid == own || who.uid == 0).then_some(stream)
    }
}

/// Offers what is held; says whether it was taken.
fn offer(
    stream: &UnixStream,
    held: &HashMap<u64, Held>,
    pages: Option<&Pages>,
) -> io::Result<bool> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    if let Some(pages) = pages {
        say(stream, PAGES, pages.identity, &[pages.socket.as_fd()])?;
    }
    let mut count = 0;
    for (before, (number, held)) in (0_u64..).zip(held) {
        let Some(kept) = &held.kept else {
            return Err(io::Error::other("of a virtual machine nothing is kept"));
        };
        let descriptors = [held.uffd.as_fd(), held.peer.pidfd.as_fd(), kept.as_fd()];
        say(stream, ADD, *number, &descriptors)?;
        count = before.checked_add(1).ok_or(io::ErrorKind::FileTooLarge)?;
    }
    say(stream, ALL, count, &[])?;
    let mut answer = [0; MESSAGE];
    let mut stream = stream;
    stream.read_exact(&mut answer)?;
    Ok(answer == message(TAKEN, count))
}

/// Another server's side: what the watcher of the one before gives.
#[derive(Debug)]
pub(crate) struct Given {
    stream: UnixStream,
    pub machines: Vec<Held>,
    pub pages: Option<Pages>,
}

impl Given {
    /// Asks whoever listens at `path` for at most `max` virtual machines; `None` if nobody does.
    pub fn ask(path: &Path, max: usize) -> Result<Option<Self>, ServeError> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(ServeError::io("connecting to", path)(error)),
        };
        let failed = |source| ServeError::NotGiven {
            path: path.to_owned(),
            source,
        };
        let who = sys::credentials(&stream).map_err(failed)?;
        let own = rustix::process::geteuid().as_raw();
        if who.uid != own && who.uid != 0 {
            return Err(ServeError::Peer {
                uid: who.uid,
                pid: who.pid,
            });
        }
        // It ends its server before.
        const ENDS: Duration = Duration::from_secs(2 * PATIENCE.as_secs());
        let limit = Some(ENDS);
        stream.set_read_timeout(limit).map_err(failed)?;
        let (machines, pages) = Self::receive(&stream, max).map_err(failed)?;
        Ok(Some(Self {
            stream,
            machines,
            pages,
        }))
    }

    fn receive(stream: &UnixStream, max: usize) -> io::Result<(Vec<Held>, Option<Pages>)> {
        let mut machines = Vec::new();
        let mut pages = None;
        loop {
            let Some((what, number, mut descriptors)) = hear(stream)? else {
                // Nothing is held: it has ended, or is ended.
                return match machines.is_empty() {
                    true => Ok((machines, None)),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            };
            if what == ALL && number == to_u64(machines.len()) {
                return Ok((machines, pages));
            }
            if what == PAGES && pages.is_none() {
                pages = descriptors.pop().map(|socket| Pages::new(socket, number));
                continue;
            }
            let (kept, pidfd, uffd) = (descriptors.pop(), descriptors.pop(), descriptors.pop());
            let (Some(uffd), Some(pidfd), Some(_)) = (uffd, pidfd, &kept) else {
                return Err(io::Error::other("a message without its descriptors"));
            };
            if what != ADD || machines.len() >= max {
                return Err(io::Error::other(
                    "more virtual machines than there is room for",
                ));
            }
            let peer = Peer::new(pidfd);
            machines.push(Held { uffd, peer, kept });
        }
    }

    /// Says that they are served from now on, and waits until whoever gave them has let go.
    pub fn taken(self, count: usize) {
        let mut stream = &self.stream;
        if stream.write_all(&message(TAKEN, to_u64(count))).is_ok() {
            let _ = stream.read(&mut [0]);
        }
    }
}

fn say(
    socket: &impl AsFd,
    what: u8,
    number: u64,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let message = message(what, number);
    loop {
        let parts = [IoSlice::new(&message)];
        match sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(MESSAGE) => return Ok(()),
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The next message with its descriptors; `None` if there is none any more.
fn hear(socket: &impl AsFd) -> io::Result<Option<(u8, u64, Vec<OwnedFd>)>> {
    let mut bytes = [0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = loop {
        match recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            other => break other?.bytes,
        }
    };
    if got == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    // Both kinds of sockets give each message by itself: no other byte came with its descriptors.
    if got != MESSAGE {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let [what, number @ ..] = bytes;
    Ok(Some((what, u64::from_le_bytes(number), descriptors)))
}

/// Takes in one message; says whether there was one.
fn step(socket: &impl AsFd, work: &mut Work) -> Result<bool, Errno> {
    let heard = hear(socket).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let Some((what, number, descriptors)) = heard else {
        return Ok(false);
    };
    let mut descriptors = descriptors.into_iter();
    let first = descriptors.next();
    let answer = match (what, first, descriptors.next()) {
        (FORGET, ..) => {
            work.held.remove(&number);
            return Ok(true);
        }
        (KEEP, Some(socket), None) => {
            let socket = UnixListener::from(socket);
            // Who stood there may be gone before he is let in.
            match socket.set_nonblocking(true) {
                Ok(()) => {
                    let limit = Duration::from_millis(number);
                    work.door = Some(Door { socket, limit });
                    KEEP
                }
                Err(_) => LOST,
            }
        }
        (PAGES, Some(socket), None) => {
            work.pages = Some(Pages::new(socket, number));
            PAGES
        }
        (ADD, Some(uffd), Some(pidfd)) => {
            let peer = Peer::new(pidfd);
            let kept = descriptors.next();
            work.held.insert(number, Held { uffd, peer, kept });
            ADD
        }
        _ => LOST,
    };
    // If nobody hears it, nothing is to be read any more.
    let _ = send(socket, &message(answer, number), SendFlags::NOSIGNAL);
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

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
        let error = watcher.add(&null, &peer, None).unwrap_err();
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
        let mut work = Work::default();
        for (number, (count, expected)) in (7..).zip([(0, LOST), (1, LOST), (2, ADD), (3, ADD)]) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors = vec![null.as_fd(); count];
            if count > 0 {
                assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            }
            let told = message(ADD, number);
            let parts = [IoSlice::new(&told)];
            sendmsg(&near, &parts, &mut control, SendFlags::empty()).unwrap();
            assert!(step(&far, &mut work).unwrap());
            let mut answer = [0; MESSAGE];
            recv(&near, &mut answer, RecvFlags::empty()).unwrap();
            assert_eq!(answer, message(expected, number));
        }
        let kept =
            |work: &Work, number: u64| work.held.get(&number).map(|held| held.kept.is_some());
        assert_eq!(kept(&work, 8), None);
        assert_eq!((kept(&work, 9), kept(&work, 10)), (Some(false), Some(true)));
        for number in [9, 10] {
            send(&near, &message(FORGET, number), SendFlags::empty()).unwrap();
            assert!(step(&far, &mut work).unwrap());
        }
        assert!(work.held.is_empty());
        drop(near);
        assert!(!step(&far, &mut work).unwrap());
    }
}
