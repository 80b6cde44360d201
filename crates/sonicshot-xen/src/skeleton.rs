//! An image without the content of its pages, and the image again with content put in.
//!
//! In a skeleton each record of pages ends behind its entries; its stated length counts the data
//! that is left out, so that an image is the skeleton with the data put in where it is missing.

use crate::cursor::Cursor;
use crate::frames::Frame;
use crate::image::{PAGE_DATA, Pages};
use crate::page_data::Entry;
use crate::prune::{between, rest, rewritten};
use crate::{Dropped, FrameType, Place, Record, Within, XenError, XlImage};
use sonicshot::{Bytes, FileBytes, FileOffset, FileRange, Pfn, PfnRange, to_u64};

/// A part of an image that is put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
// Exhaustive: whoever writes the parts must write each.
pub enum Joined {
    /// A range of the skeleton.
    Skeleton(FileRange),
    /// The content of some pages.
    Pages {
        /// The frames, in this order.
        frames: PfnRange,
        /// Whether they are page tables of a PV guest.
        tables: bool,
    },
}

/// The parts of an image beside the content of its pages: its headers, its records, and of each
/// page what it is.
///
/// ```
/// use sonicshot::FileBytes;
/// use sonicshot_xen::{Skeleton, XenError};
/// let cut = FileBytes::from_slice(b"Xen saved domain");
/// assert!(matches!(Skeleton::parse(cut), Err(XenError::Truncated { .. })));
/// ```
#[derive(Debug)]
pub struct Skeleton(XlImage);

impl XlImage {
    /// The skeleton of the image in `data`, from which this was parsed, without the frames in
    /// `dropped`. Of a page that comes several times only the last copy is to have content: the
    /// others are named without it, and a restore has the same in the end.
    ///
    /// # Errors
    /// [`XenError`], if `data` is not what was parsed.
    pub fn skeleton(&self, data: FileBytes<'_>, dropped: &Dropped) -> Result<Vec<u8>, XenError> {
        let mut out = Vec::new();
        let mut copied = FileOffset::ZERO;
        for record in self.records().iter().filter(|r| r.kind == PAGE_DATA) {
            let pages = self.page_data(data, record)?;
            let after = |entry: Entry| {
                if entry.data.is_some() && (dropped.contains(entry.pfn) || !self.is_last(&entry)) {
                    entry.without_data()
                } else {
                    entry
                }
            };
            append(data, between(copied, record.offset, record)?, &mut out)?;
            rewritten(record, &pages, after, &mut out)?;
            copied = record.body.end();
        }
        append(data, rest(data, copied)?, &mut out)?;
        Ok(out)
    }

    /// Whether the content of this entry is the one that counts.
    fn is_last(&self, entry: &Entry) -> bool {
        let pfn = Pfn::new(entry.pfn);
        let found = self.frames().binary_search_by_key(&pfn, Frame::pfn);
        let frame = found.ok().and_then(|index| self.frames().get(index));
        frame.is_some_and(|frame| frame.data() == entry.data)
    }
}

fn append(data: FileBytes<'_>, from: FileRange, out: &mut Vec<u8>) -> Result<(), XenError> {
    let mut cursor = Cursor::at(data, Within::Headers, from.start());
    let cut = cursor.place(from.start());
    let part = cursor.take(from.len())?;
    let bytes = part.copied().ok_or(XenError::Truncated {
        place: cut,
        wanted: to_u64(part.len()),
        left: 0,
    })?;
    out.extend(bytes);
    Ok(())
}

impl Skeleton {
    /// Reads the skeleton in `data`. An image made of it is never larger than it and the guest's
    /// memory together.
    ///
    /// # Errors
    /// [`XenError`] if it is none, contradicts itself or is of an unsupported kind.
    pub fn parse(data: FileBytes<'_>) -> Result<Self, XenError> {
        let this = Self(XlImage::read(data, Pages::LeftOut, &None)?);
        this.check_contents(data)?;
        Ok(this)
    }

    /// Refuses a second content of the same page: a small skeleton could ask for it without end.
    fn check_contents(&self, data: FileBytes<'_>) -> Result<(), XenError> {
        let frames = self.0.frames();
        let mut seen = vec![false; frames.len()];
        for record in self.page_records() {
            let pages = self.0.page_data(data, record)?;
            for entry in pages.entries().filter(|entry| entry.data.is_some()) {
                let pfn = Pfn::new(entry.pfn);
                let found = frames.binary_search_by_key(&pfn, Frame::pfn).ok();
                let seen = found.and_then(|index| seen.get_mut(index));
                if seen.is_some_and(|seen| core::mem::replace(seen, true)) {
                    return Err(XenError::Malformed {
                        what: "a second content of a page",
                        place: Place {
                            within: Within::Record(record.number),
                            offset: entry.at,
                        },
                        value: entry.pfn,
                    });
                }
            }
        }
        Ok(())
    }

    /// The records of pages.
    fn page_records(&self) -> impl Iterator<Item = &Record> {
        let records = self.0.records().iter();
        records.filter(|record| record.kind == PAGE_DATA)
    }

    /// The frames that the guest has after a restore, lowest first, each once; and whether the
    /// image is to have content for it.
    pub fn frames(&self) -> impl Iterator<Item = (Pfn, bool)> + '_ {
        let frames = self.0.frames().iter();
        frames.map(|frame| (frame.pfn(), frame.data().is_some()))
    }

    /// Hands out the image piece by piece: ranges of the skeleton in `data`, from which this was
    /// parsed, and between them the pages whose content is to be put in.
    ///
    /// # Errors
    /// What `each` gives; or what `failed` makes of a [`XenError`], if `data` is not what was
    /// parsed.
    pub fn joined<E>(
        &self,
        data: FileBytes<'_>,
        failed: impl Fn(XenError) -> E,
        mut each: impl FnMut(Joined) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut copied = FileOffset::ZERO;
        for record in self.page_records() {
            let end = record.body.end();
            each(Joined::Skeleton(
                between(copied, end, record).map_err(&failed)?,
            ))?;
            copied = end;
            let pages = self.0.page_data(data, record).map_err(&failed)?;
            let mut run: Option<(PfnRange, bool)> = None;
            for entry in pages.entries().filter(|entry| entry.data.is_some()) {
                let tables = matches!(entry.kind, FrameType::Table { .. });
                let Some(one) = PfnRange::with_len(Pfn::new(entry.pfn), 1) else {
                    continue;
                };
                match &mut run {
                    Some((frames, of)) if *of == tables && frames.end() == one.start() => {
                        *frames = PfnRange::new(frames.start(), one.end());
                    }
                    _ => {
                        if let Some((frames, tables)) = run.replace((one, tables)) {
                            each(Joined::Pages { frames, tables })?;
                        }
                    }
                }
            }
            if let Some((frames, tables)) = run {
                each(Joined::Pages { frames, tables })?;
            }
        }
        each(Joined::Skeleton(rest(data, copied).map_err(&failed)?))
    }
}
