//! Lies of a guest's kernel: real captures in which one record is changed, or several that agree
//! with each other, and every drop that the changed memory gives held against the truth.
//!
//! The truth is what the same capture gives unchanged, and `/proc/kpageflags` of the moment before.
//! A frame that a changed memory would drop and the truth has in use is a wrong drop. Pages that
//! hold only zeroes are not in question: they are told by their content and come back as they were.

pub mod anatomy;
pub mod capture;
pub mod command;
pub mod plan;

use anatomy::{Anatomy, Kind, Walker};
use capture::{Capture, Change, KPF_BUDDY, KPF_IN_USE, KPF_OFFLINE, Overlay};
use plan::{Mutation, Plan, Rng};
use sonicshot::{PageClass, PageMap, PageSize, Pfn};
use sonicshot_vmi::symbols::Vmcoreinfo;
use sonicshot_vmi::x86_64::Cr3;
use sonicshot_vmi::{
    Classification, GuestOptions, Knowledge, LinuxGuest, OnInconsistency, VmiError,
};
use std::collections::BTreeMap;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// One capture, where its records are, and what is true of it.
pub struct Subject<'c> {
    pub capture: &'c Capture,
    pub anatomy: Anatomy,
    pub truth: PageMap,
    /// The processor's `CR3` is known: traces of a later owner, for which all memory is searched,
    /// are then not looked for, and cannot be what refuses a lie.
    pub options: GuestOptions,
    /// Blocks on which the unchanged guest's own sources disagree.
    pub explained: u64,
    /// The most that the changed guest is taken to tell of itself; truth is what all of it tells.
    pub knowledge: Knowledge,
}

/// A frame that would have been lost.
#[derive(Debug, Clone, Copy)]
pub struct Lost {
    pub pfn: Pfn,
    /// Its kind.
    pub truth: PageClass,
    /// The class that it was taken for.
    pub taken_for: PageClass,
}

/// The result of one mutation.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// No kernel was found, or none that is whole.
    NotOpened(String),
    /// The kernel was opened, and its pages were not believed.
    Refused(String),
    /// Pages were classified: how many more are kept than of the unchanged guest.
    Classified {
        kept_more: u64,
        zones: usize,
    },
    /// Frames in use would have been dropped.
    Wrong {
        lost: Vec<Lost>,
        frames: u64,
    },
    Panicked,
}

fn is_dropped(class: PageClass) -> bool {
    // What the default policy drops, but for zero pages.
    matches!(
        class,
        PageClass::FreeBuddy | PageClass::FreePcp | PageClass::Offline
    )
}

impl<'c> Subject<'c> {
    /// Looks at the unchanged guest, and holds it against its own kernel's word.
    pub fn new(capture: &'c Capture) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let overlay = Overlay::new(capture);
        let raw = LinuxGuest::open(&overlay, &GuestOptions::new())?;
        let info = Vmcoreinfo::parse(raw.vmcoreinfo().unwrap_or_default().as_bytes())?;
        let root = Walker::new(&overlay, &info)?.root();
        let options = GuestOptions::new().cr3(Cr3::new(root));
        let guest = LinuxGuest::open(&overlay, &options)?;
        let pages = guest.classify(OnInconsistency::Refuse)?;
        // A balloon takes pages after the kernel's word, and page cache goes for it: the word is
        // then no more of this instant.
        let balloon = pages.map.counts().get(PageClass::Offline) > 0;
        let is_free = |class| is_dropped(class) && !balloon;
        for (frames, class) in pages.map.runs().filter(|(_, class)| is_free(*class)) {
            // Pages may have been freed between the kernel's word and the stop: a few.
            let used = frames.iter().filter(|pfn| {
                let flags = capture.flags(*pfn);
                flags & KPF_IN_USE != 0 && flags & (KPF_BUDDY | KPF_OFFLINE) == 0
            });
            let used = used.count() as u64;
            if used > 64 {
                return Err(format!("{frames} is {class}, of which {used} are in use").into());
            }
        }
        let anatomy = Anatomy::new(capture, &options)?;
        Ok(Self {
            capture,
            anatomy,
            truth: pages.map,
            options,
            explained: pages.disagreement.map_or(0, |found| found.blocks),
            knowledge: Knowledge::Types,
        })
    }

