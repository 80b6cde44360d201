//! Working sets: what a guest touches first after it is restored.

use crate::error::ServeError;
use core::fmt::Write as _;
use core::time::Duration;
use sonicshot::{Gpa, GpaRange, RamLayout, to_u64};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The start of a working set's file.
const TITLE: &str = "sonicshot working set 1";

/// Guest memory that is needed soon, as ranges: sorted, disjoint, not empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageSet(Vec<GpaRange>);

impl PageSet {
    /// The longest text of a set that is read.
    pub(crate) const MAX_FILE: u64 = 64 << 20;

    /// The set that has all of `ranges`.
    #[must_use]
    pub fn from_ranges(mut ranges: Vec<GpaRange>) -> Self {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable_by_key(GpaRange::start);
        let mut out: Vec<GpaRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match out.last_mut() {
                Some(last) if range.start() <= last.end() => {
                    *last = GpaRange::new(last.start(), last.end().max(range.end()));
                }
                _ => out.push(range),
            }
        }
        Self(out)
    }

    /// The ranges.
    #[must_use]
    pub fn ranges(&self) -> &[GpaRange] {
        &self.0
    }

    /// The amount of memory in it, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        GpaRange::total_of(&self.0)
    }

    /// The set without its shortest ranges, so that at most `max` bytes are left.
    #[must_use]
    pub fn capped(self, max: u64) -> Self {
        if self.bytes() <= max {
            return self;
        }
        let mut ranges = self.0;
        ranges.sort_by_key(|range| core::cmp::Reverse(range.len()));
        let mut left = max;
        ranges.retain(|range| match left.checked_sub(range.len()) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        });
        Self::from_ranges(ranges)
    }

    /// The set as text: a title, and a line for each range.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut out = format!("{TITLE}\n");
        for range in &self.0 {
            let (start, end) = (range.start().raw(), range.end().raw());
            // Writing to a string does not fail.
            let _ = writeln!(out, "{start:#x}-{end:#x}");
        }
        out
    }

    /// The set that `text` is, of a file at `path`.
    ///
    /// # Errors
    /// [`ServeError::Set`] if it is something else, [`ServeError::SetOfAnother`] if it has memory
    /// that `layout` has not.
    pub fn from_text(text: &str, path: &Path, layout: &RamLayout) -> Result<Self, ServeError> {
        let wrong = |line: usize, what| ServeError::Set {
            path: path.to_owned(),
            line,
            what,
        };
        let mut lines = (1..).zip(text.lines());
        if lines.next().is_none_or(|(_, title)| title != TITLE) {
            return Err(wrong(1, "it does not begin as one"));
        }
        let mut ranges: Vec<GpaRange> = Vec::new();
        for (line, text) in lines {
            let ends = text.split_once('-');
            let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
            let ends = ends.and_then(|(start, end)| Some((number(start)?, number(end)?)));
            let (start, end) = ends.ok_or_else(|| wrong(line, "it is not a range"))?;
            if start >= end || start % 4096 != 0 || end % 4096 != 0 {
                return Err(wrong(line, "it is not a range of whole pages"));
            }
            let (start, end) = (Gpa::new(start), Gpa::new(end));
            if ranges.last().is_some_and(|last| last.end() >= start) {
                return Err(wrong(line, "it is not behind the range before it"));
            }
            let range = GpaRange::new(start, end);
            if !layout.contains(start, range.len()) {
                return Err(ServeError::SetOfAnother {
                    path: path.to_owned(),
                    at: start,
                });
            }
            ranges.push(range);
        }
        Ok(Self(ranges))
    }

    /// The set in the file at `path`.
    ///
    /// # Errors
    /// As [`from_text`](Self::from_text), and [`ServeError::Io`] if it cannot be read.
    pub fn read(path: &Path, layout: &RamLayout) -> Result<Self, ServeError> {
        use std::io::Read;
        let file = sonicshot::open_file(path).map_err(ServeError::io("opening", path))?;
        let mut text = String::new();
        // One byte more tells that there is more.
        const TOO_MUCH: u64 = PageSet::MAX_FILE + 1;
        file.take(TOO_MUCH)
            .read_to_string(&mut text)
            .map_err(ServeError::io("reading", path))?;
        if to_u64(text.len()) > Self::MAX_FILE {
            return Err(ServeError::Set {
                path: path.to_owned(),
                line: 1,
                what: "the file is too long",
            });
        }
        Self::from_text(&text, path, layout)
    }
}

/// Notes which pages guests ask for.
#[derive(Debug)]
pub struct Recorder {
    since: Mutex<Option<Instant>>,
    limit: Duration,
    max: u64,
    ranges: Mutex<Vec<GpaRange>>,
    /// The lock of those that write: one after the other.
    writing: Mutex<()>,
}

/// A new file beside `path`, and its name.
fn create(path: &Path) -> io::Result<(File, PathBuf)> {
    let mut numbers = 0..=NAMES;
    let taken = || io::Error::from(io::ErrorKind::AlreadyExists);
    loop {
        let number = numbers.next().ok_or_else(taken)?;
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}-{number}.new", std::process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new);
        match file {
            // What is there may be another's, or a link of somebody's.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < NAMES => {}
            other => return Ok((other?, new.into())),
        }
    }
}

/// Names that are tried for a file that is not whole yet.
const NAMES: u32 = 100;
/// Ranges that are noted before they are put together.
const NOTED: usize = 1 << 16;

impl Recorder {
    /// Notes what is asked for within `limit` of the first fault, at most `max` bytes of it.
    #[must_use]
    pub fn new(limit: Duration, max: u64) -> Self {
        Self {
            since: Mutex::default(),
            limit,
            max,
            ranges: Mutex::default(),
            writing: Mutex::default(),
        }
    }

