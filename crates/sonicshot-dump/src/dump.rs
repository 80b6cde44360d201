//! A dump of any format.

use crate::backing::plain::{PlainDump, is_block_device};
use crate::backing::spool::Spool;
use crate::format::ability::{AsStream, ByCopy, InPlace, Migration};
use crate::format::kind::Format;
use crate::format::qemu::{migration, start};
use crate::output::{Output, Target, WriteOptions};
use crate::prune::stats::disk_usage;
use crate::{DumpError, DumpOptions, LayoutSpec, RamBlock};
use sonicshot::{
    Architecture, ClassSet, Disposition, FileStamp, Fill, Gpa, GpaRange, GuestMemory, Mapped,
    MemoryError, P2m, PageMap, PageSize, PfnRange, Processors, Progress, PrunePlan, RamLayout,
    Tally,
};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The reason why a dump lacks pages that it should have.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Incomplete {
    /// Its header says so: there was no room to write it to the end.
    Said,
    /// The place of its last page was never written: whoever wrote it was stopped.
    Unwritten,
    /// The file ends before its last page does.
    CutOff {
        /// Its length in bytes.
        len: u64,
        /// The end of the content that it should have, as far as that is known.
        need: u64,
    },
    /// It is one part of several.
    Part {
        /// The frames that it has, or had before some were left out.
        frames: PfnRange,
    },
}

impl fmt::Display for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Said => f.write_str("its header says that it was not written to the end"),
            Self::Unwritten => f.write_str(
                "where its last page is was never written: whoever wrote the file was stopped",
            ),
            Self::CutOff { len, need } => write!(
                f,
                "the file is cut off: it ends at {len} bytes, and what it should have at {need}"
            ),
            Self::Part { frames } => write!(
                f,
                "it is one part of several, with frames {:#x} to {:#x} \
                 (makedumpfile --reassemble joins them)",
                frames.start().raw(),
                frames.end().raw()
            ),
        }
    }
}

/// A dump file: the guest's memory, and how the file holds it.
///
/// ```no_run
/// use sonicshot::GuestMemory;
/// use sonicshot_dump::{Dump, LayoutSpec};
/// let dump = Dump::open("guest.raw", Some(&LayoutSpec::Pc))?;
/// println!("{}: {} bytes of RAM", dump.format(), dump.layout().bytes());
/// # Ok::<(), sonicshot_dump::DumpError>(())
/// ```
#[derive(Debug)]
pub struct Dump {
    path: PathBuf,
    format: Box<dyn Format>,
    /// The content, if it came through a pipe.
    spool: Option<Spool>,
    /// The facts of the processors from elsewhere.
    told: Option<Processors>,
}

impl Dump {
    /// Opens the dump at `path`, its kind told by its content. What has no known beginning is
    /// raw RAM, laid out by `layout`, by default [`LayoutSpec::Pc`]. [`DumpOptions`] say what it
    /// is instead. A file that is compressed as a whole is decompressed first: see [`Spool`].
    ///
    /// # Errors
    /// [`DumpError`] if the file cannot be read, is no dump, or contradicts itself.
    pub fn open(path: impl AsRef<Path>, layout: Option<&LayoutSpec>) -> Result<Self, DumpError> {
        DumpOptions::of_layout(layout).open(path)
    }

