//! The header: what a checkpoint is, and of which guest.

use super::info::{CheckpointInfo, Compression};
use super::layout::{
    ALIGN, MAGIC, MAX_ATTRIBUTE, MAX_CHUNK, MAX_HEADER, MAX_REGIONS, VERSION, checksum, narrow,
    pad, plus, size, too_large,
};
use crate::checkpoint::CheckpointError;
use crate::to_u64;
use crate::{
    Architecture, Bytes, Cursor, CutShort, FileOffset, Gpa, GpaRange, PageSize, RamLayout,
};

/// The length of the checksum at the end.
const SUM_LEN: u64 = 8;
/// The offset of the header's length.
const LENGTH_AT: u64 = 12;
/// The offset of the part that a reader must know.
const FEATURES_AT: u64 = 16;
/// The first 16 bytes tell what the file is, and how long its header.
pub(crate) const START_LEN: u64 = 16;

const ATTRIBUTE_RELEASE: u16 = 1;
const ATTRIBUTE_BUILD_ID: u16 = 2;
const ATTRIBUTE_VMM: u16 = 3;

/// The header of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub info: CheckpointInfo,
    pub codec: Codec,
    /// Bytes of page data in every chunk but the last.
    pub chunk_size: u32,
    /// Pages are on disks.
    pub on_disks: bool,
}

/// An incompatible feature: pages are on the guest's disks.
const ON_DISKS: u64 = 1;
/// A compatible feature: pages that the guest uses are left out.
const FOR_ANALYSIS: u64 = 1;

/// The compression of chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    None,
    Lz4,
    Zstd,
}

impl Codec {
    pub(crate) const fn of(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::Zstd { .. } => Self::Zstd,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    const fn numbered(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::None),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }
}

