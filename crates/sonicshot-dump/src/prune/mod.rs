//! Writes a dump without its dropped pages.

pub(crate) mod copy;
pub(crate) mod holes;
pub(crate) mod in_place;
pub(crate) mod stream;

use crate::backing::mapped::MappedDump;
use crate::format::elf_core::{self, ElfCore, HEADER_LEN, PT_LOAD, SEGMENT_LEN, Segment};
use crate::format::kdump::write::{KdumpCompression, KdumpOptions, write_kdump};
use crate::format::qemu::mapped_ram::MappedRam;
use crate::format::xen;
use crate::output::{Output, Overwrite, Target};
use crate::prune::copy::Copier;
use crate::prune::stream::{Rewritten, copy_stream};
use crate::{Dump, DumpError, Format};
use sonicshot::{Gpa, GpaRange, PrunePlan};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

pub(crate) use sonicshot::Progress;

/// What a prune did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PruneStats {
    /// Bytes of guest RAM that were dropped.
    pub dropped_bytes: u64,
    /// Bytes that the plan would drop, but the format keeps, for they would not read as the guest
    /// expects after a restore ([`Dump::restores`]).
    pub kept_for_fill: u64,
    /// Bytes that the plan would drop, but a diff keeps: without them the guest would have what
    /// the base has there, which is not zero.
    pub kept_for_base: u64,
    /// Stretches that were dropped, in the file.
    pub runs: u64,
    /// Of those, the ones that really had to be punched; the others were holes already.
    pub punched: u64,
    /// Stretches of an ELF core that were dropped as a hole in the file, because it would have
    /// more segments than 16 bits count.
    pub joined: u64,
    /// Bytes that were dropped and are in the file all the same: in stretches too short for a
    /// hole, or in parts of blocks.
    pub left_bytes: u64,
    /// Stretches that were too short for a hole.
    pub left_runs: u64,
    /// Bytes that the output shares with the input.
    pub cloned_bytes: u64,
    /// Stretches of data in the input file, if that is cheap to count.
    pub extents_before: Option<u64>,
    /// Stretches of data in the output file, the same.
    pub extents_after: Option<u64>,
    /// What the input takes on disk, in bytes.
    pub disk_before: u64,
    /// What the output takes on disk, in bytes.
    pub disk_after: u64,
}

impl PruneStats {
    /// What dropping `goes` of `plan` comes to, before it is done.
    pub(crate) fn of(plan: &PrunePlan, goes: &PrunePlan) -> Self {
        Self {
            dropped_bytes: goes.dropped_bytes(),
            kept_for_fill: plan.dropped_bytes().saturating_sub(goes.dropped_bytes()),
            runs: goes.runs().len() as u64,
            ..Self::default()
        }
    }
}

/// A core has at most this many segments, so that every reader can count them in 16 bits.
const MAX_SEGMENTS: usize = 0xfffe;

