//! The command on a real guest's memory in QEMU's and libvirt's files, through pipes, and from one
//! format into another.

use crate::common::*;
use serde_json::Value;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

const PAGE: usize = 4096;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn libvirt_header(format: u8) -> Vec<u8> {
    let xml = b"<domain type='qemu'/>\0";
    let mut out = b"LibvirtQemudSave".to_vec();
    for word in [2, u8::try_from(xml.len()).unwrap(), 1, format, 0] {
        out.extend([word, 0, 0, 0]);
    }
    out.resize(92, 0);
    out.extend(xml);
    out
}

fn json(args: &[&str]) -> Value {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

fn convert(from: &Path, to: &Path, format: &str) {
    json(&[
        "convert",
        text(from),
        "-o",
        text(to),
        "--to",
        format,
        "--json",
    ]);
}

/// The facts that are the same in every form of the same memory.
fn facts(path: &Path) -> Vec<Value> {
    let report = json(&["inspect", text(path), "--json"]);
    [
        "kernel_release",
        "classes",
        "classes_zero",
        "zero_pages",
        "zones",
    ]
    .iter()
    .map(|key| report[key].clone())
    .collect()
}

#[test]
fn every_form_of_a_guest_reads_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let expected = facts(&raw);
    fs::write(at("stream"), stream()).unwrap();
    convert(&at("stream"), &at("mapped"), "mapped-ram");
    convert(&at("mapped"), &at("stream again"), "stream");
    assert!(fs::read(at("stream again")).unwrap() == stream());
    fs::write(at("image"), [libvirt_header(0), stream()].concat()).unwrap();
    let packed = zstd::encode_all(stream().as_slice(), 1).unwrap();
    fs::write(at("packed"), [libvirt_header(5), packed].concat()).unwrap();
    convert(&at("packed"), &at("elf"), "elf");
    convert(&at("elf"), &at("kdump"), "kdump");
    convert(&at("kdump"), &at("sonic"), "sonic");
    convert(&at("sonic"), &at("back"), "raw");
    assert!(fs::read(at("back")).unwrap() == ram());
    for name in [
        "stream", "mapped", "image", "packed", "elf", "kdump", "back",
    ] {
        assert_eq!(facts(&at(name)), expected, "{name}");
    }

    // Pruned in each form it is the same memory again.
    let dropped = json(&["prune", text(&raw), "-o", text(&at("raw.pruned")), "--json"]);
    let want = fs::read(at("raw.pruned")).unwrap();
    for name in ["stream", "mapped", "image", "packed", "elf", "kdump"] {
        let pruned = at("pruned");
        let report = json(&[
            "prune",
            text(&at(name)),
            "-o",
            text(&pruned),
            "--json",
            "--force",
        ]);
        // In a kdump pages of zeroes stay: they share one.
        let zero = dropped["dropped"]["zero"].as_u64().unwrap() * 4096;
        let stays = if name == "kdump" { zero } else { 0 };
        let goes = report["droppable_bytes"].as_u64().unwrap() + stays;
        assert_eq!(dropped["droppable_bytes"], goes, "{name}");
        convert(&pruned, &at("pruned.raw"), "raw");
        assert!(fs::read(at("pruned.raw")).unwrap() == want, "{name}");
        fs::remove_file(at("pruned.raw")).unwrap();
    }
}

#[test]
fn a_stream_goes_through_in_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("stream"), stream()).unwrap();
    json(&[
        "prune",
        text(&at("stream")),
        "-o",
        text(&at("file")),
        "--json",
    ]);
    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["prune", "-", "-o", "-", "--json"])
        .stdin(File::open(at("stream")).unwrap())
        .stdout(File::create(at("piped")).unwrap())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", stderr(&run));
    // The report is beside the stream, not in it.
    let report: Value = serde_json::from_slice(&run.stderr).unwrap();
    let piped = fs::read(at("piped")).unwrap();
    assert_eq!(report["disk_after"], piped.len());
    assert!(piped == fs::read(at("file")).unwrap());

    let run = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_sonicshot"))
            .args(args)
            .stdin(File::open(at("stream")).unwrap())
            .output()
            .unwrap()
    };
    assert_eq!(run(&["prune", "-", "--in-place"]).status.code(), Some(2));
    // What is no stream cannot go into a pipe, and nothing does.
    let raw = raw_dump(folder.path(), |_| {});
    let refused = run(&["prune", text(&raw), "-o", "-"]);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(refused.stdout.is_empty());
    // Half a stream.
    let cut = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["prune", "-", "-o", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = cut.stdin.as_ref().unwrap();
    std::io::Write::write_all(&mut stdin, &stream()[..1 << 20]).unwrap();
    let cut = cut.wait_with_output().unwrap();
    assert_eq!(cut.status.code(), Some(3), "{}", stderr(&cut));
    assert!(cut.stdout.is_empty());
}