    /// Opens a dump that came through a pipe or that was compressed. Messages call it by the
    /// spool's name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_spooled(spool: &Spool, layout: Option<&LayoutSpec>) -> Result<Self, DumpError> {
        DumpOptions::of_layout(layout).open_spooled(spool)
    }

    /// Opens a Firecracker diff snapshot's memory file at `path` over `base`, the memory it was
    /// made against (with earlier diffs merged, if there are any). Guest RAM is then the diff's
    /// data over the base's.
    ///
    /// Pruned by copy it is the merged memory, which needs no base any more. Pruned in place the
    /// diff alone is changed, and keeps what would otherwise become what the base has.
    ///
    /// # Errors
    /// [`DumpError::Base`] if the two cannot belong together, and as [`open`](Self::open).
    pub fn open_over(
        path: impl AsRef<Path>,
        base: impl AsRef<Path>,
        layout: Option<&LayoutSpec>,
    ) -> Result<Self, DumpError> {
        DumpOptions::of_layout(layout).open_over(path, base)
    }

    pub(crate) fn new(path: &Path, format: Box<dyn Format>, spool: Option<Spool>) -> Self {
        Self {
            path: path.to_owned(),
            format,
            spool,
            told: None,
        }
    }

    /// The same with what something beside the file tells of the guest's processors, such as the
    /// VMM's own state: [`SnapshotFiles::processors`](crate::SnapshotFiles::processors).
    #[must_use]
    pub fn with_processors(mut self, processors: Processors) -> Self {
        self.told = Some(processors);
        self
    }

    /// The content that came through a pipe or was compressed: to open it again without
    /// doing that again.
    #[must_use]
    pub fn spool(&self) -> Option<&Spool> {
        // What came through a pipe may have been compressed on top, and has a spool of its own.
        self.format.unpacked().or(self.spool.as_ref())
    }

    /// The format's name.
    #[must_use]
    pub fn format(&self) -> &'static str {
        self.format.name()
    }

    /// Whether a page that must read as `fill` can be dropped: does it after a restore? Mostly a
    /// dropped page reads as zero; in a Xen image nobody knows.
    #[must_use]
    pub fn restores(&self, fill: Fill) -> bool {
        fill == Fill::Any || fill == self.format.dropped_reads_as()
    }

    /// The part of `classes` that is left out of a file of this format. One in which pages of
    /// zeroes share one that is stored has them all.
    #[must_use]
    pub fn leaves_out(&self, classes: ClassSet) -> ClassSet {
        if self.format.shares_zeroes() {
            classes.without_zero()
        } else {
            classes
        }
    }

    /// The number of bytes of the file that the pages take that `plan` drops: none where they are left out
    /// already. Of a file that holds pages as they are, those are its data.
    ///
    /// # Errors
    /// [`DumpError`] if the file cannot be read.
    pub fn stored_bytes(&self, plan: &PrunePlan) -> Result<u64, DumpError> {
        let stored = self.format.stored();
        let mut sum = Tally::ZERO;
        for region in self.layout().regions() {
            for dropped in plan.dropped_in(*region) {
                sum.add(stored.stored_bytes(dropped)?);
            }
        }
        Ok(sum.get())
    }

    /// The space that the files take on disk, in bytes.
    ///
    /// # Errors
    /// [`DumpError::Io`] if that cannot be told.
    pub fn disk_bytes(&self) -> Result<u64, DumpError> {
        let mut sum = Tally::ZERO;
        for file in self.files() {
            sum.add(disk_usage(file, &self.path)?);
        }
        Ok(sum.get())
    }

    /// The part of `plan` that this format can drop: what it [restores](Self::restores).
    #[must_use]
    pub fn restorable(&self, plan: &PrunePlan) -> PrunePlan {
        if self.restores(Fill::Zero) {
            plan.clone().zero_filled_only()
        } else {
            plan.clone().any_filled_only()
        }
    }

    /// The layout of a raw file; `None` if the format itself says where RAM lies.
    #[must_use]
    pub fn layout_spec(&self) -> Option<&LayoutSpec> {
        self.format.layout()
    }

    /// Whether it is a diff that was opened over its base.
    #[must_use]
    pub fn has_base(&self) -> bool {
        self.format.base().is_some()
    }

    /// The reason why the dump lacks pages that it should have; `None` if nothing says that it does.
    #[must_use]
    pub fn incomplete(&self) -> Option<Incomplete> {
        self.format.incomplete()
    }

    /// Whether what the dump does not have may have been zeroes: whoever wrote it left out both.
    #[must_use]
    pub fn absent_may_be_zero(&self) -> bool {
        self.format.absent_may_be_zero()
    }

    /// The VMCOREINFO text that the dump carries beside the memory, if it does.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        self.format.vmcoreinfo()
    }

    /// The notes that the dump carries beside the memory, as an ELF core has them.
    #[must_use]
    pub fn core_notes(&self) -> Option<Vec<u8>> {
        self.format.notes()
    }

    /// The file. Of a dump that came through a pipe, the temporary file with its content.
    #[must_use]
    pub fn file(&self) -> &File {
        self.format.file()
    }

    /// All files that the memory comes from: [`file`](Self::file), or the one that is compressed as
    /// a whole, and the base of a diff. What is made of it is to be for no more eyes than each of
    /// them.
    #[must_use]
    pub fn files(&self) -> Vec<&File> {
        // The file that was decompressed is gone with its last user, and says nothing of rights.
        let packed = self.spool().and_then(Spool::packed);
        let file = packed.unwrap_or_else(|| self.file());
        std::iter::once(file).chain(self.format.base()).collect()
    }

    /// The machine that QEMU ran, such as `pc-i440fx-10.0`, if the dump says.
    #[must_use]
    pub fn machine_type(&self) -> Option<&str> {
        self.format.machine_type()
    }

    /// The RAM layout of a guest of that machine, if it is one whose layout is known.
    #[must_use]
    pub fn machine_layout(&self) -> Option<LayoutSpec> {
        start::layout_of(self.machine_type()?)
    }

    /// The blocks of memory of QEMU's migration files; other formats have none.
    #[must_use]
    pub fn ram_blocks(&self) -> &[RamBlock] {
        self.format.ram_blocks()
    }

    /// Whether the file holds the devices' state too, so that a guest can be restored from it.
    #[must_use]
    pub fn holds_device_state(&self) -> bool {
        self.format.holds_device_state()
    }

    /// Whether it is a Xen save image.
    #[must_use]
    pub fn is_xl(&self) -> bool {
        self.format.as_skeletal().is_some()
    }

    /// The processor that the dump says the guest has, if it says.
    #[must_use]
    pub fn machine(&self) -> Option<Architecture> {
        self.format.machine()
    }

    /// The length of the file in bytes.
    ///
    /// # Errors
    /// [`DumpError::Io`] if the system does not tell it.
    pub fn file_len(&self) -> Result<u64, DumpError> {
        let stamp = FileStamp::of(self.file());
        let stamp = stamp.map_err(DumpError::io("reading the length of", &self.path))?;
        Ok(stamp.len())
    }

    /// The parts of a Xen image beside the guest's memory: [`XlSkeleton::write`] makes an image of
    /// it again. `None` of other formats. [`CheckedPlan::xl_skeleton`] leaves pages out.
    ///
    /// # Errors
    /// [`DumpError::Xen`] if the file is no longer what was opened.
    ///
    /// [`XlSkeleton::write`]: crate::XlSkeleton::write
    /// [`CheckedPlan::xl_skeleton`]: crate::CheckedPlan::xl_skeleton
    pub fn xl_skeleton(&self) -> Result<Option<Vec<u8>>, DumpError> {
        let map = PageMap::new(self.layout(), PageSize::SIZE_4K);
        let nothing = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
        self.skeleton_without(&nothing)
    }

    pub(crate) fn skeleton_without(&self, plan: &PrunePlan) -> Result<Option<Vec<u8>>, DumpError> {
        let skeletal = self.format.as_skeletal();
        skeletal.map(|format| format.skeleton(plan)).transpose()
    }

    /// Writes the migration file again as a mapped-ram file, which QEMU 9 and later loads with
    /// the capability of that name. Of a libvirt image that is the migration file in it.
    ///
    /// # Errors
    /// [`DumpError::CannotConvert`] if it is no migration file, and what reading and writing
    /// gives; there is then no new file.
    pub fn to_mapped_ram(&self, out: &Path, options: &WriteOptions) -> Result<u64, DumpError> {
        let from = self.as_migration("a mapped-ram file")?;
        let out = Target::new(out, options.overwrite);
        self.to_migration(from, migration::Kind::MappedRam, out, &options.progress)
    }

    /// Writes the migration file again as a classic stream, which every QEMU since 5 loads. Of a
    /// libvirt image that is the migration file in it.
    ///
    /// # Errors
    /// As [`to_mapped_ram`](Self::to_mapped_ram).
    pub fn to_stream(&self, out: &Path, options: &WriteOptions) -> Result<u64, DumpError> {
        let from = self.as_migration("a migration stream")?;
        let out = Target::new(out, options.overwrite);
        self.to_migration(from, migration::Kind::Stream, out, &options.progress)
    }

    fn to_migration(
        &self,
        from: &dyn Migration,
        kind: migration::Kind,
        out: Target<'_>,
        progress: &dyn Progress,
    ) -> Result<u64, DumpError> {
        self.check_unchanged()?;
        let output = Output::create(out, &self.files())?;
        let written = migration::write(from, kind, &output, progress);
        written.map_err(|error| self.blame(error))?;
        self.check_unchanged()?;
        output.finish(progress)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn must_stay(&self) -> Vec<PfnRange> {
        self.format.must_stay()
    }

    /// Refuses files that were changed since they were opened, and such as could not be read: what
    /// is known of them, and what was written of them, is of no use.
    ///
    /// What was decompressed lies in a file of its own, and whatever becomes of the compressed one, it is what
    /// it was: see [`check_files_unchanged`](Self::check_files_unchanged).
    ///
    /// # Errors
    /// [`DumpError::Changed`], [`DumpError::Modified`] or [`DumpError::Io`].
    pub fn check_unchanged(&self) -> Result<(), DumpError> {
        self.format.stored().check_unchanged()
    }

    /// The same, also of a compressed file that the content came out of: for whoever tells what it takes of the
    /// disk.
    ///
    /// # Errors
    /// As [`check_unchanged`](Self::check_unchanged).
    pub fn check_files_unchanged(&self) -> Result<(), DumpError> {
        self.check_unchanged()?;
        let spools = [self.format.unpacked(), self.spool.as_ref()];
        spools
            .into_iter()
            .flatten()
            .try_for_each(Spool::check_packed)
    }

    /// The trouble with a file that has changed, or cannot be read, says less than that.
    pub(crate) fn blame(&self, error: DumpError) -> DumpError {
        self.check_unchanged().err().unwrap_or(error)
    }
}

