//! Copies ranges of one file to another.

use crate::DumpError;
use crate::backing::plain::PlainDump;
use crate::backing::sys;
use crate::output::Output;
use crate::prune::holes::block_size;
use rustix::fs::{copy_file_range, fstatfs};
use rustix::io::Errno;
use sonicshot::Progress;
use sonicshot::{FileOffset, FileRange, Tally, to_u64, to_usize};
use std::os::unix::fs::FileExt;

/// Longest range that is copied at once. Larger ones leave the processor's cache.
pub(crate) const COPY: usize = 1 << 20;

/// Copies ranges of the input to the output; holes stay holes.
pub(crate) struct Copier<'a> {
    dump: &'a PlainDump,
    output: &'a Output,
    /// The blocks that the output can share with the input; `None` if it cannot.
    block: Option<u64>,
    cloned: Tally,
    /// Whether the kernel copies between these two files by itself.
    by_kernel: bool,
    buffer: Vec<u8>,
    done: Tally,
    total: u64,
    progress: &'a dyn Progress,
}

impl<'a> Copier<'a> {
    pub(crate) fn new(
        dump: &'a PlainDump,
        output: &'a Output,
        total: u64,
        progress: &'a dyn Progress,
    ) -> Copier<'a> {
        Copier {
            dump,
            output,
            // Whether it can is found out by the first try.
            block: fstatfs(output.file())
                .ok()
                .map(|system| block_size(&system)),
            cloned: Tally::ZERO,
            by_kernel: true,
            buffer: Vec::new(),
            done: Tally::ZERO,
            total,
            progress,
        }
    }

    /// Copies bytes alone: the output shares nothing with the input.
    pub(crate) fn by_bytes(mut self) -> Self {
        (self.block, self.by_kernel) = (None, false);
        self
    }

    /// Copies the bytes `from` to `to`.
    pub(crate) fn copy(&mut self, from: FileRange, to: FileOffset) -> Result<(), DumpError> {
        let dump = self.dump;
        if from.end() > dump.file_range().end() {
            return Err(self.beyond(from));
        }
        let whole = [from];
        let data = dump.data_extents().unwrap_or(&whole);
        let first = data.partition_point(|data| data.end() <= from.start());
        let before = self.done;
        for data in data.iter().skip(first) {
            let data = data.intersection(&from);
            if data.is_empty() {
                break;
            }
            let inside = data.start().offset_from(from.start());
            let there = inside.and_then(|inside| to.checked_add(inside));
            self.copy_data(data, there.ok_or_else(|| self.beyond(from))?)?;
        }
        // What lies in holes is done as well.
        self.done = before.and(from.len());
        self.progress.tell(self.done.get(), self.total);
        Ok(())
    }

    /// Copies all bytes of `from` to where they are, also such as may be a hole.
    pub(crate) fn copy_all(&mut self, from: FileRange) -> Result<(), DumpError> {
        self.copy_bytes(from, from.start())
    }

    /// So many bytes are there already.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.done.add(bytes);
        self.progress.tell(self.done.get(), self.total);
    }

    fn beyond(&self, from: FileRange) -> DumpError {
        let (start, len) = (from.start(), from.len());
        DumpError::malformed(self.dump.path(), "a range beyond the end", start, len)
    }

    /// Shares the whole blocks of a range where the file system can, and copies the rest.
    fn copy_data(&mut self, from: FileRange, to: FileOffset) -> Result<(), DumpError> {
        let body = self.block.and_then(|block| shared(from, to, block));
        let Some((body, there)) = body else {
            return self.copy_bytes(from, to);
        };
        let behind = there.checked_add(body.len());
        let behind = behind.ok_or_else(|| self.beyond(from))?;
        self.copy_bytes(FileRange::new(from.start(), body.start()), to)?;
        let (input, output) = (self.dump.file(), self.output.file());
        match sys::clone_range(input, body, output, there) {
            Ok(()) => {
                self.cloned.add(body.len());
                self.done.add(body.len());
                self.progress.tell(self.done.get(), self.total);
            }
            // Two file systems, or one that cannot. What is really wrong, such as a full disk,
            // the plain copy finds out too.
            Err(_) => {
                self.block = None;
                self.copy_bytes(body, there)?;
            }
        }
        self.copy_bytes(FileRange::new(body.end(), from.end()), behind)
    }

    fn copy_bytes(&mut self, from: FileRange, to: FileOffset) -> Result<(), DumpError> {
        let (mut rest, mut to) = (from, to);
        while !rest.is_empty() {
            let now = to_usize(rest.up_to(to_u64(COPY)).len());
            let copied = to_u64(match self.copy_by_kernel(rest.start(), to, now)? {
                Some(copied) => copied,
                None => self.copy_through(rest.start(), to, now)?,
            });
            let next = rest.start().checked_add(copied).zip(to.checked_add(copied));
            let (start, there) = next.ok_or_else(|| self.beyond(from))?;
            (rest, to) = (FileRange::new(start, rest.end()), there);
            self.done.add(copied);
            self.progress.tell(self.done.get(), self.total);
        }
        Ok(())
    }

    /// The number of bytes that are done.
    pub(crate) fn done(&self) -> u64 {
        self.done.get()
    }

    /// The number of bytes that the output shares with the input.
    pub(crate) fn cloned(&self) -> u64 {
        self.cloned.get()
    }

    /// Lets the kernel copy up to `len` bytes; `None` if it does not between these files.
    fn copy_by_kernel(
        &mut self,
        from: FileOffset,
        to: FileOffset,
        len: usize,
    ) -> Result<Option<usize>, DumpError> {
        let (input, output) = (self.dump.file(), self.output.file());
        let (mut source, mut target) = (from.raw(), to.raw());
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

    fn copy_through(
        &mut self,
        from: FileOffset,
        to: FileOffset,
        len: usize,
    ) -> Result<usize, DumpError> {
        self.buffer.resize(len, 0);
        self.dump
            .file()
            .read_exact_at(&mut self.buffer, from.raw())
            .map_err(DumpError::io("reading", self.dump.path()))?;
        self.output
            .file()
            .write_all_at(&self.buffer, to.raw())
            .map_err(DumpError::io("writing", self.output.path()))?;
        Ok(len)
    }
}

