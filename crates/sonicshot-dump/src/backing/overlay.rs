//! A sparse file of changes over the file that they were made to: a Firecracker diff snapshot
//! and its base.
//!
//! Firecracker makes the diff as long as guest RAM and writes only the pages that changed since
//! the last snapshot; where the diff has a hole, the guest has what the base has
//! (`docs/snapshotting/snapshot-support.md`; `snapshot-editor edit-memory rebase` copies what
//! `SEEK_DATA` finds in the diff over the base). So a hole in a diff does not read as zero, and
//! a page may be punched out of it only where the base reads as zero. Whatever loses or makes
//! holes on the way changes what such a diff means, for Firecracker as for this: a plain `cp`
//! (coreutils 9.1) makes holes of zeroes in a sparse file, and so does a file system that
//! compresses them away. `cp --reflink=always` and `mv` are safe.
//!
//! A base may be pruned although there are diffs to it: what was free then and is not in the
//! diff was not written to since.

use crate::DumpError;
use crate::backing::Stored;
use crate::backing::plain::PlainDump;
use sonicshot::{
    FileId, FileOffset, FileRange, Gpa, GpaRange, GuestMemory, Mapped, MemoryError, RamLayout,
    Tally, to_u64, to_usize,
};
use std::fs::File;

/// The bytes of the base that are looked at in one step for being zero: a hole is no use to the guest
/// in smaller parts.
const PAGE: u64 = 4096;

/// A diff over its base, both raw files of the same length in the same layout.
#[derive(Debug)]
pub(crate) struct Overlay {
    diff: PlainDump,
    base: PlainDump,
    /// All of the layout, sorted, without gaps inside a region.
    pieces: Vec<Piece>,
}

/// A range of guest RAM that one of the files holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub guest: GpaRange,
    pub in_diff: bool,
}

fn same_file(a: &PlainDump, b: &PlainDump) -> Result<bool, DumpError> {
    let identity = |dump: &PlainDump| {
        let id = FileId::of(dump.file());
        id.map_err(DumpError::io("reading", dump.path()))
    };
    Ok(identity(a)? == identity(b)?)
}

/// Splits guest RAM at the ends of the diff's data; `None` if those are not known.
fn pieces(diff: &PlainDump) -> Option<Vec<Piece>> {
    let data = diff.data_extents()?;
    let mut pieces = Vec::new();
    for extent in diff.extents() {
        let here = extent.file()?;
        let guest = |at: FileOffset| {
            let inside = at.offset_from(here.start())?;
            extent.guest.start().checked_add(inside)
        };
        let mut push = |start: FileOffset, end: FileOffset, in_diff| {
            if start < end {
                let guest = GpaRange::new(guest(start)?, guest(end)?);
                pieces.push(Piece { guest, in_diff });
            }
            Some(())
        };
        let mut at = here.start();
        for data in inside(data, here) {
            push(at, data.start(), false)?;
            push(data.start(), data.end(), true)?;
            at = data.end();
        }
        push(at, here.end(), false)?;
    }
    Some(pieces)
}

/// The parts of the ranges `data`, which are sorted, that lie in `range`.
fn inside(data: &[FileRange], range: FileRange) -> impl Iterator<Item = FileRange> + '_ {
    let first = data.partition_point(|data| data.end() <= range.start());
    let parts = data.iter().skip(first);
    parts
        .map(move |data| data.intersection(&range))
        .take_while(|part| !part.is_empty())
}

impl Overlay {
    /// `diff` over `base`; `refuse` says why they cannot belong together.
    pub(crate) fn new(
        diff: PlainDump,
        base: PlainDump,
        refuse: impl Fn(&'static str) -> DumpError,
    ) -> Result<Self, DumpError> {
        if diff.file_len() != base.file_len() {
            return Err(refuse("their lengths differ"));
        }
        if same_file(&diff, &base)? {
            return Err(refuse("they are the same file"));
        }
        let pieces = pieces(&diff)
            .ok_or_else(|| refuse("the file system does not tell where the diff has holes"))?;
        Ok(Self { diff, base, pieces })
    }

    pub(crate) fn diff(&self) -> &PlainDump {
        &self.diff
    }

    pub(crate) fn base(&self) -> &PlainDump {
        &self.base
    }

    pub(crate) fn source(&self, in_diff: bool) -> &PlainDump {
        if in_diff { &self.diff } else { &self.base }
    }

    /// The parts of the pieces that lie in `range`.
    pub(crate) fn parts(&self, range: GpaRange) -> impl Iterator<Item = Piece> + '_ {
        let first = self
            .pieces
            .partition_point(|piece| piece.guest.end() <= range.start());
        let parts = self.pieces.iter().skip(first).map(move |piece| Piece {
            guest: piece.guest.intersection(&range),
            in_diff: piece.in_diff,
        });
        parts.take_while(|part| !part.guest.is_empty())
    }

