//! `sonicshot xen` with a Xen that is not there: stand-ins for its libraries and its tool, and the
//! memory of a real guest as a domain's. (The lab has a real one.)

use crate::common::*;
use crate::disks::disk;
use crate::face::phases_told;
use serde_json::Value;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with the stand-ins, and the guest's memory.
struct Standin(tempfile::TempDir);

impl Standin {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.build(
            "control.rs",
            "libxenctrl.so.4.39",
            &["--crate-type", "cdylib"],
        );
        this.build(
            "memory.rs",
            "libxenforeignmemory.so.1",
            &["--crate-type", "cdylib"],
        );
        this.build("xl.rs", "xl", &["-Clink-arg=libxenctrl.so.4.39"]);
        fs::write(this.file("ram"), ram()).unwrap();
        this
    }

    fn build(&self, source: &str, name: &str, options: &[&str]) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standin");
        let done = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
            .args(["--edition", "2024", "-o", name])
            .arg(folder.join(source))
            .args(options)
            .current_dir(self.0.path())
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", stderr(&done));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &Path, args: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(self.0.path())
            .env("PATH", self.0.path())
            .env("LD_LIBRARY_PATH", self.0.path())
            .env("STANDIN_RAM", self.file("ram"))
            .env("STANDIN_LOG", self.file("log"))
            .env("STANDIN_RESTORED", self.file("restored"))
            .envs(variables.iter().copied());
        checked_run(command)
    }

    fn sonicshot(&self, args: &[&str], variables: &[(&str, &str)]) -> Output {
        self.run(Path::new(env!("CARGO_BIN_EXE_sonicshot")), args, variables)
    }

    /// The calls of `xl` since this was called last.
    fn asked(&self) -> Vec<String> {
        let log = fs::read_to_string(self.file("log")).unwrap_or_default();
        let _ = fs::remove_file(self.file("log"));
        log.lines().map(str::to_owned).collect()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap()
    }
}

fn json(run: &Output) -> Value {
    assert!(run.status.success(), "{}", stderr(run));
    serde_json::from_slice(&run.stdout).unwrap()
}

#[test]
fn a_save_is_what_a_prune_makes_of_a_full_one() {
    let xen = Standin::new();
    assert!(
        xen.run(&xen.file("xl"), &["save", "-p", "5", "./full"], &[])
            .status
            .success()
    );
    json(&xen.sonicshot(&["prune", "full", "-o", "pruned", "--json"], &[]));
    xen.asked();

    let saved = json(&xen.sonicshot(&["xen", "save", "guest", "live", "--json"], &[]));
    assert_eq!(saved["pruned"], true, "{saved}");
    assert_eq!(saved["total_pages"], 32768);
    assert!(saved["dropped_pages"].as_u64().unwrap() > 10_000, "{saved}");
    assert!(xen.bytes("live") == xen.bytes("pruned"));
    assert_eq!(saved["file_bytes"], xen.bytes("live").len());
    // Destroyed only after its image has its name.
    assert_eq!(xen.asked(), ["domid guest", "save -p 5", "destroy 5"]);

    let again = xen.sonicshot(&["xen", "save", "5", "live"], &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("live exists"), "{}", stderr(&again));
    assert_eq!(xen.asked(), [""; 0], "the domain was not touched");

    for option in ["-c", "-p"] {
        let args = ["xen", "save", "5", "live", "--force", "--json", option];
        assert_eq!(json(&xen.sonicshot(&args, &[]))["pruned"], true);
        assert_eq!(xen.asked(), [format!("save {option} 5")]);
    }
}