    /// The same guest, of which no more than this is taken: what types tell of it stays the truth.
    pub fn knowing(mut self, knowledge: Knowledge) -> Result<Self, Box<dyn Error + Send + Sync>> {
        self.knowledge = knowledge;
        self.options = self.options.at_most(knowledge);
        let overlay = Overlay::new(self.capture);
        let guest = LinuxGuest::open(&overlay, &self.options)?;
        if guest.knowledge() != knowledge {
            return Err(format!("the guest is known by {}", guest.knowledge()).into());
        }
        match self.judge(&guest.classify(OnInconsistency::Refuse)?) {
            Outcome::Classified { kept_more, .. } if kept_more < 1000 => Ok(self),
            outcome => Err(format!("the unchanged guest: {outcome:?}").into()),
        }
    }

    /// Whether the guest must be opened again for these changes. Where the kernel is searched by
    /// shape opening reads all there is, but of it takes no more than which page tables are the
    /// kernel's: it is opened again for some of the changes elsewhere.
    fn must_open(&self, changes: &[Change]) -> bool {
        const ONE_IN: u64 = 8;
        let is_read = |change: &Change| self.anatomy.is_read_by_open(change.at, change.bytes.len());
        let is_one = |change: &Change| (change.at.raw() >> 3).is_multiple_of(ONE_IN);
        changes.iter().any(is_read)
            || self.knowledge != Knowledge::Types && changes.iter().any(is_one)
    }

    /// Holds what a changed memory gives against the truth.
    fn judge(&self, pages: &Classification) -> Outcome {
        let (mut lost, mut frames, mut dropped) = (Vec::new(), 0, 0);
        let size = pages.map.page_size().bytes();
        for (run, class) in pages.map.runs().filter(|(_, class)| is_dropped(*class)) {
            let of = |pfn: Pfn| pfn.raw() * size / PageSize::SIZE_4K.bytes();
            for number in of(run.start())..of(run.end()) {
                let pfn = Pfn::new(number);
                let truth = self.truth.class(pfn).unwrap_or(PageClass::Hole);
                dropped += 1;
                if is_dropped(truth) || self.is_excused(pfn, truth) {
                    continue;
                }
                frames += 1;
                if lost.len() < 8 {
                    let taken_for = class;
                    lost.push(Lost {
                        pfn,
                        truth,
                        taken_for,
                    });
                }
            }
        }
        if frames > 0 {
            return Outcome::Wrong { lost, frames };
        }
        let all: u64 = [PageClass::FreeBuddy, PageClass::FreePcp, PageClass::Offline]
            .iter()
            .map(|class| self.truth.counts().get(*class))
            .sum();
        Outcome::Classified {
            kept_more: all.saturating_sub(dropped),
            zones: pages.zones.len(),
        }
    }

    /// Kept in doubt in the unchanged guest, and free by the kernel's own word.
    fn is_excused(&self, pfn: Pfn, truth: PageClass) -> bool {
        truth == PageClass::Unknown && self.capture.flags(pfn) & (KPF_BUDDY | KPF_OFFLINE) != 0
    }

    /// Opens the guest with the changes in it, and classifies its pages.
    fn afresh(&self, overlay: &Overlay<'_>, options: &GuestOptions) -> Outcome {
        let guest = match LinuxGuest::open(overlay, options) {
            Ok(guest) => guest,
            Err(error) => return Outcome::NotOpened(error.to_string()),
        };
        self.classified(guest.classify(OnInconsistency::Refuse))
    }

    fn classified(&self, pages: Result<Classification, VmiError>) -> Outcome {
        match pages {
            Ok(pages) => self.judge(&pages),
            Err(error) => Outcome::Refused(error.to_string()),
        }
    }

    /// Tries `changes` in memory of which nothing else is known.
    pub fn try_raw(&self, overlay: &Overlay<'_>, changes: &[Change]) -> Outcome {
        overlay.set(changes);
        let done = catch_unwind(AssertUnwindSafe(|| {
            self.afresh(overlay, &GuestOptions::new().at_most(self.knowledge))
        }));
        done.unwrap_or(Outcome::Panicked)
    }

    /// Tries `changes`. `guest` was opened on `overlay` without changes, and serves all those that
    /// change nothing that opening reads.
    pub fn try_one(
        &self,
        overlay: &Overlay<'_>,
        guest: &LinuxGuest<'_>,
        changes: &[Change],
    ) -> Outcome {
        let reopen = self.must_open(changes);
        overlay.set(changes);
        let done = catch_unwind(AssertUnwindSafe(|| {
            if reopen {
                return self.afresh(overlay, &self.options);
            }
            match self.classified(guest.classify(OnInconsistency::Refuse)) {
                // What is wrong must also be wrong from the beginning.
                Outcome::Wrong { .. } => self.afresh(overlay, &self.options),
                outcome => outcome,
            }
        }));
        done.unwrap_or(Outcome::Panicked)
    }
}

