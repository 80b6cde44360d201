//! The facts of a file before it is opened.

use crate::{DumpFormat, LayoutSpec};

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
    /// Where RAM lies; of a raw file by default [`LayoutSpec::Pc`].
    pub layout: Option<LayoutSpec>,
    /// The format that the file is read as.
    pub format: Option<DumpFormat>,
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

    pub(crate) fn of_layout(layout: Option<&LayoutSpec>) -> Self {
        Self {
            layout: layout.cloned(),
            format: None,
        }
    }

    pub(crate) fn is_raw(&self) -> bool {
        self.format == Some(DumpFormat::RAW)
    }
}
