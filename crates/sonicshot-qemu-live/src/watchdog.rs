//! A second process that lets the guest run on if the one that paused it dies, or takes too long.
//!
//! It has the same connection to QEMU's monitor, which serves one client alone: what it says comes
//! behind all that the first has said. Nobody reads what QEMU answers to a process that is gone, so
//! it does.
//!
//! ```text
//!  ARM ms   the guest will be paused for at most that long (0: without a limit)
//!  COMMIT   the copy is complete: from now on it does not come too late. Answered by COMMIT, or by
//!           LATE if the guest runs on already
//!  DONE     the guest is as it shall be
//! ```

use crate::error::QemuError;
use crate::qmp::{Lines, Until, receive, send_all};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use serde_json::{Value, json};
use sonicshot::Tally;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ARM: u8 = b'A';
const COMMIT: u8 = b'C';
const LATE: u8 = b'L';
const DONE: u8 = b'D';
const MESSAGE: usize = 9;
/// The longest that an answer of the other process may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The time for which it tries to let the guest run on.
const RESUMING: Duration = Duration::from_secs(60);
/// The longest that QEMU may take for one answer.
const ANSWER: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(100);

/// A line that it sends to QEMU. A command of its owner is never cut off: one call sends all of it.
fn line(command: &str, id: u64) -> String {
    format!(
        "{}\n",
        json!({"execute": command, "id": format!("sonicshot-watchdog-{id}")})
    )
}

/// The saving process's end.
#[derive(Debug)]
pub(crate) struct Watchdog {
    socket: Option<OwnedFd>,
    child: Child,
}

