//! Memory in which no kernel is found: only pages of zeroes can go.

use sonicshot::checkpoint::{Compression, SaveOptions};
use sonicshot::{ClassSet, PageClass};
use sonicshot_dump::DumpError;
use sonicshot_offline::{
    AnalyzeOptions, CheckpointOptions, DumpFormat, Note, OfflineError, OpenOptions, Overwrite,
    PruneOptions, Snapshot,
};
use std::fs;
use std::os::unix::fs::FileExt;
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

fn replacing() -> PruneOptions {
    PruneOptions::new().overwrite(Overwrite::Replace)
}

#[test]
fn pages_of_zeroes_need_no_kernel() {
    let folder = TempDir::new().unwrap();
    let path = memory(&folder, b"x");
    let snapshot = Snapshot::open(&path, &OpenOptions::new()).unwrap();
    let error = snapshot.analyze(&AnalyzeOptions::new()).unwrap_err();
    assert!(error.is_of_the_kernel(), "{error:?}");
    let found = snapshot.zero_pages().unwrap();
    assert_eq!(found.counts().total_zero(), 21);
    assert_eq!(found.counts().get(PageClass::Unknown), 64);
    let plan = found.plan(ClassSet::DEFAULT_DROP).unwrap();
    let out = folder.path().join("out");
    let stats = plan.prune_to(&out, &PruneOptions::new()).unwrap();
    assert_eq!(stats.dropped_bytes, 21 * PAGE as u64);
    assert!(fs::read(&out).unwrap() == fs::read(&path).unwrap());
    // What nobody told is not made up.
    let writing = CheckpointOptions::new(SaveOptions::new(Compression::Lz4));
    let mut sonic = Vec::new();
    let saved = plan.save_to_writer(&mut sonic, &writing).unwrap();
    assert_eq!(
        (saved.info.architecture, saved.info.kernel_release),
        (None, None)
    );
}

#[test]
fn what_may_be_a_diff_or_no_memory_keeps_its_zeroes() {
    let folder = TempDir::new().unwrap();
    let zeroes = |path: &PathBuf, options: &OpenOptions| {
        let snapshot = Snapshot::open(path, options).unwrap();
        let found = snapshot.zero_pages()?;
        Ok::<_, OfflineError>(found.counts().total_zero())
    };
    let nothing = OpenOptions::new();
    assert_eq!(zeroes(&memory(&folder, b"x"), &nothing).unwrap(), 21);
    let image = memory(&folder, b"KDMV");
    let refused = zeroes(&image, &nothing);
    assert!(
        matches!(refused, Err(OfflineError::Dump(DumpError::NotRead { .. }))),
        "{refused:?}"
    );
    let raw = OpenOptions::new().format(DumpFormat::RAW);
    assert_eq!(zeroes(&image, &raw).unwrap(), 21);
    // A hole: in a diff snapshot that is what the base has.
    let path = memory(&folder, b"x");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(96 * PAGE as u64).unwrap();
    for options in [&nothing, &raw] {
        let refused = zeroes(&path, options);
        let at = match &refused {
            Err(OfflineError::MayBeDiff { at, .. }) => at.raw(),
            other => panic!("{other:?}"),
        };
        assert_eq!(at, 64 * PAGE as u64);
    }
}

/// Zeroes that a prune in place has made are holes; the next one has nothing to do, and says so.
#[test]
fn zeroes_that_are_holes_already_are_no_work() {
    let folder = TempDir::new().unwrap();
    // One long range of zeroes, and some that are too short to be made holes.
    let mut bytes = vec![7; 512 * PAGE];
    bytes[64 * PAGE..320 * PAGE].fill(0);
    for page in [400, 410, 420] {
        bytes[page * PAGE..(page + 1) * PAGE].fill(0);
    }
    let path = folder.path().join("memory");
    fs::write(&path, &bytes).unwrap();
    let prune = || {
        let snapshot = Snapshot::open(&path, &OpenOptions::new()).unwrap();
        let found = snapshot.zero_pages()?;
        let plan = found.plan(ClassSet::EMPTY.with_zero())?;
        let stats = plan.prune_in_place(&PruneOptions::new())?;
        let out = folder.path().join("copy");
        plan.prune_to(&out, &replacing())?;
        assert!(fs::read(&out).unwrap() == bytes);
        Ok::<_, OfflineError>((stats.changed, stats.dropped_bytes, found.notes().to_vec()))
    };
    let (changed, dropped, notes) = prune().unwrap();
    assert!(changed && notes == [Note::NoKernel], "{notes:?}");
    assert_eq!(dropped, 259 * PAGE as u64);
    for _ in 0..2 {
        let (changed, dropped, notes) = prune().unwrap();
        assert!(!changed && notes == [Note::HolesWithoutKernel], "{notes:?}");
        assert_eq!(dropped, 0);
        assert!(fs::read(&path).unwrap() == bytes);
    }
    // Beside such holes a long range of zeroes that is none may be a diff's own.
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&vec![0; 32 * PAGE], 100 * PAGE as u64)
        .unwrap();
    let refused = prune();
    assert!(
        matches!(refused, Err(OfflineError::MayBeDiff { .. })),
        "{refused:?}"
    );
}