/// A kind of wrong drop.
#[derive(Debug, Clone)]
pub struct Finding {
    pub mutations: u64,
    pub most_frames: u64,
    pub example: String,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub tried: u64,
    pub not_opened: u64,
    pub refused: u64,
    pub kept_more: u64,
    pub unmoved: u64,
    pub wrong: u64,
    pub panicked: u64,
}

impl Counts {
    fn add(&mut self, other: &Self) {
        self.tried += other.tried;
        self.not_opened += other.not_opened;
        self.refused += other.refused;
        self.kept_more += other.kept_more;
        self.unmoved += other.unmoved;
        self.wrong += other.wrong;
        self.panicked += other.panicked;
    }
}

/// The results of many mutations.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Of mutations in one record, by kind.
    pub single: BTreeMap<Kind, Counts>,
    pub findings: BTreeMap<String, Finding>,
    /// Of lies in two or more places that agree with each other.
    pub lies: Counts,
    pub lies_found: BTreeMap<String, Finding>,
    /// Zones whose lists were walked to the end, all together.
    pub zones: u64,
    pub elapsed: Duration,
}

impl Report {
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        for counts in self.single.values() {
            total.add(counts);
        }
        total
    }

    fn note(&mut self, subject: &Subject<'_>, mutation: &Mutation, outcome: &Outcome) {
        let is_lie = mutation.places > 1;
        let (counts, findings) = if is_lie {
            (&mut self.lies, &mut self.lies_found)
        } else {
            let counts = self.single.entry(mutation.kind).or_default();
            (counts, &mut self.findings)
        };
        counts.tried += 1;
        let mut found = |class: &str, frames: u64, text: String| {
            let key = format!("{}: {} -> {class}", mutation.kind, mutation.name);
            let finding = findings.entry(key).or_insert_with(|| Finding {
                mutations: 0,
                most_frames: 0,
                example: String::new(),
            });
            finding.mutations += 1;
            if frames > finding.most_frames || finding.example.is_empty() {
                finding.most_frames = frames;
                finding.example = text;
            }
        };
        match outcome {
            Outcome::NotOpened(_) => counts.not_opened += 1,
            Outcome::Refused(_) => counts.refused += 1,
            Outcome::Classified { kept_more, zones } => {
                self.zones += *zones as u64;
                if *kept_more == 0 {
                    counts.unmoved += 1;
                } else {
                    counts.kept_more += 1;
                }
            }
            Outcome::Wrong { lost, frames } => {
                counts.wrong += 1;
                let lost = lost.first();
                let class = lost.map_or("", |lost| lost.taken_for.name());
                let what = lost.map_or_else(String::new, |lost| {
                    format!("frame {} ({}) as {class}", lost.pfn, lost.truth)
                });
                let text = format!("{}; {what}", mutation.describe(subject.capture));
                found(class, *frames, text);
            }
            Outcome::Panicked => {
                counts.panicked += 1;
                found("panic", 0, mutation.describe(subject.capture));
            }
        }
    }

    fn join(&mut self, other: Self) {
        for (kind, counts) in other.single {
            self.single.entry(kind).or_default().add(&counts);
        }
        self.lies.add(&other.lies);
        self.zones += other.zones;
        for (mine, theirs) in [
            (&mut self.findings, other.findings),
            (&mut self.lies_found, other.lies_found),
        ] {
            for (key, finding) in theirs {
                match mine.get_mut(&key) {
                    Some(known) => {
                        known.mutations += finding.mutations;
                        if finding.most_frames > known.most_frames {
                            known.most_frames = finding.most_frames;
                            known.example = finding.example;
                        }
                    }
                    None => {
                        mine.insert(key, finding);
                    }
                }
            }
        }
    }
}

/// The number of mutations, their kinds, and the number of threads.
#[derive(Debug, Clone)]
pub struct Settings {
    pub rounds: u64,
    pub seconds: Option<u64>,
    pub threads: u64,
    pub seed: u64,
    /// All kinds if empty.
    pub kinds: Vec<Kind>,
    /// Only records whose name has this in it, with `all`.
    pub named: String,
    /// Every bit of every record instead of a choice.
    pub all: bool,
    /// Of every so many mutations one is of several places.
    pub lies: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rounds: 1000,
            seconds: None,
            threads: 1,
            seed: 0x9e37_79b9_7f4a_7c15,
            kinds: Vec::new(),
            named: String::new(),
            all: false,
            lies: 16,
        }
    }
}

