//! From a path to a source.

use super::slots::Slots;
use super::{CheckpointSource, MemorySource, PageSource};
use crate::cloud_hypervisor::CONFIG_FILE;
use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::set::PageSet;
use sonicshot::FileStamp;
use sonicshot::checkpoint::CheckpointReader;
use sonicshot_offline::{CheckpointFile, OfflineError, OpenOptions, Snapshot};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// The blob of a checkpoint that is its working set, as text.
const SET: &str = "working-set";

/// A source, and what came with it.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenedSource {
    /// The guest's memory.
    pub source: Arc<dyn PageSource>,
    /// The working set that the checkpoint carries (its blob `working-set`).
    pub set: Option<PageSet>,
}

impl core::fmt::Debug for OpenedSource {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("OpenedSource")
            .field("layout", self.source.layout())
            .field("set", &self.set)
            .finish_non_exhaustive()
    }
}

/// Opens what `path` names: a checkpoint, a whole or pruned raw file, a mapped-ram file, the
/// folder of a VMM's snapshot (also one with a file for each slot of Cloud Hypervisor's), or whatever else `sonicshot` reads. Of a checkpoint at most `cache`
/// bytes are kept decompressed.
///
/// # Errors
/// [`ServeError::Snapshot`] if it cannot be read, or it is not known where in the guest it lies;
/// [`ServeError::Set`] or [`ServeError::SetOfAnother`] if it carries what is not a working set of it.
pub fn open_source(
    path: &Path,
    options: &OpenOptions,
    cache: u64,
    metrics: Arc<Metrics>,
) -> Result<OpenedSource, ServeError> {
    // What is said to be something else is that.
    if options.format.is_none() && CheckpointFile::is_at(path)? {
        let reader = CheckpointFile::open(path)?
            .with_disks(&options.disks)?
            .into_reader();
        if !reader.disks_are_immutable() {
            let path = path.to_owned();
            return Err(ServeError::DisksMayChange { path });
        }
        let before = FileStamp::of(reader.source()).map_err(ServeError::io("reading", path))?;
        let set = set_in(&reader, path)?;
        let source = CheckpointSource::new(reader, cache, metrics);
        let source = Arc::new(source.checked_by(unchanged(path, before)));
        return Ok(OpenedSource { source, set });
    }
    if path.join(CONFIG_FILE).is_file() {
        let source = Arc::new(Slots::open(path, options)?);
        return Ok(OpenedSource { source, set: None });
    }
    let before = identity_of(path, options);
    let memory = Snapshot::open(path, options)?.guest_memory()?;
    // Another file may have got the name meanwhile.
    let identity = before.filter(|before| identity_of(path, options).as_ref() == Some(before));
    let source = MemorySource::new(memory).identified_by(identity);
    let source =
        Arc::new(source.checked_by(|dump| Ok(dump.check_unchanged().map_err(OfflineError::from)?)));
    Ok(OpenedSource { source, set: None })
}

/// The mark that tells a file's memory from another's: which file it is, how long, written when, and what is
/// known of it beside. Of a folder, or of a diff, too little.
fn identity_of(path: &Path, options: &OpenOptions) -> Option<String> {
    if options.base.is_some() || !path.is_file() {
        return None;
    }
    let stamp = FileStamp::of(&File::open(path).ok()?).ok()?;
    let layout = options.layout.as_ref().map(ToString::to_string);
    Some(format!("{stamp:?} {layout:?}")).filter(|identity| identity.len() <= 512)
}

/// Refuses a file that is not what it was `before`.
fn unchanged(path: &Path, before: FileStamp) -> impl Fn(&File) -> Result<(), ServeError> + use<> {
    let path = path.to_owned();
    move |file| {
        let now = FileStamp::of(file).map_err(ServeError::io("reading", &path))?;
        if now == before {
            return Ok(());
        }
        Err(ServeError::Changed { path: path.clone() })
    }
}

