//! The headers and the records of an image.

use crate::cursor::Cursor;
use crate::frames::{Frame, Frames};
use crate::page_data::{PageData, table_of};
use crate::{ParseOptions, Record, XenError};
use sonicshot::{Bytes, FileBytes, FileOffset, FileRange, PhaseProgress, Progress, WorkPhase};

/// The beginning of an image.
pub const MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";

/// The only byte order, that of x86.
const BYTE_ORDER: u32 = 0x0102_0304;
/// The configuration is JSON.
const XL_JSON: u32 = 1;
/// The mark of a libxl stream of version 2 that follows.
const XL_STREAM_V2: u32 = 2;

const LIBXL_MAGIC: &[u8; 8] = b"LibxlFmt";
const LIBXL_VERSION: u32 = 2;
/// The records are big-endian.
const BIG_ENDIAN: u32 = 1;
const LIBXL_END: u32 = 0;
const LIBXL_CONTEXT: u32 = 1;
const LIBXL_CHECKPOINT_END: u32 = 4;

const LIBXC_MAGIC: &[u8; 12] = b"\xff\xff\xff\xff\xff\xff\xff\xffXENF";
const LIBXC_VERSIONS: core::ops::RangeInclusive<u32> = 2..=3;
const PV: u32 = 1;
const HVM: u32 = 2;
const PAGE_SHIFT: u16 = 12;

const END: u32 = 0;
pub(crate) const PAGE_DATA: u32 = 1;
const P2M_FRAMES: u32 = 3;
const VERIFY: u32 = 0xd;
const CHECKPOINT: u32 = 0xe;
/// Xen itself takes no longer record.
const MAX_RECORD: u32 = 128 << 20;

/// Whether the content of pages is in their records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    Inside,
    LeftOut,
}

/// The kind of a domain, as libxc sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DomainKind {
    /// Paravirtualised: the guest's page tables are checked by Xen.
    Pv,
    /// HVM or PVH: the guest has its own page tables.
    Hvm,
}

/// The outermost of the streams and headers in a file, each of which holds the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// An image as `xl save` writes it: a header with the domain's configuration.
    Xl,
    /// The stream of libxl, with the state of device models.
    Libxl,
    /// The stream of libxc, with the domain's memory.
    Libxc,
}

fn padded(len: u32) -> u64 {
    u64::from(len).next_multiple_of(8)
}

/// The number of bytes of a record of pages that come before their data.
fn table_len(cursor: &mut Cursor<'_>) -> Result<u64, XenError> {
    let body = cursor.offset();
    let count = cursor.le::<u32>()?;
    cursor.seek(body);
    Ok(table_of(count))
}

/// An `xl save` image, or one of the streams in it by itself.
///
/// ```
/// use sonicshot::FileBytes;
/// use sonicshot_xen::{XenError, XlImage};
/// let cut = FileBytes::from_slice(b"Xen saved domain");
/// assert!(matches!(XlImage::parse(cut), Err(XenError::Truncated { .. })));
/// ```
#[derive(Debug)]
pub struct XlImage {
    outermost: Layer,
    kind: DomainKind,
    xen: (u32, u32),
    records: Vec<Record>,
    frames: Vec<Frame>,
}

impl XlImage {
    /// Reads all headers and records of the image in `data`, and where its pages are.
    ///
    /// # Errors
    /// [`XenError`] if it is none, contradicts itself or is of an unsupported kind.
    pub fn parse(data: FileBytes<'_>) -> Result<Self, XenError> {
        Self::parse_with(data, &ParseOptions::new())
    }