/// One mutation of the capture in the tree, chosen by `data`: for libFuzzer.
///
/// # Panics
/// If a mutation in one record drops a frame in use, or anything panics.
pub fn by_input(data: &[u8]) {
    static SMALL: OnceLock<Mutex<Small>> = OnceLock::new();
    let Some((first, choices)) = data.split_first() else {
        return;
    };
    let small = SMALL.get_or_init(|| Mutex::new(Small::new()));
    // A panic of another thread leaves nothing half done: changes are put in place whole.
    let small = small.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rng = Rng::of_input(choices);
    let mutation = if first & 1 == 0 {
        small.plan.single(&mut rng)
    } else {
        small.plan.lie(&mut rng)
    };
    let Some(mutation) = mutation else { return };
    let outcome = small
        .subject
        .try_one(small.overlay, &small.guest, &mutation.changes);
    let fails = match &outcome {
        Outcome::Panicked => true,
        Outcome::Wrong { .. } => mutation.places == 1,
        _ => false,
    };
    assert!(
        !fails,
        "{}: {outcome:?}",
        mutation.describe(small.subject.capture)
    );
}

/// The capture in the tree, kept for as long as the process lives.
struct Small {
    subject: &'static Subject<'static>,
    plan: Plan<'static, 'static>,
    overlay: &'static Overlay<'static>,
    guest: LinuxGuest<'static>,
}

impl Small {
    fn new() -> Self {
        let capture = Capture::load(&command::small_capture()).expect("the capture in the tree");
        let capture: &'static Capture = Box::leak(Box::new(capture));
        let subject = Subject::new(capture).expect("a guest that is whole");
        let subject: &'static Subject<'static> = Box::leak(Box::new(subject));
        let overlay: &'static Overlay<'static> = Box::leak(Box::new(Overlay::new(capture)));
        let guest = LinuxGuest::open(overlay, &subject.options).expect("its kernel");
        Self {
            subject,
            plan: Plan::new(subject, &[], ""),
            overlay,
            guest,
        }
    }
}

/// The numbers below `len` in an order in which a part of them is from everywhere.
fn spread(number: u64, len: u64) -> u64 {
    /// A prime larger than any number of mutations here.
    const STEP: u128 = 2_147_483_647;
    let at = u128::from(number) * STEP % u128::from(len.max(1));
    u64::try_from(at).unwrap_or(0)
}

/// Of every so many mutations one is of memory of which nothing else is known.
const RAW: u64 = 50;

/// Tries mutations of `subject`.
pub fn run(subject: &Subject<'_>, settings: &Settings) -> Report {
    let plan = Plan::new(subject, &settings.kinds, &settings.named);
    let next = AtomicU64::new(0);
    let start = Instant::now();
    let rounds = if settings.all {
        plan.all_len()
    } else {
        settings.rounds
    };
    let worker = || {
        let mut report = Report::default();
        let overlay = Overlay::new(subject.capture);
        let Ok(guest) = LinuxGuest::open(&overlay, &subject.options) else {
            return report;
        };
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let late = settings
                .seconds
                .is_some_and(|seconds| start.elapsed().as_secs() >= seconds);
            if number >= rounds || late {
                return report;
            }
            // Each mutation has a seed of its own: threads do not change what is tried.
            let mut rng = Rng::new(settings.seed, number);
            let mutation = if settings.all {
                plan.nth(spread(number, rounds))
            } else if settings.lies > 0 && number % settings.lies == settings.lies - 1 {
                plan.lie(&mut rng)
            } else {
                plan.single(&mut rng)
            };
            let Some(mutation) = mutation else { continue };
            let outcome = if number % RAW == RAW - 1 {
                subject.try_raw(&overlay, &mutation.changes)
            } else {
                subject.try_one(&overlay, &guest, &mutation.changes)
            };
            report.note(subject, &mutation, &outcome);
        }
    };
    let mut report = Report::default();
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..settings.threads).map(|_| scope.spawn(worker)).collect();
        report.join(worker());
        for other in others {
            if let Ok(theirs) = other.join() {
                report.join(theirs);
            }
        }
    });
    report.elapsed = start.elapsed();
    report
}
