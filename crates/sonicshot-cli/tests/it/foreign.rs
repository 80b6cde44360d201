//! Files of other tools: named, and refused by every command with what to do.

use crate::common::*;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

/// Where a mark stands, the mark, and a word of what the file is called.
const MADE: &[(usize, &[u8], &str)] = &[
    (0, &[0xd0, 0xbe, 0xd2, 0xbe], "VMware"),
    (0, &[0xd2, 0xbe, 0xd2, 0xbe], "VMware"),
    (0, &0x0128_2014_u32.to_le_bytes(), "Hyper-V"),
    (0, b"\x7fVirtualBox SavedState V2.0\n", "VirtualBox"),
    (0, b"VMA\0\0\0\0\x01", "Proxmox"),
    (0, b"sadump\0\0\x01\0\0\0", "sadump"),
    (0, &0xa819_0173_618f_23ed_u64.to_le_bytes(), "LKCD"),
    (0, b"PAGEDU64d\x86\0\0", "Windows"),
    (0, b"PAGEDUMP\x0f\0\0\0", "Windows"),
    (0, b"MDMP\x93\xa7\0\0", "minidump"),
    (0, b"HIBR\0\0\0\0", "hibernation"),
    (0, b"hibr\x28\x01\0\0", "hibernation"),
    (4086, b"S1SUSPEND\0", "hibernated"),
    (0, b"EVF\x09\x0d\x0a\xff\x00\x01", "EnCase"),
    (0, &0xfeed_facf_u32.to_le_bytes(), "Mach-O"),
    (0, b"QED\0\0\0\0\x01", "QED"),
    (0, b"KDMV\x01\0\0\0", "vmdk"),
    (0, b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
    (0, b"vhdxfileQ\0E\0", "vhdx"),
    (0, b"conectix\0\0\0\x02", "vhd"),
    (64, &0xbeda_107f_u32.to_le_bytes(), "vdi"),
    (512, b"EFI PART\0\0\x01\0", "disk"),
    (0, b"7z\xbc\xaf\x27\x1c\0\x04", "7z"),
];

/// Longer than any mark's place, and as long as raw memory may be.
const LEN: usize = 128 << 10;

fn made(folder: &Path, at: usize, mark: &[u8]) -> String {
    let mut bytes = vec![0; LEN];
    bytes[at..at + mark.len()].copy_from_slice(mark);
    let path = folder.join("other");
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn is_refused(run: &std::process::Output, word: &str, what: &str) {
    let told = stderr(run);
    assert_eq!(run.status.code(), Some(3), "{what}: {told}");
    assert!(told.contains(word), "{what}: {told}");
    assert!(told.contains("hint: "), "{what}: {told}");
    assert!(told.contains("--format raw"), "{what}: {told}");
}

#[test]
fn each_is_named_and_never_taken_for_memory() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let to = out.to_str().unwrap();
    for (at, mark, word) in MADE {
        let path = made(folder.path(), *at, mark);
        for args in [
            &["inspect", &path][..],
            &["convert", &path, "--to", "elf", "-o", to],
        ] {
            is_refused(&sonicshot(args), word, args[0]);
        }
        assert!(!out.exists(), "{word}");
    }
}

#[test]
fn every_command_refuses_it() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let to = out.to_str().unwrap();
    let path = made(folder.path(), 0, b"PAGEDU64");
    let raw = folder.path().join("raw");
    fs::write(&raw, vec![0; LEN]).unwrap();
    let raw = raw.to_str().unwrap();
    let checkpoint = folder.path().join("x.sonic");
    let checkpoint = checkpoint.to_str().unwrap();
    assert!(
        sonicshot(&["save", raw, "--keep-all", "-o", checkpoint])
            .status
            .success()
    );
    let before = fs::read(&path).unwrap();
    for args in [
        &["prune", &path, "-o", to][..],
        &["prune", &path, "-o", to, "--drop", "zero"],
        &["prune", &path, "--in-place"],
        &["prune", &path, "--in-place", "--drop", "zero"],
        &["prune", &path, "--dry-run"],
        &["prune", &path, "--dry-run", "--layout", "flat"],
        &["prune", raw, "--base", &path, "--dry-run"],
        &["prune", &path, "--base", raw, "--dry-run"],
        &["save", &path, "-o", to],
        &["save", &path, "--keep-all", "-o", to],
        &["convert", &path, "--to", "raw", "-o", to],
        &["convert", &path, "--to", "sonic", "-o", to],
        &["convert", raw, "--to", "xl", "--template", &path, "-o", to],
        &["restore", &path, "-o", to],
        &["verify", &path],
        &["verify", checkpoint, "--against", &path],
    ] {
        is_refused(&sonicshot(args), "Windows", &args.join(" "));
    }
    let mut piped = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
    piped
        .args(["inspect", "-"])
        .stdin(Stdio::from(File::open(&path).unwrap()));
    is_refused(&piped.output().unwrap(), "Windows", "from a pipe");
    assert!(!out.exists());
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn a_disk_image_without_memory_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.extend([0; 12]);
    header.extend([0, 0, 0, 16]);
    let path = made(folder.path(), 0, &header);
    let out = folder.path().join("out");
    for args in [
        &["inspect", &path][..],
        &["convert", &path, "--to", "elf", "-o", out.to_str().unwrap()],
        &["prune", &path, "--drop", "zero", "--dry-run"],
    ] {
        is_refused(&sonicshot(args), "qcow2", args[0]);
    }
    assert!(!out.exists());
}
