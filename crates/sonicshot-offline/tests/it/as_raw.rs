//! Raw memory whose first page looks like another format, and files whose format is given.

use crate::common::{open, ram, raw};
use sonicshot::PageClass;
use sonicshot_dump::DumpError;
use sonicshot_offline::{
    AnalyzeOptions, Analyzed, DumpFormat, Note, OfflineError, OpenOptions, Snapshot, Target,
    WriteOptions,
};
use sonicshot_vmi::VmiError;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;

fn look(path: &Path, options: &OpenOptions) -> Result<Analyzed, OfflineError> {
    let quick = AnalyzeOptions::new().zero_pages(false);
    Snapshot::open(path, options)?.analyze(&quick)
}

/// Writes `start` over the beginning of a file.
fn begin(path: &Path, start: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(start, 0).unwrap();
}

#[test]
fn memory_that_begins_as_another_format_is_read_by_what_is_in_it() {
    let folder = TempDir::new().unwrap();
    let path = raw(folder.path());
    let core = [&b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0"[..]].concat();
    // A segment that ends beyond 64 bits.
    let mut beyond = core.clone();
    beyond.resize(32, 0);
    beyond.extend([64, 0].map(u64::to_le_bytes).concat());
    beyond.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    beyond.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let segment = [4096, 0, u64::MAX - 0xfff, 0x2000, 0x2000, 4096];
    beyond.extend(segment.map(u64::to_le_bytes).concat());
    let free = look(&path, &OpenOptions::new()).unwrap();
    let free = free.counts().get(PageClass::FreeBuddy);
    for start in [
        &core[..],
        &beyond,
        b"EMiL",
        b"QEVM\0\0\0\x03",
        b"KDUMP   ",
        b"LibvirtQemudSave",
        b"\x1f\x8b\x08",
    ] {
        begin(&path, &ram()[..4096]);
        begin(&path, start);
        let found = look(&path, &OpenOptions::new()).unwrap();
        assert_eq!(found.dump().format(), "raw RAM", "{start:?}");
        assert_eq!(found.counts().get(PageClass::FreeBuddy), free, "{start:?}");
        assert!(found.notes().contains(&Note::TakenAsRaw), "{start:?}");
    }
    let known = OpenOptions::new().format(DumpFormat::RAW);
    let found = look(&path, &known).unwrap();
    assert_eq!(found.counts().get(PageClass::FreeBuddy), free);
    assert!(!found.notes().contains(&Note::TakenAsRaw));
}

#[test]
fn a_damaged_file_is_none_of_memory() {
    let folder = TempDir::new().unwrap();
    let core = folder.path().join("core");
    let from = open(&raw(folder.path()));
    from.convert(&Target::Elf, &core, &WriteOptions::new())
        .unwrap();
    let file = File::options().write(true).open(&core).unwrap();
    let whole = file.metadata().unwrap().len();
    // Cut off where a raw file could be, and with program headers that are not there.
    file.set_len(whole & !0xfff).unwrap();
    file.write_all_at(&[0xfe, 0xff], 56).unwrap();
    let found = look(&core, &OpenOptions::new());
    assert!(
        matches!(
            found,
            Err(OfflineError::Dump(
                DumpError::Malformed { .. } | DumpError::NotADump { .. }
            ))
        ),
        "{found:?}"
    );
    // Said to be memory, it is looked through as such.
    let found = look(&core, &OpenOptions::new().format(DumpFormat::RAW));
    assert!(
        matches!(
            found,
            Err(OfflineError::Guest {
                source: VmiError::NoKernel { .. }
                    | VmiError::NoTables { .. }
                    | VmiError::BannerAlone { .. },
                ..
            })
        ),
        "{found:?}"
    );
}

#[test]
fn a_file_is_what_it_is_said_to_be_or_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("memory");
    fs::write(&path, [b"LiME is EMiL".as_slice(), &[1; 8180]].concat()).unwrap();
    let read = |format: &str| {
        let known = OpenOptions::new().format(format.parse().unwrap());
        look(&path, &known).unwrap_err()
    };
    for format in DumpFormat::all().filter(|format| *format != DumpFormat::RAW) {
        let error = read(format.name());
        assert!(
            matches!(
                &error,
                OfflineError::Dump(DumpError::OtherFormat { format: said, .. }) if *said == format
            ),
            "{format}: {error:?}"
        );
    }
    assert!(matches!(read("raw"), OfflineError::Guest { .. }));
    begin(&path, b"EMiL");
    assert!(matches!(
        read("lime"),
        OfflineError::Dump(DumpError::Malformed { .. })
    ));
    // The same through a pipe.
    let known = OpenOptions::new().format(DumpFormat::RAW);
    let bytes = fs::read(&path).unwrap();
    let piped = Snapshot::from_reader("a pipe", bytes.as_slice(), &known).unwrap();
    assert!(piped.zero_pages().is_ok());
}
