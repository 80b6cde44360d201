//! The running kernel's own symbol table, decoded from its memory.
//!
//! Names are compressed with 256 tokens (`scripts/kallsyms.c`, `kernel/kallsyms.c`). Since 6.0
//! VMCOREINFO says where the tables are; before, they are found by their form.

use super::bytes::Bytes;
use super::vmcoreinfo::Vmcoreinfo;
use super::{SymbolBase, SymbolError, SymbolSource};
use crate::{KernelVa, VirtualMemory, needs};
use sonicshot::{PageSize, to_u64, to_usize};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

const ORIGIN: &str = "kallsyms in guest memory";
/// Kernels have 80,000 to 250,000 symbols.
const MAX_SYMBOLS: u32 = 1 << 21;
/// `KSYM_NAME_LEN` is 512.
const MAX_NAME: usize = 512;
/// 256 tokens, each a part of a name.
const MAX_TOKEN_TABLE: usize = 8 << 10;
/// The most bytes of the names behind the last marker.
const LAST_NAMES: u64 = 256 * (to_u64(MAX_NAME) + 2);
const MAX_NAMES_LEN: usize = 64 << 20;

/// The way from an entry of `kallsyms_offsets` to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    /// `CONFIG_KALLSYMS_ABSOLUTE_PERCPU` (x86 to 6.14): negative is relative to the base, less 1.
    AbsolutePercpu(u64),
    /// `kallsyms_relative_base` and the entry.
    Relative(u64),
    /// Since 7.0: relative to the entry itself.
    PcRelative(u64),
    /// `CONFIG_KALLSYMS_BASE_RELATIVE` off: a table of whole addresses.
    Absolute,
}

/// The symbols of the running kernel.
///
/// The names stay compressed; each look-up of new names is one pass over them, which passes
/// over nearly every name by its length and its ends.
pub struct Kallsyms {
    names: Vec<u8>,
    tokens: Tokens,
    count: u32,
    offsets: Vec<u8>,
    scheme: Scheme,
    found: Mutex<HashMap<String, Option<u64>>>,
}

impl core::fmt::Debug for Kallsyms {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Kallsyms")
            .field("symbols", &self.count)
            .finish_non_exhaustive()
    }
}

/// The places of the tables.
#[derive(Clone, Copy, Debug)]
struct Tables {
    names: KernelVa,
    count: u32,
    tokens: KernelVa,
    token_index: KernelVa,
    offsets: KernelVa,
    relative_base: Option<u64>,
    /// Entries are whole addresses, 8 bytes each.
    absolute: bool,
}

fn malformed(what: &'static str, offset: u64, value: u64) -> SymbolError {
    SymbolError::Malformed {
        origin: ORIGIN.into(),
        what,
        offset,
        value,
    }
}

impl Kallsyms {
    /// Decodes the symbol table of the kernel that `info` describes, whose image lies in `image`.
    ///
    /// # Errors
    /// [`SymbolError::Malformed`] if there is none, or it contradicts itself or `info`.
    pub fn find(
        memory: &dyn VirtualMemory,
        info: &Vmcoreinfo,
        image: (KernelVa, KernelVa),
    ) -> Result<Self, SymbolError> {
        let tables = match Self::told(memory, info)? {
            Some(tables) => tables,
            None => Self::searched(memory, image)?,
        };
        Self::decode(memory, &tables, info)
    }

    /// The tables by VMCOREINFO (since 6.0, 5fd8fea935a1).
    fn told(memory: &dyn VirtualMemory, info: &Vmcoreinfo) -> Result<Option<Tables>, SymbolError> {
        let symbol = |name: &str| info.symbol(&format!("kallsyms_{name}"));
        let (Some(names), Some(count_at), Some(tokens), Some(token_index), Some(offsets)) = (
            symbol("names"),
            symbol("num_syms"),
            symbol("token_table"),
            symbol("token_index"),
            symbol("offsets"),
        ) else {
            return Ok(None);
        };
        let unread = |at: KernelVa| malformed("a table that is not mapped", at.raw(), 0);
        let count = memory.read_u32(count_at).map_err(|_| unread(count_at))?;
        let relative_base = match symbol("relative_base") {
            Some(at) => Some(memory.read_u64(at).map_err(|_| unread(at))?),
            None => None,
        };
        Ok(Some(Tables {
            names,
            count,
            tokens,
            token_index,
            offsets,
            relative_base,
            absolute: false,
        }))
    }

