//! The socket that virtual machines come to, and a thread for each.

use crate::crowd::{Crowd, GRACE, Seat};
use crate::descriptors::most_served;
use crate::engine::{Control, End, Kept, Machine, VmOptions};
use crate::error::ServeError;
use crate::held::Held;
use crate::metrics::Metrics;
use crate::peer::{AGAIN, Peer, is_passing};
use crate::protocol::{Handshake, Received, is_documented, receive, receive_rest};
use crate::socket::Named;
use crate::source::PageSource;
use crate::sys;
use crate::uffd::Uffd;
use crate::watch::{self, Given, Pages, Watched, Watcher};
use core::hash::{Hash, Hasher};
use core::ops::RangeFrom;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Gid, Mode, Uid, chmod, chown, fstat};
use rustix::io::Errno;
use serde_json::json;
use sonicshot::checkpoint::CheckpointError;
use std::collections::HashSet;
use std::hash::DefaultHasher;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// So often a name is tried that a watcher may be about to give up.
const TRIES: u32 = 30;

/// The time that a process may take to end whose memory is gone.
const DYING: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// Options of a server.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerOptions {
    /// The socket's name.
    pub socket: PathBuf,
    /// The user, and the group, that the socket belongs to, if not this process's.
    pub owner: Option<(u32, Option<u32>)>,
    /// Users that may have the guest's memory beside the socket's owner and root. If there are
    /// such, everybody may connect and is asked who he is; else nobody but the owner can.
    pub allow: Vec<u32>,
    /// The options for each virtual machine.
    pub vm: VmOptions,
    /// The file that the recorder's working set is written to each time that a virtual machine has
    /// ended.
    pub record: Option<PathBuf>,
    /// The most that are served at once; more wait until one has ended. Without it as many as there is
    /// room for in the process's table of descriptors, and 1024 at most
    /// ([`check_descriptors`](crate::check_descriptors)).
    pub max_vms: Option<usize>,
    /// The time that a message may take to come whole. Until it has, its sender takes none of the places
    /// of `max_vms`.
    pub patience: Duration,
    /// Whether another server can go on with the virtual machines, and this one with another's.
    pub keep: Option<KeepOptions>,
}

/// The way by which the virtual machines of a server that is gone come to another one. It needs a
/// [`Watcher`], and a source with an [identity](PageSource::identity).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct KeepOptions {
    /// The name of a socket, for this user alone, where the watcher waits for another server. A
    /// server that finds one there takes its virtual machines; if their server lives still, that is
    /// ended first.
    pub socket: PathBuf,
    /// The time that the watcher waits before it ends the virtual machines.
    pub limit: Duration,
}

impl KeepOptions {
    /// A socket of that name, where another server is waited for ten seconds.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            limit: Duration::from_secs(10),
        }
    }

    /// Says how long the watcher waits.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

impl ServerOptions {
    /// A socket of that name, for this user alone.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            owner: None,
            allow: Vec::new(),
            vm: VmOptions::default(),
            record: None,
            max_vms: None,
            patience: Duration::from_secs(10),
            keep: None,
        }
    }

    /// Says to which user, and to which group, the socket belongs.
    #[must_use]
    pub fn owner(mut self, user: u32, group: Option<u32>) -> Self {
        self.owner = Some((user, group));
        self
    }

    /// Lets a user have the guest's memory too.
    #[must_use]
    pub fn allow(mut self, user: u32) -> Self {
        self.allow.push(user);
        self
    }

    /// Says how each virtual machine is served.
    #[must_use]
    pub fn vm(mut self, vm: VmOptions) -> Self {
        self.vm = vm;
        self
    }

    /// Says where what the recorder has noted is written to.
    #[must_use]
    pub fn record(mut self, path: impl Into<PathBuf>) -> Self {
        self.record = Some(path.into());
        self
    }

    /// Says how many are served at once.
    #[must_use]
    pub fn max_vms(mut self, most: usize) -> Self {
        self.max_vms = Some(most);
        self
    }

    /// Says how long a message may take to come whole.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Lets another server go on with the virtual machines.
    #[must_use]
    pub fn keep(mut self, keep: KeepOptions) -> Self {
        self.keep = Some(keep);
        self
    }
}

