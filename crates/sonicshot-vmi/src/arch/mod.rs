//! The differences between the processors that a guest may run on: one trait (`seam`), a folder an
//! architecture, and the list of them (`known`).

mod known;
mod processor;
mod seam;
mod trace;
pub(crate) mod x86_64;

pub(crate) use known::{by_name, of, roots, shaped, tables};
pub use processor::{Foreign, ForeignProcessor};
pub(crate) use processor::{Landmark, Told};
pub(crate) use seam::{
    Arch, ImageShape, KernelShape, MIN_PAGE, MIN_PAGE_MASK, SectionSize, Tables, need_address,
};
pub use trace::Trace;
pub(crate) use trace::{Owner, Test, Verdict, not_made};
