//! Memory files that share blocks with the images of their guests' disks, so that what both have is
//! on the host's disk once: for VMMs that know of no references.
//!
//! In place the kernel compares before it shares (`FIDEDUPERANGE`), so no byte of the file can
//! change, whatever interrupts it. By copy what is shared is never written (`FICLONERANGE`), and
//! read again and compared with the memory before the copy gets its name.

mod find;

use crate::backing::plain::PlainDump;
use crate::backing::sys::{self, Deduped, ExtentCount};
use crate::in_use;
use crate::output::sync::sync;
use crate::output::{Output, Overwrite, Target};
use crate::prune::copy::Copier;
use crate::{DiskImage, Dump, DumpError};
use find::{Found, Piece};
use sonicshot::checkpoint::DiskSource;
use sonicshot::{FileId, FileOffset, FileRange, Progress, Tally, WorkPhase, to_u64, to_usize};
use std::fs::{File, OpenOptions};
use std::io;
use std::num::{NonZeroU64, NonZeroUsize};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// The most bytes that the kernel shares at once: btrfs does no more.
const AT_ONCE: u64 = 16 << 20;
/// The amount that is compared at once.
const COMPARED: u64 = 1 << 20;

/// Options for a memory file to share blocks with disks.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShareOptions {
    /// Whether an output that exists is replaced; in place there is none.
    pub overwrite: Overwrite,
    /// The shortest run of pages that is shared; by default [`MIN_RUN`](Self::MIN_RUN).
    pub min_run: NonZeroU64,
    /// The number of threads that look for pages; by default as many as there are cores.
    pub threads: Option<NonZeroUsize>,
    /// Whoever is told how far it is, in bytes: first of the disks, then of what is shared or
    /// copied.
    pub progress: Option<Arc<dyn Progress>>,
}

impl ShareOptions {
    /// 8 pages: each run is two more extents of the file, and of one guest's page cache those of 8
    /// and more had 84 % of the pages in 6 % of the runs.
    pub const MIN_RUN: NonZeroU64 = NonZeroU64::new(8).unwrap();

    /// The defaults.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            overwrite: Overwrite::Refuse,
            min_run: Self::MIN_RUN,
            threads: None,
            progress: None,
        }
    }

    /// Says whether an output that exists is replaced.
    #[must_use]
    pub fn overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Says how many pages the shortest run has that is shared.
    #[must_use]
    pub fn min_run(mut self, pages: NonZeroU64) -> Self {
        self.min_run = pages;
        self
    }

    /// Says how many threads look for pages.
    #[must_use]
    pub fn threads(mut self, threads: NonZeroUsize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl Default for ShareOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// The result of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ShareStats {
    /// Pages that were looked for: all but those of zeroes, or of one word over and over.
    pub pages: u64,
    /// Bytes in pages that seem to be on a disk.
    pub found_bytes: u64,
    /// Runs of them that were shared.
    pub runs: u64,
    /// Bytes in these.
    pub run_bytes: u64,
    /// Bytes in runs that were too short, or not in the order of the disk.
    pub short_bytes: u64,
    /// Bytes in runs that the disk does not hold after all, and that were left as they were.
    pub differing_bytes: u64,
    /// Bytes that shared blocks before, by the file system. Of a new file 0.
    pub shared_before: u64,
    /// Bytes that share blocks now, by the file system.
    pub shared_after: u64,
    /// Extents of the file before. Of a new file 0.
    pub extents_before: u64,
    /// Extents of the file now.
    pub extents_after: u64,
}

impl ShareStats {
    fn count(&mut self, before: ExtentCount, after: ExtentCount) {
        self.extents_before = before.extents;
        self.shared_before = before.shared;
        self.extents_after = after.extents;
        self.shared_after = after.shared;
    }

    fn shared(&mut self, piece: &Piece) {
        self.runs = Tally::new(self.runs).and(1).get();
        self.run_bytes = Tally::new(self.run_bytes).and(piece.file.len()).get();
    }

    fn differs(&mut self, piece: &Piece) {
        self.differing_bytes = Tally::new(self.differing_bytes).and(piece.file.len()).get();
    }
}

