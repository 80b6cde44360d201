//! Reads a Linux guest's page allocator from outside.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod address;
mod discover;
mod error;
mod guest;
mod kernel;
mod mm;
mod paging;
pub mod symbols;
mod zero;

pub use address::{KernelVa, VirtualMemory, VirtualReadError};
pub use error::VmiError;
pub use guest::{Classification, GuestOptions, LinuxGuest, OnInconsistency};
pub use mm::classify::{Inconsistency, ZoneReport};
pub(crate) use paging::AddressSpace;
pub use zero::{count_zero_pages, mark_zero_pages};
