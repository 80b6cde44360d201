//! Tests of what every guest memory must do, and of the search for RAM.

use crate::fake::{Fake, PAGE, bytes, library, without};
use sonicshot::{Gpa, GpaRange, GuestMemory, MAX_MAP};
use sonicshot_libvmi::{Domain, LibVmi, LibVmiError, LibVmiGuest};
use sonicshot_testkit::check_memory;

/// Ranges that begin and end at odd pages.
const RANGES: [(u64, u64); 4] = [
    (0, 0x9f000),
    (0x10_0000, 0x30_3000),
    (0x30_4000, 0x30_5000),
    (0x4000_0000, 0x4060_0000),
];

fn total() -> u64 {
    RANGES.iter().map(|(start, end)| end - start).sum()
}

fn regions() -> Vec<GpaRange> {
    let region = |(start, end)| GpaRange::new(Gpa::new(start), Gpa::new(end));
    RANGES.into_iter().map(region).collect()
}

/// Reads the guest's content at `at`.
fn expected(all: &[u8], at: Gpa, buf: &mut [u8]) {
    let mut offset = 0;
    for (start, end) in RANGES {
        if (start..end).contains(&at.raw()) {
            let from = usize::try_from(offset + at.raw() - start).unwrap();
            buf.copy_from_slice(&all[from..from + buf.len()]);
            return;
        }
        offset += end - start;
    }
    panic!("{at} is no RAM");
}

#[test]
fn a_guest_of_xens_has_its_ranges_to_the_page_and_reads_as_it_is() {
    let all = bytes(total());
    let folder = tempfile::tempdir().unwrap();
    let mapless = LibVmi::open(without("vmi_mmap_guest_pa", folder.path())).unwrap();
    assert!(library().version().maps_pages && !mapless.version().maps_pages);
    // With the function, without it, and with one that fails, as for other drivers.
    for (library, fails) in [(library(), false), (mapless, false), (library(), true)] {
        let mut fake = Fake::with_memory(&all, &RANGES);
        if fails {
            fake = fake.say("no", "maps");
        }
        let guest = LibVmiGuest::open(&library, &fake.domain(), None).unwrap();
        assert_eq!(guest.layout().regions(), regions());
        let paused = guest.pause(None).unwrap();
        check_memory(&paused, &|at, buf| expected(&all, at, buf));
        let maps = paused
            .map(Gpa::new(0x4000_0003), 4 << 20)
            .unwrap()
            .is_some();
        assert_eq!(maps, library.version().maps_pages && !fails);
        assert!(paused.map(Gpa::ZERO, MAX_MAP + 1).is_err());
        paused.resume().unwrap();
    }
}

#[test]
fn a_file_has_no_holes_and_no_part_of_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("raw");
    let all = bytes(40 * PAGE + 77);
    std::fs::write(&path, &all).unwrap();
    let guest = LibVmiGuest::open(&library(), &Domain::File(path), None).unwrap();
    assert_eq!(guest.layout().bytes(), 40 * PAGE);
    let paused = guest.pause(None).unwrap();
    check_memory(&paused, &|at, buf| {
        let from = usize::try_from(at.raw()).unwrap();
        buf.copy_from_slice(&all[from..from + buf.len()]);
    });
}

#[test]
fn where_ram_lies_may_be_said() {
    let all = bytes(total());
    let fake = Fake::with_memory(&all, &RANGES).say("end", &format!("{:x}", 1_u64 << 41));
    // As far as pages are tried; one more is not.
    let error = fake.open().unwrap_err();
    assert!(matches!(error, LibVmiError::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains("--layout"), "{error}");
    let layout = sonicshot::RamLayout::new(vec![regions()[1]]).unwrap();
    let guest = LibVmiGuest::open(&library(), &fake.domain(), Some(layout.clone())).unwrap();
    let paused = guest.pause(None).unwrap();
    assert_eq!(paused.layout(), &layout);
    check_memory(&paused, &|at, buf| expected(&all, at, buf));
}

#[test]
fn many_processors_are_asked_and_more_than_there_can_be_are_not() {
    use sonicshot::{Processor, Processors};
    let all = bytes(total());
    let fake = |vcpus: &[&str]| {
        let fake = Fake::with_memory(&all, &RANGES);
        vcpus.iter().fold(fake, |fake, vcpu| fake.say("vcpu", vcpu))
    };
    let told = |vcpus: &[&str]| {
        fake(vcpus)
            .open()
            .unwrap()
            .pause(None)
            .unwrap()
            .processors()
    };
    let running = "ffffffff81000000,80050033,1000,6f0,d01";
    let Processors::Known(all) = told(&[running, "fff0,60000010,0,0,0"]) else {
        panic!("not known");
    };
    assert!(matches!(all[0], Processor::Started(registers) if registers.cr3 == 0x1000));
    assert_eq!(all[1], Processor::NotStarted);
    assert!(matches!(told(&[]), Processors::NotTold(_)));
    assert!(matches!(told(&[running, "none"]), Processors::NotTold(_)));
    let many: Vec<&str> = std::iter::repeat_n(running, 16_385).collect();
    assert!(matches!(told(&many), Processors::NotTold(_)));
    assert!(matches!(told(&many[1..]), Processors::Known(all) if all.len() == 16_384));
}
