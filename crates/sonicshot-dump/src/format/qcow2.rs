//! QEMU's internal snapshots: what `savevm` (`snapshot-save`) puts into a disk image of the format
//! qcow2 (`docs/interop/qcow2.rst`). Read only.
//!
//! A snapshot has a table of its own (L1) of tables (L2) of clusters, which may be compressed. Behind
//! the last cluster of the disk, from the next place on that begins a table, is the state of the VM:
//! a migration stream (`block/qcow2-snapshot.c`). It is put into a temporary file, and read there.
//!
//! Numbers are big-endian.

use crate::DumpError;
use crate::backing::spool::Spool;
use crate::format::kind::{Format, Kind, Source};
use crate::format::qemu;
use sonicshot::{Bytes, Cursor, CutShort, FileBytes, FileOffset, to_u64};
use std::io::{self, Read};
use std::path::Path;

pub(crate) const KIND: Kind = Kind::by_magic("qcow2", &[MAGIC], |source| open(&source));

pub(crate) const MAGIC: &[u8] = b"QFI\xfb";
/// The limits of QEMU itself (`block/qcow2.h`), but for the names that are told of.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_L1: u32 = (32 << 20) / 8;
const MAX_EXTRA: u32 = 1024;
const MAX_SNAPSHOTS_LEN: u64 = 64 << 20;
const MAX_TOLD: usize = 16;
const MAX_NAME: u64 = 1 << 10;
/// A snapshot's entry, without what has its own length.
const ENTRY: u64 = 40;
/// Features that a reader must know: what was not closed well does not matter here.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Of an entry of a table.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Compressed clusters are stored in sectors.
const SECTOR: u64 = 512;

fn open(source: &Source<'_>) -> Result<Box<dyn Format>, DumpError> {
    let (path, data) = (source.path, source.data());
    let image = Image::read(path, data)?;
    let entry = image.only_snapshot(path, data)?;
    let l1 = table(path, data, entry.l1_offset, entry.l1_len)?;
    let state = State::new(&image, data, l1, &entry);
    let wrong = || {
        DumpError::malformed(
            path,
            "invalid offset of the VM state",
            FileOffset::new(24),
            entry.disk_len,
        )
    };
    let state = state.ok_or_else(wrong)?;
    let spool = Spool::of_state(path, source.content.file(), state, source.known)?;
    let spool = spool.within(source.spool.as_ref())?;
    qemu::open(Source::spooled(&spool, source.known)?)
}

/// The fields of the header.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Image {
    version: u32,
    cluster_bits: u32,
    /// The length of the disk.
    pub disk_len: u64,
    /// The place of the name of the file that this one is written over, and its length.
    pub backing: (u64, u32),
    /// The disk's own table of tables.
    pub l1_at: u64,
    pub l1_len: u32,
    snapshots: u32,
    snapshots_at: u64,
    extended: bool,
    zstd: bool,
}

/// The place of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the file, from there on.
    Stored(u64),
    /// In a cluster that is compressed, with this entry.
    Compressed(u64),
    /// Nowhere: they are zero.
    Zero,
    /// In the file that this one is written over; where there is none, they are zero.
    Below,
}

/// A snapshot that has a VM's state.
#[derive(Debug, Clone)]
struct Entry {
    l1_offset: u64,
    l1_len: u32,
    name: String,
    state_len: u64,
    disk_len: u64,
}

fn malformed<'a>(path: &'a Path, what: &'static str) -> impl Fn(CutShort) -> DumpError + use<'a> {
    move |cut| DumpError::malformed(path, what, FileOffset::new(cut.offset), cut.left)
}

