//! The command on a real guest's memory in Xen's files.

use crate::common::*;
use crate::disks::{disk, refused};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

const PAGE: usize = 4096;
/// In a record, as `xl save` has it.
const PAGES: usize = 1024;
/// The first byte of `init_on_free` in this guest's memory.
const INIT_ON_FREE: usize = 0x694_6e50;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn record(out: &mut Vec<u8>, kind: u32, body: &[&[u8]]) {
    let len: usize = body.iter().map(|part| part.len()).sum();
    out.extend(kind.to_le_bytes());
    out.extend(u32::try_from(len).unwrap().to_le_bytes());
    for part in body {
        out.extend(*part);
    }
    out.extend(vec![0; len.next_multiple_of(8) - len]);
}

/// Domains of libxc.
const PV: u8 = 1;
const HVM: u8 = 2;
/// Types of pages.
const NOTAB: u64 = 0;
const L1TAB: u64 = 1;
const PINNED_L1TAB: u64 = 9;
const XALLOC: u64 = 0xe;

/// `ram` as Xen would save it of an HVM guest; the pages in `allocated` without content. A live
/// save: the first record comes twice, and what it held first was something else.
pub(crate) fn image(ram: &[u8], allocated: impl Fn(usize) -> bool) -> Vec<u8> {
    image_of(HVM, ram, |pfn| type_of(allocated(pfn)), Some(NOTAB))
}

/// The same of a guest that was stopped: every page comes once.
fn image_at_once(ram: &[u8], allocated: impl Fn(usize) -> bool) -> Vec<u8> {
    image_of(HVM, ram, |pfn| type_of(allocated(pfn)), None)
}

fn type_of(allocated: bool) -> u64 {
    if allocated { XALLOC } else { NOTAB }
}

