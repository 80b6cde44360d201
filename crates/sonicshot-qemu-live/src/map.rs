//! A guest's RAM as a file of raw memory, of which each guest has a private mapping.

use crate::error::QemuError;
use crate::launch::Words;
use crate::pages::{self, Places};
use crate::qmp::QemuVersion;
use crate::refuse;
use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};
use sonicshot::work::{for_each_told, threads};
use sonicshot::{GpaRange, Progress, WorkPhase};
use sonicshot_dump::{NewFile, Overwrite};
use sonicshot_serve::{Content, PageSource, ServeError};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

/// The memory backend that is added.
const BACKEND: &str = "sonicshot-ram";

/// From this version on QEMU can be kept from writing to the file.
pub(crate) const READ_ONLY: QemuVersion = QemuVersion {
    major: 8,
    minor: 2,
    micro: 0,
};

/// The version that `program` says it is, started with `words`: it may be a script that starts one.
pub(crate) fn version(program: &OsStr, words: &[OsString]) -> Result<QemuVersion, QemuError> {
    let failed = |source| QemuError::Io {
        action: "starting",
        path: program.into(),
        source,
    };
    let output = Command::new(program)
        .args(words)
        .arg("--version")
        .output()
        .map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.split_once("version ").and_then(|(_, rest)| {
        let word = rest
            .split(|one: char| !one.is_ascii_digit() && one != '.')
            .next()?;
        let mut numbers = word.split('.').map(|number| number.parse().ok());
        Some(QemuVersion {
            major: numbers.next()??,
            minor: numbers.next()??,
            micro: numbers.next().flatten().unwrap_or(0),
        })
    });
    found.ok_or_else(|| QemuError::Unknown {
        what: "--version",
        found: crate::qmp::shortened(&text),
        expected: "QEMU emulator version N.N.N",
    })
}

/// The options of QEMU by which its RAM of `bytes` bytes is a private mapping of `file`.
pub(crate) fn options(
    version: QemuVersion,
    words: &Words<'_>,
    file: &Path,
    bytes: u64,
) -> Result<Vec<OsString>, QemuError> {
    if words.mention("memory-backend=") || words.mention("memdev=") {
        return Err(QemuError::not_this(
            "QEMU's command line says what its RAM is made of (memory-backend=, memdev=): leave that \
             out, the file is added here",
        ));
    }
    let name = file.to_str().filter(|name| !name.contains(['\n', '\0']));
    let name = name.ok_or_else(|| QemuError::not_this("the raw file's name is not UTF-8"))?;
    // A comma ends an option.
    let name = name.replace(',', ",,");
    let mut backend =
        format!("memory-backend-file,id={BACKEND},size={bytes},mem-path={name},share=off");
    if version >= READ_ONLY {
        backend.push_str(",readonly=on,rom=off");
    } else {
        // What these give back is punched out of the file, under all who have it.
        let punching = ["balloon", "virtio-mem", "free-page-reporting"];
        if let Some(found) = punching.iter().find(|what| words.mention(what)) {
            return Err(refuse::would_punch(version, found));
        }
    }
    Ok(vec![
        "-object".into(),
        backend.into(),
        "-machine".into(),
        format!("memory-backend={BACKEND}").into(),
    ])
}

/// The mark in a file: which checkpoint it is made of, and when it was written last. What was
/// written since has another time.
const MARK: &str = "user.sonicshot.made-of";

fn mark(digest: u128, file: &File) -> std::io::Result<String> {
    let found = file.metadata()?;
    let (seconds, nanos) = (found.mtime(), found.mtime_nsec());
    Ok(format!("{digest:032x} {seconds}.{nanos:09}"))
}

/// Has the file say so, where it can.
fn note(digest: u128, file: &File) {
    if let Ok(text) = mark(digest, file) {
        let _ = fsetxattr(file, MARK, text.as_bytes(), XattrFlags::empty());
    }
}

