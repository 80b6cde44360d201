//! A guest whose kernel tells nothing of itself, read by symbol files of its build.

use crate::knowledge::{Crashed, classes, erase, testdata, testdata_root};
use sonicshot::{Gpa, GuestBytes, MappedRegions, PageClass};
use sonicshot_vmi::symbols::{SymbolError, SymbolFile, SymbolSource};
use sonicshot_vmi::{
    GuestOptions, KernelVa, Knowledge, LinuxGuest, Note, OnInconsistency, VmiError,
};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;

/// The guest's symbols and types, and the class of each of its frames by them.
fn known() -> &'static (String, Vec<PageClass>) {
    static KNOWN: OnceLock<(String, Vec<PageClass>)> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let ram = testdata();
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let pages = guest.classify(OnInconsistency::Refuse).unwrap();
        let file = guest.symbol_file().unwrap();
        file.check_build().unwrap();
        (file.to_text(), classes(&pages.map))
    })
}

/// The guest's memory, in which no page has its VMCOREINFO.
fn mute() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let mut ram = testdata();
        assert!(erase(&mut ram, b"OSRELEASE=", b'#') > 0);
        ram
    })
}

/// The same, of a kernel that makes none.
fn mute_by_nature() -> Vec<u8> {
    let mut ram = mute().to_vec();
    assert!(erase(&mut ram, b"SYMBOL(%s)=%lx\n", b'#') > 0);
    ram
}

/// The facts of the guest in `ram`, the class of each frame, and what there is to say.
fn look(
    ram: &[u8],
    options: &GuestOptions,
) -> Result<(Knowledge, Vec<PageClass>, Vec<Note>), VmiError> {
    let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
    let guest = LinuxGuest::open(&memory, options)?;
    let pages = guest.classify(OnInconsistency::Refuse)?;
    Ok((guest.knowledge(), classes(&pages.map), pages.notes))
}

