//! What a format is called where a file is to be read as one, whatever it begins with.

use super::KINDS;
use std::fmt;
use std::str::FromStr;

/// A format of one file. By itself a file is read as its beginning says; this says it instead.
///
/// ```
/// use sonicshot_dump::DumpFormat;
/// assert_eq!("raw".parse(), Ok(DumpFormat::RAW));
/// assert!("docx".parse::<DumpFormat>().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DumpFormat(&'static str);

/// A text that names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no format: want {}", list())]
pub struct DumpFormatError {
    /// The text given.
    pub text: String,
}

impl DumpFormat {
    /// Guest RAM and nothing else.
    pub const RAW: Self = Self("raw");

    /// All that there are.
    pub fn all() -> impl Iterator<Item = Self> {
        let named = KINDS.iter().filter_map(|kind| kind.name).map(Self);
        std::iter::once(Self::RAW).chain(named)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0
    }

    pub(super) const fn named(name: &'static str) -> Self {
        Self(name)
    }
}

impl fmt::Display for DumpFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0)
    }
}

impl FromStr for DumpFormat {
    type Err = DumpFormatError;

    fn from_str(text: &str) -> Result<Self, DumpFormatError> {
        let found = Self::all().find(|format| format.0 == text);
        found.ok_or_else(|| DumpFormatError { text: text.into() })
    }
}

fn list() -> String {
    DumpFormat::all()
        .map(DumpFormat::name)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::DumpFormat;
    use std::collections::HashSet;

    #[test]
    fn every_format_has_a_name_of_its_own_that_names_it() {
        let names: Vec<&str> = DumpFormat::all().map(DumpFormat::name).collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        for format in DumpFormat::all() {
            assert_eq!(format.name().parse(), Ok(format));
        }
        let error = "docx".parse::<DumpFormat>().unwrap_err().to_string();
        assert!(
            error.starts_with("`docx` is no format: want raw, "),
            "{error}"
        );
        assert!(error.contains("kdump"), "{error}");
    }
}
