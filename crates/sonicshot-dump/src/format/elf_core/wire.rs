//! The structures of an ELF core (System V ABI, ELF-64 object file format).
//!
//! Headers are read by hand, not by a library, since QEMU 10 writes an `e_ehsize` of 8 and its
//! section headers before the program headers.

use crate::DumpError;
use crate::format::elf_core::mark::Sums;
use sonicshot::{Architecture, Bytes, FileBytes, FileOffset, FileRange, Gpa, GpaRange, to_u64};
use std::path::Path;

pub(crate) const HEADER_LEN: usize = 64;
pub(crate) const SEGMENT_LEN: usize = 56;
/// `e_phnum` of a file whose number of segments is in `sh_info` of section 0.
const PN_XNUM: u16 = 0xffff;
pub(super) const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
pub(crate) const PT_LOAD: u32 = 1;
pub(crate) const PT_NOTE: u32 = 4;
/// No dump has a million ranges of RAM.
const MAX_SEGMENTS: u32 = 1 << 20;
/// There are a few notes for each processor. What comes after so many is not looked at.
const MAX_NOTES: u32 = 1 << 16;
/// The kernel gives VMCOREINFO one page, of 64 KiB at most.
const MAX_VMCOREINFO: u32 = 1 << 16;
/// Notes that are carried along: a few hundred bytes for each processor.
const MAX_KEPT_NOTES: u32 = 16 << 20;

/// The offsets of the header's fields that are read.
const CLASS: FileOffset = FileOffset::new(4);
const TYPE: FileOffset = FileOffset::new(16);
const MACHINE: FileOffset = FileOffset::new(18);
const SEGMENTS: FileOffset = FileOffset::new(32);
const SECTIONS: FileOffset = FileOffset::new(40);
const SEGMENT_SIZE: FileOffset = FileOffset::new(54);
pub(super) const SEGMENT_COUNT: FileOffset = FileOffset::new(56);

/// The processor of that `e_machine`.
pub(crate) fn machine(path: &Path, number: u16) -> Result<Architecture, DumpError> {
    match number {
        EM_X86_64 => Ok(Architecture::X86_64),
        EM_AARCH64 => Ok(Architecture::Aarch64),
        other => {
            let what = "a machine that is neither x86-64 nor arm64";
            Err(DumpError::malformed(path, what, MACHINE, other.into()))
        }
    }
}

/// The most program headers that `e_phnum` counts by itself.
const MAX_COUNTED: usize = PN_XNUM as usize - 1;
const SECTION_LEN: usize = 64;

/// The end of a core's header, its `count` program headers and what counts them; `None` if no
/// core has so many.
pub(crate) fn headers_end(count: usize) -> Option<FileOffset> {
    if u32::try_from(count).is_ok_and(|count| count > MAX_SEGMENTS) {
        return None;
    }
    let section = if count > MAX_COUNTED { SECTION_LEN } else { 0 };
    let segments = SEGMENT_LEN.checked_mul(count)?;
    let len = segments.checked_add(HEADER_LEN)?.checked_add(section)?;
    u64::try_from(len).ok().map(FileOffset::new)
}

/// The header of a core with `segments`, whose headers follow; behind those, if they are more than
/// 16 bits count, the section that does. They end where [`headers_end`] says;
/// `None` if no core has so many.
pub(crate) fn headers(machine: Architecture, segments: &[Segment]) -> Option<Vec<u8>> {
    headers_end(segments.len())?;
    let count = u32::try_from(segments.len()).ok()?;
    let extended = segments.len() > MAX_COUNTED;
    let counted = if extended {
        PN_XNUM
    } else {
        u16::try_from(count).ok()?
    };
    let sections_at = if extended {
        let at = SEGMENT_LEN.checked_mul(segments.len())?;
        u64::try_from(at.checked_add(HEADER_LEN)?).ok()?
    } else {
        0
    };
    let mut head = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    head.resize(16, 0);
    head.extend(4_u16.to_le_bytes()); // ET_CORE
    head.extend(machine.elf_machine().to_le_bytes());
    head.extend(1_u32.to_le_bytes()); // EV_CURRENT
    head.extend(0_u64.to_le_bytes()); // e_entry
    head.extend(to_u64(HEADER_LEN).to_le_bytes()); // e_phoff
    head.extend(sections_at.to_le_bytes()); // e_shoff
    head.extend(0_u32.to_le_bytes()); // e_flags
    let (section_len, sections) = if extended { (64_u16, 1_u16) } else { (0, 0) };
    for word in [64_u16, 56, counted, section_len, sections, 0] {
        head.extend(word.to_le_bytes());
    }
    for segment in segments {
        head.extend(segment.to_bytes());
    }
    if extended {
        // A section of type SHT_NULL, all zero but for `sh_info`.
        let mut section = [0; SECTION_LEN];
        section
            .get_mut(44..48)?
            .copy_from_slice(&count.to_le_bytes());
        head.extend(section);
    }
    Some(head)
}

