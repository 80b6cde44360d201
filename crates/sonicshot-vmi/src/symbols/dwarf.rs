//! Types from a vmlinux's DWARF, without reading all of it.
//!
//! The debugging information of a kernel is hundreds of megabytes, and compilers leave out of a
//! unit what it does not use. So only the units of a few source files are read, which between
//! them use everything that is asked for, and of the others nothing but the name.

use super::bytes::Bytes;
use super::own::OwnFile;
use super::{Member, SymbolError, SymbolSource};
use crate::needs;
use gimli::{
    AttributeValue, DebuggingInformationEntry, DwarfSections, EndianSlice, LittleEndian, Reader,
    Unit, UnitOffset,
};
use std::collections::HashMap;

/// A kernel has some 5,000 units.
const MAX_UNITS: usize = 1 << 17;
/// A unit of a kernel has some 100,000 entries.
const MAX_ENTRIES: usize = 4_000_000;
const MAX_DEPTH: u32 = 32;

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// A structure, union or array, as far as it is needed.
#[derive(Debug, Clone, Default)]
struct Structure {
    /// `None` if nothing tells.
    size: Option<u64>,
    members: Vec<Field>,
}

#[derive(Debug, Clone)]
struct Field {
    /// Empty if the member is anonymous.
    name: String,
    offset: u64,
    /// Of the type's entry, across all units.
    ty: Option<usize>,
}

#[derive(Debug, Clone)]
enum Shape {
    Structure(Structure),
    Array {
        element: Option<usize>,
        len: Option<u64>,
    },
    /// A typedef or qualifier.
    Alias(Option<usize>),
    Sized(u64),
}

/// The types that the walked units define.
#[derive(Debug)]
pub(crate) struct Dwarf {
    origin: String,
    shapes: HashMap<usize, Shape>,
    structs: HashMap<String, usize>,
    enumerators: HashMap<String, i64>,
}

/// Finds a section's place in the file: offset and length.
pub(crate) type FindSection<'a> = &'a dyn Fn(&str) -> Option<(usize, usize)>;

impl Dwarf {
    /// Walks as many units of the file as it takes; `None` if the file has no DWARF.
    pub(crate) fn new(
        origin: String,
        file: &OwnFile,
        section: FindSection<'_>,
    ) -> Result<Option<Self>, SymbolError> {
        Self::up_to((MAX_UNITS, MAX_ENTRIES), origin, file, section)
    }

    /// Of at most so many units, and so many entries of each.
    fn up_to(
        (units_at_most, entries_at_most): (usize, usize),
        origin: String,
        file: &OwnFile,
        section: FindSection<'_>,
    ) -> Result<Option<Self>, SymbolError> {
        if section(".debug_info").is_none() {
            return Ok(None);
        }
        let data = Bytes(file.bytes());
        let load = |id: gimli::SectionId| -> Result<&[u8], gimli::Error> {
            Ok(section(id.name())
                .and_then(|(at, len)| data.get(at, len))
                .unwrap_or(&[]))
        };
        let mut this = Self {
            origin,
            shapes: HashMap::new(),
            structs: HashMap::new(),
            enumerators: HashMap::new(),
        };
        let damaged = |error: gimli::Error| SymbolError::Damaged {
            origin: this.origin.clone(),
            text: format!("DWARF: {error}"),
        };
        let sections = DwarfSections::load(load).map_err(damaged)?;
        let dwarf = sections.borrow(|bytes| EndianSlice::new(bytes, LittleEndian));
        let mut units = dwarf.units();
        // The source files whose units are read.
        let sources = needs::units();
        let mut left = sources.len();
        for _ in 0..units_at_most {
            let Some(header) = units.next().map_err(damaged)? else {
                break;
            };
            let unit = dwarf.unit(header).map_err(damaged)?;
            let is_wanted = unit.name.is_some_and(|name| {
                let name = name.slice();
                sources.iter().any(|source| {
                    // Relative to the kernel's tree, or absolute.
                    name.strip_suffix(source.as_bytes())
                        .is_some_and(|before| before.is_empty() || before.ends_with(b"/"))
                })
            });
            if !is_wanted {
                continue;
            }
            let mut found = Walk::default();
            found
                .unit(&dwarf, &unit, entries_at_most)
                .map_err(damaged)?;
            this.shapes.extend(found.shapes);
            for (name, at) in found.structs {
                this.structs.entry(name).or_insert(at);
            }
            for (name, value) in found.enumerators {
                this.enumerators.entry(name).or_insert(value);
            }
            let Some(others @ 1..) = left.checked_sub(1) else {
                break;
            };
            left = others;
        }
        Ok((!this.structs.is_empty()).then_some(this))
    }

