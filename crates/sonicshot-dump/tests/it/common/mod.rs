//! Plans, patterns, and files for the tests of all formats.
#![allow(dead_code, reason = "not every test file needs all of it")]

pub mod qemu;
pub mod xen;

use sonicshot::{
    DropClasses, Fill, Gpa, GpaRange, GuestMemory, MemoryError, PageClass, PageMap, PageSize,
    PageState, Pfn, PfnRange, PrunePlan, RamLayout,
};
use sonicshot_dump::{
    CheckedPlan, Dump, DumpError, Overwrite, PruneOptions, PruneStats, WriteOptions,
};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const PAGE: u64 = 4096;

/// Bytes that differ from page to page, and are never zero.
pub fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((seed * 31 + at / PAGE * 7 + at % 251) % 255 + 1).unwrap())
        .collect()
}

/// Punches whatever a plan drops.
pub fn every_page() -> PruneOptions {
    PruneOptions::new().min_hole(0)
}

/// A plan that drops the frames `runs`, each `(first, count)`.
pub fn plan(layout: &RamLayout, runs: &[(u64, u64)]) -> PrunePlan {
    plan_with(layout, runs, PageClass::FreeBuddy, Fill::Zero)
}

pub fn plan_with(
    layout: &RamLayout,
    runs: &[(u64, u64)],
    page: impl Into<PageState> + Copy,
    fill: Fill,
) -> PrunePlan {
    let mut map = PageMap::new(layout, PageSize::SIZE_4K);
    for (first, count) in runs {
        map.set(PfnRange::with_len(Pfn::new(*first), *count).unwrap(), page);
    }
    PrunePlan::new(&map, &DropClasses::default(), fill)
}

/// Prunes by plans of pages that the tests chose, which no guest was looked at for.
pub trait Prunes {
    fn checked<'a>(&'a self, plan: &'a PrunePlan) -> CheckedPlan<'a>;

    fn prune_to(
        &self,
        plan: &PrunePlan,
        out: &Path,
        overwrite: Overwrite,
    ) -> Result<PruneStats, DumpError> {
        let options = PruneOptions::new().overwrite(overwrite);
        self.checked(plan).prune_to(out, &options)
    }

    fn prune_to_writer(&self, plan: &PrunePlan, out: impl Write) -> Result<PruneStats, DumpError> {
        self.checked(plan)
            .prune_to_writer(out, &PruneOptions::new())
    }

    fn prune_in_place(&self, plan: &PrunePlan) -> Result<PruneStats, DumpError> {
        self.prune_in_place_with(plan, &PruneOptions::new())
    }

    fn prune_in_place_with(
        &self,
        plan: &PrunePlan,
        options: &PruneOptions,
    ) -> Result<PruneStats, DumpError> {
        let began = Instant::now();
        loop {
            match self.checked(plan).prune_in_place(options) {
                // A process that another test has just started has what was open when it was made, until it
                // runs its program.
                Err(DumpError::InUse { writer: None, .. })
                    if began.elapsed() < Duration::from_secs(2) =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                pruned => return pruned,
            }
        }
    }
}

impl Prunes for Dump {
    fn checked<'a>(&'a self, plan: &'a PrunePlan) -> CheckedPlan<'a> {
        CheckedPlan::unchecked(self, plan)
    }
}

/// All RAM, region by region, as `read` gives it; zeroes for what is absent.
pub fn contents(memory: &dyn GuestMemory) -> Vec<(Gpa, Vec<u8>)> {
    let absent = absent(memory);
    let regions = memory.layout().regions().iter();
    regions
        .map(|region| {
            let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
            let mut at = region.start();
            let end = GpaRange::new(region.end(), region.end());
            let here = absent
                .iter()
                .filter(|absent| region.contains(absent.start()));
            for absent in here.chain([&end]) {
                let from = usize::try_from(at.offset_from(region.start()).unwrap()).unwrap();
                let len = usize::try_from(absent.start().offset_from(at).unwrap()).unwrap();
                memory.read(at, &mut bytes[from..from + len]).unwrap();
                at = absent.end();
            }
            (region.start(), bytes)
        })
        .collect()
}

/// The ranges that a memory says it does not have.
pub fn absent(memory: &dyn GuestMemory) -> Vec<GpaRange> {
    let mut found = Vec::new();
    for region in memory.layout().regions() {
        let mut at = region.start();
        while let Some(absent) = memory.next_absent(at).unwrap() {
            assert!(at <= absent.start() && !absent.is_empty() && absent.end() <= region.end());
            found.push(absent);
            at = absent.end();
        }
    }
    found
}

