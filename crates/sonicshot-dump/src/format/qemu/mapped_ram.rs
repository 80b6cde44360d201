//! QEMU's mapped-ram migration files, of QEMU 9 and later
//! (`docs/devel/migration/mapped-ram.rst`).
//!
//! Each block of memory has a bitmap, a bit for each page that is in the file, and room for all
//! of its pages. A page is dropped by clearing its bit: QEMU then leaves its own memory as it
//! is, which is zero where the memory is fresh. Then what the page took can be punched out.

use crate::backing::Stored;
use crate::backing::plain::{Extent, PlainDump};
use crate::backing::spool::Spool;
use crate::format::ability::{ByCopy, Copying, InPlace, Migration, Punching};
use crate::format::kind::{Format, Source};
use crate::format::qemu::content::{Content, Places, behind_others, is_set, mixed, rest_of_ram};
use crate::format::qemu::start::{
    self, FLAG_EOS, MAPPED_RAM_VERSION, MAX_BLOCKS, RamBlock, Start, TARGET_PAGE,
};
use crate::format::qemu::wire::Cursor;
use crate::format::qemu::{Wrapping, device_state};
use crate::limit::allowed_for;
use crate::output::Output;
use crate::processors;
use crate::prune::copy::Copier;
use crate::prune::runs::file_runs;
use crate::prune::stats::PruneStats;
use crate::{DumpError, LayoutSpec};
use sonicshot::{
    Bytes, FileBytes, FileOffset, FileRange, GpaRange, Processors, Progress, PrunePlan, to_u64,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A page takes at least this much of the disk, however well the file system compresses.
const MIN_STORED: u64 = 512;
/// So many ranges any file may have: they take 32 MiB.
const SMALL: u64 = 1 << 20;
/// The capability that keeps shared memory out of the file.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// A mapped-ram file, mapped.
#[derive(Debug)]
pub(crate) struct MappedRamDump {
    mapped: PlainDump,
    ram: MappedRam,
    wrapping: Wrapping,
}

pub(crate) fn open(source: Source<'_>, wrapping: Wrapping) -> Result<MappedRamDump, DumpError> {
    let (path, data) = (source.path, source.data());
    let ram = MappedRam::parse(path, data, wrapping.begin(), source.layout())?;
    let extents = ram.extents(path, data, source.on_disk()?)?;
    let mut mapped = source.mapped(extents)?;
    mapped.trust_extents();
    Ok(MappedRamDump {
        mapped,
        ram,
        wrapping,
    })
}

impl Format for MappedRamDump {
    fn name(&self) -> &'static str {
        match self.wrapping.image() {
            Some(_) => "libvirt save image (sparse)",
            None => "QEMU mapped-ram",
        }
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
        self.ram.machine.as_deref()
    }

    fn ram_blocks(&self) -> &[RamBlock] {
        &self.ram.blocks
    }

    fn holds_device_state(&self) -> bool {
        true
    }

    fn processors(&self) -> Processors {
        let (path, data) = (self.mapped.path(), self.mapped.bytes());
        let start = &self.ram.start;
        let rest = rest_of_ram(path, data, start, self.ram.after);
        match rest.and_then(|rest| behind_others(path, data, start, rest.end)) {
            Ok(at) => processors::told(device_state::processors(path, data, at, &self.mapped)),
            Err(_) => Processors::NotTold("its devices' state is cut short"),
        }
    }

    /// Not where it is compressed: the format has no offsets then.
    fn by_copy(&self) -> Option<&dyn ByCopy> {
        self.unpacked().is_none().then_some(self)
    }

    fn in_place(&self) -> Option<&dyn InPlace> {
        Some(self)
    }

    fn as_migration(&self) -> Option<&dyn Migration> {
        Some(self)
    }
}

impl ByCopy for MappedRamDump {
    fn copy(&self, work: Copying<'_>) -> Result<(), DumpError> {
        let (dump, ram) = (&self.mapped, &self.ram);
        let bitmaps = ram.pruned_bitmaps(dump.path(), dump.bytes(), work.goes)?;
        work.stats.runs = to_u64(file_runs(dump, work.goes)?.len());
        work.stats.cloned_bytes = copy_mapped_ram(dump, ram, &bitmaps, work.output, work.progress)?;
        Ok(())
    }
}

impl InPlace for MappedRamDump {
    fn source(&self) -> &PlainDump {
        &self.mapped
    }

    fn punching(&self, goes: &PrunePlan, stats: &mut PruneStats) -> Result<Punching, DumpError> {
        let dump = &self.mapped;
        stats.runs = to_u64(file_runs(dump, goes)?.len());
        let mut marks = self.ram.pruned_bitmaps(dump.path(), dump.bytes(), goes)?;
        // Also what an earlier prune that was interrupted has left.
        let runs = self.ram.holes(&marks);
        marks.retain(|(offset, bitmap)| !dump.holds(*offset, bitmap));
        Ok(Punching { marks, runs })
    }
}

