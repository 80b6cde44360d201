//! `save`, `restore` and `verify` on a real guest's memory.

use crate::common::*;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(args: &[&str]) -> Value {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

#[test]
fn a_guest_comes_back_as_the_dump_that_a_prune_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let pruned = folder.path().join("pruned");
    let run = sonicshot(&["prune", text(&dump), "-o", text(&pruned)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let inspected = json(&["inspect", text(&dump), "--json"]);
    for (how, codec) in [
        ("zstd", "zstd"),
        ("zstd:3", "zstd"),
        ("lz4", "lz4"),
        ("none", "none"),
    ] {
        let file = folder.path().join(format!("{codec}.sonic"));
        let (path, back) = (text(&file), folder.path().join("back"));
        let saved = json(&[
            "save",
            text(&dump),
            "-o",
            path,
            "--compress",
            how,
            "--json",
            "--force",
        ]);
        assert_eq!(saved["file_bytes"], fs::metadata(&file).unwrap().len());
        let seen = json(&["inspect", path, "--json"]);
        assert_eq!(seen["kernel_release"], inspected["kernel_release"]);
        assert_eq!(seen["compression"], codec);
        assert_eq!(seen["architecture"], "x86_64");
        assert_eq!(seen["total_pages"], 32768);
        assert_eq!(
            seen["classes"]["free_buddy"],
            inspected["classes"]["free_buddy"]
        );
        assert_eq!(seen["digest"], saved["digest"]);
        let free = |name: &str| inspected["classes"][name].as_u64().unwrap();
        assert_eq!(
            saved["left_out_pages"],
            free("free_buddy") + free("free_pcp") + free("offline")
        );
        for said in [&saved, &seen] {
            assert_eq!(
                said["free_pages"],
                free("free_buddy") + free("free_pcp"),
                "what is offline is not free"
            );
        }
        assert_eq!(saved["zero_pages"], inspected["zero_in_use_pages"]);
        for class in ["free_buddy", "free_pcp"] {
            assert_eq!(saved["left_out"][class], free(class));
        }
        assert_eq!(
            (&saved["for_analysis"], &seen["for_analysis"]),
            (&false.into(), &false.into())
        );
        // Smaller than the pages that are kept, and than a pruned dump.
        assert!(fs::metadata(&file).unwrap().len() < fs::metadata(&pruned).unwrap().blocks() * 512);

        let checked = json(&["verify", path, "--against", text(&dump), "--json"]);
        let pages = |name: &str| saved[name].as_u64().unwrap();
        assert_eq!(
            checked["compared_pages"],
            pages("data_pages")
                + pages("duplicate_pages")
                + pages("zero_pages")
                + pages("fill_pages")
        );
        let run = sonicshot(&["restore", path, "-o", text(&back), "--force"]);
        assert!(run.status.success(), "{}", stderr(&run));
        assert!(fs::read(&back).unwrap() == fs::read(&pruned).unwrap());
        let on_disk = |path: &Path| fs::metadata(path).unwrap().blocks();
        assert!(on_disk(&back) <= on_disk(&pruned) + 64);
    }
}

#[test]
fn a_restored_core_is_a_dump_again() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let (file, core) = (folder.path().join("x.sonic"), folder.path().join("core"));
    json(&["save", text(&dump), "-o", text(&file), "--json"]);
    json(&[
        "restore",
        text(&file),
        "-o",
        text(&core),
        "--to",
        "elf",
        "--json",
    ]);
    let before = json(&["inspect", text(&dump), "--json"]);
    let after = json(&["inspect", text(&core), "--json"]);
    assert_eq!(after["format_name"], "ELF core");
    assert_eq!(after["classes"], before["classes"]);
    assert_eq!(after["kernel_release"], before["kernel_release"]);
    assert!(after["symbol_sources"].to_string().contains("VMCOREINFO"));
    // And saved again from there, it is the same memory.
    let again = folder.path().join("again.sonic");
    json(&["save", text(&core), "-o", text(&again), "--json"]);
    json(&["verify", text(&again), "--against", text(&dump), "--json"]);
}

#[test]
fn a_checkpoint_goes_through_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let file = folder.path().join("x.sonic");
    json(&["save", text(&dump), "-o", text(&file), "--json"]);
    let run = sonicshot(&["save", text(&dump), "-o", "-"]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(run.stdout == fs::read(&file).unwrap());
    assert!(stderr(&run).contains("saved"));
}

#[test]
fn blobs_are_carried_along() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let path = |name: &str| folder.path().join(name);
    fs::write(path("state"), vec![7; 100_000]).unwrap();
    let blob = format!("device={}", text(&path("state")));
    let file = path("x.sonic");
    json(&[
        "save",
        text(&dump),
        "-o",
        text(&file),
        "--blob",
        &blob,
        "--vmm",
        "test 1",
        "--json",
    ]);
    let seen = json(&["inspect", text(&file), "--json"]);
    assert_eq!(seen["vmm"], "test 1");
    assert!(seen["blobs"].to_string().contains("device"));
    let blob = format!("device={}", text(&path("copy")));
    json(&[
        "restore",
        text(&file),
        "-o",
        text(&path("back")),
        "--blob",
        &blob,
        "--json",
    ]);
    assert!(fs::read(path("copy")).unwrap() == vec![7; 100_000]);
    let run = sonicshot(&[
        "restore",
        text(&file),
        "-o",
        text(&path("b2")),
        "--blob",
        "none=/nowhere/x",
    ]);
    assert!(!run.status.success());
    assert!(
        !path("b2").exists(),
        "nothing is left of a restore that failed"
    );
    // By another way to the same name.
    let blob = format!("device={}", text(&path("./b3")));
    let out = path("b3");
    let twice = [
        "restore",
        text(&file),
        "-o",
        text(&out),
        "--blob",
        &blob,
        "--force",
    ];
    let run = sonicshot(&twice);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(stderr(&run).contains("is named for two outputs"));
    assert!(!out.exists());
}

