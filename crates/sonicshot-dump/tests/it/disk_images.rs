//! Images of disks, held against what QEMU reads of them.

use proptest::prelude::*;
use sonicshot::checkpoint::{DiskOffset, DiskSource};
use sonicshot_dump::{DiskImage, DumpError};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: usize = 1 << 20;

/// Runs a tool of QEMU's in a folder.
fn run(folder: &Path, line: &str) {
    let mut words = line.split(' ');
    let run = Command::new(words.next().unwrap())
        .args(words)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(run.status.success(), "{line}: {run:?}");
}

fn has_qemu() -> bool {
    let there = |tool| Command::new(tool).arg("--version").output().is_ok();
    sonicshot_testkit::has(
        "qemu-img and qemu-io",
        there("qemu-img") && there("qemu-io"),
    )
}

/// Bytes that compress a little, and are not zero.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| seed ^ u8::try_from(at / 7 % 250).unwrap() | 1)
        .collect()
}

/// A raw base of 3 MiB and 512 bytes, of which the second MiB is a hole.
fn base(folder: &Path) -> PathBuf {
    let path = folder.join("base");
    let file = File::create(&path).unwrap();
    file.write_all_at(&pattern(3, MIB), 0).unwrap();
    file.write_all_at(&pattern(5, MIB + 512), 2 * MIB as u64)
        .unwrap();
    path
}

fn all_of(disk: &dyn DiskSource) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.disk_len().unwrap()).unwrap()];
    disk.read_disk(&mut bytes, DiskOffset::ZERO).unwrap();
    bytes
}

/// Every byte as QEMU reads it, whole and in odd parts, and nothing but zeroes where no data is told.
fn as_qemu_reads_it(folder: &Path, name: &str) {
    run(folder, &format!("qemu-img convert -O raw {name} told"));
    let told = fs::read(folder.join("told")).unwrap();
    let disk = DiskImage::open(folder.join(name)).unwrap();
    let read = all_of(&disk);
    assert_eq!(read.len(), told.len(), "{name}");
    assert!(read == told, "{name}");
    for (at, len) in [
        (0, 1),
        (511, 3),
        (65_535, 65_538),
        (MIB - 5, MIB + 9),
        (2 * MIB + 77, 4096),
    ] {
        let mut part = vec![0; len];
        disk.read_disk(&mut part, DiskOffset::new(at as u64))
            .unwrap();
        assert!(part == told[at..at + len], "{name} {at} {len}");
    }
    let mut beyond = [0; 2];
    let last = DiskOffset::new(told.len() as u64 - 1);
    assert!(disk.read_disk(&mut beyond, last).is_err());
    let mut at = 0;
    while let Some(data) = disk.next_disk_data(DiskOffset::new(at as u64)).unwrap() {
        let (start, end) = (data.start().raw() as usize, data.end().raw() as usize);
        assert!(at <= start && start < end && end <= told.len(), "{name}");
        assert!(told[at..start].iter().all(|byte| *byte == 0), "{name}");
        at = end;
    }
    assert!(told[at..].iter().all(|byte| *byte == 0), "{name}");
    disk.check_unchanged().unwrap();
    disk.check_pinned().unwrap();
}

/// Runs `qemu-io` on an image of qcow2.
fn change(folder: &Path, image: &str, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.current_dir(folder).args(["-f", "qcow2"]);
    for one in commands {
        command.args(["-c", one]);
    }
    let run = command.arg(image).output().unwrap();
    assert!(run.status.success(), "{image}: {run:?}");
}

/// Three images over each other, the lowest made so: longer than what is below, with something written,
/// zeroed and left.
fn chain(folder: &Path, number: usize, create: &str, convert: &str) {
    let line = |text: String| {
        let words: Vec<_> = text.split_whitespace().collect();
        run(folder, &words.join(" "));
    };
    let [whole, over, top] = ["whole", "over", "top"].map(|name| format!("{name}{number}"));
    line(format!(
        "qemu-img convert -f raw -O qcow2 {create} {convert} base {whole}"
    ));
    as_qemu_reads_it(folder, &whole);
    // What lies over another image is not allocated beforehand.
    let create = if create.contains("preallocation") {
        ""
    } else {
        create
    };
    line(format!(
        "qemu-img create -q -f qcow2 {create} -F qcow2 -b {whole} {over} 5M"
    ));
    let writes = [
        "write -P 0x7e 100k 9000",
        "write -P 0x7f 3200k 64k",
        "write -P 1 4990k 512",
    ];
    change(folder, &over, &writes);
    if !create.contains("0.10") {
        change(folder, &over, &["write -z 300k 200k"]);
    }
    as_qemu_reads_it(folder, &over);
    line(format!(
        "qemu-img create -q -f qcow2 -F qcow2 -b {over} {top}"
    ));
    change(folder, &top, &["write -P 0x44 2100k 70k"]);
    as_qemu_reads_it(folder, &top);
    let opened = DiskImage::open(folder.join(&top)).unwrap();
    let names = opened
        .paths()
        .into_iter()
        .map(|path| path.file_name().unwrap());
    assert!(names.eq([top.as_str(), over.as_str(), whole.as_str()]));
}

