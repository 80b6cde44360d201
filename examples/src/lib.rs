//! What the examples share.

pub mod firecracker;
