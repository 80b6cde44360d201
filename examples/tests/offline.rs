//! The examples of `sonicshot-offline`, run on the real guest in testdata.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may stop anywhere"
)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

const PAGE: usize = 4096;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The guest's 128 MiB, as `guest.raw` in `folder`.
fn unpack(folder: &Path) -> Vec<u8> {
    let from = File::open(repository().join("testdata/guest-6.1-128m/ram.raw.zst")).unwrap();
    let mut reader = zstd::stream::read::Decoder::new(from).unwrap();
    reader.window_log_max(31).unwrap();
    let mut ram = Vec::new();
    io::copy(&mut reader, &mut ram).unwrap();
    fs::write(folder.join("guest.raw"), &ram).unwrap();
    ram
}

/// Runs an example, which is built with the tests.
fn run(name: &str, folder: &Path, args: &[&str]) -> Output {
    let tests = std::env::current_exe().unwrap();
    let examples = tests.ancestors().nth(2).unwrap().join("examples");
    let mut command = Command::new(examples.join(name));
    command.current_dir(folder).args(args).output().unwrap()
}

#[test]
fn the_example_of_the_docs_prunes_a_dump() {
    let source = include_str!("../prune_dump.rs");
    let code = source.split_once("\n\n").unwrap().1;
    assert!(code.lines().count() <= 15);
    let docs = fs::read_to_string(repository().join("docs/embedding.md")).unwrap();
    assert!(docs.contains(&format!("```rust\n{code}```\n")));
    let folder = TempDir::new().unwrap();
    let ram = unpack(folder.path());
    let output = run("prune_dump", folder.path(), &[]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("Linux 6.1."), "{said}");
    let pruned = fs::read(folder.path().join("pruned.raw")).unwrap();
    let dropped = ram.chunks(PAGE).zip(pruned.chunks(PAGE));
    let dropped = dropped.filter(|(before, after)| before != after).count();
    // Free pages with something in them; what it says counts those that were zero too.
    assert!(dropped > 9_000, "{dropped}");
    let bytes = said.split_whitespace().find_map(|word| word.parse().ok());
    let bytes: usize = bytes.unwrap();
    assert!(bytes > dropped * PAGE && bytes < ram.len(), "{said}");
    let kept = ram.chunks(PAGE).zip(pruned.chunks(PAGE));
    for (before, after) in kept {
        assert!(before == after || after.iter().all(|byte| *byte == 0));
    }
    // It does not write over anything.
    assert!(!run("prune_dump", folder.path(), &[]).status.success());
}

#[test]
fn a_diff_without_its_base_is_told_by_its_error() {
    assert!(include_str!("../refuse_diff.rs").lines().count() <= 15);
    let folder = TempDir::new().unwrap();
    let ram = unpack(folder.path());
    // A page of `struct page`s of free frames, none of them the first of a block, is missing.
    let is_record = |page: &&[u8]| {
        page.chunks(64).all(|record| {
            record[48..56] == [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
                && record[..8] == page[..8]
                && record[6..8] != [0, 0]
        })
    };
    let pages = || (0..).step_by(PAGE).zip(ram.chunks(PAGE));
    let (missing, _) = pages().find(|(_, page)| is_record(page)).unwrap();
    let diff = File::create(folder.path().join("diff.mem")).unwrap();
    for (at, page) in pages().filter(|(at, _)| *at != missing) {
        diff.write_all_at(page, at).unwrap();
    }
    let output = run("refuse_diff", folder.path(), &["diff.mem"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        said,
        format!("diff.mem is a diff: no page at {missing:#x}\n")
    );
    let output = run("refuse_diff", folder.path(), &["guest.raw"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("guest.raw: Linux 6.1."), "{said}");
}

#[test]
fn a_cache_that_was_declared_reads_as_zero_after_a_restore() {
    use sonicshot::checkpoint::CheckpointReader;
    use sonicshot::{Gpa, GuestBytes, GuestMemory, MappedRegions};
    use sonicshot_vmi::{GuestOptions, LinuxGuest, VirtualMemory};
    let folder = TempDir::new().unwrap();
    let ram = unpack(folder.path());
    let regions = vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))];
    let memory = MappedRegions::new(regions).unwrap();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    // What the guest's first program has mapped lies below there.
    let init = guest
        .tasks()
        .unwrap()
        .map(Result::unwrap)
        .find(|task| task.pid == 1);
    let top = guest
        .member("mm_struct", "mmap_base")
        .unwrap()
        .unwrap()
        .offset;
    let top = init.unwrap().memory.unwrap().checked_add(top).unwrap();
    let top = guest.read_u64(top).unwrap();
    let range = format!("{:#x}-{top:#x}", top - (256 << 20));
    // How many pages that held something are zero: free ones are too, whatever is declared.
    let zeroed_by = |range: &str| {
        let run = run("drop_cache", folder.path(), &["guest.raw", "1", range]);
        assert!(run.status.success(), "{run:?}");
        let said = String::from_utf8(run.stdout).unwrap();
        let pages = said.split(' ').find_map(|word| word.parse::<u64>().ok());
        let file = folder.path().join("guest.sonic");
        let reader = CheckpointReader::open(&file).unwrap();
        fs::remove_file(file).unwrap();
        let mut page = vec![0; PAGE];
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let mut zeroed = 0;
        for (at, before) in (0_u64..).step_by(PAGE).zip(ram.chunks(PAGE)) {
            reader.read(Gpa::new(at), &mut page).unwrap();
            zeroed += u64::from(is_zero(&page) && !is_zero(before));
        }
        (pages.unwrap(), zeroed)
    };
    let (nothing, free) = zeroed_by("0x0-0x0");
    let (pages, zeroed) = zeroed_by(&range);
    assert_eq!(nothing, 0);
    let gone = zeroed - free;
    assert!(gone > 500 && gone <= pages, "{gone} of {pages}");
}