#[test]
fn images_are_read_as_qemu_reads_them() {
    if !has_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    base(folder);
    as_qemu_reads_it(folder, "base");
    for (number, (create, convert)) in [
        ("", ""),
        ("-o compat=0.10", ""),
        ("-o cluster_size=512", ""),
        ("-o cluster_size=2M", ""),
        ("-o extended_l2=on", ""),
        ("-o compression_type=zstd", "-c"),
        ("", "-c"),
        ("-o preallocation=metadata", ""),
        ("-o lazy_refcounts=on", ""),
    ]
    .into_iter()
    .enumerate()
    {
        chain(folder, number, create, convert);
    }
    run(folder, "qemu-img create -q -f qcow2 -F raw -b base onraw");
    as_qemu_reads_it(folder, "onraw");
    fs::create_dir(folder.join("inside")).unwrap();
    run(
        folder,
        "qemu-img create -q -f qcow2 -F raw -b ../base inside/far",
    );
    as_qemu_reads_it(folder, "inside/far");
    // With a snapshot in it.
    run(folder, "qemu-img snapshot -c one whole0");
    as_qemu_reads_it(folder, "whole0");
}

#[test]
fn images_that_are_not_read_are_told_in_words() {
    if !has_qemu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    base(folder);
    let refused = |name: &str| DiskImage::open(folder.join(name)).unwrap_err();
    run(
        folder,
        "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on external 1M",
    );
    assert!(refused("external").to_string().contains("in another file"));
    run(
        folder,
        "qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 secret 1M",
    );
    assert!(refused("secret").to_string().contains("encrypted"));
    // Over itself, at once and by another; over one that is gone; over what is no file.
    run(folder, "qemu-img create -q -f qcow2 a 1M");
    run(folder, "qemu-img create -q -f qcow2 -F qcow2 -b a b");
    run(folder, "qemu-img rebase -u -F qcow2 -b b a");
    for name in ["a", "b"] {
        let error = refused(name);
        assert!(matches!(error, DumpError::Base { .. }), "{error}");
        assert!(error.to_string().contains("over itself"), "{error}");
    }
    run(folder, "qemu-img rebase -u -F raw -b gone a");
    assert!(matches!(refused("b"), DumpError::Io { .. }));
    run(folder, "qemu-img rebase -u -F raw -b nbd://localhost/x a");
    assert!(refused("a").to_string().contains("in no file"));
    run(folder, "mkfifo pipe");
    run(folder, "qemu-img rebase -u -F raw -b pipe a");
    assert!(refused("a").to_string().contains("neither a regular file"));
    run(folder, "qemu-img rebase -u -F vmdk -b base a");
    assert!(refused("a").to_string().contains("neither qcow2 nor raw"));
    run(folder, "qemu-img rebase -u -F qcow2 -b base a");
    assert!(matches!(refused("a"), DumpError::Malformed { .. }));
    // A chain without end, of different files.
    for number in 0..70 {
        let below = if number == 0 {
            "base".into()
        } else {
            format!("c{}", number - 1)
        };
        let format = if number == 0 { "raw" } else { "qcow2" };
        run(
            folder,
            &format!("qemu-img create -q -u -f qcow2 -F {format} -b {below} c{number} 1M"),
        );
    }
    DiskImage::open(folder.join("c60")).unwrap();
    assert!(refused("c69").to_string().contains("more images"));
    // A guest that writes a header on its raw disk makes no image of it.
    let forged = fs::read(folder.join("b")).unwrap();
    fs::write(folder.join("forged"), &forged).unwrap();
    run(
        folder,
        "qemu-img create -q -u -f qcow2 -F raw -b forged d 1M",
    );
    assert!(all_of(&DiskImage::open(folder.join("d")).unwrap())[..forged.len()] == forged);
}

/// An image of clusters of 512 bytes with a disk of 64 KiB: header, table of tables, two tables, data.
fn small() -> Vec<u8> {
    let mut out = b"QFI\xfb\0\0\0\x03".to_vec();
    out.extend([0; 12]);
    out.extend(9_u32.to_be_bytes());
    out.extend((64_u64 << 10).to_be_bytes());
    out.extend([0; 4]);
    out.extend(2_u32.to_be_bytes());
    out.extend(512_u64.to_be_bytes());
    out.resize(100, 0);
    out.extend(104_u32.to_be_bytes());
    out.resize(512, 0);
    out.extend((1_u64 << 63 | 1024).to_be_bytes());
    out.extend((1_u64 << 63 | 1536).to_be_bytes());
    out.resize(1024, 0);
    for cluster in 0..128_u64 {
        let entry = match cluster % 4 {
            0 => 1 << 63 | (2048 + 512 * (cluster / 4)),
            1 => 1,
            2 => 0,
            _ => 1 << 62 | 2048,
        };
        out.extend(entry.to_be_bytes());
    }
    out.resize(2048 + 512 * 32, 0x5a);
    out
}

