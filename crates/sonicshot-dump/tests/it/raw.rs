//! Raw dumps: read by layout, pruned by copy and in place.

use crate::common::*;
use proptest::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};
use sonicshot::{Fill, Gpa, GuestMemory, PageClass};
use sonicshot_dump::{Dump, DumpError, LayoutSpec, Overwrite, PruneOptions};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

fn file(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn regions_lie_end_to_end_in_the_file() {
    let folder = TempDir::new().unwrap();
    let bytes = pattern(1, 6 * PAGE);
    let path = file(&folder, "ram", &bytes);
    let spec: LayoutSpec = "0x1000-0x3000,1M-0x104000".parse().unwrap();
    let dump = Dump::open(&path, Some(&spec)).unwrap();
    assert_eq!(dump.format(), "raw RAM");
    assert_eq!(dump.layout_spec(), Some(&spec));
    assert_eq!(dump.machine(), None);
    assert_eq!(dump.layout().bytes(), 6 * PAGE);
    conforms(&dump);
    let want = vec![
        (Gpa::new(0x1000), bytes[..0x2000].to_vec()),
        (Gpa::new(0x10_0000), bytes[0x2000..].to_vec()),
    ];
    assert!(contents(&dump) == want);
    let wrong: LayoutSpec = "0-0x5000".parse().unwrap();
    assert!(matches!(
        Dump::open(&path, Some(&wrong)),
        Err(DumpError::LayoutLength {
            described: 0x5000,
            actual: 0x6000,
            ..
        })
    ));
}

/// VMMs that load an ELF kernel leave its header at the bottom of RAM.
#[test]
fn ram_that_begins_with_a_kernels_elf_header_is_raw() {
    const EXEC: u8 = 2;
    const CORE: u8 = 4;
    let folder = TempDir::new().unwrap();
    for (kind, pages, odd, raw) in [
        (EXEC, 4096, 0, true),
        (3, 4096, 0, true),
        (CORE, 4096, 0, false),
        // A program.
        (EXEC, 4095, 0, false),
        (EXEC, 4096, 8, false),
    ] {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        head.resize(64, 0);
        head[16] = kind;
        let path = file(&folder, "ram", &head);
        let sparse = OpenOptions::new().write(true).open(&path).unwrap();
        sparse.set_len(pages * PAGE + odd).unwrap();
        let format = Dump::open(&path, Some(&LayoutSpec::Flat)).map(|dump| dump.format());
        assert_eq!(format.is_ok(), raw, "kind {kind}, {pages} pages and {odd}");
        assert_eq!(format.unwrap_or("raw RAM"), "raw RAM");
    }
}

/// A range of a file with holes around it.
#[test]
fn holes_are_not_touched() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &[]);
    let sparse = OpenOptions::new().write(true).open(&path).unwrap();
    sparse.set_len(64 * PAGE).unwrap();
    sparse.write_all_at(&pattern(1, PAGE), 16 * PAGE).unwrap();
    sparse.write_all_at(&pattern(2, PAGE), 40 * PAGE).unwrap();
    let dump = Dump::open(&path, Some(&"0-0x20000,4G-0x100020000".parse().unwrap())).unwrap();
    conforms(&dump);
    let data = |at: u64| {
        dump.next_data(Gpa::new(at))
            .map(|r| (r.start().raw(), r.end().raw()))
    };
    assert_eq!(data(0), Some((16 * PAGE, 17 * PAGE)));
    assert_eq!(data(16 * PAGE + 5), Some((16 * PAGE + 5, 17 * PAGE)));
    assert_eq!(data(17 * PAGE), None);
    assert_eq!(
        data(1 << 32),
        Some(((1 << 32) + 8 * PAGE, (1 << 32) + 9 * PAGE))
    );
    // The copy has the same holes.
    let out = folder.path().join("out");
    let plan = plan(dump.layout(), &[(3, 2)]);
    let last = Arc::new(Mutex::new((0, 0)));
    let telling = Arc::clone(&last);
    let tell = move |done, total| *telling.lock().unwrap() = (done, total);
    let options = PruneOptions::new().progress(Arc::new(tell));
    let stats = dump.checked(&plan).prune_to(&out, &options).unwrap();
    // Syncing to disk comes last, of the whole file.
    let whole = dump.layout().bytes();
    assert_eq!(
        *last.lock().unwrap(),
        (whole, whole),
        "progress ends at the end"
    );
    assert!(stats.disk_after <= 2 * PAGE, "{stats:?}");
    assert!(fs::read(&out).unwrap() == fs::read(&path).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn copy_and_in_place_agree_with_a_model(
        zero in proptest::collection::vec((0_u64..64, 1_u64..8), 0..6),
        dropped in proptest::collection::vec((0_u64..40, 1_u64..8), 0..6),
        dropped_high in proptest::collection::vec((0x10_0000_u64..0x10_0018, 1_u64..8), 0..6),
    ) {
        let folder = TempDir::new().unwrap();
        let mut bytes = pattern(3, 64 * PAGE);
        for (first, count) in zero {
            let end = (first + count).min(64);
            bytes[usize::try_from(first * PAGE).unwrap()..usize::try_from(end * PAGE).unwrap()].fill(0);
        }
        let path = file(&folder, "ram", &bytes);
        let spec: LayoutSpec = "0-160K,0x100000000-0x100018000".parse().unwrap();
        let dump = Dump::open(&path, Some(&spec)).unwrap();
        let plan = plan(dump.layout(), &[dropped, dropped_high].concat());
        let want = pruned(&contents(&dump), &plan);
        let out = folder.path().join("out");
        let copied = dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
        let copy = Dump::open(&out, Some(&spec)).unwrap();
        prop_assert!(contents(&copy) == want);
        conforms(&copy);
        prop_assert!(contents(&dump) != want || copied.dropped_bytes == 0 || bytes.contains(&0), "input changed");
        let punched = dump.prune_in_place_with(&plan, &every_page()).unwrap();
        prop_assert_eq!(punched.dropped_bytes, copied.dropped_bytes);
        prop_assert_eq!(punched.dropped_bytes, plan.dropped_bytes());
        prop_assert_eq!(fs::metadata(&path).unwrap().len(), 64 * PAGE);
        // The mapping that was open all the while sees it, and so does a new one.
        prop_assert!(contents(&dump) == want);
        let again = Dump::open(&path, Some(&spec)).unwrap();
        prop_assert!(contents(&again) == want);
        conforms(&again);
        let twice = again.prune_in_place_with(&plan, &every_page()).unwrap();
        prop_assert_eq!((twice.punched, twice.runs), (0, punched.runs));
        prop_assert_eq!(twice.disk_before, twice.disk_after);
    }
}

