//! Killed at any system call of a run: the input or a whole output remains.

use super::inject::{Baseline, rounds, run, wanted};
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

/// Kills every job at `draws` of its calls, and before the first and the last call of each step;
/// of those, one of `share`.
/// Gives what went wrong, and how often each kind of call was the one that never came.
fn kill(jobs: &[Job], draws: u64, share: u64) -> (Vec<String>, BTreeMap<Kind, u64>) {
    let mut wrong = Vec::new();
    let mut hits: BTreeMap<Kind, u64> = BTreeMap::new();
    let mut draw = Draw::new(7);
    for job in jobs.iter().filter(|job| wanted(job)) {
        let baseline = Baseline::of(job);
        let calls = &baseline.run.calls;
        let mut points: BTreeSet<(Option<Kind>, u64)> = BTreeSet::new();
        for step in STEPS {
            if let Some(count) = calls.get(step) {
                points.extend([(Some(*step), 0), (Some(*step), count - 1)]);
            }
        }
        for _ in 0..draws {
            points.insert((None, draw.below(baseline.run.total)));
        }
        for (kind, number) in points {
            if draw.below(share) != 0 {
                continue;
            }
            let (run, now) = run(job, Some((At { kind, number }, Act::Kill)));
            let Some(hit) = run.hit else { continue };
            *hits.entry(hit).or_default() += 1;
            let mut note = |what: String| {
                wrong.push(format!(
                    "{}, killed before {hit} {number}: {what}",
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
    }
    (wrong, hits)
}

fn check(jobs: &[Job], draws: u64, share: u64, steps: &[Kind]) {
    let (wrong, hits) = kill(jobs, draws, share);
    for (kind, count) in &hits {
        println!("killed {count:5} times before {kind}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if share == 1 && std::env::var_os("SONICSHOT_FAULT_ONLY").is_none() {
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
    check(&small_jobs(), rounds().unwrap_or(1), 1, &steps);
}

#[test]
fn kills_with_a_kernel() {
    use Kind::{Clone, CopyRange, Folder, Link, Nameless, Punch, Rename, Sync, WriteAt};
    let steps = [
        Nameless, WriteAt, Punch, CopyRange, Clone, Sync, Folder, Link, Rename,
    ];
    match rounds() {
        Some(draws) => check(&guest_jobs(), draws, 1, &steps),
        None => check(&few_guest_jobs(), 1, 8, &steps),
    };
}
