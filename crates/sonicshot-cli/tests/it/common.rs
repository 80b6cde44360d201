//! The real guest in testdata, unpacked once for all tests.

use jsonschema::Validator;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Bits of `/proc/kpageflags` (include/uapi/linux/kernel-page-flags.h).
pub const KPF_SLAB: u64 = 1 << 7;
pub const KPF_BUDDY: u64 = 1 << 10;
pub const KPF_ANON: u64 = 1 << 12;
pub const KPF_LRU: u64 = 1 << 5;
pub const KPF_MMAP: u64 = 1 << 11;
pub const KPF_DIRTY: u64 = 1 << 4;
pub const KPF_PGTABLE: u64 = 1 << 26;
pub const KPF_RESERVED: u64 = 1 << 32;
pub const KPF_IN_USE: u64 = KPF_SLAB | KPF_ANON | KPF_LRU | KPF_MMAP | KPF_PGTABLE | KPF_RESERVED;

pub fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m")
}

fn unpack(name: &str) -> Vec<u8> {
    let path = testdata().join(name);
    let mut reader = zstd::stream::read::Decoder::new(File::open(path).unwrap()).unwrap();
    reader.window_log_max(31).unwrap();
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    bytes
}

/// The guest's 128 MiB.
pub fn ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| unpack("ram.raw.zst"))
}

/// The kernel's own word on every frame.
pub fn kpageflags() -> Vec<u64> {
    let bytes = unpack("kpageflags.bin.zst");
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

/// Puts a file's bytes into a buffer, which may grow: new memory each time would cost more than what is
/// tested.
pub fn read_again(path: &Path, bytes: &mut Vec<u8>) {
    let mut file = File::open(path).unwrap();
    bytes.resize(file.metadata().unwrap().len().try_into().unwrap(), 0);
    file.read_exact(bytes).unwrap();
}

/// Writes the guest's RAM, changed by `edit`, as a raw dump.
pub fn raw_dump(folder: &Path, edit: impl FnOnce(&mut [u8])) -> PathBuf {
    let path = folder.join("guest.raw");
    let mut bytes = ram().to_vec();
    edit(&mut bytes);
    fs::write(&path, bytes).unwrap();
    path
}

/// Writes the guest's RAM as QEMU's mapped-ram file of it would be: a page that is zero has no
/// mark and no bytes.
pub fn mapped_ram_dump(folder: &Path) -> PathBuf {
    const PAGES_AT: usize = 1 << 20;
    fn name(out: &mut Vec<u8>, name: &str) {
        out.push(u8::try_from(name.len()).unwrap());
        out.extend(name.as_bytes());
    }
    let ram = ram();
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x05".to_vec();
    name(&mut out, "configuration/capabilities");
    out.extend([0, 0, 0, 1, 0, 0, 0, 1]);
    name(&mut out, "mapped-ram");
    out.extend([1, 0, 0, 0, 1]);
    name(&mut out, "ram");
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((ram.len() as u64 | 4).to_be_bytes());
    name(&mut out, "pc.ram");
    out.extend((ram.len() as u64).to_be_bytes());
    out.extend(1_u32.to_be_bytes());
    out.extend(4096_u64.to_be_bytes());
    let bitmap_at = out.len() + 16;
    out.extend((bitmap_at as u64).to_be_bytes());
    out.extend((PAGES_AT as u64).to_be_bytes());
    for pages in ram.chunks(8 * 4096) {
        let marks = pages.chunks(4096).map(|page| page.iter().any(|b| *b != 0));
        out.push(
            (0..)
                .zip(marks)
                .fold(0, |byte, (bit, mark)| byte | u8::from(mark) << bit),
        );
    }
    let path = folder.join("guest.mapped");
    let file = File::create(&path).unwrap();
    file.write_all_at(&out, 0).unwrap();
    for (number, page) in (0..).zip(ram.chunks(4096)) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, PAGES_AT as u64 + number * 4096)
                .unwrap();
        }
    }
    let end = (PAGES_AT + ram.len()) as u64;
    file.write_all_at(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01the devices' state", end)
        .unwrap();
    path
}

/// The guest's RAM as QEMU would send it.
pub fn stream() -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0\x01\0\0\0\x02\x03ram".to_vec();
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    out.extend((ram().len() as u64 | 4).to_be_bytes());
    out.extend(b"\x06pc.ram");
    out.extend((ram().len() as u64).to_be_bytes());
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    out.extend(end);
    out.extend(b"\x03\0\0\0\x02");
    for (number, page) in ram().chunks(4096).enumerate() {
        let zero = page.iter().all(|byte| *byte == 0);
        let again = if number == 0 { 0 } else { 0x20 };
        let flags = if zero { 2 } else { 8 } | again;
        out.extend(((number * 4096) as u64 | flags).to_be_bytes());
        if number == 0 {
            out.extend(b"\x06pc.ram");
        }
        if zero {
            out.push(0);
        } else {
            out.extend(page);
        }
    }
    out.extend(end);
    out.extend(b"\x04the devices' state");
    out
}

/// Runs the binary. What it prints for `--json` must be as docs/json.schema.json has it.
pub fn sonicshot(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sonicshot"));
    command.args(args);
    checked_run(command)
}

/// Runs the binary as `command` has it, and holds what it prints for `--json` against the schema.
pub fn checked_run(mut command: Command) -> Output {
    let run = command.output().unwrap();
    let has = |word: &str| command.get_args().any(|arg| arg == word);
    if !has("--json") {
        return run;
    }
    // Standard output may be the file itself.
    if !has("-") {
        json_lines(&run.stdout);
    }
    let errors = run.stderr.split(|byte| *byte == b'\n');
    for line in errors.filter(|line| line.starts_with(b"{")) {
        json_lines(line);
    }
    run
}

/// The lines of JSON in `stream`, each of which must be of the schema.
pub fn json_lines(stream: &[u8]) -> Vec<Value> {
    let text = String::from_utf8(stream.to_vec()).unwrap();
    let line = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(schema().is_valid(&value), "{line}");
        assert_eq!(value["version"], 1);
        value
    };
    text.lines().map(line).collect()
}

/// The schema in docs.
pub fn schema() -> &'static Validator {
    static SCHEMA: OnceLock<Validator> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json.schema.json");
        let schema = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        jsonschema::validator_for(&schema).unwrap()
    })
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `(first, last, class)` of every line of a `--pfns` file; the class is `zero` where pages in use
/// hold only zeroes.
pub fn read_pfns(path: &Path) -> Vec<(u64, u64, String)> {
    let text = fs::read_to_string(path).unwrap();
    let parse = |line: &str| {
        let mut parts = line.split('\t');
        let mut number = || parts.next().unwrap().parse().unwrap();
        let (first, last) = (number(), number());
        let class = parts.next().unwrap();
        (first, last, parts.next().unwrap_or(class).to_owned())
    };
    text.lines().map(parse).collect()
}
