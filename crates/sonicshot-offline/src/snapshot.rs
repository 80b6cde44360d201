//! A snapshot as a path names it: its files, and the opening of its memory.

use crate::error::OfflineError;
use crate::note::Note;
use crate::options::OpenOptions;
use sonicshot::{
    FileId, FileOffset, FileStamp, Gpa, GuestMemory, Processors, Progress, Tally, WorkOptions,
    WorkPhase,
};
use sonicshot_dump::{
    Dump, DumpError, DumpFormat, DumpOptions, LayoutSpec, SnapshotFiles, Spool, Vmm,
    check_not_in_use, check_not_written, hole_ahead,
};
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A guest's memory in a file, in a VMM's folder, in a diff over its base, or from a pipe.
///
/// The trouble with the path is told by [`open`](Self::open), what is wrong with the content by
/// what is done with it.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    files: SnapshotFiles,
    options: OpenOptions,
    /// The content of what came through a pipe or was compressed, once it is there.
    spool: Mutex<Option<Spool>>,
    /// The content that came through a pipe, as it came.
    piped: Option<Spool>,
    /// The first hole of what came out of a file that was open.
    hole: Option<FileOffset>,
    /// The files' state when it was opened.
    stamps: Vec<(PathBuf, FileStamp)>,
}

/// Told of content whose length is known to whoever opened it alone.
struct OfLength {
    progress: Arc<dyn Progress>,
    len: u64,
}

impl Progress for OfLength {
    fn tell(&self, done: u64, total: u64) {
        let total = if total == 0 { self.len } else { total };
        self.progress.tell(done, total);
    }

    fn begin(&self, phase: WorkPhase) {
        self.progress.begin(phase);
    }
}