    /// The same, with options.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_with(data: FileBytes<'_>, options: &ParseOptions) -> Result<Self, XenError> {
        Self::read(data, Pages::Inside, &options.progress)
    }

    pub(crate) fn read(
        data: FileBytes<'_>,
        pages: Pages,
        progress: &dyn Progress,
    ) -> Result<Self, XenError> {
        let total = data.byte_len();
        let mut phase = PhaseProgress::begin(progress, WorkPhase::Opening, total);
        let mut cursor = Cursor::new(data);
        let outermost = if cursor.is_at(LIBXC_MAGIC) {
            Layer::Libxc
        } else if cursor.is_at(LIBXL_MAGIC) {
            Layer::Libxl
        } else {
            xl_header(&mut cursor)?;
            Layer::Xl
        };
        let image = match outermost {
            Layer::Libxc => Self::libxc_stream(&mut cursor, pages, &mut phase)?,
            Layer::Xl | Layer::Libxl => Self::libxl_stream(&mut cursor, pages, &mut phase)?,
        };
        phase.end();
        Ok(Self { outermost, ..image })
    }

    fn libxl_stream(
        cursor: &mut Cursor<'_>,
        pages: Pages,
        phase: &mut PhaseProgress<'_>,
    ) -> Result<Self, XenError> {
        libxl_header(cursor)?;
        let mut image = None;
        // Each turn reads a header, so that this ends with the file.
        loop {
            cursor.next_record();
            let at = cursor.offset();
            let (kind, len): (u32, u32) = (cursor.le()?, cursor.le()?);
            match kind {
                LIBXL_CONTEXT if image.is_some() => {
                    return Err(cursor.malformed("a second memory image", at, kind.into()));
                }
                LIBXL_CONTEXT if len != 0 => {
                    return Err(cursor.malformed(
                        "invalid length of the memory image's record",
                        at,
                        len.into(),
                    ));
                }
                LIBXL_CONTEXT => image = Some(Self::libxc_stream(cursor, pages, phase)?),
                LIBXL_CHECKPOINT_END => return Err(cursor.unsupported(CHECKPOINTED, at)),
                LIBXL_END => break,
                _ => {
                    cursor.take(padded(len))?;
                }
            }
        }
        image.ok_or_else(|| cursor.malformed("no memory image before the end", cursor.offset(), 0))
    }

    fn libxc_stream(
        cursor: &mut Cursor<'_>,
        pages: Pages,
        phase: &mut PhaseProgress<'_>,
    ) -> Result<Self, XenError> {
        let (kind, xen) = libxc_header(cursor)?;
        let mut records = Vec::new();
        let mut frames = Frames::default();
        // Each turn reads a header, so that this ends with the file.
        loop {
            let number = cursor.next_record();
            let offset = cursor.offset();
            let (record_kind, len): (u32, u32) = (cursor.le()?, cursor.le()?);
            if len > MAX_RECORD {
                return Err(cursor.malformed("invalid length of a record", offset, len.into()));
            }
            let begins = cursor.offset();
            let stored = match (record_kind, pages) {
                (PAGE_DATA, Pages::LeftOut) => table_len(cursor)?,
                _ => padded(len),
            };
            let body = cursor.take(stored)?;
            let record = Record {
                number,
                kind: record_kind,
                len,
                offset,
                body: FileRange::new(begins, cursor.offset()),
            };
            match record.kind {
                END if record.len != 0 => {
                    return Err(cursor.malformed(
                        "an END record with a body",
                        offset,
                        record.len.into(),
                    ));
                }
                // What follows are passes of which only the last whole one counts.
                CHECKPOINT => return Err(cursor.unsupported(CHECKPOINTED, offset)),
                // The pages that follow are to be compared with those that came.
                VERIFY => {
                    return Err(cursor.unsupported("an image made to be verified", offset));
                }
                P2M_FRAMES if kind == DomainKind::Pv => {
                    let last = body.le_at::<u32>(4).map(u64::from);
                    let last = last.filter(|_| record.len >= 8).ok_or_else(|| {
                        cursor.malformed("invalid length of P2M_FRAMES", offset, record.len.into())
                    })?;
                    frames.set_last(last);
                }
                PAGE_DATA => frames.add(&PageData::parse(cursor, &record, body)?, cursor)?,
                _ => {}
            }
            records.push(record);
            phase.reach(cursor.offset().raw());
            if record.kind == END {
                break;
            }
        }
        Ok(Self {
            outermost: Layer::Libxc,
            kind,
            xen,
            records,
            frames: frames.settle(),
        })
    }

    /// The layer that the file begins with.
    #[must_use]
    pub fn outermost(&self) -> Layer {
        self.outermost
    }

    /// The kind of the domain.
    #[must_use]
    pub fn kind(&self) -> DomainKind {
        self.kind
    }

    /// The version of the Xen that saved it: major, minor.
    #[must_use]
    pub fn xen_version(&self) -> (u32, u32) {
        self.xen
    }

    /// The records of the libxc stream, in order.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The frames that the guest has after a restore, lowest first, each once.
    #[must_use]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    pub(crate) fn page_data(
        &self,
        data: FileBytes<'_>,
        record: &Record,
    ) -> Result<PageData, XenError> {
        let mut cursor = Cursor::at(data, record.place().within, record.body.start());
        let body = cursor.take(record.body.len())?;
        PageData::parse(&cursor, record, body)
    }
}