#[test]
fn what_must_not_read_as_zero_is_kept() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &pattern(1, 16 * PAGE));
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan_with(
        dump.layout(),
        &[(2, 4)],
        PageClass::FreeBuddy,
        Fill::Byte(0xaa),
    );
    let out = folder.path().join("out");
    let stats = dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
    assert_eq!((stats.dropped_bytes, stats.kept_for_fill), (0, 4 * PAGE));
    let stats = dump.prune_in_place_with(&plan, &every_page()).unwrap();
    assert_eq!(
        (stats.dropped_bytes, stats.kept_for_fill, stats.runs),
        (0, 4 * PAGE, 0)
    );
    assert!(fs::read(&out).unwrap() == pattern(1, 16 * PAGE));
    assert!(fs::read(&path).unwrap() == pattern(1, 16 * PAGE));
}

/// A preallocated file looks like holes where nothing was written, but takes its space.
#[test]
fn preallocated_space_is_given_back() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &[]);
    let ram = OpenOptions::new().write(true).open(&path).unwrap();
    let allocated = fallocate(&ram, FallocateFlags::empty(), 0, 16 << 20).is_ok();
    if !sonicshot_testkit::has("preallocation in its temporary folder", allocated) {
        return;
    }
    ram.write_all_at(&pattern(1, PAGE), 0).unwrap();
    ram.sync_all().unwrap();
    drop(ram);
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(dump.layout(), &[(1, 4095)]);
    let stats = dump.prune_in_place_with(&plan, &every_page()).unwrap();
    assert!(
        stats.disk_before >= 16 << 20 && stats.disk_after <= 64 << 10,
        "{stats:?}"
    );
}

#[test]
fn an_output_appears_whole_or_not_at_all() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &pattern(1, 16 * PAGE));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(dump.layout(), &[(2, 4)]);
    let go = |out: &Path, overwrite| dump.prune_to(&plan, out, overwrite);

    let taken = file(&folder, "taken", b"precious");
    assert!(matches!(
        go(&taken, Overwrite::Refuse),
        Err(DumpError::Exists { .. })
    ));
    assert_eq!(fs::read(&taken).unwrap(), b"precious");
    // A link that leads nowhere is a name that is taken, too.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    assert!(matches!(
        go(&link, Overwrite::Refuse),
        Err(DumpError::Exists { .. })
    ));
    // Under any name, the input is not an output.
    let other_name = folder.path().join("other-name");
    fs::hard_link(&path, &other_name).unwrap();
    for same in [&path, &other_name] {
        assert!(matches!(
            go(same, Overwrite::Replace),
            Err(DumpError::SameFile { .. })
        ));
    }
    let nowhere = folder.path().join("no-such-folder/out");
    assert!(matches!(
        go(&nowhere, Overwrite::Refuse),
        Err(DumpError::Io { .. })
    ));
    let subfolder = folder.path().join("folder");
    fs::create_dir(&subfolder).unwrap();
    assert!(go(&subfolder, Overwrite::Replace).is_err());
    // Nor is a device such as /dev/null, or whatever else is no file.
    let socket = folder.path().join("socket");
    let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(matches!(
        go(&socket, Overwrite::Replace),
        Err(DumpError::Io { .. })
    ));
    assert!(!fs::metadata(&socket).unwrap().is_file());
    let before = ["folder", "link", "other-name", "ram", "socket", "taken"];
    assert_eq!(names(folder.path()), before, "something is left");

    go(&taken, Overwrite::Replace).unwrap();
    let fresh = folder.path().join("fresh");
    go(&fresh, Overwrite::Replace).unwrap();
    assert!(fs::read(&taken).unwrap() == fs::read(&fresh).unwrap());
    assert_eq!(
        fs::metadata(&fresh).unwrap().permissions().mode() & 0o777,
        0o640
    );
    assert_eq!(fs::metadata(&fresh).unwrap().nlink(), 1);
    assert_eq!(
        names(folder.path()),
        [
            "folder",
            "fresh",
            "link",
            "other-name",
            "ram",
            "socket",
            "taken"
        ]
    );
    assert!(fs::read(&path).unwrap() == pattern(1, 16 * PAGE));
}

