//! Small symbol files, made of what a kernel's build leaves.

use crate::common::*;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The kernel's own types, which its image has in one piece; modules have small ones, and what is
/// left of the loader's copy has no end.
fn btf() -> &'static [u8] {
    const LEAST: usize = 1 << 20;
    let whole = |at: usize| {
        let field = |at: usize| {
            let bytes = ram().get(at..at + 4)?.try_into().ok()?;
            usize::try_from(u32::from_le_bytes(bytes)).ok()
        };
        let len = field(at + 16)?
            .checked_add(field(at + 20)?)?
            .checked_add(24)?;
        ram()
            .get(at..at.checked_add(len)?)
            .filter(|btf| btf.len() > LEAST && btf.ends_with(b"\0"))
    };
    let starts = ram().windows(8).enumerate();
    let mut starts = starts.filter(|(_, start)| *start == b"\x9f\xeb\x01\0\x18\0\0\0");
    starts.find_map(|(at, _)| whole(at)).unwrap()
}

/// An ELF file with a build ID and nothing else.
fn elf(id: &[u8]) -> Vec<u8> {
    let mut note = [4_u32, u32::try_from(id.len()).unwrap(), 3]
        .map(u32::to_le_bytes)
        .concat();
    note.extend(b"GNU\0");
    note.extend(id);
    let mut out = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    out.resize(58, 0);
    // Of a section header the size, how many there are, and which has the names.
    out[40..48].copy_from_slice(&(64 + note.len() as u64).to_le_bytes());
    out.extend([64_u16, 2, 0].map(u16::to_le_bytes).concat());
    out.resize(64, 0);
    out.extend(&note);
    out.resize(out.len() + 64, 0);
    let mut section = vec![0; 64];
    section[4] = 7;
    section[24..32].copy_from_slice(&64_u64.to_le_bytes());
    section[32..40].copy_from_slice(&(note.len() as u64).to_le_bytes());
    out.extend(section);
    out
}

fn put(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

const MAP: &str = "ffffffff81000000 T _stext\nffffffff82001000 R linux_banner\n\
    ffffffff82800000 D init_task\nffffffff82a10000 D init_top_pgt\n";

#[test]
fn a_file_is_made_of_what_a_build_leaves() {
    let folder = TempDir::new().unwrap();
    let id = [0xa5; 20];
    let files = [
        put(&folder, "vmlinux", elf(&id)),
        put(&folder, "map", MAP),
        put(&folder, "btf", btf()),
    ];
    let [vmlinux, map, types] = &files;
    let out = folder.path().join("made");
    let make = |files: &[&Path], more: &[&str]| {
        let mut args = vec!["symbols", "make", "-o", text(&out)];
        args.extend(files.iter().map(|path| text(path)));
        args.extend(more);
        sonicshot(&args)
    };
    let run = make(&[vmlinux, map, types], &["--json"]);
    assert_eq!(run.status.code(), Some(0), "{}", stderr(&run));
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["build_id"], "a5".repeat(20));
    assert!(report["facts"].as_u64().unwrap() > 100, "{report}");
    let made = fs::read_to_string(&out).unwrap();
    assert_eq!(report["bytes"], made.len());
    assert!(made.len() < 12 << 10 && made.contains("symbol init_task ffffffff82800000\n"));
    // It is not written over, and the same files make the same.
    let run = make(&[vmlinux, map, types], &[]);
    assert_eq!(run.status.code(), Some(1), "{}", stderr(&run));
    let run = make(&[types, map, vmlinux], &["--force"]);
    assert_eq!(run.status.code(), Some(0), "{}", stderr(&run));
    assert_eq!(fs::read_to_string(&out).unwrap(), made);
    // Of another build than the guest in testdata: refused as a file, and not taken of a folder.
    let dump = raw_dump(folder.path(), |_| {});
    let run = sonicshot(&["inspect", text(&dump), "--symbols", text(&out)]);
    assert_eq!(run.status.code(), Some(4), "{}", stderr(&run));
    assert!(
        stderr(&run).contains("is of another kernel"),
        "{}",
        stderr(&run)
    );
    let symbols = TempDir::new().unwrap();
    fs::copy(&out, symbols.path().join("made")).unwrap();
    let run = sonicshot(&[
        "inspect",
        text(&dump),
        "--symbols",
        text(symbols.path()),
        "--json",
    ]);
    assert_eq!(run.status.code(), Some(0), "{}", stderr(&run));
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(report["knowledge"], "types");
    assert!(
        report["notes"].to_string().contains("not used: "),
        "{report}"
    );
}

#[test]
fn what_tells_too_little_makes_no_file() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("made");
    let files = [
        put(&folder, "vmlinux", elf(&[1; 20])),
        put(&folder, "map", MAP),
        put(&folder, "btf", btf()),
        put(&folder, "other", elf(&[2; 20])),
        put(&folder, "text", "nothing of a kernel"),
    ];
    let [vmlinux, map, types, other, junk] = &files;
    let cases: [(&[&PathBuf], i32, &str); 7] = [
        (&[vmlinux], 4, "does not have the symbols of data"),
        (&[vmlinux, map], 4, "does not have types"),
        (&[map, types], 4, "does not have a build ID and a banner"),
        (&[vmlinux, other, map, types], 4, "not of the same build"),
        (&[junk], 3, "nor a SonicShot symbol file"),
        (&[&out], 1, "No such file"),
        (&[], 2, "required"),
    ];
    for (files, code, word) in cases {
        let mut args = vec!["symbols", "make", "-o", text(&out)];
        args.extend(files.iter().map(|path| text(path)));
        let run = sonicshot(&args);
        assert_eq!(run.status.code(), Some(code), "{args:?}: {}", stderr(&run));
        assert!(stderr(&run).contains(word), "{args:?}: {}", stderr(&run));
        assert!(!out.exists());
    }
}