/// Pages of the types that `kind` says. If `earlier` is given, the first record has come before;
/// its pages with content were of that type then.
fn image_of(domain: u8, ram: &[u8], kind: impl Fn(usize) -> u64, earlier: Option<u64>) -> Vec<u8> {
    let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
    out.extend([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]);
    out.extend(b"{json:}LibxlFmt\0\0\0\x02\0\0\0\0");
    record(&mut out, 1, &[]);
    out.extend([0xff; 8]);
    out.extend(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
    out.extend([domain, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    record(&mut out, 0x11, &[b"CPUID"]);
    record(&mut out, 0x10, &[]);
    let old = vec![0x5a; PAGES * PAGE];
    let chunks = ram.chunks(PAGES * PAGE).enumerate();
    let chunks = chunks.map(|(number, pages)| (number, pages, None));
    let before = earlier.map(|kind| (0, &old[..], Some(kind)));
    for (number, pages, was) in before.into_iter().chain(chunks) {
        let count = pages.len() / PAGE;
        let mut entries = u32::try_from(count).unwrap().to_le_bytes().to_vec();
        entries.extend([0; 4]);
        let mut data = Vec::new();
        for (index, page) in pages.chunks(PAGE).enumerate() {
            let pfn = number * PAGES + index;
            let kind = match kind(pfn) {
                XALLOC => XALLOC,
                now => was.unwrap_or(now),
            };
            entries.extend((pfn as u64 | kind << 60).to_le_bytes());
            if kind != XALLOC {
                data.extend(page);
            }
        }
        record(&mut out, 1, &[&entries, &data]);
    }
    record(&mut out, 9, &[b"HVM context"]);
    record(&mut out, 0, &[]);
    record(&mut out, 3, &[b"QEMU's state"]);
    record(&mut out, 0, &[]);
    out
}

fn json(args: &[&str]) -> Value {
    let run = sonicshot(args);
    assert!(run.status.success(), "{args:?}: {}", stderr(&run));
    serde_json::from_slice(&run.stdout).unwrap()
}

/// The class that `inspect` gives each frame.
fn classes(dump: &Path) -> Vec<String> {
    let out = dump.with_extension("tsv");
    json(&["inspect", text(dump), "--pfns", text(&out), "--json"]);
    let mut classes = Vec::new();
    for (first, last, class) in read_pfns(&out) {
        for _ in first..=last {
            classes.push(class.clone());
        }
    }
    classes
}

#[test]
fn free_pages_go_and_nothing_else_is_changed() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (full, pruned, piped) = (file("full"), file("pruned"), file("piped"));
    fs::write(&full, image(ram(), |_| false)).unwrap();
    let seen = json(&["inspect", text(&full), "--json"]);
    assert_eq!(seen["format_name"], "Xen save image (HVM or PVH)");
    assert_eq!(seen["free_fill"], "any");
    assert_eq!(seen["file_bytes"], fs::metadata(&full).unwrap().len());
    assert!(seen["zero_in_use_pages"].as_u64().unwrap() > 0);
    let classes = classes(&full);
    let goes = |pfn: usize| ["free_buddy", "free_pcp", "offline"].contains(&classes[pfn].as_str());
    let free = (0..classes.len()).filter(|pfn| goes(*pfn)).count();
    assert_eq!(seen["droppable_pages"], free);

    let report = json(&["prune", text(&full), "-o", text(&pruned), "--json"]);
    assert_eq!(report["dropped_bytes"], free * PAGE);
    let zero = seen["zero_in_use_pages"].as_u64().unwrap();
    assert_eq!(report["kept_for_fill_bytes"], zero * PAGE as u64);
    let notes = report["notes"].to_string();
    assert!(notes.contains("zero are kept"), "{notes}");
    // To the byte what Xen would have written of those pages; zeroes in use are there.
    assert!(fs::read(&pruned).unwrap() == image(ram(), goes));
    let again = json(&["inspect", text(&pruned), "--json"]);
    assert_eq!(again["droppable_pages"], free);

    let run = Command::new(env!("CARGO_BIN_EXE_sonicshot"))
        .args(["prune", "-", "-o", "-"])
        .stdin(File::open(&full).unwrap())
        .stdout(File::create(&piped).unwrap())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(&piped).unwrap() == fs::read(&pruned).unwrap());

    let raw = file("raw");
    json(&[
        "convert",
        text(&full),
        "-o",
        text(&raw),
        "--to",
        "raw",
        "--json",
    ]);
    assert!(fs::read(&raw).unwrap() == ram());
    let run = sonicshot(&["prune", text(&full), "--in-place"]);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
}

#[test]
fn a_guest_that_trusts_free_pages_to_be_zero_keeps_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (full, pruned, raw, less) = (file("full"), file("pruned"), file("raw"), file("less"));
    let mut ram = ram().to_vec();
    ram[INIT_ON_FREE] = 1;
    fs::write(&full, image(&ram, |_| false)).unwrap();
    fs::write(&raw, &ram).unwrap();
    let seen = json(&["inspect", text(&full), "--json"]);
    assert_eq!(seen["free_fill"], "zero");
    assert_eq!(seen["droppable_pages"], seen["classes"]["offline"]);
    let report = json(&["prune", text(&full), "-o", text(&pruned), "--json"]);
    assert_eq!(report["droppable_pages"], seen["classes"]["offline"]);
    let kept = [
        &seen["classes"]["free_buddy"],
        &seen["classes"]["free_pcp"],
        &seen["zero_in_use_pages"],
    ];
    let kept = kept.map(|pages| pages.as_u64().unwrap());
    assert_eq!(
        report["kept_for_fill_bytes"],
        kept.iter().sum::<u64>() * PAGE as u64
    );
    let notes = report["notes"].to_string();
    assert!(notes.contains("free pages are kept"), "{notes}");
    let offline = classes(&full);
    assert!(fs::read(&pruned).unwrap() == image(&ram, |pfn| offline[pfn] == "offline"));
    // Where a dropped page is zero, they go.
    let report = json(&["prune", text(&raw), "-o", text(&less), "--json"]);
    assert_eq!(report["kept_for_fill_bytes"], 0);
    assert!(report["dropped_bytes"].as_u64().unwrap() > kept[0] * PAGE as u64);
}

fn convert(from: &Path, to: &str, out: &Path) {
    let out = text(out);
    json(&["convert", text(from), "-o", out, "--to", to, "--json"]);
}

fn save(dump: &Path, out: &Path) -> Value {
    json(&["save", text(dump), "-o", text(out), "--json"])
}

