//! kdump-compressed dumps: files built here byte by byte, damaged ones, and what is written and
//! read back.

use proptest::prelude::*;
use sonicshot::{
    Architecture, DropClasses, Fill, Gpa, GpaRange, GuestMemory, MemoryError, PageClass, PageMap,
    PageSize, Pfn, PfnRange, PrunePlan, RamLayout,
};
use sonicshot_dump::{
    CheckedPlan, Dump, DumpError, Incomplete, KdumpCompression, KdumpFile, KdumpOptions,
    KdumpWriteError, PruneOptions, write_kdump_without,
};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    Plain,
    Zlib,
    Lzo,
    Snappy,
    Zstd,
}

const EVERY: [How; 5] = [How::Plain, How::Zlib, How::Lzo, How::Snappy, How::Zstd];

/// A page that each way of compressing makes smaller, LZO by hand: 100 bytes, the last of which
/// goes on to the end.
fn page_of(pfn: u64, size: usize) -> Vec<u8> {
    let mut page: Vec<u8> = (0..100_u64).map(|i| (pfn * 7 + i * i) as u8).collect();
    page.resize(size, page[99]);
    page
}

/// A number as LZO1X writes it behind an instruction: 255 for each zero byte, then the rest.
fn lzo_number(out: &mut Vec<u8>, mut number: usize) {
    while number > 255 {
        out.push(0);
        number -= 255;
    }
    out.push(number as u8);
}

fn compress(how: How, page: &[u8]) -> (u32, Vec<u8>) {
    match how {
        How::Plain => (0, page.to_vec()),
        How::Zlib => {
            let mut encoder =
                flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
            encoder.write_all(page).unwrap();
            (1, encoder.finish().unwrap())
        }
        How::Lzo => {
            let mut out = vec![0];
            lzo_number(&mut out, 100 - 18);
            out.extend(&page[..100]);
            out.push(0x20);
            lzo_number(&mut out, page.len() - 100 - 33);
            out.extend([0, 0, 0x11, 0, 0]);
            (2, out)
        }
        How::Snappy => (4, snap::raw::Encoder::new().compress_vec(page).unwrap()),
        How::Zstd => (0x20, zstd::bulk::compress(page, 3).unwrap()),
    }
}

/// A kdump file to be.
#[derive(Clone)]
struct Build {
    version: u32,
    block: usize,
    machine: &'static str,
    /// Frames that exist, and those of them that are in the file with what holds them.
    present: Vec<u64>,
    dumped: Vec<(u64, How)>,
    /// Frames whose pages are zero, in the file.
    zero: Vec<u64>,
    max_frames: u64,
    status: u32,
    vmcoreinfo: Vec<u8>,
    notes: Vec<u8>,
}