    /// The tables by their form: 256 strings, among them every digit by itself, followed by
    /// their 256 offsets; the other tables stand before them in a known order (4.18 to 6.1).
    fn searched(
        memory: &dyn VirtualMemory,
        image: (KernelVa, KernelVa),
    ) -> Result<Tables, SymbolError> {
        // Digits occur in names, so they are tokens, and stand at their own character code.
        let needle = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
        let mut found = None;
        super::scan(memory, image, needle, &mut |at| {
            found = tables_around(memory, at);
            found.is_none()
        });
        found.ok_or_else(|| malformed("no token table in the kernel's image", image.0.raw(), 0))
    }

    fn decode(
        memory: &dyn VirtualMemory,
        tables: &Tables,
        info: &Vmcoreinfo,
    ) -> Result<Self, SymbolError> {
        if tables.count == 0 || tables.count > MAX_SYMBOLS {
            return Err(malformed(
                "a number of symbols",
                tables.names.raw(),
                tables.count.into(),
            ));
        }
        let tokens = Tokens::read(memory, tables)?;
        let names = read_names(memory, tables.names, tables.count)?;
        let offsets = read_offsets(memory, tables)?;
        // All that will be asked for, in one pass.
        let asked: Vec<&str> = needs::symbol_names().collect();
        let numbers = find_names(&names, &tokens, tables.count, &asked);
        let scheme = find_scheme(tables, &offsets, info, |wanted| {
            numbers.get(wanted).copied()
        })?;
        let found = asked
            .iter()
            .map(|name| {
                let number = numbers.get(name).copied();
                let at = number.and_then(|number| scheme.address(&offsets, number));
                ((*name).to_owned(), at)
            })
            .collect();
        Ok(Self {
            names,
            tokens,
            count: tables.count,
            offsets,
            scheme,
            found: Mutex::new(found),
        })
    }

    /// The number of symbols.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl SymbolSource for Kallsyms {
    fn origin(&self) -> &'static str {
        ORIGIN
    }

    fn base(&self) -> SymbolBase {
        SymbolBase::Running
    }

    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        // A poisoned lock only means that another look-up panicked; the table is as good.
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = found.get(name) {
            return Ok(at.map(KernelVa::new));
        }
        let numbers = find_names(&self.names, &self.tokens, self.count, &[name]);
        let number = numbers.get(name).copied();
        let at = number.and_then(|number| self.scheme.address(&self.offsets, number));
        found.insert(name.to_owned(), at);
        Ok(at.map(KernelVa::new))
    }
}

/// The 256 parts that names are made of.
struct Tokens {
    table: Vec<u8>,
    parts: [(u16, u16); 256],
}

impl Tokens {
    fn read(memory: &dyn VirtualMemory, tables: &Tables) -> Result<Self, SymbolError> {
        let mut index = [0; 512];
        memory.read(tables.token_index, &mut index).map_err(|_| {
            malformed(
                "a token index that is not mapped",
                tables.token_index.raw(),
                0,
            )
        })?;
        let mut table = vec![0; MAX_TOKEN_TABLE];
        read_what_is_mapped(memory, tables.tokens, &mut table);
        Self::new(&index, table)
            .ok_or_else(|| malformed("invalid token table", tables.tokens.raw(), 0))
    }

    fn new(index: &[u8; 512], table: Vec<u8>) -> Option<Self> {
        let mut parts = [(0, 0); 256];
        let mut expected = 0_usize;
        for (part, at) in parts.iter_mut().zip((0..).step_by(2)) {
            let start = Bytes(index).u16(at)?;
            // Each token follows the one before.
            if usize::from(start) != expected {
                return None;
            }
            let len = Bytes(&table).c_str(expected)?.len();
            *part = (start, u16::try_from(len).ok()?);
            expected = expected.checked_add(len)?.checked_add(1)?;
        }
        Some(Self { table, parts })
    }

    fn get(&self, token: u8) -> &[u8] {
        self.parts
            .get(usize::from(token))
            .and_then(|(start, len)| Bytes(&self.table).get((*start).into(), (*len).into()))
            .unwrap_or(&[])
    }

