//! The finding of a guest of which little is known, against what all knowledge finds.
use sonicshot::{
    Fill, Gpa, GuestBytes, GuestMemory, Mapped, MappedRegions, MemoryError, PageClass, PageMap,
    Processors, RamLayout,
};
use sonicshot_vmi::x86_64::Cr3;
use sonicshot_vmi::{
    Classification, GuestOptions, Knowledge, LinuxGuest, Note, OnInconsistency, VmiError,
};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub(crate) fn testdata() -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/guest-6.1-128m")
        .join("ram.raw.zst");
    let mut reader = zstd::stream::read::Decoder::new(File::open(path).unwrap()).unwrap();
    reader.window_log_max(31).unwrap();
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}

/// The top-level page table of the unchanged capture's kernel.
pub(crate) fn testdata_root() -> Cr3 {
    static ROOT: OnceLock<Cr3> = OnceLock::new();
    *ROOT.get_or_init(|| root(&testdata()))
}

/// A kernel that is found by shape has to be run by a processor: by default of the capture's.
fn classify(ram: &[u8], knowledge: Knowledge, cr3: Option<Cr3>) -> Result<Classification, String> {
    let cr3 = cr3.or_else(|| (knowledge == Knowledge::Shape).then(testdata_root));
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let mut options = GuestOptions::new().at_most(knowledge);
    if let Some(cr3) = cr3 {
        options = options.cr3(cr3);
    }
    let guest = LinuxGuest::open(&memory, &options).map_err(|error| told(&error))?;
    guest
        .classify(OnInconsistency::Refuse)
        .map_err(|error| told(&error))
}

/// An error with its causes.
fn told(error: &VmiError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

pub(crate) fn classes(map: &PageMap) -> Vec<PageClass> {
    map.runs()
        .flat_map(|(frames, class)| frames.iter().map(move |_| class))
        .collect()
}

fn is_free(class: PageClass) -> bool {
    matches!(class, PageClass::FreeBuddy | PageClass::FreePcp)
}

/// The numbers of frames that are free in both, in `all` alone, and in `few` alone.
fn compare(all: &PageMap, few: &PageMap, class: &dyn Fn(PageClass) -> bool) -> [usize; 3] {
    let mut counts = [0; 3];
    for (a, b) in classes(all).into_iter().zip(classes(few)) {
        match (class(a), class(b)) {
            (true, true) => counts[0] += 1,
            (true, false) => counts[1] += 1,
            (false, true) => counts[2] += 1,
            (false, false) => {}
        }
    }
    counts
}

#[test]
fn vmcoreinfo_alone_finds_the_same_free_pages_as_types() {
    let ram = testdata();
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let few = classify(&ram, Knowledge::Vmcoreinfo, None).unwrap();
    assert_eq!(few.disagreement, None);
    for class in [PageClass::FreeBuddy, PageClass::FreePcp] {
        let [both, ..] = compare(&all.map, &few.map, &|c| c == class);
        assert!(both > 0, "{class}");
        assert_eq!(
            compare(&all.map, &few.map, &|c| c == class),
            [both, 0, 0],
            "{class}"
        );
    }
    // The same numbers by the same records; deltas of processors are found, too.
    assert_eq!(all.zones.len(), few.zones.len());
    for (all, few) in all.zones.iter().zip(&few.zones) {
        assert_eq!(
            (
                &all.name,
                all.span,
                all.listed,
                all.nr_free,
                all.counter,
                all.pcp
            ),
            (
                &few.name,
                few.span,
                few.listed,
                few.nr_free,
                few.counter,
                few.pcp
            )
        );
    }
    assert_eq!(all.free_fill, few.free_fill);
    // Nothing else is told, so nothing else can be dropped but by its content.
    let told = classes(&few.map)
        .into_iter()
        .find(|class| !is_free(*class) && !matches!(class, PageClass::Unknown | PageClass::Hole));
    assert_eq!(told, None);
}

#[test]
fn shape_alone_finds_no_other_free_pages_than_types() {
    let ram = testdata();
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let few = classify(&ram, Knowledge::Shape, None).unwrap();
    assert_eq!(few.disagreement, None);
    let [both, more, fewer] = compare(&all.map, &few.map, &is_free);
    assert_eq!(fewer, 0);
    assert!(more * 20 <= both, "{more} of {both} are missing");
    assert_eq!(all.zones.len(), few.zones.len());
    for (all, few) in all.zones.iter().zip(&few.zones) {
        assert_eq!(
            (&all.name, all.span, all.listed, all.nr_free, all.counter),
            (&few.name, few.span, few.listed, few.nr_free, few.counter)
        );
    }
}

/// Without types no flag tells of `page_poison` and `init_on_free`.
#[test]
fn the_content_of_free_pages_tells_what_they_must_read_as() {
    const POISON: u8 = 0xaa;
    let ram = testdata();
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let frames = classes(&all.map).into_iter().enumerate();
    let free = frames.filter(|(_, class)| *class == PageClass::FreeBuddy);
    let free: Vec<usize> = free.map(|(frame, _)| frame).collect();
    // A few that were just freed, or are being given away, decide nothing.
    for (byte, percent, fill) in [
        (POISON, 99, Fill::Byte(POISON)),
        (0, 99, Fill::Zero),
        (POISON, 50, Fill::Any),
    ] {
        let mut ram = ram.clone();
        for (number, frame) in free.iter().enumerate() {
            let byte = if number * 7 % 100 < percent {
                byte
            } else {
                0x5b
            };
            ram[frame << 12..][..1 << 12].fill(byte);
        }
        for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
            let few = classify(&ram, knowledge, None).unwrap();
            assert_eq!(few.free_fill, fill, "{byte:#x}, {percent} %, {knowledge}");
        }
    }
}