impl Build {
    fn new() -> Self {
        let dumped = EVERY.iter().map(|how| (*how as u64 * 3 + 1, *how));
        Self {
            version: 6,
            block: 4096,
            machine: "x86_64",
            present: (0..30).chain(600..1300).collect(),
            dumped: dumped.chain([(1299, How::Zlib), (700, How::Lzo)]).collect(),
            zero: vec![2, 29, 600, 601],
            max_frames: 1300,
            status: 1,
            vmcoreinfo: b"OSRELEASE=6.1.0\n".to_vec(),
            notes: Vec::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let b = self.block;
        let bitmap = ((self.max_frames as usize).div_ceil(8)).div_ceil(b) * b;
        let present = 2 * b;
        let dumped = present + bitmap;
        let descriptors = dumped + bitmap;
        let mut pages: Vec<(u64, Option<How>)> = self
            .dumped
            .iter()
            .map(|(f, how)| (*f, Some(*how)))
            .collect();
        pages.extend(self.zero.iter().map(|frame| (*frame, None)));
        pages.sort_by_key(|(frame, _)| *frame);
        let data = descriptors + pages.len() * 24;
        let mut out = vec![0; data];
        let put = |out: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(&mut out, 0, b"KDUMP   ");
        put(&mut out, 8, &self.version.to_le_bytes());
        put(&mut out, 12 + 4 * 65, self.machine.as_bytes());
        let fields = [
            self.status,
            b as u32,
            1,
            (bitmap / b * 2) as u32,
            self.max_frames as u32,
        ];
        for (i, field) in fields.iter().enumerate() {
            put(&mut out, 424 + 4 * i, &field.to_le_bytes());
        }
        if self.version >= 3 {
            put(&mut out, b + 32, &(b as u64 + 200).to_le_bytes());
            put(
                &mut out,
                b + 40,
                &(self.vmcoreinfo.len() as u64).to_le_bytes(),
            );
        }
        if self.version >= 4 {
            put(&mut out, b + 48, &(b as u64 + 1000).to_le_bytes());
            put(&mut out, b + 56, &(self.notes.len() as u64).to_le_bytes());
        }
        if self.version >= 6 {
            put(&mut out, b + 96, &self.max_frames.to_le_bytes());
        }
        put(&mut out, b + 200, &self.vmcoreinfo);
        put(&mut out, b + 1000, &self.notes);
        for frame in &self.present {
            out[present + *frame as usize / 8] |= 1 << (frame % 8);
        }
        out.resize(data + b, 0); // the page of zeroes
        for (i, (frame, how)) in pages.iter().enumerate() {
            out[dumped + *frame as usize / 8] |= 1 << (frame % 8);
            let (at, flags, len) = match how {
                None => (data, 0, b),
                Some(how) => {
                    let (flags, bytes) = compress(*how, &page_of(*frame, b));
                    let at = out.len();
                    out.extend(&bytes);
                    (at, flags, bytes.len())
                }
            };
            let at_descriptor = descriptors + 24 * i;
            put(&mut out, at_descriptor, &(at as u64).to_le_bytes());
            put(&mut out, at_descriptor + 8, &(len as u32).to_le_bytes());
            put(&mut out, at_descriptor + 12, &flags.to_le_bytes());
        }
        out
    }

    /// The content that frame `frame` must read as: `None` if it is not RAM, `Some(None)` if it is absent.
    fn want(&self, frame: u64) -> Option<Option<Vec<u8>>> {
        if !self.present.contains(&frame) {
            return None;
        }
        Some(if self.zero.contains(&frame) {
            Some(vec![0; self.block])
        } else if self.dumped.iter().any(|(f, _)| *f == frame) {
            Some(page_of(frame, self.block))
        } else {
            None
        })
    }

    fn check(&self, dump: &KdumpFile) {
        for frame in 0..self.max_frames + 3 {
            let at = Gpa::new(frame * self.block as u64);
            let mut got = vec![0xee; self.block];
            match (dump.read(at, &mut got), self.want(frame)) {
                (Err(MemoryError::NotRam { .. }), None)
                | (Err(MemoryError::Absent { .. }), Some(None)) => {}
                (Ok(()), Some(Some(want))) => {
                    assert!(got == want, "{frame}");
                    // The same by small pieces, which the cache serves.
                    for inside in [0, 4, 96, 98, self.block - 4] {
                        let word = dump.read_u32(at.checked_add(inside as u64).unwrap());
                        let want = u32::from_le_bytes(want[inside..inside + 4].try_into().unwrap());
                        assert_eq!(word.unwrap(), want, "{frame} {inside}");
                    }
                }
                (got, want) => panic!("{frame}: {got:?}, want {:?}", want.map(|w| w.is_some())),
            }
        }
    }
}

/// A flattened file: records of (offset, bytes).
fn flattened<'a>(records: impl IntoIterator<Item = (usize, &'a [u8])>) -> Vec<u8> {
    let mut out = b"makedumpfile\0\0\0\0".to_vec();
    out.extend(1_i64.to_be_bytes());
    out.extend(1_i64.to_be_bytes());
    out.resize(4096, 0);
    for (offset, bytes) in records {
        out.extend((offset as i64).to_be_bytes());
        out.extend((bytes.len() as i64).to_be_bytes());
        out.extend(bytes);
    }
    out.extend([0xff; 16]);
    out
}

struct Place {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump");
        Self {
            _folder: folder,
            path,
        }
    }

    fn with(bytes: &[u8]) -> Self {
        let place = Self::new();
        std::fs::write(&place.path, bytes).unwrap();
        place
    }

    fn open(&self) -> Result<KdumpFile, DumpError> {
        KdumpFile::open(&self.path)
    }
}

fn open(bytes: &[u8]) -> Result<KdumpFile, DumpError> {
    Place::with(bytes).open()
}

/// A `CORE` note of a kind and length.
fn note(kind: u32, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for field in [5, len as u32, kind] {
        out.extend(field.to_le_bytes());
    }
    out.extend(b"CORE\0\0\0\0");
    out.resize(out.len() + len.next_multiple_of(4), 7);
    out
}

