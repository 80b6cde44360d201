//! Writes a dump without its dropped pages, or takes them out of the file itself.

use crate::elf_core::{ElfCore, HEADER_LEN, PT_LOAD, SEGMENT_LEN, Segment};
use crate::mapped::MappedDump;
use crate::output::{Output, Overwrite};
use crate::{Dump, DumpError, Format};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use sonicshot::{Gpa, GpaRange, PrunePlan};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Told how far the work is: bytes done, of how many.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// What a prune did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PruneStats {
    /// Bytes of guest RAM that were dropped.
    pub dropped_bytes: u64,
    /// Bytes that the plan would drop, but the format keeps: what must read as something else
    /// than zero.
    pub kept_for_fill: u64,
    /// Stretches that were dropped, in the file.
    pub runs: u64,
    /// Of those, the ones that really had to be punched; the others were holes already.
    pub punched: u64,
    /// What the input takes on disk, in bytes.
    pub disk_before: u64,
    /// What the output takes on disk, in bytes.
    pub disk_after: u64,
}

/// Longest stretch that is copied at once.
const COPY: u64 = 16 << 20;
/// A core has at most this many segments, so that every reader can count them in 16 bits.
const MAX_SEGMENTS: usize = 0xfffe;

impl Dump {
    /// Writes a dump of the same format to `out` without the pages that `plan` drops.
    ///
    /// A raw file keeps its length; dropped pages are holes and read as zero. An ELF core leaves
    /// them out of its segments' data. The output appears whole or not at all.
    ///
    /// # Errors
    /// [`DumpError::Exists`], [`DumpError::SameFile`], or what writing gives; `out` is then as
    /// it was.
    pub fn prune_to(
        &self,
        plan: &PrunePlan,
        out: &Path,
        overwrite: Overwrite,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        let dump = self.mapped();
        let zeroed = plan.clone().zero_filled_only();
        let mut stats = PruneStats {
            dropped_bytes: zeroed.dropped_bytes(),
            kept_for_fill: plan.dropped_bytes().saturating_sub(zeroed.dropped_bytes()),
            disk_before: disk_usage(dump.file(), dump.path())?,
            ..PruneStats::default()
        };
        let output = Output::create(out, overwrite, dump.file())?;
        match self.format_data() {
            Format::Raw { .. } => stats.runs = copy_raw(dump, &zeroed, &output, progress)?,
            Format::ElfCore(core) => {
                let (runs, dropped) = copy_elf(dump, core, &zeroed, &output, progress)?;
                stats.runs = runs;
                stats.dropped_bytes = dropped;
            }
        }
        stats.disk_after = disk_usage(output.file(), out)?;
        output.finish()?;
        Ok(stats)
    }

    /// Punches the pages that `plan` drops out of the file itself.
    ///
    /// Nothing is copied, and each step only makes pages that `plan` drops read as zero, so
    /// whatever interrupts it leaves a valid dump. What is a hole already is not touched.
    ///
    /// # Errors
    /// [`DumpError::CannotPrune`] for a format that holes do not fit, [`DumpError::NoHoles`] if
    /// the file system cannot punch them; the file is then as it was.
    pub fn prune_in_place(
        &self,
        plan: &PrunePlan,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        let dump = self.mapped();
        let path = dump.path();
        let Format::Raw { .. } = self.format_data() else {
            return Err(DumpError::CannotPrune {
                path: path.into(),
                format: self.format(),
                why: "only raw files can be pruned in place",
            });
        };
        let zeroed = plan.clone().zero_filled_only();
        let mut stats = PruneStats {
            dropped_bytes: zeroed.dropped_bytes(),
            kept_for_fill: plan.dropped_bytes().saturating_sub(zeroed.dropped_bytes()),
            disk_before: disk_usage(dump.file(), path)?,
            ..PruneStats::default()
        };
        let file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(DumpError::io("opening for writing", path))?;
        // The file that was classified, not one that took its name since.
        if identity(&file, path)? != identity(dump.file(), path)? {
            return Err(DumpError::NotADump {
                path: path.into(),
                why: "another file has taken its place since it was read",
            });
        }
        let total = stats.dropped_bytes;
        let mut done = 0_u64;
        // From one snapshot of the file's holes: punching does not change what is behind.
        let data = dump.data_stretches();
        for (offset, len) in file_runs(dump, &zeroed) {
            stats.runs = stats.runs.saturating_add(1);
            if holds_data(data, offset, len) {
                punch(&file, path, offset, len)?;
                stats.punched = stats.punched.saturating_add(1);
            }
            done = done.saturating_add(len);
            progress(done, total);
        }
        if stats.punched > 0 {
            file.sync_all().map_err(DumpError::io("writing", path))?;
        }
        stats.disk_after = disk_usage(&file, path)?;
        Ok(stats)
    }
}