impl Watchdog {
    /// Starts `command`, which must call [`watch`] and do nothing else.
    pub(crate) fn start(mut command: Command, monitor: &UnixStream) -> Result<Self, QemuError> {
        let failed = |action| move |source: io::Error| QemuError::Watchdog { action, source };
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| failed("socketpair")(error.into()))?;
        let monitor = monitor.try_clone().map_err(failed("its monitor"))?;
        // A group of its own: what ends the saving process from a terminal does not end it.
        let child = command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(OwnedFd::from(monitor)))
            .process_group(0)
            .spawn()
            .map_err(failed("starting it"))?;
        Ok(Self {
            socket: Some(ours),
            child,
        })
    }

    /// Says that the guest will be paused, for at most `most`.
    pub(crate) fn arm(&self, most: Option<Duration>) -> Result<(), QemuError> {
        const FOR_EVER: u64 = 0;
        // What is shorter than a millisecond is one.
        let millis = most.map_or(FOR_EVER, |most| {
            let millis = Tally::new(most.as_secs()).times(1000);
            millis.and(most.subsec_millis().max(1).into()).get()
        });
        match self.ask(ARM, millis)? {
            ARM => Ok(()),
            _ => Err(Self::failed("arming it", io::ErrorKind::InvalidData.into())),
        }
    }

    /// Says that the copy is complete; whether the guest was paused until now.
    pub(crate) fn commit(&self) -> Result<bool, QemuError> {
        match self.ask(COMMIT, 0)? {
            COMMIT => Ok(true),
            LATE => Ok(false),
            _ => Err(Self::failed(
                "its answer",
                io::ErrorKind::InvalidData.into(),
            )),
        }
    }

    /// Says that the guest is as it shall be.
    pub(crate) fn done(&self) {
        // If it is gone it does no harm.
        let _ = self.send(DONE, 0);
    }

    fn failed(action: &'static str, source: io::Error) -> QemuError {
        QemuError::Watchdog { action, source }
    }

    fn send(&self, what: u8, value: u64) -> io::Result<()> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let mut message = [what; MESSAGE];
        let (_, rest) = message.split_at_mut(1);
        rest.copy_from_slice(&value.to_le_bytes());
        send(socket, &message, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn ask(&self, what: u8, value: u64) -> Result<u8, QemuError> {
        let asked = || -> io::Result<u8> {
            self.send(what, value)?;
            let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
            if !Until::new(PATIENCE).wait(socket.as_fd(), PollFlags::IN)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match message(socket.as_fd())? {
                Some((answer, _)) => Ok(answer),
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        };
        asked().map_err(|source| Self::failed("a message to it", source))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // It sees the end, and does what is left to do.
        self.socket = None;
        let _ = self.child.wait();
    }
}

/// The next message; `None` at the end.
fn message(socket: BorrowedFd<'_>) -> io::Result<Option<(u8, u64)>> {
    let mut bytes = [0_u8; MESSAGE];
    loop {
        match recv(socket, &mut bytes[..], RecvFlags::empty()) {
            // The other end is gone, maybe with a message unread.
            Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(None),
            Ok((_, MESSAGE)) => {
                let (what, value) = bytes.split_at(1);
                let value = <[u8; 8]>::try_from(value).map_err(io::Error::other)?;
                let what = *what.first().ok_or(io::ErrorKind::InvalidData)?;
                return Ok(Some((what, u64::from_le_bytes(value))));
            }
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The facts that are known of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is as it shall be.
    Idle,
    /// It is paused, until then.
    Armed(Option<Instant>),
    /// It was let run on.
    Late,
    /// It is paused, and may be for as long as its owner lives.
    Committed,
}

/// The second process's work: `control` is its standard input, `monitor` its standard output.
/// Whether it had to let a guest run on.
///
/// # Errors
/// [`QemuError`]: the guest may still be paused.
pub fn watch(control: &impl AsFd, monitor: &UnixStream) -> Result<bool, QemuError> {
    let state = attend(control.as_fd(), monitor);
    let state = state.map_err(|source| QemuError::Watchdog {
        action: "its socket",
        source,
    });
    match state {
        Ok(State::Idle) => Ok(false),
        // What cannot be understood is as bad as an end.
        Ok(_) | Err(_) => resume(monitor),
    }
}

/// Until the owner is gone.
fn attend(control: BorrowedFd<'_>, monitor: &UnixStream) -> io::Result<State> {
    let mut state = State::Idle;
    loop {
        let time = match state {
            State::Armed(Some(end)) => Some(end.saturating_duration_since(Instant::now())),
            _ => None,
        };
        let time = time.map(Timespec::try_from).transpose();
        let time = time.map_err(io::Error::other)?;
        let mut fds = [PollFd::from_borrowed_fd(control, PollFlags::IN)];
        match poll(&mut fds, time.as_ref()) {
            Ok(0) => {
                // Its owner may be busy reading: the answer is his, who does not know it.
                let _ = send_all(
                    monitor,
                    line("cont", 0).as_bytes(),
                    &[],
                    &Until::new(ANSWER),
                );
                state = State::Late;
                continue;
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let answer = match (message(control)?, state) {
            (None, state) => return Ok(state),
            (Some((ARM, millis)), _) => {
                let end = Instant::now().checked_add(Duration::from_millis(millis));
                state = State::Armed(end.filter(|_| millis > 0));
                ARM
            }
            (Some((COMMIT, _)), State::Armed(_) | State::Committed) => {
                state = State::Committed;
                COMMIT
            }
            (Some((COMMIT, _)), _) => LATE,
            (Some((DONE, _)), _) => {
                state = State::Idle;
                continue;
            }
            (Some(_), _) => return Err(io::ErrorKind::InvalidData.into()),
        };
        // Who does not take it is gone.
        let _ = send(control, &[answer; MESSAGE], SendFlags::NOSIGNAL);
    }
}

/// Lets the guest run on, if it is paused; whether it was.
fn resume(monitor: &UnixStream) -> Result<bool, QemuError> {
    let whole = Until::new(RESUMING);
    let mut lines = Lines::default();
    let (mut number, mut was_paused) = (1, false);
    loop {
        let status = ask(monitor, &mut lines, "query-status", &mut number)?;
        match status.get("status").and_then(Value::as_str) {
            Some("paused") => {
                was_paused = true;
                ask(monitor, &mut lines, "cont", &mut number)?;
            }
            // A save of devices is under way; or it is not known.
            Some("save-vm") | None => std::thread::sleep(AGAIN),
            Some(_) => return Ok(was_paused),
        }
        if whole.left().is_none() {
            return Err(QemuError::Silent {
                command: "cont",
                waited: RESUMING,
            });
        }
    }
}

/// QEMU's answer; nothing if it refuses.
fn ask(
    monitor: &UnixStream,
    lines: &mut Lines,
    command: &'static str,
    number: &mut u64,
) -> Result<Value, QemuError> {
    let until = Until::new(ANSWER);
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::TimedOut => QemuError::Silent {
            command,
            waited: ANSWER,
        },
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::UnexpectedEof => QemuError::Gone { command },
        _ => QemuError::Monitor { command, source },
    };
    *number = number.wrapping_add(1);
    let said = line(command, *number);
    let id = format!("sonicshot-watchdog-{number}");
    send_all(monitor, said.as_bytes(), &[], &until).map_err(failed)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        while let Some(line) = lines.next() {
            // The first may be the rest of one that its owner has begun to read.
            let Ok(Value::Object(mut answer)) = serde_json::from_slice(&line) else {
                continue;
            };
            if answer.get("id").and_then(Value::as_str) == Some(&id) {
                return Ok(answer.remove("return").unwrap_or(Value::Null));
            }
        }
        let got = receive(monitor, &mut buffer, &until).map_err(failed)?;
        let pushed = lines.push(buffer.get(..got).unwrap_or(&buffer));
        pushed.map_err(|len| QemuError::NoQmp {
            command,
            what: format!("a line of {len} bytes"),
        })?;
    }
}

#[cfg(test)]
mod tests {
    use super::{ARM, COMMIT, DONE, LATE, MESSAGE, watch};
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};
    use std::thread::JoinHandle;
    use std::time::{Duration, Instant};

    /// A monitor with a guest that is paused.
    fn monitor() -> (UnixStream, Arc<Mutex<Vec<String>>>, JoinHandle<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hearing = Arc::clone(&heard);
        let thread = std::thread::spawn(move || {
            // What was half read when the owner died, and what was said unasked.
            if theirs
                .write_all(b"status\": 7}}\n{\"event\": \"STOP\"}\n")
                .is_err()
            {
                // Nobody had to ask it anything.
                return;
            }
            let mut paused = true;
            for line in BufReader::new(theirs.try_clone().unwrap()).lines() {
                let Ok(line) = line else { return };
                let message: serde_json::Value = serde_json::from_str(&line).unwrap();
                let command = message["execute"].as_str().unwrap().to_owned();
                let status = if paused { "paused" } else { "running" };
                paused &= command != "cont";
                hearing.lock().unwrap().push(command);
                let answer = serde_json::json!({"return": {"status": status}, "id": message["id"]});
                if writeln!(theirs, "{answer}").is_err() {
                    return;
                }
            }
        });
        (ours, heard, thread)
    }

    /// The commands that the monitor got when its owner said this, waited so long, and died; what the
    /// owner was answered; and whether the guest had to be helped.
    fn said(messages: &[(u8, u64)], wait: Duration) -> (Vec<String>, Vec<u8>, bool) {
        let flags = SocketFlags::CLOEXEC;
        let (owner, control) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let (qmp, heard, thread) = monitor();
        let watching = std::thread::spawn(move || watch(&control, &qmp));
        let mut answers = Vec::new();
        for (what, value) in messages {
            if *what == COMMIT {
                std::thread::sleep(wait);
            }
            let mut bytes = vec![*what];
            bytes.extend(value.to_le_bytes());
            send(&owner, &bytes, SendFlags::NOSIGNAL).unwrap();
            if *what != DONE {
                let mut answer = [0; MESSAGE];
                rustix::io::read(&owner, &mut answer).unwrap();
                answers.push(answer[0]);
            }
        }
        drop(owner);
        let helped = watching.join().unwrap().unwrap();
        thread.join().unwrap();
        let heard = heard.lock().unwrap().clone();
        (heard, answers, helped)
    }

    #[test]
    fn a_guest_is_left_running() {
        let none = Duration::ZERO;
        let resumed = ["query-status", "cont", "query-status"];
        for (messages, expected, answers) in [
            (&[][..], &[][..], &[][..]),
            (&[(ARM, 60_000)], &resumed, &[ARM]),
            (&[(ARM, 0)], &resumed, &[ARM]),
            (&[(ARM, 60_000), (COMMIT, 0)], &resumed, &[ARM, COMMIT]),
            (
                &[(ARM, 60_000), (COMMIT, 0), (DONE, 0)],
                &[],
                &[ARM, COMMIT],
            ),
            (&[(ARM, 60_000), (DONE, 0)], &[], &[ARM]),
        ] {
            let (heard, answered, helped) = said(messages, none);
            assert_eq!(heard, expected, "{messages:?}");
            assert_eq!(answered, answers, "{messages:?}");
            assert_eq!(helped, !expected.is_empty());
        }
    }

    #[test]
    fn what_comes_too_late_does_not_count() {
        let began = Instant::now();
        let (heard, answers, _) = said(&[(ARM, 20), (COMMIT, 0)], Duration::from_millis(200));
        assert_eq!(answers, [ARM, LATE]);
        assert_eq!(heard, ["cont", "query-status"]);
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