/// A page server: virtual machines connect to its socket, and are served from one source.
#[derive(Debug)]
pub struct Server {
    socket: Named,
    shared: Arc<Shared>,
    /// Its name goes with the server; who listens is the watcher.
    _door: Option<Named>,
}

struct Shared {
    source: Arc<dyn PageSource>,
    options: ServerOptions,
    watcher: Option<Arc<Watcher>>,
    /// The mark that tells the source from others, if another server may go on.
    identity: Option<String>,
    /// The number of virtual machines that have begun, and the descriptor that wakes whoever waits for
    /// that.
    begun: AtomicUsize,
    wake: OwnedFd,
    /// All who have connected.
    crowd: Arc<Crowd>,
    /// The `userfaultfd`s that are served.
    served: Mutex<HashSet<u64>>,
}

impl core::fmt::Debug for Shared {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Shared")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Makes the socket. Without a `watcher`, virtual machines read zeroes if this process dies
    /// and they do not hold on to their `userfaultfd`, and wait for ever if they do.
    ///
    /// # Errors
    /// [`ServeError::SocketExists`] if there is something that is in use, or [`ServeError::Io`];
    /// [`ServeError::FewDescriptors`] if this process may not have as many as are needed;
    /// [`CheckpointError::CannotRun`] of a source that is for analysis, unless the options say that
    /// this is known; of [`ServerOptions::keep`] [`ServeError::NoIdentity`], or why the virtual
    /// machines of another server cannot be gone on with: they stay with its watcher.
    pub fn bind(
        source: Arc<dyn PageSource>,
        options: ServerOptions,
        watcher: Option<Watcher>,
    ) -> Result<Self, ServeError> {
        if source.is_for_analysis() && !options.vm.for_analysis {
            return Err(CheckpointError::CannotRun.into());
        }
        let most = most_served(options.max_vms)?;
        let identity = match &options.keep {
            Some(_) => Some(identity(&*source).ok_or(ServeError::NoIdentity)?),
            None => None,
        };
        let mut given = match &options.keep {
            Some(keep) => Given::ask(&keep.socket, most)?,
            None => None,
        };
        let pages = given.as_mut().and_then(|given| given.pages.take());
        let (socket, taken) = named(&options, pages)?;
        // Who is ready may be gone again before he is taken in.
        let nonblocking = socket.listener.set_nonblocking(true);
        nonblocking.map_err(failed("FIONBIO"))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            source,
            options,
            watcher: watcher.map(Arc::new),
            identity,
            begun: AtomicUsize::new(0),
            wake: wake.map_err(ServeError::system("eventfd"))?,
            crowd: Arc::new(Crowd::new(most)),
            served: Mutex::default(),
        });
        if let Some(given) = given
            && let Err(error) = shared.go_on(given)
        {
            if taken {
                // All stays with the watcher, and so does the name.
                socket.leave();
            }
            return Err(error);
        }
        let door = shared.wait_for_another()?;
        if let Some(watcher) = shared.watcher.as_ref().filter(|_| door.is_some()) {
            watcher.hold(&socket.listener, socket.hash())?;
        }
        Ok(Self {
            socket,
            _door: door,
            shared,
        })
    }

    /// Serves whoever connects: for ever, or until so many virtual machines have begun and all
    /// have ended. Those beyond them that have connected are ended then, as every one that cannot
    /// be served.
    ///
    /// # Errors
    /// [`ServeError::System`] if the socket fails.
    pub fn run(&self, count: Option<usize>) -> Result<(), ServeError> {
        let enough = || count.is_some_and(|count| self.shared.has_begun(count));
        let mut came = 1..;
        while !enough() {
            self.wait()?;
            if enough() {
                break;
            }
            self.shared.crowd.wait_for_place(enough);
            if enough() {
                break;
            }
            self.shared.crowd.make_place();
            if let Some(stream) = self.accept()? {
                self.take_next(stream, &mut came, count);
            }
        }
        // Nobody more finds it, and who has is told.
        self.socket.unname();
        self.turn_away(&mut came)?;
        self.shared.crowd.wait_for_none();
        // Who had looked the name up before.
        self.turn_away(&mut came)?;
        self.shared.crowd.wait_for_none();
        Ok(())
    }

    /// Refuses those who have connected.
    fn turn_away(&self, came: &mut RangeFrom<usize>) -> Result<(), ServeError> {
        loop {
            self.shared.crowd.make_place();
            match self.accept()? {
                Some(stream) => self.take_next(stream, came, Some(0)),
                None => return Ok(()),
            }
        }
    }

    /// Takes in the connection with the next number.
    fn take_next(&self, stream: UnixStream, came: &mut RangeFrom<usize>, count: Option<usize>) {
        if let Some(number) = came.next() {
            self.shared.take_in(stream, number, count);
        }
    }

    /// The next connection, if there is one.
    fn accept(&self) -> Result<Option<UnixStream>, ServeError> {
        loop {
            match self.socket.listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if is_passing(&error) => {
                    tracing::warn!("no connection can be taken: {error}");
                    std::thread::sleep(AGAIN);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(failed("accepting a connection")(error)),
            }
        }
    }

    /// Waits until there may be a connection, or a virtual machine has begun.
    fn wait(&self) -> Result<(), ServeError> {
        let shared = &self.shared;
        let mut ready = [
            PollFd::new(&self.socket.listener, PollFlags::IN),
            PollFd::new(&shared.wake, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ServeError::system("poll")(errno)),
        }
        let _ = rustix::io::read(&shared.wake, &mut [0_u8; 8]);
        Ok(())
    }
}

