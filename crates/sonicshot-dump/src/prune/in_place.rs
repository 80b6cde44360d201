//! Takes the dropped pages out of the file itself.
//!
//! Nothing is changed before everything is known: what is to be dropped was classified and
//! checked before this begins, then which bytes of the file that is, that it is still the same
//! file, that nobody else writes it, and that its file system punches holes. From there on each
//! step leaves a valid dump.

use crate::backing::plain::PlainDump;
use crate::format::ability::InPlace;
use crate::guard::CheckedPlan;
use crate::in_use as live;
use crate::output::sync::sync;
use crate::prune::holes::{
    PruneOptions, block_size, extents_without, join, smallest_hole, sum_in, sum_of, whole_blocks,
};
use crate::prune::stats::PruneStats;
use crate::prune::stats::bytes_of_blocks;
use crate::{Dump, DumpError};
use rustix::fs::{FallocateFlags, SeekFrom, StatFs, fallocate, fstatfs, seek};
use rustix::io::Errno;
use sonicshot::{
    ClassSet, DropClasses, FileId, FileOffset, FileRange, FileStamp, Progress, Tally, to_u64,
};
use sonicshot_vmi::Analysis;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

impl CheckedPlan<'_> {
    /// Punches the pages that go out of the file itself.
    ///
    /// Nothing is copied, and each step only makes pages that go read as zero, so whatever
    /// interrupts it leaves a valid dump. What is a hole already is not touched. In a
    /// mapped-ram file the marks of all these pages are cleared, and are on disk, before the
    /// first hole is punched.
    ///
    /// # Errors
    /// [`DumpError::NotInPlace`] for a format that holes do not fit, [`DumpError::NoHoles`] if
    /// the file system cannot punch them, [`DumpError::InUse`] or [`DumpError::MayBeInUse`] if
    /// somebody (perhaps) writes the file, [`DumpError::Changed`] or [`DumpError::Modified`] if
    /// somebody has; the file is then as it was.
    pub fn prune_in_place(&self, options: &PruneOptions) -> Result<PruneStats, DumpError> {
        check_unchanged(self.dump().in_place()?.source(), options)?;
        let Prepared {
            format,
            mut stats,
            marks,
            holes,
            block,
        } = self.prepare(options)?;
        let dump = format.source();
        if !stats.changed {
            return Ok(stats);
        }
        format.check_others()?;
        let file = open_to_change(dump, options)?;
        if !holes.is_empty() {
            probe(&file, dump.path(), dump.file_len(), block)?;
        }
        write_marks(&file, dump.path(), &marks)?;
        punch_all(&file, dump.path(), &holes, &options.progress)?;
        let now = file.metadata().map_err(|source| DumpError::Unsettled {
            path: dump.path().to_owned(),
            what: "how much of the disk it takes now cannot be told".into(),
            source,
        })?;
        stats.disk_after = bytes_of_blocks(&now);
        stats.freed_bytes = Tally::new(stats.disk_before)
            .without(stats.disk_after)
            .get();
        // Who cut it meanwhile is to know what it is that was pruned.
        let before = dump.file_len();
        dump.note_change(FileStamp::from(&now));
        if now.len() != before {
            return Err(DumpError::Changed {
                path: dump.path().to_owned(),
                before,
                now: now.len(),
            });
        }
        Ok(stats)
    }

    /// The result that a prune in place would have: nothing is changed, and who has the file open
    /// does not matter. What the file takes on disk after it is told as if each byte were on it.
    ///
    /// # Errors
    /// [`DumpError::NotInPlace`] for a format that holes do not fit, [`DumpError::Io`] if the file
    /// cannot be read.
    pub fn expect_in_place(&self, options: &PruneOptions) -> Result<PruneStats, DumpError> {
        let Prepared {
            format,
            mut stats,
            holes,
            ..
        } = self.prepare(options)?;
        stats.freed_bytes = match format.source().data_extents() {
            Some(data) => sum_in(data, &holes),
            None => sum_of(&holes),
        };
        stats.disk_after = Tally::new(stats.disk_before)
            .without(stats.freed_bytes)
            .get();
        Ok(stats)
    }

    /// Finds out what is to be done.
    fn prepare(&self, options: &PruneOptions) -> Result<Prepared<'_>, DumpError> {
        let format = self.dump().in_place()?;
        let dump = format.source();
        let mut stats = self.begin_with(&[dump.file()])?;
        let punching = format.punching(self.goes(), &mut stats)?;
        let system = fstatfs(dump.file())
            .map_err(|error| DumpError::io("reading", dump.path())(error.into()))?;
        let block = block_size(&system);
        let data = Data::of(dump, &system);
        let holes = worth_punching(punching.runs, options, &data, block, &mut stats);
        if let Some(extents) = data.extents {
            stats.extents_before = Some(to_u64(extents.len()));
            stats.extents_after = Some(extents_without(extents, &holes));
        }
        stats.punched = to_u64(holes.len());
        stats.changed = !punching.marks.is_empty() || !holes.is_empty();
        stats.disk_after = stats.disk_before;
        Ok(Prepared {
            format,
            stats,
            marks: punching.marks,
            holes,
            block,
        })
    }
}

