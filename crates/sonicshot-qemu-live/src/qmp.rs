//! QEMU's monitor protocol, for one who trusts nothing of what comes.
//!
//! The crates that there are for it read lines of any length, wait for ever, cannot send
//! descriptors, and give types for one version's answers, of which a later QEMU has more.

use crate::error::QemuError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest line that is taken, in bytes: QEMU's own tables are some 100 KiB.
pub(crate) const MAX_LINE: usize = 16 << 20;
/// The most events that are kept.
const MAX_EVENTS: usize = 256;
/// The longest that an ordinary answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
const READ: usize = 64 << 10;

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QemuVersion {
    /// Of 10.0.2 the 10.
    pub major: u32,
    /// Of 10.0.2 the 0.
    pub minor: u32,
    /// Of 10.0.2 the 2.
    pub micro: u32,
}

impl core::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An event of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub name: String,
    /// By QEMU's clock, since 1970.
    pub at: Duration,
}

/// A monitor that is connected, and ready for commands.
#[derive(Debug)]
pub(crate) struct Qmp {
    socket: UnixStream,
    version: QemuVersion,
    lines: Lines,
    events: VecDeque<Event>,
    next: u64,
}

/// The bytes that have come, and are not read yet.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    bytes: Vec<u8>,
    /// Up to here there is no end of a line.
    looked: usize,
}

impl Lines {
    /// Adds what has come.
    ///
    /// # Errors
    /// The length of the line so far, if that is too long.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), usize> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > MAX_LINE && !self.bytes.iter().take(MAX_LINE).any(|b| *b == b'\n') {
            return Err(self.bytes.len());
        }
        Ok(())
    }

    /// The next whole line, without its end.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        let rest = self.bytes.get(self.looked..)?;
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            self.looked = self.bytes.len();
            return None;
        };
        let end = self.looked.checked_add(end)?;
        let after = self.bytes.split_off(end.checked_add(1)?);
        let mut line = core::mem::replace(&mut self.bytes, after);
        line.pop();
        self.looked = 0;
        Some(line)
    }
}

/// The time to give up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Until {
    began: Instant,
    allowed: Duration,
}

impl Until {
    pub(crate) fn new(allowed: Duration) -> Self {
        Self {
            began: Instant::now(),
            allowed,
        }
    }

    /// The time itself; `None` if the clock does not go as far.
    pub(crate) fn end(&self) -> Option<Instant> {
        self.began.checked_add(self.allowed)
    }

    pub(crate) fn left(&self) -> Option<Duration> {
        let left = self.allowed.checked_sub(self.began.elapsed());
        left.filter(|left| !left.is_zero())
    }

    /// Waits until `fd` is ready; `false` if it was not in time.
    pub(crate) fn wait(&self, fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<bool> {
        loop {
            let Some(left) = self.left() else {
                return Ok(false);
            };
            let time = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
            match poll(&mut fds, Some(&time)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: GreetingNumbers,
}

#[derive(Deserialize)]
struct GreetingNumbers {
    major: u32,
    minor: u32,
    micro: u32,
}

impl Qmp {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`QemuError`]: nobody is there, or none that speaks QMP in time.
    pub(crate) fn connect(path: &Path, patience: Duration) -> Result<Self, QemuError> {
        let socket = UnixStream::connect(path).map_err(|source| QemuError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::over(socket, patience)
    }

    /// Begins on a socket that is connected.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub(crate) fn over(socket: UnixStream, patience: Duration) -> Result<Self, QemuError> {
        let mut new = Self {
            socket,
            version: QemuVersion {
                major: 0,
                minor: 0,
                micro: 0,
            },
            lines: Lines::default(),
            events: VecDeque::new(),
            next: 1,
        };
        let greeting = new.message("greeting", &Until::new(patience))?;
        let found = Greeting::deserialize(greeting).map_err(|error| QemuError::NoQmp {
            command: "greeting",
            what: error.to_string(),
        })?;
        let GreetingNumbers {
            major,
            minor,
            micro,
        } = found.qmp.version.qemu;
        new.version = QemuVersion {
            major,
            minor,
            micro,
        };
        new.run("qmp_capabilities", Value::Null)?;
        Ok(new)
    }

    pub(crate) fn version(&self) -> QemuVersion {
        self.version
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The command's result.
    ///
    /// # Errors
    /// [`QemuError`]: QEMU refuses, is gone, or does not answer in time.
    pub(crate) fn run(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, QemuError> {
        self.run_until(command, arguments, &[], &Until::new(PATIENCE))
    }

    /// The same, of a command that descriptors go with, by `until`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn run_until(
        &mut self,
        command: &'static str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
        until: &Until,
    ) -> Result<Value, QemuError> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        let mut message = Map::new();
        message.insert("execute".into(), command.into());
        if !arguments.is_null() {
            message.insert("arguments".into(), arguments);
        }
        message.insert("id".into(), id.into());
        let mut line = Value::Object(message).to_string();
        line.push('\n');
        send_all(&self.socket, line.as_bytes(), fds, until)
            .map_err(|source| broken(command, source, until))?;
        loop {
            let Value::Object(mut answer) = self.message(command, until)? else {
                continue;
            };
            if let Some(event) = answer.get("event").and_then(Value::as_str) {
                self.keep(event.into(), answer.get("timestamp"));
                continue;
            }
            // Another's is for somebody who is gone.
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            if let Some(found) = answer.remove("return") {
                return Ok(found);
            }
            let reason = answer.get("error").and_then(|error| error.get("desc"));
            return Err(match reason.and_then(Value::as_str) {
                Some(reason) => QemuError::Refused {
                    command,
                    reason: shortened(reason),
                },
                None => QemuError::NoQmp {
                    command,
                    what: "an answer without return or error".into(),
                },
            });
        }
    }

    /// The text of QEMU's monitor for people.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn human(&mut self, line: &str) -> Result<String, QemuError> {
        const COMMAND: &str = "human-monitor-command";
        match self.run(COMMAND, json!({"command-line": line}))? {
            Value::String(text) => Ok(text),
            other => Err(QemuError::Unknown {
                what: COMMAND,
                found: shortened(&other.to_string()),
                expected: "text",
            }),
        }
    }

    /// Gives QEMU the descriptor `fd`; the number of the set that it is in now.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn add_fd(&mut self, fd: &OwnedFd) -> Result<u64, QemuError> {
        let until = Until::new(PATIENCE);
        let answer = self.run_until("add-fd", Value::Null, &[fd.as_fd()], &until)?;
        let set = answer.get("fdset-id").and_then(Value::as_u64);
        set.ok_or_else(|| QemuError::Unknown {
            what: "add-fd",
            found: shortened(&answer.to_string()),
            expected: "fdset-id",
        })
    }

    /// Gives QEMU the descriptor `fd` by a name.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn get_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QemuError> {
        let until = Until::new(PATIENCE);
        self.run_until("getfd", json!({"fdname": name}), &[fd], &until)?;
        Ok(())
    }