/// The socket, with its rights; and whether it is that of the server before, which has the name.
fn named(options: &ServerOptions, before: Option<Pages>) -> Result<(Named, bool), ServeError> {
    let change = |path: &Path| {
        if let Some((uid, gid)) = options.owner {
            chown(path, Some(Uid::from_raw(uid)), gid.map(Gid::from_raw))?;
        }
        if !options.allow.is_empty() {
            chmod(path, Mode::from_raw_mode(0o666))?;
        }
        Ok(())
    };
    if let Some(Pages { socket, identity }) = before
        && let Some(taken) = Named::take(socket, identity, &options.socket, change)?
    {
        return Ok((taken, true));
    }
    Ok((Named::bind(&options.socket, change)?, false))
}

fn failed(operation: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::System { operation, source }
}

/// The mark that tells a source from others, and where its memory lies.
fn identity(source: &dyn PageSource) -> Option<String> {
    let mut layout = DefaultHasher::new();
    for region in source.layout().regions() {
        (region.start().raw(), region.len()).hash(&mut layout);
    }
    Some(format!("{} {:016x}", source.identity()?, layout.finish()))
}

impl Shared {
    /// Goes on with what another server has left: with all of it, or with nothing.
    fn go_on(self: &Arc<Self>, mut given: Given) -> Result<(), ServeError> {
        let mut sessions = Vec::new();
        let count = given.machines.len();
        for held in core::mem::take(&mut given.machines) {
            let peer = held.peer.clone();
            match self.resume(held) {
                Ok(session) => sessions.push(session),
                // There is nothing to go on with: its memory is gone a little before it is.
                Err(_) if peer.wait(Some(&DYING)) => {}
                Err(error) => return Err(error),
            }
        }
        for session in &mut sessions {
            session.held.hold();
        }
        given.taken(count);
        for session in sessions {
            self.begun.fetch_add(1, Ordering::AcqRel);
            let number = self.begun.load(Ordering::Acquire);
            let session = Mutex::new(Some((session, self.crowd.enter_served())));
            self.spawn(number, move |shared| {
                if let Some((session, _seat)) = taken(&session) {
                    tracing::info!("goes on");
                    shared.run(session);
                }
            });
        }
        Ok(())
    }

