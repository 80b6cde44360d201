//! Calls to the system that have no safe wrapper.

use rustix::process::Pid;
use std::io;

/// A range of another process's memory, and where it is to go.
pub(crate) struct RemoteRead<'a> {
    /// Its address in the other process.
    pub from: u64,
    /// As many bytes as are wanted.
    pub to: &'a mut [u8],
}

/// The most ranges of one call (`IOV_MAX`).
const PER_CALL: usize = 1024;

/// Reads memory of the process `pid`; all of it, or an error.
///
/// # Errors
/// The system's error; `UnexpectedEof` if a range is not all mapped.
pub(crate) fn read_process(pid: Pid, reads: &mut [RemoteRead<'_>]) -> io::Result<()> {
    for some in reads.chunks_mut(PER_CALL) {
        read_some(pid, some)?;
    }
    Ok(())
}

fn read_some(pid: Pid, reads: &mut [RemoteRead<'_>]) -> io::Result<()> {
    let mut local = Vec::with_capacity(reads.len());
    let mut remote = Vec::with_capacity(reads.len());
    let mut wanted = 0_usize;
    for read in reads {
        let from = usize::try_from(read.from).map_err(io::Error::other)?;
        wanted = wanted
            .checked_add(read.to.len())
            .ok_or(io::ErrorKind::InvalidInput)?;
        remote.push(libc::iovec {
            iov_base: core::ptr::without_provenance_mut(from),
            iov_len: read.to.len(),
        });
        local.push(libc::iovec {
            iov_base: read.to.as_mut_ptr().cast(),
            iov_len: read.to.len(),
        });
    }
    let count = libc::c_ulong::try_from(local.len()).map_err(io::Error::other)?;
    // SAFETY: each local entry is a buffer that is borrowed for writing and as long as it says; the
    // addresses in the other process are the kernel's to check.
    let got = unsafe {
        libc::process_vm_readv(
            pid.as_raw_nonzero().get(),
            local.as_ptr(),
            count,
            remote.as_ptr(),
            count,
            0,
        )
    };
    match usize::try_from(got) {
        Ok(got) if got == wanted => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::{RemoteRead, read_process};

    #[test]
    fn memory_of_a_process_is_read_whole_or_not_at_all() {
        let own = rustix::process::getpid();
        let bytes: Vec<u8> = (0..=255).collect();
        let (mut one, mut two) = ([0; 3], vec![0; 200]);
        let at = |offset: u64| bytes.as_ptr().addr() as u64 + offset;
        let mut reads = [
            RemoteRead {
                from: at(5),
                to: &mut one,
            },
            RemoteRead {
                from: at(50),
                to: &mut two,
            },
        ];
        read_process(own, &mut reads).unwrap();
        assert_eq!(one, [5, 6, 7]);
        assert_eq!(two, bytes[50..250]);
        let mut read = [RemoteRead {
            from: 8,
            to: &mut one,
        }];
        assert!(read_process(own, &mut read).is_err());
        // More than one call takes.
        let mut many = vec![[0_u8; 1]; 3000];
        let mut reads: Vec<_> = many
            .iter_mut()
            .enumerate()
            .map(|(number, to)| RemoteRead {
                from: at(number as u64 % 256),
                to,
            })
            .collect();
        read_process(own, &mut reads).unwrap();
        assert!((0..3000).all(|number| many[number] == [bytes[number % 256]]));
    }
}