/// The whole blocks of a range, and where they go; `None` if blocks of the input are none of the
/// output.
fn shared(from: FileRange, to: FileOffset, block: u64) -> Option<(FileRange, FileOffset)> {
    let inside = from.start().raw().checked_rem(block)?;
    if to.raw().checked_rem(block)? != inside {
        return None;
    }
    let start = from.start().checked_align_up(block)?;
    let end = from.end().raw();
    let end = FileOffset::new(end.checked_sub(end.checked_rem(block)?)?);
    let body = FileRange::new(start, end);
    let there = to.checked_add(start.offset_from(from.start())?)?;
    (!body.is_empty()).then_some((body, there))
}

#[cfg(test)]
mod tests {
    use super::shared;
    use sonicshot::{FileOffset, FileRange};

    #[test]
    fn whole_blocks_can_be_shared() {
        let at = FileOffset::new;
        let range = |from, len| FileRange::with_len(at(from), len).unwrap();
        // How much comes before the first whole block, and how much is whole blocks.
        for (from, to, len, want) in [
            (0, 8192, 4096, Some((0, 4096))),
            (100, 4196, 9000, Some((3996, 4096))),
            (100, 100, 4096, None),
            (1, 0, 1 << 20, None),
            (4096, 0, 4095, None),
            (0, 0, 0, None),
            (u64::MAX - 1, u64::MAX - 1, 1, None),
        ] {
            let want = want.map(|(head, body)| (range(from + head, body), at(to + head)));
            assert_eq!(
                shared(range(from, len), at(to), 4096),
                want,
                "{from} {to} {len}"
            );
        }
        assert_eq!(shared(range(0, 1 << 20), at(0), 0), None);
    }
}
