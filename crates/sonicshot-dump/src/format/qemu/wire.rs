//! The fields of QEMU's migration files, and how its sections begin and end
//! (`migration/savevm.c`).

use crate::DumpError;
use sonicshot::{Bytes, CutShort, FileBytes, FileOffset, Number, to_u64};
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

/// The fewest bytes that are read at once: what stands before the memory is short.
const FIRST_WINDOW: u64 = 512;
/// The most: a few pages with their records, or some thousand records of pages that are zero.
const MAX_WINDOW: u64 = 64 << 10;

/// A range of the file that was read at once. Records are as short as nine bytes, and there is one for each
/// page.
#[derive(Default)]
struct Window {
    at: u64,
    bytes: Vec<u8>,
    /// The end of what could not be read at once: up to there fields are read by themselves, for some of
    /// them may be well.
    unread: u64,
}

impl Window {
    /// The offset of `at` in it, if all `len` bytes from there are in it.
    fn offset(&self, at: u64, len: u64) -> Option<u64> {
        let offset = at.checked_sub(self.at)?;
        (offset.checked_add(len)? <= to_u64(self.bytes.len())).then_some(offset)
    }

    /// Reads what begins at `at`: more each time, while that is near to what was read before.
    fn read(&mut self, from: FileBytes<'_>, at: u64) -> Option<()> {
        if at < self.unread {
            return None;
        }
        let before = to_u64(self.bytes.len());
        let near = before.checked_add(MAX_WINDOW)?;
        let is_near = at.checked_sub(self.at).is_some_and(|far| far <= near);
        let len = match before {
            1.. if is_near => before.checked_mul(2)?.min(MAX_WINDOW),
            _ => FIRST_WINDOW,
        };
        let len = len.min(from.byte_len().checked_sub(at)?);
        self.at = at;
        self.bytes.resize(usize::try_from(len).ok()?, 0);
        let read = from
            .part(at, len)
            .is_some_and(|part| part.copy_ahead(&mut self.bytes));
        if !read {
            self.bytes.clear();
            self.unread = at.checked_add(len)?;
        }
        read.then_some(())
    }
}

/// The cursor of all formats over a migration file: its errors name the file.
pub(crate) struct Cursor<'a> {
    path: &'a Path,
    fields: sonicshot::Cursor<FileBytes<'a>>,
    window: Window,
}

/// A clone reads for itself: it looks at a few fields ahead.
impl Clone for Cursor<'_> {
    fn clone(&self) -> Self {
        Self {
            path: self.path,
            fields: self.fields,
            window: Window::default(),
        }
    }
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(path: &'a Path, data: FileBytes<'a>, at: FileOffset) -> Self {
        let fields = sonicshot::Cursor::at(data, at.raw());
        Self {
            path,
            fields,
            window: Window::default(),
        }
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
        let ahead = self.ahead(to_u64(N));
        let found = ahead.and_then(|offset| self.window.bytes.as_slice().array_at(offset));
        let read = match found {
            Some(bytes) => self.fields.skip(to_u64(N)).map(|()| bytes),
            None => self.fields.array(),
        };
        self.told(read)
    }

    /// The offset in the window of the next `len` bytes; `None` if they are not there, or cannot be read
    /// with what follows them.
    fn ahead(&mut self, len: u64) -> Option<u64> {
        let at = self.fields.position();
        if let Some(offset) = self.window.offset(at, len) {
            return Some(offset);
        }
        self.window.read(self.fields.bytes(), at)?;
        self.window.offset(at, len)
    }

    /// The next number: they are big-endian.
    pub(crate) fn be<T: Number>(&mut self) -> Result<T, DumpError> {
        let ahead = self.ahead(to_u64(T::LEN));
        let found = ahead.and_then(|offset| self.window.bytes.as_slice().be_at(offset));
        let read = match found {
            Some(number) => self.fields.skip(to_u64(T::LEN)).map(|()| number),
            None => self.fields.be(),
        };
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

    pub(crate) fn peek(&mut self) -> Option<u8> {
        match self.ahead(1) {
            Some(offset) => self.window.bytes.as_slice().le_at(offset),
            None => self.fields.peek(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Cursor, FIRST_WINDOW, MAX_WINDOW};
    use proptest::prelude::*;
    use sonicshot::{Bytes, FileBytes, FileContent, FileOffset};
    use std::io::Write;
    use std::path::Path;

    /// What cannot be read, and is only near to what is asked for, is nobody's trouble.
    #[test]
    fn what_is_read_ahead_fails_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 1536]).unwrap();
        let content = FileContent::new(file.try_clone().unwrap()).unwrap();
        file.set_len(FIRST_WINDOW + 100).unwrap();
        let mut cursor = Cursor::new(Path::new("file"), content.bytes(), FileOffset::ZERO);
        for _ in 0..(FIRST_WINDOW + 96) / 8 {
            assert_eq!(cursor.be::<u64>().unwrap(), u64::from_be_bytes([7; 8]));
        }
        assert!(content.failure().is_none());
        cursor.be::<u64>().unwrap_err();
        assert!(content.failure().is_some());
        assert_eq!(cursor.at().raw(), FIRST_WINDOW + 96);
    }

    proptest! {
        /// Whatever is read ahead, each field is what stands there.
        #[test]
        fn fields_are_those_of_the_file(
            len in 0..3 * MAX_WINDOW,
            steps in proptest::collection::vec((0_u8..5, 0..MAX_WINDOW), 1..200),
        ) {
            let bytes: Vec<u8> = (0..len).map(|at| (at * 31 / 7 % 251) as u8).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let content = FileContent::new(file).unwrap();
            let slice = bytes.as_slice();
            for data in [content.bytes(), FileBytes::from_slice(slice)] {
                let mut cursor = Cursor::new(Path::new("file"), data, FileOffset::ZERO);
                for (kind, far) in &steps {
                    let at = cursor.at().raw();
                    let moved = match kind {
                        0 => {
                            prop_assert_eq!(cursor.be::<u64>().ok(), slice.be_at(at));
                            8
                        }
                        1 => {
                            prop_assert_eq!(cursor.be::<u8>().ok(), slice.be_at(at));
                            1
                        }
                        2 => {
                            prop_assert_eq!(cursor.peek(), slice.le_at(at));
                            prop_assert_eq!(cursor.clone().bytes::<3>().ok(), slice.array_at(at));
                            0
                        }
                        3 => {
                            let _ = cursor.skip(*far);
                            *far
                        }
                        _ => {
                            cursor.seek(FileOffset::new(*far));
                            prop_assert_eq!(cursor.at().raw(), *far);
                            continue;
                        }
                    };
                    let is_there = at.checked_add(moved).unwrap() <= len;
                    prop_assert_eq!(cursor.at().raw(), if is_there { at + moved } else { at });
                }
            }
        }
    }
}
