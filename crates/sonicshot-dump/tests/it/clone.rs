//! Pruning by copy where the file system can share blocks, and where it cannot.

use crate::common::*;
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, LayoutSpec, Overwrite, PruneStats};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A file system in a file, mounted for as long as it lives.
struct Mounted(TempDir);

impl Mounted {
    /// Only root may, and the file system's tools must be there.
    fn new(mkfs: &[&str]) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(600 << 20).unwrap();
        let at = folder.path().join("at");
        fs::create_dir(&at).unwrap();
        let made = Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image).output();
        let mounted = made.is_ok_and(|run| run.status.success())
            && Command::new("mount")
                .args(["-o", "loop"])
                .args([&image, &at])
                .output()
                .is_ok_and(|run| run.status.success());
        let what = format!("{} and loop mounts of what it makes", mkfs[0]);
        sonicshot_testkit::has(&what, mounted).then(|| Self(folder))
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("at")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn prune(dump: &Path, out: &Path, layout: &LayoutSpec) -> PruneStats {
    let dump = Dump::open(dump, Some(layout)).unwrap();
    let plan = plan(dump.layout(), &[(3, 5), (40, 1), (1000, 3000)]);
    let stats = dump
        .prune_to(&plan, out, Overwrite::Refuse, &mut |_, _| {})
        .unwrap();
    let copy = Dump::open(out, Some(layout)).unwrap();
    assert!(contents(&copy) == pruned(&contents(&dump), &plan));
    stats
}

#[test]
fn kept_stretches_are_shared() {
    let bytes = pattern(1, 16 << 20);
    for mkfs in [&["mkfs.xfs", "-q"][..], &["mkfs.btrfs", "-q"]] {
        let Some(mounted) = Mounted::new(mkfs) else {
            continue;
        };
        let folder = mounted.path();
        let dump = folder.join("ram");
        fs::write(&dump, &bytes).unwrap();
        let stats = prune(&dump, &folder.join("out"), &LayoutSpec::Flat);
        let kept = (16 << 20) - 3006 * PAGE;
        assert_eq!(stats.cloned_bytes, kept, "{mkfs:?}");
        // Not a byte of the input depends on the copy, nor the other way round.
        let out = fs::read(folder.join("out")).unwrap();
        fs::write(&dump, pattern(2, 16 << 20)).unwrap();
        assert!(fs::read(folder.join("out")).unwrap() == out, "{mkfs:?}");
        // To another file system the bytes are copied.
        fs::write(&dump, &bytes).unwrap();
        let elsewhere = TempDir::new().unwrap();
        let stats = prune(&dump, &elsewhere.path().join("out"), &LayoutSpec::Flat);
        assert_eq!(stats.cloned_bytes, 0);
        assert!(fs::read(elsewhere.path().join("out")).unwrap() == out);
    }
}
