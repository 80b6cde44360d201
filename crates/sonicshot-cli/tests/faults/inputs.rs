//! One memory in every format that is read, and every command on each.

use super::common::{ram, testdata};
use super::tracer::Spec;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tempfile::TempDir;

const PAGE: usize = 4096;

/// Files in memory, if the machine has a place for them: thousands of runs wait for no disk.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    match TempDir::new_in(memory) {
        Ok(folder) => folder,
        Err(_) => TempDir::new().unwrap(),
    }
}

/// 128 pages: zeroes, pages that occur twice, words, and what does not compress.
fn small_ram() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let page = |number: usize| -> Vec<u8> {
        match number % 8 {
            0 | 1 => vec![0; PAGE],
            2 => vec![0x55; PAGE],
            3 => b"the same page twice "[..16].repeat(PAGE / 16),
            4 => (0..PAGE)
                .map(|at| (at / 7 + number).to_le_bytes()[0])
                .collect(),
            _ => {
                let words = std::iter::repeat_with(|| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()
                });
                words.take(PAGE / 8).flatten().collect()
            }
        }
    };
    (0..128).flat_map(page).collect()
}

/// The real guest with one of eight of the pages that no kernel needs, the others zero: a run that
/// copies less takes less time, and goes the same way.
fn thinned_ram() -> Vec<u8> {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let mut thinned = ram().to_vec();
    write_sparse(&at("raw"), None, &thinned);
    let line = ["inspect", "raw", "--pfns", "classes"];
    let spec = Spec {
        args: line.iter().map(OsString::from).collect(),
        folder: folder.path().into(),
        ..Spec::default()
    };
    let run = spec.run();
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for (first, last, class) in super::common::read_pfns(&at("classes")) {
        let is_content = ["free", "anonymous", "page_cache", "shmem"]
            .iter()
            .any(|begin| class.starts_with(begin));
        for frame in (first..=last).filter(|frame| is_content && frame % 8 != 0) {
            let start = usize::try_from(frame).unwrap() * PAGE;
            thinned[start..start + PAGE].fill(0);
        }
    }
    thinned
}

pub fn name(out: &mut Vec<u8>, name: &str) {
    out.push(u8::try_from(name.len()).unwrap());
    out.extend(name.as_bytes());
}

pub fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// QEMU's migration stream.
pub fn stream(ram: &[u8]) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram".to_vec();
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((ram.len() as u64 | 4).to_be_bytes());
    name(&mut out, "pc.ram");
    out.extend((ram.len() as u64).to_be_bytes());
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    out.extend(end);
    out.extend(b"\x03\0\0\0\x02");
    for (number, page) in ram.chunks(PAGE).enumerate() {
        let again = if number == 0 { 0 } else { 0x20 };
        let flags = if is_zero(page) { 2 } else { 8 } | again;
        out.extend(((number * PAGE) as u64 | flags).to_be_bytes());
        if number == 0 {
            name(&mut out, "pc.ram");
        }
        if is_zero(page) {
            out.push(0);
        } else {
            out.extend(page);
        }
    }
    out.extend(end);
    out.extend(b"\x04the devices' state");
    out
}

pub fn libvirt(format: u8, content: &[u8]) -> Vec<u8> {
    let xml = b"<domain type='qemu'/>\0";
    let mut out = b"LibvirtQemudSave".to_vec();
    for word in [2, u8::try_from(xml.len()).unwrap(), 1, format, 0] {
        out.extend([word, 0, 0, 0]);
    }
    out.resize(92, 0);
    out.extend(xml);
    out.extend(content);
    out
}

fn record(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    out.extend(body);
    out.resize(out.len() + body.len().next_multiple_of(8) - body.len(), 0);
}

