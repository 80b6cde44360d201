//! Pages that are on the guest's disks too, byte for byte: a checkpoint refers to them there.

pub(crate) mod find;
pub(crate) mod given;
pub(crate) mod guess;
pub(crate) mod hash;
pub(crate) mod source;
