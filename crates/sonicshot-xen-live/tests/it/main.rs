//! The frames that a save by `xl` leaves out, without a Xen.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests say so by panicking"
)]

mod filter;
