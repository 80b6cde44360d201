//! Dumps of every shape: what is kept stays byte for byte, what is dropped reads as zero, and
//! what is damaged is refused. The cores are written by this file's own code, from the
//! specification, so that a mistake of the reader cannot hide behind the writer's.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

use proptest::prelude::*;
use sonicshot::{
    DropClasses, Fill, Gpa, GuestMemory, PageClass, PageMap, PageSize, Pfn, PfnRange, PrunePlan,
};
use sonicshot_dump::{Dump, DumpError, LayoutSpec, Overwrite};
use std::fs;
use std::path::{Path, PathBuf};

const PAGE: u64 = 4096;

/// One `PT_LOAD` to write: where in the guest, bytes in the file, bytes in memory.
#[derive(Debug, Clone)]
struct Load {
    at: u64,
    data: Vec<u8>,
    mem_len: u64,
}

/// How a core differs from the plainest one.
#[derive(Debug, Clone, Copy)]
struct Quirks {
    /// QEMU 10 writes 8.
    header_size: u16,
    /// Where the program headers are; QEMU 10 puts section headers before them.
    headers_at: u64,
    /// Bytes between the headers and the data: QEMU's data is not aligned.
    gap: u64,
    /// The count in section 0 instead of the header.
    extended: bool,
}

const PLAIN: Quirks = Quirks {
    header_size: 64,
    headers_at: 64,
    gap: 0,
    extended: false,
};