    /// One virtual machine of another server.
    fn resume(self: &Arc<Self>, held: watch::Held) -> Result<Session, ServeError> {
        let none = || ServeError::Kept {
            why: "nothing is kept",
        };
        let identity = self.identity.as_deref().ok_or_else(none)?;
        let file = Arc::new(held.kept.ok_or_else(none)?);
        let fd = Arc::new(held.uffd);
        // It was let in before: what it needs, and from whom it may come, was asked then.
        let uffd = Arc::new(Uffd::of_peer(Arc::clone(&fd), false)?);
        held.peer.check_may_end()?;
        let control = Arc::new(Control::new()?);
        let served = Served::new(self, &uffd, &control)?;
        let (kept, regions) = Kept::open(Arc::clone(&file), identity)?;
        let mut machine = Machine::new(
            Arc::clone(&self.source),
            Arc::clone(&uffd),
            &regions,
            self.options.vm.clone(),
            control,
            Some(Arc::clone(&held.peer.pidfd)),
        )?;
        machine.go_on(kept, &regions)?;
        let watched = self.watch(&uffd, &held.peer, Some(&file))?;
        Ok(Session {
            held: Held::given(fd, held.peer),
            machine,
            _served: served,
            _watched: watched,
        })
    }

    fn watch(
        &self,
        uffd: &Uffd,
        peer: &Peer,
        kept: Option<&OwnedFd>,
    ) -> Result<Option<Watched>, ServeError> {
        let watcher = self.watcher.as_ref();
        let watched = watcher.map(|watcher| watcher.add(&uffd.as_fd(), peer, kept));
        watched.transpose()
    }

    /// Has the watcher wait for another server, should this one be gone.
    fn wait_for_another(&self) -> Result<Option<Named>, ServeError> {
        let (Some(keep), Some(watcher)) = (&self.options.keep, &self.watcher) else {
            return Ok(None);
        };
        // The watcher of a server that was killed has the name until it has ended, too.
        let mut tries = 0..TRIES;
        let door = loop {
            match Named::bind(&keep.socket, |_| Ok(())) {
                Err(ServeError::SocketExists { .. }) if tries.next().is_some() => {
                    std::thread::sleep(AGAIN);
                }
                bound => break bound?,
            }
        };
        watcher.keep(&door.listener, keep.limit)?;
        Ok(Some(door))
    }

    fn has_begun(&self, count: usize) -> bool {
        self.begun.load(Ordering::Acquire) >= count
    }

