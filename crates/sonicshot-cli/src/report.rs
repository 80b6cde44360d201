//! Numbers and lines for people.

use anstyle::{AnsiColor, Style};
use sonicshot::{RamLayout, Tally};
use sonicshot_offline::{ByteSize, LayoutSpec, Note};
use std::fmt;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The bytes of so many pages, for people.
pub(crate) fn bytes_of(pages: u64, page_size: u64) -> u64 {
    Tally::new(pages).times(page_size).get()
}

/// The first error of standard output.
static OUTPUT_ERROR: OnceLock<io::Error> = OnceLock::new();

/// Prints a line to standard output, as `println!` does, but without a panic if it fails.
macro_rules! say {
    ($($arg:tt)*) => { $crate::report::print_line(format_args!($($arg)*)) };
}
pub(crate) use say;

/// The same of a line with colours of our own, and nothing of a guest or a file.
macro_rules! say_styled {
    ($($arg:tt)*) => { $crate::report::print_styled_line(format_args!($($arg)*)) };
}
pub(crate) use say_styled;

/// Prints a line to standard error, as `eprintln!` does, but without a panic if it fails: the exit
/// code tells what came of the work.
macro_rules! complain {
    ($($arg:tt)*) => { $crate::report::print_error_line(format_args!($($arg)*)) };
}
pub(crate) use complain;

/// Tells a note on standard error, unless none are wanted (`--quiet`).
macro_rules! note {
    ($($arg:tt)*) => {
        if !$crate::progress::talk().quiet {
            $crate::report::complain!("note: {}", format_args!($($arg)*));
        }
    };
}
pub(crate) use note;

pub(crate) fn print_error_line(line: fmt::Arguments<'_>) {
    write_error_line(&visible(&line.to_string()));
}

fn write_error_line(line: &str) {
    // Without its colours where there is no terminal, or none are wanted (`NO_COLOR`).
    let _ = writeln!(anstream::stderr().lock(), "{}", coloured(line));
}

/// Words that begin a line, and how clap colours such words.
const COLOURED: [(&str, Style); 5] = [
    ("error:", AnsiColor::Red.on_default().bold()),
    ("failed:", AnsiColor::Red.on_default().bold()),
    ("warning:", AnsiColor::Yellow.on_default().bold()),
    ("note:", Style::new().bold()),
    ("  hint:", AnsiColor::Green.on_default()),
];

/// The line with its first word coloured, if that says what the line is.
fn coloured(line: &str) -> String {
    for (word, style) in COLOURED {
        if let Some(rest) = line.strip_prefix(word) {
            return format!("{style}{word}{style:#}{rest}");
        }
    }
    line.to_owned()
}

/// Standard output takes a dump: what is said goes to standard error.
static OUTPUT_IS_DUMP: AtomicBool = AtomicBool::new(false);

/// From now on, what is said goes to standard error.
pub(crate) fn say_to_stderr() {
    OUTPUT_IS_DUMP.store(true, Ordering::Relaxed);
}

/// The text with its control characters as escapes: what a guest or a file says must not move a terminal's
/// cursor, nor set its title. Ends of lines stay.
fn visible(text: &str) -> String {
    escaped(text, |c| c == '\n')
}

/// The same of a text that is to stay on its line.
pub(crate) fn one_line(text: &str) -> String {
    escaped(text, |_| false)
}

fn escaped(text: &str, stays: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && !stays(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

pub(crate) fn print_line(line: fmt::Arguments<'_>) {
    print_styled_line(format_args!("{}", visible(&line.to_string())));
}

pub(crate) fn print_styled_line(line: fmt::Arguments<'_>) {
    if OUTPUT_IS_DUMP.load(Ordering::Relaxed) {
        write_error_line(&line.to_string());
        return;
    }
    if let Err(error) = writeln!(io::stdout().lock(), "{line}") {
        // The work goes on; what it says at its end counts.
        let _ = OUTPUT_ERROR.set(error);
    }
}

/// The error of standard output, unless its reader just wanted no more (`| head`).
pub(crate) fn output_error() -> Option<io::Error> {
    let error = OUTPUT_ERROR.get()?;
    if error.kind() == io::ErrorKind::BrokenPipe {
        return None;
    }
    // In the operating system's words, which a kind alone may not have.
    Some(match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.kind().into(),
    })
}

/// Bytes as people read them: `449.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

/// The same for a program, in MiB: exact, of pages and of as much memory as there is.
#[allow(
    clippy::cast_precision_loss,
    reason = "a number of pages has less than 52 bits"
)]
pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Pages by what they are, as people read them: `free_buddy 65,984, zero 12`.
pub(crate) fn by_name(pages: &[(&str, u64)]) -> String {
    let parts: Vec<_> = pages
        .iter()
        .map(|(name, pages)| format!("{name} {}", count(*pages)))
        .collect();
    parts.join(", ")
}

/// Notes as JSON has them: a text for each.
pub(crate) fn lines(notes: &[Note]) -> Vec<String> {
    notes.iter().map(Note::to_string).collect()
}

/// Notes for people. That a guest should not run from what was made is a warning.
pub(crate) fn tell_notes(notes: &[Note]) {
    for note in notes {
        match note {
            Note::ForAnalysis => complain!("warning: {note}"),
            _ => note!("{note}"),
        }
    }
}

/// The ranges of a raw file as `--layout` takes them.
pub(crate) fn layout_arg(layout: &RamLayout) -> String {
    LayoutSpec::Ranges(layout.regions().to_vec()).to_string()
}

/// `part` of `whole` in percent.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let share = if whole == 0 {
        0.0
    } else {
        part as f64 * 100.0 / whole as f64
    };
    format!("{share:.1} %")
}

/// A number with its thousands set apart.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{by_name, coloured, count, mib, one_line, percent, size, visible};

    #[test]
    fn a_line_is_coloured_by_what_it_is() {
        assert_eq!(
            coloured("error: no such file"),
            "\x1b[1m\x1b[31merror:\x1b[0m no such file"
        );
        assert_eq!(coloured("  hint: -o"), "\x1b[32m  hint:\x1b[0m -o");
        for plain in ["", "{\"error\":1}", "an error: of a guest"] {
            assert_eq!(coloured(plain), plain);
        }
    }

    #[test]
    fn what_a_guest_says_moves_no_terminal() {
        let said = "5.10\x1b]0;title\x07\u{9b}31m\r\nnote: forged";
        let seen = "5.10\\u{1b}]0;title\\u{7}\\u{9b}31m\\r";
        assert_eq!(visible(said), format!("{seen}\nnote: forged"));
        assert_eq!(one_line(said), format!("{seen}\\nnote: forged"));
        assert_eq!(one_line("größer als 5"), "größer als 5");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1 << 20), "1.0 MiB");
        assert_eq!(size(449_500 << 10), "439.0 MiB");
        assert_eq!(count(1_048_576), "1,048,576");
        assert_eq!(count(12), "12");
        assert_eq!(mib(4096), 0.003_906_25);
        assert_eq!(
            by_name(&[("slab", 1234), ("zero", 1)]),
            "slab 1,234, zero 1"
        );
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(percent(0, 0), "0.0 %");
    }
}
