//! `serve`: its sources on a real guest's memory, and its command line.

use crate::common::*;
use sonicshot::{Gpa, GpaRange};
use sonicshot_offline::OpenOptions;
use sonicshot_serve::{Content, open_source};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// All of the guest's memory as a virtual machine gets it, and how much of it was bytes.
fn served(path: &Path) -> (Vec<u8>, u64) {
    let opened = open_source(path, &OpenOptions::new(), 1 << 20, Arc::default()).unwrap();
    let source = opened.source;
    let (mut out, mut stored, mut buffer) = (Vec::new(), 0, Vec::new());
    for region in source.layout().regions() {
        let mut at = region.start();
        while at < region.end() {
            let run = source.run_at(at).unwrap();
            assert!(run.range.contains(at));
            let rest = GpaRange::new(at, run.range.end());
            match run.content {
                Content::Bytes => {
                    let piece = source.read(rest, &mut buffer).unwrap();
                    out.extend(piece.bytes());
                    stored += rest.len();
                }
                Content::Fill(word) => {
                    let words = usize::try_from(rest.len() / 8).unwrap();
                    out.extend(word.to_le_bytes().repeat(words));
                }
                other => panic!("{other:?}"),
            }
            at = rest.end();
        }
        assert_eq!(at, region.end());
    }
    assert!(source.run_at(Gpa::new(1 << 40)).is_err());
    (out, stored)
}

#[test]
fn every_kind_of_snapshot_is_a_source() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let mapped = mapped_ram_dump(folder.path());
    let pruned = folder.path().join("pruned");
    let sonic = folder.path().join("guest.sonic");
    for args in [
        &["prune", text(&raw), "-o", text(&pruned)][..],
        &["save", text(&raw), "-o", text(&sonic)],
    ] {
        let run = sonicshot(args);
        assert!(run.status.success(), "{}", stderr(&run));
    }
    for whole in [&raw, &mapped] {
        assert!(served(whole).0 == ram(), "{}", whole.display());
    }
    let (of_raw, stored) = served(&pruned);
    let (of_checkpoint, _) = served(&sonic);
    assert!(of_raw == of_checkpoint);
    assert!(stored < ram().len() as u64 * 3 / 4, "{stored}");
    let pages = of_raw.chunks(4096).zip(ram().chunks(4096));
    let dropped = pages.filter(|(found, whole)| found != whole);
    let mut count = 0;
    for (found, _) in dropped {
        assert!(found.iter().all(|byte| *byte == 0));
        count += 1;
    }
    assert!(count > 1000, "{count}");
}

/// A server that has said that it serves, and what it says after that.
fn serving(args: &[&str]) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .arg("serve")
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    if !line.starts_with("serving ") {
        let said = child.wait_with_output().unwrap();
        panic!("{line}{}", String::from_utf8_lossy(&said.stderr));
    }
    child
}