impl Header {
    /// The header's bytes, its padding and checksum included.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CheckpointError> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]); // the length, once it is known
        let incompatible = if self.on_disks { ON_DISKS } else { 0 };
        out.extend(incompatible.to_le_bytes());
        let compatible = if self.info.for_analysis {
            FOR_ANALYSIS
        } else {
            0
        };
        out.extend(compatible.to_le_bytes());
        let page_size: u32 = narrow(
            "a page of",
            self.info.page_size.bytes(),
            PageSize::SIZE_64K.bytes(),
        )?;
        out.extend(page_size.to_le_bytes());
        // ELF's EM_NONE where none is said.
        let machine = self.info.architecture.map_or(0, Architecture::elf_machine);
        out.extend(machine.to_le_bytes());
        out.extend([self.codec.number(), 0]);
        out.extend(self.chunk_size.to_le_bytes());
        self.encode_regions(&mut out)?;
        self.encode_attributes(&mut out)?;
        let len = to_u64(out.len())
            .checked_add(SUM_LEN)
            .and_then(|len| len.checked_next_multiple_of(ALIGN))
            .filter(|len| *len <= MAX_HEADER)
            .ok_or_else(|| too_large("bytes of header", to_u64(out.len()), MAX_HEADER))?;
        let length: u32 = narrow("bytes of header", len, MAX_HEADER)?;
        let (start, end) = (size(LENGTH_AT), size(FEATURES_AT));
        if let Some(field) = out.get_mut(start..end) {
            field.copy_from_slice(&length.to_le_bytes());
        }
        // Never below what is there: the sum was added before it was rounded up.
        let summed = len.checked_sub(SUM_LEN);
        let short = || too_large("bytes of header", SUM_LEN, len);
        out.resize(size(summed.ok_or_else(short)?), 0);
        let sum = checksum(&out);
        out.extend(sum.to_le_bytes());
        Ok(out)
    }

    fn encode_regions(&self, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let regions = self.info.layout.regions();
        let count = to_u64(regions.len());
        if count > MAX_REGIONS {
            return Err(too_large("RAM regions", count, MAX_REGIONS));
        }
        let count: u32 = narrow("RAM regions", count, MAX_REGIONS)?;
        out.extend(count.to_le_bytes());
        for region in regions {
            out.extend(region.start().raw().to_le_bytes());
            out.extend(region.end().raw().to_le_bytes());
        }
        Ok(())
    }

    fn encode_attributes(&self, out: &mut Vec<u8>) -> Result<(), CheckpointError> {
        let info = &self.info;
        for (kind, value) in [
            (
                ATTRIBUTE_RELEASE,
                info.kernel_release.as_ref().map(String::as_bytes),
            ),
            (ATTRIBUTE_BUILD_ID, info.build_id.as_deref()),
            (ATTRIBUTE_VMM, info.vmm.as_ref().map(String::as_bytes)),
        ] {
            let Some(value) = value else { continue };
            let len = to_u64(value.len());
            if len > MAX_ATTRIBUTE {
                return Err(too_large("bytes of an attribute", len, MAX_ATTRIBUTE));
            }
            let len: u32 = narrow("bytes of an attribute", len, MAX_ATTRIBUTE)?;
            out.extend(kind.to_le_bytes());
            out.extend([0; 2]);
            out.extend(len.to_le_bytes());
            out.extend(value);
            pad(out, 8);
        }
        out.extend([0; 8]); // no more attributes
        Ok(())
    }

    /// The length of the header that begins with `start`, the first 16 bytes or more of the file.
    pub(crate) fn length(start: &[u8], file_len: u64) -> Result<u64, CheckpointError> {
        let magic = start.get(..MAGIC.len()).unwrap_or(start);
        if magic != MAGIC {
            return Err(CheckpointError::NotACheckpoint {
                found: magic.to_vec(),
            });
        }
        let short = |_: CutShort| CheckpointError::Truncated {
            what: "the header",
            offset: FileOffset::ZERO,
            need: START_LEN,
            len: to_u64(start.len()),
        };
        let mut cursor = Cursor::at(start, to_u64(MAGIC.len()));
        let version: u32 = cursor.le().map_err(short)?;
        if version != VERSION {
            return Err(CheckpointError::Version {
                found: version,
                known: VERSION,
            });
        }
        let len = u64::from(cursor.le::<u32>().map_err(short)?);
        if len == 0 || len > MAX_HEADER || !len.is_multiple_of(ALIGN) {
            return Err(corrupt("the header's length", LENGTH_AT, len));
        }
        if len > file_len {
            return Err(CheckpointError::Truncated {
                what: "the header",
                offset: FileOffset::ZERO,
                need: len,
                len: file_len,
            });
        }
        Ok(len)
    }

    /// Reads a whole header, its length checked already.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let mut fields = Fields::checked(bytes)?;
        let incompatible: u64 = fields.next()?;
        if incompatible & !ON_DISKS != 0 {
            return Err(CheckpointError::Incompatible {
                flags: incompatible & !ON_DISKS,
            });
        }
        let compatible: u64 = fields.next()?;
        let at = fields.at();
        let raw = u64::from(fields.next::<u32>()?);
        let page_size = PageSize::new(raw).ok_or_else(|| corrupt("the page size", at, raw))?;
        let architecture = Architecture::from_elf_machine(fields.next()?);
        let at = fields.at();
        let [codec, _reserved] = fields.next::<u16>()?.to_le_bytes();
        let codec = Codec::numbered(codec).ok_or_else(|| corrupt("the codec", at, codec.into()))?;
        let at = fields.at();
        let chunk_size: u32 = fields.next()?;
        let chunk = u64::from(chunk_size);
        if chunk == 0 || chunk > MAX_CHUNK || chunk & page_size.offset_mask() != 0 {
            return Err(corrupt("the chunk size", at, chunk));
        }
        let mut info = CheckpointInfo::new(fields.regions()?, page_size);
        info.architecture = architecture;
        info.for_analysis = compatible & FOR_ANALYSIS != 0;
        while fields.attribute(&mut info)? {}
        Ok(Self {
            info,
            codec,
            chunk_size,
            on_disks: incompatible & ON_DISKS != 0,
        })
    }
}

