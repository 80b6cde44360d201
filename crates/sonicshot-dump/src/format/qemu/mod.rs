//! QEMU's migration files, of two kinds.

pub(crate) mod content;
pub(crate) mod device_state;
pub(crate) mod internal;
pub(crate) mod mapped_ram;
pub(crate) mod migration;
pub(crate) mod others;
pub(crate) mod start;
pub(crate) mod stream;
pub(crate) mod wire;

use crate::backing::spool::{Image, Packed, Spool};
use crate::format::kind::{Format, Kind, Source, boxed};
use crate::{DumpError, LayoutSpec};
use internal::Internal;
use sonicshot::{FileOffset, to_u64};
use start::{MAGIC, MAPPED_RAM};
use std::fs::File;
use wire::Cursor;

pub(crate) const KIND: Kind = Kind::by_magic(NAME, &[MAGIC], open);
const NAME: &str = "qemu";

/// A migration file behind something else: `migrate file:NAME,offset=N` leaves the beginning of the
/// file to whoever gave the name. The offsets in it count from the beginning of the file.
pub(crate) const BEHIND: Kind = Kind {
    form_of: Some(NAME),
    is_one: |source| offset_of(source).is_some(),
    open: |source| {
        let at = offset_of(&source).unwrap_or(FileOffset::ZERO);
        open_wrapped(source, Wrapping::at(at))
    },
    ..Kind::by_name(|_| Ok(None))
};

/// A migration file begins in the first bytes of a file, so many at most.
const MAX_OFFSET: usize = 16 << 20;
/// So many places that look like a beginning are looked at.
const MAX_BEGINNINGS: usize = 16;
/// The first bytes of a migration file, up to its configuration.
const BEGINNING: &[u8] = b"QEVM\0\0\0\x03\x07";

/// The offset of a migration file that is not at the beginning of its file. Memory may hold such
/// bytes anywhere: what is in there must fit all of the file, or nothing may be before it.
fn offset_of(source: &Source<'_>) -> Option<FileOffset> {
    let data = source.data();
    let start = data.get(0, data.len().min(MAX_OFFSET))?;
    let mut bytes = vec![0; start.len()];
    start.copy_to(&mut bytes).then_some(())?;
    let found = memchr::memmem::find_iter(&bytes, BEGINNING).take(MAX_BEGINNINGS);
    let fits = |at: &usize| {
        let begin = FileOffset::new(to_u64(*at));
        let mut cursor = Cursor::new(source.path, data, begin);
        start::start(&mut cursor).is_ok_and(|start| {
            // One that is damaged, or cut off, is one all the same.
            let (before, _) = bytes.split_at(*at);
            if before.iter().all(|byte| *byte == 0) {
                return true;
            }
            let layout = source.layout().or(Some(&LayoutSpec::Flat));
            start.has(MAPPED_RAM)
                && mapped_ram::MappedRam::parse(source.path, data, begin, layout).is_ok()
        })
    };
    let mut found = found.filter(|at| *at > 0);
    found.find(fits).map(|at| FileOffset::new(to_u64(at)))
}

/// The wrapping of a migration file.
#[derive(Debug)]
pub(crate) struct Wrapping {
    /// The offset of the migration file, if it is in no image.
    at: FileOffset,
    image: Option<Image>,
    /// The content, if the image is compressed.
    unpacked: Option<Spool>,
}

impl Wrapping {
    /// In nothing, but behind what is before `at`.
    const fn at(at: FileOffset) -> Self {
        Self {
            at,
            image: None,
            unpacked: None,
        }
    }

    /// The offset of the migration file in the bytes.
    pub(crate) fn begin(&self) -> FileOffset {
        match self.image {
            Some(image) if image.compression.is_none() => image.payload_at,
            _ => self.at,
        }
    }

    pub(crate) fn image(&self) -> Option<Image> {
        self.image
    }

    pub(crate) fn unpacked(&self) -> Option<&Spool> {
        self.unpacked.as_ref()
    }

    /// The file that it is in: the image's, or `own` if it is in none of its own.
    pub(crate) fn file_or<'a>(&'a self, own: &'a File) -> &'a File {
        self.packed_in().map_or(own, |packed| packed.file)
    }

    /// The compressed image, if it is one.
    pub(crate) fn packed_in(&self) -> Option<Packed<'_>> {
        self.unpacked.as_ref()?.original()
    }
}

/// Opens a migration file, or what was compressed as one.
pub(crate) fn open(source: Source<'_>) -> Result<Box<dyn Format>, DumpError> {
    if let Some(spool) = source.spool.clone()
        && let Some(image) = spool.state_of()
    {
        let image = image.try_clone();
        let image = image.map_err(DumpError::io("reading", source.path))?;
        let inner = open_wrapped(source, Wrapping::at(FileOffset::ZERO))?;
        return Ok(boxed(Internal {
            inner,
            spool,
            image,
        }));
    }
    let unpacked = source.spool.clone().filter(|spool| spool.image().is_some());
    let image = unpacked.as_ref().and_then(Spool::image);
    let image = image.map(|(_, image)| image);
    open_wrapped(
        source,
        Wrapping {
            at: FileOffset::ZERO,
            image,
            unpacked,
        },
    )
}

/// Opens the migration file in `image`.
pub(crate) fn open_in(source: Source<'_>, image: Image) -> Result<Box<dyn Format>, DumpError> {
    let image = Some(image);
    let unpacked = None;
    open_wrapped(
        source,
        Wrapping {
            at: FileOffset::ZERO,
            image,
            unpacked,
        },
    )
}

fn open_wrapped(source: Source<'_>, wrapping: Wrapping) -> Result<Box<dyn Format>, DumpError> {
    let mut cursor = Cursor::new(source.path, source.data(), wrapping.begin());
    if start::start(&mut cursor)?.has(MAPPED_RAM) {
        return mapped_ram::open(source, wrapping).map(boxed);
    }
    stream::open(source, wrapping).map(boxed)
}
