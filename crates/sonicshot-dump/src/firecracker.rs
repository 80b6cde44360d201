//! Firecracker's snapshots: a file with the VM's state, and one with guest RAM.
//!
//! The memory file is the bytes of guest RAM and nothing else, so where they lie is found as for
//! any raw file. The state file tells that a folder holds such a pair, and is not read: what is
//! in it changes with every version. It begins with a number, `0x0710_1984_8664_0000` (arm64:
//! `..._AAAA_0000`), whose lowest 16 bits were a version once (up to 1.5); since it is written
//! by `bitcode` (1.15) a byte stands before it (`src/vmm/src/snapshot/mod.rs`).
//!
//! # What a hole reads as
//!
//! In a full snapshot, zero: `File` restores map the memory file privately
//! (`src/vmm/src/vstate/memory.rs`), and a page-fault handler that serves from the file reads
//! the same. In a diff snapshot, what the base has: see [`Dump::open_over`].
//!
//! A diff that was made of a VM that was booted, not restored, is one of all memory that was
//! ever touched; its holes are zero, and it is read as a full one.
//!
//! [`Dump::open_over`]: crate::Dump::open_over

use crate::DumpError;
use std::path::PathBuf;

/// How the number goes on after its two lowest bytes, on x86-64 and arm64.
const MAGIC: [[u8; 6]; 2] = [
    [0x64, 0x86, 0x84, 0x19, 0x10, 0x07],
    [0xaa, 0xaa, 0x84, 0x19, 0x10, 0x07],
];

/// What is said of a state file that is taken for a memory file.
pub(crate) const NOT_MEMORY: &str =
    "it is a Firecracker VM's state: give the memory file, or the folder of both";

/// Guest RAM is given in MiB.
const MIB: u64 = 1 << 20;

/// Whether a file that begins with `start` is a state file.
pub(crate) fn is_state(start: &[u8]) -> bool {
    [2, 3].iter().any(|at| {
        let rest = start.get(*at..).unwrap_or(&[]);
        MAGIC.iter().any(|magic| rest.starts_with(magic))
    })
}

/// Whether a file of `len` bytes that begins with `start` may be guest RAM.
fn may_be_memory(start: &[u8], len: u64) -> bool {
    len > 0 && len.is_multiple_of(MIB) && !is_state(start) && !crate::begins_as_known(start)
}

/// A file of a folder.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub path: PathBuf,
    pub len: u64,
    /// Its first bytes.
    pub start: Vec<u8>,
}

/// The memory file among the files of the folder `path`; `None` if no state file is there.
pub(crate) fn memory_of(
    path: &std::path::Path,
    entries: &[Entry],
) -> Result<Option<PathBuf>, DumpError> {
    let several = |what, files: Vec<&Entry>| DumpError::Ambiguous {
        path: path.to_owned(),
        what,
        candidates: files.into_iter().map(|entry| entry.path.clone()).collect(),
    };
    let states: Vec<_> = entries.iter().filter(|e| is_state(&e.start)).collect();
    match states.as_slice() {
        [] => return Ok(None),
        [_] => {}
        _ => return Err(several("several Firecracker VM states", states)),
    }
    let memory: Vec<_> = entries
        .iter()
        .filter(|entry| may_be_memory(&entry.start, entry.len))
        .collect();
    match memory.as_slice() {
        [] => Err(DumpError::NotADump {
            path: path.to_owned(),
            why: "it holds a Firecracker VM's state, and no file that may be its memory",
        }),
        [memory] => Ok(Some(memory.path.clone())),
        _ => Err(several("several files that may be the VM's memory", memory)),
    }
}

#[cfg(test)]
mod tests {
    use super::is_state;

    #[test]
    fn a_state_file_is_told_in_every_version() {
        let x86 = 0x0710_1984_8664_0000_u64;
        let arm = 0x0710_1984_aaaa_0000_u64;
        for magic in [x86, x86 | 7, arm, arm | 1] {
            let mut start = magic.to_le_bytes().to_vec();
            start.extend([1, 0, 0, 0]);
            assert!(is_state(&start));
            // Behind the byte of `bitcode`.
            start.insert(0, 0);
            assert!(is_state(&start));
            start.insert(0, 0);
            assert!(!is_state(&start));
        }
        assert!(!is_state(&x86.to_be_bytes()));
        assert!(!is_state(&x86.to_le_bytes()[..7]));
        assert!(!is_state(&[0; 16]));
    }
}
