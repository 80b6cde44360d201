//! The log of a server, on standard error. Whoever may connect may cause lines in it: of each kind only the
//! first of a second are written, and then one that says how many there were besides. What is to be
//! counted exactly is among the metrics.

use crate::progress::talk;
use crate::report::count;
use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The lines of a kind that are written in each second.
const FEW: u64 = 10;
const SECOND: Duration = Duration::from_secs(1);

static LINES: OnceLock<Arc<Lines>> = OnceLock::new();

/// Begins the log, once.
pub(crate) fn begin() {
    let level = if talk().verbose {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let lines = Arc::clone(LINES.get_or_init(Arc::default));
    let teller = Arc::clone(&lines);
    let thread = Builder::new().name("sonicshot-log".into());
    // Without a thread, what was left out is told before the next line of its kind, or at the end.
    let _ = thread.spawn(move || teller.tell_each_second());
    let builder = tracing_subscriber::fmt().with_writer(Writer(lines));
    builder.with_ansi(false).with_max_level(level).init();
}

/// Tells what was left out last.
pub(crate) fn end() {
    if let Some(lines) = LINES.get() {
        lines.tell(|_| true);
    }
}

/// The lines of all kinds.
#[derive(Debug, Default)]
struct Lines {
    /// A kind is a place in the program.
    kinds: Mutex<HashMap<tracing::callsite::Identifier, Kind>>,
    left_out: Condvar,
}

/// The lines of a kind, since a second began.
#[derive(Debug)]
struct Kind {
    since: Instant,
    written: u64,
    left_out: u64,
    /// The last one that was left out.
    last: Vec<u8>,
}

impl Kind {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            written: 0,
            left_out: 0,
            last: Vec::new(),
        }
    }

    /// Adds a line, and gives what is to be written.
    fn add(&mut self, line: &[u8], now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        if now.duration_since(self.since) >= SECOND {
            out = self.rest(now);
            *self = Self::new(now);
        }
        if self.written < FEW {
            self.written += 1;
            out.extend_from_slice(line);
        } else {
            self.left_out += 1;
            line.clone_into(&mut self.last);
        }
        out
    }

    /// The line that tells what was left out, if anything was.
    fn rest(&mut self, now: Instant) -> Vec<u8> {
        let seconds = now.duration_since(self.since).as_secs_f64();
        let left_out = core::mem::take(&mut self.left_out);
        if left_out == 0 {
            return Vec::new();
        }
        let lines = count(left_out);
        let mut out = format!("{lines} more lines like the next in {seconds:.1} s\n").into_bytes();
        out.append(&mut self.last);
        out
    }
}

impl Lines {
    fn kinds(&self) -> MutexGuard<'_, HashMap<tracing::callsite::Identifier, Kind>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, kind: tracing::callsite::Identifier, line: &[u8]) {
        let now = Instant::now();
        let mut kinds = self.kinds();
        let kind = kinds.entry(kind).or_insert_with(|| Kind::new(now));
        write(&kind.add(line, now));
        if kind.left_out == 1 {
            self.left_out.notify_all();
        }
    }

    /// Tells what was left out of the kinds that are asked for.
    fn tell(&self, is_meant: impl Fn(&Kind) -> bool) {
        let now = Instant::now();
        let mut kinds = self.kinds();
        for kind in kinds.values_mut().filter(|kind| is_meant(kind)) {
            write(&kind.rest(now));
        }
    }

    fn tell_each_second(&self) {
        loop {
            let kinds = self.kinds();
            let none = |kinds: &mut HashMap<_, Kind>| kinds.values().all(|kind| kind.left_out == 0);
            drop(self.left_out.wait_while(kinds, none));
            std::thread::sleep(SECOND);
            self.tell(|kind| kind.since.elapsed() >= SECOND);
        }
    }
}

fn write(text: &[u8]) {
    if !text.is_empty() {
        // There is nowhere else to tell it.
        let _ = io::stderr().lock().write_all(text);
    }
}

struct Writer(Arc<Lines>);

/// Takes one line, which is written to it at once.
struct Line(Arc<Lines>, Option<tracing::callsite::Identifier>);

impl<'w> MakeWriter<'w> for Writer {
    type Writer = Line;

    fn make_writer(&'w self) -> Line {
        Line(Arc::clone(&self.0), None)
    }

    fn make_writer_for(&'w self, of: &tracing::Metadata<'_>) -> Line {
        Line(Arc::clone(&self.0), Some(of.callsite()))
    }
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match &self.1 {
            Some(kind) => self.0.add(kind.clone(), line),
            None => write(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_lines_a_few_are_written_and_the_rest_counted() {
        let start = Instant::now();
        let mut kind = Kind::new(start);
        let mut at = |millis: u64, line: &str| {
            let now = start + Duration::from_millis(millis);
            String::from_utf8(kind.add(line.as_bytes(), now)).unwrap()
        };
        for _ in 0..FEW {
            assert_eq!(at(1, "a\n"), "a\n");
        }
        for _ in 0..2000 {
            assert_eq!(at(999, "b\n"), "");
        }
        assert_eq!(
            at(1500, "c\n"),
            "2,000 more lines like the next in 1.5 s\nb\nc\n"
        );
        assert_eq!(at(1600, "d\n"), "d\n");
        // Of few nothing is left out.
        assert_eq!(at(9000, "e\n"), "e\n");
    }
}
