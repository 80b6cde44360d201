//! VMCOREINFO: what the kernel writes down of itself for crash dumps.
//!
//! Lines such as `SYMBOL(swapper_pg_dir)=ffffffff82a10000`, `OFFSET(page.lru)=8`
//! (`kernel/vmcore_info.c`, Documentation/admin-guide/kdump/vmcoreinfo.rst).

use super::{Member, SymbolBase, SymbolError, SymbolSource};
use crate::{KernelVa, VmiError};
use sonicshot::to_u64;
use std::collections::HashMap;

/// VMCOREINFO is one page; a note may carry it with others' additions.
const MAX_LEN: usize = 64 << 10;

/// The parsed text of one VMCOREINFO.
///
/// ```
/// use sonicshot_vmi::symbols::Vmcoreinfo;
/// let info = Vmcoreinfo::parse(b"OSRELEASE=6.1.0\nPAGESIZE=4096\nOFFSET(page.lru)=8\n")?;
/// assert_eq!(info.osrelease(), Some("6.1.0"));
/// assert_eq!(info.offset("page.lru"), Some(8));
/// # Ok::<(), sonicshot_vmi::symbols::SymbolError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmcoreinfo {
    text: String,
    lines: HashMap<String, String>,
    build_id: Option<Vec<u8>>,
}

impl Vmcoreinfo {
    /// Parses the text up to its first NUL.
    ///
    /// # Errors
    /// [`SymbolError::Malformed`] if it does not begin as VMCOREINFO does, is too long, or is
    /// not text.
    pub fn parse(text: &[u8]) -> Result<Self, SymbolError> {
        let malformed = |what, offset: usize, value: usize| SymbolError::Malformed {
            origin: "VMCOREINFO".into(),
            what,
            offset: to_u64(offset),
            value: to_u64(value),
        };
        let end = memchr::memchr(0, text).unwrap_or(text.len());
        let (text, _) = text.split_at(end);
        if text.len() > MAX_LEN {
            return Err(malformed("more text than VMCOREINFO has", 0, text.len()));
        }
        let text = core::str::from_utf8(text).map_err(|error| {
            let at = error.valid_up_to();
            let byte = text.get(at).map_or(at, |byte| usize::from(*byte));
            malformed("a byte that is not UTF-8", at, byte)
        })?;
        if !text.starts_with("OSRELEASE=") {
            return Err(malformed(
                "text that does not begin with OSRELEASE=",
                0,
                text.len(),
            ));
        }
        let mut lines = HashMap::new();
        for line in text.lines() {
            if let Some((key, value)) = line.split_once('=') {
                // The kernel writes each key once; of two, the first counts.
                lines
                    .entry(key.trim().to_owned())
                    .or_insert_with(|| value.trim().to_owned());
            }
        }
        let build_id = lines.get("BUILD-ID").and_then(|id| from_hex(id));
        Ok(Self {
            text: text.to_owned(),
            lines,
            build_id,
        })
    }

