//! The tests of the crate through its public API, one program.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests may stop anywhere"
)]

mod checkpoint;
mod conformance;
mod disks;
#[expect(unsafe_code, reason = "an allocator that counts")]
mod memory;
mod page_sizes;
