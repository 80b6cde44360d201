//! QEMU's classic migration streams, as files: `migrate exec:cat > FILE` and what wraps it
//! (`migration/savevm.c`, `migration/ram.c`).
//!
//! The pages of all memory blocks follow each other as records, each a page or a note that it is
//! zero; a page may come several times, and the last one counts. A page is dropped by writing
//! that it is zero. Streams with compressed pages, deltas (XBZRLE) or more than one channel are
//! refused.

use crate::backing::Stored;
use crate::backing::plain::{PlainDump, sum_of_lens};
use crate::backing::scattered::{PagePlaces, Scattered};
use crate::backing::spool::Spool;
use crate::backing::spool::{Image, Packed};
use crate::format::ability::{AsStream, ByCopy, Copying, EachPart, Migration, Part};
use crate::format::kind::{Format, Source};
use crate::format::qemu::content::{Content, Places, behind_others, mixed, next_part};
use crate::format::qemu::start::{
    self, BlockKind, FLAG_CONTINUE, FLAG_EOS, FLAG_MULTIFD_FLUSH, FLAG_PAGE, FLAG_ZERO, MAX_BLOCKS,
    RamBlock, Start, TARGET_PAGE,
};
use crate::format::qemu::wire::{Cursor, SECTION_END};
use crate::format::qemu::{Wrapping, device_state};
use crate::limit::allowed_for;
use crate::processors;
use crate::prune::stream;
use crate::{DumpError, LayoutSpec};
use sonicshot::{
    FileBytes, FileOffset, FileRange, PhaseProgress, Processors, Progress, PrunePlan, WorkPhase,
    to_u64,
};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

/// A page as what changed since it was last sent.
const FLAG_XBZRLE: u64 = 0x40;
/// A page compressed by QEMU itself (before QEMU 9.1).
const FLAG_COMPRESSED: u64 = 0x100;
const FLAGS: u64 = TARGET_PAGE - 1;
/// A page that is noted to be zero takes this much of the file.
const ZERO_RECORD: u64 = 9;
/// A byte on disk is at most so many of the file's, however well the file system compresses.
const MAX_RATIO: u64 = 32;
/// So many pages any file may have: what is kept of them takes a MiB.
const SMALL: u64 = 1 << 24;
const WITH_DELTAS: &str = "a migration stream with deltas (xbzrle)";

/// A migration stream, mapped.
#[derive(Debug)]
pub(crate) struct StreamDump {
    mapped: PlainDump,
    stream: Stream,
    wrapping: Wrapping,
}

pub(crate) fn open(source: Source<'_>, wrapping: Wrapping) -> Result<StreamDump, DumpError> {
    let (path, data) = (source.path, source.data());
    let most = most_pages(source.len(), source.on_disk()?);
    let mut stream = Stream::parse(path, data, wrapping.begin(), source.layout(), most)?;
    let pages = stream.pages(path, data, &source.known.progress)?;
    let mapped = source.scattered(pages)?;
    Ok(StreamDump {
        mapped,
        stream,
        wrapping,
    })
}

impl Format for StreamDump {
    fn name(&self) -> &'static str {
        let image = self.wrapping.image();
        image.as_ref().map_or("QEMU migration stream", Image::name)
    }

    fn stored(&self) -> &dyn Stored {
        &self.mapped
    }

    fn file(&self) -> &File {
        self.wrapping.file_or(self.mapped.file())
    }

    fn unpacked(&self) -> Option<&Spool> {
        self.wrapping.unpacked()
    }

    fn machine_type(&self) -> Option<&str> {
        self.stream.start.machine.as_deref()
    }

    fn ram_blocks(&self) -> &[RamBlock] {
        &self.stream.blocks
    }

    fn holds_device_state(&self) -> bool {
        true
    }

    fn processors(&self) -> Processors {
        let dump = &self.mapped;
        let Some(at) = self.stream.records_end else {
            return Processors::NotTold("its records were not gone through");
        };
        let (path, data) = (dump.path(), dump.bytes());
        match behind_others(path, data, &self.stream.start, at) {
            Ok(at) => processors::told(device_state::processors(path, data, at, dump)),
            Err(_) => Processors::NotTold("its devices' state is cut short"),
        }
    }

    fn by_copy(&self) -> Option<&dyn ByCopy> {
        Some(self)
    }

    fn as_stream(&self) -> Option<&dyn AsStream> {
        Some(self)
    }

    fn as_migration(&self) -> Option<&dyn Migration> {
        Some(self)
    }
}

impl ByCopy for StreamDump {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        stream::copy(self, work)
    }
}

