//! QEMU's mapped-ram migration files, of QEMU 9 and later
//! (`docs/devel/migration/mapped-ram.rst`).
//!
//! Each block of memory has a bitmap, a bit for each page that is in the file, and room for all
//! of its pages. A page is dropped by clearing its bit: QEMU then leaves its own memory as it
//! is, which is zero where the memory is fresh. Then what the page took can be punched out.

use crate::mapped::Extent;
use crate::qemu::{self, Cursor, FLAG_EOS, MAX_BLOCKS, TARGET_PAGE};
use crate::{DumpError, LayoutSpec};
use sonicshot::{GpaRange, GuestBytes, PrunePlan};
use std::path::Path;

/// The capability in the file's configuration.
pub(crate) const CAPABILITY: &str = "mapped-ram";
/// What keeps shared memory out of the file.
const IGNORE_SHARED: &str = "x-ignore-shared";
const HEADER_VERSION: u32 = 1;

/// The guest's RAM in a mapped-ram file.
#[derive(Debug, Clone)]
pub(crate) struct MappedRam {
    pub machine: Option<String>,
    /// Where the block's parts are in the guest, end to end in the block.
    ranges: Vec<GpaRange>,
    bitmap_offset: u64,
    /// In bytes, without padding.
    bitmap_len: u64,
    pages_offset: u64,
}

struct Block {
    name: String,
    len: u64,
    bitmap_offset: u64,
    pages_offset: u64,
}

impl MappedRam {
    /// Reads the blocks' headers. The stream begins at `at` in the file, its offsets count from
    /// the file's own beginning.
    pub(crate) fn parse(
        path: &Path,
        data: GuestBytes<'_>,
        at: u64,
        layout: Option<&LayoutSpec>,
    ) -> Result<Self, DumpError> {
        let mut cursor = Cursor::new(path, data, at);
        let start = qemu::start(&mut cursor)?;
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
                return Err(cursor.malformed("the number of memory blocks", total));
            }
            let block = block(&mut cursor, data.len() as u64)?;
            total = total.saturating_add(block.len);
            // The next block is behind the room for this one's pages.
            cursor.at = block.pages_offset.saturating_add(block.len);
            blocks.push(block);
        }
        let end = cursor.u64()?;
        if total != start.total || end != FLAG_EOS {
            return Err(cursor.malformed("the end of the memory blocks", end));
        }
        let names = blocks.iter().enumerate();
        let main = qemu::main_block(path, names.map(|(n, b)| (n, b.name.as_str(), b.len)))?;
        let main = blocks
            .get(main)
            .ok_or_else(|| cursor.malformed("no block of guest RAM", 0))?;
        Ok(Self {
            ranges: qemu::ranges(path, &start, layout, main.len)?,
            machine: start.machine,
            bitmap_offset: main.bitmap_offset,
            bitmap_len: main.len.div_ceil(TARGET_PAGE).div_ceil(8),
            pages_offset: main.pages_offset,
        })
    }

    fn bitmap(&self, path: &Path, data: GuestBytes<'_>) -> Result<Vec<u8>, DumpError> {
        let len = usize::try_from(self.bitmap_len).unwrap_or(usize::MAX);
        let start = usize::try_from(self.bitmap_offset).unwrap_or(usize::MAX);
        // Inside the file, as `block` has checked: no more memory than the file has bytes.
        let bytes = data
            .get(start, len)
            .ok_or_else(|| DumpError::malformed(path, "a bitmap", self.bitmap_offset, 0))?;
        let mut bitmap = vec![0; len];
        if bytes.copy_to(&mut bitmap) {
            return Ok(bitmap);
        }
        Err(DumpError::malformed(
            path,
            "a bitmap",
            self.bitmap_offset,
            0,
        ))
    }

    /// Where each stretch of the guest's RAM is in the file; what has no bit is not in it.
    pub(crate) fn extents(
        &self,
        path: &Path,
        data: GuestBytes<'_>,
    ) -> Result<Vec<Extent>, DumpError> {
        let bitmap = self.bitmap(path, data)?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut base = 0_u64;
        for range in &self.ranges {
            let mut at = base;
            base = base.saturating_add(range.len());
            while at < base {
                let first = is_set(&bitmap, at / TARGET_PAGE);
                let mut end = at;
                while end < base && is_set(&bitmap, end / TARGET_PAGE) == first {
                    end = end.saturating_add(TARGET_PAGE);
                }
                let end = end.min(base);
                for (guest, from) in qemu::place(&self.ranges, at, end.saturating_sub(at)) {
                    extents.push(Extent {
                        guest,
                        offset: first.then(|| self.pages_offset.saturating_add(from)),
                    });
                }
                at = end;
            }
        }
        extents.sort_by_key(|extent| extent.guest);
        Ok(extents)
    }

    /// The stretches of the file that stand for pages without a bit: offset and length.
    pub(crate) fn holes(&self, bitmap: &[u8]) -> Vec<(u64, u64)> {
        let total = self
            .ranges
            .iter()
            .fold(0_u64, |sum, range| sum.saturating_add(range.len()));
        let mut holes: Vec<(u64, u64)> = Vec::new();
        for page in 0..total / TARGET_PAGE {
            if is_set(bitmap, page) {
                continue;
            }
            let offset = self
                .pages_offset
                .saturating_add(page.saturating_mul(TARGET_PAGE));
            match holes.last_mut() {
                Some((start, len)) if start.saturating_add(*len) == offset => {
                    *len = len.saturating_add(TARGET_PAGE);
                }
                _ => holes.push((offset, TARGET_PAGE)),
            }
        }
        holes
    }

    /// The bitmap without the pages that `plan` drops: where it is in the file, and its bytes.
    pub(crate) fn pruned_bitmap(
        &self,
        path: &Path,
        data: GuestBytes<'_>,
        plan: &PrunePlan,
    ) -> Result<(u64, Vec<u8>), DumpError> {
        let mut bitmap = self.bitmap(path, data)?;
        let mut base = 0_u64;
        for range in &self.ranges {
            for dropped in plan.dropped_in(*range) {
                let inside = dropped.start().offset_from(range.start()).unwrap_or(0);
                let start = base.saturating_add(inside);
                // Only pages that are dropped as a whole.
                let first = start.div_ceil(TARGET_PAGE);
                let end = start.saturating_add(dropped.len()) / TARGET_PAGE;
                for page in first..end {
                    let byte = usize::try_from(page >> 3).unwrap_or(usize::MAX);
                    if let Some(byte) = bitmap.get_mut(byte) {
                        *byte &= !(1_u8 << (page & 7));
                    }
                }
            }
            base = base.saturating_add(range.len());
        }
        Ok((self.bitmap_offset, bitmap))
    }
}

