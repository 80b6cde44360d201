//! A virtual machine that cannot be served after it has sent its memory must not run on over pages of
//! zeroes.

use crate::guest::{PAGE, PAGES, expected, layout, save};
use crate::own::{Memory, regions};
use crate::server::{Serving, client_command, example, succeeded};
use core::mem::MaybeUninit;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use sonicshot::checkpoint::Compression;
use sonicshot::{Gpa, GpaRange, RamLayout};
use sonicshot_serve::{
    CheckpointSource, PageSource, Piece, Run, ServeError, Server, ServerOptions, Uffd,
};
use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// A process that stands for a virtual machine of which somebody else tells.
struct Machine {
    child: Child,
    pidfd: OwnedFd,
}

impl Machine {
    fn new() -> Self {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        Self { child, pidfd }
    }

    /// Whether it was ended.
    fn is_ended(&mut self) -> bool {
        let status = self.child.try_wait().unwrap();
        status.is_some_and(|status| status.signal() == Some(9))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connects, and sends that from this process.
fn send(serving: &Serving, message: &str, descriptors: &[BorrowedFd<'_>]) -> UnixStream {
    let stream = UnixStream::connect(serving.socket()).unwrap();
    say(&stream, message, descriptors);
    stream
}

fn say(stream: &UnixStream, message: &str, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    let parts = [IoSlice::new(message.as_bytes())];
    sendmsg(stream, &parts, &mut control, SendFlags::empty()).unwrap();
}

/// All that comes back.
fn rest(mut stream: &UnixStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

const WHOLE: &str =
    r#"{"sonicshot":1,"pidfd":true,"regions":[{"host":4096,"len":4096,"gpa":0,"page":4096}]}"#;
const HALF: &str = r#"{"sonicshot":1,"pidfd":true,"regions":[}"#;

/// The sender tells of another process: that is ended, whatever is wrong, and he is answered.
#[test]
fn a_machine_that_another_tells_of_is_ended() {
    let uffd = Uffd::new().unwrap();
    let null = File::open("/dev/null").unwrap();
    let (memory, none) = (uffd.as_fd(), null.as_fd());
    // What is sent beside the process's own descriptor, and whether that comes first.
    let cases: [(&str, Vec<BorrowedFd<'_>>, bool); 6] = [
        (WHOLE, vec![memory], false),
        (HALF, vec![memory], false),
        (r#"{"sonicshot":7}"#, vec![memory], false),
        // Memory is not looked for in the first place alone.
        (WHOLE, vec![memory], true),
        (WHOLE, vec![none, memory], true),
        (WHOLE, vec![memory, none, none], false),
    ];
    let serving = Serving::start(1, Compression::None, |_| {});
    for (message, mut descriptors, first) in cases {
        let mut machine = Machine::new();
        let at = if first { 0 } else { 1 };
        descriptors.insert(at, machine.pidfd.as_fd());
        let count = descriptors.len();
        let answer = rest(&send(&serving, message, &descriptors));
        assert!(answer.starts_with(r#"{"error":"#), "{message}: {answer}");
        drop(descriptors);
        assert!(machine.is_ended(), "{message} with {count}: {answer}");
    }
    serving.serve_one();
}

/// Nobody is ended who has sent no memory, and none who is not known.
#[test]
fn nobody_is_ended_for_nothing() {
    let uffd = Uffd::new().unwrap();
    let null = File::open("/dev/null").unwrap();
    let serving = Serving::start(1, Compression::None, |_| {});
    let mut machine = Machine::new();
    for (descriptors, what) in [
        (
            vec![null.as_fd(), machine.pidfd.as_fd()],
            "not a userfaultfd",
        ),
        // Of whom memory comes that is not his own, and not whose it is. It is held until the
        // connection is closed.
        (
            vec![uffd.as_fd()],
            "1 file descriptors came with the message, not 2",
        ),
        (
            vec![uffd.as_fd(), null.as_fd()],
            "one of its file descriptors is a pidfd, and none of the 2 that came is",
        ),
    ] {
        let stream = send(&serving, WHOLE, &descriptors);
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer).unwrap();
        assert!(answer.contains(what), "{answer}");
    }
    assert!(!machine.is_ended());
    serving.serve_one();
}

#[test]
fn a_sender_whose_message_is_wrong_is_ended() {
    let serving = Serving::start(1, Compression::None, |_| {});
    let child = serving.client("twice", 4096, "check", 1);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    serving.serve_one();
}

#[test]
fn a_stranger_does_not_run_on_over_zeroes() {
    const NOBODY: u32 = 65534;
    const JAILED: u32 = 4321;
    let root = rustix::process::geteuid().is_root();
    if !sonicshot_testkit::has("the rights of root", root) {
        return;
    }
    let serving = Serving::start(1, Compression::None, |options| options.allow = vec![JAILED]);
    // A program that every user may run, whatever the build's folder is.
    let everybody = || PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(serving.folder.path(), everybody()).unwrap();
    let program = serving.folder.path().join("vm_client");
    std::fs::copy(example("vm_client"), &program).unwrap();
    std::fs::set_permissions(&program, everybody()).unwrap();
    let as_user = |uid: u32| {
        let known = client_command(&serving.socket(), "1.7", 4096, "check", 1);
        let mut command = Command::new(&program);
        command.args(known.get_args()).uid(uid).gid(uid);
        command.current_dir("/").output().unwrap()
    };
    let output = as_user(NOBODY);
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    let output = as_user(JAILED);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(serving.metric("connections_refused_total"), 1);
    serving.end(Vec::new());
}

/// A source with an error of its own.
struct Broken(CheckpointSource<File>);

const BROKEN: u64 = 5 * 4096;

impl PageSource for Broken {
    fn layout(&self) -> &RamLayout {
        self.0.layout()
    }

    fn run_at(&self, at: Gpa) -> Result<Run, ServeError> {
        assert!(at.raw() != BROKEN, "a source that is broken, for a test");
        self.0.run_at(at)
    }

    fn read<'b>(&self, range: GpaRange, buffer: &'b mut Vec<u8>) -> Result<Piece<'b>, ServeError> {
        self.0.read(range, buffer)
    }

    fn by_need(&self) -> Arc<[GpaRange]> {
        self.0.by_need()
    }
}

#[test]
fn a_thread_that_fails_takes_its_machine_along() {
    assert!(layout().contains(Gpa::new(BROKEN), 4096));
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("pages");
    let options = ServerOptions::new(&socket);
    let metrics = Arc::clone(&options.vm.metrics);
    let file = save(Compression::Lz4);
    let source = Broken(CheckpointSource::new(
        crate::guest::open(&file),
        1 << 20,
        Arc::default(),
    ));
    let server = Server::bind(Arc::new(source), options, None).unwrap();
    std::thread::scope(|scope| {
        // One of them has begun, and so has the other.
        scope.spawn(|| server.run(Some(2)).unwrap());
        let client = |page| client_command(&socket, "1.7", 4096, "bad", page).spawn();
        let output = client(BROKEN / 4096).unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
        assert_eq!(output.stdout, b"ready\n");
        // Others are served, and the server ends.
        succeeded(client(0).unwrap());
    });
    let text = metrics.to_text();
    assert!(text.contains("\nsonicshot_serve_machines 0\n"), "{text}");
}

/// Whoever has connected when all have come that were to is told, and ended, before it can run.
#[test]
fn who_comes_too_late_is_ended() {
    let serving = Serving::start(1, Compression::None, |options| {
        options.max_vms = Some(1);
        options.patience = Duration::from_secs(3600);
    });
    // It takes no virtual machine's place.
    let mut idle = UnixStream::connect(serving.socket()).unwrap();
    let memory = Memory::new(PAGES * PAGE, false);
    let (own, registered) = memory.register();
    let none = Uffd::new().unwrap();
    let (mut first, mut machine) = (Machine::new(), Machine::new());
    let regions: Vec<_> = regions(&registered, PAGE)
        .iter()
        .map(|region| {
            let (host, guest, page) = (region.host().raw(), region.guest(), region.page());
            let (gpa, len) = (guest.start().raw(), guest.len());
            format!(r#"{{"host":{host},"len":{len},"gpa":{gpa},"page":{page}}}"#)
        })
        .collect();
    let regions = regions.join(",");
    let message = format!(r#"{{"sonicshot":1,"pidfd":true,"regions":[{regions}]}}"#);
    let late = UnixStream::connect(serving.socket()).unwrap();
    let served = send(&serving, &message, &[own.as_fd(), first.pidfd.as_fd()]);
    let mut answer = String::new();
    BufReader::new(&served).read_line(&mut answer).unwrap();
    assert_eq!(answer, "{\"ok\":true}\n");
    say(&late, WHOLE, &[none.as_fd(), machine.pidfd.as_fd()]);
    // The name goes as soon as that is known: some find it still.
    let silent = UnixStream::connect(serving.socket()).ok();
    idle.write_all(b"]").unwrap();
    assert!(memory.read(5) == expected(5));
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let answer = rest(&late);
    assert!(
        answer.contains("as many virtual machines as it was started for"),
        "{answer}"
    );
    assert!(machine.is_ended());
    if let Some(silent) = &silent {
        assert_eq!(rest(silent), "");
    }
    let metrics = Arc::clone(&serving.metrics);
    serving.end(Vec::new());
    let text = metrics.to_text();
    let refused = 2 + usize::from(silent.is_some());
    let told = format!("\nsonicshot_serve_connections_refused_total {refused}\n");
    assert!(text.contains(&told), "{text}");
}

/// Whoever says nothing takes no place of a virtual machine's, however many of them there are; the one
/// that has waited longest goes.
#[test]
fn who_is_silent_takes_no_place() {
    let serving = Serving::start(2, Compression::Lz4, |options| {
        options.max_vms = Some(1);
        options.patience = Duration::from_secs(3600);
    });
    let connect = || UnixStream::connect(serving.socket()).unwrap();
    let mut half = connect();
    half.write_all(b"{").unwrap();
    succeeded(serving.client("1.7", 4096, "check", 1));
    let mut all: Vec<_> = (0..150).map(|_| connect()).collect();
    succeeded(serving.client("own", 4096, "check", 2));
    // They are told, too; and by now the others.
    let mut text = String::new();
    half.read_to_string(&mut text).unwrap();
    assert!(text.is_empty() || text.contains("waited longest"), "{text}");
    all[0].read_to_string(&mut String::new()).unwrap();
    assert!(serving.metric("connections_refused_total") >= 80);
    drop(all);
    serving.end(Vec::new());
}

/// Two threads would not know of each other what was given back.
#[test]
fn memory_is_served_by_one_connection() {
    let serving = Serving::start(3, Compression::Lz4, |_| {});
    let children = ["check", "removes"].map(|what| serving.client("again", 4096, what, 3));
    for child in children {
        succeeded(child);
    }
    let metrics = Arc::clone(&serving.metrics);
    serving.serve_one();
    let text = metrics.to_text();
    assert!(
        text.contains("\nsonicshot_serve_connections_refused_total 2\n"),
        "{text}"
    );
}
