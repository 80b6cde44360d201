//! An error, or a short count, at each kind of system call of every command and format.

use super::inputs::{Content, Job, content, few_guest_jobs, guest_jobs, scratch, small_jobs};
use super::kills::Draw;
use super::tracer::{Act, At, Kind, Run, Spec};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// The fault of a call: its name, the error number; none for a short count.
type Fault = (&'static str, Option<i32>, bool);

const NOSPC: Fault = ("ENOSPC", Some(libc::ENOSPC), false);
const FULL: Fault = ("ENOSPC from there on", Some(libc::ENOSPC), true);
const IO: Fault = ("EIO", Some(libc::EIO), false);
const INTR: Fault = ("EINTR", Some(libc::EINTR), false);
const SHORT: Fault = ("short", None, false);
const NOTSUP: Fault = ("EOPNOTSUPP", Some(libc::EOPNOTSUPP), false);
const MFILE: Fault = ("EMFILE", Some(libc::EMFILE), false);
const NOMEM: Fault = ("ENOMEM", Some(libc::ENOMEM), false);
const PERM: Fault = ("EPERM", Some(libc::EPERM), false);

/// The errors that a call of this kind may give.
fn faults(kind: Kind) -> &'static [Fault] {
    match kind {
        Kind::Open => &[IO, MFILE, INTR],
        Kind::Nameless => &[NOTSUP, NOSPC, IO],
        Kind::Read | Kind::ReadAt => &[IO, INTR, SHORT],
        Kind::Write | Kind::WriteAt => &[NOSPC, FULL, IO, INTR, SHORT],
        Kind::Say => &[NOSPC, IO, INTR, SHORT],
        Kind::Create | Kind::Complain | Kind::Truncate | Kind::Sync => &[NOSPC, IO, INTR],
        Kind::Seek | Kind::Stat | Kind::List | Kind::Unlink => &[IO],
        Kind::Map => &[NOMEM],
        Kind::CopyRange => &[NOSPC, FULL, IO, INTR, SHORT, NOTSUP],
        Kind::Clone | Kind::Punch => &[NOSPC, IO, INTR, NOTSUP],
        Kind::Owner | Kind::Mode => &[PERM, IO],
        Kind::Folder | Kind::Link | Kind::Rename => &[NOSPC, IO, PERM],
        Kind::Lease => &[IO, INTR],
        Kind::Other => &[],
    }
}

/// A run without a fault.
pub struct Baseline {
    pub before: Content,
    pub after: Content,
    pub run: Run,
}