#[test]
fn a_server_is_for_its_user_and_counts() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let sonic = folder.path().join("guest.sonic");
    let set = folder.path().join("set");
    fs::write(&set, "sonicshot working set 1\n0x1000-0x3000\n").unwrap();
    let blob = format!("working-set={}", text(&set));
    let run = sonicshot(&["save", text(&raw), "-o", text(&sonic), "--blob", &blob]);
    assert!(run.status.success(), "{}", stderr(&run));
    let socket = folder.path().join("pages");
    let metrics = folder.path().join("metrics");
    let args = [
        "--vms",
        "1",
        "--socket",
        text(&socket),
        "--metrics",
        text(&metrics),
    ];
    let mut child = serving(&[&[text(&sonic)], &args[..]].concat());
    for path in [&socket, &metrics] {
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
    let mut counters = UnixStream::connect(&metrics).unwrap();
    counters
        .write_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    counters.read_to_string(&mut answer).unwrap();
    assert!(
        answer.contains("\nsonicshot_serve_machines 0\n"),
        "{answer}"
    );
    let again = sonicshot(&["serve", text(&sonic), "--socket", text(&socket)]);
    assert_eq!(again.status.code(), Some(1), "{}", stderr(&again));
    assert!(
        stderr(&again).contains("somebody serves there"),
        "{}",
        stderr(&again)
    );
    // The look at whether somebody serves there was refused, and is none of those that count.
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("refused: "), "{line}");
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Many lines of one kind are counted instead of written; the metrics count all.
#[test]
fn a_flood_of_connections_fills_no_log() {
    const MANY: usize = 3000;
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let [socket, metrics] = ["pages", "metrics"].map(|name| folder.path().join(name));
    let args = ["--socket", text(&socket), "--metrics", text(&metrics)];
    let mut child = serving(&[&[text(&raw)], &args[..]].concat());
    let mut said = child.stderr.take().unwrap();
    let said = std::thread::spawn(move || {
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        text
    });
    for _ in 0..MANY {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(b"]]}").unwrap();
        // Until it is refused.
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
    // The last ones are told of without another line.
    std::thread::sleep(Duration::from_millis(2500));
    let mut counters = UnixStream::connect(&metrics).unwrap();
    counters.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    counters.read_to_string(&mut answer).unwrap();
    let line = format!("\nsonicshot_serve_connections_refused_total {MANY}\n");
    assert!(answer.contains(&line), "{answer}");
    child.kill().unwrap();
    child.wait().unwrap();
    let said = said.join().unwrap();
    let (mut lines, mut told) = (0, 0);
    for line in said.lines() {
        lines += 1;
        match line.split_once(" more lines like the next in ") {
            // The next line is one of them.
            Some((count, _)) => told += count.replace(',', "").parse::<usize>().unwrap() - 1,
            None => told += usize::from(line.contains("refused: ")),
        }
    }
    assert_eq!(told, MANY, "{said}");
    assert!(lines < MANY / 5, "{lines}");
}

#[test]
fn what_cannot_be_served_is_told_before_anything_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let socket = folder.path().join("pages");
    let set = folder.path().join("set");
    fs::write(&set, "sonicshot working set 1\n0x100000000-0x100001000\n").unwrap();
    let none = folder.path().join("none");
    for (args, code, words) in [
        (vec![text(&raw), "--set", text(&set)], 3, "another guest"),
        (vec![text(&raw), "--metrics", "0.0.0.0:9100"], 1, "loopback"),
        (
            vec![text(&raw), "--record", "x", "--prefetch", "all"],
            2,
            "--record",
        ),
        (vec![text(&raw), "--owner", "root"], 2, "--owner"),
        (vec![text(&none)], 1, "none"),
        (vec![text(&raw), "--format", "elf"], 3, "format elf"),
        (
            vec![text(&raw), "--cloud-hypervisor", "x"],
            2,
            "cannot be used with",
        ),
    ] {
        let run = sonicshot(&[&["serve", "--socket", text(&socket)], &args[..]].concat());
        let said = stderr(&run);
        assert_eq!(run.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
        assert!(!socket.exists());
    }
}

/// A snapshot that Cloud Hypervisor's protocol cannot be spoken with says what it lacks, whoever
/// listens.
#[test]
fn what_cloud_hypervisor_needs_is_told_before_anybody_is_spoken_to() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let sonic = folder.path().join("guest.sonic");
    let run = sonicshot(&["save", text(&raw), "-o", text(&sonic)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let plain = folder.path().join("plain");
    fs::create_dir(&plain).unwrap();
    for name in ["config.json", "state.json", "memory-ranges"] {
        fs::write(plain.join(name), "{}").unwrap();
    }
    let listener = folder.path().join("cloud");
    let socket = std::os::unix::net::UnixListener::bind(&listener).unwrap();
    socket.set_nonblocking(true).unwrap();
    for (path, words) in [
        (&raw, "memory alone"),
        (&sonic, "lacks the blob cloud-hypervisor-config"),
        (&plain, "`vm.snapshot` wrote"),
    ] {
        let run = sonicshot(&["serve", text(path), "--cloud-hypervisor", text(&listener)]);
        let said = stderr(&run);
        assert_eq!(run.status.code(), Some(3), "{said}");
        assert!(said.contains(words), "{said}");
        assert!(socket.accept().is_err());
    }
    // One of another guest.
    let config = folder.path().join("config");
    let state = folder.path().join("state");
    let slot = "{\"slot\":0,\"gpa\":0,\"size\":4096,\"zone_id\":\"mem0\",\"file_offset\":0}";
    let of_another = format!(
        "{{\"vm_config\":{{\"memory\":{{}}}},\"common_cpuid\":[],\
         \"memory_manager_data\":{{\"guest_ram_mappings\":[{slot}]}}}}"
    );
    fs::write(&config, of_another).unwrap();
    fs::write(&state, "{}").unwrap();
    let blobs = [
        format!("cloud-hypervisor-config={}", text(&config)),
        format!("cloud-hypervisor-state={}", text(&state)),
    ];
    let other = folder.path().join("other.sonic");
    let save = ["save", text(&raw), "-o", text(&other), "--blob"];
    let run = sonicshot(&[&save[..], &[&blobs[0], "--blob", &blobs[1]]].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    let run = sonicshot(&["serve", text(&other), "--cloud-hypervisor", text(&listener)]);
    let said = stderr(&run);
    assert_eq!(run.status.code(), Some(3), "{said}");
    assert!(said.contains("different guests"), "{said}");
    assert!(socket.accept().is_err());
}

/// A recorded working set is put into the checkpoint that it is of: a new file, and the old one stays.
#[test]
fn a_working_set_is_put_into_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let [sonic, set, out] = ["guest.sonic", "set", "with.sonic"].map(|n| folder.path().join(n));
    let run = sonicshot(&["save", text(&raw), "-o", text(&sonic)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let before = fs::read(&sonic).unwrap();
    let ranges = "sonicshot working set 1\n0x1000-0x3000\n0x100000-0x180000\n";
    fs::write(&set, ranges).unwrap();
    let blob = format!("working-set={}", text(&set));
    let attach = |from: &Path, to: &Path, more: &[&str]| {
        let args = ["attach", text(from), "-o", text(to), "--blob", &blob];
        sonicshot(&[&args[..], more].concat())
    };
    let run = attach(&sonic, &out, &["--json"]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(&sonic).unwrap() == before);
    let opened = open_source(&out, &OpenOptions::new(), 0, Arc::default()).unwrap();
    assert_eq!(opened.set.unwrap().to_text(), ranges);
    assert!(served(&out).0 == served(&sonic).0);
    let run = sonicshot(&["verify", text(&out)]);
    assert!(run.status.success(), "{}", stderr(&run));
    // Nothing is written over untold: neither a file, nor a set, nor what it is made of.
    let other = folder.path().join("other");
    let long = "sonicshot working set 1\n0x100000000-0x100001000\n";
    let first = fs::read(&out).unwrap();
    for (from, to, more, words) in [
        (&sonic, &out, &[][..], "exists"),
        (&out, &other, &[], "already"),
        (
            &out,
            &out,
            &["--replace", "--force"],
            "is an input: name another",
        ),
    ] {
        let run = attach(from, to, more);
        assert!(!run.status.success(), "{words}");
        assert!(stderr(&run).contains(words), "{words}: {}", stderr(&run));
    }
    assert!(fs::read(&out).unwrap() == first && !other.exists());
    let run = attach(&out, &other, &["--replace"]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(&other).unwrap() == first);
    // What is no set of this guest.
    fs::write(&set, long).unwrap();
    let run = attach(&sonic, &out, &["--force"]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert!(fs::read(&out).unwrap() == first);
}

/// The same command again: the next server takes the place of one that lives.
#[test]
fn the_next_server_takes_the_place_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let [socket, keep] = ["pages", "keep"].map(|name| folder.path().join(name));
    let args = [
        text(&raw),
        "--socket",
        text(&socket),
        "--keep-fds",
        text(&keep),
    ];
    let mut first = serving(&args);
    let mode = fs::metadata(&keep).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut second = serving(&args);
    let ended = first.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&ended),
        Some(9)
    );
    assert!(second.try_wait().unwrap().is_none());
    assert!(UnixStream::connect(&socket).is_ok());
    second.kill().unwrap();
    second.wait().unwrap();
    // One that was killed leaves its names, which are nobody's.
    let mut third = serving(&args);
    third.kill().unwrap();
    third.wait().unwrap();
    // A folder is told from another by nothing.
    let plain = folder.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let slot = format!(
        "{{\"slot\":0,\"gpa\":0,\"size\":{},\"zone_id\":\"mem0\",\"file_offset\":0}}",
        ram().len()
    );
    let config = format!(
        "{{\"vm_config\":{{\"memory\":{{}}}},\"memory_manager_data\":{{\"guest_ram_mappings\":[{slot}]}}}}"
    );
    fs::write(plain.join("migration_config.json"), config).unwrap();
    fs::copy(&raw, plain.join("memory-0")).unwrap();
    assert!(served(&plain).0 == ram());
    let run = sonicshot(&[&["serve", text(&plain)], &args[1..]].concat());
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("--keep-fds"), "{}", stderr(&run));
}
