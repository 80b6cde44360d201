//! The same image without the pages that are dropped.

use crate::image::PAGE_DATA;
use crate::page_data::{Entry, PAGE, PageData};
use crate::{Place, Record, Within, XenError, XlImage};
use sonicshot::{FileBytes, FileOffset, FileRange, Pfn, PfnRange, to_u64};

/// [`PAGE`] as a record's length has it.
const PAGE_LEN: u32 = 4096;

/// A part of a pruned image.
#[derive(Debug)]
// Exhaustive: whoever writes the parts must write each.
pub enum Part<'a> {
    /// A range of the input.
    Copy(FileRange),
    /// Other bytes.
    Bytes(&'a [u8]),
}

/// The frames that are dropped of an image: those of a plan that may be. Only `sonicshot-dump`
/// makes one, behind the guards there; by default it is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Sorted, disjoint, with gaps between.
    pub(crate) runs: Vec<PfnRange>,
}

impl Dropped {
    /// The runs of frames, lowest first.
    #[must_use]
    pub fn runs(&self) -> &[PfnRange] {
        &self.runs
    }

    /// The number of frames.
    #[must_use]
    pub fn pages(&self) -> u64 {
        PfnRange::total_of(&self.runs)
    }

    pub(crate) fn contains(&self, pfn: u64) -> bool {
        let pfn = Pfn::new(pfn);
        let above = self.runs.partition_point(|run| run.start() <= pfn);
        let run = above.checked_sub(1).and_then(|index| self.runs.get(index));
        run.is_some_and(|run| pfn < run.end())
    }
}

impl XlImage {
    /// Hands out the image in `data`, from which this was parsed, without the frames in `dropped`:
    /// ranges of the input, and other bytes between. Every copy of a dropped page goes.
    ///
    /// # Errors
    /// What `each` gives; or what `failed` makes of a [`XenError`], if `data` is not what was
    /// parsed.
    pub fn pruned<E>(
        &self,
        data: FileBytes<'_>,
        dropped: &Dropped,
        failed: impl Fn(XenError) -> E,
        mut each: impl FnMut(Part<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut copied = FileOffset::ZERO;
        let mut bytes = Vec::new();
        for record in self.records().iter().filter(|r| r.kind == PAGE_DATA) {
            let pages = self.page_data(data, record).map_err(&failed)?;
            let goes = |entry: &Entry| entry.data.is_some() && dropped.contains(entry.pfn);
            if !pages.entries().any(|entry| goes(&entry)) {
                continue;
            }
            let after = |entry: Entry| {
                if goes(&entry) {
                    entry.without_data()
                } else {
                    entry
                }
            };
            each(Part::Copy(
                between(copied, record.offset, record).map_err(&failed)?,
            ))?;
            bytes.clear();
            rewritten(record, &pages, after, &mut bytes).map_err(&failed)?;
            each(Part::Bytes(&bytes))?;
            // The data of pages that are kept, neighbours as one.
            let mut stretches: Vec<FileRange> = Vec::new();
            for at in pages.entries().filter_map(|entry| after(entry).data) {
                let page = FileRange::with_len(at, PAGE);
                let beyond = || failed(changed(record, at.raw()));
                page.ok_or_else(beyond)?.append_to(&mut stretches);
            }
            stretches
                .into_iter()
                .map(Part::Copy)
                .try_for_each(&mut each)?;
            copied = record.body.end();
        }
        each(Part::Copy(rest(data, copied).map_err(&failed)?))
    }
}

/// The rest of the file from `copied` on.
pub(crate) fn rest(data: FileBytes<'_>, copied: FileOffset) -> Result<FileRange, XenError> {
    let end = FileOffset::new(to_u64(data.len()));
    if end < copied {
        return Err(XenError::Truncated {
            place: Place {
                within: Within::Headers,
                offset: copied,
            },
            wanted: 0,
            left: 0,
        });
    }
    Ok(FileRange::new(copied, end))
}

/// A record of pages up to where their data begins. Entries and pages are multiples of 8 bytes: it
/// needs no padding.
///
/// # Errors
/// [`XenError::Malformed`] if the entries are no longer those that were counted.
pub(crate) fn rewritten(
    record: &Record,
    pages: &PageData,
    after: impl Fn(Entry) -> Entry,
    out: &mut Vec<u8>,
) -> Result<(), XenError> {
    let mut entries = Vec::new();
    let mut count = Some(0_u32);
    let mut len = Some(record.len);
    for entry in pages.entries() {
        let now = after(entry);
        if entry.data.is_some() && now.data.is_none() {
            len = len.and_then(|len| len.checked_sub(PAGE_LEN));
        }
        entries.extend(now.word().to_le_bytes());
        count = count.and_then(|count| count.checked_add(1));
    }
    let len = len.filter(|_| count == Some(pages.count()));
    let len = len.ok_or_else(|| changed(record, pages.count().into()))?;
    out.extend(record.kind.to_le_bytes());
    out.extend(len.to_le_bytes());
    out.extend(pages.head().to_le_bytes());
    out.extend(entries);
    Ok(())
}

fn changed(record: &Record, value: u64) -> XenError {
    XenError::Malformed {
        what: "a record of pages that has changed",
        place: record.place(),
        value,
    }
}

/// The bytes between the end of a record and the next.
pub(crate) fn between(
    from: FileOffset,
    to: FileOffset,
    record: &Record,
) -> Result<FileRange, XenError> {
    if to < from {
        return Err(XenError::Malformed {
            what: "record that overlaps the one before it",
            place: record.place(),
            value: from.raw(),
        });
    }
    Ok(FileRange::new(from, to))
}
