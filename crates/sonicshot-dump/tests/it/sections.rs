//! QEMU's migration files with more in them than memory and devices, and behind something else.

use crate::common::qemu::{Block, File, PAGE, first_bytes, name, stream};
use crate::common::{Prunes, every_page, plan, replacing};
use sonicshot::GuestMemory;
use sonicshot_dump::{Dump, DumpError, DumpFormat, DumpOptions, Overwrite};
use std::fs;
use std::path::Path;

const RAM_ENDS: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";

fn footed(mut section: Vec<u8>, number: u8) -> Vec<u8> {
    section.extend([0x7e, 0, 0, 0, number]);
    section
}

/// The beginning, a part, and the end of the section with the bitmaps of a disk.
fn bitmaps() -> [Vec<u8>; 3] {
    let mut start = vec![1, 0, 0, 0, 7];
    name(&mut start, "dirty-bitmap");
    start.extend([0, 0, 0, 0, 0, 0, 0, 1]);
    start.extend(b"\x1c\x04disk\x03map\0\x01\0\0\x03\x01");
    let mut part = vec![2, 0, 0, 0, 7, 0x4c];
    part.extend(b"\x04disk\x03map");
    part.extend([0; 8]);
    part.extend([0, 0, 8, 0]);
    part.extend([0, 0, 0, 0, 0, 0, 0, 4, 0x5a, 0xa5, 0x5a, 0xa5, 1]);
    let end = vec![3, 0, 0, 0, 7, 0x20, 1];
    [footed(start, 7), footed(part, 7), footed(end, 7)]
}

/// A device's state, and the end of the file with its description.
fn devices() -> Vec<u8> {
    let mut out = vec![4, 0, 0, 0, 5];
    name(&mut out, "timer");
    out.extend([0, 0, 0, 0, 0, 0, 0, 2]);
    out.extend([9; 8]);
    let mut out = footed(out, 5);
    let description = br#"{"page_size":4096,"devices":[{"name":"timer","instance_id":0,"vmsd_name":"timer","version":2,"fields":[{"name":"x","type":"u64","size":8}]}]}"#;
    out.extend([0, 6]);
    out.extend((description.len() as u32).to_be_bytes());
    out.extend(description);
    out
}

/// The bytes before the records of pages, the records as a part of the memory, and the rest.
fn taken_apart() -> [Vec<u8>; 3] {
    let whole = stream();
    let find = |mut places: Vec<usize>| places.pop().unwrap() + RAM_ENDS.len();
    let all: Vec<usize> = (0..whole.len())
        .filter(|at| whole[*at..].starts_with(RAM_ENDS))
        .collect();
    let (first, last) = (find(all[..1].to_vec()), find(all));
    let mut records = whole[first..last].to_vec();
    // No part of it is the last.
    let ends = b"\x08\0\x0b\0\0\x03\0\0\0\x02";
    let at = records.windows(ends.len()).position(|there| there == ends);
    records[at.unwrap() + 5] = 2;
    [whole[..first].to_vec(), records, whole[last..].to_vec()]
}

fn open(folder: &Path, bytes: &[u8]) -> Result<Dump, DumpError> {
    let path = folder.join("file");
    fs::write(&path, bytes).unwrap();
    Dump::open(&path, None)
}

fn pruned(folder: &Path, dump: &Dump, runs: &[(u64, u64)]) -> Vec<u8> {
    let out = folder.join("out");
    dump.prune_to(&plan(dump.layout(), runs), &out, Overwrite::Replace)
        .unwrap();
    fs::read(out).unwrap()
}

const LAST_PART: &[u8] = b"\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";

#[test]
fn other_sections_between_the_memorys_parts_stay() {
    let folder = tempfile::tempdir().unwrap();
    let [head, records, rest] = taken_apart();
    let [start, part, end] = bitmaps();
    let seen = first_bytes(&open(folder.path(), &stream()).unwrap());
    let plain = [&head[..], &records, LAST_PART, &rest].concat();
    let runs = [(0, 2), (3, 2)];
    let plain = pruned(folder.path(), &open(folder.path(), &plain).unwrap(), &runs);
    let tables: [(Vec<&[u8]>, bool); 2] = [
        (
            vec![&head, &start, &part, &records, LAST_PART, &end, &rest],
            true,
        ),
        (
            vec![&head, &start, &records, &part, LAST_PART, &end, &rest],
            false,
        ),
    ];
    for (parts, converts) in tables {
        let dump = open(folder.path(), &parts.concat()).unwrap();
        assert_eq!(first_bytes(&dump), seen);
        let written = pruned(folder.path(), &dump, &runs);
        let mut without = written.clone();
        for section in [&start, &part, &end] {
            let at = without
                .windows(section.len())
                .position(|there| there == &section[..]);
            let at = at.expect("the section as it was");
            without.drain(at..at + section.len());
        }
        assert!(without == plain);
        let again = Dump::open(folder.path().join("out"), None).unwrap();
        assert_eq!(first_bytes(&again), [0, 0, 3, 0, 0, 6, 0, 8]);
        let out = folder.path().join("mapped");
        let converted = dump.to_mapped_ram(&out, &replacing());
        assert_eq!(converted.is_ok(), converts, "{converted:?}");
        assert!(converts || matches!(converted, Err(DumpError::CannotConvert { .. })));
    }
    // A part of what never began.
    let parts = [&head[..], &part, &records, LAST_PART, &rest].concat();
    let refused = open(folder.path(), &parts).unwrap_err();
    assert!(matches!(refused, DumpError::Malformed { .. }), "{refused}");
}

