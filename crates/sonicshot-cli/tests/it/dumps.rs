//! Dumps in every format that is written here, pruned and read again, and dumps that lack pages.

use crate::common::*;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const PAGE: u64 = 4096;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The JSON that a command prints.
fn json(args: &[&str]) -> Value {
    let run = sonicshot(&[args, &["--json"]].concat());
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// The guest in a kdump that was pruned of free pages, and that of which it was made.
fn filtered(folder: &Path) -> (PathBuf, PathBuf) {
    let raw = raw_dump(folder, |_| {});
    let (whole, less) = (folder.join("whole.kdump"), folder.join("less.kdump"));
    json(&["convert", text(&raw), "-o", text(&whole), "--to", "kdump"]);
    json(&["prune", text(&whole), "-o", text(&less)]);
    (whole, less)
}

#[test]
fn what_is_pruned_is_read_and_pruned_again_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let stream = at("stream");
    fs::write(&stream, crate::common::stream()).unwrap();
    let mut dumps = vec![raw.clone(), mapped_ram_dump(folder.path()), stream];
    let convert = |name: &str, how: &[&str]| {
        let to = at(name);
        json(&[&["convert", text(&raw), "-o", text(&to)], how].concat());
        to
    };
    dumps.push(convert("elf", &["--to", "elf"]));
    for codec in ["none", "zlib", "snappy", "zstd"] {
        dumps.push(convert(codec, &["--to", "kdump", "--compress", codec]));
    }
    let truth = json(&["inspect", text(&raw)]);
    let fills = ["free_buddy", "free_pcp", "offline"];
    for dump in dumps {
        let name = dump.file_name().unwrap().to_str().unwrap().to_owned();
        let is_kdump = ["none", "zlib", "snappy", "zstd"].contains(&name.as_str());
        let (once, twice) = (at("once"), at("twice"));
        let expected = json(&["prune", text(&dump), "--dry-run"]);
        assert!(number(&expected["stored_bytes"]) > 0, "{name}");
        let pruned = json(&["prune", text(&dump), "-o", text(&once), "--force"]);
        assert_eq!(pruned["dropped"], expected["dropped"], "{name}");
        if is_kdump {
            let (told, is) = (&expected["disk_after"], &pruned["disk_after"]);
            assert!(
                number(told).abs_diff(number(is)) < 128 << 10,
                "{name}: {told} {is}"
            );
        }
        let len = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(len(&once) <= len(&dump), "{name}");
        // It opens, and every page that is in use is what it was.
        let seen = json(&["inspect", text(&once)]);
        let (mut free, mut absent) = (0, 0);
        for (class, pages) in truth["classes"].as_object().unwrap() {
            let now = number(&seen["classes"][class]);
            match class.as_str() {
                "absent" => absent = now,
                class if fills.contains(&class) => {
                    free += number(pages);
                    let kept = if is_kdump { 0 } else { number(pages) };
                    assert_eq!(now, kept, "{name}: {class}");
                }
                class => assert_eq!(now, number(pages), "{name}: {class}"),
            }
        }
        // Of the default classes only what is free is not in a kdump: zeroes are.
        assert_eq!(absent, if is_kdump { free } else { 0 }, "{name}");
        assert_eq!(seen["missing_in_use_pages"], 0, "{name}");
        assert_eq!(
            seen["zero_in_use_pages"], truth["zero_in_use_pages"],
            "{name}"
        );
        // Once more there is nothing to do, and the file is the same size.
        let again = json(&["prune", text(&once), "--dry-run"]);
        assert_eq!(again["stored_bytes"], 0, "{name}");
        json(&["prune", text(&once), "-o", text(&twice), "--force"]);
        assert_eq!(len(&once), len(&twice), "{name}");
        assert_eq!(
            json(&["inspect", text(&twice)])["classes"],
            seen["classes"],
            "{name}"
        );
    }
}

