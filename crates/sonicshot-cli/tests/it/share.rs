//! `share`: a real guest's memory and a disk that has the same, on file systems that share blocks and
//! on such as do not.

use crate::common::*;
use crate::face::phases_told;
use serde_json::Value;
use sonicshot_testkit::Mounted;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const SHARING: [&[&str]; 2] = [&["mkfs.xfs", "-q"], &["mkfs.btrfs", "-q"]];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(args: &[&str]) -> Value {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

fn bytes_of(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap()
}

fn is_bytes(page: &[u8]) -> bool {
    page.chunks(8).any(|word| word != &page[..8])
}

/// A disk with what the guest has, in pieces of so many pages, the last piece first.
fn disk(folder: &Path, pages: usize) -> PathBuf {
    let mut bytes = vec![0x11; 3 * PAGE];
    for piece in ram().chunks(pages * PAGE).rev() {
        if piece.chunks(PAGE).all(is_bytes) {
            bytes.extend(piece);
        }
    }
    let path = folder.join("disk.img");
    fs::write(&path, bytes).unwrap();
    path
}

/// A refusal by its code and its words, which leaves the file as it was and no output.
fn refused(args: &[&str], code: i32, words: &str) {
    let run = sonicshot(args);
    let said = stderr(&run);
    assert_eq!(run.status.code(), Some(code), "{args:?}: {said}");
    assert!(said.contains(words), "{args:?}: {said}");
}

#[test]
fn memory_shares_the_blocks_of_its_disk_and_no_byte_changes() {
    for mkfs in SHARING {
        let Some(mounted) = Mounted::new(mkfs) else {
            continue;
        };
        let folder = mounted.path();
        let image = disk(&folder, 16);
        for dump in [raw_dump(&folder, |_| {}), mapped_ram_dump(&folder)] {
            let before = fs::read(&dump).unwrap();
            let args = ["share", text(&dump), "--disk", text(&image), "--json"];
            let report = json(&args);
            let shared = bytes_of(&report, "shared_bytes");
            assert!(fs::read(&dump).unwrap() == before, "{mkfs:?}");
            assert!(shared > 8 << 20, "{mkfs:?}: {report}");
            assert_eq!(report["run_bytes"], shared, "{mkfs:?}: {report}");
            assert_eq!(report["gained_bytes"], shared);
            assert_eq!(report["differing_bytes"], 0);
            assert!(bytes_of(&report, "found_bytes") >= shared);
            // Once more there is nothing to gain.
            let again = json(&args);
            assert_eq!(again["shared_bytes"], shared);
            assert_eq!(again["gained_bytes"], 0);

            // By copy, of the file that shares, and with shorter runs.
            let out = folder.join("out");
            let copy = [&args[..], &["-o", text(&out)]].concat();
            let report = json(&copy);
            assert!(fs::read(&out).unwrap() == before, "{mkfs:?}");
            assert_eq!(report["shared_bytes"], shared, "{mkfs:?}: {report}");
            refused(&copy, 1, "exists");
            let report = json(&[&copy[..], &["--min-run", "1", "--force"]].concat());
            assert!(fs::read(&out).unwrap() == before, "{mkfs:?}");
            assert_eq!(report["short_bytes"], 0, "{report}");
            assert!(bytes_of(&report, "shared_bytes") > shared, "{report}");

            // Who writes to the disk later changes nothing.
            fs::write(&image, vec![0x55; 1 << 20]).unwrap();
            assert!(fs::read(&dump).unwrap() == before, "{mkfs:?}");
            assert!(fs::read(&out).unwrap() == before, "{mkfs:?}");
            for path in [&out, &dump] {
                fs::remove_file(path).unwrap();
            }
            disk(&folder, 16);
        }
    }
}

/// In place and by copy, each phase is told of, and the search and the sharing with their bytes.
#[test]
fn what_share_does_is_told_of_to_its_end() {
    let Some(mounted) = Mounted::new(SHARING[0]) else {
        return;
    };
    let folder = mounted.path();
    let image = disk(&folder, 16);
    let dump = raw_dump(&folder, |_| {});
    let out = folder.join("out");
    let args = [
        "share",
        text(&dump),
        "--disk",
        text(&image),
        "--progress",
        "json",
    ];
    for rest in [&["-o", text(&out)][..], &[]] {
        let run = sonicshot(&[&args[..], &["-q"], rest].concat());
        assert!(run.status.success(), "{rest:?}: {}", stderr(&run));
        let told = phases_told(&stderr(&run));
        let names: Vec<_> = told.iter().map(|(phase, _)| phase.as_str()).collect();
        let searched = ["opening", "searching disks", "searching disks"];
        let written = ["sharing", "syncing to disk", "syncing to disk"];
        let synced = if rest.is_empty() { 2 } else { 3 };
        assert_eq!(
            names,
            [&searched[..], &written[..synced]].concat(),
            "{rest:?}"
        );
        for (phase, bytes) in &told {
            assert!(*bytes > 8 << 20 || phase == "opening", "{rest:?}: {told:?}");
        }
    }
}

#[test]
fn a_folder_shares_its_memory() {
    let Some(mounted) = Mounted::new(SHARING[0]) else {
        return;
    };
    let folder = mounted.path();
    let image = disk(&folder, 16);
    let snapshot = crate::folders::cloud_hypervisor(&folder.join("snapshot"));
    let memory = fs::read(snapshot.join("memory-ranges")).unwrap();
    let out = folder.join("out");
    let args = ["share", text(&snapshot), "--disk", text(&image), "--json"];
    let copied = json(&[&args[..], &["-o", text(&out)]].concat());
    let shared = json(&args);
    assert!(bytes_of(&shared, "gained_bytes") > 8 << 20, "{shared}");
    assert_eq!(copied["shared_bytes"], shared["shared_bytes"]);
    for folder in [&snapshot, &out] {
        assert!(fs::read(folder.join("memory-ranges")).unwrap() == memory);
        let same = |name| fs::read(folder.join(name)).ok() == fs::read(snapshot.join(name)).ok();
        assert!(same("state.json") && same("config.json"));
    }
}

#[test]
fn what_cannot_share_is_refused_in_words_and_as_it_was() {
    // The tests' folder may be on anything; a tmpfs shares no blocks.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let folder = folder.path();
    let image = disk(folder, 16);
    let dump = raw_dump(folder, |_| {});
    let out = folder.join("out");
    let share = |dump: &Path, image: &Path, code, words| {
        let args = ["share", text(dump), "--disk", text(image)];
        refused(&args, code, words);
        refused(&[&args[..], &["-o", text(&out)]].concat(), code, words);
        assert!(!out.exists());
    };
    share(&dump, &image, 1, "cannot share blocks");
    assert!(fs::read(&dump).unwrap() == ram());
    share(Path::new("-"), &image, 2, "standard input");
    let stream_path = folder.join("stream");
    fs::write(&stream_path, stream()).unwrap();
    share(&stream_path, &image, 2, "cannot be shared with a disk");

    let Some(mounted) = Mounted::new(SHARING[0]) else {
        return;
    };
    let there = mounted.path();
    let near = disk(&there, 16);
    // The image on another file system than the memory, or the output.
    let dump = raw_dump(&there, |_| {});
    let args = ["share", text(&dump), "--disk", text(&image)];
    refused(&args, 1, "cannot share blocks");
    let args = [
        "share",
        text(&dump),
        "--disk",
        text(&near),
        "-o",
        text(&out),
    ];
    refused(&args, 1, "cannot share blocks");
    // Somebody writes the memory, or the image.
    let args = ["share", text(&dump), "--disk", text(&near)];
    for open in [&dump, &near] {
        let writer = File::options().append(true).open(open).unwrap();
        refused(&args, 6, "is open for writing");
        drop(writer);
    }
    refused(
        &["share", text(&dump), "--disk", text(&dump)],
        1,
        "is an input",
    );
    assert!(fs::read(&dump).unwrap() == ram());
}

#[test]
fn blocks_that_begin_the_same_and_differ_are_left() {
    for mkfs in SHARING {
        let Some(mounted) = Mounted::new(mkfs) else {
            continue;
        };
        let folder = mounted.path();
        // Every eighth page of the disk is another one.
        let image = disk(&folder, 16);
        let mut changed = fs::read(&image).unwrap();
        for page in changed.chunks_mut(PAGE).step_by(8) {
            page[99] ^= 1;
        }
        fs::write(&image, &changed).unwrap();
        let dump = raw_dump(&folder, |_| {});
        let args = ["share", text(&dump), "--disk", text(&image), "--json"];
        assert_eq!(json(&args)["shared_bytes"], 0);
        let shorter = json(&[&args[..], &["--min-run", "7"]].concat());
        assert!(bytes_of(&shorter, "shared_bytes") > 8 << 20, "{shorter}");
        assert!(fs::read(&dump).unwrap() == ram());
        assert!(fs::read(&image).unwrap() == changed);
    }
}

/// Killed at instants spread over the measured whole: the file is what it was, and whoever goes on ends
/// where an undisturbed one does.
#[test]
fn killed_at_any_moment_the_file_is_whole() {
    const KILLS: u32 = 12;
    let mut now = Vec::new();
    for mkfs in SHARING {
        let Some(mounted) = Mounted::new(mkfs) else {
            continue;
        };
        let folder = mounted.path();
        // The longest way: every page by itself.
        let image = disk(&folder, 1);
        let dump = raw_dump(&folder, |_| {});
        let args = [
            "share",
            text(&dump),
            "--disk",
            text(&image),
            "--min-run",
            "1",
            "--json",
        ];
        let began = Instant::now();
        let all = bytes_of(&json(&args), "shared_bytes");
        let takes = began.elapsed();
        let mut in_part = 0;
        for kill in 0..KILLS {
            fs::remove_file(&dump).unwrap();
            raw_dump(&folder, |_| {});
            let mut child = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
                .args(args)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(takes * kill / KILLS + Duration::from_millis(1));
            let _ = child.kill();
            child.wait().unwrap();
            read_again(&dump, &mut now);
            assert!(now == ram(), "{mkfs:?}, kill {kill}");
            let report = json(&args);
            let before = bytes_of(&report, "shared_bytes_before");
            in_part += u32::from(before > 0 && before < all);
            assert_eq!(report["shared_bytes"], all, "{mkfs:?}, kill {kill}");
            read_again(&dump, &mut now);
            assert!(now == ram(), "{mkfs:?}, kill {kill}");
        }
        assert!(in_part > 0, "{mkfs:?}: no kill was in the midst of it");
    }
}

/// A copy that is killed has not appeared.
#[test]
fn a_copy_appears_whole_or_not_at_all() {
    let Some(mounted) = Mounted::new(SHARING[0]) else {
        return;
    };
    let folder = mounted.path();
    let image = disk(&folder, 2);
    let dump = raw_dump(&folder, |_| {});
    let out = folder.join("out");
    let args = [
        "share",
        text(&dump),
        "--disk",
        text(&image),
        "--min-run",
        "1",
        "-o",
        text(&out),
    ];
    let began = Instant::now();
    json(&[&args[..], &["--json"]].concat());
    let takes = began.elapsed();
    for kill in 0..10 {
        let _ = fs::remove_file(&out);
        let mut child = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
            .args(args)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(takes * kill / 10);
        let _ = child.kill();
        child.wait().unwrap();
        assert!(
            !out.exists() || fs::read(&out).unwrap() == ram(),
            "kill {kill}"
        );
        let left = fs::read_dir(&folder).unwrap().count();
        assert!(left <= 3, "kill {kill}: {left} files");
    }
}