/// Whether a prune in place that makes holes of all pages of zeroes would find one to make: not so
/// where another has made them.
///
/// # Errors
/// [`DumpError::NotInPlace`] and the like if the file cannot be pruned so.
pub fn has_zeroes_to_punch(dump: &Dump, guest: &Analysis) -> Result<bool, DumpError> {
    let zeroes = guest.plan(&DropClasses(ClassSet::EMPTY.with_zero()));
    let plan = CheckedPlan::of(dump, zeroes);
    Ok(plan.expect_in_place(&PruneOptions::new())?.changed)
}

/// The facts that are known before the file is changed.
struct Prepared<'a> {
    format: &'a dyn InPlace,
    stats: PruneStats,
    /// The bytes that are written before the first hole is punched, each with its offset.
    marks: Vec<(FileOffset, Vec<u8>)>,
    holes: Vec<FileRange>,
    /// The file system's block.
    block: u64,
}

/// Of the runs that go, the whole blocks that are worth a hole; what is left is counted.
fn worth_punching(
    runs: Vec<FileRange>,
    options: &PruneOptions,
    data: &Data<'_>,
    block: u64,
    stats: &mut PruneStats,
) -> Vec<FileRange> {
    let runs = join(runs);
    // By all that is dropped, whether it is a hole already or not: so a prune that follows an
    // interrupted one leaves what that would have left.
    let min_hole = options.min_hole.unwrap_or_else(|| smallest_hole(&runs));
    let runs = data.held(&runs, stats.disk_before);
    let mut holes = Vec::with_capacity(runs.len());
    let (mut left_bytes, mut left_runs) = (Tally::ZERO, Tally::ZERO);
    for run in runs {
        let hole = whole_blocks(run, block);
        let worth = !hole.is_empty() && hole.len() >= min_hole;
        let left = Tally::new(run.len()).without(if worth { hole.len() } else { 0 });
        left_bytes.add(left.get());
        if worth {
            holes.push(hole);
        } else {
            left_runs.add(1);
        }
    }
    (stats.left_bytes, stats.left_runs) = (left_bytes.get(), left_runs.get());
    holes
}

/// A prune that fails has left a valid dump.
fn in_part<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> DumpError + use<'a> {
    move |source| DumpError::PrunedInPart {
        action,
        path: path.to_owned(),
        source,
    }
}

/// First nobody may look for the pages any more: then what is left of them is as good as gone,
/// whatever happens.
fn write_marks(file: &File, path: &Path, marks: &[(FileOffset, Vec<u8>)]) -> Result<(), DumpError> {
    let writing = || in_part("writing", path);
    for (offset, bitmap) in marks {
        file.write_all_at(bitmap, offset.raw()).map_err(writing())?;
    }
    if marks.is_empty() {
        return Ok(());
    }
    file.sync_all().map_err(writing())
}

/// Punches the holes.
fn punch_all(
    file: &File,
    path: &Path,
    holes: &[FileRange],
    progress: &dyn Progress,
) -> Result<(), DumpError> {
    let total = sum_of(holes);
    let mut done = Tally::ZERO;
    for hole in holes {
        let failed = in_part("punching a hole into", path);
        punch(file, *hole).map_err(|error| failed(error.into()))?;
        done.add(hole.len());
        progress.tell(done.get(), total);
    }
    if !holes.is_empty() {
        sync(file, progress).map_err(in_part("writing", path))?;
    }
    Ok(())
}

