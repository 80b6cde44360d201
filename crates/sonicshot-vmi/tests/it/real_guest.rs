//! A real guest's memory, as it was, and damaged on purpose: whatever a guest's memory holds,
//! no page may be dropped that its kernel uses.

use sonicshot::{
    DropClasses, Fill, Gpa, GpaRange, GuestBytes, GuestMemory, MappedRegions, MemoryError,
    PageClass, PageMap, Pfn, PfnRange, RamLayout, WorkOptions, WorkPhase,
};
use sonicshot_testkit::Told;
use sonicshot_vmi::{
    AnalysisOptions, BlockDisagreement, Classification, GivenUp, GuestOptions, GuestOs, Knowledge,
    LinuxGuest, OnInconsistency, VirtualMemory, VmiError, analyze, count_zero_pages,
    mark_zero_pages,
};
use std::fs::File;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::slice::from_ref;
use std::sync::{Arc, OnceLock};

const PAGE: usize = 4096;
/// Of the guest's `struct page` (Linux 6.1, x86-64), from its own BTF.
const STRUCT_PAGE: usize = 64;
const LRU: usize = 8;
const PRIVATE: usize = 40;
const MAPCOUNT: usize = 48;
const REFCOUNT: usize = 52;
const PAGE_BUDDY: u32 = !0x80;

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/guest-6.1-128m")
        .join(name)
}

fn ram() -> Vec<u8> {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let file = File::open(testdata("ram.raw.zst")).unwrap();
        let mut reader = zstd::stream::read::Decoder::new(file).unwrap();
        reader.window_log_max(31).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
    .clone()
}

fn memory(ram: &[u8]) -> MappedRegions<'_> {
    MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap()
}

fn classify(ram: &[u8], on: OnInconsistency) -> Result<Classification, VmiError> {
    let memory = memory(ram);
    LinuxGuest::open(&memory, &GuestOptions::new())?.classify(on)
}

/// Whatever is known of the kernel, and on any number of threads, all of memory is told of in each
/// phase, without a step back.
#[test]
fn each_phase_of_an_analysis_is_told_of_to_its_end() {
    use WorkPhase::{Classifying, FindingKernel, FindingLists, FindingZeroPages, WalkingLists};
    let ram = ram();
    let memory = memory(&ram);
    let all = ram.len() as u64;
    for (knowledge, threads, expected) in [
        (
            Knowledge::Types,
            1,
            &[FindingKernel, WalkingLists, Classifying, FindingZeroPages][..],
        ),
        (
            Knowledge::Types,
            4,
            &[FindingKernel, WalkingLists, Classifying, FindingZeroPages],
        ),
        (
            Knowledge::Vmcoreinfo,
            2,
            &[
                FindingKernel,
                FindingLists,
                WalkingLists,
                Classifying,
                FindingZeroPages,
            ],
        ),
        (
            Knowledge::Shape,
            2,
            &[
                FindingKernel,
                FindingLists,
                WalkingLists,
                Classifying,
                FindingZeroPages,
            ],
        ),
    ] {
        let told = Arc::new(Told::default());
        let guest = GuestOptions::new()
            .at_most(knowledge)
            .threads(NonZeroUsize::new(threads).unwrap());
        let options = AnalysisOptions::new().guest(guest).progress(told.clone());
        let analysis = analyze(&memory, &options).unwrap();
        let told = told.phases();
        let phases: Vec<_> = told.iter().map(|(phase, _)| *phase).collect();
        assert_eq!(phases, expected, "{knowledge:?}");
        for (phase, bytes) in told.iter() {
            let (_, total) = bytes[0];
            assert!(bytes.len() > 2, "{phase:?}: {bytes:?}");
            assert!(bytes.is_sorted() && bytes.iter().all(|(_, of)| *of == total));
            assert_eq!(bytes.last(), Some(&(total, total)), "{phase:?}");
            // Of struct pages the bytes are their own, of lists those that the zones count.
            let of_all = ![FindingLists, WalkingLists].contains(phase);
            assert_eq!(total == all, of_all, "{phase:?}: {total}");
            if *phase == WalkingLists {
                let zones = analysis.zones().iter();
                let counted: u64 = zones.map(|zone| zone.nr_free << 12).sum();
                assert_eq!(total, counted);
            }
        }
    }
}

