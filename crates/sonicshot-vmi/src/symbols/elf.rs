//! vmlinux: the ELF symbol table, and types from BTF or DWARF.

use super::bytes::Bytes;
use super::dwarf::Dwarf;
use super::names::NameIndex;
use super::own::OwnFile;
use super::{Btf, Member, SymbolError, SymbolSource};
use crate::KernelVa;
use goblin::elf::header::header64;
use goblin::elf::section_header::{SHF_COMPRESSED, SHT_NOBITS, SHT_NOTE, SHT_SYMTAB};
use sonicshot::{to_u64, to_usize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// `struct elf64_shdr` and `struct elf64_sym`, in bytes.
const SECTION_SIZE: usize = 64;
const SYMBOL_SIZE: usize = 24;

/// The notes of a kernel are less than a page.
pub(crate) const MAX_NOTES: u64 = 1 << 16;

/// One section of the file.
#[derive(Clone, Copy, Debug)]
struct Section {
    name: u32,
    kind: u32,
    flags: u64,
    address: u64,
    offset: u64,
    size: u64,
    link: u32,
}

/// A vmlinux: symbols from `.symtab`, types from `.BTF` if the file has it, else from DWARF.
///
/// The file is mapped, and no more of it is read than what is asked for needs.
#[derive(Debug)]
pub struct Vmlinux {
    origin: String,
    file: Arc<OwnFile>,
    sections: Vec<Section>,
    names_section: usize,
    symbols: OnceLock<SymbolTable>,
    types: OnceLock<Result<Option<Types>, String>>,
    prefer_dwarf: bool,
    build_id: Option<Vec<u8>>,
    banner: OnceLock<Option<String>>,
}

#[derive(Debug)]
enum Types {
    Btf(Btf),
    Dwarf(Dwarf),
}

impl Types {
    fn source(&self) -> &dyn SymbolSource {
        match self {
            Self::Btf(btf) => btf,
            Self::Dwarf(dwarf) => dwarf,
        }
    }
}

#[derive(Debug)]
struct SymbolTable {
    /// The places of the symbols and of the strings in the file: offset and length.
    symbols: (usize, usize),
    strings: (usize, usize),
    index: NameIndex,
}

impl Vmlinux {
    /// Opens the vmlinux at `path`.
    ///
    /// # Errors
    /// [`SymbolError`] if it cannot be read or is no little-endian ELF64 file with sections.
    pub fn open(path: &Path) -> Result<Self, SymbolError> {
        Self::new(path.display().to_string(), OwnFile::open(path)?)
    }

    /// Takes types from DWARF even where the file has BTF.
    #[must_use]
    pub fn prefer_dwarf(mut self) -> Self {
        self.prefer_dwarf = true;
        self
    }

    pub(crate) fn new(origin: String, file: OwnFile) -> Result<Self, SymbolError> {
        let name = origin.clone();
        let malformed = |what, offset: u64, value: u64| SymbolError::Malformed {
            origin: name.clone(),
            what,
            offset,
            value,
        };
        let data = Bytes(file.bytes());
        let head: &[u8; header64::SIZEOF_EHDR] = data
            .get(0, header64::SIZEOF_EHDR)
            .and_then(|head| head.try_into().ok())
            .ok_or_else(|| {
                malformed(
                    "a file too short for an ELF header",
                    0,
                    to_u64(file.bytes().len()),
                )
            })?;
        let header = header64::Header::from_bytes(head);
        // Class 64-bit, data little-endian.
        if head.get(4..6) != Some(&[2, 1]) {
            return Err(malformed(
                "no little-endian ELF64 file",
                4,
                u64::from(head[4]),
            ));
        }
        let count = usize::from(header.e_shnum);
        let table = to_usize(header.e_shoff);
        // Of 16 bits.
        if count == 0 || usize::from(header.e_shentsize) != SECTION_SIZE {
            return Err(malformed("no sections", 0x3c, to_u64(count)));
        }
        let mut sections = Vec::with_capacity(count);
        for number in 0..count {
            let at = number
                .checked_mul(SECTION_SIZE)
                .and_then(|offset| table.checked_add(offset));
            let section = at.and_then(|at| Section::read(data, at));
            sections.push(section.ok_or_else(|| {
                malformed(
                    "a section header beyond the end",
                    header.e_shoff,
                    to_u64(number),
                )
            })?);
        }
        let names_section = usize::from(header.e_shstrndx);
        let mut this = Self {
            origin,
            file: Arc::new(file),
            sections,
            names_section,
            symbols: OnceLock::new(),
            types: OnceLock::new(),
            prefer_dwarf: false,
            build_id: None,
            banner: OnceLock::new(),
        };
        this.build_id = this.read_build_id();
        Ok(this)
    }

    fn data(&self) -> Bytes<'_> {
        Bytes(self.file.bytes())
    }

    /// A section's place in the file, if it has bytes there.
    fn place(section: &Section) -> Option<(usize, usize)> {
        if section.kind == SHT_NOBITS || section.flags & u64::from(SHF_COMPRESSED) != 0 {
            return None;
        }
        Some((
            usize::try_from(section.offset).ok()?,
            usize::try_from(section.size).ok()?,
        ))
    }

    /// The place of the section `name` in the file, if all of it lies there.
    fn section(&self, name: &str) -> Option<(usize, usize)> {
        let (names, names_len) = Self::place(self.sections.get(self.names_section)?)?;
        let names = Bytes(self.data().get(names, names_len)?);
        let section = self.sections.iter().find(|section| {
            usize::try_from(section.name)
                .ok()
                .and_then(|at| names.c_str(at))
                == Some(name.as_bytes())
        })?;
        let (at, len) = Self::place(section)?;
        self.data().get(at, len)?;
        Some((at, len))
    }

    /// `NT_GNU_BUILD_ID` of any note section.
    fn read_build_id(&self) -> Option<Vec<u8>> {
        let notes = self.sections.iter().filter(|s| s.kind == SHT_NOTE);
        let bytes = |section| {
            let (at, len) = Self::place(section)?;
            self.data().get(at, len)
        };
        notes.filter_map(bytes).find_map(build_id_of_notes)
    }

    fn symbol_table(&self) -> &SymbolTable {
        /// More symbols no kernel has.
        const KERNELS_SYMBOLS: usize = 1 << 24;
        /// A section that is not there.
        const NOTHING: (usize, usize) = (0, 0);
        self.symbols.get_or_init(|| {
            let symtab = self.sections.iter().find(|s| s.kind == SHT_SYMTAB);
            let symbols = symtab.and_then(Self::place).unwrap_or(NOTHING);
            let strings = symtab
                .and_then(|s| self.sections.get(usize::try_from(s.link).ok()?))
                .and_then(Self::place)
                .unwrap_or(NOTHING);
            let count = (symbols.1 / SYMBOL_SIZE).min(KERNELS_SYMBOLS);
            let index = NameIndex::new(count, |number| self.symbol_name(symbols, strings, number));
            SymbolTable {
                symbols,
                strings,
                index,
            }
        })
    }

    fn symbol_bytes(&self, symbols: (usize, usize), number: u32) -> Option<Bytes<'_>> {
        let offset = usize::try_from(number).ok()?.checked_mul(SYMBOL_SIZE)?;
        let at = symbols.0.checked_add(offset)?;
        self.data().get(at, SYMBOL_SIZE).map(Bytes)
    }

    /// The name of a defined function, object or plain label.
    fn symbol_name(
        &self,
        symbols: (usize, usize),
        strings: (usize, usize),
        number: u32,
    ) -> Option<&[u8]> {
        let symbol = self.symbol_bytes(symbols, number)?;
        let kind = symbol.get(4, 1)?.first()? & 0xf;
        // STT_NOTYPE, STT_OBJECT, STT_FUNC; not in SHN_UNDEF.
        if kind > 2 || symbol.u16(6)? == 0 {
            return None;
        }
        let name = usize::try_from(symbol.u32(0)?).ok()?;
        if name >= strings.1 {
            return None;
        }
        self.data().c_str(strings.0.checked_add(name)?)
    }

    /// `.BTF`, or else what DWARF tells; `Err` is the text of an error found earlier.
    fn types(&self) -> Result<Option<&Types>, SymbolError> {
        let types = self.types.get_or_init(|| {
            if !self.prefer_dwarf
                && let Some((at, len)) = self.section(".BTF")
            {
                let part = FilePart {
                    file: Arc::clone(&self.file),
                    at,
                    len,
                };
                return Btf::new(self.origin.clone(), part)
                    .map(|btf| Some(Types::Btf(btf)))
                    .map_err(|error| error.to_string());
            }
            let section = |name: &str| self.section(name);
            Dwarf::new(self.origin.clone(), &self.file, &section)
                .map(|dwarf| dwarf.map(Types::Dwarf))
                .map_err(|error| error.to_string())
        });
        match types {
            Ok(types) => Ok(types.as_ref()),
            Err(text) => Err(SymbolError::Damaged {
                origin: self.origin.clone(),
                text: text.clone(),
            }),
        }
    }

    /// The text at linked address `at`, if the file holds it.
    fn text_at(&self, at: u64) -> Option<String> {
        let section = self.sections.iter().find(|section| {
            at.checked_sub(section.address)
                .is_some_and(|offset| section.address != 0 && offset < section.size)
        })?;
        let (start, _) = Self::place(section)?;
        let offset = usize::try_from(at.checked_sub(section.address)?).ok()?;
        let text = self.data().c_str(start.checked_add(offset)?)?;
        core::str::from_utf8(text.get(..text.len().min(512))?)
            .ok()
            .map(|text| text.trim_end().to_owned())
    }
}

