//! Images that are compressed on their way to a file and from it.

use sonicshot_dump::Lz4Frames;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};

const ZSTD_LEVEL: i32 = 3;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const LZ4_MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];
const BUFFER: usize = 1 << 20;

/// The compression of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageCompression {
    /// Zstandard, with its checksum.
    Zstd,
    /// LZ4 frames, with their checksum.
    Lz4,
}

/// Writes all that comes from `from`, compressed and with a checksum.
///
/// # Errors
/// The errors of reading or writing.
pub fn compress(how: ImageCompression, mut from: impl Read, out: &File) -> io::Result<()> {
    let out = BufWriter::with_capacity(BUFFER, out);
    let out = match how {
        ImageCompression::Zstd => {
            let mut encoder = zstd::Encoder::new(out, ZSTD_LEVEL)?;
            encoder.include_checksum(true)?;
            copy(&mut from, &mut encoder)?;
            encoder.finish()?
        }
        ImageCompression::Lz4 => {
            let info = lz4_flex::frame::FrameInfo::new().content_checksum(true);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, out);
            copy(&mut from, &mut encoder)?;
            encoder.finish().map_err(io::Error::from)?
        }
    };
    out.into_inner()?.flush()
}

/// The compression of the file that begins with these bytes.
#[must_use]
pub fn compression_of(start: [u8; 4]) -> Option<ImageCompression> {
    match start {
        ZSTD_MAGIC => Some(ImageCompression::Zstd),
        LZ4_MAGIC => Some(ImageCompression::Lz4),
        _ => None,
    }
}

/// Writes what `from` holds, decompressed, to `out`.
///
/// # Errors
/// The errors of reading or writing; [`io::ErrorKind::InvalidData`] or
/// [`io::ErrorKind::UnexpectedEof`] and the like if it is damaged or cut short.
pub fn decompress(how: ImageCompression, from: &File, out: &mut impl Write) -> io::Result<()> {
    let from = BufReader::with_capacity(BUFFER, from);
    match how {
        ImageCompression::Zstd => copy(&mut zstd::Decoder::with_buffer(from)?, out),
        ImageCompression::Lz4 => copy(&mut Lz4Frames::new(from), out),
    }
}

fn copy(from: &mut impl Read, out: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let len = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        // More than there is room for no reader gives.
        let read = buffer.get(..len).ok_or(io::ErrorKind::InvalidData)?;
        out.write_all(read)?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may stop anywhere")]

    use super::{ImageCompression, compress, compression_of, decompress};
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    fn packed(how: ImageCompression, content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        compress(how, content, &file).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn comes_back_as_it_was_and_is_missed_when_cut() {
        let content: Vec<u8> = (0..3_000_000_u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        for how in [ImageCompression::Zstd, ImageCompression::Lz4] {
            let mut file = packed(how, &content);
            let mut start = [0; 4];
            file.read_exact(&mut start).unwrap();
            assert_eq!(compression_of(start), Some(how));
            file.rewind().unwrap();
            let mut back = Vec::new();
            decompress(how, &file, &mut back).unwrap();
            assert!(back == content, "{how:?}");

            let len = file.metadata().unwrap().len();
            let mut lens = vec![len - 1, len / 2];
            if how == ImageCompression::Lz4 {
                // Its end is a length of zero, and the checksum.
                lens.extend([len - 8, len - 5]);
            }
            for len in lens {
                file.set_len(len).unwrap();
                file.rewind().unwrap();
                let cut = decompress(how, &file, &mut Vec::new());
                assert!(cut.is_err(), "{how:?} {len}");
                file = packed(how, &content);
            }

            let mut file = packed(how, &content);
            file.seek(std::io::SeekFrom::Start(len / 2)).unwrap();
            file.write_all(b"other bytes than there were").unwrap();
            file.rewind().unwrap();
            assert!(decompress(how, &file, &mut Vec::new()).is_err(), "{how:?}");
        }
        assert_eq!(compression_of(*b"Xen "), None);
    }
}
