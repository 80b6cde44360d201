//! A qcow2 image over the images that it was written over, as its guest reads it.

use crate::DumpError;
use crate::format::qcow2::{Image, OFFSET, Place, table};
use sonicshot::checkpoint::{DiskOffset, DiskRange, DiskSource};
use sonicshot::{Bytes, FileContent, FileOffset, FileRange, to_u64, to_usize};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Of tables, and of clusters that were compressed, so many bytes are held at most.
const HELD: u64 = 16 << 20;
/// The longest name that QEMU itself takes (`block/qcow2.c`).
const MAX_NAME: u32 = 1023;
/// Extensions of a header that are looked at.
const MAX_EXTENSIONS: usize = 64;
/// The extension with the format of the file below.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const MAX_FORMAT: u32 = 16;

/// The parts of a file that were read lately, by their place.
#[derive(Debug)]
struct Recent<T> {
    most: usize,
    held: Mutex<HashMap<u64, Arc<T>>>,
}

impl<T> Recent<T> {
    fn new(bytes_each: u64) -> Self {
        let most = HELD
            .checked_div(bytes_each)
            .and_then(|most| usize::try_from(most).ok());
        Self {
            most: most.unwrap_or_default().max(1),
            held: Mutex::default(),
        }
    }

    fn get(&self, at: u64, read: impl FnOnce() -> io::Result<T>) -> io::Result<Arc<T>> {
        let held = || self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = held().get(&at) {
            return Ok(Arc::clone(found));
        }
        let read = Arc::new(read()?);
        let mut held = held();
        if held.len() >= self.most {
            held.clear();
        }
        held.insert(at, Arc::clone(&read));
        Ok(read)
    }
}

/// The file that an image was written over: its name as the image has it, and its format if it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Below {
    pub path: PathBuf,
    pub format: Option<Vec<u8>>,
}

/// One image of a chain.
pub(crate) struct Qcow2Disk {
    content: FileContent,
    image: Image,
    l1: Vec<u64>,
    tables: Recent<Vec<u64>>,
    clusters: Recent<Vec<u8>>,
    below: Option<Box<dyn DiskSource>>,
}

/// An image with its header read, before the one below it is open.
pub(crate) struct Qcow2Head {
    content: FileContent,
    image: Image,
    l1: Vec<u64>,
    pub below: Option<Below>,
}

impl Qcow2Head {
    pub(crate) fn read(path: &Path, file: File) -> Result<Self, DumpError> {
        let content = FileContent::new(file).map_err(DumpError::io("reading", path))?;
        let image = Image::read(path, content.bytes())?;
        let bad = |what, at, value| DumpError::malformed(path, what, FileOffset::new(at), value);
        if image.disk_len == 0 || image.disk_len > i64::MAX.cast_unsigned() {
            let what = "a virtual disk size that is not from 1 to 2^63 - 1";
            return Err(bad(what, 24, image.disk_len));
        }
        let of_table = image.clusters_of_table().checked_mul(image.cluster());
        let needed = of_table.map(|bytes| image.disk_len.div_ceil(bytes));
        if needed.is_none_or(|tables| tables > image.l1_len.into()) {
            let what = "a table that is too short for its disk";
            return Err(bad(what, 36, image.l1_len.into()));
        }
        let l1 = table(path, content.bytes(), image.l1_at, image.l1_len)?;
        let below = below(path, &image, &content)?;
        Ok(Self {
            content,
            image,
            l1,
            below,
        })
    }
}

fn below(path: &Path, image: &Image, content: &FileContent) -> Result<Option<Below>, DumpError> {
    let (at, len) = image.backing;
    if at == 0 {
        return Ok(None);
    }
    let bytes = content.bytes();
    let bad = |what, at, value| DumpError::malformed(path, what, FileOffset::new(at), value);
    if len == 0 || len > MAX_NAME {
        let what = "a backing file name whose length is not from 1 to 1023";
        return Err(bad(what, 16, len.into()));
    }
    let name = bytes.part(at, len.into()).and_then(Bytes::copied);
    let name = name.ok_or_else(|| bad("a backing file name beyond the end of the file", 8, at))?;
    let unsupported = |kind| DumpError::Unsupported {
        path: path.to_owned(),
        kind,
    };
    let file = match name.strip_prefix(b"file:") {
        Some(file) => file,
        // A protocol of QEMU's has a colon before any slash.
        None if name
            .iter()
            .find(|byte| matches!(byte, b':' | b'/'))
            .is_some_and(|byte| *byte == b':') =>
        {
            return Err(unsupported("a qcow2 image over one that is in no file"));
        }
        None => &name,
    };
    let named = PathBuf::from(OsString::from_vec(file.to_vec()));
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    Ok(Some(Below {
        path: folder.join(named),
        format: format_below(image, content),
    }))
}

