//! The files of `lzop`: LZO in blocks, with checksums (`lzop.c`, `conf.h`). libvirt's images may
//! be compressed so.

use super::packed::{is_at_end, unread};
use sonicshot::to_u64;
use std::io::{self, BufRead, Read, Write};

/// The first bytes of a file.
pub(crate) const MAGIC: [u8; 9] = *b"\x89LZO\0\r\n\x1a\n";
/// The version from which on the header has its longer form.
const LONG_HEADER: u16 = 0x0940;
const VERSION: u16 = 0x1040;
const VERSION_NEEDED: u16 = 0x0940;
const LIBRARY: u16 = 0x20a0;
/// LZO1X-1.
const METHOD: u8 = 1;
const LEVEL: u8 = 5;

/// Of the flags: which checksums stand before a block, of its content and as it is stored;
const ADLER32_CONTENT: u32 = 0x1;
const ADLER32_STORED: u32 = 0x2;
const CRC32_CONTENT: u32 = 0x100;
const CRC32_STORED: u32 = 0x200;
/// what else is in the header; that the file is one of several.
const EXTRA_FIELD: u32 = 0x40;
const FILTER: u32 = 0x800;
const HEADER_CRC32: u32 = 0x1000;
const MULTIPART: u32 = 0x400;

/// The blocks that `lzop` itself takes.
const MAX_BLOCK: u32 = 64 << 20;
/// The blocks that it writes.
const BLOCK: usize = 256 << 10;
/// A header's extra field is skipped, and has no use that is known.
const MAX_EXTRA: u32 = 1 << 20;

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Decompresses.
pub(crate) struct Decoder<R> {
    inner: R,
    flags: u32,
    stored: Vec<u8>,
    content: Vec<u8>,
    at: usize,
    ended: bool,
}

/// Reads numbers, and keeps what was read for a checksum.
struct Header<'a, R> {
    inner: &'a mut R,
    bytes: Vec<u8>,
}

impl<R: Read> Header<'_, R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes)?;
        self.bytes.extend(bytes);
        Ok(bytes)
    }

    fn skip(&mut self, len: u32) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.inner.read_exact(&mut bytes)?;
        self.bytes.extend(bytes);
        Ok(())
    }

    fn word(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_be_bytes)
    }
}

impl<R: BufRead> Decoder<R> {
    /// Reads the header.
    pub(crate) fn new(mut inner: R) -> io::Result<Self> {
        let mut magic = [0; MAGIC.len()];
        inner.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(damaged("it does not begin as a file of lzop"));
        }
        let mut header = Header {
            inner: &mut inner,
            bytes: Vec::new(),
        };
        let version = u16::from_be_bytes(header.take()?);
        header.take::<2>()?; // the library's version
        let long = version >= LONG_HEADER;
        if long {
            header.take::<2>()?; // the version that is needed
        }
        let [method] = header.take()?;
        if long {
            header.take::<1>()?; // the level
        }
        if !(1..=3).contains(&method) {
            return Err(damaged("an unknown method of lzop"));
        }
        let flags = header.word()?;
        if flags & (FILTER | MULTIPART) != 0 {
            return Err(unread("it is of several files, or was filtered (lzop)"));
        }
        header.take::<8>()?; // mode, time
        if long {
            header.take::<4>()?; // the rest of the time
        }
        let [name] = header.take()?;
        header.skip(name.into())?;
        let sum = checksum(flags & HEADER_CRC32 != 0, &header.bytes);
        if header.word()? != sum {
            return Err(damaged("the header's checksum is wrong"));
        }
        if flags & EXTRA_FIELD != 0 {
            let len = header.word()?;
            if len > MAX_EXTRA {
                return Err(damaged("the header's extra field is too long"));
            }
            header.skip(len)?;
            header.word()?;
        }
        Ok(Self {
            inner,
            flags,
            stored: Vec::new(),
            content: Vec::new(),
            at: 0,
            ended: false,
        })
    }

    fn word(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.inner.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// Reads the checksums of a block that the flags tell of: by Adler-32, by CRC-32.
    fn sums(&mut self, adler: u32, crc: u32) -> io::Result<[Option<u32>; 2]> {
        let mut read = |flag| {
            let there = self.flags & flag != 0;
            there.then(|| self.word()).transpose()
        };
        Ok([read(adler)?, read(crc)?])
    }

    /// Takes the next block; `false` if there is none.
    fn next(&mut self) -> io::Result<bool> {
        let len = self.word()?;
        if len == 0 {
            // `lzop` reads several files, each of which may be another: none of them is read here.
            if is_at_end(&mut self.inner)? {
                return Ok(false);
            }
            let next = self.inner.fill_buf()?;
            return Err(match MAGIC.starts_with(next) || next.starts_with(&MAGIC) {
                true => unread("several files of lzop, one behind the other"),
                false => damaged("something follows the last block"),
            });
        }
        let stored_len = self.word()?;
        if len > MAX_BLOCK || stored_len == 0 || stored_len > len {
            return Err(damaged(&format!(
                "a block of {len} bytes that takes {stored_len}, which has at most {MAX_BLOCK} and takes \
                 no more than it has"
            )));
        }
        let of_content = self.sums(ADLER32_CONTENT, CRC32_CONTENT)?;
        let of_stored = if stored_len < len {
            self.sums(ADLER32_STORED, CRC32_STORED)?
        } else {
            [None, None]
        };
        // Room for what is there, not for what is said.
        self.stored.clear();
        let taken = (&mut self.inner)
            .take(stored_len.into())
            .read_to_end(&mut self.stored)?;
        if to_u64(taken) != u64::from(stored_len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        check(&self.stored, of_stored)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if self.stored.len() == len {
            std::mem::swap(&mut self.content, &mut self.stored);
        } else {
            self.content.resize(len, 0);
            let found = lzokay::decompress::decompress(&self.stored, &mut self.content);
            if found != Ok(len) {
                return Err(damaged("a block does not decompress"));
            }
        }
        check(&self.content, of_content)?;
        self.at = 0;
        Ok(true)
    }
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.content.len() && !self.ended {
            self.ended = !self.next()?;
            if self.ended {
                self.content.clear();
            }
        }
        let mut left = self.content.get(self.at..).unwrap_or(&[]);
        let read = left.read(out)?;
        self.at = self
            .at
            .checked_add(read)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(read)
    }
}