/// Refuses a file that is not as it was when it was opened, or that somebody writes.
fn check_unchanged(dump: &PlainDump, options: &PruneOptions) -> Result<(), DumpError> {
    dump.check_length()?;
    if !options.live_ok {
        dump.check_unchanged()?;
        live::check(dump.file(), dump.path())?;
    }
    Ok(())
}

/// Opens the file that was classified for writing, right before it is changed.
fn open_to_change(dump: &PlainDump, options: &PruneOptions) -> Result<File, DumpError> {
    let path = dump.path();
    check_unchanged(dump, options)?;
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(DumpError::io("opening for writing", path))?;
    // Not one that took its name since.
    let identity = |file| FileId::of(file).map_err(DumpError::io("reading", path));
    if identity(&file)? != identity(dump.file())? {
        return Err(DumpError::NotADump {
            path: path.into(),
            why: "another file has taken its place since it was read",
        });
    }
    Ok(file)
}

/// The ranges of a file that have data, by its file system.
struct Data<'a> {
    file: &'a File,
    len: u64,
    /// All of it; `None` if it costs as much to ask as to punch: in memory each page is looked
    /// at.
    extents: Option<&'a [FileRange]>,
}

impl<'a> Data<'a> {
    fn of(dump: &'a PlainDump, system: &StatFs) -> Self {
        /// `include/uapi/linux/magic.h`: tmpfs, ramfs, hugetlbfs.
        const IN_MEMORY: [u32; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];
        // Magic numbers have 32 bits, whatever the type.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "as it says"
        )]
        let in_memory = IN_MEMORY.contains(&(system.f_type as u32));
        Self {
            file: dump.file(),
            len: dump.file_len(),
            extents: (!in_memory).then(|| dump.data_extents()).flatten(),
        }
    }

    /// The runs that hold data.
    ///
    /// Space that is allocated but was never written looks like a hole. So where there may be
    /// such space in a file that takes `on_disk` bytes, that is every run.
    fn held(&self, runs: &[FileRange], on_disk: u64) -> Vec<FileRange> {
        let held: Vec<FileRange> = runs
            .iter()
            .copied()
            .filter(|run| self.holds(*run))
            .collect();
        let in_data = match self.extents {
            Some(extents) => Some(sum_of(extents)),
            None => sum_of(runs)
                .checked_sub(sum_of(&held))
                .and_then(|holes| self.len.checked_sub(holes)),
        };
        // The file system's own blocks count too: 1.5 % and 1 MiB are more than they take.
        let expected = in_data.and_then(|len| len.checked_add(len >> 6)?.checked_add(1 << 20));
        if expected.is_some_and(|expected| on_disk > expected) {
            runs.to_vec()
        } else {
            held
        }
    }

    fn holds(&self, run: FileRange) -> bool {
        if let Some(extents) = self.extents {
            let index = extents.partition_point(|data| data.end() <= run.start());
            let next = extents.get(index);
            return next.is_some_and(|data| data.start() < run.end());
        }
        match seek(self.file, SeekFrom::Data(run.start().raw())) {
            Ok(data) => data < run.end().raw(),
            Err(Errno::NXIO) => false,
            // It cannot tell.
            Err(_) => true,
        }
    }
}

/// Finds out whether holes can be punched, by punching one where there is nothing: behind the
/// end of the file.
fn probe(file: &File, path: &Path, file_len: u64, block: u64) -> Result<(), DumpError> {
    let behind = FileOffset::new(file_len).checked_align_up(block);
    let Some(behind) = behind.and_then(|behind| FileRange::with_len(behind, block)) else {
        return Ok(());
    };
    match punch(file, behind) {
        // Too big: a file as long as the file system allows.
        Ok(()) | Err(Errno::FBIG) => Ok(()),
        Err(error @ (Errno::OPNOTSUPP | Errno::NOSYS)) => Err(DumpError::NoHoles {
            path: path.into(),
            source: error.into(),
        }),
        Err(error) => Err(DumpError::io("punching a hole into", path)(error.into())),
    }
}

fn punch(file: &File, hole: FileRange) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(file, flags, hole.start().raw(), hole.len()) {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}