/// The abilities of the format, or the refusal.
impl Dump {
    pub(crate) fn by_copy(&self) -> Result<&dyn ByCopy, DumpError> {
        self.format.by_copy().ok_or_else(|| DumpError::CannotPrune {
            path: self.path.clone(),
            why: self.format.instead(),
        })
    }

    /// Returns the ability to be changed in place; content that came through a pipe has no file for that.
    pub(crate) fn in_place(&self) -> Result<&dyn InPlace, DumpError> {
        let not_in_place = |format| DumpError::NotInPlace {
            path: self.path.clone(),
            format,
        };
        let format = self.format.in_place().filter(|_| self.spool().is_none());
        let format = format.ok_or_else(|| not_in_place(self.format()))?;
        if is_block_device(self.file()).map_err(DumpError::io("reading", &self.path))? {
            return Err(not_in_place("on a block device"));
        }
        Ok(format)
    }

    /// The file, if its pages lie in it as they are.
    pub(crate) fn sharable(&self) -> Result<&PlainDump, DumpError> {
        let cannot = |format| DumpError::CannotShare {
            path: self.path.clone(),
            format,
        };
        let format = self.format.in_place().filter(|_| self.spool().is_none());
        let format = format.ok_or_else(|| cannot(self.format()))?;
        if is_block_device(self.file()).map_err(DumpError::io("reading", &self.path))? {
            return Err(cannot("on a block device"));
        }
        Ok(format.source())
    }

