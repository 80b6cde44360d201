//! The reasons to refuse a plan, and the pages that it keeps, on a real guest's dump.

use crate::common::*;
use sonicshot::{ClassSet, GpaRange, GuestMemory, PageClass, PageSize};
use sonicshot_dump::{CheckedPlan, Doubts, Dump, DumpError, LayoutSpec, PruneOptions, check_whole};
use sonicshot_vmi::{Analysis, AnalysisOptions, analyze};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The demo's guest of 128 MiB, in a folder of its own.
struct Guest {
    folder: TempDir,
    ram: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        let packed =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m/ram.raw.zst");
        let ram = zstd::decode_all(File::open(packed).unwrap()).unwrap();
        let folder = TempDir::new().unwrap();
        Self { folder, ram }
    }

    /// A file of its memory, with a hole where it is zero.
    fn file(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(self.ram.len() as u64).unwrap();
        for (number, page) in (0_u64..).zip(self.ram.chunks(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, number * PAGE).unwrap();
            }
        }
        path
    }
}

fn look(dump: &Dump) -> Analysis {
    analyze(dump, &AnalysisOptions::new()).unwrap()
}

fn plan<'d>(
    dump: &'d Dump,
    guest: &Analysis,
    doubts: &Doubts,
) -> Result<CheckedPlan<'d>, DumpError> {
    CheckedPlan::new(dump, guest, doubts, ClassSet::DEFAULT_DROP)
}

fn open(path: &Path) -> Dump {
    Dump::open(path, Some(&LayoutSpec::Pc)).unwrap()
}

#[test]
fn a_plan_prunes_what_was_found() {
    let guest = Guest::new();
    let dump = open(&guest.file("ram"));
    let found = look(&dump);
    let plan = plan(&dump, &found, &Doubts::none()).unwrap();
    let out = guest.folder.path().join("out");
    let stats = plan.prune_to(&out, &PruneOptions::new()).unwrap();
    assert_eq!(stats.dropped_bytes, plan.goes().dropped_bytes());
    assert!(stats.dropped_bytes > 50 << 20, "{stats:?}");
    let again = look(&open(&out));
    assert_eq!(again.counts(), found.counts());
}

#[test]
fn a_class_that_is_in_use_is_never_planned() {
    let guest = Guest::new();
    let dump = open(&guest.file("ram"));
    let found = look(&dump);
    let classes: ClassSet = [PageClass::FreeBuddy, PageClass::Kernel]
        .into_iter()
        .collect();
    let refused = CheckedPlan::new(&dump, &found, &Doubts::none(), classes);
    assert!(
        matches!(
            refused,
            Err(DumpError::Undroppable {
                class: PageClass::Kernel
            })
        ),
        "{refused:?}"
    );
}

#[test]
fn a_diff_without_its_base_is_refused() {
    let guest = Guest::new();
    let whole = open(&guest.file("ram"));
    let found = look(&whole);
    check_whole(&whole, &found).unwrap();
    // The same guest, but a page of its records is a hole.
    let path = guest.file("diff");
    let record = found.present()[0].whole_frames(PageSize::SIZE_4K).start();
    let at = record.gpa(PageSize::SIZE_4K).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, at.raw(), PAGE).unwrap();
    drop(file);
    let diff = open(&path);
    let refused = plan(&diff, &found, &Doubts::none()).map(|_| ());
    assert!(
        matches!(refused, Err(DumpError::NotWhole { at: there, .. }) if there == at),
        "{refused:?}"
    );
    let asked_for = Doubts::none().partial(true);
    plan(&diff, &found, &asked_for).unwrap();
}

