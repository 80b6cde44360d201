//! `BOUNDS.md` is what the code has: every bound with its value, and a test that there is.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may stop anywhere"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The beginnings of bounds' names.
const NAMES: [&str; 5] = ["MAX_", "LARGEST", "SMALL", "MOST", "FREE_PARTS"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn sources(folder: &Path, out: &mut BTreeMap<PathBuf, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            out.insert(path, text);
        }
    }
}

/// The constants of a file and their values, without those of its tests.
fn constants(text: &str) -> Vec<(&str, String)> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let parts = code.match_indices("const ").map(|(at, _)| &code[at + 6..]);
    parts
        .filter_map(|part| {
            let (name, rest) = part.split_once(':')?;
            let is_name = name
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
            let (_, value) = rest.split_once(';')?.0.split_once('=')?;
            let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
            is_name.then_some((name, value))
        })
        .collect()
}

#[test]
fn every_bound_is_in_the_table_with_its_value_and_its_test() {
    let root = workspace();
    let mut files = BTreeMap::new();
    sources(&root.join("crates"), &mut files);
    let is_test = |name: &str| {
        let begins = format!("fn {name}(");
        files.values().any(|text| text.contains(&begins))
    };
    let table = fs::read_to_string(root.join("BOUNDS.md")).unwrap();
    let mut listed = BTreeSet::new();
    for line in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [file, name, value, _, tests] = cells[..] else {
            panic!("a row of {} cells: {line}", cells.len());
        };
        let [file, name, value] = [file, name, value].map(|cell| cell.trim_matches('`'));
        let text = files.get(&root.join("crates").join(file));
        let text = text.unwrap_or_else(|| panic!("{file} is no more"));
        let there = constants(text)
            .into_iter()
            .find(|(there, _)| *there == name);
        let (_, there) = there.unwrap_or_else(|| panic!("{file} has no {name} any more"));
        assert_eq!(there, value, "{file}: {name}");
        assert!(listed.insert((file.to_owned(), name.to_owned())), "{line}");
        let names: Vec<_> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{file}: {name} has no test");
        for test in names {
            assert!(is_test(test), "{file}: {name}: no test is called {test}");
        }
    }
    for (path, text) in &files {
        let file = path.strip_prefix(root.join("crates")).unwrap();
        if !file.iter().any(|part| part == "src") {
            continue;
        }
        for (name, value) in constants(text) {
            let is_bound = NAMES.iter().any(|begin| name.starts_with(begin));
            let key = (file.to_str().unwrap().to_owned(), name.to_owned());
            // Names of files and places of fields are no bounds.
            let is_other = value.starts_with(['"', 'b', '&']) || value.starts_with("FileOffset::");
            if is_bound && !is_other {
                assert!(listed.contains(&key), "{key:?} is not in BOUNDS.md");
            }
        }
    }
    println!("{} bounds", listed.len());
}
