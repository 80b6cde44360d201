//! Finds out what a path names.

use crate::snapshot::{Named, SnapshotFiles, check_is_file};
use crate::{DumpError, DumpOptions, LayoutSpec, format};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

impl SnapshotFiles {
    /// Looks at `path`: a file is the memory itself; a folder is Cloud Hypervisor's,
    /// crosvm's or a Firecracker pair, and nothing else. What lies deeper is not looked at.
    ///
    /// `base` is a file that is not the memory though it may look so: what a diff is to. `layout`
    /// is where RAM lies if the caller knows better; then a state that cannot be read is only
    /// noted.
    ///
    /// # Errors
    /// [`DumpError::NotASnapshot`], [`DumpError::Ambiguous`], and what is wrong with the VMM's
    /// state.
    pub fn find(
        path: impl AsRef<Path>,
        base: Option<&Path>,
        layout: Option<&LayoutSpec>,
    ) -> Result<Self, DumpError> {
        Self::find_as(path, base, &DumpOptions::of_layout(layout))
    }

    /// The same of what is `known` of the memory file: of one that is said to be
    /// [raw](crate::DumpFormat::RAW) it does not count how it begins.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_as(
        path: impl AsRef<Path>,
        base: Option<&Path>,
        known: &DumpOptions,
    ) -> Result<Self, DumpError> {
        let path = path.as_ref();
        let layout = known.layout.as_ref();
        let metadata = fs::metadata(path).map_err(DumpError::io("opening", path))?;
        // To open a pipe that nobody writes would take for ever.
        let is_file = metadata.is_file() || metadata.file_type().is_block_device();
        if !metadata.is_dir() && !is_file {
            return Err(DumpError::NotADump {
                path: path.to_owned(),
                why: "it is neither a regular file nor a block device; what comes through a pipe is given as `-`",
            });
        }
        let is_known = match known.is_raw() {
            true => |_: &[u8], _| false,
            false => format::begins_as_known,
        };
        let named = Named::new(path, metadata.is_dir(), base, layout, is_known);
        match format::snapshot(&named)? {
            Some(files) => Ok(files),
            None if metadata.is_dir() => Err(DumpError::NotASnapshot {
                path: path.to_owned(),
            }),
            None => Ok(Self::file(path, layout)),
        }
    }

    /// Refuses a snapshot whose VMM would not read a hole as zero, and a folder whose memory is
    /// not in it: a link leads to a file that may be another snapshot's, too.
    ///
    /// # Errors
    /// [`DumpError::CannotPrune`], [`DumpError::Folder`], or why its files cannot be read.
    pub fn check_prunable(&self) -> Result<(), DumpError> {
        let memory = self.memory();
        if self.folder().is_some() {
            let there = fs::symlink_metadata(memory);
            let there = there.map_err(DumpError::io("reading", memory))?;
            check_is_file(memory, there.file_type())?;
        }
        format::check_holes(memory)
    }
}
