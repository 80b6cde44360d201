//! The output of `--json` for real work is as docs/json.schema.json has it.

use crate::common::*;
use crate::face::phases_told;
use crate::fake_qemu::{self, Answer, Fake};
use serde_json::{Value, json};
use sonicshot::{Gpa, GuestBytes, MappedRegions};
use sonicshot_vmi::{GuestOptions, KernelVa, LinuxGuest, VirtualMemory};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// The one line of a run, on the stream where it belongs.
fn one(run: &Output) -> Value {
    let stream = match run.status.success() {
        true => &run.stdout,
        false => &run.stderr,
    };
    let mut lines = json_lines(stream);
    assert_eq!(lines.len(), 1, "{}", stderr(run));
    lines.remove(0)
}

#[test]
fn what_every_command_prints_is_of_the_schema() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let raw = raw_dump(folder.path(), |_| {});
    let raw = raw.to_str().unwrap();
    fs::write(at("blob"), b"a blob").unwrap();
    let blob = format!("other={}", at("blob"));
    let sonic = at("a.sonic");
    let (pruned, elf, other) = (at("pruned"), at("elf"), at("b.sonic"));
    let (back, none, bad) = (at("back"), at("none"), at("blob"));
    let explain = ["inspect", raw, "--explain", "0x1000", "--free-lists"];
    let attach = ["attach", &sonic, "-o", &other, "--blob", &blob];
    let table: [(&str, &str, &[&str]); 14] = [
        ("inspect", raw, &["inspect", raw]),
        ("inspect", raw, &explain),
        ("prune", raw, &["prune", raw, "--dry-run"]),
        ("prune", raw, &["prune", raw, "-o", &pruned]),
        ("convert", raw, &["convert", raw, "--to", "elf", "-o", &elf]),
        ("save", raw, &["save", raw, "-o", &sonic]),
        ("checkpoint", &sonic, &["inspect", &sonic]),
        ("verify", &sonic, &["verify", &sonic]),
        ("verify", &sonic, &["verify", &sonic, "--against", raw]),
        ("attach", &sonic, &attach),
        (
            "restore",
            &sonic,
            &["restore", &sonic, "-o", &back, "--to", "raw"],
        ),
        // Errors of a file, of what is none, and of where it goes.
        ("error", &none, &["inspect", &none]),
        ("error", &bad, &["verify", &bad]),
        ("error", raw, &["restore", raw, "-o", "-", "--to", "raw"]),
    ];
    for (kind, path, args) in table {
        let run = sonicshot(&[args, &["--json"]].concat());
        let value = one(&run);
        assert_eq!(value["kind"], kind, "{args:?}: {value}");
        assert_eq!(value["path"], path, "{args:?}: {value}");
        // The schema says something: of no value may a key be missing that is not of an option, and
        // none is of another kind.
        let mut bad = value.clone();
        bad["kind"] = json!("another");
        assert!(!schema().is_valid(&bad));
        for key in ["version", "path"] {
            let mut bad = value.clone();
            bad.as_object_mut().unwrap().remove(key);
            assert!(!schema().is_valid(&bad), "{kind} without {key}");
        }
    }
    let run = sonicshot(&["inspect", "--no-such-option", "--json"]);
    let value = one(&run);
    assert_eq!(
        (&value["kind"], &value["path"]),
        (&json!("error"), &Value::Null)
    );
    // How far it is.
    let run = sonicshot(&[
        "save",
        raw,
        "-o",
        &sonic,
        "--force",
        "--progress",
        "json",
        "-q",
    ]);
    let told = json_lines(&run.stderr);
    assert!(
        told.iter().any(|line| line["kind"] == "progress"),
        "{}",
        stderr(&run)
    );
}

