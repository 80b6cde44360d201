//! The content of both of QEMU's kinds of migration files, and where it is.

use crate::DumpError;
use crate::backing::scattered::PagePlaces;
use crate::format::qemu::device_state;
use crate::format::qemu::start::{
    self, FLAG_EOS, FLAG_MULTIFD_FLUSH, RamBlock, Start, TARGET_PAGE,
};
use crate::format::qemu::wire::{Cursor, SECTION_END, SECTION_FULL, SECTION_PART};
use sonicshot::{FileBytes, FileOffset, FileRange};
use std::path::Path;

/// The content of both kinds of file.
pub(crate) struct Content<'a> {
    pub start: &'a Start,
    pub blocks: &'a [RamBlock],
    /// The places of the pages of each block.
    pub places: Vec<Places>,
    /// The beginning of the file.
    pub begin: FileOffset,
    /// The sections behind the memory's first part.
    pub between: FileRange,
    /// The beginning of what follows the memory.
    pub end: FileOffset,
}

/// The rest of the section `ram` in a mapped-ram file, which has no pages.
pub(crate) struct RestOfRam {
    /// The end of the sections behind its first part,
    pub between: FileOffset,
    /// and that of all of it.
    pub end: FileOffset,
    /// Whether other sections have parts between its later ones.
    pub mixed: bool,
}

/// Passes over the rest of the section `ram` in a mapped-ram file.
pub(crate) fn rest_of_ram(
    path: &Path,
    data: FileBytes<'_>,
    start: &Start,
    after: FileOffset,
) -> Result<RestOfRam, DumpError> {
    let mut cursor = Cursor::new(path, data, after);
    let mut rest = RestOfRam {
        between: after,
        end: after,
        mixed: false,
    };
    let mut known = start.others_alone();
    let mut first = true;
    // Each turn passes over a section, so that this ends with the file.
    loop {
        let before = known.others.passed;
        start::other_sections(&mut cursor, &mut known)?;
        if first {
            rest.between = cursor.at();
            first = false;
        } else {
            rest.mixed |= known.others.passed != before;
        }
        if !next_part(&mut cursor, path, data, start.ram_section)? {
            rest.end = cursor.at();
            return Ok(rest);
        }
        let is_last = cursor.be::<u8>()? == SECTION_END;
        cursor.section(start.ram_section)?;
        loop {
            match cursor.be::<u64>()? {
                FLAG_EOS => break,
                FLAG_MULTIFD_FLUSH => {}
                other => return Err(cursor.malformed("what follows the memory", other)),
            }
        }
        cursor.footer(start.ram_section)?;
        if is_last {
            rest.end = cursor.at();
            return Ok(rest);
        }
    }
}

/// Whether the next section is a part of the memory. `false` if the memory ends here without a
/// last part: with the capability `background-snapshot` the devices' state follows, which was
/// taken before the memory was written.
///
/// # Errors
/// If it is neither: what other sections may follow, and more memory behind them, is not known.
pub(crate) fn next_part(
    cursor: &mut Cursor<'_>,
    path: &Path,
    data: FileBytes<'_>,
    section: u32,
) -> Result<bool, DumpError> {
    let mut ahead = cursor.clone();
    let kind = ahead.be::<u8>()?;
    match kind {
        SECTION_PART | SECTION_END => {
            ahead.section(section)?;
            Ok(true)
        }
        SECTION_FULL if device_state::is_described(path, data, cursor.at()) => Ok(false),
        _ => Err(cursor.malformed("a section among the memory's", kind.into())),
    }
}

/// The beginning of the devices' state behind the memory's `end`: parts of other sections may come
/// first.
pub(crate) fn behind_others(
    path: &Path,
    data: FileBytes<'_>,
    start: &Start,
    end: FileOffset,
) -> Result<FileOffset, DumpError> {
    let mut cursor = Cursor::new(path, data, end);
    start::other_sections(&mut cursor, &mut start.others_alone())?;
    Ok(cursor.at())
}

/// A refusal to convert a file whose other sections have parts between the memory's: they would be
/// lost.
pub(crate) fn mixed(path: &Path) -> DumpError {
    DumpError::CannotConvert {
        path: path.to_owned(),
        format: "a migration file with other sections between the memory's",
        to: "one of the other kind",
    }
}

/// The places of the pages of a block.
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
