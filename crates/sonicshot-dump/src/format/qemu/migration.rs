//! From one of QEMU's two kinds of migration files to the other: a classic stream, and a mapped-ram
//! file. Both hold the same: all blocks of memory, and then the devices' state, which stays as it
//! is byte for byte.

use crate::backing::mapped::MappedDump;
use crate::format::qemu::mapped_ram::{self, HEADER_VERSION, MappedRam, is_set};
use crate::format::qemu::stream::{
    FLAG_CONTINUE, FLAG_MULTIFD_FLUSH, FLAG_PAGE, FLAG_ZERO, SECTION_END, SECTION_PART, Stream,
};
use crate::format::qemu::{
    CAPABILITIES, Cursor, FLAG_EOS, FLAG_MEM_SIZE, SUBSECTION, Start, TARGET_PAGE,
};
use crate::output::{Output, Overwrite, Target};
use crate::prune::Progress;
use crate::prune::copy::{COPY, Copier};
use crate::{BlockKind, Dump, DumpError, Format, RamBlock};
use sonicshot::GuestBytes;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where the pages of a block begin is a multiple of this, for direct I/O.
const PAGES_ALIGN: u64 = 1 << 20;
const FOOTER: u8 = 0x7e;
/// The header of a block in a mapped-ram file.
const HEADER_LEN: u64 = 28;
/// The shortest record of a page in a stream.
const MIN_RECORD: u64 = 9;
/// The header of the section `ram`: kind, number, name, instance, version.
const RAM_HEADER: u64 = 17;

impl Dump {
    /// Writes the migration file again as a mapped-ram file, which QEMU 9 and later loads with
    /// the capability of that name. Of a libvirt image that is the migration file in it.
    ///
    /// # Errors
    /// [`DumpError::CannotConvert`] if it is no migration file, and what reading and writing
    /// gives; there is then no new file.
    pub fn to_mapped_ram(
        &self,
        out: &Path,
        overwrite: Overwrite,
        progress: Progress<'_>,
    ) -> Result<u64, DumpError> {
        self.to_migration(out, overwrite, progress, write_mapped, "a mapped-ram file")
    }

    /// Writes the migration file again as a classic stream, which every QEMU since 5 loads. Of a
    /// libvirt image that is the migration file in it.
    ///
    /// # Errors
    /// As [`to_mapped_ram`](Self::to_mapped_ram).
    pub fn to_stream(
        &self,
        out: &Path,
        overwrite: Overwrite,
        progress: Progress<'_>,
    ) -> Result<u64, DumpError> {
        self.to_migration(out, overwrite, progress, write_stream, "a migration stream")
    }

    fn to_migration(
        &self,
        out: &Path,
        overwrite: Overwrite,
        progress: Progress<'_>,
        write: fn(&Content<'_>, &mut Writer<'_>) -> Result<(), DumpError>,
        to: &'static str,
    ) -> Result<u64, DumpError> {
        let cannot = || DumpError::CannotConvert {
            path: self.path().into(),
            format: self.format(),
            to,
        };
        let dump = self.mapped().ok_or_else(cannot)?;
        dump.check_length()?;
        let content = match self.format_data() {
            Format::Stream(stream) => of_stream(dump, stream, self.payload_at())?,
            Format::MappedRam(ram) => of_mapped(dump, ram, self.payload_at())?,
            _ => return Err(cannot()),
        };
        let output = Output::create(Target::new(out, overwrite), &self.files())?;
        write(&content, &mut Writer::new(dump, &output, progress))?;
        output.finish()
    }
}

/// What both kinds of file hold.
struct Content<'a> {
    start: &'a Start,
    blocks: &'a [RamBlock],
    /// Where the pages of each block are.
    places: Vec<Places>,
    /// Where the file begins.
    begin: u64,
    /// The sections behind the memory's first part: where they begin and end.
    between: (u64, u64),
    /// Where what follows the memory begins.
    end: u64,
}

/// Writes one piece after the other.
struct Writer<'a> {
    dump: &'a MappedDump,
    output: &'a Output,
    copier: Copier<'a>,
    /// What was not written yet, and where it goes.
    pending: Vec<u8>,
    at: u64,
}

impl<'a> Writer<'a> {
    fn new(dump: &'a MappedDump, output: &'a Output, progress: Progress<'a>) -> Self {
        Self {
            dump,
            output,
            copier: Copier::new(dump, output, dump.file_len(), progress),
            pending: Vec::new(),
            at: 0,
        }
    }

    fn file(&self) -> &File {
        self.output.file()
    }

    /// Where the next byte goes.
    fn position(&self) -> u64 {
        self.at.saturating_add(self.pending.len() as u64)
    }

    fn flush(&mut self) -> Result<(), DumpError> {
        let writing = DumpError::io("writing", self.output.path());
        self.file()
            .write_all_at(&self.pending, self.at)
            .map_err(writing)?;
        self.at = self.position();
        self.pending.clear();
        Ok(())
    }