#[test]
fn free_lists_are_what_the_guest_said_and_its_counters_agree() {
    let folder = TempDir::new().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let args = ["inspect", raw.to_str().unwrap(), "--free-lists=2", "--json"];
    let seen: Value = serde_json::from_slice(&sonicshot(&args).stdout).unwrap();
    let zones = seen["free_lists"].as_array().unwrap();
    // `/proc/buddyinfo`, a moment before the guest was stopped.
    let told = fs::read_to_string(testdata().join("buddyinfo")).unwrap();
    let mut blocks = 0_i64;
    for zone in zones {
        assert_eq!(zone["disagreements"], json!([]));
        let name = zone["name"].as_str().unwrap();
        let words = told
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let words = words
            .into_iter()
            .find(|words| words.get(3) == Some(&name))
            .unwrap();
        for (order, told) in words[4..].iter().enumerate() {
            let told: i64 = told.parse().unwrap();
            let listed = zone["listed"][order].as_i64().unwrap();
            blocks += listed;
            assert!(
                (told - listed).abs() <= 8,
                "{name} {order}: {told}, {listed}"
            );
        }
        for list in zone["lists"].as_array().unwrap() {
            let named = list["first_pfns"].as_array().unwrap().len() as u64;
            assert_eq!(named, list["blocks"].as_u64().unwrap().min(2), "{list}");
            assert!(list["migrate_type"].is_string() != list["cpu"].is_number());
        }
    }
    assert_eq!(blocks, 26);
    let pages: u64 = zones
        .iter()
        .map(|zone| zone["listed_pages"].as_u64().unwrap())
        .sum();
    assert_eq!(pages, seen["classes"]["free_buddy"].as_u64().unwrap());
    let text = sonicshot(&["inspect", raw.to_str().unwrap(), "--free-lists"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("movable") && text.contains("agree"), "{text}");
    assert!(!text.contains("disagrees"), "{text}");
}

/// The addresses of the counter `nr_free` of the blocks of `order` of the zone with this number, and
/// the zone's `NR_FREE_PAGES`.
fn counters_of_zone(number: u64, order: u64) -> [usize; 2] {
    let ram = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram()))]).unwrap();
    let guest = LinuxGuest::open(&ram, &GuestOptions::new()).unwrap();
    let offset = |of: &str, member: &str| guest.member(of, member).unwrap().unwrap().offset;
    let size = |of: &str| guest.type_size(of).unwrap().unwrap();
    let node = guest.symbol("node_data").unwrap().unwrap();
    let node = KernelVa::new(guest.read_u64(node).unwrap());
    let zone = offset("pglist_data", "node_zones") + number * size("zone");
    let area = offset("zone", "free_area") + order * size("free_area");
    let free_pages = guest.constant("NR_FREE_PAGES").unwrap().unwrap();
    let free_pages = offset("zone", "vm_stat") + 8 * u64::try_from(free_pages).unwrap();
    [area + offset("free_area", "nr_free"), free_pages].map(|counter| {
        let at = node.checked_add(zone + counter).unwrap();
        usize::try_from(guest.translate(at).unwrap().raw()).unwrap()
    })
}

#[test]
fn a_counter_that_is_not_what_its_lists_have_is_shown_beside_them() {
    let folder = TempDir::new().unwrap();
    let [nr_free, free_pages] = counters_of_zone(1, 3);
    let (mut blocks, mut pages) = (0, 0);
    let raw = raw_dump(folder.path(), |ram| {
        let mut more = |at: usize, by: u64| {
            let bytes = &mut ram[at..at + 8];
            let before = u64::from_le_bytes((&*bytes).try_into().unwrap());
            bytes.copy_from_slice(&(before + by).to_le_bytes());
            before
        };
        (blocks, pages) = (more(nr_free, 1), more(free_pages, 5));
    });
    let raw = raw.to_str().unwrap();
    let run = sonicshot(&["inspect", raw, "--free-lists", "--json"]);
    let seen = one(&run);
    let zones = seen["free_lists"].as_array().unwrap();
    let (changed, others): (Vec<_>, Vec<_>) =
        zones.iter().partition(|zone| zone["name"] == "DMA32");
    let zone = changed[0];
    let told = [
        format!("order 3: {blocks} blocks listed, nr_free is {}", blocks + 1),
        format!("{pages} pages listed, NR_FREE_PAGES is {}", pages + 5),
    ];
    assert_eq!(zone["disagreements"], json!(told));
    assert_eq!(zone["listed"][3], blocks);
    assert_eq!(zone["nr_free"][3], blocks + 1);
    assert_eq!(zone["listed_pages"], pages);
    assert_eq!(zone["nr_free_pages"], pages + 5);
    assert!(!others.is_empty());
    for zone in others {
        assert_eq!(zone["disagreements"], json!([]));
    }
    let text = sonicshot(&["inspect", raw, "--free-lists"]);
    let text = String::from_utf8(text.stdout).unwrap();
    for line in told {
        assert!(text.contains(&format!("  disagrees: {line}\n")), "{text}");
    }
}

