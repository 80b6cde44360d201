//! Running QEMU guests, saved in a pause that follows what they use, and restored in an unchanged
//! QEMU.
//!
//! - [`save`] finds the guest's memory by QEMU's monitor and `/proc`, looks at its kernel once
//!   while it runs, stops it, takes the state of its devices and the pages that it uses, and lets it
//!   run on; what it has copied becomes a checkpoint afterwards.
//! - [`restore`] starts a QEMU and has it take such a guest, by a migration stream that is made of the
//!   checkpoint.
//! - [`guard`] is the work of another, which ends a restored guest whose server of pages died.
//! - [`watch`] is the work of a second process, which lets a guest run on whose saver died.
//!
//! # Trust
//! What QEMU says, what its process shows and what a checkpoint holds is checked: lines of the
//! monitor have a longest length and a time within which they must come, a block of memory must be
//! mapped in the process as long as it is said to be before room is made for it, and what is said
//! twice must agree.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod ahead;
mod disks;
mod error;
mod find;
mod fuzz;
mod guard;
mod hearing;
mod launch;
mod map;
mod memory;
mod pages;
mod postcopy;
mod process;
mod qmp;
mod record;
mod refuse;
mod restore;
mod save;
#[expect(unsafe_code, reason = "a file that is mapped")]
mod sealed;
#[expect(unsafe_code, reason = "a mapping that several threads fill")]
mod shadow;
mod stream;
#[expect(unsafe_code, reason = "calls to the system without a safe wrapper")]
mod sys;
mod tables;
mod watchdog;

pub use disks::PinnedDisk;
pub use error::QemuError;
#[doc(hidden)]
pub use fuzz::fuzz;
pub use guard::guard;
pub use qmp::QemuVersion;
pub use restore::{LiveRestoreOptions, LiveRestored, RestoreHow, restore};
pub use save::{AfterSave, LiveSaveOptions, LiveSaved, PauseTimes, save};
pub use watchdog::watch;
