//! Files that are cut off or written to while they are read: an error that says so, or what the
//! file held; no signal, and no mixture.

use super::inject::{rounds, wanted};
use super::inputs::{Content, Job, content, few_guest_jobs, guest_jobs, scratch, small_jobs};
use super::kills::Draw;
use super::tracer::{Act, At, Run};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What happens to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    CutToHalf,
    CutToNothing,
    CutAndGrown,
    Rewritten,
}

const CHANGES: [Change; 4] = [
    Change::CutToHalf,
    Change::CutToNothing,
    Change::CutAndGrown,
    Change::Rewritten,
];

impl Change {
    fn make(self, path: &Path) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let len = file.metadata().unwrap().len();
        match self {
            Self::CutToHalf => file.set_len(len / 2).unwrap(),
            Self::CutToNothing => file.set_len(0).unwrap(),
            Self::CutAndGrown => {
                file.set_len(len / 2).unwrap();
                file.set_len(len).unwrap();
            }
            Self::Rewritten => rewrite(&file, len),
        }
    }
}

/// Other bytes of the same length behind the beginning, which tells the format.
fn rewrite(file: &File, len: u64) {
    let mut at = 4096.min(len / 2);
    let other = vec![0xa5; 1 << 20];
    while at < len {
        let now = (len - at).min(other.len() as u64);
        file.write_all_at(&other[..usize::try_from(now).unwrap()], at)
            .unwrap();
        at += now;
    }
}

/// What standard output says but for the time it took.
fn said(run: &Run) -> String {
    let text = String::from_utf8_lossy(&run.stdout);
    let lines = text.lines().filter(|line| !line.contains(" s"));
    lines.collect::<Vec<_>>().join("\n")
}

#[derive(Debug, Default)]
struct Tally {
    tries: u64,
    signals: u64,
    wrong: u64,
    told: u64,
    other: u64,
    unmoved: u64,
    examples: BTreeMap<String, u64>,
}

impl Tally {
    /// Counts a run that left `now`; it would have left and said `want` without the change.
    fn judge(&mut self, run: &Run, now: &Content, (want, expected): (&Content, &str)) {
        let mut note = |what: String| *self.examples.entry(what).or_default() += 1;
        match (run.code, run.signal) {
            (_, Some(signal)) => {
                note(format!("signal {signal}"));
                self.signals += 1;
            }
            (Some(0), _) if now == want && said(run) == expected => self.unmoved += 1,
            (Some(0), _) => {
                note(format!("exit 0 with another output: {}", run.stderr.trim()));
                self.wrong += 1;
            }
            (Some(101), _) => {
                note(format!("panics: {}", run.stderr.trim()));
                self.wrong += 1;
            }
            _ if !now.is_empty() && now != want => {
                note("leaves what is half".into());
                self.wrong += 1;
            }
            _ if ["was written to", "bytes when it was opened"]
                .iter()
                .any(|words| run.stderr.contains(words)) =>
            {
                self.told += 1;
            }
            (code, _) => {
                note(format!(
                    "exit {code:?}: {}",
                    run.stderr.trim().replace('\n', " / ")
                ));
                self.other += 1;
            }
        }
    }
}

/// The commands that read one file.
fn jobs(all: bool) -> Vec<Job> {
    let of_guests = if all { guest_jobs() } else { few_guest_jobs() };
    let all = small_jobs().into_iter().chain(of_guests);
    all.filter(|job| job.changed().is_some() && wanted(job))
        .collect()
}

/// `tries` of each change to each job, or of one of `share` of them: at a call of the run, drawn
/// from all.
fn tally(jobs: &[Job], tries: u64, share: u64) -> BTreeMap<(Change, String), Tally> {
    let mut out: BTreeMap<(Change, String), Tally> = BTreeMap::new();
    let mut draw = Draw::new(11);
    for job in jobs {
        let changes = CHANGES.into_iter().filter(|_| draw.below(share) == 0);
        let changes: Vec<_> = changes.collect();
        if changes.is_empty() {
            continue;
        }
        let name = job.changed().unwrap();
        let (want, calls, expected) = {
            let work = scratch();
            let spec = job.spec_of_copy(work.path());
            let run = spec.traced(None);
            assert_eq!(run.code, Some(0), "{}: {}", job.name, run.stderr);
            let mut content = content(work.path());
            content.retain(|path, _| !path.starts_with(name));
            (content, run.total, said(&run))
        };
        for change in changes {
            // What was changed before it was opened is another file.
            let of_changed = {
                let work = scratch();
                let spec = job.spec_of_copy(work.path());
                change.make(&job.changed_file(work.path()));
                let run = spec.run();
                let mut content = content(work.path());
                content.retain(|path, _| !path.starts_with(name));
                (run.code, content, said(&run))
            };
            for _ in 0..tries {
                let work = scratch();
                let spec = job.spec_of_copy(work.path());
                let file = job.changed_file(work.path());
                let made = Cell::new(false);
                let make = || {
                    change.make(&file);
                    made.set(true);
                };
                let at = At {
                    kind: None,
                    number: draw.below(calls),
                };
                let run = spec.traced(Some((at, Act::Do(&make))));
                if !made.get() {
                    continue;
                }
                let tally = out.entry((change, job.name.clone())).or_default();
                tally.tries += 1;
                let mut now = content(work.path());
                now.retain(|path, _| !path.starts_with(name));
                if run.signal.is_none() && of_changed == (run.code, now.clone(), said(&run)) {
                    tally.unmoved += 1;
                    continue;
                }
                tally.judge(&run, &now, (&want, &expected));
            }
        }
    }
    out
}

#[test]
fn files_that_change_while_they_are_read() {
    let found = match rounds() {
        Some(tries) => tally(&jobs(true), tries, 1),
        None => tally(&jobs(false), 2, 10),
    };
    let mut text = String::new();
    let mut sum = Tally::default();
    for ((change, job), tally) in &found {
        sum.tries += tally.tries;
        sum.signals += tally.signals;
        sum.wrong += tally.wrong;
        sum.told += tally.told;
        sum.other += tally.other;
        sum.unmoved += tally.unmoved;
        writeln!(
            text,
            "{change:?} {job}: {} tries: signals {}, wrong {}, told {}, another error {}, as if nothing {}",
            tally.tries, tally.signals, tally.wrong, tally.told, tally.other, tally.unmoved
        )
        .unwrap();
        for (what, count) in &tally.examples {
            writeln!(text, "    {count} x {what}").unwrap();
        }
    }
    println!(
        "{text}{} tries: signals {}, wrong {}, told {}, another error {}, as if nothing {}",
        sum.tries, sum.signals, sum.wrong, sum.told, sum.other, sum.unmoved
    );
    assert_eq!((sum.signals, sum.wrong), (0, 0));
}