    /// The text itself.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    fn line(&self, key: &str) -> Option<&str> {
        self.lines.get(key).map(String::as_str)
    }

    fn entry(&self, kind: &str, name: &str) -> Option<&str> {
        self.line(&format!("{kind}({name})"))
    }

    /// The kernel's release, such as `6.1.0-37-cloud-amd64`.
    #[must_use]
    pub fn osrelease(&self) -> Option<&str> {
        self.line("OSRELEASE")
    }

    /// The size of a page in bytes.
    #[must_use]
    pub fn page_size(&self) -> Option<u64> {
        self.line("PAGESIZE")?.parse().ok()
    }

    /// The offset that KASLR added to the linked addresses, in bytes.
    #[must_use]
    pub fn kernel_offset(&self) -> Option<u64> {
        u64::from_str_radix(self.line("KERNELOFFSET")?, 16).ok()
    }

    /// The same, and 0 of a kernel that does not say it: it has no KASLR.
    pub(crate) fn displacement(&self) -> Result<u64, VmiError> {
        match (self.line("KERNELOFFSET"), self.kernel_offset()) {
            (_, Some(offset)) => Ok(offset),
            (None, None) => Ok(0),
            (Some(text), None) => Err(VmiError::Unsupported {
                what: format!(
                    "VMCOREINFO with KERNELOFFSET `{text}`, which is no hexadecimal number"
                ),
            }),
        }
    }

    /// `SYMBOL(name)`: an address, or for `mem_section` and `vmemmap` where the array is.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<KernelVa> {
        let text = self.entry("SYMBOL", name)?;
        u64::from_str_radix(text, 16).ok().map(KernelVa::new)
    }

    /// Whether the kernel was built without kallsyms: since 6.0 (5fd8fea935a1) one with it says
    /// where its tables are, and before that nothing is told.
    pub(crate) fn tells_of_no_kallsyms(&self) -> bool {
        let release = self
            .osrelease()
            .and_then(|release| release.split('.').next());
        let major = release.and_then(|major| major.parse::<u32>().ok());
        let mut names = self.lines.keys();
        major.is_some_and(|major| major >= 6)
            && !names.any(|name| name.starts_with("SYMBOL(kallsyms_"))
    }

    /// `SIZE(name)` in bytes.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<u64> {
        self.entry("SIZE", name)?.parse().ok()
    }

    /// `OFFSET(name)` in bytes; the name is dotted, such as `page.lru`.
    #[must_use]
    pub fn offset(&self, name: &str) -> Option<u64> {
        self.entry("OFFSET", name)?.parse().ok()
    }

    /// `LENGTH(name)` in elements.
    #[must_use]
    pub fn length(&self, name: &str) -> Option<u64> {
        self.entry("LENGTH", name)?.parse().ok()
    }

    /// `NUMBER(name)`. Some are printed as signed, some as hexadecimal with `0x`.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<i64> {
        parse_number(self.entry("NUMBER", name)?)
    }
}

/// The lines of what may be a VMCOREINFO, without any of it copied: enough to tell in microseconds
/// that it is none of this memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VmcoreinfoLines<'t>(&'t [u8]);

impl<'t> VmcoreinfoLines<'t> {
    /// The lines of `text` up to its first NUL.
    pub(crate) fn new(text: &'t [u8]) -> Self {
        let end = memchr::memchr(0, text).unwrap_or(text.len());
        let (text, _) = text.split_at(end);
        Self(text)
    }

    /// Each line's key and value.
    pub(crate) fn lines(self) -> impl Iterator<Item = (&'t [u8], &'t [u8])> {
        self.0.split(|byte| *byte == b'\n').filter_map(|line| {
            let (key, value) = line.split_at_checked(memchr::memchr(b'=', line)?)?;
            Some((key, value.get(1..)?.trim_ascii()))
        })
    }

    /// The value of `key`. The kernel writes each key once; of two, the first counts.
    pub(crate) fn value(self, key: &str) -> Option<&'t [u8]> {
        let mut lines = self.lines();
        lines.find_map(|(this, value)| (this == key.as_bytes()).then_some(value))
    }

    /// The number that `key` has.
    pub(crate) fn number(self, key: &str) -> Option<i64> {
        parse_number(core::str::from_utf8(self.value(key)?).ok()?)
    }

    /// The value of a hexadecimal number without a prefix, as addresses are written.
    pub(crate) fn hexadecimal(value: &[u8]) -> Option<u64> {
        u64::from_str_radix(core::str::from_utf8(value).ok()?, 16).ok()
    }

    /// `SYMBOL(name)`.
    pub(crate) fn address(self, name: &str) -> Option<KernelVa> {
        let value = self.value(&format!("SYMBOL({name})"))?;
        Self::hexadecimal(value).map(KernelVa::new)
    }
}

