//! QEMU's mapped-ram files and migration streams: what is read, what a prune leaves, and files that
//! lie.

use crate::common::qemu::{Block, File, PAGE, first_bytes, stream, virtio_mem};
use crate::common::{Prunes, Ramfs, every_page};

use sonicshot::{
    DropClasses, Fill, Gpa, GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange, PrunePlan,
};
use sonicshot_dump::{BlockKind, Dump, DumpError, LayoutSpec, Overwrite, PruneOptions};
use std::fs;

fn ram(count: u8) -> Vec<Option<u8>> {
    (0..count).map(|n| (n % 5 != 2).then_some(n + 1)).collect()
}

fn plan(dump: &Dump, free: &[(u64, u64)]) -> PrunePlan {
    let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
    for (from, to) in free {
        map.set(
            PfnRange::new(Pfn::new(*from), Pfn::new(*to)),
            PageClass::FreeBuddy,
        );
    }
    PrunePlan::new(&map, &DropClasses::default(), Fill::Zero)
}

#[test]
fn pages_without_a_bit_are_zero_and_other_blocks_are_no_ram() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::new(vec![
        Block("ram0", ram(20)),
        Block("/rom@etc/acpi/tables", vec![Some(0x77); 30]),
        Block("vga.vram", vec![Some(0x66); 50]),
    ]);
    let dump = Dump::open(file.write(folder.path()), None).unwrap();
    assert_eq!(dump.format(), "QEMU mapped-ram");
    assert_eq!(dump.machine_type(), Some("pc-i440fx-10.0"));
    assert_eq!(dump.layout().bytes(), 20 * PAGE as u64);
    let expected: Vec<u8> = ram(20).iter().map(|page| page.unwrap_or(0)).collect();
    assert_eq!(first_bytes(&dump), expected);
}

#[test]
fn ram_lies_around_the_hole_that_the_layout_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = File::new(vec![Block("ram0", ram(20))]).write(folder.path());
    let layout: LayoutSpec = "0-0x5000,0x100000-0x10f000".parse().unwrap();
    let dump = Dump::open(&path, Some(&layout)).unwrap();
    let mut page = [0; 8];
    dump.read(Gpa::new(0x10_0000), &mut page).unwrap();
    assert_eq!(page, [6; 8], "the sixth page of the block");
    let wrong: LayoutSpec = "0-0x5000".parse().unwrap();
    let error = Dump::open(&path, Some(&wrong)).unwrap_err();
    assert!(matches!(error, DumpError::LayoutLength { .. }), "{error}");
}