/// Runs a job in a fresh folder.
pub fn run(job: &Job, act: Option<(At, Act<'_>)>) -> (Run, Content) {
    let work = scratch();
    let run = job.spec(work.path()).traced(act);
    let content = content(work.path());
    (run, content)
}

impl Baseline {
    pub fn of(job: &Job) -> Self {
        let work = scratch();
        let spec = job.spec(work.path());
        let before = content(work.path());
        let run = spec.traced(None);
        assert_eq!(run.code, Some(0), "{}: {}", job.name, run.stderr);
        let after = content(work.path());
        Self { before, after, run }
    }

    /// The files of a folder that are half done: neither as it was, nor as it is to be.
    pub fn half(&self, now: &Content) -> Vec<String> {
        let mut found = Vec::new();
        let is_temporary = |path: &Path| {
            path.iter()
                .any(|part| part.to_string_lossy().starts_with(".sonicshot-"))
        };
        for (path, bytes) in now.iter().filter(|(path, _)| !is_temporary(path)) {
            let (before, after) = (self.before.get(path), self.after.get(path));
            if before == Some(bytes) || after == Some(bytes) {
                continue;
            }
            if after.is_some_and(|after| same_memory(after, bytes)) {
                continue;
            }
            match (before, after) {
                // In place: page by page.
                (Some(before), Some(after)) if self.in_place(path) => {
                    if let Err(what) = half_punched(before, after, bytes) {
                        found.push(format!("{}: {what}", path.display()));
                    }
                }
                _ => found.push(format!("{} is half", path.display())),
            }
        }
        // What is replaced may be gone once the other is there.
        let lost = |path: &&PathBuf| !now.contains_key(*path) && self.after.contains_key(*path);
        for path in self.before.keys().filter(lost) {
            found.push(format!("{} is gone", path.display()));
        }
        // A folder is whole or not there at all.
        let whole = |want: &Content| {
            let names = |content: &Content| -> BTreeSet<_> {
                content
                    .keys()
                    .filter(|path| path.starts_with("out") && !is_temporary(path))
                    .cloned()
                    .collect()
            };
            names(want) == names(now)
        };
        if !whole(&self.before) && !whole(&self.after) {
            found.push("the folder is half".into());
        }
        found
    }

    fn in_place(&self, path: &Path) -> bool {
        path.starts_with("in")
    }

    /// The files that have stayed and were not to.
    pub fn left(now: &Content) -> BTreeSet<String> {
        let names = now.keys().flat_map(|path| path.iter());
        names
            .map(|name| name.to_string_lossy().into_owned())
            .filter(|name| name.starts_with(".sonicshot-"))
            .collect()
    }

    pub fn is_done(&self, now: &Content) -> bool {
        self.after.iter().all(|(path, bytes)| {
            now.get(path)
                .is_some_and(|now| now == bytes || same_memory(now, bytes))
        })
    }
}

/// Whether two files are checkpoints of the same memory: one in which two pages were not found to
/// be the same is as good.
fn same_memory(a: &[u8], b: &[u8]) -> bool {
    let is_checkpoint = |bytes: &[u8]| bytes.starts_with(b"\x89SONIC");
    if !is_checkpoint(a) || !is_checkpoint(b) {
        return false;
    }
    let folder = scratch();
    let restored = |bytes: &[u8]| {
        let at = |name: &str| folder.path().join(name);
        fs::write(at("x"), bytes).unwrap();
        let line = ["restore", "x", "-o", "raw", "--force"];
        let spec = Spec {
            args: line.iter().map(OsString::from).collect(),
            folder: folder.path().into(),
            ..Spec::default()
        };
        let verified = Spec {
            args: ["verify", "x"].iter().map(OsString::from).collect(),
            ..spec.clone()
        };
        let sound = spec.run().code == Some(0) && verified.run().code == Some(0);
        sound.then(|| fs::read(at("raw")).unwrap())
    };
    let a = restored(a);
    a.is_some() && a == restored(b)
}

/// Whether a file that is pruned in place is sound: marks of pages go before the pages do.
fn half_punched(before: &[u8], after: &[u8], now: &[u8]) -> Result<(), String> {
    const PAGE: usize = 4096;
    /// The offset of a mapped-ram file's pages.
    const PAGES_AT: usize = 1 << 20;
    if now.len() != before.len() {
        return Err(format!("{} bytes, not {}", now.len(), before.len()));
    }
    let has_marks = before.starts_with(b"QEVM");
    let mut punched = false;
    for (number, page) in now.chunks(PAGE).enumerate() {
        let range = number * PAGE..number * PAGE + page.len();
        let (old, new) = (&before[range.clone()], &after[range.clone()]);
        punched |= range.start >= PAGES_AT && page != old;
        if page == old || page == new {
            continue;
        }
        // Marks may be written in part.
        let mixed = page
            .iter()
            .zip(old.iter().zip(new))
            .all(|(now, (old, new))| now == old || now == new);
        if !(has_marks && range.start < PAGES_AT && mixed) {
            return Err(format!(
                "page {number} is neither as it was nor as it is to be"
            ));
        }
    }
    if has_marks && punched && now[..PAGES_AT] != after[..PAGES_AT] {
        return Err("a page is gone before its mark".into());
    }
    Ok(())
}

/// The trouble with how the command took a fault.
fn judge(baseline: &Baseline, fault: Fault, run: &Run, now: &Content, kind: Kind) -> Vec<String> {
    let mut wrong = baseline.half(now);
    if let Some(signal) = run.signal {
        wrong.push(format!("ended by signal {signal}"));
    }
    if run.code == Some(101) {
        wrong.push("panics".into());
    }
    if run.stderr.contains("uncategorized") {
        wrong.push("says \"uncategorized error\"".into());
    }
    for name in Baseline::left(now) {
        if !run.stderr.contains(&name) {
            wrong.push("leaves a temporary that it does not name".into());
        }
    }
    let done = baseline.is_done(now);
    // Nothing is lost by a call that is begun again, nor by what only people read.
    let harmless = fault.1.is_none() || fault.1 == Some(libc::EINTR) || kind == Kind::Complain;
    match run.code {
        Some(0) if !done => wrong.push("exit 0 without the whole output".into()),
        Some(0)
            if run.stdout.len() != baseline.run.stdout.len()
                && kind != Kind::Say
                && baseline.after.is_empty()
                && !same_memory(&run.stdout, &baseline.run.stdout) =>
        {
            wrong.push("exit 0 without all of standard output".into());
        }
        Some(0) | None => {}
        Some(code) if harmless => wrong.push(format!("exit {code}")),
        Some(code) => {
            // Whether somebody writes the file cannot be told: nothing is changed.
            let untold = kind == Kind::Lease && code == 6;
            if code != 1 && !untold {
                wrong.push(format!("exit {code}"));
            }
            if !run.stderr.contains("error: ") || !run.stderr.contains("because: ") {
                wrong.push("no message with a cause".into());
            }
            if done
                && kind != Kind::Say
                && baseline.before != baseline.after
                && !["completely", "valid dump", "no byte of it"]
                    .iter()
                    .any(|words| run.stderr.contains(words))
            {
                wrong.push("the output is there, and the message does not say so".into());
            }
        }
    }
    wrong
}

/// The number of points of each kind that are tried, if it is given.
pub fn rounds() -> Option<u64> {
    std::env::var("SONICSHOT_FAULT_ROUNDS").ok()?.parse().ok()
}

/// The jobs that are to be done.
pub fn wanted(jobs: Vec<Job>) -> Vec<Job> {
    let only = std::env::var("SONICSHOT_FAULT_ONLY").ok();
    let share = std::env::var("SONICSHOT_FAULT_SHARE").ok().map(|share| {
        let (number, of) = share.split_once('/').unwrap();
        [number, of].map(|part| part.parse::<usize>().unwrap())
    });
    let jobs = jobs.into_iter().enumerate();
    let jobs = jobs.filter(|(at, job)| {
        let named = only.as_ref().is_none_or(|only| job.name.contains(only));
        named && share.is_none_or(|[number, of]| at % of == number)
    });
    jobs.map(|(_, job)| job).collect()
}

/// Whether all of them are.
pub fn all_wanted() -> bool {
    let is_set = |name| std::env::var_os(name).is_some();
    !is_set("SONICSHOT_FAULT_ONLY") && !is_set("SONICSHOT_FAULT_SHARE")
}

/// `points` numbers below `count`: the last, the first, and between.
fn spread(count: u64, points: u64) -> Vec<u64> {
    let last = count.saturating_sub(1);
    let points = points.min(count);
    match points {
        0 => Vec::new(),
        1 => vec![last],
        _ => {
            let numbers = (0..points).map(|point| last * point / (points - 1));
            numbers.collect::<BTreeSet<_>>().into_iter().collect()
        }
    }
}

#[derive(Debug)]
struct Report {
    draw: Draw,
    runs: u64,
    hits: BTreeMap<(Kind, &'static str), u64>,
    /// The trouble: the fault and what is said of it, with the jobs.
    wrong: BTreeMap<(Kind, &'static str, String), BTreeMap<String, String>>,
}

impl Report {
    /// Every fault of each kind of call at `points` of them; of those, one of `share`.
    fn job(&mut self, job: &Job, points: u64, share: u64) {
        let baseline = Baseline::of(job);
        let (runs, wrong) = (self.runs, self.wrong());
        let mut signals = 0;
        for (kind, count) in &baseline.run.counts() {
            for fault in faults(*kind) {
                for number in spread(*count, points) {
                    if self.draw.below(share) != 0 {
                        continue;
                    }
                    let act = match fault {
                        (_, Some(errno), true) => Act::FailFromHere(*errno),
                        (_, Some(errno), false) => Act::Fail(*errno),
                        (_, None, _) => Act::Short,
                    };
                    let at = baseline.run.at(Some(*kind), number, fault.2);
                    let (run, now) = run(job, Some((at, act)));
                    self.runs += 1;
                    signals += u64::from(run.signal.is_some());
                    if run.hit.is_some() {
                        *self.hits.entry((*kind, fault.0)).or_default() += 1;
                    }
                    for what in judge(&baseline, *fault, &run, &now, *kind) {
                        let jobs = self.wrong.entry((*kind, fault.0, what)).or_default();
                        let example = format!(
                            "call {number} of {count}: {}",
                            run.stderr.trim().replace('\n', " / ")
                        );
                        jobs.entry(job.name.clone()).or_insert(example);
                    }
                }
            }
        }
        println!(
            "errors: {}: {} runs, signals {signals}, wrong {}",
            job.name,
            self.runs - runs,
            self.wrong() - wrong
        );
    }

    fn wrong(&self) -> usize {
        self.wrong.values().map(BTreeMap::len).sum()
    }

    fn text(&self) -> String {
        let mut out = format!("{} runs\n", self.runs);
        for ((kind, fault), count) in &self.hits {
            writeln!(out, "hit {count:5} {kind} {fault}").unwrap();
        }
        for ((kind, fault, what), jobs) in &self.wrong {
            writeln!(out, "WRONG {kind} {fault}: {what}: {} jobs", jobs.len()).unwrap();
            for (job, example) in jobs {
                writeln!(out, "    {job}: {example}").unwrap();
            }
        }
        out
    }
}

fn check(jobs: Vec<Job>, points: u64, share: u64) {
    let mut report = Report {
        draw: Draw::new(3),
        runs: 0,
        hits: BTreeMap::new(),
        wrong: BTreeMap::new(),
    };
    for job in wanted(jobs) {
        report.job(&job, points, share);
    }
    println!("{}", report.text());
    assert!(report.wrong.is_empty(), "{}", report.text());
}

#[test]
fn errors_without_a_kernel() {
    match rounds() {
        Some(points) => check(small_jobs(), points, 1),
        None => check(small_jobs(), 2, 12),
    }
}

#[test]
fn errors_with_a_kernel() {
    match rounds() {
        Some(points) => check(guest_jobs(), points, 1),
        None => check(few_guest_jobs(), 1, 12),
    }
}
