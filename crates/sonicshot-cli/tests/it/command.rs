//! The command's manners: what it prints and refuses, on files that are no guests.

use crate::common::*;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The guest's RAM as an ELF core with two segments.
fn elf_dump(folder: &Path) -> std::path::PathBuf {
    let half = 64_u64 << 20;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0_u64, 64, 0] {
        out.extend(word.to_le_bytes());
    }
    for half_word in [0_u16, 0, 64, 56, 2, 0, 0, 0] {
        out.extend(half_word.to_le_bytes());
    }
    for index in 0..2 {
        out.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        for word in [
            4096 + index * half,
            index * half,
            index * half,
            half,
            half,
            0,
        ] {
            out.extend(word.to_le_bytes());
        }
    }
    out.resize(4096, 0);
    out.extend(ram());
    let path = folder.join("guest.elf");
    fs::write(&path, out).unwrap();
    path
}

#[test]
fn a_core_is_inspected_and_pruned_like_a_raw_dump() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let elf = elf_dump(folder.path());
    let json = |args: &[&str]| -> serde_json::Value {
        let run = sonicshot(args);
        assert!(run.status.success(), "{}", stderr(&run));
        serde_json::from_slice(&run.stdout).unwrap()
    };
    let inspect = |path: &Path| json(&["inspect", text(path), "--json"]);
    let (of_raw, of_elf) = (inspect(&raw), inspect(&elf));
    assert_eq!(of_elf["format_name"], "ELF core");
    assert_eq!(of_elf["layout"], serde_json::Value::Null);
    for key in [
        "kernel_release",
        "classes",
        "droppable_pages",
        "zero_pages",
        "zones",
    ] {
        assert_eq!(of_elf[key], of_raw[key], "{key}");
    }
    let out = folder.path().join("pruned.elf");
    let report = json(&["prune", text(&elf), "-o", text(&out), "--json"]);
    assert_eq!(
        report["dropped_bytes"],
        of_elf["droppable_pages"].as_u64().unwrap() * 4096
    );
    assert_eq!(report["joined"], 0);
    assert!(fs::metadata(&out).unwrap().len() < fs::metadata(&elf).unwrap().len());
    let again = inspect(&out);
    assert_eq!(again["classes"], of_raw["classes"]);

    let run = sonicshot(&["prune", text(&elf), "--in-place"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(
        stderr(&run).contains("hint: prune by copy instead: -o OUT"),
        "{}",
        stderr(&run)
    );
}

#[test]
fn a_processor_on_other_page_tables_refuses_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let before = fs::read(&raw).unwrap();
    let out = folder.path().join("out");
    for args in [
        &["inspect", text(&raw)][..],
        &["prune", text(&raw), "--in-place"],
        &["prune", text(&raw), "-o", text(&out)],
        &["save", text(&raw), "-o", text(&out)],
    ] {
        let run = sonicshot(&[args, &["--cr3", "0x1005"]].concat());
        assert_eq!(run.status.code(), Some(5), "{}", stderr(&run));
        let told = stderr(&run);
        assert!(told.contains("processor 0 (CR3 0x1005)"), "{told}");
        assert!(told.contains("--cr3 N"), "{told}");
    }
    assert!(!out.exists());
    assert!(fs::read(&raw).unwrap() == before);
    // What QEMU prints is hexadecimal without saying so.
    let run = sonicshot(&["inspect", text(&raw), "--cr3", "0000000000100500"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    let told = [
        "inspect",
        text(&raw),
        "--cr3",
        "0x1005",
        "--allow-inconsistent",
    ];
    let run = sonicshot(&told);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(stdout(&run).contains("does not own the guest's memory"));
}

#[test]
fn dropping_what_the_guest_uses_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let drop = "free_buddy,page_cache_clean";
    let prune = |more: &[&str]| {
        let args = ["prune", text(&dump), "--dry-run", "--drop", drop];
        sonicshot(&[&args[..], more].concat())
    };
    assert_eq!(prune(&[]).status.code(), Some(2));
    let run = prune(&["--for-analysis"]);
    assert!(run.status.success());
    assert!(
        stderr(&run).contains("warning: page_cache_clean"),
        "{}",
        stderr(&run)
    );
    let run = prune(&["--for-analysis", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(
        report["warnings"][0]
            .as_str()
            .unwrap()
            .contains("cannot run")
    );
    assert!(run.stderr.is_empty(), "JSON alone: {}", stderr(&run));
}

#[test]
fn the_list_of_frames_is_not_written_over_the_dump() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let link = folder.path().join("link");
    fs::hard_link(&dump, &link).unwrap();
    for out in [&dump, &link] {
        let run = sonicshot(&["inspect", text(&dump), "--pfns", text(out), "--force"]);
        assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    }
    assert!(fs::read(&dump).unwrap() == ram());
    let taken = folder.path().join("taken");
    fs::write(&taken, "precious").unwrap();
    let run = sonicshot(&["inspect", text(&dump), "--pfns", text(&taken)]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert_eq!(fs::read(&taken).unwrap(), b"precious");
    // Nor over what is no file, such as /dev/null.
    let socket = folder.path().join("socket");
    let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let run = sonicshot(&["inspect", text(&dump), "--pfns", text(&socket), "--force"]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert!(!fs::metadata(&socket).unwrap().is_file());
}

#[test]
fn a_reader_that_stops_is_no_error_but_a_full_disk_is() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let mut child = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["inspect", text(&dump)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // As `head` does, before the first line.
    drop(child.stdout.take());
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert_eq!(said, "");

    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["inspect", text(&dump), "--json"])
        .stdout(
            fs::OpenOptions::new()
                .write(true)
                .open("/dev/full")
                .unwrap(),
        )
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert!(stderr(&run).contains("standard output"));
}

#[test]
fn help_names_every_exit_code() {
    for args in [
        &["--help"][..],
        &["inspect", "--help"],
        &["prune", "--help"],
    ] {
        let run = sonicshot(args);
        assert!(run.status.success());
        for code in 0..=5 {
            assert!(
                stdout(&run).contains(&format!("\n  {code}  ")),
                "{args:?}: {code}"
            );
        }
    }
    assert_eq!(sonicshot(&["prune", "x"]).status.code(), Some(2));
    assert_eq!(
        sonicshot(&["prune", "x", "-o", "y", "--in-place"])
            .status
            .code(),
        Some(2)
    );
    assert_eq!(
        sonicshot(&["inspect", "x", "--layout", "odd"])
            .status
            .code(),
        Some(2)
    );
}

/// A pipe without a writer is not waited for, whatever is to be done with it.
#[test]
fn a_named_pipe_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let (pipe, out) = (text(&pipe), folder.path().join("out"));
    for args in [
        vec!["inspect", pipe],
        vec!["prune", pipe, "--in-place"],
        vec!["convert", pipe, "--to", "elf", "-o", text(&out)],
        vec!["save", pipe, "-o", text(&out)],
    ] {
        let run = sonicshot(&args);
        assert_eq!(run.status.code(), Some(3), "{args:?}: {}", stderr(&run));
    }
}

/// What is read at any place is refused at once if it is a pipe; where one is read from its begin to its
/// end, that it is waited for is told.
#[test]
fn a_named_pipe_is_not_waited_for_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let pipe = at("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let raw = raw_dump(folder.path(), |_| {});
    let (out, sonic) = (at("out"), at("guest.sonic"));
    let (pipe, out, raw, sonic) = (text(&pipe), text(&out), text(&raw), text(&sonic));
    let run = sonicshot(&["save", raw, "-o", sonic]);
    assert!(run.status.success(), "{}", stderr(&run));
    let set = format!("working-set={pipe}");
    let socket = at("socket");
    let image = format!("disk={pipe}");
    for args in [
        &["verify", pipe][..],
        &["verify", sonic, "--against", pipe],
        &["verify", sonic, "--disk", &image],
        &["restore", pipe, "-o", out],
        &["attach", pipe, "-o", out, "--blob", "a=/etc/hostname"],
        &["attach", sonic, "-o", out, "--blob", &set],
        &["symbols", "make", pipe, "-o", out],
        &["inspect", raw, "--symbols", pipe],
        &["inspect", raw, "--base", pipe],
        &["save", raw, "-o", out, "--disk", &image],
        &["xen", "restore", pipe],
        &["qemu", "restore", pipe, "--", "true"],
        &["serve", pipe, "--socket", text(&socket)],
        &["serve", raw, "--socket", text(&socket), "--set", pipe],
        &["share", pipe, "--disk", &image, "-o", out],
    ] {
        let run = Command::new("timeout")
            .args(["60", env!("CARGO_BIN_EXE_sonicshot")])
            .args(args)
            .output()
            .unwrap();
        let said = stderr(&run);
        let code = run.status.code();
        assert!(matches!(code, Some(1..=6)), "{args:?}: {code:?} {said}");
        assert!(said.contains("error: "), "{args:?}: {said}");
        assert!(!at("out").exists(), "{args:?}");
    }
    // A blob is read as it comes.
    let blob = format!("a={pipe}");
    let mut child = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["attach", sonic, "-o", out, "--blob", &blob, "--verbose"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert!(line.contains("waited for until somebody writes"), "{line}");
    fs::write(pipe, "content").unwrap();
    assert!(child.wait().unwrap().success());
}

/// An error says what there is, and what to do about it.
#[test]
fn words_fit_what_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("empty"), "").unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    // A migration file whose machine has no name, and no memory that it could be told by.
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\0".to_vec();
    stream.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    stream.extend((0x0800_0000_u64 | 4).to_be_bytes());
    stream.extend(b"\x06pc.ram");
    stream.extend(0x0800_0000_u64.to_be_bytes());
    stream.extend(0x10_u64.to_be_bytes());
    stream.extend(b"\x7e\0\0\0\x02\0");
    fs::write(at("nameless"), stream).unwrap();
    let (empty, raw, nameless) = (at("empty"), raw, at("nameless"));
    let (empty, raw, nameless) = (text(&empty), text(&raw), text(&nameless));
    for (args, words) in [
        (&["verify", empty][..], "the file is empty (0 bytes)"),
        (
            &["verify", "/dev/null"],
            "neither a regular file nor a block device",
        ),
        (&["inspect", nameless], "it names no machine"),
        (&["save", raw, "-o", "/dev/full"], "give a file"),
        (&["prune", raw, "-o", "/dev/full"], "give a file"),
        (&["save", raw, "-o", "/dev/full", "--force"], "a device"),
        (&["save", raw, "-o", "/proc/none"], "give another folder"),
    ] {
        let run = sonicshot(args);
        let said = stderr(&run);
        assert!(!run.status.success(), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
}

#[test]
fn where_to_prune_to_must_be_said() {
    let run = sonicshot(&["prune", "x"]);
    assert_eq!(run.status.code(), Some(2));
    assert!(stderr(&run).contains("--in-place"), "{}", stderr(&run));
}

/// Only what is possible with the file is offered, and only what is true of it is said.
#[test]
fn words_without_a_kernel_are_true_of_the_file() {
    const MIB: usize = 1 << 20;
    const OFFER: &str = "--drop zero";
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let noise: Vec<u8> = (0..4 * MIB)
        .map(|at| u8::try_from(at % 251).unwrap() | 1)
        .collect();
    let sparse = put("sparse", &noise);
    let file = fs::OpenOptions::new().write(true).open(&sparse).unwrap();
    file.set_len(8 * MIB as u64).unwrap();
    let hole = put("hole", &[]);
    let file = fs::OpenOptions::new().write(true).open(&hole).unwrap();
    file.set_len(8 * MIB as u64).unwrap();
    let mut lime = b"EMiL\x01\0\0\0".to_vec();
    lime.extend(
        [0, 4 * MIB as u64 - 1, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    lime.extend(&noise);
    for (path, is_offered, words) in [
        (put("noise", &noise), true, "encrypted"),
        (
            put("zeroes", &vec![0; 4 * MIB]),
            true,
            "the memory is zeroes",
        ),
        (hole, false, "the memory is zeroes"),
        (sparse, false, "has holes"),
        // No such file is written.
        (put("lime", &lime), false, "encrypted"),
    ] {
        let run = sonicshot(&["inspect", text(&path)]);
        let said = stderr(&run);
        assert_eq!(run.status.code(), Some(4), "{said}");
        assert!(said.contains(words), "{said}");
        assert_eq!(said.contains(OFFER), is_offered, "{said}");
        let run = sonicshot(&["prune", text(&path), "--drop", "zero", "--dry-run"]);
        assert!(run.status.success() || !is_offered, "{}", stderr(&run));
    }
}

#[test]
fn formats_are_called_as_their_writers_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    for (name, word) in [
        ("firecracker", "no Linux kernel"),
        ("cloud-hypervisor", "no Linux kernel"),
        ("vmware", "no Linux kernel"),
        ("mapped-ram", "as a file of the format qemu"),
        ("stream", "as a file of the format qemu"),
        ("xl", "as a file of the format xen"),
        ("sonic", "as a file of the format sonic"),
        ("docx", "sonic"),
    ] {
        let run = sonicshot(&["inspect", text(&path), "--format", name]);
        assert!(stderr(&run).contains(word), "{name}: {}", stderr(&run));
    }
}
