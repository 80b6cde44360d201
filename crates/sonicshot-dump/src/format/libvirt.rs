//! libvirt's save images: what `virsh save` and `virsh managedsave` write
//! (`src/qemu/qemu_saveimage.h`).
//!
//! A header of 92 bytes in the order of the host that wrote it, the domain's XML and whatever else
//! libvirt wants to know, and then a migration file of QEMU's: as it is, compressed as a whole, or
//! (format `sparse`, libvirt 11 and later) a mapped-ram file whose offsets count from the beginning
//! of the image. libvirt's own part stays as it is.

use crate::DumpError;
use crate::backing::spool::{Image, Spool};
use crate::backing::unpack::Compression;
use crate::format::kind::{Format, Kind, Source};
use crate::format::qemu;
use sonicshot::{Cursor, CutShort, FileBytes, FileOffset, to_u64};
use std::path::Path;

pub(crate) const KIND: Kind = Kind::by_magic("libvirt", &[MAGIC], open);

/// An image that is complete.
pub(crate) const MAGIC: &[u8; 16] = b"LibvirtQemudSave";
const HEADER_LEN: FileOffset = FileOffset::new(92);
const VERSION_AT: FileOffset = FileOffset::new(16);
const DATA_LEN: FileOffset = FileOffset::new(20);
const FORMAT: FileOffset = FileOffset::new(28);
const VERSION: u32 = 2;
/// The XML of a domain, with its snapshots and what else there is, is shorter.
const MAX_DATA: u32 = 1 << 28;

fn open(source: Source<'_>) -> Result<Box<dyn Format>, DumpError> {
    let image = parse(source.path, source.data())?;
    if image.compression.is_none() {
        return qemu::open_in(source, image);
    }
    let spool = Spool::decompress(source.path, source.content.file(), image, source.known)?;
    let spool = spool.within(source.spool.as_ref())?;
    qemu::open(Source::spooled(&spool, source.known)?)
}

/// Reads the header.
fn parse(path: &Path, data: FileBytes<'_>) -> Result<Image, DumpError> {
    let malformed =
        |what, offset, value: u32| Err(DumpError::malformed(path, what, offset, u64::from(value)));
    let mut header = Cursor::at(data, VERSION_AT.raw());
    let mut read = || {
        let (version, data_len) = (header.le::<u32>()?, header.le::<u32>()?);
        header.skip(4)?;
        let format = header.le::<u32>()?;
        header.skip(4)?;
        Ok::<_, CutShort>((version, data_len, format))
    };
    let Ok((version, data_len, format)) = read() else {
        let what = "truncated: the file ends inside the header";
        return malformed(what, VERSION_AT, 0);
    };
    // A host of the other byte order.
    let swapped = version.swap_bytes() == VERSION;
    let in_order = |word: u32| if swapped { word.swap_bytes() } else { word };
    let (data_len, format) = (in_order(data_len), in_order(format));
    if version != VERSION && !swapped {
        return malformed(
            "invalid version of a libvirt save image",
            VERSION_AT,
            version,
        );
    }
    if data_len > MAX_DATA {
        return malformed(
            "invalid length of the domain's description",
            DATA_LEN,
            data_len,
        );
    }
    let payload_at = HEADER_LEN.checked_add(data_len.into());
    let payload_at = payload_at.filter(|at| at.raw() < to_u64(data.len()));
    let Some(payload_at) = payload_at else {
        let what = "domain description that reaches beyond the end: truncated";
        return malformed(what, DATA_LEN, data_len);
    };
    let compression = match format {
        // Raw and sparse: the migration file itself says which it is.
        0 | 6 => None,
        1 => Some(Compression::Gzip),
        2 => Some(Compression::Bzip2),
        3 => Some(Compression::Xz),
        4 => Some(Compression::Lzop),
        5 => Some(Compression::Zstd),
        other => return malformed("invalid format of a libvirt save image", FORMAT, other),
    };
    Ok(Image {
        compression,
        payload_at,
    })
}