/// Of what comes through a pipe, or is compressed, a temporary file has holes of its own. A file
/// that standard input comes from has those that it has.
#[test]
fn holes_of_a_temporary_file_are_none_of_the_memorys() {
    let folder = TempDir::new().unwrap();
    let path = memory(&folder, b"x");
    let bytes = fs::read(&path).unwrap();
    let nothing = OpenOptions::new();
    let zeroes = |snapshot: &Snapshot| {
        let found = snapshot.zero_pages()?;
        let out = folder.path().join("out");
        let plan = found.plan(ClassSet::EMPTY.with_zero())?;
        plan.prune_to(&out, &replacing())?;
        assert!(fs::read(&out).unwrap()[..bytes.len()] == bytes[..]);
        Ok::<_, OfflineError>(plan.dropped_pages())
    };
    let piped = Snapshot::from_reader("a pipe", bytes.as_slice(), &nothing).unwrap();
    assert_eq!(zeroes(&piped).unwrap(), 21);
    let packed = zstd::encode_all(bytes.as_slice(), 1).unwrap();
    let packed_at = folder.path().join("memory.zst");
    fs::write(&packed_at, &packed).unwrap();
    let snapshot = Snapshot::open(&packed_at, &nothing).unwrap();
    assert_eq!(zeroes(&snapshot).unwrap(), 21);
    let piped = Snapshot::from_reader("a pipe", packed.as_slice(), &nothing).unwrap();
    assert_eq!(zeroes(&piped).unwrap(), 21);
    let file = fs::File::open(&path).unwrap();
    let whole = Snapshot::from_file("standard input", &file, &nothing).unwrap();
    assert_eq!(zeroes(&whole).unwrap(), 21);
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.set_len(96 * PAGE as u64).unwrap();
    let sparse = Snapshot::from_file("standard input", &file, &nothing).unwrap();
    match zeroes(&sparse) {
        Err(OfflineError::MayBeDiff { at, .. }) => assert_eq!(at.raw(), 64 * PAGE as u64),
        other => panic!("{other:?}"),
    }
}

/// The base is not zero where the diff has its zeroes, nor where the diff has nothing.
#[test]
fn a_diff_over_its_base_has_its_zeroes_where_the_merged_memory_has_them() {
    let folder = TempDir::new().unwrap();
    let diff = memory(&folder, b"x");
    let file = fs::OpenOptions::new().write(true).open(&diff).unwrap();
    file.set_len(96 * PAGE as u64).unwrap();
    drop(file);
    let base = folder.path().join("base");
    fs::write(&base, vec![7; 96 * PAGE]).unwrap();
    let options = OpenOptions::new().base(&base);
    let snapshot = Snapshot::open(&diff, &options).unwrap();
    let found = snapshot.zero_pages().unwrap();
    assert_eq!(found.counts().total_zero(), 21);
    let plan = found.plan(ClassSet::EMPTY.with_zero()).unwrap();
    let out = folder.path().join("out");
    plan.prune_to(&out, &PruneOptions::new()).unwrap();
    let mut merged = fs::read(&diff).unwrap();
    merged[64 * PAGE..].fill(7);
    assert!(fs::read(&out).unwrap() == merged);
    // In place a hole would be the base's.
    let stats = plan.prune_in_place(&PruneOptions::new()).unwrap();
    assert_eq!(stats.dropped_bytes, 0);
    let again = Snapshot::open(&diff, &options)
        .unwrap()
        .zero_pages()
        .unwrap();
    assert_eq!(again.counts().total_zero(), 21);
}
