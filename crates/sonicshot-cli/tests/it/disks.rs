//! `save --disk` and what comes of it, on a real guest's memory and a disk that has its page cache.

use crate::common::*;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PAGE: usize = 4096;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(args: &[&str]) -> Value {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

/// The numbers of the frames of the page cache.
fn page_cache(dump: &Path, folder: &Path) -> Vec<usize> {
    let list = folder.join("pages.tsv");
    let run = sonicshot(&["inspect", text(dump), "--pfns", text(&list)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let mut frames = Vec::new();
    for line in fs::read_to_string(&list).unwrap().lines() {
        let fields: Vec<_> = line.split('\t').collect();
        if fields[2].starts_with("page_cache") {
            let [first, last] = [0, 1].map(|at| fields[at].parse::<usize>().unwrap());
            frames.extend(first..=last);
        }
    }
    frames
}

/// A disk with an ext4's superblock, the page cache in another order, and something behind: its path, and
/// the number of pages that are on it.
pub(crate) fn disk(folder: &Path, dump: &Path) -> (PathBuf, usize) {
    let frames = page_cache(dump, folder);
    let ram = ram();
    let is_bytes = |frame: &&usize| {
        let page = &ram[**frame * PAGE..][..PAGE];
        page.chunks(8).any(|word| word != &page[..8])
    };
    let kept = frames.iter().filter(is_bytes).count();
    let mut bytes = vec![0_u8; PAGE];
    bytes[1024 + 56..1024 + 58].copy_from_slice(&0xef53_u16.to_le_bytes());
    let (up, down) = frames.split_at(frames.len() / 2);
    for frame in up.iter().chain(down.iter().rev()) {
        bytes.extend(&ram[frame * PAGE..][..PAGE]);
    }
    bytes.extend(vec![0x77; 3 * PAGE]);
    let path = folder.join("disk.img");
    fs::write(&path, bytes).unwrap();
    (path, kept)
}

#[test]
fn a_guest_whose_page_cache_is_on_its_disk_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let dump = raw_dump(folder, |_| {});
    let (image, kept) = disk(folder, &dump);
    assert!(kept > 500, "{kept} pages of page cache");
    let given = format!("root={}", text(&image));
    let path = |name: &str| folder.join(name);
    let (all, small) = (path("all.sonic"), path("small.sonic"));
    let whole = json(&["save", text(&dump), "-o", text(&all), "--json"]);
    assert_eq!(whole["disk_pages"], 0);
    for hash in ["xxh3", "sha256"] {
        let saved = json(&[
            "save",
            text(&dump),
            "-o",
            text(&small),
            "--disk",
            &given,
            "--hash",
            hash,
            "--json",
            "--force",
        ]);
        assert_eq!(saved["disk_pages"], kept);
        let len = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(len(&small) < len(&all) - (kept * PAGE) as u64 / 5);
        let seen = json(&["inspect", text(&small), "--json"]);
        assert_eq!(
            (&seen["disk_pages"], &seen["disks"]),
            (&saved["disk_pages"], &saved["disks"])
        );
        assert_eq!(seen["disks"][0]["name"], "root");
        assert_eq!(seen["disks"][0]["hash"], hash);
        assert_eq!(seen["disks"][0]["marks"][0], "ext4's superblock");
        assert_eq!(seen["on_disk_bytes"], kept * PAGE);
        let shown = sonicshot(&["inspect", text(&small)]);
        let shown = String::from_utf8(shown.stdout).unwrap();
        assert!(
            shown.contains("disk      root, ") && shown.contains("on a disk"),
            "{shown}"
        );

        let (back, again) = (path("back"), path("again"));
        for (from, to) in [(&all, &back), (&small, &again)] {
            let args = ["restore", text(from), "-o", text(to), "--force"];
            let disks = if from == &small {
                &["--disk", &given][..]
            } else {
                &[]
            };
            let run = sonicshot(&[&args, disks].concat());
            assert!(run.status.success(), "{}", stderr(&run));
        }
        assert!(fs::read(&back).unwrap() == fs::read(&again).unwrap());
        let checked = json(&[
            "verify",
            text(&small),
            "--disk",
            &given,
            "--against",
            text(&dump),
            "--json",
        ]);
        assert_eq!(checked["checked_disk_pages"], kept);
        let unchecked = json(&["verify", text(&small), "--json"]);
        assert_eq!(unchecked["checked_disk_pages"], Value::Null);
    }
}

/// Without a kernel nothing tells what is page cache: the disk is looked through.
#[test]
fn pages_are_found_on_the_disk_without_a_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let dump = raw_dump(folder, |_| {});
    let (image, kept) = disk(folder, &dump);
    let given = format!("root={}", text(&image));
    let out = folder.join("x.sonic");
    let save = [
        "save",
        text(&dump),
        "-o",
        text(&out),
        "--disk",
        &given,
        "--json",
    ];
    let found = json(&[&save[..], &["--keep-all", "--layout", "flat"]].concat());
    assert!(
        found["disk_pages"].as_u64().unwrap() >= kept as u64,
        "{found}"
    );
    assert_eq!(
        found["disk_search"]["streamed_bytes"],
        fs::metadata(&image).unwrap().len()
    );
    json(&[
        "verify",
        text(&out),
        "--disk",
        &given,
        "--against",
        text(&dump),
        "--json",
    ]);
}

/// A refusal by its code and its words, which leaves no output.
pub fn refused(args: &[&str], code: i32, words: &str, output: &Path) {
    let run = sonicshot(args);
    let said = stderr(&run);
    assert_eq!(run.status.code(), Some(code), "{args:?}: {said}");
    assert!(said.contains(words), "{args:?}: {said}");
    assert!(!output.exists(), "{args:?}");
}

#[test]
fn what_cannot_be_taken_from_the_disk_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let dump = raw_dump(folder, |_| {});
    let (image, _) = disk(folder, &dump);
    let given = format!("root={}", text(&image));
    let small = folder.join("small.sonic");
    json(&[
        "save",
        text(&dump),
        "-o",
        text(&small),
        "--disk",
        &given,
        "--json",
    ]);
    let whole = fs::read(&image).unwrap();
    let out = folder.join("out");
    let restore = ["restore", text(&small), "-o", text(&out)];
    let with = |disk: &str| [&restore[..], &["--disk", disk]].concat().join("\n");
    let refuse = |args: String, code, words| {
        refused(&args.lines().collect::<Vec<_>>(), code, words, &out);
    };
    refuse(restore.join("\n"), 2, "its image was not given");
    refuse(with(&given.replace("root=", "else=")), 2, "no disk `else`");
    refuse(with("root"), 2, "NAME=IMAGE");
    refuse(with("root=/nowhere"), 1, "/nowhere");
    let convert = ["convert", text(&small), "-o", text(&out), "--to", "elf"];
    refuse(convert.join("\n"), 2, "its image was not given");
    let sonic = ["convert", text(&small), "-o", text(&out), "--to", "sonic"];
    refuse(sonic.join("\n"), 2, "its image was not given");
    let serve = ["serve", text(&small), "--socket", text(&out)];
    refuse(serve.join("\n"), 2, "its image was not given");
    let lazy = [&serve[..], &["--disk", &given]].concat().join("\n");
    refuse(lazy, 1, "--disk-immutable");

    // Ten blocks that changed; somebody mounted it; it is shorter; it is longer.
    let mut changed = whole.clone();
    for block in 3..13 {
        changed[block * PAGE + block] ^= 1;
    }
    fs::write(&image, &changed).unwrap();
    refuse(with(&given), 3, "holds other bytes");
    refuse(with(&given) + "\n--disk-moved-on", 3, "holds other bytes");
    let verify = ["verify", text(&small), "--disk", &given];
    refuse(verify.join("\n"), 3, "holds other bytes");
    let mut mounted = whole.clone();
    mounted[1024 + 44] ^= 1;
    fs::write(&image, &mounted).unwrap();
    refuse(with(&given), 3, "ext4's superblock");
    fs::write(&image, &whole[..whole.len() - 512]).unwrap();
    refuse(with(&given), 3, "bytes, and had");
    fs::write(&image, [&whole[..], &[0; 512]].concat()).unwrap();
    refuse(with(&given), 3, "bytes, and had");
    fs::write(&image, b"QFI\xfb this is no raw disk").unwrap();
    refuse(with(&given), 3, "qcow2");

    // A guest still runs on it.
    fs::write(&image, &whole).unwrap();
    let writer = File::options().write(true).open(&image).unwrap();
    refuse(with(&given), 6, "not pinned");
    let save = ["save", text(&dump), "-o", text(&out), "--disk", &given];
    refuse(save.join("\n"), 6, "not pinned");
    drop(writer);

    // What goes on all the same.
    fs::write(&image, &mounted).unwrap();
    let run = sonicshot(
        &with(&given)
            .lines()
            .chain(["--disk-moved-on"])
            .collect::<Vec<_>>(),
    );
    assert!(run.status.success(), "{}", stderr(&run));
    let mut page = [0; 16];
    File::open(&out)
        .unwrap()
        .read_exact_at(&mut page, 0)
        .unwrap();
}
