//! The crate's tests on real guests' memory.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

mod embedded;
mod knowledge;
mod owner;
mod place;
mod real_guest;
mod symbol_files;