#[test]
fn without_a_kernel_only_zeroes_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("noise");
    let mut bytes = vec![0; 1 << 20];
    bytes[5000] = 1;
    fs::write(&dump, &bytes).unwrap();
    let file = folder.path().join("x.sonic");
    let run = sonicshot(&["save", text(&dump), "-o", text(&file)]);
    assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
    assert!(!file.exists());
    let saved = json(&[
        "save",
        text(&dump),
        "-o",
        text(&file),
        "--keep-all",
        "--json",
    ]);
    assert_eq!(
        (&saved["data_pages"], &saved["zero_pages"]),
        (&1.into(), &255.into())
    );
    let back = folder.path().join("back");
    json(&["restore", text(&file), "-o", text(&back), "--json"]);
    assert!(fs::read(&back).unwrap() == bytes);
}

#[test]
fn damage_and_misuse_have_exit_codes_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dump = folder.path().join("noise");
    let words: Vec<u8> = (0..20_480_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(&dump, words).unwrap();
    let path = |name: &str| folder.path().join(name);
    let (file, bad, out) = (path("x.sonic"), path("bad.sonic"), path("out"));
    json(&[
        "save",
        text(&dump),
        "-o",
        text(&file),
        "--keep-all",
        "--json",
    ]);
    let sound = fs::read(&file).unwrap();
    let code = |args: &[&str]| {
        let run = sonicshot(args);
        assert!(!stderr(&run).contains("panicked"), "{}", stderr(&run));
        run.status.code()
    };
    let mut bytes = sound.clone();
    bytes[4100] ^= 1;
    fs::write(&bad, &bytes).unwrap();
    assert_eq!(code(&["verify", text(&bad)]), Some(3));
    assert_eq!(code(&["restore", text(&bad), "-o", text(&out)]), Some(3));
    assert!(!out.exists());
    fs::write(&bad, &sound[..sound.len() - 1]).unwrap();
    for command in ["verify", "inspect"] {
        assert_eq!(code(&[command, text(&bad)]), Some(3));
    }
    // Of another dump.
    let mut other = fs::read(&dump).unwrap();
    other[70_000] ^= 1;
    fs::write(path("other"), other).unwrap();
    assert_eq!(
        code(&["verify", text(&file), "--against", text(&path("other"))]),
        Some(3)
    );
    // Nothing is written over unasked.
    assert_eq!(
        code(&["save", text(&dump), "-o", text(&file), "--keep-all"]),
        Some(1)
    );
    assert_eq!(code(&["restore", text(&file), "-o", text(&dump)]), Some(1));
    assert!(fs::read(&file).unwrap() == sound);
    for args in [
        &["save", text(&dump), "-o", text(&out), "--compress", "gzip"][..],
        &[
            "save",
            text(&dump),
            "-o",
            text(&out),
            "--keep-all",
            "--blob",
            "x",
        ],
        &[
            "save",
            text(&dump),
            "-o",
            text(&out),
            "--keep-all",
            "--chunk",
            "5",
        ],
    ] {
        assert_eq!(code(args), Some(2), "{args:?}");
    }
    assert_eq!(code(&["restore", text(&dump), "-o", text(&out)]), Some(3));
}