/// An image as `xl save` writes it of an HVM guest.
fn xen(ram: &[u8]) -> Vec<u8> {
    let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
    out.extend([4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0]);
    out.extend(b"{json:}LibxlFmt\0\0\0\x02\0\0\0\0");
    record(&mut out, 1, &[]);
    out.extend([0xff; 8]);
    out.extend(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0");
    out.extend([2, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0]);
    record(&mut out, 0x11, b"CPUID");
    record(&mut out, 0x10, &[]);
    for (number, pages) in ram.chunks(1024 * PAGE).enumerate() {
        let count = pages.len() / PAGE;
        let mut body = (count as u64).to_le_bytes().to_vec();
        for index in 0..count {
            body.extend(((number * 1024 + index) as u64).to_le_bytes());
        }
        body.extend(pages);
        record(&mut out, 1, &body);
    }
    record(&mut out, 9, b"HVM context");
    record(&mut out, 0, &[]);
    record(&mut out, 3, b"QEMU's state");
    record(&mut out, 0, &[]);
    out
}

fn lime(ram: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let half = ram.len() / 2;
    for (number, part) in ram.chunks(half).enumerate() {
        out.extend(0x4c69_4d45_u32.to_le_bytes());
        out.extend(1_u32.to_le_bytes());
        let start = number * half;
        for word in [start, start + part.len() - 1, 0] {
            out.extend((word as u64).to_le_bytes());
        }
        out.extend(part);
    }
    out
}

/// Pages that are not those of `base`, in a sparse file.
fn write_sparse(path: &Path, base: Option<&[u8]>, ram: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(ram.len() as u64).unwrap();
    let zero = [0; PAGE];
    for (number, page) in ram.chunks(PAGE).enumerate() {
        let old = base.map_or(&zero[..], |base| &base[number * PAGE..][..PAGE]);
        if old != page {
            file.write_all_at(page, (number * PAGE) as u64).unwrap();
        }
    }
}

/// A memory in every format.
#[derive(Debug)]
pub struct Inputs {
    folder: TempDir,
}

impl Inputs {
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Of memory that no kernel is in, half a mebibyte: a run takes milliseconds.
    pub fn small() -> Arc<Self> {
        static SMALL: Mutex<Weak<Inputs>> = Mutex::new(Weak::new());
        Self::shared(&SMALL, || Self::make(&small_ram(), true))
    }

    /// Of the real guest.
    pub fn guest() -> Arc<Self> {
        static GUEST: Mutex<Weak<Inputs>> = Mutex::new(Weak::new());
        Self::shared(&GUEST, || Self::make(&thinned_ram(), false))
    }

    /// Those of a test that still uses them: the last one takes them away.
    fn shared(there: &Mutex<Weak<Self>>, make: impl FnOnce() -> Self) -> Arc<Self> {
        let mut there = there.lock().unwrap_or_else(PoisonError::into_inner);
        there.upgrade().unwrap_or_else(|| {
            let made = Arc::new(make());
            *there = Arc::downgrade(&made);
            made
        })
    }

    fn make(ram: &[u8], small: bool) -> Self {
        let inputs = Self { folder: scratch() };
        let at = |name: &str| inputs.path(name);
        write_sparse(&at("raw"), None, ram);
        fs::write(at("stream"), stream(ram)).unwrap();
        let content = stream(ram);
        fs::write(at("libvirt"), libvirt(0, &content)).unwrap();
        let packed = zstd::encode_all(&content[..], 1).unwrap();
        fs::write(at("libvirt-zstd"), libvirt(5, &packed)).unwrap();
        fs::write(at("xen"), xen(ram)).unwrap();
        fs::write(at("lime"), lime(ram)).unwrap();
        fs::write(at("blob"), vec![7; 20_000]).unwrap();
        let convert = |from: &str, to: &str, format: &str, more: &[&str]| {
            let out = at(to);
            let mut args: Vec<OsString> = vec!["convert".into(), at(from).into(), "-o".into()];
            args.extend([out.into(), "--to".into(), format.into()]);
            args.extend(more.iter().map(OsString::from));
            inputs.must(args);
        };
        convert("stream", "mapped", "mapped-ram", &[]);
        convert("raw", "elf", "elf", &[]);
        convert("raw", "kdump", "kdump", &[]);
        for (name, how) in [
            ("sonic", "zstd"),
            ("sonic-lz4", "lz4"),
            ("sonic-none", "none"),
        ] {
            let mut args: Vec<OsString> = vec!["save".into(), at("xen").into(), "-o".into()];
            args.extend([at(name).into(), "--compress".into(), how.into()]);
            args.push("--blob".into());
            args.push(format!("state={}", at("blob").display()).into());
            args.extend(["--keep-all".into(), "--chunk".into(), "32".into()]);
            inputs.must(args);
        }
        // A diff with the upper quarter, over a base without it.
        let from = ram.len() / 4 * 3;
        let mut base = ram.to_vec();
        base[from..].fill(0);
        write_sparse(&at("base"), None, &base);
        write_sparse(&at("diff"), Some(&base), ram);
        if small {
            let avml = testdata().join("../../fuzz/corpus/avml/two_blocks");
            fs::copy(avml, at("avml")).unwrap();
        }
        inputs.folders(ram);
        let kdump = fs::read(at("kdump")).unwrap();
        super::made::all(inputs.folder.path(), ram, &kdump);
        if small {
            super::made::symbols(inputs.folder.path());
        }
        inputs
    }

    /// Snapshot folders of Cloud Hypervisor, Firecracker and crosvm.
    fn folders(&self, ram: &[u8]) {
        let folder = self.path("ch");
        fs::create_dir(&folder).unwrap();
        let ranges =
            serde_json::json!({"memory_ranges": {"data": [{"gpa": 0, "length": ram.len()}]}});
        let state = serde_json::json!({
            "snapshots": {
                "device-manager": {"snapshots": {}, "snapshot_data": null},
                "memory-manager": {"snapshots": {}, "snapshot_data": {"state": ranges.to_string()}},
            },
            "snapshot_data": {"state": "{}"},
        });
        fs::write(folder.join("state.json"), state.to_string()).unwrap();
        let config = serde_json::json!({"memory": {"size": ram.len(), "zones": null}});
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        write_sparse(&folder.join("memory-ranges"), None, ram);
        let folder = self.path("fc");
        fs::create_dir(&folder).unwrap();
        let mut state = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
        state.extend([3; 1000]);
        fs::write(folder.join("vm.state"), state).unwrap();
        write_sparse(&folder.join("vm.mem"), None, ram);
        let folder = self.path("crosvm");
        fs::create_dir_all(folder.join("vcpu")).unwrap();
        fs::write(folder.join("vcpu/0"), b"registers").unwrap();
        let regions = serde_json::json!({"regions": [
            {"guest_base": 0, "size": ram.len(), "data_ranges": [{"start": 0, "end": ram.len()}]},
        ]});
        fs::write(folder.join("mem_metadata"), regions.to_string()).unwrap();
        write_sparse(&folder.join("mem"), None, ram);
    }

    fn must(&self, args: Vec<OsString>) {
        let folder = self.folder.path().to_owned();
        let spec = Spec {
            args,
            folder,
            ..Spec::default()
        };
        let run = spec.run();
        assert_eq!(run.code, Some(0), "{:?}: {}", spec.args, run.stderr);
    }
}

/// A command on one input.
#[derive(Debug)]
pub struct Job {
    pub name: String,
    inputs: Arc<Inputs>,
    /// `{NAME}` is an input, `{work}` the folder that outputs go to.
    line: String,
    /// The input that is changed in place, or that is there to be replaced.
    pub prepared: Option<(&'static str, &'static str)>,
    pub stdin: Option<&'static str>,
    /// The file system knows no files without a name.
    pub names_only: bool,
}

/// The content of a folder: that of each file.
pub type Content = BTreeMap<PathBuf, Vec<u8>>;

impl Job {
    fn new(inputs: &Arc<Inputs>, name: &str, line: &str) -> Self {
        Self {
            name: name.into(),
            inputs: Arc::clone(inputs),
            line: line.into(),
            prepared: None,
            stdin: None,
            names_only: false,
        }
    }

    /// The command line in an empty folder, where it is made ready.
    pub fn spec(&self, work: &Path) -> Spec {
        self.spec_of(self.inputs.folder.path(), work)
    }

    /// The same, on inputs that are in a folder of their own.
    fn spec_of(&self, inputs: &Path, work: &Path) -> Spec {
        if let Some((from, to)) = self.prepared {
            copy(&self.inputs.path(from), &work.join(to));
        }
        let word = |word: &str| -> OsString {
            let mut out = String::new();
            let mut rest = word;
            while let Some((before, after)) = rest.split_once('{') {
                let (name, after) = after.split_once('}').unwrap();
                let path = match name {
                    "work" => work.to_owned(),
                    name => inputs.join(name),
                };
                out.push_str(before);
                out.push_str(path.to_str().unwrap());
                rest = after;
            }
            out.push_str(rest);
            out.into()
        };
        Spec {
            args: self.line.split(' ').map(word).collect(),
            stdin: self.stdin.map(|name| inputs.join(name)),
            folder: work.into(),
            env: vec![("TMPDIR", work.as_os_str().to_owned())],
            names_only: self.names_only,
            ..Spec::default()
        }
    }

    /// Whether what it writes is a folder, which has a name from the start.
    pub fn writes_folder(&self) -> bool {
        ["{ch} -o", "{fc} -o", "{crosvm} -o"]
            .iter()
            .any(|part| self.line.contains(part))
    }

    /// Whether it writes more than one output, each by itself.
    pub fn has_several(&self) -> bool {
        self.line.split(' ').any(|word| word == "{work}")
    }

    /// The inputs that it names.
    fn named(&self) -> impl Iterator<Item = &str> {
        let parts = self.line.split('{').skip(1);
        let names = parts.filter_map(|part| Some(part.split_once('}')?.0));
        names.filter(|name| *name != "work").chain(self.stdin)
    }

    /// The file that is pruned in place.
    pub fn in_place(&self) -> Option<&str> {
        let (from, to) = self.prepared?;
        (to == "in").then_some(from)
    }

    /// The same command line, on a copy of all of its inputs.
    pub fn spec_of_copy(&self, copies: &Path, work: &Path) -> Spec {
        for name in self.named().collect::<BTreeSet<_>>() {
            copy(&self.inputs.path(name), &copies.join(name));
        }
        self.spec_of(copies, work)
    }

    /// The files that may be changed under it: whether they are in the folder of the work, and
    /// where there.
    pub fn changed_files(&self) -> Vec<(bool, PathBuf)> {
        let files = |input: &str, name: &str| -> Vec<PathBuf> {
            let parts: &[&str] = match input {
                "ch" => &["memory-ranges", "state.json", "config.json"],
                "fc" => &["vm.mem", "vm.state"],
                "crosvm" => &["mem", "mem_metadata", "vcpu/0"],
                "vmware" => &["vm.vmem", "vm.vmss"],
                _ => &[""],
            };
            let path = |part: &&str| match *part {
                "" => name.into(),
                part => Path::new(name).join(part),
            };
            parts.iter().map(path).collect()
        };
        let named: BTreeSet<_> = self.named().collect();
        let of_copy = named.into_iter().flat_map(|name| files(name, name));
        let in_place = self.in_place().map(|from| files(from, "in"));
        of_copy
            .map(|path| (false, path))
            .chain(in_place.into_iter().flatten().map(|path| (true, path)))
            .collect()
    }

    /// The inputs that must not be changed.
    pub fn inputs(&self) -> &Path {
        self.inputs.folder.path()
    }
}

/// A file and its holes, or a folder.
pub fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &to.join(entry.file_name()));
        }
        return;
    }
    let bytes = fs::read(from).unwrap();
    if bytes.len().is_multiple_of(PAGE) {
        write_sparse(to, None, &bytes);
    } else {
        File::create(to).unwrap().write_all(&bytes).unwrap();
    }
}

