//! The format itself: records and their bytes, the index, compression, and what a checkpoint says
//! of its guest. Knows nothing of files.

pub(crate) mod builder;
pub(crate) mod codec;
pub(crate) mod disk;
pub(crate) mod footer;
pub(crate) mod frames;
pub(crate) mod header;
pub(crate) mod index;
pub(crate) mod info;
pub(crate) mod layout;
pub(crate) mod record;
