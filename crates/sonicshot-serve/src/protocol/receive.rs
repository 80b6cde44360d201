//! One message with its descriptors, from somebody who may send anything.

use crate::error::ServeError;
use crate::until::Until;
use core::mem::MaybeUninit;
use core::time::Duration;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::de::IgnoredAny;
use std::io::IoSliceMut;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

/// The longest message that is taken, in bytes. Firecracker's have some hundred: one mapping for
/// each region.
const MAX_MESSAGE: usize = 64 << 10;
/// Descriptors that a message of any known form has, at most.
const MAX_DESCRIPTORS: usize = 3;

/// A message as it came.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub message: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
    /// Whether descriptors came that there was no room for, which the kernel has closed.
    pub lost: bool,
}

/// Receives one JSON value. What came is in `received` even if it is not whole.
pub(crate) fn receive(
    stream: &UnixStream,
    limit: Duration,
    received: &mut Received,
) -> Result<(), ServeError> {
    let until = Until::new(limit);
    loop {
        wait(stream, &until, received.message.len())?;
        let got = receive_part(stream, received)?;
        let len = received.message.len();
        // A stream keeps no messages apart: this one is complete when it can be read. It is tried
        // where it may be: whoever sends it byte by byte must not make work of it.
        let last = received.message.iter().rfind(|b| !b.is_ascii_whitespace());
        if matches!(last, Some(b']' | b'}')) {
            match serde_json::from_slice::<IgnoredAny>(&received.message) {
                Ok(_) => return Ok(()),
                Err(error) if !error.is_eof() => return Err(error.into()),
                Err(_) => {}
            }
        }
        if got == 0 {
            return Err(ServeError::Closed { len });
        }
        if len > MAX_MESSAGE {
            return Err(ServeError::TooLong { max: MAX_MESSAGE });
        }
    }
}

/// Takes in what has come behind that of which [`receive`] says that it is no message, and lets
/// nothing more come: whoever sends later is told by the system.
pub(crate) fn receive_rest(stream: &UnixStream, received: &mut Received) {
    if stream.shutdown(Shutdown::Read).is_err() {
        return;
    }
    // What was sent before is read, and then its end.
    loop {
        match receive_part(stream, received) {
            Ok(0) | Err(ServeError::System { .. }) => return,
            // What is in excess is closed: what it was is not known then.
            Ok(_) | Err(_) => {
                received.lost |= received.descriptors.len() > MAX_DESCRIPTORS;
                received.descriptors.truncate(MAX_DESCRIPTORS);
                received.message.truncate(MAX_MESSAGE);
            }
        }
    }
}

/// Waits until there is more to read, at most for as long as `until` says.
fn wait(stream: &UnixStream, until: &Until, len: usize) -> Result<(), ServeError> {
    loop {
        let timeout = Timespec::try_from(until.left()).map_err(|_| Errno::INVAL);
        let timeout = timeout.map_err(ServeError::system("poll"))?;
        let mut ready = [PollFd::new(stream, PollFlags::IN)];
        match poll(&mut ready, Some(&timeout)) {
            Err(Errno::INTR) => {}
            Ok(0) => {
                let limit = until.limit();
                return Err(ServeError::Slow { len, limit });
            }
            other => return other.map(drop).map_err(ServeError::system("poll")),
        }
    }
}