#[test]
fn a_conversion_says_what_it_leaves_out_and_writes_over_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("stream"), stream()).unwrap();
    let report = json(&[
        "convert",
        text(&at("stream")),
        "-o",
        text(&at("raw")),
        "--to",
        "raw",
        "--json",
    ]);
    assert!(
        report["notes"][0]
            .as_str()
            .unwrap()
            .contains("devices' state")
    );
    let run = sonicshot(&[
        "convert",
        text(&at("stream")),
        "-o",
        text(&at("raw")),
        "--to",
        "elf",
    ]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert!(fs::read(at("raw")).unwrap() == ram());
    // A file named `-` is not what anybody means.
    let run = sonicshot(&["convert", text(&at("raw")), "-o", "-", "--to", "elf"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    // A raw file holds no devices' state to make a stream of.
    for format in ["stream", "mapped-ram"] {
        let run = sonicshot(&[
            "convert",
            text(&at("raw")),
            "-o",
            text(&at("x")),
            "--to",
            format,
        ]);
        assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
        assert!(!at("x").exists());
    }
}

/// A short file with thousands of blocks must not be laid out in every way.
#[test]
fn of_many_blocks_no_order_is_searched() {
    const COUNT: u64 = 4096;
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram".to_vec();
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((COUNT * PAGE as u64 + 4).to_be_bytes());
    let names: Vec<String> = (0..COUNT).map(|n| format!("ram{n:04}")).collect();
    for name in &names {
        out.push(7);
        out.extend(name.as_bytes());
        out.extend((PAGE as u64).to_be_bytes());
    }
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    out.extend(end);
    out.extend(b"\x03\0\0\0\x02");
    for name in &names {
        out.extend(2_u64.to_be_bytes());
        out.push(7);
        out.extend(name.as_bytes());
        out.push(0);
    }
    out.extend(end);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    fs::write(&path, out).unwrap();
    let run = sonicshot(&["inspect", text(&path)]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    let message = stderr(&run);
    assert!(
        message.contains("4096 blocks") && message.contains("--layout"),
        "{message}"
    );
}

/// Three blocks of which the guest does not show which lies where: the order is asked for.
#[test]
fn an_order_that_the_guest_does_not_show_is_not_guessed() {
    let (mut out, mut records) = (Vec::new(), Vec::new());
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    out.extend(b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram");
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((ram().len() as u64 | 4).to_be_bytes());
    let (low, high) = ram().split_at(64 << 20);
    let (middle, high) = high.split_at(32 << 20);
    for (name, bytes) in [(b"\x01a", low), (b"\x01b", middle), (b"\x01c", high)] {
        out.extend(name);
        out.extend((bytes.len() as u64).to_be_bytes());
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            records.extend(((number * PAGE) as u64 | 8).to_be_bytes());
            records.extend(name);
            records.extend(page);
        }
    }
    let out = [
        &out[..],
        end,
        b"\x03\0\0\0\x02",
        &records,
        end,
        b"\x04state",
    ]
    .concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    fs::write(&path, out).unwrap();
    let run = sonicshot(&["inspect", text(&path)]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert!(stderr(&run).contains("--layout"), "{}", stderr(&run));
    let layout = "a=0-64M;b=64M-96M;c=96M-128M";
    let report = json(&["inspect", text(&path), "--layout", layout, "--json"]);
    let raw = raw_dump(folder.path(), |_| {});
    let expected = json(&["inspect", text(&raw), "--json"]);
    assert_eq!(report["classes"], expected["classes"]);
    // Two of the same length that changed places.
    for layout in [
        "a=0-64M;b=96M-128M;c=64M-96M",
        "a=64M-128M;b=0-32M;c=32M-64M",
    ] {
        let run = sonicshot(&["inspect", text(&path), "--layout", layout]);
        let code = run.status.code();
        assert!(matches!(code, Some(3..=5)), "{}", stderr(&run));
    }
}