impl Dump {
    /// Lets the file share the blocks of `disks` that hold the same: not a byte of it changes, and
    /// whatever interrupts it, it is a whole dump.
    ///
    /// # Errors
    /// [`DumpError::CannotShare`] if its pages do not lie in it as they are,
    /// [`DumpError::NoSharing`] if the file system cannot, or an image is on another,
    /// [`DumpError::InUse`] or [`DumpError::MayBeInUse`] if somebody (perhaps) writes the file,
    /// [`DumpError::Changed`] or [`DumpError::Modified`] if somebody has.
    pub fn share_in_place(
        &self,
        disks: &[DiskImage],
        options: &ShareOptions,
    ) -> Result<ShareStats, DumpError> {
        let dump = self.sharable()?;
        drop(open_to_share(dump, disks)?);
        let found = Found::new(dump, disks, options)?;
        options.progress.begin(WorkPhase::Sharing);
        let mut stats = found.stats;
        if found.pieces.is_empty() {
            let now = counted(dump.file(), dump.file_len(), dump.path())?;
            stats.count(now, now);
            return Ok(stats);
        }
        // Looking took its time.
        let file = open_to_share(dump, disks)?;
        let before = counted(&file, dump.file_len(), dump.path())?;
        let total = sum_of(&found.pieces);
        let mut done = Tally::ZERO;
        for piece in &found.pieces {
            let image = disk_of(disks, piece, dump)?;
            let failed = |source| DumpError::SharedInPart {
                path: dump.path().to_owned(),
                image: image.path().to_owned(),
                source,
            };
            match dedupe(raw_of(image)?, piece, &file).map_err(failed)? {
                true => stats.shared(piece),
                false => stats.differs(piece),
            }
            done.add(piece.file.len());
            options.progress.tell(done.get(), total);
        }
        sync(&file, &options.progress).map_err(DumpError::io("writing", dump.path()))?;
        let after = counted(&file, dump.file_len(), dump.path())?;
        stats.count(before, after);
        dump.check_length()?;
        Ok(stats)
    }

    /// Writes a copy to `out` that shares the blocks of `disks` that hold the same; what else it
    /// has is copied, and holes stay holes. It appears whole or not at all.
    ///
    /// # Errors
    /// As [`share_in_place`](Self::share_in_place), [`DumpError::Exists`] or
    /// [`DumpError::SameFile`].
    pub fn share_to(
        &self,
        out: &Path,
        disks: &[DiskImage],
        options: &ShareOptions,
    ) -> Result<ShareStats, DumpError> {
        self.share_at(Target::new(out, options.overwrite), disks, options)
    }

    pub(crate) fn share_at(
        &self,
        out: Target<'_>,
        disks: &[DiskImage],
        options: &ShareOptions,
    ) -> Result<ShareStats, DumpError> {
        let dump = self.sharable()?;
        self.check_unchanged()?;
        let mut inputs = self.files();
        for image in disks {
            inputs.push(raw_of(image)?);
        }
        let output = Output::create(out, &inputs)?;
        for image in disks {
            probe_clone(image, &output)?;
        }
        let found = Found::new(dump, disks, options)?;
        options.progress.begin(WorkPhase::Sharing);
        let mut stats = found.stats;
        let writing = || DumpError::io("writing", output.path());
        let file = output.file();
        file.set_len(dump.file_len()).map_err(writing())?;
        let mut copier = Copier::new(dump, &output, dump.file_len(), &options.progress).by_bytes();
        let mut at = FileOffset::ZERO;
        for piece in &found.pieces {
            let image = disk_of(disks, piece, dump)?;
            copier.copy(FileRange::new(at, piece.file.start()), at)?;
            let cloned = sys::clone_range(raw_of(image)?, piece.disk, file, piece.file.start());
            cloned.map_err(no_sharing(output.path(), image))?;
            if same(dump, file, piece.file).map_err(writing())? {
                stats.shared(piece);
                copier.skip(piece.file.len());
            } else {
                stats.differs(piece);
                copier.copy_all(piece.file)?;
            }
            at = piece.file.end();
        }
        copier.copy(FileRange::new(at, dump.file_range().end()), at)?;
        sync(file, &options.progress).map_err(writing())?;
        let after = counted(file, dump.file_len(), output.path())?;
        stats.count(ExtentCount::default(), after);
        self.check_unchanged()?;
        output.finish(&options.progress)?;
        Ok(stats)
    }
}

fn no_sharing(path: &Path, image: &DiskImage) -> impl Fn(io::Error) -> DumpError + use<> {
    let (path, image) = (path.to_owned(), image.path().to_owned());
    move |source| DumpError::NoSharing {
        path: path.clone(),
        image: image.clone(),
        source,
    }
}

fn counted(file: &File, len: u64, path: &Path) -> Result<ExtentCount, DumpError> {
    sys::count_extents(file, len).map_err(DumpError::io("counting the extents of", path))
}

fn sum_of(pieces: &[Piece]) -> u64 {
    let lengths = pieces.iter().map(|piece| piece.file.len());
    lengths.sum::<Tally>().get()
}

