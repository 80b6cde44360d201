//! The common part of all that unpacks: where the packed bytes come from, and how they end.

use sonicshot::to_u64;
use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) const BUFFER: usize = 1 << 20;
/// Bytes behind so many zeroes are no part of the file.
const MAX_FILL: u64 = 1 << 20;

/// A file from a place on. Where another handle of it reads makes no difference to this one.
pub(crate) struct At {
    file: File,
    at: u64,
    /// The place up to which it was read, for whoever shows that.
    reached: Reached,
}

/// The place up to which a file was read.
pub(crate) type Reached = Arc<AtomicU64>;

impl At {
    pub(crate) fn new(file: File, at: u64) -> Self {
        Self::told(file, at, Reached::default())
    }

    /// The same; how far it is is in `reached`.
    pub(crate) fn told(file: File, at: u64, reached: Reached) -> Self {
        Self { file, at, reached }
    }
}

impl Read for At {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(out, self.at)?;
        let next = self.at.checked_add(to_u64(read));
        self.at = next.ok_or(io::ErrorKind::FileTooLarge)?;
        self.reached.store(self.at, Ordering::Relaxed);
        Ok(read)
    }
}

pub(super) fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// It is sound, but more than is read here: to be unpacked by its own tool.
pub(super) fn unread(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}

/// Whether nothing follows but zeroes.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] if something stands behind zeroes.
pub(super) fn is_at_end(packed: &mut impl BufRead) -> io::Result<bool> {
    let mut zeroes = 0_u64;
    while zeroes < MAX_FILL {
        let next = packed.fill_buf()?;
        if next.is_empty() {
            return Ok(true);
        }
        let count = next.iter().take_while(|byte| **byte == 0).count();
        if count < next.len() {
            return match (zeroes, count) {
                (0, 0) => Ok(false),
                _ => Err(damaged("something stands behind zeroes")),
            };
        }
        packed.consume(count);
        let more = zeroes.checked_add(to_u64(count));
        zeroes = more.ok_or_else(|| damaged("zeroes without end"))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::{MAX_FILL, is_at_end};

    #[test]
    fn behind_so_many_zeroes_nothing_is_looked_at() {
        let fill = usize::try_from(MAX_FILL).unwrap();
        for (zeroes, more, end) in [
            (0, &b""[..], Some(true)),
            (fill + 5, b"", Some(true)),
            (0, b"more", Some(false)),
            (1, b"more", None),
            (fill - 1, b"more", None),
            (fill, b"more", Some(true)),
        ] {
            let packed = [vec![0; zeroes], more.to_vec()].concat();
            let mut packed = std::io::BufReader::with_capacity(4096, packed.as_slice());
            assert_eq!(is_at_end(&mut packed).ok(), end, "{zeroes}");
        }
    }
}