#[test]
fn what_a_dump_lacks_is_said_by_all_who_fill_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (whole, less) = filtered(folder.path());
    let seen = json(&["inspect", text(&less)]);
    let missing = number(&seen["classes"]["absent"]) * PAGE;
    assert!(missing > 8 << 20, "{seen}");
    let check = |said: &Value, words: &str| {
        assert_eq!(said["missing_bytes"], missing);
        assert_eq!(
            said["missing_mib"].as_f64().unwrap() * 1_048_576.0,
            missing as f64
        );
        assert!(said["notes"].to_string().contains(words), "{said}");
    };
    check(&seen, "not in the source");
    for to in ["raw", "elf", "sonic"] {
        let out = at(to);
        let said = json(&["convert", text(&less), "-o", text(&out), "--to", to]);
        check(&said, "zeroes in the output");
        let said = json(&[
            "convert",
            text(&whole),
            "-o",
            text(&out),
            "--to",
            to,
            "--force",
        ]);
        assert_eq!(said["missing_bytes"], 0);
    }
    let out = at("again");
    check(
        &json(&["convert", text(&less), "-o", text(&out), "--to", "kdump"]),
        "nor in the output",
    );
    let sonic = at("saved.sonic");
    let saved = json(&["save", text(&less), "-o", text(&sonic)]);
    check(&saved, "zeroes in the output");
    // Nothing of it is used by the guest.
    assert_eq!(saved["for_analysis"], false);
    let restored = json(&["restore", text(&sonic), "-o", text(&at("back"))]);
    assert_eq!(restored["missing_bytes"], missing);
    // In use as the kernel says, and gone all the same.
    let cache = at("cache.kdump");
    let drop = ["--drop", "page_cache_clean", "--for-analysis"];
    json(&[&["prune", text(&whole), "-o", text(&cache)], &drop[..]].concat());
    let seen = json(&["inspect", text(&cache)]);
    assert_eq!(seen["missing_in_use_pages"], seen["classes"]["absent"]);
    assert!(seen["notes"].to_string().contains("cannot run"));
    let saved = json(&["save", text(&cache), "-o", text(&sonic), "--force"]);
    assert_eq!(saved["for_analysis"], true);
    // No machine can run from it, so none is waited for.
    let socket = at("socket");
    let run = sonicshot(&["serve", text(&sonic), "--socket", text(&socket)]);
    assert!(!run.status.success() && !socket.exists());
    assert!(stderr(&run).contains("for analysis"), "{}", stderr(&run));
}

#[test]
fn a_dump_that_is_cut_off_says_where_and_is_read_as_far_as_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, _) = filtered(folder.path());
    let bytes = fs::read(&whole).unwrap();
    let cut = folder.path().join("cut.kdump");
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let run = sonicshot(&["inspect", text(&cut)]);
    let said = stderr(&run);
    assert!(!run.status.success() || said.contains("cut off"), "{said}");
    let end = format!("it ends at {} bytes", bytes.len() / 2);
    assert!(said.contains(&end) && said.contains("missing"), "{said}");
    let raw = folder.path().join("raw");
    let report = json(&["convert", text(&cut), "-o", text(&raw), "--to", "raw"]);
    let missing = number(&report["missing_bytes"]);
    assert!(missing > 1 << 20 && missing < 128 << 20, "{report}");
    assert!(report["notes"].to_string().contains(&end), "{report}");
    // What is there is what it was.
    let (got, want) = (fs::read(&raw).unwrap(), ram());
    let pages = got.chunks(4096).zip(want.chunks(4096));
    let differ = pages.filter(|(got, want)| got != want).count() as u64;
    assert!(differ > 0 && differ * PAGE <= missing, "{differ}");
    // Flagged by who wrote it: its descriptors are there, some pages are not.
    let mut flagged = bytes.clone();
    flagged[424] |= 8;
    fs::write(&cut, &flagged[..bytes.len() - 4096]).unwrap();
    let seen = sonicshot(&["inspect", text(&cut), "--json"]);
    let said = stdout(&seen) + &stderr(&seen);
    assert!(said.contains("not written to the end"), "{said}");
}