/// Of the guest's `struct page` (Linux 6.1, x86-64), from its own BTF.
const STRUCT_PAGE: usize = 64;
const LRU: usize = 8;
const PRIVATE: usize = 40;
const MAPCOUNT: usize = 48;
const REFCOUNT: usize = 52;
const PAGE_BUDDY: u32 = !0x80;

fn u64_at(ram: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(ram[at..at + 8].try_into().unwrap())
}

fn put(ram: &mut [u8], at: usize, value: u64) {
    ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// The guest's struct pages: where they are in the file, and their virtual address.
struct StructPages {
    at: usize,
    va: u64,
}

impl StructPages {
    fn new(ram: &[u8]) -> Self {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let at = usize::try_from(guest.struct_page_memory().unwrap()[0].start().raw()).unwrap();
        let mut found = Self { at, va: 0 };
        // Any list that goes on in another struct page; the array begins at a whole GiB.
        let next = (0..ram.len() / 4096)
            .filter(|pfn| found.is_free_head(ram, *pfn))
            .map(|pfn| u64_at(ram, found.of(pfn) + LRU))
            .find(|next| next & 0xffff_0000_0000_0000 == 0xffff_0000_0000_0000 && next & 63 == 8)
            .unwrap();
        found.va = next & !((1 << 30) - 1);
        found
    }

    fn of(&self, pfn: usize) -> usize {
        self.at + pfn * STRUCT_PAGE
    }

    fn node(&self, pfn: usize) -> u64 {
        self.va + (pfn * STRUCT_PAGE + LRU) as u64
    }

    fn is_free_head(&self, ram: &[u8], pfn: usize) -> bool {
        let at = self.of(pfn) + MAPCOUNT;
        ram[at..at + 4] == PAGE_BUDDY.to_le_bytes()
    }

    /// Makes the struct pages from `pfn` on look like a free block between two nodes.
    fn make_free(&self, ram: &mut [u8], pfn: usize, order: u64, prev: u64, next: u64) {
        for page in pfn..pfn + (1 << order) {
            let at = self.of(page);
            let zone_and_node = u64_at(ram, at) & !0x3f_ffff;
            put(ram, at, zone_and_node);
            put(ram, at + LRU, 0);
            ram[at + MAPCOUNT..at + MAPCOUNT + 4].fill(0xff);
            ram[at + REFCOUNT..at + REFCOUNT + 4].fill(0);
        }
        let at = self.of(pfn);
        put(ram, at + LRU, next);
        put(ram, at + LRU + 8, prev);
        put(ram, at + PRIVATE, order);
        ram[at + MAPCOUNT..at + MAPCOUNT + 4].copy_from_slice(&PAGE_BUDDY.to_le_bytes());
    }

    /// Two free blocks that follow each other in a list, and their order: the lowest there is.
    fn neighbours(&self, ram: &[u8]) -> (usize, usize, u64) {
        let order = |pfn: usize| u64_at(ram, self.of(pfn) + PRIVATE);
        // In the zone of most memory.
        (4096..ram.len() / 4096)
            .filter(|pfn| self.is_free_head(ram, *pfn))
            .filter_map(|pfn| {
                let next = u64_at(ram, self.of(pfn) + LRU).checked_sub(self.va + LRU as u64)?;
                let next = usize::try_from(next).unwrap() / STRUCT_PAGE;
                (next < ram.len() / 4096).then_some((pfn, next, order(pfn)))
            })
            .min_by_key(|(.., order)| *order)
            .unwrap()
    }
}

fn line<'t>(text: &'t str, key: &str) -> &'t str {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap()
}

/// The frame in which the kernel's code begins.
fn code(ram: &[u8]) -> usize {
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let info = guest.vmcoreinfo().unwrap();
    let stext = u64::from_str_radix(line(info, "SYMBOL(_stext)="), 16).unwrap();
    let phys_base: i64 = line(info, "NUMBER(phys_base)=").parse().unwrap();
    let gpa = (stext - 0xffff_ffff_8000_0000).wrapping_add(phys_base.cast_unsigned());
    usize::try_from(gpa >> 12).unwrap()
}

#[test]
fn a_copy_of_the_struct_pages_is_not_believed() {
    let mut ram = testdata();
    let pages = StructPages::new(&ram);
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let free: Vec<bool> = classes(&all.map).into_iter().map(is_free).collect();
    let len = free.len() * STRUCT_PAGE;
    // In one piece, as in a nested guest's memory or a copied dump; that nobody uses it does not
    // matter to what is found.
    let frames = len / 4096;
    let to = (0..free.len())
        .step_by(frames)
        .find(|first| free[*first..first + frames].iter().all(|free| *free))
        .unwrap();
    ram.copy_within(pages.at..pages.at + len, to * 4096);
    for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
        let few = classify(&ram, knowledge, None).unwrap();
        let [both, more, fewer] = compare(&all.map, &few.map, &is_free);
        assert_eq!((more, fewer), (0, 0), "{knowledge}: {both} in both");
    }
}