#[test]
fn reads_every_compression_version_and_page_size() {
    for version in 1..=6 {
        for block in [4096, 16384, 65536] {
            let build = Build {
                version,
                block,
                ..Build::new()
            };
            let dump = open(&build.bytes()).unwrap();
            build.check(&dump);
            assert_eq!(dump.layout().regions().len(), 2);
            assert_eq!(dump.page_size().bytes(), block as u64);
            assert_eq!(dump.machine(), Some(Architecture::X86_64));
            assert_eq!(dump.dumped_frames(), 11);
            let info = (version >= 3).then_some(&b"OSRELEASE=6.1.0\n"[..]);
            assert_eq!(dump.vmcoreinfo(), info);
            assert!(!dump.is_flattened());
        }
    }
}

#[test]
fn finds_processor_and_vmcoreinfo_in_the_notes() {
    for (len, machine) in [
        (336, Some(Architecture::X86_64)),
        (392, Some(Architecture::Aarch64)),
        (100, None),
    ] {
        let mut notes = note(6, 20);
        notes.extend(note(1, len));
        notes.extend(b"\x0b\0\0\0\x03\0\0\0\0\0\0\0VMCOREINFO\0\0a=b");
        let build = Build {
            machine: "Unknown",
            vmcoreinfo: Vec::new(),
            notes: notes.clone(),
            ..Build::new()
        };
        let dump = open(&build.bytes()).unwrap();
        assert_eq!(dump.machine(), machine);
        assert_eq!(dump.vmcoreinfo(), Some(&b"a=b"[..]));
        assert_eq!(dump.notes(), Some(notes.as_slice()));
    }
}

#[test]
fn reads_across_pages_and_says_what_is_missing() {
    let build = Build::new();
    let dump = open(&build.bytes()).unwrap();
    let mut got = vec![1; 96 + 4096];
    dump.read(Gpa::new(4096 + 4000), &mut got).unwrap();
    assert!(got[..96] == page_of(1, 4096)[4000..] && got[96..].iter().all(|b| *b == 0));
    // Frame 3 exists, and is not in the file.
    match dump.read(Gpa::new(2 * 4096 + 4000), &mut got) {
        Err(MemoryError::Absent { range }) => assert_eq!(range.start(), Gpa::new(3 * 4096)),
        other => panic!("{other:?}"),
    }
    // What is absent is not zero.
    let data = dump.next_data(Gpa::new(3 * 4096)).unwrap();
    assert_eq!(data.start(), Gpa::new(3 * 4096));
}

#[test]
fn a_shorter_max_mapnr_ends_the_guest_and_a_longer_one_is_refused() {
    let build = Build::new();
    let mut bytes = build.bytes();
    bytes[4096 + 96..4096 + 104].copy_from_slice(&25_u64.to_le_bytes());
    assert_eq!(open(&bytes).unwrap().layout().end(), Gpa::new(25 * 4096));
    for lie in [3 * 4096 * 8, 1 << 33, u64::MAX, u64::MAX - 7] {
        bytes[4096 + 96..4096 + 104].copy_from_slice(&lie.to_le_bytes());
        let error = open(&bytes).unwrap_err();
        assert!(
            matches!(error, DumpError::Malformed { offset, .. } if offset.raw() == 440),
            "{error}"
        );
    }
}

#[test]
fn refuses_what_it_does_not_know() {
    let change = |at: usize, with: &[u8]| {
        let mut bytes = Build::new().bytes();
        bytes[at..at + with.len()].copy_from_slice(with);
        open(&bytes).unwrap_err()
    };
    let malformed = |error: DumpError, want: u64| match error {
        DumpError::Malformed { offset, .. } => assert_eq!(offset.raw(), want),
        other => panic!("{other}"),
    };
    malformed(change(0, b"KDUMP  1"), 0);
    malformed(change(8, &7_u32.to_le_bytes()), 8);
    malformed(change(428, &8192_u32.to_le_bytes()), 428);
    malformed(change(432, &0_u32.to_le_bytes()), 432);
    malformed(change(432, &u32::MAX.to_le_bytes()), 432);
    malformed(change(436, &u32::MAX.to_le_bytes()), 436);
    malformed(change(436, &0_u32.to_le_bytes()), 436);
    malformed(change(4096 + 40, &u64::MAX.to_le_bytes()), 4096 + 32);
    malformed(change(4096 + 32, &u64::MAX.to_le_bytes()), 4096 + 32);
    let unsupported = |error| assert!(matches!(error, DumpError::Unsupported { .. }), "{error}");
    unsupported(change(8, &6_u32.to_be_bytes()));
    // No RAM at all.
    let error = change(8192, &[0; 4096]);
    assert!(matches!(error, DumpError::Layout { .. }), "{error}");
}