/// Progress that panics half way is as good as any failure half way.
#[test]
fn a_failure_half_way_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &pattern(1, 4 << 20));
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(dump.layout(), &[(2, 4)]);
    let out = folder.path().join("out");
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let tell = |done: u64, _: u64| assert!(done < 2 << 20, "enough");
        let options = PruneOptions::new().progress(Arc::new(tell));
        dump.checked(&plan).prune_to(&out, &options)
    }));
    assert!(result.is_err());
    assert_eq!(names(folder.path()), ["ram"]);
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &pattern(1, 4 << 20));
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(dump.layout(), &[(2, 4)]);
    let out = folder.path().join("out");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let copied = dump.prune_to(&plan, &out, Overwrite::Refuse);
    assert!(matches!(copied, Err(DumpError::Changed { .. })));
    let punched = dump.prune_in_place_with(&plan, &every_page());
    assert!(matches!(punched, Err(DumpError::Changed { .. })));
    assert_eq!(names(folder.path()), ["ram"]);
}

#[test]
fn another_file_under_the_same_name_is_not_punched() {
    let folder = TempDir::new().unwrap();
    let path = file(&folder, "ram", &pattern(1, 16 * PAGE));
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(dump.layout(), &[(2, 4)]);
    let other = file(&folder, "other", &pattern(2, 16 * PAGE));
    fs::rename(&other, &path).unwrap();
    assert!(dump.prune_in_place_with(&plan, &every_page()).is_err());
    assert!(fs::read(&path).unwrap() == pattern(2, 16 * PAGE));
}

#[test]
fn other_formats_are_named_and_refused() {
    let folder = TempDir::new().unwrap();
    let table: [(&[u8], &str); 3] = [
        (b"\x89SONIC\r\n", "checkpoint"),
        (b"LibvirtQemudPart\x02\0\0\0", "unfinished"),
        (b"LZIP\x01", "lzip"),
    ];
    for (magic, word) in table {
        let mut bytes = magic.to_vec();
        bytes.resize(8192, 0);
        let path = file(&folder, "dump", &bytes);
        match Dump::open(&path, None) {
            Err(DumpError::NotRead { kind, .. }) => assert!(kind.contains(word), "{kind}"),
            other => panic!("{word}: {other:?}"),
        }
    }
    for magic in [
        &b"\x28\xb5\x2f\xfd"[..],
        b"\x1f\x8b\x08",
        b"\xfd7zXZ\0",
        b"BZh",
        b"PK\x03\x04",
    ] {
        let mut bytes = magic.to_vec();
        bytes.resize(8192, 0);
        let refused = Dump::open(file(&folder, "dump", &bytes), None);
        assert!(
            matches!(refused, Err(DumpError::Compressed { .. })),
            "{magic:x?}: {refused:?}"
        );
    }
    // Formats that are read, in files with nothing but their beginning.
    for magic in [
        &b"QEVM\0\0\0\x03"[..],
        b"KDUMP   \x06",
        b"makedumpfile",
        b"EMiL",
        b"AVML",
        b"LibvirtQemudSave\x02\0\0\0",
        b"Xen saved domain, xl format\n \0 \r",
        b"LibxlFmt\0\0\0\x02",
        b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x03",
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0",
    ] {
        let mut bytes = magic.to_vec();
        bytes.resize(8192, 0);
        assert!(Dump::open(file(&folder, "dump", &bytes), None).is_err());
    }
    for (bytes, word) in [(vec![], "empty"), (vec![1; 4095], "multiple")] {
        let path = file(&folder, "dump", &bytes);
        let error = Dump::open(&path, None).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    assert!(matches!(
        Dump::open(folder.path(), None),
        Err(DumpError::NotADump { .. })
    ));
    assert!(matches!(
        Dump::open(folder.path().join("absent"), None),
        Err(DumpError::Io { .. })
    ));
    // Files shorter than the longest magic.
    for len in 1..16 {
        let path = folder.path().join("short");
        File::create(&path)
            .unwrap()
            .write_all(&b"LibvirtQemudSave"[..len])
            .unwrap();
        assert!(Dump::open(&path, None).is_err());
    }
}
