//! QEMU's migration files, of two kinds.

pub(crate) mod content;
pub(crate) mod device_state;
pub(crate) mod mapped_ram;
pub(crate) mod migration;
pub(crate) mod start;
pub(crate) mod stream;

use crate::DumpError;
use crate::backing::spool::Image;
use crate::backing::spool::Spool;
use crate::format::kind::{Format, Kind, Source, boxed};
use sonicshot::FileOffset;
use start::{Cursor, MAGIC, MAPPED_RAM};
use std::fs::File;

pub(crate) const KIND: Kind = Kind::by_magic("qemu", &[MAGIC], open);

/// What a migration file is wrapped in.
#[derive(Debug, Default)]
pub(crate) struct Wrapping {
    image: Option<Image>,
    /// The content, if the image is compressed.
    unpacked: Option<Spool>,
}

impl Wrapping {
    /// Where the migration file begins in the bytes.
    pub(crate) fn begin(&self) -> FileOffset {
        match self.image {
            Some(image) if image.compression.is_none() => image.payload_at,
            _ => FileOffset::ZERO,
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
        self.packed_in().map_or(own, |(file, _)| file)
    }

    /// The compressed image, if it is one.
    pub(crate) fn packed_in(&self) -> Option<(&File, Image)> {
        self.unpacked.as_ref()?.image()
    }
}

/// Opens a migration file, or what was compressed as one.
pub(crate) fn open(source: Source<'_>) -> Result<Box<dyn Format>, DumpError> {
    let unpacked = source.spool.clone().filter(|spool| spool.image().is_some());
    let image = unpacked.as_ref().and_then(Spool::image);
    let image = image.map(|(_, image)| image);
    open_wrapped(source, Wrapping { image, unpacked })
}

/// Opens the migration file in `image`.
pub(crate) fn open_in(source: Source<'_>, image: Image) -> Result<Box<dyn Format>, DumpError> {
    let image = Some(image);
    let unpacked = None;
    open_wrapped(source, Wrapping { image, unpacked })
}

fn open_wrapped(source: Source<'_>, wrapping: Wrapping) -> Result<Box<dyn Format>, DumpError> {
    let mut cursor = Cursor::new(source.path, source.data(), wrapping.begin());
    if start::start(&mut cursor)?.has(MAPPED_RAM) {
        return mapped_ram::open(source, wrapping).map(boxed);
    }
    stream::open(source, wrapping).map(boxed)
}
