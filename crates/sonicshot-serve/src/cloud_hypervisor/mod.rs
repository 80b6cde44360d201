//! Cloud Hypervisor (53 and later) restored page by page: its local migration protocol in the mode
//! `postcopy`, with this server in the place of the sender.
//!
//! It listens (`receive-migration receiver_url=unix:PATH,memory_mode=postcopy`), and the server
//! connects. A first connection carries the configuration, a file for each slot of memory, and the
//! state; a second one the questions for pages, one after the other. Whenever no guest waits, it
//! asks for the next page, until it has all: what was left out of the snapshot becomes resident
//! there as well, for the protocol has no word for zero.
//!
//! A page is in the shared file before its question is answered. What becomes of the answer
//! differs: 53.0 wakes who waits, whose fault then finds the page; later versions map it
//! (`CONTINUE`). Both need nothing more than that it is there.
//!
//! Its `userfaultfd` is its own. Should the server die, the second connection ends, by which it
//! learns that no pages come: but it lets go of its `userfaultfd` before it ends, and its guest
//! could read zeroes then. So the watcher holds on to that connection until it is ended.

mod migration;
#[expect(unsafe_code, reason = "memory that is mapped in two processes")]
mod pages;
mod wire;

pub use self::migration::Migration;
pub(crate) use self::migration::{CONFIG_FILE, slots_of};
use self::pages::{Mapped, Shared};
pub use self::wire::FaultRequest;
use self::wire::{Command, HEADER, ROLE_FAULT, well};
use crate::engine::{Asked, Asks, Control, End, Machine, VmOptions};
use crate::error::ServeError;
use crate::peer::Peer;
use crate::server::Running;
use crate::source::PageSource;
use crate::sys::{self, Credentials};
use crate::watch::{Watched, Watcher};
use core::mem::MaybeUninit;
use core::time::Duration;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sonicshot::to_u64;
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::Builder;

/// The factor by which an answer may take longer than others if the virtual machine is made before it.
const MAKING: u32 = 6;

/// Options for restoring Cloud Hypervisors.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CloudOptions {
    /// The options for each virtual machine.
    pub vm: VmOptions,
    /// Users that may have the guest's memory beside this process's own and root.
    pub allow: Vec<u32>,
    /// Leave the guest paused.
    pub paused: bool,
    /// The time that an answer may take.
    pub patience: Duration,
}

impl Default for CloudOptions {
    fn default() -> Self {
        Self {
            vm: VmOptions::default(),
            allow: Vec::new(),
            paused: false,
            patience: Duration::from_secs(10),
        }
    }
}

impl CloudOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how each virtual machine is served.
    #[must_use]
    pub fn vm(mut self, vm: VmOptions) -> Self {
        self.vm = vm;
        self
    }

    /// Lets a user have the guest's memory too.
    #[must_use]
    pub fn allow(mut self, user: u32) -> Self {
        self.allow.push(user);
        self
    }

    /// Says whether the guest is left paused.
    #[must_use]
    pub fn paused(mut self, paused: bool) -> Self {
        self.paused = paused;
        self
    }

    /// Says how long an answer may take.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

/// The outcome for a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Restored {
    /// It has all of its memory, and needs no server any more.
    Complete,
    /// It ended before it had.
    Ended,
}

/// Restores Cloud Hypervisors from one snapshot.
pub struct CloudHypervisor {
    source: Arc<dyn PageSource>,
    migration: Migration,
    options: CloudOptions,
    watcher: Option<Arc<Watcher>>,
}

impl core::fmt::Debug for CloudHypervisor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("CloudHypervisor")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl CloudHypervisor {
    /// Restores from `source`, whose memory `migration` is of.
    ///
    /// # Errors
    /// [`ServeError::NotInLayout`], [`ServeError::NotInSlot`] or [`ServeError::MigrationSlot`] if
    /// it is not.
    pub fn new(
        source: Arc<dyn PageSource>,
        migration: Migration,
        options: CloudOptions,
        watcher: Option<Arc<Watcher>>,
    ) -> Result<Self, ServeError> {
        migration.parts(source.layout())?;
        Ok(Self {
            source,
            migration,
            options,
            watcher,
        })
    }

