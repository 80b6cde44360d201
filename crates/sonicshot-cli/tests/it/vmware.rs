//! A suspended guest of VMware's: its memory, and beside it the state that says where that lies.

use crate::common::*;
use std::fs;
use std::path::Path;

/// A state with these regions: first page in the guest, in the file, and pages.
fn state(regions: &[(u32, u32, u32)]) -> Vec<u8> {
    let mut out = b"\xd2\xbe\xd2\xbe\x08\0\0\0\x01\0\0\0memory".to_vec();
    out.resize(12 + 64, 0);
    out.extend(92_u64.to_le_bytes());
    out.extend([0; 8]);
    let mut tag = |name: &str, index: Option<u32>, value: u32| {
        out.push(if index.is_some() { 0x44 } else { 4 });
        out.push(u8::try_from(name.len()).unwrap());
        out.extend(name.as_bytes());
        out.extend(index.into_iter().flat_map(u32::to_le_bytes));
        out.extend(value.to_le_bytes());
    };
    tag("regionsCount", None, u32::try_from(regions.len()).unwrap());
    for (number, (guest, file, pages)) in (0..).zip(regions) {
        tag("regionPPN", Some(number), *guest);
        tag("regionPageNum", Some(number), *file);
        tag("regionSize", Some(number), *pages);
    }
    out.extend([0; 2]);
    out
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn memory_is_read_as_its_state_has_it_and_never_pruned() {
    let folder = tempfile::tempdir().unwrap();
    let memory = folder.path().join("guest-Snapshot1.vmem");
    let beside = folder.path().join("guest-Snapshot1.vmsn");
    // The upper half first in the file.
    let (low, high) = ram().split_at(64 << 20);
    fs::write(&memory, [high, low].concat()).unwrap();
    fs::write(&beside, state(&[(0, 0x4000, 0x4000), (0x4000, 0, 0x4000)])).unwrap();
    let raw = raw_dump(folder.path(), |_| {});
    let json = |path: &Path| -> serde_json::Value {
        let run = sonicshot(&["inspect", text(path), "--json"]);
        assert!(run.status.success(), "{}", stderr(&run));
        serde_json::from_slice(&run.stdout).unwrap()
    };
    let of_raw = json(&raw);
    for path in [&memory, &beside] {
        let seen = json(path);
        assert_eq!(seen["vmm"], "VMware");
        assert_eq!(seen["classes"], of_raw["classes"]);
    }
    let out = folder.path().join("out");
    let before = fs::read(&memory).unwrap();
    for args in [
        &["prune", text(&memory), "--in-place"][..],
        &["prune", text(&memory), "-o", text(&out)],
        &["prune", text(&beside), "-o", text(&out), "--drop", "zero"],
    ] {
        let run = sonicshot(args);
        assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
        assert!(stderr(&run).contains("not tried"), "{}", stderr(&run));
        assert!(!out.exists());
    }
    assert!(fs::read(&memory).unwrap() == before);
    let run = sonicshot(&["convert", text(&beside), "--to", "raw", "-o", text(&out)]);
    assert!(run.status.success(), "{}", stderr(&run));
    assert!(fs::read(&out).unwrap() == ram());
    let run = sonicshot(&["save", text(&memory), "-o", text(&out), "--force"]);
    assert!(run.status.success(), "{}", stderr(&run));

    // A state that is damaged from its beginning on does not make plain memory of what is beside it.
    for damaged in [&b""[..], b"not a state"] {
        fs::write(&beside, damaged).unwrap();
        for args in [
            &["inspect", text(&memory)][..],
            &["prune", text(&memory), "--in-place"],
        ] {
            let run = sonicshot(args);
            assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
            assert!(stderr(&run).contains("state"), "{}", stderr(&run));
        }
        assert!(fs::read(&memory).unwrap() == before);
    }

    // Memory inside of the state is not read, whatever it is said to be.
    let inside = folder.path().join("esx.vmss");
    let mut bytes = state(&[]);
    bytes.extend(vec![0; 1 << 20]);
    for len in [bytes.len(), bytes.len().next_multiple_of(4096)] {
        bytes.resize(len, 0);
        fs::write(&inside, &bytes).unwrap();
        for how in [&[][..], &["--format", "raw"]] {
            let run = sonicshot(&[&["inspect", text(&inside)], how].concat());
            let said = stderr(&run);
            assert!(!run.status.success(), "{said}");
            let told = said.contains("VMware") && said.contains("vmss2core");
            assert!(told, "{len} {how:?}: {said}");
            assert_eq!(said.contains("--format raw"), how.is_empty(), "{said}");
        }
    }

    // A state that lies, and one without its memory.
    fs::write(&beside, state(&[(0, 0, 0x8001)])).unwrap();
    let run = sonicshot(&["inspect", text(&memory)]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    fs::remove_file(&memory).unwrap();
    let run = sonicshot(&["inspect", text(&beside)]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert!(stderr(&run).contains(".vmem"), "{}", stderr(&run));
}