fn is_dropped(class: PageClass) -> bool {
    matches!(
        class,
        PageClass::FreeBuddy | PageClass::FreePcp | PageClass::Offline
    )
}

fn dropped(map: &PageMap) -> Vec<bool> {
    map.runs()
        .flat_map(|(run, class)| run.iter().map(move |_| is_dropped(class)))
        .collect()
}

/// The range of the struct pages in the file.
fn struct_pages(ram: &[u8]) -> GpaRange {
    let memory = memory(ram);
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let found = guest.struct_page_memory().unwrap();
    assert_eq!(found.len(), 1, "a guest of one section");
    found[0]
}

fn u32_at(ram: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(ram[at..at + 4].try_into().unwrap())
}

fn u64_at(ram: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(ram[at..at + 8].try_into().unwrap())
}

fn put(ram: &mut [u8], at: usize, value: u64) {
    ram[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn unmark(ram: &mut [u8], at: usize) {
    ram[at + MAPCOUNT..at + MAPCOUNT + 4].fill(0xff);
}

/// The frames that head a free block, with the order of each and where its struct page is.
fn heads(ram: &[u8]) -> Vec<(usize, u64, usize)> {
    let base = usize::try_from(struct_pages(ram).start().raw()).unwrap();
    (0..ram.len() / PAGE)
        .map(|pfn| (pfn, base + pfn * STRUCT_PAGE))
        .filter(|(_, at)| u32_at(ram, at + MAPCOUNT) == PAGE_BUDDY)
        .map(|(pfn, at)| (pfn, u64_at(ram, at + PRIVATE), at))
        .collect()
}

fn class_of(pages: &Classification, pfn: usize) -> PageClass {
    pages.map.class(Pfn::new(pfn as u64)).unwrap()
}

#[test]
fn any_number_of_threads_finds_the_same() {
    let mut ram = ram();
    let classify = |ram: &[u8], threads| {
        let memory = memory(ram);
        let options = GuestOptions::new().threads(NonZeroUsize::new(threads).unwrap());
        let guest = LinuxGuest::open(&memory, &options).unwrap();
        guest.classify(OnInconsistency::KeepInQuestion).unwrap()
    };
    // Sound, and with free blocks of which struct pages show users, more than are described.
    for torn in [false, true] {
        if torn {
            let sound = classify(&ram, 1);
            let structs = usize::try_from(struct_pages(&ram).start().raw()).unwrap();
            let free = sound
                .map
                .runs()
                .filter(|(_, class)| *class == PageClass::FreeBuddy);
            let frames = free.flat_map(|(run, _)| run.iter()).map(Pfn::raw);
            // At least one in each large block.
            let inside: Vec<u64> = frames.filter(|pfn| pfn % 256 == 255).collect();
            for pfn in inside {
                ram[structs + usize::try_from(pfn).unwrap() * STRUCT_PAGE + REFCOUNT] = 1;
            }
        }
        let one = classify(&ram, 1);
        assert_eq!(one.disagreement.is_some(), torn);
        if let Some(found) = &one.disagreement {
            assert!(found.blocks > found.examples.len() as u64, "{found}");
        }
        for threads in [2, 4, 7] {
            let several = classify(&ram, threads);
            assert_eq!(several.map, one.map);
            assert_eq!(several.zones, one.zones);
            assert_eq!(several.disagreement, one.disagreement);
            assert_eq!(format!("{:?}", several.notes), format!("{:?}", one.notes));
        }
    }
}

#[test]
fn the_guest_as_it_was_has_no_contradiction() {
    let ram = ram();
    let pages = classify(&ram, OnInconsistency::Refuse).unwrap();
    assert_eq!(pages.disagreement, None);
    for zone in &pages.zones {
        assert_eq!(zone.listed, zone.flagged);
        assert_eq!(zone.listed, zone.nr_free);
        assert_eq!(i64::try_from(zone.listed).unwrap(), zone.counter);
    }
    let blocks: u64 = heads(&ram).iter().map(|(_, order, _)| 1 << order).sum();
    assert_eq!(pages.map.counts().get(PageClass::FreeBuddy), blocks);
}

#[test]
fn one_block_without_its_mark_is_kept_and_three_are_refused() {
    let mut ram = ram();
    let heads = heads(&ram);
    let (pfn, order, at) = heads[5];
    unmark(&mut ram, at);
    let pages = classify(&ram, OnInconsistency::Refuse).unwrap();
    assert_eq!(pages.disagreement.as_ref().unwrap().blocks, 1);
    for frame in pfn..pfn + (1 << order) {
        assert!(!is_dropped(class_of(&pages, frame)));
    }
    for (_, _, at) in &heads[6..8] {
        unmark(&mut ram, *at);
    }
    let error = classify(&ram, OnInconsistency::Refuse).unwrap_err();
    let VmiError::Inconsistent(inconsistency) = &error else {
        panic!("{error}");
    };
    assert_eq!((inconsistency.blocks, inconsistency.explained), (3, 1));
    let named = format!("frame {:#x}", heads[6].0);
    assert!(error.to_string().contains(&named), "{error}");
    let pages = classify(&ram, OnInconsistency::KeepInQuestion).unwrap();
    assert!(!is_dropped(class_of(&pages, heads[7].0)));
}

#[test]
fn a_user_inside_a_free_block_keeps_the_whole_block() {
    let mut ram = ram();
    let heads = heads(&ram);
    let (pfn, order, at) = *heads.iter().find(|(_, order, _)| *order >= 3).unwrap();
    ram[at + 3 * STRUCT_PAGE + REFCOUNT] = 1;
    let pages = classify(&ram, OnInconsistency::Refuse).unwrap();
    for frame in pfn..pfn + (1 << order) {
        assert!(!is_dropped(class_of(&pages, frame)), "frame {frame}");
    }
    let example = &pages.disagreement.unwrap().examples[0];
    assert!(
        matches!(example, BlockDisagreement::InUse { .. }),
        "{example}"
    );
    assert!(example.to_string().contains("shows a user"), "{example}");
}

#[test]
fn an_owners_name_is_told_as_far_as_a_bound() {
    let mut ram = ram();
    // A slab's cache, and where its name's address lies in the file.
    let (pfn, pointer, banner) = {
        let memory = memory(&ram);
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let pages = guest.classify(OnInconsistency::Refuse).unwrap();
        let mut slabs = pages.map.runs().filter(|run| run.1 == PageClass::Slab);
        let pfn = slabs.next().unwrap().0.start();
        let owner = guest.page_facts(pfn).unwrap().owner.unwrap();
        assert_eq!(owner.kind, "slab");
        assert!((1..64).contains(&owner.name.unwrap().len()));
        let member = guest.member("kmem_cache", "name").unwrap().unwrap();
        let at = owner.at.unwrap().checked_add(member.offset).unwrap();
        let banner = guest.symbol("linux_banner").unwrap().unwrap();
        (pfn, guest.translate(at).unwrap(), banner)
    };
    put(
        &mut ram,
        usize::try_from(pointer.raw()).unwrap(),
        banner.raw(),
    );
    let memory = memory(&ram);
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let whole = guest.banner().unwrap();
    assert!(whole.len() > 64);
    let owner = guest.page_facts(pfn).unwrap().owner.unwrap();
    assert_eq!(owner.name.as_deref(), Some(&whole[..64]));
}

#[test]
fn a_block_that_lies_about_its_order_is_kept() {
    let original = ram();
    let before = dropped(&classify(&original, OnInconsistency::Refuse).unwrap().map);
    let heads = heads(&original);
    let (pfn, order, at) = *heads.iter().find(|(_, order, _)| *order == 3).unwrap();
    for wrong in [0_u64, 1, 9, 10, 11, 63, 64, u64::MAX] {
        let mut ram = original.clone();
        put(&mut ram, at + PRIVATE, wrong);
        let pages = classify(&ram, OnInconsistency::KeepInQuestion).unwrap();
        for frame in pfn..pfn + (1 << order) {
            assert!(!is_dropped(class_of(&pages, frame)), "order {wrong}");
        }
        let after = dropped(&pages.map);
        assert!(
            after
                .iter()
                .zip(&before)
                .all(|(after, before)| !after || *before)
        );
    }
}

#[test]
fn a_mark_on_a_page_in_use_drops_nothing() {
    let mut ram = ram();
    let base = usize::try_from(struct_pages(&ram).start().raw()).unwrap();
    let pages = classify(&ram, OnInconsistency::Refuse).unwrap();
    let used = (0..ram.len() / PAGE)
        .find(|pfn| class_of(&pages, *pfn) == PageClass::Anonymous && pfn % 4 == 0)
        .unwrap();
    let at = base + used * STRUCT_PAGE;
    ram[at + MAPCOUNT..at + MAPCOUNT + 4].copy_from_slice(&PAGE_BUDDY.to_le_bytes());
    put(&mut ram, at + PRIVATE, 2);
    let pages = classify(&ram, OnInconsistency::Refuse).unwrap();
    assert!((used..used + 4).all(|pfn| !is_dropped(class_of(&pages, pfn))));
}

#[test]
fn broken_lists_end_with_an_error() {
    let original = ram();
    let heads = heads(&original);
    let (_, _, at) = heads[heads.len() / 2];
    let back = u64_at(&original, at + LRU + 8);
    for next in [0, 1, u64::MAX, back ^ 4, 0xffff_8880_0000_0008] {
        let mut ram = original.clone();
        put(&mut ram, at + LRU, next);
        let error = classify(&ram, OnInconsistency::KeepInQuestion).unwrap_err();
        assert!(
            matches!(error, VmiError::BrokenLists { .. }),
            "{next:#x}: {error}"
        );
    }
}

#[test]
fn lists_that_turn_back_on_themselves_end() {
    let original = ram();
    let heads = heads(&original);
    for (_, _, at) in heads.iter().step_by(heads.len() / 6) {
        let mut ram = original.clone();
        // Every block's next becomes one and the same node.
        let target = u64_at(&original, at + LRU);
        for (_, _, other) in &heads {
            put(&mut ram, other + LRU, target);
        }
        assert!(classify(&ram, OnInconsistency::KeepInQuestion).is_err());
    }
}

#[test]
fn cut_lists_show_the_numbers() {
    let mut ram = ram();
    let heads = heads(&ram);
    // The struct pages' part of the address space: what the blocks of the longest list point to.
    let mut parts: Vec<u64> = heads
        .iter()
        .filter(|(_, order, _)| *order == 10)
        .map(|(_, _, at)| u64_at(&ram, at + LRU) >> 40)
        .collect();
    parts.sort_unstable();
    let vmemmap = parts[parts.len() / 2];
    // The first block of each list points back to the list's head, which is no struct page. Let
    // it point forward to it too, and the list ends there.
    for (_, _, at) in &heads {
        let back = u64_at(&ram, at + LRU + 8);
        if back >> 40 != vmemmap {
            put(&mut ram, at + LRU, back);
        }
    }
    let error = classify(&ram, OnInconsistency::Refuse).unwrap_err();
    assert!(matches!(error, VmiError::Inconsistent(_)), "{error}");
    assert!(error.to_string().contains("nr_free says"), "{error}");
}

/// The place of the word in `mem_section` that names the struct pages of the guest's only section.
fn section_word(ram: &[u8]) -> usize {
    let len = ram.len() / PAGE * STRUCT_PAGE;
    let mut arrays: Vec<u64> = heads(ram)
        .iter()
        .map(|(_, _, at)| u64_at(ram, at + LRU) & !(len as u64 - 1))
        .collect();
    // The others are heads of lists, in the zones: no word says of those that they are online.
    arrays.sort_unstable();
    arrays.dedup();
    // Present, with a mem_map, online, early.
    let is_word = |at: &usize| {
        let word = u64_at(ram, *at);
        word & 0xfff == 0xf && arrays.contains(&(word ^ 0xf))
    };
    let found: Vec<usize> = (0..ram.len()).step_by(8).filter(is_word).collect();
    assert_eq!(found.len(), 1);
    found[0]
}

#[test]
fn a_section_in_use_that_loses_a_bit_is_not_dropped() {
    let original = ram();
    let before = dropped(&classify(&original, OnInconsistency::Refuse).unwrap().map);
    let at = section_word(&original);
    let mut classified = 0;
    for bit in (0..7).chain(12..24).chain([30, 47]) {
        let mut ram = original.clone();
        ram[at + bit / 8] ^= 1 << (bit % 8);
        let Ok(pages) = classify(&ram, OnInconsistency::KeepInQuestion) else {
            continue;
        };
        classified += 1;
        let after = dropped(&pages.map);
        let wrong = after.iter().zip(&before).filter(|(a, b)| **a && !**b);
        assert_eq!(wrong.count(), 0, "bit {bit}");
        if bit == 2 {
            assert!(
                pages
                    .notes
                    .iter()
                    .any(|note| note.to_string().contains("not online"))
            );
        }
    }
    assert!(classified >= 2, "{classified}");
}

#[test]
fn a_page_in_use_that_says_it_is_offline_is_not_dropped() {
    const PAGE_OFFLINE: u32 = !0x100;
    let original = ram();
    let base = usize::try_from(struct_pages(&original).start().raw()).unwrap();
    let pages = classify(&original, OnInconsistency::Refuse).unwrap();
    for class in [
        PageClass::Kernel,
        PageClass::PageCacheClean,
        PageClass::Anonymous,
        PageClass::Reserved,
    ] {
        let mut ram = original.clone();
        let used: Vec<usize> = (0..ram.len() / PAGE)
            .filter(|pfn| class_of(&pages, *pfn) == class)
            .take(200)
            .collect();
        assert!(used.len() > 20, "{class}");
        for pfn in &used {
            let at = base + pfn * STRUCT_PAGE;
            ram[at + MAPCOUNT..at + MAPCOUNT + 4].copy_from_slice(&PAGE_OFFLINE.to_le_bytes());
            // As a driver leaves it, every second.
            if pfn % 2 == 0 {
                put(&mut ram, at + PRIVATE, 0);
                ram[at + REFCOUNT..at + REFCOUNT + 4].copy_from_slice(&[1, 0, 0, 0]);
            }
        }
        let pages = classify(&ram, OnInconsistency::Refuse).unwrap();
        for pfn in used {
            assert!(!is_dropped(class_of(&pages, pfn)), "{class}, frame {pfn}");
        }
    }
}

/// A simple generator: the same damage every time.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    usize::try_from(*state >> 1).unwrap()
}

#[test]
fn no_damage_to_struct_pages_drops_a_page_in_use() {
    let original = ram();
    let before = dropped(&classify(&original, OnInconsistency::Refuse).unwrap().map);
    let range = struct_pages(&original);
    let start = usize::try_from(range.start().raw()).unwrap();
    let len = usize::try_from(range.len()).unwrap();
    let mut state = 0x2545_f491_4f6c_dd1d;
    let mut classified = 0;
    for round in 0..60 {
        let mut ram = original.clone();
        for _ in 0..1 << (round % 8) {
            let at = next(&mut state) % (len - STRUCT_PAGE);
            match next(&mut state) % 3 {
                0 => ram[start + at] ^= 1 << (next(&mut state) % 8),
                1 => ram[start + at] = 0,
                _ => {
                    let from = start + next(&mut state) % (len / STRUCT_PAGE) * STRUCT_PAGE;
                    let to = start + at / STRUCT_PAGE * STRUCT_PAGE;
                    ram.copy_within(from..from + STRUCT_PAGE, to);
                }
            }
        }
        if let Ok(pages) = classify(&ram, OnInconsistency::KeepInQuestion) {
            classified += 1;
            for (pfn, (after, before)) in dropped(&pages.map).iter().zip(&before).enumerate() {
                assert!(!after || *before, "round {round}: frame {pfn} was in use");
            }
        }
    }
    assert!(
        classified > 10,
        "only {classified} rounds got as far as classes"
    );
}

#[test]
fn damage_anywhere_ends_in_an_error_or_in_classes() {
    let original = ram();
    let mut state = 0x9e37_79b9_7f4a_7c15;
    for round in 0..40 {
        let mut ram = original.clone();
        match round % 4 {
            // Cut, or with ranges gone.
            0 => ram.truncate(next(&mut state) % ram.len() / PAGE * PAGE + PAGE),
            1 => {
                let at = next(&mut state) % ram.len();
                let end = ram.len().min(at + (8 << 20));
                ram[at..end].fill(0);
            }
            _ => {
                for _ in 0..2000 {
                    let at = next(&mut state) % ram.len();
                    ram[at] ^= 1 << (next(&mut state) % 8);
                }
            }
        }
        let _ = classify(&ram, OnInconsistency::KeepInQuestion);
    }
}

/// Memory that can only be copied, as of a compressed dump.
struct CopyOnly<'a>(MappedRegions<'a>);

