//! kdump-compressed files: read, and written.

pub(crate) mod read;
pub(crate) mod write;
