//! The formats, a file or a folder of them each.

pub(crate) mod avml;
pub(crate) mod cloud_hypervisor;
pub(crate) mod core_notes;
pub(crate) mod elf_core;
pub(crate) mod firecracker;
pub(crate) mod kdump;
pub(crate) mod libvirt;
pub(crate) mod lime;
pub(crate) mod qemu;
pub(crate) mod raw;
pub(crate) mod xen;