    fn shape(&self, at: Option<usize>) -> Option<&Shape> {
        self.shapes.get(&at?)
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, at: Option<usize>) -> Option<&Shape> {
        let mut shape = self.shape(at)?;
        for _ in 0..MAX_DEPTH {
            match shape {
                Shape::Alias(next) => shape = self.shape(*next)?,
                _ => return Some(shape),
            }
        }
        None
    }

    fn size_of(&self, at: Option<usize>, depth: u32) -> Option<u64> {
        match self.resolve(at)? {
            Shape::Structure(structure) => structure.size,
            Shape::Sized(size) => Some(*size),
            Shape::Array { element, len } if depth < MAX_DEPTH => {
                let element = self.size_of(*element, depth.checked_add(1)?)?;
                element.checked_mul((*len)?)
            }
            _ => None,
        }
    }

    fn find_member(&self, structure: &Structure, name: &str, depth: u32) -> Option<Field> {
        if depth > MAX_DEPTH {
            return None;
        }
        for field in &structure.members {
            if field.name == name {
                return Some(field.clone());
            }
            if field.name.is_empty()
                && let Some(Shape::Structure(inner)) = self.resolve(field.ty)
                && let Some(mut found) = self.find_member(inner, name, depth.checked_add(1)?)
            {
                found.offset = found.offset.checked_add(field.offset)?;
                return Some(found);
            }
        }
        None
    }

    fn structure(&self, name: &str) -> Option<&Structure> {
        match self.shape(self.structs.get(name).copied())? {
            Shape::Structure(structure) => Some(structure),
            _ => None,
        }
    }

    fn member_of(&self, name: &str, path: &str) -> Option<Member> {
        let mut structure = self.structure(name)?;
        let mut offset = 0_u64;
        let mut parts = path.split('.').peekable();
        loop {
            let field = self.find_member(structure, parts.next()?, 0)?;
            offset = offset.checked_add(field.offset)?;
            if parts.peek().is_some() {
                match self.resolve(field.ty)? {
                    Shape::Structure(inner) => structure = inner,
                    _ => return None,
                }
                continue;
            }
            let len = match self.resolve(field.ty) {
                Some(Shape::Array { len, .. }) => *len,
                _ => None,
            };
            return Some(Member {
                offset,
                size: self.size_of(field.ty, 0),
                len,
            });
        }
    }
}

impl SymbolSource for Dwarf {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        Ok(self.structure(name).and_then(|structure| structure.size))
    }

    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        Ok(self.member_of(name, path))
    }

    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        Ok(self.enumerators.get(name).copied())
    }
}

/// The definitions in one unit.
#[derive(Default)]
struct Walk {
    shapes: HashMap<usize, Shape>,
    structs: HashMap<String, usize>,
    enumerators: HashMap<String, i64>,
}

