//! The socket that virtual machines come to, and a thread for each.

use crate::engine::{Control, End, Machine, VmOptions};
use crate::error::ServeError;
use crate::peer::Peer;
use crate::protocol::{Handshake, Received, receive};
use crate::source::PageSource;
use crate::sys;
use crate::uffd::Uffd;
use crate::watch::{Watched, Watcher};
use core::time::Duration;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Gid, Mode, Uid, chmod, chown};
use serde_json::json;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

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
                    std::thread::sleep(Duration::from_millis(100));
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

/// Whether a process that is ended frees what lacks.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
    )
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

    fn count(&self, change: impl FnOnce(usize) -> usize) {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        *live = change(*live);
        drop(live);
        self.less.notify_all();
    }

    fn spawn(self: &Arc<Self>, stream: UnixStream, number: usize) {
        self.count(|live| live.saturating_add(1));
        let shared = Arc::clone(self);
        let thread = std::thread::Builder::new().name(format!("sonicshot-vm-{number}"));
        let spawned = thread.spawn(move || {
            let span = tracing::info_span!("vm", number);
            let _entered = span.enter();
            shared.serve(&stream);
            shared.count(|live| live.saturating_sub(1));
        });
        if let Err(error) = spawned {
            // Its message was not read: it keeps its userfaultfd, or has not sent it.
            tracing::error!("no thread for a virtual machine: {error}");
            self.count(|live| live.saturating_sub(1));
        }
    }

    /// Serves one virtual machine until it has ended.
    fn serve(&self, stream: &UnixStream) {
        let metrics = &self.options.vm.metrics;
        let mut session = match self.meet(stream) {
            Ok(session) => session,
            Err(error) => {
                metrics.refused();
                tracing::warn!("refused: {}", error.with_causes());
                return;
            }
        };
        metrics.began();
        tracing::info!("began");
        let end = session.machine.run();
        metrics.ended();
        match end {
            End::Failed(error) => {
                metrics.failed();
                tracing::error!(
                    "the virtual machine was ended, for it would have read what is not its own: {}",
                    error.with_causes()
                );
            }
            End::Ended | End::Stopped => tracing::info!("ended"),
        }
        if let (Some(recorder), Some(path)) = (&self.options.vm.recorder, &self.options.record) {
            match recorder.write(path) {
                Ok(set) => tracing::info!("recorded {} bytes", set.bytes()),
                Err(error) => tracing::error!("no recording: {}", error.with_causes()),
            }
        }
    }

    /// All before the first page.
    fn meet(&self, stream: &UnixStream) -> Result<Session, ServeError> {
        let who = sys::credentials(stream).map_err(ServeError::PeerGone)?;
        if !self.may(who.uid) {
            return Err(ServeError::Peer {
                uid: who.uid,
                pid: who.pid,
            });
        }
        let sender = Peer::of_socket(stream, who.pid)?;
        let mut received = Received::default();
        let outcome = receive(stream, self.options.patience, &mut received);
        let count = received.descriptors.len();
        let outcome = outcome.and_then(|()| Handshake::parse(&received.message, count));
        let (answers, has_pidfd) = match &outcome {
            Ok(handshake) => (handshake.answers, handshake.has_pidfd),
            Err(_) => (false, false),
        };
        let mut descriptors = received.descriptors.into_iter();
        let first = descriptors.next();
        let kept = first.as_ref().and_then(|fd| fd.try_clone().ok());
        let second = descriptors.next();
        let session = outcome.and_then(|handshake| {
            let fd = first.ok_or(ServeError::Descriptors {
                found: 0,
                expected: 1,
            })?;
            let peer = match second {
                Some(pidfd) => Peer::of_descriptor(pidfd)?,
                None => sender.clone(),
            };
            self.begin(&handshake, fd, &peer)
        });
        match session {
            Ok(session) => {
                if answers {
                    answer(stream, &json!({"ok": true}));
                }
                Ok(session)
            }
            Err(error) => {
                if answers {
                    answer(stream, &json!({"error": error.with_causes()}));
                }
                let vm = (!has_pidfd).then_some(&sender);
                let_go(stream, kept, vm);
                Err(error)
            }
        }
    }

    fn may(&self, uid: u32) -> bool {
        let own = rustix::process::geteuid().as_raw();
        let owner = self.options.owner.map_or(own, |(uid, _)| uid);
        uid == 0 || uid == own || uid == owner || self.options.allow.contains(&uid)
    }

    fn begin(
        &self,
        handshake: &Handshake,
        fd: OwnedFd,
        peer: &Peer,
    ) -> Result<Session, ServeError> {
        let uffd = Arc::new(Uffd::of_peer(fd)?);
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
        Ok(Session {
            machine,
            _watched: watched,
        })
    }
}

/// A virtual machine, from its message to its end.
struct Session {
    machine: Machine,
    /// Dropped when it has ended.
    _watched: Option<Watched>,
}

fn answer(mut stream: &UnixStream, value: &serde_json::Value) {
    let _ = stream.set_write_timeout(Some(Duration::from_secs(1)));
    // Who does not read it will see what becomes of it.
    let _ = stream.write_all(format!("{value}\n").as_bytes());
}

/// Lets go of a virtual machine that cannot be served: it must not run on over memory that nobody
/// fills. A sender who is not the virtual machine has been told, and has to end it himself: the
/// descriptor is kept until he closes the connection.
fn let_go(mut stream: &UnixStream, uffd: Option<OwnedFd>, vm: Option<&Peer>) {
    let Some(uffd) = uffd else { return };
    // What is no userfaultfd is nobody's memory.
    let Ok(uffd) = Uffd::of_peer(uffd) else {
        return;
    };
    match vm {
        Some(vm) => {
            vm.end();
            vm.wait(None);
        }
        None => {
            let _ = stream.set_read_timeout(None);
            while matches!(stream.read(&mut [0; 64]), Ok(got) if got > 0) {}
        }
    }
    drop(uffd);
}
