//! Whether an image is compressed, where nothing else was asked for: LZ4, if that costs no time.

use crate::filter::memory_file;
use sonicshot::to_u64;
use sonicshot_offline::packed::{self, ImageCompression};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::time::{Duration, Instant};

/// So much is packed and written to learn how fast that is.
const SAMPLE: usize = 8 << 20;
/// The ratio of speeds, packing to disk, from which packing pays: packed data is seldom shorter than
/// half, and packing must take no longer than what it spares.
const TIMES: u32 = 2;

/// The measurements that the choice was made by.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Choice {
    /// LZ4, or nothing.
    pub compression: Option<ImageCompression>,
    /// The time that writing the sample to the image's disk took.
    pub wrote: Duration,
    /// The time that packing it took.
    pub packed: Duration,
    /// The length of the sample, in bytes.
    pub sample: u64,
}

impl Choice {
    fn of(wrote: Duration, packed: Duration) -> Self {
        let pays = packed
            .checked_mul(TIMES)
            .is_some_and(|twice| twice <= wrote);
        Self {
            compression: pays.then_some(ImageCompression::Lz4),
            wrote,
            packed,
            sample: to_u64(SAMPLE),
        }
    }

    /// Tries it with `out`, which has nothing in it yet, and has nothing in it again.
    pub(crate) fn make(mut out: &File) -> io::Result<Self> {
        let sample = sample();
        let begin = Instant::now();
        out.write_all(&sample)?;
        out.sync_data()?;
        let wrote = begin.elapsed();
        out.set_len(0)?;
        out.rewind()?;
        let into = memory_file("sonicshot-sample")?;
        let begin = Instant::now();
        packed::compress(ImageCompression::Lz4, sample.as_slice(), &into)?;
        Ok(Self::of(wrote, begin.elapsed()))
    }
}

/// Bytes that pack as a guest's do: to less than a half, none of them zero for long.
fn sample() -> Vec<u8> {
    /// Of each so many bytes the first ones are new.
    const STEP: usize = 64;
    let mut word = 0x9e37_79b9_u32;
    let mut sample = Vec::with_capacity(SAMPLE);
    while sample.len() < SAMPLE {
        for _ in 0..STEP / 8 {
            word ^= word << 13;
            word ^= word >> 17;
            word ^= word << 5;
            sample.extend(word.to_le_bytes());
        }
        let old = sample.len().checked_sub(STEP / 2);
        let half = old.and_then(|from| sample.get(from..)).map(<[u8]>::to_vec);
        sample.extend(half.unwrap_or_default());
    }
    sample.truncate(SAMPLE);
    sample
}

#[cfg(test)]
mod tests {
    use super::{Choice, SAMPLE, sample};
    use sonicshot_offline::packed::{ImageCompression, compress};
    use std::io::Seek;
    use std::time::Duration;

    #[test]
    fn it_is_packed_where_the_disk_is_half_as_fast() {
        let of = |wrote, packed| {
            let made = Choice::of(Duration::from_millis(wrote), Duration::from_millis(packed));
            made.compression
        };
        assert_eq!(of(100, 10), Some(ImageCompression::Lz4));
        assert_eq!(of(100, 50), Some(ImageCompression::Lz4));
        assert_eq!(of(100, 51), None);
        assert_eq!(of(0, 1), None);
        assert_eq!(of(u64::MAX, u64::MAX), None);
    }

    #[test]
    fn it_leaves_nothing_in_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        let made = Choice::make(&file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0);
        assert_eq!(file.stream_position().unwrap(), 0);
        assert_eq!(made.sample, SAMPLE as u64);
    }

    #[test]
    fn the_sample_packs_to_between_a_third_and_two_thirds() {
        let file = tempfile::tempfile().unwrap();
        compress(ImageCompression::Lz4, sample().as_slice(), &file).unwrap();
        let len = file.metadata().unwrap().len();
        let all = SAMPLE as u64;
        assert!((all / 3..all * 2 / 3).contains(&len), "{len}");
    }
}