#[test]
fn a_block_that_does_not_name_the_one_before_it_is_kept() {
    let ram = testdata();
    let pages = StructPages::new(&ram);
    let heads = || (4096..ram.len() / 4096).filter(|pfn| pages.is_free_head(&ram, *pfn));
    let prev = |pfn: usize| pages.of(pfn) + LRU + 8;
    let is_node = |word: u64| word >> 30 == pages.va >> 30;
    let first = heads().find(|pfn| !is_node(u64_at(&ram, prev(*pfn))));
    let (one, next, _) = pages.neighbours(&ram);
    for knowledge in [Knowledge::Types, Knowledge::Vmcoreinfo, Knowledge::Shape] {
        for word in [0, pages.node(77)] {
            // The first of a list: nothing else names what is before it.
            let mut ram = ram.clone();
            put(&mut ram, prev(first.unwrap()), word);
            let found = classify(&ram, knowledge, Some(testdata_root())).unwrap();
            assert!(!is_free(classes(&found.map)[first.unwrap()]), "{knowledge}");
            let disagree = |note: &Note| matches!(note, Note::Disagreement(_));
            assert!(found.notes.iter().any(disagree), "{:?}", found.notes);
        }
        // Of one in the middle the one before it is in question, too: that is more than a guest with
        // one processor may have.
        let mut ram = ram.clone();
        put(&mut ram, prev(next), 0);
        let error = classify(&ram, knowledge, Some(testdata_root())).unwrap_err();
        assert!(
            error.contains("disagree on 2 blocks"),
            "{knowledge}: {error}"
        );
        // As it is while `one` is taken out.
        let before = u64_at(&ram, prev(one));
        put(&mut ram, prev(next), before);
        let found = classify(&ram, knowledge, Some(testdata_root())).unwrap();
        let classes = classes(&found.map);
        assert!(
            !is_free(classes[one]) && is_free(classes[next]),
            "{knowledge}"
        );
    }
}

#[test]
fn a_list_that_leads_nowhere_contradicts_the_other_records() {
    let ram = testdata();
    let pages = StructPages::new(&ram);
    let (one, ..) = pages.neighbours(&ram);
    for (knowledge, start) in [
        (Knowledge::Types, "the free lists contradict"),
        (
            Knowledge::Vmcoreinfo,
            "types are missing, and the free lists contradict",
        ),
        (
            Knowledge::Shape,
            "types are missing, and the free lists contradict",
        ),
    ] {
        for word in [0, 0xffff_ea12_3456_7808] {
            let mut ram = ram.clone();
            put(&mut ram, pages.of(one) + LRU, word);
            let error = classify(&ram, knowledge, Some(testdata_root())).unwrap_err();
            assert!(error.starts_with(start), "{knowledge}, {word:#x}: {error}");
        }
    }
}

/// A guest that has counted nothing but its free pages yet, or has all else in its processors' deltas:
/// the kernel's own sums tell which word counts them.
#[test]
fn where_zones_count_free_pages_alone_the_sums_of_all_zones_tell() {
    const COUNTERS: usize = 6;
    let mut ram = testdata();
    let node = Node::new(&ram);
    let zones = [0, 1].map(|zone| node.at + zone * node.zone_size + node.vm_stat);
    let sums: Vec<u8> = (0..COUNTERS)
        .flat_map(|number| {
            let words = zones.map(|zone| u64_at(&ram, zone + number * 8));
            words[0].wrapping_add(words[1]).to_le_bytes()
        })
        .collect();
    let mut places = ram.windows(sums.len()).step_by(8);
    let global = places.position(|words| words == sums).unwrap() * 8;
    let all = classify(&ram, Knowledge::Shape, None).unwrap();
    for at in [zones[0], zones[1], global] {
        ram[at + 8..at + COUNTERS * 8].fill(0);
    }
    let found = classify(&ram, Knowledge::Shape, None).unwrap();
    assert_eq!(compare(&all.map, &found.map, &is_free)[1..], [0, 0]);
    // The sums say something else, or nothing.
    let counted = u64_at(&ram, global);
    for word in [counted - 1, 0] {
        put(&mut ram, global, word);
        let error = classify(&ram, Knowledge::Shape, None).unwrap_err();
        assert!(error.contains("may count their free pages"), "{error}");
    }
    put(&mut ram, global, counted);
    put(&mut ram, global + 8, 1);
    let error = classify(&ram, Knowledge::Shape, None).unwrap_err();
    assert!(error.contains("may count their free pages"), "{error}");
}

#[test]
fn a_record_on_no_list_is_kept() {
    let mut ram = testdata();
    let pages = StructPages::new(&ram);
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let used: Vec<usize> = classes(&all.map)
        .iter()
        .enumerate()
        .filter(|(_, class)| **class == PageClass::Anonymous)
        .map(|(pfn, _)| pfn)
        .take(64)
        .collect();
    let (first, second, _) = pages.neighbours(&ram);
    // As an earlier boot has left them: they name blocks which do not name them.
    for pfn in &used {
        let (prev, next) = (pages.node(first), pages.node(second));
        pages.make_free(&mut ram, *pfn, 0, prev, next);
    }
    let few = classify(&ram, Knowledge::Shape, None).unwrap();
    assert_eq!(compare(&all.map, &few.map, &is_free)[1..], [0, 0]);
    assert!(
        few.notes
            .iter()
            .any(|note| note.to_string().starts_with("64 blocks"))
    );
    let error = classify(&ram, Knowledge::Vmcoreinfo, None).unwrap_err();
    assert!(
        error.starts_with("types are missing, and the guest's sources of truth"),
        "{error}"
    );
}

