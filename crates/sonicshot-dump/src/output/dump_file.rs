//! Files to restore a guest's memory into: raw RAM, ELF cores.

use crate::DumpError;
use crate::format::elf_core::wire::{self, PT_LOAD, PT_NOTE, Segment};
use crate::format::notes::note;
use crate::output::{Output, Overwrite, Ready, Target, WriteOptions};
use sonicshot::checkpoint::{CheckpointError, FillWith, RestoreTarget};
use sonicshot::file::write_sparse_at;
use sonicshot::{
    Architecture, FileOffset, Gpa, GpaRange, GuestMemory, MemoryError, Progress, RamLayout, Tally,
    to_u64,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Guest memory is copied in pieces of this many bytes.
const COPY: u64 = 1 << 20;
const ALIGN: u64 = 4096;

/// A dump that is being written: sparse, with room for all of the guest's RAM, which reads as
/// zero until it is filled. It gets its name when it is [finished](Self::finish).
#[derive(Debug)]
pub struct DumpFile {
    output: Output,
    layout: RamLayout,
    /// Each region, and where its bytes begin in the file.
    places: Vec<(GpaRange, FileOffset)>,
    progress: Option<Arc<dyn Progress>>,
}

/// The places of the regions of a layout in a file.
struct Places {
    /// Each region, and where its bytes begin.
    list: Vec<(GpaRange, FileOffset)>,
    /// The end of the file.
    end: FileOffset,
}

impl Places {
    /// From `start` on, each at the next multiple of `align`.
    fn new(
        path: &Path,
        layout: &RamLayout,
        start: FileOffset,
        align: u64,
    ) -> Result<Self, DumpError> {
        let mut list = Vec::with_capacity(layout.regions().len());
        let mut end = start;
        for region in layout.regions() {
            list.push((*region, end));
            end = end
                .checked_add(region.len())
                .and_then(|end| end.checked_align_up(align))
                .ok_or_else(|| too_large(path, "RAM of (bytes)", layout.bytes()))?;
        }
        Ok(Self { list, end })
    }
}

fn too_large(path: &Path, what: &'static str, value: u64) -> DumpError {
    let path = path.to_owned();
    DumpError::TooLarge { path, what, value }
}

/// The notes of an ELF core, beside the memory.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CoreNotes {
    /// The guest's processor: every core names one.
    pub machine: Architecture,
    /// The notes of the core that the memory came from, as they were.
    pub notes: Option<Vec<u8>>,
    /// The guest kernel's VMCOREINFO, for a core without `notes`.
    pub vmcoreinfo: Option<Vec<u8>>,
}

impl CoreNotes {
    /// No more than the guest's processor.
    #[must_use]
    pub const fn new(machine: Architecture) -> Self {
        Self {
            machine,
            notes: None,
            vmcoreinfo: None,
        }
    }
}

impl DumpFile {
    /// A raw file: the regions end to end, lowest first. `inputs` are all files whose content
    /// goes into it; see [`NewFile::create`].
    ///
    /// # Errors
    /// [`DumpError`] if `path` is an input, exists and may not be replaced, or cannot be written.
    pub fn raw(
        path: &Path,
        layout: &RamLayout,
        inputs: &[&File],
        options: &WriteOptions,
    ) -> Result<Self, DumpError> {
        let places = Places::new(path, layout, FileOffset::ZERO, 1)?;
        Self::create(path, layout, inputs, options, places, &[])
    }

