//! A library's user is refused what the command's user is.

use crate::common::{PAGE, analyze, diff, open, ram, raw};
use sonicshot::{ClassSet, Gpa, GpaRange, GuestMemory, PageClass};
use sonicshot_dump::DumpError;
use sonicshot_offline::{
    AnalyzeOptions, LayoutSpec, Note, OfflineError, OpenOptions, PruneOptions, Snapshot, Target,
    WriteOptions,
};
use sonicshot_vmi::{OnInconsistency, VmiError};
use std::collections::HashSet;
use std::fs;
use tempfile::TempDir;

/// Whether it is a page of `struct page`s of free frames, none of them the first of a block: the
/// lists do not lead through it.
fn is_record(page: &[u8]) -> bool {
    page.chunks(64).all(|record| {
        record[48..56] == [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
            && record[..8] == page[..8]
            && record[6..8] != [0, 0]
    })
}

#[test]
fn a_diff_without_its_base_is_no_whole_guest() {
    let temporary = TempDir::new().unwrap();
    let number = ram().chunks(PAGE).position(is_record).unwrap();
    let path = diff(temporary.path(), |page, _| page == number);
    match analyze(&path) {
        Err(OfflineError::NotWhole { path: of, at }) => {
            assert_eq!(of, path);
            assert_eq!(at.raw(), (number * PAGE) as u64);
        }
        other => panic!("{other:?}"),
    }
    let base = raw(temporary.path());
    let over = Snapshot::open(&path, &OpenOptions::new().base(base)).unwrap();
    over.analyze(&AnalyzeOptions::new()).unwrap();
    // Who takes a guest that contradicts itself is told nothing of it.
    let all = AnalyzeOptions::new().on_inconsistency(OnInconsistency::KeepInQuestion);
    open(&path).analyze(&all).unwrap();
}

#[test]
fn a_diff_with_little_in_it_has_no_kernel() {
    let temporary = TempDir::new().unwrap();
    let path = diff(temporary.path(), |page, _| page % 64 != 0);
    let found = analyze(&path);
    assert!(
        matches!(
            found,
            Err(OfflineError::Guest {
                source: VmiError::NoKernel { .. }
                    | VmiError::NoTables { .. }
                    | VmiError::BannerAlone { .. },
                ..
            })
        ),
        "{found:?}"
    );
}

#[test]
fn what_the_kernel_needs_is_never_dropped() {
    let temporary = TempDir::new().unwrap();
    let guest = analyze(&raw(temporary.path())).unwrap();
    let plan = guest.plan(
        [PageClass::FreeBuddy, PageClass::Slab]
            .into_iter()
            .collect(),
    );
    assert!(
        matches!(
            plan,
            Err(OfflineError::Undroppable {
                class: PageClass::Slab
            })
        ),
        "{plan:?}"
    );
}

#[test]
fn a_layout_that_the_memory_contradicts_is_refused() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    // Two ranges with kernel objects in them have changed places.
    let layout = "0-32M,48M-56M,40M-48M,32M-40M,56M-128M";
    let layout: LayoutSpec = layout.parse().unwrap();
    let found = Snapshot::open(&path, &OpenOptions::new().layout(layout)).unwrap();
    let found = found.analyze(&AnalyzeOptions::new());
    assert!(
        matches!(found, Err(OfflineError::Misplaced { .. })),
        "{found:?}"
    );
}

#[test]
fn a_layout_in_more_ranges_than_a_bound_is_not_checked() {
    const MOST: usize = 4096;
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    // A page each, and the rest.
    let at = |page: usize| Gpa::new((page * PAGE) as u64);
    for count in [MOST, MOST + 1] {
        let mut ranges: Vec<_> = (0..count - 1)
            .map(|page| GpaRange::new(at(page), at(page + 1)))
            .collect();
        ranges.push(GpaRange::new(at(count - 1), at(ram().len() / PAGE)));
        let options = OpenOptions::new().layout(LayoutSpec::Ranges(ranges));
        let found = Snapshot::open(&path, &options).unwrap();
        let found = found.analyze(&AnalyzeOptions::new());
        let refused = matches!(found, Err(OfflineError::ManyRanges { count, .. }) if count > MOST);
        assert_eq!(refused, count > MOST, "{count}: {found:?}");
    }
}

#[test]
fn a_file_that_is_written_is_not_pruned_in_place() {
    let temporary = TempDir::new().unwrap();
    let path = raw(temporary.path());
    let guest = analyze(&path).unwrap();
    let plan = guest.plan(ClassSet::DEFAULT_DROP).unwrap();
    let _writer = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let pruned = plan.prune_in_place(&PruneOptions::new());
    assert!(
        matches!(
            pruned,
            Err(OfflineError::Dump(
                DumpError::InUse { .. } | DumpError::MayBeInUse { .. }
            ))
        ),
        "{pruned:?}"
    );
    assert!(fs::read(&path).unwrap() == ram());
}

