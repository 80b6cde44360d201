//! The symbols and types of one kernel build, in a few kilobytes of text: see `SYMBOLS.md`.
//!
//! It answers what `needs` asks and nothing else, and says of each row whether the
//! kernel has it: a file that was made when less was asked is refused, for what it does not say
//! would be taken for what the kernel does not have.

use super::{Member, SymbolBase, SymbolError, SymbolSource};
use crate::KernelVa;
use crate::needs::{CONSTANTS, STRUCTURES, SYMBOLS};
use core::fmt::Write;
use core::hash::Hasher;
use sonicshot::to_u64;
use std::collections::HashMap;
use twox_hash::XxHash3_64;

/// The beginning of every file; the number is the version.
pub(super) const MAGIC: &[u8] = b"SonicShot symbols ";
const VERSION: &str = "1";
/// One has some 10 KiB.
const MAX_LEN: usize = 1 << 20;
const MAX_BANNER: usize = 512;
pub(crate) const MAX_BUILD_ID: usize = 64;

/// The symbols and types of one kernel build that are needed, and no others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SymbolFile {
    origin: String,
    build_id: Option<Vec<u8>>,
    banner: Option<String>,
    /// As linked. `None`: the kernel does not have it.
    symbols: HashMap<String, Option<u64>>,
    structures: HashMap<String, Option<Structure>>,
    constants: HashMap<String, Option<i64>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Structure {
    size: u64,
    members: HashMap<String, Option<Member>>,
}

impl SymbolFile {
    /// Gathers what is needed of the kernel that all of `sources` are of; the first that knows
    /// something counts. It is called `origin` in messages.
    ///
    /// # Errors
    /// [`SymbolError::Lacks`] if they tell no types or no symbols, [`SymbolError::Differ`] if they
    /// are not of one build, [`SymbolError::Malformed`] if one is damaged.
    pub fn gather(
        origin: impl Into<String>,
        sources: &[&dyn SymbolSource],
    ) -> Result<Self, SymbolError> {
        Self::of_running(origin.into(), sources, 0)
    }

    /// The same of sources of which some have the addresses of a running kernel, which `kaslr` has
    /// moved.
    pub(crate) fn of_running(
        origin: String,
        sources: &[&dyn SymbolSource],
        kaslr: u64,
    ) -> Result<Self, SymbolError> {
        let names: Vec<&str> = sources.iter().map(|source| source.origin()).collect();
        let names = names.join(", ");
        // It gives the value instead of the address of some.
        let sources: Vec<&dyn SymbolSource> = sources
            .iter()
            .copied()
            .filter(|source| !source.is_vmcoreinfo())
            .collect();
        let mut ids = sources
            .iter()
            .filter_map(|source| Some((source.build_id()?, source.origin())));
        let build_id = ids.next();
        if let Some((id, first)) = build_id
            && let Some((_, second)) = ids.find(|(other, _)| *other != id)
        {
            return Err(SymbolError::Differ {
                first: first.to_owned(),
                second: second.to_owned(),
                what: "their build ID".into(),
            });
        }
        let banner = sources.iter().find_map(|source| source.banner());
        let mut file = Self {
            origin,
            build_id: build_id.map(|(id, _)| id.to_vec()),
            banner: banner.map(|banner| banner.trim().to_owned()),
            symbols: HashMap::new(),
            structures: HashMap::new(),
            constants: HashMap::new(),
        };
        for symbol in SYMBOLS {
            let at = first(
                &sources,
                symbol.name,
                |at| *at,
                |source| linked(source, symbol.name, kaslr),
            )?;
            file.symbols.insert(symbol.name.into(), at);
        }
        for structure in STRUCTURES {
            let size = first(
                &sources,
                structure.name,
                |size| *size,
                |source| source.type_size(structure.name),
            )?;
            let mut members = HashMap::new();
            for member in structure.members {
                let ask = |source: &dyn SymbolSource| source.member(structure.name, member.path);
                let offset = |member: &Member| member.offset;
                let found = first(&sources, member.path, offset, ask)?;
                members.insert(member.path.to_owned(), found);
            }
            let structure_of = size.map(|size| Structure { size, members });
            file.structures.insert(structure.name.into(), structure_of);
        }
        for constant in CONSTANTS {
            let value = first(
                &sources,
                constant.name,
                |value: &i64| value.cast_unsigned(),
                |source| source.constant(constant.name),
            )?;
            file.constants.insert(constant.name.into(), value);
        }
        file.check_useful(&names)?;
        Ok(file)
    }