/// A `NUMBER`'s value.
fn parse_number(text: &str) -> Option<i64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok().map(u64::cast_signed),
        None => text
            .parse()
            .ok()
            .or_else(|| text.parse::<u64>().ok().map(u64::cast_signed)),
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    pairs
        .iter()
        .map(|pair| u8::from_str_radix(core::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

impl SymbolSource for Vmcoreinfo {
    fn origin(&self) -> &'static str {
        "VMCOREINFO"
    }

    fn base(&self) -> SymbolBase {
        SymbolBase::Running
    }

    fn is_vmcoreinfo(&self) -> bool {
        true
    }

    fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
        Ok(Self::symbol(self, name))
    }

    fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
        Ok(self.size(name))
    }

    fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
        let name = format!("{name}.{path}");
        Ok(self.offset(&name).map(|offset| Member {
            offset,
            size: None,
            len: self.length(&name),
        }))
    }

    fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
        Ok(self.number(name))
    }

    fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_LEN, Vmcoreinfo};
    use crate::KernelVa;
    use proptest::prelude::*;

    #[test]
    fn no_more_text_is_taken_than_there_is() {
        for (len, is_read) in [(MAX_LEN, true), (MAX_LEN + 1, false)] {
            let mut text = b"OSRELEASE=6.1\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff82a1b2c0\n\
                CRASHTIME=0\n"
                .to_vec();
            text.resize(len, b'\n');
            let read = Vmcoreinfo::parse(&text);
            assert_eq!(read.is_ok(), is_read, "{len}: {read:?}");
        }
    }

    #[test]
    fn reads_every_kind_of_line() {
        let info = Vmcoreinfo::parse(
            b"OSRELEASE=6.12.1-cloud\nBUILD-ID=00ff7f\nPAGESIZE=4096\n\
              SYMBOL(init_uts_ns)=ffffffff82a1b2c0\nSIZE(page)=64\nOFFSET(page.flags)=0\n\
              LENGTH(zone.free_area)=11\nNUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129\n\
              NUMBER(phys_base)=-2097152\nNUMBER(sme_mask)=0\nNUMBER(x)=0xf0000000\n\
              KERNELOFFSET=1a000000\nno equals sign\n\0\0garbage",
        )
        .unwrap();
        assert_eq!(info.osrelease(), Some("6.12.1-cloud"));
        assert_eq!(info.page_size(), Some(4096));
        assert_eq!(info.kernel_offset(), Some(0x1a00_0000));
        assert_eq!(info.displacement().unwrap(), 0x1a00_0000);
        let other = |line: &str| Vmcoreinfo::parse(line.as_bytes()).unwrap().displacement();
        assert_eq!(other("OSRELEASE=6.1\n").unwrap(), 0);
        let error = other("OSRELEASE=6.1\nKERNELOFFSET=1a0x\n").unwrap_err();
        assert!(error.to_string().contains("KERNELOFFSET `1a0x`"), "{error}");
        assert_eq!(
            info.symbol("init_uts_ns"),
            Some(KernelVa::new(0xffff_ffff_82a1_b2c0))
        );
        assert_eq!(info.size("page"), Some(64));
        assert_eq!(info.offset("page.flags"), Some(0));
        assert_eq!(info.length("zone.free_area"), Some(11));
        assert_eq!(info.number("PAGE_BUDDY_MAPCOUNT_VALUE"), Some(-129));
        assert_eq!(info.number("phys_base"), Some(-0x20_0000));
        assert_eq!(info.number("x"), Some(0xf000_0000));
        assert_eq!(info.number("garbage"), None);
        assert_eq!(
            super::SymbolSource::build_id(&info),
            Some(&[0, 255, 127][..])
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(tail in proptest::collection::vec(any::<u8>(), 0..400), cut in 0_usize..12) {
            let mut text = b"OSRELEASE=6".to_vec();
            text.truncate(text.len().min(cut + 4));
            text.extend(tail);
            if let Ok(info) = Vmcoreinfo::parse(&text) {
                let _ = (info.symbol("a"), info.number("b"), info.page_size(), info.kernel_offset());
            }
        }
    }
}
