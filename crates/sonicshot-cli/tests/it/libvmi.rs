//! `--libvmi`, through a library with LibVMI's C interface.

use crate::common::{checked_run, ram, sonicshot};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The small real guest, as a domain of Xen's that tells no processors: a guest whose text this is.
struct Guest {
    folder: TempDir,
}

impl Guest {
    fn new(more: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let memory = folder.path().join("memory");
        fs::write(&memory, ram()).unwrap();
        let len = ram().len();
        let text = format!(
            "memory={}\nlog={}\nrange=0-{len:x}@0\nsize={len:x}\nend={len:x}\n{more}",
            memory.display(),
            folder.path().join("log").display(),
        );
        fs::write(folder.path().join("guest"), text).unwrap();
        Self { folder }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Output {
        let domain = format!("xen:{}", self.file("guest").display());
        self.run_of(&domain, words)
    }

    fn run_of(&self, domain: &str, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
        command.args(words).args(["--libvmi", domain]);
        command.env("SONICSHOT_LIBVMI", libvmi_fake::library());
        checked_run(command)
    }

    /// The calls, without tries to map.
    fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.file("log")).unwrap_or_default();
        let calls = log.lines().filter(|line| *line != "maps");
        calls.map(str::to_owned).collect()
    }
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    serde_json::from_str(text.trim()).unwrap_or_else(|_| panic!("{text}{error}"))
}

fn cr3() -> String {
    let text = ram();
    let value = |name: &[u8]| {
        let at = text
            .windows(name.len())
            .position(|window| window == name)
            .unwrap();
        let rest = &text[at + name.len()..];
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap();
        String::from_utf8(rest[..end].to_vec()).unwrap()
    };
    let linked = u64::from_str_radix(&value(b"\nSYMBOL(swapper_pg_dir)="), 16).unwrap();
    let base: i64 = value(b"\nNUMBER(phys_base)=").parse().unwrap();
    let linked = linked - 0xffff_ffff_8000_0000;
    format!("0x{:x}", linked.checked_add_signed(base).unwrap())
}