/// The image that a checkpoint becomes.
fn restored(sonic: &Path) -> Vec<u8> {
    let out = sonic.with_extension("restored");
    let (from, to) = (text(sonic), text(&out));
    json(&["restore", from, "-o", to, "--to", "xl", "--force", "--json"]);
    fs::read(out).unwrap()
}

#[test]
fn a_guest_that_checks_free_pages_for_its_poison_finds_it() {
    const POISON: u8 = 0xaa;
    // This kernel is built without. Its flag is said to be where other bytes are than zeroes.
    const SYMBOLS: &str = "\
        ffffffff81000000 T _stext\n\
        ffffffff81000000 D _page_poisoning_enabled\n";
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (full, pruned, sonic) = (file("full"), file("pruned"), file("sonic"));
    let map = file("System.map");
    fs::write(&map, SYMBOLS).unwrap();
    let with_map = |args: &[&str]| json(&[args, &["--symbols", text(&map), "--json"]].concat());
    let mut ram = ram().to_vec();
    fs::write(file("raw"), &ram).unwrap();
    let plain = classes(&file("raw"));
    let is_free = |pfn: usize| plain[pfn].starts_with("free");
    for (pfn, page) in ram.chunks_mut(PAGE).enumerate() {
        if is_free(pfn) {
            page.fill(POISON);
        }
    }
    fs::write(&full, image_at_once(&ram, |_| false)).unwrap();
    let seen = with_map(&["inspect", text(&full)]);
    assert_eq!(seen["free_fill"], "byte");
    assert_eq!(seen["free_fill_byte"], POISON);
    assert!(classes(&full) == plain);
    let offline = |pfn: usize| plain[pfn] == "offline";
    let wanted = image_at_once(&ram, offline);
    let report = with_map(&["prune", text(&full), "-o", text(&pruned)]);
    let kept = |pfn: &usize| is_free(*pfn) || plain[*pfn] == "zero";
    let kept = (0..plain.len()).filter(kept).count();
    assert_eq!(report["kept_for_fill_bytes"], kept * PAGE);
    assert!(fs::read(&pruned).unwrap() == wanted);
    // A checkpoint leaves them out, and knows what they were.
    let report = with_map(&["save", text(&full), "-o", text(&sonic)]);
    let free = (0..plain.len()).filter(|pfn| is_free(*pfn)).count();
    assert!(report["free_pages"].as_u64().unwrap() >= free as u64);
    assert!(restored(&sonic) == wanted);
}

#[test]
fn page_tables_of_a_paravirtualised_guest_are_in_every_image() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (full, pruned, sonic) = (file("full"), file("pruned"), file("sonic"));
    fs::write(file("raw"), ram()).unwrap();
    let plain = classes(&file("raw"));
    // Some that the guest calls free, too: Xen has the last word.
    let kind = |pfn: usize| match plain[pfn].as_str() {
        "page_table" => L1TAB,
        "free_buddy" if pfn.is_multiple_of(97) => PINNED_L1TAB,
        _ => NOTAB,
    };
    let goes = |pfn: usize| {
        ["free_buddy", "free_pcp", "offline"].contains(&plain[pfn].as_str()) && kind(pfn) == NOTAB
    };
    let less = |pfn: usize| if goes(pfn) { XALLOC } else { kind(pfn) };
    let of = |wanted| (0..plain.len()).filter(|pfn| kind(*pfn) == wanted).count();
    assert!(of(L1TAB) > 10 && of(PINNED_L1TAB) > 10);
    for earlier in [None, Some(NOTAB)] {
        fs::write(&full, image_of(PV, ram(), kind, earlier)).unwrap();
        let seen = json(&["inspect", text(&full), "--json"]);
        assert_eq!(seen["format_name"], "Xen save image (PV)");
        let args = ["prune", text(&full), "-o", text(&pruned), "--force"];
        assert!(sonicshot(&args).status.success());
        assert!(fs::read(&pruned).unwrap() == image_of(PV, ram(), less, earlier));
        let out = text(&sonic);
        json(&["save", text(&full), "-o", out, "--force", "--json"]);
        let earlier = earlier.map(|_| XALLOC);
        assert!(restored(&sonic) == image_of(PV, ram(), less, earlier));
    }
    // A checkpoint that was not made of the image lacks those.
    let (other, out) = (file("other"), file("out"));
    save(&file("raw"), &other);
    let args = ["convert", text(&other), "-o", text(&out), "--to", "xl"];
    let run = sonicshot(&[&args[..], &["--template", text(&full)]].concat());
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    let said = stderr(&run);
    assert!(said.contains("page table, and its content was left out"));
    assert!(!out.exists());
}

