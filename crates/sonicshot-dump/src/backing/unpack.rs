//! Files that are compressed as a whole: told by how they begin, and decompressed.

use crate::backing::lz4::Lz4Frames;
use crate::backing::packed::{At, BUFFER, Reached};
use crate::backing::streams::Streams;
use crate::backing::{archive, lzop};
use bzip2::bufread::BzDecoder;
use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use std::fs::File;
use std::io::{self, BufReader, Read};

/// As much as `zstd` itself takes for a window without being told to take more; a dictionary of
/// `xz -9` is half of that. In KiB, and room for the rest.
const XZ_MEMORY: u32 = (128 + 32) << 10;

/// A way of compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Zstd,
    Xz,
    Bzip2,
    Lzop,
    Lz4,
    /// One file in an archive.
    Zip,
}

/// The first bytes of compressed files.
const MARKS: &[(&[u8], Compression)] = &[
    (GZIP, Compression::Gzip),
    (ZSTD, Compression::Zstd),
    (XZ, Compression::Xz),
    (BZIP2, Compression::Bzip2),
    (LZOP, Compression::Lzop),
    (LZ4, Compression::Lz4),
    (ZIP, Compression::Zip),
];
pub(crate) const GZIP: &[u8] = &[0x1f, 0x8b, 8];
pub(crate) const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
pub(crate) const XZ: &[u8] = b"\xfd7zXZ\0";
pub(crate) const BZIP2: &[u8] = b"BZh";
pub(crate) const LZOP: &[u8] = &lzop::MAGIC;
pub(crate) const LZ4: &[u8] = &[0x04, 0x22, 0x4d, 0x18];
pub(crate) const ZIP: &[u8] = &archive::MAGIC;
/// No file needs more to be told, with what `pzstd` puts before.
pub(crate) const LONGEST_MARK: usize = 32;

impl Compression {
    /// The compression of a file that begins with `start`, if it is compressed.
    pub(crate) fn of(start: &[u8]) -> Option<Self> {
        let known = MARKS.iter().find(|(mark, _)| start.starts_with(mark));
        known
            .map(|(_, how)| *how)
            .or_else(|| Self::behind_skipped(start))
    }

    /// The same of a file that may begin with frames that hold no content, which `pzstd` writes.
    fn behind_skipped(start: &[u8]) -> Option<Self> {
        /// Of the 16 magics the least; the length of what is skipped follows.
        const SKIPPED: u32 = 0x184d_2a50;
        let (magic, rest) = start.split_first_chunk::<4>()?;
        if u32::from_le_bytes(*magic) & !0xf != SKIPPED {
            return None;
        }
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
        // What is beyond the beginning is as likely another's.
        let next = rest.get(len..).filter(|next| next.len() >= ZSTD.len())?;
        Self::of(next).filter(|how| *how == Self::Zstd)
    }