    /// The next byte goes to `at`; what lies between is a hole.
    fn seek(&mut self, at: u64) -> Result<(), DumpError> {
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
        // Names come from a file, where their length is one byte.
        self.bytes(&[u8::try_from(name.len()).unwrap_or(u8::MAX)])?;
        self.bytes(name.as_bytes())
    }

    /// A page or other small stretch of the input.
    fn small(&mut self, from: u64, len: u64) -> Result<(), DumpError> {
        let beyond = DumpError::malformed(self.dump.path(), "a stretch beyond the end", from, len);
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let Some(there) = self.dump.bytes().get(start, size) else {
            return Err(beyond);
        };
        let old = self.pending.len();
        self.pending.resize(old.saturating_add(size), 0);
        let copied = self
            .pending
            .get_mut(old..)
            .is_some_and(|out| there.copy_to(out));
        if !copied {
            return Err(beyond);
        }
        self.bytes(&[])
    }

    /// A stretch of the input of any length.
    fn long(&mut self, from: u64, to: u64) -> Result<(), DumpError> {
        let len = to.saturating_sub(from);
        self.flush()?;
        self.copier.copy(from, self.at, len)?;
        self.at = self.at.saturating_add(len);
        Ok(())
    }

    fn footer(&mut self, start: &Start) -> Result<(), DumpError> {
        self.word(FLAG_EOS)?;
        self.bytes(&[FOOTER])?;
        self.bytes(&start.ram_section.to_be_bytes())
    }

    /// All of the input from `from` on, and the end of the file.
    fn rest(&mut self, from: u64) -> Result<(), DumpError> {
        self.long(from, self.dump.file_len())?;
        let writing = DumpError::io("writing", self.output.path());
        self.file().set_len(self.at).map_err(writing)
    }

    /// What stands before the section `ram`, with or without the capability of mapped-ram.
    fn head(&mut self, start: &Start, begin: u64, mapped: bool) -> Result<(), DumpError> {
        let configuration = start.configuration_at.unwrap_or(start.ram_at);
        self.small(begin, configuration.saturating_sub(begin))?;
        let mut capabilities: Vec<&str> = start.capabilities.iter().map(String::as_str).collect();
        capabilities.retain(|name| *name != mapped_ram::CAPABILITY);
        if mapped {
            capabilities.push(mapped_ram::CAPABILITY);
        }
        if !capabilities.is_empty() {
            self.bytes(&[SUBSECTION])?;
            self.name(CAPABILITIES)?;
            self.bytes(&1_u32.to_be_bytes())?;
            let count = u32::try_from(capabilities.len()).unwrap_or(u32::MAX);
            self.bytes(&count.to_be_bytes())?;
            for name in capabilities {
                self.name(name)?;
            }
        }
        let (before, after) = start
            .capabilities_at
            .unwrap_or((start.ram_at, start.ram_at));
        self.small(configuration, before.saturating_sub(configuration))?;
        self.small(after, start.ram_at.saturating_sub(after))?;
        self.small(start.ram_at, RAM_HEADER)?;
        self.word(start.total | FLAG_MEM_SIZE)
    }
}

/// Passes over the rest of the section `ram` in a mapped-ram file, which has no pages: returns
/// where the sections between its parts end, and where all of it ends.
pub(crate) fn rest_of_ram(
    path: &Path,
    data: GuestBytes<'_>,
    start: &Start,
    after: u64,
) -> Result<(u64, u64), DumpError> {
    let mut cursor = Cursor::new(path, data, after);
    let mut between = after;
    let mut first = true;
    // Each turn passes over a section, so that this ends with the file.
    loop {
        crate::format::qemu::other_sections(&mut cursor, &mut Start::default())?;
        if first {
            between = cursor.at;
            first = false;
        }
        let kind = cursor.u8()?;
        if kind != SECTION_PART && kind != SECTION_END {
            return Err(cursor.malformed("a section among the memory's", kind.into()));
        }
        cursor.section(start.ram_section)?;
        loop {
            match cursor.u64()? {
                FLAG_EOS => break,
                FLAG_MULTIFD_FLUSH => {}
                other => return Err(cursor.malformed("what follows the memory", other)),
            }
        }
        cursor.footer(start.ram_section)?;
        if kind == SECTION_END {
            return Ok((between, cursor.at));
        }
    }
}

/// Where each page of a block is.
enum Places {
    /// 0 where it is zero.
    Listed(Vec<u64>),
    /// One behind the other from here on, those with a bit.
    InOrder {
        bitmap: Vec<u8>,
        at: u64,
        pages: u64,
    },
}

impl Places {
    /// The place of each page; 0 where it is zero.
    fn iter(&self) -> Box<dyn Iterator<Item = u64> + '_> {
        match self {
            Self::Listed(places) => Box::new(places.iter().copied()),
            Self::InOrder { bitmap, at, pages } => Box::new((0..*pages).map(move |page| {
                let there = at.saturating_add(page.saturating_mul(TARGET_PAGE));
                if is_set(bitmap, page) { there } else { 0 }
            })),
        }
    }

    /// A bit for each page that is not zero, as a mapped-ram file has them.
    fn bitmap(&self) -> Vec<u8> {
        let places = match self {
            Self::Listed(places) => places,
            Self::InOrder { bitmap, .. } => return bitmap.clone(),
        };
        let byte = |pages: &[u64]| {
            let bits = pages.iter().zip(0_u32..);
            bits.fold(0_u8, |byte, (place, bit)| {
                byte | u8::from(*place != 0) << bit
            })
        };
        places.chunks(8).map(byte).collect()
    }
}