/// Of an image as `xl save` wrote it, of a live one, and of one that was pruned before: with the disk the
/// same image comes of it as without.
#[test]
fn page_cache_that_is_on_the_disk_comes_back_into_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let file = |name: &str| folder.join(name);
    let raw = raw_dump(folder, |_| {});
    let (disk, kept) = disk(folder, &raw);
    let given = format!("root={}", text(&disk));
    let plain = classes(&raw);
    let kind = |pfn: usize| match plain[pfn].as_str() {
        "page_table" => L1TAB,
        _ => NOTAB,
    };
    let full = file("full");
    for (earlier, pruned) in [(None, false), (Some(NOTAB), false), (None, true)] {
        fs::write(&full, image_of(PV, ram(), kind, earlier)).unwrap();
        let mut from = full.clone();
        if pruned {
            from = file("pruned");
            json(&["prune", text(&full), "-o", text(&from), "--json"]);
        }
        let (all, small) = (file("all"), file("small"));
        let whole = json(&["save", text(&from), "-o", text(&all), "--force", "--json"]);
        let args = ["save", text(&from), "-o", text(&small), "--disk", &given];
        let saved = json(&[&args[..], &["--force", "--json"]].concat());
        assert_eq!(
            (&whole["disk_pages"], &saved["disk_pages"]),
            (&0.into(), &kept.into())
        );
        let len = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(len(&small) < len(&all) - (kept * PAGE) as u64 / 5);
        let args = [
            "verify",
            text(&small),
            "--disk",
            &given,
            "--against",
            text(&from),
        ];
        assert_eq!(
            json(&[&args[..], &["--json"]].concat())["checked_disk_pages"],
            kept
        );
        let back = file("back");
        let args = [
            "restore",
            text(&small),
            "-o",
            text(&back),
            "--to",
            "xl",
            "--disk",
            &given,
        ];
        json(&[&args[..], &["--force", "--json"]].concat());
        let bytes = fs::read(&back).unwrap();
        assert!(bytes == restored(&all));
        // No page that is kept lacks its content.
        assert!(bytes.len() > kept * PAGE);
    }
    refuse_other_disks(&file("small"), &disk, &file("out"));
}

/// What is no longer the disk that it was becomes no image.
fn refuse_other_disks(small: &Path, disk: &Path, out: &Path) {
    let whole = fs::read(disk).unwrap();
    let given = format!("root={}", text(disk));
    let args = ["restore", text(small), "-o", text(out), "--to", "xl"];
    refused(&args, 2, "its image was not given", out);
    let with = [&args[..], &["--disk", &given]].concat();
    let all_the_same = [&with[..], &["--disk-moved-on"]].concat();
    // A block, of the last pages of the page cache.
    let mut changed = whole.clone();
    let at = changed.len() - 5 * PAGE;
    changed[at] ^= 1;
    fs::write(disk, &changed).unwrap();
    refused(&with, 3, "holds other bytes", out);
    refused(&all_the_same, 3, "holds other bytes", out);
    fs::write(disk, &whole[..whole.len() - 512]).unwrap();
    refused(&with, 3, "bytes, and had", out);
    fs::remove_file(disk).unwrap();
    refused(&with, 1, "disk.img", out);
    let mut mounted = whole;
    mounted[1024 + 44] ^= 1;
    fs::write(disk, &mounted).unwrap();
    refused(&with, 3, "ext4's superblock", out);
    let writer = File::options().write(true).open(disk).unwrap();
    refused(&with, 6, "not pinned", out);
    drop(writer);
    let run = sonicshot(&all_the_same);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(out).unwrap() == restored(small.with_file_name("all").as_path()));
}

