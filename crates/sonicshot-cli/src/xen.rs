//! `sonicshot xen save` and `sonicshot xen restore`: around Xen's own `xl`.

mod restore;
mod save;

pub(crate) use restore::restore;
pub(crate) use save::save;
