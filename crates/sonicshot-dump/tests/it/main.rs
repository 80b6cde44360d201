//! The tests of the crate, one program.
#![allow(
    missing_docs,
    dead_code,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests may stop anywhere"
)]

mod bounds;
mod clone;
mod common;
mod disk_images;
mod elf;
mod guard;
mod in_place;
mod kdump;
mod libvirt;
mod mapped_ram;
mod overlay;
mod processors;
mod progress;
mod qcow2;
mod raw;
mod rights;
mod sections;
mod xen;
