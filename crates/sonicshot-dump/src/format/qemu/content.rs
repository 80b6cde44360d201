//! What both of QEMU's kinds of migration files hold, and where.

use crate::DumpError;
use crate::backing::scattered::PagePlaces;
use crate::format::qemu::start::{
    self, Cursor, FLAG_EOS, FLAG_MULTIFD_FLUSH, RamBlock, SECTION_END, SECTION_PART, Start,
    TARGET_PAGE,
};
use sonicshot::{FileBytes, FileOffset, FileRange};
use std::path::Path;

/// What both kinds of file hold.
pub(crate) struct Content<'a> {
    pub start: &'a Start,
    pub blocks: &'a [RamBlock],
    /// Where the pages of each block are.
    pub places: Vec<Places>,
    /// Where the file begins.
    pub begin: FileOffset,
    /// The sections behind the memory's first part.
    pub between: FileRange,
    /// Where what follows the memory begins.
    pub end: FileOffset,
}

/// Passes over the rest of the section `ram` in a mapped-ram file, which has no pages: returns
/// where the sections between its parts are, and where all of it ends.
pub(crate) fn rest_of_ram(
    path: &Path,
    data: FileBytes<'_>,
    start: &Start,
    after: FileOffset,
) -> Result<(FileRange, FileOffset), DumpError> {
    let mut cursor = Cursor::new(path, data, after);
    let mut between = None;
    // Each turn passes over a section, so that this ends with the file.
    loop {
        start::pass_sections(&mut cursor)?;
        let between = *between.get_or_insert(FileRange::new(after, cursor.at()));
        let kind = cursor.be::<u8>()?;
        if kind != SECTION_PART && kind != SECTION_END {
            return Err(cursor.malformed("a section among the memory's", kind.into()));
        }
        cursor.section(start.ram_section)?;
        loop {
            match cursor.be::<u64>()? {
                FLAG_EOS => break,
                FLAG_MULTIFD_FLUSH => {}
                other => return Err(cursor.malformed("what follows the memory", other)),
            }
        }
        cursor.footer(start.ram_section)?;
        if kind == SECTION_END {
            return Ok((between, cursor.at()));
        }
    }
}

/// Where each page of a block is.
pub(crate) enum Places {
    /// Each for itself.
    Listed(PagePlaces),
    /// One behind the other, those with a bit.
    InOrder { bitmap: Vec<u8>, pages: FileRange },
}

impl Places {
    /// The place of each page; `None` where it is zero.
    pub(crate) fn iter(&self) -> Box<dyn Iterator<Item = Option<FileOffset>> + '_> {
        match self {
            Self::Listed(places) => Box::new(places.iter()),
            Self::InOrder { bitmap, pages } => {
                let pages = (0_u64..).zip(pages.pieces(TARGET_PAGE));
                Box::new(pages.map(|(page, place)| is_set(bitmap, page).then_some(place.start())))
            }
        }
    }

    /// A bit for each page that is not zero, as a mapped-ram file has them.
    pub(crate) fn bitmap(&self) -> Vec<u8> {
        let places = match self {
            Self::Listed(places) => places,
            Self::InOrder { bitmap, .. } => return bitmap.clone(),
        };
        let mut bitmap = Vec::new();
        for (page, place) in (0_u32..8).cycle().zip(places.iter()) {
            if page == 0 {
                bitmap.push(0_u8);
            }
            if let Some(byte) = bitmap.last_mut() {
                *byte |= u8::from(place.is_some()) << page;
            }
        }
        bitmap
    }
}

/// Bits count from the lowest of the first byte: words in the order of a little-endian host,
/// which is what all hosts of these guests are.
pub(crate) fn is_set(bitmap: &[u8], page: u64) -> bool {
    usize::try_from(page >> 3)
        .ok()
        .and_then(|byte| bitmap.get(byte))
        .is_some_and(|byte| byte >> (page & 7) & 1 == 1)
}