impl Snapshot {
    /// Looks at what `path` names: a file of any format that
    /// [`sonicshot-dump`](sonicshot_dump) reads, or the folder of a VMM's snapshot.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if there is no such file, or no snapshot in the folder.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self, OfflineError> {
        let path = path.as_ref();
        let files = SnapshotFiles::find_as(
            path,
            options.base.as_deref(),
            &options.of_file(options.layout.as_ref()),
        )?;
        let names = [Some(files.memory()), options.base.as_deref()];
        let stamp = |path: &Path| Some((path.to_owned(), FileStamp::of_path(path).ok()?));
        let stamps = names.into_iter().flatten().filter_map(stamp).collect();
        Ok(Self {
            path: path.to_owned(),
            files,
            options: options.clone(),
            spool: Mutex::default(),
            piped: None,
            hole: None,
            stamps,
        })
    }

    /// Takes all that comes through a pipe, which messages call `name`. It is put into a nameless
    /// temporary file, for a kernel is not read from front to back.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if it cannot be read to its end, or there is no room for it.
    pub fn from_reader(
        name: impl AsRef<Path>,
        reader: impl Read,
        options: &OpenOptions,
    ) -> Result<Self, OfflineError> {
        let name = name.as_ref();
        let known = options.of_file(options.layout.as_ref());
        let spool = known.spool(name, reader, options.max_size)?;
        Ok(Self {
            path: name.to_owned(),
            files: SnapshotFiles::file(name, options.layout.as_ref()),
            options: options.clone(),
            spool: Mutex::default(),
            piped: Some(spool),
            hole: None,
            stamps: Vec::new(),
        })
    }

    /// The same of a `file` that is open, from where it is read up to its end: such as one that
    /// standard input comes from. Unlike of a pipe its holes are seen.
    ///
    /// # Errors
    /// As [`from_reader`](Self::from_reader), and if the file was changed meanwhile.
    pub fn from_file(
        name: impl AsRef<Path>,
        file: &File,
        options: &OpenOptions,
    ) -> Result<Self, OfflineError> {
        let name = name.as_ref();
        let reading = || OfflineError::io("reading", name);
        let metadata = file.metadata().map_err(reading())?;
        let hole = hole_ahead(file).map_err(reading())?;
        let mut told = options.clone();
        if let (Some(progress), true) = (&options.progress, metadata.is_file()) {
            let at = (&*file).stream_position().map_err(reading())?;
            told.progress = Some(Arc::new(OfLength {
                progress: Arc::clone(progress),
                len: Tally::new(metadata.len()).without(at).get(),
            }));
        }
        let snapshot = Self::from_reader(name, file, &told);
        if metadata.is_file() {
            let now = FileStamp::of(file).map_err(reading())?;
            DumpError::check_same(name, FileStamp::from(&metadata), now)?;
        }
        Ok(Self {
            hole,
            options: options.clone(),
            ..snapshot?
        })
    }

    /// The first hole of raw memory that came out of a file.
    pub(crate) fn hole_in_pipe(&self, dump: &Dump) -> Option<Gpa> {
        dump.layout_spec()?;
        let mut left = self.hole?.raw();
        // What was compressed has lost them.
        let file = |spool: &Spool| FileId::of(spool.file()).ok();
        if dump.spool().and_then(file) != self.piped.as_ref().and_then(file) {
            return None;
        }
        for region in dump.layout().regions() {
            match left.checked_sub(region.len()) {
                Some(beyond) => left = beyond,
                None => return region.start().checked_add(left),
            }
        }
        None
    }

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file with the guest's memory.
    #[must_use]
    pub fn memory_file(&self) -> &Path {
        self.files.memory()
    }

    /// The VMM that made it, if its files tell.
    #[must_use]
    pub fn vmm(&self) -> Option<Vmm> {
        self.files.vmm()
    }

    /// Refuses a snapshot whose VMM would not read a hole as zero. Every prune does so too; this is
    /// for those who want to know before they look at the guest.
    ///
    /// # Errors
    /// [`DumpError::CannotPrune`] as [`OfflineError::Dump`].
    pub fn check_prunable(&self) -> Result<(), OfflineError> {
        Ok(self.files.check_prunable()?)
    }

    /// Refuses a memory file that a process has open for writing. A prune in place does so too, at
    /// its last moment.
    ///
    /// # Errors
    /// [`DumpError::InUse`] or [`DumpError::MayBeInUse`] as [`OfflineError::Dump`].
    pub fn check_not_in_use(&self) -> Result<(), OfflineError> {
        Ok(check_not_in_use(self.memory_file())?)
    }

    /// Refuses files that were changed since this was opened: what is known of them is of no use.
    ///
    /// # Errors
    /// [`DumpError::Changed`] or [`DumpError::Modified`] as [`OfflineError::Dump`].
    pub fn check_unchanged(&self) -> Result<(), OfflineError> {
        for (path, before) in &self.stamps {
            let now = FileStamp::of_path(path).map_err(OfflineError::io("reading", path))?;
            DumpError::check_same(path, *before, now)?;
        }
        Ok(())
    }

    /// The same with its memory file taken for raw memory.
    pub(crate) fn as_raw(&self) -> Self {
        Self {
            path: self.path.clone(),
            files: self.files.clone(),
            options: self.options.clone().format(DumpFormat::RAW),
            // What was decompressed is not what is in the file.
            spool: Mutex::default(),
            piped: self.piped.clone(),
            hole: self.hole,
            stamps: self.stamps.clone(),
        }
    }

    /// The options for looking through pages.
    pub(crate) fn work(&self) -> WorkOptions {
        let mut work = WorkOptions::new();
        work.progress.clone_from(&self.options.progress);
        work
    }

    /// The length of its memory file in bytes, if that can be told.
    pub(crate) fn memory_len(&self) -> Option<u64> {
        match &self.piped {
            Some(spool) => spool.content_len().ok(),
            None => Some(std::fs::metadata(self.memory_file()).ok()?.len()),
        }
    }

    /// Whether its memory file begins as one of a format that says itself what it is.
    pub(crate) fn begins_as_other(&self) -> bool {
        let file = self.memory_file();
        let begins = match &self.piped {
            Some(spool) => DumpOptions::spooled_begins_as_other(spool),
            None => DumpOptions::begins_as_other(file),
        };
        begins.unwrap_or(false)
    }

    /// The trouble with a file that has changed says less than that it has.
    pub(crate) fn blame(&self, error: OfflineError) -> OfflineError {
        self.check_unchanged().err().unwrap_or(error)
    }

    /// The bytes that came through a pipe, if they did.
    pub(crate) fn piped(&self) -> Option<&Spool> {
        self.piped.as_ref()
    }

    pub(crate) fn options(&self) -> &OpenOptions {
        &self.options
    }

    pub(crate) fn files(&self) -> &SnapshotFiles {
        &self.files
    }

    /// Opens the memory, over its base if one was given, with what the VMM's state beside it tells
    /// of the processors.
    pub(crate) fn dump(&self, layout: Option<&LayoutSpec>) -> Result<Dump, DumpError> {
        let dump = self.memory(layout)?;
        Ok(match self.files.processors() {
            Processors::Unknown => dump,
            told => dump.with_processors(told.clone()),
        })
    }

    fn memory(&self, layout: Option<&LayoutSpec>) -> Result<Dump, DumpError> {
        let known = self.options.of_file(layout);
        if let Some(base) = &self.options.base {
            return known.open_over(self.memory_file(), base);
        }
        let spool = self.spool_of(&known)?;
        let dump = match spool.as_ref().or(self.piped.as_ref()) {
            Some(spool) => known.open_spooled(spool)?,
            None => known.open(self.memory_file())?,
        };
        // What is in there may have been compressed too.
        if let Some(spool) = dump.spool() {
            *self.spool() = Some(spool.clone());
        }
        Ok(dump)
    }

    /// The bytes that came through a pipe or were compressed: the file is decompressed once, also if no
    /// layout is known in which it can be opened.
    fn spool_of(&self, known: &DumpOptions) -> Result<Option<Spool>, DumpError> {
        let mut spool = self.spool();
        if spool.is_none() {
            *spool = match &self.piped {
                Some(piped) => known.unpack_spooled(piped)?,
                None => known.unpack(self.memory_file())?,
            };
        }
        Ok(spool.clone())
    }

    fn spool(&self) -> MutexGuard<'_, Option<Spool>> {
        self.spool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The note on a file that somebody may be writing while it is read.
    pub(crate) fn in_use(&self) -> Option<Note> {
        match check_not_written(self.memory_file()) {
            Err(DumpError::InUse { path, writer }) => Some(Note::InUse { path, writer }),
            Err(DumpError::MayBeInUse { path, .. }) => Some(Note::MayBeInUse { path }),
            _ => None,
        }
    }

    /// Notes of what the files beside the memory say, and whether somebody is writing it.
    pub(crate) fn notes(&self) -> Vec<Note> {
        let files = self.files.notes().iter().cloned().map(Note::Files);
        files.chain(self.in_use()).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may stop anywhere")]

    use super::Snapshot;
    use crate::options::OpenOptions;
    use sonicshot_dump::{DumpError, LayoutSpec};
    use std::fs;

    /// A migration stream of a page, of a machine that nobody knows.
    fn stream() -> Vec<u8> {
        let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x07strange\x01\0\0\0\x02\x03ram".to_vec();
        out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
        out.extend((4096_u64 | 4).to_be_bytes());
        out.extend(b"\x06pc.ram");
        out.extend(4096_u64.to_be_bytes());
        let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
        out.extend(end);
        out.extend(b"\x03\0\0\0\x02");
        out.extend(8_u64.to_be_bytes());
        out.extend(b"\x06pc.ram");
        out.extend([7; 4096]);
        out.extend(end);
        out.extend(b"\x04 the devices' state");
        out
    }

    #[test]
    fn a_compressed_file_is_decompressed_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream.zst");
        fs::write(&path, zstd::encode_all(&stream()[..], 1).unwrap()).unwrap();
        let snapshot = Snapshot::open(&path, &OpenOptions::new()).unwrap();
        let no_layout = snapshot.dump(None);
        assert!(
            matches!(no_layout, Err(DumpError::NoLayout { .. })),
            "{no_layout:?}"
        );
        // What is there now is not looked at again.
        fs::write(&path, b"something else").unwrap();
        let dump = snapshot.dump(Some(&LayoutSpec::Flat)).unwrap();
        assert_eq!(dump.format(), "QEMU migration stream");
    }
}
