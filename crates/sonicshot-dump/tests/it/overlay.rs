//! Diffs over their base, and the folders of VMMs.

use crate::common::*;
use proptest::prelude::*;
use sonicshot::{Fill, Gpa, GuestMemory, PageClass};
use sonicshot_dump::{
    CheckedPlan, Dump, DumpError, LayoutSpec, NewFolder, Overwrite, PruneOptions, SnapshotFiles,
    Vmm,
};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const STATE: u64 = 0x0710_1984_8664_0000;

/// A sparse file with a page of `pattern(seed)` or of zeroes where `pages` says so.
fn sparse(path: &Path, pages: &[Option<u64>]) -> PathBuf {
    let file = File::create(path).unwrap();
    file.set_len(pages.len() as u64 * PAGE).unwrap();
    for (number, seed) in (0_u64..).zip(pages) {
        if let Some(seed) = seed {
            file.write_all_at(&page(*seed), number * PAGE).unwrap();
        }
    }
    path.into()
}

fn page(seed: u64) -> Vec<u8> {
    if seed == 0 {
        vec![0; 4096]
    } else {
        pattern(seed, PAGE)
    }
}

/// The guest's memory: the diff's pages, else the base's.
fn merged(base: &[Option<u64>], diff: &[Option<u64>]) -> Vec<u8> {
    let pages = base.iter().zip(diff);
    pages
        .flat_map(|(base, diff)| page(diff.or(*base).unwrap_or(0)))
        .collect()
}

/// Copies the data of the diff over the base, as the VMM's tool does.
fn merge(base: &Path, diff: &Path) -> Vec<u8> {
    let mut bytes = fs::read(base).unwrap();
    let file = File::open(diff).unwrap();
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        let (from, to) = (
            usize::try_from(start).unwrap(),
            usize::try_from(at).unwrap(),
        );
        file.read_exact_at(&mut bytes[from..to], start).unwrap();
    }
    bytes
}

fn flat(memory: &dyn GuestMemory) -> Vec<u8> {
    contents(memory).into_iter().flat_map(|(_, b)| b).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_diff_over_its_base_is_the_guest(
        pages in proptest::collection::vec(
            (proptest::option::of(0_u64..3), proptest::option::of(0_u64..4), any::<bool>(), any::<bool>()),
            2..40,
        ),
        split in 1_usize..39,
    ) {
        let folder = TempDir::new().unwrap();
        let base_pages: Vec<_> = pages.iter().map(|page| page.0).collect();
        let diff_pages: Vec<_> = pages.iter().map(|page| page.1).collect();
        let (base, diff) = (folder.path().join("base"), folder.path().join("diff"));
        sparse(&base, &base_pages);
        sparse(&diff, &diff_pages);
        let split = split.min(pages.len() - 1) as u64 * PAGE;
        let end = (1 << 32) + pages.len() as u64 * PAGE - split;
        let layout: LayoutSpec = format!("0-{split},4G-{end}").parse().unwrap();
        let dump = Dump::open_over(&diff, &base, Some(&layout)).unwrap();
        conforms(&dump);
        let before = merged(&base_pages, &diff_pages);
        prop_assert!(flat(&dump) == before);

        // Free pages, and of the others those that are zero.
        let mut classes = vec![];
        for (number, page) in pages.iter().enumerate() {
            let zero = before[number * 4096..][..4096].iter().all(|byte| *byte == 0);
            let dropped = page.2 || page.3 && zero;
            let at = number as u64 * PAGE;
            let gpa = if at < split { at } else { at - split + (1 << 32) };
            if dropped {
                classes.push((gpa / PAGE, 1));
            }
        }
        let plan = plan(dump.layout(), &classes);
        let want = pruned(&contents(&dump), &plan);
        let want: Vec<u8> = want.into_iter().flat_map(|(_, bytes)| bytes).collect();

        let out = folder.path().join("out");
        let stats = dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
        prop_assert!(fs::read(&out).unwrap() == want);
        prop_assert_eq!(stats.dropped_bytes, plan.dropped_bytes());
        prop_assert!(merge(&base, &diff) == before, "a copy changes nothing");

        let stats = dump.prune_in_place(&plan).unwrap();
        let after = merge(&base, &diff);
        let mut kept = 0;
        for number in 0..pages.len() {
            let range = number * 4096..(number + 1) * 4096;
            let gpa = Gpa::new(number as u64 * PAGE);
            let gpa = if gpa.raw() < split { gpa } else { Gpa::new(gpa.raw() - split + (1 << 32)) };
            let is_dropped = classes.contains(&(gpa.raw() / PAGE, 1));
            let base_zero = base_pages[number].unwrap_or(0) == 0;
            if is_dropped && diff_pages[number].is_some() {
                if base_zero {
                    prop_assert!(after[range].iter().all(|byte| *byte == 0));
                } else {
                    kept += PAGE;
                    prop_assert!(after[range.clone()] == before[range], "what is kept stays");
                }
            } else {
                prop_assert!(after[range.clone()] == before[range]);
            }
        }
        prop_assert_eq!(stats.kept_for_base, kept);
        // The same file again, and nothing to do.
        let again = Dump::open_over(&diff, &base, Some(&layout)).unwrap();
        prop_assert_eq!(again.prune_in_place(&plan).unwrap().punched, 0);
    }
}