#[test]
fn a_list_with_the_kernels_own_code_is_refused() {
    let mut ram = testdata();
    let pages = StructPages::new(&ram);
    let code = code(&ram);
    // A list of one block, in the zone of most memory, of an order to which the code is aligned:
    // its head names it twice.
    let alone = |ram: &[u8], pfn: usize| {
        let order = u64_at(ram, pages.of(pfn) + PRIVATE);
        let next = u64_at(ram, pages.of(pfn) + LRU);
        let prev = u64_at(ram, pages.of(pfn) + LRU + 8);
        (next == prev && code.is_multiple_of(1 << order)).then_some((pfn, order, next))
    };
    let (block, order, head) = (4096..ram.len() / 4096)
        .filter(|pfn| pages.is_free_head(&ram, *pfn))
        .find_map(|pfn| alone(&ram, pfn))
        .unwrap();
    let mut names = pages.node(block).to_le_bytes().to_vec();
    names.extend_from_within(..);
    let at = ram.windows(16).step_by(8).position(|two| two == names);
    let head_at = at.unwrap() * 8;
    assert_eq!(head_at % 8, usize::try_from(head % 8).unwrap());
    pages.make_free(&mut ram, code, order, pages.node(block), head);
    put(&mut ram, pages.of(block) + LRU, pages.node(code));
    put(&mut ram, head_at + 8, pages.node(code));
    for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
        let error = classify(&ram, knowledge, None).unwrap_err();
        assert!(
            error.starts_with("the kernel's code at"),
            "{knowledge}: {error}"
        );
    }
}

/// The guest's zones, and memory of which the classification reads nothing.
struct Node {
    /// From an address of the direct map to the place in the file.
    direct_map: u64,
    /// `struct pglist_data`, which begins with the zones: where it is in the file.
    at: usize,
    zone_size: usize,
    free_area: usize,
    area_size: usize,
    spanned_pages: usize,
    vm_stat: usize,
    /// `node_data[0]`, in the kernel's image.
    named: usize,
}

impl Node {
    fn new(ram: &[u8]) -> Self {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let info = guest.vmcoreinfo().unwrap();
        let number = |key: &str| line(info, key).parse::<usize>().unwrap();
        let named = usize::try_from(in_image(info, "SYMBOL(node_data)=")).unwrap();
        let direct_map = guest.direct_map().unwrap().unwrap().raw();
        Self {
            direct_map,
            at: usize::try_from(u64_at(ram, named) - direct_map).unwrap(),
            zone_size: number("SIZE(zone)="),
            free_area: number("OFFSET(zone.free_area)="),
            area_size: number("SIZE(free_area)="),
            spanned_pages: number("OFFSET(zone.spanned_pages)="),
            vm_stat: number("OFFSET(zone.vm_stat)="),
            named,
        }
    }

    fn va(&self, at: usize) -> u64 {
        self.direct_map + at as u64
    }

    /// Makes a zone at `at`, as an earlier boot may have left one: whole, with its own node, and one
    /// list of one block, `free`, whose struct page says so.
    fn make(&self, ram: &mut [u8], pages: &StructPages, at: usize, free: usize) {
        const ORDERS: usize = 11;
        let [dma, large] = [self.at, self.at + self.zone_size];
        ram.copy_within(dma..dma + self.zone_size, at);
        let span = self.spanned_pages - 16;
        ram.copy_within(large + span..large + span + 32, at + span);
        let node = (0..self.free_area)
            .step_by(8)
            .find(|offset| u64_at(ram, dma + offset) == self.va(self.at));
        put(ram, at + node.unwrap(), self.va(at & !0xfff));
        for order in 0..ORDERS {
            let area = at + self.free_area + order * self.area_size;
            for head in (area..area + self.area_size - 8).step_by(16) {
                put(ram, head, self.va(head));
                put(ram, head + 8, self.va(head));
            }
            put(ram, area + self.area_size - 8, u64::from(order == 0));
        }
        put(ram, at + self.vm_stat, 1);
        let head = at + self.free_area;
        put(ram, head, pages.node(free));
        put(ram, head + 8, pages.node(free));
        pages.make_free(ram, free, 0, self.va(head), self.va(head));
    }
}

#[test]
fn a_zone_of_an_earlier_boot_is_none() {
    const ZONE_BIT: u64 = 1 << 63;
    let ram = testdata();
    let pages = StructPages::new(&ram);
    let node = Node::new(&ram);
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let mut used = classes(&all.map)
        .into_iter()
        .enumerate()
        .filter(|(pfn, class)| *class == PageClass::Anonymous && *pfn > 4096)
        .map(|(pfn, _)| pfn);
    let (free, home) = (used.next().unwrap(), used.next().unwrap());
    let stale = |ram: &mut [u8]| node.make(ram, &pages, (home << 12) + 0x400, free);
    // Behind `node_data` is room for more nodes.
    let named = |ram: &mut [u8]| put(ram, node.named + 8, node.va(home << 12));
    let other_zone = |ram: &mut [u8]| {
        let flags = u64_at(ram, pages.of(free));
        put(ram, pages.of(free), flags ^ ZONE_BIT);
    };
    type Change<'a> = &'a dyn Fn(&mut [u8]);
    let table: [(&str, &[Change<'_>], bool); 5] = [
        ("as it may be", &[&stale], false),
        ("with pages of no other zone", &[&stale, &other_zone], false),
        ("named by the kernel", &[&stale, &named], false),
        // Nothing is wrong with that one.
        (
            "named, and of its own",
            &[&stale, &named, &other_zone],
            true,
        ),
        ("no node is named", &[&|ram| put(ram, node.named, 0)], false),
    ];
    for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
        for (what, changes, is_free_then) in &table {
            let mut ram = ram.clone();
            for change in *changes {
                change(&mut ram);
            }
            let found = classify(&ram, knowledge, Some(testdata_root()));
            let frees = found.as_ref().is_ok_and(|found| {
                let [.., fewer] = compare(&all.map, &found.map, &is_free);
                fewer > 0
            });
            assert_eq!(
                frees,
                *is_free_then,
                "{knowledge}, {what}: {:?}",
                found.err()
            );
        }
        let mut ram = ram.clone();
        put(&mut ram, node.named, 0);
        let error = classify(&ram, knowledge, Some(testdata_root())).unwrap_err();
        assert!(
            error.contains("nothing in the kernel's image points"),
            "{error}"
        );
    }
}

/// As a kernel that can remove memory leaves those that hold a node: it counts and marks them.
#[test]
fn the_image_may_have_pages_that_are_marked_as_a_nodes() {
    const REFCOUNT: usize = 52;
    const PRIVATE_FLAG: u64 = 1 << 13;
    const DIRTY: u64 = 1 << 3;
    let ram = testdata();
    let pages = StructPages::new(&ram);
    let page = pages.of(Node::new(&ram).named >> 12);
    for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
        for (more, is_kept) in [(PRIVATE_FLAG, true), (PRIVATE_FLAG | DIRTY, false)] {
            let mut ram = ram.clone();
            let flags = u64_at(&ram, page);
            put(&mut ram, page, flags | more);
            ram[page + REFCOUNT..page + REFCOUNT + 4].copy_from_slice(&2_u32.to_le_bytes());
            let found = classify(&ram, knowledge, Some(testdata_root()));
            assert_eq!(found.is_ok(), is_kept, "{knowledge}: {:?}", found.err());
        }
    }
}

