//! One file in a zip archive, as its local headers tell of it (PKWARE's APPNOTE, 4.3.7): they lie one
//! behind the other, where the directory at the archive's end can claim any number of entries that
//! are not there.

use super::packed::{At, BUFFER, Reached, damaged, unread};
use sonicshot::{Cursor, CutShort, FileBytes, FileContent, to_u64};
use std::fs::File;
use std::io::{self, BufReader, Read};

pub(super) const MAGIC: [u8; 4] = *b"PK\x03\x04";
/// The magic of the directory, behind the last file.
const DIRECTORY: [u8; 4] = *b"PK\x01\x02";
/// A length that is in an extra field.
const ELSEWHERE: u32 = u32::MAX;
/// The extra field with the lengths: of the file, then as it is stored.
const LENGTHS: u16 = 1;
const ENCRYPTED: u16 = 1;
/// The lengths are behind the file and not in its header.
const STREAMED: u16 = 1 << 3;
/// Of one file and the folders that it is in.
const MAX_HEADERS: usize = 1024;

/// The only file of an archive, decompressed.
pub(super) fn only_file(file: File, reached: Reached) -> io::Result<Entry> {
    let content = FileContent::new(file.try_clone()?)?;
    let found = header_of_file(Cursor::new(content.bytes()));
    // What cannot be read looks like what is not there.
    let header = content.failure().map_or(found, Err)?;
    let packed = At::told(file, header.data_at, reached);
    let packed = BufReader::with_capacity(BUFFER, packed).take(header.packed_len);
    let content: Box<dyn Read> = match header.method {
        0 => Box::new(packed),
        8 => Box::new(flate2::bufread::DeflateDecoder::new(packed)),
        _ => {
            return Err(unread("the archive is compressed in an unusual way"));
        }
    };
    Ok(Entry {
        content,
        left: header.len,
        found: flate2::Crc::new(),
        sum: header.sum,
    })
}

/// The fields of a local header.
struct Header {
    is_folder: bool,
    method: u16,
    sum: u32,
    len: u64,
    packed_len: u64,
    data_at: u64,
}

fn header_of_file(mut at: Cursor<FileBytes<'_>>) -> io::Result<Header> {
    let mut found = None;
    for _ in 0..MAX_HEADERS {
        match at.array().map_err(cut)? {
            MAGIC => {}
            DIRECTORY => return found.ok_or_else(|| damaged("there is no file in the archive")),
            _ => return Err(damaged("what is behind a file in the archive is damaged")),
        }
        let header = Header::read(&mut at)?;
        if !header.is_folder && found.replace(header).is_some() {
            return Err(unread("the archive has more than one file"));
        }
    }
    Err(unread("the archive has too many folders"))
}

impl Header {
    /// Reads the rest of a header, behind its magic; `at` is then behind the entry's data.
    fn read(at: &mut Cursor<FileBytes<'_>>) -> io::Result<Self> {
        let mut number = || at.le::<u16>().map_err(cut);
        let [_version, flags, method, _time, _date] =
            [number()?, number()?, number()?, number()?, number()?];
        if flags & ENCRYPTED != 0 {
            return Err(unread("the file in the archive is encrypted"));
        }
        if flags & STREAMED != 0 {
            return Err(unread(
                "the archive does not say beforehand how long its file is",
            ));
        }
        let sum = at.le().map_err(cut)?;
        let short: [u32; 2] = [at.le().map_err(cut)?, at.le().map_err(cut)?];
        let name_len: u16 = at.le().map_err(cut)?;
        let extra_len: u16 = at.le().map_err(cut)?;
        let name = at.take(name_len.into()).map_err(cut)?;
        let extra = at.take(extra_len.into()).map_err(cut)?;
        let [packed_len, len] = if short.contains(&ELSEWHERE) {
            let [packed_len, len] = short;
            let [long_len, long_packed_len] = long_lengths(extra)?;
            [either(packed_len, long_packed_len), either(len, long_len)]
        } else {
            short.map(u64::from)
        };
        let data_at = at.position();
        at.skip(packed_len).map_err(cut)?;
        let last = name.len().checked_sub(1);
        Ok(Self {
            is_folder: last.and_then(|last| name.u8_at(last)) == Some(b'/'),
            method,
            sum,
            len,
            packed_len,
            data_at,
        })
    }
}

fn either(short: u32, long: u64) -> u64 {
    match short {
        ELSEWHERE => long,
        short => short.into(),
    }
}

/// The lengths among the extra fields of a header: of the file, and as it is stored.
fn long_lengths(extra: FileBytes<'_>) -> io::Result<[u64; 2]> {
    let mut at = Cursor::new(extra);
    while !at.is_at_end() {
        let tag: u16 = at.le().map_err(cut)?;
        let len: u16 = at.le().map_err(cut)?;
        let field = at.take(len.into()).map_err(cut)?;
        if tag == LENGTHS {
            let mut field = Cursor::new(field);
            return Ok([field.le().map_err(cut)?, field.le().map_err(cut)?]);
        }
    }
    Err(damaged("how long the file in the archive is, is not told"))
}