impl SymbolSource for Vmlinux {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        let table = self.symbol_table();
        Ok(table
            .index
            .find(name.as_bytes(), |number| {
                self.symbol_name(table.symbols, table.strings, number)
            })
            .and_then(|number| self.symbol_bytes(table.symbols, number)?.u64(8))
            .map(KernelVa::new))
    }

    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        self.types()?
            .map_or(Ok(None), |types| types.source().type_size(name))
    }

    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        self.types()?
            .map_or(Ok(None), |types| types.source().member(name, path))
    }

    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        self.types()?
            .map_or(Ok(None), |types| types.source().constant(name))
    }

    fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    fn banner(&self) -> Option<&str> {
        self.banner
            .get_or_init(|| {
                let at = self.symbol("linux_banner").ok()??;
                self.text_at(at.raw())
            })
            .as_deref()
            .filter(|banner| banner.starts_with("Linux version"))
    }
}

impl Section {
    fn read(data: Bytes<'_>, at: usize) -> Option<Self> {
        let header = Bytes(data.get(at, SECTION_SIZE)?);
        Some(Self {
            name: header.u32(0)?,
            kind: header.u32(4)?,
            flags: header.u64(8)?,
            address: header.u64(16)?,
            offset: header.u64(24)?,
            size: header.u64(32)?,
            link: header.u32(40)?,
        })
    }
}

