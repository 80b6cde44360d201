//! Writes a migration stream again, with a note that it is zero for each dropped page: to a file,
//! into a compressor, or into a pipe.

use crate::DumpError;
use crate::backing::lzop;
use crate::backing::plain::PlainDump;
use crate::backing::unpack::Compression;
use crate::format::ability::{AsStream, Copying, Part};
use crate::output::Output;
use crate::prune::copy::{COPY, Copier};
use sonicshot::Progress;
use sonicshot::{FileOffset, FileRange, PrunePlan, to_u64};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Ranges shorter than this are gathered before they are written.
const GATHERED_BELOW: u64 = 64 << 10;
/// The level that `zstd` itself uses.
const ZSTD_LEVEL: i32 = 3;
/// Of 0 to 9: memory is large, and higher ones take ten times as long.
const XZ_PRESET: u32 = 1;

/// Writes the pruned stream to a file: compressed again if it was.
pub(crate) fn copy(stream: &dyn AsStream, work: Copying<'_>) -> Result<(), DumpError> {
    let Copying {
        goes,
        output,
        stats,
        progress,
        ..
    } = work;
    stream.count(goes, stats);
    if stream.packed_in().is_none() {
        return copy_stream(stream, goes, output, progress);
    }
    let path = stream.source().path();
    write(stream, goes, path, &mut output.file(), progress)?;
    Ok(())
}

/// The kernel copies what stays as it is.
fn copy_stream(
    stream: &dyn AsStream,
    goes: &PrunePlan,
    output: &Output,
    progress: &dyn Progress,
) -> Result<(), DumpError> {
    let dump = stream.source();
    let mut copier = Copier::new(dump, output, dump.file_len(), progress);
    let writing = || DumpError::io("writing", output.path());
    let behind = |at: FileOffset, len: u64| {
        let what = "a range beyond 64 bits";
        let beyond = || DumpError::malformed(dump.path(), what, at, len);
        at.checked_add(len).ok_or_else(beyond)
    };
    let mut at = FileOffset::ZERO;
    // Small pieces are gathered: a note of a zero page has nine bytes.
    let mut small: Vec<u8> = Vec::new();
    let flush = |small: &mut Vec<u8>, at: &mut FileOffset| {
        let next = behind(*at, to_u64(small.len()))?;
        let written = output.file().write_all_at(small, at.raw());
        written.map_err(writing())?;
        *at = next;
        small.clear();
        Ok::<(), DumpError>(())
    };
    stream.pruned(goes, &mut |piece| {
        let from = match piece {
            Part::Bytes(bytes) => {
                small.extend(bytes);
                return Ok(());
            }
            Part::Copy(from) => from,
        };
        if from.len() < GATHERED_BELOW {
            append(dump, from, &mut small)?;
            if small.len() >= COPY {
                flush(&mut small, &mut at)?;
            }
            return Ok(());
        }
        flush(&mut small, &mut at)?;
        copier.copy(from, at)?;
        at = behind(at, from.len())?;
        Ok(())
    })?;
    flush(&mut small, &mut at)?;
    output.file().set_len(at.raw()).map_err(writing())
}

/// Writes the pruned stream from front to back.
fn write_stream(
    stream: &dyn AsStream,
    goes: &PrunePlan,
    out: &mut dyn Write,
    failed: &dyn Fn(io::Error) -> DumpError,
    progress: &dyn Progress,
) -> Result<(), DumpError> {
    let dump = stream.source();
    let mut buffer: Vec<u8> = Vec::new();
    let total = dump.file_len();
    stream.pruned(goes, &mut |piece| {
        let mut rest = match piece {
            Part::Bytes(bytes) => {
                buffer.extend(bytes);
                return Ok(());
            }
            Part::Copy(from) => from,
        };
        while !rest.is_empty() {
            let end = rest.start().checked_add(to_u64(COPY));
            let end = end.map_or(rest.end(), |end| end.min(rest.end()));
            append(dump, FileRange::new(rest.start(), end), &mut buffer)?;
            rest = FileRange::new(end, rest.end());
            if buffer.len() >= COPY {
                out.write_all(&buffer).map_err(failed)?;
                buffer.clear();
                progress.tell(end.raw(), total);
            }
        }
        Ok(())
    })?;
    out.write_all(&buffer).map_err(failed)?;
    progress.tell(total, total);
    Ok(())
}