#[test]
fn what_is_known_of_another_guest_is_no_plan() {
    let guest = Guest::new();
    let dump = open(&guest.file("ram"));
    let found = look(&dump);
    let other = guest.folder.path().join("other");
    fs::write(&other, vec![1; 1 << 20]).unwrap();
    let refused = plan(&open(&other), &found, &Doubts::none()).map(|_| ());
    assert!(
        matches!(refused, Err(DumpError::OtherGuest { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_snapshot_whose_vmm_reads_something_else_in_holes_is_refused() {
    let guest = Guest::new();
    let path = guest.file("memory-ranges");
    let dump = open(&path);
    let found = look(&dump);
    plan(&dump, &found, &Doubts::none()).unwrap();
    fs::write(path.with_file_name("state.json"), "{}").unwrap();
    for (config, is_refused) in [
        (
            r#"{"memory":{"zones":[{"file":"/dev/shm/a","shared":true}]}}"#,
            false,
        ),
        (r#"{"memory":{"zones":[{"file":"/dev/shm/a"}]}}"#, true),
    ] {
        fs::write(path.with_file_name("config.json"), config).unwrap();
        let planned = plan(&dump, &found, &Doubts::none()).map(|_| ());
        assert_eq!(
            matches!(planned, Err(DumpError::CannotPrune { .. })),
            is_refused,
            "{config}: {planned:?}"
        );
        assert_eq!(planned.is_err(), is_refused, "{config}");
    }
}

#[test]
fn what_is_in_doubt_stays() {
    let guest = Guest::new();
    let dump = open(&guest.file("ram"));
    let found = look(&dump);
    let sure = plan(&dump, &found, &Doubts::none()).unwrap();
    let zero = |range: &GpaRange| {
        let mut bytes = vec![0; usize::try_from(range.len()).unwrap()];
        dump.read(range.start(), &mut bytes).unwrap();
        bytes.iter().all(|byte| *byte == 0)
    };
    let at = |mib: u64| sonicshot::Gpa::new(mib << 20);
    let range = GpaRange::new(at(32), at(64));
    let in_range = |plan: &CheckedPlan<'_>| -> u64 {
        let parts = plan.goes().dropped_in(range);
        parts.map(|part| part.len()).sum()
    };
    assert!(in_range(&sure) > 1 << 20);
    let unconfirmed = Doubts::none().unconfirmed(vec![range]);
    let kept = plan(&dump, &found, &unconfirmed).unwrap();
    // What was found to be zero is so wherever it lies.
    for part in kept.goes().dropped_in(range) {
        assert!(zero(&part), "{part}");
    }
    assert!(in_range(&kept) < in_range(&sure));
    // Outside nothing changes.
    let rest = GpaRange::new(at(64), at(128));
    let sum = |plan: &CheckedPlan<'_>| -> u64 {
        plan.goes().dropped_in(rest).map(|part| part.len()).sum()
    };
    assert_eq!(sum(&kept), sum(&sure));

    let shared = Doubts::none().shared(vec![vec![range, GpaRange::new(at(64), at(96))]]);
    let kept = plan(&dump, &found, &shared).unwrap();
    for part in kept.goes().dropped_in(range) {
        let there = part.start().checked_add(32 << 20).unwrap();
        let there = GpaRange::with_len(there, part.len()).unwrap();
        let both: u64 = sure.goes().dropped_in(there).map(|part| part.len()).sum();
        assert!(both == part.len() || zero(&part), "{part}");
    }
    assert!(in_range(&kept) < in_range(&sure));
}

#[test]
fn memory_of_which_nothing_shows_where_it_lies_is_refused() {
    let guest = Guest::new();
    let path = guest.file("ram");
    let lying = |ranges: &str| {
        let dump = Dump::open(&path, Some(&ranges.parse().unwrap())).unwrap();
        let found = look(&dump);
        plan(&dump, &found, &Doubts::none()).map(|_| ())
    };
    // In pieces, each where it is by the guest's own map.
    lying("0-64M,64M-128M").unwrap();
    // One of them where that map has nothing.
    let refused = lying("0-72M,4G-4104M,80M-128M").unwrap_err();
    let (end, boot) = match &refused {
        DumpError::LayoutNotShown { end, boot_end, .. } => (end.raw(), boot_end.unwrap().raw()),
        other => panic!("{other}"),
    };
    assert_eq!(end, 4104 << 20);
    assert!(boot <= 128 << 20 && boot > 127 << 20, "{boot:#x}");
}
