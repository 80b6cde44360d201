//! The formats, a file or a folder of them each, and what all of them have in common.
//!
//! A format is one file here that has a [`Kind`], which opens it, and implements [`Format`]; and
//! one line in [`KINDS`]. What it can do beside being read it says by the traits of
//! [`ability`]; what it cannot is refused in one place, [`crate::Dump`]. A format knows no other but
//! those that it wraps, and not the list.

pub(crate) mod ability;
pub(crate) mod avml;
pub(crate) mod cloud_hypervisor;
pub(crate) mod core_notes;
pub(crate) mod crosvm;
pub(crate) mod diff;
pub(crate) mod elf_core;
pub(crate) mod firecracker;
pub(crate) mod foreign;
pub(crate) mod kdump;
pub(crate) mod kind;
pub(crate) mod libvirt;
pub(crate) mod lime;
pub(crate) mod name;
pub(crate) mod notes;
pub(crate) mod qcow2;
pub(crate) mod qemu;
pub(crate) mod raw;
pub(crate) mod vmware;
pub(crate) mod xen;

use crate::backing::plain::check_content;
use crate::backing::unpack::{Compression, LONGEST_MARK};
use crate::snapshot::{Named, SnapshotFiles};
use crate::{DumpError, DumpFormat, DumpOptions};
use kind::{Format, Kind, Source, boxed};
use std::path::Path;

/// All formats that say themselves what they are; the first that takes a file has it. What none
/// takes is raw RAM.
const KINDS: &[&Kind] = &[
    &cloud_hypervisor::KIND,
    &crosvm::KIND,
    &firecracker::KIND,
    &vmware::KIND,
    &xen::core::KIND,
    &elf_core::KIND,
    &qemu::KIND,
    &qcow2::KIND,
    &kdump::KIND,
    &lime::KIND,
    &avml::KIND,
    &libvirt::KIND,
    &xen::image::KIND,
    &qemu::BEHIND,
];

/// Opens a file of any format, which its content tells.
pub(crate) fn open(source: Source<'_>) -> Result<Box<dyn Format>, DumpError> {
    let watch = source.watch()?;
    let opened = kind_of(&source).and_then(|kind| match kind {
        Some(kind) => (kind.open)(source),
        None => raw::open(source).map(boxed),
    });
    opened.map_err(|error| watch.blame(error))
}

/// The format of a file; `None` if it is raw RAM.
pub(crate) fn kind_of(source: &Source<'_>) -> Result<Option<&'static Kind>, DumpError> {
    match source.known.format {
        Some(DumpFormat::RAW) => return Ok(None),
        Some(format) if !is_unpacked(source) => return kind_named(source, format).map(Some),
        _ => {}
    }
    // What a VMM keeps beside a file tells more than how the file begins.
    match KINDS.iter().copied().find(|kind| kind.takes(source)) {
        Some(kind) => Ok(Some(kind)),
        // That it is of no format counts only if what would tell could be read.
        None => {
            let foreign = refuse_foreign(source);
            check_content(&source.content, source.path)?;
            foreign.map(|()| None)
        }
    }
}

/// Whether the content is what was compressed in the file: that has another format than the file.
fn is_unpacked(source: &Source<'_>) -> bool {
    let spool = source.spool.as_ref();
    spool.is_some_and(|spool| spool.image().is_some() || spool.state_of().is_some())
}

/// The format that the caller says a file has.
fn kind_named(source: &Source<'_>, format: DumpFormat) -> Result<&'static Kind, DumpError> {
    if format == DumpFormat::CHECKPOINT {
        // Who reads it is told of if it is one.
        refuse_foreign(source)?;
    }
    let is_named = |kind: &&'static Kind| {
        let names = [kind.name, kind.form_of].map(|name| name.map(DumpFormat::named));
        names.contains(&Some(format))
    };
    let mut kinds = KINDS.iter().copied().filter(is_named);
    let kind = kinds.find(|kind| kind.may_be(source));
    kind.ok_or_else(|| DumpError::OtherFormat {
        path: source.path.to_owned(),
        format,
    })
}

/// Whether a file is of a format, other than RAM.
pub(crate) fn is_taken(source: &Source<'_>) -> bool {
    KINDS.iter().any(|kind| kind.takes(source))
}

/// Whether a file is of a format, read or not, other than RAM.
pub(crate) fn begins_as(source: &Source<'_>) -> bool {
    foreign::foreign(source).is_some() || is_taken(source)
}

/// Refuses a file of a format that is known but not read: for those who are about to say that it
/// is none of theirs.
///
/// # Errors
/// [`DumpError::NotRead`], with what it is and what to do with it.
pub fn check_not_foreign(path: &Path) -> Result<(), DumpError> {
    // What cannot be opened is told of by who opens it.
    let known = DumpOptions::new();
    Source::open(path, &known).map_or(Ok(()), |source| {
        // What is compressed is only refused inside of what is.
        let start: Option<[u8; LONGEST_MARK]> = source.start();
        match start.and_then(|start| Compression::of(&start)) {
            Some(_) => Ok(()),
            None => refuse_foreign(&source),
        }
    })
}

/// Refuses a file of a format that is known but not read.
pub(crate) fn refuse_foreign(source: &Source<'_>) -> Result<(), DumpError> {
    foreign::foreign(source).map_or(Ok(()), |foreign| Err(foreign.refusal(source)))
}

/// Whether a file of `len` bytes that begins with `start` is of a known format, other than RAM.
pub(crate) fn begins_as_known(start: &[u8], len: u64) -> bool {
    if elf_core::may_be_ram(start, len) {
        return false;
    }
    let mut known = KINDS.iter().flat_map(|kind| kind.magics);
    known.any(|magic| start.starts_with(magic)) || foreign::begins_as_foreign(start)
}

/// The snapshot that a path names, by the first VMM whose it is.
pub(crate) fn snapshot(named: &Named<'_>) -> Result<Option<SnapshotFiles>, DumpError> {
    for kind in KINDS {
        if let Some(found) = (kind.snapshot)(named)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Refuses the memory file of a snapshot whose VMM would not read a hole as zero.
pub(crate) fn check_holes(memory: &Path) -> Result<(), DumpError> {
    for kind in KINDS {
        if let Some(why) = (kind.no_holes)(memory)? {
            return Err(DumpError::CannotPrune {
                path: memory.to_owned(),
                why,
            });
        }
    }
    Ok(())
}