/// The header stands at the beginning of the file: `at` in it is `at` in the file.
const fn corrupt(what: &'static str, at: u64, value: u64) -> CheckpointError {
    CheckpointError::Corrupt {
        what,
        offset: FileOffset::new(at),
        value,
    }
}

/// The fields of a header whose checksum is right, one after the other.
struct Fields<'a>(Cursor<&'a [u8]>);

impl<'a> Fields<'a> {
    fn checked(bytes: &'a [u8]) -> Result<Self, CheckpointError> {
        let short = || corrupt("the header's length", LENGTH_AT, to_u64(bytes.len()));
        let end = to_u64(bytes.len()).checked_sub(SUM_LEN).ok_or_else(short)?;
        let body = bytes.part(0, end).ok_or_else(short)?;
        let stored: u64 = bytes.le_at(end).ok_or_else(short)?;
        let computed = checksum(body);
        if stored != computed {
            return Err(CheckpointError::Checksum {
                what: "the header",
                offset: FileOffset::ZERO,
                stored: stored.into(),
                computed: computed.into(),
            });
        }
        Ok(Self(Cursor::at(body, FEATURES_AT)))
    }

    fn at(&self) -> u64 {
        self.0.position()
    }

    fn next<T: crate::Number>(&mut self) -> Result<T, CheckpointError> {
        self.0.le().map_err(|_| self.short())
    }

    fn short(&self) -> CheckpointError {
        match plus("bytes of header", self.0.bytes().byte_len(), SUM_LEN) {
            Ok(len) => corrupt("the header's length", LENGTH_AT, len),
            Err(error) => error,
        }
    }

    fn regions(&mut self) -> Result<RamLayout, CheckpointError> {
        let at = self.at();
        let count = u64::from(self.next::<u32>()?);
        if count == 0 || count > MAX_REGIONS {
            return Err(corrupt("the number of RAM regions", at, count));
        }
        let first_at = self.at();
        let mut regions: Vec<GpaRange> = Vec::new();
        for _ in 0..count {
            let at = self.at();
            let start: u64 = self.next()?;
            let end_at = self.at();
            let end: u64 = self.next()?;
            // Sorted, with holes between: what `RamLayout` gives back as it was.
            let touches = regions.last().is_some_and(|last| start <= last.end().raw());
            if start >= end || touches {
                return Err(corrupt("a RAM region's start", at, start));
            }
            // The last frame must have an end, so that no frame arithmetic can wrap.
            if end > (1 << 63) {
                return Err(corrupt("a RAM region's end", end_at, end));
            }
            regions.push(GpaRange::new(Gpa::new(start), Gpa::new(end)));
        }
        RamLayout::new(regions).map_err(|_| corrupt("a RAM region's start", first_at, count))
    }

    /// Takes the next attribute into `info`; `false` if there are no more.
    fn attribute(&mut self, info: &mut CheckpointInfo) -> Result<bool, CheckpointError> {
        let kind: u16 = self.next()?;
        let _reserved: u16 = self.next()?;
        let len_at = self.at();
        let len = u64::from(self.next::<u32>()?);
        if kind == 0 {
            return Ok(false);
        }
        let bad_length = || corrupt("an attribute's length", len_at, len);
        if len > MAX_ATTRIBUTE {
            return Err(bad_length());
        }
        let at = self.at();
        let value = self.0.take(len).map_err(|_| bad_length())?;
        let text = || {
            core::str::from_utf8(value)
                .map(|text| Some(text.to_owned()))
                .map_err(|error| corrupt("an attribute's text", at, to_u64(error.valid_up_to())))
        };
        match kind {
            ATTRIBUTE_RELEASE => info.kernel_release = text()?,
            ATTRIBUTE_BUILD_ID => info.build_id = Some(value.to_vec()),
            ATTRIBUTE_VMM => info.vmm = text()?,
            _ => {} // not needed to read the rest
        }
        let next = self
            .at()
            .checked_next_multiple_of(8)
            .ok_or_else(bad_length)?;
        self.0.seek(next);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        ALIGN, CheckpointInfo, Codec, Header, MAX_ATTRIBUTE, MAX_CHUNK, MAX_HEADER, MAX_REGIONS,
        START_LEN, checksum, size, to_u64,
    };
    use crate::{Gpa, GpaRange, PageSize, RamLayout};

