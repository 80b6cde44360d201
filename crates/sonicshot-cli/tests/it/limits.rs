//! The command of a user who may have few threads, short files, or no more memory.

use crate::common::{ram, raw_dump};
use sonicshot_testkit::Mounted;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

const SONICSHOT: &str = env!("CARGO_BIN_EXE_sonicshot");

/// Runs the command as `prlimit` allows.
fn limited(limit: &str, args: &[&str]) -> Output {
    let mut command = Command::new("prlimit");
    command.args([limit, SONICSHOT]).args(args);
    command.output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn sonicshot(args: &[&str]) {
    let output = Command::new(SONICSHOT).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
}

#[test]
fn a_file_that_may_not_grow_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let (raw, all, out) = (text(&raw), at("all.sonic"), at("out"));
    let (all, out) = (text(&all), text(&out));
    sonicshot(&["save", raw, "-o", all, "--keep-all"]);
    let blobs = at("blobs.sonic");
    let blobs = text(&blobs);
    let blob = format!("a={raw}");
    sonicshot(&["attach", all, "-o", blobs, "--blob", &blob]);
    let blob_out = format!("a={}", text(&at("blob")));
    let cases: &[&[&str]] = &[
        &["prune", raw, "-o", out],
        &["save", raw, "-o", out],
        &["restore", all, "-o", out],
        &["convert", raw, "--to", "elf", "-o", out],
        &["attach", all, "-o", out, "--blob", &blob],
        &["restore", blobs, "-o", out, "--blob", &blob_out],
    ];
    for args in cases {
        let output = limited("--fsize=1048576", args);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("File too large"), "{args:?}: {said}");
        let named = if args.contains(&blobs) { "blob" } else { "out" };
        let error = said.lines().next().unwrap();
        assert!(error.contains(text(&at(named))), "{args:?}: {said}");
        assert!(!at("out").exists() && !at("blob").exists(), "{args:?}");
    }
    let pages = at("pages");
    let output = limited("--fsize=64", &["generate", "man", "-o", text(&pages)]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains(".1"), "{}", stderr(&output));
    assert_eq!(fs::read_dir(&pages).unwrap().count(), 0);
}

/// Nothing can be written: that is told with its place, and what is there is left as it is.
#[test]
fn a_file_system_that_is_read_only_is_told() {
    let Some(mounted) = Mounted::new(&["mkfs.xfs", "-q"]) else {
        return;
    };
    let folder = mounted.path();
    let at = |name: &str| folder.join(name);
    let raw = raw_dump(&folder, |_| {});
    let (raw, all, out) = (text(&raw), at("all.sonic"), at("out"));
    let (all, out) = (text(&all), text(&out));
    sonicshot(&["save", raw, "-o", all, "--keep-all"]);
    let remounted = Command::new("mount")
        .args(["-o", "remount,ro", text(&folder)])
        .status()
        .unwrap();
    assert!(remounted.success());
    let blob = format!("a={raw}");
    let svg = at("out.svg");
    let svg = text(&svg);
    let creating = format!("creating a file in {}", text(&folder));
    let opening = format!("opening for writing {raw}");
    let cases: &[(&[&str], &str)] = &[
        (&["prune", raw, "-o", out], &creating),
        (&["prune", raw, "--in-place"], &opening),
        (&["save", raw, "-o", out], &creating),
        (&["restore", all, "-o", out], &creating),
        (&["convert", raw, "--to", "elf", "-o", out], &creating),
        (&["attach", all, "-o", out, "--blob", &blob], &creating),
        (&["inspect", raw, "--pfns", out], &creating),
        (&["inspect", raw, "--map", svg], &creating),
        (&["share", raw, "--disk", all], &opening),
        (&["share", raw, "--disk", all, "-o", out], &creating),
    ];
    for (args, place) in cases {
        let output = Command::new(SONICSHOT).args(*args).output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains(place), "{args:?}: {said}");
        assert!(said.contains("Read-only file system"), "{args:?}: {said}");
    }
    assert!(fs::read(raw).unwrap() == ram());
}

#[test]
fn what_has_no_end_is_no_blob() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let out = folder.path().join("out");
    for blob in ["a=/dev/zero", "a=/"] {
        let args = ["save", text(&raw), "-o", text(&out), "--blob", blob];
        let output = Command::new(SONICSHOT).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("give a file"),
            "{}",
            stderr(&output)
        );
        assert!(!out.exists());
    }
}