/// Everything under a folder.
pub fn content(folder: &Path) -> Content {
    let mut out = Content::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_owned();
                out.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    out
}

/// Commands that need no kernel, on every format.
pub fn small_jobs() -> Vec<Job> {
    let inputs = Inputs::small();
    let all = [
        of_formats(&inputs),
        to_kdump(&inputs),
        of_made(&inputs),
        zeroes_alone(&inputs),
        of_checkpoints(&inputs),
        of_several_files(&inputs),
        by_names_only(&inputs),
    ];
    all.into_iter().flatten().collect()
}

/// Each format made another one.
fn of_formats(inputs: &Arc<Inputs>) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut job = |name: &str, line: &str| jobs.push(Job::new(inputs, name, line));
    for from in [
        "raw",
        "elf",
        "kdump",
        "mapped",
        "stream",
        "libvirt",
        "libvirt-zstd",
        "xen",
        "lime",
        "avml",
        "ch",
        "crosvm",
        "sonic",
    ] {
        // No kernel tells where QEMU's blocks of memory lie.
        let blocks = ["mapped", "stream", "libvirt", "libvirt-zstd"].contains(&from);
        let layout = if blocks { " --layout 0x0-0x80000" } else { "" };
        for to in ["raw", "elf", "kdump", "sonic"] {
            let line = format!("convert {{{from}}} -o {{work}}/out --to {to}{layout}");
            job(&format!("convert {from} to {to}"), &line);
        }
        if from != "sonic" {
            let line = format!("save {{{from}}} -o {{work}}/out --keep-all{layout}");
            job(&format!("save {from}"), &line);
        }
    }
    for (from, to) in [
        ("stream", "mapped-ram"),
        ("mapped", "stream"),
        ("libvirt-zstd", "mapped-ram"),
        ("xen", "xl"),
        ("sonic", "xl"),
    ] {
        let line = format!("convert {{{from}}} -o {{work}}/out --to {to}");
        job(&format!("convert {from} to {to}"), &line);
    }
    jobs
}

