//! Snapshot folders, diffs, and several inputs, all of a real guest's memory.

use crate::common::*;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const PAGE: usize = 4096;
const HALF: u64 = 64 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(args: &[&str]) -> Value {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

/// The guest's RAM as a plain prune leaves it.
fn pruned(folder: &Path) -> Vec<u8> {
    let dump = raw_dump(folder, |_| {});
    let out = folder.join("pruned.raw");
    let run = sonicshot(&["prune", text(&dump), "-o", text(&out)]);
    assert!(run.status.success(), "{}", stderr(&run));
    fs::remove_file(dump).unwrap();
    let bytes = fs::read(&out).unwrap();
    fs::remove_file(out).unwrap();
    bytes
}

/// A Cloud Hypervisor folder whose file holds the upper half of RAM first.
pub fn cloud_hypervisor(folder: &Path) -> PathBuf {
    fs::create_dir(folder).unwrap();
    let ranges = json!({"memory_ranges": {"data": [
        {"gpa": HALF, "length": HALF},
        {"gpa": 0, "length": HALF},
    ]}});
    let state = json!({
        "snapshots": {
            "device-manager": {"snapshots": {}, "snapshot_data": null},
            "memory-manager": {"snapshots": {}, "snapshot_data": {"state": ranges.to_string()}},
        },
        "snapshot_data": {"state": "{}"},
    });
    fs::write(folder.join("state.json"), state.to_string()).unwrap();
    let config = json!({"memory": {"size": 2 * HALF, "zones": null}});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("memory-ranges"), halves(ram())).unwrap();
    folder.into()
}

/// The other half first.
fn halves(bytes: &[u8]) -> Vec<u8> {
    let (low, high) = bytes.split_at(usize::try_from(HALF).unwrap());
    [high, low].concat()
}

fn state_file() -> Vec<u8> {
    let mut state = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
    state.extend([3; 1000]);
    state
}

fn firecracker(folder: &Path, memory: &[u8]) -> PathBuf {
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("vm.state"), state_file()).unwrap();
    fs::write(folder.join("vm.mem"), memory).unwrap();
    folder.into()
}

/// The pages of `ram` that are not those of `base`, in a sparse file.
fn write_diff(path: &Path, base: &[u8], ram: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(ram.len() as u64).unwrap();
    for (number, (old, new)) in base.chunks(PAGE).zip(ram.chunks(PAGE)).enumerate() {
        if old != new {
            file.write_all_at(new, (number * PAGE) as u64).unwrap();
        }
    }
}

/// The class of every frame.
fn classes(args: &[&str], out: &Path) -> Vec<String> {
    let run = sonicshot(&[&["inspect", "--pfns", text(out), "--force"], args].concat());
    assert!(run.status.success(), "{}", stderr(&run));
    let runs = read_pfns(out).into_iter();
    runs.flat_map(|(first, last, class)| (first..=last).map(move |_| class.clone()))
        .collect()
}

#[test]
fn a_crosvm_folder_is_pruned_with_all_that_is_in_it() {
    let temporary = TempDir::new().unwrap();
    let want = pruned(temporary.path());
    let folder = temporary.path().join("vm");
    fs::create_dir_all(folder.join("vcpu")).unwrap();
    fs::create_dir_all(folder.join("bus0/pci")).unwrap();
    fs::write(folder.join("vcpu/0"), b"registers").unwrap();
    fs::write(folder.join("bus0/pci/3"), b"a device").unwrap();
    let whole = json!({"guest_base": 0, "size": 2 * HALF, "data_ranges": [
        {"start": 0, "end": HALF}, {"start": HALF, "end": 2 * HALF},
    ]});
    let metadata = json!({"regions": [whole], "compressed": false}).to_string();
    fs::write(folder.join("mem_metadata"), &metadata).unwrap();
    fs::write(folder.join("mem"), ram()).unwrap();
    let others = |folder: &Path| {
        assert_eq!(fs::read(folder.join("vcpu/0")).unwrap(), b"registers");
        assert_eq!(fs::read(folder.join("bus0/pci/3")).unwrap(), b"a device");
        assert_eq!(
            fs::read_to_string(folder.join("mem_metadata")).unwrap(),
            metadata
        );
        fs::read(folder.join("mem")).unwrap()
    };
    assert_eq!(json(&["inspect", text(&folder), "--json"])["vmm"], "crosvm");
    let out = temporary.path().join("out");
    json(&["prune", text(&folder), "-o", text(&out), "--json"]);
    assert!(others(&out) == want);
    assert!(others(&folder) == ram());
    let all = ["--in-place", "--min-hole", "0", "--json"];
    json(&[&["prune", text(&folder)], &all[..]].concat());
    assert!(others(&folder) == want);

    // What is no file is refused by its name, and nothing is left behind.
    let link = folder.join("vcpu/1");
    std::os::unix::fs::symlink("0", &link).unwrap();
    let again = temporary.path().join("again");
    let run = sonicshot(&["prune", text(&folder), "-o", text(&again)]);
    assert_eq!(run.status.code(), Some(3));
    assert!(stderr(&run).contains(text(&link)), "{}", stderr(&run));
    assert!(!again.exists());
}

