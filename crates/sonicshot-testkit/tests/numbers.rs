//! No wrong number lives on: the places at which the shipped code lets one stay within bounds
//! instead of being an error are counted, and are few.
//!
//! Counted are, in `src` of every crate that is published, without tests and comments:
//! - `saturating_*`, `wrapping_*` and `overflowing_*`;
//! - `unwrap_or` and `map_or` with a number, or with a type's `MAX` or `MIN`, and
//!   `unwrap_or_default`, of whatever type;
//! - `min` and `max` with a number or a constant, and `clamp`. What cuts a range at the end of
//!   another, or a piece at the end of a buffer, does not: that is an intersection;
//! - `as` where an attribute allows it to lose something; everywhere else Clippy refuses it.
//!
//! Every `as` to a number is counted beside that, and has a ceiling of its own: a length in memory
//! becomes one of 64 bits by `sonicshot::to_u64`, other numbers a wider one by `from` and a narrower
//! one by `try_from`.
//!
//! `sonicshot::Tally`, which saturates, is the type of what is only shown; that counts where it is
//! defined. Its uses are printed.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests may stop anywhere")]

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// So many in 10,000 lines at most; what there are is less, and to be lowered as they go.
const MOST: usize = 20;

/// So many casts in 10,000 lines at most.
const MOST_CASTS: usize = 6;

/// The lints that forbid `as` to lose something.
const LOSING: [&str; 3] = [
    "cast_possible_truncation",
    "cast_possible_wrap",
    "cast_sign_loss",
];

const NUMBERS: [&str; 14] = [
    "u8", "u16", "u32", "u64", "u128", "usize", "i8", "i16", "i32", "i64", "i128", "isize",
    "c_int", "c_uint",
];

#[derive(Default)]
struct Count {
    lines: BTreeSet<usize>,
    /// The line and the word of each.
    found: Vec<(usize, String)>,
    /// Every `as` to a number, whether it may lose something or not.
    casts: Vec<(usize, String)>,
    tallies: usize,
}

/// Whether the first argument in `group` is a number, or a constant that `counts`.
fn is_fixed(group: &Group, counts: impl Fn(&str) -> bool) -> bool {
    let argument: Vec<TokenTree> = group
        .stream()
        .into_iter()
        .take_while(|token| !matches!(token, TokenTree::Punct(punct) if punct.as_char() == ','))
        .collect();
    let is_path = argument.iter().all(|token| match token {
        TokenTree::Ident(_) => true,
        TokenTree::Punct(punct) => matches!(punct.as_char(), ':' | '-'),
        TokenTree::Literal(_) => argument.len() <= 2,
        TokenTree::Group(_) => false,
    });
    match argument.last() {
        Some(TokenTree::Literal(literal)) => {
            is_path
                && literal
                    .to_string()
                    .starts_with(|first: char| first.is_ascii_digit())
        }
        Some(TokenTree::Ident(ident)) => is_path && counts(&ident.to_string()),
        _ => false,
    }
}

fn is_constant(name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    name.len() > 1 && name.chars().all(is_part)
}

impl Count {
    /// Counts in `stream`; `loses` says whether `as` may lose something there.
    fn stream(&mut self, stream: TokenStream, loses: bool) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let is_punct = |at: usize, char: char| matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == char);
        // Of the next item.
        let mut item_loses = loses;
        let mut whole_loses = loses;
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let is_inner = is_punct(at + 1, '!');
            let attribute = tokens.get(at + 1 + usize::from(is_inner));
            if is_punct(at, '#')
                && let Some(TokenTree::Group(group)) = attribute
                && group.delimiter() == Delimiter::Bracket
            {
                at += 2 + usize::from(is_inner);
                let text = group.stream().to_string();
                let is_test = text.starts_with("cfg")
                    && !text.starts_with("cfg_attr")
                    && text.contains("test")
                    && !text.contains("not");
                if is_test {
                    at = end_of_item(&tokens, at);
                } else if LOSING.iter().any(|lint| text.contains(lint)) {
                    whole_loses |= is_inner;
                    item_loses = true;
                }
                if !text.starts_with("doc") && !is_test {
                    self.lines.insert(group.span_open().start().line);
                }
                continue;
            }
            self.lines.insert(token.span().start().line);
            match token {
                TokenTree::Group(group) => {
                    self.stream(group.stream(), item_loses);
                    self.lines.insert(group.span_close().start().line);
                    if group.delimiter() == Delimiter::Brace {
                        item_loses = whole_loses;
                    }
                }
                TokenTree::Punct(punct) if punct.as_char() == ';' => item_loses = whole_loses,
                TokenTree::Ident(ident) => {
                    let name = ident.to_string();
                    let before = at.checked_sub(1).and_then(|at| tokens.get(at));
                    let is_defined = before.is_some_and(|token| token.to_string() == "fn");
                    let is_called = at > 0 && is_punct(at - 1, '.');
                    let next = tokens.get(at + 1);
                    if !is_defined && counts(&name, is_called, next, item_loses) {
                        self.found.push((ident.span().start().line, name.clone()));
                    }
                    if let ("as", Some(TokenTree::Ident(to))) = (name.as_str(), next) {
                        let to = to.to_string();
                        if NUMBERS.contains(&to.as_str()) || to == "f64" || to == "f32" {
                            self.casts
                                .push((ident.span().start().line, format!("as {to}")));
                        }
                    }
                    self.tallies += usize::from(name == "Tally");
                }
                _ => {}
            }
            at += 1;
        }
    }
}