#[test]
fn a_counter_that_is_chosen_because_it_agrees_is_none() {
    const LINE: usize = 64;
    let ram = testdata();
    let node = Node::new(&ram);
    let counters = [node.at, node.at + node.zone_size].map(|zone| zone + node.vm_stat);
    type Change<'a> = &'a dyn Fn(&mut [u8], usize);
    let table: [(Change<'_>, Option<&str>); 6] = [
        (&|_, _| {}, None),
        // The counter says something else, and another word what the lists hold.
        (
            &|ram, at| {
                let counted = u64_at(ram, at);
                put(ram, at, counted + 100_000);
                put(ram, at - LINE + 8, counted);
            },
            Some("0 places"),
        ),
        // The same at the begin of a line, with numbers behind it that are no counters.
        (
            &|ram, at| {
                let counted = u64_at(ram, at);
                put(ram, at, counted + 100_000);
                put(ram, at - LINE, counted);
                put(ram, at - LINE + 8, u64::MAX / 2);
            },
            Some("0 places"),
        ),
        // Two lines that say the same, as do the sums of all zones: either is right.
        (&|ram, at| ram.copy_within(at..at + LINE, at - LINE), None),
        // Of two that do not the sums are of one.
        (
            &|ram, at| {
                ram.copy_within(at..at + LINE, at - LINE);
                let counted = u64_at(ram, at);
                put(ram, at - LINE, counted + 1);
            },
            None,
        ),
        // They are of neither.
        (
            &|ram, at| {
                ram.copy_within(at..at + LINE, at - LINE);
                let counted = u64_at(ram, at);
                put(ram, at, counted + 1);
                put(ram, at - LINE, counted - 1);
            },
            Some("2 places"),
        ),
    ];
    for (change, refused) in table {
        let mut ram = ram.clone();
        for at in counters {
            change(&mut ram, at);
        }
        let found = classify(&ram, Knowledge::Shape, None);
        match (refused, found) {
            (None, Ok(_)) => {}
            (Some(text), Err(error)) => assert!(error.contains(text), "{error}"),
            (refused, found) => panic!("{refused:?}: {:?}", found.err()),
        }
    }
}

/// By shape, of raw memory: as a kernel without VMCOREINFO is read.
fn classify_raw(ram: &[u8], options: &GuestOptions) -> Result<Classification, VmiError> {
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    LinuxGuest::open(&memory, options)?.classify(OnInconsistency::Refuse)
}

#[test]
fn raw_memory_is_read_by_shape_if_its_log_is_found() {
    let mut ram = testdata();
    let shape = GuestOptions::new().at_most(Knowledge::Shape);
    let told = classify(&ram, Knowledge::Shape, None).unwrap();
    let raw = classify_raw(&ram, &shape).unwrap();
    assert!(raw.map.runs().eq(told.map.runs()));
    // Nothing points to the log any more.
    let variable = {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        in_image(guest.vmcoreinfo().unwrap(), "SYMBOL(prb)=")
    };
    put(&mut ram, usize::try_from(variable).unwrap(), 0);
    let error = classify_raw(&ram, &shape).unwrap_err();
    assert!(matches!(error, VmiError::OwnerUntold { .. }), "{error}");
}

#[test]
fn a_kernel_that_makes_no_vmcoreinfo_is_read_of_its_memory_alone() {
    let mut ram = testdata();
    assert!(erase(&mut ram, b"OSRELEASE=", b'#') > 0);
    assert!(classify_raw(&ram, &GuestOptions::new()).is_err());
    assert!(erase(&mut ram, b"SYMBOL(%s)=%lx\n", b'#') > 0);
    assert!(classify_raw(&ram, &GuestOptions::new()).is_ok());
}

/// Memory of a kernel that crashed.
pub(crate) struct Crashed<'a>(pub(crate) MappedRegions<'a>);

impl GuestMemory for Crashed<'_> {
    fn layout(&self) -> &RamLayout {
        self.0.layout()
    }
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read(at, buf)
    }
    fn processors(&self) -> Processors {
        Processors::Crashed
    }
}

