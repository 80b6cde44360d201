//! Real `userfaultfd`s: of this process, and of others that the server does not share code with.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_lossless,
    reason = "tests may stop anywhere"
)]

mod cloud;
mod guest;
mod own;
mod refused;
mod server;
