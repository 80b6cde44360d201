//! Files are opened: by what is known of them, and by what their content tells.

use crate::backing::spool::Spool;
use crate::format::kind::{Source, boxed};
use crate::format::{self, refuse_foreign};
use crate::{Dump, DumpError, DumpOptions};
use std::io::Read;
use std::path::Path;

impl DumpOptions {
    /// Opens the dump at `path`.
    ///
    /// # Errors
    /// [`DumpError`] if the file cannot be read, is no dump, or contradicts itself;
    /// [`DumpError::OtherFormat`] if it is not what it is said to be.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Dump, DumpError> {
        let path = path.as_ref();
        let source = Source::open(path, self)?;
        if let Some(spool) = self.unpack_source(path, &source)? {
            return self.open_spooled(&spool);
        }
        Ok(Dump::new(path, format::open(source)?, None))
    }

    /// The content of the file at `path`, if it is opened as one that is compressed as a whole: for
    /// those who open it more than once.
    ///
    /// # Errors
    /// [`DumpError`] if it cannot be read or decompressed.
    pub fn unpack(&self, path: impl AsRef<Path>) -> Result<Option<Spool>, DumpError> {
        let path = path.as_ref();
        self.unpack_source(path, &Source::open(path, self)?)
    }

    /// The same of what came through a pipe.
    ///
    /// # Errors
    /// As there.
    pub fn unpack_spooled(&self, spool: &Spool) -> Result<Option<Spool>, DumpError> {
        if self.is_raw() {
            return Ok(None);
        }
        spool.unpacked(self)
    }

    fn unpack_source(&self, path: &Path, source: &Source<'_>) -> Result<Option<Spool>, DumpError> {
        // What a VMM keeps beside it may tell of a file that it is no compressed dump.
        if self.is_raw() || format::is_taken(source) {
            return Ok(None);
        }
        Spool::unpack(path, source.content.file(), self)
    }

    /// Opens a dump that came through a pipe or that was compressed. Messages call it by the
    /// spool's name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_spooled(&self, spool: &Spool) -> Result<Dump, DumpError> {
        if let Some(content) = self.unpack_spooled(spool)? {
            return self.open_spooled(&content);
        }
        let format = format::open(Source::spooled(spool, self)?)?;
        Ok(Dump::new(spool.name(), format, Some(spool.clone())))
    }

    /// Opens a diff over its base, as [`Dump::open_over`] does.
    ///
    /// # Errors
    /// As there.
    pub fn open_over(
        &self,
        path: impl AsRef<Path>,
        base: impl AsRef<Path>,
    ) -> Result<Dump, DumpError> {
        let path = path.as_ref();
        let diff = format::diff::open(path, base.as_ref(), self)?;
        Ok(Dump::new(path, boxed(diff), None))
    }

    /// Takes in what `reader` gives, as [`Spool::from_reader_up_to`] does; of raw memory nothing
    /// but what the caller allows and what is free limits how much.
    ///
    /// # Errors
    /// As there.
    pub fn spool(
        &self,
        name: impl AsRef<Path>,
        reader: impl Read,
        max_size: Option<u64>,
    ) -> Result<Spool, DumpError> {
        Spool::take_in(name.as_ref(), reader, max_size, self)
    }

    /// Whether the file begins as one of a format that says itself what it is. What is raw memory
    /// all the same can only be told by what is in it.
    ///
    /// # Errors
    /// [`DumpError`] if it cannot be read.
    pub fn begins_as_other(path: impl AsRef<Path>) -> Result<bool, DumpError> {
        let known = Self::new();
        Ok(format::begins_as(&Source::open(path.as_ref(), &known)?))
    }

    /// The same of what came through a pipe.
    ///
    /// # Errors
    /// As there.
    pub fn spooled_begins_as_other(spool: &Spool) -> Result<bool, DumpError> {
        let known = Self::new();
        Ok(format::begins_as(&Source::spooled(spool, &known)?))
    }
}

impl Spool {
    /// Refuses what is of a format that is known but not read.
    ///
    /// # Errors
    /// [`DumpError::NotRead`], with what it is and what to do with it.
    pub fn check_not_foreign(&self) -> Result<(), DumpError> {
        // What cannot be read is told of by who reads it.
        let known = DumpOptions::new();
        Source::spooled(self, &known).map_or(Ok(()), |source| refuse_foreign(&source))
    }
}
