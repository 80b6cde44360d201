//! LiME dumps: the RAM of a guest as its own kernel sees it, one record for each `System RAM`
//! range (LiME, `lime.h`: `lime_mem_range_header` version 1).

use crate::DumpError;
use crate::Incomplete;
use crate::backing::Stored;
use crate::backing::plain::{Extent, PlainDump, may_claim, sum_of_lens};
use crate::format::kind::{Format, Kind, Source, boxed};
use sonicshot::{
    Bytes, Cursor, CutShort, FileBytes, FileOffset, FileRange, Gpa, GpaRange, PhaseProgress,
    Progress, WorkPhase, to_u64,
};
use std::path::Path;

pub(crate) const KIND: Kind = Kind::by_magic("lime", &[b"EMiL"], |source| open(source).map(boxed));

/// `EMiL` in the file.
const MAGIC: u32 = 0x4c69_4d45;
pub(crate) const HEADER_LEN: u64 = 32;
/// No guest has a million ranges of RAM.
const MAX_RECORDS: usize = 1 << 20;

/// The header of a record, the same in LiME's and AVML's files but for magic and version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub magic: u32,
    pub version: u32,
    pub guest: GpaRange,
}

impl Record {
    /// Reads the header at `at`. `None` in the result's place is a header that is cut off.
    pub(crate) fn read(
        path: &Path,
        data: FileBytes<'_>,
        at: FileOffset,
    ) -> Result<Self, DumpError> {
        let bad = |what, value| DumpError::malformed(path, what, at, value);
        let cut = |_: CutShort| {
            bad(
                "a record's header beyond the end: truncated",
                to_u64(data.len()),
            )
        };
        let mut header = Cursor::at(data, at.raw());
        let (magic, version) = (header.le().map_err(cut)?, header.le().map_err(cut)?);
        let start = header.le().map_err(cut)?;
        let last: u64 = header.le().map_err(cut)?;
        // What is reserved.
        header.skip(8).map_err(cut)?;
        // The end is the last byte itself.
        let end = last.checked_add(1).filter(|end| *end > start);
        let end = end.ok_or_else(|| bad("a record that ends before it begins", last))?;
        Ok(Self {
            magic,
            version,
            guest: GpaRange::new(Gpa::new(start), Gpa::new(end)),
        })
    }
}

/// A LiME file, mapped.
#[derive(Debug)]
struct LimeDump {
    mapped: PlainDump,
    incomplete: Option<Incomplete>,
}

fn open(source: Source<'_>) -> Result<LimeDump, DumpError> {
    let records = Records::read(source.path, source.data(), &source.known.progress)?;
    let incomplete = records.incomplete(source.len());
    let mapped = source.mapped(records.extents)?.lacking(records.absent);
    Ok(LimeDump { mapped, incomplete })
}

impl Format for LimeDump {
    fn name(&self) -> &'static str {
        "LiME"
    }

    fn stored(&self) -> &dyn Stored {
        &self.mapped
    }

    fn incomplete(&self) -> Option<Incomplete> {
        self.incomplete.clone()
    }
}

/// The places of the records of a LiME file. Ranges that overlap are found out by
/// [`PlainDump::new`](crate::backing::plain::PlainDump::new).
#[derive(Debug, Default)]
struct Records {
    extents: Vec<Extent>,
    /// The memory of the last record that is beyond the end of the file.
    absent: Vec<GpaRange>,
    /// The least offset at which the file should end, if it is cut off.
    need: Option<FileOffset>,
}

impl Records {
    fn read(path: &Path, data: FileBytes<'_>, progress: &dyn Progress) -> Result<Self, DumpError> {
        let len = to_u64(data.len());
        let mut phase = PhaseProgress::begin(progress, WorkPhase::Opening, len);
        let file_end = FileOffset::new(len);
        let mut this = Self::default();
        let mut at = FileOffset::ZERO;
        while at < file_end && !this.is_end(data, at) {
            let bad = |what, value| DumpError::malformed(path, what, at, value);
            let record = Record::read(path, data, at)?;
            if record.magic != MAGIC {
                return Err(bad("missing LiME magic", record.magic.into()));
            }
            if record.version != 1 {
                return Err(bad("an unknown version of LiME", record.version.into()));
            }
            let len = record.guest.len();
            let body = at.checked_add(HEADER_LEN);
            let body = body.and_then(|body| FileRange::with_len(body, len));
            let body = body.ok_or_else(|| bad("a record beyond 64 bits", len))?;
            if this.extents.len() >= MAX_RECORDS {
                return Err(bad("too many records", to_u64(MAX_RECORDS)));
            }
            this.add(record.guest, body, file_end)
                .ok_or_else(|| bad("a record beyond the end: truncated", len))?;
            at = body.end();
            phase.reach(at.raw());
        }
        phase.end();
        this.extents.sort_unstable_by_key(|extent| extent.guest);
        Ok(this)
    }