fn write_core(loads: &[Load], quirks: Quirks) -> Vec<u8> {
    let mut file = vec![0; usize::try_from(quirks.headers_at.max(128)).unwrap()];
    file[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    file[16..18].copy_from_slice(&4_u16.to_le_bytes());
    file[18..20].copy_from_slice(&62_u16.to_le_bytes());
    file[32..40].copy_from_slice(&quirks.headers_at.max(64).to_le_bytes());
    file[52..54].copy_from_slice(&quirks.header_size.to_le_bytes());
    file[54..56].copy_from_slice(&56_u16.to_le_bytes());
    let count = u16::try_from(loads.len()).unwrap();
    let shown = if quirks.extended { 0xffff } else { count };
    file[56..58].copy_from_slice(&shown.to_le_bytes());
    if quirks.extended {
        // Section 0 right behind the header; its sh_info holds the count.
        file[40..48].copy_from_slice(&64_u64.to_le_bytes());
        file[64 + 44..64 + 48].copy_from_slice(&u32::from(count).to_le_bytes());
    }
    file.truncate(usize::try_from(quirks.headers_at).unwrap());
    let mut offset = quirks.headers_at + 56 * loads.len() as u64 + quirks.gap;
    for load in loads {
        file.extend(1_u32.to_le_bytes());
        file.extend(6_u32.to_le_bytes());
        for word in [
            offset,
            load.at | 0xffff_8880_0000_0000,
            load.at,
            load.data.len() as u64,
            load.mem_len,
            0,
        ] {
            file.extend(word.to_le_bytes());
        }
        offset += load.data.len() as u64;
    }
    file.resize(file.len() + usize::try_from(quirks.gap).unwrap(), 0xee);
    for load in loads {
        file.extend(&load.data);
    }
    file
}

fn put(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// A plan that drops the frames for which `drop` says so.
fn plan(dump: &Dump, drop: impl Fn(u64) -> bool) -> PrunePlan {
    let mut map = PageMap::new(dump.layout(), PageSize::SIZE_4K);
    map.set(
        PfnRange::new(Pfn::new(0), Pfn::new(u64::MAX)),
        PageClass::Kernel,
    );
    for frames in dump.layout().frames(PageSize::SIZE_4K) {
        for pfn in frames.iter().filter(|pfn| drop(pfn.raw())) {
            map.set(PfnRange::with_len(pfn, 1).unwrap(), PageClass::FreeBuddy);
        }
    }
    PrunePlan::new(&map, &DropClasses::default(), Fill::Zero)
}

/// Every byte of the guest's RAM.
fn contents(dump: &Dump) -> Vec<(u64, Vec<u8>)> {
    dump.layout()
        .regions()
        .iter()
        .map(|region| {
            let mut bytes = vec![0x77; usize::try_from(region.len()).unwrap()];
            dump.read(region.start(), &mut bytes).unwrap();
            (region.start().raw(), bytes)
        })
        .collect()
}

/// What the guest's RAM must read as once the plan is carried out.
fn expected(dump: &Dump, plan: &PrunePlan) -> Vec<(u64, Vec<u8>)> {
    let mut all = contents(dump);
    for run in plan.runs() {
        let range = run.frames.gpa_range(PageSize::SIZE_4K).unwrap();
        for (start, bytes) in &mut all {
            let end = *start + bytes.len() as u64;
            let (from, to) = (range.start().raw().max(*start), range.end().raw().min(end));
            if from < to {
                let bounds =
                    usize::try_from(from - *start).unwrap()..usize::try_from(to - *start).unwrap();
                bytes[bounds].fill(0);
            }
        }
    }
    all
}

fn loads() -> impl Strategy<Value = Vec<Load>> {
    let load = (
        0_u64..6,
        0_u64..3 * PAGE,
        0_u64..5 * PAGE,
        0_u64..3 * PAGE,
        any::<u8>(),
    );
    proptest::collection::vec(load, 1..5)
        .prop_map(|loads| {
            let mut at = 0;
            loads
                .into_iter()
                .map(|(pages, skew, len, more, seed)| {
                    at += pages * PAGE + skew / 512 * 512;
                    let data: Vec<u8> = (0..len)
                        .map(|i| seed.wrapping_add(u8::try_from(i % 251).unwrap()) | 1)
                        .collect();
                    let load = Load {
                        at,
                        mem_len: len + more,
                        data,
                    };
                    at += len + more;
                    load
                })
                .filter(|load| load.mem_len > 0)
                .collect::<Vec<_>>()
        })
        .prop_filter("some RAM", |loads| !loads.is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_pruned_core_keeps_every_kept_byte(
        loads in loads(),
        dropped in any::<u64>(),
        header_size in prop_oneof![Just(64_u16), Just(8)],
        headers_at in prop_oneof![Just(64_u64), Just(192)],
        gap in 0_u64..5000,
        reverse in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut written = loads.clone();
        if reverse {
            written.reverse();
        }
        let core = write_core(&written, Quirks { header_size, headers_at, gap, extended: false });
        let dump = Dump::open(put(folder.path(), "core", &core), None).unwrap();
        for load in &loads {
            let mut bytes = vec![0x77; usize::try_from(load.mem_len).unwrap()];
            dump.read(Gpa::new(load.at), &mut bytes).unwrap();
            prop_assert_eq!(&bytes[..load.data.len()], &load.data[..]);
            prop_assert!(bytes[load.data.len()..].iter().all(|byte| *byte == 0));
        }
        let plan = plan(&dump, |pfn| dropped >> (pfn % 64) & 1 == 1);
        let want = expected(&dump, &plan);
        let out = folder.path().join("out");
        dump.prune_to(&plan, &out, Overwrite::Refuse, &mut |_, _| {}).unwrap();
        let pruned = Dump::open(&out, None).unwrap();
        prop_assert_eq!(pruned.layout(), dump.layout());
        prop_assert_eq!(contents(&pruned), want);
        // Only what is kept is in the file, and each segment's data begins on a page.
        let len = fs::metadata(&out).unwrap().len();
        let file = fs::read(&out).unwrap();
        let count = u64::from(u16::from_le_bytes([file[56], file[57]]));
        prop_assert!(len <= 64 + count * 56 + core.len() as u64 + count * PAGE);
    }

    #[test]
    fn damaged_cores_are_read_or_refused(
        loads in loads(),
        changes in proptest::collection::vec((0_usize..400, any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut core = write_core(&loads, PLAIN);
        for (at, value) in changes {
            if let Some(byte) = core.get_mut(at) {
                *byte = value;
            }
        }
        let cut = cut.index(core.len() * 2);
        core.truncate(cut.max(1));
        if let Ok(dump) = Dump::open(put(folder.path(), "core", &core), None) {
            let mut byte = [0];
            for region in dump.layout().regions() {
                let _ = dump.read(region.start(), &mut byte);
                let _ = dump.next_data(region.start());
            }
        }
    }

    #[test]
    fn raw_by_copy_and_in_place_agree(pages in 1_u64..80, dropped in any::<u64>(), holes in any::<u64>()) {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..pages)
            .flat_map(|page| vec![if holes >> (page % 64) & 1 == 1 { 0 } else { 1 + u8::try_from(page).unwrap() }; 4096])
            .collect();
        let path = put(folder.path(), "raw", &bytes);
        let dump = Dump::open(&path, Some(&LayoutSpec::Flat)).unwrap();
        let plan = plan(&dump, |pfn| dropped >> (pfn % 64) & 1 == 1);
        let want: Vec<u8> = expected(&dump, &plan).remove(0).1;
        let out = folder.path().join("out");
        let by_copy = dump.prune_to(&plan, &out, Overwrite::Refuse, &mut |_, _| {}).unwrap();
        prop_assert_eq!(fs::read(&out).unwrap(), want.clone());
        prop_assert_eq!(fs::read(&path).unwrap(), bytes);
        let in_place = dump.prune_in_place(&plan, &mut |_, _| {}).unwrap();
        prop_assert_eq!(fs::read(&path).unwrap(), want);
        prop_assert_eq!(by_copy.dropped_bytes, in_place.dropped_bytes);
        let again = Dump::open(&path, Some(&LayoutSpec::Flat)).unwrap();
        prop_assert_eq!(again.prune_in_place(&plan, &mut |_, _| {}).unwrap().punched, 0);
    }
}

#[test]
fn a_split_at_the_pci_hole_reads_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..8_u8).flat_map(|page| vec![page + 1; 4096]).collect();
    let path = put(folder.path(), "raw", &bytes);
    let layout: LayoutSpec = "0-20K,4G-0x100003000".parse().unwrap();
    let dump = Dump::open(&path, Some(&layout)).unwrap();
    assert_eq!(dump.read_u32(Gpa::new(0x4000)).unwrap(), 0x0505_0505);
    assert_eq!(dump.read_u32(Gpa::new(1 << 32)).unwrap(), 0x0606_0606);
    assert!(dump.read_u32(Gpa::new(0x4ffe)).is_err());
    // Dropped on both sides, the pages are neighbours in the file.
    let plan = plan(&dump, |pfn| pfn == 4 || pfn == 1 << 20);
    let stats = dump.prune_in_place(&plan, &mut |_, _| {}).unwrap();
    assert_eq!((stats.runs, stats.dropped_bytes), (1, 8192));
    let now = fs::read(&path).unwrap();
    assert!(now[0x4000..0x6000].iter().all(|byte| *byte == 0));
    assert_eq!((now[0x3fff], now[0x6000]), (4, 7));
}

#[test]
fn more_segments_than_sixteen_bits_are_counted_in_section_0() {
    let folder = tempfile::tempdir().unwrap();
    let loads = [Load {
        at: 0x1000,
        data: vec![9; 4096],
        mem_len: 4096,
    }];
    let quirks = Quirks {
        headers_at: 128,
        extended: true,
        ..PLAIN
    };
    let dump = Dump::open(
        put(folder.path(), "core", &write_core(&loads, quirks)),
        None,
    )
    .unwrap();
    assert_eq!(dump.layout().bytes(), 4096);
}

#[test]
fn a_core_with_too_many_holes_joins_the_smallest() {
    let folder = tempfile::tempdir().unwrap();
    // 140,000 pages, every other one dropped: more runs than a header can count.
    let pages = 140_000_u64;
    let mut data = vec![1; usize::try_from(pages * PAGE).unwrap()];
    data[0] = 2;
    let loads = [Load {
        at: 0,
        mem_len: pages * PAGE,
        data,
    }];
    let dump = Dump::open(put(folder.path(), "core", &write_core(&loads, PLAIN)), None).unwrap();
    let plan = plan(&dump, |pfn| pfn % 2 == 1);
    let out = folder.path().join("out");
    dump.prune_to(&plan, &out, Overwrite::Refuse, &mut |_, _| {})
        .unwrap();
    let pruned = Dump::open(&out, None).unwrap();
    assert_eq!(pruned.layout(), dump.layout());
    let mut page = vec![0; 4096];
    for pfn in (0..pages).step_by(997) {
        pruned.read(Gpa::new(pfn * PAGE), &mut page).unwrap();
        let want = if pfn % 2 == 1 { 0 } else { 1 };
        assert!(page[1..].iter().all(|byte| *byte == want), "frame {pfn}");
    }
}

#[test]
fn outputs_appear_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = put(folder.path(), "raw", &[1; 8192]);
    let dump = Dump::open(&path, Some(&LayoutSpec::Flat)).unwrap();
    let plan = plan(&dump, |pfn| pfn == 0);
    let out = put(folder.path(), "out", b"there");
    let prune = |out: &Path, overwrite| dump.prune_to(&plan, out, overwrite, &mut |_, _| {});
    assert!(matches!(
        prune(&out, Overwrite::Refuse),
        Err(DumpError::Exists { .. })
    ));
    assert!(matches!(
        prune(&path, Overwrite::Replace),
        Err(DumpError::SameFile { .. })
    ));
    assert!(matches!(
        prune(&folder.path().join("no/such/out"), Overwrite::Refuse),
        Err(DumpError::Io { .. })
    ));
    assert_eq!(fs::read(&out).unwrap(), b"there");
    prune(&out, Overwrite::Replace).unwrap();
    assert_eq!(fs::metadata(&out).unwrap().len(), 8192);
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        2,
        "nothing temporary is left"
    );
}

#[test]
fn other_formats_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[u8], &str); 6] = [
        (b"QEVM\0\0\0\x03", "QEMU migration"),
        (b"KDUMP   ", "kdump"),
        (b"makedumpfile\0\0\0\0", "flattened"),
        (b"EMiL\x01\0\0\0", "LiME"),
        (b"Xen saved domain, xl format\n \0 \r", "xl save"),
        (b"LibvirtQemudSave", "libvirt"),
    ];
    for (magic, name) in cases {
        let mut bytes = magic.to_vec();
        bytes.resize(8192, 0);
        let error = Dump::open(put(folder.path(), "x", &bytes), None).unwrap_err();
        assert!(matches!(error, DumpError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
}