/// One program header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub kind: u32,
    pub flags: u32,
    pub offset: FileOffset,
    pub vaddr: u64,
    pub paddr: u64,
    pub file_len: u64,
    pub mem_len: u64,
    pub align: u64,
}

/// The class of 64 bits, and the data little-endian, as they follow the magic.
const ELF_64_LITTLE: u16 = 0x0102;

/// The content of an ELF core's headers.
#[derive(Debug, Clone)]
pub(crate) struct ElfCore {
    pub machine: Architecture,
    pub segments: Vec<Segment>,
    /// The VMCOREINFO text.
    pub vmcoreinfo: Option<Vec<u8>>,
    /// The sums of the segments of memory by their headers.
    pub(super) sums: Option<Sums>,
    /// The end of the last segment's data, if that is beyond the end of the file. The part that
    /// there is of each is in `segments`.
    pub(super) cut_before: Option<FileOffset>,
    /// The memory whose bytes would be beyond the end of the file.
    pub(super) lost: Vec<GpaRange>,
}

/// A copy of the `len` bytes at `at`. All is read as [`FileBytes`], for somebody may be writing the
/// file.
fn copy_of(data: FileBytes<'_>, at: FileOffset, len: u32) -> Option<Vec<u8>> {
    data.part(at.raw(), len.into())?.copied()
}

impl Segment {
    fn read(data: FileBytes<'_>, at: FileOffset) -> Option<Self> {
        let data = data.part(at.raw(), to_u64(SEGMENT_LEN))?;
        let field = |offset: u64| data.le_at::<u64>(offset);
        Some(Self {
            kind: data.le_at(0)?,
            flags: data.le_at(4)?,
            offset: FileOffset::new(field(8)?),
            vaddr: field(16)?,
            paddr: field(24)?,
            file_len: field(32)?,
            mem_len: field(40)?,
            align: field(48)?,
        })
    }

    /// Reads program header `number` of the table at `table`, whose data must be in the file.
    fn of_table(
        path: &Path,
        data: FileBytes<'_>,
        table: FileOffset,
        number: u64,
    ) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let at = number
            .checked_mul(to_u64(SEGMENT_LEN))
            .and_then(|offset| table.checked_add(offset));
        let (at, segment) = at
            .and_then(|at| Some((at, Self::read(data, at)?)))
            .ok_or_else(|| bad("a program header beyond the end", table, number))?;
        if segment.file_len > 0 && segment.data().is_none() {
            return Err(bad("a segment beyond 64 bits", at, number));
        }
        if segment.guest_len() > 0 && segment.file_len > segment.mem_len {
            return Err(bad(
                "a segment with more data than memory",
                at,
                segment.file_len,
            ));
        }
        Ok(segment)
    }

    pub(crate) fn to_bytes(self) -> [u8; SEGMENT_LEN] {
        let mut out = [0; SEGMENT_LEN];
        let kind = u64::from(self.kind) | u64::from(self.flags) << 32;
        let words = [
            kind,
            self.offset.raw(),
            self.vaddr,
            self.paddr,
            self.file_len,
            self.mem_len,
            self.align,
        ];
        for (part, word) in out.chunks_exact_mut(8).zip(words) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// The range of its data in the file; `None` if that is beyond 64 bits.
    pub(crate) fn data(&self) -> Option<FileRange> {
        FileRange::with_len(self.offset, self.file_len)
    }

    /// The number of bytes of guest RAM that the segment stands for.
    pub(super) fn guest_len(&self) -> u64 {
        // `/proc/kcore` marks memory that is not RAM with an address of all ones.
        if self.kind == PT_LOAD && self.paddr != u64::MAX {
            self.mem_len
        } else {
            0
        }
    }

    /// The guest RAM that the segment holds, if it does.
    pub(crate) fn guest(&self) -> Option<GpaRange> {
        let range = GpaRange::with_len(Gpa::new(self.paddr), self.guest_len())?;
        (!range.is_empty()).then_some(range)
    }

    /// The part of that RAM that the file has data for: empty if it has none.
    pub(crate) fn filled(&self) -> Option<GpaRange> {
        self.guest()?;
        GpaRange::with_len(Gpa::new(self.paddr), self.file_len)
    }
}

