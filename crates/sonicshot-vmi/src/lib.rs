//! Reads a Linux guest's page allocator from outside.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod address;
pub mod symbols;

pub use address::{KernelVa, VirtualMemory, VirtualReadError};
