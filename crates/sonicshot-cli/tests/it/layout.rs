//! A layout that is given is believed only as far as the guest's memory shows that it is right.

use crate::common::*;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;
use std::time::Duration;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn inspect(dump: &Path, layout: &str, pfns: &Path) -> Output {
    let (dump, pfns) = (text(dump), text(pfns));
    sonicshot(&[
        "inspect", dump, "--layout", layout, "--pfns", pfns, "--force", "--json",
    ])
}

fn report(run: &Output) -> Value {
    assert!(run.status.success(), "{}", stderr(run));
    serde_json::from_slice(&run.stdout).unwrap()
}

/// The layout in which the ranges at `a` and `b` of the file, each of `len` MiB, have changed
/// places.
fn swapped(a: usize, b: usize, len: usize) -> String {
    let parts = [
        (0, a),
        (b, b + len),
        (a + len, b),
        (a, a + len),
        (b + len, 128),
    ];
    let parts = parts.iter().filter(|(start, end)| start < end);
    let parts: Vec<String> = parts
        .map(|(start, end)| format!("{start}M-{end}M"))
        .collect();
    parts.join(",")
}

/// The frames of `len` MiB from `start` MiB on that are to be dropped and are not zero where the
/// file has them for this layout, from `at` MiB on.
fn lost(pfns: &Path, start: usize, len: usize, at: usize) -> usize {
    let mut lost = 0;
    for (first, last, class) in read_pfns(pfns) {
        if !["free_buddy", "free_pcp", "offline", "zero"].contains(&class.as_str()) {
            continue;
        }
        for pfn in first..=last {
            let gpa = usize::try_from(pfn).unwrap() * 4096;
            if (start * MIB..(start + len) * MIB).contains(&gpa) {
                let from = gpa - start * MIB + at * MIB;
                lost += usize::from(ram()[from..from + 4096].iter().any(|byte| *byte != 0));
            }
        }
    }
    lost
}

#[test]
fn a_right_layout_is_accepted_whole() {
    let folder = TempDir::new().unwrap();
    let (raw, pfns) = (raw_dump(folder.path(), |_| {}), folder.path().join("pfns"));
    let want = sonicshot(&["inspect", text(&raw), "--json"]);
    let want = report(&want);
    for layout in [
        "pc",
        "q35",
        "firecracker",
        "firecracker-old",
        "flat",
        "0-128M",
        "0-64M,64M-128M",
        "0-32M,32M-128M",
        "0-24M,24M-32M,32M-128M",
    ] {
        let got = report(&inspect(&raw, layout, &pfns));
        assert_eq!(got["classes"], want["classes"], "{layout}");
        assert_eq!(got["notes"], want["notes"], "{layout}");
    }
    // The file has the upper half first.
    let (low, high) = ram().split_at(64 * MIB);
    fs::write(&raw, [high, low].concat()).unwrap();
    let got = report(&inspect(&raw, "64M-128M,0-64M", &pfns));
    assert_eq!(got["classes"], want["classes"]);
    let run = inspect(&raw, "0-64M,64M-128M", &pfns);
    assert!(matches!(run.status.code(), Some(3..=5)), "{}", stderr(&run));
}

