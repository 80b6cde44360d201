//! The cores that `xl dump-core` writes: ELF files of sections, without program headers (Xen's
//! `docs/misc/dump-core-format.txt`).

use crate::cursor::Cursor;
use crate::page_data::{MAX_FRAME, PAGE};
use crate::{DomainKind, ParseOptions, Within, XenError};
use sonicshot::{
    Bytes, FileBytes, FileOffset, Mfn, P2m, Pfn, PfnRange, PhaseProgress, Progress, WorkPhase,
    to_u64,
};

/// 64-bit, little-endian: the two bytes behind the magic.
const CLASS_AND_ORDER: u16 = 0x0102;
const ET_CORE: u16 = 4;
const SECTION_HEADER: u16 = 64;
const PROGBITS: u32 = 1;
const STRTAB: u32 = 3;
const NOTE: u32 = 7;

const NAMES_SECTION: &str = ".shstrtab";
const NOTE_SECTION: &str = ".note.Xen";
const PAGES_SECTION: &str = ".xen_pages";
const P2M_SECTION: &str = ".xen_p2m";
const PFN_SECTION: &str = ".xen_pfn";

const NOTE_NAME: &[u8; 4] = b"Xen\0";
const HEADER_NOTE: u32 = 0x200_0001;
const XEN_VERSION_NOTE: u32 = 0x200_0002;
const FORMAT_VERSION_NOTE: u32 = 0x200_0003;
const MAGIC_PV: u64 = 0xf00f_ebed;
const MAGIC_HVM: u64 = 0xf00f_ebee;
/// The only major version of the format.
const FORMAT: u64 = 0;

/// Stands for a page that there is not; its bytes are zero and mean nothing.
const NO_FRAME: u64 = u64::MAX;

/// Frames that are neighbours in the guest and in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoreRun {
    /// The guest's frames.
    pub frames: PfnRange,
    /// The place of the first one's content.
    pub offset: FileOffset,
}

/// A core of Xen.
///
/// ```
/// use sonicshot::FileBytes;
/// use sonicshot_xen::CoreDump;
/// assert!(!CoreDump::is_core(FileBytes::from_slice(b"\x7fELF")));
/// ```
#[derive(Debug)]
pub struct CoreDump {
    kind: DomainKind,
    machine: u16,
    xen: (u64, u64),
    vcpus: u64,
    runs: Vec<CoreRun>,
    p2m: Option<P2m>,
}

impl CoreDump {
    /// Whether `data` begins as a core of Xen does: as an ELF core without program headers, which
    /// nobody else writes.
    #[must_use]
    pub fn is_core(data: FileBytes<'_>) -> bool {
        Cursor::new(data).is_at(b"\x7fELF")
            && data.le_at(4) == Some(CLASS_AND_ORDER)
            && data.le_at(16) == Some(ET_CORE)
            && data.le_at(56) == Some(0_u16)
    }

    /// Reads the sections of the core in `data`, and where its pages are.
    ///
    /// # Errors
    /// [`XenError`] if it is none, or contradicts itself.
    pub fn parse(data: FileBytes<'_>) -> Result<Self, XenError> {
        Self::parse_with(data, &ParseOptions::new())
    }

    /// The same, with options. The bytes that are told of are those of the table of frames.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_with(data: FileBytes<'_>, options: &ParseOptions) -> Result<Self, XenError> {
        let sections = Sections::read(data)?;
        let notes = Notes::read(sections.open(NOTE_SECTION, NOTE)?)?;
        let pages = sections.open(PAGES_SECTION, PROGBITS)?;
        if Some(pages.left()) != notes.pages.checked_mul(PAGE) {
            return Err(pages.malformed(
                "a section of another length",
                pages.offset(),
                pages.left(),
            ));
        }
        let frames = frames(&sections, &notes, &options.progress)?;
        let p2m = match notes.kind {
            DomainKind::Pv => {
                let table = sections.open(P2M_SECTION, PROGBITS)?;
                let failed = |source| XenError::Frames {
                    place: table.place(table.offset()),
                    source,
                };
                Some(P2m::new(frames.iter().copied()).map_err(failed)?)
            }
            DomainKind::Hvm => None,
        };
        Ok(Self {
            kind: notes.kind,
            machine: sections.machine,
            xen: notes.xen,
            vcpus: notes.vcpus,
            runs: runs(&frames, pages.offset()),
            p2m,
        })
    }

    /// The number of processors by the header's note.
    pub(crate) fn vcpu_count(&self) -> u64 {
        self.vcpus
    }

    /// A section that must be there: a cursor at its beginning that ends where it does.
    pub(crate) fn open_section<'a>(
        data: FileBytes<'a>,
        name: &'static str,
    ) -> Result<Cursor<'a>, XenError> {
        Sections::read(data)?.open(name, PROGBITS)
    }

    /// The kind of the domain.
    #[must_use]
    pub fn kind(&self) -> DomainKind {
        self.kind
    }

    /// The processor, as ELF numbers it (`e_machine`).
    #[must_use]
    pub fn machine(&self) -> u16 {
        self.machine
    }

    /// The version of the Xen that ran it: major, minor.
    #[must_use]
    pub fn xen_version(&self) -> (u64, u64) {
        self.xen
    }

    /// The guest's frames, lowest first.
    #[must_use]
    pub fn runs(&self) -> &[CoreRun] {
        &self.runs
    }

    /// The map from a PV guest's frames to the machine's: its page tables hold those.
    #[must_use]
    pub fn p2m(&self) -> Option<&P2m> {
        self.p2m.as_ref()
    }
}