impl GuestMemory for CopyOnly<'_> {
    fn layout(&self) -> &RamLayout {
        self.0.layout()
    }
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read(at, buf)
    }
}

#[test]
fn memory_that_must_be_copied_reads_the_same() {
    let ram = ram();
    let mapped = memory(&ram);
    let copied = CopyOnly(mapped.clone());
    let read = |memory: &dyn GuestMemory| {
        let guest = LinuxGuest::open(memory, &GuestOptions::new()).unwrap();
        let mut pages = guest.classify(OnInconsistency::Refuse).unwrap();
        mark_zero_pages(memory, &mut pages.map, &WorkOptions::new()).unwrap();
        let zero = count_zero_pages(memory, &pages.map, &WorkOptions::new()).unwrap();
        (pages.map, zero, guest.release().to_owned())
    };
    let by_map = read(&mapped);
    assert!(by_map == read(&copied));
    let is_zero = |page: &&[u8]| page.iter().all(|byte| *byte == 0);
    assert_eq!(by_map.1, ram.chunks(PAGE).filter(is_zero).count() as u64);
}

#[test]
fn memory_without_a_kernel_is_told_so() {
    for ram in [vec![0; 1 << 20], vec![0x5a; 1 << 20]] {
        let error = classify(&ram, OnInconsistency::Refuse).unwrap_err();
        assert!(matches!(error, VmiError::NoKernel { .. }), "{error}");
    }
}

