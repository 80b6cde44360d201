//! The progress of a long phase of the work, on standard error: a bar on a terminal, else a line now
//! and then, or JSON for a program that shows it itself.

use crate::json::{OfProgress, ProgressReport, Version, line};
use crate::report::{complain, size};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sonicshot::{Progress, WorkPhase};
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum ProgressMode {
    /// A bar on a terminal, else a line every few seconds; nothing beside JSON
    #[default]
    Auto,
    /// The same, from the first moment, and beside JSON too
    Always,
    /// Nothing
    Never,
    /// A line of JSON every second, and at the begin and end of a phase: `phase`, `done` and `total`
    /// in bytes where they are known, `seconds`, `finished`
    Json,
}

/// Options for what is told while the command works.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Talk {
    pub mode: ProgressMode,
    /// Neither progress nor notes.
    pub quiet: bool,
    /// Each phase is told with its time.
    pub verbose: bool,
}

static TALK: OnceLock<Talk> = OnceLock::new();

/// The interval of lines where there is no terminal.
const LINE: Duration = Duration::from_secs(5);
/// The interval of lines of JSON.
const JSON: Duration = Duration::from_secs(1);
/// The interval at which a bar without an amount moves.
const TICK: Duration = Duration::from_millis(100);

/// The time when the last line was written, or the first phase began.
fn last_line() -> MutexGuard<'static, Option<Instant>> {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Set once, before the work.
pub(crate) fn set(talk: Talk) {
    // Nobody sets it twice.
    let _ = TALK.set(talk);
}

/// The options that were set.
pub(crate) fn talk() -> Talk {
    TALK.get().copied().unwrap_or_default()
}

/// The form in which a phase is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Show {
    Bar,
    Lines,
    Json,
    Nothing,
}

impl Show {
    fn of(talk: Talk, json: bool, terminal: bool) -> Self {
        match talk.mode {
            ProgressMode::Json => Self::Json,
            ProgressMode::Never => Self::Nothing,
            ProgressMode::Auto if talk.quiet || json => Self::Nothing,
            ProgressMode::Auto | ProgressMode::Always if terminal => Self::Bar,
            ProgressMode::Auto | ProgressMode::Always => Self::Lines,
        }
    }
}

#[derive(Debug)]
struct State {
    phase: &'static str,
    started: Instant,
    done: AtomicU64,
    /// 0 until it is known.
    total: AtomicU64,
}

impl State {
    /// Bytes done, and of how many, if that is known.
    fn amount(&self) -> Option<(u64, u64)> {
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed).min(total);
        (total > 0).then_some((done, total))
    }

    /// Bytes done of nobody knows how many, if any.
    fn of_unknown(&self) -> Option<u64> {
        let done = self.done.load(Ordering::Relaxed);
        (done > 0).then_some(done)
    }

    fn line(&self) -> String {
        let seconds = self.started.elapsed().as_secs();
        match self.amount() {
            Some((done, total)) => {
                let left = left(done, total, self.started.elapsed());
                let (percent, done, total) = (percent(done, total), size(done), size(total));
                format!("{}: {percent} %, {done} of {total}{left}", self.phase)
            }
            None => match self.of_unknown() {
                None => format!("{}: {seconds} s", self.phase),
                Some(done) => format!("{}: {}, {seconds} s", self.phase, size(done)),
            },
        }
    }

    fn json(&self, finished: bool) -> String {
        let amount = self.amount();
        line(&ProgressReport {
            version: Version::default(),
            kind: OfProgress::default(),
            phase: self.phase.to_string(),
            done: amount.map(|(done, _)| done).or(self.of_unknown()),
            total: amount.map(|(_, total)| total),
            seconds: self.started.elapsed().as_secs_f64(),
            finished,
        })
    }
}

fn percent(done: u64, total: u64) -> u128 {
    // Of 128 bits, of which the product fills 71.
    (u128::from(done) * 100)
        .checked_div(total.into())
        .unwrap_or(0)
}

/// The time left, once there is something to tell it by.
fn left(done: u64, total: u64, gone: Duration) -> String {
    let left = u128::from(total.saturating_sub(done)) * gone.as_millis();
    match left.checked_div(done.into()) {
        Some(left) if gone > JSON => format!(", {} s left", left.div_ceil(1000)),
        _ => String::new(),
    }
}

/// The phases of a command's work, of which one is shown at a time.
#[derive(Debug, Clone)]
pub(crate) struct Phases(Arc<Shown>);

#[derive(Debug)]
struct Shown {
    json: bool,
    /// The phase that is shown, while a [`Phase`] lives.
    now: Mutex<Option<Running>>,
}

impl Phases {
    /// Those of a command that prints JSON or does not.
    pub(crate) fn new(json: bool) -> Self {
        let now = Mutex::new(None);
        Self(Arc::new(Shown { json, now }))
    }