#[test]
fn a_cloud_hypervisor_folder_is_pruned_as_its_state_says() {
    let temporary = TempDir::new().unwrap();
    let want = halves(&pruned(temporary.path()));
    let folder = cloud_hypervisor(&temporary.path().join("vm"));
    let memory = folder.join("memory-ranges");
    for input in [&folder, &memory] {
        let report = json(&["inspect", text(input), "--json"]);
        assert_eq!(report["vmm"], "Cloud Hypervisor");
        assert_eq!(report["path"], text(input));
        assert_eq!(report["total_pages"], 32768);
        let origin = report["layout_origin"].as_str().unwrap();
        assert!(origin.contains("state.json"), "{origin}");
    }
    // By copy: the folder whole.
    let out = temporary.path().join("out");
    json(&["prune", text(&folder), "-o", text(&out), "--json"]);
    assert!(fs::read(out.join("memory-ranges")).unwrap() == want);
    for name in ["state.json", "config.json"] {
        let (a, b) = (fs::read(folder.join(name)), fs::read(out.join(name)));
        assert_eq!(a.unwrap(), b.unwrap());
    }
    let on_disk = fs::metadata(out.join("memory-ranges")).unwrap().blocks() * 512;
    assert!(on_disk < 100 << 20, "{on_disk}");
    let run = sonicshot(&["prune", text(&folder), "-o", text(&out)]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    json(&[
        "prune",
        text(&folder),
        "-o",
        text(&out),
        "--force",
        "--json",
    ]);
    // The file alone.
    let file = temporary.path().join("file");
    json(&["prune", text(&memory), "-o", text(&file), "--json"]);
    assert!(fs::read(&file).unwrap() == want);
    assert!(fs::read(&memory).unwrap() == halves(ram()), "not in place");
    // A checkpoint of the folder.
    let (sonic, again) = (
        temporary.path().join("x.sonic"),
        temporary.path().join("again"),
    );
    json(&["save", text(&folder), "-o", text(&sonic), "--json"]);
    json(&["restore", text(&sonic), "-o", text(&again), "--json"]);
    assert!(halves(&fs::read(&again).unwrap()) == want);
    // In place.
    let report = json(&[
        "prune",
        text(&folder),
        "--in-place",
        "--min-hole",
        "0",
        "--json",
    ]);
    assert!(report["punched"].as_u64().unwrap() > 0, "{report}");
    assert!(fs::read(&memory).unwrap() == want);
    // Killed or done, it is the same guest; done again, there is nothing to do.
    let report = json(&[
        "prune",
        text(&folder),
        "--in-place",
        "--min-hole",
        "0",
        "--json",
    ]);
    assert_eq!(report["punched"], 0, "{report}");
}

#[test]
fn a_cloud_hypervisor_folder_that_is_not_sound_is_refused() {
    let temporary = TempDir::new().unwrap();
    let folder = cloud_hypervisor(&temporary.path().join("vm"));
    let state = fs::read(folder.join("state.json")).unwrap();
    fs::write(folder.join("state.json"), "{}").unwrap();
    let run = sonicshot(&["inspect", text(&folder)]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert!(stderr(&run).contains("--layout"), "{}", stderr(&run));
    let run = sonicshot(&["inspect", text(&folder), "--layout", "64M-128M,0-64M"]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(stdout(&run).contains("not understood"), "{}", stdout(&run));
    fs::write(folder.join("state.json"), state).unwrap();
    let config = r#"{"memory":{"zones":[{"id":"a","size":1,"file":"/tmp/ram"}]}}"#;
    fs::write(folder.join("config.json"), config).unwrap();
    assert!(sonicshot(&["inspect", text(&folder)]).status.success());
    let run = sonicshot(&["prune", text(&folder), "--in-place"]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert!(stderr(&run).contains("private mapping"), "{}", stderr(&run));
    assert!(fs::read(folder.join("memory-ranges")).unwrap() == halves(ram()));
}

#[test]
fn a_firecracker_pair_is_pruned() {
    let temporary = TempDir::new().unwrap();
    let want = pruned(temporary.path());
    let folder = firecracker(&temporary.path().join("vm"), ram());
    let out = temporary.path().join("out");
    json(&["prune", text(&folder), "-o", text(&out), "--json"]);
    json(&[
        "prune",
        text(&folder),
        "--in-place",
        "--min-hole",
        "0",
        "--json",
    ]);
    for folder in [&folder, &out] {
        assert!(fs::read(folder.join("vm.mem")).unwrap() == want);
        assert_eq!(fs::read(folder.join("vm.state")).unwrap(), state_file());
    }
    let run = sonicshot(&["prune", text(&folder.join("vm.state")), "--in-place"]);
    assert_eq!(run.status.code(), Some(3));
    assert!(
        stderr(&run).contains("give the memory file"),
        "{}",
        stderr(&run)
    );
    fs::write(folder.join("other.mem"), vec![0; 1 << 20]).unwrap();
    let run = sonicshot(&["prune", text(&folder), "--in-place"]);
    assert_eq!(run.status.code(), Some(3));
    assert!(
        stderr(&run).contains("other.mem, vm.mem"),
        "{}",
        stderr(&run)
    );
}

/// The guest some time before: other data in what changes as a guest runs, and of that some that
/// was zero then.
fn some_time_before(classes: &[String]) -> Vec<u8> {
    let mut before = ram().to_vec();
    let mut count = 0_u8;
    for (page, class) in before.chunks_mut(PAGE).zip(classes) {
        if matches!(
            class.as_str(),
            "free_buddy" | "free_pcp" | "zero" | "anonymous"
        ) {
            count = count.wrapping_add(1);
            if count.is_multiple_of(3) {
                page.fill(if count.is_multiple_of(2) { 0 } else { count });
            }
        }
    }
    before
}

/// The memory that a diff over `base` reads as.
fn merged_over(base: &[u8], diff: &Path) -> Vec<u8> {
    let mut merged = base.to_vec();
    let file = File::open(diff).unwrap();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        let (from, to) = (
            usize::try_from(start).unwrap(),
            usize::try_from(at).unwrap(),
        );
        file.read_exact_at(&mut merged[from..to], start).unwrap();
    }
    merged
}

/// Prunes a diff in place: what would let the base show through stays.
fn prune_diff_in_place(diff: &Path, base: &Path) {
    let over = ["--base", text(base)];
    let blocks = || fs::metadata(diff).unwrap().blocks();
    let size = blocks();
    let report = json(
        &[
            &[
                "prune",
                text(diff),
                "--in-place",
                "--min-hole",
                "0",
                "--json",
            ],
            &over[..],
        ]
        .concat(),
    );
    assert!(report["punched"].as_u64().unwrap() > 0, "{report}");
    assert!(
        report["kept_for_base_bytes"].as_u64().unwrap() > 0,
        "{report}"
    );
    assert!(blocks() < size);
}

#[test]
fn a_diff_is_read_over_its_base() {
    let temporary = TempDir::new().unwrap();
    let want = pruned(temporary.path());
    let whole = raw_dump(temporary.path(), |_| {});
    let tsv = temporary.path().join("pfns");
    let classes_of_whole = classes(&[text(&whole)], &tsv);
    let before = some_time_before(&classes_of_whole);
    let base = temporary.path().join("base");
    fs::write(&base, &before).unwrap();
    let folder = firecracker(&temporary.path().join("vm"), b"");
    let diff = folder.join("vm.mem");
    write_diff(&diff, &before, ram());

    // Alone it is no guest, and the hint says what is missing.
    let run = sonicshot(&["prune", text(&diff), "--in-place"]);
    assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
    assert!(stderr(&run).contains("--base"), "{}", stderr(&run));

    let over = ["--base", text(&base)];
    assert_eq!(
        classes(&[&[text(&diff)], &over[..]].concat(), &tsv),
        classes_of_whole
    );
    // By copy it is whole.
    for input in [&diff, &folder] {
        let out = temporary.path().join("out");
        json(
            &[
                &["prune", text(input), "-o", text(&out), "--json"],
                &over[..],
            ]
            .concat(),
        );
        let memory = if out.is_dir() {
            out.join("vm.mem")
        } else {
            out.clone()
        };
        assert!(fs::read(memory).unwrap() == want);
        if out.is_dir() {
            fs::remove_dir_all(out).unwrap();
        } else {
            fs::remove_file(out).unwrap();
        }
    }
    let (sonic, again) = (
        temporary.path().join("x.sonic"),
        temporary.path().join("again"),
    );
    json(
        &[
            &["save", text(&diff), "-o", text(&sonic), "--json"],
            &over[..],
        ]
        .concat(),
    );
    json(&["restore", text(&sonic), "-o", text(&again), "--json"]);
    assert!(fs::read(&again).unwrap() == want);

    prune_diff_in_place(&diff, &base);
    assert!(fs::read(&base).unwrap() == before, "the base is only read");
    let merged = merged_over(&before, &diff);
    let pages = merged
        .chunks(PAGE)
        .zip(ram().chunks(PAGE))
        .zip(&classes_of_whole);
    for ((after, before), class) in pages {
        let free = matches!(class.as_str(), "free_buddy" | "free_pcp" | "offline");
        assert!(
            after == before || free && after.iter().all(|byte| *byte == 0),
            "{class}"
        );
    }
    let run = sonicshot(&["inspect", text(&base), "--base", text(&base)]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
}

#[test]
fn a_hole_in_the_records_of_pages_is_no_whole_guest() {
    let temporary = TempDir::new().unwrap();
    // A page of `struct page`s of free frames, none of them the first of a block: the lists do
    // not lead through it, and one block in question would be explained.
    let is_record = |page: &&[u8]| {
        page.chunks(64).all(|record| {
            record[48..56] == [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
                && record[..8] == page[..8]
                && record[6..8] != [0, 0]
        })
    };
    let number = ram()
        .chunks(PAGE)
        .position(|page| is_record(&page))
        .unwrap();
    let mut before = ram().to_vec();
    before[number * PAGE..(number + 1) * PAGE].fill(0);
    let dump = temporary.path().join("dump");
    let file = File::create(&dump).unwrap();
    file.set_len(before.len() as u64).unwrap();
    for (at, page) in (0_u64..).step_by(PAGE).zip(ram().chunks(PAGE)) {
        if at != (number * PAGE) as u64 {
            file.write_all_at(page, at).unwrap();
        }
    }
    drop(file);
    for args in [
        &["inspect", text(&dump)][..],
        &["prune", text(&dump), "--in-place"],
        &["save", text(&dump), "-o", text(&temporary.path().join("x"))],
    ] {
        let run = sonicshot(args);
        assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
        assert!(stderr(&run).contains("--base"), "{}", stderr(&run));
        assert!(
            stderr(&run).contains("records of its pages"),
            "{}",
            stderr(&run)
        );
    }
    assert!(fs::read(&dump).unwrap() == before);
    let base = raw_dump(temporary.path(), |_| {});
    let run = sonicshot(&["inspect", text(&dump), "--base", text(&base)]);
    assert!(run.status.success(), "{}", stderr(&run));
}

#[test]
fn one_that_fails_does_not_stop_the_others() {
    let temporary = TempDir::new().unwrap();
    let want = pruned(temporary.path());
    let raw = raw_dump(temporary.path(), |_| {});
    let folder = firecracker(&temporary.path().join("vm"), ram());
    let link = temporary.path().join("link");
    fs::hard_link(&raw, &link).unwrap();
    let plain = temporary.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let absent = temporary.path().join("absent");
    let inputs = [&plain, &raw, &absent, &folder, &link].map(|path| text(path));

    let run = sonicshot(&[&["inspect"], &inputs[..], &["--json"]].concat());
    assert_eq!(
        run.status.code(),
        Some(3),
        "that of the first: {}",
        stderr(&run)
    );
    let lines = |text: &str| -> Vec<Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let paths = |values: &[Value]| -> Vec<String> {
        let paths = values
            .iter()
            .map(|value| value["path"].as_str().unwrap().to_owned());
        paths.collect()
    };
    assert_eq!(paths(&lines(&stdout(&run))), [text(&raw), text(&folder)]);
    let errors = lines(&stderr(&run));
    assert_eq!(paths(&errors), [text(&plain), text(&absent)]);
    assert_eq!(errors[0]["exit_code"], 3);
    assert_eq!(errors[1]["exit_code"], 1);
    assert!(
        errors[0]["error"].as_str().unwrap().contains("state.json"),
        "{errors:?}"
    );

    let run = sonicshot(&[&["prune", "--in-place", "--min-hole", "0"], &inputs[1..]].concat());
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    let last = stdout(&run).lines().last().unwrap().to_owned();
    assert!(
        last.starts_with("2 done, 1 failed, 1 given again; dropped "),
        "{last}"
    );
    assert!(
        stderr(&run).contains(&format!("failed: {}", text(&absent))),
        "{}",
        stderr(&run)
    );
    assert!(fs::read(&raw).unwrap() == want);
    assert!(fs::read(folder.join("vm.mem")).unwrap() == want);
}

#[test]
fn copies_of_several_go_into_a_folder_that_exists() {
    let temporary = TempDir::new().unwrap();
    let want = pruned(temporary.path());
    let at = |name: &str| temporary.path().join(name);
    let raw = raw_dump(temporary.path(), |_| {});
    let folder = firecracker(&at("vm"), ram());
    let out = at("out");
    let prune = |inputs: &[&Path], more: &[&str]| {
        let inputs: Vec<_> = inputs.iter().map(|path| text(path)).collect();
        sonicshot(&[&["prune", "-o", text(&out)], &inputs[..], more].concat())
    };
    let run = prune(&[&raw, &folder], &[]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(
        stderr(&run).contains("a folder that exists"),
        "{}",
        stderr(&run)
    );
    fs::create_dir(&out).unwrap();
    // Refused before anything is done.
    fs::create_dir(at("other")).unwrap();
    fs::hard_link(&raw, at("copy")).unwrap();
    fs::copy(&raw, at("other").join("guest.raw")).unwrap();
    let run = prune(&[&raw, &at("other").join("guest.raw")], &[]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(
        stderr(&run).contains("would both be written"),
        "{}",
        stderr(&run)
    );
    // One that exists does not stop the others, whichever comes first.
    for inputs in [[&raw, &folder], [&folder, &raw]] {
        fs::write(out.join("guest.raw"), "precious").unwrap();
        let run = prune(&inputs.map(PathBuf::as_path), &[]);
        assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
        assert_eq!(fs::read(out.join("guest.raw")).unwrap(), b"precious");
        assert!(fs::read(out.join("vm/vm.mem")).unwrap() == want);
        fs::remove_dir_all(&out).unwrap();
        fs::create_dir(&out).unwrap();
    }
    fs::write(out.join("vm"), "precious").unwrap();
    let run = prune(&[&raw, &folder], &[]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert!(fs::read(out.join("guest.raw")).unwrap() == want);
    let run = prune(&[&raw, &folder], &["--force"]);
    assert_eq!(
        run.status.code(),
        Some(3),
        "a file is not replaced by a folder"
    );
    assert_eq!(fs::read(out.join("vm")).unwrap(), b"precious");
    fs::remove_file(out.join("vm")).unwrap();
    let run = prune(&[&raw, &folder], &["--force"]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(out.join("guest.raw")).unwrap() == want);
    assert!(fs::read(out.join("vm/vm.mem")).unwrap() == want);
    assert!(fs::read(&raw).unwrap() == ram());
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);

    let run = sonicshot(&["inspect", text(&raw), text(&folder), "--pfns", "x"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
}