/// Whether the file at `path` has the guest's RAM: by what it says of itself, or by its bytes. What was
/// left out of the checkpoint may be anything there, as it may be in the guest.
pub(crate) fn check(
    source: &dyn PageSource,
    digest: u128,
    places: &Places,
    path: &Path,
    progress: &dyn Progress,
) -> Result<(), QemuError> {
    let reading = |source| QemuError::Io {
        action: "reading",
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(reading)?;
    let expected = mark(digest, &file).map_err(reading)?;
    let mut found = [0; 128];
    if let Ok(len) = fgetxattr(&file, MARK, &mut found[..])
        && found.get(..len) == Some(expected.as_bytes())
    {
        return Ok(());
    }
    let told = Told::begin(progress, WorkPhase::Comparing, source);
    for_each_told(
        threads(None),
        kept(source),
        |_| told.tell(),
        Vec::new,
        |buffer: &mut Vec<u8>, found| {
            let found = found.map_err(QemuError::Pages)?;
            told.add(found.0.len());
            let bytes = pages::bytes(source, &found).map_err(QemuError::Pages)?;
            buffer.resize(bytes.len(), 0);
            each_part(places, found.0, buffer, |offset, part| {
                file.read_exact_at(part, offset).map_err(reading)
            })?;
            if *buffer == bytes {
                return Ok(());
            }
            Err(QemuError::not_this(format!(
                "{} is not made of this checkpoint, or was written to: it has other bytes between {:#x} \
                 and {:#x}. Name a file that is not there, to have it made",
                path.display(),
                found.0.start(),
                found.0.end()
            )))
        },
    )?;
    told.end();
    note(digest, &file);
    Ok(())
}

/// A phase that several threads do: the bytes that were begun, of all of the guest's.
struct Told<'a> {
    progress: &'a dyn Progress,
    done: AtomicU64,
    total: u64,
}

impl<'a> Told<'a> {
    fn begin(progress: &'a dyn Progress, phase: WorkPhase, source: &dyn PageSource) -> Self {
        let (done, total) = (AtomicU64::new(0), source.layout().bytes());
        progress.begin(phase);
        progress.tell(0, total);
        Self {
            progress,
            done,
            total,
        }
    }

    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn tell(&self) {
        self.progress
            .tell(self.done.load(Ordering::Relaxed), self.total);
    }

    fn end(self) {
        self.progress.tell(self.total, self.total);
    }
}

/// All of the guest that the checkpoint has, and that is not zero.
fn kept(source: &dyn PageSource) -> impl Iterator<Item = Result<pages::Found, ServeError>> + '_ {
    let regions = source.layout().regions().to_vec();
    let all = regions
        .into_iter()
        .flat_map(move |region| pages::runs(source, region));
    all.filter(|found| !matches!(found, Ok((_, Content::Fill(0)))))
}

/// Does something with each part of `bytes`, which are those of `range`, that is in a row in the file.
fn each_part(
    places: &Places,
    mut range: GpaRange,
    bytes: &mut [u8],
    mut part_at: impl FnMut(u64, &mut [u8]) -> Result<(), QemuError>,
) -> Result<(), QemuError> {
    let nowhere = || QemuError::not_this("the checkpoint has guest memory that is in no block");
    let mut rest = bytes;
    while !range.is_empty() {
        let (part, _, offset) = places.of(&range).ok_or_else(nowhere)?;
        let len = usize::try_from(part.len()).map_err(|_| nowhere())?;
        let (now, later) = rest.split_at_mut_checked(len).ok_or_else(nowhere)?;
        part_at(offset, now)?;
        range = GpaRange::new(part.end(), range.end());
        rest = later;
    }
    Ok(())
}