impl Dump {
    /// Writes a dump of the same format to `out` without the pages that `plan` drops.
    ///
    /// A raw file keeps its length; dropped pages are holes and read as zero. An ELF core leaves
    /// them out of its segments' data. What the format cannot [restore](Self::restores) as the guest
    /// expects it is kept. The output appears whole or not at all.
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
        self.prune_at(plan, Target::new(out, overwrite), progress)
    }

    pub(crate) fn prune_at(
        &self,
        plan: &PrunePlan,
        out: Target<'_>,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        if let Some(overlay) = self.overlay() {
            return overlay.prune_to(plan, out, progress);
        }
        if self.is_compressed() {
            return self.prune_compressed(plan, out, progress);
        }
        let Some(dump) = self.mapped() else {
            return self.prune_kdump(plan, out, progress);
        };
        dump.check_length()?;
        let goes = self.restorable(plan);
        let mut stats = PruneStats::of(plan, &goes);
        stats.disk_before = disk_usage(dump.file(), dump.path())?;
        let output = Output::create(out, &self.files())?;
        match self.format_data() {
            Format::Raw { .. } => copy_raw(dump, &goes, &output, &mut stats, progress)?,
            Format::ElfCore(core) => {
                copy_elf(dump, core, &goes, &output, &mut stats, progress)?;
            }
            Format::MappedRam(ram) => {
                let bitmaps = ram.pruned_bitmaps(dump.path(), dump.bytes(), &goes)?;
                stats.runs = file_runs(dump, &goes).len() as u64;
                stats.cloned_bytes = copy_mapped_ram(dump, ram, &bitmaps, &output, progress)?;
            }
            Format::Stream(stream) => {
                let stream = Rewritten::Stream(stream, &goes);
                copy_stream(dump, &stream, &output, progress)?;
            }
            Format::Xen(image) => {
                let dropped = image.dropped(&goes);
                copy_stream(dump, &Rewritten::Xen(image, &dropped), &output, progress)?;
                xen::count(&dropped, &mut stats);
            }
            Format::XenCore(_) | Format::Lime | Format::Kdump | Format::Avml => {
                return Err(self.read_only());
            }
        }
        stats.disk_after = output.finish()?;
        Ok(stats)
    }
}

impl Dump {
    fn read_only(&self) -> DumpError {
        DumpError::CannotPrune {
            path: self.path().into(),
            why: match self.format_data() {
                Format::XenCore(_) => {
                    "a core of Xen is only read here: prune an image of `xl save`, or save this \
                     as a checkpoint"
                }
                _ => "this format is only read here: save it as a checkpoint instead",
            },
        }
    }

    /// A kdump-compressed file again, without the dropped pages.
    fn prune_kdump(
        &self,
        plan: &PrunePlan,
        out: Target<'_>,
        progress: Progress<'_>,
    ) -> Result<PruneStats, DumpError> {
        if !matches!(self.format_data(), Format::Kdump) {
            return Err(self.read_only());
        }
        let zeroed = plan.clone().zero_filled_only();
        let mut stats = PruneStats::of(plan, &zeroed);
        stats.disk_before = disk_usage(self.file(), self.path())?;
        let output = Output::create(out, &self.files())?;
        let notes = self.core_notes();
        let options = KdumpOptions {
            compression: KdumpCompression::Zlib,
            machine: self.machine(),
            vmcoreinfo: self.vmcoreinfo(),
            notes: notes.as_deref(),
            threads: None,
        };
        write_kdump(self, &zeroed, output.file(), &options, progress).map_err(|source| {
            DumpError::Kdump {
                path: out.path.into(),
                source,
            }
        })?;
        stats.disk_after = output.finish()?;
        Ok(stats)
    }
}

/// Copies all of the file but the dropped pages, and clears their bits. Returns how many bytes
/// are shared.
fn copy_mapped_ram(
    dump: &MappedDump,
    ram: &MappedRam,
    bitmaps: &[(u64, Vec<u8>)],
    output: &Output,
    progress: Progress<'_>,
) -> Result<u64, DumpError> {
    let writing = || DumpError::io("writing", output.path());
    let total = dump.file_len();
    output.file().set_len(total).map_err(writing())?;
    let mut copier = Copier::new(dump, output, total, progress);
    let mut at = 0_u64;
    for (offset, len) in ram.holes(bitmaps).into_iter().chain([(total, 0)]) {
        copier.copy(at, at, offset.saturating_sub(at))?;
        at = offset.saturating_add(len);
    }
    for (offset, bitmap) in bitmaps {
        output
            .file()
            .write_all_at(bitmap, *offset)
            .map_err(writing())?;
    }
    Ok(copier.cloned())
}

pub(crate) fn disk_usage(file: &File, path: &Path) -> Result<u64, DumpError> {
    let metadata = file.metadata().map_err(DumpError::io("reading", path))?;
    Ok(metadata.blocks().saturating_mul(512))
}