    /// Whether nothing begins at `at`: zeroes are what a disk or a transport in whole blocks adds,
    /// the beginning of a header is what is left of one that is cut off.
    fn is_end(&mut self, data: FileBytes<'_>, at: FileOffset) -> bool {
        if self.extents.is_empty() {
            return false;
        }
        self.need = cut_header(data, at, &[MAGIC]);
        self.need.is_some() || is_zero_from(data, at.raw())
    }

    /// Adds a record, of whose body something must be there.
    fn add(&mut self, guest: GpaRange, body: FileRange, file_end: FileOffset) -> Option<()> {
        let there = file_end.offset_from(body.start())?.min(guest.len());
        let end = guest.start().checked_add(there)?;
        let is_cut = end < guest.end();
        if is_cut {
            let all = self.extents.iter().map(|extent| extent.guest.len());
            let claimed = sum_of_lens(all.chain([guest.len()]))?;
            may_claim(claimed, file_end.raw()).then_some(())?;
            self.absent.push(GpaRange::new(end, guest.end()));
            self.need = Some(body.end());
        }
        let parts = [
            (GpaRange::new(guest.start(), end), Some(body.start())),
            (GpaRange::new(end, guest.end()), None),
        ];
        let parts = parts.into_iter().filter(|(guest, _)| !guest.is_empty());
        self.extents
            .extend(parts.map(|(guest, offset)| Extent { guest, offset }));
        let has_any = self.extents.iter().any(|extent| extent.offset.is_some());
        (!is_cut || has_any).then_some(())
    }

    /// The reason why pages are missing, of a file of `len` bytes.
    fn incomplete(&self, len: u64) -> Option<Incomplete> {
        let need = self.need?.raw();
        Some(Incomplete::CutOff { len, need })
    }
}

/// The end that the cut-off header at `at` should have, if there is the beginning of one with any of
/// these magics and no more.
pub(crate) fn cut_header(
    data: FileBytes<'_>,
    at: FileOffset,
    magics: &[u32],
) -> Option<FileOffset> {
    let left = to_u64(data.len()).checked_sub(at.raw())?;
    if left >= HEADER_LEN {
        return None;
    }
    let start = data.part(at.raw(), left.min(4))?.copied()?;
    let mut magics = magics.iter().map(|magic| magic.to_le_bytes());
    let begins = magics.any(|magic| magic.starts_with(&start));
    begins.then(|| at.checked_add(HEADER_LEN)).flatten()
}

/// Whether there are only zeroes from `at` on.
pub(crate) fn is_zero_from(data: FileBytes<'_>, at: u64) -> bool {
    let rest = usize::try_from(at).ok().and_then(|at| {
        let len = data.len().checked_sub(at)?;
        data.get(at, len)
    });
    rest.is_some_and(|rest| rest.is_zero())
}

