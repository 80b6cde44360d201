//! Cloud Hypervisors, as `examples/cloud_listener.rs` has them: processes that share no code with
//! the server.

use crate::guest::{PAGE, PAGES, REGIONS, expected, open, save};
use crate::server::example;
use serde_json::{Value, json};
use sonicshot::checkpoint::Compression;
use sonicshot_serve::{
    CheckpointSource, CloudHypervisor, CloudOptions, Migration, Prefetch, Restored, ServeError,
};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const STATE: &str = "{\"id\":\"\",\"snapshots\":{}}";

/// The configuration, in which the second slot's file begins with 4 MiB of another's.
pub fn config() -> Value {
    let mapping = |slot: u32, number: usize, offset: u64| {
        let (gpa, pages) = REGIONS[number];
        json!({"slot": slot, "gpa": gpa, "size": pages * PAGE, "zone_id": "mem0",
               "virtio_mem": false, "file_offset": offset})
    };
    json!({
        "vm_config": {"memory": {"size": PAGES * PAGE, "shared": true}},
        "common_cpuid": [],
        "memory_manager_data": {
            "guest_ram_mappings": [mapping(0, 0, 0), mapping(3, 1, 4 << 20)]},
    })
}

fn migration() -> Migration {
    migration_of(&config())
}

fn migration_of(config: &Value) -> Migration {
    let config = config.to_string().into_bytes();
    Migration::new(config, STATE.into(), Path::new("test")).unwrap()
}

struct Listener {
    child: Option<Child>,
    lines: BufReader<ChildStdout>,
    socket: PathBuf,
    _folder: TempDir,
}

