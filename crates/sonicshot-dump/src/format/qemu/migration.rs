//! From one of QEMU's two kinds of migration files to the other: a classic stream, and a mapped-ram
//! file. Both hold the same: all blocks of memory, and then the devices' state, which stays as it
//! is byte for byte.

use crate::DumpError;
use crate::backing::plain::PlainDump;
use crate::format::ability::Migration;
use crate::format::qemu::content::Content;
use crate::format::qemu::start::{
    BlockKind, CAPABILITIES, FLAG_CONTINUE, FLAG_EOS, FLAG_MEM_SIZE, FLAG_PAGE, FLAG_ZERO,
    MAPPED_RAM, MAPPED_RAM_VERSION, Start, TARGET_PAGE, TARGET_PAGE_LEN,
};
use crate::format::qemu::wire::{SECTION_END, SUBSECTION};
use crate::output::Output;
use crate::prune::copy::{COPY, Copier};
use crate::prune::stream::append;
use sonicshot::Progress;
use sonicshot::{FileOffset, FileRange, to_u64};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The pages of a block begin at a multiple of this, for direct I/O.
const PAGES_ALIGN: u64 = 1 << 20;
const FOOTER: u8 = 0x7e;
/// The header of a block in a mapped-ram file.
const HEADER_LEN: u64 = 28;
/// The header of the section `ram`: kind, number, name, instance, version.
const RAM_HEADER: u64 = 17;

/// The kind of file that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    MappedRam,
    Stream,
}

/// Writes what `from` holds as the other kind, or the same again.
pub(crate) fn write(
    from: &dyn Migration,
    kind: Kind,
    output: &Output,
    progress: &dyn Progress,
) -> Result<(), DumpError> {
    let content = from.content()?;
    let mut writer = Writer::new(from.source(), output, progress);
    match kind {
        Kind::MappedRam => write_mapped(&content, &mut writer),
        Kind::Stream => write_stream(&content, &mut writer),
    }
}

/// Writes one piece after the other.
struct Writer<'a> {
    dump: &'a PlainDump,
    output: &'a Output,
    copier: Copier<'a>,
    /// The bytes that are not yet written, and the place where they go.
    pending: Vec<u8>,
    at: FileOffset,
}

impl<'a> Writer<'a> {
    fn new(dump: &'a PlainDump, output: &'a Output, progress: &'a dyn Progress) -> Self {
        Self {
            dump,
            output,
            copier: Copier::new(dump, output, dump.file_len(), progress),
            pending: Vec::new(),
            at: FileOffset::ZERO,
        }
    }

    fn file(&self) -> &File {
        self.output.file()
    }

    /// A refusal of what cannot be written.
    fn impossible(&self, what: &'static str, value: u64) -> DumpError {
        DumpError::malformed(self.dump.path(), what, self.at, value)
    }

    /// The offset of the next byte.
    fn position(&self) -> Result<FileOffset, DumpError> {
        let pending = to_u64(self.pending.len());
        let position = self.at.checked_add(pending);
        position.ok_or_else(|| self.impossible("a range beyond 64 bits", pending))
    }

    fn flush(&mut self) -> Result<(), DumpError> {
        let writing = DumpError::io("writing", self.output.path());
        let next = self.position()?;
        self.file()
            .write_all_at(&self.pending, self.at.raw())
            .map_err(writing)?;
        self.at = next;
        self.pending.clear();
        Ok(())
    }

    /// The next byte goes to `at`; what lies between is a hole.
    fn seek(&mut self, at: FileOffset) -> Result<(), DumpError> {
        self.flush()?;
        self.at = at;
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), DumpError> {
        self.pending.extend(bytes);
        if self.pending.len() >= COPY {
            self.flush()?;
        }
        Ok(())
    }

    fn word(&mut self, word: u64) -> Result<(), DumpError> {
        self.bytes(&word.to_be_bytes())
    }

    fn name(&mut self, name: &str) -> Result<(), DumpError> {
        let len = u8::try_from(name.len())
            .map_err(|_| self.impossible("the length of a name", to_u64(name.len())))?;
        self.bytes(&[len])?;
        self.bytes(name.as_bytes())
    }

    /// The range of the input from `from` to `to`.
    fn between(&self, from: FileOffset, to: FileOffset) -> Result<FileRange, DumpError> {
        let what = "a range that ends before it begins";
        FileRange::between(from, to).ok_or_else(|| self.impossible(what, to.raw()))
    }

    /// The range of `len` bytes from `from` on.
    fn range_at(&self, from: FileOffset, len: u64) -> Result<FileRange, DumpError> {
        let what = "a range beyond 64 bits";
        FileRange::with_len(from, len).ok_or_else(|| self.impossible(what, from.raw()))
    }

    /// A page or other small range of the input.
    fn small(&mut self, range: FileRange) -> Result<(), DumpError> {
        append(self.dump, range, &mut self.pending)?;
        self.bytes(&[])
    }

    /// A range of the input of any length.
    fn long(&mut self, range: FileRange) -> Result<(), DumpError> {
        self.flush()?;
        self.copier.copy(range, self.at)?;
        let end = self.at.checked_add(range.len());
        self.at = end.ok_or_else(|| self.impossible("a range beyond 64 bits", range.len()))?;
        Ok(())
    }

