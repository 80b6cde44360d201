//! BTF: the kernel's own types, in its own image (Documentation/bpf/btf.rst).

use super::bytes::Bytes;
use super::names::NameIndex;
use super::{Member, SymbolError, SymbolSource};
use crate::{KernelVa, VirtualMemory};
use sonicshot::to_u64;

const MAGIC: u16 = 0xeb9f;
/// The largest kernels have some 10 MB.
const MAX_LEN: u64 = 64 << 20;
/// The depth to which modifiers, typedefs and anonymous members may nest.
const MAX_DEPTH: u32 = 32;
/// The most members that one lookup may look at, in all structures together.
const MAX_STEPS: u32 = 100_000;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// The bytes that BTF lies in: owned, or a part of a mapped file.
type Blob = Box<dyn AsRef<[u8]> + Send + Sync>;

/// The types of one kernel, from BTF. Little-endian only, as are the guests.
pub struct Btf {
    origin: String,
    blob: Blob,
    /// The beginning of the types in the blob, and of each type, from there.
    types_at: usize,
    offsets: Vec<u32>,
    strings_at: usize,
    strings_len: usize,
    /// `struct` and `union` definitions: where the name is in the strings, and the type.
    structs: Named<u32>,
    /// Enumerators: where the name is in the strings, and the value.
    enumerators: Named<i64>,
}

/// Values by the names that stand at offsets in the strings.
#[derive(Debug)]
struct Named<T> {
    entries: Vec<(u32, T)>,
    index: NameIndex,
}

impl<T: Copy> Named<T> {
    fn new(entries: Vec<(u32, T)>, strings: Bytes<'_>) -> Self {
        let index = NameIndex::new(entries.len(), |number| {
            Self::name(&entries, strings, number)
        });
        Self { entries, index }
    }

    fn name<'a>(entries: &[(u32, T)], strings: Bytes<'a>, number: u32) -> Option<&'a [u8]> {
        let (at, _) = entries.get(usize::try_from(number).ok()?)?;
        strings.c_str(usize::try_from(*at).ok()?)
    }

    fn get(&self, name: &str, strings: Bytes<'_>) -> Option<T> {
        let number = self.index.find(name.as_bytes(), |number| {
            Self::name(&self.entries, strings, number)
        })?;
        let (_, value) = self.entries.get(usize::try_from(number).ok()?)?;
        Some(*value)
    }
}

impl core::fmt::Debug for Btf {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Btf")
            .field("origin", &self.origin)
            .field("types", &self.offsets.len())
            .finish_non_exhaustive()
    }
}

/// One type's fixed part.
#[derive(Clone, Copy, Debug)]
struct Type {
    name: u32,
    vlen: u32,
    kind: u32,
    kind_flag: bool,
    /// Size in bytes, or the type that it refers to.
    size_or_type: u32,
    /// The beginning of its variable part in the types.
    tail: usize,
}

