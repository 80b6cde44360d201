//! Writing a checkpoint.

mod attach;
pub(crate) mod options;
mod pages;
mod scan;
mod sink;
pub(crate) mod writer;
