//! The evidence in a real guest's memory of the place of each part of it.

use sonicshot::{Gpa, GpaRange, GuestBytes, MappedRegions};
use sonicshot_vmi::{GuestOptions, LinuxGuest, PlaceEvidence, VmiError};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

const MIB: u64 = 1 << 20;
/// Linux 6.1 has `struct page`s of 64 bytes: 2 MiB of them for 128 MiB.
const STRUCT_PAGES: u64 = 2 << 20;

fn ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let path = "../../testdata/guest-6.1-128m/ram.raw.zst";
        let file = File::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let mut reader = zstd::stream::read::Decoder::new(file).unwrap();
        reader.window_log_max(31).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Parts of 8 MiB.
fn parts() -> Vec<GpaRange> {
    let part = |n: u64| GpaRange::with_len(Gpa::new(n * 8 * MIB), 8 * MIB).unwrap();
    (0..16).map(part).collect()
}

/// The evidence for each part if two of them have changed places.
fn swapped(a: usize, b: usize) -> Result<Vec<PlaceEvidence>, VmiError> {
    let mut order: Vec<usize> = (0..16).collect();
    order.swap(a, b);
    let size = 8 << 20;
    let bytes = |n: usize| GuestBytes::from_slice(&ram()[n * size..(n + 1) * size]);
    let regions = (0_u64..)
        .zip(&order)
        .map(|(n, from)| (Gpa::new(n * 8 * MIB), bytes(*from)));
    let memory = MappedRegions::new(regions.collect()).unwrap();
    LinuxGuest::open(&memory, &GuestOptions::new())?.evidence_of_places(&parts())
}

#[test]
fn lists_and_struct_pages_tell_where_they_lie() {
    let all = swapped(0, 0).unwrap();
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram()))]).unwrap();
    let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
    let structs = guest.struct_page_memory().unwrap();
    assert_eq!(structs.iter().map(GpaRange::len).sum::<u64>(), STRUCT_PAGES);
    let confirmed: Vec<usize> = (0..16).filter(|n| all[*n].is_confirmed()).collect();
    // Those with the kernel's objects, and the one with the struct pages.
    for (number, evidence) in all.iter().enumerate() {
        assert_eq!(evidence.belongs_to(), None, "{evidence:?}");
        let holds = structs
            .iter()
            .any(|s| !s.intersection(&evidence.range).is_empty());
        assert_eq!(evidence.struct_pages > 0, holds, "{number}: {evidence:?}");
        assert!(!holds || evidence.struct_pages > 1000, "{evidence:?}");
        assert!(!holds || confirmed.contains(&number), "{evidence:?}");
    }
    for number in [2, 3, 4, 5, 15] {
        assert!(confirmed.contains(&number), "{confirmed:?}");
        assert!(all[number].here >= 512, "{:?}", all[number]);
    }
    // Processes alone.
    for number in [6, 7, 8] {
        assert!(!confirmed.contains(&number), "{confirmed:?}");
    }
}

#[test]
fn parts_that_changed_places_are_told() {
    let parts = parts();
    for (a, b) in [(4, 6), (4, 8), (4, 14)] {
        let all = swapped(a, b).unwrap();
        // At `b` lies what belongs at `a`, which is full of lists.
        assert_eq!(all[b].belongs_to(), Some(parts[a]), "{:?}", all[b]);
        assert!(!all[a].is_confirmed() && !all[b].is_confirmed(), "{a} {b}");
        let others = (0..16).filter(|n| ![a, b].contains(n));
        let told = others.filter(|n| all[*n].belongs_to().is_some()).count();
        assert_eq!(told, 0, "{a} {b}");
    }
}