const CHECKPOINTED: &str = "a checkpointed stream (Remus, COLO)";

fn xl_header(cursor: &mut Cursor<'_>) -> Result<(), XenError> {
    let magic: [u8; 32] = cursor.array()?;
    if &magic != MAGIC {
        return Err(cursor.malformed("invalid magic of an xl image", FileOffset::ZERO, 0));
    }
    let at = cursor.offset();
    let order = cursor.le::<u32>()?;
    if order != BYTE_ORDER {
        return Err(cursor.malformed("invalid byte order", at, order.into()));
    }
    let at = cursor.offset();
    let mandatory = cursor.le::<u32>()?;
    if mandatory & !(XL_JSON | XL_STREAM_V2) != 0 {
        return Err(cursor.malformed("an unknown mandatory flag", at, mandatory.into()));
    }
    if mandatory & XL_STREAM_V2 == 0 {
        return Err(cursor.unsupported("a stream from before Xen 4.6", at));
    }
    let _optional = cursor.le::<u32>()?;
    let config = cursor.le::<u32>()?;
    cursor.take(config.into())?;
    Ok(())
}

fn libxl_header(cursor: &mut Cursor<'_>) -> Result<(), XenError> {
    let at = cursor.offset();
    let magic: [u8; 8] = cursor.array()?;
    if &magic != LIBXL_MAGIC {
        let value = u64::from_be_bytes(magic);
        return Err(cursor.malformed("invalid magic of the libxl stream", at, value));
    }
    let at = cursor.offset();
    let version = cursor.be::<u32>()?;
    if version != LIBXL_VERSION {
        return Err(cursor.malformed("invalid version of the libxl stream", at, version.into()));
    }
    let at = cursor.offset();
    let options = cursor.be::<u32>()?;
    if options & BIG_ENDIAN != 0 {
        return Err(cursor.unsupported("a big-endian stream", at));
    }
    Ok(())
}

fn libxc_header(cursor: &mut Cursor<'_>) -> Result<(DomainKind, (u32, u32)), XenError> {
    let at = cursor.offset();
    let magic: [u8; 12] = cursor.array()?;
    if &magic != LIBXC_MAGIC {
        return Err(cursor.malformed("invalid magic of the libxc stream", at, 0));
    }
    let at = cursor.offset();
    let version = cursor.be::<u32>()?;
    if !LIBXC_VERSIONS.contains(&version) {
        return Err(cursor.malformed("invalid version of the libxc stream", at, version.into()));
    }
    let at = cursor.offset();
    let options: u16 = cursor.be()?;
    if u32::from(options) & BIG_ENDIAN != 0 {
        return Err(cursor.unsupported("a big-endian stream", at));
    }
    cursor.take(6)?;
    let at = cursor.offset();
    let kind = match cursor.le::<u32>()? {
        PV => DomainKind::Pv,
        HVM => DomainKind::Hvm,
        other => return Err(cursor.malformed("invalid kind of the domain", at, other.into())),
    };
    let at = cursor.offset();
    let shift = cursor.le::<u16>()?;
    if shift != PAGE_SHIFT {
        return Err(cursor.malformed("invalid size of a page", at, shift.into()));
    }
    cursor.take(2)?;
    Ok((kind, (cursor.le()?, cursor.le()?)))
}