/// Then `vmcoreinfo_data` points to a copy that the crash kernel's memory has.
#[test]
fn a_crash_dump_without_types_has_its_vmcoreinfo_in_the_note() {
    let mut ram = testdata();
    let (text, own, direct_map) = {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let own = guest.symbol_sources()[0].clone();
        let own = own.strip_prefix("VMCOREINFO at 0x").unwrap();
        (
            guest.vmcoreinfo().unwrap().to_owned(),
            u64::from_str_radix(own, 16).unwrap(),
            guest.direct_map().unwrap().unwrap().raw(),
        )
    };
    let pointer = (direct_map + own).to_le_bytes();
    let elsewhere = (direct_map + (1 << 40)).to_le_bytes();
    let places: Vec<usize> = memchr::memmem::find_iter(&ram, &pointer).collect();
    assert!(!places.is_empty());
    for at in places {
        ram[at..at + 8].copy_from_slice(&elsewhere);
    }
    let text = format!("{text}CRASHTIME=1\n");
    let options = GuestOptions::new()
        .at_most(Knowledge::Vmcoreinfo)
        .vmcoreinfo(text);
    let memory = || MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
    let crashed = Crashed(memory());
    let guest = LinuxGuest::open(&crashed, &options).unwrap();
    assert_eq!(guest.knowledge(), Knowledge::Vmcoreinfo);
    let pages = guest.classify(OnInconsistency::Refuse).unwrap();
    assert!(pages.map.counts().get(PageClass::FreeBuddy) > 10_000);
    assert!(pages.notes.contains(&Note::CrashDump));
    // Of memory that is none, the note's word is not enough.
    let memory = memory();
    let error = LinuxGuest::open(&memory, &options).err().unwrap();
    assert!(matches!(error, VmiError::Stale { .. }), "{error}");
}

/// Writes `over` over all of `what` in the guest's memory; how often it stood there.
pub(crate) fn erase(ram: &mut [u8], what: &[u8], over: u8) -> usize {
    let places: Vec<usize> = memchr::memmem::find_iter(ram, what).collect();
    for at in &places {
        ram[*at..at + what.len()].fill(over);
    }
    places.len()
}

#[test]
fn symbols_that_are_gone_are_not_symbols_that_never_were() {
    let mut ram = testdata();
    let memory = |ram: &[u8]| {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        match LinuxGuest::open(&memory, &GuestOptions::new()) {
            Ok(guest) => Err(guest.knowledge()),
            Err(error) => Ok(error),
        }
    };
    assert_eq!(memory(&ram).unwrap_err(), Knowledge::Types);
    // What writes over a kernel's symbols may write over more of it.
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
    assert!(erase(&mut ram, digits, 0xff) > 0);
    let error = memory(&ram).unwrap();
    assert!(matches!(error, VmiError::Symbols(_)), "{error}");
}

/// The kernel's top-level page table: the processor's `CR3`.
fn root(ram: &[u8]) -> Cr3 {
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let info = guest.vmcoreinfo().unwrap();
    Cr3::new(in_image(info, "SYMBOL(swapper_pg_dir)="))
}

/// The guest-physical address of a symbol of the kernel's image.
fn in_image(info: &str, symbol: &str) -> u64 {
    let at = u64::from_str_radix(line(info, symbol), 16).unwrap();
    let base: i64 = line(info, "NUMBER(phys_base)=").parse().unwrap();
    at.wrapping_sub(0xffff_ffff_8000_0000)
        .wrapping_add_signed(base)
}

#[test]
fn a_kernel_without_vmcoreinfo_must_be_run_by_the_processors() {
    let mut ram = testdata();
    let cr3 = root(&ram);
    assert!(erase(&mut ram, b"OSRELEASE=", b'#') > 0);
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
    // As after a reset by a firmware that took just this page.
    let error = classify_raw(&ram, &GuestOptions::new()).unwrap_err();
    let gone = matches!(&error, VmiError::OwnerUntold { why, .. } if why.contains("is gone"));
    assert!(gone, "{error}");
    let told = GuestOptions::new().cr3(cr3);
    let guest = LinuxGuest::open(&memory, &told).unwrap();
    assert_eq!(guest.knowledge(), Knowledge::Shape);
    // A file of symbols is not taken for its kernel's, and that is said.
    let map = tempfile::NamedTempFile::new().unwrap();
    let line = |number: u64| format!("{:x} T s{number}\n", 0xffff_ffff_8100_0000 + number * 16);
    fs::write(map.path(), (0..20_000).map(line).collect::<String>()).unwrap();
    let guest = LinuxGuest::open(&memory, &told.symbols(map.path())).unwrap();
    assert_eq!(guest.knowledge(), Knowledge::Shape);
    let pages = guest.classify(OnInconsistency::Refuse).unwrap();
    let files = vec![map.path().to_owned()];
    assert!(pages.notes.contains(&Note::SymbolFilesNotUsed { files }));
}

/// Memory that counts how often it is asked.
struct Counted<'a>(MappedRegions<'a>, AtomicU64);

impl GuestMemory for Counted<'_> {
    fn layout(&self) -> &RamLayout {
        self.0.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.read(at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.map(at, len)
    }
}