    /// Has `work` done by a thread of its own.
    fn spawn(self: &Arc<Self>, number: usize, work: impl Fn(&Arc<Self>) + Send + Sync + 'static) {
        let work = Arc::new(work);
        loop {
            let (shared, work) = (Arc::clone(self), Arc::clone(&work));
            let thread = std::thread::Builder::new().name(format!("sonicshot-vm-{number}"));
            let spawned = thread.spawn(move || {
                let span = tracing::info_span!("vm", number);
                let _entered = span.enter();
                work(&shared);
            });
            match spawned {
                Ok(_) => return,
                // What it has sent stays unread until there is one.
                Err(error) => tracing::warn!("no thread for a virtual machine yet: {error}"),
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Serves who has connected, by a thread of his own. It is too late for him once `count` have begun.
    fn take_in(self: &Arc<Self>, stream: UnixStream, number: usize, count: Option<usize>) {
        let stream = Arc::new(stream);
        let uid = sys::credentials(&stream).ok().map(|who| who.uid);
        let seat = Mutex::new(Some(self.crowd.enter(number, uid, &stream)));
        self.spawn(number, move |shared| {
            let Some(mut seat) = taken(&seat) else {
                return;
            };
            if let Some(session) = shared.meet(&stream, &mut seat, count) {
                tracing::info!("began");
                shared.run(session);
            }
        });
    }

    /// Serves one virtual machine until it has ended.
    fn run(&self, mut session: Session) {
        let metrics = &self.options.vm.metrics;
        let running = Running::new(metrics);
        let end = session.machine.run();
        drop(running);
        match end {
            End::Failed(error) => {
                metrics.failed();
                tracing::error!(
                    "the virtual machine was ended, for it would have read what is not its own: {}",
                    error.with_causes()
                );
            }
            End::Ended => {
                session.held.release();
                tracing::info!("ended");
            }
            End::Stopped | End::Complete => tracing::info!("stopped"),
        }
        if let (Some(recorder), Some(path)) = (&self.options.vm.recorder, &self.options.record) {
            match recorder.write(path) {
                Ok(set) => tracing::info!("recorded {} bytes", set.bytes()),
                Err(error) => tracing::error!("no recording: {}", error.with_causes()),
            }
        }
    }

    /// All before the first page. Who is refused after he has sent his memory is ended.
    fn meet(
        self: &Arc<Self>,
        stream: &Arc<UnixStream>,
        seat: &mut Seat,
        count: Option<usize>,
    ) -> Option<Session> {
        let is_late = || count.is_some_and(|count| self.has_begun(count));
        let (mut held, answers, outcome) = match self.hear(stream, seat, count == Some(0)) {
            Ok(heard) => heard,
            Err(error) => {
                self.refuse(&error);
                return None;
            }
        };
        let session = outcome.and_then(|(handshake, vm)| {
            let mut watched = None;
            if is_late() || !seat.take_now() {
                // It has sent its memory, and nobody else has it while it waits.
                if let Some(uffd) = held.descriptors().first() {
                    let watcher = self.watcher.as_ref();
                    watched = watcher
                        .map(|watcher| watcher.add(uffd, &vm, None))
                        .transpose()?;
                }
                if !seat.take(is_late) {
                    return Err(ServeError::Late);
                }
            }
            let _until_it_is_watched = watched;
            self.begin(&handshake, held.descriptors(), &vm)
        });
        match session {
            Ok((machine, served, watched)) => {
                self.begun.fetch_add(1, Ordering::AcqRel);
                let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
                self.crowd.wake();
                if answers {
                    answer(stream, &json!({"ok": true}));
                }
                Some(Session {
                    held,
                    machine,
                    _served: served,
                    _watched: watched,
                })
            }
            Err(error) => {
                self.refuse(&error);
                if matches!(error, ServeError::Twice) {
                    held.release();
                }
                if answers {
                    answer(stream, &json!({"error": error.with_causes()}));
                }
                drop(held);
                None
            }
        }
    }

    fn refuse(&self, error: &ServeError) {
        self.options.vm.metrics.refused();
        // Lines of their own kinds: of many of one kind some are left out.
        match error {
            ServeError::Peer { .. } => {
                tracing::warn!("refused: a stranger: {}", error.with_causes());
            }
            ServeError::Crowded { .. } | ServeError::Slow { .. } | ServeError::Closed { .. } => {
                tracing::warn!("refused: no message: {}", error.with_causes());
            }
            _ => tracing::warn!("refused: {}", error.with_causes()),
        }
    }

    /// Takes in what somebody sends, whoever he is: of his memory nobody would know else. Says what
    /// is held, whether he waits for an answer, and whose memory it is, if it can be served.
    fn hear(
        &self,
        stream: &Arc<UnixStream>,
        seat: &Seat,
        is_late: bool,
    ) -> Result<Heard, ServeError> {
        let who = sys::credentials(stream).map_err(ServeError::PeerGone)?;
        let sender = Peer::of_socket(stream, who);
        let welcome = self.may(who.uid);
        let patience = self.options.patience;
        let patience = if welcome && !is_late {
            patience
        } else {
            patience.min(GRACE)
        };
        let mut received = Received::default();
        let mut outcome = receive(stream, patience, &mut received);
        if seat.heard() && matches!(outcome, Err(ServeError::Closed { .. })) {
            let len = received.message.len();
            outcome = Err(ServeError::Crowded { len });
        }
        if outcome.is_err() {
            receive_rest(stream, &mut received);
        }
        let answers = is_documented(&received.message);
        let (held, vm) = Held::new(stream, &mut received, who, sender, welcome);
        let check = || {
            if !welcome {
                return Err(ServeError::Peer {
                    uid: who.uid,
                    pid: who.pid,
                });
            }
            if is_late {
                return Err(ServeError::Late);
            }
            outcome?;
            let handshake = Handshake::parse(&received.message, held.descriptors().len())?;
            let vm = vm?;
            vm.check_may_end()?;
            Ok((handshake, vm))
        };
        let checked = check();
        Ok((held, answers, checked))
    }

    fn may(&self, uid: u32) -> bool {
        let own = rustix::process::geteuid().as_raw();
        let owner = self.options.owner.map_or(own, |(uid, _)| uid);
        uid == 0 || uid == own || uid == owner || self.options.allow.contains(&uid)
    }

    fn begin(
        self: &Arc<Self>,
        handshake: &Handshake,
        descriptors: &[Arc<OwnedFd>],
        peer: &Peer,
    ) -> Result<(Machine, Option<Served>, Option<Watched>), ServeError> {
        let fd = descriptors.first().ok_or(ServeError::Descriptors {
            found: 0,
            expected: 1,
        })?;
        let uffd = Arc::new(Uffd::of_peer(Arc::clone(fd), handshake.needs_remove)?);
        let control = Arc::new(Control::new()?);
        let served = Served::new(self, &uffd, &control)?;
        let regions = handshake.regions(self.source.layout())?;
        let mut options = self.options.vm.clone();
        options.metrics = Arc::clone(&self.options.vm.metrics);
        let mut machine = Machine::new(
            Arc::clone(&self.source),
            Arc::clone(&uffd),
            &regions,
            options,
            control,
            Some(Arc::clone(&peer.pidfd)),
        )?;
        let kept = self.identity.as_deref();
        let kept = kept.map(|identity| machine.keep(identity)).transpose()?;
        let watched = self.watch(&uffd, peer, kept.as_deref())?;
        tracing::debug!(
            form = handshake.form,
            regions = regions.len(),
            "a message came"
        );
        Ok((machine, served, watched))
    }
}

/// The descriptors that are held, whether an answer is waited for, and the handshake, or why it cannot
/// be served.
type Heard = (Held, bool, Result<(Handshake, Peer), ServeError>);

/// A `userfaultfd` that is served, by its inode: what was given back is known to one thread alone.
struct Served {
    shared: Arc<Shared>,
    inode: u64,
}

impl Served {
    fn new(
        shared: &Arc<Shared>,
        uffd: &Uffd,
        control: &Control,
    ) -> Result<Option<Self>, ServeError> {
        let inode = |fd: BorrowedFd<'_>| fstat(fd).map(|found| found.st_ino);
        let inode = |fd| inode(fd).map_err(ServeError::system("fstat"));
        let of_uffd = inode(uffd.as_fd())?;
        // Before Linux 5.12 all of them have one, as an eventfd has it too.
        if of_uffd == inode(control.wake.as_fd())? {
            return Ok(None);
        }
        let mut served = shared.served.lock().unwrap_or_else(PoisonError::into_inner);
        if !served.insert(of_uffd) {
            return Err(ServeError::Twice);
        }
        Ok(Some(Self {
            shared: Arc::clone(shared),
            inode: of_uffd,
        }))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let served = self.shared.served.lock();
        served
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.inode);
    }
}

/// The content, for whoever comes first.
fn taken<T>(content: &Mutex<Option<T>>) -> Option<T> {
    let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
    content.take()
}

/// A virtual machine that is counted among those that run.
pub(crate) struct Running<'m>(&'m Metrics);

impl<'m> Running<'m> {
    pub fn new(metrics: &'m Metrics) -> Self {
        metrics.began();
        Self(metrics)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.ended();
    }
}

/// A virtual machine, from its message to its end. Dropped in this order: it has ended before the
/// watcher forgets it.
struct Session {
    held: Held,
    machine: Machine,
    _served: Option<Served>,
    _watched: Option<Watched>,
}

fn answer(mut stream: &UnixStream, value: &serde_json::Value) {
    let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
    // Who does not read it will see what becomes of it.
    let _ = stream.write_all(format!("{value}\n").as_bytes());
}
