//! A Xen image made of what another holds beside the guest's memory, and of memory from elsewhere.

use crate::DumpError;
use crate::output::{Output, Target, WriteOptions};
use sonicshot::file::SparseWriter;
use sonicshot::{
    Bytes, FileBytes, GuestMemory, MemoryError, PageSize, Pfn, PfnRange, Progress, Tally, to_u64,
};
use sonicshot_xen::{Joined, Skeleton};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

const PAGE: PageSize = PageSize::SIZE_4K;
const PAGE_LEN: usize = 4096;

/// The parts of a Xen image beside the guest's memory: headers, other records, and what each page
/// is.
#[derive(Debug)]
pub struct XlSkeleton {
    path: PathBuf,
    bytes: Vec<u8>,
    skeleton: Skeleton,
}

impl XlSkeleton {
    /// Reads what [`Dump::xl_skeleton`](crate::Dump::xl_skeleton) gave; messages call it by `path`.
    ///
    /// # Errors
    /// [`DumpError::Xen`] if it is none.
    pub fn parse(path: &Path, bytes: Vec<u8>) -> Result<Self, DumpError> {
        let parsed = Skeleton::parse(FileBytes::from_slice(&bytes));
        let skeleton = parsed.map_err(|source| DumpError::Xen {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
            skeleton,
        })
    }

    /// Refuses memory that has something in it where the image is to have no content: what is
    /// there would be lost.
    ///
    /// # Errors
    /// [`DumpError::XenFrame`], or why the memory cannot be read.
    pub fn check_holds_all(&self, memory: &dyn GuestMemory) -> Result<(), DumpError> {
        let mut page = [0; PAGE_LEN];
        for (pfn, has_content) in self.skeleton.frames() {
            let Some(at) = pfn.gpa(PAGE).filter(|_| !has_content) else {
                continue;
            };
            match memory.read(at, &mut page) {
                Ok(()) if page.iter().all(|byte| *byte == 0) => {}
                Ok(()) => {
                    return Err(self.wrong(pfn, "the memory has content there, the image has not"));
                }
                Err(MemoryError::Absent { .. }) => {}
                Err(source) => return Err(DumpError::Memory { source }),
            }
        }
        Ok(())
    }

    /// Writes the image with the content that `memory` has. Of a page table it must really have
    /// it: `left_out` says of a frame whether it was left out there. Zeroes are holes in the file,
    /// which appears whole or not at all, for no more eyes than `inputs`. Returns what it takes on
    /// disk, in bytes.
    ///
    /// # Errors
    /// [`DumpError::XenFrame`] if `memory` is not of this guest or lacks a page table; and what
    /// reading and writing gives.
    pub fn write(
        &self,
        memory: &dyn GuestMemory,
        left_out: &dyn Fn(Pfn) -> bool,
        out: &Path,
        inputs: &[&File],
        options: &WriteOptions,
    ) -> Result<u64, DumpError> {
        self.check_frames(memory)?;
        let output = Output::create(Target::new(out, options.overwrite), inputs)?;
        let mut writer = SparseWriter::new(output.file());
        let writing = || DumpError::io("writing", output.path());
        let mut put = |bytes: &[u8]| writer.write_all(bytes).map_err(writing());
        self.each_part(memory, left_out, &options.progress, &mut put)?;
        writer.finish().map_err(writing())?;
        output.finish(&options.progress)
    }

    /// The same into a pipe, which messages call `name`, page by page. What is written is an image only
    /// if this returns without an error.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_to(
        &self,
        memory: &dyn GuestMemory,
        left_out: &dyn Fn(Pfn) -> bool,
        out: &mut dyn Write,
        name: &Path,
        progress: &dyn Progress,
    ) -> Result<(), DumpError> {
        self.check_frames(memory)?;
        let writing = || DumpError::io("writing", name);
        let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(writing());
        self.each_part(memory, left_out, progress, &mut put)
    }

    /// Hands out the image from front to back.
    fn each_part(
        &self,
        memory: &dyn GuestMemory,
        left_out: &dyn Fn(Pfn) -> bool,
        progress: &dyn Progress,
        put: &mut dyn FnMut(&[u8]) -> Result<(), DumpError>,
    ) -> Result<(), DumpError> {
        let with_content = to_u64(self.skeleton.frames().filter(|(_, has)| *has).count());
        let total = Tally::new(with_content).times(PAGE.bytes()).get();
        let mut done = Tally::ZERO;
        let data = FileBytes::from_slice(&self.bytes);
        let failed = |source| DumpError::Xen {
            path: self.path.clone(),
            source,
        };
        self.skeleton.joined(data, failed, |part| match part {
            Joined::Skeleton(range) => {
                let (from, len) = (range.start(), range.len());
                let bytes = self.bytes.as_slice().part(from.raw(), len);
                let beyond =
                    || DumpError::malformed(&self.path, "a part beyond the end", from, len);
                put(bytes.ok_or_else(beyond)?)
            }
            Joined::Pages { frames, tables } => {
                if let Some(pfn) = frames.iter().find(|pfn| tables && left_out(*pfn)) {
                    let why = "it is a page table, and its content was left out";
                    return Err(self.wrong(pfn, why));
                }
                self.write_pages(memory, frames, put)?;
                done.add(Tally::new(frames.len()).times(PAGE.bytes()).get());
                progress.tell(done.up_to(total), total);
                Ok(())
            }
        })
    }

    /// Hands out the content of frames, page by page.
    fn write_pages(
        &self,
        memory: &dyn GuestMemory,
        frames: PfnRange,
        each: &mut dyn FnMut(&[u8]) -> Result<(), DumpError>,
    ) -> Result<(), DumpError> {
        let mut page = [0; PAGE_LEN];
        for pfn in frames.iter() {
            let at = pfn
                .gpa(PAGE)
                .ok_or_else(|| self.wrong(pfn, "no memory is so high"))?;
            let read = memory.read(at, &mut page);
            read.map_err(|source| DumpError::Memory { source })?;
            each(&page)?;
        }
        if let Some(range) = frames.gpa_range(PAGE) {
            memory.release(range);
        }
        Ok(())
    }

    /// The memory's frames must be the image's.
    fn check_frames(&self, memory: &dyn GuestMemory) -> Result<(), DumpError> {
        let mut ours = self.skeleton.frames().map(|(pfn, _)| pfn);
        let theirs = memory.layout().frames(PAGE).flat_map(|run| run.iter());
        for pfn in theirs {
            match ours.next() {
                Some(our) if our == pfn => {}
                Some(our) if our < pfn => return Err(self.wrong(our, NOT_IN_MEMORY)),
                _ => return Err(self.wrong(pfn, "the memory has it, the image has not")),
            }
        }
        match ours.next() {
            Some(pfn) => Err(self.wrong(pfn, NOT_IN_MEMORY)),
            None => Ok(()),
        }
    }

    fn wrong(&self, pfn: Pfn, why: &'static str) -> DumpError {
        DumpError::XenFrame {
            path: self.path.clone(),
            pfn,
            why,
        }
    }
}

const NOT_IN_MEMORY: &str = "the image has it, the memory has not";