impl AsStream for StreamDump {
    fn source(&self) -> &PlainDump {
        &self.mapped
    }

    fn packed_in(&self) -> Option<Packed<'_>> {
        self.wrapping.packed_in()
    }

    fn pruned(&self, goes: &PrunePlan, each: EachPart<'_>) -> Result<(), DumpError> {
        self.stream.pruned(&self.mapped, goes, each)
    }
}

impl Migration for StreamDump {
    fn source(&self) -> &PlainDump {
        &self.mapped
    }

    fn content(&self) -> Result<Content<'_>, DumpError> {
        of_stream(&self.mapped, &self.stream, self.wrapping.begin())
    }
}

/// A classic migration stream.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    pub start: Start,
    /// All blocks, as [`crate::Dump::ram_blocks`] gives them.
    pub blocks: Vec<RamBlock>,
    /// The beginning of the records of pages.
    pub records_at: FileOffset,
    /// The end of them and of the section `ram`, where the devices' state begins; `None` until the
    /// records were gone through.
    pub records_end: Option<FileOffset>,
    /// So many pages the file has room for.
    most: u64,
}

/// The most pages that a file may have: each has a record, and a file that is short, or one of holes,
/// must not claim a lot of memory.
fn most_pages(len: u64, on_disk: u64) -> u64 {
    let records = allowed_for(len / ZERO_RECORD, 1);
    let stored = (on_disk / ZERO_RECORD).checked_mul(MAX_RATIO);
    let stored = stored.and_then(|stored| stored.checked_add(SMALL));
    stored.map_or(records, |stored| records.min(stored))
}

/// Of which blocks the pages are looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    /// The guest's RAM.
    Ram,
    /// Video memory and ROMs, too: a record of none of the blocks is an error then.
    All,
}

/// One page's record.
pub(crate) struct Record {
    /// Its beginning, that which its page data would have, and its end.
    at: FileOffset,
    pub data: FileOffset,
    end: FileOffset,
    /// The page's place in its block.
    pub address: u64,
    flags: u64,
    /// The number of its block.
    pub block: Option<usize>,
}

impl Record {
    /// Whether the page is there; if not it is zero.
    pub(crate) fn has_data(&self) -> bool {
        self.flags & FLAG_PAGE != 0
    }
}

impl Stream {
    /// Reads what comes before the pages.
    pub(crate) fn parse(
        path: &Path,
        data: FileBytes<'_>,
        at: FileOffset,
        layout: Option<&LayoutSpec>,
        most: u64,
    ) -> Result<Self, DumpError> {
        let mut cursor = Cursor::new(path, data, at);
        let mut start = start::start(&mut cursor)?;
        for (capability, kind) in [
            (
                "x-ignore-shared",
                "a migration stream without the shared memory (x-ignore-shared)",
            ),
            ("postcopy-ram", "a migration stream for postcopy"),
            (
                "multifd",
                "a migration stream of several channels (multifd)",
            ),
            ("xbzrle", WITH_DELTAS),
        ] {
            if start.has(capability) {
                let path = path.to_owned();
                return Err(DumpError::Unsupported { path, kind });
            }
        }
        let mut blocks: Vec<(String, u64)> = Vec::new();
        let mut total = 0_u64;
        while total < start.total {
            let name = cursor.name()?;
            let len = cursor.be::<u64>()?;
            if blocks.len() >= MAX_BLOCKS || len == 0 || len & FLAGS != 0 {
                return Err(cursor.malformed("invalid length of a memory block", len));
            }
            let all = total.checked_add(len);
            total = all.ok_or_else(|| cursor.malformed("invalid length of a memory block", len))?;
            blocks.push((name, len));
        }
        if total != start.total {
            return Err(cursor.malformed("invalid size of all memory", total));
        }
        // Where a virtio-mem device has its memory stands behind the first part.
        let mut ahead = cursor.clone();
        if matches!(ahead.be::<u64>(), Ok(FLAG_EOS)) {
            ahead.footer(start.ram_section)?;
            start::other_sections(&mut ahead, &mut start)?;
        }
        // What is not plugged in of a virtio-mem device has no records.
        let mut blocks = start::blocks(path, &start, layout, blocks)?;
        let pages = |blocks: &[RamBlock]| {
            let placed = blocks.iter().filter(|block| !block.ranges.is_empty());
            sum_of_lens(placed.map(|block| block.len)).map(|len| len / TARGET_PAGE)
        };
        if pages(&blocks).is_none_or(|pages| pages > most) {
            for block in &mut blocks {
                if block.kind == BlockKind::VirtioMem {
                    block.ranges.clear();
                }
            }
        }
        if pages(&blocks).is_none_or(|pages| pages > most) {
            return Err(cursor.malformed("invalid size of all memory", total));
        }
        Ok(Self {
            blocks,
            start,
            records_at: cursor.at(),
            records_end: None,
            most,
        })
    }