    /// Begins a phase.
    pub(crate) fn run(&self, name: &'static str) -> Phase {
        self.0.begin(name);
        Phase {
            phases: self.clone(),
            name,
        }
    }

    /// Told of the bytes of the phases that it is told of, while a phase of a command runs.
    pub(crate) fn shown(&self) -> Arc<dyn Progress> {
        self.of("opening")
    }

    /// The same; until it is told of another phase it is this one.
    fn of(&self, name: &'static str) -> Arc<dyn Progress> {
        Arc::new(Teller {
            shown: Arc::clone(&self.0),
            phase: Mutex::new(name),
        })
    }
}

impl Shown {
    fn now(&self) -> MutexGuard<'_, Option<Running>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, name: &'static str) {
        let mut now = self.now();
        // What was begun is told of as the phase that it is.
        if now.as_ref().is_some_and(|now| now.is_fresh(name)) {
            return;
        }
        // Its last line comes first.
        drop(now.take());
        *now = Some(Running::begin(name, self.json));
    }
}

/// Whoever tells of phases.
struct Teller {
    shown: Arc<Shown>,
    /// The phase that it tells of.
    phase: Mutex<&'static str>,
}

impl Teller {
    fn phase(&self) -> MutexGuard<'_, &'static str> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress for Teller {
    fn tell(&self, done: u64, total: u64) {
        let phase = *self.phase();
        let is_other = |now: &Running| now.state.phase != phase;
        let begins = self.shown.now().as_ref().is_some_and(is_other);
        if begins {
            self.shown.begin(phase);
        }
        if let Some(now) = &*self.shown.now() {
            now.tell(done, total);
        }
    }

    fn begin(&self, phase: WorkPhase) {
        *self.phase() = phase.name();
        let is_running = self.shown.now().is_some();
        if is_running {
            self.shown.begin(phase.name());
        }
    }
}

/// A phase of the work, from where it is begun to where it is dropped; what it is told of may be
/// phases of its own.
#[derive(Debug)]
pub(crate) struct Phase {
    phases: Phases,
    name: &'static str,
}

impl Phase {
    /// Begins a phase of a command that prints JSON or does not.
    pub(crate) fn begin(name: &'static str, json: bool) -> Self {
        Phases::new(json).run(name)
    }