/// The image that a piece is in.
fn disk_of<'a>(
    disks: &'a [DiskImage],
    piece: &Piece,
    dump: &PlainDump,
) -> Result<&'a DiskImage, DumpError> {
    let found = disks.get(piece.number);
    let number = to_u64(piece.number);
    found.ok_or_else(|| {
        DumpError::malformed(dump.path(), "a disk's number", piece.file.start(), number)
    })
}

/// Opens the file for writing, if it is what was opened, nobody else writes it, and it can share
/// blocks with each of the images.
fn open_to_share(dump: &PlainDump, disks: &[DiskImage]) -> Result<File, DumpError> {
    let path = dump.path();
    dump.check_length()?;
    dump.check_unchanged()?;
    in_use::check(dump.file(), path)?;
    let file = OpenOptions::new()
        .write(true)
        .read(true)
        .open(path)
        .map_err(DumpError::io("opening for writing", path))?;
    // Not one that took its name since.
    let identity = |file| FileId::of(file).map_err(DumpError::io("reading", path));
    let ours = identity(&file)?;
    if ours != identity(dump.file())? {
        return Err(DumpError::NotADump {
            path: path.into(),
            why: "another file has taken its place since it was read",
        });
    }
    for image in disks {
        if identity(raw_of(image)?)? == ours {
            return Err(DumpError::SameFile { path: path.into() });
        }
        let block = find::block_of(dump.file(), path)?;
        let first = FileRange::new(FileOffset::ZERO, FileOffset::new(block));
        if first.end() > dump.file_range().end() || image_len(image)? < block {
            continue;
        }
        // Whatever they hold: what is the same may be shared, and what is not is left.
        sys::dedupe_range(raw_of(image)?, first, &file, FileOffset::ZERO)
            .map_err(no_sharing(path, image))?;
    }
    Ok(file)
}

/// The file whose blocks are shared: pages are found on the guest's disk, which a qcow2 image is not.
fn raw_of(image: &DiskImage) -> Result<&File, DumpError> {
    image.raw_file().ok_or_else(|| DumpError::NotRead {
        path: image.path().to_owned(),
        kind: "a qcow2 image",
        instead: "memory shares the blocks of raw images alone: make one (`qemu-img convert -O raw`), or \
                  leave the pages out of a checkpoint (`save --disk`), which reads qcow2",
    })
}

fn image_len(image: &DiskImage) -> Result<u64, DumpError> {
    image
        .disk_len()
        .map_err(DumpError::io("reading", image.path()))
}

/// Refuses an image whose blocks a new file cannot share, before the work.
fn probe_clone(image: &DiskImage, output: &Output) -> Result<(), DumpError> {
    let block = find::block_of(output.file(), output.path())?;
    if image_len(image)? < block {
        return Ok(());
    }
    let first = FileRange::new(FileOffset::ZERO, FileOffset::new(block));
    sys::clone_range(raw_of(image)?, first, output.file(), FileOffset::ZERO)
        .map_err(no_sharing(output.path(), image))?;
    let emptied = output.file().set_len(0);
    emptied.map_err(DumpError::io("writing", output.path()))
}

/// Lets `file` share the piece of the image, if it is the same.
fn dedupe(image: &File, piece: &Piece, file: &File) -> io::Result<bool> {
    let beyond = || io::Error::from(io::ErrorKind::InvalidData);
    let (mut from, mut to) = (piece.disk, piece.file.start());
    while !from.is_empty() {
        let now = from.up_to(AT_ONCE);
        let done = match sys::dedupe_range(image, now, file, to)? {
            Deduped::Differs => return Ok(false),
            Deduped::Shared(0) => return Err(io::ErrorKind::WriteZero.into()),
            Deduped::Shared(done) => done,
        };
        let start = from.start().checked_add(done).ok_or_else(beyond)?;
        from = FileRange::between(start, from.end()).ok_or_else(beyond)?;
        to = to.checked_add(done).ok_or_else(beyond)?;
    }
    Ok(true)
}

/// Whether a range of the dump's file and of a copy of it hold the same.
fn same(dump: &PlainDump, copy: &File, range: FileRange) -> io::Result<bool> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for piece in range.pieces(COMPARED) {
        let (at, len) = (piece.start(), to_usize(piece.len()));
        ours.resize(len, 0);
        theirs.resize(len, 0);
        dump.file().read_exact_at(&mut ours, at.raw())?;
        copy.read_exact_at(&mut theirs, at.raw())?;
        if ours != theirs {
            return Ok(false);
        }
    }
    Ok(true)
}