#[test]
fn several_blocks_lie_where_the_layout_has_them() {
    let folder = tempfile::tempdir().unwrap();
    let blocks = vec![
        Block("ram-node0", ram(20)),
        Block("ram-node1", (0..12).map(|n| Some(0x80 + n)).collect()),
        Block("/objects/mem0", vec![Some(0x40); 4]),
        Block("pc.bios", vec![Some(0x55); 9]),
    ];
    let path = File::new(blocks).write(folder.path());
    // Alone, only the longest is known.
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(dump.layout().bytes(), 20 * PAGE as u64);
    let kinds: Vec<_> = dump.ram_blocks().iter().map(|block| block.kind).collect();
    use BlockKind::{Device, Ram};
    assert_eq!(kinds, [Ram, Ram, Ram, Device]);
    let text = "ram-node1=0x20000-0x24000,0x100000-0x108000;ram-node0=0-0x14000";
    let layout: LayoutSpec = text.parse().unwrap();
    let dump = Dump::open(&path, Some(&layout)).unwrap();
    let mut expected: Vec<u8> = ram(20).iter().map(|page| page.unwrap_or(0)).collect();
    expected.extend(0x80..0x8c);
    assert_eq!(first_bytes(&dump), expected);
    let before = fs::read(&path).unwrap();
    // Pages of both, and across the end of one.
    let plan = plan(&dump, &[(3, 9), (0x22, 0x30), (0x100, 0x102)]);
    let copy = folder.path().join("copy");
    dump.prune_to(&plan, &copy, Overwrite::Refuse).unwrap();
    dump.prune_in_place_with(&plan, &every_page()).unwrap();
    let after = fs::read(&path).unwrap();
    assert!(after == fs::read(&copy).unwrap());
    for dropped in [3, 4, 5, 6, 7, 8, 22, 23, 24, 25] {
        expected[dropped] = 0;
    }
    let pruned = Dump::open(&path, Some(&layout)).unwrap();
    assert_eq!(first_bytes(&pruned), expected);
    for byte in [0x40, 0x55] {
        let count = |file: &[u8]| file.iter().filter(|b| **b == byte).count();
        assert_eq!(count(&after), count(&before), "blocks that are not placed");
    }
    for (wrong, says) in [
        ("ram-node7=0-0x14000", "has no block of memory `ram-node7`"),
        (
            "ram-node0=0-0x14000;ram-node0=1M-0x114000",
            "`ram-node0` to place",
        ),
        (
            "ram-node0=0-0x13000",
            "describes 77824 bytes of RAM, the file has 81920",
        ),
        (
            "ram-node0=0-0x14000;ram-node1=0x10000-0x1c000",
            "invalid RAM layout",
        ),
    ] {
        let layout: LayoutSpec = wrong.parse().unwrap();
        let error = Dump::open(&path, Some(&layout)).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn a_virtio_mem_device_says_where_its_memory_is() {
    let folder = tempfile::tempdir().unwrap();
    let memory = "0000:00:02.0/vmem0";
    let mut file = File::new(vec![
        Block("ram0", ram(20)),
        Block(
            memory,
            (0..16).map(|n| (n < 8).then_some(0x80 + n)).collect(),
        ),
        Block("0000:00:03.0/vga", vec![Some(1); 16]),
    ]);
    let len = 16 * PAGE as u64;
    file.between = virtio_mem("0000:00:02.0", 1 << 32, len, 8192);
    let path = file.write(folder.path());
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(dump.layout().bytes(), 20 * PAGE as u64 + len);
    let mut word = [0; 2];
    dump.read(Gpa::new((1 << 32) + 7 * 4096), &mut word)
        .unwrap();
    assert_eq!(word, [0x87; 2]);
    // The same in a stream, where it stands behind the list of blocks.
    let mut bytes = stream();
    let at = bytes
        .windows(5)
        .position(|part| part == b"\x7e\0\0\0\x02")
        .unwrap()
        + 5;
    bytes.splice(at..at, virtio_mem("pc", 1 << 32, 8 * 4096, 4096));
    // Its block would be `pc/...`.
    let list = bytes
        .windows(7)
        .position(|part| part == b"\x06pc.rom")
        .unwrap();
    bytes[list + 3] = b'/';
    let list = bytes
        .windows(7)
        .rposition(|part| part == b"\x06pc.rom")
        .unwrap();
    bytes[list + 3] = b'/';
    let path = folder.path().join("stream");
    fs::write(&path, &bytes).unwrap();
    // Of another length than the device says: kept, as memory that is not known.
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(dump.ram_blocks()[1].kind, BlockKind::Ram);
    assert_eq!(first_bytes(&dump), [1, 0x77, 3, 0, 5, 6, 0, 8]);
    let fits = virtio_mem("pc", 1 << 32, 2 * 4096, 4096);
    bytes.splice(at..at + fits.len(), fits);
    fs::write(&path, &bytes).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(dump.ram_blocks()[1].kind, BlockKind::VirtioMem);
    assert_eq!(first_bytes(&dump), [1, 0x77, 3, 0, 5, 6, 0, 8, 0x55, 0]);

    for (at, len, piece) in [(u64::MAX, len, 8192), (0, len, 0), (0, 5, 1), (0, len, 1)] {
        file.between = virtio_mem("0000:00:02.0", at, len, piece);
        if piece == 1 {
            file.between.truncate(120);
        }
        let error = Dump::open(file.write(folder.path()), None).unwrap_err();
        assert!(matches!(error, DumpError::Malformed { .. }), "{error}");
    }
    // Over the RAM that the guest boots with.
    file.between = virtio_mem("0000:00:02.0", 0x1000, len, 8192);
    let error = Dump::open(file.write(folder.path()), None).unwrap_err();
    assert!(matches!(error, DumpError::Layout { .. }), "{error}");
}

#[test]
fn a_prune_clears_bits_and_punches_pages_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::new(vec![
        Block("ram0", ram(40)),
        Block("pc.bios", vec![Some(0x55); 9]),
    ]);
    let path = file.write(folder.path());
    let before = fs::read(&path).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(&dump, &[(3, 9), (20, 21), (33, 40)]);
    let copy = folder.path().join("copy");
    dump.prune_to(&plan, &copy, Overwrite::Refuse).unwrap();
    dump.prune_in_place_with(&plan, &every_page()).unwrap();
    let after = fs::read(&path).unwrap();
    assert!(after == fs::read(&copy).unwrap());
    assert_eq!(after.len(), before.len());
    let pruned = Dump::open(&path, None).unwrap();
    let dropped = |n: usize| (3..9).contains(&n) || n == 20 || n >= 33;
    let expected: Vec<u8> = ram(40)
        .iter()
        .enumerate()
        .map(|(n, page)| if dropped(n) { 0 } else { page.unwrap_or(0) })
        .collect();
    assert_eq!(first_bytes(&pruned), expected);
    // The same file as if QEMU had found those pages zero.
    let pages = ram(40).into_iter().enumerate();
    let same = File::new(vec![
        Block(
            "ram0",
            pages
                .map(|(n, page)| page.filter(|_| !dropped(n)))
                .collect(),
        ),
        Block("pc.bios", vec![Some(0x55); 9]),
    ]);
    assert!(after == same.bytes());
    // Again: nothing is left to do.
    let stats = pruned.prune_in_place_with(&plan, &every_page()).unwrap();
    assert_eq!(stats.punched, 0);
    assert!(fs::read(&path).unwrap() == after);
}

#[test]
fn what_an_interrupted_prune_has_left_is_punched_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = File::new(vec![Block("ram0", vec![Some(9); 64])]).write(folder.path());
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(&dump, &[(8, 60)]);
    let copy = folder.path().join("copy");
    dump.prune_to(&plan, &copy, Overwrite::Refuse).unwrap();
    // Bits cleared, pages still there: where a kill may come.
    let (mut bytes, pruned) = (fs::read(&path).unwrap(), fs::read(&copy).unwrap());
    let differ = (0..PAGE).find(|at| bytes[*at] != pruned[*at]).unwrap();
    bytes[differ..PAGE].copy_from_slice(&pruned[differ..PAGE]);
    fs::write(&path, &bytes).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(first_bytes(&dump)[8..60], [0; 52]);
    let stats = dump.prune_in_place_with(&plan, &every_page()).unwrap();
    assert!(stats.punched > 0);
    assert!(fs::read(&path).unwrap() == pruned);
}