#[test]
fn an_image_goes_to_every_format_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let kind = |pfn| type_of(pfn % 5000 == 77);
    for (live, earlier) in [(false, None), (true, Some(NOTAB))] {
        let bytes = image_of(HVM, ram(), kind, earlier);
        // What came first in a live save is left out, its entries are there.
        let wanted = image_of(HVM, ram(), kind, earlier.map(|_| XALLOC));
        let full = file(&format!("{live}"));
        fs::write(&full, &bytes).unwrap();
        let raw_of = |dump: &Path| {
            let mut raw = dump.as_os_str().to_owned();
            raw.push(".raw");
            let raw = Path::new(&raw);
            convert(dump, "raw", raw);
            fs::read(raw).unwrap()
        };
        let memory = raw_of(&full);
        for to in ["elf", "kdump"] {
            let out = file(&format!("{live}.as-{to}"));
            convert(&full, to, &out);
            assert!(raw_of(&out) == memory, "{to}");
        }
        let sonic = file(&format!("{live}.converted"));
        convert(&full, "sonic", &sonic);
        let kept = file(&format!("{live}.kept"));
        let save = [
            "save",
            text(&full),
            "-o",
            text(&kept),
            "--keep-all",
            "--json",
        ];
        json(&save);
        let itself = file(&format!("{live}.itself"));
        convert(&full, "xl", &itself);
        assert!(fs::read(&itself).unwrap() == wanted);
        let once_more = file(&format!("{live}.once-more"));
        convert(&sonic, "sonic", &once_more);
        for sonic in [sonic, kept, once_more] {
            let args = ["verify", text(&sonic), "--against", text(&full), "--json"];
            assert!(json(&args)["compared_pages"].as_u64().unwrap() > 30_000);
            let name = sonic.file_name().unwrap().to_str().unwrap();
            let converted = file(&format!("{name}-again"));
            convert(&sonic, "xl", &converted);
            assert!(fs::read(&converted).unwrap() == wanted);
            assert!(restored(&sonic) == wanted);
            assert!(raw_of(&converted) == memory);
        }
    }
}

#[test]
fn a_checkpoint_becomes_an_image_without_free_pages() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (full, pruned, sonic, again) = (file("full"), file("pruned"), file("sonic"), file("again"));
    fs::write(&full, image_at_once(ram(), |_| false)).unwrap();
    json(&["prune", text(&full), "-o", text(&pruned), "--json"]);
    json(&["save", text(&full), "-o", text(&sonic), "--json"]);
    let blobs = json(&["inspect", text(&sonic), "--json"])["blobs"].to_string();
    assert!(blobs.contains("xen-image"), "{blobs}");
    let restore = [
        "restore",
        text(&sonic),
        "-o",
        text(&again),
        "--to",
        "xl",
        "--json",
    ];
    json(&restore);
    assert!(fs::read(&again).unwrap() == fs::read(&pruned).unwrap());
    // A pruned image as a template does not take what it has no place for.
    let raw = file("raw");
    fs::write(&raw, ram()).unwrap();
    let other = file("other");
    let mut args = vec!["convert", text(&raw), "-o", text(&other), "--to", "xl"];
    let run = sonicshot(&args);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    args.extend(["--template", text(&pruned)]);
    let run = sonicshot(&args);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    let said = stderr(&run);
    assert!(
        said.contains("the memory has content there, the image has not"),
        "{said}"
    );
    assert!(!other.exists());
    args.pop();
    args.push(text(&full));
    let run = sonicshot(&args);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(&other).unwrap() == fs::read(&full).unwrap());
}

#[test]
fn a_guest_that_trusts_zeroes_finds_them_after_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (full, sonic, again) = (file("full"), file("sonic"), file("again"));
    let mut ram = ram().to_vec();
    ram[INIT_ON_FREE] = 1;
    fs::write(&full, image_at_once(&ram, |_| false)).unwrap();
    let classes = classes(&full);
    json(&["save", text(&full), "-o", text(&sonic), "--json"]);
    let restore = [
        "restore",
        text(&sonic),
        "-o",
        text(&again),
        "--to",
        "xl",
        "--json",
    ];
    let report = json(&restore);
    for (pfn, class) in classes.iter().enumerate() {
        if class.starts_with("free") {
            ram[pfn * PAGE..][..PAGE].fill(0);
        }
    }
    let bytes = fs::read(&again).unwrap();
    assert!(bytes == image_at_once(&ram, |pfn| classes[pfn] == "offline"));
    let on_disk = report["disk_bytes"].as_u64().unwrap();
    let free = classes.iter().filter(|class| class.starts_with("free"));
    let free = (free.count() * PAGE) as u64;
    let most = bytes.len() as u64 - free / 2;
    assert!(
        on_disk < most,
        "zeroes are holes: {on_disk} of {}, free {free}",
        bytes.len()
    );
}