impl Migration for MappedRamDump {
    fn source(&self) -> &PlainDump {
        &self.mapped
    }

    fn content(&self) -> Result<Content<'_>, DumpError> {
        of_mapped(&self.mapped, &self.ram, self.wrapping.begin())
    }
}

/// The memory in a mapped-ram file.
#[derive(Debug, Clone)]
pub(crate) struct MappedRam {
    pub machine: Option<String>,
    /// All blocks, as [`crate::Dump::ram_blocks`] gives them.
    pub blocks: Vec<RamBlock>,
    /// The place of each in the file.
    pub stores: Vec<Store>,
    pub start: Start,
    /// The beginning of what follows the memory's first part.
    pub after: FileOffset,
}

/// The place of a block in the file.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    /// The ranges of the block's parts in the guest, end to end in the block; none if the block is
    /// kept as it is.
    ranges: Vec<GpaRange>,
    bitmap: FileRange,
    /// The room for all of its pages.
    pages: FileRange,
}

struct Block {
    name: String,
    bitmap: FileRange,
    pages: FileRange,
}

impl MappedRam {
    /// Reads the blocks' headers. The stream begins at `at` in the file, its offsets count from
    /// the file's own beginning.
    pub(crate) fn parse(
        path: &Path,
        data: FileBytes<'_>,
        at: FileOffset,
        layout: Option<&LayoutSpec>,
    ) -> Result<Self, DumpError> {
        let mut cursor = Cursor::new(path, data, at);
        let mut start = start::start(&mut cursor)?;
        if start.has(IGNORE_SHARED) {
            return Err(DumpError::Unsupported {
                path: path.to_owned(),
                kind: "a migration file without the shared memory (x-ignore-shared): prune the \
                       memory's own file",
            });
        }
        let mut blocks: Vec<Block> = Vec::new();
        let mut total = 0_u64;
        while total < start.total {
            if blocks.len() >= MAX_BLOCKS {
                return Err(cursor.malformed("invalid number of memory blocks", total));
            }
            let block = block(&mut cursor, to_u64(data.len()))?;
            let sum = total.checked_add(block.pages.len());
            total = sum.ok_or_else(|| cursor.malformed("invalid size of all memory", total))?;
            // The next block is behind the room for this one's pages.
            cursor.seek(block.pages.end());
            blocks.push(block);
        }
        let end = cursor.be::<u64>()?;
        if total != start.total || end != FLAG_EOS {
            return Err(cursor.malformed("missing end of the memory blocks", end));
        }
        cursor.footer(start.ram_section)?;
        let after = cursor.at();
        start::other_sections(&mut cursor, &mut start)?;
        let names = blocks
            .iter()
            .map(|block| (block.name.clone(), block.pages.len()));
        let placed = start::blocks(path, &start, layout, names.collect())?;
        let stores = placed.iter().zip(&blocks).map(|(placed, block)| Store {
            ranges: placed.ranges.clone(),
            bitmap: block.bitmap,
            pages: block.pages,
        });
        Ok(Self {
            stores: stores.collect(),
            machine: start.machine.clone(),
            blocks: placed,
            start,
            after,
        })
    }

    /// The extents of the guest's RAM in the file, which takes `on_disk` bytes; a page without a
    /// bit is not in it.
    pub(crate) fn extents(
        &self,
        path: &Path,
        data: FileBytes<'_>,
        on_disk: u64,
    ) -> Result<Vec<Extent>, DumpError> {
        let mut extents: Vec<Extent> = Vec::new();
        // A file of holes must not claim pages without end: a range of data, and one of none,
        // for a page each, which a file system may have compressed.
        let limit = allowed_for(on_disk / MIN_STORED, SMALL);
        for store in self.placed() {
            let at = store.bitmap.start();
            let missing = || DumpError::malformed(path, "page bitmap out of bounds", at, 0);
            let mut marks = store.marks(data).ok_or_else(missing)?;
            let fits = store.extents(&mut marks, limit, &mut extents);
            if !fits.ok_or_else(missing)? {
                let what = "more ranges of pages than the file has data for";
                return Err(DumpError::malformed(path, what, at, limit));
            }
        }
        extents.sort_by_key(|extent| extent.guest);
        Ok(extents)
    }

    /// The blocks that are looked into.
    fn placed(&self) -> impl Iterator<Item = &Store> {
        self.stores.iter().filter(|store| !store.ranges.is_empty())
    }