/// The dropped stretches of a raw file: offset and length; neighbours in the file are joined.
pub(crate) fn file_runs(dump: &MappedDump, plan: &PrunePlan) -> Vec<(u64, u64)> {
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

fn copy_raw(
    dump: &MappedDump,
    plan: &PrunePlan,
    output: &Output,
    stats: &mut PruneStats,
    progress: Progress<'_>,
) -> Result<(), DumpError> {
    let total = dump
        .extents()
        .iter()
        .fold(0_u64, |sum, extent| sum.saturating_add(extent.guest.len()));
    output
        .file()
        .set_len(total)
        .map_err(DumpError::io("writing", output.path()))?;
    let kept_total = total.saturating_sub(plan.dropped_bytes());
    let mut copier = Copier::new(dump, output, kept_total, progress);
    for extent in dump.extents() {
        let Some(base) = extent.offset else { continue };
        for kept in plan.kept_in(extent.guest) {
            let inside = kept.start().offset_from(extent.guest.start()).unwrap_or(0);
            let offset = base.saturating_add(inside);
            copier.copy(offset, offset, kept.len())?;
        }
    }
    stats.runs = file_runs(dump, plan).len() as u64;
    stats.cloned_bytes = copier.cloned();
    Ok(())
}

/// One segment of the output, and where its data is in the input.
struct Piece {
    /// The number of the input's segment that it is a part of.
    source: usize,
    segment: Segment,
    from: u64,
}

/// Splits a segment at the dropped pages: each piece is data that is kept, followed by memory
/// that has no data and reads as zero (`p_filesz` less than `p_memsz`).
fn split(source: usize, segment: &Segment, plan: &PrunePlan, pieces: &mut Vec<Piece>) {
    let (Some(guest), Some(filled)) = (
        segment.guest(),
        GpaRange::with_len(Gpa::new(segment.paddr), segment.file_len),
    ) else {
        pieces.push(Piece {
            source,
            segment: *segment,
            from: segment.offset,
        });
        return;
    };
    let mut kept = plan.kept_in(filled).peekable();
    // What is dropped at the very start belongs to a piece without data.
    let mut next = match kept.peek() {
        Some(first) if first.start() == guest.start() => kept.next(),
        _ => Some(GpaRange::new(guest.start(), guest.start())),
    };
    while let Some(data) = next {
        next = kept.next();
        let start = data.start();
        let end = next.map_or(guest.end(), |next| next.start());
        let inside = start.offset_from(guest.start()).unwrap_or(0);
        pieces.push(Piece {
            source,
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

/// Joins the pieces with the smallest gaps between them until at most `limit` are left. What was
/// dropped in such a gap becomes a hole in the file, which reads as zero too. Returns how many
/// gaps that were.
fn join_smallest_gaps(pieces: Vec<Piece>, limit: usize) -> (Vec<Piece>, u64) {
    let excess = pieces.len().saturating_sub(limit);
    let mut gaps: Vec<u64> = pieces
        .array_windows()
        .filter_map(|[a, b]| gap(a, b))
        .collect();
    gaps.sort_unstable();
    let last = excess.min(gaps.len()).checked_sub(1);
    let Some(widest) = last.and_then(|last| gaps.get(last)).copied() else {
        return (pieces, 0);
    };
    // All narrower gaps go, and of those exactly as wide as many as it still takes.
    let mut as_wide = excess.saturating_sub(gaps.partition_point(|gap| *gap < widest));
    let mut joined: Vec<Piece> = Vec::with_capacity(limit);
    let mut count = 0_u64;
    for piece in pieces {
        // A piece that has taken others in still ends with the gap of its last.
        let gap = joined.last().and_then(|last| gap(last, &piece));
        let goes = gap.is_some_and(|gap| gap < widest || gap == widest && as_wide > 0);
        match joined.last_mut().filter(|_| goes) {
            Some(last) => {
                if gap == Some(widest) {
                    as_wide = as_wide.saturating_sub(1);
                }
                let (a, b) = (&mut last.segment, &piece.segment);
                a.file_len = a.mem_len.saturating_add(b.file_len);
                a.mem_len = a.mem_len.saturating_add(b.mem_len);
                count = count.saturating_add(1);
            }
            None => joined.push(piece),
        }
    }
    (joined, count)
}

/// How much was dropped between two pieces, if they are of the same segment.
fn gap(a: &Piece, b: &Piece) -> Option<u64> {
    (a.source == b.source).then(|| a.segment.mem_len.saturating_sub(a.segment.file_len))
}

/// Writes a core with the kept pages.
fn copy_elf(
    dump: &MappedDump,
    core: &ElfCore,
    plan: &PrunePlan,
    output: &Output,
    stats: &mut PruneStats,
    progress: Progress<'_>,
) -> Result<(), DumpError> {
    const ALIGN: u64 = 4096;
    let refuse = |why| DumpError::CannotPrune {
        path: dump.path().into(),
        why,
    };
    let mut pieces = Vec::new();
    // Only what segments have data for.
    stats.dropped_bytes = 0;
    stats.runs = 0;
    for (source, segment) in core.segments.iter().enumerate() {
        if let Some(guest) = segment.guest() {
            let filled = GpaRange::with_len(guest.start(), segment.file_len).unwrap_or(guest);
            for run in plan.dropped_in(filled) {
                stats.dropped_bytes = stats.dropped_bytes.saturating_add(run.len());
                stats.runs = stats.runs.saturating_add(1);
            }
        }
        split(source, segment, plan, &mut pieces);
    }
    let (mut pieces, joined) = join_smallest_gaps(pieces, MAX_SEGMENTS);
    stats.joined = joined;
    if pieces.len() > MAX_SEGMENTS {
        return Err(refuse("it has more segments than e_phnum can count"));
    }
    let headers = (pieces.len().saturating_mul(SEGMENT_LEN)).saturating_add(HEADER_LEN) as u64;
    let mut at = headers;
    let mut kept_total = 0_u64;
    for piece in &mut pieces {
        // A page of a mapped file can then be a page of memory.
        if piece.segment.kind == PT_LOAD {
            at = at.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX);
        }
        piece.segment.offset = at;
        at = at.saturating_add(piece.segment.file_len);
        kept_total = kept_total.saturating_add(piece.segment.file_len);
    }
    // Segments may share data, as the kernel's text does in `/proc/vmcore`, which is then copied
    // for each of them. A crafted file must not fill the disk so.
    if kept_total > dump.file_len().saturating_mul(2) {
        return Err(refuse("its segments share the same data many times over"));
    }
    let writing = || DumpError::io("writing", output.path());
    output.file().set_len(at).map_err(writing())?;
    let mut head = elf_core::header(core.machine, pieces.len());
    for piece in &pieces {
        head.extend(piece.segment.to_bytes());
    }
    output.file().write_all_at(&head, 0).map_err(writing())?;
    let mut copier = Copier::new(dump, output, kept_total, progress);
    for piece in &pieces {
        let to = piece.segment.offset;
        let filled = GpaRange::with_len(Gpa::new(piece.segment.paddr), piece.segment.file_len);
        let Some(filled) = filled.filter(|_| piece.segment.guest().is_some()) else {
            copier.copy(piece.from, to, piece.segment.file_len)?;
            continue;
        };
        // Where pieces were joined, dropped pages lie inside: they are passed over.
        for kept in plan.kept_in(filled) {
            let inside = kept.start().offset_from(filled.start()).unwrap_or(0);
            let from = piece.from.saturating_add(inside);
            copier.copy(from, to.saturating_add(inside), kept.len())?;
        }
    }
    stats.cloned_bytes = copier.cloned();
    Ok(())
}