#[test]
fn what_is_no_checkpoint_of_an_image_becomes_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (raw, sonic, out, skeleton) = (file("raw"), file("sonic"), file("out"), file("skeleton"));
    fs::write(&raw, &ram()[..PAGES * PAGE]).unwrap();
    let save = [
        "save",
        text(&raw),
        "-o",
        text(&sonic),
        "--keep-all",
        "--layout",
        "flat",
        "--force",
    ];
    let restore = ["restore", text(&sonic), "-o", text(&out), "--to", "xl"];
    assert!(sonicshot(&save).status.success());
    let run = sonicshot(&restore);
    assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    assert!(stderr(&run).contains("--template"), "{}", stderr(&run));
    // A blob of that name that is no image, and one of another guest.
    let blob = format!("xen-image={}", text(&skeleton));
    let with_blob = [&save[..], &["--blob", &blob]].concat();
    let (image, other) = (file("image"), file("other"));
    fs::write(&image, image_at_once(&ram()[..2 * PAGES * PAGE], |_| false)).unwrap();
    json(&[
        "save",
        text(&image),
        "-o",
        text(&other),
        "--keep-all",
        "--json",
    ]);
    let take = ["restore", text(&other), "-o", text(&out), "--blob", &blob];
    assert!(sonicshot(&take).status.success());
    fs::remove_file(&out).unwrap();
    for (damage, said) in [
        (false, "the image has it, the memory has not"),
        (true, "truncated in record"),
    ] {
        if damage {
            let len = fs::metadata(&skeleton).unwrap().len();
            File::options()
                .write(true)
                .open(&skeleton)
                .unwrap()
                .set_len(len - 20)
                .unwrap();
        }
        assert!(sonicshot(&with_blob).status.success());
        let run = sonicshot(&restore);
        assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
        assert!(stderr(&run).contains(said), "{}", stderr(&run));
        assert!(!out.exists());
    }
}

#[test]
fn a_damaged_image_is_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (full, out) = (folder.path().join("full"), folder.path().join("out"));
    let mut bytes = image(&ram()[..PAGES * PAGE], |_| false);
    let len = bytes.len();
    bytes.truncate(len - 30);
    fs::write(&full, &bytes).unwrap();
    let run = sonicshot(&["prune", text(&full), "-o", text(&out)]);
    assert_eq!(run.status.code(), Some(3));
    assert!(
        stderr(&run).contains("truncated in record 7, at offset"),
        "{}",
        stderr(&run)
    );
    assert!(!out.exists());
}