    /// The length of a name, and its first and last byte: without its first letter, the symbol's
    /// type. `None` where an end of it is a token without a letter.
    fn shape(&self, compressed: &[u8]) -> Option<(usize, u8, u8)> {
        let parts = compressed.iter().map(|token| {
            let part = self.parts.get(usize::from(*token));
            part.map(|(_, len)| usize::from(*len))
        });
        let with_type = parts.sum::<Option<usize>>()?;
        let (begin, more) = compressed.split_first()?;
        let first = match (self.get(*begin), more.first()) {
            ([_, first, ..], _) => *first,
            ([_], Some(second)) => *self.get(*second).first()?,
            _ => return None,
        };
        let last = self.get(*compressed.last()?).last()?;
        Some((with_type.checked_sub(1)?, first, *last))
    }
}

/// Whether a word may be an address of the kernel's: in the upper half on every architecture.
fn is_kernel_half(word: u64) -> bool {
    word >> 63 == 1
}

/// Fills `buf` step by step as far as it is mapped; the rest stays zero. Returns how far.
fn read_what_is_mapped(memory: &dyn VirtualMemory, at: KernelVa, buf: &mut [u8]) -> usize {
    let mut done = 0_usize;
    let mut rest = buf;
    while !rest.is_empty() {
        let Some(here) = at.checked_add(to_u64(done)) else {
            break;
        };
        // No architecture has smaller pages.
        let left = to_usize(PageSize::SIZE_4K.left_in_page(here.raw()));
        let (part, later) = rest.split_at_mut(left.min(rest.len()));
        let read = memory.read(here, part);
        match done.checked_add(part.len()).filter(|_| read.is_ok()) {
            Some(next) => done = next,
            None => break,
        }
        rest = later;
    }
    done
}

/// The compressed name at the start of `names`, and what follows.
fn split_name(names: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = match names {
        [low, rest @ ..] if low & 0x80 == 0 => (usize::from(*low), rest),
        // Since 6.1 (73bbb94466fd) a long name has its length in two bytes.
        [low, high, rest @ ..] => (usize::from(low & 0x7f) | usize::from(*high) << 7, rest),
        _ => return None,
    };
    if len == 0 || len > MAX_NAME {
        return None;
    }
    rest.split_at_checked(len)
}

/// Reads `count` names from `at`, still compressed, and checks that each is whole.
fn read_names(
    memory: &dyn VirtualMemory,
    at: KernelVa,
    count: u32,
) -> Result<Vec<u8>, SymbolError> {
    const PIECE: usize = 256 << 10;
    let mut names: Vec<u8> = Vec::new();
    let mut piece = vec![0; PIECE];
    let (mut whole, mut done) = (0_usize, 0_u32);
    while done < count {
        let here = at.checked_add(to_u64(names.len()));
        let got = here.map(|here| read_what_is_mapped(memory, here, &mut piece));
        let read = got.and_then(|got| piece.get(..got)).unwrap_or(&[]);
        names.extend_from_slice(read);
        while done < count {
            let rest = names.get(whole..).unwrap_or(&[]);
            let after = split_name(rest).map(|(_, after)| after.len());
            let behind = after.and_then(|after| names.len().checked_sub(after));
            let Some(next) = behind.zip(done.checked_add(1)) else {
                break;
            };
            (whole, done) = next;
        }
        let left = names.len().checked_sub(whole);
        let stuck = left.is_none_or(|left| left > 2 * MAX_NAME);
        if done < count && (read.is_empty() || stuck || names.len() > MAX_NAMES_LEN) {
            return Err(malformed(
                "a name that is cut off or too long",
                at.checked_add(to_u64(whole)).unwrap_or(at).raw(),
                done.into(),
            ));
        }
    }
    names.truncate(whole);
    Ok(names)
}