    /// A header of so many regions, and a kernel's name of so many bytes.
    fn header(regions: u64, name: u64) -> Header {
        let range = |number: u64| GpaRange::with_len(Gpa::new(number << 20), 4096).unwrap();
        let layout = RamLayout::new((0..regions).map(range).collect()).unwrap();
        let mut info = CheckpointInfo::new(layout, PageSize::SIZE_4K);
        info.kernel_release = Some("a".repeat(size(name)));
        Header {
            info,
            codec: Codec::None,
            chunk_size: 4096,
            on_disks: false,
        }
    }

    /// Whether it is read with other bytes at a place.
    fn is_read_with(header: &Header, at: usize, bytes: &[u8]) -> bool {
        let mut out = header.encode().unwrap();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        let end = out.len() - 8;
        let sum = checksum(&out[..end]);
        out[end..].copy_from_slice(&sum.to_le_bytes());
        Header::decode(&out).is_ok()
    }

    #[test]
    fn what_a_header_claims_is_bounded() {
        for (regions, name, is_written) in [
            (MAX_REGIONS, MAX_ATTRIBUTE, true),
            (MAX_REGIONS + 1, 1, false),
            (1, MAX_ATTRIBUTE + 1, false),
        ] {
            let header = header(regions, name);
            let written = header.encode();
            assert_eq!(written.is_ok(), is_written, "{regions}, {name}");
            if let Ok(bytes) = written {
                assert_eq!(Header::decode(&bytes).unwrap(), header);
            }
        }
        // What no writer of ours writes: the fields, and where they stand (`FORMAT.md`).
        let whole = header(2, MAX_ATTRIBUTE);
        let attribute = 48 + 2 * 16;
        for (at, value, is_read) in [
            (40, MAX_CHUNK, true),
            (40, MAX_CHUNK + 4096, false),
            (attribute + 4, MAX_ATTRIBUTE, true),
            (attribute + 4, MAX_ATTRIBUTE + 8, false),
        ] {
            let field = u32::try_from(value).unwrap().to_le_bytes();
            assert_eq!(is_read_with(&whole, at, &field), is_read, "{at}, {value}");
        }
        let many = header(MAX_REGIONS + 1, 1);
        let mut bytes = header(MAX_REGIONS, 1).encode().unwrap();
        bytes.truncate(48);
        for region in many.info.layout.regions() {
            bytes.extend(region.start().raw().to_le_bytes());
            bytes.extend(region.end().raw().to_le_bytes());
        }
        bytes.extend([0; 8]);
        for (count, is_read) in [(MAX_REGIONS, true), (MAX_REGIONS + 1, false)] {
            bytes[44..48].copy_from_slice(&u32::try_from(count).unwrap().to_le_bytes());
            let mut bytes = bytes.clone();
            let at = 48 + 16 * size(count);
            bytes.truncate(at);
            bytes.extend([0; 8]);
            bytes.extend(checksum(&bytes).to_le_bytes());
            assert_eq!(Header::decode(&bytes).is_ok(), is_read, "{count}");
        }
        for (len, is_read) in [(MAX_HEADER, true), (MAX_HEADER + ALIGN, false)] {
            let mut start = whole.encode().unwrap();
            start.truncate(size(START_LEN));
            start[12..].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
            let found = Header::length(&start, to_u64(usize::MAX));
            assert_eq!(found.is_ok(), is_read, "{len}");
        }
    }
}
