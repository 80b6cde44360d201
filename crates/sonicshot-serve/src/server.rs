//! The socket that virtual machines come to, and a thread for each.

use crate::engine::{Control, End, Machine, VmOptions};
use crate::error::ServeError;
use crate::held::Held;
use crate::metrics::Metrics;
use crate::peer::{AGAIN, Peer, is_passing};
use crate::protocol::{Handshake, Received, is_documented, receive};
use crate::source::PageSource;
use crate::sys;
use crate::uffd::Uffd;
use crate::watch::{Watched, Watcher};
use core::time::Duration;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Gid, Mode, Uid, chmod, chown};
use serde_json::json;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// How long the message of somebody who will not be served is waited for: it may be on its way.
const STRANGER: Duration = Duration::from_secs(1);

/// How a server is set up.
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
    /// How each virtual machine is served.
    pub vm: VmOptions,
    /// Where what its recorder has noted is written to each time that one has ended.
    pub record: Option<PathBuf>,
    /// How many are served at once. More wait until one has ended.
    pub max_vms: usize,
    /// How long a message may take to come whole.
    pub patience: Duration,
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
            max_vms: 1024,
            patience: Duration::from_secs(10),
        }
    }
}

/// A page server: virtual machines connect to its socket, and are served from one source.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<dyn PageSource>,
    options: ServerOptions,
    watcher: Option<Arc<Watcher>>,
    /// Which socket is ours: its device and number.
    socket: (u64, u64),
    live: Mutex<usize>,
    less: Condvar,
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
    /// [`ServeError::SocketExists`] if there is something that is in use, or [`ServeError::Io`].
    pub fn bind(
        source: Arc<dyn PageSource>,
        options: ServerOptions,
        watcher: Option<Watcher>,
    ) -> Result<Self, ServeError> {
        let (listener, socket) = bind(&options)?;
        Ok(Self {
            listener,
            shared: Arc::new(Shared {
                source,
                options,
                watcher: watcher.map(Arc::new),
                socket,
                live: Mutex::new(0),
                less: Condvar::new(),
            }),
        })
    }

    /// Serves whoever connects: for ever, or until so many have come and ended.
    ///
    /// # Errors
    /// [`ServeError::System`] if the socket fails.
    pub fn run(&self, count: Option<usize>) -> Result<(), ServeError> {
        let mut came = 0_usize;
        while count.is_none_or(|count| came < count) {
            self.shared.wait_for_fewer(self.shared.options.max_vms);
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_passing(&error) => {
                    tracing::warn!("no connection can be taken: {error}");
                    std::thread::sleep(AGAIN);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(source) => {
                    return Err(ServeError::System {
                        operation: "accepting a connection",
                        source,
                    });
                }
            };
            came = came.saturating_add(1);
            self.shared.spawn(stream, came);
        }
        self.shared.wait_for_fewer(1);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let path = &self.shared.options.socket;
        // Another server may have taken the name.
        if identity(path).is_ok_and(|found| found == self.shared.socket) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Lets this process have as many descriptors as it may: four for each virtual machine.
pub fn allow_many_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // It may do with fewer.
    let _ = setrlimit(Resource::Nofile, limit);
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// The socket appears under its name with its rights, and takes the place of one that nobody
/// listens to.
fn bind(options: &ServerOptions) -> Result<(UnixListener, (u64, u64)), ServeError> {
    let path = &options.socket;
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
        if let Some((uid, gid)) = options.owner {
            chown(&new, Some(Uid::from_raw(uid)), gid.map(Gid::from_raw))?;
        }
        if !options.allow.is_empty() {
            chmod(&new, Mode::from_raw_mode(0o666))?;
        }
        std::fs::rename(&new, path)?;
        identity(path)
    })();
    if placed.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    Ok((
        listener,
        placed.map_err(failed("giving its rights to the socket"))?,
    ))
}

fn check_free(path: &Path) -> Result<(), ServeError> {
    let exists = |why| ServeError::SocketExists {
        path: path.to_owned(),
        why,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ServeError::io("looking at", path)(error)),
        Ok(found) if !found.file_type().is_socket() => Err(exists("is no socket")),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            Err(error) => Err(ServeError::io("connecting to", path)(error)),
            Ok(_) => Err(exists("somebody serves there")),
        },
    }
}