fn put(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

/// The text of another build: as `text`, with other lines instead of some.
fn other(text: &str, change: impl Fn(&str) -> Option<String>) -> String {
    use std::hash::Hasher;
    let lines = text.lines().filter(|line| !line.starts_with("end "));
    let lines = lines.map(|line| change(line).unwrap_or_else(|| line.to_owned()));
    let body: String = lines
        .filter(|line| !line.is_empty())
        .map(|line| line + "\n")
        .collect();
    let mut hasher = twox_hash::XxHash3_64::new();
    hasher.write(body.as_bytes());
    format!("{body}end {:016x}\n", hasher.finish())
}

fn without_id(line: &str) -> Option<String> {
    line.starts_with("build-id ").then(String::new)
}

fn of_another_build(line: &str) -> Option<String> {
    line.starts_with("build-id ")
        .then(|| "build-id 0102030405060708".into())
}

#[test]
fn a_small_file_tells_all_that_the_kernel_itself_would() {
    let (text, all) = known();
    assert!(text.len() < 12 << 10, "{} bytes", text.len());
    let folder = TempDir::new().unwrap();
    let file = put(&folder, "file", text);
    let by_banner = put(&folder, "by-banner", &other(text, without_id));
    let only = TempDir::new().unwrap();
    put(&only, "a", &other(text, of_another_build));
    put(&only, "b", text);
    put(&only, "notes.txt", "not a symbol file\n");
    let made_without = mute_by_nature();
    for path in [file.as_path(), by_banner.as_path(), only.path()] {
        // By the processors' word, and by the traces that there are none of.
        for (ram, cr3) in [
            (mute(), Some(testdata_root())),
            (made_without.as_slice(), None),
        ] {
            let mut options = GuestOptions::new().symbols(path);
            if let Some(cr3) = cr3 {
                options = options.cr3(cr3);
            }
            let (knowledge, found, notes) = look(ram, &options).unwrap();
            assert_eq!(knowledge, Knowledge::Types, "{}", path.display());
            assert!(found == *all, "{}", path.display());
            let unused = |note: &Note| {
                matches!(
                    note,
                    Note::SymbolFilesNotUsed { .. } | Note::SymbolFolderNotUsed { .. }
                )
            };
            assert!(!notes.iter().any(unused), "{notes:?}");
        }
        // What writes over a VMCOREINFO may own all of the memory.
        let error = look(mute(), &GuestOptions::new().symbols(path)).unwrap_err();
        let gone = matches!(&error, VmiError::OwnerUntold { why, .. } if why.contains("is gone"));
        assert!(gone, "{error}");
    }
}

#[test]
fn a_file_of_another_build_is_not_used() {
    let (text, all) = known();
    let folder = TempDir::new().unwrap();
    let id = put(&folder, "id", &other(text, of_another_build));
    let banner = put(
        &folder,
        "banner",
        &other(text, |line| {
            let banner = line.starts_with("banner ");
            let banner = banner.then(|| format!("{line} by somebody else"));
            banner.or_else(|| without_id(line))
        }),
    );
    // Where the image would have to be with these, nothing is.
    let moved = put(
        &folder,
        "moved",
        &other(text, |line| {
            let table = line.starts_with("symbol init_top_pgt ");
            table.then(|| "symbol init_top_pgt ffffffff82345000".into())
        }),
    );
    for path in [id.as_path(), banner.as_path(), moved.as_path()] {
        let options = GuestOptions::new().symbols(path).cr3(testdata_root());
        let (knowledge, _, notes) = look(mute(), &options).unwrap();
        assert_eq!(knowledge, Knowledge::Shape, "{}", path.display());
        let files = vec![path.to_owned()];
        assert!(notes.contains(&Note::SymbolFilesNotUsed { files }));
    }
    // A kernel that tells its build refuses a file, and passes over a folder.
    let whole = testdata();
    let error = look(&whole, &GuestOptions::new().symbols(&id)).unwrap_err();
    assert!(matches!(error, VmiError::WrongKernel { .. }), "{error}");
    let files_of = folder.path().to_owned();
    fs::remove_file(&moved).unwrap();
    let (knowledge, found, notes) =
        look(&whole, &GuestOptions::new().symbols(folder.path())).unwrap();
    assert_eq!(knowledge, Knowledge::Types);
    assert!(found == *all);
    let unused = |note: &Note| match note {
        Note::SymbolFolderNotUsed {
            folder,
            files,
            build_id: Some(id),
        } => (folder, *files, id.len()) == (&files_of, 1, 40),
        _ => false,
    };
    assert!(notes.iter().any(unused), "{notes:?}");
    let with_own = put(&folder, "own", text);
    let (_, found, notes) = look(&whole, &GuestOptions::new().symbols(folder.path())).unwrap();
    assert!(found == *all, "{}", with_own.display());
    assert!(
        !notes
            .iter()
            .any(|note| matches!(note, Note::SymbolFolderNotUsed { .. }))
    );
}

#[test]
fn of_two_files_of_the_build_the_one_that_is_whole_is_read() {
    let (text, all) = known();
    let folder = TempDir::new().unwrap();
    let whole = put(&folder, "whole", text);
    // The smaller one would come first.
    let damaged = put(&folder, "damaged", &text[..text.len() / 2]);
    let ram = testdata();
    let options = GuestOptions::new().symbols(folder.path());
    let (_, found, notes) = look(&ram, &options).unwrap();
    assert!(found == *all);
    let is_told =
        |note: &Note| matches!(note, Note::SymbolFileDamaged { file, .. } if *file == damaged);
    assert!(notes.iter().any(is_told), "{notes:?}");
    fs::remove_file(whole).unwrap();
    let error = look(&ram, &options).unwrap_err();
    assert!(matches!(error, VmiError::Symbols(_)), "{error}");
}

#[test]
fn files_of_several_builds_are_refused() {
    let (text, _) = known();
    let folder = TempDir::new().unwrap();
    let file = put(&folder, "file", text);
    let moved = |line: &str| {
        let name = line.strip_prefix("symbol init_uts_ns ");
        name.map(|_| "symbol init_uts_ns ffffffff82345000".into())
    };
    let banner = |line: &str| {
        let banner = line.starts_with("banner ");
        banner.then(|| format!("{line} by somebody else"))
    };
    for (name, wrong) in [
        ("id", other(text, of_another_build)),
        ("symbols", other(text, moved)),
        ("banner", other(text, banner)),
    ] {
        assert_ne!(wrong, *text);
        let wrong = put(&folder, name, &wrong);
        let options = GuestOptions::new().symbols(&file).symbols(&wrong);
        let options = options.cr3(testdata_root());
        let error = look(mute(), &options).unwrap_err();
        let wrong = matches!(error, VmiError::WrongKernel { .. });
        assert!(wrong, "{name}: {error}");
    }
}

/// The note of a crash names its kernel. Of one that was found without it nothing says that it is
/// that one.
#[test]
fn a_crash_dump_whose_note_is_gone_is_looked_at_as_others_are() {
    let (text, all) = known();
    let folder = TempDir::new().unwrap();
    let options = GuestOptions::new().symbols(put(&folder, "file", text));
    let made_without = mute_by_nature();
    for (ram, is_told) in [(mute(), false), (made_without.as_slice(), true)] {
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram))]).unwrap();
        let crashed = Crashed(memory);
        let guest = LinuxGuest::open(&crashed, &options).unwrap();
        match guest.classify(OnInconsistency::Refuse) {
            Ok(pages) => {
                assert!(is_told && !pages.notes.contains(&Note::CrashDump));
                assert!(classes(&pages.map) == *all);
            }
            Err(error) => {
                let gone =
                    matches!(&error, VmiError::OwnerUntold { why, .. } if why.contains("is gone"));
                assert!(gone && !is_told, "{error}");
            }
        }
    }
}