/// Bits count from the lowest of the first byte: words in the order of a little-endian host,
/// which is what all hosts of these guests are.
fn is_set(bitmap: &[u8], page: u64) -> bool {
    usize::try_from(page >> 3)
        .ok()
        .and_then(|byte| bitmap.get(byte))
        .is_some_and(|byte| byte >> (page & 7) & 1 == 1)
}

/// One block's name, length and header; all of it must lie in the file.
fn block(cursor: &mut Cursor<'_>, file_len: u64) -> Result<Block, DumpError> {
    let name = cursor.name()?;
    let len = cursor.u64()?;
    let version = cursor.u32()?;
    if version != HEADER_VERSION {
        return Err(cursor.malformed("the version of a mapped-ram header", version.into()));
    }
    let page_size = cursor.u64()?;
    if page_size != TARGET_PAGE || len % TARGET_PAGE != 0 || len == 0 {
        return Err(cursor.malformed("the page size or length of a memory block", page_size));
    }
    let bitmap_offset = cursor.u64()?;
    let pages_offset = cursor.u64()?;
    let bitmap_len = len.div_ceil(TARGET_PAGE).div_ceil(8);
    let bitmap_end = bitmap_offset.checked_add(bitmap_len);
    if bitmap_offset < cursor.at || bitmap_end.is_none_or(|end| end > pages_offset) {
        return Err(cursor.malformed("the offset of a bitmap", bitmap_offset));
    }
    let end = pages_offset.checked_add(len);
    if end.is_none_or(|end| end > file_len) {
        return Err(cursor.malformed("the offset of a block's pages", pages_offset));
    }
    Ok(Block {
        name,
        len,
        bitmap_offset,
        pages_offset,
    })
}
