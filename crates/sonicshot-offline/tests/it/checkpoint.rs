//! A snapshot saved, and made a dump again.

use crate::common::{open, quiet, ram, raw};
use sonicshot::ClassSet;
use sonicshot::checkpoint::{Compression, SaveOptions};
use sonicshot_offline::{
    AnalyzeOptions, CheckpointFile, CheckpointOptions, OfflineError, Overwrite, RestoreOptions,
    RestoreTo, Target,
};
use std::fs;
use tempfile::TempDir;

fn options() -> CheckpointOptions {
    CheckpointOptions::new(SaveOptions::new(Compression::Lz4))
}

#[test]
fn a_plan_is_saved_to_a_file_and_into_a_pipe() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    let state = temporary.path().join("state");
    fs::write(&state, "the devices' state").unwrap();
    let with_state = || options().vmm("a VMM").blob("state", &state).unwrap();
    let guest = open(&path)
        .analyze(&AnalyzeOptions::new().zero_pages(false))
        .unwrap();
    let plan = guest.plan(ClassSet::DEFAULT_DROP).unwrap();
    let out = temporary.path().join("x.sonic");
    let saved = plan
        .save(&out, Overwrite::Refuse, &with_state(), &mut quiet)
        .unwrap();
    assert_eq!(saved.info.vmm.as_deref(), Some("a VMM"));
    assert!(saved.disk_bytes.unwrap() > 0);
    let mut piped = Vec::new();
    let of_pipe = plan
        .save_to_writer(&mut piped, &with_state(), &mut quiet)
        .unwrap();
    assert_eq!((of_pipe.stats, of_pipe.disk_bytes), (saved.stats, None));
    assert!(fs::read(&out).unwrap() == piped);

    assert!(CheckpointFile::is_at(&out).unwrap() && !CheckpointFile::is_at(&path).unwrap());
    let checkpoint = CheckpointFile::open(&out).unwrap();
    checkpoint.verify(&mut quiet).unwrap();
    assert!(checkpoint.verify_against(&path, None, &mut quiet).unwrap() > 0);

    let mut restore = RestoreOptions::new(RestoreTo::Raw);
    let copy = temporary.path().join("state again");
    restore.blobs = vec![("state".into(), copy.clone())];
    let back = temporary.path().join("back");
    checkpoint.restore(&back, &restore, &mut quiet).unwrap();
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&state).unwrap());
    let pruned = temporary.path().join("pruned");
    plan.prune_to(&pruned, Overwrite::Refuse, &mut quiet)
        .unwrap();
    // Free pages are gone from both; zero ones read as zero anyway.
    assert!(fs::read(&back).unwrap() == fs::read(&pruned).unwrap());

    let image = RestoreOptions::new(RestoreTo::Xl);
    let image = checkpoint.restore(temporary.path().join("image"), &image, &mut quiet);
    assert!(
        matches!(image, Err(OfflineError::NoImage { .. })),
        "{image:?}"
    );
    let stream = checkpoint.convert(
        &Target::Stream,
        temporary.path().join("stream"),
        Overwrite::Refuse,
        &mut quiet,
    );
    assert!(
        matches!(stream, Err(OfflineError::NotOfCheckpoint)),
        "{stream:?}"
    );
}

#[test]
fn all_of_it_comes_back_whatever_it_was_in_between() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    let all = open(&path).keep_all().unwrap();
    let sonic = temporary.path().join("all.sonic");
    all.save(&sonic, Overwrite::Refuse, &options(), &mut quiet)
        .unwrap();
    let checkpoint = CheckpointFile::open(&sonic).unwrap();
    let elf = temporary.path().join("elf");
    checkpoint
        .convert(&Target::Elf, &elf, Overwrite::Refuse, &mut quiet)
        .unwrap();
    for target in [Target::Kdump, Target::Checkpoint, Target::Elf, Target::Raw] {
        let out = temporary.path().join("out");
        let converted = open(&elf)
            .convert(&target, &out, Overwrite::Replace, &mut quiet)
            .unwrap();
        assert_eq!(converted.format, "ELF core");
        assert_eq!(converted.layout.bytes(), ram().len() as u64);
        let back = temporary.path().join("back");
        let force = Overwrite::Replace;
        if CheckpointFile::is_at(&out).unwrap() {
            let out = CheckpointFile::open(&out).unwrap();
            out.convert(&Target::Raw, &back, force, &mut quiet).unwrap();
        } else {
            open(&out)
                .convert(&Target::Raw, &back, force, &mut quiet)
                .unwrap();
        }
        assert!(fs::read(&back).unwrap() == ram(), "{target:?}");
    }
}