    pub(crate) fn as_stream(&self) -> Result<&dyn AsStream, DumpError> {
        self.format
            .as_stream()
            .ok_or_else(|| DumpError::NotAStream {
                path: self.path.clone(),
                format: self.format(),
            })
    }

    fn as_migration(&self, to: &'static str) -> Result<&dyn Migration, DumpError> {
        self.format
            .as_migration()
            .ok_or_else(|| DumpError::CannotConvert {
                path: self.path.clone(),
                format: self.format(),
                to,
            })
    }
}

impl GuestMemory for Dump {
    fn layout(&self) -> &RamLayout {
        self.format.stored().layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.format.stored().read(at, buf)
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.format.stored().map(at, len)
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        self.format.stored().next_data(at)
    }

    fn next_absent(&self, at: Gpa) -> Result<Option<GpaRange>, MemoryError> {
        self.format.stored().next_absent(at)
    }

    fn release(&self, range: GpaRange) {
        self.format.stored().release(range);
    }

    fn prefers_read(&self) -> bool {
        self.format.stored().prefers_read()
    }

    fn p2m(&self) -> Option<&P2m> {
        self.format.p2m()
    }

    fn processors(&self) -> Processors {
        match &self.told {
            Some(told) => told.clone(),
            None if self.machine() == Some(Architecture::Aarch64) => Processors::Unknown,
            None => self.format.processors(),
        }
    }
}
