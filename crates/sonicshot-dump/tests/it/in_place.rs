//! Pruning in place: what it leaves, and what it refuses before anything is changed.

use crate::common::*;
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, DumpError, PruneOptions, PruneStats, check_not_in_use};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;

fn prune(
    dump: &Dump,
    runs: &[(u64, u64)],
    options: &PruneOptions,
) -> Result<PruneStats, DumpError> {
    dump.prune_in_place_with(&plan(dump.layout(), runs), options)
}

#[test]
fn ranges_shorter_than_the_smallest_hole_are_left() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ram");
    let before = pattern(1, 64 * PAGE);
    let runs = [(1, 2), (8, 3), (11, 1), (20, 5), (40, 24)];
    // Neighbours count as one: 2, 4, 5 and 24 pages.
    for (min_hole, punched, left_runs, left) in [
        (0, 4, 0, 0),
        (PAGE, 4, 0, 0),
        (2 * PAGE + 1, 3, 1, 2),
        (5 * PAGE, 2, 2, 6),
        (1 << 30, 0, 4, 35),
    ] {
        fs::write(&path, &before).unwrap();
        let dump = Dump::open(&path, None).unwrap();
        let options = PruneOptions::new().min_hole(min_hole);
        let stats = prune(&dump, &runs, &options).unwrap();
        assert_eq!(
            (stats.runs, stats.punched, stats.left_runs, stats.left_bytes),
            (4, punched, left_runs, left * PAGE),
            "{min_hole}"
        );
        assert_eq!(stats.dropped_bytes, 35 * PAGE);
        let after = fs::read(&path).unwrap();
        let page =
            |bytes: &[u8], n: u64| bytes[usize::try_from(n * PAGE).unwrap()..][..4096].to_vec();
        let mut zero = 0;
        for n in 0..64 {
            let same = page(&after, n) == page(&before, n);
            zero += u64::from(!same);
            let may_go = runs
                .iter()
                .any(|(first, count)| (*first..first + count).contains(&n));
            assert!(same || may_go && page(&after, n) == [0; 4096], "page {n}");
        }
        assert_eq!(zero, 35 - left);
        if let (Some(before), Some(after)) = (stats.extents_before, stats.extents_after) {
            assert_eq!((before, after), (1, punched.max(1)));
        }
    }
}

/// Whatever is refused, the file is as it was.
fn unchanged(path: &Path, before: &[u8], result: Result<PruneStats, DumpError>) -> DumpError {
    assert!(fs::read(path).unwrap() == before);
    result.unwrap_err()
}

#[test]
fn a_file_that_somebody_writes_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ram");
    let before = pattern(1, 64 * PAGE);
    fs::write(&path, &before).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    let refused = prune(&dump, &[(0, 32)], &PruneOptions::new());
    let error = unchanged(&path, &before, refused);
    assert!(matches!(error, DumpError::InUse { .. }), "{error}");
    assert!(check_not_in_use(&path).is_err());
    let stats = prune(&dump, &[(0, 32)], &PruneOptions::new().live_ok(true)).unwrap();
    assert_eq!(stats.punched, 1);
    drop(writer);
    check_not_in_use(&path).unwrap();
    prune(&dump, &[(0, 48)], &PruneOptions::new()).unwrap();
}

#[test]
fn a_file_that_was_written_to_since_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ram");
    fs::write(&path, pattern(1, 64 * PAGE)).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    // Clocks of file systems tick every few milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(30));
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    writer.write_all_at(b"new", 5 * PAGE).unwrap();
    drop(writer);
    let before = fs::read(&path).unwrap();
    let refused = prune(&dump, &[(0, 32)], &PruneOptions::new());
    let error = unchanged(&path, &before, refused);
    assert!(matches!(error, DumpError::Modified { .. }), "{error}");
    // Opened anew, it can be pruned, and what we write ourselves does not count.
    let dump = Dump::open(&path, None).unwrap();
    prune(&dump, &[(0, 32)], &PruneOptions::new()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(30));
    prune(&dump, &[(0, 48)], &PruneOptions::new()).unwrap();
}

#[test]
fn without_holes_nothing_is_changed() {
    let Some(ramfs) = Ramfs::mount() else {
        return;
    };
    let path = ramfs.path().join("ram");
    let before = pattern(1, 64 * PAGE);
    fs::write(&path, &before).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let refused = prune(&dump, &[(0, 32)], &PruneOptions::new());
    let error = unchanged(&path, &before, refused);
    assert!(matches!(error, DumpError::NoHoles { .. }), "{error}");
    // By copy it goes.
    let out = ramfs.path().join("out");
    let plan = plan(dump.layout(), &[(0, 32)]);
    dump.prune_to(&plan, &out, sonicshot_dump::Overwrite::Refuse)
        .unwrap();
    assert!(fs::read(&out).unwrap()[..4096] == [0; 4096]);
}