impl Btf {
    /// Reads BTF from the whole of `blob`.
    ///
    /// # Errors
    /// [`SymbolError::Malformed`] with the offset and the value that cannot be.
    pub fn new(
        origin: impl Into<String>,
        blob: impl AsRef<[u8]> + Send + Sync + 'static,
    ) -> Result<Self, SymbolError> {
        let origin = origin.into();
        let malformed = |what, offset: usize, value: u64| SymbolError::Malformed {
            origin: origin.clone(),
            what,
            offset: to_u64(offset),
            value,
        };
        let data = Bytes(blob.as_ref());
        let header = Header::read(data).ok_or_else(|| {
            let found = data.u32(0).map_or(to_u64(data.0.len()), u64::from);
            malformed("missing BTF magic", 0, found)
        })?;
        let (types_at, types_len) = header.types;
        let (strings_at, strings_len) = header.strings;
        let strings = data
            .get(strings_at, strings_len)
            .ok_or_else(|| malformed("strings beyond the end", strings_at, to_u64(strings_len)))?;
        if strings.first() != Some(&0) || strings.last() != Some(&0) {
            return Err(malformed(
                "strings that are not NUL-terminated",
                strings_at,
                0,
            ));
        }
        let types = data
            .get(types_at, types_len)
            .ok_or_else(|| malformed("types beyond the end", types_at, to_u64(types_len)))?;
        let types = Bytes(types);
        let mut offsets = vec![0];
        let mut structs = Vec::new();
        let mut enumerators = Vec::new();
        let mut at = 0_usize;
        while at < types_len {
            let bad = |what, value: u32| {
                let at = types_at.checked_add(at).unwrap_or(types_at);
                malformed(what, at, value.into())
            };
            let ty = Type::read(types, at).ok_or_else(|| bad("a type that is cut off", 0))?;
            let tail_len = ty
                .tail_len()
                .ok_or_else(|| bad("a type of unknown kind", ty.kind))?;
            let next = ty.tail.checked_add(tail_len);
            let next = next.filter(|next| *next <= types_len);
            let next = next.ok_or_else(|| bad("a type that is cut off", ty.vlen))?;
            let id = u32::try_from(offsets.len()).map_err(|_| bad("too many types", u32::MAX))?;
            offsets.push(u32::try_from(at).map_err(|_| bad("too many types", u32::MAX))?);
            match ty.kind {
                KIND_STRUCT | KIND_UNION if ty.name != 0 => {
                    structs.push((ty.name, id));
                }
                KIND_ENUM | KIND_ENUM64 => ty.enumerators(types, &mut |name, value| {
                    enumerators.push((name, value));
                }),
                _ => {}
            }
            at = next;
        }
        Ok(Self {
            origin,
            types_at,
            offsets,
            strings_at,
            strings_len,
            structs: Named::new(structs, Bytes(strings)),
            enumerators: Named::new(enumerators, Bytes(strings)),
            blob: Box::new(blob),
        })
    }

    fn data(&self) -> Bytes<'_> {
        Bytes((*self.blob).as_ref())
    }

    fn types(&self) -> Bytes<'_> {
        Bytes(self.data().0.get(self.types_at..).unwrap_or(&[]))
    }

    fn strings(&self) -> Bytes<'_> {
        let strings = self.data().get(self.strings_at, self.strings_len);
        Bytes(strings.unwrap_or(&[]))
    }

    fn ty(&self, id: u32) -> Option<Type> {
        let at = *self.offsets.get(usize::try_from(id).ok()?)?;
        // Type 0 is void.
        (id != 0).then(|| Type::read(self.types(), usize::try_from(at).ok()?))?
    }

    fn find_struct(&self, name: &str) -> Option<Type> {
        self.ty(self.structs.get(name, self.strings())?)
    }

    /// Follows typedefs and qualifiers.
    fn resolve(&self, id: u32) -> Option<Type> {
        let mut ty = self.ty(id)?;
        for _ in 0..MAX_DEPTH {
            match ty.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    ty = self.ty(ty.size_or_type)?;
                }
                _ => return Some(ty),
            }
        }
        None
    }

    /// The size in bytes of the type `id`.
    fn size_of(&self, id: u32, depth: u32) -> Option<u64> {
        let ty = self.resolve(id)?;
        match ty.kind {
            KIND_INT | KIND_STRUCT | KIND_UNION | KIND_ENUM | KIND_ENUM64 | KIND_FLOAT => {
                Some(u64::from(ty.size_or_type))
            }
            KIND_PTR => Some(8),
            KIND_ARRAY if depth < MAX_DEPTH => {
                let types = self.types();
                let len = types.u32(ty.tail.checked_add(8)?)?;
                let element = self.size_of(types.u32(ty.tail)?, depth.checked_add(1)?)?;
                element.checked_mul(len.into())
            }
            _ => None,
        }
    }

    /// The member of `ty`, or of an anonymous member of it, that is called `wanted`.
    fn find_member(
        &self,
        ty: &Type,
        wanted: &str,
        depth: u32,
        steps: &mut u32,
    ) -> Option<(u64, u32)> {
        let types = self.types();
        if !matches!(ty.kind, KIND_STRUCT | KIND_UNION) || depth > MAX_DEPTH {
            return None;
        }
        for index in 0..usize::try_from(ty.vlen).ok()? {
            *steps = steps.checked_sub(1)?;
            let at = ty.tail.checked_add(index.checked_mul(12)?)?;
            let name = types.u32(at)?;
            let member = types.u32(at.checked_add(4)?)?;
            let bits = types.u32(at.checked_add(8)?)?;
            // With the kind flag the top byte is the width of a bit field.
            let bits = if ty.kind_flag { bits & 0xff_ffff } else { bits };
            let offset = u64::from(bits >> 3);
            if name != 0
                && self.strings().c_str(usize::try_from(name).ok()?) == Some(wanted.as_bytes())
            {
                return (bits & 7 == 0).then_some((offset, member));
            }
            if name == 0
                && let Some(inner) = self.resolve(member)
                && let Some((below, found)) =
                    self.find_member(&inner, wanted, depth.checked_add(1)?, steps)
            {
                return Some((offset.checked_add(below)?, found));
            }
        }
        None
    }

    fn member_of(&self, name: &str, path: &str) -> Option<Member> {
        let mut ty = self.find_struct(name)?;
        let mut offset = 0_u64;
        let mut last = None;
        let mut steps = MAX_STEPS;
        for part in path.split('.') {
            if let Some(id) = last {
                ty = self.resolve(id)?;
            }
            let (below, id) = self.find_member(&ty, part, 0, &mut steps)?;
            offset = offset.checked_add(below)?;
            last = Some(id);
        }
        let id = last?;
        let ty = self.resolve(id)?;
        let len = (ty.kind == KIND_ARRAY)
            .then(|| self.types().u32(ty.tail.checked_add(8)?))
            .flatten();
        Some(Member {
            offset,
            size: self.size_of(id, 0),
            len: len.map(u64::from),
        })
    }
}