    /// An ELF core: a segment for each region.
    ///
    /// # Errors
    /// As [`raw`](Self::raw).
    pub fn elf_core(
        path: &Path,
        layout: &RamLayout,
        notes: &CoreNotes,
        inputs: &[&File],
        options: &WriteOptions,
    ) -> Result<Self, DumpError> {
        let text = match (&notes.notes, &notes.vmcoreinfo) {
            (Some(notes), _) => notes.clone(),
            (None, Some(text)) => note(b"VMCOREINFO\0", 0, text)
                .ok_or_else(|| too_large(path, "a VMCOREINFO of (bytes)", to_u64(text.len())))?,
            (None, None) => Vec::new(),
        };
        let count = layout.regions().len();
        let many = || too_large(path, "a number of ranges of RAM of", to_u64(count));
        let headers = count.checked_add(1).and_then(wire::headers_end);
        let headers = headers.ok_or_else(many)?;
        let start = headers
            .checked_add(to_u64(text.len()))
            .and_then(|end| end.checked_align_up(ALIGN))
            .ok_or_else(|| too_large(path, "notes of (bytes)", to_u64(text.len())))?;
        let places = Places::new(path, layout, start, ALIGN)?;
        let mut segments = vec![Segment {
            kind: PT_NOTE,
            flags: 0,
            offset: headers,
            vaddr: 0,
            paddr: 0,
            file_len: to_u64(text.len()),
            mem_len: to_u64(text.len()),
            align: 4,
        }];
        for (region, offset) in &places.list {
            segments.push(Segment {
                kind: PT_LOAD,
                flags: 7,
                offset: *offset,
                vaddr: region.start().raw(),
                paddr: region.start().raw(),
                file_len: region.len(),
                mem_len: region.len(),
                align: ALIGN,
            });
        }
        let mut head = wire::headers(notes.machine, &segments).ok_or_else(many)?;
        head.extend(text);
        Self::create(path, layout, inputs, options, places, &head)
    }

    fn create(
        path: &Path,
        layout: &RamLayout,
        inputs: &[&File],
        options: &WriteOptions,
        places: Places,
        head: &[u8],
    ) -> Result<Self, DumpError> {
        let output = Output::create(Target::new(path, options.overwrite), inputs)?;
        let writing = || DumpError::io("writing", path);
        output.file().set_len(places.end.raw()).map_err(writing())?;
        output.file().write_all_at(head, 0).map_err(writing())?;
        Ok(Self {
            output,
            layout: layout.clone(),
            places: places.list,
            progress: options.progress.clone(),
        })
    }

    fn place(&self, range: GpaRange) -> Option<FileOffset> {
        let above = self
            .places
            .partition_point(|(region, _)| region.start() <= range.start());
        let (region, offset) = self.places.get(above.checked_sub(1)?)?;
        if range.end() > region.end() {
            return None;
        }
        offset.checked_add(range.start().offset_from(region.start())?)
    }

    /// The offset at which the bytes from `at` on go.
    fn offset(&self, at: Gpa, bytes: &[u8]) -> Result<FileOffset, DumpError> {
        let range = GpaRange::with_len(at, to_u64(bytes.len()));
        let offset = range.and_then(|range| self.place(range));
        let path = self.output.path();
        offset.ok_or_else(|| too_large(path, "RAM without a place, at", at.raw()))
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), DumpError> {
        let offset = self.offset(at, bytes)?;
        self.output
            .file()
            .write_all_at(bytes, offset.raw())
            .map_err(DumpError::io("writing", self.output.path()))
    }

    /// Writes what is not zero, where nothing was written yet.
    fn write_used(&self, at: Gpa, bytes: &[u8]) -> Result<(), DumpError> {
        let offset = self.offset(at, bytes)?;
        write_sparse_at(self.output.file(), bytes, offset)
            .map_err(DumpError::io("writing", self.output.path()))
    }

    /// Copies all of `memory`, leaving holes where it is known to be zero or holds no data.
    ///
    /// # Errors
    /// [`DumpError`] if it cannot be read or written.
    pub fn copy(&self, memory: &dyn GuestMemory) -> Result<(), DumpError> {
        let total = self.layout.bytes();
        let mut done = Tally::ZERO;
        let mut buffer = Vec::new();
        for region in self.layout.regions() {
            let mut at = region.start();
            while let Some(data) = memory.next_data(at) {
                let mut from = data.start();
                while from < data.end() {
                    let end = from
                        .checked_add(COPY)
                        .map_or(data.end(), |end| end.min(data.end()));
                    let part = GpaRange::new(from, end);
                    self.copy_part(memory, part, &mut buffer)?;
                    from = end;
                    if let Some(inside) = from.offset_from(region.start()) {
                        self.progress.tell(done.and(inside).get(), total);
                    }
                }
                at = data.end();
                if at >= region.end() {
                    break;
                }
            }
            done.add(region.len());
            self.progress.tell(done.get(), total);
        }
        Ok(())
    }