#[test]
fn the_guests_own_memory_map_is_read() {
    let ram = ram();
    let memory = memory(&ram);
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let e820 = guest.e820().unwrap().unwrap();
    let mut told: Vec<_> = std::fs::read_to_string(testdata("iomem"))
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_suffix(" : System RAM"))
        .map(|range| {
            let (start, last) = range.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            (number(start), number(last) + 1)
        })
        .collect();
    let pairs = |ranges: &[GpaRange]| -> Vec<(u64, u64)> {
        let ends = ranges.iter().map(|r| (r.start().raw(), r.end().raw()));
        ends.collect()
    };
    let resources = guest.system_ram().unwrap().unwrap();
    assert_eq!(pairs(&resources), told);
    // The firmware gives page 0 too, which the kernel keeps for itself (`trim_bios_range`).
    told[0].0 = 0;
    assert_eq!(pairs(&e820), told);
    // page_offset_base: a kernel address on a whole GiB.
    let direct_map = guest.direct_map().unwrap().unwrap().raw();
    assert!(direct_map >= 0xff11_0000_0000_0000 && direct_map.is_multiple_of(1 << 30));
}

#[test]
fn the_places_of_pages_of_files_are_told() {
    let ram = ram();
    let memory = memory(&ram);
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let pages = guest.classify(OnInconsistency::Refuse).unwrap().map;
    let told_places = guest.file_places(&pages).unwrap();
    assert!(!told_places.file_systems.is_empty());
    let places = told_places.places;
    let counts = pages.counts();
    let cache = [PageClass::PageCacheClean, PageClass::PageCacheDirty];
    let cache: u64 = cache.into_iter().map(|class| counts.get(class)).sum();
    let told = places.len() as u64;
    assert!(told <= cache && told * 2 > cache, "{told} of {cache}");
    // Every page once, and of one file system no place twice.
    let mut frames: Vec<_> = places.iter().map(|place| place.frame).collect();
    frames.sort_unstable();
    frames.dedup();
    assert_eq!(frames.len(), places.len());
    let mut at: Vec<_> = places.iter().map(|p| (p.file_system, p.at)).collect();
    at.sort_unstable();
    at.dedup();
    // A block that a device and a file have both may be there twice.
    assert!(at.len() * 100 > places.len() * 95, "{} of {told}", at.len());
    assert!(places.iter().all(|place| place.at % 512 == 0));
}

