//! The register that page tables begin by.

use core::fmt;
use core::str::FromStr;

/// The value of a processor's `CR3`, which says where its page tables begin.
///
/// ```
/// use sonicshot_vmi::x86_64::Cr3;
/// assert_eq!("0x1e20c000".parse(), Ok(Cr3::new(0x1e20_c000)));
/// assert_eq!("4096".parse(), Ok(Cr3::new(4096)));
/// assert!("1e20c000".parse::<Cr3>().is_err());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cr3(u64);

impl Cr3 {
    /// The register's value, as the processor has it.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The value as a number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Cr3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cr3({:#x})", self.0)
    }
}

impl fmt::Display for Cr3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A text is no value of `CR3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither a decimal number nor a hexadecimal one that begins with 0x")]
#[non_exhaustive]
pub struct ParseCr3Error;

impl FromStr for Cr3 {
    type Err = ParseCr3Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16),
            // QEMU writes `CR3=000000001e20c000`, which is no decimal number.
            None if text.len() > 1 && text.starts_with('0') => return Err(ParseCr3Error),
            None => text.parse(),
        };
        number.map(Self).map_err(|_| ParseCr3Error)
    }
}