/// The format of the image below, where the header says it.
fn format_below(image: &Image, content: &FileContent) -> Option<Vec<u8>> {
    let bytes = content.bytes();
    let mut at = image.extensions_at(bytes)?;
    for _ in 0..MAX_EXTENSIONS {
        let kind = bytes.be_at::<u32>(at)?;
        let len = bytes.be_at::<u32>(at.checked_add(4)?)?;
        let data = at.checked_add(8)?;
        match kind {
            0 => return None,
            BACKING_FORMAT if len <= MAX_FORMAT => return bytes.part(data, len.into())?.copied(),
            _ => at = data.checked_add(len.into())?.checked_next_multiple_of(8)?,
        }
    }
    None
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Qcow2Disk {
    /// The disk of an image over what it was written over.
    pub(crate) fn new(head: Qcow2Head, below: Option<Box<dyn DiskSource>>) -> Self {
        Self {
            tables: Recent::new(head.image.cluster()),
            clusters: Recent::new(head.image.cluster()),
            content: head.content,
            image: head.image,
            l1: head.l1,
            below,
        }
    }

    /// The place of the byte at `at` of the disk, and the number of bytes from there on in the same place.
    /// A table that is not there is of nothing.
    fn locate(&self, at: u64) -> io::Result<(Place, u64)> {
        let wrong = || damaged("an entry of a table that cannot be");
        let cluster = self.image.cluster();
        let of_table = self.image.clusters_of_table();
        let number = at.checked_div(cluster).ok_or_else(wrong)?;
        let (table, entry) = (number.checked_div(of_table), number.checked_rem(of_table));
        let (table, entry) = (table.ok_or_else(wrong)?, entry.ok_or_else(wrong)?);
        let inside = at.checked_rem(cluster).ok_or_else(wrong)?;
        let offset = usize::try_from(table).ok().and_then(|at| self.l1.get(at));
        let offset = offset.ok_or_else(wrong)? & OFFSET;
        if offset == 0 {
            let all = of_table.checked_mul(cluster).ok_or_else(wrong)?;
            let begun = at.checked_rem(all).ok_or_else(wrong)?;
            return Ok((Place::Below, all.checked_sub(begun).ok_or_else(wrong)?));
        }
        let table = self.tables.get(offset, || self.read_table(offset))?;
        let entry = usize::try_from(entry).map_err(io::Error::other)?;
        let place = if self.image.has_parts() {
            let at = entry.checked_mul(2).ok_or_else(wrong)?;
            let parts = at.checked_add(1).and_then(|at| table.get(at).copied());
            let parts = Some(parts.ok_or_else(wrong)?);
            self.image
                .place(*table.get(at).ok_or_else(wrong)?, parts, inside)
        } else {
            self.image
                .place(*table.get(entry).ok_or_else(wrong)?, None, inside)
        };
        place.ok_or_else(wrong)
    }

    fn read_table(&self, at: u64) -> io::Result<Vec<u64>> {
        let len = usize::try_from(self.image.cluster()).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.content.read_at(&mut bytes, FileOffset::new(at))?;
        let (numbers, _) = bytes.as_chunks::<8>();
        Ok(numbers
            .iter()
            .map(|number| u64::from_be_bytes(*number))
            .collect())
    }

    /// Reads the bytes stored at a place; behind the end of the file, zeroes, as QEMU reads it.
    fn read_stored(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        let inside = inside(out, at, self.content.len())?;
        self.content.read_at(inside, FileOffset::new(at))
    }

    fn decompressed(&self, entry: u64) -> io::Result<Vec<u8>> {
        let stored = self.image.stored(entry, self.content.len());
        let (at, len) =
            stored.ok_or_else(|| damaged("a compressed cluster beyond the end of the file"))?;
        // No longer than two clusters.
        let most = self.image.cluster().checked_mul(2);
        let most = most.and_then(|most| most.checked_add(1024));
        let most = most.ok_or_else(|| damaged("a cluster size of more than 64 bits"))?;
        let len = usize::try_from(len.min(most)).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.content.read_at(&mut bytes, FileOffset::new(at))?;
        self.image.decompress(&bytes)
    }

    fn read_below(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        let Some(below) = &self.below else {
            out.fill(0);
            return Ok(());
        };
        match inside(out, at, below.disk_len()?)? {
            [] => Ok(()),
            inside => below.read_disk(inside, DiskOffset::new(at)),
        }
    }

    /// The first byte from `at` on that may not be zero, in the first `len`; `None` if there is none.
    fn data_in(&self, at: u64, place: Place, len: u64) -> io::Result<Option<(u64, u64)>> {
        let disk_len = self.image.disk_len;
        let end = at
            .checked_add(len)
            .map_or(disk_len, |end| end.min(disk_len));
        match (place, &self.below) {
            (Place::Stored(_) | Place::Compressed(_), _) => Ok(Some((at, end))),
            (Place::Zero, _) | (Place::Below, None) => Ok(None),
            (Place::Below, Some(below)) => {
                let data = below.next_disk_data(DiskOffset::new(at))?;
                let data = data.map(|data| (data.start().raw().max(at), data.end().raw().min(end)));
                Ok(data.filter(|(start, end)| start < end))
            }
        }
    }
}

/// The part of `out`, which is what lies at `at`, that is before `end`; the rest is zeroes.
fn inside(out: &mut [u8], at: u64, end: u64) -> io::Result<&mut [u8]> {
    let wanted = FileRange::with_len(FileOffset::new(at), to_u64(out.len()));
    let wanted = wanted.ok_or_else(|| damaged("a place beyond 64 bits"))?;
    let there = wanted.intersection(&FileRange::new(FileOffset::ZERO, FileOffset::new(end)));
    let (inside, behind) = out.split_at_mut(to_usize(there.len()));
    behind.fill(0);
    Ok(inside)
}

impl DiskSource for Qcow2Disk {
    fn disk_len(&self) -> io::Result<u64> {
        Ok(self.image.disk_len)
    }

    fn read_disk(&self, buf: &mut [u8], at: DiskOffset) -> io::Result<()> {
        let end = at.raw().checked_add(to_u64(buf.len()));
        if end.is_none_or(|end| end > self.image.disk_len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut rest, mut at) = (buf, at.raw());
        while !rest.is_empty() {
            let (place, len) = self.locate(at)?;
            let len = to_usize(len).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match place {
                Place::Zero => now.fill(0),
                Place::Stored(offset) => self.read_stored(now, offset)?,
                Place::Below => self.read_below(now, at)?,
                Place::Compressed(entry) => {
                    let cluster = self.clusters.get(entry, || self.decompressed(entry))?;
                    let inside = at.checked_rem(self.image.cluster());
                    let inside = inside.and_then(|inside| usize::try_from(inside).ok());
                    let part = inside.and_then(|at| cluster.get(at..at.checked_add(len)?));
                    now.copy_from_slice(part.ok_or_else(|| damaged("a short cluster"))?);
                }
            }
            rest = later;
            at = at
                .checked_add(to_u64(len))
                .ok_or(io::ErrorKind::UnexpectedEof)?;
        }
        Ok(())
    }

    fn next_disk_data(&self, at: DiskOffset) -> io::Result<Option<DiskRange>> {
        let mut at = at.raw();
        let mut found: Option<(u64, u64)> = None;
        while at < self.image.disk_len {
            let (place, len) = self.locate(at)?;
            let data = self.data_in(at, place, len)?;
            found = match (found, data) {
                (None, data) => data,
                (Some((start, end)), Some((next, stop))) if next == end => Some((start, stop)),
                (Some(_), _) => break,
            };
            // What is not data to the end of this place is looked at again.
            let stop = at.checked_add(len).ok_or(io::ErrorKind::UnexpectedEof)?;
            match found {
                Some((_, end)) if end < stop.min(self.image.disk_len) => break,
                _ => at = stop,
            }
        }
        Ok(found.map(|(start, end)| DiskRange::new(DiskOffset::new(start), DiskOffset::new(end))))
    }
}