/// Adds a range of the dump's file to `out`.
pub(crate) fn append(
    dump: &PlainDump,
    from: FileRange,
    out: &mut Vec<u8>,
) -> Result<(), DumpError> {
    let (start, len) = (from.start(), from.len());
    let beyond = || DumpError::malformed(dump.path(), "a range beyond the end", start, len);
    let there = dump.bytes_in(from).ok_or_else(beyond)?;
    let old = out.len();
    out.resize(old.checked_add(there.len()).ok_or_else(beyond)?, 0);
    let copied = out.get_mut(old..).is_some_and(|out| there.copy_to(out));
    copied.then_some(()).ok_or_else(beyond)
}

/// Writes the pruned stream to `out`, in the image that it was compressed in. Messages call the
/// input `path`. Returns how many bytes were written.
pub(crate) fn write(
    stream: &dyn AsStream,
    goes: &PrunePlan,
    path: &Path,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<u64, DumpError> {
    let failed = move |source| DumpError::Io {
        action: "writing the pruned",
        path: path.to_owned(),
        source,
    };
    let mut counted = Counted(out, 0);
    let mut compression = None;
    if let Some(packed) = stream.packed_in() {
        counted.write_all(&packed.header(path)?).map_err(&failed)?;
        compression = packed.image.compression;
    }
    let mut all = |packer: &mut dyn Write| write_stream(stream, goes, packer, &failed, progress);
    match compression {
        None => all(&mut counted)?,
        Some(how) => compressed(how, &mut counted, &failed, &mut all)?,
    }
    counted.flush().map_err(&failed)?;
    Ok(counted.1)
}

/// A function that writes all of a stream.
type WriteAll<'a> = &'a mut dyn FnMut(&mut dyn Write) -> Result<(), DumpError>;

/// Has `all` written to `out`, compressed.
fn compressed(
    how: Compression,
    out: &mut dyn Write,
    failed: &dyn Fn(io::Error) -> DumpError,
    all: WriteAll<'_>,
) -> Result<(), DumpError> {
    match how {
        Compression::Gzip => {
            let level = flate2::Compression::default();
            let mut packer = flate2::write::GzEncoder::new(out, level);
            all(&mut packer)?;
            packer.finish().map_err(failed)?;
        }
        Compression::Zstd => {
            let packer = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL);
            let mut packer = packer.map_err(failed)?;
            all(&mut packer)?;
            packer.finish().map_err(failed)?;
        }
        Compression::Bzip2 => {
            let mut packer = bzip2::write::BzEncoder::new(out, bzip2::Compression::best());
            all(&mut packer)?;
            packer.finish().map_err(failed)?;
        }
        Compression::Xz => {
            let options = lzma_rust2::XzOptions::with_preset(XZ_PRESET);
            let mut packer = lzma_rust2::XzWriter::new(out, options).map_err(failed)?;
            all(&mut packer)?;
            packer.finish().map_err(failed)?;
        }
        Compression::Lzop => {
            let mut packer = lzop::Encoder::new(out).map_err(failed)?;
            all(&mut packer)?;
            packer.finish().map_err(failed)?;
        }
        // libvirt has no others: what is in its header would not be true of what follows.
        Compression::Lz4 | Compression::Zip => {
            return Err(failed(io::ErrorKind::Unsupported.into()));
        }
    }
    Ok(())
}

/// Counts what is written. A call that was interrupted is begun again: not all packers do that for
/// what they write last.
struct Counted<W>(W, u64);

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(written) => {
                    let all = self.1.checked_add(to_u64(written));
                    self.1 = all.ok_or(io::ErrorKind::FileTooLarge)?;
                    return Ok(written);
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::{Compression, Counted, compressed};
    use crate::DumpError;
    use std::io::{self, Read, Write};

    /// Every second call is interrupted.
    struct Interrupted(Vec<u8>, bool);

    impl Write for Interrupted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_interrupted_call_is_begun_again_whatever_packs() {
        let failed = |source| DumpError::Io {
            action: "writing",
            path: "out".into(),
            source,
        };
        let content: Vec<u8> = (0..200_000_u32)
            .flat_map(|n| n.wrapping_mul(n).to_le_bytes())
            .collect();
        for how in [
            Compression::Gzip,
            Compression::Bzip2,
            Compression::Xz,
            Compression::Lzop,
            Compression::Zstd,
        ] {
            let mut out = Counted(Interrupted(Vec::new(), false), 0);
            let mut all = |packer: &mut dyn Write| packer.write_all(&content).map_err(failed);
            compressed(how, &mut out, &failed, &mut all).unwrap();
            assert_eq!(out.1, out.0.0.len() as u64, "{how:?}");
            let mut unpacked = Vec::new();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&out.0.0).unwrap();
            let mut reader = how.reader(file, 0, Default::default()).unwrap();
            reader.read_to_end(&mut unpacked).unwrap();
            assert!(unpacked == content, "{how:?}");
        }
    }
}