#[test]
fn members_that_lie_elsewhere_are_refused() {
    let (text, _) = known();
    let folder = TempDir::new().unwrap();
    for (row, with) in [
        ("struct page ", "struct page 128"),
        ("member free_area ", "member free_area 200 - 11"),
        ("constant NR_FREE_PAGES ", "constant NR_FREE_PAGES 1"),
    ] {
        let wrong = other(text, |line| line.starts_with(row).then(|| with.into()));
        assert_ne!(wrong, *text, "{row}");
        let path = put(&folder, "wrong", &wrong);
        let options = GuestOptions::new().symbols(&path).cr3(testdata_root());
        let found = look(mute(), &options);
        assert!(
            found.is_err(),
            "{row}: {:?}",
            found.map(|(knowledge, ..)| knowledge)
        );
    }
}

/// What an embedder knows of a build: symbols as the kernel was linked, and how often it was asked.
#[derive(Debug)]
struct Table {
    symbols: HashMap<String, u64>,
    asked: AtomicU64,
}

impl Table {
    const ORIGIN: &str = "the table of builds";

    fn new(symbols: HashMap<String, u64>) -> Arc<Self> {
        Arc::new(Self {
            symbols,
            asked: AtomicU64::new(0),
        })
    }
}

impl SymbolSource for Table {
    fn origin(&self) -> &str {
        Self::ORIGIN
    }

    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(self.symbols.get(name).copied().map(KernelVa::new))
    }
}

/// Of a guest whose own table of symbols is gone: it can be read by nothing else.
#[test]
fn a_source_of_the_embedders_own_counts_as_a_system_map_does() {
    let (text, all) = known();
    let mut ram = testdata();
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
    assert!(erase(&mut ram, digits, 0xff) > 0);
    let error = look(&ram, &GuestOptions::new()).unwrap_err();
    assert!(matches!(error, VmiError::Symbols(_)), "{error}");
    let symbols = text.lines().filter_map(|line| {
        let (name, at) = line.strip_prefix("symbol ")?.split_once(' ')?;
        Some((name.to_owned(), u64::from_str_radix(at, 16).ok()?))
    });
    let symbols: HashMap<String, u64> = symbols.collect();
    let mut lines: Vec<_> = symbols.iter().map(|(name, at)| (at, name)).collect();
    lines.sort_unstable();
    let map: String = lines
        .iter()
        .map(|(at, name)| format!("{at:016x} T {name}\n"))
        .collect();
    let folder = TempDir::new().unwrap();
    let map = put(&folder, "System.map", &map);
    let by_map = look(&ram, &GuestOptions::new().symbols(&map)).unwrap();
    let table = Table::new(symbols.clone());
    let by_table = look(&ram, &GuestOptions::new().source(table.clone())).unwrap();
    assert!(by_map.1 == *all && by_table == by_map);
    assert_eq!(by_table.0, Knowledge::Types);
    assert!(table.asked.load(Ordering::Relaxed) > 20);
    // Read ahead, it is the same; and so it is for a guest that tells all itself.
    let ahead = GuestOptions::new().source(table).read_symbols().unwrap();
    assert!(look(&ram, &ahead).unwrap() == by_map);
    assert!(look(&testdata(), &ahead).unwrap().1 == *all);
    // Of another build, or of none.
    let mut wrong = symbols;
    *wrong.get_mut("init_uts_ns").unwrap() += 64;
    for ram in [&ram, &testdata()] {
        let options = GuestOptions::new().source(Table::new(wrong.clone()));
        let error = look(ram, &options).unwrap_err();
        let named =
            matches!(&error, VmiError::WrongKernel { origin, .. } if origin == Table::ORIGIN);
        assert!(named, "{error}");
        assert!(error.to_string().contains("init_uts_ns"), "{error}");
        let other = HashMap::from([("jiffies_of_mine".to_owned(), 1 << 40)]);
        for empty in [HashMap::new(), other] {
            let options = GuestOptions::new().source(Table::new(empty));
            let error = look(ram, &options).unwrap_err();
            let VmiError::Symbols(SymbolError::Lacks { origin, .. }) = &error else {
                panic!("{error}");
            };
            assert_eq!(origin, Table::ORIGIN);
        }
    }
}

/// The files that `testdata/kernels/extract.py` takes out of real kernels, in a folder of each one's
/// release: `SONICSHOT_KERNELS`.
#[test]
#[ignore = "needs the lab's kernels"]
fn real_kernels_make_small_files() {
    let kernels = std::env::var_os("SONICSHOT_KERNELS").unwrap();
    for kernel in fs::read_dir(kernels).unwrap() {
        let kernel = kernel.unwrap().path();
        let open = |name: &str| {
            let path: &Path = &kernel.join(name);
            sonicshot_vmi::symbols::open_symbol_file(path).unwrap()
        };
        let sources = [open("System.map"), open("btf")];
        let sources: Vec<&dyn SymbolSource> = sources.iter().map(AsRef::as_ref).collect();
        let file = SymbolFile::gather("made", &sources).unwrap();
        let text = file.to_text();
        println!(
            "{}: {} facts, {} bytes",
            kernel.display(),
            file.len(),
            text.len()
        );
        assert!(text.len() < 12 << 10);
        assert!(SymbolFile::parse("made", text.as_bytes()).unwrap() == file);
    }
}
