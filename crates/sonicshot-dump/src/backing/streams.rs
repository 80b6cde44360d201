//! Compressed streams, one behind the other, and the zeroes that a file is filled up with: on a
//! device, which ends where it ends.

use super::packed::is_at_end;
use std::io::{self, BufRead, Read};

/// A decoder of one stream.
pub(super) trait Stream<R>: Read + Sized {
    fn begin(packed: R) -> io::Result<Self>;
    /// The input behind it.
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
