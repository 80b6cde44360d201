//! The crate's tests, through a C interface: of a library made for them, and of the real one where
//! `SONICSHOT_LIBVMI` names it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

mod conformance;
mod errors;
mod fake;
mod pause;
mod real;
mod real_guest;
