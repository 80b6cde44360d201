//! A format: how it is told from others and opened, and what every one of them tells.

use crate::Incomplete;
use crate::backing::Stored;
use crate::backing::plain::{self, PlainDump, open_content};
use crate::backing::scattered::Scattered;
use crate::backing::spool::Spool;
use crate::format::ability::{AsStream, ByCopy, InPlace, Migration, Skeletal};
use crate::format::qemu::start::RamBlock;
use crate::layout::LayoutSpec;
use crate::output::check_stamp;
use crate::prune::stats::bytes_of_blocks;
use crate::snapshot::{Named, SnapshotFiles};
use crate::{DumpError, DumpOptions};
use sonicshot::{
    Architecture, Failure, FileBytes, FileContent, FileStamp, Fill, P2m, PfnRange, Processors,
};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A kind of format: the ways to tell it from others and to open it.
pub(crate) struct Kind {
    /// Its name where a file is to be read as one; `None` if no file is.
    pub name: Option<&'static str>,
    /// The name of the format that it is another form of, if it is none of its own.
    pub form_of: Option<&'static str>,
    /// The first bytes of its files: each of them begins with one of these.
    pub magics: &'static [&'static [u8]],
    /// Whether a file is one, where its beginning does not tell by itself.
    pub is_one: fn(&Source<'_>) -> bool,
    /// Opens a file of it.
    pub open: fn(Source<'_>) -> Result<Box<dyn Format>, DumpError>,
    /// Finds the memory where a VMM keeps more than that: in a folder, or in a file with others
    /// beside it. `None` if it is not this VMM's.
    pub snapshot: fn(&Named<'_>) -> Result<Option<SnapshotFiles>, DumpError>,
    /// The reason why the memory file at a path must not get holes, whatever the format: the VMM whose
    /// snapshot it is part of would not read them as zero.
    pub no_holes: fn(&Path) -> Result<Option<&'static str>, DumpError>,
}

impl Kind {
    /// The format `name` of one file that is told by how it begins.
    pub(crate) const fn by_magic(
        name: &'static str,
        magics: &'static [&'static [u8]],
        open: fn(Source<'_>) -> Result<Box<dyn Format>, DumpError>,
    ) -> Self {
        Self {
            name: Some(name),
            form_of: None,
            magics,
            is_one: |_| true,
            open,
            snapshot: |_| Ok(None),
            no_holes: |_| Ok(None),
        }
    }

    /// A kind that is told by the names of its files alone, of which the memory is in another format.
    pub(crate) const fn by_name(
        snapshot: fn(&Named<'_>) -> Result<Option<SnapshotFiles>, DumpError>,
    ) -> Self {
        Self {
            name: None,
            form_of: None,
            magics: &[],
            is_one: |_| false,
            // No file is one.
            open: |source| {
                Err(DumpError::NotADump {
                    path: source.path.to_owned(),
                    why: "it is not a format of its own",
                })
            },
            snapshot,
            no_holes: |_| Ok(None),
        }
    }

    pub(crate) fn takes(&self, source: &Source<'_>) -> bool {
        (self.magics.is_empty() || self.begins(source)) && (self.is_one)(source)
    }

    /// Whether a file that is said to be one may be: what else tells its beginning from others'
    /// does not count.
    pub(crate) fn may_be(&self, source: &Source<'_>) -> bool {
        match self.magics {
            [] => (self.is_one)(source),
            _ => self.begins(source),
        }
    }

    fn begins(&self, source: &Source<'_>) -> bool {
        let begins = |magic: &&[u8]| source.begins_with(magic);
        self.magics.iter().any(begins)
    }
}

/// A file that is to be opened.
pub(crate) struct Source<'a> {
    /// Its name in messages.
    pub path: &'a Path,
    pub content: FileContent,
    /// The options that it is opened with.
    pub known: &'a DumpOptions,
    /// The content, if it came through a pipe or was compressed.
    pub spool: Option<Spool>,
}

impl<'a> Source<'a> {
    /// The file at `path`.
    pub(crate) fn open(path: &'a Path, known: &'a DumpOptions) -> Result<Self, DumpError> {
        let not_a_dump = |why| DumpError::NotADump {
            path: path.to_owned(),
            why,
        };
        let metadata = std::fs::metadata(path).map_err(DumpError::io("opening", path))?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(not_a_dump(
                "it is neither a regular file nor a block device",
            ));
        }
        let content = open_content(path)?;
        if content.is_empty() {
            return Err(not_a_dump("it is empty"));
        }
        Ok(Self {
            path,
            content,
            known,
            spool: None,
        })
    }

    /// The content of `spool`.
    pub(crate) fn spooled(spool: &'a Spool, known: &'a DumpOptions) -> Result<Self, DumpError> {
        let content = spool.content()?;
        if content.is_empty() {
            return Err(DumpError::NotADump {
                path: spool.name().to_owned(),
                why: "it is empty",
            });
        }
        Ok(Self {
            path: spool.name(),
            content,
            known,
            spool: Some(spool.clone()),
        })
    }

    /// The RAM layout, if the caller gives it.
    pub(crate) fn layout(&self) -> Option<&'a LayoutSpec> {
        self.known.layout.as_ref()
    }

    /// To tell what is wrong with the file when it cannot be opened.
    pub(crate) fn watch(&self) -> Result<Watch, DumpError> {
        let file = self.content.file().try_clone();
        Ok(Watch {
            path: self.path.to_owned(),
            file: file.map_err(DumpError::io("reading", self.path))?,
            stamp: self.content.stamp(),
            failure: self.content.watch(),
        })
    }

    /// All bytes.
    pub(crate) fn data(&self) -> FileBytes<'_> {
        self.content.bytes()
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.content.len()
    }

    /// The first bytes, if there are so many.
    pub(crate) fn start<const N: usize>(&self) -> Option<[u8; N]> {
        let mut start = [0; N];
        let there = self.data().get(0, N)?;
        there.copy_to(&mut start).then_some(start)
    }

    pub(crate) fn begins_with(&self, magic: &[u8]) -> bool {
        self.has(0, magic)
    }

    /// Whether these bytes stand at `at`.
    pub(crate) fn has(&self, at: usize, wanted: &[u8]) -> bool {
        let mut found = vec![0; wanted.len()];
        let there = self.data().get(at, wanted.len());
        there.is_some_and(|there| there.copy_to(&mut found)) && found == wanted
    }

    /// The space that the file takes on disk, in bytes.
    pub(crate) fn on_disk(&self) -> Result<u64, DumpError> {
        let metadata = self.content.file().metadata();
        let metadata = metadata.map_err(DumpError::io("reading", self.path))?;
        if metadata.file_type().is_block_device() {
            return Ok(self.len());
        }
        Ok(bytes_of_blocks(&metadata))
    }

    /// The file as guest memory, which lies in it as `extents` say.
    pub(crate) fn mapped(self, extents: Vec<plain::Extent>) -> Result<PlainDump, DumpError> {
        PlainDump::new(self.path, self.content, extents)
    }

    /// The same of pages that lie in it one by one.
    pub(crate) fn scattered(self, pages: Scattered) -> Result<PlainDump, DumpError> {
        PlainDump::scattered(self.path, self.content, pages)
    }
}