    pub(crate) fn note(&self, range: GpaRange) {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let since = since.get_or_insert_with(Instant::now);
        if since.elapsed() > self.limit {
            return;
        }
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.push(range);
        if ranges.len() >= NOTED && ranges.len().is_power_of_two() {
            let set = PageSet::from_ranges(core::mem::take(&mut ranges));
            *ranges = set.0;
        }
    }

    /// The pages that were noted.
    #[must_use]
    pub fn set(&self) -> PageSet {
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        PageSet::from_ranges(ranges.clone()).capped(self.max)
    }

    /// Writes what was noted to `path`: the file appears whole or not at all, for this user's eyes
    /// alone, and replaces a link rather than what that leads to.
    ///
    /// # Errors
    /// [`ServeError::Io`] if it cannot be written.
    pub fn write(&self, path: &Path) -> Result<PageSet, ServeError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let set = self.set();
        let (mut file, new) = create(path).map_err(ServeError::io("writing", path))?;
        let written = file.write_all(set.to_text().as_bytes());
        let written = written.and_then(|()| std::fs::rename(&new, path));
        if written.is_err() {
            let _ = std::fs::remove_file(&new);
        }
        written.map_err(ServeError::io("writing", path))?;
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(Gpa::new(start * 4096), Gpa::new(end * 4096))
    }

    fn layout() -> RamLayout {
        RamLayout::new(vec![range(0, 100), range(200, 300)]).unwrap()
    }

    #[test]
    fn a_set_is_written_and_read() {
        let set = PageSet::from_ranges(vec![
            range(5, 6),
            range(250, 260),
            range(3, 5),
            range(4, 5),
            range(9, 9),
        ]);
        assert_eq!(set.ranges(), [range(3, 6), range(250, 260)]);
        assert_eq!(set.bytes(), 13 * 4096);
        let text = set.to_text();
        let read = PageSet::from_text(&text, Path::new("x"), &layout()).unwrap();
        assert_eq!(read, set);
    }

    #[test]
    fn what_is_no_set_is_refused() {
        for (text, line) in [
            ("", 1),
            ("sonicshot working set 2\n", 1),
            ("sonicshot working set 1\nx\n", 2),
            ("sonicshot working set 1\n0x0-0x1000\n0x1000-0x2000\n", 3),
            ("sonicshot working set 1\n0x2000-0x1000\n", 2),
            ("sonicshot working set 1\n0x10-0x1000\n", 2),
            ("sonicshot working set 1\n0-0x1000\n", 2),
            ("sonicshot working set 1\n0x0-0x10000000000000000\n", 2),
        ] {
            let error = PageSet::from_text(text, Path::new("x"), &layout()).unwrap_err();
            assert!(
                matches!(error, ServeError::Set { line: found, .. } if found == line),
                "{text}: {error:?}"
            );
        }
        let long = tempfile::NamedTempFile::new().unwrap();
        for (len, what) in [
            (64 << 20, "it does not begin as one"),
            ((64 << 20) + 1, "the file is too long"),
        ] {
            long.as_file().set_len(len).unwrap();
            let error = PageSet::read(long.path(), &layout()).unwrap_err();
            assert!(
                matches!(error, ServeError::Set { what: w, .. } if w == what),
                "{error:?}"
            );
        }
        let text = PageSet::from_ranges(vec![range(99, 101)]).to_text();
        let error = PageSet::from_text(&text, Path::new("x"), &layout()).unwrap_err();
        assert!(
            matches!(error, ServeError::SetOfAnother { .. }),
            "{error:?}"
        );
    }

    #[test]
    fn of_a_set_that_is_too_large_the_longest_ranges_stay() {
        let ranges = vec![range(0, 1), range(10, 20), range(30, 35), range(40, 42)];
        let set = PageSet::from_ranges(ranges);
        let capped = |pages: u64| set.clone().capped(pages * 4096);
        assert_eq!(capped(18), set);
        assert_eq!(
            capped(17).ranges(),
            [range(10, 20), range(30, 35), range(40, 42)]
        );
        assert_eq!(capped(11).ranges(), [range(0, 1), range(10, 20)]);
        assert!(capped(0).ranges().is_empty());
    }

    #[test]
    fn a_recording_ends_and_is_written_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        let recorder = Recorder::new(Duration::from_secs(60), 4096);
        recorder.note(range(7, 8));
        recorder.note(range(1, 2));
        recorder.write(&path).unwrap();
        let read = PageSet::read(&path, &layout()).unwrap();
        assert_eq!(read.bytes(), 4096);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // What others have put there is not written to.
        let other = folder.path().join("other");
        std::fs::write(&other, "x").unwrap();
        std::fs::remove_file(&path).unwrap();
        let new = format!("set.{}-0.new", std::process::id());
        for link in [path.clone(), folder.path().join(new)] {
            std::os::unix::fs::symlink(&other, link).unwrap();
        }
        // Nor by two at once.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| drop(recorder.write(&path).unwrap())));
            }
        });
        assert_eq!(std::fs::read(&other).unwrap(), b"x");
        assert!(!std::fs::symlink_metadata(&path).unwrap().is_symlink());
        assert_eq!(PageSet::read(&path, &layout()).unwrap(), read);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
        let over = Recorder::new(Duration::ZERO, u64::MAX);
        over.note(range(1, 2));
        std::thread::sleep(Duration::from_millis(2));
        over.note(range(3, 4));
        assert!(over.set().bytes() <= 4096);
    }
}