    /// The bitmaps without the pages that `plan` drops: where each is in the file, and its bytes.
    pub(crate) fn pruned_bitmaps(
        &self,
        path: &Path,
        data: FileBytes<'_>,
        plan: &PrunePlan,
    ) -> Result<Vec<(FileOffset, Vec<u8>)>, DumpError> {
        self.placed()
            .map(|store| {
                let at = store.bitmap.start();
                let mut bitmap = store.bitmap(path, data)?;
                store.clear(&mut bitmap, plan).ok_or_else(|| {
                    let what = "a bitmap that does not fit its block";
                    DumpError::malformed(path, what, at, store.pages.len())
                })?;
                Ok((at, bitmap))
            })
            .collect()
    }

    /// The ranges of the file that stand for pages without a bit, in the file's order. `bitmaps`
    /// are those of [`Self::pruned_bitmaps`].
    pub(crate) fn holes(&self, bitmaps: &[(FileOffset, Vec<u8>)]) -> Vec<FileRange> {
        let mut holes = Vec::new();
        for (store, (_, bitmap)) in self.placed().zip(bitmaps) {
            store.holes(bitmap, &mut holes);
        }
        holes
    }
}

/// A block's bitmap, looked at in pieces: however long it is, only one of them is in memory.
struct Marks<'a> {
    bitmap: FileBytes<'a>,
    /// The bytes from `at` on; none if nothing was read yet.
    piece: Vec<u8>,
    at: u64,
}

/// The number of bytes of a bitmap that are looked at at once.
const PIECE: u64 = 64 << 10;

impl Marks<'_> {
    /// The marks of the eight pages from 8 x `number` on.
    fn byte(&mut self, number: u64) -> Option<u8> {
        let inside = |at: u64| usize::try_from(number.checked_sub(at)?).ok();
        if let Some(byte) = inside(self.at).and_then(|inside| self.piece.get(inside)) {
            return Some(*byte);
        }
        let start = number.checked_sub(number % PIECE)?;
        let left = to_u64(self.bitmap.len()).checked_sub(start)?;
        let len = usize::try_from(left.min(PIECE)).ok()?;
        let bytes = self.bitmap.get(usize::try_from(start).ok()?, len)?;
        let mut piece = vec![0; len];
        bytes.copy_to(&mut piece).then_some(())?;
        (self.piece, self.at) = (piece, start);
        self.piece.get(inside(start)?).copied()
    }

    fn is_set(&mut self, page: u64) -> Option<bool> {
        Some(self.byte(page >> 3)? >> (page & 7) & 1 == 1)
    }

    /// The first page from `page` on that is not marked as it is, or `end`.
    fn end_of(&mut self, page: u64, end: u64, mark: bool) -> Option<u64> {
        let all = if mark { 0xff } else { 0 };
        let mut page = page;
        while page < end {
            let left = end.checked_sub(page)?;
            let eight = page & 7 == 0 && left >= 8;
            if eight && self.byte(page >> 3)? == all {
                page = page.checked_add(8)?;
            } else if self.is_set(page)? == mark {
                page = page.checked_add(1)?;
            } else {
                break;
            }
        }
        Some(page)
    }
}

impl Store {
    fn marks<'a>(&self, data: FileBytes<'a>) -> Option<Marks<'a>> {
        Some(Marks {
            bitmap: data.part(self.bitmap.start().raw(), self.bitmap.len())?,
            piece: Vec::new(),
            at: 0,
        })
    }

    pub(crate) fn bitmap(&self, path: &Path, data: FileBytes<'_>) -> Result<Vec<u8>, DumpError> {
        let at = self.bitmap.start();
        // Inside the file, as `block` has checked: no more memory than the file has bytes.
        let bytes = data.part(at.raw(), self.bitmap.len());
        bytes
            .and_then(Bytes::copied)
            .ok_or_else(|| DumpError::malformed(path, "page bitmap out of bounds", at, 0))
    }

    /// Adds the block's ranges; `false` if they are more than `limit` all together, `None` if
    /// the bitmap is not all there.
    fn extents(
        &self,
        marks: &mut Marks<'_>,
        limit: u64,
        extents: &mut Vec<Extent>,
    ) -> Option<bool> {
        let mut base = 0_u64;
        for range in &self.ranges {
            let mut at = base;
            base = base.checked_add(range.len())?;
            while at < base {
                let page = at / TARGET_PAGE;
                let first = marks.is_set(page)?;
                let end = marks.end_of(page, base.div_ceil(TARGET_PAGE), first)?;
                let end = end.checked_mul(TARGET_PAGE);
                let end = end.map_or(base, |end| end.min(base));
                if to_u64(extents.len()) > limit {
                    return Some(false);
                }
                for (guest, from) in start::place(&self.ranges, at, end.checked_sub(at)?) {
                    let there = self.pages.start().checked_add(from)?;
                    extents.push(Extent {
                        guest,
                        offset: first.then_some(there),
                    });
                }
                at = end;
            }
        }
        Some(true)
    }

    fn holes(&self, bitmap: &[u8], holes: &mut Vec<FileRange>) {
        for (page, place) in (0_u64..).zip(self.pages.pieces(TARGET_PAGE)) {
            if !is_set(bitmap, page) {
                place.append_to(holes);
            }
        }
    }

    /// Clears the bits of the pages that `plan` drops. `None` if the bitmap is not the block's.
    fn clear(&self, bitmap: &mut [u8], plan: &PrunePlan) -> Option<()> {
        let mut base = 0_u64;
        for range in &self.ranges {
            for dropped in plan.dropped_in(*range) {
                let inside = dropped.start().offset_from(range.start())?;
                let start = base.checked_add(inside)?;
                // Only pages that are dropped as a whole.
                let first = start.div_ceil(TARGET_PAGE);
                let end = start.checked_add(dropped.len())? / TARGET_PAGE;
                for page in first..end {
                    let byte = bitmap.get_mut(usize::try_from(page >> 3).ok()?)?;
                    *byte &= !(1_u8 << (page & 7));
                }
            }
            base = base.checked_add(range.len())?;
        }
        Some(())
    }
}