    fn footer(&mut self, start: &Start) -> Result<(), DumpError> {
        self.word(FLAG_EOS)?;
        self.bytes(&[FOOTER])?;
        self.bytes(&start.ram_section.to_be_bytes())
    }

    /// All of the input from `from` on, and the end of the file.
    fn rest(&mut self, from: FileOffset) -> Result<(), DumpError> {
        let rest = self.between(from, self.dump.file_range().end())?;
        self.long(rest)?;
        let writing = DumpError::io("writing", self.output.path());
        self.file().set_len(self.at.raw()).map_err(writing)
    }

    /// Writes what stands before the section `ram`, with or without the capability of mapped-ram.
    fn head(&mut self, start: &Start, begin: FileOffset, mapped: bool) -> Result<(), DumpError> {
        let configuration = start.configuration_at.unwrap_or(start.ram_at);
        self.small(self.between(begin, configuration)?)?;
        let mut capabilities: Vec<&str> = start.capabilities.iter().map(String::as_str).collect();
        capabilities.retain(|name| *name != MAPPED_RAM);
        if mapped {
            capabilities.push(MAPPED_RAM);
        }
        if !capabilities.is_empty() {
            self.bytes(&[SUBSECTION])?;
            self.name(CAPABILITIES)?;
            self.bytes(&1_u32.to_be_bytes())?;
            let count = u32::try_from(capabilities.len()).map_err(|_| {
                self.impossible("the number of capabilities", to_u64(capabilities.len()))
            })?;
            self.bytes(&count.to_be_bytes())?;
            for name in capabilities {
                self.name(name)?;
            }
        }
        // Without a list of them it would be at the end.
        let (before, after) = match start.capabilities_at {
            Some(list) => (list.start(), list.end()),
            None => (start.ram_at, start.ram_at),
        };
        self.small(self.between(configuration, before)?)?;
        self.small(self.between(after, start.ram_at)?)?;
        self.small(self.range_at(start.ram_at, RAM_HEADER)?)?;
        self.word(start.total | FLAG_MEM_SIZE)
    }
}

fn write_mapped(content: &Content<'_>, out: &mut Writer<'_>) -> Result<(), DumpError> {
    let start = content.start;
    out.head(start, content.begin, true)?;
    for (block, places) in content.blocks.iter().zip(&content.places) {
        out.name(&block.name)?;
        out.word(block.len)?;
        let bitmap = places.bitmap();
        let bitmap_at = out.position()?.checked_add(HEADER_LEN);
        let pages_at = bitmap_at
            .and_then(|at| at.checked_add(to_u64(bitmap.len())))
            .and_then(|end| end.checked_align_up(PAGES_ALIGN));
        let places_of_block = bitmap_at.zip(pages_at);
        let (bitmap_at, pages_at) = places_of_block
            .ok_or_else(|| out.impossible("the length of a memory block", block.len))?;
        out.bytes(&MAPPED_RAM_VERSION.to_be_bytes())?;
        for field in [TARGET_PAGE, bitmap_at.raw(), pages_at.raw()] {
            out.word(field)?;
        }
        out.bytes(&bitmap)?;
        let mut at = pages_at;
        for place in places.iter() {
            if let Some(place) = place {
                if out.position()? != at {
                    out.seek(at)?;
                }
                out.small(out.range_at(place, TARGET_PAGE)?)?;
            }
            at = at
                .checked_add(TARGET_PAGE)
                .ok_or_else(|| out.impossible("the length of a memory block", block.len))?;
        }
        out.seek(at)?;
    }
    out.footer(start)?;
    out.long(content.between)?;
    out.bytes(&[SECTION_END])?;
    out.bytes(&start.ram_section.to_be_bytes())?;
    out.footer(start)?;
    out.rest(content.end)
}

fn write_stream(content: &Content<'_>, out: &mut Writer<'_>) -> Result<(), DumpError> {
    let start = content.start;
    out.head(start, content.begin, false)?;
    for block in content.blocks {
        out.name(&block.name)?;
        out.word(block.len)?;
    }
    out.footer(start)?;
    out.long(content.between)?;
    out.bytes(&[SECTION_END])?;
    out.bytes(&start.ram_section.to_be_bytes())?;
    for (block, places) in content.blocks.iter().zip(&content.places) {
        let mut again = 0;
        let addresses = (0_u64..).step_by(TARGET_PAGE_LEN);
        for (address, place) in addresses.zip(places.iter()) {
            // Like QEMU, nothing of what is not plugged in.
            if place.is_none() && block.kind == BlockKind::VirtioMem {
                continue;
            }
            let kind = if place.is_some() {
                FLAG_PAGE
            } else {
                FLAG_ZERO
            };
            out.word(address | kind | again)?;
            if again == 0 {
                out.name(&block.name)?;
                again = FLAG_CONTINUE;
            }
            match place {
                None => out.bytes(&[0])?,
                Some(place) => out.small(out.range_at(place, TARGET_PAGE)?)?,
            }
        }
    }
    out.footer(start)?;
    out.rest(content.end)
}
