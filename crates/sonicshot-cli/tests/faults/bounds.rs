//! Small files that describe huge guests, and contents that grow when they are unpacked: a command
//! takes a bounded part of the machine's memory and disk, whatever the file says.

use super::inputs::{libvirt, name, scratch};
use super::tracer::{Run, Spec};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use twox_hash::{XxHash3_64, XxHash3_128};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PAGE: u64 = 4096;

/// The most memory that a command may take of its own, and for each GiB of RAM that the file has data
/// for.
const MEMORY: u64 = 256 * MIB;
const MEMORY_PER_GIB: u64 = MIB;
/// No such file is worked on for longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A checkpoint of `len` bytes of RAM that are zero (`FORMAT.md`).
fn checkpoint(path: &Path, len: u64) {
    let mut header = b"\x89SONIC\r\n".to_vec();
    header.extend([1_u32, 4096].map(u32::to_le_bytes).concat());
    header.extend([0; 16]);
    header.extend(4096_u32.to_le_bytes());
    header.extend([62, 0, 2, 0]);
    header.extend([65536_u32, 1].map(u32::to_le_bytes).concat());
    header.extend([0, len].map(u64::to_le_bytes).concat());
    header.resize(4088, 0);
    header.extend(XxHash3_64::oneshot(&header).to_le_bytes());
    let mut runs = Vec::new();
    let mut first = 0;
    let frames = len / PAGE;
    while first < frames {
        let count = (frames - first).min(u32::MAX.into());
        runs.extend(first.to_le_bytes());
        runs.extend(u32::try_from(count).unwrap().to_le_bytes());
        // Class zero, content zero.
        runs.extend([5, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        first += count;
    }
    let mut index = b"SONICIDX".to_vec();
    index.extend([3_u32, 0].map(u32::to_le_bytes).concat());
    index.extend([0; 16]);
    let end = 32 + 3 * 24 + runs.len() as u64;
    for (kind, at, len) in [(1_u32, 104, runs.len() as u64), (2, end, 0), (3, end, 0)] {
        index.extend([kind, 1].map(u32::to_le_bytes).concat());
        index.extend([at, len].map(u64::to_le_bytes).concat());
    }
    index.extend(runs);
    let mut footer = (header.len() as u64).to_le_bytes().to_vec();
    footer.extend((index.len() as u64).to_le_bytes());
    footer.extend(XxHash3_64::oneshot(&index).to_le_bytes());
    footer.extend((header.len() as u64 + index.len() as u64 + 64).to_le_bytes());
    let all = [&header[..], &index, &footer].concat();
    footer.extend(XxHash3_128::oneshot(&all).to_le_bytes());
    footer.extend(XxHash3_64::oneshot(&footer).to_le_bytes());
    footer.extend(b"SONICEND");
    fs::write(path, [header, index, footer].concat()).unwrap();
}

/// A file of `len` bytes of which only these are there.
fn sparse(path: &Path, len: u64, parts: &[(u64, &[u8])]) {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    for (at, bytes) in parts {
        file.write_all_at(bytes, *at).unwrap();
    }
}

/// An ELF core of which one segment says that it is `len` long, and has a page.
fn elf(path: &Path, len: u64) {
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    out.extend([0_u64, 64, 0].map(u64::to_le_bytes).concat());
    out.extend(
        [0_u16, 0, 64, 56, 1, 0, 0, 0]
            .map(u16::to_le_bytes)
            .concat(),
    );
    out.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    out.extend([4096, 0, 0, 4096, len, 4096].map(u64::to_le_bytes).concat());
    out.resize(4096, 0);
    out.extend([7; 4096]);
    fs::write(path, out).unwrap();
}

/// The beginning of QEMU's migration of one block of `len` bytes.
fn qemu(len: u64, mapped: bool) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0".to_vec();
    if mapped {
        out.push(5);
        name(&mut out, "configuration/capabilities");
        out.extend([0, 0, 0, 1, 0, 0, 0, 1]);
        name(&mut out, "mapped-ram");
        out.extend([1, 0, 0, 0, 1]);
    } else {
        out.extend([1, 0, 0, 0, 2]);
    }
    name(&mut out, "ram");
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((len | 4).to_be_bytes());
    name(&mut out, "pc.ram");
    out.extend(len.to_be_bytes());
    out
}

fn mapped(path: &Path, len: u64) {
    let (bitmap_at, pages_at) = (8192, GIB);
    let mut head = qemu(len, true);
    head.extend(1_u32.to_be_bytes());
    head.extend([PAGE, bitmap_at, pages_at].map(u64::to_be_bytes).concat());
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01the devices' state";
    let parts: [(u64, &[u8]); 4] = [
        (0, &head),
        (bitmap_at, &[1]),
        (pages_at, &[9; 4096]),
        (pages_at + len, end),
    ];
    sparse(path, pages_at + len + end.len() as u64, &parts);
}

/// The same as a stream, of which `pages` come.
fn stream_of(len: u64, pages: impl Iterator<Item = Vec<u8>>) -> impl Iterator<Item = Vec<u8>> {
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02".to_vec();
    let mut head = qemu(len, false);
    head.extend(&end);
    head.extend(b"\x03\0\0\0\x02");
    let pages = (0_u64..).zip(pages).map(|(number, page)| {
        let (again, zero) = (u64::from(number > 0) << 5, page.is_empty());
        let flags = if zero { 2 } else { 8 };
        let mut out = ((number * PAGE) | flags | again).to_be_bytes().to_vec();
        if number == 0 {
            name(&mut out, "pc.ram");
        }
        if zero {
            out.push(0);
        }
        out.extend(page);
        out
    });
    let rest = [end, b"\x04the devices' state".to_vec()];
    std::iter::once(head).chain(pages).chain(rest)
}

fn stream(path: &Path, len: u64) {
    let pages = [vec![7; 4096], vec![], vec![8; 4096]];
    fs::write(
        path,
        stream_of(len, pages.into_iter())
            .flatten()
            .collect::<Vec<_>>(),
    )
    .unwrap();
}

fn lime(path: &Path, len: u64) {
    let mut head = [0x4c69_4d45_u32, 1].map(u32::to_le_bytes).concat();
    head.extend([0, len - 1, 0].map(u64::to_le_bytes).concat());
    sparse(path, 32 + len, &[(0, &head), (5000, b"some")]);
}

fn kdump(path: &Path, len: u64) {
    let frames = len / PAGE;
    let bitmap = frames / 8;
    let mut head = b"KDUMP   ".to_vec();
    head.extend(6_u32.to_le_bytes());
    head.resize(424, 0);
    let blocks = u32::try_from(2 * bitmap / PAGE).unwrap();
    for word in [1, 4096, 1, blocks, u32::try_from(frames - 1).unwrap()] {
        head.extend(word.to_le_bytes());
    }
    let present = 2 * PAGE;
    let descriptors = present + 2 * bitmap;
    let last = [0x80_u8];
    let all = vec![0xff; 1 << 20];
    let mut parts: Vec<(u64, &[u8])> = vec![(0, &head), (present + bitmap, &last)];
    // All frames are there, none but one is in the file.
    parts.extend((0..bitmap / MIB).map(|number| (present + number * MIB, &all[..])));
    let frames = frames.to_le_bytes();
    parts.push((PAGE + 96, &frames));
    let mut descriptor = (descriptors + PAGE).to_le_bytes().to_vec();
    descriptor.extend([4096_u32, 0].map(u32::to_le_bytes).concat());
    descriptor.extend([0; 8]);
    parts.push((descriptors, &descriptor));
    sparse(path, descriptors + 2 * PAGE, &parts);
}

/// A crosvm snapshot's memory of holes, and metadata for it: as many `item`s of the regions as go
/// into `room` bytes, by their number.
fn crosvm(path: &Path, room: u64, head: &[u8], item: impl Fn(u64) -> Vec<u8>, tail: &[u8]) {
    // So much that the longest metadata are read.
    sparse(path, 8 * GIB, &[]);
    let mut metadata = head.to_vec();
    let room = usize::try_from(room).unwrap() - tail.len();
    for number in 0.. {
        let item = item(number);
        if metadata.len() + item.len() > room {
            break;
        }
        metadata.extend(item);
    }
    // What came last ends with a comma.
    if metadata.last() == Some(&b',') {
        metadata.pop();
    }
    metadata.extend(tail);
    fs::write(path.with_file_name("mem_metadata"), metadata).unwrap();
}

/// Metadata of more regions than any guest has.
fn crosvm_regions(path: &Path, room: u64) {
    crosvm(path, room, b"{\"regions\":[", |_| b"[0,0],".to_vec(), b"]}");
}

/// Metadata that are right: every second page.
fn crosvm_ranges(path: &Path, room: u64) {
    let size = 32 * GIB;
    let head = format!(r#"{{"regions":[{{"guest_base":0,"size":{size},"data_ranges":["#);
    let range = |number: u64| {
        let start = 2 * number * PAGE;
        format!(r#"{{"start":{start},"end":{}}},"#, start + PAGE).into_bytes()
    };
    crosvm(path, room, head.as_bytes(), range, b"]}]}");
    let metadata = fs::read_to_string(path.with_file_name("mem_metadata")).unwrap();
    let ranges = metadata.matches("start").count() as u64;
    sparse(path, ranges * PAGE, &[]);
}

/// CBOR that would take many times its length if it were read into a tree.
fn crosvm_tree(path: &Path, room: u64) {
    let mut head = b"\xa2\x65other\x9a".to_vec();
    let items = room - MIB;
    head.extend(u32::try_from(items).unwrap().to_be_bytes());
    head.extend(vec![0; usize::try_from(items).unwrap()]);
    crosvm(path, room, &head, |_| vec![0; 64 << 20], b"\x67regions\x80");
}

type Make = fn(&Path, u64);

/// A file: its name, what makes it, of how many bytes of RAM; of crosvm's memory, of metadata.
const FILES: &[(&str, Make, u64)] = &[
    ("sonic", checkpoint, 1 << 50),
    (
        "raw",
        |path, len| sparse(path, len, &[(0x10_0000, b"some")]),
        TIB,
    ),
    ("elf", elf, 1 << 46),
    ("mapped", mapped, TIB),
    ("stream", stream, 8 * TIB),
    ("lime", lime, TIB),
    ("kdump", kdump, 32 * GIB),
    // The longest that are read.
    ("mem", crosvm_regions, 64 * MIB),
    ("mem", crosvm_tree, 64 * MIB),
    ("mem", crosvm_ranges, 64 * MIB),
];

/// The commands that are run on each file.
const LINES: &[&str] = &[
    "inspect {file}",
    "prune {file} -o out",
    "save {file} --keep-all -o out",
    "convert {file} --to raw -o out",
    "convert {file} --to elf -o out",
    "convert {file} --to kdump -o out",
    "convert {file} --to sonic -o out",
    "restore {file} -o out",
    "verify {file}",
];

/// Cases that are known to take more, or not to end, and how they end. This may only get shorter.
const KNOWN: &[(&str, &str)] = &[];

fn spec(folder: &Path, line: &str, file: &str, layout: &str) -> Spec {
    let mut args: Vec<OsString> = Vec::new();
    for word in line.split(' ') {
        args.push(if word == "{file}" {
            file.into()
        } else {
            word.into()
        });
    }
    if ["mapped", "stream"].contains(&file) && !line.starts_with("verify") {
        args.extend(["--layout".into(), layout.into()]);
    }
    Spec {
        args,
        folder: folder.into(),
        env: vec![("TMPDIR", folder.into())],
        memory: Some(MEMORY),
        patience: Some(PATIENCE),
        ..Spec::default()
    }
}

/// The fault in how a command ended, if there is one.
fn objection(run: &Run) -> Option<String> {
    if run.timed_out {
        return Some("does not end".into());
    }
    if let Some(signal) = run.signal {
        return Some(format!("signal {signal}: {}", run.stderr.trim()));
    }
    match run.code {
        Some(0) => None,
        Some(1..=5) if run.stderr.contains("error: ") => None,
        code => Some(format!("exit {code:?}: {}", run.stderr.trim())),
    }
}

#[test]
fn memory_is_bounded_whatever_the_file_says() {
    let folder = scratch();
    let mut found = Vec::new();
    for (name, make, len) in FILES {
        let path = folder.path().join(name);
        make(&path, *len);
        let layout = format!("0x0-{len:#x}");
        for line in LINES {
            if *name != "sonic" && (line.starts_with("restore") || line.starts_with("verify")) {
                continue;
            }
            if *name == "sonic" && (line.starts_with("save") || line.starts_with("prune")) {
                continue;
            }
            // A descriptor for each page of zeroes would fill the disk.
            if line.contains("kdump") && !["sonic", "kdump"].contains(name) {
                continue;
            }
            let run = spec(folder.path(), line, name, &layout).run();
            let _ = fs::remove_file(folder.path().join("out"));
            let said = run.stderr.lines().next().unwrap_or_default();
            println!(
                "{name:8} {line:34} exit {:?} signal {:?}, {} MiB resident at most, {:.1} s: {said}",
                run.code,
                run.signal,
                run.peak / MIB,
                run.took.as_secs_f64()
            );
            if let Some(what) = objection(&run) {
                found.push((*name, *line, what));
            }
        }
        fs::remove_file(path).unwrap();
    }
    for (name, line, what) in &found {
        assert!(KNOWN.contains(&(name, line)), "{name}: {line}: {what}");
    }
    for (name, line) in KNOWN {
        assert!(
            found.iter().any(|(n, l, _)| (n, l) == (name, line)),
            "{name}: {line} is mended: take it off the list"
        );
    }
}

#[test]
fn a_sparse_file_of_16_tib_is_saved() {
    let folder = scratch();
    sparse(
        &folder.path().join("raw"),
        16 * TIB,
        &[(0x10_0000, b"some")],
    );
    let run = spec(folder.path(), "save {file} --keep-all -o out", "raw", "").run();
    assert_eq!((run.code, run.signal), (Some(0), None), "{}", run.stderr);
}

/// A libvirt image of a guest that has `ram` bytes, whose content goes on for `len` bytes.
fn bomb(path: &Path, ram: u64, len: u64) {
    let page: Vec<u8> = (0..4096_u32)
        .map(|at| (at * 7 + 1).to_le_bytes()[0])
        .collect();
    let pages = (0..len / PAGE).map(|_| page.clone());
    let mut packed = zstd::stream::write::Encoder::new(libvirt_file(path), 1).unwrap();
    for part in stream_of(ram, pages) {
        packed.write_all(&part).unwrap();
    }
    packed.finish().unwrap();
}

fn libvirt_file(path: &Path) -> File {
    let mut file = File::create(path).unwrap();
    file.write_all(&libvirt(5, &[])).unwrap();
    file
}

#[test]
fn what_is_unpacked_takes_no_more_disk_than_the_guest_has_ram() {
    let folder = scratch();
    let path = folder.path().join("bomb");
    bomb(&path, MIB, GIB);
    assert!(fs::metadata(&path).unwrap().len() < 4 * MIB);
    for line in [
        "inspect {file}",
        "convert {file} --to raw -o out",
        "prune {file} -o out",
    ] {
        let mut spec = spec(folder.path(), line, "bomb", "");
        // Whoever writes behind it gets a signal.
        spec.longest = Some(32 * MIB);
        let run = spec.run();
        assert_eq!(
            (run.code, run.signal),
            (Some(3), None),
            "{line}: {}",
            run.stderr
        );
        assert!(run.stderr.contains("more than"), "{line}: {}", run.stderr);
        assert!(!folder.path().join("out").exists());
    }
}

/// A file system in memory of so many mebibytes, mounted for as long as it lives.
struct Small(TempDir);

impl Small {
    /// Only root may mount.
    fn mount(mebibytes: u64) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let size = format!("size={mebibytes}M");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .output();
        let mounted = mount.is_ok_and(|run| run.status.success());
        sonicshot_testkit::has("tmpfs, or root to mount it", mounted).then(|| Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// An input of unknown length takes half of the free room, and gives it back; zeroes take none.
#[test]
fn a_pipe_takes_half_of_the_disk_that_is_free() {
    let Some(small) = Small::mount(64) else {
        return;
    };
    let (code, said) = endless(&["inspect", "-"], small.path());
    assert_eq!(code, Some(1), "{said}");
    let half = "standard input expands to more than";
    assert!(said.contains(half), "{said}");
    let spec = Spec {
        args: ["inspect", "-"].map(OsString::from).into(),
        stdin: Some("/dev/zero".into()),
        patience: Some(PATIENCE),
        ..spec(small.path(), "", "", "")
    };
    let run = spec.run();
    assert_eq!((run.code, run.signal), (Some(1), None), "{}", run.stderr);
    assert!(run.stderr.contains(half), "{}", run.stderr);
    // More may be allowed than there is.
    let (code, said) = endless(&["inspect", "-", "--max-size", "1G"], small.path());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("No space left"), "{said}");
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0);
}

/// Nor does a header take more than there is that claims so.
#[test]
fn a_header_takes_no_more_of_the_disk_than_is_free() {
    let Some(small) = Small::mount(32) else {
        return;
    };
    let path = small.path().join("claims");
    bomb(&path, 256 * MIB, 64 * MIB);
    let spec = spec(small.path(), "inspect {file}", "claims", "");
    let run = spec.run();
    assert_eq!((run.code, run.signal), (Some(1), None), "{}", run.stderr);
    assert!(run.stderr.contains("but a sixteenth"), "{}", run.stderr);
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 1);
}

/// A disk that is full is no fault of the file: exit 1, the words of the system, no output.
#[test]
fn a_full_disk_is_told_as_one() {
    let Some(small) = Small::mount(1) else { return };
    let inputs = scratch();
    let mut draw = super::kills::Draw::new(5);
    let noise: Vec<u8> = (0..4 * MIB / 8)
        .flat_map(|_| draw.below(u64::MAX).to_le_bytes())
        .collect();
    fs::write(inputs.path().join("raw"), &noise).unwrap();
    let run = |line: &str, folder: &Path| {
        let mut spec = spec(folder, line, "", "");
        spec.memory = None;
        for arg in &mut spec.args {
            if let Some(name) = arg.to_str().and_then(|arg| arg.strip_prefix("in/")) {
                *arg = inputs.path().join(name).into();
            }
        }
        spec.run()
    };
    for (line, name) in [
        (
            "save in/raw --keep-all --compress none -o in/sonic",
            "sonic",
        ),
        ("convert in/raw --to elf -o in/elf", "elf"),
    ] {
        let run = run(line, inputs.path());
        assert_eq!(run.code, Some(0), "{line}: {}", run.stderr);
        assert!(inputs.path().join(name).exists());
    }
    for line in [
        "restore in/sonic -o out",
        "restore in/sonic --to elf -o out",
        "convert in/sonic --to raw -o out",
        "convert in/raw --to elf -o out",
        "convert in/elf --to kdump -o out",
        "convert in/raw --to sonic -o out",
        "save in/raw --keep-all -o out",
        "prune in/elf --drop zero -o out",
    ] {
        let run = run(line, small.path());
        assert_eq!(
            (run.code, run.signal),
            (Some(1), None),
            "{line}: {}",
            run.stderr
        );
        assert!(
            run.stderr.contains("No space left"),
            "{line}: {}",
            run.stderr
        );
        // The output that is written is named first, and no input is blamed.
        let names_it = ["error: writing out\n", "error: out\n  because: writing "]
            .iter()
            .any(|words| run.stderr.contains(words));
        assert!(names_it, "{line}: {}", run.stderr);
        assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0, "{line}");
    }
}

/// A symbol file of holes takes no memory and no disk, one that is longer than any is not read.
#[test]
fn a_symbol_file_of_holes_is_refused_at_no_cost() {
    let Some(small) = Small::mount(8) else { return };
    let inputs = scratch();
    sparse(
        &inputs.path().join("raw"),
        64 * MIB,
        &[(0x10_0000, b"some")],
    );
    for len in [GIB, TIB] {
        let head = b"\x7fELF\x02\x01\x01";
        let symbols = inputs.path().join("vmlinux");
        sparse(&symbols, len, &[(0, head)]);
        let mut spec = spec(inputs.path(), "inspect raw --symbols vmlinux", "", "");
        spec.env = vec![("TMPDIR", small.path().into())];
        let run = spec.run();
        assert_eq!((run.code, run.signal), (Some(4), None), "{}", run.stderr);
        assert!(run.stderr.contains("vmlinux"), "{}", run.stderr);
        assert!(run.peak < MEMORY, "{}", run.peak);
    }
}

/// Runs the command with a pipe that never ends, as `yes | sonicshot` does.
fn endless(args: &[&str], folder: &Path) -> (Option<i32>, String) {
    let mut child = Command::new(super::tracer::binary())
        .args(args)
        .env("TMPDIR", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let piece: Vec<u8> = (0_u32..1 << 20)
        .map(|at| (at % 251).to_le_bytes()[0])
        .collect();
    let mut written = 0;
    while written < 8 * GIB && stdin.write_all(&piece).is_ok() {
        written += piece.len() as u64;
    }
    drop(stdin);
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    (child.wait().unwrap().code(), said)
}

#[test]
fn a_pipe_without_an_end_is_given_up() {
    let folder = scratch();
    let (code, said) = endless(&["inspect", "-", "--max-size", "64M"], folder.path());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("more than"), "{said}");
    assert!(said.contains("--max-size"), "{said}");
}
