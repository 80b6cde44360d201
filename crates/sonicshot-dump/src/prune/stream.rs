//! Writes a migration stream again, with a note that it is zero for each dropped page: to a file,
//! into a compressor, or into a pipe.

use crate::backing::mapped::MappedDump;
use crate::format::libvirt::Compression;
use crate::format::qemu::stream::{Part, Stream};
use crate::format::xen;
use crate::output::{Output, Target};
use crate::prune::copy::{COPY, Copier};
use crate::prune::{Progress, PruneStats, disk_usage};
use crate::{Dump, DumpError, Format, Spool};
use sonicshot::PrunePlan;
use sonicshot_xen::{Dropped, XlImage};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// Stretches shorter than this are gathered before they are written.
const SMALL_PIECE: u64 = 64 << 10;
/// What `zstd` itself uses.
const ZSTD_LEVEL: i32 = 3;

/// What is written again, and without which pages.
pub(crate) enum Rewritten<'a> {
    Stream(&'a Stream, &'a PrunePlan),
    Xen(&'a XlImage, &'a Dropped),
}

impl Rewritten<'_> {
    /// Hands out the pruned content piece by piece.
    fn pruned(
        &self,
        dump: &MappedDump,
        each: impl FnMut(Part<'_>) -> Result<(), DumpError>,
    ) -> Result<(), DumpError> {
        match self {
            Self::Stream(stream, plan) => stream.pruned(dump.path(), dump.bytes(), plan, each),
            Self::Xen(image, dropped) => xen::pruned(image, dump, dropped, each),
        }
    }
}

/// Writes the pruned stream to a file; the kernel copies what stays as it is.
pub(crate) fn copy_stream(
    dump: &MappedDump,
    stream: &Rewritten<'_>,
    output: &Output,
    progress: Progress<'_>,
) -> Result<(), DumpError> {
    let mut copier = Copier::new(dump, output, dump.file_len(), progress);
    let writing = || DumpError::io("writing", output.path());
    let mut at = 0_u64;
    // Small pieces are gathered: a note of a zero page has nine bytes.
    let mut small: Vec<u8> = Vec::new();
    let flush = |small: &mut Vec<u8>, at: &mut u64| {
        output.file().write_all_at(small, *at).map_err(writing())?;
        *at = at.saturating_add(small.len() as u64);
        small.clear();
        Ok::<(), DumpError>(())
    };
    stream.pruned(dump, |piece| {
        let (from, len) = match piece {
            Part::Bytes(bytes) => {
                small.extend(bytes);
                return Ok(());
            }
            Part::Copy { from, len } => (from, len),
        };
        if len < SMALL_PIECE {
            append(dump, from, len, &mut small)?;
            if small.len() >= COPY {
                flush(&mut small, &mut at)?;
            }
            return Ok(());
        }
        flush(&mut small, &mut at)?;
        copier.copy(from, at, len)?;
        at = at.saturating_add(len);
        Ok(())
    })?;
    flush(&mut small, &mut at)?;
    output.file().set_len(at).map_err(writing())
}

/// Writes the pruned stream from front to back.
fn write_stream(
    dump: &MappedDump,
    stream: &Rewritten<'_>,
    out: &mut dyn Write,
    failed: &dyn Fn(io::Error) -> DumpError,
    progress: Progress<'_>,
) -> Result<(), DumpError> {
    let mut buffer: Vec<u8> = Vec::new();
    let total = dump.file_len();
    stream.pruned(dump, |piece| {
        let (mut from, mut left) = match piece {
            Part::Bytes(bytes) => {
                buffer.extend(bytes);
                (0, 0)
            }
            Part::Copy { from, len } => (from, len),
        };
        while left > 0 {
            let now = left.min(COPY as u64);
            append(dump, from, now, &mut buffer)?;
            from = from.saturating_add(now);
            left = left.saturating_sub(now);
            if buffer.len() >= COPY {
                out.write_all(&buffer).map_err(failed)?;
                buffer.clear();
                progress(from, total);
            }
        }
        Ok(())
    })?;
    out.write_all(&buffer).map_err(failed)?;
    progress(total, total);
    Ok(())
}