fn check(bytes: &[u8], [adler, crc]: [Option<u32>; 2]) -> io::Result<()> {
    let wrong = |sum: Option<u32>, crc| sum.is_some_and(|sum| sum != checksum(crc, bytes));
    if wrong(adler, false) || wrong(crc, true) {
        return Err(damaged("the checksum of a block is wrong"));
    }
    Ok(())
}

/// By CRC-32, or by Adler-32.
fn checksum(crc: bool, bytes: &[u8]) -> u32 {
    if crc {
        let mut sum = flate2::Crc::new();
        sum.update(bytes);
        return sum.sum();
    }
    /// The largest prime below 2^16, and how many bytes a sum of 32 bits takes before it is due.
    const BASE: u32 = 65521;
    const DUE: usize = 5552;
    let (mut low, mut high) = (1_u32, 0_u32);
    for part in bytes.chunks(DUE) {
        for byte in part {
            low = low.wrapping_add(u32::from(*byte));
            high = high.wrapping_add(low);
        }
        low %= BASE;
        high %= BASE;
    }
    high << 16 | low
}

/// Compresses, as `lzop` does without options.
pub(crate) struct Encoder<W> {
    inner: W,
    dictionary: Box<lzokay::compress::Dict>,
    pending: Vec<u8>,
}

impl<W: Write> Encoder<W> {
    /// Writes the header.
    pub(crate) fn new(mut inner: W) -> io::Result<Self> {
        let mut header = Vec::new();
        for version in [VERSION, LIBRARY, VERSION_NEEDED] {
            header.extend(version.to_be_bytes());
        }
        header.extend([METHOD, LEVEL]);
        header.extend(ADLER32_CONTENT.to_be_bytes());
        // A file that may be read and written, of no time, without a name.
        header.extend(0o100_600_u32.to_be_bytes());
        header.extend([0; 9]);
        let sum = checksum(false, &header);
        inner.write_all(&MAGIC)?;
        inner.write_all(&header)?;
        inner.write_all(&sum.to_be_bytes())?;
        Ok(Self {
            inner,
            dictionary: lzokay::compress::Dict::new(),
            pending: Vec::new(),
        })
    }