impl Walk {
    fn unit<'a>(
        &mut self,
        dwarf: &gimli::Dwarf<Slice<'a>>,
        unit: &Unit<Slice<'a>>,
        most: usize,
    ) -> Result<(), gimli::Error> {
        let mut entries = unit.entries();
        // The type whose children are being read, and how deep they are.
        let mut parents: Vec<(isize, usize)> = Vec::new();
        let mut left = most;
        while let Some(entry) = entries.next_dfs()? {
            let Some(others) = left.checked_sub(1) else {
                break;
            };
            left = others;
            let depth = entry.depth();
            while parents.last().is_some_and(|(at, _)| *at >= depth) {
                parents.pop();
            }
            let parent = parents
                .last()
                .filter(|(at, _)| at.checked_add(1) == Some(depth))
                .map(|(_, parent)| *parent);
            let at = global(unit, entry.offset());
            if self.entry(dwarf, unit, entry, at, parent) == Children::Read {
                parents.push((depth, at));
            }
        }
        Ok(())
    }

    /// Takes one entry, which is at `at` across all units; `parent` is the type around it.
    fn entry<'a>(
        &mut self,
        dwarf: &gimli::Dwarf<Slice<'a>>,
        unit: &Unit<Slice<'a>>,
        entry: &DebuggingInformationEntry<Slice<'a>>,
        at: usize,
        parent: Option<usize>,
    ) -> Children {
        match entry.tag() {
            gimli::DW_TAG_structure_type | gimli::DW_TAG_union_type => {
                if entry.attr_value(gimli::DW_AT_declaration).is_some() {
                    return Children::Skip;
                }
                if let Some(name) = name_of(dwarf, unit, entry) {
                    self.structs.entry(name).or_insert(at);
                }
                let structure = Structure {
                    size: unsigned(entry, gimli::DW_AT_byte_size),
                    members: Vec::new(),
                };
                self.shapes.insert(at, Shape::Structure(structure));
                return Children::Read;
            }
            gimli::DW_TAG_member => {
                let field = field_of(dwarf, unit, entry);
                if let Some(Shape::Structure(structure)) = self.parent(parent) {
                    structure.members.extend(field);
                }
            }
            gimli::DW_TAG_array_type => {
                let element = type_of(unit, entry);
                self.shapes.insert(at, Shape::Array { element, len: None });
                return Children::Read;
            }
            gimli::DW_TAG_subrange_type => {
                if let Some(Shape::Array { len, .. }) = self.parent(parent)
                    && len.is_none()
                {
                    *len = unsigned(entry, gimli::DW_AT_count)
                        .or_else(|| unsigned(entry, gimli::DW_AT_upper_bound)?.checked_add(1));
                }
            }
            gimli::DW_TAG_enumeration_type => {
                if let Some(size) = unsigned(entry, gimli::DW_AT_byte_size) {
                    self.shapes.insert(at, Shape::Sized(size));
                }
                return Children::Read;
            }
            gimli::DW_TAG_enumerator => {
                if let Some(name) = name_of(dwarf, unit, entry)
                    && let Some(value) = constant(entry)
                {
                    self.enumerators.entry(name).or_insert(value);
                }
            }
            gimli::DW_TAG_typedef
            | gimli::DW_TAG_const_type
            | gimli::DW_TAG_volatile_type
            | gimli::DW_TAG_restrict_type
            | gimli::DW_TAG_atomic_type => {
                self.shapes.insert(at, Shape::Alias(type_of(unit, entry)));
            }
            gimli::DW_TAG_base_type => {
                if let Some(size) = unsigned(entry, gimli::DW_AT_byte_size) {
                    self.shapes.insert(at, Shape::Sized(size));
                }
            }
            // Kernels that are read here have 64 bits.
            gimli::DW_TAG_pointer_type => {
                let told = entry.attr_value(gimli::DW_AT_byte_size);
                let size = told.map_or(Some(8), |size| size.udata_value());
                self.shapes
                    .extend(size.map(|size| (at, Shape::Sized(size))));
            }
            _ => {}
        }
        Children::Skip
    }

    fn parent(&mut self, parent: Option<usize>) -> Option<&mut Shape> {
        self.shapes.get_mut(&parent?)
    }
}

/// Whether what is inside an entry belongs to it.
#[derive(PartialEq, Eq)]
enum Children {
    Read,
    Skip,
}