/// `ram` as `xl dump-core` would write it: of a PV guest with the machine's frame numbers, if there
/// are any.
fn core(ram: &[u8], machine: Option<fn(u64) -> u64>) -> Vec<u8> {
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
    let pages = (ram.len() / PAGE) as u64;
    let note = |kind: u32, desc: &[u64]| {
        let len = u32::try_from(desc.len() * 8).unwrap();
        let head: Vec<u8> = [4, len, kind]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        [head, b"Xen\0".to_vec(), words(desc)].concat()
    };
    let magic = 0xf00f_ebee - u64::from(machine.is_some());
    let notes = [
        note(0x200_0000, &[]),
        note(0x200_0001, &[magic, 1, pages, 4096]),
        note(0x200_0002, &[4, 17]),
        note(0x200_0003, &[1]),
    ]
    .concat();
    let names = match machine {
        Some(_) => "\0.shstrtab\0.note.Xen\0.xen_pages\0.xen_p2m\0",
        None => "\0.shstrtab\0.note.Xen\0.xen_pages\0.xen_pfn\0",
    };
    let table: Vec<u64> = match machine {
        Some(machine) => (0..pages).flat_map(|pfn| [pfn, machine(pfn)]).collect(),
        None => (0..pages).collect(),
    };
    let table = words(&table);
    let sections: [(&str, u32, &[u8]); 4] = [
        (".note.Xen", 7, &notes),
        (".xen_pages", 1, ram),
        (
            &names[names.rfind(".xen").unwrap()..names.len() - 1],
            1,
            &table,
        ),
        (".shstrtab", 3, names.as_bytes()),
    ];
    let mut out = b"\x7fELF\x02\x01\x01\0\x01\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    out.extend(words(&[0, 0, 64]));
    out.extend([0, 0, 0, 0, 64, 0, 56, 0, 0, 0, 64, 0, 5, 0, 4, 0]);
    out.extend([0; 64]);
    let mut at = 64 + 5 * 64;
    for (name, kind, content) in sections {
        let name = u64::try_from(names.find(name).unwrap()).unwrap();
        let len = content.len() as u64;
        out.extend(words(&[
            name | u64::from(kind) << 32,
            0,
            0,
            at,
            len,
            0,
            0,
            0,
        ]));
        at += len;
    }
    out.extend(sections.map(|section| section.2).concat());
    out
}

/// Somewhere else for every frame of a guest of 128 MiB, but the 512 of a large page together.
fn machine(pfn: u64) -> u64 {
    0x10_0000 + (63 - pfn / 512) * 512 + pfn % 512
}

/// Makes the kernel's page tables in `ram` those of a PV guest: each entry names a frame of the
/// machine.
fn paravirtualise(ram: &mut [u8]) {
    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let info = ram
        .chunks(PAGE)
        .find(|page| page.starts_with(b"OSRELEASE="));
    let info = String::from_utf8_lossy(info.unwrap()).into_owned();
    let value = |name: &str| {
        let start = info.find(name).unwrap() + name.len();
        info[start..].lines().next().unwrap().to_owned()
    };
    let linked = u64::from_str_radix(&value("SYMBOL(swapper_pg_dir)="), 16).unwrap();
    let base: i64 = value("NUMBER(phys_base)=").parse().unwrap();
    let root = (linked - 0xffff_ffff_8000_0000).wrapping_add_signed(base) >> 12;
    let levels = 4 + value("NUMBER(pgtable_l5_enabled)=").parse::<u32>().unwrap();
    let frames = (ram.len() / PAGE) as u64;
    let mut tables = vec![(root, levels)];
    let mut seen = BTreeSet::new();
    while let Some((table, level)) = tables.pop() {
        if !seen.insert(table) {
            continue;
        }
        let at = usize::try_from(table).unwrap() * PAGE;
        for entry in ram[at..at + PAGE].as_chunks_mut::<8>().0 {
            let word = u64::from_le_bytes(*entry);
            let frame = (word & ADDRESS) >> 12;
            if word & PRESENT == 0 || frame >= frames {
                continue;
            }
            if level > 1 && (level > 3 || word & LARGE == 0) {
                tables.push((frame, level - 1));
            }
            *entry = (word & !ADDRESS | machine(frame) << 12).to_le_bytes();
        }
    }
    assert!(seen.len() > 10, "{} tables", seen.len());
}