#[test]
fn a_guest_is_inspected_as_its_memory_in_a_file_is() {
    let guest = Guest::new("");
    let file = guest.file("memory");
    let plain = json(&sonicshot(&["inspect", file.to_str().unwrap(), "--json"]));
    // Its processors are not told: it takes their CR3.
    let told = guest.run(&["inspect", "--json"]);
    assert!(!told.status.success());
    let seen = json(&guest.run(&["inspect", "--json", "--cr3", &cr3()]));
    for key in [
        "classes",
        "classes_zero",
        "zones",
        "total_pages",
        "kernel_release",
        "ram",
    ] {
        assert_eq!(seen[key], plain[key], "{key}");
    }
    assert_eq!(seen["format_name"], "LibVMI (Xen)");
    assert_eq!(seen["libvmi"]["events_version"], 9);
    assert!(seen["paused_seconds"].as_f64().unwrap() > 0.0);
    let calls = guest.log();
    assert_eq!(calls[..4], ["pause", "flush", "resume", "destroy"]);
    // As a file through LibVMI's own file mode.
    let domain = format!("file:{}", file.display());
    let seen = json(&guest.run_of(&domain, &["inspect", "--json"]));
    assert_eq!(seen["classes"], plain["classes"]);
    let text = guest.run_of(&domain, &["inspect"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("free_buddy*") && text.contains("of zeroes*"),
        "{text}"
    );
    // The runs of frames.
    let runs = guest.file("runs.tsv");
    let path = runs.to_str().unwrap();
    assert!(
        guest
            .run_of(&domain, &["inspect", "--pfns", path])
            .status
            .success()
    );
    let plain_runs = guest.file("plain.tsv");
    let file = file.to_str().unwrap();
    sonicshot(&["inspect", file, "--pfns", plain_runs.to_str().unwrap()]);
    assert_eq!(fs::read(runs).unwrap(), fs::read(plain_runs).unwrap());
}

#[test]
fn a_guest_is_saved_and_what_could_be_dropped_is_told() {
    let guest = Guest::new("");
    let domain = format!("file:{}", guest.file("memory").display());
    let out = guest.file("out.sonic");
    let out = out.to_str().unwrap();
    let saved = json(&guest.run_of(&domain, &["save", "-o", out, "--json"]));
    assert!(saved["left_out"]["free_buddy"].as_u64().unwrap() > 0);
    assert!(saved["devices"].as_str().unwrap().contains("memory alone"));
    let file = guest.file("memory");
    let file = file.to_str().unwrap();
    let verified = sonicshot(&["verify", out, "--against", file]);
    assert!(verified.status.success(), "{verified:?}");
    // As of the file itself.
    let plain = guest.file("plain.sonic");
    let plain = sonicshot(&["save", file, "-o", plain.to_str().unwrap(), "--json"]);
    assert_eq!(json(&plain)["left_out"], saved["left_out"]);
    let again = guest.run_of(&domain, &["save", "-o", out]);
    assert_eq!(again.status.code(), Some(1));
    let piped = guest.run_of(&domain, &["save", "-o", "-"]);
    assert!(piped.status.success() && piped.stdout.len() > 1 << 20);
    let dry = json(&guest.run_of(&domain, &["prune", "--dry-run", "--json"]));
    let plain = json(&sonicshot(&["prune", file, "--dry-run", "--json"]));
    assert_eq!(dry["droppable_pages"], plain["droppable_pages"]);
    assert_eq!(dry["dropped"], plain["dropped"]);
}

#[test]
fn what_cannot_be_is_refused_in_words_and_leaves_nothing_paused() {
    let guest = Guest::new("");
    let out = guest.file("out");
    let out = out.to_str().unwrap();
    for (words, code, says) in [
        (&["prune", "-o", out][..], 2, "--dry-run"),
        (&["prune", "--in-place"], 2, "--dry-run"),
        (&["save", "-o", out, "--keep-all"], 2, "--keep-all"),
        (&["save", "-o", out, "--drop", "anonymous"], 2, "anonymous"),
        (&["inspect", "--layout", "pc"], 2, "START-END"),
        (&["inspect", "--format", "raw"], 2, "--format"),
        (&["inspect", "a-file"], 2, "--libvmi"),
    ] {
        let output = guest.run(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
        assert!(error.contains(says), "{words:?}: {error}");
    }
    assert!(guest.log().is_empty());
    let output = guest.run_of("xen:/nowhere", &["inspect"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("there is no such guest"), "{error}");
    let output = guest.run_of("qemu:a", &["inspect"]);
    assert_eq!(output.status.code(), Some(2));
    // No LibVMI.
    let mut command = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
    command.args([
        "inspect",
        "--libvmi",
        "xen:a",
        "--libvmi-library",
        "/nowhere/libvmi.so.0",
    ]);
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("github.com/libvmi/libvmi"), "{error}");
    // Destroyed while it is looked at: reading failed, and it was to run on.
    let gone = Guest::new("gone_after=100\n");
    let output = gone.run(&["inspect", "--cr3", "0x1000"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(gone.log().contains(&"resume".into()));
    assert!(!Path::new(out).exists());
}

#[test]
fn a_guest_runs_on_whose_saver_is_killed() {
    let guest = Guest::new("");
    let domain = format!("xen:{}", guest.file("guest").display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
    // It waits for who takes the checkpoint from its pipe.
    command
        .args(["save", "-o", "-", "--cr3", &cr3(), "--libvmi", &domain])
        .env("SONICSHOT_LIBVMI", libvmi_fake::library())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut saver = command.spawn().unwrap();
    let mut first = [0];
    saver
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    assert_eq!(guest.log(), ["pause", "flush"]);
    saver.kill().unwrap();
    saver.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while !guest.log().contains(&"resume".into()) {
        assert!(Instant::now() < until, "{:?}", guest.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}