#[test]
fn a_page_that_must_not_read_as_zero_stays() {
    let folder = TempDir::new().unwrap();
    let base = sparse(&folder.path().join("base"), &[None, None, None]);
    let diff = sparse(&folder.path().join("diff"), &[Some(1), Some(2), None]);
    let dump = Dump::open_over(&diff, &base, None).unwrap();
    assert!(dump.format().contains("diff"));
    let poison = plan_with(
        dump.layout(),
        &[(0, 2)],
        PageClass::FreeBuddy,
        Fill::Byte(0xaa),
    );
    let stats = dump.prune_in_place(&poison).unwrap();
    assert_eq!((stats.punched, stats.kept_for_fill), (0, 2 * PAGE));
    let out = folder.path().join("out");
    dump.prune_to(&poison, &out, Overwrite::Refuse).unwrap();
    assert_eq!(
        fs::read(&out).unwrap(),
        merged(&[None; 3], &[Some(1), Some(2), None])
    );
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let folder = TempDir::new().unwrap();
    let base = sparse(&folder.path().join("base"), &[Some(1), None]);
    let longer = sparse(&folder.path().join("longer"), &[Some(1), None, None]);
    let diff = sparse(&folder.path().join("diff"), &[None, Some(2)]);
    let link = folder.path().join("link");
    symlink(&base, &link).unwrap();
    let elf = folder.path().join("elf");
    fs::write(&elf, b"\x7fELF").unwrap();
    assert!(Dump::open_over(&diff, &base, None).is_ok());
    for (path, base, word) in [(&diff, &longer, "lengths"), (&base, &link, "same file")] {
        let error = Dump::open_over(path, base, None).unwrap_err();
        assert!(matches!(error, DumpError::Base { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(Dump::open_over(&diff, &elf, None).is_err());
    // Neither file may be written over.
    let dump = Dump::open_over(&diff, &base, None).unwrap();
    let none = plan(dump.layout(), &[]);
    for out in [&base, &diff] {
        let error = dump.prune_to(&none, out, Overwrite::Replace).unwrap_err();
        assert!(matches!(error, DumpError::SameFile { .. }), "{error}");
    }
    // A base that has changed is no base.
    let writer = File::options().write(true).open(&base).unwrap();
    // File systems keep time in ticks.
    std::thread::sleep(std::time::Duration::from_millis(30));
    writer.write_all_at(&[1], 0).unwrap();
    let error = dump.prune_in_place(&none).unwrap_err();
    assert!(matches!(error, DumpError::Modified { .. }), "{error}");
    writer.set_len(PAGE).unwrap();
    let out = folder.path().join("out");
    for error in [
        dump.prune_to(&none, &out, Overwrite::Refuse),
        dump.prune_in_place(&none),
    ] {
        assert!(matches!(error, Err(DumpError::Changed { .. })), "{error:?}");
    }
}

fn firecracker(folder: &Path) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let state = [STATE.to_le_bytes().as_slice(), &[1; 99]].concat();
    fs::write(folder.join("vm.state"), state).unwrap();
    File::create(folder.join("vm.mem"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    folder.into()
}

fn cloud_hypervisor(folder: &Path, ranges: &[(u64, u64)]) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let table: Vec<_> = ranges
        .iter()
        .map(|(gpa, length)| format!(r#"{{\"gpa\":{gpa},\"length\":{length}}}"#))
        .collect();
    let state = format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshots":{{}},"snapshot_data":{{"state":"{{\"memory_ranges\":{{\"data\":[{}]}}}}"}}}}}},"snapshot_data":null}}"#,
        table.join(",")
    );
    fs::write(folder.join("state.json"), state).unwrap();
    fs::write(folder.join("config.json"), r#"{"memory":{"size":8192}}"#).unwrap();
    let len: u64 = ranges.iter().map(|(_, length)| length).sum();
    fs::write(folder.join("memory-ranges"), pattern(1, len)).unwrap();
    folder.into()
}

