//! From a file's name to what is made of it, on the real guest in testdata.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

mod as_raw;
mod checkpoint;
mod common;
mod prune;
mod refusals;
mod zero;