/// Of each packing a kdump.
fn to_kdump(inputs: &Arc<Inputs>) -> Vec<Job> {
    let job = |how: &&str| {
        let line = format!("convert {{elf}} -o {{work}}/out --to kdump --compress {how}");
        Job::new(inputs, &format!("convert elf to kdump by {how}"), &line)
    };
    ["none", "zlib", "snappy", "zstd"].iter().map(job).collect()
}

/// Files of other programs, and files that are compressed as a whole.
fn of_made(inputs: &Arc<Inputs>) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut job = |name: &str, line: &str| jobs.push(Job::new(inputs, name, line));
    for from in [
        "raw-gzip",
        "kdump-zstd",
        "raw-zip",
        "libvirt-gzip",
        "libvirt-bzip2",
        "libvirt-xz",
        "libvirt-lzop",
        "libvirt-sparse",
        "flat",
        "qcow2",
        "core",
        "vmware",
    ] {
        let blocks = from.starts_with("libvirt") || from == "qcow2";
        let layout = if blocks { " --layout 0x0-0x80000" } else { "" };
        let file = if from == "vmware" { "/vm.vmem" } else { "" };
        for to in ["raw", "elf"] {
            let line = format!("convert {{{from}}}{file} -o {{work}}/out --to {to}{layout}");
            job(&format!("convert {from} to {to}"), &line);
        }
        let line = format!("save {{{from}}}{file} -o {{work}}/out --keep-all{layout}");
        job(&format!("save {from}"), &line);
    }
    for to in ["stream", "mapped-ram"] {
        let line = format!("convert {{qcow2}} -o {{work}}/out --to {to}");
        job(&format!("convert qcow2 to {to}"), &line);
    }
    let line = "convert {vmware}/vm.vmss -o {work}/out --to raw";
    job("convert vmware by its state", line);
    let line = "symbols make {vmlinux} {map} {btf} -o {work}/out";
    job("symbols make", line);
    job("replace by symbols make", &format!("{line} --force"));
    for job in &mut jobs {
        if job.name.starts_with("replace") {
            job.prepared = Some(("blob", "out"));
        }
    }
    jobs
}