#[test]
fn pages_that_begin_like_vmcoreinfo_do_not_hide_a_kernel_that_has_none() {
    const DECOYS: usize = 10_000;
    let mut ram = testdata();
    let cr3 = root(&ram);
    let text = {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        guest.vmcoreinfo().unwrap().to_owned()
    };
    let found = |ram: &[u8], decoys: &[u8]| {
        let mut parts = vec![(Gpa::ZERO, GuestBytes::from_slice(ram))];
        if !decoys.is_empty() {
            parts.push((Gpa::new(1 << 30), GuestBytes::from_slice(decoys)));
        }
        let memory = Counted(MappedRegions::new(parts).unwrap(), AtomicU64::new(0));
        let guest = LinuxGuest::open(&memory, &GuestOptions::new().cr3(cr3)).unwrap();
        let calls = memory.1.load(Ordering::Relaxed);
        assert_eq!(guest.knowledge(), Knowledge::Shape);
        let pages = guest.classify(OnInconsistency::Refuse).unwrap();
        (pages.map.counts().get(PageClass::FreeBuddy), calls)
    };
    assert!(erase(&mut ram, b"OSRELEASE=", b'#') > 0);
    let (free, without) = found(&ram, &[]);
    // The beginning alone; a text of another kernel, of another machine, of this kernel elsewhere.
    let texts = [
        "OSRELEASE=".to_owned(),
        format!("{}KERNELOFFSET=1\n", &text[..text.len() / 2]),
        format!("{text}NUMBER(VA_BITS)=48\n"),
        text.replace(
            "NUMBER(phys_base)=",
            "NUMBER(phys_base)=4096\nNUMBER(other)=",
        ),
    ];
    let mut decoys = vec![0; DECOYS << 12];
    for (page, text) in decoys.chunks_mut(1 << 12).zip(texts.iter().cycle()) {
        page[..text.len()].copy_from_slice(text.as_bytes());
    }
    for count in [1, DECOYS] {
        let (with, calls) = found(&ram, &decoys[..count << 12]);
        assert_eq!(with, free, "{count}");
        // All are read, none is tried to the end: that takes thousands of calls.
        let more = calls.saturating_sub(without);
        let most = 100 * u64::try_from(count).unwrap() + 1000;
        assert!(more < most, "{count}: {more} calls");
    }
}

#[test]
fn records_made_elsewhere_do_not_hide_the_kernels_own() {
    let mut ram = testdata();
    let pages = StructPages::new(&ram);
    let cr3 = root(&ram);
    let all = classify(&ram, Knowledge::Types, None).unwrap();
    let direct_map = {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        guest.direct_map().unwrap().unwrap().raw()
    };
    assert!(direct_map < pages.va);
    // Lists of a process's making, by the addresses at which the kernel has its pages.
    let mut made = 0_u64;
    let free = classes(&all.map).into_iter().enumerate();
    for (pfn, _) in free.filter(|(_, class)| is_free(*class)).take(64) {
        let first = pfn << 12;
        let node = |number: usize| direct_map + (first + number % 64 * 64 + LRU) as u64;
        for number in 0..64 {
            let at = first + number * 64;
            ram[at..at + 64].fill(0);
            put(&mut ram, at + LRU, node(number + 1));
            put(&mut ram, at + LRU + 8, node(number + 63));
            ram[at + MAPCOUNT..at + MAPCOUNT + 4].copy_from_slice(&PAGE_BUDDY.to_le_bytes());
            made += 1;
        }
    }
    assert_eq!(made, 4096);
    let few = classify(&ram, Knowledge::Shape, Some(cr3)).unwrap();
    let [both, more, fewer] = compare(&all.map, &few.map, &is_free);
    assert_eq!((more, fewer), (0, 0), "{both}");
}

#[test]
fn without_types_a_guest_that_bears_no_trace_is_taken() {
    let mut ram = testdata();
    let levels = [Knowledge::Vmcoreinfo, Knowledge::Shape];
    for options in levels.map(|level| GuestOptions::new().at_most(level)) {
        let few = classify_raw(&ram, &options).unwrap();
        let notes: Vec<String> = few.notes.iter().map(ToString::to_string).collect();
        let made = "tested: the kernel's log, the BIOS's clock, firmware tables)";
        assert!(notes.iter().any(|note| note.contains(made)), "{notes:?}");
    }
    // A firmware that keeps no clock starts again as any does, and leaves an image with a setup header.
    ram[0x413..0x415].fill(0);
    for options in levels.map(|level| GuestOptions::new().at_most(level)) {
        let error = classify_raw(&ram, &options).unwrap_err();
        assert!(matches!(error, VmiError::OwnerUntold { .. }), "{error}");
    }
    // A machine without a BIOS has none to start again.
    ram[..0x400].fill(0);
    for options in levels.map(|level| GuestOptions::new().at_most(level)) {
        assert!(classify_raw(&ram, &options).is_ok());
    }
}

/// Writes `with` wherever `what` is.
fn replace(ram: &mut [u8], what: &[u8], with: &[u8]) {
    assert_eq!(what.len(), with.len());
    let places: Vec<usize> = memchr::memmem::find_iter(ram, what).collect();
    assert!(!places.is_empty());
    for at in places {
        ram[at..at + what.len()].copy_from_slice(with);
    }
}

/// Each made in the memory of a guest that bears no trace; of no processor is anything told.
#[test]
fn without_types_the_log_tells_of_a_later_owner() {
    let ram = testdata();
    let rsdp = (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|at| ram[*at..].starts_with(b"RSD PTR "));
    let ticks = u32::from_le_bytes(ram[0x46c..0x470].try_into().unwrap());
    type Change<'a> = &'a dyn Fn(&mut [u8]);
    // An hour later; cleared, as a BIOS does first.
    let later = (ticks + 65_543) % 0x18_00b0;
    let table: [(&str, Change<'_>, &str); 5] = [
        (
            "a BIOS that started later",
            &|ram| ram[0x46c..0x470].copy_from_slice(&later.to_le_bytes()),
            "the kernel found does not own this memory any more: the BIOS's clock",
        ),
        (
            "a BIOS that starts",
            &|ram| ram[0x46c..0x470].fill(0),
            "the kernel found does not own this memory any more: the BIOS's clock",
        ),
        (
            "a BIOS whose ROM is new",
            &|ram| ram[rsdp.unwrap()..][..8].fill(0),
            "the kernel found does not own this memory any more: the ACPI root pointer",
        ),
        (
            "no line of the clock",
            &|ram| {
                replace(
                    ram,
                    b": setting system clock to 2",
                    b": setting SYSTEM clock to 2",
                );
            },
            "it cannot be told whether kernel 6.1.0-50-cloud-amd64 still owns the memory: types are \
             missing, and nothing else would show a reset (not tested: the BIOS's clock",
        ),
        (
            "no data area of a BIOS, started by EFI",
            &|ram| {
                ram[0x413..0x415].fill(0);
                let line = b"BIOS-e820: [mem 0x0000000000000000-0";
                replace(ram, line, b"efi: EFI v2.70 by EDK II            ");
            },
            "it cannot be told whether kernel 6.1.0-50-cloud-amd64 still owns the memory: types are \
             missing, and nothing else would show a reset (not tested: the BIOS's clock, the \
             kernel was started by EFI",
        ),
    ];
    for (what, change, text) in table {
        let mut ram = ram.clone();
        change(&mut ram);
        for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
            let options = GuestOptions::new().at_most(knowledge);
            let error = told(&classify_raw(&ram, &options).unwrap_err());
            assert!(error.starts_with(text), "{knowledge}, {what}: {error}");
        }
        // What the processors say needs no trace.
        let told = classify(&ram, Knowledge::Vmcoreinfo, Some(testdata_root()));
        assert!(told.is_ok(), "{what}: {:?}", told.err());
    }
}