fn cut(_: CutShort) -> io::Error {
    damaged("the archive is cut short")
}

/// A file of an archive, of the length and with the checksum that it must have.
pub(super) struct Entry {
    content: Box<dyn Read>,
    left: u64,
    found: flate2::Crc,
    sum: u32,
}

impl Read for Entry {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(out)?;
        let (now, _) = out.split_at(read.min(out.len()));
        self.found.update(now);
        let left = self.left.checked_sub(to_u64(now.len()));
        self.left = left.ok_or_else(|| damaged("the file in the archive is longer than said"))?;
        if now.is_empty() && !out.is_empty() && (self.left > 0 || self.found.sum() != self.sum) {
            return Err(damaged("the file in the archive is cut short or damaged"));
        }
        Ok(now.len())
    }
}

#[cfg(test)]
mod tests {
    use super::{Entry, only_file};
    use std::io::{self, Cursor, Read, Write};
    use std::os::unix::fs::FileExt;
    use zip::CompressionMethod::{Deflated, Stored};
    use zip::write::SimpleFileOptions;

    fn archive(files: &[(&str, &[u8])], options: SimpleFileOptions) -> Vec<u8> {
        let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in files {
            if name.ends_with('/') {
                out.add_directory(*name, options).unwrap();
            } else {
                out.start_file(*name, options).unwrap();
                out.write_all(content).unwrap();
            }
        }
        out.finish().unwrap().into_inner()
    }

    fn opened(archive: &[u8]) -> io::Result<Entry> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(archive).unwrap();
        only_file(file, Default::default())
    }

    fn content_of(archive: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        opened(archive)?.read_to_end(&mut content)?;
        Ok(content)
    }

    #[test]
    fn an_archive_has_one_file() {
        let content = b"content".repeat(99);
        let options = SimpleFileOptions::default();
        for method in [Stored, Deflated] {
            for large in [false, true] {
                let options = options.compression_method(method).large_file(large);
                let one = archive(&[("a/", b""), ("a/b", &content), ("c/", b"")], options);
                assert!(content_of(&one).unwrap() == content, "{method} {large}");
                let empty = archive(&[("a", b"")], options);
                assert_eq!(content_of(&empty).unwrap(), b"");
                let two = archive(&[("a", &content), ("b", b"")], options);
                assert!(content_of(&two).is_err());
                let directory = one.windows(4).position(|four| four == super::DIRECTORY);
                for len in 0..directory.unwrap() + 4 {
                    assert!(opened(&one[..len]).is_err(), "{method} {large} {len}");
                }
            }
        }
        assert!(content_of(&archive(&[], options)).is_err());
        assert!(content_of(&archive(&[("a/", b"")], options)).is_err());
        for folders in [1000, 1100] {
            let mut files = vec![("a/", &b""[..]); 1];
            let names: Vec<_> = (0..folders).map(|number| format!("{number}/")).collect();
            files.extend(names.iter().map(|name| (name.as_str(), &b""[..])));
            files.push(("b", b"x"));
            assert_eq!(
                content_of(&archive(&files, options)).is_ok(),
                folders == 1000
            );
        }
    }

    #[test]
    fn what_a_header_says_otherwise_is_refused() {
        let options = SimpleFileOptions::default().compression_method(Stored);
        let good = archive(&[("a", b"content")], options);
        assert_eq!(content_of(&good).unwrap(), b"content");
        // Flags: encrypted, streamed. Method, checksum, lengths.
        for (at, bits) in [
            (6, 1),
            (6, 8),
            (8, 1),
            (14, 1),
            (18, 1),
            (22, 1),
            (25, 0x80),
        ] {
            let mut bad = good.clone();
            bad[at] ^= bits;
            assert!(content_of(&bad).is_err(), "{at} {bits}");
        }
        let mut elsewhere = good.clone();
        elsewhere[18..26].fill(0xff);
        assert!(content_of(&elsewhere).is_err());
    }

    /// A few kilobytes of an archive with a directory of terabytes that is not there.
    #[test]
    fn a_directory_that_claims_much_takes_no_memory() {
        const LEN: u64 = 1 << 40;
        let file = tempfile::tempfile().unwrap();
        let start = archive(&[("a", b"x")], SimpleFileOptions::default());
        file.write_all_at(&start[..30], 0).unwrap();
        file.set_len(LEN).unwrap();
        let mut end = Vec::new();
        // The ZIP64 end of the directory, where to find it, and the end.
        end.extend(*b"PK\x06\x06");
        end.extend((LEN - 4096).to_le_bytes());
        end.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        end.extend(
            [LEN / 46, LEN / 46, LEN / 2, 0]
                .map(u64::to_le_bytes)
                .concat(),
        );
        end.extend(*b"PK\x06\x07\0\0\0\0");
        end.extend((LEN - 98).to_le_bytes());
        end.extend([1, 0, 0, 0]);
        end.extend(*b"PK\x05\x06\0\0\0\0");
        end.extend([0xff; 12]);
        end.extend([0, 0]);
        file.write_all_at(&end, LEN - end.len() as u64).unwrap();
        assert!(only_file(file, Default::default()).is_err());
    }
}
