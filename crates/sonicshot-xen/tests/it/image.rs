//! Images made here, byte by byte, by another hand than the reader's.

use proptest::prelude::*;
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{
    DropClasses, FileBytes, FileContent, FileOffset, FileRange, Fill, Gpa, GpaRange, PageClass,
    PageMap, PageSize, Pfn, PfnRange, PrunePlan, RamLayout,
};
use sonicshot_xen::{
    DomainKind, Joined, Layer, ParseOptions, Part, Skeleton, Within, XenError, XlImage,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const PAGE: usize = 4096;
const XALLOC: u8 = 0xe;
const XTAB: u8 = 0xf;
const BROKEN: u8 = 0xd;

/// A record of a libxc stream.
#[derive(Debug, Clone)]
enum Item {
    /// Type, number, and what fills the page.
    Pages(Vec<(u8, u64, u8)>),
    Other(u32, Vec<u8>),
}

fn has_data(kind: u8) -> bool {
    kind < BROKEN
}

fn record(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(body);
    out.extend(vec![0; (8 - body.len() % 8) % 8]);
}

fn pages_body(pages: &[(u8, u64, u8)]) -> Vec<u8> {
    let mut body = (pages.len() as u32).to_le_bytes().to_vec();
    body.extend([0; 4]);
    for (kind, pfn, _) in pages {
        body.extend((pfn | u64::from(*kind) << 60).to_le_bytes());
    }
    for (kind, _, fill) in pages {
        if has_data(*kind) {
            body.extend([*fill; PAGE]);
        }
    }
    body
}

/// Up to the first record of the libxc stream.
fn head(kind: u8, version: u8) -> Vec<u8> {
    let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
    let config = b"{\"c_info\":{}}";
    out.extend([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0]);
    out.extend((config.len() as u32).to_le_bytes());
    out.extend(config);
    out.extend(b"LibxlFmt\0\0\0\x02\0\0\0\0");
    // A libxl record, then the memory image.
    record(&mut out, 2, b"emulator");
    record(&mut out, 1, b"");
    out.extend([0xff; 8]);
    out.extend(b"XENF\0\0\0");
    out.push(version);
    out.extend([0; 8]);
    out.extend([kind, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    out
}

fn tail(out: &mut Vec<u8>) {
    record(out, 0, b"");
    record(out, 3, b"a device");
    record(out, 0, b"");
}

fn image(kind: u8, items: &[Item]) -> Vec<u8> {
    let mut out = head(kind, 3);
    for item in items {
        match item {
            Item::Pages(pages) => record(&mut out, 1, &pages_body(pages)),
            Item::Other(kind, body) => record(&mut out, *kind, body),
        }
    }
    tail(&mut out);
    out
}

fn parse(data: &[u8]) -> Result<XlImage, XenError> {
    XlImage::parse(FileBytes::from_slice(data))
}

/// The guest's memory after a restore: each frame's content, or nothing that is known.
fn model(items: &[Item]) -> BTreeMap<u64, (Option<u8>, bool)> {
    let mut frames: BTreeMap<u64, (Option<u8>, bool, bool)> = BTreeMap::new();
    for item in items {
        let Item::Pages(pages) = item else { continue };
        for (kind, pfn, fill) in pages {
            let frame = frames.entry(*pfn).or_insert((None, true, false));
            if has_data(*kind) {
                frame.0 = Some(*fill);
            }
            frame.1 &= *kind == 0 || *kind == XALLOC;
            frame.2 |= *kind != XTAB && *kind != BROKEN;
        }
    }
    frames.retain(|_, frame| frame.2);
    let known = |(pfn, (fill, ordinary, _))| (pfn, (fill, ordinary));
    frames.into_iter().map(known).collect()
}

fn seen(data: &[u8]) -> BTreeMap<u64, (Option<u8>, bool)> {
    let image = parse(data).unwrap();
    let frame = |frame: &sonicshot_xen::Frame| {
        let fill = frame.data().map(|at| {
            let page = &data[usize::try_from(at.raw()).unwrap()..][..PAGE];
            assert!(page.iter().all(|byte| *byte == page[0]));
            page[0]
        });
        (frame.pfn().raw(), (fill, frame.may_be_dropped()))
    };
    image.frames().iter().map(frame).collect()
}

fn plan(drop: &[u64]) -> PrunePlan {
    let ram = GpaRange::new(Gpa::ZERO, Gpa::new(64 * 4096));
    let layout = RamLayout::new(vec![ram]).unwrap();
    let mut map = PageMap::new(&layout, PageSize::SIZE_4K);
    for pfn in drop {
        let frame = PfnRange::with_len(Pfn::new(*pfn), 1).unwrap();
        map.set(frame, PageClass::FreeBuddy);
    }
    PrunePlan::new(&map, &DropClasses::default(), Fill::Any)
}

fn inside(range: FileRange) -> std::ops::Range<usize> {
    let place = |at: FileOffset| usize::try_from(at.raw()).unwrap();
    place(range.start())..place(range.end())
}

fn prune(data: &[u8], drop: &[u64]) -> Vec<u8> {
    let image = parse(data).unwrap();
    let dropped = image.dropped(&plan(drop));
    let mut out = Vec::new();
    let bytes = FileBytes::from_slice(data);
    image
        .pruned(
            bytes,
            &dropped,
            |error| error,
            |part| {
                match part {
                    Part::Bytes(bytes) => out.extend(bytes),
                    Part::Copy(range) => out.extend(&data[inside(range)]),
                }
                Ok(())
            },
        )
        .unwrap();
    out
}

/// The records of a pruned image, made from the items and not from the image.
fn expected(items: &[Item], drop: &[u64]) -> Vec<Item> {
    let model = model(items);
    let goes = |pfn: &u64| drop.contains(pfn) && model.get(pfn).is_some_and(|frame| frame.1);
    let pages = |pages: &Vec<(u8, u64, u8)>| {
        let page = |(kind, pfn, fill): &(u8, u64, u8)| match goes(pfn) {
            true => (XALLOC, *pfn, *fill),
            false => (*kind, *pfn, *fill),
        };
        Item::Pages(pages.iter().map(page).collect())
    };
    items
        .iter()
        .map(|item| match item {
            Item::Pages(of) => pages(of),
            other @ Item::Other(..) => other.clone(),
        })
        .collect()
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let kinds = prop_oneof![
        12 => Just(0_u8),
        1 => 1_u8..5,
        1 => 9_u8..13,
        1 => Just(BROKEN),
        2 => Just(XALLOC),
        1 => Just(XTAB),
    ];
    let page = (kinds, 0_u64..64, any::<u8>());
    let item = prop_oneof![
        4 => proptest::collection::vec(page, 1..12).prop_map(Item::Pages),
        1 => (
            prop_oneof![Just(2_u32), Just(4), Just(7), Just(0x10), Just(0x8000_1234)],
            proptest::collection::vec(any::<u8>(), 0..40)
        )
            .prop_map(|(kind, body)| Item::Other(kind, body)),
    ];
    proptest::collection::vec(item, 0..10)
}

#[test]
fn the_records_are_told_of_to_the_end_of_the_image() {
    let pages = |first: u64| Item::Pages((first..first + 4).map(|pfn| (0, pfn, 7)).collect());
    let items: Vec<Item> = (0..64).map(|number| pages(4 * number)).collect();
    let data = image(2, &items);
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let tell = move |done: u64, total: u64| telling.lock().unwrap().push((done, total));
    let options = ParseOptions::new().progress(Arc::new(tell));
    let parsed = XlImage::parse_with(FileBytes::from_slice(&data), &options).unwrap();
    assert_eq!(parsed.frames().len(), 256);
    let (told, total) = (told.lock().unwrap(), data.len() as u64);
    // Record by record.
    assert!(told.is_sorted() && told.len() > 64, "{told:?}");
    let ends = (told.first().copied(), told.last().copied());
    assert_eq!(ends, (Some((0, total)), Some((total, total))));
}

proptest! {
    #[test]
    fn the_last_copy_of_a_page_counts(items in items(), kind in 1_u8..3) {
        let data = image(kind, &items);
        let parsed = parse(&data).unwrap();
        prop_assert_eq!(parsed.kind(), if kind == 1 { DomainKind::Pv } else { DomainKind::Hvm });
        prop_assert_eq!(parsed.xen_version(), (4, 17));
        prop_assert_eq!(parsed.records().len(), items.len() + 1);
        prop_assert_eq!(seen(&data), model(&items));
    }

    #[test]
    fn only_dropped_pages_are_changed(
        items in items(),
        drop in proptest::collection::vec(0_u64..64, 0..64),
    ) {
        let data = image(1, &items);
        let pruned = prune(&data, &drop);
        prop_assert!(pruned == image(1, &expected(&items, &drop)));
        // What is left out already is left out again.
        prop_assert!(prune(&pruned, &drop) == pruned);
    }

    #[test]
    fn damage_is_no_panic(
        items in items(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut data = image(2, &items);
        for (at, byte) in changes {
            let at = at.index(data.len());
            data[at] = byte;
        }
        if let Ok(image) = parse(&data) {
            for frame in image.frames() {
                let at = frame.data().map_or(0, |at| at.raw() + 4096);
                prop_assert!(at <= data.len() as u64);
            }
            prune(&data, &[1, 2, 3]);
        }
    }
}

/// The skeleton of `data` without `drop`, and the image that it makes with what the guest has.
fn split_and_join(data: &[u8], drop: &[u64]) -> (Vec<u8>, Vec<u8>) {
    let image = parse(data).unwrap();
    let dropped = image.dropped(&plan(drop));
    let bytes = FileBytes::from_slice(data);
    let skeleton = image.skeleton(bytes, &dropped).unwrap();
    let memory = seen(data);
    let joined = join(&skeleton, |pfn| memory[&pfn].0.unwrap()).unwrap();
    (skeleton, joined)
}

fn join(skeleton: &[u8], content: impl Fn(u64) -> u8) -> Result<Vec<u8>, XenError> {
    let bytes = FileBytes::from_slice(skeleton);
    let mut out = Vec::new();
    let put = |part| {
        match part {
            Joined::Skeleton(range) => out.extend(&skeleton[inside(range)]),
            Joined::Pages { frames, .. } => {
                for pfn in frames.iter() {
                    out.extend([content(pfn.raw()); PAGE]);
                }
            }
        }
        Ok(())
    };
    Skeleton::parse(bytes)?.joined(bytes, |error| error, put)?;
    Ok(out)
}

proptest! {
    #[test]
    fn a_skeleton_and_the_memory_are_the_image_again(
        items in items(),
        drop in proptest::collection::vec(0_u64..64, 0..64),
    ) {
        let data = image(1, &items);
        let (skeleton, joined) = split_and_join(&data, &drop);
        let (before, after) = (model(&items), seen(&joined));
        prop_assert!(before.keys().eq(after.keys()));
        for (pfn, (fill, ordinary)) in before {
            let goes = drop.contains(&pfn) && ordinary;
            prop_assert_eq!(after[&pfn].0, if goes { None } else { fill }, "{}", pfn);
        }
        // The last word on what each page is stays, unless it is dropped.
        let types = last_types(&joined, &items);
        for (pfn, was) in last_types(&data, &items) {
            let is = types[&pfn];
            prop_assert!(is == was || was == 0 && is == XALLOC && drop.contains(&pfn));
        }
        let mut numbers: Vec<u64> = Vec::new();
        for item in &items {
            if let Item::Pages(pages) = item {
                numbers.extend(pages.iter().map(|page| page.1));
            }
        }
        let count = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        if count == numbers.len() {
            // Of a save in one pass, to the byte.
            prop_assert!(joined == prune(&data, &drop));
        }
        prop_assert!(skeleton.len() < 1000 + 100 * items.len() + 8 * count);
        prop_assert!(split_and_join(&joined, &[]) == (skeleton, joined));
    }

    #[test]
    fn a_damaged_skeleton_is_no_panic(
        items in items(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut data = split_and_join(&image(1, &items), &[]).0;
        for (at, byte) in changes {
            let at = at.index(data.len());
            data[at] = byte;
        }
        if let Ok(joined) = join(&data, |pfn| pfn.to_le_bytes()[0]) {
            let image = parse(&joined).unwrap();
            for frame in image.frames().iter().filter(|frame| frame.data().is_some()) {
                let at = usize::try_from(frame.data().unwrap().raw()).unwrap();
                prop_assert_eq!(joined[at], frame.pfn().raw().to_le_bytes()[0]);
            }
        }
    }
}

/// The type that the last entry of each page has, in an image of as many pages as `items` are.
fn last_types(data: &[u8], items: &[Item]) -> BTreeMap<u64, u8> {
    let mut types = BTreeMap::new();
    let image = parse(data).unwrap();
    for (record, item) in image.records().iter().zip(items) {
        let Item::Pages(pages) = item else { continue };
        let at = usize::try_from(record.offset.raw()).unwrap() + 16;
        for (index, (_, pfn, _)) in pages.iter().enumerate() {
            types.insert(*pfn, data[at + index * 8 + 7] >> 4);
        }
    }
    types
}

#[test]
fn a_skeleton_that_asks_for_a_page_twice_is_refused() {
    // One page in two records, then in one. In a skeleton only the entries are there.
    for records in [&[vec![1, 2], vec![3, 1]][..], &[vec![4, 5, 4]]] {
        let mut data = head(1, 3);
        let mut last = 0;
        for pages in records {
            let pages: Vec<_> = pages.iter().map(|pfn| (0, *pfn, 0)).collect();
            let body = pages_body(&pages);
            data.extend(1_u32.to_le_bytes());
            data.extend((body.len() as u32).to_le_bytes());
            data.extend(&body[..8 + 8 * pages.len()]);
            last = data.len() - 8;
        }
        tail(&mut data);
        let error = Skeleton::parse(FileBytes::from_slice(&data)).unwrap_err();
        let wanted = format!(
            "a second content of a page in record {}, at offset {last:#x} (value {:#x})",
            1 + records.len(),
            records[0][0],
        );
        assert_eq!(error.to_string(), wanted);
    }
}

#[test]
fn pages_are_asked_for_in_the_order_of_the_file() {
    let items = [
        Item::Pages(vec![
            (0, 5, 1),
            (0, 6, 2),
            (2, 7, 3),
            (XALLOC, 8, 0),
            (0, 9, 4),
        ]),
        Item::Pages(vec![(0, 1, 5), (0, 6, 6)]),
    ];
    let data = image(1, &items);
    let skeleton = split_and_join(&data, &[]).0;
    let bytes = FileBytes::from_slice(&skeleton);
    let mut asked = Vec::new();
    let skeleton = Skeleton::parse(bytes).unwrap();
    let each = |part| {
        if let Joined::Pages { frames, tables } = part {
            asked.push((frames.start().raw(), frames.end().raw(), tables));
        }
        Ok::<(), XenError>(())
    };
    skeleton.joined(bytes, |error| error, each).unwrap();
    // Of page 6 the second copy.
    let expected = [
        (5, 6, false),
        (7, 8, true),
        (9, 10, false),
        (1, 2, false),
        (6, 7, false),
    ];
    assert_eq!(asked, expected);
    let content: Vec<(u64, bool)> = skeleton
        .frames()
        .map(|(pfn, has)| (pfn.raw(), has))
        .collect();
    let expected = [
        (1, true),
        (5, true),
        (6, true),
        (7, true),
        (8, false),
        (9, true),
    ];
    assert_eq!(content, expected);
}

#[test]
fn page_tables_are_kept_in_every_pass() {
    let tables = (1..5).chain(9..13);
    for table in tables {
        for pages in [
            vec![(table, 5, 1)],
            vec![(table, 5, 1), (0, 5, 2)],
            vec![(0, 5, 1), (table, 5, 2)],
        ] {
            let items = [Item::Pages(pages), Item::Pages(vec![(0, 6, 3)])];
            let data = image(1, &items);
            let pruned = prune(&data, &[5, 6]);
            assert_eq!(data.len() - pruned.len(), PAGE, "only page 6 goes");
            assert_eq!(seen(&pruned)[&5], seen(&data)[&5]);
        }
    }
}

#[test]
fn an_image_cut_off_anywhere_is_refused_with_the_place() {
    let items = [
        Item::Other(2, vec![1; 8]),
        Item::Pages(vec![(0, 1, 1), (XALLOC, 2, 0)]),
    ];
    let data = image(1, &items);
    let first_record = head(1, 3).len();
    for len in (0..data.len()).filter(|len| *len < 400 || len % 61 == 0 || data.len() - len < 70) {
        match parse(&data[..len]) {
            Err(XenError::Truncated {
                place,
                wanted,
                left,
            }) => {
                assert!(
                    wanted > left && place.offset.raw() + left == len as u64,
                    "{len}: {place}"
                );
                if len > first_record + 8 {
                    assert!(
                        matches!(place.within, Within::Record(2..)),
                        "{len}: {place}"
                    );
                }
            }
            other => panic!("{len}: {other:?}"),
        }
    }
}

/// An image of one page, with some bytes of it changed.
fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut data = image(1, &[Item::Pages(vec![(0, 1, 0)])]);
    data[at..at + bytes.len()].copy_from_slice(bytes);
    data
}

#[test]
fn what_contradicts_the_format_is_named_with_record_and_offset() {
    let libxl = 48 + 13;
    let libxc = head(1, 3).len() - 40;
    let pages = head(1, 3).len();
    let last = image(1, &[Item::Pages(vec![(0, 1, 1)])]).len();
    let in_file: [(usize, &[u8], &str); 22] = [
        (
            0,
            b"x",
            "magic of an xl image in the headers, at offset 0x0 ",
        ),
        (
            32,
            &[1, 2, 3, 4],
            "byte order in the headers, at offset 0x20 (value 0x4030201)",
        ),
        (36, &[7], "mandatory flag"),
        (36, &[1], "before Xen 4.6"),
        (44, &[0xff; 4], "truncated in the headers, at offset 0x30"),
        (libxl, b"x", "magic of the libxl stream"),
        (libxl + 11, &[3], "version of the libxl stream"),
        (libxl + 15, &[1], "big-endian stream"),
        (libxl + 20, &[0xff; 4], "truncated in record 0"),
        (
            libxl + 36,
            &[8],
            "length of the memory image's record in record 1",
        ),
        (libxc, &[0], "magic of the libxc stream in record 1"),
        (libxc + 15, &[1], "version of the libxc stream"),
        (libxc + 17, &[1], "big-endian stream"),
        (libxc + 24, &[3], "kind of the domain"),
        (libxc + 28, &[13], "size of a page"),
        (
            pages,
            &[0xe],
            "checkpointed stream (Remus, COLO) in record 2",
        ),
        (pages, &[0xd], "to be verified in record 2"),
        (pages + 4, &[0, 0, 0, 9], "length of a record in record 2"),
        (
            pages + 8,
            &[2],
            "record of pages of another length in record 2",
        ),
        (pages + 8, &[0], "number of pages in record 2"),
        (pages + 8, &[0xff; 4], "number of pages in record 2"),
        (last - 8, &[1], "a second memory image in record 5"),
    ];
    for (at, bytes, wanted) in in_file {
        let error = parse(&changed(at, bytes)).unwrap_err().to_string();
        assert!(error.contains(wanted), "{at:#x}: {error}");
    }
    let mut none = head(1, 3);
    none.truncate(libxl + 32);
    record(&mut none, 0, b"");
    let error = parse(&none).unwrap_err().to_string();
    assert!(
        error.contains("no memory image before the end in record 1"),
        "{error}"
    );
}

#[test]
fn a_page_that_cannot_be_is_named_with_record_and_place() {
    let pages = head(1, 3).len();
    for (word, wanted) in [
        (5 << 60, "type of a page"),
        (8 << 60 | 1, "type of a page"),
        (1 << 40, "number of a page"),
        (1 << 55, "number of a page"),
        (u64::from(XTAB) << 60 | 1, "pages of another length"),
    ] {
        let word: u64 = word;
        let error = parse(&changed(pages + 16, &word.to_le_bytes())).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(wanted) && error.contains("in record 2"),
            "{word:#x}: {error}"
        );
    }
    let beyond = [
        Item::Other(3, vec![0, 0, 0, 0, 9, 0, 0, 0]),
        Item::Pages(vec![(0, 9, 1), (0, 10, 1)]),
    ];
    let error = parse(&image(1, &beyond)).unwrap_err().to_string();
    assert!(
        error.contains("beyond the guest's last in record 3") && error.contains("0xa"),
        "{error}"
    );
    assert!(parse(&image(2, &beyond)).is_ok(), "only PV has it");
    let error = parse(&image(1, &[Item::Other(3, vec![0; 4])])).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("length of P2M_FRAMES in record 2")
    );
}

#[test]
fn both_versions_and_trailing_bytes() {
    for version in [2, 3] {
        let mut data = head(2, version);
        record(&mut data, 1, &pages_body(&[(0, 1, 7), (0, 2, 8)]));
        tail(&mut data);
        data.extend(b"whatever follows");
        assert_eq!(seen(&data).len(), 2);
        let pruned = prune(&data, &[1]);
        assert!(pruned.ends_with(b"whatever follows"));
        assert_eq!(data.len() - pruned.len(), PAGE);
    }
}

/// An xl image, the libxl stream in it, and the libxc stream in that.
fn layers(items: &[Item]) -> [(Layer, Vec<u8>); 3] {
    let whole = image(1, items);
    let libxl = whole[48 + 13..].to_vec();
    let mut end = Vec::new();
    tail(&mut end);
    let libxc = whole[head(1, 3).len() - 40..whole.len() - end.len() + 8].to_vec();
    assert!(libxl.starts_with(b"LibxlFmt") && libxc.starts_with(&[0xff; 8]));
    [
        (Layer::Xl, whole),
        (Layer::Libxl, libxl),
        (Layer::Libxc, libxc),
    ]
}

proptest! {
    #[test]
    fn a_stream_by_itself_is_read_and_pruned_as_in_an_image(
        items in items(),
        drop in proptest::collection::vec(0_u64..64, 0..64),
    ) {
        let pruned = layers(&expected(&items, &drop));
        for ((layer, data), (_, pruned)) in layers(&items).iter().zip(&pruned) {
            prop_assert_eq!(parse(data).unwrap().outermost(), *layer);
            prop_assert_eq!(seen(data), model(&items));
            prop_assert!(prune(data, &drop) == *pruned);
        }
    }
}

#[test]
fn a_stream_by_itself_counts_its_own_records() {
    let items = [Item::Other(2, vec![1; 8]), Item::Pages(vec![(5, 1, 1)])];
    for ((layer, data), record) in layers(&items).iter().zip([3, 3, 1]) {
        let error = parse(data).unwrap_err().to_string();
        let wanted = format!("type of a page in record {record}, at offset");
        assert!(error.contains(&wanted), "{layer:?}: {error}");
    }
    for (layer, data) in layers(&[Item::Pages(vec![(0, 1, 1)])]) {
        for len in 0..data.len() {
            let cut = parse(&data[..len]);
            assert!(
                matches!(
                    cut,
                    Err(XenError::Truncated { .. } | XenError::Malformed { .. })
                ),
                "{layer:?}, {len}: {cut:?}"
            );
        }
    }
}

/// A `struct hvm_hw_cpu`: `CR0`, `CR3`, `CR4`, `EFER`.
fn hvm_cpu(control: [u64; 4], len: usize) -> Vec<u8> {
    let mut out = vec![0x77; 1032];
    let [cr0, cr3, cr4, efer] = control;
    for (at, value) in [
        (640, 0xffff_ffff_8100_0000),
        (648, 0x246),
        (656, cr0),
        (672, cr3),
        (680, cr4),
        (736, 0x10),
        (808, 0),
        (992, efer),
    ] {
        out[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    out.truncate(len);
    out
}

/// The parts of an HVM context: type, number, content.
fn hvm_context(parts: &[(u8, u8, Vec<u8>)]) -> Item {
    let mut body = Vec::new();
    for (kind, instance, content) in parts {
        body.extend([*kind, 0, *instance, 0]);
        body.extend((content.len() as u32).to_le_bytes());
        body.extend(content);
    }
    Item::Other(9, body)
}

/// A PV processor's record: its number, `CR0`, `CR3`, `CR4`.
fn pv_cpu(id: u32, control: [u64; 3], len: usize) -> Item {
    let mut body = id.to_le_bytes().to_vec();
    body.resize(8 + len, 0x77);
    let [cr0, cr3, cr4] = control;
    for (at, value) in [(4984, cr0), (5008, cr3), (5016, cr4)] {
        if let Some(place) = body.get_mut(8 + at..16 + at) {
            place.copy_from_slice(&u64::to_le_bytes(value));
        }
    }
    Item::Other(4, body)
}

#[test]
fn processors_are_no_more_than_a_domain_has() {
    const MOST: u16 = 1 << 14;
    for (count, is_read) in [(MOST, true), (MOST + 1, false)] {
        let cpu = hvm_cpu([0x8005_0033, 0x1000, 0x37_0ef0, 0xd01], 1032);
        let mut body = Vec::new();
        for id in 0..count {
            body.extend([2, id].map(u16::to_le_bytes).concat());
            body.extend(1032_u32.to_le_bytes());
            body.extend(&cpu);
        }
        body.extend([0; 8]);
        let data = image(2, &[Item::Other(9, body)]);
        let vcpus = parse(&data).unwrap().vcpus(FileBytes::from_slice(&data));
        assert_eq!(vcpus.is_ok(), is_read, "{count}");
    }
}

#[test]
fn processors_are_told() {
    let vcpus = |kind: u8, items: &[Item]| {
        let data = image(kind, items);
        let vcpus = parse(&data).unwrap().vcpus(FileBytes::from_slice(&data));
        vcpus.map(|vcpus| {
            assert_eq!(vcpus.offline, 0);
            let control = |vcpu: &sonicshot_xen::Vcpu| (vcpu.id, vcpu.control);
            vcpus.online.iter().map(control).collect::<Vec<_>>()
        })
    };
    let cpu = |cr3: u64| hvm_cpu([0x8005_0033, cr3, 0x37_0ef0, 0xd01], 1032);
    let registers = |cr3| ControlRegisters::new(0x8005_0033, cr3, 0x37_0ef0, Some(0xd01));
    let page = Item::Pages(vec![(0, 0, 1)]);
    let end = (0, 0, Vec::new());
    let header = (1, 0, vec![1; 24]);
    let good = [
        page.clone(),
        hvm_context(&[
            header.clone(),
            (2, 0, cpu(0x1000)),
            (2, 3, cpu(0x2000)),
            (5, 0, vec![2; 16]),
            end.clone(),
        ]),
    ];
    let want = vec![(0, registers(0x1000)), (3, registers(0x2000))];
    assert_eq!(vcpus(2, &good).unwrap(), want);
    // Xen's of before 4.15 are shorter.
    let old = hvm_context(&[(2, 0, hvm_cpu([1, 2, 3, 4], 1000)), end.clone()]);
    let want = vec![(0, ControlRegisters::new(1, 2, 3, Some(4)))];
    assert_eq!(vcpus(2, &[old]).unwrap(), want);
    for wrong in [
        vec![page.clone()],
        vec![hvm_context(&[header.clone(), end.clone()])],
        vec![hvm_context(&[header.clone(), (2, 0, cpu(0x1000))])],
        vec![hvm_context(&[(2, 1, cpu(0x1000)), end.clone()])],
        vec![hvm_context(&[(2, 0, cpu(1)), (2, 0, cpu(1)), end.clone()])],
        vec![hvm_context(&[(2, 0, hvm_cpu([0; 4], 999)), end.clone()])],
        vec![hvm_context(&[(2, 0, vec![0; 5000]), end.clone()])],
        vec![good[1].clone(), good[1].clone()],
        vec![Item::Other(9, vec![2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])],
        // Of the other kind of domain.
        vec![pv_cpu(0, [8, 0x1000, 0x10], 5168)],
    ] {
        assert!(vcpus(2, &wrong).is_err(), "{wrong:?}");
    }

    // A PV guest's root is the guest's own frame; it always has paging and long mode.
    let good = [
        page,
        pv_cpu(0, [8, 0x1000, 0x10], 5168),
        pv_cpu(2, [8, 0x4018, 0], 5168),
    ];
    let long = Some(0x500);
    let want = vec![
        (0, ControlRegisters::new(0x8000_0009, 0x1000, 0x30, long)),
        (2, ControlRegisters::new(0x8000_0009, 0x4000, 0x20, long)),
    ];
    assert_eq!(vcpus(1, &good).unwrap(), want);
    for wrong in [
        // A 32-bit guest.
        vec![pv_cpu(0, [8, 0x1000, 0x10], 2800)],
        vec![pv_cpu(0, [8, 0x1000, 0x10], 5169)],
        vec![good[2].clone(), good[1].clone()],
        vec![good[1].clone(), good[1].clone()],
        vec![good[2].clone()],
        vec![hvm_context(&[(2, 0, cpu(0x1000)), end])],
    ] {
        assert!(vcpus(1, &wrong).is_err(), "{wrong:?}");
    }
}

/// The number of times that this thread has read from a file.
fn reads() -> u64 {
    let said = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    let count = said.lines().find_map(|line| line.strip_prefix("syscr: "));
    count.unwrap().parse().unwrap()
}

#[test]
fn the_entries_of_a_record_are_read_at_one_go() {
    const PAGES: u64 = 20_000;
    let pages =
        |first: u64| Item::Pages((first..first + 1000).map(|pfn| (XALLOC, pfn, 0)).collect());
    let items: Vec<Item> = (0..PAGES / 1000).map(|at| pages(at * 1000)).collect();
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &image(2, &items)).unwrap();
    let content = FileContent::new(file).unwrap();
    let before = reads();
    let image = XlImage::parse(content.bytes()).unwrap();
    let read = reads() - before;
    assert_eq!(image.frames().len() as u64, PAGES);
    assert!(read < PAGES / 50, "{read} times read for {PAGES} pages");
}