/// Adds `len` bytes of the dump's file to `out`.
fn append(dump: &MappedDump, from: u64, len: u64, out: &mut Vec<u8>) -> Result<(), DumpError> {
    let start = usize::try_from(from).unwrap_or(usize::MAX);
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    let beyond = || DumpError::malformed(dump.path(), "a stretch beyond the end", from, len);
    let there = dump.bytes().get(start, size).ok_or_else(beyond)?;
    let old = out.len();
    out.resize(old.saturating_add(size), 0);
    let copied = out.get_mut(old..).is_some_and(|out| there.copy_to(out));
    copied.then_some(()).ok_or_else(beyond)
}

impl Dump {
    /// Whether the content is compressed as a whole, so that it can only be written again.
    pub(crate) fn is_compressed(&self) -> bool {
        self.spool().and_then(Spool::image).is_some()
    }

    /// Writes a dump of the same format without the pages that `plan` drops, from front to back:
    /// into a pipe. Only migration streams, those in a libvirt image too, and Xen images can be
    /// written so.
    /// What is written is complete only if this returns without an error.
    ///
    /// # Errors
    /// [`DumpError::NotAStream`] for other formats, and what reading and writing gives.
    pub fn prune_to_writer(
        &self,
        plan: &PrunePlan,
        mut out: impl Write,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        let not_a_stream = || DumpError::NotAStream {
            path: self.path().into(),
            format: self.format(),
        };
        let dump = self.mapped().ok_or_else(not_a_stream)?;
        dump.check_length()?;
        let path = self.path().to_owned();
        let failed = move |source| DumpError::Io {
            action: "writing the pruned",
            path: path.clone(),
            source,
        };
        let goes = self.restorable(plan);
        let mut stats = PruneStats::of(plan, &goes);
        stats.disk_before = disk_usage(self.file(), self.path())?;
        let dropped;
        let stream = &match self.format_data() {
            Format::Stream(stream) => Rewritten::Stream(stream, &goes),
            Format::Xen(image) => {
                dropped = image.dropped(&goes);
                xen::count(&dropped, &mut stats);
                Rewritten::Xen(image, &dropped)
            }
            _ => return Err(not_a_stream()),
        };
        let mut counted = Counted(&mut out, 0);
        if let Some((file, image)) = self.spool().and_then(Spool::image) {
            let len = usize::try_from(image.payload_at).unwrap_or(usize::MAX);
            // At most what `libvirt::parse` lets pass.
            let mut header = vec![0; len];
            file.read_exact_at(&mut header, 0)
                .map_err(DumpError::io("reading", self.path()))?;
            counted.write_all(&header).map_err(&failed)?;
            match image.compression {
                Some(Compression::Gzip) => {
                    let level = flate2::Compression::default();
                    let mut packer = flate2::write::GzEncoder::new(&mut counted, level);
                    write_stream(dump, stream, &mut packer, &failed, progress)?;
                    packer.finish().map_err(&failed)?;
                }
                Some(Compression::Zstd) => {
                    let packer = zstd::stream::write::Encoder::new(&mut counted, ZSTD_LEVEL);
                    let mut packer = packer.map_err(&failed)?;
                    write_stream(dump, stream, &mut packer, &failed, progress)?;
                    packer.finish().map_err(&failed)?;
                }
                None => write_stream(dump, stream, &mut counted, &failed, progress)?,
            }
        } else {
            write_stream(dump, stream, &mut counted, &failed, progress)?;
        }
        counted.flush().map_err(&failed)?;
        stats.disk_after = counted.1;
        Ok(stats)
    }

    /// Writes a compressed image again.
    pub(crate) fn prune_compressed(
        &self,
        plan: &PrunePlan,
        out: Target<'_>,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        let output = Output::create(out, &self.files())?;
        let mut stats = self.prune_to_writer(plan, output.file(), progress)?;
        stats.disk_after = output.finish()?;
        Ok(stats)
    }
}

/// Counts what is written.
struct Counted<W>(W, u64);

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.1 = self.1.saturating_add(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
