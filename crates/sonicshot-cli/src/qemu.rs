//! `sonicshot qemu save` and `sonicshot qemu restore`.

mod restore;
mod save;

pub(crate) use restore::{guard, restore};
pub(crate) use save::{save, watch};
