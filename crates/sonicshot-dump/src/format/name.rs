//! The name of a format where a file is to be read as one, whatever it begins with.

use super::KINDS;
use std::fmt;
use std::str::FromStr;

/// A format of one file. By itself a file is read as its beginning says; this says it instead.
///
/// ```
/// use sonicshot_dump::DumpFormat;
/// assert_eq!("raw".parse(), Ok(DumpFormat::RAW));
/// assert_eq!("mapped-ram".parse::<DumpFormat>().map(DumpFormat::name), Ok("qemu"));
/// assert!("docx".parse::<DumpFormat>().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DumpFormat(&'static str);

/// A text that names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a format: want {}", list())]
pub struct DumpFormatError {
    /// The text given.
    pub text: String,
}

/// Other names of formats: by who writes them, and as they are called where they are written.
/// The memory of some is guest RAM and nothing else.
const ALSO: [(&str, &str); 6] = [
    ("firecracker", "raw"),
    ("cloud-hypervisor", "raw"),
    ("vmware", "raw"),
    ("mapped-ram", "qemu"),
    ("stream", "qemu"),
    ("xl", "xen"),
];

impl DumpFormat {
    /// Guest RAM and nothing else.
    pub const RAW: Self = Self("raw");
    /// A checkpoint: no dump, but what can be made one again.
    pub const CHECKPOINT: Self = Self("sonic");

    /// All that there are, without the checkpoint.
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
        let also = ALSO.iter().find(|(also, _)| *also == text);
        let name = also.map_or(text, |(_, name)| name);
        let mut all = Self::all().chain([Self::CHECKPOINT]);
        all.find(|format| format.0 == name)
            .ok_or_else(|| DumpFormatError { text: text.into() })
    }
}

/// All names, each with its others.
fn list() -> String {
    let with_others = |format: DumpFormat| {
        let others = ALSO.iter().filter(|(_, name)| *name == format.0);
        let others: Vec<&str> = others.map(|(also, _)| *also).collect();
        match others.as_slice() {
            [] => format.0.to_owned(),
            others => format!("{} (also {})", format.0, others.join(", ")),
        }
    };
    let all = DumpFormat::all().chain([DumpFormat::CHECKPOINT]);
    all.map(with_others).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::{ALSO, DumpFormat};
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
            error.starts_with("`docx` is not a format: want raw (also firecracker, "),
            "{error}"
        );
        for (also, name) in ALSO {
            assert!(!names.contains(&also), "{also}");
            assert_eq!(also.parse().map(DumpFormat::name), Ok(name), "{also}");
            assert!(error.contains(also), "{error}");
        }
        assert_eq!("sonic".parse(), Ok(DumpFormat::CHECKPOINT));
        assert!(
            error.contains("kdump") && error.contains("sonic"),
            "{error}"
        );
    }
}