/// Runs the binary with a file's content coming through a pipe.
fn piped(from: &Path, args: &[&str]) -> std::process::Output {
    use std::process::{Command, Stdio};
    let mut cat = Command::new("cat")
        .arg(from)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pipe = cat.stdout.take().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(args)
        .stdin(pipe)
        .output()
        .unwrap();
    cat.wait().unwrap();
    run
}

#[test]
fn a_checkpoint_comes_through_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let dump = raw_dump(folder.path(), |_| {});
    let file = folder.path().join("guest.sonic");
    json(&["save", text(&dump), "-o", text(&file), "--json"]);
    let run = sonicshot(&["restore", text(&file), "-o", &at("by-file")]);
    assert!(run.status.success(), "{}", stderr(&run));
    let run = piped(&file, &["restore", "-", "-o", &at("by-pipe")]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(at("by-file")).unwrap() == fs::read(at("by-pipe")).unwrap());
    let run = piped(&file, &["verify", "-", "--against", text(&dump), "--json"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let verified: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(verified["compared_pages"].as_u64().unwrap() > 0);
    let run = piped(&file, &["inspect", "-", "--json"]);
    let seen: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(seen["digest"], verified["digest"]);
    let run = piped(
        &file,
        &["convert", "-", "--to", "raw", "-o", &at("converted")],
    );
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(at("converted")).unwrap() == fs::read(at("by-file")).unwrap());

    // What is cut short or damaged on its way, or too long, leaves nothing.
    let whole = fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    for (bytes, more, code) in [
        (&whole[..whole.len() - 1], &[][..], 3),
        (&damaged, &[], 3),
        (&whole, &["--max-size", "1M"], 1),
        (b"PAGEDU64", &[], 3),
        (&[], &[], 3),
    ] {
        let path = folder.path().join("sent");
        fs::write(&path, bytes).unwrap();
        let out = at("not");
        let run = piped(&path, &[&["restore", "-", "-o", &out][..], more].concat());
        assert_eq!(run.status.code(), Some(code), "{}", stderr(&run));
        let run = piped(&path, &[&["verify", "-"][..], more].concat());
        assert_eq!(run.status.code(), Some(code), "{}", stderr(&run));
        assert!(!Path::new(&out).exists());
    }
}

#[test]
fn runs_of_frames_go_to_standard_output() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let file = folder.path().join("guest.sonic");
    json(&["save", text(&dump), "-o", text(&file), "--json"]);
    let tsv = folder.path().join("frames.tsv");
    for path in [&dump, &file] {
        let run = sonicshot(&["inspect", text(path), "--pfns", text(&tsv), "--force"]);
        assert!(run.status.success(), "{}", stderr(&run));
        for more in [&[][..], &["--json"]] {
            let piped = sonicshot(&[&["inspect", text(path), "--pfns", "-"][..], more].concat());
            assert!(piped.status.success(), "{}", stderr(&piped));
            assert!(piped.stdout == fs::read(&tsv).unwrap());
            assert!(stderr(&piped).contains("free_buddy"));
        }
    }
    assert!(!Path::new("-").exists());
}