#[test]
fn few_threads_do_all_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let all_may = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let output = Command::new("setpriv")
        .args(["--reuid=54321", "--clear-groups", "true"])
        .output();
    let can = output.is_ok_and(|output| output.status.success());
    if !sonicshot_testkit::has("the right to be another user", can) {
        return;
    }
    all_may(folder.path(), 0o777);
    let raw = raw_dump(folder.path(), |_| {});
    all_may(&raw, 0o644);
    let program = folder.path().join("program");
    fs::copy(SONICSHOT, &program).unwrap();
    all_may(&program, 0o755);
    let at = |name: &str| folder.path().join(name);
    let run = |threads: u32, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=54321", "--clear-groups", "prlimit"]);
        command.arg(format!("--nproc={threads}")).arg(&program);
        command.args(args).current_dir(folder.path());
        command.env("TMPDIR", folder.path()).output().unwrap()
    };
    for threads in 1..=3 {
        for args in [
            &["inspect", "guest.raw", "--progress", "always"][..],
            &["prune", "guest.raw", "-o", "pruned", "--force"],
            &["save", "guest.raw", "-o", "saved", "--force"],
            &[
                "convert",
                "guest.raw",
                "--to",
                "kdump",
                "-o",
                "converted",
                "--force",
            ],
            &["verify", "saved"],
            &["restore", "saved", "-o", "restored", "--force"],
        ] {
            let output = run(threads, args);
            assert!(
                output.status.success(),
                "{threads}, {args:?}: {}",
                stderr(&output)
            );
        }
        assert!(fs::read(at("restored")).unwrap() == fs::read(at("pruned")).unwrap());
    }
}

/// The limit is raised as far as it may be; one that is too low is told with what is needed.
#[test]
fn a_server_has_descriptors_for_those_that_it_serves() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let socket = folder.path().join("pages");
    let serve = ["serve", text(&raw), "--socket", text(&socket)];
    for (limit, more, words) in [
        ("--nofile=12:12", &[][..], ["12 files", "need 455"]),
        ("--nofile=400:400", &[], ["400 files", "1 virtual machines"]),
        (
            "--nofile=1000:1000",
            &["--max-vms", "100"],
            ["1000 files", "need 1148"],
        ),
    ] {
        let output = limited(limit, &[&serve[..], more].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        for words in words.iter().chain(&["RLIMIT_NOFILE", "LimitNOFILE="]) {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert!(!socket.exists());
    }
    for (limit, more) in [
        ("--nofile=64:20000", &["--max-vms", "1024"][..]),
        ("--nofile=1000:1000", &[]),
    ] {
        let mut command = Command::new("prlimit");
        command.args([limit, SONICSHOT]).args(serve).args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(line.starts_with("serving "), "{limit}: {line}");
    }
}

/// On a terminal a bar moves by itself: where that can have no thread it is drawn all the same.
#[test]
fn a_bar_needs_no_thread() {
    let folder = tempfile::tempdir().unwrap();
    let can = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        output.is_ok_and(|output| output.status.success())
    };
    let can = can("setpriv", &["--reuid=54321", "--clear-groups", "true"])
        && can("script", &["--version"]);
    if !sonicshot_testkit::has("the right to be another user, and `script`", can) {
        return;
    }
    let all_may = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let raw = raw_dump(folder.path(), |_| {});
    let program = folder.path().join("program");
    fs::copy(SONICSHOT, &program).unwrap();
    for (path, mode) in [(folder.path(), 0o777), (&raw, 0o644), (&program, 0o755)] {
        all_may(path, mode);
    }
    for threads in [1, 2, 100] {
        let line = format!(
            "setpriv --reuid=54322 --clear-groups prlimit --nproc={threads} {} inspect {} --verbose",
            text(&program),
            text(&raw)
        );
        // A terminal of its own.
        let output = Command::new("script")
            .args(["-qec", &line, "/dev/null"])
            .env("TMPDIR", folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{threads}: {said}");
        assert!(!said.contains("panicked"), "{threads}: {said}");
        // The cursor is moved: there was a bar.
        assert!(said.contains("\u{1b}["), "{threads}: {said:?}");
    }
}

#[test]
fn a_link_to_an_open_file_is_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let (link, further) = (folder.path().join("stdout"), folder.path().join("further"));
    symlink("/proc/self/fd/1", &link).unwrap();
    symlink("stdout", &further).unwrap();
    for name in [&link, &further] {
        let captured = fs::File::create(folder.path().join("captured")).unwrap();
        let output = Command::new(SONICSHOT)
            .args(["prune", text(&raw), "-o", text(name), "--force"])
            .stdout(captured)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("link of the system"),
            "{}",
            stderr(&output)
        );
        assert!(name.is_symlink());
    }
}
