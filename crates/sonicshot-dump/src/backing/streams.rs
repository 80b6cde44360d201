//! Compressed streams, one behind the other, and the zeroes that a file is filled up with: on a
//! device, which ends where it ends.

use super::unpack::damaged;
use std::io::{self, BufRead, Read};

/// What is behind so many zeroes is no part of the file.
const MAX_FILL: u64 = 1 << 20;

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
            return match zeroes.saturating_add(count as u64) {
                0 => Ok(false),
                _ => Err(damaged("something stands behind zeroes")),
            };
        }
        packed.consume(count);
        zeroes = zeroes.saturating_add(count as u64);
    }
    Ok(true)
}

/// A decoder of one stream.
pub(super) trait Stream<R>: Read + Sized {
    fn begin(packed: R) -> io::Result<Self>;
    /// What comes behind it.
    fn rest(self) -> R;
}

impl<R: BufRead> Stream<R> for flate2::bufread::GzDecoder<R> {
    fn begin(packed: R) -> io::Result<Self> {
        Ok(Self::new(packed))
    }
    fn rest(self) -> R {
        self.into_inner()
    }
}

impl<R: BufRead> Stream<R> for bzip2::bufread::BzDecoder<R> {
    fn begin(packed: R) -> io::Result<Self> {
        Ok(Self::new(packed))
    }
    fn rest(self) -> R {
        self.into_inner()
    }
}

impl<R: BufRead> Stream<R> for zstd::stream::read::Decoder<'static, R> {
    fn begin(packed: R) -> io::Result<Self> {
        Ok(Self::with_buffer(packed)?.single_frame())
    }
    fn rest(self) -> R {
        self.finish()
    }
}

/// All streams of a file, decompressed.
pub(super) enum Streams<R, D> {
    In(D),
    Behind(R),
    Ended,
}

impl<R: BufRead, D: Stream<R>> Streams<R, D> {
    pub(super) fn new(packed: R) -> Self {
        Self::Behind(packed)
    }
}

impl<R: BufRead, D: Stream<R>> Read for Streams<R, D> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // Each turn takes a stream's header, so that this ends with the file.
        while !out.is_empty() {
            match std::mem::replace(self, Self::Ended) {
                Self::In(mut stream) => {
                    let read = stream.read(out)?;
                    if read > 0 {
                        *self = Self::In(stream);
                        return Ok(read);
                    }
                    let mut rest = stream.rest();
                    if !is_at_end(&mut rest)? {
                        *self = Self::Behind(rest);
                    }
                }
                Self::Behind(rest) => *self = Self::In(D::begin(rest)?),
                Self::Ended => break,
            }
        }
        Ok(0)
    }
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
