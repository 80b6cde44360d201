//! Files of other tools: named, and refused by every command with what to do.

use crate::common::*;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

/// The offset of a mark, the mark, and a word of what the file is called.
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
    (0, b"\xeb\x52\x90NTFS    ", "ntfs"),
    (82, b"FAT32   ", "fat"),
    (0, b"PK\x07\x08PK\x03\x04", "first part of an archive (zip)"),
    (
        LEN - 22,
        b"PK\x05\x06\x02\0\x02\0\x01\0\x01\0\x50\0\0\0\0\0\0\0\0\0",
        "last part of an archive (zip)",
    ),
    (0, b"PK\x05\x06\0\0\0\0\0\0\0\0", "empty archive"),
];

/// A partition from sector 8 on, and the mark of such a table behind it.
fn partitioned(bytes: &mut [u8]) {
    bytes[446..462].copy_from_slice(b"\x80\0\x02\0\x83\0\0\0\x08\0\0\0\x40\0\0\0");
    bytes[510..512].copy_from_slice(b"\x55\xaa");
}

/// The fields that every superblock of ext4 has: 128 blocks of 1 KiB.
fn ext4(bytes: &mut [u8]) {
    for (at, value) in [
        (0, 16_u32),
        (4, 128),
        (20, 1),
        (24, 0),
        (32, 8192),
        (40, 16),
        (76, 1),
    ] {
        bytes[1024 + at..1028 + at].copy_from_slice(&value.to_le_bytes());
    }
    for (at, value) in [(56, 0xef53_u16), (58, 1), (60, 1)] {
        bytes[1024 + at..1026 + at].copy_from_slice(&value.to_le_bytes());
    }
}

/// The parts that make a file a disk, what that is called, and changes of a byte after each of which nothing
/// tells that it is one: it may be memory.
type Disk = (fn(&mut [u8]), &'static str, &'static [(usize, u8)]);

/// Disks whose mark of two bytes may stand in any memory: one is told by all that must be so.
#[test]
fn disks_are_told_by_more_than_a_mark_of_two_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other");
    let out = folder.path().join("out");
    let convert = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let (from, to) = (path.to_str().unwrap(), out.to_str().unwrap());
        sonicshot(&["convert", from, "--to", "elf", "-o", to, "--force"])
    };
    let cases: [Disk; 2] = [
        (
            partitioned,
            "mbr",
            &[
                (446, 1),
                (454, 0),
                (458, 0),
                (457, 9),
                (470, 1),
                (478, 7),
                (510, 0),
            ],
        ),
        (
            ext4,
            "ext4",
            &[
                (1024, 0),
                (1044, 0),
                (1048, 7),
                (1057, 0),
                (1057, 0xff),
                (1080, 0),
                (1084, 9),
                (1100, 2),
                (1031, 1),
            ],
        ),
    ];
    for (make, name, changes) in cases {
        let mut bytes = vec![0; LEN];
        make(&mut bytes);
        is_refused(&convert(&bytes), name, name);
        for (at, to) in changes {
            let mut other = bytes.clone();
            assert_ne!(other[*at], *to, "{name} {at}");
            other[*at] = *to;
            let run = convert(&other);
            assert!(run.status.success(), "{name} {at}: {}", stderr(&run));
        }
    }
}

/// A sound file that is to be unpacked by its own tool is not called damaged.
#[test]
fn what_is_to_be_unpacked_is_said_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packed");
    let name = path.to_str().unwrap();
    let entry = |name: &[u8]| {
        let mut out = b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0".to_vec();
        out.extend([0; 4]);
        out.extend([
            6,
            0,
            0,
            0,
            6,
            0,
            0,
            0,
            u8::try_from(name.len()).unwrap(),
            0,
            0,
            0,
        ]);
        out.extend(name);
        out.extend(b"memory");
        out
    };
    let mut encrypted = entry(b"a");
    encrypted[6] = 1;
    let directory = b"PK\x01\x02".to_vec();
    let two = [entry(b"a"), entry(b"b"), directory.clone()].concat();
    for (packed, word) in [
        (two, "more than one file"),
        ([encrypted, directory].concat(), "encrypted"),
    ] {
        fs::write(&path, packed).unwrap();
        let run = sonicshot(&["inspect", name]);
        let said = stderr(&run);
        assert_eq!(run.status.code(), Some(3), "{said}");
        assert!(
            said.contains(word) && said.contains("hint: unpack it"),
            "{said}"
        );
        assert!(!said.contains("damaged"), "{said}");
    }
    // Said to be what it is not: it is not told to be called so again.
    fs::write(&path, [&b"\x1f\x8b\x08"[..], &[7; 5000]].concat()).unwrap();
    let said = stderr(&sonicshot(&["inspect", name, "--format", "raw"]));
    assert!(
        said.contains("5003 bytes") && !said.contains("--format raw"),
        "{said}"
    );
    assert!(
        said.contains("without --format") && said.contains("--layout"),
        "{said}"
    );
}

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
