//! Peers that ask for pages in words, where the kernel tells of faults to somebody else.

use crate::error::ServeError;
use rustix::fd::BorrowedFd;
use sonicshot::GpaRange;

/// A question that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "server"),
    expect(dead_code, reason = "only a server has such peers")
)]
pub(crate) enum Asked {
    /// For these pages, which are waited for.
    Pages(GpaRange),
    /// Nothing, or not all of a question.
    Nothing,
    /// Nothing more will be.
    Closed,
}

/// A peer that asks for pages through a descriptor, one question after the other.
pub(crate) trait Asks: Send {
    /// Readable when there may be a question.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The next question, if it has come whole. Does not wait.
    fn next(&mut self) -> Result<Asked, ServeError>;

    /// All pages of the last question are in place.
    fn answer(&mut self) -> Result<(), ServeError>;
}
