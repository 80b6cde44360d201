//! Copies stretches of one file to another.

use crate::DumpError;
use crate::mapped::MappedDump;
use crate::output::Output;
use crate::prune::Progress;
use rustix::fs::copy_file_range;
use rustix::io::Errno;
use std::os::unix::fs::FileExt;

/// Longest stretch that is copied at once. Larger ones leave the processor's cache.
pub(crate) const COPY: usize = 1 << 20;

/// Copies stretches of the input to the output; holes stay holes.
pub(crate) struct Copier<'a> {
    dump: &'a MappedDump,
    output: &'a Output,
    /// Whether the kernel copies between these two files by itself.
    by_kernel: bool,
    buffer: Vec<u8>,
    done: u64,
    total: u64,
    progress: Progress<'a>,
}

impl<'a> Copier<'a> {
    pub(crate) fn new(
        dump: &'a MappedDump,
        output: &'a Output,
        total: u64,
        progress: Progress<'a>,
    ) -> Copier<'a> {
        Copier {
            dump,
            output,
            by_kernel: true,
            buffer: Vec::new(),
            done: 0,
            total,
            progress,
        }
    }

    /// Copies the `len` bytes at `from` to `to`.
    pub(crate) fn copy(&mut self, from: u64, to: u64, len: u64) -> Result<(), DumpError> {
        let dump = self.dump;
        let cut = || DumpError::malformed(dump.path(), "a stretch beyond the end", from, len);
        let end = from.checked_add(len).ok_or_else(cut)?;
        if end > dump.file_len() {
            return Err(cut());
        }
        let whole = [(from, end)];
        let data = dump.data_stretches().unwrap_or(&whole);
        let first = data.partition_point(|(_, data_end)| *data_end <= from);
        let before = self.done;
        for (start, stop) in data.iter().skip(first) {
            if *start >= end {
                break;
            }
            let (start, stop) = ((*start).max(from), (*stop).min(end));
            let there = to.saturating_add(start.saturating_sub(from));
            self.copy_data(start, there, stop.saturating_sub(start))?;
        }
        // What lies in holes is done as well.
        self.done = before.saturating_add(len);
        (self.progress)(self.done, self.total);
        Ok(())
    }

    fn copy_data(&mut self, mut from: u64, mut to: u64, mut left: u64) -> Result<(), DumpError> {
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(COPY).min(COPY);
            let copied = match self.copy_by_kernel(from, to, now)? {
                Some(copied) => copied,
                None => self.copy_through(from, to, now)?,
            } as u64;
            from = from.saturating_add(copied);
            to = to.saturating_add(copied);
            left = left.saturating_sub(copied);
            self.done = self.done.saturating_add(copied);
            (self.progress)(self.done, self.total);
        }
        Ok(())
    }

    /// Lets the kernel copy up to `len` bytes; `None` if it does not between these files.
    fn copy_by_kernel(
        &mut self,
        from: u64,
        to: u64,
        len: usize,
    ) -> Result<Option<usize>, DumpError> {
        let (input, output) = (self.dump.file(), self.output.file());
        let (mut source, mut target) = (from, to);
        while self.by_kernel {
            match copy_file_range(input, Some(&mut source), output, Some(&mut target), len) {
                Ok(copied) if copied > 0 => return Ok(Some(copied)),
                Err(Errno::INTR) => {}
                Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)) => {
                    return Err(DumpError::io("writing", self.output.path())(error.into()));
                }
                // Two file systems, or one that cannot. What is really wrong, such as a file
                // that has become shorter, the plain copy finds out too.
                Ok(_) | Err(_) => self.by_kernel = false,
            }
        }
        Ok(None)
    }

    fn copy_through(&mut self, from: u64, to: u64, len: usize) -> Result<usize, DumpError> {
        self.buffer.resize(len, 0);
        self.dump
            .file()
            .read_exact_at(&mut self.buffer, from)
            .map_err(DumpError::io("reading", self.dump.path()))?;
        self.output
            .file()
            .write_all_at(&self.buffer, to)
            .map_err(DumpError::io("writing", self.output.path()))?;
        Ok(len)
    }
}