/// A file that is being opened.
pub(crate) struct Watch {
    path: PathBuf,
    file: File,
    stamp: FileStamp,
    failure: Failure,
}

impl Watch {
    /// The trouble with a file that changed meanwhile, or could not be read, says less.
    pub(crate) fn blame(&self, error: DumpError) -> DumpError {
        if let Err(changed) = check_stamp(&self.file, &self.path, self.stamp) {
            return changed;
        }
        match self.failure.get() {
            Some(source) => DumpError::io("reading", &self.path)(source),
            None => error,
        }
    }
}

/// A dump of some format: the guest's memory, and what the file says beside it.
pub(crate) trait Format: fmt::Debug + Send + Sync {
    /// Its name, for people.
    fn name(&self) -> &'static str;

    /// The guest's memory, as the file has it.
    fn stored(&self) -> &dyn Stored;

    /// The file; of one that is compressed as a whole, that one.
    fn file(&self) -> &File {
        self.stored().file()
    }

    /// The file that some of the memory comes from, if that is another.
    fn base(&self) -> Option<&File> {
        None
    }

    /// The decompressed content, if the file is compressed as a whole.
    fn unpacked(&self) -> Option<&Spool> {
        None
    }

    /// The content that a dropped page reads as after a restore.
    fn dropped_reads_as(&self) -> Fill {
        Fill::Zero
    }

    /// The reason why it lacks pages that it should have.
    fn incomplete(&self) -> Option<Incomplete> {
        None
    }

    /// Whether the pages that it lacks may have been zeroes.
    fn absent_may_be_zero(&self) -> bool {
        false
    }

    /// Whether a page of zeroes takes no room though it is there: all of them share one.
    fn shares_zeroes(&self) -> bool {
        false
    }

    /// Frames that must stay, whatever the guest says of them; sorted.
    fn must_stay(&self) -> Vec<PfnRange> {
        Vec::new()
    }

    /// The RAM layout, if the file itself does not have it.
    fn layout(&self) -> Option<&LayoutSpec> {
        None
    }

    /// The processor's kind.
    fn machine(&self) -> Option<Architecture> {
        None
    }

    /// The name of the machine that QEMU ran.
    fn machine_type(&self) -> Option<&str> {
        None
    }

    /// The blocks of memory of QEMU's migration files.
    fn ram_blocks(&self) -> &[RamBlock] {
        &[]
    }

    /// The VMCOREINFO text.
    fn vmcoreinfo(&self) -> Option<&[u8]> {
        None
    }

    /// The ELF notes.
    fn notes(&self) -> Option<Vec<u8>> {
        None
    }

    /// Whether the file holds the devices' state too.
    fn holds_device_state(&self) -> bool {
        false
    }

    /// The processors, as the file tells of them.
    fn processors(&self) -> Processors {
        Processors::Unknown
    }

    /// The table that translates the machine's frame numbers in a PV guest's page tables.
    fn p2m(&self) -> Option<&P2m> {
        self.stored().p2m()
    }

    /// The advice for a file that cannot be pruned.
    fn instead(&self) -> &'static str {
        "this format is only read here: save it as a checkpoint instead"
    }

    /// Can it be pruned by copy?
    fn by_copy(&self) -> Option<&dyn ByCopy> {
        None
    }

    /// Can it be pruned in place?
    fn in_place(&self) -> Option<&dyn InPlace> {
        None
    }

    /// Can it be written from front to back?
    fn as_stream(&self) -> Option<&dyn AsStream> {
        None
    }

    /// Can it be made into QEMU's migration files?
    fn as_migration(&self) -> Option<&dyn Migration> {
        None
    }

    /// Can it be split into the guest's memory and the rest?
    fn as_skeletal(&self) -> Option<&dyn Skeletal> {
        None
    }
}

pub(crate) fn boxed(format: impl Format + 'static) -> Box<dyn Format> {
    Box::new(format)
}
