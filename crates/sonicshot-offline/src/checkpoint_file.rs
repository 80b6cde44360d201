//! A checkpoint made a dump again, and checked.

use crate::blobs::{self, Beside, open_blob};
use crate::error::OfflineError;
use crate::note::Note;
use crate::options::OpenOptions;
use crate::place;
use crate::snapshot::Snapshot;
use crate::untold::{assumed, named_machine};
use sonicshot::checkpoint::{CheckpointError, CheckpointReader, PageContent, SaveStats};
use sonicshot::{
    Architecture, FileId, FileStamp, MemoryError, Pfn, Progress, Tally, WorkOptions, open_file,
};
use sonicshot_dump::{
    CoreNotes, DiskImage, Dump, DumpError, DumpFile, DumpFormat, DumpOptions, LayoutSpec, NewFile,
    Overwrite, Spool, WriteOptions, XlSkeleton, check_not_foreign,
};
use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A checkpoint in a file.
#[derive(Debug)]
pub struct CheckpointFile {
    path: PathBuf,
    reader: CheckpointReader<File>,
    /// The file's state before it was opened.
    stamp: FileStamp,
    /// The disks' images that were given.
    images: Vec<Arc<DiskImage>>,
}

/// The form of file that a checkpoint is made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RestoreTo {
    /// Raw guest RAM.
    #[default]
    Raw,
    /// An ELF core.
    Elf,
    /// The Xen save image that it was made of.
    Xl,
}

/// Options for making a checkpoint a dump again.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// The form of the output.
    pub to: RestoreTo,
    /// Whether files that exist are replaced.
    pub overwrite: Overwrite,
    /// The number of threads; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// The blobs to be written to files too: the name of each, and the file's.
    pub blobs: Vec<(String, PathBuf)>,
    /// Whoever is told how far it is, in bytes.
    pub progress: Option<Arc<dyn Progress>>,
}

impl RestoreOptions {
    /// The memory alone, into a file that must not exist.
    #[must_use]
    pub fn new(to: RestoreTo) -> Self {
        Self {
            to,
            overwrite: Overwrite::Refuse,
            threads: None,
            blobs: Vec::new(),
            progress: None,
        }
    }

    /// Says whether files that exist are replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Says how many threads work.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Writes the blob `name` to the file at `path` too.
    #[must_use]
    pub fn blob(mut self, name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        self.blobs.push((name.into(), path.as_ref().to_owned()));
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    fn writing(&self) -> WriteOptions {
        let mut writing = WriteOptions::new().overwrite(self.overwrite);
        writing.progress.clone_from(&self.progress);
        writing
    }

    fn work(&self) -> sonicshot::checkpoint::RestoreOptions {
        let mut work = sonicshot::checkpoint::RestoreOptions::new();
        work.threads = self.threads;
        work.progress.clone_from(&self.progress);
        work
    }
}

/// Options for adding blobs to a checkpoint; by default nothing that is there is replaced.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AttachOptions {
    /// Whether a file that exists is replaced.
    pub overwrite: Overwrite,
    /// Whether a blob whose name is taken takes the place of that one.
    pub replace: bool,
    /// Whoever is told how far it is, in bytes of the checkpoint.
    pub progress: Option<Arc<dyn Progress>>,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            overwrite: Overwrite::Refuse,
            replace: false,
            progress: None,
        }
    }
}

impl AttachOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says whether a file that exists is replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Says whether a blob whose name is taken takes the place of that one.
    #[must_use]
    pub fn replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

/// The result of making a checkpoint a dump again.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Restored {
    /// The space that the dump takes on disk, in bytes.
    pub disk_bytes: u64,
    /// Notes for people.
    pub notes: Vec<Note>,
}