    /// Goes through all records of pages. Returns where the section `ram` ends, and whether other
    /// sections have parts between its later ones.
    pub(crate) fn walk(
        &self,
        path: &Path,
        data: FileBytes<'_>,
        mut each: impl FnMut(&Record) -> Result<(), DumpError>,
    ) -> Result<(FileOffset, bool), DumpError> {
        let unsupported = |kind| DumpError::Unsupported {
            path: path.to_owned(),
            kind,
        };
        let mut cursor = Cursor::new(path, data, self.records_at);
        // Of two blocks of one name the first. Each record may name another one.
        let names = self.blocks.iter().map(|block| block.name.as_str());
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        for (number, name) in names.enumerate() {
            numbers.entry(name).or_insert(number);
        }
        let mut block = None;
        let mut last_part = false;
        let mut known = self.start.others_alone();
        let (mut is_first, mut mixed) = (true, false);
        // Each turn reads at least a byte, so that this ends with the file.
        loop {
            // The records of one part of the section.
            loop {
                let at = cursor.at();
                let word = cursor.be::<u64>()?;
                let (flags, address) = (word & FLAGS, word & !FLAGS);
                match flags & !FLAG_CONTINUE {
                    FLAG_EOS => break,
                    FLAG_MULTIFD_FLUSH => continue,
                    FLAG_PAGE | FLAG_ZERO => {}
                    // QEMU does not say ahead that it sends such pages.
                    FLAG_XBZRLE => return Err(unsupported(WITH_DELTAS)),
                    FLAG_COMPRESSED => {
                        return Err(unsupported("a migration stream with compressed pages"));
                    }
                    other => return Err(cursor.malformed("unknown flags of a page record", other)),
                }
                if flags & FLAG_CONTINUE == 0 {
                    let name = cursor.name()?;
                    block = numbers.get(name.as_str()).copied();
                }
                let start = cursor.at();
                if flags & FLAG_PAGE != 0 {
                    cursor.skip(TARGET_PAGE)?;
                } else {
                    let fill = cursor.be::<u8>()?;
                    if fill != 0 {
                        return Err(cursor.malformed("nonzero fill byte of a page", fill.into()));
                    }
                }
                each(&Record {
                    at,
                    data: start,
                    end: cursor.at(),
                    address,
                    flags,
                    block,
                })?;
            }
            cursor.footer(self.start.ram_section)?;
            if last_part {
                return Ok((cursor.at(), mixed));
            }
            let before = known.others.passed;
            start::other_sections(&mut cursor, &mut known)?;
            mixed |= !is_first && known.others.passed != before;
            is_first = false;
            if !next_part(&mut cursor, path, data, self.start.ram_section)? {
                return Ok((cursor.at(), mixed));
            }
            let kind = cursor.be::<u8>()?;
            cursor.section(self.start.ram_section)?;
            last_part = kind == SECTION_END;
        }
    }

    /// The places of the bytes of each page that count, the last that came; of other blocks than
    /// these none. And the end of the section `ram`.
    fn places(
        &self,
        path: &Path,
        data: FileBytes<'_>,
        of: Of,
        progress: &dyn Progress,
    ) -> Result<(Vec<PagePlaces>, (FileOffset, bool)), DumpError> {
        let mut places: Vec<Option<PagePlaces>> = Vec::new();
        for block in &self.blocks {
            let pages = block.len / TARGET_PAGE;
            let is_wanted = of == Of::All || !block.ranges.is_empty();
            let found = is_wanted.then(|| PagePlaces::new(pages, to_u64(data.len())));
            places.push(found);
        }
        let len = to_u64(data.len());
        let mut phase = PhaseProgress::begin(progress, WorkPhase::Opening, len);
        let end = self.walk(path, data, |record| {
            phase.reach(record.end.raw());
            let bad = || {
                DumpError::malformed(path, "invalid address of a page", record.at, record.address)
            };
            let found = record
                .block
                .and_then(|block| places.get_mut(block)?.as_mut());
            let places = match (found, of) {
                (Some(places), _) => places,
                (None, Of::Ram) => return Ok(()),
                (None, Of::All) => return Err(bad()),
            };
            let place = record.has_data().then_some(record.data);
            places
                .set(record.address / TARGET_PAGE, place)
                .ok_or_else(bad)
        })?;
        phase.end();
        let none = || PagePlaces::new(0, 0);
        let places = places.into_iter().map(|places| places.unwrap_or_else(none));
        Ok((places.collect(), end))
    }