/// `before` with zeroes where `plan` drops.
pub fn pruned(before: &[(Gpa, Vec<u8>)], plan: &PrunePlan) -> Vec<(Gpa, Vec<u8>)> {
    let mut after = before.to_vec();
    for (start, bytes) in &mut after {
        let range = GpaRange::with_len(*start, bytes.len() as u64).unwrap();
        for run in plan.dropped_in(range) {
            let at = |gpa: Gpa| usize::try_from(gpa.offset_from(*start).unwrap()).unwrap();
            bytes[at(run.start())..at(run.end())].fill(0);
        }
    }
    after
}

/// Checks what every memory must do, whatever its format: `map`, `next_data` and reads of any length
/// agree with one plain read.
pub fn conforms(memory: &dyn GuestMemory) {
    let absent = absent(memory);
    let lacks = |at: Gpa, len: u64| {
        let range = GpaRange::with_len(at, len).unwrap();
        let mut both = absent.iter().map(|absent| absent.intersection(&range));
        both.any(|both| !both.is_empty())
    };
    for (start, bytes) in contents(memory) {
        let len = bytes.len() as u64;
        let slice = |from: u64, len: u64| {
            let from = usize::try_from(from).unwrap();
            &bytes[from..from + usize::try_from(len).unwrap()]
        };
        for (from, want) in [
            (0, len),
            (1, 7),
            (PAGE - 3, 6),
            (len - 9, 9),
            (len / 2, len / 3),
        ] {
            let at = start.checked_add(from).unwrap();
            if from + want > len {
                continue;
            }
            let want_bytes = slice(from, want);
            let size = usize::try_from(want).unwrap();
            let mut got = vec![0xee; size];
            if lacks(at, want) {
                let read = memory.read(at, &mut got);
                assert!(matches!(read, Err(MemoryError::Absent { .. })), "{read:?}");
                continue;
            }
            memory.read(at, &mut got).unwrap();
            assert!(got == want_bytes, "read {at} {want}");
            if let Some(mapped) = memory.map(at, size).unwrap() {
                got.fill(0xee);
                assert!(mapped.bytes().copy_to(&mut got));
                assert!(got == want_bytes, "map {at} {want}");
            }
        }
        // Everything that `next_data` passes over is zero, and it always moves on.
        let end = start.checked_add(len).unwrap();
        let mut at = start;
        while at < end {
            let data = memory.next_data(at);
            let next = data.map_or(end, |data| data.start());
            assert!(at <= next && next <= end);
            let from = at.offset_from(start).unwrap();
            let skipped = next.offset_from(at).unwrap();
            assert!(!lacks(at, skipped), "skipped what is absent at {at}");
            assert!(
                slice(from, skipped).iter().all(|byte| *byte == 0),
                "skipped data at {at}"
            );
            let Some(data) = data else { break };
            assert!(!data.is_empty() && data.end() <= end);
            at = data.end();
        }
        memory.release(GpaRange::new(start, end));
        let mut one = [0];
        if !lacks(start, 1) {
            memory.read(start, &mut one).unwrap();
            assert_eq!(one[0], bytes[0], "after a release");
        }
        // Outside of RAM.
        if memory.layout().region_of(end).is_none() {
            assert!(memory.read(end, &mut one).is_err());
            assert!(memory.map(end, 1).is_err());
            let last = end.raw().checked_sub(1).map(Gpa::new).unwrap();
            assert!(memory.read(last, &mut [0; 2]).is_err());
            assert!(memory.map(last, 2).is_err());
            assert!(memory.next_data(end).is_none());
        }
    }
    assert!(memory.read(Gpa::new(u64::MAX), &mut [0; 2]).is_err());
    assert!(memory.map(Gpa::new(u64::MAX), 2).is_err());
    assert!(memory.next_data(Gpa::new(u64::MAX)).is_none());
    reads_as_it_is(memory);
}

/// The suite that every guest memory passes.
fn reads_as_it_is(memory: &dyn GuestMemory) {
    let all = contents(memory);
    sonicshot_testkit::check_memory(memory, &|at, buf| {
        let inside = all.iter().rev().find(|(start, _)| *start <= at);
        let (start, bytes) = inside.unwrap();
        let from = usize::try_from(at.offset_from(*start).unwrap()).unwrap();
        buf.copy_from_slice(&bytes[from..from + buf.len()]);
    });
}

/// The names in a folder.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A file system without holes, mounted for as long as it lives.
pub struct Ramfs(TempDir);

impl Ramfs {
    /// Only root may mount.
    pub fn mount() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let mount = Command::new("mount")
            .args(["-t", "ramfs", "ramfs"])
            .arg(folder.path())
            .output();
        let mounted = mount.is_ok_and(|run| run.status.success());
        sonicshot_testkit::has("ramfs, or root to mount it", mounted).then(|| Self(folder))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// Of an output that exists, which is replaced.
pub fn replacing() -> WriteOptions {
    WriteOptions::new().overwrite(Overwrite::Replace)
}
