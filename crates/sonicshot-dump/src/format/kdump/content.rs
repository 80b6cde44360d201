//! The bytes of a kdump-compressed file, flattened or not.
//!
//! A *flattened* file, as written to a pipe, is a list of pieces, each with the place it has in
//! the file proper. It is read in place, by an index of the pieces.

use crate::DumpError;
use crate::limit::allowed_for;
use sonicshot::{
    Bytes, FileContent, FileOffset, FileRange, PhaseProgress, Progress, WorkPhase, to_u64,
};
use std::collections::BinaryHeap;
use std::path::Path;

const FLAT_SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";
/// A flattened file's own header.
const FLAT_HEADER_LEN: FileOffset = FileOffset::new(4096);
/// The offset of the field with the kind of the file.
const FLAT_KIND: FileOffset = FileOffset::new(16);

/// A flattened file may have so many pieces, and one more for each [`PIECE_LEN`] bytes.
const SMALL_PIECES: u64 = 1 << 20;
const PIECE_LEN: u64 = 256;

/// The bytes of the file proper, which in a flattened file are in pieces.
pub(super) struct Content {
    pub(super) file: FileContent,
    /// Sorted by `to`, disjoint.
    pieces: Option<Vec<Piece>>,
    /// It is flattened, and its end mark is missing.
    pub(super) is_cut: bool,
}

/// A piece of a flattened file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Its range in the file proper.
    to: FileRange,
    /// Its offset in the flattened file.
    from: FileOffset,
}

impl Content {
    pub(super) fn new(
        path: &Path,
        file: FileContent,
        progress: &dyn Progress,
    ) -> Result<Self, DumpError> {
        let mut content = Self {
            file,
            pieces: None,
            is_cut: false,
        };
        let mut signature = [0; 16];
        if content.read(FileOffset::ZERO, &mut signature) && signature == *FLAT_SIGNATURE {
            let (pieces, is_cut) = content.find_pieces(path, progress)?;
            content.pieces = Some(pieces);
            content.is_cut = is_cut;
        }
        Ok(content)
    }

    /// Whether the file is flattened.
    pub(super) fn is_flattened(&self) -> bool {
        self.pieces.is_some()
    }

    /// The end of the file proper.
    pub(super) fn end(&self) -> FileOffset {
        match &self.pieces {
            Some(pieces) => pieces.last().map_or(FileOffset::ZERO, |last| last.to.end()),
            None => FileOffset::new(self.stored_len()),
        }
    }

    /// The length of the file on disk.
    pub(super) fn stored_len(&self) -> u64 {
        self.file.len()
    }

    fn read_stored(&self, at: FileOffset, out: &mut [u8]) -> bool {
        let end = at.checked_add(to_u64(out.len()));
        end.is_some_and(|end| end.raw() <= self.stored_len()) && self.file.read_at(out, at).is_ok()
    }

    /// Fills `out` with the bytes from `at` on; what is in no piece is zero. `false` if they are
    /// not all inside.
    pub(super) fn read(&self, at: FileOffset, out: &mut [u8]) -> bool {
        let Some(pieces) = &self.pieces else {
            return self.read_stored(at, out);
        };
        self.read_pieces(pieces, at, out).is_some()
    }

    fn read_pieces(&self, pieces: &[Piece], at: FileOffset, out: &mut [u8]) -> Option<()> {
        let end = at.checked_add(to_u64(out.len()))?;
        (end <= self.end()).then_some(())?;
        let mut at = at;
        let mut rest = out;
        let mut next = pieces.partition_point(|piece| piece.to.end() <= at);
        while !rest.is_empty() {
            let piece = pieces.get(next)?;
            // Behind the beginning of the piece, or in the gap before it.
            let inside = at.offset_from(piece.to.start());
            let until = inside.map_or(piece.to.start(), |_| piece.to.end());
            let part = FileRange::new(at, until.min(end));
            let (now, later) = rest.split_at_mut_checked(usize::try_from(part.len()).ok()?)?;
            if let Some(inside) = inside {
                let from = piece.from.checked_add(inside)?;
                self.read_stored(from, now).then_some(())?;
                next = next.checked_add(1)?;
            } else {
                now.fill(0);
            }
            at = part.end();
            rest = later;
        }
        Some(())
    }

    /// A copy of `len` bytes; the caller bounds `len`.
    pub(super) fn copy(&self, at: FileOffset, len: u64) -> Option<Vec<u8>> {
        if at.checked_add(len)? > self.end() {
            return None;
        }
        let mut copy = vec![0; usize::try_from(len).ok()?];
        self.read(at, &mut copy).then_some(copy)
    }