/// The number of the first symbol of each wanted name.
fn find_names<'w>(
    names: &[u8],
    tokens: &Tokens,
    count: u32,
    wanted: &[&'w str],
) -> HashMap<&'w str, u32> {
    let by_name: HashMap<&[u8], &str> =
        wanted.iter().map(|name| (name.as_bytes(), *name)).collect();
    // Of each length, how the wanted names begin and end: hardly another one does.
    let mut shapes: Vec<Vec<(u8, u8)>> = vec![Vec::new(); MAX_NAME];
    for name in by_name.keys() {
        if let [first, .., last] | [first @ last] = name
            && let Some(of_length) = shapes.get_mut(name.len())
        {
            of_length.push((*first, *last));
        }
    }
    let mut found = HashMap::new();
    let mut rest = names;
    let mut name = Vec::with_capacity(MAX_NAME);
    for number in 0..count {
        let Some((compressed, after)) = split_name(rest) else {
            break;
        };
        rest = after;
        let shape = tokens.shape(compressed);
        let is_like_one = shape.is_none_or(|(len, first, last)| {
            let of_length = shapes.get(len);
            of_length.is_some_and(|of_length| of_length.contains(&(first, last)))
        });
        if !is_like_one {
            continue;
        }
        name.clear();
        for token in compressed {
            name.extend_from_slice(tokens.get(*token));
            if name.len() > MAX_NAME {
                break;
            }
        }
        let this = name.get(1..).unwrap_or(&[]);
        if let Some(wanted) = by_name.get(this) {
            found.entry(*wanted).or_insert(number);
        }
    }
    found
}

impl Scheme {
    /// The bytes that each symbol has in the table.
    fn width(self) -> usize {
        if self == Self::Absolute { 8 } else { 4 }
    }

    /// The address of symbol `number` by the table `offsets`.
    fn address(self, offsets: &[u8], number: u32) -> Option<u64> {
        let table = Bytes(offsets);
        let at = usize::try_from(number).ok()?.checked_mul(self.width())?;
        if self == Self::Absolute {
            return table.u64(at);
        }
        let raw = table.u32(at)?;
        let signed = i64::from(raw.cast_signed()).cast_unsigned();
        let from = |base: u64| KernelVa::new(base);
        let address = match self {
            Self::AbsolutePercpu(base) if raw.cast_signed() < 0 => {
                from(base).moved_back_by(1).moved_back_by(signed)
            }
            Self::AbsolutePercpu(_) => from(raw.into()),
            Self::Relative(base) => from(base).moved_by(raw.into()),
            Self::PcRelative(first) => from(first).moved_by(to_u64(at)).moved_by(signed),
            Self::Absolute => return None,
        };
        Some(address.raw())
    }
}

fn read_offsets(memory: &dyn VirtualMemory, tables: &Tables) -> Result<Vec<u8>, SymbolError> {
    let width = if tables.absolute { 8 } else { 4 };
    let at = tables.offsets.raw();
    let len = (tables.count as usize).checked_mul(width);
    let len = len.ok_or_else(|| malformed("too many offsets", at, tables.count.into()))?;
    let mut offsets = vec![0; len];
    if read_what_is_mapped(memory, tables.offsets, &mut offsets) < len {
        return Err(malformed("offsets that are not mapped", at, to_u64(len)));
    }
    Ok(offsets)
}

/// The scheme under which the symbols that VMCOREINFO names too have the addresses it gives.
fn find_scheme(
    tables: &Tables,
    offsets: &[u8],
    info: &Vmcoreinfo,
    find: impl Fn(&str) -> Option<u32>,
) -> Result<Scheme, SymbolError> {
    let schemes: &[Scheme] = match (tables.absolute, tables.relative_base) {
        (true, _) => &[Scheme::Absolute],
        (false, Some(base)) => &[Scheme::AbsolutePercpu(base), Scheme::Relative(base)],
        (false, None) => &[Scheme::PcRelative(tables.offsets.raw())],
    };
    for scheme in schemes {
        let (mut agreed, mut wrong) = (false, false);
        for name in ["_stext", "swapper_pg_dir", "init_uts_ns", "node_data"] {
            if let Some(told) = info.symbol(name)
                && let Some(number) = find(name)
            {
                let agrees = scheme.address(offsets, number) == Some(told.raw());
                agreed |= agrees;
                wrong |= !agrees;
            }
        }
        if agreed && !wrong {
            return Ok(*scheme);
        }
    }
    let at = tables.offsets.raw();
    Err(malformed("addresses that VMCOREINFO contradicts", at, 0))
}