#[test]
fn files_that_lie_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |edit: fn(&mut File)| {
        let mut file = File::new(vec![Block("ram0", ram(20)), Block("pc.rom", vec![Some(1)])]);
        edit(&mut file);
        let error = Dump::open(file.write(folder.path()), None).unwrap_err();
        assert!(!error.to_string().is_empty());
        error
    };
    let malformed = |edit| assert!(matches!(refused(edit), DumpError::Malformed { .. }));
    malformed(|file| file.edit = |header| header[0] = 2);
    malformed(|file| file.edit = |header| header[1] = 65536);
    malformed(|file| file.edit = |header| header[2] = 0);
    malformed(|file| file.edit = |header| header[2] = u64::MAX);
    malformed(|file| file.edit = |header| header[3] = 100);
    malformed(|file| file.edit = |header| header[3] = u64::MAX - 5);
    malformed(|file| file.edit = |header| header[3] = 1 << 40);
    malformed(|file| file.blocks.remove(0).1.clear());
    let other = refused(|file| file.machine = "isapc");
    assert!(matches!(other, DumpError::NoLayout { .. }), "{other}");
    let shared = refused(|file| file.capabilities.push("x-ignore-shared"));
    assert!(matches!(shared, DumpError::Unsupported { .. }), "{shared}");
    // Then it would be a stream, whose pages begin right here.
    malformed(|file| file.capabilities.clear());
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = File::new(vec![Block("ram0", ram(9)), Block("pc.rom", vec![Some(1)])]);
    let bytes = file.bytes();
    // The section's end and the devices' state are QEMU's to judge.
    let end = bytes.len() - 41;
    let path = folder.path().join("cut");
    for len in (0..400).chain((400..end).step_by(509)).chain([end - 1]) {
        fs::write(&path, &bytes[..len]).unwrap();
        Dump::open(&path, Some(&LayoutSpec::Flat)).unwrap_err();
    }
}

