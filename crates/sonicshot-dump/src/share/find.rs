//! The parts of a memory file that are on disks, in pieces that a file system can share.

use super::{ShareOptions, ShareStats};
use crate::backing::plain::PlainDump;
use crate::prune::holes::block_size;
use crate::{DiskImage, DumpError};
use rustix::fs::fstatfs;
use sonicshot::checkpoint::{
    CheckpointError, DiskFinder, DiskGuess, DiskGuesses, DiskHash, DiskOffset, DiskSource,
};
use sonicshot::{
    Disposition, FileOffset, FileRange, Fill, Gpa, GuestMemory, PageMap, PageSize, PrunePlan,
    Tally, WorkOptions,
};
use std::fs::File;
use std::path::Path;

const PAGE: PageSize = PageSize::SIZE_4K;

/// A range of the file, and where an image holds the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub file: FileRange,
    /// The number of the image.
    pub number: usize,
    pub disk: FileRange,
}

/// The pieces that were found.
#[derive(Debug)]
pub(super) struct Found {
    /// Sorted, apart, each on whole blocks of the file system and long enough.
    pub pieces: Vec<Piece>,
    pub stats: ShareStats,
}

impl Found {
    /// Looks for all pages of the file, whatever the guest says of them.
    pub(super) fn new(
        dump: &PlainDump,
        disks: &[DiskImage],
        options: &ShareOptions,
    ) -> Result<Self, DumpError> {
        let guesses = Guessed::of(dump, disks, options)?;
        let block = block_of(dump.file(), dump.path())?.max(PAGE.bytes());
        let mut pieces = Vec::new();
        for guess in guesses.found.runs() {
            places(dump, guess, &mut pieces)?;
        }
        let found = sum(&pieces);
        // Runs of more than 64 bits there are none.
        let shortest = options.min_run.get().checked_mul(PAGE.bytes());
        let pieces: Vec<Piece> = join(pieces)
            .into_iter()
            .filter_map(|piece| whole_blocks(piece, block))
            .filter(|piece| shortest.is_some_and(|shortest| piece.file.len() >= shortest))
            .collect();
        let stats = ShareStats {
            pages: guesses.looked_for,
            found_bytes: found,
            short_bytes: Tally::new(found).without(sum(&pieces)).get(),
            ..ShareStats::default()
        };
        Ok(Self { pieces, stats })
    }
}

/// The pages that the disks were looked through for, and those found.
struct Guessed {
    looked_for: u64,
    found: DiskGuesses,
}

impl Guessed {
    fn of(
        dump: &PlainDump,
        disks: &[DiskImage],
        options: &ShareOptions,
    ) -> Result<Self, DumpError> {
        // Nothing is known of any page, nor need it be: the bytes decide.
        let map = PageMap::new(dump.layout(), PAGE);
        let all = PrunePlan::new(&map, &|_| Disposition::Keep, Fill::Zero);
        let mut known = Vec::new();
        let mut sources: Vec<&dyn DiskSource> = Vec::new();
        for (number, image) in disks.iter().enumerate() {
            known.push(image.info(&number.to_string(), DiskHash::default())?);
            sources.push(image);
        }
        let failed = |error| told(error, dump, disks);
        let mut work = WorkOptions::new();
        work.threads = options.threads;
        work.progress.clone_from(&options.progress);
        let finder = DiskFinder::new(dump, &map, &all, DiskFinder::LIKELY, &work);
        let finder = finder.map_err(failed)?;
        let found = finder.stream(&known, &sources, &work);
        Ok(Self {
            looked_for: finder.pages(),
            found: found.map_err(failed)?,
        })
    }
}

/// The error that names the file which could not be read.
fn told(error: CheckpointError, dump: &PlainDump, disks: &[DiskImage]) -> DumpError {
    match error {
        CheckpointError::Memory(source) => DumpError::Memory { source },
        CheckpointError::DiskIo { name, source, .. } => {
            let image = name
                .parse()
                .ok()
                .and_then(|number: usize| disks.get(number));
            let path = image.map_or(dump.path(), DiskImage::path);
            DumpError::io("reading", path)(source)
        }
        other => DumpError::io("reading", dump.path())(std::io::Error::other(other)),
    }
}

/// The unit that the file system of `file` shares at once, in bytes.
pub(super) fn block_of(file: &File, path: &Path) -> Result<u64, DumpError> {
    let system = fstatfs(file).map_err(|error| DumpError::io("reading", path)(error.into()))?;
    Ok(block_size(&system))
}

