//! Calls to the system that have no safe wrapper.

use core::mem::size_of;
use rustix::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::io;

/// The user and process that connected a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub uid: u32,
    pub pid: i32,
}

fn option<T: Default>(socket: &impl AsFd, name: i32) -> io::Result<T> {
    let mut value = T::default();
    let mut len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: `value` is plain data of `len` bytes, and both live for longer than the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 && usize::try_from(len).is_ok_and(|len| len == size_of::<T>()) {
        return Ok(value);
    }
    Err(io::Error::last_os_error())
}

/// `struct ucred`.
#[repr(C)]
#[derive(Default)]
struct Cred {
    pid: i32,
    uid: u32,
    gid: u32,
}

/// The process and user that have connected.
pub(crate) fn credentials(socket: &impl AsFd) -> io::Result<Credentials> {
    let cred: Cred = option(socket, libc::SO_PEERCRED)?;
    Ok(Credentials {
        uid: cred.uid,
        pid: cred.pid,
    })
}

/// The process that has connected, whatever becomes of its number (Linux 6.5).
pub(crate) fn peer_pidfd(socket: &impl AsFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: i32 = 77;
    let fd: i32 = option(socket, SO_PEERPIDFD)?;
    // SAFETY: the kernel has just made it for this process, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether this process may send signals to that one; fails if it is gone.
pub(crate) fn may_signal(pidfd: &impl AsFd) -> io::Result<()> {
    let none = core::ptr::null::<libc::siginfo_t>();
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: signal 0 is none, and the kernel reads nothing of a null pointer.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, 0_i32, none, 0_u32) };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// Lets the signals pass that end a service: who has work to do behind its end does it first.
pub(crate) fn ignore_ends() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: to ignore a signal runs no code.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