impl Listener {
    fn start(form: &str, what: &str, seed: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let socket = folder.path().join("cloud");
        let mut child = Command::new(example("cloud_listener"))
            .arg(&socket)
            .args([form, what, &seed.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the example is built with the tests");
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, "listening\n");
        Self {
            child: Some(child),
            lines,
            socket,
            _folder: folder,
        }
    }

    /// Waits for its end; returns how it ended, and what it has said.
    fn end(mut self) -> (Output, String) {
        let mut said = String::new();
        self.lines.read_to_string(&mut said).unwrap();
        (self.child.take().unwrap().wait_with_output().unwrap(), said)
    }

    fn succeeded(self) -> String {
        let (output, said) = self.end();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {told}", output.status);
        said
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn cloud(compression: Compression, change: impl FnOnce(&mut CloudOptions)) -> CloudHypervisor {
    let file = save(compression);
    let mut options = CloudOptions::default();
    options.patience = Duration::from_millis(700);
    change(&mut options);
    let metrics = Arc::clone(&options.vm.metrics);
    let source = CheckpointSource::new(open(&file), 1 << 20, metrics);
    CloudHypervisor::new(Arc::new(source), migration(), options, None).unwrap()
}

fn restored(form: &str, what: &str, cloud: &CloudHypervisor) -> String {
    let listener = Listener::start(form, what, 11);
    let end = cloud.restore(&listener.socket);
    let said = listener.succeeded();
    match end {
        Ok(Restored::Complete) => said,
        other => panic!("{form} {what}: {other:?}"),
    }
}

#[test]
fn both_forms_get_every_byte_and_keep_what_they_write() {
    for form in ["wake", "continue"] {
        for what in ["check", "paused", "balloon", "dribble", "fds"] {
            for prefetch in [Prefetch::Nothing, Prefetch::Everything] {
                let cloud = cloud(Compression::Lz4, |options| {
                    options.paused = what == "paused";
                    options.vm.prefetch = prefetch;
                });
                let said = restored(form, what, &cloud);
                assert!(said.starts_with("done after "), "{said}");
            }
        }
    }
}

/// A folder as `offload_daemon snapshot` writes it.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
    write("migration_config.json", config().to_string().as_bytes());
    write("state.json", STATE.as_bytes());
    let ram: Vec<u8> = (0..PAGES).flat_map(expected).collect();
    let (low, high) = ram.split_at(REGIONS[0].1 * PAGE);
    write("memory-0", low);
    write("memory-3", high);
    folder
}

#[test]
fn a_folder_with_a_file_for_each_slot_is_restored() {
    let folder = folder();
    let run = |what: &str| {
        let listener = Listener::start("wake", what, 5);
        let server = Command::new(example("cloud_server"))
            .arg(&listener.socket)
            .arg(folder.path())
            .output();
        (listener, server.unwrap())
    };
    let (listener, server) = run("check");
    assert!(server.status.success(), "{server:?}");
    assert_eq!(String::from_utf8_lossy(&server.stdout), "Complete\n");
    assert!(listener.succeeded().starts_with("done"));
    // A slot that is cut short.
    let file = std::fs::File::options()
        .write(true)
        .open(folder.path().join("memory-3"));
    file.unwrap().set_len(4096).unwrap();
    let (_, server) = run("check");
    assert!(!server.status.success());
    let told = String::from_utf8_lossy(&server.stderr).into_owned();
    assert!(told.contains("memory-3"), "{told}");
}

#[test]
fn huge_pages_are_filled_as_such() {
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = std::fs::read_to_string(free).ok();
    let free = free.and_then(|free| free.trim().parse::<usize>().ok());
    let enough = free.is_some_and(|free| free >= 2 * PAGES * PAGE / (2 << 20));
    if !sonicshot_testkit::has("huge pages of 2 MiB", enough) {
        return;
    }
    let mut config = config();
    config["vm_config"]["memory"]["hugepages"] = true.into();
    let file = save(Compression::Lz4);
    for form in ["wake-huge", "continue-huge"] {
        for prefetch in [Prefetch::Nothing, Prefetch::Everything] {
            let mut options = CloudOptions::default();
            options.vm.prefetch = prefetch;
            let source = Arc::new(CheckpointSource::new(open(&file), 1 << 20, Arc::default()));
            let cloud = CloudHypervisor::new(source, migration_of(&config), options, None).unwrap();
            let said = restored(form, "check", &cloud);
            assert_eq!(said, "done after 6 questions\n");
        }
    }
}

#[test]
fn several_are_restored_at_once_from_one_snapshot() {
    let cloud = cloud(Compression::ZSTD, |options| {
        options.vm.prefetch = Prefetch::Everything;
    });
    std::thread::scope(|scope| {
        for form in ["wake", "continue", "wake", "continue"] {
            scope.spawn(|| restored(form, "balloon", &cloud));
        }
    });
}

#[test]
fn who_asks_for_what_is_not_his_is_ended() {
    for (what, words) in [
        ("outside", "0x1000 bytes at 0xc0000000"),
        ("odd", "0x64 bytes at 0x1000"),
        ("huge", "0x4000000000000000 bytes at 0x0"),
        ("garbage", "command 65535"),
        ("occupied", "there was a page"),
        ("flood", "PageFault"),
    ] {
        let cloud = cloud(Compression::None, |options| {
            options.vm.prefetch = Prefetch::Nothing;
        });
        let listener = Listener::start("wake", what, 1);
        let error = cloud.restore(&listener.socket).unwrap_err();
        let (output, said) = listener.end();
        assert_eq!(output.status.signal(), Some(9), "{what}: {output:?} {said}");
        assert!(error.with_causes().contains(words), "{what}: {error:?}");
    }
}

#[test]
fn who_goes_before_he_has_all_is_ended() {
    for (what, signal) in [("die", None), ("leave", Some(9)), ("abandon", Some(9))] {
        let cloud = cloud(Compression::None, |options| {
            options.vm.prefetch = Prefetch::Nothing;
        });
        let listener = Listener::start("continue", what, 1);
        let end = cloud.restore(&listener.socket);
        let (output, _) = listener.end();
        assert!(matches!(end, Ok(Restored::Ended)), "{what}: {end:?}");
        // He who ended himself may have been ended as well.
        if signal.is_some() {
            assert_eq!(output.status.signal(), signal, "{what}: {output:?}");
        } else {
            assert!(!output.status.success());
        }
    }
}

#[test]
fn who_does_not_take_it_runs_no_guest_and_lives() {
    for (what, words) in [
        ("refuse", "refused the command Config"),
        ("state", "refused the command State"),
        ("silent", "no answer to the command Config"),
        ("strange", "status 9 and 1152921504606846976 bytes"),
        ("half", "no answer to the command Config"),
    ] {
        let cloud = cloud(Compression::None, |_| {});
        let listener = Listener::start("wake", what, 1);
        let error = cloud.restore(&listener.socket).unwrap_err();
        assert!(error.with_causes().contains(words), "{what}: {error:?}");
        let (output, _) = listener.end();
        // None of them is ended by us.
        assert!(output.status.success(), "{what}: {output:?}");
    }
    let nobody = Path::new("/nonexistent/cloud");
    let error = cloud(Compression::None, |_| {})
        .restore(nobody)
        .unwrap_err();
    assert!(matches!(*error, ServeError::Io { .. }), "{error:?}");
}

#[test]
fn a_page_that_cannot_be_read_ends_it() {
    let file = save(Compression::ZSTD);
    let mut bytes = std::fs::read(file.path()).unwrap();
    let footer = bytes.len() - 64;
    let index = u64::from_le_bytes(bytes[footer..footer + 8].try_into().unwrap());
    bytes[index as usize - 100] ^= 0x40;
    std::fs::write(file.path(), bytes).unwrap();
    let source = CheckpointSource::new(open(&file), 0, Arc::default());
    let options = CloudOptions::default();
    let cloud = CloudHypervisor::new(Arc::new(source), migration(), options, None).unwrap();
    let listener = Listener::start("continue", "slow", 1);
    let error = cloud.restore(&listener.socket).unwrap_err();
    assert!(matches!(*error, ServeError::Page { .. }), "{error:?}");
    let (output, _) = listener.end();
    assert_eq!(output.status.signal(), Some(9), "{output:?}");
}

/// The watcher keeps the second connection: a guest never sees what comes of its end.
#[test]
fn a_server_that_is_killed_takes_it_along() {
    let folder = folder();
    for round in 0..3 {
        let mut listener = Listener::start("wake", "slow", round);
        let mut server = Command::new(example("cloud_server"))
            .arg(&listener.socket)
            .arg(folder.path())
            .spawn()
            .unwrap();
        let mut line = String::new();
        listener.lines.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        std::thread::sleep(Duration::from_millis(50 * round));
        server.kill().unwrap();
        server.wait().unwrap();
        let start = Instant::now();
        let (output, _) = listener.end();
        // It would have said so if it had read anything else.
        assert_eq!(output.status.signal(), Some(9), "{output:?}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