#[test]
fn reads_what_a_full_disk_left_of_a_dump() {
    let build = Build {
        status: 1 | 8,
        ..Build::new()
    };
    let bytes = build.bytes();
    let cut = &bytes[..bytes.len() - 10];
    let dump = open(cut).unwrap();
    let mut page = vec![0; 4096];
    dump.read(Gpa::new(4096), &mut page).unwrap();
    assert_eq!(page, page_of(1, 4096));
    let last = dump.read(Gpa::new(1299 * 4096), &mut page);
    assert!(matches!(last, Err(MemoryError::Absent { .. })), "{last:?}");
}

/// Whoever is killed while it is written has no time to say so.
#[test]
fn reads_what_a_killed_writer_left_of_a_dump() {
    let build = Build::new();
    let mut bytes = build.bytes();
    let mut frames: Vec<u64> = build.dumped.iter().map(|(frame, _)| *frame).collect();
    frames.extend(&build.zero);
    frames.sort_unstable();
    // Behind two headers and two bitmaps of a block.
    let descriptors = 4 * 4096;
    let written = frames.len() - 3;
    bytes[descriptors + written * 24..descriptors + frames.len() * 24].fill(0);
    let dump = open(&bytes).unwrap();
    assert_eq!(dump.incomplete(), Some(&Incomplete::Unwritten));
    for (number, frame) in frames.iter().enumerate() {
        let mut got = vec![0; 4096];
        let read = dump.read(Gpa::new(frame * 4096), &mut got);
        if number < written {
            assert!(read.is_ok() && Some(Some(got)) == build.want(*frame));
        } else {
            assert!(matches!(read, Err(MemoryError::Absent { .. })), "{read:?}");
        }
    }
    check_cut(&build, &dump);
    // One that is wrong among those that are right is an error.
    bytes[descriptors..descriptors + 24].fill(0);
    bytes[descriptors + written * 24..descriptors + frames.len() * 24].copy_from_slice(
        &build.bytes()[descriptors + written * 24..descriptors + frames.len() * 24],
    );
    if let Ok(dump) = open(&bytes) {
        let read = dump.read(Gpa::new(frames[0] * 4096), &mut [0; 4096]);
        assert!(matches!(read, Err(MemoryError::Backend { .. })), "{read:?}");
    }
}

#[test]
fn a_flattened_file_reads_the_same_in_any_order() {
    let build = Build::new();
    let bytes = build.bytes();
    for size in [97, 4096, 5000, bytes.len()] {
        let mut records: Vec<_> = bytes.chunks(size).enumerate().collect();
        records.reverse();
        let middle = records.len() / 2;
        records.rotate_left(middle);
        let flat = flattened(records.iter().map(|(i, part)| (i * size, *part)));
        let dump = open(&flat).unwrap();
        assert!(dump.is_flattened());
        build.check(&dump);
    }
}

#[test]
fn later_records_override_earlier_ones() {
    let build = Build::new();
    let bytes = build.bytes();
    let junk = vec![0xa5; bytes.len()];
    // All junk first, then the truth in two layers, one of them in overlapping pieces.
    let mut records: Vec<(usize, &[u8])> = vec![(0, &junk)];
    let half = bytes.len() / 2;
    records.push((half, &bytes[half..]));
    for at in (0..half).step_by(1000).rev() {
        records.push((at, &junk[at..half.min(at + 1700)]));
        records.push((at, &bytes[at..half.min(at + 1500)]));
    }
    records.push((100, &[]));
    // Those above covered the pieces below with junk.
    for at in (0..half).step_by(500) {
        records.push((at, &bytes[at..half.min(at + 700)]));
    }
    build.check(&open(&flattened(records)).unwrap());
}

#[test]
fn a_gap_between_records_is_zero() {
    let build = Build::new();
    let bytes = build.bytes();
    let (first, rest) = (&bytes[..4096 + 300], &bytes[2 * 4096..]);
    build.check(&open(&flattened([(2 * 4096, rest), (0, first)])).unwrap());
}