/// The docs name each kind of line that there is.
#[test]
fn each_kind_of_line_is_in_the_docs() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let schema = fs::read_to_string(docs.join("json.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let text = fs::read_to_string(docs.join("json.md")).unwrap();
    let mut kinds = Vec::new();
    for (name, of) in schema["$defs"].as_object().unwrap() {
        if name.starts_with("Of") {
            let kind = of["oneOf"][0]["const"].as_str();
            kinds.push(kind.unwrap().to_owned());
        }
    }
    assert!(kinds.len() > 14, "{kinds:?}");
    for kind in kinds {
        assert!(
            text.contains(&format!("`{kind}`")),
            "docs/json.md lacks {kind}"
        );
    }
}

/// A QEMU that takes a guest, and is not one: a program, and the answers of its monitor.
fn standin_qemu(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standin/qemu.rs");
    let built = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .args(["--edition", "2024", "-o", "qemu"])
        .arg(source)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", stderr(&built));
    let last = ram().len() - 1;
    let mtree = format!(
        "FlatView #0\n AS \"memory\", root: system\n  0-9ffff (prio 0, ram): pc.ram\n  e0000-fffff \
         (prio 1, rom): pc.bios\n  100000-{last:x} (prio 0, ram): pc.ram @100000\n"
    );
    let answers = [
        ("qom-get", json!("pc-i440fx-10.0-machine")),
        ("info ramblock", json!(fake_qemu::blocks())),
        ("info mtree -f", json!(mtree)),
        (
            "query-memdev",
            json!([{"id": "pc.ram", "size": ram().len()}]),
        ),
        ("query-status", json!({"status": "running"})),
    ];
    let answers = answers.map(|(command, answer)| format!("{command}\t{answer}\n"));
    fs::write(folder.join("answers"), answers.concat()).unwrap();
    folder.join("qemu")
}

/// Restores of what `fake` was saved as, into a QEMU that is none: their lines, and how far they are.
fn restores_are_of_the_schema(fake: &Fake, sonic: &str) {
    let folder = fake.folder.path();
    let (qemu, raw) = (standin_qemu(folder), folder.join("guest.raw"));
    let restore = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
        command.args(["qemu", "restore", sonic, "--json", "--progress", "json"]);
        command.args(more).arg("--").arg(&qemu).args(["-m", "128M"]);
        command.env("STANDIN_ANSWERS", folder.join("answers"));
        let run = checked_run(command);
        assert!(run.status.success(), "{more:?}: {}", stderr(&run));
        let told: Vec<String> = phases_told(&stderr(&run))
            .into_iter()
            .map(|(phase, bytes)| format!("{phase} {}", bytes >> 20))
            .collect();
        (one(&run), told.join(", "))
    };
    let raw = raw.to_str().unwrap();
    // By postcopy, which this QEMU refuses; at once; and twice by a file, which is made first.
    for (more, how, phases) in [
        (&[][..], "eager", "restoring 128"),
        (&["--eager"], "eager", "restoring 128"),
        (&["--map", raw], "map", "restoring 128, syncing to disk 128"),
        (&["--map", raw], "map", "restoring 0"),
    ] {
        let was_there = fs::exists(raw).unwrap();
        let (restored, told) = restore(more);
        assert_eq!(restored["kind"], "qemu_restore", "{restored}");
        assert_eq!(restored["path"], sonic, "{restored}");
        assert_eq!(restored["qemu"], "10.0.2", "{restored}");
        assert_eq!(restored["how"], how, "{restored}");
        let why = more.is_empty().then(|| json!("no postcopy here"));
        assert_eq!(restored["why"], why.unwrap_or_default(), "{restored}");
        assert_eq!(restored["paused"], false, "{restored}");
        let made = how == "map" && !was_there;
        assert_eq!(restored["raw_file_seconds"].is_number(), made, "{restored}");
        // On a file system without extended attributes the file itself is compared.
        assert!(
            told == phases || was_there && told == "restoring 0, comparing 128",
            "{more:?}: {told}"
        );
        for key in ["pid", "ready_seconds", "seconds"] {
            assert!(restored[key].is_number(), "{key}: {restored}");
            let mut bad = restored.clone();
            bad.as_object_mut().unwrap().remove(key);
            assert!(!schema().is_valid(&bad), "without {key}");
        }
    }
    // What was kept is what the guest had.
    let made = fs::read(raw).unwrap();
    let same = made.chunks(4096).zip(ram().chunks(4096));
    assert!(made.len() == ram().len());
    let differ = same.filter(|(made, had)| made != had && made.iter().any(|byte| *byte != 0));
    assert_eq!(differ.count(), 0);
}