impl Image {
    pub(crate) fn read(path: &Path, data: FileBytes<'_>) -> Result<Self, DumpError> {
        let unsupported = |kind| DumpError::Unsupported {
            path: path.to_owned(),
            kind,
        };
        let bad =
            |what, offset, value| DumpError::malformed(path, what, FileOffset::new(offset), value);
        let cut = malformed(path, "truncated: the file ends inside its header");
        let mut header = Cursor::at(data, 4);
        let version = header.be::<u32>().map_err(&cut)?;
        if !(2..=3).contains(&version) {
            return Err(bad("an unknown version of qcow2", 4, version.into()));
        }
        let backing = (
            header.be::<u64>().map_err(&cut)?,
            header.be::<u32>().map_err(&cut)?,
        );
        let cluster_bits = header.be::<u32>().map_err(&cut)?;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(bad("an invalid size of a cluster", 20, cluster_bits.into()));
        }
        let disk_len = header.be::<u64>().map_err(&cut)?;
        if header.be::<u32>().map_err(&cut)? != 0 {
            return Err(unsupported("an encrypted qcow2 image"));
        }
        let l1_len = header.be::<u32>().map_err(&cut)?;
        let l1_at = header.be::<u64>().map_err(&cut)?;
        if l1_len > MAX_L1 {
            return Err(bad("a table that is too long", 36, l1_len.into()));
        }
        header.seek(60);
        let snapshots = header.be::<u32>().map_err(&cut)?;
        if snapshots > MAX_SNAPSHOTS {
            return Err(bad("an invalid number of snapshots", 60, snapshots.into()));
        }
        let snapshots_at = header.be::<u64>().map_err(&cut)?;
        let mut image = Self {
            version,
            cluster_bits,
            disk_len,
            backing,
            l1_at,
            l1_len,
            snapshots,
            snapshots_at,
            extended: false,
            zstd: false,
        };
        if version == 3 {
            let features = header.be::<u64>().map_err(&cut)?;
            if features & CORRUPT != 0 {
                return Err(unsupported("a qcow2 image that is marked as corrupt"));
            }
            if features & !(DIRTY | CORRUPT | COMPRESSION_TYPE | EXTENDED_L2) != 0 {
                return Err(unsupported("a qcow2 image whose data is in another file"));
            }
            image.extended = features & EXTENDED_L2 != 0;
            if features & COMPRESSION_TYPE != 0 {
                header.seek(104);
                image.zstd = match header.be::<u8>().map_err(&cut)? {
                    0 => false,
                    1 => true,
                    other => {
                        return Err(bad("an unknown compression of clusters", 104, other.into()));
                    }
                };
            }
        }
        Ok(image)
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The offset of the extensions of the header.
    pub(crate) fn extensions_at(&self, data: FileBytes<'_>) -> Option<u64> {
        const OLD: u64 = 72;
        const LENGTH: u64 = 100;
        match self.version {
            2 => Some(OLD),
            _ => data.be_at::<u32>(LENGTH).map(u64::from),
        }
    }

    /// Of an entry of a table of clusters, and of the one that follows it, what the disk has `inside`
    /// bytes behind the beginning of the cluster, and how far that goes.
    pub(crate) fn place(
        &self,
        entry: u64,
        parts: Option<u64>,
        inside: u64,
    ) -> Option<(Place, u64)> {
        let left = self.cluster().checked_sub(inside)?;
        let offset = entry & OFFSET;
        if entry & COMPRESSED != 0 {
            return Some((Place::Compressed(entry), left));
        }
        let here = || offset.checked_add(inside).map(Place::Stored);
        let Some(parts) = parts else {
            return Some(match (entry & ZERO != 0, offset) {
                (true, _) => (Place::Zero, left),
                (false, 0) => (Place::Below, left),
                _ => (here()?, left),
            });
        };
        let size = (self.cluster() / 32).max(1);
        let number = inside.checked_div(size)?;
        let left = size.checked_sub(inside.checked_rem(size)?)?;
        let bit = |of: u64| {
            of.checked_shr(u32::try_from(number).ok()?)
                .map(|of| of & 1 == 1)
        };
        Some(match (bit(parts >> 32)?, bit(parts)?) {
            (true, _) => (Place::Zero, left),
            (false, true) if offset != 0 => (here()?, left),
            _ => (Place::Below, left),
        })
    }

    /// Whether the entries of a table of clusters have another number each.
    pub(crate) fn has_parts(&self) -> bool {
        self.extended
    }

