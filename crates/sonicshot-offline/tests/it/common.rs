//! The real guest in testdata, unpacked once for all tests.

use sonicshot_offline::{
    AnalyzeOptions, Analyzed, OfflineError, OpenOptions, Overwrite, Snapshot, WriteOptions,
};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub const PAGE: usize = 4096;

/// The guest's 128 MiB.
pub fn ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
        let file = File::open(testdata.join("guest-6.1-128m/ram.raw.zst")).unwrap();
        let mut reader = zstd::stream::read::Decoder::new(file).unwrap();
        reader.window_log_max(31).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Its RAM as a raw file.
pub fn raw(folder: &Path) -> PathBuf {
    let path = folder.join("guest.raw");
    fs::write(&path, ram()).unwrap();
    path
}

/// Its RAM in a sparse file that lacks the pages that `missing` tells by their number and content.
pub fn diff(folder: &Path, missing: impl Fn(usize, &[u8]) -> bool) -> PathBuf {
    let path = folder.join("diff.mem");
    let file = File::create(&path).unwrap();
    file.set_len(ram().len() as u64).unwrap();
    for (number, page) in ram().chunks(PAGE).enumerate() {
        if !missing(number, page) {
            file.write_all_at(page, (number * PAGE) as u64).unwrap();
        }
    }
    path
}

pub fn open(path: &Path) -> Snapshot {
    Snapshot::open(path, &OpenOptions::new()).unwrap()
}

pub fn analyze(path: &Path) -> Result<Analyzed, OfflineError> {
    open(path).analyze(&AnalyzeOptions::new())
}

/// Of an output that exists, which is replaced.
pub fn replacing() -> WriteOptions {
    WriteOptions::new().overwrite(Overwrite::Replace)
}