    fn block(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let stored = lzokay::compress::compress_with_dict(&self.pending, &mut self.dictionary)
            .map_err(|_| io::Error::other("LZO does not compress"))?;
        let smaller = stored.len() < self.pending.len();
        let stored = if smaller { &stored } else { &self.pending };
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).map_err(io::Error::other);
        for word in [
            length(&self.pending)?,
            length(stored)?,
            checksum(false, &self.pending),
        ] {
            self.inner.write_all(&word.to_be_bytes())?;
        }
        self.inner.write_all(stored)?;
        self.pending.clear();
        Ok(())
    }

    /// Writes what is left, and the end.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.block()?;
        self.inner.write_all(&[0; 4])?;
        Ok(self.inner)
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = BLOCK.checked_sub(self.pending.len());
        let room = room.ok_or(io::ErrorKind::FileTooLarge)?;
        let (now, _) = bytes.split_at(room.min(bytes.len()));
        self.pending.extend(now);
        if self.pending.len() >= BLOCK {
            self.block()?;
        }
        Ok(now.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::{Decoder, Encoder, checksum};
    use proptest::prelude::*;
    use std::io::{self, Read, Write};
    use std::process::{Command, Stdio};

    fn pack(content: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new()).unwrap();
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Decoder::new(packed)?.read_to_end(&mut content)?;
        Ok(content)
    }

    fn content() -> Vec<u8> {
        let numbers = (0..200_000_u32).flat_map(|n| (n / 5).wrapping_mul(77).to_le_bytes());
        let mut state = 1_u32;
        let noise = std::iter::repeat_with(move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        });
        numbers
            .chain(noise.take(300_000))
            .chain([0; 70_000])
            .collect()
    }

    /// Sums of the text `Wikipedia`, as are said elsewhere.
    #[test]
    fn checksums_are_those_of_others() {
        assert_eq!(checksum(false, b"Wikipedia"), 0x11e6_0398);
        assert_eq!(checksum(true, b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn what_is_damaged_or_cut_short_is_refused() {
        let content = content();
        let packed = pack(&content);
        assert!(packed.len() < content.len());
        assert!(unpack(&packed).unwrap() == content);
        assert!(unpack(&pack(&[])).unwrap().is_empty());
        for len in (0..packed.len()).step_by(997).chain([packed.len() - 1]) {
            assert!(unpack(&packed[..len]).is_err(), "{len}");
        }
        // Every byte of the header but its versions, and some of the blocks.
        for at in (0..42).chain((42..packed.len()).step_by(991)) {
            let mut other = packed.clone();
            other[at] ^= 0x10;
            assert!(unpack(&other).is_err(), "{at}");
        }
        assert!(unpack(&[&packed[..], b"more"].concat()).is_err());
        // More than a block may have, and than a header.
        let mut long = pack(b"some content");
        long[38..42].copy_from_slice(&(65_u32 << 20).to_be_bytes());
        let said = unpack(&long).unwrap_err().to_string();
        assert!(said.contains("a block of 68157440 bytes"), "{said}");
        let mut header = pack(&[])[9..34].to_vec();
        header[8..12].copy_from_slice(&0x40_u32.to_be_bytes());
        for (len, is_taken) in [(4_u32, true), ((1 << 20) + 1, false)] {
            let mut file = [&super::MAGIC[..], &header].concat();
            file.extend(checksum(false, &header).to_be_bytes());
            file.extend(len.to_be_bytes());
            file.resize(file.len() + len as usize + 4 + 4, 0);
            assert_eq!(unpack(&file).is_ok(), is_taken, "{len}");
        }
    }

    #[test]
    fn lzop_itself_reads_and_writes_the_same() {
        let there = Command::new("lzop").arg("--version").output().is_ok();
        if !sonicshot_testkit::has("lzop", there) {
            return;
        }
        let lzop = |args: &[&str], input: Vec<u8>| -> Vec<u8> {
            let mut lzop = Command::new("lzop")
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdin = lzop.stdin.take().unwrap();
            let writer = std::thread::spawn(move || stdin.write_all(&input));
            let output = lzop.wait_with_output().unwrap();
            writer.join().unwrap().unwrap();
            assert!(output.status.success());
            output.stdout
        };
        let content = content();
        for args in [
            &["-c"][..],
            &["-c", "-9"],
            &["-c", "-1", "--crc32"],
            &["-c", "-CC"],
        ] {
            assert!(
                unpack(&lzop(args, content.clone())).unwrap() == content,
                "{args:?}"
            );
        }
        assert!(lzop(&["-dc"], pack(&content)) == content);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_bytes_are_too_strange(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = unpack(&bytes);
            let mut packed = pack(&bytes);
            prop_assert_eq!(&unpack(&packed).unwrap(), &bytes);
            packed.extend(&bytes);
            let _ = unpack(&packed);
        }
    }
}
