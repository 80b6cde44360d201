//! The fields of QEMU's migration files, and how its sections begin and end
//! (`migration/savevm.c`).

use crate::DumpError;
use sonicshot::{Bytes, CutShort, FileBytes, FileOffset, Number};
use std::path::Path;

pub(crate) const SECTION_START: u8 = 1;
pub(crate) const SECTION_PART: u8 = 2;
pub(crate) const SECTION_END: u8 = 3;
pub(crate) const SECTION_FULL: u8 = 4;
pub(crate) const SECTION_COMMAND: u8 = 8;
pub(crate) const SECTION_FOOTER: u8 = 0x7e;
pub(crate) const SUBSECTION: u8 = 5;
/// Names and small tables are shorter than this.
const MAX_NAME: u32 = 4096;

/// The cursor of all formats over a migration file: its errors name the file.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    path: &'a Path,
    fields: sonicshot::Cursor<FileBytes<'a>>,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(path: &'a Path, data: FileBytes<'a>, at: FileOffset) -> Self {
        let fields = sonicshot::Cursor::at(data, at.raw());
        Self { path, fields }
    }

    /// The offset of the next field.
    pub(crate) fn at(&self) -> FileOffset {
        FileOffset::new(self.fields.position())
    }

    /// Goes to `at`, which may be behind the end.
    pub(crate) fn seek(&mut self, at: FileOffset) {
        self.fields.seek(at.raw());
    }

    pub(crate) fn malformed(&self, what: &'static str, value: u64) -> DumpError {
        DumpError::malformed(self.path, what, self.at(), value)
    }

    fn told<T>(&self, read: Result<T, CutShort>) -> Result<T, DumpError> {
        read.map_err(|_| self.malformed("truncated: the file ends inside a field", 0))
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], DumpError> {
        let read = self.fields.array();
        self.told(read)
    }

    /// The next number: they are big-endian.
    pub(crate) fn be<T: Number>(&mut self) -> Result<T, DumpError> {
        let read = self.fields.be();
        self.told(read)
    }

    /// A text of so many bytes.
    pub(crate) fn text(&mut self, len: u32) -> Result<String, DumpError> {
        if len > MAX_NAME {
            return Err(self.malformed("invalid length of a name", len.into()));
        }
        let mut ahead = self.fields;
        let name = ahead.take(len.into()).map(Bytes::copied);
        let cut = || self.malformed("truncated: the file ends inside a field", 0);
        let name = name.ok().flatten().ok_or_else(cut)?;
        self.fields = ahead;
        String::from_utf8(name).map_err(|_| self.malformed("a name that is not UTF-8", len.into()))
    }

    /// A name behind its length in one byte.
    pub(crate) fn name(&mut self) -> Result<String, DumpError> {
        let len: u8 = self.be()?;
        self.text(len.into())
    }

    /// Passes over bytes that are there.
    pub(crate) fn skip(&mut self, len: u64) -> Result<(), DumpError> {
        let skipped = self.fields.skip(len);
        skipped.map_err(|_| self.malformed("truncated: the file ends inside a page", len))
    }

    /// The number of a section, which must be this.
    pub(crate) fn section(&mut self, wanted: u32) -> Result<(), DumpError> {
        let found: u32 = self.be()?;
        if found == wanted {
            return Ok(());
        }
        Err(self.malformed("invalid number of a section", found.into()))
    }

    /// The end of a section, if it is marked.
    pub(crate) fn footer(&mut self, section: u32) -> Result<(), DumpError> {
        if self.peek() == Some(SECTION_FOOTER) {
            self.be::<u8>()?;
            self.section(section)?;
        }
        Ok(())
    }

    pub(crate) fn peek(&self) -> Option<u8> {
        self.fields.peek()
    }
}
