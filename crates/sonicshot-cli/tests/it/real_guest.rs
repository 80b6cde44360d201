//! The command on a real guest's memory, checked against that guest's own kernel.

use crate::common::*;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const PAGE: usize = 4096;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The class of every frame, by `inspect --pfns`.
fn classes(dump: &Path) -> Vec<String> {
    let out = dump.with_extension("tsv");
    let run = sonicshot(&["inspect", text(dump), "--pfns", text(&out), "--force"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let mut classes = Vec::new();
    for (first, last, class) in read_pfns(&out) {
        assert_eq!(first, classes.len() as u64, "every frame once, in order");
        for _ in first..=last {
            classes.push(class.clone());
        }
    }
    classes
}

#[test]
fn every_class_is_what_the_guests_kernel_says() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let classes = classes(&dump);
    let flags = kpageflags();
    let mut counts: HashMap<&str, (u64, u64)> = HashMap::new();
    for (pfn, class) in classes.iter().enumerate() {
        // Frames behind the last that the kernel knows have no flags.
        let Some(flags) = flags.get(pfn) else {
            continue;
        };
        let has = |bits: u64| flags & bits != 0;
        let agrees = match class.as_str() {
            "free_buddy" => has(KPF_BUDDY),
            "free_pcp" | "offline" => !has(KPF_IN_USE),
            "slab" => has(KPF_SLAB),
            "anonymous" => has(KPF_ANON),
            "page_table" => has(KPF_PGTABLE),
            "page_cache_clean" => has(KPF_LRU) && !has(KPF_ANON | KPF_DIRTY),
            "shmem" | "page_cache_dirty" => !has(KPF_ANON | KPF_SLAB | KPF_BUDDY),
            "zero" => ram()[pfn * PAGE..(pfn + 1) * PAGE]
                .iter()
                .all(|byte| *byte == 0),
            "kernel" | "unknown" | "reserved" => !has(KPF_LRU | KPF_ANON | KPF_SLAB | KPF_BUDDY),
            other => panic!("{other}"),
        };
        let entry = counts.entry(class).or_default();
        entry.0 += 1;
        entry.1 += u64::from(!agrees);
    }
    // The guest was stopped milliseconds after it wrote its flags: what is dropped must agree
    // to the frame, labels of kept pages may have changed in a handful.
    for (class, (pages, wrong)) in &counts {
        let allowed = match *class {
            "free_buddy" | "free_pcp" | "offline" | "zero" => 0,
            _ => 16,
        };
        assert!(*wrong <= allowed, "{wrong} of {pages} {class}");
    }
    let buddy = flags.iter().filter(|flags| *flags & KPF_BUDDY != 0).count() as u64;
    assert!(
        counts["free_buddy"].0 * 1000 >= buddy * 999,
        "{counts:?} of {buddy}"
    );
    assert!(counts["free_pcp"].0 > 0 && counts["anonymous"].0 > 1000);
}

#[test]
fn json_has_what_scripts_need() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let run = sonicshot(&["inspect", text(&dump), "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    let version = fs::read_to_string(testdata().join("version")).unwrap();
    let release = report["kernel_release"].as_str().unwrap();
    assert!(version.contains(&format!("Linux version {release} ")));
    assert_eq!(report["page_size"], 4096);
    assert_eq!(report["total_pages"], 32768);
    let classes = report["classes"].as_object().unwrap();
    let total: u64 = classes.values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(total, 32768);
    let default = ["free_buddy", "free_pcp", "offline"];
    let zero = report["classes_zero"].as_object().unwrap();
    let zero: u64 = zero.values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(report["zero_in_use_pages"], zero);
    let droppable = default
        .iter()
        .map(|name| classes[*name].as_u64().unwrap())
        .sum::<u64>()
        + zero;
    assert_eq!(report["droppable_pages"], droppable);
    assert!(report["zero_pages"].as_u64().unwrap() < droppable);
    // The zones' counters against the guest's own file.
    let zoneinfo = fs::read_to_string(testdata().join("zoneinfo")).unwrap();
    for zone in report["zones"].as_array().unwrap() {
        let name = format!("zone {:>8}", zone["name"].as_str().unwrap());
        let section = zoneinfo
            .split("Node ")
            .find(|part| part.contains(&name))
            .unwrap();
        let start = section
            .lines()
            .find_map(|line| line.trim().strip_prefix("start_pfn:"));
        assert_eq!(
            start.unwrap().trim().parse().ok(),
            zone["first_pfn"].as_u64()
        );
        assert_eq!(zone["free_listed"], zone["free_flagged"]);
        assert_eq!(zone["free_listed"], zone["nr_free"]);
    }
}

#[test]
fn pruning_by_copy_and_in_place_give_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let classes = classes(&dump);
    // Every hole, as in a copy.
    let in_place = [
        "prune",
        text(&dump),
        "--in-place",
        "--min-hole",
        "0",
        "--json",
    ];
    let copy = folder.path().join("copy.raw");
    let run = sonicshot(&["prune", text(&dump), "-o", text(&copy)]);
    assert!(run.status.success(), "{}", stderr(&run));
    let before = fs::metadata(&dump).unwrap().blocks();
    let run = sonicshot(&in_place);
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(report["punched"].as_u64().unwrap() > 0, "{report}");
    let pruned = fs::read(&dump).unwrap();
    assert!(
        pruned == fs::read(&copy).unwrap(),
        "copy and in place differ"
    );
    for ((after, before), class) in pruned.chunks(PAGE).zip(ram().chunks(PAGE)).zip(&classes) {
        match class.as_str() {
            "free_buddy" | "free_pcp" | "offline" | "zero" => {
                assert!(after.iter().all(|byte| *byte == 0));
            }
            _ => assert!(after == before, "a kept page changed"),
        }
    }
    assert!(fs::metadata(&dump).unwrap().blocks() < before);
    // The result is a dump of the same guest, and pruning it again does nothing.
    assert_eq!(self::classes(&dump), classes);
    let again = sonicshot(&in_place);
    let report: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(report["punched"], 0, "{report}");
    assert_eq!(report["disk_before"], report["disk_after"]);
}

#[test]
fn nothing_is_written_over_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let dump = raw_dump(folder.path(), |_| {});
    let out = folder.path().join("out");
    fs::write(&out, b"precious").unwrap();
    let run = sonicshot(&["prune", text(&dump), "-o", text(&out)]);
    assert_eq!(run.status.code(), Some(1));
    assert!(stderr(&run).contains("--force"), "{}", stderr(&run));
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    let run = sonicshot(&["prune", text(&dump), "-o", text(&dump), "--force"]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    assert!(stderr(&run).contains("--in-place"));
    let run = sonicshot(&["prune", text(&dump), "-o", text(&out), "--force"]);
    assert!(run.status.success());
    assert_eq!(fs::metadata(&out).unwrap().len(), ram().len() as u64);
    let run = sonicshot(&["prune", text(&dump), "--dry-run"]);
    assert!(run.status.success());
    assert!(
        fs::read(&dump).unwrap() == ram(),
        "a dry run changed the file"
    );
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "temporary files are left: {left:?}");
}

