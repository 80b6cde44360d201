//! Raw files that may be a diff without its base, in which a page that is made a hole would read as
//! the base has it.

use crate::backing::unpack::{Compression, LONGEST_MARK};
use crate::format::check_holes;
use crate::format::kind::Source;
use crate::{Dump, DumpOptions, LayoutSpec, PruneOptions};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sonicshot::{ClassSet, FileOffset, Fill, Gpa, GuestMemory, PageClass};
use sonicshot_vmi::{Analysis, Knowledge};
use std::fs::File;
use std::io;
use std::path::Path;

/// The classes of pages that no guest has without having written to them, if only zeroes.
const WRITTEN: ClassSet = ClassSet::EMPTY
    .with(PageClass::Anonymous)
    .with(PageClass::Shmem)
    .with(PageClass::PageCacheClean)
    .with(PageClass::PageCacheDirty)
    .with(PageClass::Slab)
    .with(PageClass::PageTable);

/// Whether a raw file may be a diff.
///
/// Of one with a kernel, if pages that the guest has written to are holes in it, others of zeroes
/// are not, and below the last of those holes lies what is none: zeroes, or free pages enough for a
/// hole. Who makes a file sparse, or prunes it, makes holes of all zeroes, from its beginning on,
/// and a prune that was interrupted has made them of free pages too. In a diff, which may hold all
/// of the kernel (Firecracker's without dirty tracking has every page that was touched, by
/// mincore(2)), a hole is what the base has, and so would be those that a prune made. Where types
/// do not tell what is written, any page that is not free counts.
///
/// Of one without a kernel, if it [has a hole](first_hole).
#[must_use]
pub fn may_be_diff(dump: &Dump, guest: &Analysis) -> bool {
    if dump.layout_spec().is_none() || dump.has_base() {
        return false;
    }
    let written = match guest.facts().knowledge {
        Knowledge::Nothing => return first_hole(dump).is_some(),
        Knowledge::Types => WRITTEN,
        _ => WRITTEN.with(PageClass::Unknown),
    };
    let size = guest.pages().page_size();
    // What a prune, or who makes a file sparse, would not have left.
    let (mut left, mut zeroes) = (false, false);
    let mut has_hole_above = false;
    for (frames, page) in guest.pages().states() {
        let Some(range) = frames.gpa_range(size) else {
            continue;
        };
        let is_written = written.contains(page.class());
        let mut at = range.start();
        while at < range.end() {
            let data = dump.next_data(at).map(|data| data.intersection(&range));
            let data = data.filter(|data| !data.is_empty());
            let is_hole = data.is_none_or(|data| data.start() > at);
            has_hole_above |= is_hole && left && is_written && page.is_zero();
            let Some(data) = data else { break };
            zeroes |= page.is_zero();
            left |= page.is_zero() || is_free(page.class()) && data.len() >= PruneOptions::MIN_HOLE;
            at = data.end();
        }
    }
    has_hole_above && zeroes
}

/// Whether pages of `class` are the allocator's.
fn is_free(class: PageClass) -> bool {
    matches!(class, PageClass::FreeBuddy | PageClass::FreePcp)
}

/// The part of `classes` that may go of a file that [may be a diff](may_be_diff): nothing that the
/// guest reads as zero.
#[must_use]
pub fn of_a_diff(classes: ClassSet, free_fill: Fill) -> ClassSet {
    let goes = classes
        .iter()
        .filter(|class| !is_free(*class) || free_fill == Fill::Any);
    goes.fold(ClassSet::EMPTY, ClassSet::with)
}

/// The first page that a raw file by itself does not hold; of other formats that is told by them.
///
/// Content that came through a pipe or was compressed has come whole: a hole in the temporary file that has
/// it is none of the source's, whose holes, if it had any, were read as zeroes. Of a diff that was
/// packed so nothing tells any more which of its zeroes were its own.
#[must_use]
pub fn first_hole(dump: &Dump) -> Option<Gpa> {
    dump.layout_spec()?;
    if dump.has_base() || dump.spool().is_some() {
        return None;
    }
    dump.layout().regions().iter().find_map(|region| {
        let mut at: Gpa = region.start();
        while at < region.end() {
            match dump.next_data(at) {
                Some(data) if data.start() <= at && data.end() > at => at = data.end(),
                _ => return Some(at),
            }
        }
        None
    })
}

/// Whether pages of zeroes can be left out of the file at `path`, whatever its guest is: for those
/// who are about to offer it. Of a file that is compressed nothing but its beginning is looked at.
#[must_use]
pub fn can_leave_out_zeroes(path: &Path) -> bool {
    let known = DumpOptions::new();
    let is_packed = Source::open(path, &known).is_ok_and(|source| {
        let start: Option<[u8; LONGEST_MARK]> = source.start();
        start.and_then(|start| Compression::of(&start)).is_some()
    });
    if is_packed {
        return true;
    }
    let layouts = LayoutSpec::KNOWN.iter().map(Some);
    let mut layouts = std::iter::once(None).chain(layouts);
    let dump = layouts.find_map(|layout| Dump::open(path, layout).ok());
    dump.is_some_and(|dump| {
        let goes = dump.by_copy().is_ok() && dump.restores(Fill::Zero);
        goes && check_holes(path).is_ok() && first_hole(&dump).is_none()
    })
}

/// The first hole in what is left to be read of `file`, counted from there; `None` if there is
/// none, or it has no places that can be asked for.
///
/// # Errors
/// The operating system's error.
pub fn hole_ahead(file: &File) -> io::Result<Option<FileOffset>> {
    let ask = || {
        let start = seek(file, SeekFrom::Current(0))?;
        let end = seek(file, SeekFrom::End(0))?;
        let hole = match seek(file, SeekFrom::Hole(start)) {
            // Nothing is left.
            Err(Errno::NXIO) => Ok(end),
            hole => hole,
        };
        // Asking moves it.
        seek(file, SeekFrom::Start(start))?;
        let hole = hole.ok().filter(|hole| *hole < end);
        Ok(hole.and_then(|hole| hole.checked_sub(start)))
    };
    match ask() {
        // A pipe.
        Err(Errno::SPIPE) => Ok(None),
        found => found
            .map(|hole| hole.map(FileOffset::new))
            .map_err(Errno::into),
    }
}

#[cfg(test)]
mod tests {
    use super::hole_ahead;
    use sonicshot::FileOffset;
    use std::io::{Read, Seek, SeekFrom};
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_hole_is_seen_without_reading() {
        const PAGE: usize = 1 << 16;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 3 * PAGE], 0).unwrap();
        assert_eq!(hole_ahead(&file).unwrap(), None);
        file.set_len(5 * PAGE as u64).unwrap();
        for read in [0, 1, 2] {
            let at = (read * PAGE) as u64;
            file.seek(SeekFrom::Start(at)).unwrap();
            let hole = FileOffset::new(3 * PAGE as u64 - at);
            assert_eq!(hole_ahead(&file).unwrap(), Some(hole), "{read}");
            // It is read from where it was.
            let mut byte = [0];
            file.read_exact(&mut byte).unwrap();
            assert_eq!((byte, file.stream_position().unwrap()), ([7], at + 1));
        }
        file.seek(SeekFrom::End(0)).unwrap();
        assert_eq!(hole_ahead(&file).unwrap(), None);
        let (from, _to) = std::io::pipe().unwrap();
        let pipe = std::fs::File::from(std::os::fd::OwnedFd::from(from));
        assert_eq!(hole_ahead(&pipe).unwrap(), None);
    }
}