/// One block's name, length and header; all of it must lie in the file.
fn block(cursor: &mut Cursor<'_>, file_len: u64) -> Result<Block, DumpError> {
    let name = cursor.name()?;
    let len = cursor.be::<u64>()?;
    let version = cursor.be::<u32>()?;
    if version != MAPPED_RAM_VERSION {
        return Err(cursor.malformed("invalid version of a mapped-ram header", version.into()));
    }
    let page_size = cursor.be::<u64>()?;
    if page_size != TARGET_PAGE || len % TARGET_PAGE != 0 || len == 0 {
        return Err(cursor.malformed("invalid page size or length of a memory block", page_size));
    }
    let bitmap_at = FileOffset::new(cursor.be()?);
    let pages_at = FileOffset::new(cursor.be()?);
    let bitmap_len = len.div_ceil(TARGET_PAGE).div_ceil(8);
    let bitmap = FileRange::with_len(bitmap_at, bitmap_len)
        .filter(|bitmap| bitmap.start() >= cursor.at() && bitmap.end() <= pages_at)
        .ok_or_else(|| cursor.malformed("invalid offset of a bitmap", bitmap_at.raw()))?;
    let pages = FileRange::with_len(pages_at, len)
        .filter(|pages| pages.end().raw() <= file_len)
        .ok_or_else(|| cursor.malformed("invalid offset of a block's pages", pages_at.raw()))?;
    Ok(Block {
        name,
        bitmap,
        pages,
    })
}

fn of_mapped<'a>(
    dump: &PlainDump,
    ram: &'a MappedRam,
    begin: FileOffset,
) -> Result<Content<'a>, DumpError> {
    let (path, data) = (dump.path(), dump.bytes());
    let rest = rest_of_ram(path, data, &ram.start, ram.after)?;
    if rest.mixed {
        return Err(mixed(path));
    }
    let mut places = Vec::new();
    for store in &ram.stores {
        // Room for all of its pages is in the file, as was checked when it was opened.
        let bitmap = store.bitmap(path, data)?;
        let pages = store.pages;
        places.push(Places::InOrder { bitmap, pages });
    }
    Ok(Content {
        start: &ram.start,
        blocks: &ram.blocks,
        places,
        begin,
        between: FileRange::new(ram.after, rest.between),
        end: rest.end,
    })
}

/// Copies all of the file but the dropped pages, and clears their bits. Returns how many bytes
/// are shared.
fn copy_mapped_ram(
    dump: &PlainDump,
    ram: &MappedRam,
    bitmaps: &[(FileOffset, Vec<u8>)],
    output: &Output,
    progress: &dyn Progress,
) -> Result<u64, DumpError> {
    let writing = || DumpError::io("writing", output.path());
    let total = dump.file_len();
    output.file().set_len(total).map_err(writing())?;
    let mut copier = Copier::new(dump, output, total, progress);
    let mut at = FileOffset::ZERO;
    let end = dump.file_range().end();
    for hole in ram
        .holes(bitmaps)
        .into_iter()
        .chain([FileRange::new(end, end)])
    {
        if hole.start() < at {
            return Err(DumpError::malformed(
                dump.path(),
                "blocks of memory that overlap",
                hole.start(),
                at.raw(),
            ));
        }
        copier.copy(FileRange::new(at, hole.start()), at)?;
        at = hole.end();
    }
    for (offset, bitmap) in bitmaps {
        output
            .file()
            .write_all_at(bitmap, offset.raw())
            .map_err(writing())?;
    }
    Ok(copier.cloned())
}
