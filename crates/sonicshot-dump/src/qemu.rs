//! What QEMU's migration files have in common: how they begin, and their RAM blocks
//! (`migration/savevm.c`, `migration/ram.c`).
//!
//! Numbers are big-endian. A file begins with `QEVM`, version 3, a configuration section with the
//! machine's name, and the first part of the section `ram`, which lists all blocks of memory:
//! the guest's RAM, and the ROMs and video memory that go with it.

use crate::{DumpError, LayoutSpec};
use sonicshot::{GpaRange, GuestBytes};
use std::path::Path;

const MAGIC: &[u8; 4] = b"QEVM";
const VERSION: u32 = 3;
const SECTION_START: u8 = 1;
const SUBSECTION: u8 = 5;
const CONFIGURATION: u8 = 7;
const RAM_VERSION: u32 = 4;
/// The flag that comes with the total of all blocks.
pub(crate) const FLAG_MEM_SIZE: u64 = 0x04;
/// Ends a part of the section.
pub(crate) const FLAG_EOS: u64 = 0x10;
/// QEMU's pages, whatever the guest's are.
pub(crate) const TARGET_PAGE: u64 = 4096;
/// No machine has more memory blocks.
pub(crate) const MAX_BLOCKS: usize = 4096;
/// Names and small tables are shorter than this.
const MAX_NAME: u32 = 4096;
const MAX_CAPABILITIES: u32 = 256;