#[test]
fn ranges_lie_in_the_file_in_the_order_of_the_state() {
    let folder = TempDir::new().unwrap();
    let path = cloud_hypervisor(folder.path(), &[(1 << 32, 2 * PAGE), (0, 3 * PAGE)]);
    let bytes = pattern(1, 5 * PAGE);
    let high = usize::try_from(2 * PAGE).unwrap();
    for given in [path.clone(), path.join("memory-ranges")] {
        let files = SnapshotFiles::find(&given, None, None).unwrap();
        assert_eq!(files.vmm(), Some(Vmm::CLOUD_HYPERVISOR));
        assert_eq!(files.memory(), path.join("memory-ranges"));
        assert_eq!(files.folder().is_some(), given.is_dir());
        files.check_prunable().unwrap();
        let dump = Dump::open(files.memory(), files.layout()).unwrap();
        conforms(&dump);
        assert!(
            contents(&dump)
                == vec![
                    (Gpa::ZERO, bytes[high..].to_vec()),
                    (Gpa::new(1 << 32), bytes[..high].to_vec()),
                ]
        );
        // By copy and in place, holes are where the ranges are in the file.
        let plan = plan(dump.layout(), &[(0, 1), ((1 << 20) + 1, 1)]);
        let out = folder.path().join("out");
        dump.prune_to(&plan, &out, Overwrite::Replace).unwrap();
        let mut want = bytes.clone();
        want[4096..3 * 4096].fill(0);
        assert!(fs::read(&out).unwrap() == want);
    }
    let files = SnapshotFiles::find(&path, None, None).unwrap();
    let dump = Dump::open(files.memory(), files.layout()).unwrap();
    let plan = plan(dump.layout(), &[(0, 1), ((1 << 20) + 1, 1)]);
    dump.prune_in_place(&plan).unwrap();
    assert_eq!(
        fs::read(files.memory()).unwrap(),
        fs::read(folder.path().join("out")).unwrap()
    );
}

#[test]
fn a_layout_that_is_given_is_believed_and_the_rest_is_said() {
    let folder = TempDir::new().unwrap();
    let path = cloud_hypervisor(folder.path(), &[(0, 2 * PAGE)]);
    let given: LayoutSpec = "0x1000-0x3000".parse().unwrap();
    let files = SnapshotFiles::find(&path, None, Some(&given)).unwrap();
    assert_eq!(files.layout(), Some(&given));
    assert!(
        files.notes()[0]
            .to_string()
            .contains("is not that of state.json"),
        "{:?}",
        files.notes()
    );
    let same: LayoutSpec = "flat".parse().unwrap();
    assert!(
        SnapshotFiles::find(&path, None, Some(&same))
            .unwrap()
            .notes()
            .is_empty()
    );
    fs::write(path.join("state.json"), "[]").unwrap();
    assert!(matches!(
        SnapshotFiles::find(&path, None, None),
        Err(DumpError::Json { .. })
    ));
    let files = SnapshotFiles::find(&path, None, Some(&given)).unwrap();
    assert!(
        files.notes()[0].to_string().contains("not understood"),
        "{:?}",
        files.notes()
    );
}

#[test]
fn memory_that_is_not_fresh_is_not_pruned() {
    let folder = TempDir::new().unwrap();
    let path = cloud_hypervisor(folder.path(), &[(0, 2 * PAGE)]);
    let config = r#"{"memory":{"zones":[{"id":"a","file":"/ram","shared":false}]}}"#;
    fs::write(path.join("config.json"), config).unwrap();
    for given in [path.clone(), path.join("memory-ranges")] {
        let files = SnapshotFiles::find(&given, None, None).unwrap();
        let error = files.check_prunable().unwrap_err();
        assert!(matches!(error, DumpError::CannotPrune { .. }), "{error}");
    }
}