    /// Told of the bytes that are done, and of all of them.
    pub(crate) fn shown(&self) -> Arc<dyn Progress> {
        self.phases.of(self.name)
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        drop(self.phases.0.now().take());
    }
}

/// A phase that is shown.
#[derive(Debug)]
struct Running {
    state: Arc<State>,
    show: Show,
    bar: ProgressBar,
    /// Tells the thread that writes lines to stop, and that thread.
    teller: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Running {
    fn begin(phase: &'static str, json: bool) -> Self {
        let state = Arc::new(State {
            phase,
            started: Instant::now(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        });
        let show = Show::of(talk(), json, io::stderr().is_terminal());
        let bar = match show {
            Show::Bar => bar(phase),
            _ => ProgressBar::hidden(),
        };
        Self {
            teller: teller(show, &state, &bar),
            state,
            show,
            bar,
        }
    }

    /// Whether it is of this name, and nothing was told of it yet.
    fn is_fresh(&self, name: &str) -> bool {
        self.state.phase == name && self.state.amount().is_none()
    }

    fn tell(&self, done: u64, total: u64) {
        let (state, bar) = (&self.state, &self.bar);
        state.done.store(done, Ordering::Relaxed);
        state.total.store(total, Ordering::Relaxed);
        if self.show == Show::Bar {
            if total > 0 && bar.length() != Some(total) {
                bar.set_length(total);
                bar.set_style(with_amount(columns()));
            }
            bar.set_position(done);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.teller.take() {
            drop(stop);
            // A thread that panicked has nothing more to tell.
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
        if talk().verbose && !talk().quiet && self.show != Show::Json {
            let seconds = self.state.started.elapsed().as_secs_f64();
            complain!("{}: {seconds:.2} s", self.state.phase);
        }
    }
}

/// The thread that writes lines, if any are to be written, or moves the bar. The bar's own (`steady_tick`)
/// would panic where no thread can be started.
fn teller(
    show: Show,
    state: &Arc<State>,
    bar: &ProgressBar,
) -> Option<(Sender<()>, JoinHandle<()>)> {
    let every = match show {
        Show::Lines => LINE,
        Show::Json => JSON,
        Show::Bar => return mover(bar),
        Show::Nothing => return None,
    };
    let (stop, stopped) = mpsc::channel::<()>();
    let state = Arc::clone(state);
    let at_once = show == Show::Json || talk().mode == ProgressMode::Always;
    let work = move || {
        let tell = |finished| {
            match show {
                Show::Json => complain!("{}", state.json(finished)),
                _ => complain!("{}", state.line()),
            }
            *last_line() = Some(Instant::now());
        };
        if at_once {
            tell(false);
        }
        // Phases that are all short make lines too.
        let left = || {
            let began = *last_line().get_or_insert_with(Instant::now);
            every.checked_sub(began.elapsed()).unwrap_or(Duration::ZERO)
        };
        while stopped.recv_timeout(left()) == Err(RecvTimeoutError::Timeout) {
            tell(false);
        }
        if at_once {
            tell(true);
        }
    };
    // Without a thread nothing is told; the work goes on.
    let thread = thread::Builder::new().name("progress".into()).spawn(work);
    Some((stop, thread.ok()?))
}

/// The thread that moves the bar. Without one it is drawn when there is something new.
fn mover(bar: &ProgressBar) -> Option<(Sender<()>, JoinHandle<()>)> {
    bar.tick();
    let (stop, stopped) = mpsc::channel::<()>();
    let bar = bar.clone();
    let work = move || {
        while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            bar.tick();
        }
    };
    let thread = thread::Builder::new().name("progress".into()).spawn(work);
    Some((stop, thread.ok()?))
}

/// A bar that only moves, until it is told how much there is.
fn bar(phase: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg} {spinner} {elapsed} {bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.set_message(phase);
    bar
}

/// Columns of the terminal, if it says so.
fn columns() -> Option<u16> {
    terminal_size::terminal_size_of(io::stderr()).map(|(width, _)| width.0)
}

/// Columns that a phase's name, an amount of 24 and a bar worth its name take.
const WIDE: u16 = 78;

/// The template of a bar: it takes what the rest of a line leaves. Where that is next to nothing, the
/// name is cut off instead, and there is no bar.
fn template(columns: Option<u16>) -> &'static str {
    match columns {
        Some(columns) if columns < WIDE => "{wide_msg} {percent:>3} % {eta:>4}",
        _ => "{msg} [{wide_bar}] {bytes}/{total_bytes} {eta}",
    }
}

fn with_amount(columns: Option<u16>) -> ProgressStyle {
    let style = ProgressStyle::with_template(template(columns));
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::{ProgressMode, Show, State, Talk, left, percent, template, with_amount};
    use indicatif::{InMemoryTerm, ProgressBar, ProgressDrawTarget};
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    #[test]
    fn what_is_shown_follows_the_terminal_and_the_options() {
        let talk = |mode, quiet| Talk {
            mode,
            quiet,
            verbose: false,
        };
        for (mode, quiet, json, terminal, show) in [
            (ProgressMode::Auto, false, false, true, Show::Bar),
            (ProgressMode::Auto, false, false, false, Show::Lines),
            (ProgressMode::Auto, true, false, true, Show::Nothing),
            (ProgressMode::Auto, false, true, true, Show::Nothing),
            (ProgressMode::Always, false, true, false, Show::Lines),
            (ProgressMode::Never, false, false, true, Show::Nothing),
            (ProgressMode::Json, true, true, false, Show::Json),
        ] {
            assert_eq!(
                Show::of(talk(mode, quiet), json, terminal),
                show,
                "{mode:?}"
            );
        }
    }

    #[test]
    fn a_bar_keeps_to_its_line() {
        for columns in [40, 60, 80, 200] {
            let term = InMemoryTerm::new(5, columns);
            let target = ProgressDrawTarget::term_like(Box::new(term.clone()));
            let bar = ProgressBar::with_draw_target(Some(512 << 30), target);
            bar.set_style(with_amount(Some(columns)));
            bar.set_message("looking for the kernel and its pages");
            bar.set_position(300 << 30);
            bar.force_draw();
            let drawn = term.contents();
            assert!(drawn.starts_with("looking for the kernel"), "{drawn}");
            assert_eq!(drawn.lines().count(), 1, "{drawn}");
            let ends = if columns < 78 { "59 %" } else { "512.00 GiB" };
            assert!(drawn.contains(ends), "{columns}: {drawn}");
        }
        assert_eq!(template(None), template(Some(80)));
    }

    #[test]
    fn a_line_tells_bytes_total_and_time_left() {
        let state = |done, total| State {
            phase: "pruning",
            started: Instant::now(),
            done: AtomicU64::new(done),
            total: AtomicU64::new(total),
        };
        assert_eq!(state(0, 0).line(), "pruning: 0 s");
        assert_eq!(
            state(1 << 20, 4 << 20).line(),
            "pruning: 25 %, 1.0 MiB of 4.0 MiB"
        );
        assert_eq!(state(1 << 20, 0).line(), "pruning: 1.0 MiB, 0 s");
        assert!(state(1, 4).json(false).contains("\"done\":1,"));
        assert!(state(1, 0).json(false).contains("\"done\":1,"));
        assert_eq!(left(1, 4, Duration::from_secs(2)), ", 6 s left");
        assert_eq!(left(0, 4, Duration::from_secs(2)), "");
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }
}
