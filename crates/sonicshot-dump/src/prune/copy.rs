//! Copies stretches of one file to another.

use crate::DumpError;
use crate::backing::mapped::MappedDump;
use crate::backing::sys;
use crate::output::Output;
use crate::prune::holes::block_size;
use rustix::fs::{copy_file_range, fstatfs};
use rustix::io::Errno;
use sonicshot::Progress;
use std::os::unix::fs::FileExt;

/// Longest stretch that is copied at once. Larger ones leave the processor's cache.
pub(crate) const COPY: usize = 1 << 20;

/// Copies stretches of the input to the output; holes stay holes.
pub(crate) struct Copier<'a> {
    dump: &'a MappedDump,
    output: &'a Output,
    /// The blocks that the output can share with the input; `None` if it cannot.
    block: Option<u64>,
    cloned: u64,
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
            // Whether it can is found out by the first try.
            block: fstatfs(output.file())
                .ok()
                .map(|system| block_size(&system)),
            cloned: 0,
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

    /// Shares the whole blocks of a stretch where the file system can, and copies the rest.
    fn copy_data(&mut self, from: u64, to: u64, len: u64) -> Result<(), DumpError> {
        let Some((head, body)) = self.block.and_then(|block| shared(from, to, len, block)) else {
            return self.copy_bytes(from, to, len);
        };
        let tail = len.saturating_sub(head).saturating_sub(body);
        let behind = |at: u64, len| at.saturating_add(len);
        self.copy_bytes(from, to, head)?;
        let (start, there) = (behind(from, head), behind(to, head));
        let (input, output) = (self.dump.file(), self.output.file());
        match sys::clone_range(input, start, body, output, there) {
            Ok(()) => {
                self.cloned = self.cloned.saturating_add(body);
                self.done = self.done.saturating_add(body);
                (self.progress)(self.done, self.total);
            }
            // Two file systems, or one that cannot. What is really wrong, such as a full disk,
            // the plain copy finds out too.
            Err(_) => {
                self.block = None;
                self.copy_bytes(start, there, body)?;
            }
        }
        self.copy_bytes(behind(start, body), behind(there, body), tail)
    }

    fn copy_bytes(&mut self, mut from: u64, mut to: u64, mut left: u64) -> Result<(), DumpError> {
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

    /// How many bytes the output shares with the input.
    pub(crate) fn cloned(&self) -> u64 {
        self.cloned
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

/// How much of a stretch comes before its first whole block, and how much is whole blocks;
/// `None` if blocks of the input are none of the output.
fn shared(from: u64, to: u64, len: u64, block: u64) -> Option<(u64, u64)> {
    let inside = from.checked_rem(block)?;
    if to.checked_rem(block)? != inside {
        return None;
    }
    let head = from.checked_next_multiple_of(block)?.checked_sub(from)?;
    let rest = len.checked_sub(head)?;
    let body = rest.checked_sub(rest.checked_rem(block)?)?;
    (body > 0).then_some((head, body))
}

#[cfg(test)]
mod tests {
    use super::shared;

    #[test]
    fn whole_blocks_can_be_shared() {
        for (from, to, len, want) in [
            (0, 8192, 4096, Some((0, 4096))),
            (100, 4196, 9000, Some((3996, 4096))),
            (100, 100, 4096, None),
            (1, 0, 1 << 20, None),
            (4096, 0, 4095, None),
            (0, 0, 0, None),
            (u64::MAX - 1, u64::MAX - 1, 1, None),
        ] {
            assert_eq!(shared(from, to, len, 4096), want, "{from} {to} {len}");
        }
        assert_eq!(shared(0, 0, 1 << 20, 0), None);
    }
}
