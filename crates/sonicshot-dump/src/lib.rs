//! The files that VMMs and dump tools write of a guest's memory: read as guest memory, most of
//! them without copying, and pruned.
//!
//! [`Dump::open`] tells a file's format by its content, [`DumpOptions::format`] says it instead. A `Dump` is a [`GuestMemory`], which
//! `sonicshot-vmi` looks into. A [`CheckedPlan`] made of what it finds, after every guard has been
//! through it, is what a file is pruned by: [`CheckedPlan::prune_to`],
//! [`CheckedPlan::prune_in_place`] or [`CheckedPlan::prune_to_writer`].
//!
//! | format | module | in place | by copy | into a pipe |
//! |---|---|---|---|---|
//! | raw guest RAM, Firecracker, Cloud Hypervisor | `raw`, `diff`, `firecracker`, `cloud_hypervisor` | yes | yes | |
//! | crosvm | `crosvm` | yes | yes | |
//! | ELF core | `elf_core` | | yes | |
//! | QEMU mapped-ram, libvirt `sparse` | `qemu::mapped_ram`, `libvirt` | yes | yes | |
//! | QEMU migration stream, libvirt `raw` or compressed | `qemu::stream`, `libvirt` | | yes | yes |
//! | QEMU internal snapshot | `qcow2` | | | |
//! | VMware | `vmware` | | | |
//! | kdump-compressed | `kdump` | | yes | |
//! | Xen `xl save` image, libxl and libxc streams | `xen` | | yes | yes |
//! | Xen `xl dump-core` core | `xen` | | | |
//! | LiME, AVML | `lime`, `avml` | | | |
//!
//! Files that are compressed as a whole are read as what is in them ([`Spool`]); formats of other tools
//! that are known and not read are refused ([`DumpError::NotRead`], `foreign`).
//!
//! # Processors
//! Beside the memory most formats hold the state of the guest's processors, which
//! [`processors`] tells: by it a kernel that runs is told from one that
//! is gone.
//!
//! | format | where | not told there |
//! |---|---|---|
//! | ELF core, kdump-compressed, of QEMU | notes `CORE` and `QEMU` | `EFER`, halted, SMM, nested guest |
//! | the same of `/proc/vmcore` | VMCOREINFO's `CRASHTIME` | all: [`Processors::Crashed`] |
//! | QEMU mapped-ram and streams, libvirt | sections `cpu` and `cpu_common` | |
//! | Cloud Hypervisor 39 and later | `state.json` | SMM |
//! | Firecracker | the state file, by shape | SMM, nested guest |
//! | Xen save image, HVM or PVH | `HVM_CONTEXT` | halted, nested guest |
//! | Xen save image, PV | `X86_PV_VCPU_BASIC` | |
//! | Xen core | `.xen_prstatus` | `EFER`, halted |
//! | raw, LiME, AVML, crosvm, VMware | | all: [`Processors::Unknown`] |
//!
//! What is damaged or contradicts itself there is [`Processors::NotTold`]; that is no error, for the
//! memory may be whole. A processor whose registers are exactly those of a reset or an INIT and
//! that is not the boot processor counts as never started, one that firmware parked as parked; all
//! others are started, whatever they run. Of a PV guest of Xen `CR3` is the guest's own address of
//! the root, also where the tables themselves hold the machine's numbers
//! ([`p2m`]). The state of a snapshot folder is not in the file that is opened:
//! [`SnapshotFiles::processors`] tells it, and [`Dump::with_processors`] puts it to the memory.
//!
//! # Disks
//! A [`DiskImage`] is the image of a guest's disk, of which a checkpoint refers to pages. A file that
//! can be pruned in place can share the blocks of such an image, where the file system can:
//! [`Dump::share_in_place`], [`Dump::share_to`].
//!
//! Files are not trusted: every offset and length is checked against the file before it is used,
//! and what is allocated is bounded by the length of the file. Output appears whole or not at all;
//! a prune in place leaves a valid dump whenever it is interrupted.
//!
//! [`GuestMemory`]: sonicshot::GuestMemory
//! [`Processors::Crashed`]: sonicshot::Processors::Crashed
//! [`Processors::NotTold`]: sonicshot::Processors::NotTold
//! [`Processors::Unknown`]: sonicshot::Processors::Unknown
//! [`p2m`]: sonicshot::GuestMemory::p2m
//! [`processors`]: sonicshot::GuestMemory::processors
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod backing;
mod disk;
mod dump;
mod error;
mod find;
mod format;
mod guard;
mod in_use;
mod layout;
mod limit;
mod may_be_diff;
mod open;
mod options;
mod output;
mod processors;
mod prune;
mod room;
mod share;
mod snapshot;

#[doc(hidden)]
pub use backing::lz4::Lz4Frames;
pub use backing::spool::Spool;
pub use disk::DiskImage;
pub use dump::{Dump, Incomplete};
#[doc(hidden)]
pub use error::KdumpWriteError;
pub use error::{DumpError, WritingProcess};
pub use format::check_not_foreign;
#[doc(hidden)]
pub use format::kdump::header::KdumpCompression;
#[doc(hidden)]
pub use format::kdump::read::KdumpFile;
#[cfg(feature = "__unchecked")]
pub use format::kdump::write::write_kdump_without;
pub use format::kdump::write::{KdumpOptions, KdumpWriteStats, write_kdump};
pub use format::name::{DumpFormat, DumpFormatError};
pub use format::qemu::start::{BlockKind, RamBlock};
pub use format::xen::join::XlSkeleton;
pub use guard::{CheckedPlan, Doubts, check_whole, keep_in_doubt};
pub use in_use::{check_not_in_use, check_not_written};
pub use layout::{BlockPlace, LayoutSpec, LayoutSpecError, is_boot_ram};
pub use limit::SizeLimit;
pub use may_be_diff::{can_leave_out_zeroes, first_hole, hole_ahead, may_be_diff, of_a_diff};
pub use options::DumpOptions;
pub use output::dump_file::{CoreNotes, DumpFile, NewFile, ReadyFile};
pub use output::folder::NewFolder;
pub use output::{Overwrite, WriteOptions};
pub use prune::holes::PruneOptions;
pub use prune::in_place::has_zeroes_to_punch;
pub use prune::stats::PruneStats;
pub use room::available_memory;
pub use share::{ShareOptions, ShareStats};
pub use snapshot::{FilesNote, SnapshotFiles, Vmm};