    /// Walks the records of a flattened file: big-endian offset and length, then the bytes. Tells
    /// too whether it ends before its end mark; what is there of the last record counts.
    fn find_pieces(
        &self,
        path: &Path,
        progress: &dyn Progress,
    ) -> Result<(Vec<Piece>, bool), DumpError> {
        let bad = |what, offset, value| DumpError::malformed(path, what, offset, value);
        let file_len = self.stored_len();
        let pair = |at| {
            let mut raw = [0; 16];
            self.read_stored(at, &mut raw).then_some(())?;
            let raw = raw.as_slice();
            raw.be_at::<u64>(0).zip(raw.be_at::<u64>(8))
        };
        let kind = pair(FLAT_KIND);
        if kind != Some((1, 1)) {
            let kind = kind.map_or(file_len, |(kind, _)| kind);
            return Err(bad("an unknown flattened format", FLAT_KIND, kind));
        }
        let limit = allowed_for(file_len / PIECE_LEN, SMALL_PIECES);
        let mut pieces = Vec::new();
        let mut at = FLAT_HEADER_LEN;
        let mut is_cut = false;
        let mut phase = PhaseProgress::begin(progress, WorkPhase::Opening, file_len);
        while !is_cut {
            let Some((to, len)) = pair(at) else {
                is_cut = true;
                break;
            };
            if (to, len) == (u64::MAX, u64::MAX) {
                break;
            }
            let from = at.checked_add(16);
            let piece = from.and_then(|from| FileRange::with_len(from, len));
            let piece = piece.ok_or_else(|| bad("a piece of an invalid length", at, len))?;
            // These are signed numbers.
            FileRange::with_len(FileOffset::new(to), len)
                .filter(|to| i64::try_from(to.end().raw()).is_ok())
                .ok_or_else(|| bad("a piece at an invalid offset", at, to))?;
            is_cut = piece.end().raw() > file_len;
            let piece = FileRange::new(piece.start(), piece.end().min(FileOffset::new(file_len)));
            let to = FileRange::with_len(FileOffset::new(to), piece.len());
            let to = to.ok_or_else(|| bad("a piece of an invalid length", at, len))?;
            if !to.is_empty() {
                let from = piece.start();
                pieces.push(Piece { to, from });
            }
            if to_u64(pieces.len()) > limit {
                return Err(bad("too many small pieces", at, to_u64(pieces.len())));
            }
            at = piece.end();
            phase.reach(at.raw());
        }
        phase.end();
        Ok((without_overlaps(pieces), is_cut))
    }
}

/// Sorts `pieces`; where some overlap, the last one counts, as if each were written in turn.
fn without_overlaps(mut pieces: Vec<Piece>) -> Vec<Piece> {
    // Where a piece lies in the flattened file tells which was first.
    pieces.sort_unstable_by_key(|piece| (piece.to.start(), piece.from));
    if pieces.is_sorted_by(|a, b| a.to.end() <= b.to.start()) {
        return pieces;
    }
    let mut edges: Vec<FileOffset> = pieces
        .iter()
        .flat_map(|piece| [piece.to.start(), piece.to.end()])
        .collect();
    edges.sort_unstable();
    edges.dedup();
    // Between two edges nothing begins or ends: all of it is of the last piece that covers it.
    let mut open: BinaryHeap<(FileOffset, FileRange)> = BinaryHeap::new();
    let mut coming = pieces.iter().peekable();
    let mut out: Vec<Piece> = Vec::new();
    for (start, end) in edges.iter().zip(edges.iter().skip(1)) {
        while let Some(piece) = coming.next_if(|piece| piece.to.start() <= *start) {
            open.push((piece.from, piece.to));
        }
        while open.peek().is_some_and(|(_, to)| to.end() <= *start) {
            open.pop();
        }
        let Some(from) = open.peek().and_then(|(from, to)| {
            // The piece lies in the file, and so does this part of it.
            from.checked_add(start.offset_from(to.start())?)
        }) else {
            continue;
        };
        let to = FileRange::new(*start, *end);
        match out.last_mut() {
            Some(last)
                if last.to.end() == *start
                    && last.from.checked_add(last.to.len()) == Some(from) =>
            {
                last.to = FileRange::new(last.to.start(), *end);
            }
            _ => out.push(Piece { to, from }),
        }
    }
    out
}
