//! ELF core dumps: QEMU's `dump-guest-memory`, `/proc/vmcore`, and others with one `PT_LOAD`
//! for each stretch of RAM (System V ABI, ELF-64 object file format).
//!
//! Headers are read by hand, not by a library, since QEMU 10 writes an `e_ehsize` of 8 and its
//! section headers before the program headers.

use crate::DumpError;
use crate::mapped::Extent;
use sonicshot::{Gpa, GpaRange};
use std::path::Path;

pub(crate) const HEADER_LEN: usize = 64;
pub(crate) const SEGMENT_LEN: usize = 56;
/// `e_phnum` of a file whose number of segments is in `sh_info` of section 0.
const PN_XNUM: u16 = 0xffff;
const ET_CORE: u16 = 4;
pub(crate) const EM_X86_64: u16 = 62;
pub(crate) const EM_AARCH64: u16 = 183;
pub(crate) const PT_LOAD: u32 = 1;
pub(crate) const PT_NOTE: u32 = 4;
/// No dump has a million stretches of RAM.
const MAX_SEGMENTS: u32 = 1 << 20;
/// `/proc/kcore` has a handful of segments that overlap.
const MAX_OVERLAPPING: usize = 1 << 12;

/// One program header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub kind: u32,
    pub flags: u32,
    pub offset: u64,
    pub vaddr: u64,
    pub paddr: u64,
    pub file_len: u64,
    pub mem_len: u64,
    pub align: u64,
}

/// What the headers of an ELF core say.
#[derive(Debug, Clone)]
pub(crate) struct ElfCore {
    pub machine: u16,
    pub segments: Vec<Segment>,
    /// The place of the VMCOREINFO text in the file.
    pub vmcoreinfo: Option<(u64, u64)>,
}