#[test]
fn refuses_damaged_flattened_files() {
    let bytes = Build::new().bytes();
    let flat = flattened([(0, &bytes[..])]);
    let place = Place::with(&flat);
    let file = OpenOptions::new().write(true).open(&place.path).unwrap();
    // What is cut off is read as far as it goes, and said.
    let mut opened = 0;
    for len in (1..flat.len()).rev().step_by(211) {
        file.set_len(len as u64).unwrap();
        let Ok(dump) = place.open() else { continue };
        opened += 1;
        let why = dump.incomplete();
        assert!(matches!(why, Some(Incomplete::CutOff { .. })), "{len}");
        check_cut(&Build::new(), &dump);
    }
    assert!(opened > 10, "{opened}");
    let changed = |at: usize, with: &[u8]| {
        let mut flat = flat.clone();
        flat[at..at + with.len()].copy_from_slice(with);
        open(&flat)
    };
    for (at, value) in [
        (16, 2_u64),
        (24, 2),
        (4096, 1 << 63),
        (4096, u64::MAX),
        (4104, u64::MAX),
        (4104, 1 << 63),
        (4096, (1 << 63) - 5),
        // A file proper of exabytes, of which the headers are a gap.
        (4096, 1 << 60),
    ] {
        assert!(
            changed(at, &value.to_be_bytes()).is_err(),
            "{at} {value:#x}"
        );
    }
}

/// Small, so that all of it can be damaged byte by byte.
fn small() -> Build {
    Build {
        present: (0..6).collect(),
        dumped: vec![
            (0, How::Zlib),
            (1, How::Lzo),
            (3, How::Snappy),
            (5, How::Zstd),
        ],
        zero: vec![4],
        max_frames: 6,
        ..Build::new()
    }
}