impl Shared {
    fn wait_for_fewer(&self, than: usize) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        while *live >= than.max(1) {
            live = self.less.wait(live).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn spawn(self: &Arc<Self>, stream: UnixStream, number: usize) {
        let stream = Arc::new(stream);
        loop {
            let counted = Counted::new(self);
            let (shared, stream) = (Arc::clone(self), Arc::clone(&stream));
            let thread = std::thread::Builder::new().name(format!("sonicshot-vm-{number}"));
            let spawned = thread.spawn(move || {
                let _counted = counted;
                let span = tracing::info_span!("vm", number);
                let _entered = span.enter();
                shared.serve(&stream);
            });
            match spawned {
                Ok(_) => return,
                // What it has sent stays unread until there is one.
                Err(error) => tracing::warn!("no thread for a virtual machine yet: {error}"),
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Serves one virtual machine until it has ended.
    fn serve(&self, stream: &Arc<UnixStream>) {
        let Some(mut session) = self.meet(stream) else {
            return;
        };
        let metrics = &self.options.vm.metrics;
        let running = Running::new(metrics);
        tracing::info!("began");
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
                session.held.has_ended();
                tracing::info!("ended");
            }
            End::Stopped => tracing::info!("stopped"),
        }
        if let (Some(recorder), Some(path)) = (&self.options.vm.recorder, &self.options.record) {
            match recorder.write(path) {
                Ok(set) => tracing::info!("recorded {} bytes", set.bytes()),
                Err(error) => tracing::error!("no recording: {}", error.with_causes()),
            }
        }
    }

    /// All before the first page. Who is refused after he has sent his memory is ended.
    fn meet(&self, stream: &Arc<UnixStream>) -> Option<Session> {
        let (held, answers, outcome) = match self.hear(stream) {
            Ok(heard) => heard,
            Err(error) => {
                self.refuse(&error);
                return None;
            }
        };
        let session =
            outcome.and_then(|(handshake, vm)| self.begin(&handshake, held.descriptors(), &vm));
        match session {
            Ok((machine, watched)) => {
                if answers {
                    answer(stream, &json!({"ok": true}));
                }
                Some(Session {
                    held,
                    machine,
                    _watched: watched,
                })
            }
            Err(error) => {
                self.refuse(&error);
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
        tracing::warn!("refused: {}", error.with_causes());
    }

    /// Takes in what somebody sends, whoever he is: of his memory nobody would know else. Says what
    /// is held, whether he waits for an answer, and whose memory it is, if it can be served.
    fn hear(&self, stream: &Arc<UnixStream>) -> Result<Heard, ServeError> {
        let who = sys::credentials(stream).map_err(ServeError::PeerGone)?;
        let sender = Peer::of_socket(stream, who);
        let welcome = self.may(who.uid);
        let patience = self.options.patience;
        let patience = if welcome {
            patience
        } else {
            patience.min(STRANGER)
        };
        let mut received = Received::default();
        let outcome = receive(stream, patience, &mut received);
        let answers = is_documented(&received.message);
        let (held, vm) = Held::new(stream, &mut received, who, sender, welcome);
        let check = || {
            if !welcome {
                return Err(ServeError::Peer {
                    uid: who.uid,
                    pid: who.pid,
                });
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
        &self,
        handshake: &Handshake,
        descriptors: &[Arc<OwnedFd>],
        peer: &Peer,
    ) -> Result<(Machine, Option<Watched>), ServeError> {
        let fd = descriptors.first().ok_or(ServeError::Descriptors {
            found: 0,
            expected: 1,
        })?;
        let uffd = Arc::new(Uffd::of_peer(Arc::clone(fd), handshake.needs_remove)?);
        let regions = handshake.regions(self.source.layout())?;
        let mut options = self.options.vm.clone();
        options.metrics = Arc::clone(&self.options.vm.metrics);
        let watcher = self.watcher.as_ref();
        let watched = watcher.map(|watcher| watcher.add(&uffd.as_fd(), peer));
        let watched = watched.transpose()?;
        let machine = Machine::new(
            Arc::clone(&self.source),
            uffd,
            &regions,
            options,
            Arc::new(Control::new()?),
            Some(Arc::clone(&peer.pidfd)),
        )?;
        tracing::debug!(
            form = handshake.form,
            regions = regions.len(),
            "a message came"
        );
        Ok((machine, watched))
    }
}

/// What is held, whether an answer is waited for, and what came, or why that cannot be served.
type Heard = (Held, bool, Result<(Handshake, Peer), ServeError>);

/// A connection that has a thread.
struct Counted(Arc<Shared>);

impl Counted {
    fn new(shared: &Arc<Shared>) -> Self {
        let mut live = shared.live.lock().unwrap_or_else(PoisonError::into_inner);
        *live = live.saturating_add(1);
        Self(Arc::clone(shared))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut live = self.0.live.lock().unwrap_or_else(PoisonError::into_inner);
        *live = live.saturating_sub(1);
        drop(live);
        self.0.less.notify_all();
    }
}

/// A virtual machine that is counted among those that run.
struct Running<'m>(&'m Metrics);

impl<'m> Running<'m> {
    fn new(metrics: &'m Metrics) -> Self {
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
    _watched: Option<Watched>,
}

fn answer(mut stream: &UnixStream, value: &serde_json::Value) {
    let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
    // Who does not read it will see what becomes of it.
    let _ = stream.write_all(format!("{value}\n").as_bytes());
}
