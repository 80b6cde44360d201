//! Numbers as people read them.

use std::fmt;

/// A number of bytes, shown in the largest unit that it fills: `449.5 MiB`.
///
/// ```
/// use sonicshot_offline::ByteSize;
/// assert_eq!(ByteSize(1023).to_string(), "1023 B");
/// assert_eq!(ByteSize(1 << 20).to_string(), "1.0 MiB");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        #[expect(clippy::cast_precision_loss, reason = "four digits are shown")]
        let mut value = self.0 as f64 / 1024.0;
        let mut units = UNITS.into_iter().peekable();
        while let Some(unit) = units.next() {
            if value < 1024.0 || units.peek().is_none() {
                return write!(f, "{value:.1} {unit}");
            }
            value /= 1024.0;
        }
        Ok(())
    }
}
