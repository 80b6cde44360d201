//! Guests of the library that is made for tests.

use sonicshot_libvmi::{Domain, LibVmi, LibVmiError, LibVmiGuest};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tempfile::TempDir;

pub const PAGE: u64 = 4096;

/// A guest's text, in a folder of its own.
pub struct Fake {
    folder: TempDir,
    text: String,
}

impl Fake {
    /// A guest without memory.
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let text = format!("log={}\n", folder.path().join("log").display());
        Self { folder, text }
    }

    /// Has these bytes, cut into ranges of pages: where the guest has each, in the order of the file.
    pub fn with_memory(bytes: &[u8], ranges: &[(u64, u64)]) -> Self {
        let mut fake = Self::new();
        let file = fake.folder.path().join("memory");
        fs::write(&file, bytes).unwrap();
        writeln!(fake.text, "memory={}", file.display()).unwrap();
        let mut offset = 0;
        for (start, end) in ranges {
            writeln!(fake.text, "range={start:x}-{end:x}@{offset:x}").unwrap();
            offset += end - start;
        }
        let end = ranges.iter().map(|(_, end)| *end).max().unwrap_or(0);
        fake.say("size", &format!("{offset:x}"))
            .say("end", &format!("{end:x}"))
    }

    pub fn say(mut self, word: &str, value: &str) -> Self {
        writeln!(self.text, "{word}={value}").unwrap();
        self
    }

    /// The guest's domain, of Xen.
    pub fn domain(&self) -> Domain {
        let path = self.folder.path().join("guest");
        fs::write(&path, &self.text).unwrap();
        Domain::Xen(path.to_str().unwrap().into())
    }

    pub fn open(&self) -> Result<LibVmiGuest, LibVmiError> {
        LibVmiGuest::open(&library(), &self.domain(), None)
    }

    /// The calls that were made.
    pub fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let calls = log.lines().filter(|line| *line != "maps");
        calls.map(str::to_owned).collect()
    }
}

pub fn library() -> LibVmi {
    LibVmi::open(libvmi_fake::library()).unwrap()
}

/// The library without one of its functions: its name is no more in it.
pub fn without(function: &str, folder: &Path) -> PathBuf {
    let mut bytes = fs::read(libvmi_fake::library()).unwrap();
    let name: Vec<u8> = [b"\0", function.as_bytes(), b"\0"].concat();
    let places: Vec<usize> = bytes
        .windows(name.len())
        .enumerate()
        .filter(|(_, window)| *window == name)
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty(), "{function}");
    for at in places {
        bytes[at + name.len() - 2] = b'_';
    }
    let path = folder.join(format!("libvmi-without-{function}.so"));
    fs::write(&path, bytes).unwrap();
    path
}

/// The memory of the small real guest in `testdata`.
pub fn real_ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m/ram.raw.zst");
        let mut reader = zstd::stream::read::Decoder::new(File::open(path).unwrap()).unwrap();
        reader.window_log_max(31).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Bytes of which no page is like another.
pub fn bytes(len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at ^ (at >> 12) ^ (at >> 20)) & 0xff).unwrap())
        .collect()
}