#[test]
fn of_a_stream_the_last_copy_of_a_page_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    fs::write(&path, stream()).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(dump.format(), "QEMU migration stream");
    assert_eq!(first_bytes(&dump), [1, 0x77, 3, 0, 5, 6, 0, 8]);
}

#[test]
fn a_pruned_stream_says_that_pages_are_zero_and_keeps_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("stream"), folder.path().join("out"));
    fs::write(&path, stream()).unwrap();
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(&dump, &[(0, 2), (3, 5)]);
    dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
    let pruned = Dump::open(&out, None).unwrap();
    assert_eq!(first_bytes(&pruned), [0, 0, 3, 0, 0, 6, 0, 8]);
    let (before, after) = (fs::read(&path).unwrap(), fs::read(&out).unwrap());
    // Pages 0 and 4 once, page 1 twice; a byte says that each is zero.
    assert_eq!(after.len(), before.len() - 4 * (PAGE - 1));
    assert!(after.ends_with(b"\x04 the devices' state"));
    assert_eq!(
        after.iter().filter(|byte| **byte == 0x55).count(),
        PAGE,
        "the ROM"
    );
    let nothing = PrunePlan::new(
        &PageMap::new(dump.layout(), PageSize::SIZE_4K),
        &DropClasses::default(),
        Fill::Zero,
    );
    dump.prune_to(&nothing, &out, Overwrite::Replace).unwrap();
    // Nothing is dropped but what is written over later: the first copy of page 1.
    let unpruned = fs::read(&out).unwrap();
    assert_eq!(unpruned.len(), before.len() - (PAGE - 1));
    let again = Dump::open(&out, None).unwrap();
    assert_eq!(first_bytes(&again), first_bytes(&dump));
    again.prune_to(&nothing, &path, Overwrite::Replace).unwrap();
    assert!(fs::read(&path).unwrap() == unpruned);
    assert!(matches!(
        dump.prune_in_place_with(&plan, &every_page()),
        Err(DumpError::NotInPlace { .. })
    ));
}

#[test]
fn a_stream_cut_short_or_of_another_kind_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let bytes = stream();
    let end = bytes.len() - 20;
    for len in (0..200).chain((200..end).step_by(97)) {
        fs::write(&path, &bytes[..len]).unwrap();
        Dump::open(&path, Some(&LayoutSpec::Flat)).unwrap_err();
    }
    // The kind of the first page's record: nothing known, a delta, a compressed page.
    let at = bytes
        .windows(7)
        .position(|part| part == b"\x08\x06pc.ra")
        .unwrap();
    for (kind, expected) in [
        (0x04, "unknown flags of a page record"),
        (0x80, "unknown flags of a page record"),
        (0x0a, "unknown flags of a page record"),
        (0x140, "unknown flags of a page record"),
        (0x40, "with deltas"),
        (0x100, "with compressed pages"),
    ] {
        let mut bytes = bytes.clone();
        bytes[at - 1..=at].copy_from_slice(&u16::to_be_bytes(kind));
        fs::write(&path, &bytes).unwrap();
        let error = Dump::open(&path, None).unwrap_err();
        match error {
            DumpError::Malformed { what, .. } => assert_eq!(what, expected, "{kind:#x}"),
            DumpError::Unsupported { kind: what, .. } => assert!(what.contains(expected), "{what}"),
            error => panic!("{kind:#x}: {error}"),
        }
    }
}