fn receive_part(stream: &UnixStream, received: &mut Received) -> Result<usize, ServeError> {
    let mut part = [0; 4096];
    // The kernel closes what there is no room for.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut part)];
    let result = loop {
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other.map_err(ServeError::system("receiving a message"))?,
        }
    };
    let got = result.bytes;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            received.descriptors.extend(rights);
        }
    }
    if got == 0 {
        return Ok(0);
    }
    let found = received.descriptors.len();
    // If some were lost it is not known how many there were.
    received.lost |= result.flags.contains(ReturnFlags::CTRUNC);
    let part = part.get(..got).unwrap_or(&part);
    received.message.extend_from_slice(part);
    if received.lost {
        return Err(ServeError::DescriptorsLost { found });
    }
    if found > MAX_DESCRIPTORS {
        return Err(ServeError::Descriptors { found, expected: 1 });
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::{AsFd, BorrowedFd};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::fs::File;
    use std::io::{IoSlice, Write};
    use std::time::Instant;

    const SHORT: Duration = Duration::from_millis(100);

    fn send(stream: &UnixStream, message: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let parts = [IoSlice::new(message)];
        let sent = sendmsg(stream, &parts, &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, message.len());
    }

    fn received(stream: &UnixStream) -> (Received, Result<(), ServeError>) {
        let mut received = Received::default();
        let result = receive(stream, SHORT, &mut received);
        (received, result)
    }

    fn null() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn a_message_may_come_in_pieces() {
        let file = null();
        for (first, second) in [(1, 0), (0, 1), (2, 0), (1, 1), (0, 0), (2, 1)] {
            let (near, far) = UnixStream::pair().unwrap();
            send(&near, b" [{\"a\":1},", &vec![file.as_fd(); first]);
            send(&near, b"{\"b\":[]}] ", &vec![file.as_fd(); second]);
            // The connection stays open.
            let (got, result) = received(&far);
            result.unwrap();
            assert_eq!(got.descriptors.len(), first + second);
            assert!(got.message.starts_with(b" [{\"a\":1},{\"b\":[]}]"));
        }
    }

    #[test]
    fn what_is_no_whole_message_is_told() {
        type Check = fn(&ServeError) -> bool;
        let cases: [(&[u8], bool, Check); 6] = [
            (b"", true, |e| matches!(e, ServeError::Closed { len: 0 })),
            (b"[{\"a\"", true, |e| {
                matches!(e, ServeError::Closed { len: 5 })
            }),
            (b"[{\"a\"", false, |e| {
                matches!(e, ServeError::Slow { len: 5, .. })
            }),
            (b"", false, |e| matches!(e, ServeError::Slow { len: 0, .. })),
            (b"{]", false, |e| matches!(e, ServeError::Json(_))),
            (b"[]]", false, |e| matches!(e, ServeError::Json(_))),
        ];
        for (message, closed, check) in cases {
            let (near, far) = UnixStream::pair().unwrap();
            (&near).write_all(message).unwrap();
            if closed {
                near.shutdown(Shutdown::Write).unwrap();
            }
            let error = received(&far).1.unwrap_err();
            assert!(check(&error), "{message:?}: {error:?}");
        }
        let (near, far) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // It does not end, and the other side ends it.
                while (&near).write_all(&[b'['; 4096]).is_ok() {}
            });
            let error = received(&far).1.unwrap_err();
            assert!(matches!(error, ServeError::TooLong { .. }), "{error:?}");
            drop(far);
        });
    }

    #[test]
    fn each_byte_in_time_is_not_the_whole_in_time() {
        let (near, far) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while (&near).write_all(b" ").is_ok() {
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            let start = Instant::now();
            let error = received(&far).1.unwrap_err();
            drop(far);
            assert!(
                matches!(error, ServeError::Slow { len, .. } if len > 1),
                "{error:?}"
            );
            assert!(start.elapsed() >= SHORT);
        });
    }

    #[test]
    fn nothing_comes_behind_what_was_refused() {
        let file = null();
        let (near, far) = UnixStream::pair().unwrap();
        send(&near, b"[", &[]);
        let (mut got, result) = received(&far);
        assert!(matches!(result, Err(ServeError::Slow { len: 1, .. })));
        // While nobody looks.
        send(&near, b"{}]", &[file.as_fd()]);
        for _ in 0..20 {
            send(&near, &[b' '; 4096], &[]);
        }
        receive_rest(&far, &mut got);
        assert_eq!((got.descriptors.len(), got.lost), (1, false));
        assert!(got.message.starts_with(b"[{}] "));
        assert!((&near).write_all(b"x").is_err());
        let (near, far) = UnixStream::pair().unwrap();
        for _ in 0..20 {
            send(&near, b" ", &[file.as_fd()]);
        }
        let (mut got, result) = received(&far);
        assert!(matches!(result, Err(ServeError::Descriptors { .. })));
        receive_rest(&far, &mut got);
        assert!(got.lost && got.descriptors.len() == 3);
    }

    #[test]
    fn more_descriptors_than_any_form_has_are_refused() {
        let file = null();
        for counts in [vec![4], vec![2, 2], vec![40], vec![1; 40]] {
            let (near, far) = UnixStream::pair().unwrap();
            for count in &counts {
                send(&near, b" ", &vec![file.as_fd(); *count]);
            }
            let (got, result) = received(&far);
            let error = result.unwrap_err();
            assert!(
                match error {
                    ServeError::Descriptors { found, expected } => !got.lost && found > expected,
                    ServeError::DescriptorsLost { .. } => got.lost,
                    _ => false,
                },
                "{counts:?}"
            );
            assert!(got.descriptors.len() <= 8);
            // There is room for four at once.
            assert_eq!(got.lost, counts.iter().any(|count| *count > 4));
        }
    }
}
