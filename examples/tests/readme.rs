//! The library example of the README does what it says.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "a test says so by panicking"
)]

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = include_str!("../readme.rs");

#[test]
fn the_readme_has_the_program() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(readme).unwrap();
    let (_, program) = PROGRAM.split_once("\n\n").unwrap();
    assert!(readme.contains(&format!("```rust\n{program}```\n")));
    assert!(program.lines().count() <= 15);
}

#[test]
fn the_program_finds_what_can_go() {
    let folder = tempfile::tempdir().unwrap();
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/guest-6.1-128m");
    let packed = File::open(testdata.join("ram.raw.zst")).unwrap();
    let mut reader = zstd::stream::read::Decoder::new(packed).unwrap();
    reader.window_log_max(31).unwrap();
    let mut ram = File::create(folder.path().join("guest.raw")).unwrap();
    io::copy(&mut reader, &mut ram).unwrap();
    // Tests and examples are built side by side.
    let tests = std::env::current_exe().unwrap();
    let program = tests.parent().unwrap().join("../examples/readme");
    let run = Command::new(program)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8(run.stdout).unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let bytes = said
        .strip_prefix("Linux 6.1.0-")
        .and_then(|said| said.strip_suffix(" bytes can go\n")?.rsplit_once(": "))
        .map(|(_, bytes)| bytes.parse::<u64>().unwrap());
    // Most of a guest of 128 MiB that does nothing.
    assert!(bytes.is_some_and(|bytes| bytes > 16 << 20), "{said}");
}
