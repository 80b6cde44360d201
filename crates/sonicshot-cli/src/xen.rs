//! `sonicshot xen save` and `sonicshot xen restore`: around Xen's own `xl`.

mod restore;
mod save;
mod xl;

pub(crate) use restore::restore;
pub(crate) use save::save;