#[test]
fn a_snapshot_whose_vmm_reads_no_zeroes_is_not_pruned_by_anybody() {
    let temporary = TempDir::new().unwrap();
    let folder = temporary.path().join("vm");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("memory-ranges"), ram()).unwrap();
    let ranges = format!(
        r#"{{"memory_ranges":{{"data":[{{"gpa":0,"length":{}}}]}}}}"#,
        ram().len()
    );
    let state = format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshots":{{}},"snapshot_data":{{"state":{ranges:?}}}}}}}}}"#
    );
    fs::write(folder.join("state.json"), state).unwrap();
    // A zone that is a private mapping of a file.
    let config = r#"{"memory":{"zones":[{"id":"a","size":1,"file":"/tmp/ram"}]}}"#;
    fs::write(folder.join("config.json"), config).unwrap();
    let snapshot = open(&folder);
    let refused = snapshot.check_prunable();
    assert!(
        matches!(
            refused,
            Err(OfflineError::Dump(DumpError::CannotPrune { .. }))
        ),
        "{refused:?}"
    );
    let guest = snapshot.analyze(&AnalyzeOptions::new()).unwrap();
    let plan = guest.plan(ClassSet::DEFAULT_DROP).unwrap();
    let out = temporary.path().join("out");
    for pruned in [
        plan.prune_to(&out, &PruneOptions::new()),
        plan.prune_in_place(&PruneOptions::new()),
        plan.prune_to_writer(Vec::new(), &PruneOptions::new()),
    ] {
        assert!(
            matches!(
                pruned,
                Err(OfflineError::Dump(DumpError::CannotPrune { .. }))
            ),
            "{pruned:?}"
        );
    }
    assert!(!out.exists());
    assert!(fs::read(folder.join("memory-ranges")).unwrap() == ram());
}

#[test]
fn what_cannot_become_another_format_is_refused() {
    let temporary = TempDir::new().unwrap();
    let snapshot = open(&raw(temporary.path()));
    let out = temporary.path().join("out");
    let image = snapshot.convert(&Target::Xl(None), &out, &WriteOptions::new());
    assert!(matches!(image, Err(OfflineError::NoTemplate)), "{image:?}");
    let stream = snapshot.convert(&Target::Stream, &out, &WriteOptions::new());
    assert!(
        matches!(
            stream,
            Err(OfflineError::Dump(DumpError::CannotConvert { .. }))
        ),
        "{stream:?}"
    );
    assert!(!out.exists());
}

/// Firecracker's, without dirty tracking, has all pages that were touched: the kernel's records
/// too.
#[test]
fn zeroes_of_what_may_be_a_diff_are_kept() {
    let temporary = TempDir::new().unwrap();
    let whole = analyze(&raw(temporary.path())).unwrap();
    let pages: Vec<_> = whole
        .pages()
        .states()
        .flat_map(|(frames, page)| frames.iter().map(move |pfn| (pfn.raw(), page)))
        .collect();
    let of_processes = |page: PageClass| {
        matches!(
            page,
            PageClass::Anonymous | PageClass::PageCacheClean | PageClass::PageCacheDirty
        )
    };
    let untouched: HashSet<usize> = pages
        .iter()
        .filter(|(pfn, page)| of_processes(page.class()) && pfn % 2 == 1)
        .map(|(pfn, _)| usize::try_from(*pfn).unwrap())
        .collect();
    assert!(untouched.len() > 500);
    let path = diff(temporary.path(), |page, _| untouched.contains(&page));
    let guest = analyze(&path).unwrap();
    assert!(guest.notes().contains(&Note::MayBeDiff));
    let plan = guest.plan(ClassSet::DEFAULT_DROP).unwrap();
    assert!(
        plan.dropped_by_name()
            .iter()
            .all(|(name, n)| *name != "zero" || *n == 0)
    );
    let mut options = PruneOptions::new();
    options.min_hole = Some(0);
    plan.prune_in_place(&options).unwrap();
    // Over a base that has something else everywhere, the guest has what it had.
    let left = analyze(&path).unwrap();
    for (pfn, page) in &pages {
        let was_there = !untouched.contains(&usize::try_from(*pfn).unwrap());
        if page.is_zero() && was_there {
            let at = Gpa::new(pfn * PAGE as u64);
            let data = left.dump().next_data(at).map(|data| data.start());
            assert_eq!(data, Some(at), "{pfn}: {page:?}");
        }
    }
    // If it has no zeroes of its own below the last such hole, free memory tells that no prune made
    // that.
    let mut numbers: Vec<usize> = untouched.iter().copied().collect();
    numbers.sort_unstable();
    let last = numbers[numbers.len() / 2];
    let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let is_hole =
        |page: usize, content: &[u8]| page <= last && (untouched.contains(&page) || zero(content));
    let free: HashSet<usize> = pages
        .iter()
        .filter(|(_, page)| matches!(page.class(), PageClass::FreeBuddy | PageClass::FreePcp))
        .map(|(pfn, _)| usize::try_from(*pfn).unwrap())
        .collect();
    let above = (last + 1..ram().len() / PAGE)
        .filter(|page| !free.contains(page) && zero(&ram()[page * PAGE..(page + 1) * PAGE]));
    assert!(above.count() > 0, "no zeroes above {last}");
    let upper = diff(temporary.path(), is_hole);
    let guest = analyze(&upper).unwrap();
    assert!(guest.notes().contains(&Note::MayBeDiff));
    // As a prune leaves it that was interrupted there.
    let pruned = diff(temporary.path(), |page, content| {
        is_hole(page, content) || page <= last && free.contains(&page)
    });
    let guest = analyze(&pruned).unwrap();
    assert!(!guest.notes().contains(&Note::MayBeDiff));
    // A file of whose zeroes all are holes is what a prune or a copy makes.
    let sparse = diff(temporary.path(), |_, page| {
        page.iter().all(|byte| *byte == 0)
    });
    let guest = analyze(&sparse).unwrap();
    assert!(!guest.notes().contains(&Note::MayBeDiff));
}