    /// Notes the build that it is of, where the sources do not tell.
    pub(crate) fn of_build(mut self, id: Option<&[u8]>, banner: Option<&str>) -> Self {
        self.build_id = self.build_id.or_else(|| id.map(<[u8]>::to_vec));
        let banner = || banner.map(|banner| banner.trim().to_owned());
        self.banner = self.banner.or_else(banner);
        self
    }

    /// Refuses what nobody could read a kernel by.
    fn check_useful(&self, sources: &str) -> Result<(), SymbolError> {
        let lacks = |what| {
            Err(SymbolError::Lacks {
                origin: sources.to_owned(),
                what,
            })
        };
        let has = |name: &str| matches!(self.symbols.get(name), Some(Some(_)));
        if !has("linux_banner") || !has("init_task") {
            return lacks("the symbols of data: a vmlinux has them that was not stripped");
        }
        let zone = self.structures.get("zone").is_some_and(Option::is_some);
        let flags = self.constants.get("__NR_PAGEFLAGS");
        if !zone || !flags.is_some_and(Option::is_some) {
            return lacks(
                "types: a kernel built with CONFIG_DEBUG_INFO (DWARF) or CONFIG_DEBUG_INFO_BTF \
                 has them",
            );
        }
        Ok(())
    }

    /// Refuses a file of which nothing would tell the guest that it is of.
    ///
    /// # Errors
    /// [`SymbolError::Lacks`].
    pub fn check_build(&self) -> Result<(), SymbolError> {
        if self.build_id.is_some() || self.banner.is_some() {
            return Ok(());
        }
        Err(SymbolError::Lacks {
            origin: self.origin.clone(),
            what: "a build ID and a banner, by which its guests are told: give the vmlinux, too",
        })
    }

    /// The text, as [`parse`](Self::parse) reads it. The same is always written the same way.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("{}{VERSION}\n", String::from_utf8_lossy(MAGIC));
        let mut line = |args: core::fmt::Arguments<'_>| {
            // A String takes whatever is written.
            let _ = writeln!(text, "{args}");
        };
        if let Some(id) = &self.build_id {
            line(format_args!("build-id {}", hex(id)));
        }
        if let Some(banner) = &self.banner {
            line(format_args!("banner {banner}"));
        }
        for (name, at) in sorted(&self.symbols) {
            match at {
                Some(at) => line(format_args!("symbol {name} {at:x}")),
                None => line(format_args!("symbol {name} -")),
            }
        }
        for (name, structure) in sorted(&self.structures) {
            let Some(structure) = structure else {
                line(format_args!("struct {name} -"));
                continue;
            };
            line(format_args!("struct {name} {}", structure.size));
            for (path, member) in sorted(&structure.members) {
                match member {
                    None => line(format_args!("member {path} -")),
                    Some(member) => line(format_args!(
                        "member {path} {}{}{}",
                        member.offset,
                        Optional(member.size),
                        Optional(member.len)
                    )),
                }
            }
        }
        for (name, value) in sorted(&self.constants) {
            match value {
                Some(value) => line(format_args!("constant {name} {value}")),
                None => line(format_args!("constant {name} -")),
            }
        }
        let sum = sum(text.as_bytes());
        let _ = writeln!(text, "end {sum:016x}");
        text
    }

    /// Reads a file that messages call `origin`.
    ///
    /// # Errors
    /// [`SymbolError::Malformed`] if it is damaged or of another version,
    /// [`SymbolError::Outdated`] if it does not say all that is asked.
    pub fn parse(origin: impl Into<String>, bytes: &[u8]) -> Result<Self, SymbolError> {
        let file = Reader::new(origin.into(), bytes).read()?;
        file.check_complete()?;
        Ok(file)
    }

    /// Refuses a file that does not say of each row whether the kernel has it.
    fn check_complete(&self) -> Result<(), SymbolError> {
        let outdated = |what: String| {
            Err(SymbolError::Outdated {
                origin: self.origin.clone(),
                what,
            })
        };
        for symbol in SYMBOLS {
            if !self.symbols.contains_key(symbol.name) {
                return outdated(format!("symbol {}", symbol.name));
            }
        }
        for structure in STRUCTURES {
            let Some(found) = self.structures.get(structure.name) else {
                return outdated(format!("struct {}", structure.name));
            };
            let Some(found) = found else { continue };
            for member in structure.members {
                if !found.members.contains_key(member.path) {
                    return outdated(format!("member {}.{}", structure.name, member.path));
                }
            }
        }
        for constant in CONSTANTS {
            if !self.constants.contains_key(constant.name) {
                return outdated(format!("constant {}", constant.name));
            }
        }
        Ok(())
    }

    /// The number of symbols, members and constants that the kernel has, of those that are asked.
    #[must_use]
    pub fn len(&self) -> usize {
        let symbols = self.symbols.values().flatten().map(drop);
        let structures = self.structures.values().flatten();
        let members = structures.flat_map(|structure| structure.members.values().flatten());
        let constants = self.constants.values().flatten().map(drop);
        symbols.chain(members.map(drop)).chain(constants).count()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A number in a place of its own, or nothing.
struct Optional(Option<u64>);

impl core::fmt::Display for Optional {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            Some(number) => write!(f, " {number}"),
            None => f.write_str(" -"),
        }
    }
}