#[test]
fn ranges_of_the_same_length_that_changed_places_are_refused() {
    let folder = TempDir::new().unwrap();
    let (raw, pfns) = (raw_dump(folder.path(), |_| {}), folder.path().join("pfns"));
    let before = fs::metadata(&raw).unwrap().modified().unwrap();
    // Halves; and ranges with kernel objects in one of them or both, of which the kernel found
    // needs none.
    for (a, b, len, by_lists) in [
        (0, 64, 64, false),
        // The kernel's VMCOREINFO is in one.
        (24, 32, 8, false),
        (24, 64, 8, false),
        (32, 48, 8, true),
        (32, 64, 8, true),
        (32, 112, 8, true),
    ] {
        let layout = swapped(a, b, len);
        let run = sonicshot(&["prune", text(&raw), "--in-place", "--layout", &layout]);
        let (said, code) = (stderr(&run), run.status.code());
        assert!(matches!(code, Some(3..=5)), "{layout}: {said}");
        if by_lists {
            assert_eq!(code, Some(3), "{layout}: {said}");
            assert!(said.contains("cannot lie as --layout says"), "{said}");
            assert!(said.contains("lists"), "{said}");
        }
        assert_eq!(fs::metadata(&raw).unwrap().modified().unwrap(), before);
    }
    // Whatever changes places: it is refused, or nothing is dropped there.
    let mut accepted = 0;
    for a in (0..128).step_by(16) {
        for b in (a + 16..128).step_by(16) {
            let layout = swapped(a, b, 16);
            let run = inspect(&raw, &layout, &pfns);
            if run.status.success() {
                accepted += 1;
                assert_eq!(lost(&pfns, a, 16, b), 0, "{layout}");
                assert_eq!(lost(&pfns, b, 16, a), 0, "{layout}");
            } else {
                assert!(matches!(run.status.code(), Some(3..=5)), "{}", stderr(&run));
            }
        }
    }
    assert!(accepted < 8, "{accepted} of 28 were accepted");
}

#[test]
fn what_nothing_is_known_of_is_kept() {
    let folder = TempDir::new().unwrap();
    let (raw, pfns) = (raw_dump(folder.path(), |_| {}), folder.path().join("pfns"));
    let part = |start: usize, end: usize| &ram()[start * MIB..end * MIB];
    // Processes and free pages, nothing of the kernel's: in another place than the layout says,
    // and in this one.
    let layout = swapped(48, 56, 8);
    for (right, at) in [(false, 56), (true, 48)] {
        if right {
            let parts = [part(0, 48), part(56, 64), part(48, 56), part(64, 128)];
            fs::write(&raw, parts.concat()).unwrap();
        }
        let got = report(&inspect(&raw, &layout, &pfns));
        let notes = got["notes"].to_string();
        assert_eq!(notes.matches("is kept as it is").count(), 2, "{notes}");
        assert_eq!(lost(&pfns, 48, 8, at), 0, "{right}");
        assert!(got["droppable_pages"].as_u64().unwrap() > 0, "{right}");
    }
    // The file's content has changed places, not the ranges.
    let [a, b] = [part(32, 40), part(48, 56)];
    fs::write(
        &raw,
        [part(0, 32), b, part(40, 48), a, part(56, 128)].concat(),
    )
    .unwrap();
    let run = inspect(&raw, "0-32M,32M-40M,40M-48M,48M-56M,56M-128M", &pfns);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    // One that is left over can be nowhere else.
    fs::write(&raw, [part(48, 64), part(0, 48), part(64, 128)].concat()).unwrap();
    let got = report(&inspect(&raw, "48M-64M,0-48M,64M-128M", &pfns));
    let notes = got["notes"].to_string();
    assert!(!notes.contains("is kept as it is"), "{notes}");
    assert!(lost(&pfns, 48, 16, 48) > 0, "free pages are dropped");
}

/// Part of the guest's memory: where a file has it, and which it is.
type Part = (u64, std::ops::Range<usize>);

/// A sparse file of `len` bytes with parts of the guest's memory.
fn sparse(path: &Path, len: u64, parts: &[Part]) {
    let file = fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    for (at, part) in parts {
        for (page, offset) in ram()[part.clone()].chunks(4096).zip((*at..).step_by(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, offset).unwrap();
            }
        }
    }
}

/// No layout is given, and more than one VMM may have made the file: what the guest does not
/// confirm is refused, and the file is as it was; where it can be read, nothing but free pages
/// goes.
/// As soon as nobody else has the file open for writing: a program that another test starts has what is
/// open here until it runs.
fn prune_in_place(path: &Path) -> Output {
    const IN_USE: Option<i32> = Some(6);
    let prune = || sonicshot(&["prune", text(path), "--in-place", "--min-hole", "0"]);
    let mut tries = (0..50).map(|_| prune()).skip_while(|run| {
        let waits = run.status.code() == IN_USE;
        if waits {
            std::thread::sleep(Duration::from_millis(100));
        }
        waits
    });
    tries.next().unwrap()
}

