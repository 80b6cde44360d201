//! A snapshot saved, and made a dump again.

use crate::common::{open, ram, raw, replacing};
use sonicshot::checkpoint::{CheckpointInfo, CheckpointWriter, Compression, SaveOptions};
use sonicshot::{
    Architecture, ClassSet, Disposition, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions,
    PageMap, PageSize, PrunePlan, WorkOptions,
};
use sonicshot_dump::{DumpError, KdumpWriteError};
use sonicshot_offline::{
    AnalyzeOptions, CheckpointFile, CheckpointOptions, KdumpCompression, Note, OfflineError,
    OpenOptions, Overwrite, PruneOptions, RestoreOptions, RestoreTo, Target, WriteOptions,
};
use std::fs::{self, File};
use std::path::Path;
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
    let saved = plan.save(&out, &with_state()).unwrap();
    assert_eq!(saved.info.vmm.as_deref(), Some("a VMM"));
    assert!(saved.disk_bytes.unwrap() > 0);
    let mut piped = Vec::new();
    let of_pipe = plan.save_to_writer(&mut piped, &with_state()).unwrap();
    assert_eq!((of_pipe.stats, of_pipe.disk_bytes), (saved.stats, None));
    assert!(fs::read(&out).unwrap() == piped);

    assert!(CheckpointFile::is_at(&out).unwrap() && !CheckpointFile::is_at(&path).unwrap());
    let checkpoint = CheckpointFile::open(&out).unwrap();
    checkpoint.verify(&WorkOptions::new()).unwrap();
    assert!(
        checkpoint
            .verify_against(&path, &OpenOptions::new(), &WorkOptions::new())
            .unwrap()
            > 0
    );

    let mut restore = RestoreOptions::new(RestoreTo::Raw);
    let copy = temporary.path().join("state again");
    restore.blobs = vec![("state".into(), copy.clone())];
    let back = temporary.path().join("back");
    checkpoint.restore(&back, &restore).unwrap();
    assert_eq!(fs::read(&copy).unwrap(), fs::read(&state).unwrap());
    let pruned = temporary.path().join("pruned");
    plan.prune_to(&pruned, &PruneOptions::new()).unwrap();
    // Free pages are gone from both; zero ones read as zero anyway.
    assert!(fs::read(&back).unwrap() == fs::read(&pruned).unwrap());

    let image = RestoreOptions::new(RestoreTo::Xl);
    let image = checkpoint.restore(temporary.path().join("image"), &image);
    assert!(
        matches!(image, Err(OfflineError::NoImage { .. })),
        "{image:?}"
    );
    let stream = checkpoint.convert(
        &Target::Stream,
        temporary.path().join("stream"),
        &WriteOptions::new(),
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
    all.save(&sonic, &options()).unwrap();
    let checkpoint = CheckpointFile::open(&sonic).unwrap();
    let elf = temporary.path().join("elf");
    checkpoint
        .convert(&Target::Elf, &elf, &WriteOptions::new())
        .unwrap();
    for target in [
        Target::Kdump(KdumpCompression::Zlib),
        Target::Checkpoint,
        Target::Elf,
        Target::Raw,
    ] {
        let out = temporary.path().join("out");
        let converted = open(&elf).convert(&target, &out, &replacing()).unwrap();
        assert_eq!(converted.format, "ELF core");
        assert_eq!(converted.layout.bytes(), ram().len() as u64);
        let back = temporary.path().join("back");
        if CheckpointFile::is_at(&out).unwrap() {
            let out = CheckpointFile::open(&out).unwrap();
            out.convert(&Target::Raw, &back, &replacing()).unwrap();
        } else {
            open(&out)
                .convert(&Target::Raw, &back, &replacing())
                .unwrap();
        }
        assert!(fs::read(&back).unwrap() == ram(), "{target:?}");
    }
}

/// A checkpoint of four pages whose guest has such a processor.
fn checkpoint_of(path: &Path, machine: Option<Architecture>) -> CheckpointFile {
    let bytes = vec![7; 4 << 12];
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&bytes))]).unwrap();
    let mut info = CheckpointInfo::new(memory.layout().clone(), PageSize::SIZE_4K);
    info.architecture = machine;
    let map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
    let plan = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
    let writing = SaveOptions::new(Compression::Lz4);
    let mut writer = CheckpointWriter::new(File::create(path).unwrap(), info, writing).unwrap();
    writer.memory(&memory, &map, &plan).unwrap();
    writer.finish().unwrap();
    CheckpointFile::open(path).unwrap()
}

#[test]
fn an_output_names_the_processor_that_the_guest_has() {
    const RISCV: Architecture = Architecture::Other(243);
    let folder = TempDir::new().unwrap();
    let (sonic, out) = (folder.path().join("x.sonic"), folder.path().join("out"));
    let replace = Overwrite::Replace;
    for (machine, number) in [
        (Some(RISCV), 243),
        (Some(Architecture::Aarch64), 183),
        (Some(Architecture::X86_64), 62),
        // Nobody tells: that is said.
        (None, 62),
    ] {
        let checkpoint = checkpoint_of(&sonic, machine);
        let of_core = || {
            let core = fs::read(&out).unwrap();
            u16::from_le_bytes([core[18], core[19]])
        };
        let elf = checkpoint.convert(&Target::Elf, &out, &replacing());
        let assumed = Note::MachineAssumed {
            machine: Architecture::X86_64,
        };
        let notes = elf.unwrap().notes;
        assert_eq!(notes.contains(&assumed), machine.is_none(), "{machine:?}");
        assert_eq!(of_core(), number);
        let mut options = RestoreOptions::new(RestoreTo::Elf);
        options.overwrite = replace;
        let restored = checkpoint.restore(&out, &options).unwrap();
        let said = restored.notes.contains(&assumed);
        assert_eq!(said, machine.is_none(), "{machine:?}");
        assert_eq!(of_core(), number);

        let again = checkpoint.convert(&Target::Checkpoint, &out, &replacing());
        again.unwrap();
        let again = CheckpointFile::open(&out).unwrap();
        assert_eq!(again.reader().info().architecture, machine);

        let kdump = checkpoint.convert(&Target::Kdump(KdumpCompression::Zlib), &out, &replacing());
        if machine == Some(RISCV) {
            let refused = matches!(
                kdump,
                Err(OfflineError::Dump(DumpError::Kdump {
                    source: KdumpWriteError::Machine { machine: RISCV },
                    ..
                }))
            );
            assert!(refused, "{kdump:?}");
        } else {
            kdump.unwrap();
        }
    }
}
