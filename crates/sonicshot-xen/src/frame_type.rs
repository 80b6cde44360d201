//! Xen's type of each page.

/// The type that a page has to Xen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FrameType {
    /// An ordinary page.
    NoTab,
    /// A page table of the given level (1 to 4), pinned or not.
    Table {
        /// Its level, 1 to 4.
        level: u8,
        /// Whether Xen holds it to be one until it is told otherwise.
        pinned: bool,
    },
    /// A page that the hardware has given up.
    Broken,
    /// A page without content.
    XAlloc,
    /// No page.
    XTab,
}

impl FrameType {
    pub(crate) fn from_bits(bits: u64) -> Option<Self> {
        const PINNED: u8 = 8;
        let bits = u8::try_from(bits).ok()?;
        Some(match bits {
            0 => Self::NoTab,
            1..=4 => Self::Table {
                level: bits,
                pinned: false,
            },
            9..=12 => Self::Table {
                level: bits & !PINNED,
                pinned: true,
            },
            13 => Self::Broken,
            14 => Self::XAlloc,
            15 => Self::XTab,
            _ => return None,
        })
    }

    pub(crate) fn bits(self) -> u64 {
        match self {
            Self::NoTab => 0,
            Self::Table { level, pinned } => u64::from(level) | if pinned { 8 } else { 0 },
            Self::Broken => 13,
            Self::XAlloc => 14,
            Self::XTab => 15,
        }
    }

    /// Whether its content is in the record.
    #[must_use]
    pub fn has_data(self) -> bool {
        matches!(self, Self::NoTab | Self::Table { .. })
    }

    /// Whether the guest has it after a restore.
    #[must_use]
    pub fn is_populated(self) -> bool {
        !matches!(self, Self::Broken | Self::XTab)
    }
}
