//! What the pages of a dump are got from: a file that has them as they are, a diff over its base,
//! what came through a pipe, blocks decompressed on demand.

pub(crate) mod overlay;
pub(crate) mod paged;
pub(crate) mod plain;
pub(crate) mod scattered;
pub(crate) mod spool;
pub(crate) mod sys;
