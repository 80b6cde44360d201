//! Memory in which no kernel is found: only pages of zeroes can go.

use sonicshot::checkpoint::{Compression, SaveOptions};
use sonicshot::{ClassSet, PageClass};
use sonicshot_offline::{AnalyzeOptions, CheckpointOptions, OpenOptions, Overwrite, Snapshot};
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

const PAGE: usize = 4096;

/// 64 pages that say `start`, of which each third is zero.
fn memory(folder: &TempDir, start: &[u8]) -> PathBuf {
    let mut bytes: Vec<u8> = (0..64 * PAGE)
        .map(|at| {
            if (at / PAGE).is_multiple_of(3) {
                0
            } else {
                u8::try_from(at % 251).unwrap() | 1
            }
        })
        .collect();
    bytes[..start.len()].copy_from_slice(start);
    let path = folder.path().join("memory");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn pages_of_zeroes_need_no_kernel() {
    let folder = TempDir::new().unwrap();
    let path = memory(&folder, b"x");
    let snapshot = Snapshot::open(&path, &OpenOptions::new()).unwrap();
    let error = snapshot.analyze(&AnalyzeOptions::new()).unwrap_err();
    assert!(error.is_of_the_kernel(), "{error:?}");
    let found = snapshot.zero_pages().unwrap().unwrap();
    assert_eq!(found.counts().get(PageClass::Zero), 21);
    assert_eq!(found.counts().get(PageClass::Unknown), 43);
    let plan = found.plan(ClassSet::DEFAULT_DROP).unwrap();
    let out = folder.path().join("out");
    let progress = &mut |_, _| {};
    let stats = plan.prune_to(&out, Overwrite::Refuse, progress).unwrap();
    assert_eq!(stats.dropped_bytes, 21 * PAGE as u64);
    assert!(fs::read(&out).unwrap() == fs::read(&path).unwrap());
    // What nobody told is not made up.
    let writing = CheckpointOptions::new(SaveOptions::new(Compression::Lz4));
    let mut sonic = Vec::new();
    let saved = plan.save_to_writer(&mut sonic, &writing, progress).unwrap();
    assert_eq!(
        (saved.info.architecture, saved.info.kernel_release),
        (None, None)
    );
}

#[test]
fn what_may_be_a_diff_or_no_memory_keeps_its_zeroes() {
    let folder = TempDir::new().unwrap();
    let zeroes = |path: &PathBuf| {
        let snapshot = Snapshot::open(path, &OpenOptions::new()).unwrap();
        snapshot
            .zero_pages()
            .unwrap()
            .map(|found| found.counts().get(PageClass::Zero))
    };
    assert_eq!(zeroes(&memory(&folder, b"x")), Some(21));
    assert_eq!(zeroes(&memory(&folder, b"QFI\xfb")), None);
    // A hole: in a diff snapshot that is what the base has.
    let path = memory(&folder, b"x");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(96 * PAGE as u64).unwrap();
    assert_eq!(zeroes(&path), None);
}