/// Behind the item that begins at `at`, with its attributes.
fn end_of_item(tokens: &[TokenTree], at: usize) -> usize {
    let ends = |token: &TokenTree| match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        TokenTree::Punct(punct) => punct.as_char() == ';',
        _ => false,
    };
    let len = tokens.iter().skip(at).position(ends);
    len.map_or(tokens.len(), |len| at + len + 1)
}

fn counts(name: &str, is_called: bool, next: Option<&TokenTree>, loses: bool) -> bool {
    if ["saturating_", "wrapping_", "overflowing_"]
        .iter()
        .any(|kind| name.starts_with(kind))
    {
        return true;
    }
    match (name, next) {
        ("unwrap_or_default" | "map_or_default", _) => true,
        ("unwrap_or" | "map_or", Some(TokenTree::Group(group))) if is_called => {
            is_fixed(group, |name| name == "MAX" || name == "MIN")
        }
        ("min" | "max", Some(TokenTree::Group(group))) if is_called => is_fixed(group, is_constant),
        ("clamp", Some(TokenTree::Group(_))) => is_called,
        ("as", Some(TokenTree::Ident(to))) => loses && NUMBERS.contains(&to.to_string().as_str()),
        _ => false,
    }
}

fn of_text(text: &str) -> Count {
    let mut count = Count::default();
    count.stream(text.parse().unwrap(), false);
    count
}

fn of_folder(folder: &Path, all: &mut BTreeMap<String, Count>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            of_folder(&path, all);
        } else if name.ends_with(".rs") && name != "tests.rs" {
            let count = of_text(&fs::read_to_string(&path).unwrap());
            all.insert(path.display().to_string(), count);
        }
    }
}

#[test]
fn numbers_that_stay_within_bounds_by_themselves_are_few() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (mut found, mut casts, mut lines) = (0, 0, 0);
    for entry in fs::read_dir(&crates).unwrap() {
        let folder = entry.unwrap().path();
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        if manifest.contains("publish = false") {
            continue;
        }
        let mut files = BTreeMap::new();
        of_folder(&folder.join("src"), &mut files);
        let here: usize = files.values().map(|count| count.found.len()).sum();
        let lines_here: usize = files.values().map(|count| count.lines.len()).sum();
        let tallies: usize = files.values().map(|count| count.tallies).sum();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        println!("{name}: {here} in {lines_here} lines; Tally {tallies} times");
        for (file, count) in &files {
            for (line, word) in &count.found {
                println!("  {file}:{line}: {word}");
            }
        }
        for (file, count) in &files {
            for (line, cast) in &count.casts {
                println!("  {file}:{line}: {cast}");
            }
            casts += count.casts.len();
        }
        found += here;
        lines += lines_here;
    }
    println!("{found} in {lines} lines, and {casts} casts");
    assert!(lines > 10_000, "only {lines} lines were found");
    assert!(
        found * 10_000 <= lines * MOST,
        "{found} in {lines} lines are more than {MOST} in 10,000"
    );
    assert!(
        casts * 10_000 <= lines * MOST_CASTS,
        "{casts} casts by `as` in {lines} lines are more than {MOST_CASTS} in 10,000"
    );
}

#[test]
fn what_counts_is_found_and_nothing_else() {
    for (text, expected) in [
        ("fn f() { a.saturating_add(1) }", 1),
        ("fn f() { a.fold(0, u64::wrapping_sub) }", 1),
        ("fn f() { say!(\"{}\", a.saturating_mul(2)) }", 1),
        (
            "fn f() { a.unwrap_or(0) + b.unwrap_or(-1) + c.unwrap_or(u64::MAX) }",
            3,
        ),
        ("fn f() { a.map_or(0, |a| a.unwrap_or_default()) }", 2),
        ("fn f() { a.unwrap_or(b) + a.map_or(b.end, |c| c) }", 0),
        ("fn f() { a.min(7).max(Self::MOST).clamp(b, c) }", 3),
        (
            "fn f() { a.min(rest.len()).max(start); all.iter().min() }",
            0,
        ),
        ("fn f() { a as usize }", 0),
        (
            "#[expect(clippy::cast_possible_truncation)] fn f() { a as usize } fn g() { a as u32 }",
            1,
        ),
        (
            "#![allow(clippy::cast_sign_loss)] fn f() { a as usize } fn g() { a as f64 as u32 }",
            2,
        ),
        (
            "// a.saturating_add(1)\n/// a.unwrap_or(0)\nfn f() { \"a.unwrap_or(0)\" }",
            0,
        ),
        (
            "#[cfg(test)] mod tests { fn f() { a.unwrap_or(0) } } fn g() { a.unwrap_or(0) }",
            1,
        ),
        (
            "#[cfg(test)]\n#[allow(dead_code)]\nconst A: u8 = b.unwrap_or(0);",
            0,
        ),
        (
            "#[cfg_attr(not(test), warn(a))] fn g() { a.unwrap_or(0) }",
            1,
        ),
        ("pub const fn wrapping_add(self) {}", 0),
    ] {
        assert_eq!(of_text(text).found.len(), expected, "{text}");
    }
    for (text, expected) in [
        ("fn f() { a as usize + b as u64 as f64 }", 3),
        (
            "use a as b; fn f() { <T as Trait>::f(a as *const u8, a as Kind) }",
            0,
        ),
        ("#[cfg(test)] mod tests { fn f() { a as u64 } }", 0),
    ] {
        assert_eq!(of_text(text).casts.len(), expected, "{text}");
    }
    let lines = of_text("/// A.\n// b\nfn f() {\n\n    a(\n        b,\n    );\n}\n");
    assert_eq!(lines.lines.len(), 5);
}