/// The guest in an ELF core that `makedumpfile -E -d 31` would write: of 256 pages and more in a
/// row that are free, zero or a process's there is memory, but no bytes.
fn filtered_core(folder: &Path) -> PathBuf {
    let flags = kpageflags();
    let is_left_out = |(number, page): (usize, &[u8])| {
        let bits = KPF_BUDDY | KPF_ANON | KPF_LRU;
        let unused = flags.get(number).is_some_and(|flags| flags & bits != 0);
        unused || page.iter().all(|byte| *byte == 0)
    };
    let pages = ram().chunks(4096).enumerate();
    let left_out: Vec<bool> = pages.map(is_left_out).collect();
    // Each range of pages with bytes, and those without that follow.
    let mut segments: Vec<(usize, usize, usize)> = vec![(0, 0, 0)];
    let mut at = 0;
    for run in left_out.chunk_by(|a, b| a == b) {
        let last = segments.last_mut().unwrap();
        match run[0] && run.len() >= 256 {
            true => last.2 += run.len(),
            false if last.2 > 0 => segments.push((at, run.len(), 0)),
            false => last.1 += run.len(),
        }
        at += run.len();
    }
    let count = u16::try_from(segments.len()).unwrap();
    let mut head = b"\x7fELF\x02\x01\x01".to_vec();
    head.resize(16, 0);
    for word in [4_u16, 62, 1, 0] {
        head.extend(word.to_le_bytes());
    }
    for word in [0_u64, 64, 0] {
        head.extend(word.to_le_bytes());
    }
    head.extend([0; 4]);
    for word in [64, 56, count, 0, 0, 0] {
        head.extend(word.to_le_bytes());
    }
    let mut data = Vec::new();
    let data_at = head.len() + segments.len() * 56;
    for (first, filled, empty) in segments {
        let (start, len) = (first * 4096, filled * 4096);
        head.extend((1_u64 | 7 << 32).to_le_bytes());
        for word in [
            data_at + data.len(),
            start,
            start,
            len,
            len + empty * 4096,
            0,
        ] {
            head.extend((word as u64).to_le_bytes());
        }
        data.extend(&ram()[start..start + len]);
    }
    let path = folder.join("filtered.elf");
    fs::write(&path, [head, data].concat()).unwrap();
    path
}

/// Pages that makedumpfile leaves out of a core are not the guest's own zeroes.
#[test]
fn what_was_filtered_out_of_a_core_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let core = filtered_core(folder.path());
    let seen = json(&["inspect", text(&core)]);
    let missing = number(&seen["missing_bytes"]);
    assert!(missing > 16 << 20 && missing < 120 << 20, "{seen}");
    assert_eq!(number(&seen["classes"]["absent"]) * PAGE, missing);
    assert!(number(&seen["missing_in_use_pages"]) > 256, "{seen}");
    let notes = seen["notes"].to_string();
    assert!(notes.contains("unless all of them were zeroes"), "{notes}");
    let (out, sonic) = (at("out"), at("x.sonic"));
    for to in ["raw", "elf", "kdump", "sonic"] {
        let args = [
            "convert",
            text(&core),
            "-o",
            text(&out),
            "--force",
            "--to",
            to,
        ];
        let said = json(&args);
        assert_eq!(said["missing_bytes"], missing, "{to}");
        assert!(
            said["notes"].to_string().contains("not in the source"),
            "{said}"
        );
    }
    let saved = json(&["save", text(&core), "-o", text(&sonic)]);
    assert_eq!(
        (&saved["missing_bytes"], &saved["for_analysis"]),
        (&missing.into(), &true.into())
    );
    // A prune adds nothing to it, and what it left out itself was free or zero.
    let pruned = json(&["prune", text(&core), "-o", text(&out), "--force"]);
    assert_eq!(pruned["missing_bytes"], missing);
    let again = json(&["inspect", text(&out)]);
    assert_eq!(again["classes"], seen["classes"]);
    assert_eq!(again["missing_bytes"], missing);
    // What the guest uses and is given up is gone for all who read it next, too.
    let raw = raw_dump(folder.path(), |_| {});
    json(&[
        "convert",
        text(&raw),
        "-o",
        text(&core),
        "--to",
        "elf",
        "--force",
    ]);
    let given_up = ["--drop", "anonymous,free_buddy,zero", "--for-analysis"];
    let prune = ["prune", text(&core), "-o", text(&out), "--force"];
    let pruned = json(&[&prune[..], &given_up].concat());
    let seen = json(&["inspect", text(&out)]);
    let given_up = number(&pruned["dropped"]["anonymous"]);
    let absent = number(&seen["missing_in_use_pages"]);
    // Some of those hold only zeroes.
    assert!(
        absent > 1000 && (absent..absent + 100).contains(&given_up),
        "{pruned}"
    );
    assert_eq!(number(&seen["classes"]["absent"]), absent);
}

