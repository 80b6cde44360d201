//! A save from a QEMU that is none: this process has the memory of the repository's guest, and a
//! thread of it answers as QEMU's monitor does.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests may stop anywhere"
)]

mod disks;
mod fake;
mod save;