    /// Restores the Cloud Hypervisor that listens at `path`, and serves it until it has all of its
    /// memory or has ended.
    ///
    /// # Errors
    /// [`ServeError::Peer`] if who listens may not have the memory, [`ServeError::Rejected`],
    /// [`ServeError::Answer`] or [`ServeError::NoAnswer`] if it does not take it;
    /// [`ServeError::Page`] and others if a page could not be had, or what it asked for was not the
    /// guest's: then it was ended.
    pub fn restore(&self, path: &Path) -> Result<Restored, Arc<ServeError>> {
        let done = self.connect(path).and_then(|session| session.run(self));
        let metrics = &self.options.vm.metrics;
        match done {
            Ok(End::Failed(error)) => {
                metrics.failed();
                Err(error)
            }
            Ok(End::Complete) => Ok(Restored::Complete),
            Ok(End::Ended | End::Stopped) => Ok(Restored::Ended),
            Err(error) => {
                metrics.refused();
                Err(Arc::new(error))
            }
        }
    }

    /// All before the state, without which no guest runs.
    fn connect(&self, path: &Path) -> Result<Session, ServeError> {
        let shared = Shared::new(&self.migration, self.source.layout())?;
        let (stream, who) = self.reach(path)?;
        let peer = Peer::of_socket(&stream, who)?;
        peer.check_may_end()?;
        let channel = Channel::new(stream, self.options.patience)?;
        channel.ask(Command::Start, &[])?;
        for (slot, file) in &shared.files {
            channel.send_file(slot.number, file.as_fd())?;
        }
        channel.ask(Command::Config, &self.migration.config)?;
        let (mut faults, second) = self.reach(path)?;
        if second != who {
            return Err(ServeError::OtherPeer {
                first: who.pid,
                second: second.pid,
            });
        }
        let written = faults.write_all(&ROLE_FAULT);
        written.map_err(no_answer("the role of the connection for page faults"))?;
        let nonblocking = faults.set_nonblocking(true);
        nonblocking.map_err(no_answer("the role of the connection for page faults"))?;
        let watched = self.watcher.as_ref();
        let watched = watched.map(|watcher| watcher.add(&faults, &peer, None));
        let watched = watched.transpose()?;
        let control = Arc::new(Control::new()?);
        let machine = Machine::new(
            Arc::clone(&self.source),
            Arc::new(shared.uffd),
            &shared.regions,
            self.options.vm.clone(),
            Arc::clone(&control),
            Some(Arc::clone(&peer.pidfd)),
        )?;
        Ok(Session {
            machine: machine.asked_by(Box::new(Questions::new(faults))),
            channel,
            control,
            peer,
            _mapped: shared.mapped,
            _watched: watched,
        })
    }

    /// Connects to who listens, if he may have the guest's memory.
    fn reach(&self, path: &Path) -> Result<(UnixStream, Credentials), ServeError> {
        let stream = UnixStream::connect(path).map_err(ServeError::io("connecting to", path))?;
        let who = sys::credentials(&stream).map_err(ServeError::PeerGone)?;
        let own = rustix::process::geteuid().as_raw();
        if who.uid != 0 && who.uid != own && !self.options.allow.contains(&who.uid) {
            return Err(ServeError::Peer {
                uid: who.uid,
                pid: who.pid,
            });
        }
        Ok((stream, who))
    }
}

/// A virtual machine that is to run. Dropped in this order.
struct Session {
    machine: Machine,
    channel: Channel,
    control: Arc<Control>,
    peer: Peer,
    _mapped: Vec<Mapped>,
    _watched: Option<Watched>,
}

impl Session {
    /// Serves pages while the virtual machine is made, and from then on.
    fn run(mut self, of: &CloudHypervisor) -> Result<End, ServeError> {
        let running = Running::new(&of.options.vm.metrics);
        let (machine, channel) = (&mut self.machine, &self.channel);
        let (control, peer) = (&self.control, &self.peer);
        let served = std::thread::scope(|scope| {
            let serving = Builder::new().spawn_scoped(scope, || machine.run());
            let serving = serving.map_err(|source| ServeError::System {
                operation: "starting a thread",
                source,
            })?;
            let mut may_run = false;
            let made = make(of, channel, &mut may_run);
            if made.is_ok() {
                tracing::info!("began");
            } else {
                // Who may have begun to run needs pages that will not come.
                if may_run {
                    peer.end();
                }
                control.stop();
            }
            Ok::<_, ServeError>((serving.join(), made))
        });
        drop(running);
        let (end, made) = served?;
        let end = end.map_err(|_| ServeError::Thread)?;
        match (made, end) {
            // Why it could not be made.
            (_, End::Failed(error)) => Ok(End::Failed(error)),
            (Err(error), _) => Err(error),
            (Ok(()), end) => Ok(end),
        }
    }
}