/// The guest's first program has 8 MiB of its own memory.
#[test]
fn what_a_process_can_do_without_is_its_own_alone() {
    let ram = ram();
    let memory = memory(&ram);
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let options = AnalysisOptions::new().zero_pages(false);
    let mut analysis = guest.analyze(&options).unwrap();
    let tasks: Vec<_> = guest.tasks().unwrap().map(Result::unwrap).collect();
    let init = tasks.iter().find(|task| task.pid == 1).unwrap();
    let process = init.memory.unwrap();
    // What it has mapped lies below there.
    let top = guest.member("mm_struct", "mmap_base").unwrap().unwrap();
    let top = guest
        .read_u64(process.checked_add(top.offset).unwrap())
        .unwrap();
    let below = top - (512 << 20)..top;
    let found = [guest.give_up(process, &[below], analysis.pages()).unwrap()];
    let pages: u64 = found.iter().map(GivenUp::pages).sum();
    assert!(pages > 500, "{pages}");
    let before = analysis.counts();
    for part in &found {
        for frame in part.frames().iter().flat_map(PfnRange::iter) {
            assert_eq!(analysis.pages().class(frame), Some(PageClass::Anonymous));
        }
        analysis.give_up(part);
    }
    let after = analysis.counts();
    assert_eq!(after.total_zero() - before.total_zero(), pages);
    let plan = analysis.plan(&DropClasses::default());
    let zero = plan.runs().iter().filter(|run| run.fill == Fill::Zero);
    assert!(zero.map(|run| run.frames.len()).sum::<u64>() >= pages);
    // The kernel's half is not a process's, and more than there is is not looked for.
    let kernel = guest.give_up(
        process,
        from_ref(&(0xffff_8880_0000_0000..0xffff_8880_0100_0000)),
        analysis.pages(),
    );
    let kernel = kernel.unwrap();
    assert_eq!((kernel.pages(), kernel.kept().not_there), (0, 4096));
    let all = guest.give_up(process, from_ref(&(0..1 << 47)), analysis.pages());
    assert!(matches!(all, Err(VmiError::TooMany { .. })), "{all:?}");
}