impl ElfCore {
    pub(crate) fn parse(path: &Path, data: FileBytes<'_>) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let len = to_u64(data.len());
        let short = || bad("a file too short for an ELF header", FileOffset::ZERO, len);
        if data.le_at::<u16>(CLASS.raw()).ok_or_else(short)? != ELF_64_LITTLE {
            return Err(DumpError::Unsupported {
                path: path.to_owned(),
                kind: "an ELF file that is not 64-bit little-endian",
            });
        }
        let kind = data.le_at::<u16>(TYPE.raw()).ok_or_else(short)?;
        if kind != ET_CORE {
            return Err(DumpError::NotADump {
                path: path.to_owned(),
                why: "it is an ELF file, but no core (for symbols, give it with --symbols)",
            });
        }
        let machine = machine(path, data.le_at::<u16>(MACHINE.raw()).ok_or_else(short)?)?;
        let table = FileOffset::new(data.le_at(SEGMENTS.raw()).ok_or_else(short)?);
        let size = data.le_at::<u16>(SEGMENT_SIZE.raw()).ok_or_else(short)?;
        if usize::from(size) != SEGMENT_LEN {
            return Err(bad(
                "an unknown size of program headers",
                SEGMENT_SIZE,
                size.into(),
            ));
        }
        let count = data.le_at::<u16>(SEGMENT_COUNT.raw()).ok_or_else(short)?;
        let count = if count == PN_XNUM {
            let sections = data.le_at::<u64>(SECTIONS.raw()).ok_or_else(short)?;
            let at = sections.checked_add(44).filter(|_| sections != 0);
            at.and_then(|at| data.le_at::<u32>(at)).ok_or_else(|| {
                bad(
                    "more segments than e_phnum holds, but no section 0",
                    SECTIONS,
                    sections,
                )
            })?
        } else {
            count.into()
        };
        if count == 0 {
            return Err(bad("no program headers", SEGMENT_COUNT, 0));
        }
        if count > MAX_SEGMENTS {
            return Err(bad(
                "an invalid number of segments",
                SEGMENT_COUNT,
                count.into(),
            ));
        }
        let mut segments = Vec::new();
        let mut sums = Some(Sums::default());
        let mut lost = Vec::new();
        let (file_end, mut last_end) = (FileOffset::new(len), FileOffset::ZERO);
        for number in 0..u64::from(count) {
            let mut segment = Segment::of_table(path, data, table, number)?;
            if segment.kind == PT_LOAD {
                sums = sums.and_then(|sums| sums.with(segment.file_len, segment.mem_len));
            }
            if let Some(stored) = segment.data().filter(|data| !data.is_empty()) {
                last_end = last_end.max(stored.end());
                let there = stored.intersection(&FileRange::new(FileOffset::ZERO, file_end));
                let all = segment.filled();
                segment.file_len = there.len();
                let rest = all.zip(segment.filled());
                let rest = rest.map(|(all, there)| GpaRange::new(there.end(), all.end()));
                lost.extend(rest.filter(|rest| !rest.is_empty()));
            }
            segments.push(segment);
        }
        let vmcoreinfo = find_vmcoreinfo(data, &segments);
        Ok(Self {
            machine,
            segments,
            vmcoreinfo,
            sums,
            lost,
            cut_before: (last_end > file_end).then_some(last_end),
        })
    }

    /// The bytes of the first `PT_NOTE` segment, unless there are too many.
    pub(crate) fn notes(&self, data: FileBytes<'_>) -> Option<Vec<u8>> {
        let notes = self
            .segments
            .iter()
            .find(|segment| segment.kind == PT_NOTE)?;
        let len = u32::try_from(notes.file_len).ok()?;
        (len <= MAX_KEPT_NOTES)
            .then(|| copy_of(data, notes.offset, len))
            .flatten()
    }
}

/// Whether notes of so many bytes are carried along.
pub(super) fn may_be_notes(len: usize) -> bool {
    u32::try_from(len).is_ok_and(|len| len <= MAX_KEPT_NOTES)
}

/// The text of the note `VMCOREINFO` in any `PT_NOTE`.
fn find_vmcoreinfo(data: FileBytes<'_>, segments: &[Segment]) -> Option<Vec<u8>> {
    let mut left = MAX_NOTES;
    for notes in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let all = notes.data()?;
        let mut at = all.start();
        while at < all.end() {
            left = left.checked_sub(1)?;
            let Some(note) = Note::read(data, at) else {
                break;
            };
            if note.text.end() > all.end() {
                break;
            }
            let len = u32::try_from(note.text.len()).ok()?;
            if note.is_vmcoreinfo && len <= MAX_VMCOREINFO {
                return copy_of(data, note.text.start(), len);
            }
            at = note.next;
        }
    }
    None
}

/// One note: a name and a text, each padded to 4 bytes.
struct Note {
    is_vmcoreinfo: bool,
    text: FileRange,
    next: FileOffset,
}

impl Note {
    fn read(data: FileBytes<'_>, at: FileOffset) -> Option<Self> {
        let name_len = data.le_at(at.raw())?;
        let text_len: u32 = data.le_at(at.checked_add(4)?.raw())?;
        let name_at = at.checked_add(12)?;
        let padded = |len: u32| u64::from(len).checked_next_multiple_of(4);
        let text_at = name_at.checked_add(padded(name_len)?)?;
        // With the zero at its end.
        let is_vmcoreinfo = name_len == 11
            && copy_of(data, name_at, name_len).is_some_and(|name| name == *b"VMCOREINFO\0");
        Some(Self {
            is_vmcoreinfo,
            text: FileRange::with_len(text_at, text_len.into())?,
            next: text_at.checked_add(padded(text_len)?)?,
        })
    }
}
