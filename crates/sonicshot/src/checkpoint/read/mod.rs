//! Reading a checkpoint.

pub(crate) mod chunk;
mod chunks;
pub(crate) mod disks;
mod memory;
pub(crate) mod reader;
pub(crate) mod source;
mod verify;