#[test]
fn page_tables_that_lead_to_no_records_are_no_kernels() {
    let ram = testdata();
    for cr3 in [0x10_0000, 0x0, 0xffff_f000] {
        let error = classify(&ram, Knowledge::Shape, Some(Cr3::new(cr3))).unwrap_err();
        assert!(error.contains("page tables maps them"), "{cr3:#x}: {error}");
    }
    let error = classify(&vec![0; 16 << 20], Knowledge::Shape, None).unwrap_err();
    assert!(
        error.contains("nothing looks like a free page's record"),
        "{error}"
    );
}

/// Captures of the lab (raw RAM without a hole), given by `SONICSHOT_CAPTURES`, `:` between them.
#[test]
#[ignore = "needs captures of the lab"]
fn captures() {
    const BUDDY: u64 = 1 << 10;
    let given = std::env::var("SONICSHOT_CAPTURES").unwrap();
    let mut wrong = 0;
    for path in given.split(':').map(PathBuf::from) {
        let ram = fs::read(&path).unwrap();
        let flags = fs::read(path.with_file_name("kpageflags.bin")).unwrap_or_default();
        let (flags, _) = flags.as_chunks::<8>();
        println!("{}", path.display());
        let mut all: Option<Classification> = None;
        for knowledge in [Knowledge::Types, Knowledge::Vmcoreinfo, Knowledge::Shape] {
            let start = Instant::now();
            let found = classify(&ram, knowledge, Some(root(&ram)));
            let took = start.elapsed();
            let pages = match found {
                Ok(pages) => pages,
                Err(error) => {
                    println!("  {knowledge}: {error}");
                    wrong += 1;
                    continue;
                }
            };
            let free = classes(&pages.map);
            let counts = pages.map.counts();
            let kernel = flags
                .iter()
                .filter(|w| u64::from_le_bytes(**w) & BUDDY != 0)
                .count();
            let not_buddy = free.iter().zip(flags).filter(|(class, word)| {
                **class == PageClass::FreeBuddy && u64::from_le_bytes(**word) & BUDDY == 0
            });
            println!(
                "  {knowledge}: {took:.2?}, buddy {}, pcp {}, offline {}; kpageflags {kernel}, \
                 not there {}",
                counts.get(PageClass::FreeBuddy),
                counts.get(PageClass::FreePcp),
                counts.get(PageClass::Offline),
                not_buddy.count()
            );
            for zone in &pages.zones {
                println!("    {zone:?}");
            }
            for note in &pages.notes {
                println!("    note: {note}");
            }
            if let Some(all) = &all {
                let buddy = compare(&all.map, &pages.map, &|c| c == PageClass::FreeBuddy);
                let free = compare(&all.map, &pages.map, &is_free);
                println!("    buddy both, more, fewer: {buddy:?}; free {free:?}");
                wrong += usize::from(free[2] > 0);
            } else {
                all = Some(pages);
            }
        }
    }
    assert_eq!(wrong, 0);
}

#[test]
fn without_types_the_last_words_of_a_kernel_tell_that_it_is_gone() {
    let place = b"BIOS-e820: [mem 0x0000000000000000-0";
    for words in [
        "reboot: Restarting system",
        "kexec_core: Starting new kernel",
        "Kernel panic - not syncing: a test",
        "sysrq: Resetting",
    ] {
        let mut ram = testdata();
        let line = format!("{words:<36}");
        replace(&mut ram, place, line.as_bytes());
        for level in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
            let error = classify_raw(&ram, &GuestOptions::new().at_most(level)).unwrap_err();
            let said = format!("does not own this memory any more: the kernel's log says `{words}");
            assert!(error.to_string().contains(&said), "{error}");
        }
    }
}

/// With `panic=0` a kernel neither restarts nor starts another, and says so last.
#[test]
fn without_types_a_kernel_that_panicked_and_stays_is_the_owner() {
    let places: [&[u8]; 2] = [
        b"BIOS-e820: [mem 0x0000000000000000-0",
        b"BIOS-e820: [mem 0x000000000009fc00-0",
    ];
    let (panic, stays) = (
        "Kernel panic - not syncing: a test",
        "---[ end Kernel panic",
    );
    for (lines, is_owner) in [([panic, stays], true), ([stays, panic], false)] {
        let mut ram = testdata();
        for (place, line) in places.iter().zip(lines) {
            replace(&mut ram, place, format!("{line:<36}").as_bytes());
        }
        for level in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
            let found = classify_raw(&ram, &GuestOptions::new().at_most(level));
            assert_eq!(found.is_ok(), is_owner, "{lines:?}: {:?}", found.err());
        }
    }
}