/// Has the virtual machine made, and run; `may_run` says whether it may, also if this fails.
fn make(of: &CloudHypervisor, channel: &Channel, may_run: &mut bool) -> Result<(), ServeError> {
    channel.wait_for(of.options.patience.saturating_mul(MAKING))?;
    channel.ask(Command::State, &of.migration.state)?;
    *may_run = true;
    let complete = match of.options.paused {
        true => Command::CompletePaused,
        false => Command::Complete,
    };
    channel.ask(complete, &[])
}

/// The first connection.
struct Channel {
    stream: UnixStream,
}

impl Channel {
    fn new(stream: UnixStream, patience: Duration) -> Result<Self, ServeError> {
        let channel = Self { stream };
        channel.wait_for(patience)?;
        Ok(channel)
    }

    /// Sets the time that each answer may take from now on.
    fn wait_for(&self, limit: Duration) -> Result<(), ServeError> {
        // None would be for ever.
        let limit = Some(limit.max(Duration::from_millis(1)));
        let set = self.stream.set_read_timeout(limit);
        let set = set.and_then(|()| self.stream.set_write_timeout(limit));
        set.map_err(|source| ServeError::System {
            operation: "setting a socket's timeouts",
            source,
        })
    }

    /// Says a command with what follows it, and waits until it is done.
    fn ask(&self, command: Command, payload: &[u8]) -> Result<(), ServeError> {
        let mut stream = &self.stream;
        let request = command.request(to_u64(payload.len()));
        let said = stream.write_all(&request);
        let said = said.and_then(|()| stream.write_all(payload));
        // Who closes the connection while it is spoken to may have said why before.
        self.hear(command).map_err(|error| match (said, error) {
            (Err(source), ServeError::NoAnswer { command, .. }) => {
                ServeError::NoAnswer { command, source }
            }
            (_, error) => error,
        })
    }

    /// Sends the file of a slot, and waits until it was taken.
    fn send_file(&self, slot: u32, file: BorrowedFd<'_>) -> Result<(), ServeError> {
        let command = Command::MemoryFd;
        let number = slot.to_le_bytes();
        let request = command.request(to_u64(number.len()));
        let failed = no_answer(command.name());
        (&self.stream).write_all(&request).map_err(failed)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let file = [file];
        control.push(SendAncillaryMessage::ScmRights(&file));
        let parts = [IoSlice::new(&number)];
        let sent = loop {
            match sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        sent.map_err(|errno| no_answer(command.name())(errno.into()))?;
        self.hear(command)
    }

    fn hear(&self, command: Command) -> Result<(), ServeError> {
        let mut answer = [0; HEADER];
        let read = (&self.stream).read_exact(&mut answer);
        read.map_err(no_answer(command.name()))?;
        command.check(&answer)
    }
}

fn no_answer(command: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::NoAnswer { command, source }
}

/// The second connection.
struct Questions {
    stream: UnixStream,
    /// The outcome of the next question.
    buffer: [u8; FaultRequest::MAX],
    have: usize,
}

impl Questions {
    const fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            buffer: [0; FaultRequest::MAX],
            have: 0,
        }
    }

    /// The question that is whole, if one is.
    fn whole(&mut self) -> Result<Option<FaultRequest>, ServeError> {
        let (have, _) = self.buffer.split_at(self.have);
        let Some((request, len)) = FaultRequest::parse(have)? else {
            return Ok(None);
        };
        self.buffer.copy_within(len.min(self.have)..self.have, 0);
        self.have = self.have.saturating_sub(len);
        Ok(Some(request))
    }
}

impl Asks for Questions {
    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn next(&mut self) -> Result<Asked, ServeError> {
        loop {
            match self.whole()? {
                Some(FaultRequest::Pages(range)) => return Ok(Asked::Pages(range)),
                Some(FaultRequest::Abandon) => {
                    self.answer()?;
                    return Ok(Asked::Closed);
                }
                None => {}
            }
            let (_, room) = self.buffer.split_at_mut(self.have);
            match self.stream.read(room) {
                Ok(0) => return Ok(Asked::Closed),
                Ok(got) => self.have = self.have.saturating_add(got),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Asked::Nothing),
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Ok(Asked::Closed),
                    _ => return Err(no_answer("PageFault")(error)),
                },
            }
        }
    }

    fn answer(&mut self) -> Result<(), ServeError> {
        // It asks for one thing at a time: there is room for what it has not read.
        match self.stream.write_all(&well()) {
            // It is read next that there is nobody.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            other => other.map_err(no_answer("PageFault")),
        }
    }
}