/// An ELF core and a LiME file say where they are cut off, and are read as far as they go.
#[test]
fn cores_that_are_cut_off_are_read_as_far_as_they_go() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let (core, lime, out) = (at("core"), at("lime"), at("out"));
    json(&["convert", text(&raw), "-o", text(&core), "--to", "elf"]);
    let mut records = b"EMiL\x01\0\0\0".to_vec();
    records.extend(0_u64.to_le_bytes());
    records.extend((ram().len() as u64 - 1).to_le_bytes());
    records.extend([0; 8]);
    records.extend(ram());
    fs::write(&lime, records).unwrap();
    for path in [&core, &lime] {
        let whole = fs::read(path).unwrap();
        for lost in [5000_u64, 64 << 20] {
            let len = whole.len() as u64 - lost;
            fs::write(path, &whole[..usize::try_from(len).unwrap()]).unwrap();
            let ends = format!("the file is cut off: it ends at {len} bytes");
            let run = sonicshot(&["inspect", text(path)]);
            let said = stdout(&run) + &stderr(&run);
            assert!(
                said.contains(&ends) && !said.contains("--format raw"),
                "{said}"
            );
            let args = [
                "convert",
                text(path),
                "-o",
                text(&out),
                "--force",
                "--to",
                "raw",
            ];
            let said = json(&args);
            assert_eq!(said["missing_bytes"], lost.next_multiple_of(PAGE), "{said}");
            assert!(said["notes"].to_string().contains(&ends), "{said}");
            let there = usize::try_from(ram().len() as u64 - lost.next_multiple_of(PAGE)).unwrap();
            assert!(fs::read(&out).unwrap()[..there] == ram()[..there]);
            let keep = [
                "save",
                text(path),
                "-o",
                text(&out),
                "--force",
                "--keep-all",
            ];
            let said = json(&keep);
            assert_eq!(said["missing_bytes"], lost.next_multiple_of(PAGE));
            assert!(said["notes"].to_string().contains(&ends), "{said}");
            // Where its kernel is still there, it is.
            assert_eq!(run.status.success(), lost == 5000, "{}", stderr(&run));
            if lost == 5000 && path == &core {
                let pruned = json(&["prune", text(path), "-o", text(&out), "--force"]);
                assert_eq!(pruned["missing_bytes"], 2 * PAGE);
                assert!(pruned["notes"].to_string().contains(&ends), "{pruned}");
                assert_eq!(json(&["inspect", text(&out)])["missing_bytes"], 2 * PAGE);
                let in_place = sonicshot(&["prune", text(path), "--in-place"]);
                assert_eq!(in_place.status.code(), Some(2));
            }
        }
    }
}

#[test]
fn what_the_guest_uses_is_dropped_only_when_that_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let before = fs::read(&raw).unwrap();
    let (out, sonic) = (at("out"), at("x.sonic"));
    let code = |command: &str, more: &[&str]| {
        let args = [&[command, text(&raw), "--drop", "anonymous"], more].concat();
        sonicshot(&args).status.code()
    };
    for (command, more) in [
        ("prune", &["--in-place"][..]),
        ("prune", &["--in-place", "--for-analysis"]),
        ("prune", &["--dry-run"]),
        ("prune", &["-o", text(&out)]),
        ("save", &["-o", text(&sonic)]),
    ] {
        assert_eq!(code(command, more), Some(2), "{command} {more:?}");
    }
    assert!(!sonic.exists() && !out.exists() && fs::read(&raw).unwrap() == before);
    let drop = ["--drop", "anonymous", "--drop", "free_pcp,zero"];
    let prune = ["prune", text(&raw), "-o", text(&out), "--for-analysis"];
    let report = json(&[&prune[..], &drop].concat());
    assert_eq!(report["for_analysis"], true);
    assert!(number(&report["dropped"]["anonymous"]) > 1000);
    assert!(number(&report["dropped"]["free_pcp"]) > 0);
    assert_eq!(report["dropped"].get("free_buddy"), None);
    let yes = code("prune", &["--in-place", "--for-analysis", "--yes"]);
    assert_eq!(yes, Some(0));
    assert!(fs::read(&raw).unwrap() != before);
}

