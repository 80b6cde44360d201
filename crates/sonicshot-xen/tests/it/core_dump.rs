//! Cores made here, byte by byte, by another hand than the reader's.

use proptest::prelude::*;
use sonicshot::x86_64::ControlRegisters;
use sonicshot::{FileBytes, Mfn, P2mError, Pfn};
use sonicshot_xen::{CoreDump, DomainKind, ParseOptions, Within, XenError};
use std::collections::BTreeMap;
use std::error::Error;
use std::slice::from_ref;
use std::sync::{Arc, Mutex};

const PAGE: usize = 4096;
const NONE: u64 = u64::MAX;
const PV: u64 = 0xf00f_ebed;
const HVM: u64 = 0xf00f_ebee;

/// The content of a core. Its pages are filled with their place.
#[derive(Debug, Clone)]
struct Core {
    magic: u64,
    /// Number, and the machine's number.
    pages: Vec<(u64, u64)>,
    /// The number of pages that the header's note tells.
    count: u64,
    page_size: u64,
    format: u64,
    /// Type and content of more notes.
    notes: Vec<(u32, Vec<u8>)>,
    /// The processors' contexts, and how many the header's note says there are.
    prstatus: Vec<u8>,
    vcpus: u64,
    /// Names of more sections.
    more: Vec<&'static str>,
    /// Sections and notes that are missing, by name and type.
    without: Vec<&'static str>,
    without_note: u32,
}