    /// The place and length of a compressed cluster: its entry has the place in its lower bits, and above
    /// them how many sectors more than one it touches. Of the last sector not all need be there.
    pub(crate) fn stored(&self, entry: u64, file_len: u64) -> Option<(u64, u64)> {
        let bits = 62_u32.checked_sub(self.cluster_bits.checked_sub(8)?)?;
        let place = entry & 1_u64.checked_shl(bits)?.checked_sub(1)?;
        let sectors = (entry & (COMPRESSED - 1)) >> bits;
        let stored = sectors.checked_add(1)?.checked_mul(SECTOR)?;
        let stored = stored.checked_sub(place % SECTOR)?;
        Some((place, stored.min(file_len.checked_sub(place)?)))
    }

    /// Decompresses a cluster.
    pub(crate) fn decompress(&self, stored: &[u8]) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.cluster()).map_err(io::Error::other)?;
        let mut cluster = vec![0; len];
        let whole = if self.zstd {
            let mut reader = zstd::stream::read::Decoder::new(stored)?;
            reader.read_exact(&mut cluster).is_ok()
        } else {
            let mut reader = flate2::bufread::DeflateDecoder::new(stored);
            reader.read_exact(&mut cluster).is_ok()
        };
        if whole {
            return Ok(cluster);
        }
        Err(damaged("a compressed cluster does not decompress"))
    }

    /// The number of clusters that a table tells of.
    pub(crate) fn clusters_of_table(&self) -> u64 {
        self.cluster() >> if self.extended { 4 } else { 3 }
    }

    /// The snapshot that has the state of a VM.
    fn only_snapshot(&self, path: &Path, data: FileBytes<'_>) -> Result<Entry, DumpError> {
        let mut cursor = Cursor::at(data, self.snapshots_at);
        let mut found: Vec<Entry> = Vec::new();
        for _ in 0..self.snapshots {
            let entry = self.snapshot(path, &mut cursor)?;
            let len = cursor.position().checked_sub(self.snapshots_at);
            if len.is_none_or(|len| len > MAX_SNAPSHOTS_LEN) {
                let at = FileOffset::new(self.snapshots_at);
                let what = "snapshot table that is too long";
                return Err(DumpError::malformed(path, what, at, self.snapshots.into()));
            }
            if entry.state_len > 0 {
                found.push(entry);
            }
            if found.len() > MAX_TOLD {
                break;
            }
        }
        match found.as_slice() {
            [only] => Ok(only.clone()),
            [] => Err(DumpError::NotRead {
                path: path.to_owned(),
                kind: "a qcow2 disk image without a snapshot of a VM's memory",
                instead: "it is a guest's disk: its memory is in it only if `savevm` put it there, \
                          which `qemu-img snapshot -l` shows",
            }),
            several => {
                let told = several.iter().take(MAX_TOLD);
                let mut names: Vec<_> = told.map(|entry| entry.name.clone()).collect();
                if several.len() > MAX_TOLD {
                    names.push("and others".to_owned());
                }
                let path = path.to_owned();
                Err(DumpError::SeveralSnapshots { path, names })
            }
        }
    }

    fn snapshot(
        &self,
        path: &Path,
        cursor: &mut Cursor<FileBytes<'_>>,
    ) -> Result<Entry, DumpError> {
        let cut = malformed(
            path,
            "truncated: the file ends inside its table of snapshots",
        );
        let begin = cursor.position();
        let bad = |what, value| DumpError::malformed(path, what, FileOffset::new(begin), value);
        let l1_offset = cursor.be::<u64>().map_err(&cut)?;
        let l1_len = cursor.be::<u32>().map_err(&cut)?;
        let (id_len, name_len) = (
            cursor.be::<u16>().map_err(&cut)?,
            cursor.be::<u16>().map_err(&cut)?,
        );
        cursor.skip(16).map_err(&cut)?; // times
        let mut state_len = u64::from(cursor.be::<u32>().map_err(&cut)?);
        let extra = cursor.be::<u32>().map_err(&cut)?;
        if l1_len > MAX_L1 || extra > MAX_EXTRA {
            return Err(bad("tables of a snapshot that are too long", l1_len.into()));
        }
        let mut disk_len = self.disk_len;
        if extra >= 8 {
            state_len = cursor.be::<u64>().map_err(&cut)?;
        }
        if extra >= 16 {
            disk_len = cursor.be::<u64>().map_err(&cut)?;
        }
        let rest = begin.checked_add(ENTRY);
        let rest = rest.and_then(|rest| rest.checked_add(extra.into()));
        let rest = rest.and_then(|rest| rest.checked_add(id_len.into()));
        cursor.seek(
            rest.ok_or_else(|| bad("an invalid length of a snapshot's entry", extra.into()))?,
        );
        let name = cursor.take(name_len.into()).map_err(&cut)?;
        let name = name.part(0, name.byte_len().min(MAX_NAME));
        let name = name.and_then(Bytes::copied);
        let name = name.ok_or_else(|| bad("a name that cannot be read", name_len.into()))?;
        let end = cursor.position().checked_next_multiple_of(8);
        cursor
            .seek(end.ok_or_else(|| bad("an invalid length of a snapshot's entry", extra.into()))?);
        Ok(Entry {
            l1_offset,
            l1_len,
            name: String::from_utf8_lossy(&name).into_owned(),
            state_len,
            disk_len,
        })
    }
}

