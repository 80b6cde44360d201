//! Lies of a real guest's kernel, in one record each: none may drop a frame in use.
#![allow(missing_docs)]

use sonicshot::PageClass;
use sonicshot_fuzz::mutate::anatomy::Kind;
use sonicshot_fuzz::mutate::capture::Capture;
use sonicshot_fuzz::mutate::command::{print, small_capture};
use sonicshot_fuzz::mutate::{Report, Settings, Subject, run};
use sonicshot_vmi::Knowledge;
use std::sync::OnceLock;

fn subject() -> &'static Subject<'static> {
    static SUBJECT: OnceLock<Subject<'static>> = OnceLock::new();
    SUBJECT.get_or_init(|| {
        let capture = Box::leak(Box::new(Capture::load(&small_capture()).unwrap()));
        Subject::new(capture).unwrap()
    })
}

fn tried(settings: &Settings) -> Report {
    let report = run(subject(), settings);
    print(subject(), &report);
    report
}

fn none_is_lost(report: &Report) {
    let total = report.total();
    assert_eq!((total.wrong, total.panicked), (0, 0));
    assert_eq!(report.lies.panicked, 0);
}

/// More by `SONICSHOT_MUTATE_ROUNDS`, others by `SONICSHOT_MUTATE_SEED`.
#[test]
fn a_lie_in_one_record_drops_nothing_in_use() {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let rounds = number("SONICSHOT_MUTATE_ROUNDS").unwrap_or(400);
    let report = tried(&Settings {
        rounds,
        seed: number("SONICSHOT_MUTATE_SEED").unwrap_or(1),
        ..Settings::default()
    });
    none_is_lost(&report);
    let total = report.total();
    // Some choices change nothing and are none.
    assert!(total.tried + report.lies.tried > rounds / 2);
    // They get as far as what is tested: lists are walked to their ends, struct pages are looked
    // at, and what is wrong is found there.
    let classified = total.kept_more + total.unmoved;
    assert!(classified > total.tried / 2, "{classified}");
    assert!(report.zones >= classified, "{}", report.zones);
    for kind in Kind::ALL {
        let counts = report.single.get(&kind).copied().unwrap_or_default();
        assert!(counts.tried > 0, "{kind}");
    }
    let of = |kind: Kind| report.single[&kind];
    assert!(of(Kind::StructPage).kept_more > 0);
    assert!(of(Kind::FreeList).refused > 0);
    assert!(of(Kind::PerCpuList).kept_more + of(Kind::PerCpuList).refused > 0);
    assert!(of(Kind::Zone).refused > 0);
    assert!(of(Kind::MemSection).refused > 0);
    assert!(of(Kind::Vmcoreinfo).not_opened > 0);
}

/// The same lies to what finds the kernel's records without types, by VMCOREINFO and by shape.
/// More by `SONICSHOT_MUTATE_ROUNDS`.
#[test]
fn a_lie_to_a_guest_without_types_drops_nothing_in_use() {
    let rounds = std::env::var("SONICSHOT_MUTATE_ROUNDS").ok();
    let rounds = rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(60);
    for knowledge in [Knowledge::Vmcoreinfo, Knowledge::Shape] {
        let subject = Subject::new(subject().capture).unwrap();
        let subject = subject.knowing(knowledge).unwrap();
        let settings = Settings {
            rounds,
            ..Settings::default()
        };
        let report = run(&subject, &settings);
        print(&subject, &report);
        none_is_lost(&report);
        let total = report.total();
        let classified = total.kept_more + total.unmoved;
        assert!(classified > total.tried / 3, "{knowledge}: {classified}");
        assert!(total.refused + total.not_opened > 0, "{knowledge}");
    }
}

/// The bit that says that a section is online, and every other of the word.
#[test]
fn no_bit_of_a_section_drops_its_frames() {
    let report = tried(&Settings {
        all: true,
        kinds: vec![Kind::MemSection],
        named: "section_mem_map".into(),
        ..Settings::default()
    });
    none_is_lost(&report);
    assert!(report.total().tried > 60);
}

/// A truth in which a free block is in use: each classification that drops it is found.
#[test]
fn a_drop_of_what_is_in_use_is_seen() {
    let mut subject = Subject::new(subject().capture).unwrap();
    let (block, _) = subject
        .truth
        .runs()
        .find(|(_, class)| *class == PageClass::FreeBuddy)
        .unwrap();
    subject.truth.set(block, PageClass::Anonymous);
    let settings = Settings {
        rounds: 60,
        ..Settings::default()
    };
    let total = run(&subject, &settings).total();
    assert!(total.wrong > 20, "{}", total.wrong);
}

#[test]
fn the_truth_has_free_pages_of_every_source() {
    let counts = subject().truth.counts();
    assert!(counts.get(PageClass::FreeBuddy) > 10_000);
    assert!(counts.get(PageClass::FreePcp) > 0);
    assert!(counts.get(PageClass::Anonymous) > 1000);
    assert_eq!(subject().anatomy.pages.len(), 1 << 15);
}