    /// The place of each page of the guest's RAM in the file.
    pub(crate) fn pages(
        &mut self,
        path: &Path,
        data: FileBytes<'_>,
        progress: &dyn Progress,
    ) -> Result<Scattered, DumpError> {
        let (places, (end, _)) = self.places(path, data, Of::Ram, progress)?;
        self.records_end = Some(end);
        let ranges = self.blocks.iter().map(|block| block.ranges.as_slice());
        Ok(Scattered::new(ranges.zip(places)))
    }

    /// Hands out the pruned stream piece by piece: ranges of the file to be copied, and bytes
    /// to be written instead of a dropped page, or of one that came again later.
    pub(crate) fn pruned(
        &self,
        dump: &PlainDump,
        plan: &PrunePlan,
        each: EachPart<'_>,
    ) -> Result<(), DumpError> {
        let (path, data) = (dump.path(), dump.bytes());
        // Of a block that is not looked into every page counts.
        let comes_again = |record: &Record| {
            let places = record.block.and_then(|block| dump.pages_of_block(block));
            let is_there = self.is_looked_into(record);
            is_there
                && places.and_then(|places| places.get(record.address / TARGET_PAGE))
                    != Some(record.data)
        };
        let mut copied = FileOffset::ZERO;
        self.walk(path, data, |record| {
            if !record.has_data() || !comes_again(record) && !self.dropped(record, plan) {
                return Ok(());
            }
            // The record's beginning stays but for its flags: name and place are the same.
            let before = |from: FileOffset, to: FileOffset| {
                let what = "record that overlaps the one before it";
                let wrong = || DumpError::malformed(path, what, from, to.raw());
                let range = FileRange::between(from, to);
                range.map(Part::Copy).ok_or_else(wrong)
            };
            each(before(copied, record.at)?)?;
            let flags = record.flags & FLAG_CONTINUE | FLAG_ZERO;
            each(Part::Bytes(&(record.address | flags).to_be_bytes()))?;
            let wrong = || DumpError::malformed(path, "a record beyond the end", record.at, 8);
            let name = record.at.checked_add(8).ok_or_else(wrong)?;
            each(before(name, record.data)?)?;
            each(Part::Bytes(&[0]))?;
            copied = record.end;
            Ok(())
        })?;
        let end = dump.file_range().end();
        let range = FileRange::between(copied, end);
        let wrong = || DumpError::malformed(path, "a record beyond the end", copied, end.raw());
        each(Part::Copy(range.ok_or_else(wrong)?))
    }

    /// Whether a record's page is of a block of the guest's RAM.
    fn is_looked_into(&self, record: &Record) -> bool {
        let block = record.block.and_then(|block| self.blocks.get(block));
        block.is_some_and(|block| !block.ranges.is_empty())
    }

    /// Whether all of a record's page is dropped.
    fn dropped(&self, record: &Record, plan: &PrunePlan) -> bool {
        let Some(block) = record.block.and_then(|block| self.blocks.get(block)) else {
            return false;
        };
        let mut left = TARGET_PAGE;
        for (guest, _) in start::place(&block.ranges, record.address, TARGET_PAGE) {
            for part in plan.dropped_in(guest) {
                let Some(rest) = left.checked_sub(part.len()) else {
                    return false;
                };
                left = rest;
            }
        }
        left == 0
    }
}

fn of_stream<'a>(
    dump: &PlainDump,
    stream: &'a Stream,
    begin: FileOffset,
) -> Result<Content<'a>, DumpError> {
    let (path, data) = (dump.path(), dump.bytes());
    let pages = stream.blocks.iter().map(|block| block.len / TARGET_PAGE);
    let bad = |total| DumpError::malformed(path, "invalid size of all memory", begin, total);
    let total = sum_of_lens(pages).ok_or_else(|| bad(stream.most))?;
    if total > stream.most {
        return Err(bad(total));
    }
    let (places, (end, is_mixed)) = stream.places(path, data, Of::All, &None)?;
    if is_mixed {
        return Err(mixed(path));
    }
    let mut cursor = Cursor::new(path, data, stream.records_at);
    let mut between = FileRange::new(begin, begin);
    if matches!(cursor.be::<u64>(), Ok(FLAG_EOS)) {
        cursor.footer(stream.start.ram_section)?;
        let begin = cursor.at();
        start::other_sections(&mut cursor, &mut stream.start.others_alone())?;
        between = FileRange::new(begin, cursor.at());
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