    /// The time when QEMU last said this.
    pub(crate) fn last(&self, name: &str) -> Option<Duration> {
        let mut events = self.events.iter().rev();
        events
            .find(|event| event.name == name)
            .map(|event| event.at)
    }

    /// Takes in what has come meanwhile, without waiting.
    pub(crate) fn catch_up(&mut self) {
        // What fails is told by the next command.
        let _ = self.run("query-status", Value::Null);
    }

    fn keep(&mut self, name: String, timestamp: Option<&Value>) {
        let number = |key| timestamp?.get(key)?.as_u64();
        let at = match (number("seconds"), number("microseconds")) {
            (Some(seconds), Some(micro)) => {
                Duration::from_secs(seconds).checked_add(Duration::from_micros(micro))
            }
            _ => None,
        };
        let Some(at) = at else { return };
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { name, at });
    }

    /// The next message.
    fn message(&mut self, command: &'static str, until: &Until) -> Result<Value, QemuError> {
        loop {
            if let Some(line) = self.lines.next() {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| QemuError::NoQmp {
                    command,
                    what: error.to_string(),
                });
            }
            let mut buffer = [0; READ];
            let got = receive(&self.socket, &mut buffer, until)
                .map_err(|source| broken(command, source, until))?;
            let got = buffer.get(..got).unwrap_or(&buffer);
            self.lines.push(got).map_err(|len| QemuError::NoQmp {
                command,
                what: format!("a line of {len} bytes and more; expected were at most {MAX_LINE}"),
            })?;
        }
    }
}

/// The error of the socket. `TimedOut` is that it took too long.
fn broken(command: &'static str, source: io::Error, until: &Until) -> QemuError {
    match source.kind() {
        io::ErrorKind::TimedOut => QemuError::Silent {
            command,
            waited: until.allowed,
        },
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::UnexpectedEof => QemuError::Gone { command },
        _ => QemuError::Monitor { command, source },
    }
}

/// As much of a text as a message can have.
pub(crate) fn shortened(text: &str) -> String {
    const SHOWN: usize = 400;
    let mut shown: String = text.trim().chars().take(SHOWN).collect();
    if shown.len() < text.trim().len() {
        shown.push('…');
    }
    shown
}

