//! ELF cores: every kind that is out there, hostile ones, and what a prune writes.

use crate::common::*;
use proptest::prelude::*;
use sonicshot::{Architecture, Gpa, GpaRange, GuestMemory, MemoryError, RamLayout};
use sonicshot_dump::{CoreNotes, Dump, DumpError, DumpFile, Incomplete, Overwrite, WriteOptions};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header to be written.
#[derive(Debug, Clone)]
struct Load {
    kind: u32,
    flags: u32,
    vaddr: u64,
    paddr: u64,
    memsz: u64,
    data: Vec<u8>,
}

fn load(paddr: u64, data: Vec<u8>) -> Load {
    Load {
        kind: PT_LOAD,
        flags: 7,
        vaddr: 0xffff_8880_0000_0000 + paddr,
        paddr,
        memsz: data.len() as u64,
        data,
    }
}

fn note(name: &str, text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend((u32::try_from(name.len()).unwrap() + 1).to_le_bytes());
    out.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    out.extend(0_u32.to_le_bytes());
    for part in [[name.as_bytes(), b"\0"].concat(), text.to_vec()] {
        out.extend(&part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

fn notes(notes: &[Vec<u8>]) -> Load {
    Load {
        kind: PT_NOTE,
        flags: 0,
        vaddr: 0,
        paddr: 0,
        memsz: 0,
        data: notes.concat(),
    }
}

/// The layout of a core in its file.
#[derive(Debug, Clone, Copy)]
struct Shape {
    ehsize: u16,
    /// The offset of the program headers.
    phoff: u64,
    /// Bytes of padding before each segment's data.
    padding: usize,
    machine: u16,
    /// Whether the number of segments is in section 0.
    xnum: bool,
}

const PLAIN: Shape = Shape {
    ehsize: 64,
    phoff: 64,
    padding: 0,
    machine: 62,
    xnum: false,
};
/// QEMU 10: a header length of 8, section headers first, data right behind the notes.
const QEMU: Shape = Shape {
    ehsize: 8,
    phoff: 192,
    padding: 28,
    ..PLAIN
};

fn put(out: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if out.len() < at + bytes.len() {
        out.resize(at + bytes.len(), 0);
    }
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn core(shape: Shape, loads: &[Load]) -> Vec<u8> {
    let count = u16::try_from(loads.len()).unwrap();
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    put(&mut out, 16, &4_u16.to_le_bytes());
    put(&mut out, 18, &shape.machine.to_le_bytes());
    put(&mut out, 20, &1_u32.to_le_bytes());
    put(&mut out, 32, &shape.phoff.to_le_bytes());
    put(&mut out, 52, &shape.ehsize.to_le_bytes());
    put(&mut out, 54, &56_u16.to_le_bytes());
    put(
        &mut out,
        56,
        &if shape.xnum { 0xffff } else { count }.to_le_bytes(),
    );
    put(&mut out, 58, &64_u16.to_le_bytes());
    if shape.xnum {
        // One section header at 64: its sh_info is the number.
        put(&mut out, 40, &64_u64.to_le_bytes());
        put(&mut out, 60, &1_u16.to_le_bytes());
        put(&mut out, 64 + 44, &u32::from(count).to_le_bytes());
    }
    let table = usize::try_from(shape.phoff).unwrap();
    let mut at = table + loads.len() * 56;
    for (index, load) in loads.iter().enumerate() {
        at += shape.padding;
        let head = table + index * 56;
        put(&mut out, head, &load.kind.to_le_bytes());
        put(&mut out, head + 4, &load.flags.to_le_bytes());
        let words = [
            at as u64,
            load.vaddr,
            load.paddr,
            load.data.len() as u64,
            load.memsz,
            0,
        ];
        for (word, value) in words.iter().enumerate() {
            put(&mut out, head + 8 + word * 8, &value.to_le_bytes());
        }
        put(&mut out, at, &load.data);
        at += load.data.len();
    }
    out
}

fn write(folder: &TempDir, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join("core");
    fs::write(&path, bytes).unwrap();
    path
}

fn word(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The segments of a core that keeps to the letter of the format, with their data.
fn segments(bytes: &[u8]) -> Vec<Load> {
    assert_eq!(&bytes[..7], b"\x7fELF\x02\x01\x01");
    let field = |at, len| usize::try_from(word(bytes, at, len)).unwrap();
    assert_eq!((field(16, 2), field(20, 4)), (4, 1), "a core, version 1");
    assert_eq!((field(32, 8), field(52, 2), field(54, 2)), (64, 64, 56));
    assert_eq!((field(40, 8), field(60, 2)), (0, 0), "no sections");
    let count = field(56, 2);
    assert!(count < 0xffff);
    (0..count)
        .map(|index| {
            let at = 64 + index * 56;
            let part = |offset: usize| word(bytes, at + offset, 8);
            let (offset, len) = (field(at + 8, 8), field(at + 32, 8));
            let kind = u32::try_from(word(bytes, at, 4)).unwrap();
            // Of a small file, to which that would add.
            if kind == PT_LOAD && bytes.len() > 1 << 20 {
                assert_eq!(offset % 4096, 0, "data is aligned");
            }
            Load {
                kind,
                flags: u32::try_from(word(bytes, at + 4, 4)).unwrap(),
                vaddr: part(16),
                paddr: part(24),
                memsz: part(40),
                data: bytes[offset..offset + len].to_vec(),
            }
        })
        .collect()
}

/// The memory by a list of segments: the first that has a byte counts, then that it is zero.
fn memory(loads: &[Load], layout: &RamLayout) -> Vec<(Gpa, Vec<u8>)> {
    let mut regions: Vec<_> = layout
        .regions()
        .iter()
        .map(|r| (r.start(), vec![0; usize::try_from(r.len()).unwrap()]))
        .collect();
    for load in loads.iter().rev() {
        if load.kind != PT_LOAD || load.paddr == u64::MAX {
            continue;
        }
        for (start, bytes) in &mut regions {
            for (at, byte) in (0..load.memsz).zip(&load.data) {
                let index = (load.paddr + at).checked_sub(start.raw());
                let place = index.and_then(|i| bytes.get_mut(usize::try_from(i).unwrap()));
                if let Some(place) = place {
                    *place = *byte;
                }
            }
        }
    }
    regions
}

/// The path of the pruned copy of a file.
fn pruned_path(path: &Path) -> PathBuf {
    format!("{}.pruned", path.display()).into()
}

fn prune(path: &Path, runs: &[(u64, u64)]) -> (Dump, Vec<u8>) {
    let dump = Dump::open(path, None).unwrap();
    let out = pruned_path(path);
    let plan = plan(dump.layout(), runs);
    dump.prune_to(&plan, &out, Overwrite::Replace).unwrap();
    (Dump::open(&out, None).unwrap(), fs::read(&out).unwrap())
}

#[test]
fn cores_of_every_shape_are_read() {
    let folder = TempDir::new().unwrap();
    let vmcoreinfo = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n";
    let loads = [
        notes(&[
            note("CORE", &[1; 336]),
            note("QEMU", &[2; 440]),
            note("VMCOREINFO", vmcoreinfo),
        ]),
        load(0, pattern(1, 0xa_0000)),
        load(0xc_0000, pattern(2, 5 * PAGE + 123)),
        load(1 << 32, pattern(3, 0x1_0000)),
    ];
    let xnum = Shape {
        phoff: 128,
        xnum: true,
        ..PLAIN
    };
    let arm = Shape {
        machine: 183,
        padding: 3,
        ..PLAIN
    };
    for (shape, machine) in [
        (PLAIN, Architecture::X86_64),
        (QEMU, Architecture::X86_64),
        (xnum, Architecture::X86_64),
        (arm, Architecture::Aarch64),
    ] {
        let dump = Dump::open(write(&folder, &core(shape, &loads)), None).unwrap();
        assert_eq!(dump.format(), "ELF core");
        assert_eq!(dump.machine(), Some(machine));
        assert_eq!(dump.vmcoreinfo(), Some(&vmcoreinfo[..]));
        assert_eq!(dump.layout().regions().len(), 3);
        assert!(contents(&dump) == memory(&loads, dump.layout()));
        conforms(&dump);
    }
}

/// Ranges by the numbers of their pages.
fn pages(ranges: &[(u64, u64)]) -> Vec<GpaRange> {
    let page = |number: u64| Gpa::new(number * PAGE);
    let ranges = ranges.iter();
    ranges
        .map(|(a, b)| GpaRange::new(page(*a), page(*b)))
        .collect()
}

/// Nothing says what was there: makedumpfile leaves out zeroes so, and pages in use.
#[test]
fn what_segments_leave_out_is_absent() {
    let folder = TempDir::new().unwrap();
    let mut tail = load(0x1_0000, pattern(1, 3 * PAGE));
    tail.memsz = 8 * PAGE;
    let mut left_out = load(0x2_0000, vec![]);
    left_out.memsz = 4 * PAGE;
    let info = notes(&[note("CORE", &[1; 336])]);
    let loads = [info, tail, left_out, load(0x2_4000, pattern(2, PAGE))];
    let path = write(&folder, &core(PLAIN, &loads));
    let dump = Dump::open(&path, None).unwrap();
    assert!(contents(&dump) == memory(&loads, dump.layout()));
    conforms(&dump);
    let lacks = pages(&[(0x13, 0x18), (0x20, 0x24)]);
    assert_eq!(absent(&dump), lacks);
    assert!(dump.absent_may_be_zero() && dump.incomplete().is_none());
    assert!(matches!(
        dump.read(Gpa::new(0x1_2fff), &mut [0; 2]),
        Err(MemoryError::Absent { .. })
    ));
    // A prune keeps it so, and tells it from what it drops itself, which is zero.
    for (runs, is_marked) in [(&[][..], false), (&[(0x11, 1)], true), (&[(0x24, 1)], true)] {
        let (after, bytes) = prune(&path, runs);
        assert_eq!(absent(&after), lacks, "{runs:?}");
        let want = pruned(&contents(&dump), &plan(dump.layout(), runs));
        assert!(contents(&after) == want, "{runs:?}");
        let told = bytes.windows(10).any(|at| at == b"SONICSHOT\0");
        assert_eq!(told, is_marked, "{runs:?}");
        assert_eq!(after.absent_may_be_zero(), !is_marked);
        let (again, twice) = prune(&pruned_path(&path), runs);
        assert!(twice == bytes && absent(&again) == lacks);
    }
    // Whoever leaves out more of what we pruned may copy our note: it does not count any more.
    let (_, mut bytes) = prune(&path, &[(0x11, 1)]);
    let last = 64 + 56 * (segments(&bytes).len() - 1);
    put(&mut bytes, last + 32, &0_u64.to_le_bytes());
    let dump = Dump::open(write(&folder, &bytes), None).unwrap();
    let lacks = pages(&[(0x11, 0x12), (0x13, 0x18), (0x20, 0x25)]);
    assert_eq!(absent(&dump), lacks);
}

/// Memory that the guest uses and that is given up is not there, and not zero, whoever reads the core next.
#[test]
fn what_is_cut_off_is_absent_and_stays_so() {
    let folder = TempDir::new().unwrap();
    let info = notes(&[note("CORE", &[1; 336])]);
    let loads = [
        info,
        load(0, pattern(1, 16 * PAGE)),
        load(0x2_0000, pattern(2, 16 * PAGE)),
    ];
    for shape in [PLAIN, QEMU] {
        let whole = core(shape, &loads);
        let data_end = whole.len() as u64;
        for (lost, lacks) in [
            (1, &[(0x2f, 0x30)][..]),
            (16 * PAGE + shape.padding as u64, &[(0x20, 0x30)]),
            (
                20 * PAGE + shape.padding as u64,
                &[(0xc, 0x10), (0x20, 0x30)],
            ),
        ] {
            let path = write(&folder, &whole);
            let len = data_end - lost;
            OpenOptions::new()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(len)
                .unwrap();
            let dump = Dump::open(&path, None).unwrap();
            let cut = Incomplete::CutOff {
                len,
                need: data_end,
            };
            assert_eq!(dump.incomplete(), Some(cut));
            let found: Vec<_> = absent(&dump)
                .iter()
                .map(|range| (range.start().raw() / PAGE, range.end().raw() / PAGE))
                .collect();
            assert_eq!(found, lacks, "{lost}");
            conforms(&dump);
            for runs in [&[][..], &[(2, 3)], &[(0x2f, 1)]] {
                let (after, _) = prune(&path, runs);
                assert_eq!(absent(&after), absent(&dump), "{lost} {runs:?}");
                let want = pruned(&contents(&dump), &plan(dump.layout(), runs));
                assert!(contents(&after) == want, "{lost} {runs:?}");
            }
        }
        // Of which nothing is there.
        let data_len = 32 * usize::try_from(PAGE).unwrap() + shape.padding;
        let path = write(&folder, &whole[..whole.len() - data_len]);
        let error = Dump::open(&path, None).unwrap_err().to_string();
        assert!(error.contains("truncated"), "{error}");
    }
}

#[test]
fn not_every_segment_is_ram() {
    let folder = TempDir::new().unwrap();
    let mut unmapped = load(0, pattern(1, PAGE));
    unmapped.paddr = u64::MAX;
    let mut nothing = load(0x5000, pattern(2, PAGE));
    nothing.memsz = 0;
    let loads = [unmapped, nothing, load(0x2000, pattern(3, 5 * PAGE))];
    let path = write(&folder, &core(PLAIN, &loads));
    let dump = Dump::open(&path, None).unwrap();
    let region = GpaRange::new(Gpa::new(0x2000), Gpa::new(0x7000));
    assert_eq!(dump.layout().regions(), [region]);
    let before = memory(&loads, dump.layout());
    assert!(contents(&dump) == before);
    conforms(&dump);
    // Neither is changed by a prune.
    let runs = [(2, 2), (6, 1)];
    let (after, bytes) = prune(&path, &runs);
    assert!(contents(&after) == pruned(&before, &plan(dump.layout(), &runs)));
    let kept: Vec<_> = segments(&bytes);
    let kept: Vec<_> = kept.iter().filter(|s| s.kind == PT_LOAD).collect();
    // Behind memory without bytes.
    assert_eq!((kept[0].paddr, kept[0].data.len()), (0x2000, 0));
    assert_eq!((kept[1].paddr, &kept[1].data), (u64::MAX, &loads[0].data));
    assert_eq!((kept[2].memsz, &kept[2].data), (0, &loads[1].data));
}

/// makedumpfile (1.7) maps a core by the memory that its segments have, and takes what follows in
/// the file for memory without bytes, unless the first segment has no byte, at no place of the file
/// that seems to be memory.
#[test]
fn memory_without_bytes_comes_first_in_a_pruned_core() {
    let folder = TempDir::new().unwrap();
    let info = notes(&[note("CORE", &[1; 336])]);
    for (runs, first) in [
        (&[(40, 2), (50, 3)][..], Some((40, 2))),
        (&[(0, 3), (50, 3)], Some((0, 3))),
        (&[(0x60, 16)], Some((0x60, 16))),
        (&[], None),
    ] {
        let loads = [
            info.clone(),
            load(0, pattern(1, 60 * PAGE)),
            load(0x6_0000, pattern(2, 16 * PAGE)),
        ];
        let path = write(&folder, &core(PLAIN, &loads));
        let (_, bytes) = prune(&path, runs);
        let at = |number: usize, field: usize| word(&bytes, 64 + 56 * number + field, 8);
        let kind = |number: usize| word(&bytes, 64 + 56 * number, 4) as u32;
        let count = segments(&bytes).len();
        let number = (0..count).find(|number| kind(*number) == PT_LOAD).unwrap();
        let empty = at(number, 32) == 0;
        assert_eq!(
            empty.then(|| (at(number, 24) / PAGE, at(number, 40) / PAGE)),
            first
        );
        // No segment seems to begin the file.
        assert!((0..count).all(|number| at(number, 8) >= 64 + 56 * count as u64));
        let (_, again) = prune(&pruned_path(&path), runs);
        assert!(again == bytes, "{runs:?}");
    }
}

/// Two segments with bytes for the same memory, each at a place of its own in the file, as the
/// kernel's text and the direct map are in `/proc/vmcore`.
#[test]
fn segments_with_the_same_memory_must_agree() {
    let folder = TempDir::new().unwrap();
    let all = pattern(1, 64 * PAGE);
    let part = |first: usize, end: usize| all[first * 4096..end * 4096].to_vec();
    let same = [
        notes(&[]),
        load(0, all.clone()),
        load(16 * PAGE, part(16, 24)),
        // Partly of memory that no other has.
        load(60 * PAGE, [part(60, 64), pattern(2, 4 * PAGE)].concat()),
    ];
    let path = write(&folder, &core(PLAIN, &same));
    let dump = Dump::open(&path, None).unwrap();
    assert_eq!(dump.layout().bytes(), 68 * PAGE);
    conforms(&dump);
    for runs in [&[][..], &[(3, 2), (18, 2), (61, 5)]] {
        let (after, bytes) = prune(&path, runs);
        let plan = plan(dump.layout(), runs);
        assert!(contents(&after) == pruned(&contents(&dump), &plan));
        assert!(absent(&after).is_empty());
        // What is in the file twice is written once.
        let kept = (64 + 8) * PAGE - plan.dropped_bytes();
        assert!(
            (bytes.len() as u64) < kept + 2 * PAGE,
            "{} {kept}",
            bytes.len()
        );
    }
    // One byte is another: nothing says which it is.
    for (segment, at) in [(2, 0), (2, 8 * 4096 - 1), (3, 100)] {
        let mut other = same.clone();
        other[segment].data[at] ^= 1;
        let error = Dump::open(write(&folder, &core(PLAIN, &other)), None).unwrap_err();
        let DumpError::SegmentsDisagree {
            first,
            second,
            at: gpa,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((first, second), (1, segment));
        assert_eq!(gpa.raw(), other[segment].paddr + at as u64);
    }
}

/// A crafted file has the same memory in every segment, each at another place: it is not compared
/// again and again.
#[test]
fn comparing_segments_takes_no_longer_than_reading_the_file() {
    let folder = TempDir::new().unwrap();
    let mut bytes = core(PLAIN, &vec![load(0, vec![]); 200]);
    let offset = bytes.len() as u64;
    for index in 0..200 {
        let head = 64 + index * 56;
        let len = 1_u64 << 30;
        for (word, value) in [offset + index as u64 * 4096, 0, 0, len, len]
            .iter()
            .enumerate()
        {
            put(&mut bytes, head + 8 + word * 8, &value.to_le_bytes());
        }
    }
    let path = write(&folder, &bytes);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(offset + (1 << 30) + 200 * 4096).unwrap();
    let error = Dump::open(&path, None).unwrap_err().to_string();
    assert!(error.contains("many times over"), "{error}");
}

/// A segment's memory that is not in the file is zero only where no other segment has it.
#[test]
fn bytes_of_the_file_count_before_memory_that_is_not_in_it() {
    let folder = TempDir::new().unwrap();
    let mut long = load(0x1000, pattern(1, PAGE));
    long.memsz = 8 * PAGE;
    let loads = [
        long,
        load(0x3000, pattern(2, 2 * PAGE)),
        load(0x8000, pattern(3, 2 * PAGE)),
    ];
    let path = write(&folder, &core(PLAIN, &loads));
    let dump = Dump::open(&path, None).unwrap();
    let page = usize::try_from(PAGE).unwrap();
    let mut want = vec![0; 9 * page];
    for load in &loads {
        let at = usize::try_from(load.paddr).unwrap() - page;
        want[at..at + load.data.len()].copy_from_slice(&load.data);
    }
    assert!(contents(&dump) == [(Gpa::new(0x1000), want.clone())]);
    let runs = [(3, 1), (6, 1)];
    let (after, _) = prune(&path, &runs);
    want[2 * page..3 * page].fill(0);
    assert!(contents(&after) == [(Gpa::new(0x1000), want)]);
}

#[test]
fn a_pruned_core_is_as_readelf_wants_it() {
    let folder = TempDir::new().unwrap();
    let info = notes(&[
        note("CORE", &[1; 336]),
        note("VMCOREINFO", b"OSRELEASE=6.1.0\n"),
    ]);
    let loads = [
        info.clone(),
        load(0, pattern(1, 160 * PAGE)),
        load(0xc_0000, pattern(2, 64 * PAGE)),
    ];
    let path = write(&folder, &core(QEMU, &loads));
    // The first pages of one segment, the middle of it, the last pages of the other.
    let runs = [(0, 16), (40, 100), (0xc0 + 50, 14)];
    let (after, bytes) = prune(&path, &runs);
    assert!((bytes.len() as u64) < (160 + 64 - 130 + 4) * PAGE);
    let got = segments(&bytes);
    let shape: Vec<_> = got
        .iter()
        .map(|s| (s.paddr / PAGE, s.data.len() as u64 / PAGE, s.memsz / PAGE))
        .collect();
    assert_eq!(
        shape[1..],
        [(0, 0, 16), (16, 24, 124), (140, 20, 20), (192, 50, 64)]
    );
    assert!(
        got[0].data.starts_with(&info.data),
        "notes are kept byte for byte"
    );
    assert_eq!(after.vmcoreinfo(), Some(&b"OSRELEASE=6.1.0\n"[..]));
    for segment in &got[1..] {
        assert_eq!(segment.vaddr, 0xffff_8880_0000_0000 + segment.paddr);
        assert_eq!(segment.flags, 7);
    }
    let run = Command::new("readelf")
        .arg("-lnW")
        .arg(pruned_path(&path))
        .output();
    if sonicshot_testkit::has("readelf", run.is_ok()) {
        let run = run.unwrap();
        let text = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
        assert!(
            text.contains("There are 5 program headers, starting at offset 64"),
            "{text}"
        );
        assert!(text.contains("VMCOREINFO"), "{text}");
    }
    // Pruned again, nothing changes.
    let (_, again) = prune(&pruned_path(&path), &runs);
    assert!(again == bytes);
    assert!(absent(&after).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_pruned_core_reads_as_the_model_says(
        // Gap before, data, memory behind it (in 256 bytes), seed.
        sizes in proptest::collection::vec((0_u64..40, 0_u64..200, 0_u64..60, 0_u64..100), 1..6),
        aligned in any::<bool>(),
        runs in proptest::collection::vec((0_u64..80, 1_u64..12), 0..10),
        quirks in any::<bool>(),
        note_text in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let unit = if aligned { PAGE / 4 } else { 256 };
        let mut at = 0;
        let mut loads = vec![notes(&[note("CORE", &note_text), note("VMCOREINFO", &note_text)])];
        for (gap, data, rest, seed) in sizes {
            let round = |n: u64| if aligned { (n * unit).next_multiple_of(PAGE) } else { n * unit };
            at += round(gap);
            let mut segment = load(at, pattern(seed, round(data)));
            segment.memsz += round(rest);
            at += segment.memsz;
            loads.push(segment);
        }
        prop_assume!(loads.iter().any(|load| load.memsz > 0));
        let folder = TempDir::new().unwrap();
        let path = write(&folder, &core(if quirks { QEMU } else { PLAIN }, &loads));
        let dump = Dump::open(&path, None).unwrap();
        let before = memory(&loads, dump.layout());
        prop_assert!(contents(&dump) == before);
        conforms(&dump);
        let plan = plan(dump.layout(), &runs);
        let want = pruned(&before, &plan);
        let (after, bytes) = prune(&path, &runs);
        prop_assert_eq!(after.layout(), dump.layout());
        prop_assert!(contents(&after) == want, "by our reader");
        prop_assert!(memory(&segments(&bytes), dump.layout()) == want, "by the tests' reader");
        conforms(&after);
        prop_assert_eq!(after.vmcoreinfo(), Some(&note_text[..]));
        prop_assert!(segments(&bytes)[0].data.starts_with(&loads[0].data));
        prop_assert_eq!(absent(&after), absent(&dump));
        let data = |loads: &[Load]| loads[1..].iter().map(|load| load.data.len()).sum::<usize>();
        let dropped: u64 = loads[1..].iter().filter(|load| !load.data.is_empty()).map(|load| {
            let range = GpaRange::with_len(Gpa::new(load.paddr), load.data.len() as u64).unwrap();
            plan.dropped_in(range).map(|run| run.len()).sum::<u64>()
        }).sum();
        prop_assert_eq!(data(&segments(&bytes)) as u64 + dropped, data(&loads) as u64);
    }
}

/// 70,000 gaps do not fit into 65,534 segments: the narrowest become holes in the file.
#[test]
fn too_many_gaps_become_holes_in_the_file() {
    let folder = TempDir::new().unwrap();
    const GAPS: u64 = 70_000;
    const WIDE: u64 = 100;
    // A page kept, a page dropped, and so on; the last 100 gaps are two pages wide.
    let pages = GAPS * 2 + WIDE;
    let path = write(&folder, &core(PLAIN, &[load(0, vec![])]));
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let len = pages * PAGE;
    file.write_all_at(&4096_u64.to_le_bytes(), 64 + 8).unwrap();
    file.write_all_at(&len.to_le_bytes(), 64 + 32).unwrap();
    file.write_all_at(&len.to_le_bytes(), 64 + 40).unwrap();
    file.set_len(4096 + len).unwrap();
    // Data in some kept and some dropped pages, the rest of the file is a hole.
    for page in [0, 1, 2, 3, 1000, 1001, GAPS] {
        file.write_all_at(&pattern(page, PAGE), 4096 + page * PAGE)
            .unwrap();
    }
    let mut runs = Vec::new();
    let mut at = 0;
    for gap in 0..GAPS {
        let width = if gap >= GAPS - WIDE { 2 } else { 1 };
        runs.push((at + 1, width));
        at += 1 + width;
    }
    assert_eq!(at, pages);
    let dump = Dump::open(&path, None).unwrap();
    let plan = plan(dump.layout(), &runs);
    let out = folder.path().join("out");
    let stats = dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
    // Each kept page begins a piece; what is dropped last needs no other behind it.
    // One is at the front, without bytes, one has the notes.
    assert_eq!(stats.joined, GAPS - 65_532);
    assert_eq!(stats.dropped_bytes, (GAPS + WIDE) * PAGE);
    assert!(stats.disk_after < 8 << 20, "{stats:?}");
    let after = Dump::open(&out, None).unwrap();
    assert_eq!(after.layout(), dump.layout());
    for page in [0, 2, 1000, GAPS] {
        let mut bytes = vec![0; 4096];
        after.read(Gpa::new(page * PAGE), &mut bytes).unwrap();
        assert!(bytes == pattern(page, PAGE), "kept page {page}");
    }
    for page in [1, 3, 1001, pages - 1] {
        let mut bytes = vec![1; 4096];
        after.read(Gpa::new(page * PAGE), &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "dropped page {page}");
    }
    let mut head = [0; 2];
    fs::File::open(&out)
        .unwrap()
        .read_exact_at(&mut head, 56)
        .unwrap();
    assert_eq!(u16::from_le_bytes(head), 65_534);
    let mut last = vec![0; 56];
    fs::File::open(&out)
        .unwrap()
        .read_exact_at(&mut last, 64 + 65_533 * 56)
        .unwrap();
    assert_eq!(
        word(&last, 40, 8) - word(&last, 32, 8),
        2 * PAGE,
        "wide gaps are not joined"
    );
}

/// A change at a place of the file, and what the error must say.
/// 70,000 ranges of RAM are more segments than `e_phnum` counts: section 0 does, in a core that
/// is made of another dump and in one that is pruned.
#[test]
fn a_core_of_many_ranges_of_ram_has_them_all() {
    const RANGES: u64 = 70_000;
    const LEN: usize = 64;
    let folder = TempDir::new().unwrap();
    let mut lime = Vec::new();
    for number in 0..RANGES {
        let start = number * 0x2000 + 0x1000;
        lime.extend(b"EMiL\x01\0\0\0");
        lime.extend(start.to_le_bytes());
        lime.extend((start + LEN as u64 - 1).to_le_bytes());
        lime.extend([0; 8]);
        // Most are zero, and holes in the core.
        let byte = if number % 1000 == 999 { 0x5a } else { 0 };
        lime.extend([byte; LEN]);
    }
    let dump = Dump::open(write(&folder, &lime), None).unwrap();
    let made = folder.path().join("made");
    let notes = CoreNotes::new(Architecture::X86_64);
    let files = dump.files();
    let core =
        DumpFile::elf_core(&made, dump.layout(), &notes, &files, &WriteOptions::new()).unwrap();
    core.copy(&dump).unwrap();
    core.finish().unwrap();
    let made_dump = Dump::open(&made, None).unwrap();
    let pruned = folder.path().join("pruned");
    let nothing = plan(made_dump.layout(), &[]);
    made_dump
        .prune_to(&nothing, &pruned, Overwrite::Refuse)
        .unwrap();
    for path in [made, pruned] {
        let mut head = [0; 64];
        let file = fs::File::open(&path).unwrap();
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!(word(&head, 56, 2), 0xffff, "e_phnum");
        assert_eq!(
            [word(&head, 58, 2), word(&head, 60, 2)],
            [64, 1],
            "e_shentsize, e_shnum"
        );
        let mut section = [0; 64];
        file.read_exact_at(&mut section, word(&head, 40, 8))
            .unwrap();
        let count = word(&section, 44, 4);
        section[44..48].fill(0);
        assert_eq!(section, [0; 64], "a section of type SHT_NULL");
        assert_eq!(count, RANGES + 1, "and the notes");
        let read = Dump::open(&path, None).unwrap();
        assert_eq!(read.layout(), dump.layout());
        assert!(contents(&read) == contents(&dump));
    }
}

#[test]
fn damaged_headers_are_named() {
    let folder = TempDir::new().unwrap();
    let good = core(
        PLAIN,
        &[
            notes(&[note("CORE", &[1; 16])]),
            load(0, pattern(1, 4 * PAGE)),
        ],
    );
    let second = 64 + 56;
    let max = u64::MAX.to_le_bytes();
    let table: [(usize, &[u8], &str); 13] = [
        (4, &[1], "not 64-bit little-endian"),
        (5, &[2], "not 64-bit little-endian"),
        (16, &[2], "no core"),
        (18, &[40], "machine"),
        (32, &max, "program header beyond the end"),
        (32, &[0, 0, 1], "program header beyond the end"),
        (54, &[32], "size of program headers"),
        (56, &[0xff, 0xff], "no section 0"),
        (second + 8, &max, "beyond 64 bits"),
        (second + 32, &max, "beyond 64 bits"),
        (second + 8, &[0, 0, 0, 1], "truncated"),
        (second + 40, &PAGE.to_le_bytes(), "more data than memory"),
        (second + 24, &(u64::MAX - 4).to_le_bytes(), "beyond 64 bits"),
    ];
    for (at, bytes, word) in table {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        let error = Dump::open(write(&folder, &bad), None)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{at}: {error}");
    }
    // Without program headers it is taken for a core of Xen.
    let mut none = good.clone();
    none[56..58].fill(0);
    assert!(matches!(
        Dump::open(write(&folder, &none), None),
        Err(DumpError::Xen { .. })
    ));
    // No RAM at all.
    let path = write(&folder, &core(PLAIN, &[notes(&[])]));
    assert!(matches!(
        Dump::open(path, None),
        Err(DumpError::NotADump { .. })
    ));
    // The last segment says where it should have ended: what there is of it is read.
    let data_at = good.len() - 4 * usize::try_from(PAGE).unwrap();
    for len in (0..good.len()).filter(|len| *len < 400 || len % 251 == 0) {
        let result = Dump::open(write(&folder, &good[..len]), None);
        assert_eq!(result.is_ok(), len > data_at, "cut to {len}");
    }
}

/// A reader keeps a few bytes for each frame, so a short file must not claim petabytes.
#[test]
fn memory_that_the_file_cannot_be_of_is_refused() {
    let folder = TempDir::new().unwrap();
    for (memsz, is_read) in [(32_u64 << 20, true), (1 << 40, false), (1 << 60, false)] {
        let mut segment = load(0, pattern(1, PAGE));
        segment.memsz = memsz;
        let path = write(&folder, &core(PLAIN, &[segment]));
        match Dump::open(path, None) {
            Ok(dump) => assert!(is_read && dump.layout().bytes() == memsz),
            Err(error) => assert!(!is_read && error.to_string().contains("claim"), "{error}"),
        }
    }
}

/// Many segments that show the same bytes do not make a file many times as large.
#[test]
fn shared_data_is_not_multiplied() {
    let folder = TempDir::new().unwrap();
    let mut bytes = core(PLAIN, &vec![load(0, vec![]); 100]);
    let offset = bytes.len() as u64;
    bytes.extend(pattern(1, 64 * PAGE));
    for index in 0..100 {
        let head = 64 + index * 56;
        let paddr = index as u64 * 64 * PAGE;
        for (word, value) in [offset, paddr, paddr, 64 * PAGE, 64 * PAGE]
            .iter()
            .enumerate()
        {
            put(&mut bytes, head + 8 + word * 8, &value.to_le_bytes());
        }
    }
    let dump = Dump::open(write(&folder, &bytes), None).unwrap();
    conforms(&dump);
    let out = folder.path().join("out");
    let plan = plan(dump.layout(), &[(0, 1)]);
    dump.prune_to(&plan, &out, Overwrite::Refuse).unwrap();
    // All of it is still shown by others: a header more would save nothing.
    assert!(fs::metadata(&out).unwrap().len() <= bytes.len() as u64);
    let after = Dump::open(&out, None).unwrap();
    assert!(contents(&after) == contents(&dump));
}

/// QEMU's `dump-guest-memory` with `paging`: a segment for each mapping, many of which show the
/// same RAM, wherever it lies in the file. All of it is written once, and a prune of anything, or
/// of nothing, makes no file larger.
#[test]
fn mappings_of_the_same_memory_share_its_bytes() {
    const PAGES: u64 = 64;
    // Of the guest's pages, in the order of the file: the direct map, the kernel, a process.
    let mappings = [(0, PAGES), (16, 24), (3, 4), (40, 64), (41, 42), (23, 41)];
    let folder = TempDir::new().unwrap();
    let mut bytes = core(QEMU, &vec![load(0, vec![]); mappings.len()]);
    bytes.resize(bytes.len() + 100, 7);
    let data_at = bytes.len() as u64;
    bytes.extend(pattern(9, PAGES * PAGE));
    for (index, (first, end)) in mappings.iter().enumerate() {
        let head = 192 + index * 56;
        let (paddr, len) = (first * PAGE, (end - first) * PAGE);
        let vaddr = (index as u64) << 40 | paddr;
        for (word, value) in [data_at + paddr, vaddr, paddr, len, len].iter().enumerate() {
            put(&mut bytes, head + 8 + word * 8, &value.to_le_bytes());
        }
    }
    let path = write(&folder, &bytes);
    for runs in [
        &[][..],
        &[(0, 1)],
        &[(20, 22)],
        &[(3, 1), (16, 8), (41, 1)],
        &[(0, PAGES)],
    ] {
        let dump = Dump::open(&path, None).unwrap();
        assert_eq!(dump.layout().bytes(), PAGES * PAGE);
        let plan = plan(dump.layout(), runs);
        let out = folder.path().join("out");
        let stats = dump.prune_to(&plan, &out, Overwrite::Replace).unwrap();
        let (dropped, len) = (plan.dropped_bytes(), fs::metadata(&out).unwrap().len());
        assert_eq!(stats.dropped_bytes, dropped);
        // Headers, and what aligns the data.
        assert!(len <= bytes.len() as u64, "{runs:?}: {len}");
        let kept = PAGES * PAGE - dropped;
        assert!(len < kept + 64 * 1024, "{runs:?}: {len} for {kept}");
        let after = Dump::open(&out, None).unwrap();
        assert!(
            contents(&after) == pruned(&contents(&dump), &plan),
            "{runs:?}"
        );
        // Every mapping still shows its own.
        let pruned = fs::read(&out).unwrap();
        let table = usize::try_from(word(&pruned, 32, 8)).unwrap();
        for index in 0..usize::try_from(word(&pruned, 56, 2)).unwrap() {
            if word(&pruned, table + index * 56, 4) == u64::from(PT_NOTE) {
                continue;
            }
            let field = |word_: usize| word(&pruned, table + index * 56 + 8 + word_ * 8, 8);
            let (offset, vaddr, paddr, len) = (field(0), field(1), field(2), field(3));
            assert_eq!(vaddr & ((1 << 40) - 1), paddr);
            for at in 0..len {
                let kept = pruned[usize::try_from(offset + at).unwrap()];
                assert_eq!(kept, bytes[usize::try_from(data_at + paddr + at).unwrap()]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn hostile_headers_never_panic(
        edits in proptest::collection::vec((0_usize..600, prop_oneof![
            any::<u8>().prop_map(|byte| vec![byte]),
            any::<u16>().prop_map(|word| word.to_le_bytes().to_vec()),
            prop_oneof![Just(u64::MAX), Just(1 << 63), Just(0xffff_ffff_ffff_f000), 0_u64..100_000]
                .prop_map(|word| word.to_le_bytes().to_vec()),
        ]), 0..6),
        field in proptest::collection::vec((0_usize..5, 0_usize..6, prop_oneof![
            Just(u64::MAX), Just(u64::MAX - 0xfff), 0_u64..0x2_0000
        ]), 0..4),
        cut in proptest::option::of(0_usize..60_000),
        quirks in any::<bool>(),
        runs in proptest::collection::vec((0_u64..80, 1_u64..12), 0..4),
    ) {
        let shape = if quirks { QEMU } else { PLAIN };
        let mut bytes = core(shape, &[
            notes(&[note("CORE", &[1; 100]), note("VMCOREINFO", b"OSRELEASE=1\n")]),
            load(0, pattern(1, 4 * PAGE)),
            load(0x8000, pattern(2, 3 * PAGE + 77)),
            load(0x2_0000, pattern(3, 2 * PAGE)),
        ]);
        for (segment, word, value) in field {
            let at = usize::try_from(shape.phoff).unwrap() + segment * 56 + 8 + word * 8;
            put(&mut bytes, at, &value.to_le_bytes());
        }
        for (at, edit) in edits {
            put(&mut bytes, at, &edit);
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        let folder = TempDir::new().unwrap();
        let path = write(&folder, &bytes);
        if let Ok(dump) = Dump::open(&path, None) {
            let _ = dump.vmcoreinfo();
            for region in dump.layout().regions().to_vec() {
                let size = usize::try_from(region.len().min(1 << 16)).unwrap();
                let mut buffer = vec![0; size];
                let _ = dump.read(region.start(), &mut buffer);
                let _ = dump.map(region.start(), size);
                let _ = dump.next_data(region.start());
                dump.release(region);
                let last = Gpa::new(region.end().raw() - 1);
                let _ = dump.read(last, &mut [0; 1]);
                let _ = dump.map(last, 1);
            }
            // A map of all frames of a layout that reaches to the sky would not fit.
            if dump.layout().bytes() < 1 << 24 {
                let plan = plan(dump.layout(), &runs);
                let out = folder.path().join("out");
                if dump.prune_to(&plan, &out, Overwrite::Refuse).is_ok() {
                    let after = Dump::open(&out, None).unwrap();
                    // What else needs a dropped page's bytes, or saves nothing, keeps it.
                    let (before, now) = (contents(&dump), contents(&after));
                    let wanted = pruned(&before, &plan);
                    for (((at, before), (_, wanted)), (now_at, now)) in before.iter().zip(&wanted).zip(&now) {
                        prop_assert_eq!((at, before.len()), (now_at, now.len()));
                        let bytes = now.iter().zip(before.iter().zip(wanted));
                        prop_assert!(bytes.clone().all(|(now, (a, b))| now == a || now == b));
                    }
                }
            }
        }
    }
}