#[test]
fn every_failure_has_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let dump = raw_dump(folder.path(), |_| {});
    let (odd, empty, zero) = (
        file("odd", b"x"),
        file("empty", b""),
        file("zero", &[0; 1 << 20]),
    );
    let elf = file("elf", b"\x7fELF\x02\x01\x01");
    let map = file(
        "System.map",
        b"ffffffff81000000 T _stext\nffffffff81000010 D swapper_pg_dir\n",
    );
    let placeholder = file(
        "stub.map",
        b"ffffffffffffffff B The real System.map is in the -dbg package\n",
    );
    let absent = folder.path().join("absent");
    let cases: [(&[&str], i32, &str); 9] = [
        (&["inspect", text(&absent)], 1, "No such file"),
        (&["inspect"], 2, "Usage"),
        (
            &["prune", text(&dump), "--dry-run", "--drop", "slab"],
            2,
            "never dropped",
        ),
        (
            &["prune", text(&dump), "--dry-run", "--drop", "nonsense"],
            2,
            "unknown page class",
        ),
        (&["inspect", text(&odd)], 3, "not a memory dump"),
        (&["inspect", text(&empty)], 3, "empty"),
        (&["inspect", text(&elf)], 3, "ELF"),
        (&["inspect", text(&zero)], 4, "no Linux kernel"),
        (
            &["inspect", text(&dump), "--symbols", text(&map)],
            4,
            "another kernel",
        ),
    ];
    for (args, code, word) in cases {
        let run = sonicshot(args);
        assert_eq!(run.status.code(), Some(code), "{args:?}: {}", stderr(&run));
        assert!(stderr(&run).contains(word), "{args:?}: {}", stderr(&run));
    }
    let run = sonicshot(&["inspect", text(&dump), "--symbols", text(&placeholder)]);
    assert!(stderr(&run).contains("-dbg package"), "{}", stderr(&run));
    let run = sonicshot(&["inspect", text(&zero), "--json"]);
    let error: serde_json::Value = serde_json::from_slice(&run.stderr).unwrap();
    assert_eq!(error["exit_code"], 4);
    assert!(
        error["causes"][0]
            .as_str()
            .unwrap()
            .contains("no Linux kernel")
    );
}

#[test]
fn the_demo_runs() {
    let run = sonicshot(&["demo", "--dump", text(&testdata())]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(stdout(&run).contains("the pruned dump tells the same of every page: yes"));
}
