//! The facts of a file before it is opened.

use crate::{DumpFormat, LayoutSpec};
use sonicshot::Progress;
use std::sync::Arc;

/// Options for opening a dump file; by default none, and its content tells.
///
/// ```no_run
/// use sonicshot_dump::{DumpFormat, DumpOptions};
/// // RAM, though its first page may look like something else.
/// let dump = DumpOptions::new().format(DumpFormat::RAW).open("guest.ram")?;
/// # Ok::<(), sonicshot_dump::DumpError>(())
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct DumpOptions {
    /// The RAM layout; of a raw file by default [`LayoutSpec::Pc`].
    pub layout: Option<LayoutSpec>,
    /// The format that the file is read as.
    pub format: Option<DumpFormat>,
    /// Whoever is told how far it is: of content that comes through a pipe or is compressed, and of
    /// formats that tell only in passing where pages lie.
    pub progress: Option<Arc<dyn Progress>>,
}

impl DumpOptions {
    /// Nothing known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says where RAM lies.
    #[must_use]
    pub fn layout(mut self, layout: LayoutSpec) -> Self {
        self.layout = Some(layout);
        self
    }

    /// Says what the file is, which must begin as one of it; [`DumpFormat::RAW`] may begin as
    /// it likes.
    #[must_use]
    pub fn format(mut self, format: DumpFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// Says who is told how far it is.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    pub(crate) fn of_layout(layout: Option<&LayoutSpec>) -> Self {
        Self {
            layout: layout.cloned(),
            ..Self::default()
        }
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.format == Some(DumpFormat::RAW)
    }
}