impl SymbolSource for SymbolFile {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        let at = self.symbols.get(name).copied().flatten();
        Ok(at.map(KernelVa::new))
    }

    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        let found = self.structures.get(name).and_then(Option::as_ref);
        Ok(found.map(|structure| structure.size))
    }

    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        let found = self.structures.get(name).and_then(Option::as_ref);
        Ok(found.and_then(|structure| structure.members.get(path).copied().flatten()))
    }

    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        Ok(self.constants.get(name).copied().flatten())
    }

    fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    fn banner(&self) -> Option<&str> {
        self.banner.as_deref()
    }
}

/// The answer of the first source that knows `name`. Another must not say otherwise.
fn first<T>(
    sources: &[&dyn SymbolSource],
    name: &str,
    number: impl Fn(&T) -> u64,
    ask: impl Fn(&dyn SymbolSource) -> Result<Option<T>, SymbolError>,
) -> Result<Option<T>, SymbolError> {
    let mut found: Option<(T, &str)> = None;
    for source in sources {
        match (ask(*source)?, &found) {
            (Some(value), None) => found = Some((value, source.origin())),
            (Some(value), Some((first, origin))) if number(&value) != number(first) => {
                return Err(SymbolError::Differ {
                    first: (*origin).to_owned(),
                    second: source.origin().to_owned(),
                    what: name.to_owned(),
                });
            }
            _ => {}
        }
    }
    Ok(found.map(|(value, _)| value))
}

/// The address of a symbol as linked.
fn linked(source: &dyn SymbolSource, name: &str, kaslr: u64) -> Result<Option<u64>, SymbolError> {
    let at = source.symbol(name)?.map(KernelVa::raw);
    Ok(match source.base() {
        SymbolBase::Linked => at,
        // A place in the per-CPU areas is not moved.
        SymbolBase::Running => at.map(|at| match at >> 63 {
            0 => at,
            _ => KernelVa::new(at).moved_back_by(kaslr).raw(),
        }),
    })
}

fn sorted<T>(map: &HashMap<String, T>) -> Vec<(&str, &T)> {
    let mut all: Vec<_> = map
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    all.sort_unstable_by_key(|(name, _)| *name);
    all
}

pub(crate) fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sum(bytes: &[u8]) -> u64 {
    let mut hasher = XxHash3_64::new();
    hasher.write(bytes);
    hasher.finish()
}

/// The bytes that a text of two digits each gives.
fn from_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let byte = |pair: &[u8; 2]| {
        let is_hex = pair.iter().all(u8::is_ascii_hexdigit);
        let text = core::str::from_utf8(pair).ok().filter(|_| is_hex)?;
        u8::from_str_radix(text, 16).ok()
    };
    let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
    bytes.filter(|id| !id.is_empty() && id.len() <= MAX_BUILD_ID)
}

/// The build ID that a file names which begins with `start`; `None` if it is no such file or names
/// none.
pub(super) fn build_id_of(start: &[u8]) -> Option<Vec<u8>> {
    let text = start.strip_prefix(MAGIC)?;
    let second = text.split(|byte| *byte == b'\n').nth(1)?;
    from_hex(core::str::from_utf8(second.strip_prefix(b"build-id ")?).ok()?)
}

