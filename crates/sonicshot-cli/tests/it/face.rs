//! The first things that people meet: the demo, pictures, progress, what is generated, words of the
//! command line.

use crate::common::*;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// From any folder, with nothing but the program, and checked against the guest's own kernel.
#[test]
fn the_demo_runs_anywhere() {
    let nowhere = tempfile::tempdir().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .arg("demo")
        .current_dir(nowhere.path())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", stderr(&run));
    let said = stdout(&run);
    for line in [
        "kernel    6.1.0-50-cloud-amd64",
        "free by both: 10,940 pages",
        "dropped although the kernel says in use: 0",
        "the pruned dump tells the same of every page: yes",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    // A file without holes is no diff.
    assert!(!said.contains("may be a diff"), "{said}");
    assert_eq!(fs::read_dir(nowhere.path()).unwrap().count(), 0);
}

/// The demo's guest shows the same as the whole guest in testdata: as many frames of every class.
#[test]
fn the_demo_s_guest_is_the_one_in_testdata() {
    let classes = |said: &str| -> Vec<String> {
        let from = said.find("class  ").unwrap();
        let lines = said.get(from..).unwrap().lines();
        lines
            .take_while(|line| !line.is_empty())
            .map(Into::into)
            .collect()
    };
    let of_folder = sonicshot(&["demo", "--dump", text(&testdata())]);
    let within = sonicshot(&["demo"]);
    let (of_folder, within) = (stdout(&of_folder), stdout(&within));
    assert!(classes(&of_folder).len() > 8, "{of_folder}");
    assert_eq!(classes(&within), classes(&of_folder));
}

#[test]
fn the_program_and_its_demo_are_small() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let bytes: u64 = fs::read_dir(demo)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(bytes <= 3 << 20, "{bytes}");
}