/// An offset within a unit as one across all units.
fn global<R: Reader<Offset = usize>>(unit: &Unit<R>, offset: UnitOffset) -> usize {
    offset
        .to_debug_info_offset(&unit.header)
        .map_or(usize::MAX, |offset| offset.0)
}

fn name_of<'a>(
    dwarf: &gimli::Dwarf<Slice<'a>>,
    unit: &Unit<Slice<'a>>,
    entry: &DebuggingInformationEntry<Slice<'a>>,
) -> Option<String> {
    let value = entry.attr_value(gimli::DW_AT_name)?;
    let text = dwarf.attr_string(unit, value).ok()?;
    Some(text.to_string_lossy().into_owned())
}

fn type_of<R: Reader<Offset = usize>>(
    unit: &Unit<R>,
    entry: &DebuggingInformationEntry<R>,
) -> Option<usize> {
    match entry.attr_value(gimli::DW_AT_type)? {
        AttributeValue::UnitRef(offset) => Some(global(unit, offset)),
        AttributeValue::DebugInfoRef(offset) => Some(offset.0),
        _ => None,
    }
}

/// A member with its place, unless it is some bits of a word, or its place is not known.
fn field_of<'a>(
    dwarf: &gimli::Dwarf<Slice<'a>>,
    unit: &Unit<Slice<'a>>,
    entry: &DebuggingInformationEntry<Slice<'a>>,
) -> Option<Field> {
    let is_bits = entry.attr_value(gimli::DW_AT_data_bit_offset).is_some();
    let offset = offset_of(entry).filter(|_| !is_bits)?;
    Some(Field {
        name: name_of(dwarf, unit, entry).unwrap_or_default(),
        offset,
        ty: type_of(unit, entry),
    })
}

/// The offset of a member. One of a union has none; of one that is to be computed nothing is known.
fn offset_of<R: Reader<Offset = usize>>(entry: &DebuggingInformationEntry<R>) -> Option<u64> {
    match entry.attr_value(gimli::DW_AT_data_member_location) {
        None => Some(0),
        Some(offset) => offset.udata_value(),
    }
}

fn unsigned<R: Reader<Offset = usize>>(
    entry: &DebuggingInformationEntry<R>,
    name: gimli::DwAt,
) -> Option<u64> {
    entry.attr_value(name)?.udata_value()
}

fn constant<R: Reader<Offset = usize>>(entry: &DebuggingInformationEntry<R>) -> Option<i64> {
    let value = entry.attr_value(gimli::DW_AT_const_value)?;
    value
        .sdata_value()
        .or_else(|| value.udata_value().map(u64::cast_signed))
}

#[cfg(test)]
mod tests {
    use super::{Dwarf, MAX_DEPTH, MAX_UNITS, Shape};
    use crate::needs;
    use crate::symbols::SymbolSource;
    use crate::symbols::own::OwnFile;
    use std::collections::HashMap;

    /// A unit without a name, one with a name and children; a variable, a structure.
    const ABBREVIATIONS: &[u8] = b"\x01\x11\0\0\0\x02\x11\x01\x03\x08\0\0\x03\x34\0\0\0\
        \x04\x13\0\x03\x08\x0b\x0b\0\0\0";

    fn unit(entries: &[u8]) -> Vec<u8> {
        let mut out = u32::try_from(7 + entries.len())
            .unwrap()
            .to_le_bytes()
            .to_vec();
        out.extend([4, 0, 0, 0, 0, 0, 8]);
        out.extend(entries);
        out
    }

