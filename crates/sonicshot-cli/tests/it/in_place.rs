//! Pruning a real guest's files in place: killed at any moment, and with somebody writing them.

use crate::common::*;
use sonicshot::{Gpa, GuestMemory};
use sonicshot_dump::{Dump, LayoutSpec};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const KILLS: u64 = 50;
/// The longest way: every page that can go is punched.
const PRUNE: [&str; 4] = ["prune", "--in-place", "--min-hole", "0"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn start(dump: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(PRUNE)
        .arg(dump)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn blocks(dump: &Path) -> u64 {
    fs::metadata(dump).unwrap().blocks()
}

/// Whether a prune drops each frame.
fn droppable(dump: &Path) -> Vec<bool> {
    let out = dump.with_extension("tsv");
    let run = sonicshot(&["inspect", text(dump), "--pfns", text(&out), "--force"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let mut frames = Vec::new();
    for (first, last, class) in read_pfns(&out) {
        let goes = matches!(
            class.as_str(),
            "free_buddy" | "free_pcp" | "offline" | "zero"
        );
        frames.extend((first..=last).map(|_| goes));
    }
    frames
}

/// Puts the guest's memory, as the file says now, into a buffer of its size.
fn memory(dump: &Path, bytes: &mut [u8]) {
    let dump = Dump::open(dump, Some(&LayoutSpec::Flat)).unwrap();
    dump.read(Gpa::ZERO, bytes).unwrap();
}

/// Makes a file what it was, with no hole.
fn put_back(path: &Path, fresh: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(fresh, 0).unwrap();
}

/// Numbers from 0 to 1, the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Kills the prune of a file 50 times: half of the time at any time, half of the time when some
/// part of what it frees is free.
fn killed_at_random(dump: &Path) {
    let fresh = fs::read(dump).unwrap();
    let goes = droppable(dump);
    let before = blocks(dump);
    let started = Instant::now();
    assert!(start(dump).wait().unwrap().success());
    let takes = started.elapsed();
    let (done, all) = (fs::read(dump).unwrap(), before - blocks(dump));
    assert!(all > 0);
    put_back(dump, &fresh);
    let (mut pages, mut now) = (vec![0; ram().len()], Vec::new());
    let mut random = Random(0x5eed_cafe);
    let (mut early, mut between, mut late) = (0, 0, 0);
    for kill in 0..KILLS {
        let before = blocks(dump);
        let mut child = start(dump);
        let part = random.next();
        if kill % 2 == 0 {
            std::thread::sleep(takes.mul_f64(part));
        } else {
            let enough = all as f64 * part;
            let deadline = Instant::now() + Duration::from_secs(60);
            while child.try_wait().unwrap().is_none()
                && before.saturating_sub(blocks(dump)) as f64 <= enough
                && Instant::now() < deadline
            {}
        }
        // It may have ended just now.
        let _ = child.kill();
        child.wait().unwrap();

        memory(dump, &mut pages);
        let pages = pages.chunks(PAGE).zip(ram().chunks(PAGE)).zip(&goes);
        for (frame, ((after, before), goes)) in pages.enumerate() {
            assert!(
                after == before || *goes && after.iter().all(|byte| *byte == 0),
                "kill {kill}, frame {frame:#x}"
            );
        }
        read_again(dump, &mut now);
        if now == fresh {
            early += 1;
            continue;
        }
        if now == done {
            late += 1;
        } else {
            between += 1;
            assert!(start(dump).wait().unwrap().success(), "kill {kill}");
            read_again(dump, &mut now);
            assert!(
                now == done,
                "kill {kill}: the result is another than without"
            );
        }
        put_back(dump, &fresh);
    }
    println!(
        "a prune takes {takes:?}: {early} kills before any change, {between} between, {late} after"
    );
    assert!(
        between >= 10,
        "{early} early, {between} between, {late} late"
    );
}

/// In memory, where there is such a folder: it takes a tenth of the time.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

#[test]
fn a_raw_file_survives_kills() {
    let folder = folder();
    killed_at_random(&raw_dump(folder.path(), |_| {}));
}

#[test]
fn a_mapped_ram_file_survives_kills() {
    let folder = folder();
    killed_at_random(&mapped_ram_dump(folder.path()));
}

/// A process that does something to a file, says so, and stays.
struct Other(Child);

impl Other {
    fn start(python: &str, dump: &Path) -> Self {
        let mut child = Command::new("python3")
            .args([
                "-c",
                &format!(
                    "import mmap, sys, time\n{python}\nprint('ready', flush=True)\ntime.sleep(600)"
                ),
            ])
            .arg(dump)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{python}");
        Self(child)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_file_that_another_process_writes_is_refused() {
    const OPEN: &str = "f = open(sys.argv[1], 'r+b')";
    const MAPPED: &str = "f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096); f.close()";
    const READS: &str = "f = open(sys.argv[1], 'rb')";
    let folder = tempfile::tempdir().unwrap();
    for dump in [
        raw_dump(folder.path(), |_| {}),
        mapped_ram_dump(folder.path()),
    ] {
        let fresh = fs::read(&dump).unwrap();
        for python in [OPEN, MAPPED] {
            let other = Other::start(python, &dump);
            let run = sonicshot(&["prune", text(&dump), "--in-place", "--json"]);
            assert_eq!(run.status.code(), Some(6), "{}", stderr(&run));
            assert!(fs::read(&dump).unwrap() == fresh, "{python}");
            let error: serde_json::Value = serde_json::from_slice(&run.stderr).unwrap();
            let said = error["error"].as_str().unwrap();
            assert!(said.contains(&format!("(pid {})", other.0.id())), "{said}");
            assert!(error["hint"].as_str().unwrap().contains("--live-ok"));
            // Reading it is fine, but said.
            let run = sonicshot(&["prune", text(&dump), "--dry-run", "--json"]);
            assert!(
                stdout(&run).contains("open for writing"),
                "{}",
                stdout(&run)
            );
            let run = sonicshot(&["inspect", text(&dump)]);
            assert!(
                stdout(&run).contains("open for writing")
                    || stderr(&run).contains("open for writing")
            );
        }
        let _reader = Other::start(READS, &dump);
        let run = sonicshot(&["prune", text(&dump), "--dry-run", "--json"]);
        assert!(
            !stdout(&run).contains("open for writing"),
            "{}",
            stdout(&run)
        );
        let _writer = Other::start(OPEN, &dump);
        let run = sonicshot(&["prune", text(&dump), "--in-place", "--live-ok", "--json"]);
        assert!(run.status.success(), "{}", stderr(&run));
        let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
        assert!(report["punched"].as_u64().unwrap() > 0, "{report}");
    }
}

#[test]
fn the_smallest_hole_is_an_option() {
    let folder = tempfile::tempdir().unwrap();
    let prune = |more: &[&str]| {
        let dump = raw_dump(folder.path(), |_| {});
        let args = ["prune", text(&dump), "--in-place", "--json"];
        let run = sonicshot(&[&args, more].concat());
        assert!(run.status.success(), "{}", stderr(&run));
        let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
        let number = |name: &str| report[name].as_u64().unwrap();
        // What was left is in the file, the rest is not.
        let dropped = number("dropped_bytes");
        assert_eq!(number("runs"), number("punched") + number("left_runs"));
        let freed = number("disk_before") - number("disk_after");
        assert!(
            freed.abs_diff(dropped - number("left_bytes")) < 1 << 20,
            "{report}"
        );
        (number("punched"), number("left_bytes"), dropped)
    };
    let (all, none_left, _) = prune(&["--min-hole", "0"]);
    let (default, left, dropped) = prune(&[]);
    let (few, much_left, _) = prune(&["--min-hole", "2M"]);
    assert!(
        all > default && default > few && few > 0,
        "{all} {default} {few}"
    );
    assert!(
        none_left == 0 && left > 0 && much_left > left,
        "{left} {much_left}"
    );
    assert!(
        left * 100 <= dropped * 3,
        "the default frees 97 %: {left} of {dropped}"
    );
    assert_eq!(prune(&["--min-hole", "4K"]).0, all);
    let dump = raw_dump(folder.path(), |_| {});
    for wrong in ["x", "4X", "99999999999G", ""] {
        let run = sonicshot(&["prune", text(&dump), "--in-place", "--min-hole", wrong]);
        assert_eq!(run.status.code(), Some(2), "{wrong}: {}", stderr(&run));
    }
}

/// A dry run refuses what the run would, and says what it would do.
#[test]
fn a_dry_run_in_place_says_what_the_run_does() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let (core, sent) = (folder.path().join("core"), folder.path().join("stream"));
    let run = sonicshot(&["convert", text(&raw), "-o", text(&core), "--to", "elf"]);
    assert!(run.status.success(), "{}", stderr(&run));
    fs::write(&sent, stream()).unwrap();
    let used = ["--drop", "anonymous", "--for-analysis"];
    for (dump, more) in [(&core, &[][..]), (&sent, &[]), (&raw, &used)] {
        for dry in [&["--dry-run"][..], &[]] {
            let args = ["prune", text(dump), "--in-place"];
            let run = sonicshot(&[&args, more, dry].concat());
            assert_eq!(
                run.status.code(),
                Some(2),
                "{more:?} {dry:?}: {}",
                stderr(&run)
            );
        }
    }
    let prune = |dump: &Path, more: &[&str]| {
        let run = sonicshot(&[&["prune", text(dump), "--in-place"], more].concat());
        assert!(run.status.success(), "{more:?}: {}", stderr(&run));
        stdout(&run)
    };
    let json = |dump: &Path, more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&prune(dump, &[more, &["--json"]].concat())).unwrap()
    };
    for dump in [raw, mapped_ram_dump(folder.path())] {
        let expected = json(&dump, &["--dry-run"]);
        let done = json(&dump, &[]);
        for key in ["droppable_bytes", "disk_before", "dropped"] {
            assert_eq!(expected[key], done[key], "{key}");
        }
        let number = |of: &serde_json::Value, key: &str| of[key].as_u64().unwrap();
        let (about, now) = (number(&expected, "disk_after"), number(&done, "disk_after"));
        assert!(about.abs_diff(now) < 1 << 20, "{about} {now}");
        assert!(number(&done, "dropped_bytes") > 0 && number(&done, "left_bytes") > 0);
        // Once more: what is left is too short for holes.
        for more in [&["--dry-run"][..], &[]] {
            let said = prune(&dump, more);
            assert!(said.contains("nothing to do"), "{said}");
            assert!(
                !said.contains("drop ") && !said.contains("dropped 5"),
                "{said}"
            );
            assert_eq!(json(&dump, more)["droppable_bytes"], 0);
        }
        // Of several it counts for nothing.
        let fresh = folder.path().join("fresh");
        fs::write(&fresh, ram()).unwrap();
        let alone = json(&fresh, &["--dry-run"]);
        let said = prune(&fresh, &[text(&dump), "--dry-run"]);
        let sum = said.lines().last().unwrap();
        let first = said
            .lines()
            .find(|line| line.starts_with("would drop"))
            .unwrap();
        let size = first.split('(').nth(1).unwrap().split(',').next().unwrap();
        assert!(number(&alone, "droppable_bytes") > 0);
        assert!(
            sum.contains(&format!("would drop {size} of 128.0 MiB")),
            "{said}"
        );
        // The rest of it goes with smaller holes, and only that is said to.
        let rest = json(&dump, &["--min-hole", "0"]);
        let (freed, left) = (number(&rest, "freed_bytes"), number(&done, "left_bytes"));
        assert!(freed > 0 && freed <= left + (1 << 16), "{freed} {left}");
    }
}