/// Reads a file line by line.
struct Reader<'t> {
    bytes: &'t [u8],
    /// The beginning of the line that is read.
    at: usize,
    file: SymbolFile,
    /// The structure that members belong to.
    structure: Option<String>,
}

impl<'t> Reader<'t> {
    fn new(origin: String, bytes: &'t [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            file: SymbolFile {
                origin,
                build_id: None,
                banner: None,
                symbols: HashMap::new(),
                structures: HashMap::new(),
                constants: HashMap::new(),
            },
            structure: None,
        }
    }

    fn wrong(&self, what: &'static str, value: u64) -> SymbolError {
        SymbolError::Malformed {
            origin: self.file.origin.clone(),
            what,
            offset: to_u64(self.at),
            value,
        }
    }

    /// The next line, without its end.
    fn line(&mut self) -> Result<&'t str, SymbolError> {
        let rest = self.bytes.get(self.at..).unwrap_or(&[]);
        let len = memchr::memchr(b'\n', rest).ok_or_else(|| {
            self.wrong("a file that ends without its last line", to_u64(rest.len()))
        })?;
        let (line, _) = rest.split_at(len);
        core::str::from_utf8(line)
            .map_err(|error| self.wrong("a line that is not UTF-8", to_u64(error.valid_up_to())))
    }

    fn read(mut self) -> Result<SymbolFile, SymbolError> {
        if self.bytes.len() > MAX_LEN {
            return Err(self.wrong("more than any symbol file has", to_u64(self.bytes.len())));
        }
        let mut is_first = true;
        loop {
            let line = self.line()?;
            if is_first {
                let version = line.as_bytes().strip_prefix(MAGIC);
                if version != Some(VERSION.as_bytes()) {
                    return Err(self.wrong("a version that is not known", to_u64(line.len())));
                }
            } else if let Some(end) = line.strip_prefix("end ") {
                return self.end(line, end);
            } else {
                self.row(line)?;
            }
            is_first = false;
            self.pass_over(line)?;
        }
    }

    /// Goes on behind `line`, which is the next one, and its end.
    fn pass_over(&mut self, line: &str) -> Result<(), SymbolError> {
        let next = self.at.checked_add(line.len());
        let next = next.and_then(|end| end.checked_add(1));
        let long = self.wrong("a line that is too long", to_u64(line.len()));
        self.at = next.ok_or(long)?;
        Ok(())
    }

    /// The last line: nothing is behind it, and its number is that of all before.
    fn end(mut self, line: &str, text: &str) -> Result<SymbolFile, SymbolError> {
        let before = self.bytes.get(..self.at).unwrap_or(&[]);
        let told = u64::from_str_radix(text, 16).ok();
        let there = sum(before);
        if told != Some(there) {
            return Err(self.wrong("an end that is not of what is before it", there));
        }
        self.pass_over(line)?;
        if self.at != self.bytes.len() {
            return Err(self.wrong("something behind the end", to_u64(self.bytes.len())));
        }
        Ok(self.file)
    }

    fn row(&mut self, line: &str) -> Result<(), SymbolError> {
        let (kind, rest) = line
            .split_once(' ')
            .ok_or_else(|| self.wrong("a line of one word", to_u64(line.len())))?;
        match kind {
            "build-id" => {
                let id = from_hex(rest);
                if id.is_none() || self.file.build_id.is_some() {
                    return Err(self.wrong("a build ID that is none, or a second", 0));
                }
                self.file.build_id = id;
            }
            "banner" => {
                if rest.len() > MAX_BANNER || self.file.banner.is_some() {
                    return Err(
                        self.wrong("a banner that is too long, or a second", to_u64(rest.len()))
                    );
                }
                self.file.banner = Some(rest.to_owned());
            }
            _ => self.fact(kind, rest)?,
        }
        Ok(())
    }

    /// The note on one name.
    fn fact(&mut self, kind: &str, rest: &str) -> Result<(), SymbolError> {
        let mut words = rest.split(' ');
        let name = words.next().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| self.wrong("a line without a name", 0))?;
        let values: Vec<&str> = words.collect();
        let is_new = match kind {
            "symbol" => {
                let at = self.value(&values, |text| u64::from_str_radix(text, 16).ok())?;
                self.file.symbols.insert(name.into(), at).is_none()
            }
            "struct" => {
                let size = self.value(&values, |text| text.parse().ok())?;
                self.structure = size.map(|_| name.to_owned());
                let members = HashMap::new();
                let structure = size.map(|size| Structure { size, members });
                self.file
                    .structures
                    .insert(name.into(), structure)
                    .is_none()
            }
            "member" => {
                let member = self.member(&values)?;
                let structure = self.structure.as_deref();
                let structure = structure.and_then(|name| self.file.structures.get_mut(name));
                match structure.and_then(Option::as_mut) {
                    Some(structure) => structure.members.insert(name.into(), member).is_none(),
                    None => return Err(self.wrong("a member of no structure", 0)),
                }
            }
            "constant" => {
                let value = self.value(&values, |text| text.parse().ok())?;
                self.file.constants.insert(name.into(), value).is_none()
            }
            _ => return Err(self.wrong("a line of an unknown kind", to_u64(kind.len()))),
        };
        match is_new {
            true => Ok(()),
            false => Err(self.wrong("a name that stands twice", to_u64(name.len()))),
        }
    }

    /// The only value of a line; `None` if the kernel has none.
    fn value<T>(
        &self,
        values: &[&str],
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, SymbolError> {
        match values {
            ["-"] => Ok(None),
            [text] => read(text)
                .map(Some)
                .ok_or_else(|| self.wrong("a value that is no number", to_u64(text.len()))),
            _ => Err(self.wrong("a line of too few or too many words", to_u64(values.len()))),
        }
    }

    fn member(&self, values: &[&str]) -> Result<Option<Member>, SymbolError> {
        let number = |text: &str| text.parse().ok();
        match values {
            ["-"] => Ok(None),
            [offset, size, len] => {
                let offset = self.value(&[offset], number)?;
                let offset = offset.ok_or_else(|| self.wrong("a member without its place", 0))?;
                Ok(Some(Member {
                    offset,
                    size: self.value(&[size], number)?,
                    len: self.value(&[len], number)?,
                }))
            }
            _ => Err(self.wrong(
                "a member of too few or too many words",
                to_u64(values.len()),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_BANNER, MAX_BUILD_ID, MAX_LEN, SymbolFile, sum};
    use crate::KernelVa;
    use crate::kernel::testing::{Facts, page_facts};
    use crate::symbols::{SymbolError, SymbolSource};
    use proptest::prelude::*;

    fn made() -> SymbolFile {
        let mut facts = page_facts();
        facts.linked = true;
        facts.sizes.insert("zone", 1600);
        Facts::member(&mut facts, "zone", "zone_start_pfn", 120);
        facts.symbols.insert("linux_banner", 0xffff_ffff_8200_0100);
        facts.symbols.insert("init_task", 0xffff_ffff_8280_0000);
        facts.symbols.insert("this_cpu_off", 0x1_9168);
        let sources: [&dyn SymbolSource; 1] = [&facts];
        let file = SymbolFile::gather("made", &sources).unwrap();
        file.of_build(Some(&[0xab, 0x01]), Some("Linux version 6.1.0 (a test)\n"))
    }

    /// The text with its last line made anew.
    fn sealed(text: &str) -> String {
        let body = text.rsplit_once("end ").map_or(text, |(body, _)| body);
        format!("{body}end {:016x}\n", sum(body.as_bytes()))
    }

    #[test]
    fn it_says_what_its_sources_say() {
        let file = made();
        let text = file.to_text();
        let read = SymbolFile::parse("made", text.as_bytes()).unwrap();
        assert_eq!(read, file);
        assert_eq!(read.to_text(), text);
        assert_eq!(sealed(&text), text);
        assert!(text.len() < 12 << 10, "{}", text.len());
        let (at, size) = (read.symbol("init_task"), read.type_size("page"));
        assert_eq!(at.unwrap().map(KernelVa::raw), Some(0xffff_ffff_8280_0000));
        assert_eq!(size.unwrap(), Some(64));
        let flags = read.member("page", "flags").unwrap().unwrap();
        assert_eq!((flags.offset, flags.size, flags.len), (0, Some(8), None));
        assert_eq!(read.constant("PG_writeback").unwrap(), Some(1));
        assert_eq!(read.constant("PGTY_buddy").unwrap(), None);
        assert_eq!(read.build_id(), Some(&[0xab, 0x01][..]));
        assert_eq!(read.banner(), Some("Linux version 6.1.0 (a test)"));
    }

    #[test]
    fn sources_that_tell_too_little_make_no_file() {
        let lacks = |facts: &Facts, what: &str| {
            let error = SymbolFile::gather("made", &[facts]).unwrap_err();
            assert!(matches!(error, SymbolError::Lacks { .. }), "{error}");
            assert!(error.to_string().contains(what), "{error}");
        };
        let mut facts = page_facts();
        facts.linked = true;
        lacks(&facts, "the symbols of data");
        facts.symbols.insert("linux_banner", 1);
        facts.symbols.insert("init_task", 2);
        lacks(&facts, "types");
        facts.sizes.insert("zone", 1600);
        let file = SymbolFile::gather("made", &[&facts]).unwrap();
        let error = file.check_build().unwrap_err();
        assert!(error.to_string().contains("build ID"), "{error}");
    }

    #[test]
    fn sources_of_two_builds_make_no_file() {
        let mut facts = page_facts();
        facts.linked = true;
        facts.symbols.insert("linux_banner", 1);
        facts.symbols.insert("init_task", 2);
        facts.sizes.insert("zone", 1600);
        let mut other = facts.clone();
        assert!(SymbolFile::gather("made", &[&facts, &other]).is_ok());
        other.symbols.insert("init_task", 3);
        let error = SymbolFile::gather("made", &[&facts, &other]).unwrap_err();
        assert!(
            matches!(&error, SymbolError::Differ { what, .. } if what == "init_task"),
            "{error}"
        );
    }

    #[test]
    fn what_is_damaged_or_says_too_little_is_refused() {
        let text = made().to_text();
        let refused = |text: &str, what: &str| {
            let error = SymbolFile::parse("made", text.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(what), "{error}, not {what}");
        };
        refused(&text[..text.len() - 1], "ends without its last line");
        refused(&text.replace("symbols 1", "symbols 2"), "a version");
        refused(
            &text.replace("symbol init_task f", "symbol init_task e"),
            "an end",
        );
        refused(&format!("{text}x\n"), "behind the end");
        let changed = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            sealed(&text.replacen(from, to, 1))
        };
        // A row that was not asked when it was made.
        refused(&changed("constant PGTY_buddy -\n", ""), "PGTY_buddy");
        refused(&changed("struct folio -\n", ""), "struct folio");
        refused(&changed("member flags 0 8 -\n", ""), "member page.flags");
        refused(
            &changed("member flags 0 8 -", "member flags 0 8"),
            "too few",
        );
        refused(
            &changed("member flags 0 8 -", "member flags - 8 -"),
            "without its place",
        );
        refused(&changed("member flags 0", "member flags x"), "no number");
        refused(
            &changed("symbol e820_table -", "symbol efi -"),
            "stands twice",
        );
        refused(
            &changed("struct e820_table -\n", "member x -\nstruct e820_table -\n"),
            "no structure",
        );
        refused(&changed("build-id ab01", "build-id abz1"), "a build ID");
        refused(&changed("constant __NR", "number __NR"), "unknown kind");
        // More than any file has.
        let long = |len: usize| "x".repeat(len);
        refused(&long(MAX_LEN + 1), "more than any symbol file");
        let banner = |len| changed("banner Linux", &format!("banner {} Linux", long(len)));
        refused(&banner(MAX_BANNER), "a banner that is too long");
        let id = |len: usize| changed("build-id ab01", &format!("build-id {}", "ab".repeat(len)));
        refused(&id(MAX_BUILD_ID + 1), "a build ID that is none");
        assert!(SymbolFile::parse("made", id(MAX_BUILD_ID).as_bytes()).is_ok());
        // What a later version asks beside is passed over.
        let more = changed("symbol efi", "symbol a_later_one 1\nsymbol efi");
        assert!(SymbolFile::parse("made", more.as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn bytes_that_are_none_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = SymbolFile::parse("any", &bytes);
            let text = [&b"SonicShot symbols 1\n"[..], &bytes].concat();
            let _ = SymbolFile::parse("any", &text);
        }

        #[test]
        fn a_file_with_another_byte_is_no_file(at in any::<prop::sample::Index>(), flip in 1_u8..=255) {
            let mut bytes = made().to_text().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // A digit of the sum may change its case.
            if let Ok(read) = SymbolFile::parse("any", &bytes) {
                prop_assert_eq!(read.to_text(), made().to_text());
            }
        }
    }
}