/// A save from a monitor that is QEMU's to `sonicshot`, restores of it, some that cannot be, and their
/// errors.
#[test]
fn what_is_printed_of_guests_of_qemu_is_of_the_schema() {
    let save = |fake: &Fake, more: &[&str]| {
        let (socket, out) = (fake.socket(), fake.out());
        let args = [
            "qemu",
            "save",
            "--qmp",
            socket.to_str().unwrap(),
            "--json",
            "-o",
        ];
        let args = [&args[..], &[out.to_str().unwrap()], more].concat();
        one(&sonicshot(&args))
    };
    let fake = Fake::start(Vec::new());
    let saved = save(&fake, &["--max-pause", "60"]);
    assert_eq!(saved["kind"], "qemu_save", "{saved}");
    assert!(saved["dropped_bytes"].as_u64() > Some(40 << 20), "{saved}");
    let sonic = fake.out();
    let sonic = sonic.to_str().unwrap();
    for (args, code) in [
        (&["qemu", "restore", sonic, "--json"][..], 2),
        (
            &["qemu", "restore", sonic, "--json", "--", "/no/such/qemu"],
            1,
        ),
        (
            &[
                "qemu",
                "restore",
                "/no/such.sonic",
                "--json",
                "--",
                "/no/such/qemu",
            ],
            1,
        ),
    ] {
        let error = one(&sonicshot(args));
        assert_eq!(error["kind"], "error", "{args:?}: {error}");
        assert_eq!(error["exit_code"], code, "{args:?}: {error}");
    }
    restores_are_of_the_schema(&fake, sonic);
    fake.heard();
    let fake = Fake::start(vec![("stop", 1, Answer::Error("it does not want to"))]);
    let error = save(&fake, &[]);
    assert_eq!(
        (&error["kind"], &error["exit_code"]),
        (&json!("error"), &json!(1))
    );
    assert!(error.to_string().contains("does not want to"), "{error}");
    fake.heard();
}