fn identity(file: &File, path: &Path) -> Result<(u64, u64), DumpError> {
    let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
    Ok((metadata.dev(), metadata.ino()))
}

fn disk_usage(file: &File, path: &Path) -> Result<u64, DumpError> {
    let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
    Ok(metadata.blocks().saturating_mul(512))
}

/// The dropped stretches of a raw file: offset and length; neighbours in the file are joined.
fn file_runs(dump: &MappedDump, plan: &PrunePlan) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for extent in dump.extents() {
        let Some(base) = extent.offset else { continue };
        for dropped in plan.dropped_in(extent.guest) {
            let inside = dropped.start().offset_from(extent.guest.start());
            let Some(offset) = inside.and_then(|inside| base.checked_add(inside)) else {
                continue;
            };
            match runs.last_mut() {
                Some((last, len)) if last.checked_add(*len) == Some(offset) => {
                    *len = len.saturating_add(dropped.len());
                }
                _ => runs.push((offset, dropped.len())),
            }
        }
    }
    runs
}

fn holds_data(data: Option<&[(u64, u64)]>, offset: u64, len: u64) -> bool {
    let Some(data) = data else { return true };
    let index = data.partition_point(|(_, end)| *end <= offset);
    data.get(index)
        .is_some_and(|(start, _)| *start < offset.saturating_add(len))
}

fn punch(file: &File, path: &Path, offset: u64, len: u64) -> Result<(), DumpError> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        return match fallocate(file, flags, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(error @ (Errno::OPNOTSUPP | Errno::NOSYS)) => Err(DumpError::NoHoles {
                path: path.into(),
                source: error.into(),
            }),
            Err(error) => Err(DumpError::io("punching a hole into", path)(error.into())),
        };
    }
}

