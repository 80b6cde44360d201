//! A checkpoint with other blobs: all else stays as it is stored.

use super::sink::Sink;
use super::writer::{add_blob, end};
use crate::checkpoint::wire::builder::IndexBuilder;
use crate::checkpoint::wire::record::BlobEntry;
use crate::checkpoint::{CheckpointError, CheckpointReader, RangeSource, SaveStats};
use crate::{FileOffset, PhaseProgress, Progress, WorkPhase};
use core::hash::Hasher;
use std::io::{Read, Write};
use twox_hash::XxHash3_64;

/// A part that follows the header.
enum Part<'a> {
    Chunk(u64),
    Blob(&'a BlobEntry),
}

impl<S: RangeSource> CheckpointReader<S> {
    /// Writes this checkpoint to `out` once more, with these blobs besides: the name and content of
    /// each. Pages and other blobs are copied as they are stored, each checked. One that has such a
    /// name already is left out if `replace` says so.
    ///
    /// Returns what was written to, flushed, and what is in it. Sections of the index that this
    /// version does not know are not copied.
    ///
    /// ```
    /// use sonicshot::checkpoint::*;
    /// use sonicshot::*;
    ///
    /// # let ram = vec![7_u8; 16 * 4096];
    /// # let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))])?;
    /// # let map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
    /// # let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
    /// # let info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
    /// # let mut writer = CheckpointWriter::new(Vec::new(), info, SaveOptions::default())?;
    /// # writer.memory(&guest, &map, &plan)?;
    /// # let file = writer.finish()?.0;
    /// let checkpoint = CheckpointReader::new(file)?;
    /// let note = ("note", &mut &b"mine"[..] as &mut dyn std::io::Read);
    /// let (file, _) = checkpoint.attach(vec![note], false, Vec::new(), &None)?;
    /// let attached = CheckpointReader::new(file)?;
    /// assert_eq!(attached.read_blob("note")?, b"mine");
    /// assert!(attached.runs().eq(checkpoint.runs()));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// `progress` is told of the bytes of this checkpoint, as [`WorkPhase::Saving`].
    ///
    /// # Errors
    /// [`CheckpointError::BlobExists`] if a name is taken, [`CheckpointError::Checksum`] if this
    /// checkpoint is damaged, or what reading and writing give.
    pub fn attach<W: Write>(
        &self,
        blobs: Vec<(&str, &mut dyn Read)>,
        replace: bool,
        out: W,
        progress: &dyn Progress,
    ) -> Result<(W, SaveStats), CheckpointError> {
        let total = self.index_offset().raw();
        let mut phase = PhaseProgress::begin(progress, WorkPhase::Saving, total);
        let mut index = IndexBuilder::again(self.index());
        let mut sink = Sink::new(out);
        let is_new = |name: &str| blobs.iter().any(|(new, _)| *new == name);
        let parts = self.parts()?;
        let header = parts.first().map_or(self.index_offset(), |(at, _)| *at);
        self.each_part(FileOffset::ZERO, header.raw(), &mut |bytes| {
            sink.write(bytes)
        })?;
        for (at, part) in parts {
            phase.reach(at.raw());
            match part {
                Part::Chunk(number) => self.copy_chunk(number, &mut sink, &mut index)?,
                Part::Blob(blob) if is_new(&blob.name) && replace => {}
                Part::Blob(blob) => {
                    let offset = sink.offset();
                    self.check_blob(blob, &mut |bytes| sink.write(bytes))?;
                    let copy = blob.clone();
                    index.push_blob(BlobEntry { offset, ..copy });
                }
            }
        }
        for (name, content) in blobs {
            add_blob(&mut sink, &mut index, self.header_codec(), name, content)?;
        }
        let (out, file_len, digest) = end(sink, index)?;
        phase.end();
        let stats = SaveStats {
            file_len,
            digest,
            ..self.stats()
        };
        Ok((out, stats))
    }

    /// All that lies between header and index, in its order, and where each begins.
    fn parts(&self) -> Result<Vec<(FileOffset, Part<'_>)>, CheckpointError> {
        let mut parts = Vec::new();
        for number in 0..self.index().chunk_count() {
            let chunk = self.index().chunk(number)?;
            parts.push((chunk.entry.offset, Part::Chunk(number)));
        }
        for blob in &self.index().blobs {
            parts.push((blob.offset, Part::Blob(blob)));
        }
        // Empty blobs stand where the next part begins.
        parts.sort_by_key(|(at, part)| match part {
            Part::Blob(blob) => (*at, blob.stored_len),
            Part::Chunk(_) => (*at, u64::MAX),
        });
        Ok(parts)
    }

