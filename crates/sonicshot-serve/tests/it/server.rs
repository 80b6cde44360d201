//! Virtual machines in processes of their own, which share no code with the server.

use crate::guest::{PAGES, expected, open, save};
use sonicshot::checkpoint::Compression;
use sonicshot_serve::{CheckpointSource, Metrics, Prefetch, Recorder, Server, ServerOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A server in a thread, which ends when so many have been served.
pub struct Serving {
    pub folder: TempDir,
    thread: Option<JoinHandle<()>>,
    pub metrics: Arc<Metrics>,
}

impl Serving {
    pub fn start(
        count: usize,
        compression: Compression,
        change: impl FnOnce(&mut ServerOptions),
    ) -> Self {
        let folder = TempDir::new().unwrap();
        let mut options = ServerOptions::new(folder.path().join("pages"));
        options.patience = Duration::from_millis(500);
        change(&mut options);
        let metrics = Arc::clone(&options.vm.metrics);
        let file = save(compression);
        let source = CheckpointSource::new(open(&file), 256 << 10, Arc::clone(&metrics));
        let server = Server::bind(Arc::new(source), options, None).unwrap();
        let thread = std::thread::spawn(move || server.run(Some(count)).unwrap());
        Self {
            folder,
            thread: Some(thread),
            metrics,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("pages")
    }

    pub fn client(&self, form: &str, page: usize, what: &str, seed: u64) -> Child {
        client_command(&self.socket(), form, page, what, seed)
            .spawn()
            .expect("the example is built with the tests")
    }

    /// Waits for the end of all of them, and of the server.
    pub fn end(mut self, children: Vec<Child>) -> Vec<String> {
        let said = children.into_iter().map(succeeded).collect();
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.socket().exists());
        said
    }

    /// Ends it, which has to serve one that is as it should be.
    pub fn serve_one(self) {
        let child = self.client("1.7", 4096, "check", 1);
        self.end(vec![child]);
    }

    pub fn metric(&self, name: &str) -> u64 {
        let text = self.metrics.to_text();
        let line = text.lines().find_map(|line| {
            line.strip_prefix("sonicshot_serve_")?
                .strip_prefix(name)?
                .strip_prefix(' ')
        });
        line.unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
    }

    pub fn wait_for(&self, name: &str, value: u64) {
        let start = Instant::now();
        while self.metric(name) < value {
            assert!(start.elapsed() < Duration::from_secs(20), "{name}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

pub fn client_command(socket: &Path, form: &str, page: usize, what: &str, seed: u64) -> Command {
    let mut command = Command::new(example("vm_client"));
    command
        .arg(socket)
        .args([form, &page.to_string(), what, &seed.to_string()]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    tests
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples")
        .join(name)
}

pub fn succeeded(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {told}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for the line that a client prints when it is ready.
pub fn ready(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    lines
}

#[test]
fn every_form_is_served_at_once() {
    let forms = ["1.1", "1.7", "1.12", "stratovirt", "own"];
    let serving = Serving::start(2 * forms.len(), Compression::ZSTD, |_| {});
    let mut children = Vec::new();
    for (seed, form) in (0..).zip(forms) {
        children.push(serving.client(form, 4096, "check", seed));
        children.push(serving.client(form, 4096, "removes", seed));
    }
    let metrics = Arc::clone(&serving.metrics);
    serving.end(children);
    assert!(metrics.removed_bytes() > 0);
    assert!(metrics.faults() > (forms.len() * PAGES) as u64);
}

/// Five of 25 are hostile, are killed, or make their descriptor sleep; nobody else notices: every byte
/// is right, and no read takes a second.
#[test]
fn twenty_five_do_not_notice_each_other() {
    let huge = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = std::fs::read_to_string(huge).ok();
    let free = free.and_then(|free| free.trim().parse::<usize>().ok());
    // Two of them with huge pages, where there are such.
    let huge = free.is_some_and(|free| free >= 2 * PAGES * 4096 / (2 << 20));
    let serving = Serving::start(22, Compression::Lz4, |options| {
        options.vm.prefetch = Prefetch::Everything;
    });
    let mut killed = serving.client("1.12", 4096, "wait", 1);
    let _lines = ready(&mut killed);
    // Half a message, and then nothing; a descriptor that is none; no message at all.
    let mut half = UnixStream::connect(serving.socket()).unwrap();
    half.write_all(b"[{\"base_host_virt_addr\"").unwrap();
    let mut noise = UnixStream::connect(serving.socket()).unwrap();
    noise.write_all(b"]]]]").unwrap();
    drop(UnixStream::connect(serving.socket()).unwrap());
    let mut children = vec![serving.client("1.7", 4096, "block", 2)];
    for seed in 3..23 {
        let form = ["1.1", "1.12", "own"][seed as usize % 3];
        let what = ["check", "removes"][seed as usize % 2];
        let page = if huge && seed < 5 { 2 << 20 } else { 4096 };
        let form = if page > 4096 { "1.12" } else { form };
        children.push(serving.client(form, page, what, seed));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let mut closed = Vec::new();
    half.read_to_end(&mut closed).unwrap();
    let metrics = Arc::clone(&serving.metrics);
    for said in serving.end(children) {
        let longest = said
            .split("longest read ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let longest: u64 = longest.unwrap().parse().unwrap();
        // A second, on two processors for all of them.
        assert!(longest < 1_000_000, "{said}");
    }
    let text = metrics.to_text();
    assert!(
        text.contains("\nsonicshot_serve_connections_refused_total 3\n"),
        "{text}"
    );
    assert!(
        text.contains("\nsonicshot_serve_machines_ended_total 22\n"),
        "{text}"
    );
    assert!(text.contains("\nsonicshot_serve_machines 0\n"), "{text}");
}

#[test]
fn a_page_that_cannot_be_read_ends_the_machine() {
    for compression in [Compression::None, Compression::ZSTD] {
        let file = save(compression);
        let page = (0..PAGES).rfind(|page| expected(*page)[8] != 0).unwrap();
        // The last chunk ends where the index begins: some bytes before that.
        let bytes = std::fs::read(file.path()).unwrap();
        let footer = bytes.len() - 64;
        let index = u64::from_le_bytes(bytes[footer..footer + 8].try_into().unwrap());
        let mut damaged = bytes;
        damaged[index as usize - 100] ^= 0x40;
        std::fs::write(file.path(), damaged).unwrap();

        let folder = TempDir::new().unwrap();
        let options = ServerOptions::new(folder.path().join("pages"));
        let metrics = Arc::clone(&options.vm.metrics);
        let source = CheckpointSource::new(open(&file), 0, Arc::clone(&metrics));
        let server = Server::bind(Arc::new(source), options, None).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| server.run(Some(2)).unwrap());
            let socket = folder.path().join("pages");
            let bad = client_command(&socket, "1.7", 4096, "bad", page as u64).spawn();
            // Another page is had all the same.
            let good = client_command(&socket, "1.7", 4096, "bad", 0).spawn();
            let output = bad.unwrap().wait_with_output().unwrap();
            assert_eq!(output.status.signal(), Some(9), "{output:?}");
            assert_eq!(output.stdout, b"ready\n");
            assert!(succeeded(good.unwrap()).contains("\nread "));
        });
        let text = metrics.to_text();
        assert!(
            text.contains("\nsonicshot_serve_machines_failed_total 1\n"),
            "{text}"
        );
    }
}

#[test]
fn nobody_else_connects() {
    const NOBODY: u32 = 65534;
    const JAILED: u32 = 4321;
    let root = rustix::process::geteuid().is_root();
    if !sonicshot_testkit::has("the rights of root", root) {
        return;
    }
    // A program that every user may run, whatever the build's folder is.
    let as_user = |serving: &Serving, uid: u32| {
        let everybody = PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(serving.folder.path(), everybody).unwrap();
        let program = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
                       s.sendall(b'[]'); s.settimeout(20); print(len(s.recv(1)))";
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", program]).arg(serving.socket());
        let output = command.uid(uid).gid(uid).current_dir("/").output();
        output.unwrap()
    };
    let python = Path::new("/usr/bin/python3").exists();
    if !sonicshot_testkit::has("/usr/bin/python3", python) {
        return;
    }
    let serving = Serving::start(1, Compression::None, |_| {});
    let mode = std::fs::metadata(serving.socket()).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    let output = as_user(&serving, NOBODY);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("PermissionError"), "{told}");
    let child = serving.client("1.7", 4096, "check", 1);
    serving.end(vec![child]);

    // Whoever is let in is asked who he is.
    let serving = Serving::start(1, Compression::None, |options| {
        options.allow = vec![JAILED];
        // Nobody is waited for who has said all.
        options.patience = Duration::from_secs(3600);
    });
    let output = as_user(&serving, NOBODY);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(serving.metric("connections_refused_total"), 1);
    let output = as_user(&serving, JAILED);
    assert!(output.status.success(), "{output:?}");
    let child = serving.client("1.7", 4096, "check", 1);
    serving.end(vec![child]);
}

#[test]
fn what_is_touched_is_recorded_and_served_first() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("set");
    let recorder = Recorder::new(Duration::from_secs(60), 1 << 30);
    let recorder = Arc::new(recorder);
    let serving = Serving::start(1, Compression::Lz4, |options| {
        options.vm.recorder = Some(Arc::clone(&recorder));
        options.record = Some(path.clone());
        options.vm.prefetch = Prefetch::Nothing;
    });
    let child = serving.client("1.7", 4096, "bad", 7);
    let layout = crate::guest::layout();
    serving.end(vec![child]);
    let set = sonicshot_serve::PageSet::read(&path, &layout).unwrap();
    let found: Vec<_> = set
        .ranges()
        .iter()
        .map(|r| (r.start().raw(), r.len()))
        .collect();
    assert_eq!(found, [(7 * 4096, 4096)]);
}

#[test]
fn a_name_is_taken_from_nobody_who_serves() {
    let serving = Serving::start(1, Compression::None, |_| {});
    let file = save(Compression::None);
    let bind = |path: &Path| {
        let source = CheckpointSource::new(open(&file), 0, Arc::default());
        Server::bind(Arc::new(source), ServerOptions::new(path), None)
    };
    let error = bind(&serving.socket()).unwrap_err();
    assert!(
        error.to_string().contains("somebody serves there"),
        "{error}"
    );
    // The look at whether somebody serves was a connection, and is none that was served.
    serving.wait_for("connections_refused_total", 1);
    let other = serving.folder.path().join("file");
    std::fs::write(&other, "x").unwrap();
    let error = bind(&other).unwrap_err();
    assert!(error.to_string().contains("is not a socket"), "{error}");
    assert_eq!(std::fs::read(&other).unwrap(), b"x");
    // One that a killed server has left.
    let stale = serving.folder.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    drop(bind(&stale).unwrap());
    assert!(!stale.exists());
    let child = serving.client("1.7", 4096, "check", 1);
    serving.end(vec![child]);
}

/// However the server dies, what it served ends before it can read what is not its own.
#[test]
fn a_server_that_is_killed_takes_its_machines_along() {
    let file = save(Compression::Lz4);
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("pages");
    for round in 0..4 {
        let mut server = Command::new(example("page_server"))
            .arg(&socket)
            .arg(file.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(ready(&mut server));
        let mut machines: Vec<Child> = (0..3)
            .map(|seed| {
                client_command(&socket, "1.7", 4096, "touch", seed)
                    .spawn()
                    .unwrap()
            })
            .collect();
        // One has ended before.
        let done = client_command(&socket, "1.7", 4096, "check", 9)
            .spawn()
            .unwrap();
        for machine in &mut machines {
            drop(ready(machine));
        }
        succeeded(done);
        std::thread::sleep(Duration::from_millis(20 * round));
        server.kill().unwrap();
        server.wait().unwrap();
        for machine in machines {
            let output = machine.wait_with_output().unwrap();
            // It would have said so if it had read anything else.
            assert_eq!(output.status.signal(), Some(9), "{output:?}");
        }
    }
}

/// A server with a watcher that keeps what it has for the next one.
fn keeping(socket: &Path, checkpoint: &Path, keep: &Path) -> Child {
    let mut server = Command::new(example("page_server"))
        .args([socket, checkpoint, keep])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(ready(&mut server));
    server
}

/// Each is killed while faults wait and pages are given back, or while it lives still, by the next
/// one. Every byte is compared.
#[test]
fn another_server_goes_on_where_one_was_killed() {
    let file = save(Compression::Lz4);
    let folder = TempDir::new().unwrap();
    let (socket, keep) = (folder.path().join("pages"), folder.path().join("keep"));
    let mut server = keeping(&socket, file.path(), &keep);
    let mode = std::fs::metadata(&keep).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let spawn = |form, what, seed| {
        client_command(&socket, form, 4096, what, seed)
            .spawn()
            .unwrap()
    };
    let started = |mut child: Child| {
        // It says more later, to somebody.
        let lines = ready(&mut child);
        (child, lines)
    };
    let mut machines = Vec::new();
    for round in 0..8 {
        machines.push(started(spawn("1.7", "touch", round)));
        machines.push(started(spawn("1.12", "wear", round + 100)));
        machines.push(started(spawn("own", "wear", round + 200)));
        std::thread::sleep(Duration::from_millis(7 * round));
        let mut between = Vec::new();
        if round % 2 == 0 {
            server.kill().unwrap();
            server.wait().unwrap();
            // Who comes now finds the socket, and waits for the next server.
            between = vec![
                spawn("1.12", "touch", round + 300),
                spawn("own", "wear", round + 400),
            ];
            std::thread::sleep(Duration::from_millis(3 * round));
        }
        let next = keeping(&socket, file.path(), &keep);
        machines.extend(between.into_iter().map(started));
        let gone = server
            .wait_with_output()
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(gone.status.signal(), Some(9), "{gone:?}");
        server = next;
    }
    for (child, mut lines) in machines {
        let mut said = String::new();
        lines.read_to_string(&mut said).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {told}", output.status);
        assert!(said.starts_with("done in "), "{said}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

/// A server of another snapshot takes nothing, and a virtual machine that no server takes is ended.
#[test]
fn what_no_other_server_takes_is_ended() {
    let (file, other) = (save(Compression::Lz4), save(Compression::None));
    let folder = TempDir::new().unwrap();
    let (socket, keep) = (folder.path().join("pages"), folder.path().join("keep"));
    let mut server = keeping(&socket, file.path(), &keep);
    let mut machine = client_command(&socket, "1.7", 4096, "wait", 1)
        .spawn()
        .unwrap();
    drop(ready(&mut machine));
    server.kill().unwrap();
    server.wait().unwrap();
    let start = Instant::now();
    // Who comes meanwhile is turned away as if there were a server: one that waits for no answer is
    // ended, and who waits hears that there is none.
    let late = client_command(&socket, "1.7", 4096, "wait", 2)
        .spawn()
        .unwrap();
    let asking = client_command(&socket, "own", 4096, "wait", 3)
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let output = Command::new(example("page_server"))
        .args([&socket, other.path(), &keep])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && told.contains("OtherSource"),
        "{told}"
    );
    assert!(machine.try_wait().unwrap().is_none());
    assert!(socket.exists());
    let output = machine.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    let took = start.elapsed();
    assert!(
        (Duration::from_secs(5)..Duration::from_secs(60)).contains(&took),
        "{took:?}"
    );
    let output = late.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
    let output = asking.wait_with_output().unwrap();
    assert!(
        output.status.code().is_some_and(|code| code != 0),
        "{output:?}"
    );
}