/// A prune that needs no kernel.
fn zeroes_alone(inputs: &Arc<Inputs>) -> Vec<Job> {
    let mut jobs = Vec::new();
    for from in [
        "elf",
        "kdump",
        "kdump-zstd",
        "flat",
        "mapped",
        "stream",
        "libvirt",
        "libvirt-zstd",
        "libvirt-gzip",
        "libvirt-bzip2",
        "libvirt-xz",
        "libvirt-lzop",
        "libvirt-sparse",
    ] {
        let blocks = ["mapped", "stream"].contains(&from) || from.starts_with("libvirt");
        let layout = if blocks { " --layout 0x0-0x80000" } else { "" };
        let line = format!("prune {{{from}}} -o {{work}}/out --drop zero{layout}");
        jobs.push(Job::new(inputs, &format!("zeroes of {from}"), &line));
    }
    let line = "prune {elf} {kdump} {flat} -o {work} --drop zero";
    jobs.push(Job::new(inputs, "zeroes of several", line));
    for from in ["stream", "libvirt", "libvirt-zstd"] {
        let line = "prune - -o - --drop zero --layout 0x0-0x80000";
        let mut job = Job::new(inputs, &format!("zeroes of {from}, pipe to pipe"), line);
        job.stdin = Some(from);
        jobs.push(job);
    }
    jobs
}

