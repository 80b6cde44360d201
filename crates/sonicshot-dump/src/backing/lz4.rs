//! LZ4's frames, one behind the other, up to the end of the last.
//!
//! The decoder takes a file that ends where a block's length would be for one that ends there. What
//! makes out whether a frame has its end is whether the file ended while the decoder asked for
//! more.

use super::packed::is_at_end;
use lz4_flex::frame::FrameDecoder;
use std::io::{self, BufRead, Read};

/// The content of a file of LZ4's frames, decompressed. One that ends inside a frame is an error.
#[derive(Debug)]
pub struct Lz4Frames<R: BufRead> {
    frames: FrameDecoder<Watched<R>>,
    has_ended: bool,
}

impl<R: BufRead> Lz4Frames<R> {
    /// Reads what begins with a frame.
    pub fn new(packed: R) -> Self {
        let hit_end = false;
        Self {
            frames: FrameDecoder::new(Watched { packed, hit_end }),
            has_ended: false,
        }
    }
}

impl<R: BufRead> Read for Lz4Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // Each turn takes a block's length or a frame's header, so that this ends with the file.
        while !self.has_ended && !out.is_empty() {
            let read = self.frames.read(out)?;
            if read > 0 {
                return Ok(read);
            }
            if self.frames.get_ref().hit_end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.has_ended = is_at_end(&mut self.frames.get_mut().packed)?;
        }
        Ok(0)
    }
}

/// A reader that notes whether more was asked for than it has.
#[derive(Debug)]
struct Watched<R> {
    packed: R,
    hit_end: bool,
}

impl<R: BufRead> Read for Watched<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.packed.read(out)?;
        self.hit_end |= read == 0 && !out.is_empty();
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::Lz4Frames;
    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    use std::io::{self, Read, Write};

    /// Of a frame: magic, two bytes of flags, checksum.
    const HEADER: usize = 7;

    fn unpacked(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        Lz4Frames::new(packed).read_to_end(&mut content)?;
        Ok(content)
    }

    fn packed(content: &[u8], mode: BlockMode, checksum: bool) -> Vec<u8> {
        let info = FrameInfo::new()
            .block_size(BlockSize::Max64KB)
            .block_mode(mode)
            .content_checksum(checksum);
        let mut out = FrameEncoder::with_frame_info(info, Vec::new());
        out.write_all(content).unwrap();
        out.finish().unwrap()
    }

    /// The offset of the length of each block, and of the zero that ends them.
    fn boundaries(packed: &[u8]) -> Vec<usize> {
        let mut found = vec![HEADER];
        loop {
            let at = found[found.len() - 1];
            let len = u32::from_le_bytes(packed[at..][..4].try_into().unwrap());
            if len == 0 {
                return found;
            }
            found.push(at + 4 + (len & 0x7fff_ffff) as usize);
        }
    }

    #[test]
    fn a_file_that_ends_inside_a_frame_is_missed_wherever_that_is() {
        let content: Vec<u8> = (0..90_000_u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        for mode in [BlockMode::Independent, BlockMode::Linked] {
            for checksum in [false, true] {
                let whole = packed(&content, mode, checksum);
                let at = boundaries(&whole);
                assert!(at.len() > 5, "{}", at.len());
                let inside_header = [1, 4, 6].into_iter();
                let inside_length = at.iter().flat_map(|at| (0..4).map(move |more| at + more));
                let before_last = std::iter::once(whole.len() - 1);
                for len in inside_header.chain(inside_length).chain(before_last) {
                    assert!(unpacked(&whole[..len]).is_err(), "{mode:?} {len}");
                    let behind_another = [&whole[..], &whole[..len]].concat();
                    assert!(unpacked(&behind_another).is_err(), "{mode:?} {len}");
                }
                assert!(unpacked(&whole).unwrap() == content);
            }
        }
    }

    #[test]
    fn frames_without_content_are_passed_over() {
        let [empty, some] = [&b""[..], b"content"].map(|content| {
            let frame = packed(content, BlockMode::Independent, true);
            assert_eq!(unpacked(&frame).unwrap(), content);
            frame
        });
        let frames = [&some[..], &empty, &some, &empty].concat();
        assert_eq!(unpacked(&frames).unwrap(), b"contentcontent");
        let mut reader = Lz4Frames::new(&some[..]);
        assert_eq!(reader.read(&mut []).unwrap(), 0);
        io::copy(&mut reader, &mut io::sink()).unwrap();
        // Behind the end is no more, however often it is asked for.
        assert_eq!(reader.read(&mut [0; 9]).unwrap(), 0);
    }
}