#[test]
fn a_checkpoint_that_no_guest_can_run_from_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let raw = raw_dump(folder.path(), |_| {});
    let (out, sonic) = (at("out"), at("x.sonic"));
    let save = ["save", text(&raw), "-o", text(&sonic)];
    let drop = ["--drop", "anonymous", "--for-analysis"];
    let saved = json(&[&save[..], &drop].concat());
    assert_eq!(saved["for_analysis"], true);
    for args in [
        &["inspect", text(&sonic)][..],
        &["verify", text(&sonic)],
        &["restore", text(&sonic), "-o", text(&out), "--force"],
    ] {
        assert_eq!(json(args)["for_analysis"], true, "{args:?}");
        let run = sonicshot(args);
        let said = stdout(&run) + &stderr(&run);
        assert!(run.status.success(), "{args:?}: {said}");
        assert!(said.contains("for analysis"), "{args:?}: {said}");
    }
}

/// Missing pages do not become a guest's own zeroes on the way through a checkpoint.
#[test]
fn what_a_checkpoint_lacks_is_said_of_all_that_is_made_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (whole, less) = filtered(folder.path());
    let (sonic, out) = (at("x.sonic"), at("out"));
    let analysis = ["--drop", "page_cache_clean", "--for-analysis"];
    for (dump, how, for_analysis) in [
        (&less, &[][..], false),
        (&whole, &analysis, true),
        (&less, &["--keep-all"], true),
    ] {
        let save = ["save", text(dump), "-o", text(&sonic), "--force"];
        let saved = json(&[&save[..], how].concat());
        let check = |said: &Value, args: &[&str]| {
            for key in ["for_analysis", "missing_bytes", "missing_mib"] {
                assert_eq!(said[key], saved[key], "{how:?} {args:?}: {key}");
            }
            let notes = said["notes"].to_string();
            let told = (notes.contains("for analysis"), notes.contains("of RAM "));
            let missing = number(&saved["missing_bytes"]) > 0;
            assert_eq!(told, (for_analysis, missing), "{args:?}: {notes}");
        };
        assert_eq!(saved["for_analysis"], for_analysis);
        check(&saved, &save);
        let both = |args: &[&str]| {
            let said = json(args);
            check(&said, args);
            // People are told the same.
            let run = sonicshot(args);
            let text = stdout(&run) + &stderr(&run);
            for note in said["notes"].as_array().unwrap() {
                assert!(text.contains(note.as_str().unwrap()), "{args:?}: {text}");
            }
            said
        };
        both(&["inspect", text(&sonic)]);
        both(&["verify", text(&sonic)]);
        let to = |command: &'static str, format: &'static str| {
            let args = [command, text(&sonic), "-o", text(&out), "--force", "--to"];
            [&args[..], &[format]].concat()
        };
        let raw = both(&to("convert", "raw"));
        assert_eq!(raw["layout"], "0x0-0x8000000");
        let raw = both(&to("restore", "raw"));
        assert_eq!(raw["layout"], "0x0-0x8000000");
        for format in ["kdump", "sonic"] {
            let args = to("convert", format);
            let said = json(&args);
            check(&said, &args);
            assert!(said["layout"].is_null());
            let seen = json(&["inspect", text(&out)]);
            assert_eq!(seen["missing_bytes"], saved["missing_bytes"], "{format}");
        }
        check(&json(&["inspect", text(&out)]), &["inspect"]);
    }
    // Nobody has looked at what is missing.
    let said = json(&[
        "convert",
        text(&less),
        "-o",
        text(&out),
        "--to",
        "sonic",
        "--force",
    ]);
    assert_eq!(said["for_analysis"], true);
    assert!(
        said["notes"].to_string().contains("may be missing"),
        "{said}"
    );
}

/// A page of a slab is one whatever it holds: the classes are the kernel's, to the page.
#[test]
fn zeroes_do_not_change_the_class() {
    let folder = tempfile::tempdir().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let seen = json(&["inspect", text(&raw)]);
    let flags = kpageflags();
    for (class, bit) in [
        ("slab", KPF_SLAB),
        ("page_table", KPF_PGTABLE),
        ("anonymous", KPF_ANON),
    ] {
        let kernel = flags.iter().filter(|flags| *flags & bit != 0).count() as u64;
        let ours = number(&seen["classes"][class]);
        // Some were given back or taken between the record and the stop.
        assert!(
            ours.abs_diff(kernel) <= 16,
            "{class}: {ours}, {kernel} by the kernel"
        );
    }
    assert!(number(&seen["classes_zero"]["slab"]) + number(&seen["classes_zero"]["anonymous"]) > 0);
    assert_eq!(seen["classes"].get("zero"), None);
}