/// The section headers.
struct Sections<'a> {
    data: FileBytes<'a>,
    machine: u16,
    headers: Vec<Section>,
    /// The section with their names.
    names: FileBytes<'a>,
}

struct Section {
    /// The place of its name among the names.
    name: u32,
    kind: u32,
    offset: FileOffset,
    len: u64,
    /// The place of this header.
    at: FileOffset,
}

impl Section {
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, XenError> {
        let at = cursor.offset();
        let (name, kind) = (cursor.le()?, cursor.le()?);
        let (_flags, _address) = (cursor.le::<u64>()?, cursor.le::<u64>()?);
        let (offset, len) = (FileOffset::new(cursor.le()?), cursor.le()?);
        // Link, info, alignment, size of an entry.
        cursor.take(24)?;
        Ok(Self {
            name,
            kind,
            offset,
            len,
            at,
        })
    }
}

impl<'a> Sections<'a> {
    fn read(data: FileBytes<'a>) -> Result<Self, XenError> {
        let mut cursor = Cursor::new(data);
        if !CoreDump::is_core(data) {
            return Err(cursor.malformed(
                "missing ELF header of a Xen core",
                FileOffset::ZERO,
                data.byte_len(),
            ));
        }
        cursor.seek(FileOffset::new(18));
        let machine = cursor.le()?;
        cursor.seek(FileOffset::new(40));
        let table = FileOffset::new(cursor.le()?);
        cursor.seek(FileOffset::new(58));
        let at = cursor.offset();
        let size: u16 = cursor.le()?;
        if size != SECTION_HEADER {
            return Err(cursor.malformed("invalid size of a section header", at, size.into()));
        }
        let count: u16 = cursor.le()?;
        let named_at = cursor.offset();
        let names: u16 = cursor.le()?;
        cursor.seek(table);
        let mut headers = Vec::new();
        for _ in 0..count {
            headers.push(Section::read(&mut cursor)?);
        }
        let section = headers.get(usize::from(names)).filter(|s| s.kind == STRTAB);
        let section = section.ok_or_else(|| {
            cursor.malformed("invalid section with the names", named_at, names.into())
        })?;
        cursor.within = Within::Section(NAMES_SECTION);
        cursor.seek(section.offset);
        let names = cursor.take(section.len)?;
        Ok(Self {
            data,
            machine,
            headers,
            names,
        })
    }

    fn is_called(&self, section: &Section, name: &str) -> bool {
        let at = FileOffset::new(section.name.into());
        let names = Cursor::at(self.names, Within::Section(NAMES_SECTION), at);
        names.is_at(&[name.as_bytes(), b"\0"].concat())
    }