fn of_stream<'a>(
    dump: &MappedDump,
    stream: &'a Stream,
    begin: u64,
) -> Result<Content<'a>, DumpError> {
    let (path, data) = (dump.path(), dump.bytes());
    let mut places: Vec<Vec<u64>> = Vec::new();
    let limit = (data.len() as u64 / MIN_RECORD).saturating_add(1);
    let mut total = 0_u64;
    for block in &stream.blocks {
        let pages = block.len / TARGET_PAGE;
        total = total.saturating_add(pages);
        // A short file must not claim a lot of memory.
        if total > limit {
            let what = "the size of all memory";
            return Err(DumpError::malformed(path, what, begin, total));
        }
        places.push(vec![0; usize::try_from(pages).unwrap_or(usize::MAX)]);
    }
    let end = stream.walk(path, data, |record| {
        let page = usize::try_from(record.address / TARGET_PAGE).unwrap_or(usize::MAX);
        let place = record
            .block
            .and_then(|block| places.get_mut(block)?.get_mut(page));
        let place = place.ok_or_else(|| {
            DumpError::malformed(path, "the address of a page", record.data, record.address)
        })?;
        *place = if record.has_data() { record.data } else { 0 };
        Ok(())
    })?;
    let mut cursor = Cursor::new(path, data, stream.records_at);
    let mut between = (0, 0);
    if matches!(cursor.u64(), Ok(FLAG_EOS)) {
        cursor.footer(stream.start.ram_section)?;
        between.0 = cursor.at;
        crate::format::qemu::other_sections(&mut cursor, &mut Start::default())?;
        between.1 = cursor.at;
    }
    Ok(Content {
        start: &stream.start,
        blocks: &stream.blocks,
        places: places.into_iter().map(Places::Listed).collect(),
        begin,
        between,
        end,
    })
}

fn of_mapped<'a>(
    dump: &MappedDump,
    ram: &'a MappedRam,
    begin: u64,
) -> Result<Content<'a>, DumpError> {
    let (path, data) = (dump.path(), dump.bytes());
    let (between, end) = rest_of_ram(path, data, &ram.start, ram.after)?;
    let mut places = Vec::new();
    for store in &ram.stores {
        // Room for all of its pages is in the file, as was checked when it was opened.
        let bitmap = store.bitmap(path, data)?;
        places.push(Places::InOrder {
            bitmap,
            at: store.pages_offset,
            pages: store.len / TARGET_PAGE,
        });
    }
    Ok(Content {
        start: &ram.start,
        blocks: &ram.blocks,
        places,
        begin,
        between: (ram.after, between),
        end,
    })
}

fn write_mapped(content: &Content<'_>, out: &mut Writer<'_>) -> Result<(), DumpError> {
    let start = content.start;
    out.head(start, content.begin, true)?;
    for (block, places) in content.blocks.iter().zip(&content.places) {
        out.name(&block.name)?;
        out.word(block.len)?;
        let bitmap = places.bitmap();
        let bitmap_at = out.position().saturating_add(HEADER_LEN);
        let pages_at = bitmap_at
            .saturating_add(bitmap.len() as u64)
            .next_multiple_of(PAGES_ALIGN);
        out.bytes(&HEADER_VERSION.to_be_bytes())?;
        for field in [TARGET_PAGE, bitmap_at, pages_at] {
            out.word(field)?;
        }
        out.bytes(&bitmap)?;
        let mut at = pages_at;
        for place in places.iter() {
            if place != 0 {
                if out.position() != at {
                    out.seek(at)?;
                }
                out.small(place, TARGET_PAGE)?;
            }
            at = at.saturating_add(TARGET_PAGE);
        }
        out.seek(at)?;
    }
    out.footer(start)?;
    out.long(content.between.0, content.between.1)?;
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
    out.long(content.between.0, content.between.1)?;
    out.bytes(&[SECTION_END])?;
    out.bytes(&start.ram_section.to_be_bytes())?;
    for (block, places) in content.blocks.iter().zip(&content.places) {
        let mut again = 0;
        for (address, place) in (0_u64..).step_by(4096).zip(places.iter()) {
            // Like QEMU, nothing of what is not plugged in.
            if place == 0 && block.kind == BlockKind::VirtioMem {
                continue;
            }
            let kind = if place == 0 { FLAG_ZERO } else { FLAG_PAGE };
            out.word(address | kind | again)?;
            if again == 0 {
                out.name(&block.name)?;
                again = FLAG_CONTINUE;
            }
            match place {
                0 => out.bytes(&[0])?,
                place => out.small(place, TARGET_PAGE)?,
            }
        }
    }
    out.footer(start)?;
    out.rest(content.end)
}