#[test]
fn compressed_images_are_restored_as_they_are() {
    let xen = Standin::new();
    json(&xen.sonicshot(&["xen", "save", "5", "plain", "--json"], &[]));
    let restored = json(&xen.sonicshot(&["xen", "restore", "plain", "--json"], &[]));
    assert_eq!(restored["kind"], "xen_restore", "{restored}");
    assert!(xen.bytes("restored") == xen.bytes("plain"));
    for how in ["zstd", "lz4"] {
        let args = ["xen", "save", "5", how, "--compress", how, "--json"];
        let saved = json(&xen.sonicshot(&args, &[]));
        assert_eq!(saved["pruned"], true);
        assert!(xen.bytes(how).len() < xen.bytes("plain").len() * 9 / 10);
        xen.asked();
        fs::remove_file(xen.file("restored")).unwrap();
        let restored = xen.sonicshot(&["xen", "restore", how, "-p", "--", "-e"], &[]);
        assert!(restored.status.success(), "{}", stderr(&restored));
        assert!(xen.bytes("restored") == xen.bytes("plain"), "{how}");
        assert_eq!(xen.asked(), ["restore -p -e"]);

        let half = xen.bytes(how).len() / 2;
        fs::write(xen.file("cut"), &xen.bytes(how)[..half]).unwrap();
        let cut = xen.sonicshot(&["xen", "restore", "cut", "--json"], &[]);
        assert_eq!(cut.status.code(), Some(1), "{}", stderr(&cut));
    }
}

/// The looks at the domain, the image, the check of it, and its way to the disk.
#[test]
fn saves_and_restores_of_a_domain_are_told_of() {
    let xen = Standin::new();
    for (args, expected) in [
        (
            &["xen", "save", "5", "plain", "--compress", "none"][..],
            "saving, finding the kernel, walking free lists, classifying pages, saving, opening, \
             syncing to disk",
        ),
        (
            &["xen", "save", "5", "packed", "--compress", "zstd"],
            "saving, finding the kernel, walking free lists, classifying pages, saving, syncing to disk",
        ),
        (&["xen", "restore", "plain"], "restoring"),
        (&["xen", "restore", "packed"], "restoring +"),
    ] {
        let run = xen.sonicshot(&[args, &["--progress", "json", "-q"]].concat(), &[]);
        assert!(run.status.success(), "{args:?}: {}", stderr(&run));
        let told = phases_told(&stderr(&run));
        let (last, restores) = (told.last().unwrap(), args[1] == "restore");
        let plus = if restores && last.1 > 0 { " +" } else { "" };
        let names: Vec<_> = told.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(format!("{}{plus}", names.join(", ")), expected, "{args:?}");
        // Each phase but the first knows its bytes.
        let known = told.iter().skip(1).all(|(_, bytes)| *bytes > 0);
        assert!(known, "{args:?}: {told:?}");
    }
}