    /// Whether a structure is found in a unit behind so many others, behind so many entries.
    fn is_found(most: Option<(usize, usize)>, units: usize, entries: usize) -> bool {
        let mut named = [b"\x02", needs::units()[0].as_bytes(), b"\0"].concat();
        named.extend(vec![3; entries]);
        named.extend(b"\x04page\0\x40\0");
        let info = [unit(b"\x01").repeat(units), unit(&named)].concat();
        let file = OwnFile::from_bytes(&[ABBREVIATIONS, &info].concat());
        let section = |name: &str| match name {
            ".debug_abbrev" => Some((0, ABBREVIATIONS.len())),
            ".debug_info" => Some((ABBREVIATIONS.len(), info.len())),
            _ => None,
        };
        let found = match most {
            Some(most) => Dwarf::up_to(most, "a test".into(), &file, &section),
            None => Dwarf::new("a test".into(), &file, &section),
        };
        found.unwrap().is_some()
    }

    #[test]
    fn no_more_units_and_entries_are_read_than_a_bound() {
        assert!(is_found(None, MAX_UNITS - 1, 0));
        assert!(!is_found(None, MAX_UNITS, 0));
        // The unit and the structure are entries, too.
        assert!(is_found(Some((1, 100)), 0, 98));
        assert!(!is_found(Some((1, 100)), 0, 99));
    }

    /// Old compilers tell an offset as an expression.
    #[test]
    fn a_member_whose_offset_is_no_number_is_not_told() {
        // A unit with a name, a structure with members: with an offset, with an expression, without.
        let abbreviations = b"\x02\x11\x01\x03\x08\0\0\x05\x13\x01\x03\x08\x0b\x0b\0\0\
            \x06\x0d\0\x03\x08\x38\x0b\0\0\x07\x0d\0\x03\x08\x38\x18\0\0\
            \x08\x0d\0\x03\x08\0\0\0";
        let mut entries = [b"\x02", needs::units()[0].as_bytes(), b"\0"].concat();
        entries.extend(b"\x05page\0\x40\x06flags\0\x08\x07lru\0\x02\x23\x10\x08first\0\0\0");
        let info = unit(&entries);
        let file = OwnFile::from_bytes(&[&abbreviations[..], &info].concat());
        let section = |name: &str| match name {
            ".debug_abbrev" => Some((0, abbreviations.len())),
            ".debug_info" => Some((abbreviations.len(), info.len())),
            _ => None,
        };
        let dwarf = Dwarf::new("a test".into(), &file, &section);
        let dwarf = dwarf.unwrap().unwrap();
        for (member, offset) in [("flags", Some(8)), ("lru", None), ("first", Some(0))] {
            let found = dwarf.member("page", member).unwrap();
            assert_eq!(found.map(|found| found.offset), offset, "{member}");
        }
    }

    #[test]
    fn types_in_each_other_end() {
        let depth = MAX_DEPTH as usize;
        let dwarf = |shapes: HashMap<usize, Shape>| Dwarf {
            origin: "a test".into(),
            shapes,
            structs: HashMap::new(),
            enumerators: HashMap::new(),
        };
        for (aliases, is_found) in [(depth - 1, true), (depth, false)] {
            let mut shapes: HashMap<_, _> = (0..aliases)
                .map(|at| (at, Shape::Alias(Some(at + 1))))
                .collect();
            shapes.insert(aliases, Shape::Sized(8));
            assert_eq!(
                dwarf(shapes).size_of(Some(0), 0).is_some(),
                is_found,
                "{aliases}"
            );
        }
        for (arrays, is_found) in [(depth, true), (depth + 1, false)] {
            let array = |at| Shape::Array {
                element: Some(at + 1),
                len: Some(1),
            };
            let mut shapes: HashMap<_, _> = (0..arrays).map(|at| (at, array(at))).collect();
            shapes.insert(arrays, Shape::Sized(8));
            assert_eq!(
                dwarf(shapes).size_of(Some(0), 0).is_some(),
                is_found,
                "{arrays}"
            );
        }
        // A structure in itself.
        let inner = super::Field {
            name: String::new(),
            offset: 0,
            ty: Some(0),
        };
        let structure = super::Structure {
            size: Some(8),
            members: vec![inner],
        };
        let itself = dwarf(HashMap::from([(0, Shape::Structure(structure.clone()))]));
        assert!(itself.find_member(&structure, "not there", 0).is_none());
    }
}