    fn copy_chunk<W: Write>(
        &self,
        number: u64,
        sink: &mut Sink<W>,
        index: &mut IndexBuilder,
    ) -> Result<(), CheckpointError> {
        let mut entry = self.index().chunk(number)?.entry;
        let mut sum = XxHash3_64::new();
        let offset = sink.offset();
        self.each_part(entry.offset, entry.stored_len.into(), &mut |bytes| {
            sum.write(bytes);
            sink.write(bytes)
        })?;
        let computed = sum.finish();
        if computed != entry.checksum {
            return Err(CheckpointError::Checksum {
                what: "a chunk",
                offset: entry.offset,
                stored: entry.checksum.into(),
                computed: computed.into(),
            });
        }
        entry.offset = offset;
        index.push_chunk(&entry);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::checkpoint::*;
    use crate::*;

    fn checkpoint(compression: Compression) -> Vec<u8> {
        let mut ram = vec![0_u8; 300 * 4096];
        for (page, bytes) in ram.chunks_exact_mut(4096).enumerate() {
            // Some are zero, some are alike, and some do not compress.
            match page % 5 {
                0 => {}
                1 => bytes.fill(9),
                _ => {
                    let mut word = page as u64 | 1;
                    for out in bytes.chunks_exact_mut(8) {
                        word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (word >> 29);
                        out.copy_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
        let guest = MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))]).unwrap();
        let mut map = PageMap::new(guest.layout(), PageSize::SIZE_4K);
        map.set(
            PfnRange::new(Pfn::new(40), Pfn::new(80)),
            PageClass::FreeBuddy,
        );
        let plan = PrunePlan::new(&map, &DropClasses::default(), Fill::Zero);
        let mut info = CheckpointInfo::new(guest.layout().clone(), PageSize::SIZE_4K);
        info.vmm = Some("a VMM".into());
        let mut writer =
            CheckpointWriter::new(Vec::new(), info, SaveOptions::new(compression)).unwrap();
        writer.blob("first", &b"in front"[..]).unwrap();
        writer.blob("empty", &b""[..]).unwrap();
        writer.memory(&guest, &map, &plan).unwrap();
        writer.blob("last", &vec![7; 5000][..]).unwrap();
        writer.finish().unwrap().0
    }

    fn attached(
        file: &[u8],
        blobs: &[(&str, &[u8])],
        replace: bool,
    ) -> Result<Vec<u8>, CheckpointError> {
        let reader = CheckpointReader::new(file.to_vec()).unwrap();
        let mut contents: Vec<_> = blobs
            .iter()
            .map(|(name, content)| (*name, *content))
            .collect();
        let blobs = contents.iter_mut();
        let blobs = blobs.map(|(name, content)| (*name, content as &mut dyn std::io::Read));
        Ok(reader
            .attach(blobs.collect(), replace, Vec::new(), &None)?
            .0)
    }

    fn everything(reader: &CheckpointReader<Vec<u8>>) -> Vec<u8> {
        let mut all = vec![0; 300 * 4096];
        reader.read(Gpa::ZERO, &mut all).unwrap();
        all
    }

    #[test]
    fn all_but_the_blobs_stays() {
        let lz4 = cfg!(feature = "lz4").then_some(Compression::Lz4);
        let zstd = cfg!(feature = "zstd").then_some(Compression::ZSTD);
        for compression in [Some(Compression::None), lz4, zstd].into_iter().flatten() {
            let before = checkpoint(compression);
            let old = CheckpointReader::new(before.clone()).unwrap();
            let big = vec![3; 200_000];
            let new: &[(&str, &[u8])] = &[("set", &big), ("last", b"another")];
            let after = attached(&before, new, true).unwrap();
            let reader = CheckpointReader::new(after).unwrap();
            reader.verify(&WorkOptions::new()).unwrap();
            assert_eq!(reader.info(), old.info());
            assert!(reader.runs().eq(old.runs()));
            assert!(everything(&reader) == everything(&old));
            for (name, content) in [
                ("first", &b"in front"[..]),
                ("empty", b""),
                ("last", b"another"),
                ("set", &big),
            ] {
                assert_eq!(reader.read_blob(name).unwrap(), content, "{name}");
            }
            assert_eq!(reader.blobs().count(), 4);
            // Nothing more, nothing less.
            assert_eq!(attached(&before, &[], false).unwrap(), before);
        }
    }

    #[test]
    fn what_is_there_is_not_replaced_untold_nor_damage_covered() {
        let before = checkpoint(Compression::None);
        let error = attached(&before, &[("last", b"another")], false).unwrap_err();
        assert!(
            matches!(error, CheckpointError::BlobExists { .. }),
            "{error:?}"
        );
        let twice: &[(&str, &[u8])] = &[("x", b"1"), ("x", b"2")];
        let error = attached(&before, twice, true).unwrap_err();
        assert!(
            matches!(error, CheckpointError::BlobExists { .. }),
            "{error:?}"
        );
        let footer = before.len() - 64;
        let index = u64::from_le_bytes(before[footer..footer + 8].try_into().unwrap());
        let index = usize::try_from(index).unwrap();
        // The last blob, and a page.
        for at in [index - 10, index / 2] {
            let mut damaged = before.clone();
            damaged[at] ^= 1;
            let error = attached(&damaged, &[("x", b"1")], true).unwrap_err();
            assert!(
                matches!(error, CheckpointError::Checksum { .. }),
                "{error:?}"
            );
        }
    }
}