/// The same over the image `base`, whose format stands behind so many other extensions.
fn over(name: &[u8], others: usize, format: &[u8]) -> Vec<u8> {
    let mut out = small();
    out.resize(20_000, 0);
    for _ in 0..others {
        out.extend([0x12, 0x34, 0x56, 0x78, 0, 0, 0, 0]);
    }
    out.extend(0xe279_2aca_u32.to_be_bytes());
    out.extend((format.len() as u32).to_be_bytes());
    out.extend(format);
    out.resize(out.len().next_multiple_of(8) + 8, 0);
    out[100..104].copy_from_slice(&20_000_u32.to_be_bytes());
    let at = out.len() as u64;
    out[8..16].copy_from_slice(&at.to_be_bytes());
    out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    out.extend(name);
    out
}

#[test]
fn what_an_image_says_of_the_one_below_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    fs::write(&base, small()).unwrap();
    let open = |bytes: &[u8]| {
        let path = folder.path().join("image");
        fs::write(&path, bytes).unwrap();
        DiskImage::open(&path)
    };
    // Whether what is below is read as raw, of which the third cluster has the tables.
    let is_raw = |others, format: &[u8]| {
        let disk = open(&over(b"base", others, format)).unwrap();
        let mut cluster = [0; 512];
        disk.read_disk(&mut cluster, DiskOffset::new(1024)).unwrap();
        cluster == small()[1024..1536]
    };
    assert!(is_raw(0, b"raw") && is_raw(63, b"raw"));
    assert!(!is_raw(64, b"raw") && !is_raw(0, b"qcow2"));
    // A longer name of a format is none.
    assert!(!is_raw(0, b"a format that nobody has"));
    let refused = open(&over(b"base", 0, b"sixteen letters.")).unwrap_err();
    assert!(
        refused.to_string().contains("neither qcow2 nor raw"),
        "{refused}"
    );
    let name = |len: usize| [b"./".repeat((len - 4) / 2), b"base".to_vec()].concat();
    assert!(open(&over(&name(1022), 0, b"raw")).is_ok());
    let refused = |bytes: &[u8], expected: &str| {
        let refused = open(bytes).unwrap_err();
        assert!(matches!(refused, DumpError::Malformed { .. }), "{refused}");
        assert!(refused.to_string().ends_with(expected), "{refused}");
    };
    let of_length = "a backing file name whose length is not from 1 to 1023 at offset 0x10";
    for (name, found) in [(name(1024), "0x400"), (Vec::new(), "0x0")] {
        let expected = format!("{of_length} (value {found})");
        refused(&over(&name, 0, b"raw"), &expected);
    }
    let mut beyond = over(b"base", 0, b"raw");
    beyond[8..16].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    refused(
        &beyond,
        "a backing file name beyond the end of the file at offset 0x8 (value 0x10000000000)",
    );
    for len in [0, 1 << 63] {
        let mut disk = small();
        disk[24..32].copy_from_slice(&u64::to_be_bytes(len));
        let size = "a virtual disk size that is not from 1 to 2^63 - 1 at offset 0x18";
        refused(&disk, &format!("{size} (value {len:#x})"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damaged_images_are_read_or_refused(
        changes in proptest::collection::vec((0_usize..2048, any::<u8>()), 1..6),
        cut in 0_usize..20_000,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut bytes = small();
        for (at, byte) in changes {
            // Not what leads to other files.
            if !(8..20).contains(&at) {
                bytes[at] = byte;
            }
        }
        bytes.truncate(cut.max(8));
        fs::write(&path, &bytes).unwrap();
        if let Ok(disk) = DiskImage::open(&path) {
            let mut part = vec![0; 3000];
            for at in [0, 1, 500, 40_000, 65_000, 1 << 40] {
                let _ = disk.read_disk(&mut part, DiskOffset::new(at));
                let _ = disk.next_disk_data(DiskOffset::new(at));
            }
        }
    }
}

/// Xen's backends write past the page cache of a device; here what is below a loop device does.
#[test]
fn a_device_is_read_past_what_the_system_has_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("below");
    fs::write(&path, pattern(3, MIB)).unwrap();
    let made = Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&path)
        .output();
    let made = made.ok().filter(|made| made.status.success());
    if !sonicshot_testkit::has("loop devices", made.is_some()) {
        return;
    }
    let device = String::from_utf8(made.unwrap().stdout).unwrap();
    let device = Path::new(device.trim_end());
    // Whoever has it open keeps what was read of it.
    let holder = File::open(device).unwrap();
    let read = || {
        let mut bytes = vec![0; MIB];
        holder.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = read();
    let below = File::options().write(true).open(&path).unwrap();
    below.write_all_at(&pattern(7, MIB), 0).unwrap();
    let cached = read();
    let opened = DiskImage::open(device).map(|disk| all_of(&disk));
    drop(holder);
    let done = Command::new("losetup").arg("--detach").arg(device).status();
    assert!(done.unwrap().success());
    assert!(before == pattern(3, MIB) && cached == before);
    assert!(opened.unwrap() == pattern(7, MIB));
}