/// `len` numbers at `at`.
pub(crate) fn table(
    path: &Path,
    data: FileBytes<'_>,
    at: u64,
    len: u32,
) -> Result<Vec<u64>, DumpError> {
    let bad = || {
        DumpError::malformed(
            path,
            "a table beyond the end",
            FileOffset::new(at),
            len.into(),
        )
    };
    numbers(data, at, len.into()).ok_or_else(bad)
}

fn numbers(data: FileBytes<'_>, at: u64, len: u64) -> Option<Vec<u64>> {
    let bytes = usize::try_from(len.checked_mul(8)?).ok()?;
    let there = data.get(usize::try_from(at).ok()?, bytes)?;
    // It is all there: no more memory than the file has bytes.
    let mut table = vec![0; bytes];
    there.copy_to(&mut table).then_some(())?;
    let (numbers, _) = table.as_chunks::<8>();
    Some(
        numbers
            .iter()
            .map(|number| u64::from_be_bytes(*number))
            .collect(),
    )
}

/// Reads the state of the VM from front to back.
struct State<'a> {
    image: Image,
    data: FileBytes<'a>,
    l1: Vec<u64>,
    /// The table that is in use, and its number.
    l2: Option<(u64, Vec<u64>)>,
    /// The number of the next cluster of the disk, and what is left of the state.
    next: u64,
    left: u64,
    /// As many bytes as may still be taken from the file: none lies in it twice.
    room: u64,
    cluster: Vec<u8>,
    at: usize,
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<'a> State<'a> {
    fn new(image: &Image, data: FileBytes<'a>, l1: Vec<u64>, entry: &Entry) -> Option<Self> {
        let table = image.clusters_of_table().checked_mul(image.cluster())?;
        // Behind the disk, where a table begins.
        let tables = entry.disk_len.div_ceil(table);
        Some(Self {
            image: *image,
            data,
            l1,
            l2: None,
            next: tables.checked_mul(image.clusters_of_table())?,
            left: entry.state_len,
            room: to_u64(data.len()),
            cluster: Vec::new(),
            at: 0,
        })
    }

    /// The entry of the next cluster, and of one with subclusters which of them are there.
    fn entry(&mut self) -> io::Result<(u64, Option<u64>)> {
        let per_table = self.image.clusters_of_table();
        let place = |found: Option<u64>| found.ok_or_else(|| damaged("a table of nothing"));
        let number = place(self.next.checked_div(per_table))?;
        if self.l2.as_ref().is_none_or(|(known, _)| *known != number) {
            let l1 = usize::try_from(number).ok().and_then(|at| self.l1.get(at));
            let offset = l1.map(|entry| entry & OFFSET).filter(|offset| *offset != 0);
            let offset = offset.ok_or_else(|| damaged("a table of the VM's state is not there"))?;
            self.take(self.image.cluster())?;
            let table = numbers(self.data, offset, self.image.cluster() / 8);
            let table = table.ok_or_else(|| damaged("a table beyond the end of the file"))?;
            self.l2 = Some((number, table));
        }
        let inside = usize::try_from(place(self.next.checked_rem(per_table))?);
        let inside = inside.map_err(io::Error::other)?;
        let table = self.l2.as_ref().map_or(&[][..], |(_, table)| table);
        let entry = |at: usize| {
            table
                .get(at)
                .copied()
                .ok_or_else(|| damaged("a short table"))
        };
        if !self.image.extended {
            return Ok((entry(inside)?, None));
        }
        let at = inside
            .checked_mul(2)
            .ok_or_else(|| damaged("a short table"))?;
        Ok((entry(at)?, Some(entry(at | 1)?)))
    }

    fn take(&mut self, len: u64) -> io::Result<()> {
        let room = self.room.checked_sub(len);
        self.room = room.ok_or_else(|| damaged("clusters that lie in the file twice"))?;
        Ok(())
    }

    fn bytes(&mut self, at: u64, len: u64) -> io::Result<Vec<u8>> {
        self.take(len)?;
        let (at, len) = (usize::try_from(at), usize::try_from(len));
        let (at, len) = (
            at.map_err(io::Error::other)?,
            len.map_err(io::Error::other)?,
        );
        let there = self.data.get(at, len);
        let there = there.ok_or_else(|| damaged("a cluster beyond the end of the file"))?;
        let mut bytes = vec![0; len];
        if there.copy_to(&mut bytes) {
            return Ok(bytes);
        }
        Err(damaged("a cluster that cannot be read"))
    }

    /// Takes the next cluster.
    fn load(&mut self) -> io::Result<()> {
        let (entry, parts) = self.entry()?;
        let size = self.image.cluster();
        let len = usize::try_from(size).map_err(io::Error::other)?;
        let left = usize::try_from(self.left).map_err(io::Error::other)?;
        let offset = entry & OFFSET;
        self.cluster = if entry & COMPRESSED != 0 {
            self.compressed(entry)?
        } else if offset == 0 || parts.is_none() && entry & ZERO != 0 {
            let all_zero = parts.map_or(entry & ZERO != 0, |parts| {
                parts >> 32 == u64::from(u32::MAX)
            });
            if !all_zero {
                return Err(damaged("a cluster of the VM's state is not there"));
            }
            self.take(8)?;
            vec![0; len]
        } else {
            // What is behind the state in its last cluster need not be there.
            let mut cluster = self.bytes(offset, size.min(self.left))?;
            cluster.resize(len, 0);
            if let Some(parts) = parts {
                let size = (len / 32).max(1);
                for (number, part) in cluster.chunks_mut(size).enumerate() {
                    let bit = |of: u64| of >> number & 1 == 1;
                    if bit(parts >> 32) {
                        part.fill(0);
                    } else if !bit(parts) && number.checked_mul(size).is_some_and(|at| at < left) {
                        return Err(damaged(
                            "a part of a cluster of the VM's state is not there",
                        ));
                    }
                }
            }
            cluster
        };
        self.cluster.truncate(left);
        let behind = self.left.checked_sub(to_u64(self.cluster.len()));
        self.left = behind.ok_or_else(|| damaged("a cluster behind the VM's state"))?;
        self.next = self
            .next
            .checked_add(1)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.at = 0;
        Ok(())
    }

    fn compressed(&mut self, entry: u64) -> io::Result<Vec<u8>> {
        let stored = self.image.stored(entry, to_u64(self.data.len()));
        let (place, len) =
            stored.ok_or_else(|| damaged("a compressed cluster beyond the end of the file"))?;
        let stored = self.bytes(place, len)?;
        self.image.decompress(&stored)
    }
}

impl Read for State<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.cluster.len() {
            if self.left == 0 {
                return Ok(0);
            }
            self.load()?;
        }
        let mut rest = self.cluster.get(self.at..).unwrap_or(&[]);
        let read = rest.read(out)?;
        self.at = self
            .at
            .checked_add(read)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(read)
    }
}