#[cfg(test)]
mod tests {
    use super::Records;
    use crate::DumpError;
    use crate::Incomplete;
    use crate::backing::plain::{PlainDump, open_content};
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError};
    use std::path::Path;

    fn record(file: &mut Vec<u8>, start: u64, data: &[u8]) {
        file.extend(b"EMiL\x01\0\0\0");
        file.extend(start.to_le_bytes());
        file.extend((start + data.len() as u64 - 1).to_le_bytes());
        file.extend([0; 8]);
        file.extend(data);
    }

    fn open(bytes: &[u8]) -> Result<PlainDump, DumpError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.lime");
        std::fs::write(&path, bytes).unwrap();
        let content = open_content(&path)?;
        let records = Records::read(&path, content.bytes(), &None)?;
        Ok(PlainDump::new(&path, content, records.extents)?.lacking(records.absent))
    }

    /// Records in any order, one of which does not end at a page.
    fn sample() -> Vec<u8> {
        let mut file = Vec::new();
        record(&mut file, 0x10_0000, &[2; 0x2000]);
        record(&mut file, 0x1000, &[1; 0x1c00]);
        file
    }

    #[test]
    fn reads_what_was_recorded() {
        let dump = open(&sample()).unwrap();
        let regions: Vec<_> = dump
            .layout()
            .regions()
            .iter()
            .map(|r| (r.start().raw(), r.end().raw()))
            .collect();
        assert_eq!(regions, [(0x1000, 0x2c00), (0x10_0000, 0x10_2000)]);
        assert_eq!(dump.read_u32(Gpa::new(0x2bfc)).unwrap(), 0x0101_0101);
        assert_eq!(dump.read_u32(Gpa::new(0x10_1ffc)).unwrap(), 0x0202_0202);
        assert!(dump.read_u32(Gpa::new(0x2bfd)).is_err());
        assert!(dump.read_u32(Gpa::new(0xf_fffe)).is_err());
    }

    #[test]
    fn zeroes_behind_the_last_record_are_no_record() {
        for more in [1, 31, 32, 4096, 3 << 20] {
            let mut file = sample();
            file.resize(file.len() + more, 0);
            let dump = open(&file).unwrap();
            assert_eq!(dump.layout().bytes(), 0x3c00);
            assert_eq!(dump.read_u32(Gpa::new(0x2bfc)).unwrap(), 0x0101_0101);
            *file.last_mut().unwrap() = 1;
            assert!(open(&file).is_err(), "{more}");
        }
        assert!(open(&[0; 4096]).is_err());
    }

    #[test]
    fn what_is_cut_off_is_read_as_far_as_it_goes() {
        let file = sample();
        let (first, second) = (0x2020, 0x2040);
        for len in 1..file.len() {
            let records = Records::read(Path::new(""), file[..len].into(), &None);
            assert_eq!(records.is_ok(), len > 0x20, "{len:#x}");
            let Ok(records) = records else { continue };
            // What ends with a whole record cannot be told from a smaller guest's dump.
            assert_eq!(records.need.is_none(), len == first, "{len:#x}");
            let need = match len {
                ..0x2020 => first,
                0x2020..0x2040 => second,
                _ => file.len(),
            };
            if let Some(Incomplete::CutOff { len: at, need: to }) = records.incomplete(len as u64) {
                assert_eq!((at, to), (len as u64, need as u64));
            }
            if len % 97 != 0 {
                continue;
            }
            let dump = open(&file[..len]).unwrap();
            let lost = |at: u64| dump.next_absent(Gpa::new(at)).unwrap();
            let (start, end, behind) = match len {
                ..0x2020 => (0x10_0000, 0x10_2000, len - 0x20),
                _ => (0x1000, 0x2c00, len.saturating_sub(second)),
            };
            let lost = lost(start);
            let want = (len != first).then(|| Gpa::new(start + behind as u64));
            match want.filter(|_| !(first..=second).contains(&len)) {
                Some(want) => {
                    assert_eq!(lost, Some(GpaRange::new(want, Gpa::new(end))), "{len:#x}");
                    let last = Gpa::new(want.raw() - 4);
                    dump.read_u32(last).unwrap();
                    let beyond = dump.read_u32(Gpa::new(want.raw() - 3));
                    assert!(matches!(beyond, Err(MemoryError::Absent { .. })));
                }
                None => assert_eq!(dump.next_absent(Gpa::new(0x10_0000)).unwrap(), None),
            }
        }
        // A short file does not claim whatever it likes.
        let mut file = sample();
        file[16..24].copy_from_slice(&(1_u64 << 40).to_le_bytes());
        assert!(matches!(open(&file), Err(DumpError::Malformed { .. })));
    }

    #[test]
    fn refuses_what_is_wrong() {
        let file = sample();
        let cases: [(usize, u8); 5] = [(0, 0), (4, 2), (15, 0xff), (16, 0), (23, 0xff)];
        for (at, byte) in cases {
            let mut file = file.clone();
            file[at] = byte;
            if at == 16 {
                file[17] = 0;
                file[18] = 0;
            }
            assert!(open(&file).is_err(), "{at}");
        }
        let mut twice = file.clone();
        record(&mut twice, 0x10_1000, &[3; 0x10]);
        assert!(matches!(open(&twice), Err(DumpError::Layout { .. })));
        let nothing = Records::read(Path::new(""), (&[][..]).into(), &None).unwrap();
        assert!(nothing.extents.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Records of any length at any distance, in any order: every byte is where it was.
        #[test]
        fn what_is_recorded_is_read(
            parts in proptest::collection::vec((0_u64..0x3000, 1_usize..0x2800, any::<u8>()), 1..8),
            turn in 0_usize..8,
        ) {
            let mut at = 0;
            let mut records = Vec::new();
            for (gap, len, seed) in parts {
                at += gap;
                let data: Vec<u8> = (0..len).map(|n| seed.wrapping_add((n % 251).to_le_bytes()[0])).collect();
                records.push((at, data));
                at += len as u64;
            }
            let mut file = Vec::new();
            let turn = turn % records.len();
            let (first, last) = records.split_at(turn);
            for (start, data) in last.iter().chain(first) {
                record(&mut file, *start, data);
            }
            let dump = open(&file).unwrap();
            let total: u64 = records.iter().map(|(_, data)| data.len() as u64).sum();
            prop_assert_eq!(dump.layout().bytes(), total);
            for (start, data) in &records {
                let mut there = vec![0; data.len()];
                dump.read(Gpa::new(*start), &mut there).unwrap();
                prop_assert!(there == *data);
            }
        }
    }
}