#[test]
fn every_truncation_is_an_error_somewhere() {
    let build = small();
    let bytes = build.bytes();
    let place = Place::with(&bytes);
    build.check(&place.open().unwrap());
    let file = OpenOptions::new().write(true).open(&place.path).unwrap();
    for len in (1..bytes.len()).rev() {
        file.set_len(len as u64).unwrap();
        let Ok(dump) = place.open() else { continue };
        let mut failed = 0;
        for frame in [0, 1, 3, 4, 5] {
            let mut got = vec![0; 4096];
            match dump.read(Gpa::new(frame * 4096), &mut got) {
                Ok(()) => assert_eq!(Some(Some(got)), build.want(frame)),
                Err(MemoryError::Absent { .. }) => failed += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(failed > 0, "{len}");
        let Some(Incomplete::CutOff { len: at, need }) = dump.incomplete() else {
            panic!("{len}: {:?}", dump.incomplete());
        };
        assert!(*at == len as u64 && *need > *at, "{len}: {need}");
        check_cut(&build, &dump);
    }
}

/// Checks that the pages there read right, and the rest is told as absent by all who tell.
fn check_cut(build: &Build, dump: &KdumpFile) {
    for frame in build.present.iter().copied() {
        let at = Gpa::new(frame * build.block as u64);
        let mut got = vec![0; build.block];
        let absent = dump.next_absent(at).unwrap();
        let is_absent = absent.is_some_and(|absent| absent.start() == at);
        match dump.read(at, &mut got) {
            Ok(()) => assert!(build.want(frame) == Some(Some(got)) && !is_absent),
            Err(MemoryError::Absent { .. }) => assert!(is_absent, "{frame}: {absent:?}"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn what_is_absent_is_told_in_ranges() {
    let build = Build::new();
    let dump = open(&build.bytes()).unwrap();
    assert_eq!(dump.incomplete(), None);
    check_cut(&build, &dump);
    let mut told = Vec::new();
    for region in dump.layout().regions() {
        let mut at = region.start();
        while let Some(absent) = dump.next_absent(at).unwrap() {
            told.extend(absent.whole_frames(PageSize::SIZE_4K).iter().map(Pfn::raw));
            at = absent.end();
            if at >= region.end() {
                break;
            }
        }
    }
    let missing = |frame: &u64| build.want(*frame) == Some(None);
    let missing: Vec<u64> = build.present.iter().copied().filter(missing).collect();
    assert_eq!(told, missing);
}

/// `makedumpfile --split`: every part has all bitmaps, and the descriptors of its own frames.
#[test]
fn one_part_of_several_has_its_own_pages() {
    let build = Build::new();
    let whole = build.bytes();
    let descriptors = 4 * 4096;
    let mut all: Vec<u64> = build.dumped.iter().map(|(frame, _)| *frame).collect();
    all.extend(&build.zero);
    all.sort_unstable();
    for (start, end) in [(0, 600), (5, 700), (600, 1300)] {
        let mut bytes = whole.clone();
        bytes[4096 + 12..4096 + 16].copy_from_slice(&1_u32.to_le_bytes());
        for (at, pfn) in [(80, start), (88, end)] {
            bytes[4096 + at..4096 + at + 8].copy_from_slice(&u64::to_le_bytes(pfn));
        }
        // Those of the parts before are not in this one.
        let before = all.iter().filter(|frame| **frame < start).count();
        let end_of_all = descriptors + all.len() * 24;
        bytes.copy_within(descriptors + before * 24..end_of_all, descriptors);
        let dump = open(&bytes).unwrap();
        let mine = |frame: &&u64| (start..end).contains(*frame);
        assert_eq!(dump.dumped_frames(), all.iter().filter(mine).count() as u64);
        let Some(Incomplete::Part { frames }) = dump.incomplete() else {
            panic!("{:?}", dump.incomplete());
        };
        assert_eq!((frames.start().raw(), frames.end().raw()), (start, end));
        for frame in &build.present {
            let mut got = vec![0; 4096];
            let here = mine(&frame) && build.want(*frame) != Some(None);
            match dump.read(Gpa::new(*frame * 4096), &mut got) {
                Ok(()) => assert!(here && build.want(*frame) == Some(Some(got)), "{frame}"),
                Err(MemoryError::Absent { .. }) => assert!(!here, "{frame}"),
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn the_dump_of_another_machine_is_named() {
    for (machine, other) in [
        ("x86_64", false),
        ("aarch64", false),
        ("Unknown", false),
        ("(unknown)", false),
        ("", false),
        ("s390x", true),
        ("ppc64le", true),
        ("i686", true),
        ("riscv64", true),
    ] {
        let mut bytes = Build { machine, ..small() }.bytes();
        for swapped in [false, true] {
            match open(&bytes) {
                Err(DumpError::OtherMachine { machine: named, .. }) => {
                    assert!(other && named == machine, "{named}");
                }
                Err(DumpError::Unsupported { .. }) => assert!(swapped && !other, "{machine}"),
                opened => assert!(
                    opened.is_ok() && !other && !swapped,
                    "{machine}: {opened:?}"
                ),
            }
            bytes[8..12].copy_from_slice(&6_u32.to_be_bytes());
        }
    }
}

/// Pages of zeroes are in the file once, whatever the source has of them; what is pruned again is
/// smaller, and its pages are those of before.
#[test]
fn a_pruned_file_is_pruned_again_with_its_pages_as_they_are() {
    for how in EVERY {
        let mut build = small();
        build.present = (0..600).collect();
        build.max_frames = 600;
        build.zero = (300..400).collect();
        build.dumped = (0..250).chain(420..600).map(|frame| (frame, how)).collect();
        let place = Place::with(&build.bytes());
        let before = std::fs::metadata(&place.path).unwrap().len();
        let mut path = place.path.clone();
        let mut sizes = vec![before];
        for free in [0..10, 0..10, 100..250] {
            let dump = Dump::open(&path, None).unwrap();
            let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
            let range = PfnRange::new(Pfn::new(free.start), Pfn::new(free.end));
            map.set(range, PageClass::FreeBuddy);
            let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
            path = place.path.with_extension(sizes.len().to_string());
            let checked = CheckedPlan::unchecked(&dump, &plan);
            checked.prune_to(&path, &PruneOptions::new()).unwrap();
            build.dumped.retain(|(frame, _)| !free.contains(frame));
            build.check(&KdumpFile::open(&path).unwrap());
            sizes.push(std::fs::metadata(&path).unwrap().len());
        }
        assert!(sizes[0] > sizes[1], "{how:?} {sizes:?}");
        assert!(sizes[1] == sizes[2], "{how:?} {sizes:?}");
        assert!(sizes[2] > sizes[3], "{how:?} {sizes:?}");
    }
}

#[test]
fn no_flipped_byte_panics() {
    let bytes = small().bytes();
    // The headers, the beginning of both bitmaps, all descriptors and compressed pages.
    let interesting = (0..480)
        .chain(4096..4096 + 220)
        .chain(8192..8200)
        .chain(12288..12296)
        .chain(16384..16384 + 5 * 24)
        .chain(16384 + 5 * 24 + 4096..bytes.len());
    let place = Place::new();
    for at in interesting {
        for flip in [0x01, 0x10, 0x80, 0xff] {
            let mut bytes = bytes.clone();
            bytes[at] ^= flip;
            std::fs::write(&place.path, &bytes).unwrap();
            let Ok(dump) = place.open() else { continue };
            for frame in 0..8 {
                let mut got = vec![0; 4096];
                let _ = dump.read(Gpa::new(frame * 4096), &mut got);
            }
        }
    }
}

/// A guest of single pages.
#[derive(Debug)]
struct Pages {
    layout: RamLayout,
    size: PageSize,
    /// By frame, lowest first.
    pages: Vec<(u64, Kind)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Zero,
    Text,
    Noise,
    Absent,
    Free,
}

impl Pages {
    fn new(size: PageSize, start: u64, kinds: &[Option<Kind>]) -> Option<Self> {
        let pages: Vec<_> = (start..)
            .zip(kinds)
            .filter_map(|(f, k)| Some((f, (*k)?)))
            .collect();
        let ranges = pages.iter().map(|(frame, _)| {
            PfnRange::with_len(Pfn::new(*frame), 1)
                .unwrap()
                .gpa_range(size)
                .unwrap()
        });
        let layout = RamLayout::new(ranges.collect()).ok()?;
        Some(Self {
            layout,
            size,
            pages,
        })
    }

    fn page(&self, frame: u64, kind: Kind) -> Vec<u8> {
        let size = self.size.bytes() as usize;
        let mut state = frame as u32 + 1;
        match kind {
            Kind::Zero | Kind::Absent => vec![0; size],
            Kind::Text => page_of(frame, size),
            Kind::Noise | Kind::Free => std::iter::repeat_with(|| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .take(size)
            .collect(),
        }
    }

    fn plan(&self) -> PrunePlan {
        let mut map = PageMap::new(&self.layout, self.size);
        for (frame, kind) in &self.pages {
            if *kind == Kind::Free {
                map.set(
                    PfnRange::with_len(Pfn::new(*frame), 1).unwrap(),
                    PageClass::FreeBuddy,
                );
            }
        }
        PrunePlan::new(&map, &DropClasses::default(), Fill::Zero)
    }
}

impl GuestMemory for Pages {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::with_len(at, buf.len() as u64).unwrap();
        let size = self.size.bytes() as usize;
        assert!(at.raw().is_multiple_of(self.size.bytes()) && buf.len().is_multiple_of(size));
        for (frame, part) in (at.pfn(self.size).raw()..).zip(buf.chunks_mut(size)) {
            let index = self.pages.binary_search_by_key(&frame, |(f, _)| *f);
            let (_, kind) = self.pages[index.map_err(|_| MemoryError::NotRam { range })?];
            if kind == Kind::Absent {
                return Err(MemoryError::Absent { range });
            }
            part.copy_from_slice(&self.page(frame, kind));
        }
        Ok(())
    }
}

fn kinds() -> impl Strategy<Value = Vec<Option<Kind>>> {
    let kind = prop_oneof![
        2 => Just(None),
        2 => Just(Some(Kind::Zero)),
        3 => Just(Some(Kind::Text)),
        2 => Just(Some(Kind::Noise)),
        1 => Just(Some(Kind::Absent)),
        3 => Just(Some(Kind::Free)),
    ];
    // Runs, so that some are longer than what a thread takes at a time.
    proptest::collection::vec((kind, 1_usize..120), 1..12).prop_map(|runs| {
        runs.into_iter()
            .flat_map(|(kind, len)| std::iter::repeat_n(kind, len))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn what_is_written_is_read_back(
        kinds in kinds(), start in 0_u64..70_000, shift in 0_usize..3,
        compression in prop_oneof![
            Just(KdumpCompression::None), Just(KdumpCompression::Zlib),
            Just(KdumpCompression::Snappy), Just(KdumpCompression::Zstd),
        ],
        threads in 0_usize..4, more in any::<bool>(),
    ) {
        let size = [PageSize::SIZE_4K, PageSize::SIZE_16K, PageSize::SIZE_64K][shift];
        // Large pages, but not large guests.
        let kinds = &kinds[..kinds.len().min(1500 >> (2 * shift))];
        let Some(guest) = Pages::new(size, start, kinds) else { return Ok(()) };
        let place = Place::new();
        let file = File::create(&place.path).unwrap();
        let mut notes = note(1, 392);
        notes.extend(note(1, 392));
        let last = Arc::new(Mutex::new((0, 0)));
        let telling = Arc::clone(&last);
        let mut options = KdumpOptions::new(compression)
            .progress(Arc::new(move |done, total| *telling.lock().unwrap() = (done, total)));
        options.threads = NonZeroUsize::new(threads);
        if more {
            options = options
                .machine(Architecture::X86_64)
                .vmcoreinfo(b"OSRELEASE=6.1\nNUMBER(phys_base)=-4096\n")
                .notes(&notes);
        }
        let stats = write_kdump_without(&guest, &guest.plan(), &file, &options).unwrap();
        let (done, total) = *last.lock().unwrap();
        prop_assert_eq!(done, total);
        let count = |kind| guest.pages.iter().filter(|(_, k)| *k == kind).count() as u64;
        prop_assert_eq!(stats.zero_pages, count(Kind::Zero));
        prop_assert_eq!(stats.dropped_pages, count(Kind::Free));
        prop_assert_eq!(stats.absent_pages, count(Kind::Absent));
        prop_assert_eq!(stats.file_len, file.metadata().unwrap().len());

        // Where every other reader looks.
        let bytes = std::fs::read(&place.path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        prop_assert_eq!(word(8), 6);
        prop_assert_eq!(u64::from(word(428)), size.bytes());
        prop_assert_eq!(word(460), if more { 2 } else { 0 });
        let sub = usize::try_from(size.bytes()).unwrap();
        prop_assert_eq!(word(sub + 8) != 0, stats.dropped_pages + stats.absent_pages > 0);
        prop_assert_eq!(word(sub).cast_signed(), if more { -4096 } else { 0 });

        let dump = place.open().unwrap();
        prop_assert_eq!(dump.layout(), guest.layout());
        prop_assert_eq!(dump.vmcoreinfo(), options.vmcoreinfo);
        // With VMCOREINFO among them, where libkdumpfile looks for it.
        let there = dump.notes().unwrap_or_default();
        prop_assert!(there.starts_with(options.notes.unwrap_or_default()));
        let rest = &there[options.notes.unwrap_or_default().len()..];
        match options.vmcoreinfo {
            Some(info) => {
                prop_assert_eq!(&rest[12..23], b"VMCOREINFO\0");
                prop_assert_eq!(&rest[24..24 + info.len()], info);
                prop_assert!(rest.len() < 24 + info.len() + 4);
            }
            None => prop_assert!(rest.is_empty()),
        }
        prop_assert_eq!(dump.machine(), options.machine);
        prop_assert_eq!(dump.dumped_frames(), stats.pages);
        for (frame, kind) in &guest.pages {
            let mut got = vec![1; usize::try_from(size.bytes()).unwrap()];
            let result = dump.read(Pfn::new(*frame).gpa(size).unwrap(), &mut got);
            match kind {
                Kind::Free | Kind::Absent => {
                    let absent = matches!(result, Err(MemoryError::Absent { .. }));
                    prop_assert!(absent, "{frame} {result:?}");
                }
                kind => {
                    prop_assert!(result.is_ok(), "{frame} {result:?}");
                    prop_assert!(got == guest.page(*frame, *kind), "{frame}");
                }
            }
        }
    }

    #[test]
    fn damaged_bytes_never_panic(
        damage in proptest::collection::vec((0_usize..24_000, any::<u8>()), 1..6), flat in any::<bool>(),
    ) {
        let mut bytes = small().bytes();
        if flat {
            bytes = flattened(bytes.chunks(1000).enumerate().map(|(i, part)| (i * 1000, part)));
        }
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(dump) = open(&bytes) {
            for region in dump.layout().regions().iter().take(100) {
                let mut got = vec![0; 10_000];
                let _ = dump.read(region.start(), &mut got);
                let _ = dump.read(region.start(), &mut got[..8]);
            }
        }
    }
}

#[test]
fn a_source_that_fails_is_an_error_of_the_writer() {
    struct Broken(RamLayout);
    impl GuestMemory for Broken {
        fn layout(&self) -> &RamLayout {
            &self.0
        }
        fn read(&self, at: Gpa, _: &mut [u8]) -> Result<(), MemoryError> {
            Err(MemoryError::NotRam {
                range: GpaRange::new(at, at),
            })
        }
    }
    let guest =
        |end| Broken(RamLayout::new(vec![GpaRange::new(Gpa::ZERO, Gpa::new(end))]).unwrap());
    let plan = Pages::new(PageSize::SIZE_4K, 0, &[Some(Kind::Zero)])
        .unwrap()
        .plan();
    let place = Place::new();
    let file = File::create(&place.path).unwrap();
    let write = |guest: &Broken| write_kdump_without(guest, &plan, &file, &KdumpOptions::default());
    let error = write(&guest(8192)).unwrap_err();
    assert!(matches!(error, KdumpWriteError::Memory(_)), "{error}");
    // Nothing of it looks like a dump.
    assert!(place.open().is_err());
    let error = write(&guest(!4095)).unwrap_err();
    assert!(matches!(error, KdumpWriteError::TooLarge { .. }), "{error}");
}