impl CheckpointFile {
    /// Opens a checkpoint; its directory is checked, its pages are not read.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] if it is none or damaged, [`DumpError::NotRead`] if it is of
    /// another tool's format, [`OfflineError::NotAFile`] if it is a pipe or a device: one that nobody
    /// writes to would be waited for.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OfflineError> {
        let path = path.as_ref();
        let file = open_file(path).map_err(|source| match source.raw_os_error() {
            Some(_) => OfflineError::io("opening", path)(source),
            None => OfflineError::NotAFile {
                path: path.to_owned(),
                source,
            },
        })?;
        Self::of_file(path, file).map_err(|error| match check_not_foreign(path) {
            Err(foreign) if error.is_no_checkpoint() => foreign.into(),
            _ => error,
        })
    }

    /// Takes a checkpoint that comes through a pipe, which messages call `name`, once and from
    /// front to back. It is put into a nameless temporary file, as small as it is: what it holds is
    /// told at its end. It has at most [`max_size`](OpenOptions::max_size) bytes, or half of what is free
    /// where it is put.
    ///
    /// # Errors
    /// [`OfflineError::Dump`] if it cannot be read to its end or is too long, and as
    /// [`open`](Self::open).
    pub fn from_reader(
        name: impl AsRef<Path>,
        reader: impl Read,
        options: &OpenOptions,
    ) -> Result<Self, OfflineError> {
        let mut known = DumpOptions::new();
        known.progress.clone_from(&options.progress);
        let spool = known.spool(name, reader, options.max_size)?;
        Self::of_spool(&spool).map_err(|error| match spool.check_not_foreign() {
            Err(foreign) if error.is_no_checkpoint() => foreign.into(),
            _ => error,
        })
    }

    /// The checkpoint that came through a pipe.
    pub(crate) fn of_spool(spool: &Spool) -> Result<Self, OfflineError> {
        let file = spool.file().try_clone();
        let file = file.map_err(OfflineError::io("opening", spool.name()))?;
        Self::of_file(spool.name(), file)
    }

    fn of_file(path: &Path, file: File) -> Result<Self, OfflineError> {
        let stamp = FileStamp::of(&file).map_err(OfflineError::io("reading", path))?;
        let watch = file.try_clone();
        let watch = watch.map_err(OfflineError::io("opening", path))?;
        let reader = CheckpointReader::new(file).map_err(|source| {
            let error = OfflineError::checkpoint(path)(source);
            check_stamp(&watch, path, stamp).err().unwrap_or(error)
        })?;
        Ok(Self {
            reader,
            path: path.to_owned(),
            stamp,
            images: Vec::new(),
        })
    }

    /// The same with another reader, to which `images` were given.
    pub(crate) fn map_reader(
        mut self,
        images: Vec<Arc<DiskImage>>,
        map: impl FnOnce(CheckpointReader<File>) -> Result<CheckpointReader<File>, CheckpointError>,
    ) -> Result<Self, OfflineError> {
        self.reader = map(self.reader).map_err(OfflineError::checkpoint(&self.path))?;
        self.images = images;
        Ok(self)
    }

    /// Refuses a file that was changed since it was opened, and images of disks that were.
    pub(crate) fn check_unchanged(&self) -> Result<(), OfflineError> {
        check_stamp(self.reader.source(), &self.path, self.stamp)?;
        Ok(self
            .images
            .iter()
            .try_for_each(|image| image.check_unchanged())?)
    }

    /// The trouble with a file that has changed says less than that it has.
    pub(crate) fn blamed<T>(&self, result: Result<T, OfflineError>) -> Result<T, OfflineError> {
        result.map_err(|error| self.check_unchanged().err().unwrap_or(error))
    }

    /// Whether the file at `path` begins as a checkpoint.
    ///
    /// # Errors
    /// [`OfflineError::Io`] if there is a file that cannot be read.
    pub fn is_at(path: &Path) -> Result<bool, OfflineError> {
        // To open a pipe that nobody writes would take for ever.
        let may_be =
            |metadata: Metadata| metadata.is_file() || metadata.file_type().is_block_device();
        if !fs::metadata(path).is_ok_and(may_be) {
            return Ok(false);
        }
        let file = File::open(path).map_err(OfflineError::io("opening", path))?;
        begins(&file).map_err(OfflineError::io("reading", path))
    }

    /// Its content.
    #[must_use]
    pub fn reader(&self) -> &CheckpointReader<File> {
        &self.reader
    }

    /// The reader, from now on by itself.
    #[must_use]
    pub fn into_reader(self) -> CheckpointReader<File> {
        self.reader
    }

    /// The amount of RAM that was not in what it was made of, in bytes: it reads as zero.
    #[must_use]
    pub fn missing_bytes(&self) -> u64 {
        let pages = self.reader.stats().absent;
        let page_size = self.reader.info().page_size;
        Tally::new(pages).times(page_size.bytes()).get()
    }

    /// Notes for people on what it lacks.
    #[must_use]
    pub fn notes(&self) -> Vec<Note> {
        self.lacks(Note::AbsentBefore {
            bytes: self.missing_bytes(),
        })
    }

    /// Notes of what it lacks, with `absent` if some was not in what it was made of.
    pub(crate) fn lacks(&self, absent: Note) -> Vec<Note> {
        let for_analysis = self.reader.info().for_analysis.then_some(Note::ForAnalysis);
        let absent = (self.missing_bytes() > 0).then_some(absent);
        for_analysis.into_iter().chain(absent).collect()
    }

    /// The same of an output that leaves out what is absent.
    pub(crate) fn lacks_still(&self) -> Vec<Note> {
        self.lacks(Note::AbsentKept {
            bytes: self.missing_bytes(),
            why: None,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the checkpoint once more, with these files as blobs besides: the name and file of
    /// each. All else stays as it is stored, each part checked. A name that is taken is refused, or
    /// its blob left out if the options say so. The file appears whole or not at all. Returns what
    /// is in it, and the bytes that it takes on disk.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] if a name is taken or the checkpoint damaged; why a file cannot
    /// be read or written.
    pub fn attach(
        &self,
        out: impl AsRef<Path>,
        blobs: &[(String, PathBuf)],
        options: &AttachOptions,
    ) -> Result<(SaveStats, u64), OfflineError> {
        let files = blobs.iter().map(|(_, path)| open_blob(path));
        let mut files = files.collect::<Result<Vec<_>, _>>()?;
        let mut inputs = vec![self.reader.source()];
        inputs.extend(&files);
        let path = out.as_ref();
        let out = NewFile::create(path, options.overwrite, &inputs)?;
        let names = blobs.iter().map(|(name, _)| name.as_str());
        let contents = files.iter_mut().map(|file| file as &mut dyn Read);
        let written = BufWriter::with_capacity(1 << 20, out.file());
        let blobs = names.zip(contents).collect();
        let (replace, progress) = (options.replace, &options.progress);
        let attached = self.reader.attach(blobs, replace, written, progress);
        let attached = attached.map_err(OfflineError::made_of(&self.path, path));
        let (_, stats) = self.blamed(attached)?;
        self.check_unchanged()?;
        Ok((stats, out.finish_told(progress)?))
    }

    /// Refuses to go on if pages are on a disk that was not given.
    pub(crate) fn check_disks(&self) -> Result<(), OfflineError> {
        let checked = self.reader.check_disks();
        checked.map_err(OfflineError::checkpoint(&self.path))
    }

    /// Makes a dump of it again.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] if it is damaged or lacks a blob, [`OfflineError::NoImage`] if
    /// it is to be a Xen image and was none, [`OfflineError::SameOutput`] if a file is named twice,
    /// [`OfflineError::Dump`] if an output exists or writing fails.
    pub fn restore(
        &self,
        out: impl AsRef<Path>,
        options: &RestoreOptions,
    ) -> Result<Restored, OfflineError> {
        let restore = || {
            self.check_disks()?;
            check_apart(out.as_ref(), &options.blobs)?;
            let mut files = Vec::new();
            for (name, path) in &options.blobs {
                let file = self.blob_to(name, path, options.overwrite)?;
                files.push(file.ready()?);
            }
            // What is wrong with the checkpoint shows before the first file has its name.
            let disk_bytes = self.memory_to(out.as_ref(), options)?;
            for file in files {
                file.place()?;
            }
            let mut notes = match options.to {
                RestoreTo::Raw | RestoreTo::Elf => self.notes(),
                RestoreTo::Xl => self.lacks_still(),
            };
            notes.extend(assumed(self.machine()).filter(|_| options.to == RestoreTo::Elf));
            Ok(Restored { disk_bytes, notes })
        };
        self.blamed(restore())
    }

    /// Refuses to go on if it was made of no Xen image, or has pages on a disk that was not given.
    ///
    /// # Errors
    /// [`OfflineError::NoImage`], [`OfflineError::Checkpoint`].
    pub fn check_xl(&self) -> Result<(), OfflineError> {
        let check = || self.check_disks().and_then(|()| self.xl_skeleton());
        self.blamed(check()).map(drop)
    }

    /// Writes the Xen image that it was made of into a pipe, which messages call `name`. What is written
    /// is an image only if this returns without an error. Returns notes for people.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] if it is damaged or lacks a disk, [`OfflineError::NoImage`] if it was
    /// no Xen image, [`OfflineError::Dump`] if writing fails.
    pub fn restore_xl_to_writer(
        &self,
        out: impl Write,
        name: impl AsRef<Path>,
        progress: &dyn Progress,
    ) -> Result<Vec<Note>, OfflineError> {
        /// Pages come one by one; so much goes into the pipe at a time, in bytes.
        const AT_A_TIME: usize = 1 << 20;
        let name = name.as_ref();
        let restore = || {
            self.check_disks()?;
            let left_out = |pfn| self.left_out(pfn);
            let skeleton = self.xl_skeleton()?;
            let mut out = BufWriter::with_capacity(AT_A_TIME, out);
            let written = skeleton.write_to(&self.reader, &left_out, &mut out, name, progress);
            // Its reader lacks the end so far. Once it has that, the guest may run, and write to its disks.
            if let Err(error) = written
                .map_err(OfflineError::from)
                .and_then(|()| self.check_unchanged())
            {
                // Dropped as it is, it would give the rest away.
                let _ = out.into_parts();
                return Err(error);
            }
            out.flush().map_err(OfflineError::io("writing", name))?;
            Ok(self.lacks_still())
        };
        self.blamed(restore())
    }

    /// Writes a blob to a file that has no name yet.
    fn blob_to(
        &self,
        name: &str,
        path: &Path,
        overwrite: Overwrite,
    ) -> Result<NewFile, OfflineError> {
        let file = NewFile::create(path, overwrite, &[self.reader.source()])?;
        let copied = self.reader.copy_blob(name, &mut file.file());
        copied.map_err(OfflineError::made_of(&self.path, path))?;
        Ok(file)
    }

    fn memory_to(&self, out: &Path, options: &RestoreOptions) -> Result<u64, OfflineError> {
        let (layout, writing) = (&self.reader.info().layout, options.writing());
        let mut source = vec![self.reader.source()];
        source.extend(self.images.iter().flat_map(|image| image.files()));
        let output = match options.to {
            RestoreTo::Xl => {
                let left_out = |pfn| self.left_out(pfn);
                let skeleton = self.xl_skeleton()?;
                let written = skeleton.write(&self.reader, &left_out, out, &source, &writing);
                return Ok(written?);
            }
            RestoreTo::Raw => DumpFile::raw(out, layout, &source, &writing)?,
            RestoreTo::Elf => {
                let beside = Beside::of_checkpoint(&self.reader, &self.path)?;
                let mut notes = CoreNotes::new(named_machine(self.machine()));
                notes.notes = beside.notes;
                notes.vmcoreinfo = beside.vmcoreinfo;
                DumpFile::elf_core(out, layout, &notes, &source, &writing)?
            }
        };
        let restored = self.reader.restore(&output, &options.work());
        restored.map_err(|error| self.of_output(error))?;
        self.check_unchanged()?;
        Ok(output.finish()?)
    }

    /// Takes the failure of the file that is written for what it is, not for the checkpoint's.
    fn of_output(&self, error: CheckpointError) -> OfflineError {
        match error {
            CheckpointError::Memory(MemoryError::Backend { range, source }) => {
                match source.downcast::<DumpError>() {
                    Ok(error) => OfflineError::Dump(*error),
                    Err(source) => OfflineError::checkpoint(&self.path)(CheckpointError::Memory(
                        MemoryError::Backend { range, source },
                    )),
                }
            }
            error => OfflineError::checkpoint(&self.path)(error),
        }
    }

    /// The guest's processor, if it is said.
    pub(crate) fn machine(&self) -> Option<Architecture> {
        self.reader.info().architecture
    }

    /// The parts that make a Xen image of it again.
    pub(crate) fn xl_skeleton(&self) -> Result<XlSkeleton, OfflineError> {
        let bytes = blobs::xen_image(&self.reader, &self.path)?;
        Ok(XlSkeleton::parse(&self.path, bytes)?)
    }

    /// Whether it has no content of `pfn`, of its own accord or the source's.
    pub(crate) fn left_out(&self, pfn: Pfn) -> bool {
        let run = self.reader.run_of(pfn);
        run.is_none_or(|run| matches!(run.content, PageContent::Absent | PageContent::Free { .. }))
    }

    /// Reads every byte of it and checks its sums.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] with the first that is wrong.
    pub fn verify(&self, options: &WorkOptions) -> Result<(), OfflineError> {
        let checked = self.reader.verify(options);
        self.blamed(checked.map_err(OfflineError::checkpoint(&self.path)))?;
        self.check_unchanged()
    }

    /// Compares every kept page with the dump at `path`. A raw dump lies as `layout` says, or as
    /// the checkpoint does. Returns how many pages were compared.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] with the first page that differs, [`OfflineError::Dump`] if the
    /// dump cannot be read.
    pub fn verify_against(
        &self,
        path: impl AsRef<Path>,
        known: &OpenOptions,
        options: &WorkOptions,
    ) -> Result<u64, OfflineError> {
        let path = path.as_ref();
        self.check_disks()?;
        // A raw dump has no layout of its own: the checkpoint tells.
        let own = LayoutSpec::Ranges(self.reader.info().layout.regions().to_vec());
        let layout = known.layout.as_ref().unwrap_or(&own);
        let dump = match known.of_file(Some(layout)).open(path) {
            // Several blocks of memory: the guest has to be asked again which is where.
            Err(DumpError::LayoutLength { .. }) if known.layout.is_none() => {
                place::open(&Snapshot::open(path, known)?)?
            }
            dump => dump?,
        };
        let compared = self.reader.verify_against(&dump, options);
        let compared = compared.map_err(OfflineError::checkpoint(&self.path));
        let compared = compared.map_err(|error| blamed_on(&dump, error));
        self.blamed(compared)
    }
}

impl Snapshot {
    /// The checkpoint that it is, if it is one and no dump, nor said to be.
    ///
    /// # Errors
    /// [`OfflineError::Checkpoint`] if it is damaged, [`OfflineError::Io`] if it cannot be read.
    pub fn checkpoint(&self) -> Result<Option<CheckpointFile>, OfflineError> {
        let said = self.options().format;
        if said.is_some_and(|format| format != DumpFormat::CHECKPOINT) {
            return Ok(None);
        }
        let opened = match self.piped() {
            None => {
                let path = self.memory_file();
                let is_one = CheckpointFile::is_at(path)?;
                is_one.then(|| CheckpointFile::open(path)).transpose()?
            }
            Some(spool) => {
                let begins = begins(spool.file());
                let is_one = begins.map_err(OfflineError::io("reading", spool.name()))?;
                is_one
                    .then(|| CheckpointFile::of_spool(spool))
                    .transpose()?
            }
        };
        let disks = &self.options().disks;
        match opened {
            Some(opened) if !disks.images.is_empty() => opened.with_disks(disks).map(Some),
            opened => Ok(opened),
        }
    }
}

/// Whether a file begins as a checkpoint.
pub(crate) fn begins(file: &File) -> io::Result<bool> {
    let mut start = [0; 8];
    match file.read_exact_at(&mut start, 0) {
        Ok(()) => Ok(CheckpointReader::is_checkpoint(&start)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Refuses outputs of which one would be in another's place.
fn check_apart(out: &Path, blobs: &[(String, PathBuf)]) -> Result<(), OfflineError> {
    let mut places = HashSet::new();
    let blobs = blobs.iter().map(|(_, path)| path.as_path());
    for path in blobs.chain([out]) {
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        // A folder that is not there is told of when something is to be written in it.
        let Ok(folder) = FileId::of_path(folder.unwrap_or(Path::new("."))) else {
            continue;
        };
        if !places.insert((folder, path.file_name())) {
            let path = path.to_owned();
            return Err(OfflineError::SameOutput { path });
        }
    }
    Ok(())
}

/// Refuses a file that was changed since it was opened.
fn check_stamp(file: &File, path: &Path, before: FileStamp) -> Result<(), OfflineError> {
    let now = FileStamp::of(file).map_err(OfflineError::io("reading", path))?;
    Ok(DumpError::check_same(path, before, now)?)
}

/// The trouble with a dump whose file has changed, or cannot be read, says less than that.
pub(crate) fn blamed_on(dump: &Dump, error: OfflineError) -> OfflineError {
    let changed = dump.check_unchanged().err();
    changed.map_or(error, OfflineError::from)
}