#[test]
fn memory_may_end_where_the_devices_begin() {
    let folder = tempfile::tempdir().unwrap();
    let [head, records, _] = taken_apart();
    let seen = first_bytes(&open(folder.path(), &stream()).unwrap());
    let devices = devices();
    let whole = [&head[..], &records, &devices].concat();
    let dump = open(folder.path(), &whole).unwrap();
    assert_eq!(first_bytes(&dump), seen);
    let written = pruned(folder.path(), &dump, &[(0, 2)]);
    assert!(written.ends_with(&devices));
    assert!(written.len() < whole.len());
    let again = Dump::open(folder.path().join("out"), None).unwrap();
    assert_eq!(first_bytes(&again), [0, 0, 3, 0, 5, 6, 0, 8]);
    // As the other kind, and back: with an end that all of QEMU's versions take.
    let (mapped, back) = (folder.path().join("mapped"), folder.path().join("back"));
    dump.to_mapped_ram(&mapped, &replacing()).unwrap();
    let mapped = Dump::open(&mapped, None).unwrap();
    assert_eq!(first_bytes(&mapped), seen);
    mapped.to_stream(&back, &replacing()).unwrap();
    assert_eq!(first_bytes(&Dump::open(&back, None).unwrap()), seen);
    // Without the description, or with memory behind the devices, nobody knows where memory ends.
    let undescribed = [&head[..], &records, &devices[..30]].concat();
    let more = [&head[..], &records, &devices[..32], &records, &devices].concat();
    for bytes in [undescribed, more] {
        let refused = open(folder.path(), &bytes).unwrap_err();
        assert!(
            refused.to_string().contains("among the memory's"),
            "{refused}"
        );
    }
}

#[test]
fn a_mapped_ram_file_without_a_last_part_tells_where_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let pages: Vec<_> = (0..8).map(|n| (n != 3).then_some(n + 1)).collect();
    let whole = File::new(vec![Block("pc.ram", pages)]).bytes();
    let end = b"\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01the devices' state";
    assert!(whole.ends_with(end));
    let bytes = [&whole[..whole.len() - end.len()], &devices()].concat();
    let dump = open(folder.path(), &bytes).unwrap();
    let out = folder.path().join("stream");
    dump.to_stream(&out, &replacing()).unwrap();
    let stream = Dump::open(&out, None).unwrap();
    assert_eq!(first_bytes(&stream), first_bytes(&dump));
    assert!(fs::read(&out).unwrap().ends_with(&devices()));
}

#[test]
fn a_file_behind_something_else_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let pages: Vec<_> = (0..40).map(|n| (n != 7).then_some(n + 1)).collect();
    let file = File::new(vec![
        Block("pc.ram", pages),
        Block("pc.rom", vec![Some(9); 3]),
    ]);
    let mut expected: Vec<u8> = (1..=40).collect();
    expected[7] = 0;
    expected[..6].fill(0);
    for before in [
        vec![0; 4096],
        b"whoever gave the name".repeat(70),
        vec![0; 2 << 20],
    ] {
        let dump = open(folder.path(), &file.bytes_behind(&before)).unwrap();
        assert_eq!(dump.format(), "QEMU mapped-ram");
        let out = pruned(folder.path(), &dump, &[(0, 6)]);
        assert_eq!(out[..before.len()], before);
        dump.prune_in_place_with(&plan(dump.layout(), &[(0, 6)]), &every_page())
            .unwrap();
        assert!(fs::read(folder.path().join("file")).unwrap() == out);
        let again = Dump::open(folder.path().join("out"), None).unwrap();
        assert_eq!(first_bytes(&again), expected);
    }
    let seen = first_bytes(&open(folder.path(), &stream()).unwrap());
    let behind = [&vec![0; 1 << 20][..], &stream()].concat();
    let dump = open(folder.path(), &behind).unwrap();
    assert_eq!(dump.format(), "QEMU migration stream");
    assert_eq!(first_bytes(&dump), seen);
    assert!(pruned(folder.path(), &dump, &[(0, 2)]).starts_with(&[0; 1 << 20]));
    let path = folder.path().join("file");
    for known in DumpFormat::all().filter(|format| *format != DumpFormat::RAW) {
        let known_as = DumpOptions::new().format(known).open(&path);
        assert_eq!(known_as.is_ok(), known.name() == "qemu", "{known}");
    }
    // One that was cut off is not memory for that.
    for before in [4096, 5 << 20] {
        let mut cut = file.bytes_behind(&vec![0; before]);
        cut.truncate(before + 8192);
        assert!(open(folder.path(), &cut).is_err(), "{before}");
    }
    // Too far behind, and behind too much that looks the same.
    let looks = b"QEVM\0\0\0\x03\x07".repeat(17);
    for before in [vec![0; 17 << 20], looks] {
        let opened = open(folder.path(), &file.bytes_behind(&before));
        assert!(opened.is_err() || opened.unwrap().format() == "raw RAM");
    }
    // Memory that has such bytes in it is memory, wherever they are.
    let mut ram = vec![1; 64 * PAGE];
    ram[3 * PAGE..][..stream().len()].copy_from_slice(&stream());
    assert_eq!(open(folder.path(), &ram).unwrap().format(), "raw RAM");
    let mut ram = vec![1; 64 * PAGE];
    let inside = file.bytes();
    ram[3 * PAGE..][..inside.len()].copy_from_slice(&inside);
    assert_eq!(open(folder.path(), &ram).unwrap().format(), "raw RAM");
}