    /// A reader of `file` from `at` on, decompressed; how far it was read is in `reached`.
    pub(crate) fn reader(self, file: File, at: u64, reached: Reached) -> io::Result<Box<dyn Read>> {
        let from = |file| BufReader::with_capacity(BUFFER, At::told(file, at, reached.clone()));
        Ok(match self {
            // One stream or several, as the tools themselves read them.
            Self::Gzip => Box::new(Streams::<_, GzDecoder<_>>::new(from(file))),
            Self::Zstd => Box::new(Streams::<_, zstd::Decoder<'static, _>>::new(from(file))),
            Self::Xz => Box::new(XzReader::new_mem_limit(from(file), true, XZ_MEMORY)),
            Self::Bzip2 => Box::new(Streams::<_, BzDecoder<_>>::new(from(file))),
            Self::Lzop => Box::new(lzop::Decoder::new(from(file))?),
            Self::Zip => Box::new(archive::only_file(file, reached)?),
            Self::Lz4 => Box::new(Lz4Frames::new(from(file))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Compression, LONGEST_MARK, MARKS, Reached};
    use std::fs::File;
    use std::io::{Read, Write};

    fn content() -> Vec<u8> {
        (0..400_000_u32)
            .flat_map(|n| (n / 9).wrapping_mul(31).to_le_bytes())
            .collect()
    }

    fn packed(how: Compression, content: &[u8]) -> Vec<u8> {
        let write = |out: &mut dyn Write| out.write_all(content).unwrap();
        match how {
            Compression::Gzip => {
                let mut out =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                write(&mut out);
                out.finish().unwrap()
            }
            Compression::Zstd => {
                let mut out = zstd::Encoder::new(Vec::new(), 1).unwrap();
                out.include_checksum(true).unwrap();
                write(&mut out);
                out.finish().unwrap()
            }
            Compression::Xz => {
                let options = lzma_rust2::XzOptions::with_preset(1);
                let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                write(&mut out);
                out.finish().unwrap()
            }
            Compression::Bzip2 => {
                let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                write(&mut out);
                out.finish().unwrap()
            }
            Compression::Lzop => {
                let mut out = crate::backing::lzop::Encoder::new(Vec::new()).unwrap();
                write(&mut out);
                out.finish().unwrap()
            }
            Compression::Lz4 => {
                let info = lz4_flex::frame::FrameInfo::new().content_checksum(true);
                let mut out = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
                write(&mut out);
                out.finish().unwrap()
            }
            Compression::Zip => {
                let mut out = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
                let options = zip::write::SimpleFileOptions::default();
                out.start_file("content", options).unwrap();
                write(&mut out);
                out.finish().unwrap().into_inner()
            }
        }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn unpacked(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        let how = Compression::of(bytes).unwrap();
        let mut content = Vec::new();
        how.reader(file(bytes), 0, Reached::default())?
            .read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn each_comes_back_as_it_was_and_is_missed_when_cut_or_damaged() {
        let content = content();
        for (mark, how) in MARKS {
            assert!(mark.len() <= LONGEST_MARK);
            let packed = packed(*how, &content);
            assert!(packed.len() < content.len() / 2, "{how:?}");
            assert_eq!(Compression::of(&packed), Some(*how));
            assert!(unpacked(&packed).unwrap() == content, "{how:?}");
            // An archive's last bytes tell nothing of the file in it.
            let end = packed.len() - 1 - usize::from(*how == Compression::Zip) * 256;
            for len in [end, packed.len() / 2, mark.len()] {
                assert!(unpacked(&packed[..len]).is_err(), "{how:?} {len}");
            }
            let mut damaged = packed.clone();
            for byte in &mut damaged[packed.len() / 2..][..4] {
                *byte ^= 0x55;
            }
            assert!(unpacked(&damaged).is_err(), "{how:?}");
            // Filled up, as on a device; an archive is told by its end.
            if *how != Compression::Zip {
                let mut filled = packed.clone();
                filled.resize(packed.len() + 5000, 0);
                assert!(unpacked(&filled).unwrap() == content, "{how:?}");
                if *how != Compression::Xz {
                    filled.push(7);
                    assert!(unpacked(&filled).is_err(), "{how:?}");
                }
            }
            // One behind the other, as tools write who add to a file.
            let twice = [&packed[..], &packed].concat();
            match how {
                Compression::Zip | Compression::Lzop => {}
                _ => assert_eq!(
                    unpacked(&twice).unwrap().len(),
                    content.len() * 2,
                    "{how:?}"
                ),
            }
        }
        assert_eq!(Compression::of(b"\x7fELF"), None);
    }

    /// `pzstd` says before each frame how long it is.
    #[test]
    fn frames_without_content_are_passed_over() {
        let content = content();
        let frame = packed(Compression::Zstd, &content);
        let mut skipped = b"\x50\x2a\x4d\x18\x04\0\0\0".to_vec();
        skipped.extend(u32::try_from(frame.len()).unwrap().to_le_bytes());
        let all = [&skipped[..], &frame, &skipped, &frame].concat();
        assert!(unpacked(&all).unwrap() == [&content[..], &content].concat());
        assert_eq!(Compression::of(&skipped), None);
        skipped[4] = 0xff;
        assert_eq!(Compression::of(&[&skipped[..], &frame].concat()), None);
    }

    /// A dictionary that is said to be long takes no memory.
    #[test]
    fn what_asks_for_much_memory_is_refused() {
        let mut options = lzma_rust2::XzOptions::with_preset(0);
        options.lzma_options.dict_size = 512 << 20;
        let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        out.write_all(b"small").unwrap();
        assert!(unpacked(&out.finish().unwrap()).is_err());
    }
}