    /// The section of that name and type, which must be there once: a cursor at its beginning
    /// that ends where it does.
    fn open(&self, name: &'static str, kind: u32) -> Result<Cursor<'a>, XenError> {
        let mut named = self.headers.iter().filter(|s| self.is_called(s, name));
        let count = to_u64(named.clone().count());
        let section = named.next().filter(|_| count == 1);
        let section = section.ok_or(XenError::NotOneSection { name, count })?;
        let mut file = Cursor::at(self.data, Within::Section(name), section.offset);
        if section.kind != kind {
            return Err(file.malformed(
                "invalid type of the section",
                section.at,
                section.kind.into(),
            ));
        }
        file.take(section.len)?;
        // What was just taken ends inside.
        let data = self.data.part(0, file.offset().raw()).unwrap_or(self.data);
        Ok(Cursor::at(data, file.within, section.offset))
    }
}

/// The content of `.note.Xen`.
struct Notes {
    kind: DomainKind,
    vcpus: u64,
    pages: u64,
    xen: (u64, u64),
}

impl Notes {
    fn read(mut cursor: Cursor<'_>) -> Result<Self, XenError> {
        let start = cursor.offset();
        let (mut header, mut xen, mut format) = (None, None, None);
        while cursor.left() > 0 {
            let at = cursor.offset();
            let (name, len, note): (u32, u32, u32) = (cursor.le()?, cursor.le()?, cursor.le()?);
            if name as usize != NOTE_NAME.len() || !cursor.is_at(NOTE_NAME) {
                return Err(cursor.malformed("a note that is not Xen's", at, name.into()));
            }
            cursor.take(name.into())?;
            let next = cursor
                .offset()
                .checked_add(u64::from(len).next_multiple_of(4));
            let again = match note {
                HEADER_NOTE => header.replace(core_header(&mut cursor)?).is_some(),
                XEN_VERSION_NOTE => xen.replace((cursor.le()?, cursor.le()?)).is_some(),
                FORMAT_VERSION_NOTE => format.replace(format_version(&mut cursor)?).is_some(),
                _ => false,
            };
            if again {
                return Err(cursor.malformed("a second note of this type", at, note.into()));
            }
            let rest = next.and_then(|next| next.offset_from(cursor.offset()));
            let rest = rest.ok_or_else(|| cursor.malformed("a short note", at, len.into()))?;
            cursor.take(rest)?;
        }
        let missing = |note: u32| cursor.malformed("no note of this type", start, note.into());
        format.ok_or_else(|| missing(FORMAT_VERSION_NOTE))?;
        let (kind, vcpus, pages) = header.ok_or_else(|| missing(HEADER_NOTE))?;
        let xen = xen.ok_or_else(|| missing(XEN_VERSION_NOTE))?;
        Ok(Self {
            kind,
            vcpus,
            pages,
            xen,
        })
    }
}

/// The kind of the domain, and how many processors and pages there are.
fn core_header(cursor: &mut Cursor<'_>) -> Result<(DomainKind, u64, u64), XenError> {
    let at = cursor.offset();
    let kind = match cursor.le::<u64>()? {
        MAGIC_PV => DomainKind::Pv,
        MAGIC_HVM => DomainKind::Hvm,
        other => return Err(cursor.malformed("invalid kind of the domain", at, other)),
    };
    let (vcpus, pages) = (cursor.le()?, cursor.le()?);
    let at = cursor.offset();
    let size: u64 = cursor.le()?;
    if size != PAGE {
        return Err(cursor.malformed("invalid size of a page", at, size));
    }
    Ok((kind, vcpus, pages))
}

fn format_version(cursor: &mut Cursor<'_>) -> Result<(), XenError> {
    let at = cursor.offset();
    let version: u64 = cursor.le()?;
    if version >> 32 != FORMAT {
        return Err(cursor.malformed("invalid version of the format", at, version));
    }
    Ok(())
}

/// The frames that the pages are, in their order; of an HVM domain the second number is the first.
fn frames(
    sections: &Sections<'_>,
    notes: &Notes,
    progress: &dyn Progress,
) -> Result<Vec<(Pfn, Mfn)>, XenError> {
    let (name, entry) = match notes.kind {
        DomainKind::Pv => (P2M_SECTION, 16),
        DomainKind::Hvm => (PFN_SECTION, 8),
    };
    let mut table = sections.open(name, PROGBITS)?;
    if Some(table.left()) != notes.pages.checked_mul(entry) {
        return Err(table.malformed("a section of another length", table.offset(), table.left()));
    }
    let mut frames: Vec<(Pfn, Mfn)> = Vec::new();
    let mut ended = false;
    let mut phase = PhaseProgress::begin(progress, WorkPhase::Opening, table.left());
    while table.left() > 0 {
        phase.add(entry);
        let at = table.offset();
        let pfn = table.le::<u64>()?;
        let mfn = match notes.kind {
            DomainKind::Pv => table.le::<u64>()?,
            DomainKind::Hvm => pfn,
        };
        if pfn == NO_FRAME && mfn == NO_FRAME {
            ended = true;
            continue;
        }
        let wrong = |what| Err(table.malformed(what, at, pfn.max(mfn)));
        if pfn.max(mfn) >= MAX_FRAME {
            return wrong("invalid number of a page");
        }
        if ended {
            return wrong("a page behind those that are none");
        }
        if frames.last().is_some_and(|(last, _)| last.raw() >= pfn) {
            return wrong("a page that is not above the one before");
        }
        frames.push((Pfn::new(pfn), Mfn::new(mfn)));
    }
    phase.end();
    Ok(frames)
}

/// `frames`, whose pages begin at `offset` of the file, with neighbours together.
fn runs(frames: &[(Pfn, Mfn)], offset: FileOffset) -> Vec<CoreRun> {
    let mut runs: Vec<CoreRun> = Vec::new();
    for (number, (pfn, _)) in (0_u64..).zip(frames) {
        let inside = number.checked_mul(PAGE);
        let offset = inside.and_then(|inside| offset.checked_add(inside));
        let (Some(frames), Some(offset)) = (PfnRange::with_len(*pfn, 1), offset) else {
            // The section ends inside the file.
            continue;
        };
        match runs.last_mut() {
            Some(last) if last.frames.end() == *pfn => {
                last.frames = PfnRange::new(last.frames.start(), frames.end());
            }
            _ => runs.push(CoreRun { frames, offset }),
        }
    }
    runs
}