#[test]
fn a_core_is_read_and_not_pruned() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (raw, hvm, pv) = (file("raw"), file("hvm"), file("pv"));
    let mut paravirtual = ram().to_vec();
    paravirtualise(&mut paravirtual);
    fs::write(&raw, ram()).unwrap();
    fs::write(&hvm, core(ram(), None)).unwrap();
    fs::write(&pv, core(&paravirtual, Some(machine))).unwrap();
    let wanted = classes(&raw);
    for (dump, bytes, name) in [
        (&hvm, ram(), "Xen core (HVM or PVH)"),
        (&pv, &paravirtual[..], "Xen core (PV)"),
    ] {
        let seen = json(&["inspect", text(dump), "--json"]);
        assert_eq!(seen["format_name"], name);
        assert!(classes(dump) == wanted, "{name}");

        let explained = name.contains("(PV)");
        for to in ["raw", "elf", "kdump", "sonic"] {
            let out = file(to);
            let args = ["convert", text(dump), "-o", text(&out), "--to", to];
            let report = json(&[&args[..], &["--force", "--json"]].concat());
            let notes = report["notes"].to_string();
            assert_eq!(notes.contains("frame numbers of the machine"), explained);
            if to == "sonic" {
                json(&["verify", text(&out), "--against", text(dump), "--json"]);
                continue;
            }
            // Without the machine's numbers nothing is found, rather than something wrong.
            let run = sonicshot(&["inspect", text(&out)]);
            let code = if explained { 4 } else { 0 };
            assert_eq!(run.status.code(), Some(code), "{to}: {}", stderr(&run));
        }
        assert!(fs::read(file("raw")).unwrap() == bytes);
        let saved = file("saved");
        let args = ["save", text(dump), "-o", text(&saved), "--force", "--json"];
        let report = json(&args);
        assert!(report["free_pages"].as_u64().unwrap() > 1000);
        let notes = report["notes"].to_string();
        assert_eq!(notes.contains("frame numbers of the machine"), explained);
        json(&["verify", text(&saved), "--against", text(dump), "--json"]);

        let out = file("pruned");
        let run = sonicshot(&["prune", text(dump), "-o", text(&out)]);
        assert_eq!(run.status.code(), Some(3));
        assert!(stderr(&run).contains("prune an image of `xl save`"));
        assert!(!out.exists());
        let run = sonicshot(&["prune", text(dump), "--in-place"]);
        assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
        let to_stream = file("stream");
        let args = [
            "convert",
            text(dump),
            "-o",
            text(&to_stream),
            "--to",
            "stream",
        ];
        let run = sonicshot(&args);
        assert_eq!(run.status.code(), Some(2), "{}", stderr(&run));
    }
}

#[test]
fn a_damaged_core_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("core");
    let good = core(&ram()[..8 * PAGE], Some(machine));
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    // In front of the sections' names.
    let table = good.len() - 41 - 8 * 16;
    for (bytes, wanted) in [
        (
            good[..good.len() - 5].to_vec(),
            "truncated in section .shstrtab, at offset",
        ),
        (changed(18, 3), "neither x86-64 nor arm64"),
        (
            changed(table + 16, 0),
            "not above the one before in section .xen_p2m",
        ),
        (
            changed(table + 24, machine(0).to_le_bytes()[0]),
            "is both guest frame",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        let run = sonicshot(&["inspect", text(&path)]);
        assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
        assert!(stderr(&run).contains(wanted), "{}", stderr(&run));
    }
}

#[test]
fn the_streams_in_an_image_are_pruned_by_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let whole = image(ram(), |_| false);
    fs::write(file("whole"), &whole).unwrap();
    json(&[
        "prune",
        text(&file("whole")),
        "-o",
        text(&file("wanted")),
        "--json",
    ]);
    let wanted = fs::read(file("wanted")).unwrap();
    let classes = classes(&file("whole"));
    let goes = |pfn: usize| ["free_buddy", "free_pcp", "offline"].contains(&classes[pfn].as_str());
    let joined = image_of(HVM, ram(), |pfn| type_of(goes(pfn)), Some(XALLOC));
    // Behind the headers of xl and of libxl. What follows the end of libxc's stream stays.
    for (begins, at) in [("LibxlFmt", 55), ("libxc", 79)] {
        let (stream, pruned) = (file(begins), file("pruned"));
        fs::write(&stream, &whole[at..]).unwrap();
        let args = [
            "prune",
            text(&stream),
            "-o",
            text(&pruned),
            "--force",
            "--json",
        ];
        let report = json(&args);
        assert_eq!(report["format_name"], "Xen migration stream (HVM or PVH)");
        assert!(fs::read(&pruned).unwrap() == wanted[at..], "{begins}");
        // By way of a checkpoint it is the same stream again.
        let sonic = file("sonic");
        let args = ["save", text(&pruned), "-o", text(&sonic), "--force"];
        assert!(sonicshot(&args).status.success());
        assert!(restored(&sonic) == joined[at..], "{begins}");
    }
}