/// A file inside another one: a page lies in two blocks of the file system.
#[test]
fn pages_across_blocks_are_punched_inside_runs() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = File::new(vec![Block("ram0", vec![Some(9); 128])]);
    file.skew = 1000;
    let path = file.write(folder.path());
    let dump = Dump::open(&path, None).unwrap();
    // The first is in no whole block.
    let plan = plan(&dump, &[(8, 9), (20, 120)]);
    let stats = dump.prune_in_place_with(&plan, &every_page()).unwrap();
    assert_eq!((stats.runs, stats.punched, stats.left_runs), (2, 1, 1));
    assert_eq!(stats.left_bytes, 2 * PAGE as u64);
    let pruned = Dump::open(&path, None).unwrap();
    let dropped = |n: usize| n == 8 || (20..120).contains(&n);
    let want: Vec<u8> = (0..128).map(|n| if dropped(n) { 0 } else { 9 }).collect();
    assert_eq!(first_bytes(&pruned), want);
    let saved = stats.disk_before - stats.disk_after;
    assert!(saved >= 98 * PAGE as u64, "{stats:?}");
}

/// The marks of short ranges are cleared as well: that costs nothing.
#[test]
fn what_is_too_short_for_a_hole_is_no_page_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = File::new(vec![Block("ram0", vec![Some(9); 128])]).write(folder.path());
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(&dump, &[(8, 11), (20, 120)]);
    let options = PruneOptions::new().min_hole(4 * PAGE as u64);
    let stats = dump.prune_in_place_with(&plan, &options).unwrap();
    assert_eq!((stats.punched, stats.left_runs), (1, 1));
    assert_eq!(stats.left_bytes, 3 * PAGE as u64);
    let pruned = Dump::open(&path, None).unwrap();
    assert_eq!(first_bytes(&pruned)[8..11], [0; 3]);
    let bytes = fs::read(&path).unwrap();
    let at = |page: usize| bytes.len() - "the devices' state".len() - 31 - (128 - page) * PAGE;
    assert_eq!(bytes[at(8)..at(11)], [9; 3 * PAGE], "left as it was");
    assert_eq!(bytes[at(20)..at(120)], [0; 100 * PAGE]);
    // What is left can go later.
    let stats = pruned.prune_in_place_with(&plan, &every_page()).unwrap();
    assert_eq!((stats.punched, stats.left_bytes), (1, 0));
}

/// The marks must not be cleared before it is known that holes can be punched.
#[test]
fn without_holes_no_mark_is_cleared() {
    let Some(ramfs) = Ramfs::mount() else { return };
    let file = File::new(vec![Block("ram0", vec![Some(9); 64])]);
    let path = file.write(ramfs.path());
    let dump = Dump::open(&path, None).unwrap();
    let refused = dump.prune_in_place_with(&plan(&dump, &[(8, 60)]), &every_page());
    assert!(matches!(refused, Err(DumpError::NoHoles { .. })));
    assert!(fs::read(&path).unwrap() == file.bytes());
}

/// Every other page of 16 GiB, in a file that has none of them.
#[test]
fn a_file_of_holes_does_not_claim_pages_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("holes");
    let mut bytes = File::new(vec![Block("ram0", vec![Some(1); 8])]).bytes();
    let pages = 1_u64 << 22;
    let (bitmap, at) = (8192_u64, 1_u64 << 20);
    let total = bytes
        .windows(4)
        .position(|part| part == b"\x03ram")
        .unwrap()
        + 12;
    let block = total + 8 + 5;
    bytes[total..total + 8].copy_from_slice(&((pages * PAGE as u64) | 4).to_be_bytes());
    bytes[block..block + 8].copy_from_slice(&(pages * PAGE as u64).to_be_bytes());
    bytes[block + 20..block + 28].copy_from_slice(&bitmap.to_be_bytes());
    bytes[block + 28..block + 36].copy_from_slice(&at.to_be_bytes());
    bytes.truncate(4096);
    let write = |bits: u8| {
        let file = fs::File::create(&path).unwrap();
        let put = |bytes: &[u8], at| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at);
        put(&bytes, 0).unwrap();
        put(&vec![bits; pages as usize / 8], bitmap).unwrap();
        let end = at + pages * PAGE as u64;
        put(&0x10_u64.to_be_bytes(), end).unwrap();
        Dump::open(&path, None)
    };
    let error = write(0x55).unwrap_err();
    assert!(error.to_string().contains("more ranges"), "{error}");
    // All of it, or none: one range.
    assert_eq!(write(0xff).unwrap().layout().bytes(), pages * PAGE as u64);
    assert_eq!(write(0).unwrap().layout().bytes(), pages * PAGE as u64);
}