fn core(magic: u64, pages: &[(u64, u64)]) -> Core {
    Core {
        magic,
        pages: pages.to_vec(),
        count: pages.len() as u64,
        page_size: 4096,
        format: 1,
        notes: Vec::new(),
        prstatus: vec![0x11; 56],
        vcpus: 1,
        more: Vec::new(),
        without: Vec::new(),
        without_note: 0,
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Core {
    fn notes(&self) -> Vec<u8> {
        let mut all = vec![
            (0x200_0000, Vec::new()),
            (
                0x200_0001,
                words(&[self.magic, self.vcpus, self.count, self.page_size]),
            ),
            (0x200_0002, words(&[4, 17, 0x5a5a, 0x5a5a, 4096])),
            (0x200_0003, words(&[self.format])),
        ];
        all.extend(self.notes.iter().cloned());
        let mut out = Vec::new();
        for (kind, desc) in all.iter().filter(|note| note.0 != self.without_note) {
            out.extend(4_u32.to_le_bytes());
            out.extend((desc.len() as u32).to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend(b"Xen\0");
            out.extend(desc);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }

    fn table(&self) -> (&'static str, Vec<u8>) {
        if self.magic == HVM {
            let numbers: Vec<u64> = self.pages.iter().map(|page| page.0).collect();
            return (".xen_pfn", words(&numbers));
        }
        let pairs: Vec<u64> = self
            .pages
            .iter()
            .flat_map(|page| [page.0, page.1])
            .collect();
        (".xen_p2m", words(&pairs))
    }

    /// The sections' headers come first, their names last, as Xen writes them.
    fn bytes(&self) -> Vec<u8> {
        let filled = |place: u8| [place; PAGE];
        let pages: Vec<u8> = (1..).take(self.pages.len()).flat_map(filled).collect();
        let (table_name, table) = self.table();
        let mut sections = vec![
            (".note.Xen", 7_u32, self.notes()),
            (".xen_prstatus", 1, self.prstatus.clone()),
            (".xen_shared_info", 1, vec![0x22; 72]),
            (".xen_pages", 1, pages),
            (table_name, 1, table),
        ];
        sections.retain(|section| !self.without.contains(&section.0));
        sections.extend(self.more.iter().map(|name| (*name, 1, vec![0x33; 8])));
        let mut names = b"\0.shstrtab\0".to_vec();
        let mut headers = vec![0; 64];
        let count = sections.len() + 2;
        let mut data = Vec::new();
        let mut header = |name: usize, kind: u32, at: usize, len: usize| {
            headers.extend((name as u32).to_le_bytes());
            headers.extend(kind.to_le_bytes());
            headers.extend(words(&[0, 0, at as u64, len as u64, 0, 0, 0]));
        };
        for (name, kind, content) in sections {
            let at = 64 + count * 64 + data.len();
            header(names.len(), kind, at, content.len());
            names.extend([name.as_bytes(), b"\0"].concat());
            data.extend(content);
        }
        header(1, 3, 64 + count * 64 + data.len(), names.len());
        let mut out = b"\x7fELF\x02\x01\x01\0\x01\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
        out.extend(words(&[0, 0, 64]));
        out.extend(0_u32.to_le_bytes());
        for word in [64, 56, 0, 64, count, count - 1] {
            out.extend((word as u16).to_le_bytes());
        }
        [out, headers, data, names].concat()
    }
}

fn parse(data: &[u8]) -> Result<CoreDump, XenError> {
    CoreDump::parse(FileBytes::from_slice(data))
}

/// The error with its causes.
fn refused(data: &[u8]) -> String {
    let error = parse(data).unwrap_err();
    let cause = error.source().map(ToString::to_string);
    format!("{error}: {}", cause.unwrap_or_default())
}

/// The byte that fills each of the guest's frames.
fn seen(data: &[u8], core: &CoreDump) -> BTreeMap<u64, u8> {
    let mut seen = BTreeMap::new();
    for run in core.runs() {
        let mut at = run.offset.raw() as usize;
        for pfn in run.frames.iter() {
            let page = &data[at..at + PAGE];
            assert!(page.iter().all(|byte| *byte == page[0]));
            assert!(seen.insert(pfn.raw(), page[0]).is_none());
            at += PAGE;
        }
    }
    seen
}

#[test]
fn pages_lie_where_the_table_says() {
    let pages = [(0, 0x90), (1, 0x91), (4, 0x70), (5, 0x71), (9, 0x72)];
    let data = core(PV, &pages).bytes();
    let parsed = parse(&data).unwrap();
    assert_eq!(parsed.kind(), DomainKind::Pv);
    assert_eq!((parsed.machine(), parsed.xen_version()), (62, (4, 17)));
    let frames: Vec<_> = parsed
        .runs()
        .iter()
        .map(|run| run.frames.to_string())
        .collect();
    assert_eq!(frames.len(), 3, "neighbours are one run: {frames:?}");
    let wanted = BTreeMap::from([(0, 1), (1, 2), (4, 3), (5, 4), (9, 5)]);
    assert_eq!(seen(&data, &parsed), wanted);
    let p2m = parsed.p2m().unwrap();
    assert_eq!(p2m.pfn(Mfn::new(0x71)), Some(Pfn::new(5)));
    assert_eq!(p2m.mfn(Pfn::new(1)), Some(Mfn::new(0x91)));
    assert_eq!(p2m.pfn(Mfn::new(5)), None);

    let data = core(HVM, &pages).bytes();
    let parsed = parse(&data).unwrap();
    assert_eq!((parsed.kind(), parsed.p2m()), (DomainKind::Hvm, None));
    assert_eq!(seen(&data, &parsed), wanted);
}

#[test]
fn pages_that_are_none_come_last() {
    for magic in [PV, HVM] {
        let none = core(magic, &[(3, 7), (NONE, NONE), (NONE, NONE)]).bytes();
        let parsed = parse(&none).unwrap();
        assert_eq!(seen(&none, &parsed), BTreeMap::from([(3, 1)]));
        let within = core(magic, &[(3, 7), (NONE, NONE), (5, 8)]).bytes();
        assert!(refused(&within).contains("behind those that are none"));
        let empty = core(magic, &[]).bytes();
        assert!(parse(&empty).unwrap().runs().is_empty());
    }
}

#[test]
fn the_last_note_may_be_unknown_and_sections_too() {
    let mut core = core(PV, &[(0, 1)]);
    core.notes = vec![(0x200_0009, vec![1, 2, 3])];
    core.more = vec![".xen_else", ".xen_pages2"];
    assert!(parse(&core.bytes()).is_ok());
}

type Change = fn(&mut Core);

/// Each change makes the core one that is refused with these words.
fn refuses(changes: &[(Change, &str)]) {
    for (number, (change, wanted)) in changes.iter().enumerate() {
        let mut core = core(PV, &[(0, 0x90), (1, 0x80), (2, 0x70)]);
        change(&mut core);
        let said = refused(&core.bytes());
        assert!(said.contains(wanted), "{number}: {said}");
    }
}

#[test]
fn what_contradicts_the_format_is_named_with_its_place() {
    refuses(&[
        (
            |c| c.magic = 0xf00f_ebef,
            "kind of the domain in section .note.Xen, at offset 0x",
        ),
        (
            |c| c.count = 4,
            "of another length in section .xen_pages, at offset 0x",
        ),
        (|c| c.count = 1 << 52, "(value 0x3000)"),
        (
            |c| c.page_size = 8192,
            "size of a page in section .note.Xen",
        ),
        (
            |c| c.format = 1 << 32,
            "version of the format in section .note.Xen",
        ),
        (
            |c| c.without_note = 0x200_0001,
            "no note of this type in section .note.Xen",
        ),
        (|c| c.without_note = 0x200_0002, "(value 0x2000002)"),
        (|c| c.without_note = 0x200_0003, "(value 0x2000003)"),
        (
            |c| c.notes = vec![(0x200_0001, words(&[PV, 1, 3, 4096]))],
            "a second note",
        ),
        (
            |c| c.notes = vec![(0x200_0002, words(&[4, 17]))],
            "a second note",
        ),
        (
            |c| c.notes = vec![(0x200_0003, words(&[1]))],
            "a second note",
        ),
        (
            |c| c.notes = vec![(0x200_0003, vec![1])],
            "truncated in section .note.Xen",
        ),
        (
            |c| c.without = vec![".note.Xen"],
            "found 0 sections .note.Xen, expected one",
        ),
        (
            |c| c.without = vec![".xen_pages"],
            "found 0 sections .xen_pages, expected one",
        ),
        (
            |c| c.without = vec![".xen_p2m"],
            "found 0 sections .xen_p2m, expected one",
        ),
        (
            |c| c.more = vec![".xen_pages"],
            "found 2 sections .xen_pages, expected one",
        ),
        (
            |c| c.more = vec![".xen_p2m", ".xen_p2m"],
            "found 3 sections .xen_p2m, expected one",
        ),
    ]);
    let mut other = core(HVM, &[(0, 0)]);
    other.without = vec![".xen_pfn"];
    other.more = vec![".xen_p2m"];
    assert!(refused(&other.bytes()).contains("0 sections .xen_pfn"));
}

#[test]
fn a_list_of_pages_that_contradicts_itself_is_named_with_its_place() {
    refuses(&[
        (
            |c| c.pages[1].0 = 1 << 40,
            "number of a page in section .xen_p2m",
        ),
        (|c| c.pages[1].1 = 1 << 40, "(value 0x10000000000)"),
        (
            |c| c.pages[1].0 = NONE,
            "number of a page in section .xen_p2m",
        ),
        (
            |c| c.pages[1].1 = NONE,
            "number of a page in section .xen_p2m",
        ),
        (
            |c| c.pages[1].0 = 0,
            "not above the one before in section .xen_p2m",
        ),
        (|c| c.pages[2].0 = 0, "not above the one before"),
        (|c| c.pages[2].1 = 0x90, "is both guest frame"),
        (|c| c.pages.swap(0, 1), "not above the one before"),
    ]);
}

#[test]
fn a_machine_frame_that_is_two_of_the_guest_s_is_named_with_both() {
    let data = core(PV, &[(3, 0x90), (4, 0x80), (7, 0x90)]).bytes();
    match parse(&data) {
        Err(XenError::Frames { place, source }) => {
            assert_eq!(place.within, Within::Section(".xen_p2m"));
            let shared = P2mError::Shared {
                mfn: Mfn::new(0x90),
                first: Pfn::new(3),
                second: Pfn::new(7),
            };
            assert_eq!(source, shared);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn headers_that_lie_are_refused_with_the_place() {
    let data = core(PV, &[(0, 0x90), (1, 0x80)]).bytes();
    // The fourth header is that of the pages, the last that of the names.
    let (note, pages, names) = (64 + 64, 64 + 4 * 64, 64 + 6 * 64);
    let cases: [(usize, &[u8], &str); 14] = [
        (0, b"x", "missing ELF header of a Xen core in the headers"),
        (4, &[1], "missing ELF header of a Xen core"),
        (5, &[2], "missing ELF header of a Xen core"),
        (16, &[2], "missing ELF header of a Xen core"),
        (56, &[1], "missing ELF header of a Xen core"),
        (
            58,
            &[40],
            "size of a section header in the headers, at offset 0x3a (value 0x28)",
        ),
        (60, &[0xff, 0xff], "truncated in the headers, at offset 0x"),
        (
            60,
            &[0, 0],
            "invalid section with the names in the headers, at offset 0x3e (value 0x6)",
        ),
        (62, &[1], "invalid section with the names"),
        (
            40,
            &[0xff; 8],
            "truncated in the headers, at offset 0xffffffffffffffff",
        ),
        (
            note + 4,
            &[1],
            "invalid type of the section in section .note.Xen",
        ),
        (
            pages + 24,
            &[0xff; 8],
            "truncated in section .xen_pages, at offset 0xffff",
        ),
        (
            pages + 32,
            &[0xff; 8],
            "truncated in section .xen_pages, at offset 0x",
        ),
        (
            names + 32,
            &[0xff; 4],
            "truncated in section .shstrtab, at offset 0x",
        ),
    ];
    for (at, bytes, wanted) in cases {
        let mut data = data.clone();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        let said = refused(&data);
        assert!(said.contains(wanted), "{at:#x}: {said}");
    }
    let notes = u64::from_le_bytes(data[note + 24..note + 32].try_into().unwrap()) as usize;
    for (at, bytes, wanted) in [
        (notes, 5, "a note that is not Xen's in section .note.Xen"),
        (notes + 12, b'Y', "a note that is not Xen's"),
        (notes + 16 + 4, 8, "a short note in section .note.Xen"),
        (notes + 16 + 7, 0xff, "truncated in section .note.Xen"),
    ] {
        let mut data = data.clone();
        data[at] = bytes;
        let said = refused(&data);
        assert!(said.contains(wanted), "{at:#x}: {said}");
    }
}

#[test]
fn a_core_cut_off_anywhere_is_refused() {
    for magic in [PV, HVM] {
        let data = core(magic, &[(0, 0x90), (1, 0x80)]).bytes();
        for len in 0..data.len() {
            match parse(&data[..len]) {
                Err(XenError::Truncated {
                    place,
                    wanted,
                    left,
                }) => assert!(
                    wanted > left && (left == 0 || place.offset.raw() + left == len as u64),
                    "{len}: {place}"
                ),
                Err(XenError::Malformed { .. }) if len < 58 => {}
                other => panic!("{len}: {other:?}"),
            }
        }
        assert!(parse(&[data, b"more".to_vec()].concat()).is_ok());
    }
}

/// Pages in order, the machine's numbers in none; then some that are none.
#[test]
fn the_table_of_frames_is_told_of_to_its_end() {
    let pages: Vec<(u64, u64)> = (0..200).map(|pfn| (2 * pfn, 2 * pfn)).collect();
    for (magic, entry) in [(HVM, 8), (PV, 16)] {
        let data = core(magic, &pages).bytes();
        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&told);
        let tell = move |done: u64, total: u64| telling.lock().unwrap().push((done, total));
        let options = ParseOptions::new().progress(Arc::new(tell));
        CoreDump::parse_with(FileBytes::from_slice(&data), &options).unwrap();
        let (told, total) = (told.lock().unwrap(), 200 * entry);
        assert!(told.is_sorted() && told.len() > 2, "{told:?}");
        let ends = (told.first().copied(), told.last().copied());
        assert_eq!(ends, (Some((0, total)), Some((total, total))));
    }
}

fn cores() -> impl Strategy<Value = Core> {
    let numbers = proptest::collection::btree_set(0_u64..80, 0..12);
    (
        prop_oneof![Just(PV), Just(HVM)],
        numbers,
        any::<u64>(),
        0_usize..3,
    )
        .prop_map(|(magic, numbers, turn, none)| {
            // An odd factor makes different numbers of different ones.
            let machine = |pfn: u64| (pfn.wrapping_mul(turn | 1) & 0xffff) | 0x10_0000;
            let mut pages: Vec<_> = numbers.into_iter().map(|pfn| (pfn, machine(pfn))).collect();
            pages.extend(vec![(NONE, NONE); none]);
            core(magic, &pages)
        })
}

proptest! {
    #[test]
    fn every_page_is_found(core in cores()) {
        let data = core.bytes();
        let parsed = parse(&data).unwrap();
        let there = core.pages.iter().filter(|page| page.0 != NONE);
        let wanted: BTreeMap<u64, u8> = there.clone().map(|page| page.0).zip(1..).collect();
        prop_assert_eq!(seen(&data, &parsed), wanted);
        prop_assert_eq!(parsed.p2m().is_some(), core.magic == PV);
        if let Some(p2m) = parsed.p2m() {
            for (pfn, mfn) in there {
                prop_assert_eq!(p2m.mfn(Pfn::new(*pfn)), Some(Mfn::new(*mfn)));
                prop_assert_eq!(p2m.pfn(Mfn::new(*mfn)), Some(Pfn::new(*pfn)));
            }
        }
    }

    #[test]
    fn damage_is_no_panic(
        core in cores(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut data = core.bytes();
        // Not in the pages, which may hold anything.
        let head = 64 + 7 * 64 + 300;
        let end = data.len();
        for (at, byte) in changes {
            let at = at.index(2 * head.min(end / 2));
            let at = if at < head { at } else { end - 1 - (at - head) };
            data[at.min(end - 1)] = byte;
        }
        if let Ok(core) = parse(&data) {
            for run in core.runs() {
                prop_assert!(run.offset.raw() + run.frames.len() * PAGE as u64 <= data.len() as u64);
            }
        }
    }
}

/// A `struct vcpu_guest_context`: online or not, and its `CR0`, `CR3` and `CR4`.
fn context(online: bool, control: [u64; 3]) -> Vec<u8> {
    let mut out = vec![0x77; 5168];
    let flags = 0x04 | u64::from(online) << 5;
    let [cr0, cr3, cr4] = control;
    for (at, value) in [
        (512, flags),
        (648, 0xffff_ffff_8100_0000),
        (656, 0xe030),
        (664, 0x246),
        (4984, cr0),
        (5008, cr3),
        (5016, cr4),
    ] {
        out[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    out
}

#[test]
fn processors_are_told() {
    let pages = [(0, 0x90), (1, 0x91), (4, 0x70)];
    let with = |magic: u64, contexts: &[Vec<u8>]| Core {
        prstatus: contexts.concat(),
        vcpus: contexts.len() as u64,
        ..core(magic, &pages)
    };
    let vcpus = |core: &Core| {
        let data = core.bytes();
        parse(&data)
            .unwrap()
            .vcpus(FileBytes::from_slice(&data))
            .map(|vcpus| {
                let control = |vcpu: &sonicshot_xen::Vcpu| (vcpu.id, vcpu.control);
                let online: Vec<_> = vcpus.online.iter().map(control).collect();
                (online, vcpus.offline)
            })
    };
    // As Xen shows them, a PV guest's registers lack what it always has; its root is the
    // machine's frame.
    let pv = with(
        PV,
        &[
            context(true, [8, 0x9_1000, 0x10]),
            context(false, [0; 3]),
            context(true, [8, 0x7_0018, 0]),
        ],
    );
    let long = Some(0x500);
    let registers = ControlRegisters::new;
    let want = vec![
        (0, registers(0x8000_0009, 0x1000, 0x30, long)),
        (2, registers(0x8000_0009, 0x4000, 0x20, long)),
    ];
    assert_eq!(vcpus(&pv).unwrap(), (want, 1));
    // Of another they are as they are.
    let hvm = with(HVM, &[context(true, [0x8005_0033, 0x9_1000, 0x20])]);
    let want = vec![(0, registers(0x8005_0033, 0x9_1000, 0x20, None))];
    assert_eq!(vcpus(&hvm).unwrap(), (want, 0));

    let good = context(true, [8, 0x9_1000, 0x10]);
    for wrong in [
        core(PV, &pages),
        with(PV, &[]),
        with(PV, &[context(false, [0; 3])]),
        with(PV, &[good[..5167].to_vec()]),
        with(PV, &[context(true, [8, 0x9_2000, 0x10])]),
        Core {
            vcpus: 2,
            ..with(PV, from_ref(&good))
        },
        Core {
            without: vec![".xen_prstatus"],
            ..with(PV, from_ref(&good))
        },
        Core {
            more: vec![".xen_prstatus"],
            ..with(PV, from_ref(&good))
        },
    ] {
        assert!(vcpus(&wrong).is_err(), "{wrong:?}");
    }
    assert!(vcpus(&with(PV, &[good])).is_ok());
}
