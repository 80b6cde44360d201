//! What kind of processor a guest has.

/// A guest's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Machine {
    /// x86-64.
    X86_64,
    /// arm64.
    Aarch64,
}