/// Some bytes, at least one. `UnexpectedEof` at the end.
pub(crate) fn receive(socket: &UnixStream, buffer: &mut [u8], until: &Until) -> io::Result<usize> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, got)) => return Ok(got),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !until.wait(socket.as_fd(), PollFlags::IN)? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends all bytes, and the descriptors with the first of them.
pub(crate) fn send_all(
    socket: &UnixStream,
    mut bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    until: &Until,
) -> io::Result<()> {
    let mut fds = Some(fds).filter(|fds| !fds.is_empty());
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    while !bytes.is_empty() {
        let sent = if let Some(fds) = fds {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
        } else {
            send(socket, bytes, flags)
        };
        match sent {
            Ok(sent) => {
                fds = None;
                bytes = bytes.get(sent..).unwrap_or(&[]);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !until.wait(socket.as_fd(), PollFlags::OUT)? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Lines, MAX_LINE, Qmp, Until};
    use crate::error::QemuError;
    use serde_json::Value;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}"#;

    /// A monitor that says `said` to whatever it is asked behind its greeting; the error that
    /// comes of it.
    fn error_of(said: &[&[u8]]) -> QemuError {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut heard = [0; 4096];
                for part in said {
                    if theirs.write_all(part).is_err() {
                        return;
                    }
                }
                // Until the other side has had enough.
                while theirs.read(&mut heard).is_ok_and(|got| got > 0) {}
            });
            let result = Qmp::over(ours, Duration::from_millis(300)).and_then(|mut qmp| {
                let until = Until::new(Duration::from_millis(300));
                qmp.run_until("query-status", Value::Null, &[], &until)
            });
            result.unwrap_err()
        })
    }

    #[test]
    fn a_monitor_that_is_none_is_refused_in_time() {
        let greeting = format!("{GREETING}\n");
        let ok = "{\"return\": {}, \"id\": 1}\n";
        let deep = format!("{}\n", "[".repeat(100_000));
        let long = vec![b' '; MAX_LINE + 2];
        type Case<'c> = (&'c str, Vec<&'c [u8]>, fn(&QemuError) -> bool);
        let cases: &[Case<'_>] = &[
            ("silence", vec![], |e| {
                matches!(
                    e,
                    QemuError::Silent {
                        command: "greeting",
                        ..
                    }
                )
            }),
            ("no json", vec![b"SSH-2.0\n"], |e| {
                matches!(e, QemuError::NoQmp { .. })
            }),
            ("another json", vec![b"{\"QMP\": 7}\n"], |e| {
                matches!(e, QemuError::NoQmp { .. })
            }),
            ("nesting", vec![deep.as_bytes()], |e| {
                matches!(e, QemuError::NoQmp { .. })
            }),
            ("a line without end", vec![&long], |e| {
                matches!(e, QemuError::NoQmp { .. })
            }),
            (
                "no answer",
                vec![
                    greeting.as_bytes(),
                    ok.as_bytes(),
                    b"{\"event\": \"X\"}\n{\"return\": {}, \"id\": 77}\n\n[]\n",
                ],
                |e| {
                    matches!(
                        e,
                        QemuError::Silent {
                            command: "query-status",
                            ..
                        }
                    )
                },
            ),
            (
                "an error",
                vec![
                    greeting.as_bytes(),
                    ok.as_bytes(),
                    b"{\"error\": {\"class\": \"X\", \"desc\": \"no\"}, \"id\": 2}\n",
                ],
                |e| matches!(e, QemuError::Refused { reason, .. } if reason == "no"),
            ),
            (
                "neither",
                vec![greeting.as_bytes(), ok.as_bytes(), b"{\"id\": 2}\n"],
                |e| matches!(e, QemuError::NoQmp { .. }),
            ),
        ];
        for (name, said, expected) in cases {
            let error = error_of(said);
            assert!(expected(&error), "{name}: {error:?}");
        }
    }

    #[test]
    fn of_many_events_the_last_are_kept() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let event = |number: usize| {
            format!(
                "{{\"event\": \"E{number}\", \"timestamp\": {{\"seconds\": {number}, \
                 \"microseconds\": 5}}}}\n"
            )
        };
        let mut said = format!("{GREETING}\n{{\"return\": {{}}, \"id\": 1}}\n");
        let most = super::MAX_EVENTS;
        said.extend((0..most + 10).map(event));
        said.push_str("{\"return\": 7, \"id\": 2}\n");
        let writing =
            std::thread::spawn(move || theirs.write_all(said.as_bytes()).map(|()| theirs));
        let mut qmp = Qmp::over(ours, Duration::from_secs(5)).unwrap();
        assert_eq!(qmp.run("x", Value::Null).unwrap(), 7);
        let _theirs = writing.join().unwrap().unwrap();
        assert_eq!(qmp.events.len(), most);
        assert_eq!(qmp.last("E9"), None);
        assert_eq!(qmp.last("E11"), Some(Duration::from_micros(11_000_005)));
    }

    #[test]
    fn a_monitor_that_ends_is_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(GREETING.as_bytes()).unwrap();
        theirs.write_all(b"\n").unwrap();
        drop(theirs);
        let error = Qmp::over(ours, Duration::from_secs(5)).unwrap_err();
        assert!(matches!(error, QemuError::Gone { .. }), "{error:?}");
    }

    #[test]
    fn lines_are_cut_where_they_end() {
        let mut lines = Lines::default();
        lines.push(b"one\r\nt").unwrap();
        assert_eq!(lines.next().as_deref(), Some(&b"one\r"[..]));
        assert_eq!(lines.next(), None);
        lines.push(b"wo\n\nthree").unwrap();
        assert_eq!(lines.next().as_deref(), Some(&b"two"[..]));
        assert_eq!(lines.next().as_deref(), Some(&b""[..]));
        assert_eq!(lines.next(), None);
    }
}
