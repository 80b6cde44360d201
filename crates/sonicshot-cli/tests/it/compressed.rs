//! Dumps that are compressed as a whole.

use crate::common::*;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn zstd_of(folder: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = folder.join(name);
    let mut out = zstd::Encoder::new(File::create(&path).unwrap(), 1).unwrap();
    out.write_all(content).unwrap();
    out.finish().unwrap();
    path
}

#[test]
fn a_compressed_dump_is_read_as_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let packed = zstd_of(folder.path(), "guest.raw.zst", ram());
    let json = |args: &[&str]| -> serde_json::Value {
        let run = sonicshot(args);
        assert!(run.status.success(), "{}", stderr(&run));
        serde_json::from_slice(&run.stdout).unwrap()
    };
    let of_raw = json(&["inspect", text(&raw), "--json"]);
    let of_packed = json(&["inspect", text(&packed), "--json"]);
    for key in ["format", "classes", "layout", "kernel_release"] {
        assert_eq!(of_packed[key], of_raw[key], "{key}");
    }
    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["inspect", "-", "--json"])
        .stdin(Stdio::from(File::open(&packed).unwrap()))
        .output()
        .unwrap();
    let piped: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(piped["classes"], of_raw["classes"]);
    let (by_raw, by_packed) = (folder.path().join("a"), folder.path().join("b"));
    json(&["prune", text(&raw), "-o", text(&by_raw), "--json"]);
    json(&["prune", text(&packed), "-o", text(&by_packed), "--json"]);
    assert!(fs::read(&by_raw).unwrap() == fs::read(&by_packed).unwrap());
    let before = fs::read(&packed).unwrap();
    let run = sonicshot(&["prune", text(&packed), "--in-place"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(fs::read(&packed).unwrap() == before);
}

#[test]
fn what_cannot_be_unpacked_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let twice = fs::read(zstd_of(folder.path(), "once", &[7; 8192])).unwrap();
    let twice = zstd_of(folder.path(), "twice", &twice);
    let whole = zstd_of(folder.path(), "whole", &stream());
    let cut = folder.path().join("cut");
    let bytes = fs::read(&whole).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    // More than the guest can have, however well it compresses.
    let mut long = stream();
    long.resize(long.len() + (64 << 20), 0);
    let long = zstd_of(folder.path(), "long", &long);
    for (path, word) in [
        (&twice, "compressed with zstd"),
        (&cut, "cannot be decompressed"),
        (&long, "more than"),
    ] {
        let run = sonicshot(&["convert", text(path), "--to", "raw", "-o", text(&out)]);
        assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
        assert!(stderr(&run).contains(word), "{}", stderr(&run));
        assert!(!out.exists());
    }
}
