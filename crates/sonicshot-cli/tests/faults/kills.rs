//! Killed at any system call of a run: the input or a whole output remains.

use super::inject::{Baseline, all_wanted, rounds, run, wanted};
use super::inputs::{Job, few_guest_jobs, guest_jobs, small_jobs};
use super::tracer::{Act, At, Kind};
use std::collections::{BTreeMap, BTreeSet};

/// Numbers that look random, and are the same in every run.
#[derive(Debug)]
pub struct Draw(u64);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `below`.
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below.max(1)
    }
}

/// Steps of a run that change something: each of them must have been the last.
const STEPS: &[Kind] = &[
    Kind::Nameless,
    Kind::Create,
    Kind::Write,
    Kind::WriteAt,
    Kind::Truncate,
    Kind::Punch,
    Kind::CopyRange,
    Kind::Clone,
    Kind::Sync,
    Kind::Owner,
    Kind::Mode,
    Kind::Folder,
    Kind::Link,
    Kind::Rename,
];

/// A call of a job that is the one that never comes.
type Point = (usize, At);

/// Of every job the first and the last call of each step, and `draws` of all of its calls.
fn points(jobs: &[Job], draws: u64, draw: &mut Draw) -> BTreeMap<Option<Kind>, Vec<Point>> {
    let mut points: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (job, run) in jobs.iter().map(|job| Baseline::of(job).run).enumerate() {
        let (counts, total) = (run.counts(), run.calls.len() as u64);
        let steps = STEPS
            .iter()
            .filter_map(|step| Some((*step, counts.get(step)?)));
        for (step, count) in steps {
            let of_step = points.entry(Some(step)).or_default();
            of_step.extend([0, count - 1].map(|number| (job, run.at(Some(step), number, false))));
        }
        let drawn = (0..draws).map(|_| (job, run.at(None, draw.below(total), false)));
        points.entry(None).or_default().extend(drawn);
    }
    let of_kind = |(kind, points): (_, BTreeSet<_>)| (kind, points.into_iter().collect());
    points.into_iter().map(of_kind).collect()
}

/// Kills the jobs at all of these points, or at so many of each step that are drawn.
/// Gives what went wrong, and how often each kind of call was the one that never came.
fn kill(jobs: &[Job], draws: u64, each: Option<u64>) -> (Vec<String>, BTreeMap<Kind, u64>) {
    let mut draw = Draw::new(7);
    let mut chosen: BTreeMap<usize, Vec<At>> = BTreeMap::new();
    for (_, mut points) in points(jobs, draws, &mut draw) {
        for _ in 0..each.unwrap_or(u64::MAX) {
            if points.is_empty() {
                break;
            }
            let number = draw.below(points.len() as u64);
            let (job, at) = points.swap_remove(usize::try_from(number).unwrap());
            chosen.entry(job).or_default().push(at);
        }
    }
    let mut wrong = Vec::new();
    let mut hits: BTreeMap<Kind, u64> = BTreeMap::new();
    for (number, chosen) in chosen {
        let job = &jobs[number];
        let baseline = Baseline::of(job);
        let (before, tries) = (wrong.len(), chosen.len());
        for at in chosen {
            let (run, now) = run(job, Some((at, Act::Kill)));
            let Some(hit) = run.hit else { continue };
            *hits.entry(hit).or_default() += 1;
            let mut note = |what: String| {
                wrong.push(format!(
                    "{}, killed at {at:?}, before {hit}: {what}",
                    job.name
                ));
            };
            if run.signal != Some(libc::SIGKILL) {
                note(format!("{:?}, {:?}", run.code, run.signal));
            }
            for what in baseline.half(&now) {
                note(what);
            }
            // Without a name it goes with the process. What has to have one while it is written,
            // or while it takes another's place, stays: see SECURITY.md.
            let may_stay = job.names_only || job.name.starts_with("replace") || job.writes_folder();
            if !may_stay {
                for name in Baseline::left(&now) {
                    note(format!("{name} stays"));
                }
            }
        }
        let found = wrong.len() - before;
        println!("kills: {}: {tries} tries, wrong {found}", job.name);
    }
    (wrong, hits)
}

fn check(jobs: Vec<Job>, draws: u64, each: Option<u64>, steps: &[Kind]) {
    let jobs = wanted(jobs);
    let (wrong, hits) = kill(&jobs, draws, each);
    for (kind, count) in &hits {
        println!("killed {count:5} times before {kind}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if all_wanted() {
        for step in steps {
            assert!(hits.contains_key(step), "never killed before {step}");
        }
    }
}

#[test]
fn kills_without_a_kernel() {
    use Kind::{Create, Link, Mode, Nameless, Owner, Rename, Sync, Truncate, Write, WriteAt};
    let steps = [
        Nameless, Create, Write, WriteAt, Truncate, Sync, Owner, Mode, Link, Rename,
    ];
    match rounds() {
        Some(draws) => check(small_jobs(), draws, None, &steps),
        None => check(small_jobs(), 1, Some(8), &steps),
    }
}

#[test]
fn kills_with_a_kernel() {
    use Kind::{Clone, CopyRange, Folder, Link, Nameless, Punch, Rename, Sync, WriteAt};
    let steps = [
        Nameless, WriteAt, Punch, CopyRange, Clone, Sync, Folder, Link, Rename,
    ];
    match rounds() {
        Some(draws) => check(guest_jobs(), draws, None, &steps),
        None => check(few_guest_jobs(), 1, Some(1), &steps),
    }
}
