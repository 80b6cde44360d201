//! The disks whose images were given for a checkpoint that refers to them.

use super::source::{DiskOffset, DiskSource};
use crate::PageSize;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::disk::{DiskInfo, DiskMark, DiskRun, MarkKind, digest};
use crate::checkpoint::wire::layout::{size, too_large};
use std::fmt;
use std::io;
use std::sync::Arc;

/// A disk that a checkpoint refers to, and where its bytes are to be had.
#[derive(Clone)]
pub struct GivenDisk {
    name: String,
    source: Arc<dyn DiskSource>,
    immutable: bool,
}

impl GivenDisk {
    /// The disk `name`, as it was when the guest was saved.
    #[must_use]
    pub fn new(name: impl Into<String>, source: impl DiskSource + 'static) -> Self {
        Self {
            name: name.into(),
            source: Arc::new(source),
            immutable: false,
        }
    }

    /// Declares that nobody writes to it, neither the guest nor the host, for as long as a guest
    /// runs from the checkpoint: only then are pages read from it while one runs.
    #[must_use]
    pub fn immutable(mut self) -> Self {
        self.immutable = true;
        self
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it was declared that nobody writes to it.
    #[must_use]
    pub const fn is_immutable(&self) -> bool {
        self.immutable
    }
}

impl fmt::Debug for GivenDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GivenDisk")
            .field("name", &self.name)
            .field("immutable", &self.immutable)
            .finish_non_exhaustive()
    }
}

/// The treatment of a disk that was written to since the guest was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum MovedOn {
    /// It is refused.
    #[default]
    Refuse,
    /// It is taken all the same. What the checkpoint refers to must still be there, but the guest's
    /// memory may contradict the rest of the disk.
    GoOn,
}

/// The disks that were given, by their numbers in the checkpoint.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    given: Vec<Option<GivenDisk>>,
}

impl Disks {
    /// Checks what was `given` for the `known` disks: names, lengths and marks.
    pub(crate) fn check(
        known: &[DiskInfo],
        given: Vec<GivenDisk>,
        moved_on: MovedOn,
    ) -> Result<Self, CheckpointError> {
        let mut disks = Self::default();
        disks.given.resize_with(known.len(), || None);
        for disk in given {
            let found = known.iter().zip(&mut disks.given);
            let mut found = found.filter(|(info, _)| info.name == disk.name);
            let Some((info, place)) = found.next() else {
                return Err(CheckpointError::UnknownDisk {
                    name: disk.name,
                    known: known.iter().map(|info| info.name.clone()).collect(),
                });
            };
            if place.is_some() {
                return Err(CheckpointError::DiskTwice { name: disk.name });
            }
            check_disk(info, &*disk.source, moved_on)?;
            *place = Some(disk);
        }
        Ok(disks)
    }

    /// The disk with this number.
    pub(crate) fn get(&self, known: &[DiskInfo], disk: u32) -> Result<&GivenDisk, CheckpointError> {
        let number = size(disk.into());
        let given = self.given.get(number).and_then(Option::as_ref);
        given.ok_or_else(|| CheckpointError::NoDisk {
            name: known
                .get(number)
                .map_or_else(|| format!("number {disk}"), |info| info.name.clone()),
        })
    }

    /// Fills `out` with what is on a disk at `at`.
    pub(crate) fn read(
        &self,
        known: &[DiskInfo],
        disk: u32,
        at: DiskOffset,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let given = self.get(known, disk)?;
        given
            .source
            .read_disk(out, at)
            .map_err(disk_io(&given.name, at))
    }

    /// The bytes of `run` in the disk's order, into `out`; refused unless they are what they were.
    pub(crate) fn read_run(
        &self,
        known: &[DiskInfo],
        run: &DiskRun,
        page_size: PageSize,
        out: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        // Of a run that was decoded, at most `MAX_DISK_RUN`.
        out.resize(size(u64::from(run.pages) << page_size.shift()), 0);
        self.read(known, run.disk, run.at, out)?;
        check_run(known, run, out)
    }
}

/// Refuses bytes that are not those that `run` had.
pub(crate) fn check_run(
    known: &[DiskInfo],
    run: &DiskRun,
    bytes: &[u8],
) -> Result<(), CheckpointError> {
    let Some(info) = known.get(size(run.disk.into())) else {
        return Err(CheckpointError::NoDisk {
            name: String::new(),
        });
    };
    if digest(info.hash, bytes)? == run.digest {
        return Ok(());
    }
    Err(CheckpointError::DiskChanged {
        name: info.name.clone(),
        at: run.at,
    })
}

fn disk_io(name: &str, at: DiskOffset) -> impl FnOnce(io::Error) -> CheckpointError {
    move |source| CheckpointError::DiskIo {
        name: name.to_owned(),
        at,
        source,
    }
}

/// Refuses a disk of another length, and one whose file systems were written to since.
fn check_disk(
    info: &DiskInfo,
    source: &dyn DiskSource,
    moved_on: MovedOn,
) -> Result<(), CheckpointError> {
    let found = source
        .disk_len()
        .map_err(disk_io(&info.name, DiskOffset::ZERO))?;
    if found < info.bytes || (found != info.bytes && moved_on == MovedOn::Refuse) {
        return Err(CheckpointError::DiskLength {
            name: info.name.clone(),
            found,
            expected: info.bytes,
        });
    }
    if !info.hash.is_available() {
        let codec = info.hash.name();
        return Err(CheckpointError::CodecMissing { codec });
    }
    if moved_on == MovedOn::GoOn {
        return Ok(());
    }
    for mark in &info.marks {
        let mut bytes = vec![0; size(mark.len.into())];
        let read = source.read_disk(&mut bytes, mark.at);
        read.map_err(disk_io(&info.name, mark.at))?;
        if digest(info.hash, &bytes)? != mark.digest {
            return Err(CheckpointError::DiskMovedOn {
                name: info.name.clone(),
                what: mark.kind.name(),
                at: mark.at,
            });
        }
    }
    Ok(())
}

impl DiskInfo {
    /// The disk `source`, as it is now: what tells later that it is still so stands at `marks`
    /// (where each is, how many bytes it has, at most [`LONGEST_MARK`](Self::LONGEST_MARK), and
    /// what it is).
    ///
    /// # Errors
    /// [`CheckpointError::DiskIo`] if it cannot be read, [`CheckpointError::CodecMissing`] of a
    /// hash that this build has not.
    pub fn of(
        name: impl Into<String>,
        source: &dyn DiskSource,
        hash: super::hash::DiskHash,
        marks: &[(DiskOffset, u32, MarkKind)],
    ) -> Result<Self, CheckpointError> {
        let name = name.into();
        let bytes = source
            .disk_len()
            .map_err(disk_io(&name, DiskOffset::ZERO))?;
        let mark = |&(at, len, kind): &(DiskOffset, u32, MarkKind)| {
            if len > Self::LONGEST_MARK {
                let most = Self::LONGEST_MARK.into();
                return Err(too_large("bytes of a disk's mark", len.into(), most));
            }
            let mut bytes = vec![0; size(len.into())];
            let read = source.read_disk(&mut bytes, at);
            read.map_err(disk_io(&name, at))?;
            let digest = digest(hash, &bytes)?;
            Ok(DiskMark {
                at,
                len,
                kind,
                digest,
            })
        };
        let marks = marks
            .iter()
            .map(mark)
            .collect::<Result<_, CheckpointError>>()?;
        Ok(Self {
            name,
            bytes,
            hash,
            marks,
        })
    }
}