#[test]
fn a_layout_that_is_guessed_wrongly_loses_nothing() {
    const GIB: u64 = 1 << 30;
    const M64: u64 = 64 << 20;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("guest.raw");
    let whole = raw_dump(folder.path(), |_| {});
    let run = prune_in_place(&whole);
    assert!(run.status.success(), "{}", stderr(&run));
    // What may go, wherever a file has it.
    let free = fs::read(&whole).unwrap();
    let halves = |high: u64| vec![(0, 0..64 * MIB), (high, 64 * MIB..128 * MIB)];
    let table: [(u64, Vec<Part>, bool); 8] = [
        // As large as a guest that is split at 3, at 2 or at 3.25 GiB, or not at all: the guest has
        // 128 MiB, and all is there, or its upper half is where such a guest has what lies above 4
        // GiB.
        (7 * GIB / 2, vec![(0, 0..128 * MIB)], false),
        (7 * GIB / 2 + M64, halves(7 * GIB / 2), false),
        (3 * GIB + M64, halves(3 * GIB), false),
        (13 * GIB / 4 + M64, halves(13 * GIB / 4), false),
        (2 * GIB + M64, halves(2 * GIB), false),
        // All of it behind a hole.
        (4 * GIB, vec![(7 * GIB / 2, 0..128 * MIB)], false),
        // One layout alone is known for the size, and it is wrong, or more than the guest has.
        (4 * M64, halves(3 * M64), false),
        (4 * M64, vec![(0, 0..128 * MIB)], true),
    ];
    for (len, parts, is_read) in table {
        sparse(&path, len, &parts);
        let file = fs::File::open(&path).unwrap();
        let before = file.metadata().unwrap().modified().unwrap();
        let run = prune_in_place(&path);
        let said = stderr(&run);
        assert_eq!(run.status.success(), is_read, "{len:#x} {parts:?}: {said}");
        if !is_read {
            assert!(matches!(run.status.code(), Some(3..=5)), "{len:#x}: {said}");
            assert_eq!(file.metadata().unwrap().modified().unwrap(), before);
        }
        let mut gone = 0;
        for (at, part) in &parts {
            let mut got = vec![0; part.len()];
            file.read_exact_at(&mut got, *at).unwrap();
            for (number, got) in got.chunks(4096).enumerate() {
                let page = part.start + number * 4096..part.start + (number + 1) * 4096;
                let was = &ram()[page.clone()];
                assert!(got == was || *got == free[page], "{len:#x}: {number}");
                gone += usize::from(got != was);
            }
        }
        assert_eq!(gone > 1000, is_read, "{len:#x}: {gone}");
    }
}

