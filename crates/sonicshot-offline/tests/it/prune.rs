//! A snapshot pruned every way.

use crate::common::{PAGE, analyze, open, ram, raw};
use sonicshot::{ClassSet, GuestMemory, PageClass, Pfn};
use sonicshot_dump::DumpError;
use sonicshot_offline::{
    AnalyzeOptions, LayoutSpec, Note, OfflineError, OpenOptions, PruneOptions, Snapshot,
};
use std::fs;
use tempfile::TempDir;

#[test]
fn a_copy_and_the_file_itself_lose_the_same_pages_and_no_other() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    let guest = analyze(&path).unwrap();
    assert!(guest.facts().release.starts_with("6.1."));
    let plan = guest.plan(ClassSet::DEFAULT_DROP).unwrap();
    let out = temporary.path().join("out");
    let stats = plan.prune_to(&out, &PruneOptions::new()).unwrap();
    assert_eq!(stats.dropped_bytes, plan.dropped_bytes());
    let copy = fs::read(&out).unwrap();
    let pages = (0..).zip(copy.chunks(PAGE).zip(ram().chunks(PAGE)));
    let mut dropped = 0;
    for (pfn, (after, before)) in pages {
        let page = guest.pages().state(Pfn::new(pfn)).unwrap();
        let goes = ClassSet::DEFAULT_DROP.takes(page);
        dropped += u64::from(goes);
        assert!(
            if goes {
                after.iter().all(|byte| *byte == 0)
            } else {
                after == before
            },
            "{pfn}: {page:?}"
        );
    }
    assert_eq!(dropped, plan.dropped_pages());
    assert!(dropped > 10_000);
    let mut options = PruneOptions::new();
    options.min_hole = Some(0);
    plan.prune_in_place(&options).unwrap();
    assert!(fs::read(&path).unwrap() == copy);
    // What is left tells the same of every page.
    let again = analyze(&out).unwrap();
    assert_eq!(again.counts(), guest.counts());
}

#[test]
fn what_comes_through_a_pipe_is_analysed_as_a_file_is() {
    let temporary = TempDir::new().unwrap();
    let of_file = analyze(&raw(temporary.path())).unwrap();
    let piped = Snapshot::from_reader("a pipe", ram(), &OpenOptions::new()).unwrap();
    let of_pipe = piped.analyze(&AnalyzeOptions::new()).unwrap();
    assert_eq!(of_pipe.counts(), of_file.counts());
    assert_eq!(of_pipe.dump().layout(), of_file.dump().layout());
    // There is no file to punch.
    let plan = of_pipe.plan(ClassSet::DEFAULT_DROP).unwrap();
    let in_place = plan.prune_in_place(&PruneOptions::new());
    assert!(
        matches!(
            in_place,
            Err(OfflineError::Dump(DumpError::NotInPlace { .. }))
        ),
        "{in_place:?}"
    );
}

#[test]
fn without_a_look_at_pages_in_use_none_is_zero_and_the_rest_is_the_same() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    let with = analyze(&path).unwrap();
    let without = AnalyzeOptions::new().zero_pages(false);
    let without = open(&path).analyze(&without).unwrap();
    assert_eq!(without.counts().total_zero(), 0);
    assert!(with.counts().total_zero() > 0);
    for class in [PageClass::FreeBuddy, PageClass::FreePcp, PageClass::Offline] {
        assert_eq!(without.counts().get(class), with.counts().get(class));
    }
}

#[test]
fn memory_whose_place_nothing_shows_is_kept_with_a_note() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    // Processes and free pages, nothing of the kernel's, in each other's place.
    let layout: LayoutSpec = "0-48M,56M-64M,48M-56M,64M-128M".parse().unwrap();
    let snapshot = Snapshot::open(&path, &OpenOptions::new().layout(layout)).unwrap();
    let guest = snapshot.analyze(&AnalyzeOptions::new()).unwrap();
    let unconfirmed = guest.notes().iter().filter_map(|note| match note {
        Note::Unconfirmed { range } => Some(*range),
        _ => None,
    });
    let mut kept = 0;
    for range in unconfirmed {
        for pfn in range.whole_frames(guest.pages().page_size()).iter() {
            let class = guest.pages().class(pfn).unwrap();
            let stays = !class.may_be_dropped();
            assert!(stays, "{pfn:?}: {class}");
            kept += 1;
        }
    }
    assert_eq!(kept, 2 * (8 << 20) / 4096);
    assert!(guest.counts().get(PageClass::FreeBuddy) > 0);
}

#[test]
fn somebody_who_writes_the_file_is_told_of() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    let _writer = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let guest = analyze(&path).unwrap();
    let told = |note: &Note| matches!(note, Note::InUse { path: of, .. } if *of == path);
    assert!(guest.notes().iter().any(told), "{:?}", guest.notes());
}