    /// Of the ranges `runs` of the diff, those that it has and that read as zero in the base;
    /// and how many bytes it has that do not.
    pub(crate) fn punchable(&self, runs: &[FileRange]) -> (Vec<FileRange>, u64) {
        let whole = [self.diff.file_range()];
        let data = self.diff.data_extents().unwrap_or(&whole);
        let (mut found, mut kept): (Vec<FileRange>, _) = (Vec::new(), Tally::ZERO);
        for run in runs {
            for data in inside(data, *run) {
                let mut at = data.start();
                while at < data.end() {
                    // Up to the end of the page, so that all later steps are whole pages.
                    let next = at.checked_add(1).and_then(|at| at.checked_align_up(PAGE));
                    let next = next.map_or(data.end(), |next| next.min(data.end()));
                    let part = FileRange::new(at, next);
                    if !self.base_is_zero(part) {
                        kept.add(part.len());
                    } else {
                        match found.last_mut() {
                            Some(last) if last.end() == at => {
                                *last = FileRange::new(last.start(), next);
                            }
                            _ => found.push(part),
                        }
                    }
                    at = next;
                }
            }
        }
        (found, kept.get())
    }

    fn base_is_zero(&self, range: FileRange) -> bool {
        if let Some(data) = self.base.data_extents()
            && inside(data, range).next().is_none()
        {
            return true;
        }
        let bytes = self.base.bytes_in(range);
        bytes.is_some_and(|bytes| bytes.is_zero())
    }

    /// Refuses files that have become shorter or longer since they were opened, and a base that
    /// was written to: what was zero in it may not be.
    pub(crate) fn check_base(&self) -> Result<(), DumpError> {
        self.diff.check_length()?;
        self.base.check_unchanged()
    }

    /// Refuses files that were changed since they were opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), DumpError> {
        self.diff.check_unchanged()?;
        self.base.check_unchanged()
    }
}

impl Stored for Overlay {
    fn file(&self) -> &File {
        self.diff().file()
    }

    fn check_unchanged(&self) -> Result<(), DumpError> {
        self.check_unchanged()
    }
}

impl GuestMemory for Overlay {
    fn layout(&self) -> &RamLayout {
        self.diff.layout()
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::of_request(at, buf.len());
        if range.len() != to_u64(buf.len()) || !self.layout().contains(at, range.len()) {
            return Err(MemoryError::NotRam { range });
        }
        let mut rest = buf;
        for part in self.parts(range) {
            let len = to_usize(part.guest.len());
            // The parts tile the range, so this cannot fail.
            let Some((now, later)) = rest.split_at_mut_checked(len) else {
                return Err(MemoryError::NotRam { range });
            };
            self.source(part.in_diff).read(part.guest.start(), now)?;
            rest = later;
        }
        if rest.is_empty() {
            return Ok(());
        }
        Err(MemoryError::NotRam { range })
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let range = GpaRange::of_request(at, len);
        match self.parts(range).next() {
            Some(part) if part.guest == range => self.source(part.in_diff).map(at, len),
            // A range across pieces.
            Some(_) if self.layout().contains(at, to_u64(len)) => Ok(None),
            _ => Err(MemoryError::NotRam { range }),
        }
    }

    fn next_data(&self, at: Gpa) -> Option<GpaRange> {
        let region = *self.layout().region_of(at)?;
        for part in self.parts(GpaRange::new(at, region.end())) {
            if part.in_diff {
                return Some(part.guest);
            }
            let data = self.base.next_data(part.guest.start());
            let data = data.map(|data| data.intersection(&part.guest));
            if let Some(data) = data.filter(|data| !data.is_empty()) {
                return Some(data);
            }
        }
        None
    }

    fn release(&self, range: GpaRange) {
        for part in self.parts(range) {
            self.source(part.in_diff).release(part.guest);
        }
    }

    fn prefers_read(&self) -> bool {
        true
    }
}