fn get<const N: usize>(data: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(data: &[u8], at: u64) -> Option<u16> {
    get(data, at).map(u16::from_le_bytes)
}

fn u32_at(data: &[u8], at: u64) -> Option<u32> {
    get(data, at).map(u32::from_le_bytes)
}

fn u64_at(data: &[u8], at: u64) -> Option<u64> {
    get(data, at).map(u64::from_le_bytes)
}

impl Segment {
    fn read(data: &[u8], at: u64) -> Option<Self> {
        let field = |offset: u64| u64_at(data, at.checked_add(offset)?);
        Some(Self {
            kind: u32_at(data, at)?,
            flags: u32_at(data, at.checked_add(4)?)?,
            offset: field(8)?,
            vaddr: field(16)?,
            paddr: field(24)?,
            file_len: field(32)?,
            mem_len: field(40)?,
            align: field(48)?,
        })
    }

    pub(crate) fn to_bytes(self) -> [u8; SEGMENT_LEN] {
        let mut out = [0; SEGMENT_LEN];
        let kind = u64::from(self.kind) | u64::from(self.flags) << 32;
        let words = [
            kind,
            self.offset,
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

    /// The guest RAM that the segment holds, if it does.
    pub(crate) fn guest(&self) -> Option<GpaRange> {
        // `/proc/kcore` marks memory that is not RAM with an address of all ones.
        if self.kind != PT_LOAD || self.mem_len == 0 || self.paddr == u64::MAX {
            return None;
        }
        GpaRange::with_len(Gpa::new(self.paddr), self.mem_len)
    }
}

impl ElfCore {
    pub(crate) fn parse(path: &Path, data: &[u8]) -> Result<Self, DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let len = data.len() as u64;
        let short = || bad("a file too short for an ELF header", 0, len);
        // Class 64-bit, data little-endian.
        if get::<2>(data, 4).ok_or_else(short)? != [2, 1] {
            return Err(DumpError::Unsupported {
                path: path.to_owned(),
                kind: "an ELF file that is not 64-bit little-endian",
            });
        }
        let kind = u16_at(data, 16).ok_or_else(short)?;
        if kind != ET_CORE {
            return Err(DumpError::NotADump {
                path: path.to_owned(),
                why: "it is an ELF file, but no core (for symbols, give it with --symbols)",
            });
        }
        let machine = u16_at(data, 18).ok_or_else(short)?;
        if machine != EM_X86_64 && machine != EM_AARCH64 {
            return Err(bad(
                "a machine that is neither x86-64 nor arm64",
                18,
                machine.into(),
            ));
        }
        let table = u64_at(data, 32).ok_or_else(short)?;
        let size = u16_at(data, 54).ok_or_else(short)?;
        if usize::from(size) != SEGMENT_LEN {
            return Err(bad("an unknown size of program headers", 54, size.into()));
        }
        let count = u16_at(data, 56).ok_or_else(short)?;
        let count = if count == PN_XNUM {
            let sections = u64_at(data, 40).ok_or_else(short)?;
            let at = sections.checked_add(44).filter(|_| sections != 0);
            at.and_then(|at| u32_at(data, at)).ok_or_else(|| {
                bad(
                    "more segments than e_phnum holds, but no section 0",
                    40,
                    sections,
                )
            })?
        } else {
            count.into()
        };
        if count == 0 || count > MAX_SEGMENTS {
            return Err(bad("an impossible number of segments", 56, count.into()));
        }
        let mut segments = Vec::new();
        for number in 0..u64::from(count) {
            let at = number
                .checked_mul(SEGMENT_LEN as u64)
                .and_then(|offset| table.checked_add(offset));
            let segment = at
                .and_then(|at| Segment::read(data, at))
                .ok_or_else(|| bad("a program header beyond the end", table, number))?;
            let at = at.unwrap_or(table);
            let end = segment.offset.checked_add(segment.file_len);
            if segment.file_len > 0 && end.is_none_or(|end| end > len) {
                return Err(bad(
                    "a segment beyond the end of the file: truncated",
                    at,
                    number,
                ));
            }
            if segment.kind == PT_LOAD && segment.file_len > segment.mem_len {
                return Err(bad(
                    "a segment with more data than memory",
                    at,
                    segment.file_len,
                ));
            }
            segments.push(segment);
        }
        let vmcoreinfo = find_vmcoreinfo(data, &segments);
        Ok(Self {
            machine,
            segments,
            vmcoreinfo,
        })
    }

    /// The guest's RAM: sorted, disjoint; where segments overlap, the first in the file counts.
    pub(crate) fn extents(&self, path: &Path) -> Result<Vec<Extent>, DumpError> {
        let mut loads = Vec::new();
        for (number, segment) in (0_u64..).zip(&self.segments) {
            if segment.kind == PT_LOAD && segment.mem_len > 0 && segment.paddr != u64::MAX {
                let guest = segment.guest().ok_or_else(|| {
                    DumpError::malformed(path, "a segment beyond 64 bits", segment.paddr, number)
                })?;
                loads.push((guest, segment));
            }
        }
        // Segments that overlap are rare, and each may cut every other into pieces.
        let mut order: Vec<_> = loads.iter().map(|(guest, _)| *guest).collect();
        order.sort_unstable();
        if order.is_sorted_by(|a, b| a.end() <= b.start()) {
            loads.sort_unstable_by_key(|(guest, _)| guest.start());
        } else if loads.len() > MAX_OVERLAPPING {
            let count = loads.len() as u64;
            return Err(DumpError::malformed(
                path,
                "too many overlapping segments",
                56,
                count,
            ));
        }
        let mut extents: Vec<Extent> = Vec::new();
        for (guest, segment) in loads {
            add_extent(&mut extents, guest, segment);
        }
        if extents.is_empty() {
            return Err(DumpError::NotADump {
                path: path.to_owned(),
                why: "an ELF core without any RAM",
            });
        }
        Ok(extents)
    }
}

/// Adds what of `guest` is not covered yet.
fn add_extent(extents: &mut Vec<Extent>, guest: GpaRange, segment: &Segment) {
    let mut gaps = Vec::new();
    let mut at = guest.start();
    let first = extents.partition_point(|extent| extent.guest.end() <= guest.start());
    for extent in extents.iter().skip(first) {
        if extent.guest.start() >= guest.end() {
            break;
        }
        gaps.push(GpaRange::new(at, extent.guest.start()));
        at = at.max(extent.guest.end());
    }
    gaps.push(GpaRange::new(at, guest.end()));
    let filled = GpaRange::with_len(guest.start(), segment.file_len).unwrap_or(guest);
    for gap in gaps {
        let data = gap.intersection(&filled);
        let rest = GpaRange::new(gap.start().max(filled.end()), gap.end());
        let inside = data.start().offset_from(guest.start()).unwrap_or(0);
        for (guest, offset) in [(data, segment.offset.checked_add(inside)), (rest, None)] {
            if !guest.is_empty() {
                let index = extents.partition_point(|e| e.guest.start() < guest.start());
                extents.insert(index, Extent { guest, offset });
            }
        }
    }
}

/// The text of the note `VMCOREINFO` in any `PT_NOTE`.
fn find_vmcoreinfo(data: &[u8], segments: &[Segment]) -> Option<(u64, u64)> {
    for notes in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let end = notes.offset.checked_add(notes.file_len)?;
        let mut at = notes.offset;
        // Each note has 12 bytes at least, so this ends.
        while at < end {
            let (Some(name_len), Some(desc_len)) = (
                u32_at(data, at),
                at.checked_add(4).and_then(|at| u32_at(data, at)),
            ) else {
                break;
            };
            let name_at = at.checked_add(12)?;
            let padded = |len: u32| u64::from(len).checked_next_multiple_of(4);
            let desc_at = name_at.checked_add(padded(name_len)?)?;
            let next = desc_at.checked_add(padded(desc_len)?)?;
            let desc_end = desc_at.checked_add(desc_len.into())?;
            if desc_end > end {
                break;
            }
            if name_len == 11 && get::<10>(data, name_at) == Some(*b"VMCOREINFO") {
                return Some((desc_at, desc_len.into()));
            }
            at = next;
        }
    }
    None
}