/// Adds the places of the frames of a guess in the file and in the image.
fn places(dump: &PlainDump, guess: &DiskGuess, pieces: &mut Vec<Piece>) -> Result<(), DumpError> {
    let wrong = |at: Gpa| {
        let what = "memory beyond 64 bits";
        DumpError::malformed(dump.path(), what, FileOffset::ZERO, at.raw())
    };
    let number = usize::try_from(guess.disk).map_err(|_| wrong(Gpa::ZERO))?;
    for (index, frame) in (0_u64..).zip(guess.frames.iter()) {
        let at = frame.gpa(PAGE).ok_or_else(|| wrong(Gpa::ZERO))?;
        // What is not in the file, or a part of a page alone, is not shared.
        let Some((Some(place), len)) = dump.part(at, PAGE.bytes()) else {
            continue;
        };
        let there = match guess.descending {
            true => guess
                .frames
                .len()
                .checked_sub(index)
                .and_then(|left| left.checked_sub(1)),
            false => Some(index),
        };
        let there = there
            .and_then(|pages| pages.checked_mul(PAGE.bytes()))
            .and_then(|bytes| guess.at.checked_add(bytes))
            .map(DiskOffset::raw)
            .ok_or_else(|| wrong(at))?;
        // The image is its guest's disk, byte for byte.
        let file = FileRange::with_len(place, PAGE.bytes());
        let disk = FileRange::with_len(FileOffset::new(there), PAGE.bytes());
        match (file, disk) {
            (Some(file), Some(disk)) if len == PAGE.bytes() => {
                pieces.push(Piece { file, number, disk });
            }
            _ => {}
        }
    }
    Ok(())
}

fn sum(pieces: &[Piece]) -> u64 {
    let lengths = pieces.iter().map(|piece| piece.file.len());
    lengths.sum::<Tally>().get()
}

/// Sorts pieces, and joins those that follow each other in both files. Of memory that has the same
/// place in the file the first counts.
fn join(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_unstable_by_key(|piece| (piece.file, piece.number, piece.disk));
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if piece.file.start() < last.file.end() => {}
            Some(last)
                if (piece.file.start(), piece.disk.start(), piece.number)
                    == (last.file.end(), last.disk.end(), last.number) =>
            {
                last.file = FileRange::new(last.file.start(), piece.file.end());
                last.disk = FileRange::new(last.disk.start(), piece.disk.end());
            }
            _ => joined.push(piece),
        }
    }
    joined
}

/// The part of a piece that is whole blocks in both files.
fn whole_blocks(piece: Piece, block: u64) -> Option<Piece> {
    let inside = piece.file.start().raw().checked_rem(block)?;
    if piece.disk.start().raw().checked_rem(block)? != inside {
        return None;
    }
    let start = piece.file.start().checked_align_up(block)?;
    let end = piece.file.end().raw();
    let end = FileOffset::new(end.checked_sub(end.checked_rem(block)?)?);
    let file = FileRange::between(start, end).filter(|file| !file.is_empty())?;
    let before = start.offset_from(piece.file.start())?;
    let disk = FileRange::with_len(piece.disk.start().checked_add(before)?, file.len())?;
    Some(Piece {
        file,
        disk,
        ..piece
    })
}

#[cfg(test)]
mod tests {
    use super::{Piece, join, whole_blocks};
    use sonicshot::{FileOffset, FileRange};

    const BLOCK: u64 = 4096;

    /// By blocks: in the file, of which disk, there, how many.
    fn piece((file, number, disk, len): (u64, usize, u64, u64)) -> Piece {
        let range = |at: u64| FileRange::with_len(FileOffset::new(at * BLOCK), len * BLOCK);
        Piece {
            file: range(file).unwrap(),
            number,
            disk: range(disk).unwrap(),
        }
    }

    #[test]
    fn pieces_that_follow_each_other_in_both_files_are_one() {
        for (pieces, want) in [
            (
                &[(4, 0, 9, 1), (5, 0, 10, 1), (3, 0, 8, 1)][..],
                &[(3, 0, 8, 3)][..],
            ),
            (&[(4, 0, 9, 1), (5, 0, 8, 1)], &[(4, 0, 9, 1), (5, 0, 8, 1)]),
            (
                &[(4, 0, 9, 1), (5, 1, 10, 1)],
                &[(4, 0, 9, 1), (5, 1, 10, 1)],
            ),
            (
                &[(4, 0, 9, 1), (6, 0, 10, 1)],
                &[(4, 0, 9, 1), (6, 0, 10, 1)],
            ),
            // The same place of the file twice.
            (
                &[(4, 0, 9, 1), (4, 0, 30, 1), (5, 0, 31, 1)],
                &[(4, 0, 9, 1), (5, 0, 31, 1)],
            ),
        ] {
            let found = join(pieces.iter().copied().map(piece).collect());
            let want: Vec<_> = want.iter().copied().map(piece).collect();
            assert_eq!(found, want, "{pieces:?}");
        }
    }

    #[test]
    fn parts_of_blocks_are_not_shared() {
        // Of larger blocks: those that lie the same way in both.
        for (from, want) in [
            ((4, 0, 8, 4), Some((4, 0, 8, 4))),
            ((5, 0, 9, 9), Some((8, 0, 12, 4))),
            ((5, 0, 8, 9), None),
            ((5, 0, 9, 3), None),
        ] {
            let found = whole_blocks(piece(from), 4 * BLOCK);
            assert_eq!(found, want.map(piece), "{from:?}");
        }
    }
}