    fn copy_part(
        &self,
        memory: &dyn GuestMemory,
        part: GpaRange,
        buffer: &mut Vec<u8>,
    ) -> Result<(), DumpError> {
        let reading = |source| DumpError::Memory { source };
        buffer.resize(self.size(part)?, 0);
        match memory.read(part.start(), buffer) {
            Ok(()) => {
                memory.release(part);
                self.write_used(part.start(), buffer)
            }
            // Page by page, to keep what is there.
            Err(MemoryError::Absent { .. }) if part.len() > ALIGN => {
                let mut from = part.start();
                while from < part.end() {
                    const IN_PAGE: u64 = ALIGN - 1;
                    let page = Gpa::new(from.raw() | IN_PAGE).checked_add(1);
                    let end = page.map_or(part.end(), |page| page.min(part.end()));
                    self.copy_part(memory, GpaRange::new(from, end), buffer)?;
                    from = end;
                }
                Ok(())
            }
            Err(MemoryError::Absent { .. }) => Ok(()),
            Err(error) => Err(reading(error)),
        }
    }

    /// The length of a piece in memory.
    fn size(&self, range: GpaRange) -> Result<usize, DumpError> {
        usize::try_from(range.len())
            .map_err(|_| too_large(self.output.path(), "a piece of (bytes)", range.len()))
    }

    /// Makes the file durable and gives it its name. Returns what it takes on disk, in bytes.
    ///
    /// # Errors
    /// [`DumpError`] if that fails; then there is no such file.
    pub fn finish(self) -> Result<u64, DumpError> {
        self.output.finish(&self.progress)
    }
}

impl RestoreTarget for DumpFile {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn reads_as_zero(&self) -> bool {
        true
    }

    fn fill(&self, range: GpaRange, fill: FillWith<'_>) -> Result<(), CheckpointError> {
        let failed = |source| {
            CheckpointError::Memory(MemoryError::Backend {
                range,
                source: Box::new(source),
            })
        };
        let mut bytes = vec![0; self.size(range).map_err(failed)?];
        fill(&mut bytes)?;
        self.write(range.start(), &bytes).map_err(failed)
    }
}

/// A file that something else than a dump is written to: a checkpoint. It appears whole or not
/// at all.
#[derive(Debug)]
pub struct NewFile(Output);

impl NewFile {
    /// Begins to write `path`, which must be none of `inputs`: all files whose content goes into
    /// it. It will be for no more eyes than each of them, and belong to the owner of the first,
    /// or of the file that it replaces, where that is allowed.
    ///
    /// # Errors
    /// [`DumpError`] if `path` is an input, exists and may not be replaced, or cannot be written.
    pub fn create(path: &Path, overwrite: Overwrite, inputs: &[&File]) -> Result<Self, DumpError> {
        Output::create(Target::new(path, overwrite), inputs).map(Self)
    }

    /// The same of something that is no file: a guest that runs. It is for its owner's eyes
    /// alone.
    ///
    /// # Errors
    /// [`DumpError`] if `path` exists and may not be replaced, or cannot be written.
    pub fn create_new(path: &Path, overwrite: Overwrite) -> Result<Self, DumpError> {
        Output::create(Target::new(path, overwrite), &[]).map(Self)
    }

    /// The file, without its name yet.
    #[must_use]
    pub fn file(&self) -> &File {
        self.0.file()
    }

    /// Makes the file durable and gives it its name. Returns what it takes on disk, in bytes.
    ///
    /// # Errors
    /// [`DumpError`] if that fails; then there is no such file.
    pub fn finish(self) -> Result<u64, DumpError> {
        self.finish_told(&None)
    }

    /// The same; `progress` is told how much of it is durable.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn finish_told(self, progress: &dyn Progress) -> Result<u64, DumpError> {
        self.0.finish(progress)
    }

    /// Makes the file durable and checks the inputs, so that nothing but its name is left to be
    /// done: for files that are to appear together with another one.
    ///
    /// # Errors
    /// [`DumpError`] if that fails; then there is no such file.
    pub fn ready(self) -> Result<ReadyFile, DumpError> {
        self.0.ready(&None).map(ReadyFile)
    }
}

/// A [`NewFile`] that is whole and on disk, but for its name.
#[derive(Debug)]
pub struct ReadyFile(Ready);

impl ReadyFile {
    /// Gives the file its name. Returns what it takes on disk, in bytes.
    ///
    /// # Errors
    /// [`DumpError`] if that fails; then there is no such file.
    pub fn place(self) -> Result<u64, DumpError> {
        self.0.place()
    }
}