/// The guest's own map is changed: RAM to 64 MiB, and as much from 4 GiB on. The kernel's records
/// lie elsewhere.
#[test]
fn a_map_that_lies_loses_nothing() {
    const GIB: u64 = 1 << 30;
    const M64: u64 = 64 << 20;
    let folder = TempDir::new().unwrap();
    let whole = raw_dump(folder.path(), |_| {});
    let run = sonicshot(&["prune", text(&whole), "--in-place", "--min-hole", "0"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let free = fs::read(&whole).unwrap();
    let map = |entries: &[(u64, u64, u32)]| -> Vec<u8> {
        let entry = |(start, len, kind): &(u64, u64, u32)| {
            [
                &start.to_le_bytes()[..],
                &len.to_le_bytes(),
                &kind.to_le_bytes(),
            ]
            .concat()
        };
        entries.iter().flat_map(entry).collect()
    };
    let was = map(&[(0x10_0000, 0x7fd_a000 - 0x10_0000, 1)]);
    let lie = map(&[(0x10_0000, M64 - 0x10_0000, 1), (4 * GIB, M64, 1)]);
    let mut count = 0;
    let lying = raw_dump(folder.path(), |bytes| {
        let places: Vec<usize> = memchr_all(bytes, &was);
        count = places.len();
        for at in places {
            bytes[at..at + lie.len()].copy_from_slice(&lie);
        }
    });
    assert!(
        count >= 2,
        "the maps of the firmware and of the kernel: {count}"
    );
    let run = sonicshot(&["prune", text(&lying), "--in-place", "--min-hole", "0"]);
    if run.status.success() {
        let got = fs::read(&lying).unwrap();
        let pages = got
            .chunks(4096)
            .zip(ram().chunks(4096))
            .zip(free.chunks(4096));
        for (number, ((got, was), free)) in pages.enumerate() {
            let told = was.windows(lie.len()).any(|at| at == lie)
                || got.windows(lie.len()).any(|at| at == lie);
            assert!(got == was || got == free || told, "{number}");
        }
    } else {
        assert!(matches!(run.status.code(), Some(3..=5)), "{}", stderr(&run));
    }
}

/// The offsets of `what` in `bytes`.
fn memchr_all(bytes: &[u8], what: &[u8]) -> Vec<usize> {
    let begins = |at: &usize| bytes[*at..].starts_with(what);
    (0..bytes.len() - what.len())
        .step_by(2)
        .filter(begins)
        .collect()
}

/// LiME's raw format, whose ranges end where firmware ends them, and a file that is cut inside a
/// page.
#[test]
fn memory_that_ends_inside_a_page_is_pruned_by_its_exact_layout() {
    let folder = TempDir::new().unwrap();
    let mut ends_odd = ram().to_vec();
    ends_odd.extend([0x5a; 0x234]);
    let ranges = [(0x1000, 0x9_fc00), (0x10_0000, 0x7fd_a000)];
    let of_lime: Vec<u8> = ranges
        .iter()
        .flat_map(|(start, end)| ram()[*start..*end].to_vec())
        .collect();
    let table = [
        (&ends_odd, "flat"),
        (&of_lime, "0x1000-0x9fc00,0x100000-0x7fda000"),
    ];
    let whole = raw_dump(folder.path(), |_| {});
    let whole = report(&sonicshot(&["inspect", text(&whole), "--json"]));
    for (bytes, layout) in table {
        let path = folder.path().join("odd.raw");
        fs::write(&path, bytes).unwrap();
        // Nothing tells of it that it is memory.
        let run = sonicshot(&["inspect", text(&path)]);
        assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
        assert!(
            stderr(&run).contains("needs its layout"),
            "{}",
            stderr(&run)
        );
        let seen = inspect(&path, layout, &folder.path().join("pfns"));
        let seen = report(&seen);
        let free = |report: &Value| report["classes"]["free_buddy"].as_u64().unwrap();
        assert!(free(&seen) > 0 && free(&seen) <= free(&whole), "{layout}");

        let out = folder.path().join("pruned.raw");
        let args = ["prune", text(&path), "--layout", layout];
        let run = sonicshot(&[&args[..], &["-o", text(&out), "--force"]].concat());
        assert!(run.status.success(), "{}", stderr(&run));
        let pruned = fs::read(&out).unwrap();
        let run = sonicshot(&[&args[..], &["--in-place", "--min-hole", "0"]].concat());
        assert!(run.status.success(), "{}", stderr(&run));
        // In place only whole blocks of the file go.
        let in_place = fs::read(&path).unwrap();
        assert!(pruned.len() == bytes.len() && in_place.len() == bytes.len());
        assert!(pruned != *bytes && in_place != *bytes);
        for ((was, pruned), in_place) in bytes.iter().zip(&pruned).zip(&in_place) {
            assert!(was == pruned || *pruned == 0, "{layout}");
            assert!(
                was == in_place || (*in_place, *pruned) == (0, 0),
                "{layout}"
            );
        }
        assert_eq!(pruned[bytes.len() - 0x234..], bytes[bytes.len() - 0x234..]);
        for path in [&out, &path] {
            let again = inspect(path, layout, &folder.path().join("pfns"));
            assert_eq!(report(&again)["classes"], seen["classes"], "{layout}");
        }
    }
}
