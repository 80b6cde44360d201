//! Reading of input that comes from others, for fuzzing.

use crate::qmp::Lines;
use crate::record::Record;
use crate::{hearing, tables};

/// Reads what `data` has as one of the things that QEMU or a checkpoint says; the first byte says
/// as which.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(data);
    match which % 6 {
        0 => drop(tables::ram_blocks(&text)),
        1 => drop(tables::placed(&text)),
        2 => drop(tables::processors(&text)),
        3 => hearing::fuzz(data),
        4 => {
            if let Ok(record) = serde_json::from_slice::<Record>(data) {
                let _ = record.check();
            }
        }
        _ => {
            let mut lines = Lines::default();
            for part in data.chunks(7) {
                let _ = lines.push(part);
                while let Some(line) = lines.next() {
                    let _ = serde_json::from_slice::<serde_json::Value>(&line);
                }
            }
        }
    }
}