/// A guest's memory in a file, a checkpoint of it, and LibVMI tell the same of a frame.
#[test]
fn a_checkpoint_and_libvmi_tell_of_frames_and_lists_as_the_file_does() {
    let folder = TempDir::new().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let raw = raw.to_str().unwrap();
    let sonic = folder.path().join("guest.sonic");
    let sonic = sonic.to_str().unwrap();
    assert!(sonicshot(&["save", raw, "-o", sonic]).status.success());
    let domain = format!("file:{raw}");
    let look = |of: &str, words: &[&str]| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
        match of {
            "libvmi" => command.args(["inspect", "--libvmi", &domain]),
            file => command.args(["inspect", file]),
        };
        command.args(words).arg("--json");
        command.env("SONICSHOT_LIBVMI", libvmi_fake::library());
        one(&checked_run(command))
    };
    let flags = kpageflags();
    for (bits, stored) in [
        (KPF_BUDDY, (json!(true), json!("free"))),
        (KPF_SLAB, (json!(false), json!("data"))),
        (KPF_ANON, (json!(false), Value::Null)),
    ] {
        let found = (0x1000..).zip(&flags[0x1000..]);
        let found = found.into_iter().find(|(_, flags)| **flags & bits == bits);
        let pfn = found.unwrap().0.to_string();
        let words = ["--explain", &pfn, "--free-lists=3"];
        let plain = look(raw, &words);
        for of in [sonic, "libvmi"] {
            let other = look(of, &words);
            assert_eq!(other["free_lists"], plain["free_lists"], "{of}");
            for key in ["class", "struct_page", "owner", "zones", "records", "folio"] {
                assert_eq!(other["page"][key], plain["page"][key], "{of} {pfn}: {key}");
            }
        }
        // The checkpoint says itself what it has of it.
        let kept = look(sonic, &words);
        assert_eq!(kept["page"]["prune"]["drops"], stored.0, "{kept}");
        if stored.1 != Value::Null {
            assert_eq!(kept["page"]["content"], stored.1, "{kept}");
        }
        assert_eq!(plain["page"]["content"], Value::Null);
        let run = sonicshot(&["inspect", sonic, "--explain", &pfn]);
        let text = String::from_utf8(run.stdout).unwrap();
        let says = match stored.0 == json!(true) {
            true => "stored    left out: it was free_buddy, and is restored as zeroes",
            false => "stored    kept: ",
        };
        assert!(text.contains(says), "{text}");
    }
    let run = sonicshot(&["inspect", sonic, "--free-lists"]);
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(text.contains("of the processors agree"), "{text}");
    // A frame that it does not have.
    let run = sonicshot(&["inspect", sonic, "--explain", "0x100000"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    // One of memory without a kernel says what is missing.
    let empty = folder.path().join("empty.raw");
    fs::write(&empty, vec![0; 32 << 20]).unwrap();
    let empty = empty.to_str().unwrap();
    let whole = folder.path().join("empty.sonic");
    let whole = whole.to_str().unwrap();
    let run = sonicshot(&[
        "convert", empty, "--to", "sonic", "-o", whole, "--layout", "flat",
    ]);
    assert!(run.status.success(), "{}", stderr(&run));
    let run = sonicshot(&["inspect", whole, "--free-lists"]);
    assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
    assert!(stderr(&run).contains("kernel"), "{}", stderr(&run));
}

#[test]
fn a_frame_is_explained_as_the_kernel_had_it() {
    let folder = TempDir::new().unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let raw = raw.to_str().unwrap();
    let flags = kpageflags();
    let first = |wanted: u64| {
        let all = (0x1000..).zip(&flags[0x1000..]);
        let found = all
            .into_iter()
            .find(|(_, flags)| **flags & wanted == wanted);
        found.unwrap().0.to_string()
    };
    let of = |pfn: &str| -> Value {
        let run = sonicshot(&["inspect", raw, "--explain", pfn, "--json"]);
        let seen: Value = serde_json::from_slice(&run.stdout).unwrap();
        seen["page"].clone()
    };
    let says = |page: &Value| -> Vec<(String, Value)> {
        let all = page["records"].as_array().unwrap().iter();
        all.map(|one| {
            (
                one["record"].as_str().unwrap().to_owned(),
                one["says_free"].clone(),
            )
        })
        .collect()
    };
    let free = of(&first(KPF_BUDDY));
    assert_eq!(free["class"], "free_buddy");
    assert_eq!(free["prune"]["drops"], true, "{free}");
    let told = says(&free);
    for record in ["mark", "list", "struct_page", "block", "zone"] {
        assert!(
            told.contains(&(record.into(), json!(true))),
            "{record}: {free}"
        );
    }
    assert_eq!(free["owner"], Value::Null);
    // In use: none of the records says that it is free.
    for (bits, class, owner) in [
        (KPF_SLAB, "slab", "slab"),
        (KPF_ANON, "anonymous", "anonymous"),
        (KPF_PGTABLE, "page_table", "none"),
    ] {
        let page = of(&first(bits));
        assert_eq!(
            (&page["class"], &page["owner"]["kind"]),
            (&json!(class), &json!(owner))
        );
        let told = says(&page);
        for record in ["mark", "list", "struct_page"] {
            let is_free = told.contains(&(record.into(), json!(true)));
            // A slab's pages have no references.
            assert!(!is_free, "{class}, {record}: {page}");
        }
        assert_eq!(page["prune"]["drops"], page["zero"], "{page}");
    }
    assert!(of(&first(KPF_SLAB))["owner"]["name"].is_string());
    let run = sonicshot(&["inspect", raw, "--explain", &first(KPF_BUDDY)]);
    let text = String::from_utf8(run.stdout).unwrap();
    assert!(text.contains("drops it: free_buddy pages"), "{text}");
    assert!(text.contains("marked as a free block of order"), "{text}");
    // A frame that there is not, and what is no number.
    for pfn in ["0x100000", "x"] {
        let run = sonicshot(&["inspect", raw, "--explain", pfn]);
        assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    }
}
