//! The beginning of QEMU's migration files, and their RAM blocks (`migration/savevm.c`,
//! `migration/ram.c`).
//!
//! Numbers are big-endian. A file begins with `QEVM`, version 3, a configuration section with the
//! machine's name, and the first part of the section `ram`, which lists all blocks of memory:
//! the guest's RAM, and the ROMs and video memory that go with it.

use crate::format::qemu::others::Others;
use crate::format::qemu::wire::{
    Cursor, SECTION_COMMAND, SECTION_END, SECTION_FULL, SECTION_PART, SECTION_START, SUBSECTION,
};
use crate::{BlockPlace, DumpError, LayoutSpec};
use sonicshot::{FileBytes, FileOffset, FileRange, Gpa, GpaRange, to_u64};
use std::path::Path;

/// The subsection with the capabilities that both sides must have.
pub(crate) const CAPABILITIES: &str = "configuration/capabilities";
/// The first bytes of a migration file.
pub(crate) const MAGIC: &[u8; 4] = b"QEVM";
const VERSION: u32 = 3;
const CONFIGURATION: u8 = 7;
const RAM_VERSION: u32 = 4;
/// The flag that comes with the total of all blocks.
pub(crate) const FLAG_MEM_SIZE: u64 = 0x04;
/// Ends a part of the section.
pub(crate) const FLAG_EOS: u64 = 0x10;
pub(crate) const FLAG_ZERO: u64 = 0x02;
pub(crate) const FLAG_PAGE: u64 = 0x08;
pub(crate) const FLAG_CONTINUE: u64 = 0x20;
/// Nothing follows it: only of use to the channels of multifd.
pub(crate) const FLAG_MULTIFD_FLUSH: u64 = 0x200;
/// The version of the header of a block in a mapped-ram file.
pub(crate) const MAPPED_RAM_VERSION: u32 = 1;
/// The capability of a mapped-ram file.
pub(crate) const MAPPED_RAM: &str = "mapped-ram";
/// QEMU's pages, whatever the guest's are.
pub(crate) const TARGET_PAGE_LEN: usize = 4096;
pub(crate) const TARGET_PAGE: u64 = to_u64(TARGET_PAGE_LEN);
/// No machine has more memory blocks.
pub(crate) const MAX_BLOCKS: usize = 4096;
const MAX_CAPABILITIES: u32 = 256;
/// No machine has more virtio-mem devices.
const MAX_PLUGGED: usize = 256;
/// The state of a virtio-mem device that goes before the memory
/// (`hw/virtio/virtio-mem.c`, QEMU 8 and later); the device's own name stands before it.
const VIRTIO_MEM: &str = "/virtio-mem-device-early";

/// The content of a migration file before its memory.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub machine: Option<String>,
    pub capabilities: Vec<String>,
    /// The end of the machine's name, if there is one: the rest of the configuration follows.
    pub configuration_at: Option<FileOffset>,
    /// The range of the list of capabilities.
    pub capabilities_at: Option<FileRange>,
    /// The offset of the section `ram`.
    pub ram_at: FileOffset,
    /// The number of the section `ram`.
    pub ram_section: u32,
    /// The length of all blocks, in bytes.
    pub total: u64,
    /// The memory of virtio-mem devices.
    plugged: Vec<Plugged>,
    /// The sections that come in parts between those of the memory.
    pub others: Others,
}

/// The memory of a virtio-mem device.
#[derive(Debug, Clone)]
struct Plugged {
    /// The device's name, which the block of its memory begins with.
    device: String,
    range: GpaRange,
}

/// The kind of a block of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockKind {
    /// The guest's RAM: what it boots with, or what was plugged in as a DIMM. Also whatever has
    /// a name that is not known.
    Ram,
    /// The memory of a virtio-mem device, which says itself where it lies.
    VirtioMem,
    /// A ROM, video memory, or another device's, by its name.
    Device,
}

/// A block of memory in a migration file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamBlock {
    /// Its name, such as `pc.ram`, `ram-node0` or `pc.bios`.
    pub name: String,
    /// Its length in bytes.
    pub len: u64,
    /// Its kind.
    pub kind: BlockKind,
    /// Its ranges in the guest, end to end in the block. Empty: they are not known, and the
    /// block is kept as it is.
    pub ranges: Vec<GpaRange>,
}

impl Start {
    /// Nothing yet of a file whose next section begins at `ram_at`.
    pub(crate) const fn new(ram_at: FileOffset) -> Self {
        Self {
            machine: None,
            capabilities: Vec::new(),
            configuration_at: None,
            capabilities_at: None,
            ram_at,
            ram_section: 0,
            total: 0,
            plugged: Vec::new(),
            others: Others::new(),
        }
    }

    /// The knowledge of other sections, and nothing else.
    pub(crate) fn others_alone(&self) -> Self {
        Self {
            others: self.others.clone(),
            ..Self::new(self.ram_at)
        }
    }

    pub(crate) fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }
}