/// Checkpoints made dumps again, and looked at.
fn of_checkpoints(inputs: &Arc<Inputs>) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut job = |name: &str, line: &str| jobs.push(Job::new(inputs, name, line));
    for from in ["sonic", "sonic-lz4", "sonic-none"] {
        for to in ["raw", "elf", "xl"] {
            let line = format!("restore {{{from}}} -o {{work}}/out --to {to}");
            job(&format!("restore {from} to {to}"), &line);
        }
        let line = format!("verify {{{from}}} --against {{xen}}");
        job(&format!("verify {from}"), &line);
        let line = format!("inspect {{{from}}} --pfns {{work}}/out");
        job(&format!("inspect {from}"), &line);
    }
    for (name, line) in [
        ("restore from a pipe", "restore - -o {work}/out"),
        (
            "restore from a pipe to elf",
            "restore - -o {work}/out --to elf",
        ),
        ("verify from a pipe", "verify -"),
        ("inspect from a pipe", "inspect - --pfns {work}/out"),
        ("convert from a pipe", "convert - -o {work}/out --to kdump"),
    ] {
        let mut job = Job::new(inputs, name, line);
        job.stdin = Some("sonic");
        jobs.push(job);
    }
    jobs
}

/// Commands with more than one input or output.
fn of_several_files(inputs: &Arc<Inputs>) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut job = |name: &str, line: &str| jobs.push(Job::new(inputs, name, line));
    for (name, line) in [
        (
            "convert raw and a template to xl",
            "convert {raw} --template {xen} -o {work}/out --to xl",
        ),
        (
            "convert diff to raw",
            "convert {diff} --base {base} -o {work}/out --to raw",
        ),
        (
            "save to standard output",
            "save {raw} -o - --keep-all --compress lz4",
        ),
        (
            "save with a blob",
            "save {raw} -o {work}/out --keep-all --compress none --blob b={blob}",
        ),
        (
            "restore with a blob",
            "restore {sonic} -o {work}/out --blob state={work}/state",
        ),
        (
            "replace by a restore",
            "restore {sonic} -o {work}/out --force",
        ),
        (
            "replace by a save",
            "save {raw} -o {work}/out --keep-all --force",
        ),
    ] {
        job(name, line);
    }
    for from in ["raw", "stream", "libvirt-zstd", "elf"] {
        let layout = if from == "elf" {
            ""
        } else {
            " --layout 0x0-0x80000"
        };
        let line = format!("convert - -o {{work}}/out --to raw{layout}");
        let mut job = Job::new(inputs, &format!("convert {from} from a pipe"), &line);
        job.stdin = Some(from);
        jobs.push(job);
    }
    for job in jobs
        .iter_mut()
        .filter(|job| job.name.starts_with("replace"))
    {
        job.prepared = Some(("blob", "out"));
    }
    jobs
}

/// Commands of which no more than the names of the files is told.
fn by_names_only(inputs: &Arc<Inputs>) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (name, line) in [
        (
            "names only: convert",
            "convert {elf} -o {work}/out --to raw",
        ),
        ("names only: restore", "restore {sonic} -o {work}/out"),
        (
            "names only: replace",
            "save {raw} -o {work}/out --keep-all --force",
        ),
        (
            "names only: spool",
            "convert {libvirt-zstd} -o {work}/out --to raw --layout 0x0-0x80000",
        ),
    ] {
        let mut job = Job::new(inputs, name, line);
        job.names_only = true;
        if name.ends_with("replace") {
            job.prepared = Some(("blob", "out"));
        }
        jobs.push(job);
    }
    jobs
}

