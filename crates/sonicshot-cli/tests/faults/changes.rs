//! Files that are cut off or written to while they are read: an error that says so, or what the
//! file held; no signal, and no mixture.

use super::inject::{all_wanted, rounds, wanted};
use super::inputs::{
    Content, Job, content, few_guest_jobs, guest_jobs, looking_jobs, scratch, small_jobs,
};
use super::kills::Draw;
use super::tracer::{Act, At, Run};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A change of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    CutToHalf,
    CutToNothing,
    CutAndGrown,
    Rewritten,
}

/// Each, and its part of the tries: a file is cut as often as it is rewritten.
const CHANGES: [(Change, u64); 4] = [
    (Change::CutToHalf, 3),
    (Change::CutToNothing, 3),
    (Change::CutAndGrown, 3),
    (Change::Rewritten, 1),
];

impl Change {
    /// Gives whether it came to that: who asks whether somebody writes the file holds it off for
    /// that moment.
    fn make(self, path: &Path) -> bool {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let opened = options.custom_flags(libc::O_NONBLOCK).open(path);
        let file = match opened {
            Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => return false,
            opened => opened.unwrap(),
        };
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
        true
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

/// Standard output without the time it took, where the files were, and what the input takes of the disk
/// by now.
fn said(run: &Run, folders: [&Path; 2]) -> String {
    let mut text = String::from_utf8_lossy(&run.stdout).into_owned();
    for folder in folders {
        text = text.replace(folder.to_str().unwrap(), "");
    }
    let lines = text.lines();
    let lines = lines.filter(|line| !line.contains(" s") && !line.starts_with("on disk"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The outcome for a run: what it left, said, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    code: Option<i32>,
    content: Content,
    said: String,
}

/// A job to which nothing happens.
#[derive(Debug)]
struct Plain {
    /// The content of the work's folder before anything runs.
    before: Content,
    end: End,
    traced: Run,
    /// The time that it takes without a tracer.
    took: Duration,
}

impl Plain {
    fn of(job: &Job) -> Self {
        let (copies, work) = (scratch(), scratch());
        let spec = job.spec_of_copy(copies.path(), work.path());
        let before = content(work.path());
        let traced = spec.traced(None);
        assert_eq!(traced.code, Some(0), "{}: {}", job.name, traced.stderr);
        let end = End {
            code: traced.code,
            content: content(work.path()),
            said: said(&traced, [copies.path(), work.path()]),
        };
        let (copies, work) = (scratch(), scratch());
        Self {
            before,
            end,
            traced,
            took: job.spec_of_copy(copies.path(), work.path()).run().took,
        }
    }
}

/// A file of a job, and the change to it.
#[derive(Debug)]
struct Case<'a> {
    job: &'a Job,
    plain: &'a Plain,
    change: Change,
    /// Whether it is what is pruned in place.
    in_place: bool,
    path: &'a Path,
}

impl Case<'_> {
    /// The outcome of the file if it is changed before it is opened: that is another file.
    fn of_changed(&self) -> End {
        let (_, end) = self.run(|run, make| {
            assert!(make());
            run(None)
        });
        end
    }

    /// Runs the job in new folders. `how` gets what runs it, at a call something else, and what
    /// makes the change.
    fn run(
        &self,
        how: impl FnOnce(&dyn Fn(Option<(At, Act<'_>)>) -> Run, &(dyn Fn() -> bool + Sync)) -> Run,
    ) -> (Run, End) {
        let (copies, work) = (scratch(), scratch());
        let spec = self.job.spec_of_copy(copies.path(), work.path());
        let folder = if self.in_place { &work } else { &copies };
        let file: PathBuf = folder.path().join(self.path);
        let run = how(
            &|act| match act {
                Some(act) => spec.traced(Some(act)),
                None => spec.run(),
            },
            &|| self.change.make(&file),
        );
        let end = End {
            code: run.code,
            content: content(work.path()),
            said: said(&run, [copies.path(), work.path()]),
        };
        (run, end)
    }

    /// Changes the file at a call of the run, or at any time of it, both drawn from all; `None` if
    /// it did not come to that.
    fn change(&self, draw: &mut Draw, at_call: bool) -> Option<(Run, End)> {
        let made = Cell::new(false);
        let out = if at_call {
            let traced = &self.plain.traced;
            let at = traced.at(None, draw.below(traced.calls.len() as u64), false);
            self.run(|run, make| run(Some((at, Act::Do(&|| made.set(make()))))))
        } else {
            let micros = u64::try_from(self.plain.took.as_micros()).unwrap();
            let wait = Duration::from_micros(draw.below(micros));
            self.run(|run, make| {
                std::thread::scope(|scope| {
                    let changing = scope.spawn(move || {
                        std::thread::sleep(wait);
                        make()
                    });
                    let run = run(None);
                    made.set(changing.join().unwrap());
                    run
                })
            })
        };
        made.get().then_some(out)
    }

    /// The trouble with a file that was pruned in place and changed meanwhile: each page is as it
    /// was, as it is to be, or as the other made it.
    fn mixture(&self, now: &Content) -> Option<String> {
        const PAGE: usize = 4096;
        let path = self.path;
        let (before, after) = (&self.plain.before[path], &self.plain.end.content[path]);
        let changed = |bytes: &[u8]| {
            let folder = scratch();
            let path = folder.path().join("file");
            fs::write(&path, bytes).unwrap();
            assert!(self.change.make(&path));
            fs::read(&path).unwrap()
        };
        let changed = [changed(before), changed(after)];
        let all = [before, after, &changed[0], &changed[1]].map(Vec::as_slice);
        let now = &now[path];
        if !all.iter().any(|one| one.len() == now.len()) {
            return Some(format!("{} bytes", now.len()));
        }
        let pages = now.chunks(PAGE).enumerate();
        let is_right = |(number, page): (usize, &[u8])| {
            all.iter()
                .any(|one| one.get(number * PAGE..number * PAGE + page.len()) == Some(page))
        };
        let wrong = pages.clone().find(|page| !is_right(*page))?;
        Some(format!("page {} is nobody's", wrong.0))
    }

    /// Whether nothing is half in what a run has left that failed: of several outputs each is there
    /// or not, of one all.
    fn is_whole(&self, now: &Content) -> bool {
        let (before, after) = (&self.plain.before, &self.plain.end.content);
        let is_either = |(path, bytes): (&PathBuf, &Vec<u8>)| {
            before.get(path) == Some(bytes) || after.get(path) == Some(bytes)
        };
        now == before || now == after || self.job.has_several() && now.iter().all(is_either)
    }

    /// Whether each page of the other files of the work's folder is as it was, or as it is to be:
    /// what tells of the memory may be changed once it was read.
    fn others_stay(&self, now: &Content) -> bool {
        const PAGE: usize = 4096;
        let (before, after) = (&self.plain.before, &self.plain.end.content);
        let stays = |(path, bytes): (&PathBuf, &Vec<u8>)| {
            let (Some(old), Some(new)) = (before.get(path), after.get(path)) else {
                return false;
            };
            let pages = bytes
                .chunks(PAGE)
                .zip(old.chunks(PAGE).zip(new.chunks(PAGE)));
            bytes.len() == old.len()
                && bytes.len() == new.len()
                && pages
                    .into_iter()
                    .all(|(now, (old, new))| now == old || now == new)
        };
        let others = now.iter().filter(|(path, _)| *path != self.path);
        now.len() == before.len() && others.into_iter().all(stays)
    }
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
    fn add(&mut self, other: &Self) {
        self.tries += other.tries;
        self.signals += other.signals;
        self.wrong += other.wrong;
        self.told += other.told;
        self.other += other.other;
        self.unmoved += other.unmoved;
    }

    fn judge(&mut self, case: &Case<'_>, of_changed: &End, run: &Run, end: &End) {
        let plain = &case.plain.end;
        self.tries += 1;
        let mut note = |what: String| *self.examples.entry(what).or_default() += 1;
        if let Some(signal) = run.signal {
            note(format!("signal {signal}"));
            self.signals += 1;
            return;
        }
        // Before the first look at it, or after the last.
        let as_if = end == of_changed || end == plain;
        let done = end.code == Some(0);
        let wrong = if as_if {
            None
        } else if run.code == Some(101) {
            Some(format!("panics: {}", run.stderr.trim()))
        } else if case.in_place {
            let others = case.others_stay(&end.content);
            let other = || "another file is not as it was".to_owned();
            case.mixture(&end.content).or((!others).then(other))
        } else if done {
            let other = |(path, bytes): (&PathBuf, &Vec<u8>)| {
                (plain.content.get(path) != Some(bytes)).then(|| path.display().to_string())
            };
            let others: Vec<_> = end.content.iter().filter_map(other).collect();
            Some(format!(
                "exit 0 with another output: {others:?}; said {:?}, expected {:?}",
                end.said, plain.said
            ))
        } else if !case.is_whole(&end.content) {
            Some("leaves what is half".into())
        } else {
            None
        };
        if let Some(what) = wrong {
            note(what);
            self.wrong += 1;
        } else if as_if || done {
            self.unmoved += 1;
        } else if ["was written to", "bytes when it was opened"]
            .iter()
            .any(|words| run.stderr.contains(words))
        {
            self.told += 1;
        } else {
            note(format!(
                "exit {:?}: {}",
                run.code,
                run.stderr.trim().replace('\n', " / ")
            ));
            self.other += 1;
        }
    }

    fn text(&self) -> String {
        format!(
            "{} tries: signals {}, wrong {}, told {}, another error {}, as if nothing {}",
            self.tries, self.signals, self.wrong, self.told, self.other, self.unmoved
        )
    }
}

/// `tries` of each change to each file of each job, or of one of `share` of them.
fn tally(jobs: Vec<Job>, tries: u64, share: u64) -> Tally {
    let mut sum = Tally::default();
    let mut draw = Draw::new(11);
    for job in &wanted(jobs) {
        let files = job.changed_files();
        let cases = files
            .iter()
            .flat_map(|file| CHANGES.map(|change| (file, change)));
        let cases: Vec<_> = cases.filter(|_| draw.below(share) == 0).collect();
        if cases.is_empty() {
            continue;
        }
        let plain = Plain::of(job);
        for ((in_place, path), (change, part)) in cases {
            let case = Case {
                job,
                plain: &plain,
                change,
                in_place: *in_place,
                path,
            };
            let of_changed = case.of_changed();
            let mut tally = Tally::default();
            for number in 0..tries.div_ceil(part) {
                if let Some((run, end)) = case.change(&mut draw, number % 2 == 0) {
                    tally.judge(&case, &of_changed, &run, &end);
                }
            }
            // At once: all of it may take an hour.
            println!(
                "{change:?} of {}: {}: {}",
                path.display(),
                job.name,
                tally.text()
            );
            for (what, count) in &tally.examples {
                println!("    {count} x {what}");
            }
            sum.add(&tally);
        }
    }
    sum
}

fn check(jobs: Vec<Job>, tries: u64, share: u64) {
    let sum = tally(jobs, tries, share);
    println!("{}", sum.text());
    assert!(sum.tries > 0 || !all_wanted());
    assert_eq!((sum.signals, sum.wrong), (0, 0));
}

#[test]
fn files_that_change_while_they_are_read() {
    match rounds() {
        Some(tries) => check(small_jobs(), tries, 1),
        None => check(small_jobs(), 2, 20),
    }
}

#[test]
fn guests_that_change_while_they_are_looked_into() {
    match rounds() {
        Some(tries) => {
            let mut jobs = guest_jobs();
            jobs.extend(looking_jobs());
            check(jobs, tries, 1);
        }
        None => check(few_guest_jobs(), 2, 16),
    }
}