/// The tables whose token table holds the ten digits at `digits`, if they are.
///
/// `scripts/kallsyms.c` to 6.1 writes, each aligned to 8 bytes: offsets (or addresses),
/// `relative_base`, `num_syms`, names, markers, token table, token index.
fn tables_around(memory: &dyn VirtualMemory, digits: KernelVa) -> Option<Tables> {
    // The token of '0' is number 48: 48 NULs stand between it and the start.
    let mut before = vec![0; 2048];
    let start = KernelVa::new(digits.raw().checked_sub(to_u64(before.len()))?);
    memory.read(start, &mut before).ok()?;
    // The byte before the token of '0' ends the token before.
    let mut at = before.len();
    for _ in 0..49 {
        at = memchr::memrchr(0, before.get(..at)?)?;
    }
    // Padding before the table is NUL too: the first token may be found a few bytes early or
    // late, but the table is aligned to 8 bytes.
    let near = start.checked_add(to_u64(at))?.checked_add(1)?;
    for tokens in [near.raw() & !7, (near.raw() & !7).checked_add(8)?] {
        let tokens = KernelVa::new(tokens);
        let mut table = vec![0; MAX_TOKEN_TABLE];
        read_what_is_mapped(memory, tokens, &mut table);
        let mut end = 0_usize;
        for _ in 0..256 {
            end = Bytes(&table)
                .c_str(end)?
                .len()
                .checked_add(end)?
                .checked_add(1)?;
        }
        let token_index = tokens.checked_add(to_u64(end).checked_next_multiple_of(8)?)?;
        let mut index = [0; 512];
        if memory.read(token_index, &mut index).is_err() || Tokens::new(&index, table).is_none() {
            continue;
        }
        return tables_before(memory, tokens, token_index);
    }
    None
}

/// Walks back from the token table over markers, names and the number of symbols.
fn tables_before(
    memory: &dyn VirtualMemory,
    tokens: KernelVa,
    token_index: KernelVa,
) -> Option<Tables> {
    // Markers: one `u32` for every 256 names, where it begins among them, so the first is 0
    // and each is larger than the one before. Walk back to the 0.
    let mut marker_count = 0_u64;
    let mut last = 0_u32;
    let mut at = tokens;
    let mut above = u32::MAX;
    while marker_count <= u64::from(MAX_SYMBOLS >> 8) {
        at = KernelVa::new(at.raw().checked_sub(4)?);
        let marker = memory.read_u32(at).ok()?;
        if marker_count == 0 && marker == 0 {
            // Padding to 8 bytes.
            continue;
        }
        if marker >= above {
            return None;
        }
        if marker_count == 0 {
            last = marker;
        }
        marker_count = marker_count.checked_add(1)?;
        above = marker;
        if marker == 0 {
            break;
        }
    }
    let markers = at;
    // The names are `last` bytes and up to 256 names more; `num_syms`, aligned to 8 bytes,
    // stands before them, and its value is known to within 256.
    let most = u64::from(last).checked_add(LAST_NAMES)?;
    let least = u64::from(last);
    let low = (marker_count.checked_sub(1)?).checked_mul(256)?;
    let high = marker_count.checked_mul(256)?;
    let mut gap = least.checked_next_multiple_of(8)?;
    while gap <= most {
        let names = KernelVa::new(markers.raw().checked_sub(gap)?);
        gap = gap.checked_add(8)?;
        let count_at = KernelVa::new(names.raw().checked_sub(8)?);
        let count = memory.read_u64(count_at).ok()?;
        if count <= low || count > high || !names_fill(memory, names, count, markers)? {
            continue;
        }
        let count = u32::try_from(count).ok()?;
        let base_at = KernelVa::new(count_at.raw().checked_sub(8)?);
        let base = memory.read_u64(base_at).ok()?;
        // With a relative base that is an address, offsets of 4 bytes stand before it;
        // else the table of addresses ends here.
        let relative = u64::from(count)
            .checked_mul(4)?
            .checked_next_multiple_of(8)?;
        let absolute = u64::from(count).checked_mul(8)?;
        let first = KernelVa::new(count_at.raw().checked_sub(absolute)?);
        let is_absolute = is_kernel_half(memory.read_u64(first).ok()?)
            && is_kernel_half(memory.read_u64(first.checked_add(8)?).ok()?);
        let (offsets, relative_base) = if is_absolute {
            (first, None)
        } else {
            (
                KernelVa::new(base_at.raw().checked_sub(relative)?),
                Some(base),
            )
        };
        return Some(Tables {
            names,
            count,
            tokens,
            token_index,
            offsets,
            relative_base,
            absolute: is_absolute,
        });
    }
    None
}