/// Reads one field after the other.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    path: &'a Path,
    data: GuestBytes<'a>,
    pub at: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(path: &'a Path, data: GuestBytes<'a>, at: u64) -> Self {
        Self { path, data, at }
    }

    pub(crate) fn malformed(&self, what: &'static str, value: u64) -> DumpError {
        DumpError::malformed(self.path, what, self.at, value)
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], DumpError> {
        let mut out = [0; N];
        self.copy(&mut out)?;
        Ok(out)
    }

    fn copy(&mut self, out: &mut [u8]) -> Result<(), DumpError> {
        let start = usize::try_from(self.at).unwrap_or(usize::MAX);
        self.data
            .get(start, out.len())
            .filter(|bytes| bytes.copy_to(out))
            .ok_or_else(|| self.malformed("the end of the file inside a field", 0))?;
        self.at = self.at.saturating_add(out.len() as u64);
        Ok(())
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DumpError> {
        Ok(u8::from_be_bytes(self.bytes()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DumpError> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DumpError> {
        Ok(u64::from_be_bytes(self.bytes()?))
    }

    fn text(&mut self, len: u32) -> Result<String, DumpError> {
        if len > MAX_NAME {
            return Err(self.malformed("the length of a name", len.into()));
        }
        let mut name = vec![0; len as usize];
        self.copy(&mut name)?;
        String::from_utf8(name).map_err(|_| self.malformed("a name that is no text", len.into()))
    }

    /// A name behind its length in one byte.
    pub(crate) fn name(&mut self) -> Result<String, DumpError> {
        let len = self.u8()?;
        self.text(len.into())
    }

    /// Passes over bytes that are there.
    pub(crate) fn skip(&mut self, len: u64) -> Result<(), DumpError> {
        let end = self.at.checked_add(len);
        match end.filter(|end| *end <= self.data.len() as u64) {
            Some(end) => {
                self.at = end;
                Ok(())
            }
            None => Err(self.malformed("the end of the file inside a page", len)),
        }
    }

    /// The number of a section, which must be this.
    pub(crate) fn section(&mut self, wanted: u32) -> Result<(), DumpError> {
        let found = self.u32()?;
        if found == wanted {
            return Ok(());
        }
        Err(self.malformed("the number of a section", found.into()))
    }

    pub(crate) fn peek(&self) -> Option<u8> {
        self.data.u8_at(usize::try_from(self.at).ok()?)
    }
}

/// What a migration file says before its memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Start {
    pub machine: Option<String>,
    pub capabilities: Vec<String>,
    /// The number of the section `ram`.
    pub ram_section: u32,
    /// The length of all blocks, in bytes.
    pub total: u64,
}

impl Start {
    pub(crate) fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }

    /// Where a guest of this machine has its RAM.
    pub(crate) fn layout(&self) -> Option<LayoutSpec> {
        let machine = self.machine.as_deref()?;
        if machine.starts_with("pc-q35") {
            Some(LayoutSpec::Q35)
        } else if machine.starts_with("pc-i440fx") {
            Some(LayoutSpec::Pc)
        } else {
            None
        }
    }
}

/// Reads the file's start up to the first memory block of the section `ram`.
pub(crate) fn start(cursor: &mut Cursor<'_>) -> Result<Start, DumpError> {
    if &cursor.bytes::<4>()? != MAGIC {
        return Err(cursor.malformed("no QEVM", 0));
    }
    let version = cursor.u32()?;
    if version != VERSION {
        return Err(cursor.malformed("a migration version", version.into()));
    }
    let mut start = Start::default();
    if cursor.peek() == Some(CONFIGURATION) {
        cursor.u8()?;
        let len = cursor.u32()?;
        start.machine = Some(cursor.text(len)?);
        while cursor.peek() == Some(SUBSECTION) {
            cursor.u8()?;
            let name = cursor.name()?;
            cursor.u32()?; // its version
            match name.as_str() {
                "configuration/capabilities" => {
                    let count = cursor.u32()?;
                    if count > MAX_CAPABILITIES {
                        return Err(cursor.malformed("the number of capabilities", count.into()));
                    }
                    for _ in 0..count {
                        start.capabilities.push(cursor.name()?);
                    }
                }
                "configuration/target-page-bits" => {
                    let bits = cursor.u32()?;
                    if 1_u64.checked_shl(bits) != Some(TARGET_PAGE) {
                        return Err(cursor.malformed("the size of a page", bits.into()));
                    }
                }
                "configuration/uuid" => drop(cursor.bytes::<16>()?),
                _ => return Err(cursor.malformed("a part of the configuration, unknown", 0)),
            }
        }
    }
    let section = cursor.u8()?;
    start.ram_section = cursor.u32()?;
    let name = cursor.name()?;
    cursor.u32()?; // instance
    let version = cursor.u32()?;
    if section != SECTION_START || name != "ram" || version != RAM_VERSION {
        return Err(cursor.malformed("a first section that is not ram", section.into()));
    }
    let total = cursor.u64()?;
    if total & (TARGET_PAGE.saturating_sub(1)) != FLAG_MEM_SIZE {
        return Err(cursor.malformed("the size of all memory", total));
    }
    start.total = total & !(TARGET_PAGE.saturating_sub(1));
    Ok(start)
}

/// Whether a block of this name is no RAM of the guest, but a device's.
fn is_device(name: &str) -> bool {
    name.starts_with("/rom@")
        || name.ends_with(".rom")
        || name.ends_with(".bios")
        || name.contains("vga")
        || name.contains(".vram")
        || name.contains("flash")
        || name.contains(':')
}

/// Which of the blocks is the guest's RAM, by name and length: the longest that is no device's.
pub(crate) fn main_block<'b>(
    path: &Path,
    blocks: impl Iterator<Item = (usize, &'b str, u64)>,
) -> Result<usize, DumpError> {
    blocks
        .filter(|(_, name, _)| !is_device(name))
        .max_by(|a, b| a.2.cmp(&b.2).then(b.0.cmp(&a.0)))
        .map(|(number, ..)| number)
        .ok_or_else(|| DumpError::malformed(path, "no block of guest RAM", 0, 0))
}

/// Where the `len` bytes of the RAM block are in the guest.
pub(crate) fn ranges(
    path: &Path,
    start: &Start,
    layout: Option<&LayoutSpec>,
    len: u64,
) -> Result<Vec<GpaRange>, DumpError> {
    let Some(spec) = layout.cloned().or_else(|| start.layout()) else {
        return Err(DumpError::NoLayout {
            path: path.to_owned(),
            machine: start.machine.clone().unwrap_or_default(),
        });
    };
    let ranges = spec.ranges(len);
    let described = ranges
        .iter()
        .fold(0_u64, |sum, range| sum.saturating_add(range.len()));
    if described != len {
        return Err(DumpError::LayoutLength {
            path: path.to_owned(),
            layout: spec.to_string(),
            described,
            actual: len,
        });
    }
    Ok(ranges)
}

/// The stretches of guest RAM that `start..start + len` of the RAM block is.
pub(crate) fn place(
    ranges: &[GpaRange],
    start: u64,
    len: u64,
) -> impl Iterator<Item = (GpaRange, u64)> + '_ {
    let end = start.saturating_add(len);
    let mut base = 0_u64;
    ranges.iter().filter_map(move |range| {
        let first = base;
        base = base.saturating_add(range.len());
        let (from, to) = (start.max(first), end.min(base));
        if from >= to {
            return None;
        }
        let at = range.start().checked_add(from.saturating_sub(first))?;
        Some((GpaRange::with_len(at, to.saturating_sub(from))?, from))
    })
}
