//! A file is made durable, and whoever waits is told how far it is.

use crate::backing::sys::write_back;
use sonicshot::{FileOffset, FileRange, PhaseProgress, Progress, WorkPhase};
use std::fs::File;
use std::io;

/// So much is waited for at a time, while the next is on its way.
const PIECE: u64 = 64 << 20;

/// Writes all of `file` to its disk, as `fsync` does.
///
/// # Errors
/// The first error of writing, which may be told of only once.
pub(crate) fn sync(file: &File, progress: &dyn Progress) -> io::Result<()> {
    let len = file.metadata()?.len();
    let mut phase = PhaseProgress::begin(progress, WorkPhase::Syncing, len);
    write_pieces(file, len, &mut phase)?;
    file.sync_all()?;
    phase.end();
    Ok(())
}

/// Writes the file's content piece by piece, as far as the file system does so.
fn write_pieces(file: &File, len: u64, phase: &mut PhaseProgress<'_>) -> io::Result<()> {
    let piece = |at: u64| {
        let end = at.checked_add(PIECE).map_or(len, |end| end.min(len));
        FileRange::new(FileOffset::new(at), FileOffset::new(end))
    };
    let mut at = 0;
    while at < len {
        let this = piece(at);
        let end = this.end().raw();
        let next = Some(piece(end)).filter(|next| !next.is_empty());
        let begun = next.map_or(Ok(()), |next| write_back(file, next, false));
        match begun.and_then(|()| write_back(file, this, true)) {
            Ok(()) => phase.reach(end),
            // `fsync` does it all.
            Err(error) if is_not_offered(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
        at = end;
    }
    Ok(())
}

/// Whether the kernel, the file system or a filter of system calls does not know the call. Any other
/// error is the file's: `fsync` would not tell of it again.
fn is_not_offered(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOSYS | libc::EPERM | libc::ESPIPE | libc::EOPNOTSUPP)
    )
}

#[cfg(test)]
mod tests {
    use super::{PIECE, is_not_offered, sync};
    use std::io;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;

    #[test]
    fn a_file_is_told_of_up_to_its_end() {
        for len in [0, 1, PIECE, PIECE + 1, 5 * PIECE] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            for at in [0, len / 2] {
                let at = at.min(len.saturating_sub(1));
                file.write_all_at(&b"x"[..usize::from(len > 0)], at)
                    .unwrap();
            }
            let told = Mutex::new(Vec::new());
            let tell = |done: u64, total: u64| told.lock().unwrap().push((done, total));
            sync(&file, &tell).unwrap();
            let told = told.into_inner().unwrap();
            assert_eq!(told.last(), Some(&(len, len)));
            assert!(told.is_sorted());
            assert!(len < 2 * PIECE || told.len() > 4, "{told:?}");
        }
    }

    #[test]
    fn a_disk_that_is_full_or_broken_is_an_error() {
        for (error, is_one) in [
            (libc::EIO, false),
            (libc::ENOSPC, false),
            (libc::EDQUOT, false),
            (libc::EROFS, false),
            (libc::EINVAL, true),
            (libc::ENOSYS, true),
        ] {
            assert_eq!(is_not_offered(&io::Error::from_raw_os_error(error)), is_one);
        }
    }
}