/// Copies the stretch of the input that holds data; holes stay holes.
fn copy(
    dump: &MappedDump,
    output: &Output,
    from: u64,
    to: u64,
    len: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<(), DumpError> {
    let cut = || DumpError::malformed(dump.path(), "a stretch beyond the end", from, len);
    let end = from.checked_add(len).ok_or_else(cut)?;
    let whole = [(from, end)];
    let data = dump.data_stretches().unwrap_or(&whole);
    let first = data.partition_point(|(_, data_end)| *data_end <= from);
    for (start, stop) in data.iter().skip(first) {
        let (mut at, stop) = ((*start).max(from), (*stop).min(end));
        if *start >= end {
            break;
        }
        while let Some(left) = stop.checked_sub(at).filter(|left| *left > 0) {
            let len = left.min(COPY);
            let bytes = dump.file_bytes(at, len).ok_or_else(cut)?;
            let there = at
                .checked_sub(from)
                .and_then(|inside| to.checked_add(inside))
                .ok_or_else(cut)?;
            output
                .file()
                .write_all_at(bytes, there)
                .map_err(DumpError::io("writing", output.path()))?;
            progress(len);
            at = at.saturating_add(len);
        }
    }
    Ok(())
}

fn copy_raw(
    dump: &MappedDump,
    plan: &PrunePlan,
    output: &Output,
    progress: Progress<'_>,
) -> Result<u64, DumpError> {
    let total = dump
        .extents()
        .iter()
        .fold(0_u64, |sum, extent| sum.saturating_add(extent.guest.len()));
    output
        .file()
        .set_len(total)
        .map_err(DumpError::io("writing", output.path()))?;
    let kept_total = total.saturating_sub(plan.dropped_bytes());
    let mut done = 0_u64;
    for extent in dump.extents() {
        let Some(base) = extent.offset else { continue };
        for kept in plan.kept_in(extent.guest) {
            let inside = kept.start().offset_from(extent.guest.start()).unwrap_or(0);
            let offset = base.saturating_add(inside);
            copy(dump, output, offset, offset, kept.len(), &mut |bytes| {
                done = done.saturating_add(bytes);
                progress(done, kept_total);
            })?;
        }
    }
    Ok(file_runs(dump, plan).len() as u64)
}

/// One segment of the output, and where its data is in the input.
struct Piece {
    segment: Segment,
    from: u64,
}

/// Splits a segment at the dropped pages: each piece is data that is kept, followed by memory
/// that has no data and reads as zero (`p_filesz` less than `p_memsz`).
fn split(segment: &Segment, plan: &PrunePlan, pieces: &mut Vec<Piece>) {
    let (Some(guest), Some(filled)) = (
        segment.guest(),
        GpaRange::with_len(Gpa::new(segment.paddr), segment.file_len),
    ) else {
        pieces.push(Piece {
            segment: *segment,
            from: segment.offset,
        });
        return;
    };
    let mut kept: Vec<_> = plan.kept_in(filled).collect();
    // What is dropped at the very start belongs to a piece without data.
    if kept.first().map(GpaRange::start) != Some(guest.start()) {
        kept.insert(0, GpaRange::new(guest.start(), guest.start()));
    }
    for (index, data) in kept.iter().enumerate() {
        let next = kept.get(index.saturating_add(1));
        let end = next.map_or(guest.end(), GpaRange::start);
        let start = data.start();
        let inside = start.offset_from(guest.start()).unwrap_or(0);
        pieces.push(Piece {
            segment: Segment {
                vaddr: segment.vaddr.wrapping_add(inside),
                paddr: start.raw(),
                file_len: data.len(),
                mem_len: end.offset_from(start).unwrap_or(0),
                ..*segment
            },
            from: segment.offset.saturating_add(inside),
        });
    }
}

/// Joins the pieces with the smallest gaps between them until there are few enough. What was
/// dropped in such a gap becomes a hole in the file, which reads as zero too.
fn join_smallest_gaps(pieces: Vec<Piece>) -> Vec<Piece> {
    let excess = pieces.len().saturating_sub(MAX_SEGMENTS);
    if excess == 0 {
        return pieces;
    }
    let gap = |a: &Piece, b: &Piece| -> Option<u64> {
        let is_next = a.segment.kind == PT_LOAD
            && b.segment.kind == PT_LOAD
            && a.segment.paddr.checked_add(a.segment.mem_len) == Some(b.segment.paddr)
            && a.from.checked_add(a.segment.mem_len) == Some(b.from);
        is_next.then(|| a.segment.mem_len.saturating_sub(a.segment.file_len))
    };
    let mut gaps: Vec<u64> = pieces
        .windows(2)
        .filter_map(|pair| match pair {
            [a, b] => gap(a, b),
            _ => None,
        })
        .collect();
    gaps.sort_unstable();
    let limit = gaps
        .get(excess.saturating_sub(1).min(gaps.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0);
    let mut left = excess;
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        if let Some(last) = joined.last_mut()
            && left > 0
            && let Some(gap) = gap(last, &piece)
            && gap <= limit
        {
            last.segment.file_len = last.segment.mem_len.saturating_add(piece.segment.file_len);
            last.segment.mem_len = last.segment.mem_len.saturating_add(piece.segment.mem_len);
            left = left.saturating_sub(1);
            continue;
        }
        joined.push(piece);
    }
    joined
}

/// Writes a core with the kept pages; returns how many stretches and bytes were dropped.
fn copy_elf(
    dump: &MappedDump,
    core: &ElfCore,
    plan: &PrunePlan,
    output: &Output,
    progress: Progress<'_>,
) -> Result<(u64, u64), DumpError> {
    const ALIGN: u64 = 4096;
    let mut pieces = Vec::new();
    let mut dropped = 0_u64;
    let mut runs = 0_u64;
    for segment in &core.segments {
        if let Some(guest) = segment.guest() {
            let filled = GpaRange::with_len(guest.start(), segment.file_len).unwrap_or(guest);
            for run in plan.dropped_in(filled) {
                dropped = dropped.saturating_add(run.len());
                runs = runs.saturating_add(1);
            }
        }
        split(segment, plan, &mut pieces);
    }
    let mut pieces = join_smallest_gaps(pieces);
    if pieces.len() > MAX_SEGMENTS {
        return Err(DumpError::CannotPrune {
            path: dump.path().into(),
            format: "an ELF core",
            why: "it has more segments than e_phnum can count",
        });
    }
    let headers = (pieces.len().saturating_mul(SEGMENT_LEN)).saturating_add(HEADER_LEN) as u64;
    let mut at = headers;
    let mut kept_total = 0_u64;
    for piece in &mut pieces {
        // A page of a mapped file can then be a page of memory.
        if piece.segment.kind == PT_LOAD {
            at = at.next_multiple_of(ALIGN);
        }
        piece.segment.offset = at;
        at = at.saturating_add(piece.segment.file_len);
        kept_total = kept_total.saturating_add(piece.segment.file_len);
    }
    let writing = || DumpError::io("writing", output.path());
    output.file().set_len(at).map_err(writing())?;
    let mut head = elf_header(core.machine, pieces.len());
    for piece in &pieces {
        head.extend(piece.segment.to_bytes());
    }
    output.file().write_all_at(&head, 0).map_err(writing())?;
    let mut done = 0_u64;
    for piece in &pieces {
        let mut count = |bytes| {
            done = done.saturating_add(bytes);
            progress(done, kept_total);
        };
        let to = piece.segment.offset;
        let filled = GpaRange::with_len(Gpa::new(piece.segment.paddr), piece.segment.file_len);
        let Some(filled) = filled.filter(|_| piece.segment.guest().is_some()) else {
            copy(
                dump,
                output,
                piece.from,
                to,
                piece.segment.file_len,
                &mut count,
            )?;
            continue;
        };
        // Where pieces were joined, dropped pages lie inside: they are passed over.
        for kept in plan.kept_in(filled) {
            let inside = kept.start().offset_from(filled.start()).unwrap_or(0);
            let (from, to) = (piece.from.saturating_add(inside), to.saturating_add(inside));
            copy(dump, output, from, to, kept.len(), &mut count)?;
        }
    }
    Ok((runs, dropped))
}

/// The header of a core with `count` program headers right behind it.
fn elf_header(machine: u16, count: usize) -> Vec<u8> {
    let mut head = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    head.resize(16, 0);
    head.extend(4_u16.to_le_bytes()); // ET_CORE
    head.extend(machine.to_le_bytes());
    head.extend(1_u32.to_le_bytes()); // EV_CURRENT
    head.extend(0_u64.to_le_bytes()); // e_entry
    head.extend((HEADER_LEN as u64).to_le_bytes()); // e_phoff
    head.extend(0_u64.to_le_bytes()); // e_shoff
    head.extend(0_u32.to_le_bytes()); // e_flags
    for word in [HEADER_LEN, SEGMENT_LEN, count, 0, 0, 0] {
        head.extend(u16::try_from(word).unwrap_or(0).to_le_bytes());
    }
    head
}