/// The RAM layout of a guest of the machine of this name.
pub(crate) fn layout_of(machine: &str) -> Option<LayoutSpec> {
    if machine.starts_with("pc-q35") {
        Some(LayoutSpec::Q35)
    } else if machine.starts_with("pc-i440fx") {
        Some(LayoutSpec::Pc)
    } else if machine == "microvm" {
        // Split at 3 GiB, too (`hw/i386/microvm.c`).
        Some(LayoutSpec::Firecracker)
    } else {
        None
    }
}

/// The RAM, in bytes, of the guest whose migration file begins with `data`, which messages call `path`;
/// `None` if it is no such beginning.
pub(crate) fn ram_of_migration(path: &Path, data: FileBytes<'_>) -> Option<u64> {
    let start = start(&mut Cursor::new(path, data, FileOffset::ZERO)).ok()?;
    Some(start.total)
}

/// Reads the file's start up to the first memory block of the section `ram`.
pub(crate) fn start(cursor: &mut Cursor<'_>) -> Result<Start, DumpError> {
    if &cursor.bytes::<4>()? != MAGIC {
        return Err(cursor.malformed("missing QEVM magic", 0));
    }
    let version = cursor.be::<u32>()?;
    if version != VERSION {
        return Err(cursor.malformed("unsupported version of a migration stream", version.into()));
    }
    let mut start = Start::new(cursor.at());
    if cursor.peek() == Some(CONFIGURATION) {
        cursor.be::<u8>()?;
        let len = cursor.be::<u32>()?;
        start.machine = Some(cursor.text(len)?);
        start.configuration_at = Some(cursor.at());
        while cursor.peek() == Some(SUBSECTION) {
            let begin = cursor.at();
            cursor.be::<u8>()?;
            let name = cursor.name()?;
            cursor.be::<u32>()?; // its version
            match name.as_str() {
                CAPABILITIES => {
                    let count = cursor.be::<u32>()?;
                    if count > MAX_CAPABILITIES {
                        return Err(
                            cursor.malformed("invalid number of capabilities", count.into())
                        );
                    }
                    for _ in 0..count {
                        start.capabilities.push(cursor.name()?);
                    }
                    start.capabilities_at = FileRange::between(begin, cursor.at());
                }
                "configuration/target-page-bits" => {
                    let bits = cursor.be::<u32>()?;
                    if 1_u64.checked_shl(bits) != Some(TARGET_PAGE) {
                        return Err(cursor.malformed("invalid size of a page", bits.into()));
                    }
                }
                "configuration/uuid" => drop(cursor.bytes::<16>()?),
                _ => return Err(cursor.malformed("a part of the configuration, unknown", 0)),
            }
        }
    }
    other_sections(cursor, &mut start)?;
    start.ram_at = cursor.at();
    let section = cursor.be::<u8>()?;
    start.ram_section = cursor.be::<u32>()?;
    let name = cursor.name()?;
    cursor.be::<u32>()?; // instance
    let version = cursor.be::<u32>()?;
    if section != SECTION_START || name != "ram" || version != RAM_VERSION {
        return Err(cursor.malformed("a first section that is not ram", section.into()));
    }
    let total = cursor.be::<u64>()?;
    if !start.others.begin_memory(start.ram_section) {
        let what = "a section with the number of another";
        return Err(cursor.malformed(what, start.ram_section.into()));
    }
    if total & IN_PAGE != FLAG_MEM_SIZE {
        return Err(cursor.malformed("invalid size of all memory", total));
    }
    start.total = total & !IN_PAGE;
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

/// Passes over what may stand before, between and behind the parts of the memory: commands, parts
/// of other sections, and the state of virtio-mem devices, which is noted.
pub(crate) fn other_sections(cursor: &mut Cursor<'_>, start: &mut Start) -> Result<(), DumpError> {
    loop {
        let mut ahead = cursor.clone();
        match ahead.peek() {
            Some(SECTION_COMMAND) => {
                ahead.be::<u8>()?;
                ahead.bytes::<2>()?;
                let len: u16 = ahead.be()?;
                ahead.skip(len.into())?;
            }
            Some(SECTION_FULL) => {
                ahead.be::<u8>()?;
                let number = ahead.be::<u32>()?;
                let name = ahead.name()?;
                ahead.bytes::<8>()?; // instance, version
                let Some(device) = name.strip_suffix(VIRTIO_MEM) else {
                    return Ok(());
                };
                if start.plugged.len() >= MAX_PLUGGED {
                    return Err(ahead.malformed("invalid number of virtio-mem devices", 0));
                }
                let range = virtio_mem(&mut ahead)?;
                start.plugged.push(Plugged {
                    device: device.to_owned(),
                    range,
                });
                ahead.footer(number)?;
            }
            Some(SECTION_START | SECTION_PART | SECTION_END) => {
                if !start.others.pass(&mut ahead)? {
                    return Ok(());
                }
            }
            _ => return Ok(()),
        }
        *cursor = ahead;
    }
}

/// Reads what a virtio-mem device says of its memory: where it is, and which of its pieces are
/// plugged in, which the memory's own records tell as well.
fn virtio_mem(cursor: &mut Cursor<'_>) -> Result<GpaRange, DumpError> {
    let address = cursor.be::<u64>()?;
    let len = cursor.be::<u64>()?;
    let piece = cursor.be::<u64>()?;
    cursor.be::<u32>()?; // node
    cursor.be::<u64>()?; // how much is plugged in
    let range = GpaRange::with_len(Gpa::new(address), len);
    let pieces = len.checked_div(piece).filter(|_| len % TARGET_PAGE == 0);
    let (Some(range), Some(pieces)) = (range, pieces) else {
        return Err(cursor.malformed("invalid memory of a virtio-mem device", len));
    };
    // A bit for each piece, in words.
    let words = pieces.div_ceil(64).checked_mul(8);
    let words =
        words.ok_or_else(|| cursor.malformed("invalid memory of a virtio-mem device", len))?;
    cursor.skip(words)?;
    Ok(range)
}

/// The blocks of these names and lengths, each with where it lies in the guest, if that is known.
///
/// Without a layout for each block by name, the longest one that is no device's is the RAM that
/// the machine boots with, laid out by `layout` or by the machine's name.
pub(crate) fn blocks(
    path: &Path,
    start: &Start,
    layout: Option<&LayoutSpec>,
    found: Vec<(String, u64)>,
) -> Result<Vec<RamBlock>, DumpError> {
    let mut blocks: Vec<RamBlock> = Vec::new();
    for (name, len) in found {
        let plugged = start.plugged.iter().find(|plugged| {
            let rest = name.strip_prefix(plugged.device.as_str());
            rest.is_some_and(|rest| rest.starts_with('/')) && plugged.range.len() == len
        });
        blocks.push(RamBlock {
            kind: match plugged {
                Some(_) => BlockKind::VirtioMem,
                None if is_device(&name) => BlockKind::Device,
                None => BlockKind::Ram,
            },
            ranges: plugged.iter().map(|plugged| plugged.range).collect(),
            name,
            len,
        });
    }
    if let Some(LayoutSpec::Blocks(places)) = layout {
        for block in &mut blocks {
            block.ranges.clear();
        }
        for place in places {
            place_named(path, place, &mut blocks)?;
        }
    } else {
        let main = blocks
            .iter_mut()
            .filter(|block| block.kind == BlockKind::Ram)
            // Of blocks of one length the first.
            .rev()
            .max_by_key(|block| block.len)
            .ok_or_else(|| DumpError::malformed(path, "no block of guest RAM", start.ram_at, 0))?;
        main.ranges = ranges(path, start, layout, main.len)?;
    }
    Ok(blocks)
}

/// Puts a block where the layout has it.
fn place_named(path: &Path, place: &BlockPlace, blocks: &mut [RamBlock]) -> Result<(), DumpError> {
    let wanted = |block: &RamBlock| block.name == place.name && block.ranges.is_empty();
    let found = blocks.iter().position(wanted);
    let Some(block) = found.and_then(|found| blocks.get_mut(found)) else {
        let known: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        return Err(DumpError::NoBlock {
            path: path.to_owned(),
            name: place.name.clone(),
            known: known.join(", "),
        });
    };
    let described = sum(&place.ranges);
    if described != block.len {
        return Err(DumpError::LayoutLength {
            path: path.to_owned(),
            layout: LayoutSpec::Blocks(vec![place.clone()]).to_string(),
            described,
            actual: block.len,
        });
    }
    block.ranges.clone_from(&place.ranges);
    Ok(())
}

/// The bits of a place in a page.
const IN_PAGE: u64 = TARGET_PAGE - 1;

fn sum(ranges: &[GpaRange]) -> u64 {
    GpaRange::total_of(ranges)
}

/// The ranges in the guest of the `len` bytes that the machine boots with.
fn ranges(
    path: &Path,
    start: &Start,
    layout: Option<&LayoutSpec>,
    len: u64,
) -> Result<Vec<GpaRange>, DumpError> {
    let Some(spec) = layout
        .cloned()
        .or_else(|| layout_of(start.machine.as_deref()?))
    else {
        return Err(DumpError::NoLayout {
            path: path.to_owned(),
            machine: start.machine.clone().unwrap_or_default(),
        });
    };
    let ranges = spec.ranges(len);
    let described = sum(&ranges);
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

/// The ranges of guest RAM that `start..start + len` of the RAM block is.
pub(crate) fn place(
    ranges: &[GpaRange],
    start: u64,
    len: u64,
) -> impl Iterator<Item = (GpaRange, u64)> + '_ {
    // What is beyond 64 bits is of no range.
    let end = start.checked_add(len);
    let mut base = 0_u64;
    ranges.iter().filter_map(move |range| {
        let first = base;
        base = base.checked_add(range.len())?;
        let (from, to) = (start.max(first), end?.min(base));
        if from >= to {
            return None;
        }
        let at = range.start().checked_add(from.checked_sub(first)?)?;
        Some((GpaRange::with_len(at, to.checked_sub(from)?)?, from))
    })
}
