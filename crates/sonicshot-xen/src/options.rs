//! What there is to say before a file is read.

use sonicshot::Progress;
use std::sync::Arc;

/// Options for reading an image or a core; by default nobody is told how far it is.
///
/// ```
/// use sonicshot::FileBytes;
/// use sonicshot_xen::{ParseOptions, XenError, XlImage};
/// use std::sync::Arc;
/// let options = ParseOptions::new().progress(Arc::new(|done: u64, total: u64| {
///     eprintln!("{done} of {total} bytes of the file");
/// }));
/// let cut = FileBytes::from_slice(b"Xen saved domain");
/// let image = XlImage::parse_with(cut, &options);
/// assert!(matches!(image, Err(XenError::Truncated { .. })));
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ParseOptions {
    /// Whoever is told how far it is, in bytes of the file, as the phase
    /// [`Opening`](sonicshot::WorkPhase::Opening).
    pub progress: Option<Arc<dyn Progress>>,
}

impl ParseOptions {
    /// The defaults.
    #[must_use]
    pub const fn new() -> Self {
        Self { progress: None }
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}