/// The image of the domain by `xl`, and a checkpoint of it with its page cache on a disk.
#[test]
fn a_domain_is_saved_as_a_checkpoint_that_refers_to_its_disk() {
    let xen = Standin::new();
    let folder = xen.file("made");
    fs::create_dir(&folder).unwrap();
    let (image, kept) = disk(&folder, &raw_dump(&folder, |_| {}));
    let given = format!("root={}", image.display());
    json(&xen.sonicshot(
        &["xen", "save", "5", "plain", "--compress", "none", "--json"],
        &[],
    ));
    xen.asked();
    // While the domain runs, its disk is open.
    let writer = File::options().write(true).open(&image).unwrap();
    for (option, asked) in [
        ("", &["domid guest", "save -p 5", "destroy 5"][..]),
        ("-p", &["domid guest", "save -p 5"][..]),
    ] {
        let mut args = vec!["xen", "save", "guest", "vm.sonic", "--disk", &given];
        args.extend(["--json", "--force"]);
        args.extend(Some(option).filter(|option| !option.is_empty()));
        let saved = json(&xen.sonicshot(&args, &[]));
        assert_eq!(
            (&saved["pruned"], &saved["disk_pages"]),
            (&true.into(), &kept.into())
        );
        assert_eq!(saved["disks"][0]["name"], "root");
        assert_eq!(saved["compression"], "zstd");
        assert_eq!(saved["file_bytes"], xen.bytes("vm.sonic").len());
        assert!(saved["suspended_seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(xen.asked(), asked);
    }
    // One that goes on would write over it.
    let keeps = ["xen", "save", "5", "on.sonic", "-c", "--disk", &given];
    let refused = xen.sonicshot(&keeps, &[]);
    assert_eq!(refused.status.code(), Some(6), "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains("not pinned"),
        "{}",
        stderr(&refused)
    );
    assert_eq!(xen.asked(), [""; 0], "the domain was not touched");
    drop(writer);
    let shown = xen.sonicshot(&keeps, &[]);
    assert!(shown.status.success(), "{}", stderr(&shown));
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("on the disks, and not stored"), "{shown}");
    assert_eq!(xen.asked(), ["save -p 5", "unpause 5"]);

    for sonic in ["vm.sonic", "on.sonic"] {
        let args = ["xen", "restore", sonic, "--disk", &given, "-p", "--json"];
        json(&xen.sonicshot(&args, &[]));
        assert_eq!(xen.asked(), ["restore -p"]);
        assert!(xen.bytes("restored") == xen.bytes("plain"));
        fs::remove_file(xen.file("restored")).unwrap();
    }
    let left: Vec<_> = fs::read_dir(xen.0.path()).unwrap().collect();
    let names = left.iter().map(|entry| entry.as_ref().unwrap().file_name());
    let names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    let made = ["made", "ram", "plain", "vm.sonic", "on.sonic"];
    let is_ours = |name: &&String| made.contains(&name.as_str());
    assert_eq!(
        names.iter().filter(is_ours).count(),
        made.len(),
        "{names:?}"
    );
    assert!(!names.iter().any(|name| name.starts_with('.')), "{names:?}");
}

#[test]
fn a_checkpoint_whose_disk_is_another_becomes_no_domain() {
    let xen = Standin::new();
    let folder = xen.file("made");
    fs::create_dir(&folder).unwrap();
    let (image, _) = disk(&folder, &raw_dump(&folder, |_| {}));
    let given = format!("root={}", image.display());
    let nowhere = "root=/nowhere";
    json(&xen.sonicshot(
        &["xen", "save", "5", "plain", "--compress", "none", "--json"],
        &[],
    ));
    xen.asked();
    // Before the domain is touched.
    let early = xen.sonicshot(&["xen", "save", "5", "x.sonic", "--disk", nowhere], &[]);
    assert_eq!(early.status.code(), Some(1), "{}", stderr(&early));
    assert_eq!(xen.asked(), [""; 0]);
    // xl itself resumes it.
    let args = ["xen", "save", "5", "x.sonic", "--disk", &given];
    let failed = xen.sonicshot(&args, &[("STANDIN_FAILS", "1")]);
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(xen.asked(), ["save -p 5"]);
    // The disk is gone, or another, when the domain is suspended.
    let gone = image.display().to_string();
    for (after, asked) in [
        (&[][..], ["save -p 5", "unpause 5"]),
        (&["-c"][..], ["save -p 5", "unpause 5"]),
    ] {
        let whole = fs::read(&image).unwrap();
        let failed = xen.sonicshot(&[&args[..], after].concat(), &[("STANDIN_REMOVES", &gone)]);
        assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
        assert!(!xen.file("x.sonic").exists());
        assert_eq!(xen.asked(), asked, "it goes on");
        fs::write(&image, whole).unwrap();
    }

    json(&xen.sonicshot(&[&args[..], &["--json"]].concat(), &[]));
    xen.asked();
    let restore =
        |more: &[&str]| xen.sonicshot(&[&["xen", "restore", "x.sonic"], more].concat(), &[]);
    let without = restore(&[]);
    assert_eq!(without.status.code(), Some(2), "{}", stderr(&without));
    assert_eq!(xen.asked(), [""; 0], "xl was not asked");
    let mut bytes = fs::read(&image).unwrap();
    let at = bytes.len() - 5 * 4096;
    bytes[at] ^= 1;
    fs::write(&image, &bytes).unwrap();
    let changed = restore(&["--disk", &given]);
    assert_eq!(changed.status.code(), Some(3), "{}", stderr(&changed));
    assert!(stderr(&changed).contains("holds other bytes"));
    assert_eq!(xen.asked(), ["restore"]);
    // The image that xl was given has no end.
    assert!(xen.bytes("restored").len() < xen.bytes("plain").len());
    bytes[1024 + 44] ^= 1;
    fs::write(&image, &bytes).unwrap();
    let moved = restore(&["--disk", &given]);
    assert_eq!(moved.status.code(), Some(3), "{}", stderr(&moved));
    assert_eq!(xen.asked(), [""; 0], "xl was not asked");
    // An image is no checkpoint, and a checkpoint of something else is no image.
    let image = xen.sonicshot(&["xen", "restore", "plain", "--disk", &given], &[]);
    assert_eq!(image.status.code(), Some(2), "{}", stderr(&image));
    json(&xen.sonicshot(&["save", "ram", "-o", "ram.sonic", "--json"], &[]));
    xen.asked();
    let other = xen.sonicshot(&["xen", "restore", "ram.sonic"], &[]);
    assert_eq!(other.status.code(), Some(2), "{}", stderr(&other));
    assert_eq!(xen.asked(), [""; 0], "xl was not asked");
}

#[test]
fn whatever_fails_the_domain_is_left() {
    let xen = Standin::new();
    // xl itself resumes it.
    for option in ["-p", "--compress=zstd"] {
        let args = ["xen", "save", "5", "live", "--json", option];
        let failed = xen.sonicshot(&args, &[("STANDIN_FAILS", "1")]);
        assert_eq!(failed.status.code(), Some(1));
        assert!(
            stderr(&failed).contains("the disk is full"),
            "{}",
            stderr(&failed)
        );
        assert!(!xen.file("live").exists());
        assert_eq!(xen.asked(), ["save -p 5"]);
    }
    // Its image could not be given its name.
    fs::create_dir(xen.file("folder")).unwrap();
    let args = ["xen", "save", "5", "folder", "--force"];
    assert_eq!(xen.sonicshot(&args, &[]).status.code(), Some(1));
    assert_eq!(xen.asked(), [""; 0], "the domain was not touched");
    let missing = xen.sonicshot(&["xen", "save", "nobody", "live"], &[]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(stderr(&missing).contains("no such domain"));
    xen.asked();
    let dom0 = xen.sonicshot(&["xen", "save", "0", "live"], &[]);
    assert_eq!(dom0.status.code(), Some(2));
    assert_eq!(xen.asked(), [""; 0], "dom0 was not touched");
    assert!(!xen.file("live").exists());
}

#[test]
fn without_a_look_the_image_is_a_full_one_and_says_so() {
    let xen = Standin::new();
    assert!(
        xen.run(&xen.file("xl"), &["save", "-p", "5", "./full"], &[])
            .status
            .success()
    );
    let args = ["xen", "save", "5", "live", "--json"];
    let saved = json(&xen.sonicshot(&args, &[("STANDIN_RUNS", "1")]));
    assert_eq!(saved["pruned"], false);
    assert!(
        saved["reason"].as_str().unwrap().contains("not suspended"),
        "{saved}"
    );
    assert!(xen.bytes("live") == xen.bytes("full"));

    // Not a Linux guest.
    fs::write(xen.file("ram"), vec![7; 16 << 20]).unwrap();
    let text = xen.sonicshot(&["xen", "save", "5", "other"], &[]);
    assert!(text.status.success());
    assert!(
        stderr(&text).contains("this is a full image"),
        "{}",
        stderr(&text)
    );
}

#[test]
fn without_xen_nothing_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["xen", "save", "guest", "image"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("run it in dom0"), "{}", stderr(&run));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