/// Commands that only look at every format with a guest in it.
pub fn looking_jobs() -> Vec<Job> {
    let inputs = Inputs::guest();
    let mut jobs = Vec::new();
    for from in [
        "raw",
        "elf",
        "kdump",
        "mapped",
        "stream",
        "libvirt",
        "libvirt-zstd",
        "xen",
        "lime",
        "ch",
        "fc",
        "crosvm",
        "diff",
        "raw-gzip",
        "raw-zip",
        "kdump-zstd",
        "flat",
        "core",
        "qcow2",
        "libvirt-sparse",
        "vmware",
    ] {
        let base = if from == "diff" { " --base {base}" } else { "" };
        let mut job = |name: &str, line: String| {
            jobs.push(Job::new(&inputs, &format!("{name} {from}"), &line));
        };
        let file = if from == "vmware" { "/vm.vmem" } else { "" };
        job("inspect", format!("inspect {{{from}}}{file}{base}"));
        if !["lime", "core", "qcow2", "vmware"].contains(&from) {
            job("dry run", format!("prune {{{from}}}{base} --dry-run"));
        }
        if from == "vmware" || from == "qcow2" {
            job("save", format!("save {{{from}}}{file} -o {{work}}/out"));
        }
        if from == "fc" {
            job(
                "convert",
                format!("convert {{{from}}} -o {{work}}/out --to elf"),
            );
        }
    }
    jobs
}

/// Of those that look into the guest the ones that the gate takes: by copy, in place, through a
/// pipe, a folder.
const IN_THE_GATE: [&str; 4] = [
    "prune raw",
    "prune mapped in place",
    "prune from pipe to pipe",
    "replace a folder",
];

/// A few of the commands that look into the guest.
pub fn few_guest_jobs() -> Vec<Job> {
    let mut jobs = guest_jobs();
    jobs.retain(|job| IN_THE_GATE.contains(&job.name.as_str()));
    assert_eq!(jobs.len(), IN_THE_GATE.len());
    jobs
}

/// Commands that look into the guest.
pub fn guest_jobs() -> Vec<Job> {
    let inputs = Inputs::guest();
    let mut jobs = Vec::new();
    for from in [
        "raw",
        "elf",
        "kdump",
        "mapped",
        "stream",
        "libvirt",
        "libvirt-zstd",
        "xen",
        "ch",
        "fc",
        "crosvm",
        "raw-gzip",
        "libvirt-lzop",
        "libvirt-sparse",
    ] {
        let line = format!("prune {{{from}}} -o {{work}}/out");
        jobs.push(Job::new(&inputs, &format!("prune {from}"), &line));
    }
    jobs.push(Job::new(
        &inputs,
        "prune diff",
        "prune {diff} --base {base} -o {work}/out",
    ));
    for (from, name) in [
        ("raw", "raw"),
        ("mapped", "mapped"),
        ("libvirt-sparse", "libvirt-sparse"),
        ("ch", "ch"),
        ("fc", "fc"),
        ("crosvm", "crosvm"),
    ] {
        let mut job = Job::new(
            &inputs,
            &format!("prune {name} in place"),
            "prune {work}/in --in-place",
        );
        job.prepared = Some((from, "in"));
        jobs.push(job);
    }
    let mut job = Job::new(
        &inputs,
        "prune diff in place",
        "prune {work}/in --base {base} --in-place",
    );
    job.prepared = Some(("diff", "in"));
    jobs.push(job);
    let mut job = Job::new(&inputs, "prune from pipe to pipe", "prune - -o -");
    job.stdin = Some("stream");
    jobs.push(job);
    let mut job = Job::new(
        &inputs,
        "replace by a prune",
        "prune {raw} -o {work}/out --force",
    );
    job.prepared = Some(("blob", "out"));
    jobs.push(job);
    let mut job = Job::new(
        &inputs,
        "replace a folder",
        "prune {ch} -o {work}/out --force",
    );
    job.prepared = Some(("fc", "out"));
    jobs.push(job);
    for from in ["raw", "kdump", "lime", "xen"] {
        let line = format!("inspect {{{from}}} --pfns {{work}}/out");
        jobs.push(Job::new(&inputs, &format!("inspect {from}"), &line));
    }
    jobs.push(Job::new(
        &inputs,
        "save the guest",
        "save {raw} -o {work}/out",
    ));
    let line = "prune {raw} {elf} -o {work}";
    jobs.push(Job::new(&inputs, "prune several", line));
    jobs
}
