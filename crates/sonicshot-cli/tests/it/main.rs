//! The command, on the real guest in testdata and on files made of it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

mod block_device;
mod checkpoint;
mod command;
mod common;
mod compressed;
mod disks;
mod dumps;
mod face;
#[allow(dead_code, reason = "another test uses the rest")]
#[path = "../../../sonicshot-qemu-live/tests/it/fake.rs"]
mod fake_qemu;
mod folders;
mod foreign;
mod in_place;
mod json;
mod layout;
#[cfg(feature = "libvmi")]
mod libvmi;
mod limits;
mod migration;
mod real_guest;
mod rights;
mod serve;
mod share;
mod symbols;
mod vmware;
mod xen;
mod xen_live;