fn set_in(reader: &CheckpointReader<File>, path: &Path) -> Result<Option<PageSet>, ServeError> {
    let Some((_, len)) = reader.blobs().find(|(name, _)| *name == SET) else {
        return Ok(None);
    };
    let wrong = |what| ServeError::Set {
        path: path.to_owned(),
        line: 1,
        what,
    };
    if len > PageSet::MAX_FILE {
        return Err(wrong("the blob working-set is too long"));
    }
    let text = String::from_utf8(reader.read_blob(SET)?);
    let text = text.map_err(|_| wrong("the blob working-set is not UTF-8"))?;
    PageSet::from_text(&text, path, &reader.info().layout).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sonicshot::checkpoint::{CheckpointInfo, CheckpointWriter, Compression, SaveOptions};
    use sonicshot::{DropClasses, Fill, Gpa, GpaRange, GuestBytes, GuestMemory};
    use sonicshot::{MappedRegions, PageMap, PageSize, PrunePlan};
    use std::os::unix::fs::FileExt;

    fn checkpoint(blob: Option<&[u8]>) -> tempfile::NamedTempFile {
        checkpoint_of(blob, Compression::ZSTD)
    }

    fn checkpoint_of(blob: Option<&[u8]>, compression: Compression) -> tempfile::NamedTempFile {
        let ram: Vec<u8> = (0..16 * 4096_u32).map(|at| (at % 251) as u8).collect();
        let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = SaveOptions::new(compression);
        let mut writer = CheckpointWriter::new(file.reopen().unwrap(), info, options).unwrap();
        if let Some(blob) = blob {
            writer.blob(SET, blob).unwrap();
        }
        writer.memory(&guest, &map, &plan).unwrap();
        writer.finish().unwrap();
        file
    }

    #[test]
    fn a_checkpoint_may_carry_its_working_set() {
        let open = |blob: Option<&[u8]>| {
            let file = checkpoint(blob);
            open_source(file.path(), &OpenOptions::new(), 0, Arc::default())
        };
        assert_eq!(open(None).unwrap().set, None);
        let range = |first: u64, end: u64| GpaRange::new(Gpa::new(first), Gpa::new(end));
        let set = PageSet::from_ranges(vec![range(4096, 8192), range(0x8000, 0x9000)]);
        let opened = open(Some(set.to_text().as_bytes())).unwrap();
        assert_eq!(opened.set, Some(set));
        for (blob, another) in [
            (&b"\xff"[..], false),
            (b"", false),
            (b"sonicshot working set 1\n0x10000-0x11000\n", true),
        ] {
            let error = open(Some(blob)).unwrap_err();
            assert_eq!(
                matches!(error, ServeError::SetOfAnother { .. }),
                another,
                "{error:?}"
            );
            assert_eq!(
                matches!(error, ServeError::Set { .. }),
                !another,
                "{error:?}"
            );
        }
    }

    /// Whoever writes to a snapshot must not write into guests.
    #[test]
    fn what_is_written_to_while_it_is_served_is_not_served() {
        let raw = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(raw.path(), vec![7; 1 << 20]).unwrap();
        let plain = checkpoint_of(None, Compression::None);
        let packed = checkpoint_of(None, Compression::Lz4);
        let mut options = OpenOptions::new();
        options.layout = Some("flat".parse().unwrap());
        for file in [raw, plain, packed] {
            let (path, mut buffer) = (file.path(), Vec::new());
            let opened = open_source(path, &options, 0, Arc::default()).unwrap();
            let one = GpaRange::with_len(Gpa::new(4096), 4096).unwrap();
            let mut read = || opened.source.read(one, &mut buffer).map(drop);
            read().unwrap();
            read().unwrap();
            // Of the same length, and in a part that is not read here.
            let len = std::fs::metadata(path).unwrap().len();
            let file = File::options().write(true).open(path).unwrap();
            file.write_at(b"x", len - 1).unwrap();
            let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
            file.set_modified(later).unwrap();
            let error = read().unwrap_err().with_causes();
            assert!(error.contains("was written to"), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_a_source() {
        // Of a file of zeroes with a layout that is given.
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut options = OpenOptions::new();
        options.layout = Some("flat".parse().unwrap());
        let opened = open_source(file.path(), &options, 0, Arc::default());
        match opened {
            Ok(opened) => assert_eq!(opened.source.layout().bytes(), 1 << 20),
            Err(error) => panic!("{}", error.with_causes()),
        }
    }
}