#[test]
fn a_map_is_drawn_and_a_picture_written() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let run = sonicshot(&["inspect", text(&raw), "--map"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let said = stdout(&run);
    assert!(
        said.contains("a character is 64.0 KiB (16 pages)"),
        "{said}"
    );
    let drawn: Vec<_> = said
        .lines()
        .filter(|line| line.trim_start().starts_with("0x") && line.len() > 60)
        .collect();
    // 32 lines before a prune and 32 after it.
    assert_eq!(drawn.len(), 64, "{said}");
    assert!(drawn.iter().all(|line| line.len() <= 80), "{said}");
    let (before, after) = drawn.split_at(32);
    let free = |lines: &[&str]| lines.concat().matches('.').count();
    assert!(free(before) > 500, "{said}");
    assert_eq!(free(after), 0, "{said}");
    // The largest blocks of this guest are of 4 MiB, and most of its free memory is in them.
    let largest = said.lines().find(|line| line.starts_with("  4.0 MiB "));
    let bar = |line: &str| line.matches('#').count();
    assert_eq!(largest.map(bar), Some(33), "{said}");
    let blocks = said
        .lines()
        .skip_while(|line| !line.starts_with("free blocks"));
    assert!(blocks.clone().count() > 11, "{said}");
    assert!(blocks.clone().all(|line| line.len() < 80), "{said}");

    let svg = folder.path().join("map.svg");
    let run = sonicshot(&["inspect", text(&raw), "--map", text(&svg), "--json"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let picture = fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    assert!(picture.contains("free_buddy") && picture.len() < 200_000);
    assert!(picture.contains("free blocks by size"), "{picture}");
    // A checkpoint of it is drawn as its guest was, and without what it does not hold.
    let sonic = folder.path().join("map.sonic");
    let run = sonicshot(&["save", text(&raw), "-o", text(&sonic)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let run = sonicshot(&["inspect", text(&sonic), "--map"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let of_checkpoint = stdout(&run);
    let lines: Vec<_> = of_checkpoint
        .lines()
        .filter(|line| line.trim_start().starts_with("0x") && line.len() > 60)
        .collect();
    assert_eq!(lines, drawn, "{of_checkpoint}");
    let of_checkpoint = folder.path().join("checkpoint.svg");
    let run = sonicshot(&["inspect", text(&sonic), "--map", text(&of_checkpoint)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let picture = fs::read_to_string(&of_checkpoint).unwrap();
    assert!(picture.contains("in the checkpoint: "), "{picture}");
    let run = sonicshot(&["inspect", text(&sonic), "--map", text(&of_checkpoint)]);
    assert!(
        stderr(&run).contains("checkpoint.svg exists"),
        "{}",
        stderr(&run)
    );
    // Not over another file unless it is told to, and never over the dump.
    let run = sonicshot(&["inspect", text(&raw), "--map", text(&svg)]);
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("map.svg exists"), "{}", stderr(&run));
    let run = sonicshot(&["inspect", text(&raw), "--map", text(&raw)]);
    assert_eq!(run.status.code(), Some(2));
    assert!(
        stderr(&run).contains("name of an .svg file"),
        "{}",
        stderr(&run)
    );
}

#[test]
fn shells_and_man_learn_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let run = sonicshot(&["generate", "completions", shell]);
        assert!(run.status.success(), "{}", stderr(&run));
        let script = stdout(&run);
        for command in ["inspect", "prune", "restore", "serve"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let run = sonicshot(&["generate", "man"]);
    assert!(stdout(&run).contains(".TH sonicshot 1"), "{}", stdout(&run));
    let run = sonicshot(&["generate", "man", "-o", text(folder.path())]);
    assert!(run.status.success(), "{}", stderr(&run));
    let prune = fs::read_to_string(folder.path().join("sonicshot-prune.1")).unwrap();
    assert!(prune.contains("in\\-place"), "{prune}");
}

#[test]
fn progress_is_told_as_it_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let out = folder.path().join("out.raw");
    let prune = |talk: &[&str]| {
        let args = ["prune", text(&raw), "-o", text(&out), "--force"];
        let run = sonicshot(&[&args[..], talk].concat());
        assert!(run.status.success(), "{}", stderr(&run));
        stderr(&run)
    };
    // Nothing of short phases without a terminal.
    let quiet = prune(&[]);
    assert!(!quiet.contains("pruning"), "{quiet}");
    assert!(quiet.contains("note:"), "{quiet}");
    assert_eq!(prune(&["-q"]), "");
    let verbose = prune(&["-v"]);
    let told = |line: &str| line.starts_with("pruning: ") && line.ends_with(" s");
    assert!(verbose.lines().any(told), "{verbose}");
    assert!(prune(&["--progress", "always"]).contains("pruning: 100 %, "));
}

/// The phases that `--progress json` told of, in their order, each with its bytes: no phase goes
/// back, and one that knows of bytes ends with all of them.
pub(crate) fn phases_told(lines: &str) -> Vec<(String, u64)> {
    let mut phases = Vec::new();
    let mut done = None;
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let phase = line["phase"].as_str().unwrap().to_owned();
        let now = line["done"].as_u64();
        assert!(now >= done, "{phase} goes back: {lines}");
        done = now;
        if line["finished"] == true {
            assert_eq!(now.is_some(), line["total"].is_u64(), "{phase}: {lines}");
            assert_eq!(now, line["total"].as_u64(), "{phase}: {lines}");
            phases.push((phase, now.unwrap_or(0)));
            done = None;
        }
    }
    phases
}

/// Command lines, whose files are in the folder that `@` is, and the phases of each with their bytes in
/// MiB; `+` where they are some, nothing where they are none.
const PHASES: &[(&str, &str)] = &[
    (
        "prune @guest.raw -o @pruned.raw",
        "opening, opening, finding the kernel 128, walking free lists +, classifying pages 128, \
         finding zero pages 128, pruning +, syncing to disk 128",
    ),
    (
        "inspect @guest.zst",
        "opening, opening, taking in +, finding the kernel 128, walking free lists +, \
         classifying pages 128, finding zero pages 128, finding zero pages 128",
    ),
    // Its types are not looked at.
    (
        "inspect @guest.raw --at-most shape",
        "opening, opening, finding the kernel 128, finding free lists +, walking free lists +, \
         classifying pages 128, finding zero pages 128, finding zero pages 128",
    ),
    (
        "save @guest.raw -o @guest.sonic",
        "opening, opening, finding the kernel 128, walking free lists +, classifying pages 128, \
         saving 128, syncing to disk +",
    ),
    ("verify @guest.sonic", "checking +"),
    (
        "verify @guest.sonic --against @guest.raw",
        "checking +, comparing 128",
    ),
    (
        "restore @guest.sonic -o @back.raw --to raw",
        "restoring +, syncing to disk 128",
    ),
    (
        "attach @guest.sonic -o @more.sonic --blob blob=@blob",
        "saving +, syncing to disk +",
    ),
    (
        "save @guest.raw -o @disk.sonic --disk vda=@disk.img --scan",
        "opening, opening, finding the kernel 128, walking free lists +, classifying pages 128, \
         saving, searching disks +, searching disks +, saving 128, syncing to disk +",
    ),
    (
        "verify @disk.sonic --disk vda=@disk.img",
        "checking +, checking disks +",
    ),
    (
        "restore @disk.sonic -o @again.raw --to raw --disk vda=@disk.img",
        "restoring +, syncing to disk 128",
    ),
    (
        "convert @guest.raw --to elf -o @guest.elf",
        "opening, converting, finding the kernel 128, converting 128, syncing to disk +",
    ),
    (
        "convert @guest.raw --to kdump -o @guest.kdump",
        "opening, converting, finding the kernel 128, converting 128, syncing to disk +",
    ),
    // Its bitmaps; its VMCOREINFO spares the search.
    (
        "inspect @guest.kdump",
        "opening, opening +, opening +, walking free lists +, classifying pages 128, \
         finding zero pages 128, finding zero pages 128",
    ),
    (
        "inspect @guest.lime",
        "opening, opening 128, opening 128, finding the kernel 128, walking free lists +, \
         classifying pages 128, finding zero pages 128, finding zero pages 128",
    ),
    (
        "inspect @guest.xl",
        "opening, opening +, opening +, finding the kernel 128, walking free lists +, \
         classifying pages 128, finding zero pages 128, finding zero pages 128",
    ),
];

#[test]
fn each_phase_is_told_of_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let content = fs::read(&raw).unwrap();
    let packed = zstd::encode_all(&content[..], 1).unwrap();
    fs::write(at("guest.zst"), packed).unwrap();
    fs::write(at("blob"), "a blob").unwrap();
    let last = content.len() as u64 - 1;
    let header = [
        &b"EMiL\x01\0\0\0"[..],
        &[0, last, 0].map(u64::to_le_bytes).concat(),
    ]
    .concat();
    fs::write(at("guest.lime"), [&header[..], &content].concat()).unwrap();
    fs::write(at("guest.xl"), crate::xen::image(&content, |_| false)).unwrap();
    crate::disks::disk(folder.path(), &raw);
    let mut wrong = Vec::new();
    for (command, expected) in PHASES {
        let in_folder = format!("{}/", text(folder.path()));
        let command = command.replace('@', &in_folder);
        let mut args: Vec<&str> = command.split(' ').collect();
        args.extend(["--progress", "json", "-q"]);
        let run = sonicshot(&args);
        assert!(run.status.success(), "{args:?}: {}", stderr(&run));
        let told = phases_told(&stderr(&run));
        let mut each = expected.split(", ");
        let told: Vec<_> = told
            .iter()
            .map(|(name, bytes)| match (bytes, each.next()) {
                (0, _) => name.clone(),
                (_, Some(expected)) if expected.ends_with('+') => format!("{name} +"),
                (bytes, _) => format!("{name} {}", bytes >> 20),
            })
            .collect();
        if told.join(", ") != *expected {
            wrong.push(format!(
                "{args:?}: {}, expected {expected}",
                told.join(", ")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// With `--json`, what is wrong with the command line is JSON as well.
#[test]
fn a_wrong_command_line_is_told_as_json() {
    for (args, what) in [
        (&["inspect", "--json"][..], "required"),
        (&["prune", "x", "--in-plaice", "--json"], "--in-plaice"),
        (&["prune", "x", "--drop", "fre", "-o", "y", "--json"], "fre"),
    ] {
        let run = sonicshot(args);
        assert_eq!(run.status.code(), Some(2), "{args:?}");
        let error: Value = serde_json::from_slice(&run.stderr).unwrap();
        assert!(error["error"].as_str().unwrap().contains(what), "{error}");
        assert_eq!(error["exit_code"], 2);
    }
    let run = sonicshot(&["--help"]);
    assert_eq!(run.status.code(), Some(0));
}

/// A guest's memory, its checkpoint, and files that are no such, or damaged.
fn files_of_strangers(folder: &Path) {
    let at = |name: &str| folder.join(name);
    raw_dump(folder, |_| {});
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("text"), "hello\n").unwrap();
    fs::write(at("qcow2"), b"QFI\xfb\0\0\0\x03").unwrap();
    let mut mapped = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0".to_vec();
    fs::write(at("mapped"), &mapped).unwrap();
    mapped.truncate(6);
    fs::write(at("short"), &mapped).unwrap();
    let record = |magic: &[u8], version: u32, rest: &[u8]| {
        let range = [0_u64, 0, 0].map(u64::to_le_bytes).concat();
        [magic, &version.to_le_bytes(), &range, rest].concat()
    };
    fs::write(at("lime"), record(b"EMiL", 1, &[7; 41])).unwrap();
    fs::write(at("avml"), record(b"AVML", 2, &[7; 41])).unwrap();
    fs::write(at("xl"), b"Xen saved domain, xl format\n \0 \r\x01\x02").unwrap();
    let mut libvirt = b"LibvirtQemudSave\x07".to_vec();
    libvirt.resize(4096, 0);
    fs::write(at("libvirt"), &libvirt).unwrap();
    let mut vmlinuz = vec![0; 0x202];
    vmlinuz.extend(b"HdrS");
    vmlinuz.resize(4096, 0);
    fs::write(at("vmlinuz"), &vmlinuz).unwrap();
    let (raw, sonic) = (at("guest.raw"), at("x.sonic"));
    let (raw, sonic) = (raw.to_str().unwrap(), sonic.to_str().unwrap());
    let run = sonicshot(&["save", raw, "-o", sonic, "-q"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let whole = fs::read(sonic).unwrap();
    fs::write(at("cut.sonic"), &whole[..5000]).unwrap();
    let mut flipped = whole;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    fs::write(at("flipped.sonic"), &flipped).unwrap();
}

/// The mistakes of a stranger, the words of the command, and how it exits.
#[test]
fn errors_tell_what_is_wrong_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    files_of_strangers(folder.path());
    let (raw, out, sonic) = (at("guest.raw"), at("out"), at("x.sonic"));
    let blob = format!("a={}", at("folder"));
    let (cut, wrong) = (at("cut.sonic"), at("flipped.sonic"));
    let (text_file, mapped, short, qcow2) = (at("text"), at("mapped"), at("short"), at("qcow2"));
    let none = at("none");
    let folder_out = format!("{}/out", at("none"));
    #[rustfmt::skip]
    let table: &[(&[&str], i32, &[&str])] = &[
        (&["inspect", &none], 1, &["opening", "No such file"]),
        (&["inspect", &text_file], 3, &["no known format", "--layout"]),
        (&["inspect", &mapped], 3, &["mapped: truncated: the file ends inside a field at offset 0x1b"]),
        (&["inspect", &short], 3, &["short: truncated: the file ends inside a field at offset 0x4"]),
        (&["inspect", &at("lime")], 3, &["lime: missing LiME magic at offset 0x21 (value 0x7070707)"]),
        (&["inspect", &at("avml")], 3, &["avml: missing Snappy stream identifier at offset 0x20 (value 0x7)"]),
        (&["inspect", &at("xl")], 3, &["truncated in the headers, at offset 0x20: 4 bytes expected, 2 left"]),
        (&["inspect", &at("libvirt")], 3, &["invalid version of a libvirt save image at offset 0x10 (value 0x7)"]),
        (&["inspect", &qcow2], 3, &["qcow2"]),
        (&["inspect", &at("folder")], 3, &["is not a snapshot"]),
        (&["inspect", &raw, "--layout", "foo"], 2, &["`foo` is not a layout", "firecracker"]),
        (&["inspect", &raw, "--layout", "0-64M"], 3, &["67108864", "134217728", "hint: "]),
        (&["inspect", &raw, "--format", "foo"], 2, &["`foo` is not a format", "kdump"]),
        (&["inspect", &raw, "--symbols", &text_file], 4, &["neither a System.map"]),
        (&["inspect", &raw, "--symbols", &at("vmlinuz")], 4, &["neither a System.map", "hint: it is a kernel as it is booted"]),
        (&["inspect", &raw, "--symbols", &none], 1, &["none", "No such file"]),
        (&["inspect", &raw, "--map", "--json"], 2, &["FILE.svg"]),
        (&["inspect", &cut], 3, &["footer at 0x1348", "hint: "]),
        (&["prune", &raw], 2, &["--in-place", "--dry-run"]),
        (&["prune", &raw, &out], 2, &["did you mean `-o ", "out`?"]),
        (&["prune", &raw, "-o", &raw], 1, &["is an input: name another", "--in-place"]),
        (&["prune", &raw, "-o", &text_file], 1, &["exists", "--force"]),
        (&["prune", &raw, "-o", &folder_out], 1, &["none", "No such file"]),
        (&["prune", &raw, "-o", &out, "--drop", "foo"], 2, &["unknown page class `foo`", "free_buddy"]),
        (&["prune", &raw, "-o", &out, "--drop", "kernel"], 2, &["kernel"]),
        (&["prune", &raw, "-o", &out, "--drop", "anonymous"], 2, &["the guest uses", "--for-analysis"]),
        (&["prune", &raw, "--in-place", "-o", &out], 2, &["cannot be used with"]),
        (&["prune", &raw, "-o", &out, "--min-hole", "4K"], 2, &["cannot be used with"]),
        (&["prune", &sonic, "-o", &out], 3, &["is a checkpoint", "restore"]),
        (&["prune", &raw, "-o", "-"], 2, &["into a pipe"]),
        (&["save", &raw], 2, &["--output <X.sonic>"]),
        (&["save", &raw, &out], 2, &["did you mean `-o ", "out`?"]),
        (&["restore", &sonic, &out], 2, &["did you mean `-o ", "out`?"]),
        (&["save", &raw, "-o", &out, "--threads", "0"], 2, &["not a number from 1 on"]),
        (&["save", &raw, "-o", &out, "--chunk", "5"], 2, &["5120", "4096"]),
        (&["save", &raw, "-o", &out, "--compress", "gzip"], 2, &["gzip", "zstd"]),
        (&["save", &raw, "-o", &out, "--blob", &blob], 1, &["folder", "it is a folder: give a file"]),
        (&["save", &raw, "-o", &out, "--blob", "a"], 2, &["NAME=FILE"]),
        (&["restore", &raw, "-o", &out], 3, &["not a checkpoint", "`save` makes a checkpoint"]),
        (&["restore", &cut, "-o", &out], 3, &["footer", "take another copy"]),
        (&["restore", &wrong, "-o", &out], 3, &["flipped.sonic", "hint: "]),
        (&["restore", &sonic, "-o", "-"], 2, &["-o OUT"]),
        (&["verify", &raw], 3, &["not a checkpoint"]),
        (&["verify", &wrong], 3, &["flipped.sonic"]),
        (&["convert", &raw, "-o", &out, "--to", "stream"], 2, &["raw RAM", "migration stream"]),
        (&["convert", &sonic, "-o", &out, "--to", "mapped-ram"], 2, &["restore it"]),
        (&["attach", &sonic, "-o", &out, "--blob", &format!("working-set={text_file}")], 3, &["is not a working set"]),
        (&["serve", &text_file, "--socket", &out], 3, &["no known format"]),
        (&["serve", &raw], 2, &["--socket"]),
        (&["qemu", "save", "--qmp", &none, "-o", &out], 1, &["QEMU's monitor", "none"]),
        (&["qemu", "restore", &raw, "--", "qemu"], 3, &["not a checkpoint"]),
    ];
    for (args, code, words) in table {
        let run = sonicshot(args);
        let said = stderr(&run);
        assert_eq!(run.status.code(), Some(*code), "{args:?}: {said}");
        for word in *words {
            assert!(said.contains(word), "{args:?}: no {word:?} in {said}");
        }
        assert!(!Path::new(&out).exists(), "{args:?}");
    }
}