/// Whether `count` names from `names` end right before `markers`, but for padding.
fn names_fill(
    memory: &dyn VirtualMemory,
    names: KernelVa,
    count: u64,
    markers: KernelVa,
) -> Option<bool> {
    let room = markers.offset_from(names)?;
    let read = read_names(memory, names, u32::try_from(count).ok()?);
    Some(read.is_ok_and(|read| {
        room.checked_sub(to_u64(read.len()))
            .is_some_and(|padding| padding < 8)
    }))
}

#[cfg(test)]
mod tests {
    use super::{
        Kallsyms, MAX_NAME, MAX_NAMES_LEN, MAX_SYMBOLS, MAX_TOKEN_TABLE, Tables, Tokens,
        read_names, split_name,
    };
    use crate::KernelVa;
    use crate::kernel::testing::{DIRECT_MAP, Facts, Ram, kernel};
    use crate::symbols::SymbolError;
    use crate::symbols::vmcoreinfo::Vmcoreinfo;

    #[test]
    fn a_name_is_no_longer_than_the_kernels() {
        for (len, is_one) in [
            (0, false),
            (1, true),
            (MAX_NAME, true),
            (MAX_NAME + 1, false),
        ] {
            let mut names = match u8::try_from(len) {
                Ok(short @ ..0x80) => vec![short],
                _ => vec![len.to_le_bytes()[0] | 0x80, (len >> 7).to_le_bytes()[0]],
            };
            names.resize(names.len() + 2 * MAX_NAME, 7);
            let name = split_name(&names).map(|(name, _)| name.len());
            assert_eq!(name, is_one.then_some(len));
        }
    }

    fn tables(count: u32) -> Tables {
        let at = |offset| KernelVa::new(DIRECT_MAP + offset);
        Tables {
            names: at(0x10_0000),
            count,
            tokens: at(0x1000),
            token_index: at(0x8000),
            offsets: at(0xa000),
            relative_base: None,
            absolute: false,
        }
    }

    fn said(found: Result<impl Sized, SymbolError>) -> String {
        found
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    }

    #[test]
    fn there_are_no_more_symbols_than_a_bound() {
        let ram = Ram::new(8 << 20);
        let memory = ram.memory();
        let space = kernel(&memory, Facts::default()).space;
        let info = Vmcoreinfo::parse(b"OSRELEASE=6.1\n").unwrap();
        for (count, is_refused) in [(0, true), (MAX_SYMBOLS, false), (MAX_SYMBOLS + 1, true)] {
            let said = said(Kallsyms::decode(&space, &tables(count), &info));
            assert_eq!(
                said.contains("a number of symbols"),
                is_refused,
                "{count}: {said}"
            );
        }
    }

    #[test]
    fn all_tokens_are_no_longer_than_a_bound() {
        for (len, is_one) in [(MAX_TOKEN_TABLE, true), (MAX_TOKEN_TABLE + 1, false)] {
            let mut ram = Ram::new(8 << 20);
            let mut start = 0;
            for token in 0..256 {
                // The last one has what is left.
                let end = if token == 255 { len } else { (token + 1) * 32 };
                ram.0[0x1000 + start..0x1000 + end - 1].fill(b'x');
                let index = u16::try_from(start).unwrap().to_le_bytes();
                ram.0[0x8000 + token * 2..][..2].copy_from_slice(&index);
                start = end;
            }
            let memory = ram.memory();
            let space = kernel(&memory, Facts::default()).space;
            assert_eq!(Tokens::read(&space, &tables(1)).is_ok(), is_one, "{len}");
        }
    }

    #[test]
    fn all_names_are_no_longer_than_a_bound() {
        for (len, is_refused) in [(100, false), (120, true)] {
            // So many as would be longer, or not: a byte tells the length.
            let count = u32::try_from(MAX_NAMES_LEN / 110).unwrap();
            let mut ram =
                Ram::new((MAX_NAMES_LEN + (MAX_NAMES_LEN >> 2)).next_multiple_of(1 << 21));
            let start = 0x10_0000;
            for number in 0..count as usize {
                ram.0[start + number * (len + 1)] = u8::try_from(len).unwrap();
            }
            let memory = ram.memory();
            let space = kernel(&memory, Facts::default()).space;
            let found = read_names(&space, tables(1).names, count);
            assert_eq!(found.is_err(), is_refused, "{len}");
        }
    }
}
