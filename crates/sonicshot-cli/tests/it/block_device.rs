//! A guest's memory on a block device, such as a snapshot of LVM.

use crate::common::*;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// A loop device over a file, until it is dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        Self::with(file, &["--read-only"])
    }

    fn with(file: &Path, options: &[&str]) -> Option<Self> {
        let run = Command::new("losetup")
            .args(["--find", "--show"])
            .args(options)
            .arg(file)
            .output()
            .ok()?;
        run.status
            .success()
            .then(|| Self(stdout(&run).trim_end().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn memory_on_a_block_device_is_read_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let device = Loop::over(&raw);
    if !sonicshot_testkit::has("loop devices", device.is_some()) {
        return;
    }
    let device = device.unwrap();
    let json = |path: &str| -> serde_json::Value {
        let run = sonicshot(&["inspect", path, "--json"]);
        assert!(run.status.success(), "{}", stderr(&run));
        serde_json::from_slice(&run.stdout).unwrap()
    };
    let (of_file, of_device) = (json(raw.to_str().unwrap()), json(&device.0));
    assert_eq!(of_device["file_bytes"], ram().len());
    assert_eq!(of_device["classes"], of_file["classes"]);
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (from, to) in [(raw.to_str().unwrap(), "by-file"), (&device.0, "by-device")] {
        let run = sonicshot(&["prune", from, "-o", &at(to)]);
        assert!(run.status.success(), "{}", stderr(&run));
        let run = sonicshot(&["save", from, "-o", &at(&format!("{to}.sonic"))]);
        assert!(run.status.success(), "{}", stderr(&run));
    }
    assert!(fs::read(at("by-file")).unwrap() == fs::read(at("by-device")).unwrap());
    assert!(fs::read(at("by-file.sonic")).unwrap() == fs::read(at("by-device.sonic")).unwrap());
    let run = sonicshot(&["prune", &device.0, "--in-place"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(stderr(&run).contains("block device"), "{}", stderr(&run));
    let run = sonicshot(&["verify", &at("by-device.sonic"), "--against", &device.0]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(&raw).unwrap() == ram());
}

/// A device that somebody may write while it is read.
#[test]
fn a_device_that_is_open_for_writing_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let device = Loop::with(&raw, &[]);
    if !sonicshot_testkit::has("loop devices", device.is_some()) {
        return;
    }
    let device = device.unwrap();
    let said = || stdout(&sonicshot(&["inspect", &device.0]));
    let by_us = format!("(pid {})", std::process::id());
    // Where not every process may be looked into, it is said that it cannot be told.
    assert!(!said().contains(&by_us), "{}", said());
    let writer = OpenOptions::new().write(true).open(&device.0).unwrap();
    assert!(said().contains(&by_us), "{}", said());
    drop(writer);
}

#[test]
fn an_image_on_a_longer_device_is_read_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    fs::write(&path, stream()).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    // A volume is as long as it was made.
    let len = (stream().len() as u64).next_multiple_of(4 << 20) + (4 << 20);
    file.flush().unwrap();
    file.set_len(len).unwrap();
    drop(file);
    let device = Loop::over(&path);
    if !sonicshot_testkit::has("loop devices", device.is_some()) {
        return;
    }
    let run = sonicshot(&["inspect", &device.unwrap().0]);
    assert!(run.status.success(), "{}", stderr(&run));
}