#[test]
fn a_folder_is_told_by_what_is_in_it() {
    let temporary = TempDir::new().unwrap();
    let at = |name: &str| temporary.path().join(name);
    let find = |path: &Path, base: Option<&Path>| SnapshotFiles::find(path, base, None);

    let plain = at("plain");
    fs::create_dir(&plain).unwrap();
    fs::write(plain.join("file"), "x").unwrap();
    fs::create_dir(plain.join("more")).unwrap();
    firecracker(&plain.join("more"));
    let error = find(&plain, None).unwrap_err();
    assert!(matches!(error, DumpError::NotASnapshot { .. }), "{error}");

    let pair = firecracker(&at("pair"));
    fs::write(pair.join("log"), "not a MiB").unwrap();
    fs::write(
        pair.join("kernel"),
        [b"\x7fELF".as_slice(), &[0; (1 << 20) - 4]].concat(),
    )
    .unwrap();
    let files = find(&pair, None).unwrap();
    assert_eq!(files.vmm(), Some(Vmm::FIRECRACKER));
    assert_eq!(files.memory(), pair.join("vm.mem"));
    // The state alone is no memory.
    let error = Dump::open(pair.join("vm.state"), None).unwrap_err();
    assert!(error.to_string().contains("Firecracker"), "{error}");

    // Two that may be meant; a base is not.
    fs::copy(pair.join("vm.mem"), pair.join("base.mem")).unwrap();
    let error = find(&pair, None).unwrap_err().to_string();
    assert!(error.contains("base.mem, vm.mem"), "{error}");
    let files = find(&pair, Some(&pair.join("base.mem"))).unwrap();
    assert_eq!(files.memory(), pair.join("vm.mem"));
    assert_eq!(files.base(), Some(pair.join("base.mem").as_path()));

    fs::remove_file(pair.join("base.mem")).unwrap();
    fs::copy(pair.join("vm.state"), pair.join("again")).unwrap();
    let error = find(&pair, None).unwrap_err().to_string();
    assert!(error.contains("again, vm.state"), "{error}");
    fs::remove_file(pair.join("again")).unwrap();
    fs::remove_file(pair.join("vm.mem")).unwrap();
    assert!(matches!(find(&pair, None), Err(DumpError::NotADump { .. })));

    let cloud = cloud_hypervisor(&at("cloud"), &[(0, PAGE)]);
    fs::remove_file(cloud.join("memory-ranges")).unwrap();
    let error = find(&cloud, None).unwrap_err().to_string();
    assert!(error.contains("without `memory-ranges`"), "{error}");
}

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    let temporary = TempDir::new().unwrap();
    let at = |name: &str| temporary.path().join(name);
    let input = firecracker(&at("in"));
    let disk = sparse(&input.join("disk"), &[None, Some(1), None, None]);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(&input, fs::Permissions::from_mode(0o750)).unwrap();
    let find = || SnapshotFiles::find(&input, None, None).unwrap();
    let out = at("out");
    // Given up half way.
    drop(NewFolder::create(&out, Overwrite::Refuse, &find()).unwrap());
    assert_eq!(names(temporary.path()), ["in"]);

    let make = |overwrite, memory: &[u8]| {
        let folder = NewFolder::create(&out, overwrite, &find())?;
        let file = input.join("vm.mem");
        fs::write(&file, memory).unwrap();
        let dump = Dump::open(&file, None).unwrap();
        let nothing = plan(dump.layout(), &[]);
        folder.write_memory(
            &CheckedPlan::unchecked(&dump, &nothing),
            &PruneOptions::new(),
        )?;
        folder.finish()
    };
    make(Overwrite::Refuse, &vec![1; 1 << 20]).unwrap();
    assert_eq!(names(temporary.path()), ["in", "out"]);
    assert_eq!(names(&out), ["disk", "vm.mem", "vm.state"]);
    assert_eq!(fs::read(out.join("vm.mem")).unwrap(), vec![1; 1 << 20]);
    for name in ["disk", "vm.state"] {
        let (a, b) = (fs::read(input.join(name)), fs::read(out.join(name)));
        assert_eq!(a.unwrap(), b.unwrap());
    }
    let copied = fs::metadata(out.join("disk")).unwrap();
    assert_eq!(
        copied.blocks(),
        fs::metadata(&disk).unwrap().blocks(),
        "holes stay holes"
    );
    assert_eq!(copied.mode() & 0o777, 0o640);
    assert_eq!(fs::metadata(&out).unwrap().mode() & 0o777, 0o750);

    // Replaced only when told, as a whole, and only a snapshot.
    let error = make(Overwrite::Refuse, b"").unwrap_err();
    assert!(matches!(error, DumpError::Exists { .. }), "{error}");
    // With nothing of somebody else's.
    fs::write(out.join("old"), "x").unwrap();
    let error = make(Overwrite::Replace, b"").unwrap_err();
    assert!(
        matches!(&error, DumpError::Foreign { path } if *path == out.join("old")),
        "{error}"
    );
    assert_eq!(names(&out), ["disk", "old", "vm.mem", "vm.state"]);
    assert_eq!(fs::read(out.join("vm.mem")).unwrap()[0], 1, "as it was");
    fs::remove_file(out.join("old")).unwrap();
    make(Overwrite::Replace, &vec![2; 1 << 20]).unwrap();
    assert_eq!(names(&out), ["disk", "vm.mem", "vm.state"]);
    assert_eq!(fs::read(out.join("vm.mem")).unwrap()[0], 2);
    assert_eq!(names(temporary.path()), ["in", "out"]);
    fs::create_dir(out.join("precious")).unwrap();
    let error = make(Overwrite::Replace, b"").unwrap_err();
    assert!(matches!(error, DumpError::Folder { .. }), "{error}");
    fs::remove_dir(out.join("precious")).unwrap();
    fs::remove_file(out.join("vm.state")).unwrap();
    let error = make(Overwrite::Replace, b"").unwrap_err();
    assert!(matches!(error, DumpError::Folder { .. }), "{error}");
    assert_eq!(names(&out), ["disk", "vm.mem"], "as it was");

    // It appeared meanwhile.
    let late = at("late");
    let folder = NewFolder::create(&late, Overwrite::Refuse, &find()).unwrap();
    fs::create_dir(&late).unwrap();
    let error = folder.finish().unwrap_err();
    assert!(matches!(error, DumpError::Exists { .. }), "{error}");

    for (out, word) in [
        (input.clone(), "is an input"),
        (input.join("x"), "lie in the folder"),
    ] {
        let error = NewFolder::create(&out, Overwrite::Replace, &find()).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    symlink("disk", input.join("link")).unwrap();
    let error = NewFolder::create(&at("new"), Overwrite::Refuse, &find()).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    assert_eq!(names(temporary.path()), ["in", "late", "out"]);
}