impl SymbolSource for Btf {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        Ok(self.find_struct(name).map(|ty| ty.size_or_type.into()))
    }

    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        Ok(self.member_of(name, path))
    }

    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        Ok(self.enumerators.get(name, self.strings()))
    }
}

/// The places of the two sections in the blob: start and length.
struct Header {
    types: (usize, usize),
    strings: (usize, usize),
}

impl Header {
    fn read(data: Bytes<'_>) -> Option<Self> {
        let hdr_len = data.u32(4)?;
        if data.u16(0)? != MAGIC || data.get(2, 1)? != [1] || !(24..=1024).contains(&hdr_len) {
            return None;
        }
        let field = |at| data.u32(at).and_then(|value| usize::try_from(value).ok());
        let base = field(4)?;
        Some(Self {
            types: (base.checked_add(field(8)?)?, field(12)?),
            strings: (base.checked_add(field(16)?)?, field(20)?),
        })
    }

    /// The end of the last section.
    fn end(&self) -> Option<usize> {
        let types = self.types.0.checked_add(self.types.1)?;
        let strings = self.strings.0.checked_add(self.strings.1)?;
        Some(types.max(strings))
    }
}

impl Type {
    fn read(types: Bytes<'_>, at: usize) -> Option<Self> {
        let info = types.u32(at.checked_add(4)?)?;
        Some(Self {
            name: types.u32(at)?,
            vlen: info & 0xffff,
            kind: (info >> 24) & 0x1f,
            kind_flag: info >> 31 != 0,
            size_or_type: types.u32(at.checked_add(8)?)?,
            tail: at.checked_add(12)?,
        })
    }

    /// The length in bytes of the variable part, or `None` for a kind that is not known: the
    /// types behind it could not be found.
    fn tail_len(&self) -> Option<usize> {
        let vlen = usize::try_from(self.vlen).ok()?;
        match self.kind {
            KIND_PTR | KIND_FWD | KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT
            | KIND_FUNC | KIND_FLOAT | KIND_TYPE_TAG => Some(0),
            KIND_INT | KIND_VAR | KIND_DECL_TAG => Some(4),
            KIND_ARRAY => Some(12),
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => vlen.checked_mul(12),
            KIND_ENUM | KIND_FUNC_PROTO => vlen.checked_mul(8),
            _ => None,
        }
    }

    fn enumerators(&self, types: Bytes<'_>, visit: &mut dyn FnMut(u32, i64)) {
        let is_64 = self.kind == KIND_ENUM64;
        let step = if is_64 { 12 } else { 8 };
        let entries = (self.tail..).step_by(step);
        for (_, at) in (0..self.vlen).zip(entries) {
            let word = |offset| types.u32(at.checked_add(offset)?);
            let (Some(name), Some(low)) = (word(0), word(4)) else {
                return;
            };
            let value = if is_64 {
                let Some(high) = word(8) else {
                    return;
                };
                (u64::from(high) << 32 | u64::from(low)).cast_signed()
            } else if self.kind_flag {
                low.cast_signed().into()
            } else {
                low.into()
            };
            visit(name, value);
        }
    }
}

