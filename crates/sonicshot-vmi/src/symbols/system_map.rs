//! System.map: a line `ADDRESS TYPE NAME` for each symbol, as `nm` writes it.

use super::names::NameIndex;
use super::own::OwnFile;
use super::{SymbolError, SymbolSource};
use crate::KernelVa;
use sonicshot::to_u64;
use std::path::Path;

/// The symbols of a System.map.
#[derive(Debug)]
pub struct SystemMap {
    origin: String,
    file: OwnFile,
    /// The beginning of each line.
    lines: Vec<u32>,
    index: NameIndex,
}

/// Kernels have some 200,000 symbols.
const MAX_LINES: usize = 1 << 22;

impl SystemMap {
    /// Opens the System.map at `path`.
    ///
    /// # Errors
    /// [`SymbolError`] if it cannot be read or holds other lines. The placeholder that Debian
    /// puts into its kernel packages is refused.
    pub fn open(path: &Path) -> Result<Self, SymbolError> {
        let file = OwnFile::open(path)?;
        Self::new(path.display().to_string(), file)
    }

    fn new(origin: String, file: OwnFile) -> Result<Self, SymbolError> {
        let malformed = |what, offset: usize, value: u64| SymbolError::Malformed {
            origin: origin.clone(),
            what,
            offset: to_u64(offset),
            value,
        };
        let text: &[u8] = file.bytes();
        let mut lines = Vec::new();
        let mut at = 0_usize;
        while at < text.len() {
            let (_, rest) = text.split_at(at);
            let len = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
            if lines.len() >= MAX_LINES {
                return Err(malformed("too many lines", at, to_u64(lines.len())));
            }
            let (line, _) = rest.split_at(len);
            if parse(line).is_none() {
                let first = rest.first().map_or(to_u64(len), |byte| u64::from(*byte));
                return Err(malformed(
                    "a line that is not `ADDRESS TYPE NAME` (Debian's kernel packages carry a \
                     placeholder; the real System.map is in the -dbg package)",
                    at,
                    first,
                ));
            }
            lines.push(u32::try_from(at).map_err(|_| malformed("too large a file", at, 0))?);
            // Of the last line there may be no end.
            let next = at.checked_add(len).and_then(|end| end.checked_add(1));
            at = next.unwrap_or(text.len());
        }
        if lines.len() < 2 {
            return Err(malformed("too few symbols", 0, to_u64(lines.len())));
        }
        let index = NameIndex::new(lines.len(), |number| name(text, &lines, number));
        Ok(Self {
            origin,
            file,
            lines,
            index,
        })
    }
}

/// The line's address and name.
fn parse(line: &[u8]) -> Option<(u64, &[u8])> {
    let space = memchr::memchr(b' ', line)?;
    let (address, rest) = line.split_at_checked(space)?;
    if address.is_empty() || address.len() > 16 {
        return None;
    }
    let address = u64::from_str_radix(core::str::from_utf8(address).ok()?, 16).ok()?;
    match rest {
        [b' ', _, b' ', name @ ..] if !name.is_empty() && !name.contains(&b' ') => {
            Some((address, name))
        }
        _ => None,
    }
}

fn line<'a>(text: &'a [u8], lines: &[u32], number: u32) -> Option<(u64, &'a [u8])> {
    let at = usize::try_from(*lines.get(usize::try_from(number).ok()?)?).ok()?;
    let rest = text.get(at..)?;
    parse(rest.get(..memchr::memchr(b'\n', rest).unwrap_or(rest.len()))?)
}

fn name<'a>(text: &'a [u8], lines: &[u32], number: u32) -> Option<&'a [u8]> {
    line(text, lines, number).map(|(_, name)| name)
}

impl SymbolSource for SystemMap {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn symbol(&self, wanted: &str) -> Result<Option<KernelVa>, SymbolError> {
        let text = self.file.bytes();
        Ok(self
            .index
            .find(wanted.as_bytes(), |number| name(text, &self.lines, number))
            .and_then(|number| line(text, &self.lines, number))
            .map(|(address, _)| KernelVa::new(address)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::own::OwnFile;
    use super::{MAX_LINES, SymbolSource, SystemMap};
    use crate::KernelVa;
    use proptest::prelude::*;

    fn open(text: &[u8]) -> Result<SystemMap, super::SymbolError> {
        SystemMap::new("test".into(), OwnFile::from_bytes(text))
    }

    #[test]
    fn finds_symbols() {
        let map = open(b"ffffffff81000000 T _stext\nffffffff82000000 D a.b\n0000000000000000 A x")
            .unwrap();
        assert_eq!(
            map.symbol("_stext").unwrap(),
            Some(KernelVa::new(0xffff_ffff_8100_0000))
        );
        assert_eq!(
            map.symbol("a.b").unwrap(),
            Some(KernelVa::new(0xffff_ffff_8200_0000))
        );
        assert_eq!(map.symbol("x").unwrap(), Some(KernelVa::new(0)));
        assert_eq!(map.symbol("a").unwrap(), None);
    }

    #[test]
    fn no_more_lines_are_taken_than_a_kernel_has_symbols() {
        for (count, is_read) in [(MAX_LINES, true), (MAX_LINES + 1, false)] {
            let read = open(&b"1 T a\n".repeat(count));
            assert_eq!(read.is_ok(), is_read, "{count}");
        }
    }

    #[test]
    fn refuses_the_placeholder_of_debian() {
        let error =
            open(b"ffffffffffffffff B The real System.map is in the linux-image-x-dbg package\n")
                .unwrap_err();
        assert!(error.to_string().contains("-dbg package"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "([0-9a-f]{0,17} ?[TtD]? ?[a-z ]{0,5}\n?){0,8}") {
            if let Ok(map) = open(text.as_bytes()) {
                let _ = map.symbol("a");
            }
        }
    }
}