/// A finding in a file must be what is copied: a state that changed tells of another layout.
#[test]
fn a_file_of_a_folder_that_changed_since_it_was_looked_at_is_not_copied() {
    let temporary = TempDir::new().unwrap();
    let input = firecracker(&temporary.path().join("in"));
    let state = input.join("vm.state");
    let whole = fs::read(&state).unwrap();
    let found = SnapshotFiles::find(&input, None, None).unwrap();
    let out = temporary.path().join("out");
    let create = || NewFolder::create(&out, Overwrite::Refuse, &found);
    let cut = |len: usize| fs::write(&state, &whole[..len]).unwrap();
    cut(whole.len() / 2);
    let error = create().unwrap_err();
    assert!(
        matches!(&error, DumpError::Changed { path, .. } if *path == state),
        "{error}"
    );
    // Of the same length again, but it was written to.
    cut(whole.len());
    let error = create().unwrap_err();
    assert!(
        matches!(&error, DumpError::Modified { path } if *path == state),
        "{error}"
    );
    assert_eq!(names(temporary.path()), ["in"]);
}

/// In place its target would be pruned, which may be another snapshot's memory too.
#[test]
fn a_folder_with_a_link_for_its_memory_is_refused_by_copy_and_in_place() {
    let temporary = TempDir::new().unwrap();
    let at = |name: &str| temporary.path().join(name);
    for (folder, memory) in [
        (firecracker(&at("pair")), "vm.mem"),
        (
            cloud_hypervisor(&at("cloud"), &[(0, PAGE)]),
            "memory-ranges",
        ),
    ] {
        let find = || SnapshotFiles::find(&folder, None, None).unwrap();
        let file = folder.join(memory);
        find().check_prunable().unwrap();
        fs::rename(&file, at("elsewhere")).unwrap();
        symlink(at("elsewhere"), &file).unwrap();
        for error in [
            find().check_prunable().unwrap_err(),
            NewFolder::create(&at("out"), Overwrite::Refuse, &find()).unwrap_err(),
        ] {
            assert!(
                matches!(&error, DumpError::Folder { path, .. } if *path == file),
                "{error}"
            );
        }
        // Given by its own name it is what it leads to.
        SnapshotFiles::find(at("elsewhere"), None, None)
            .unwrap()
            .check_prunable()
            .unwrap();
    }
}