/// `NT_GNU_BUILD_ID` of these notes, if it is among them.
pub(crate) fn build_id_of_notes(notes: &[u8]) -> Option<Vec<u8>> {
    let notes = Bytes(notes);
    let mut at = 0_usize;
    // Each step is 12 bytes at least, so this ends.
    while let Some(note) = Note::read(notes, at) {
        if note.kind == 3 && note.name == b"GNU\0" && !note.desc.is_empty() {
            return Some(note.desc.to_vec());
        }
        at = note.next;
    }
    None
}

/// The build ID of a vmlinux that begins with `start`, of which nothing is read but the table of
/// its sections and its notes.
pub(super) fn build_id_in(file: &File, start: &[u8]) -> Option<Vec<u8>> {
    let head: &[u8; header64::SIZEOF_EHDR] = start.first_chunk()?;
    let header = header64::Header::from_bytes(head);
    let count = usize::from(header.e_shnum);
    let is_known =
        head.get(4..6) == Some(&[2, 1]) && usize::from(header.e_shentsize) == SECTION_SIZE;
    if !is_known || count == 0 {
        return None;
    }
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    };
    let table = read(header.e_shoff, count.checked_mul(SECTION_SIZE)?)?;
    let sections = (0..count)
        .filter_map(|number| Section::read(Bytes(&table), number.checked_mul(SECTION_SIZE)?));
    let notes = sections.filter(|section| section.kind == SHT_NOTE);
    notes
        .filter_map(|section| {
            let (at, len) = Vmlinux::place(&section)?;
            read(
                to_u64(at),
                Some(len).filter(|len| to_u64(*len) <= MAX_NOTES)?,
            )
        })
        .find_map(|notes| build_id_of_notes(&notes))
}

/// One ELF note.
struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    desc: &'a [u8],
    next: usize,
}

impl<'a> Note<'a> {
    fn read(notes: Bytes<'a>, at: usize) -> Option<Self> {
        let len = |at| notes.u32(at).and_then(|len| usize::try_from(len).ok());
        let (name_len, desc_len) = (len(at)?, len(at.checked_add(4)?)?);
        let kind = notes.u32(at.checked_add(8)?)?;
        let name_at = at.checked_add(12)?;
        let desc_at = name_at.checked_add(name_len.checked_next_multiple_of(4)?)?;
        Some(Self {
            kind,
            name: notes.get(name_at, name_len)?,
            desc: notes.get(desc_at, desc_len)?,
            next: desc_at.checked_add(desc_len.checked_next_multiple_of(4)?)?,
        })
    }
}

/// A part of a mapped file that keeps it mapped.
#[derive(Debug)]
pub(crate) struct FilePart {
    pub file: Arc<OwnFile>,
    pub at: usize,
    pub len: usize,
}

impl AsRef<[u8]> for FilePart {
    fn as_ref(&self) -> &[u8] {
        Bytes(self.file.bytes())
            .get(self.at, self.len)
            .unwrap_or(&[])
    }
}
