//! Pruning by copy where the file system can share blocks, and where it cannot.

use crate::common::*;
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, LayoutSpec, Overwrite, PruneStats};
use sonicshot_testkit::Mounted;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

fn prune(dump: &Path, out: &Path, layout: &LayoutSpec) -> PruneStats {
    let dump = Dump::open(dump, Some(layout)).unwrap();
    let plan = plan(dump.layout(), &[(3, 5), (40, 1), (1000, 3000)]);
    let stats = dump.prune_to(&plan, out, Overwrite::Refuse).unwrap();
    let copy = Dump::open(out, Some(layout)).unwrap();
    assert!(contents(&copy) == pruned(&contents(&dump), &plan));
    stats
}

#[test]
fn kept_ranges_are_shared() {
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