/// Finds the kernel's BTF in its image: between `bounds` (`__start_BTF`, `__stop_BTF`) if
/// they are known, else by searching `image` for a whole and valid one.
///
/// # Errors
/// [`SymbolError::Malformed`] if what lies between the bounds is not BTF.
pub fn find_btf(
    memory: &dyn VirtualMemory,
    bounds: Option<(KernelVa, KernelVa)>,
    image: (KernelVa, KernelVa),
) -> Result<Option<Btf>, SymbolError> {
    const ORIGIN: &str = "BTF in guest memory";
    if let Some((start, stop)) = bounds {
        // Types that cannot be read are not none: a kernel without any has no such symbols.
        let unread = |what, value| SymbolError::Malformed {
            origin: ORIGIN.into(),
            what,
            offset: start.raw(),
            value,
        };
        let len = stop.offset_from(start).filter(|len| *len <= MAX_LEN);
        let len = len.and_then(|len| usize::try_from(len).ok());
        let len = len.ok_or_else(|| unread("an end of .BTF", stop.raw()))?;
        if len > 0 {
            let mut blob = vec![0; len];
            let read = memory.read(start, &mut blob);
            read.map_err(|_| unread("a .BTF that is not mapped", to_u64(len)))?;
            return Btf::new(ORIGIN, blob).map(Some);
        }
    }
    // `.BTF` follows read-only data and is aligned to a page or at least to a word.
    let needle = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0];
    let mut found = None;
    super::scan(memory, image, &needle, &mut |at| {
        let mut head = [0; 24];
        let Ok(()) = memory.read(at, &mut head) else {
            return true;
        };
        let len = Header::read(Bytes(&head)).and_then(|header| header.end());
        let Some(len) = len.filter(|len| to_u64(*len) <= MAX_LEN) else {
            return true;
        };
        let mut blob = vec![0; len];
        if memory.read(at, &mut blob).is_ok()
            && let Ok(btf) = Btf::new(ORIGIN, blob)
            && btf.find_struct("page").is_some()
        {
            found = Some(btf);
        }
        found.is_none()
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{Btf, MAX_LEN, MAX_STEPS, SymbolSource, find_btf};
    use crate::KernelVa;
    use crate::kernel::testing::{Facts, Ram, kernel};
    use proptest::prelude::*;

    /// Writes BTF from the specification alone.
    #[derive(Default)]
    pub struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
    }

    impl Builder {
        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = u32::try_from(self.strings.len()).unwrap();
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            at
        }

        fn put(&mut self, words: &[u32]) {
            for word in words {
                self.types.extend(word.to_le_bytes());
            }
        }

        fn ty(&mut self, name: &str, kind: u32, vlen: u32, flag: u32, size: u32, tail: &[u32]) {
            let name = self.name(name);
            self.put(&[name, flag << 31 | kind << 24 | vlen, size]);
            self.put(tail);
        }

        fn finish(mut self) -> Vec<u8> {
            self.name("");
            let types = u32::try_from(self.types.len()).unwrap();
            let strings = u32::try_from(self.strings.len()).unwrap();
            let mut blob = vec![0x9f, 0xeb, 1, 0];
            for word in [24, 0, types, types, strings] {
                blob.extend(word.to_le_bytes());
            }
            blob.extend(self.types);
            blob.extend(self.strings);
            blob
        }
    }

    /// `struct page { unsigned long flags; union { struct { list lru; }; int x[3]; }; const alias arr[5]; };`
    fn sample() -> Vec<u8> {
        let mut b = Builder::default();
        b.ty("unsigned long", 1, 0, 0, 8, &[64]); // 1
        let (next, prev) = (b.name("next"), b.name("prev"));
        b.ty("list", 4, 2, 0, 16, &[next, 1, 0, prev, 1, 64]); // 2
        let lru = b.name("lru");
        b.ty("", 4, 1, 0, 16, &[lru, 2, 0]); // 3
        b.ty("", 3, 0, 0, 0, &[1, 1, 3]); // 4: unsigned long[3]
        let x = b.name("x");
        b.ty("", 5, 2, 0, 24, &[0, 3, 0, x, 4, 0]); // 5
        b.ty("alias", 8, 0, 0, 1, &[]); // 6
        b.ty("", 10, 0, 0, 6, &[]); // 7
        b.ty("", 3, 0, 0, 0, &[7, 1, 5]); // 8
        let (flags, arr, bit) = (b.name("flags"), b.name("arr"), b.name("bit"));
        b.ty(
            "page",
            4,
            4,
            1,
            80,
            &[flags, 1, 0, 0, 5, 64, arr, 8, 256, bit, 1, 1 << 24 | 579],
        ); // 9
        let (a, m) = (b.name("PG_a"), b.name("MINUS"));
        b.ty("e", 6, 2, 1, 4, &[a, 7, m, u32::MAX]); // 10
        let big = b.name("BIG");
        b.ty("e64", 19, 1, 0, 8, &[big, 1, 2]); // 11
        b.finish()
    }

    #[test]
    fn finds_members_through_anonymous_unions() {
        let btf = Btf::new("test", sample()).unwrap();
        let member = |path: &str| {
            btf.member("page", path)
                .unwrap()
                .map(|m| (m.offset, m.size, m.len))
        };
        assert_eq!(btf.type_size("page").unwrap(), Some(80));
        assert_eq!(member("flags"), Some((0, Some(8), None)));
        assert_eq!(member("lru"), Some((8, Some(16), None)));
        assert_eq!(member("lru.prev"), Some((16, Some(8), None)));
        assert_eq!(member("x"), Some((8, Some(24), Some(3))));
        assert_eq!(member("arr"), Some((32, Some(40), Some(5))));
        assert_eq!(member("bit"), None, "not on a byte");
        assert_eq!(member("lru.none"), None);
        assert_eq!(member("nothing"), None);
        assert_eq!(btf.type_size("nothing").unwrap(), None);
        assert_eq!(btf.constant("PG_a").unwrap(), Some(7));
        assert_eq!(btf.constant("MINUS").unwrap(), Some(-1));
        assert_eq!(btf.constant("BIG").unwrap(), Some(0x2_0000_0001));
    }

    #[test]
    fn a_look_up_ends_after_so_many_members() {
        // One anonymous structure as so many members of another: all of it is looked at each time.
        let most = MAX_STEPS;
        for (inner, outer, is_found) in [(99, most / 100 - 1, true), (99, most / 100, false)] {
            let mut b = Builder::default();
            b.ty("unsigned long", 1, 0, 0, 8, &[64]); // 1
            let (some, last) = (b.name("some"), b.name("last"));
            b.ty("", 4, inner, 0, 8, &[some, 1, 0].repeat(inner as usize)); // 2
            let members = [[0, 2, 0].repeat(outer as usize), vec![last, 1, 64]].concat();
            b.ty("wide", 4, outer + 1, 0, 16, &members); // 3
            let btf = Btf::new("test", b.finish()).unwrap();
            let found = btf.member("wide", "last").unwrap();
            assert_eq!(found.is_some(), is_found, "{outer}");
        }
    }

    #[test]
    fn a_structure_inside_itself_ends() {
        let mut b = Builder::default();
        b.ty("loop", 4, 1, 0, 8, &[0, 1, 0]);
        b.ty("turn", 8, 0, 0, 2, &[]);
        let btf = Btf::new("test", b.finish()).unwrap();
        assert_eq!(btf.member("loop", "x").unwrap(), None);
        assert_eq!(btf.size_of(2, 0), None);
    }

    proptest! {
        #[test]
        fn changed_bytes_are_read_or_refused(
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut blob = sample();
            for (at, value) in changes {
                let at = at.index(blob.len());
                blob[at] = value;
            }
            let cut = cut.index(blob.len() * 4);
            blob.truncate(cut);
            if let Ok(btf) = Btf::new("test", blob) {
                for path in ["flags", "lru.prev", "x", "arr", "bit"] {
                    let _ = btf.member("page", path);
                }
                let _ = btf.constant("PG_a");
            }
        }
    }

    #[test]
    fn no_more_types_are_read_than_a_bound() {
        let ram = Ram::new(8 << 20);
        let memory = ram.memory();
        let space = kernel(&memory, Facts::default()).space;
        let start = KernelVa::new(0xffff_ffff_9000_0000);
        for (len, said) in [
            (MAX_LEN, "a .BTF that is not mapped"),
            (MAX_LEN + 1, "an end of .BTF"),
        ] {
            let stop = start.checked_add(len).unwrap();
            let found = find_btf(&space, Some((start, stop)), (start, start));
            let error = found.unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