/// Makes the file at `path`: the guest's RAM as its block has it, `bytes` long. It appears whole or
/// not at all.
pub(crate) fn make(
    source: &dyn PageSource,
    digest: u128,
    places: &Places,
    bytes: u64,
    path: &Path,
    progress: &dyn Progress,
) -> Result<(), QemuError> {
    let out = NewFile::create_new(path, Overwrite::Refuse)?;
    let writing = |source| QemuError::Io {
        action: "writing",
        path: path.to_owned(),
        source,
    };
    out.file().set_len(bytes).map_err(writing)?;
    let told = Told::begin(progress, WorkPhase::Restoring, source);
    for_each_told(
        threads(None),
        kept(source),
        |_| told.tell(),
        || (),
        |(), found| {
            let found = found.map_err(QemuError::Pages)?;
            told.add(found.0.len());
            let mut bytes = pages::bytes(source, &found).map_err(QemuError::Pages)?;
            each_part(places, found.0, &mut bytes, |offset, part| {
                out.file().write_all_at(part, offset).map_err(writing)
            })
        },
    )?;
    told.end();
    note(digest, out.file());
    out.finish_told(progress)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Words, check, make, options};
    use crate::find::Piece;
    use crate::pages::Places;
    use crate::qmp::QemuVersion;
    use sonicshot::checkpoint::{CheckpointInfo, CheckpointReader, CheckpointWriter, SaveOptions};
    use sonicshot::{DropClasses, Fill, Gpa, GuestBytes, GuestMemory, MappedRegions};
    use sonicshot::{PageMap, PageSize, PrunePlan};
    use sonicshot_serve::CheckpointSource;
    use std::ffi::OsString;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Arc;

    #[test]
    fn nobody_may_write_to_a_file_that_others_have() {
        let version = |major, minor| QemuVersion {
            major,
            minor,
            micro: 0,
        };
        for (major, minor, line, readonly) in [
            (10, 0, "-m 1G", Some(true)),
            (10, 0, "-m 1G -device virtio-balloon-pci", Some(true)),
            (8, 2, "-m 1G", Some(true)),
            (8, 1, "-m 1G", Some(false)),
            (7, 2, "-m 1G -device virtio-balloon-pci", None),
            (7, 2, "-m 1G -device virtio-mem-pci,id=x", None),
            (10, 0, "-machine pc,memory-backend=ram0", None),
            (10, 0, "-numa node,memdev=a", None),
        ] {
            let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
            let found = options(version(major, minor), &Words(&words), Path::new("/a,b"), 7);
            let found = found
                .ok()
                .map(|found| found[1].to_str().unwrap().to_owned());
            let readonly_is = found
                .as_ref()
                .map(|text| text.contains("readonly=on,rom=off"));
            assert_eq!(readonly_is, readonly, "{line}");
            if let Some(text) = found {
                assert!(text.contains("size=7,mem-path=/a,,b,share=off"), "{text}");
            }
        }
    }

    #[test]
    fn a_file_of_another_guest_is_refused() {
        let mut ram = vec![0; 64 * 4096];
        for page in (0..64).step_by(2) {
            ram[page * 4096..(page + 1) * 4096].fill(u8::try_from(page + 1).unwrap());
        }
        let memory = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let map = PageMap::new(memory.layout(), PageSize::SIZE_4K);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let info = CheckpointInfo::new(memory.layout().clone(), PageSize::SIZE_4K);
        let file = tempfile::tempfile().unwrap();
        let out = file.try_clone().unwrap();
        let mut writer = CheckpointWriter::new(out, info, SaveOptions::default()).unwrap();
        writer.memory(&memory, &map, &plan).unwrap();
        writer.finish().unwrap();
        let reader = CheckpointReader::new(file).unwrap();
        let source = CheckpointSource::new(reader, 0, Arc::default());
        let mut places = Places::default();
        let piece = |offset: u64, gpa: u64, pages: u64| Piece {
            offset: offset << 12,
            gpa: gpa << 12,
            len: pages << 12,
        };
        // Its second half comes first in the file.
        places
            .add("ram0", &[piece(0, 32, 32), piece(32, 0, 32)])
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw");
        make(&source, 7, &places, 64 << 12, &path, &None).unwrap();
        let raw = std::fs::read(&path).unwrap();
        assert_eq!(
            (&raw[..32 << 12], &raw[32 << 12..]),
            (&ram[32 << 12..], &ram[..32 << 12])
        );
        check(&source, 7, &places, &path, &None).unwrap();
        // By its bytes.
        check(&source, 8, &places, &path, &None).unwrap();
        check(&source, 8, &places, &path, &None).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        // What the guest does not use may be anything.
        file.write_all_at(&[1], 1 << 12).unwrap();
        check(&source, 8, &places, &path, &None).unwrap();
        // Before Linux 6.13 two writes of one tick have one time.
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.write_all_at(&[1], 34 << 12).unwrap();
        for digest in [7, 8] {
            let error = check(&source, digest, &places, &path, &None).unwrap_err();
            assert!(error.to_string().contains("is not made of"), "{error}");
        }
        file.set_len(1).unwrap();
        assert!(check(&source, 8, &places, &path, &None).is_err());
    }
}
