//! A QEMU that is started to run a guest.

use crate::error::QemuError;
use crate::guard::{self, Guard};
use crate::qmp::{Qmp, shortened};
use rustix::fd::AsRawFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// The longest that QEMU may take to begin: it may have to fill huge pages.
const START: Duration = Duration::from_secs(600);
/// The most that is kept of QEMU's messages, in bytes.
const MAX_SAID: usize = 4096;
/// The name of the monitor that is added.
const MONITOR: &str = "sonicshot-restore";

/// The facts in the words of a command line that a restore must know.
#[derive(Debug, Clone)]
pub(crate) struct Words<'a>(pub &'a [OsString]);

impl Words<'_> {
    /// Whether there is the option `-name`, also as `--name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        let mut words = self.0.iter().filter_map(|word| word.to_str());
        words.any(|word| {
            let option = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
            option == Some(name)
        })
    }

    /// Whether some word has `part` in it.
    pub(crate) fn mention(&self, part: &str) -> bool {
        self.0
            .iter()
            .any(|word| word.to_string_lossy().contains(part))
    }

    /// Whether memory may be made of a file that has something in it already.
    pub(crate) fn have_used_file(&self) -> bool {
        const OPTION: &str = "mem-path";
        let mut named_next = false;
        self.0.iter().any(|word| {
            let text = word.to_string_lossy();
            if std::mem::take(&mut named_next) {
                return is_used(&text);
            }
            if text.trim_start_matches('-') == OPTION {
                named_next = true;
                return false;
            }
            let Some((_, rest)) = text.split_once(OPTION) else {
                return false;
            };
            // A comma ends it, two are one; of what is written otherwise nothing is known.
            match rest.strip_prefix('=') {
                Some(rest) => is_used(&first_value(rest)),
                None => true,
            }
        })
    }

    /// Refuses what a restore does itself.
    pub(crate) fn check(&self) -> Result<(), QemuError> {
        for (option, why) in [
            ("incoming", "it is added here"),
            ("loadvm", "the guest comes from the checkpoint"),
            (
                "daemonize",
                "this command waits for QEMU: run it in the background itself",
            ),
        ] {
            if self.has(option) {
                return Err(QemuError::not_this(format!(
                    "QEMU's command line has -{option}: leave it out, {why}"
                )));
            }
        }
        Ok(())
    }
}

/// Up to the comma that ends an option's value.
fn first_value(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text.chars().peekable();
    while let Some(one) = rest.next() {
        if one == ',' && rest.next_if_eq(&',').is_none() {
            break;
        }
        out.push(one);
    }
    out
}

/// Whether a file may hold something; a folder, in which QEMU makes a new file, does not.
fn is_used(path: &str) -> bool {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => false,
        Ok(found) => !found.is_file() || found.blocks() > 0,
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// A QEMU that waits for a guest, or runs it.
#[derive(Debug)]
pub(crate) struct Launched {
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
    listening: Option<JoinHandle<()>>,
    /// Ends it if this process dies before it has its guest.
    guard: Option<Guard>,
}

impl Launched {
    /// Starts `program` with `words` and what makes it wait for a guest; itself and its monitor. Without
    /// `guard` it would wait for ever if this process died.
    pub(crate) fn start(
        program: &OsStr,
        words: &[OsString],
        more: &[OsString],
        guard: Option<Command>,
    ) -> Result<(Self, Qmp), QemuError> {
        let system = |action| {
            move |error: rustix::io::Errno| QemuError::System {
                action,
                source: error.into(),
            }
        };
        let pair = |flags| socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        // The one that QEMU gets must outlive its start; no other program is started here.
        let (ours, theirs) = pair(SocketFlags::empty()).map_err(system("socketpair"))?;
        rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).map_err(system("fcntl"))?;
        let mut command = Command::new(program);
        command.args(words).args(more);
        command.args(["-incoming", "defer", "-chardev"]);
        command.arg(format!("socket,id={MONITOR},fd={}", theirs.as_raw_fd()));
        command.args(["-mon", &format!("chardev={MONITOR},mode=control")]);
        let child = command.stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(|source| QemuError::Io {
            action: "starting",
            path: program.into(),
            source,
        })?;
        drop(theirs);
        let said = Arc::new(Mutex::new(Vec::new()));
        let from = child.stderr.take();
        let mut new = Self {
            child,
            said: Arc::clone(&said),
            listening: None,
            guard: None,
        };
        if let Some(from) = from {
            let listening = Builder::new().spawn(move || listen(from, &said));
            new.listening = Some(listening.map_err(QemuError::system("starting a thread"))?);
        }
        if let Some(command) = guard {
            let qemu = guard::descriptor(new.pid());
            match qemu.and_then(|qemu| Guard::start(command, &qemu)) {
                Ok(guard) => new.guard = Some(guard),
                Err(error) => return Err(new.blame(error)),
            }
        }
        let socket = UnixStream::from(ours);
        match Qmp::over(socket, START) {
            Ok(qmp) => Ok((new, qmp)),
            Err(error) => Err(new.blame(error)),
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// It has its guest, and needs nobody any more.
    pub(crate) fn is_whole(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.done();
        }
    }

    /// Ends QEMU. If it had ended by itself, that is the error, with what it said.
    pub(crate) fn blame(&mut self, error: QemuError) -> QemuError {
        let blamed = self.ended(error);
        self.is_whole();
        blamed
    }

    fn ended(&mut self, error: QemuError) -> QemuError {
        if matches!(error, QemuError::Gone { .. }) {
            // It closes its monitor before it ends.
            for _ in 0..50 {
                if let Ok(Some(status)) = self.child.try_wait() {
                    self.heard();
                    return QemuError::Ended {
                        status,
                        said: self.said(),
                    };
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.heard();
        match ended {
            // It was ended for what cannot be read.
            Ok(Some(status)) if !matches!(error, QemuError::Pages(_)) => QemuError::Ended {
                status,
                said: self.said(),
            },
            _ => error,
        }
    }

    fn heard(&mut self) {
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
    }

    fn said(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        match String::from_utf8_lossy(&said).trim() {
            "" => "it said nothing".into(),
            text => shortened(text),
        }
    }

    /// Waits until QEMU ends.
    pub(crate) fn wait(mut self) -> Result<ExitStatus, QemuError> {
        let status = self
            .child
            .wait()
            .map_err(QemuError::system("waiting for QEMU"))?;
        self.heard();
        Ok(status)
    }
}

/// Passes on what QEMU says, and keeps the last of it.
fn listen(mut from: impl Read, said: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 1024];
    while let Ok(got) = from.read(&mut buffer) {
        let Some(new) = buffer.get(..got).filter(|new| !new.is_empty()) else {
            return;
        };
        let _ = std::io::stderr().lock().write_all(new);
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        said.extend_from_slice(new);
        if let Some(over) = said.len().checked_sub(MAX_SAID) {
            said.drain(..over);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Launched, Words};
    use crate::error::QemuError;
    use sonicshot::Gpa;
    use sonicshot_serve::ServeError;
    use std::ffi::OsString;
    use std::process::Command;
    use std::sync::Arc;

    #[test]
    fn what_is_done_here_is_refused() {
        let words = |text: &str| -> Vec<OsString> { text.split(' ').map(Into::into).collect() };
        for (text, good) in [
            ("-m 512M -S", true),
            ("-incoming defer", false),
            ("--incoming defer", false),
            ("-m 1G -daemonize", false),
            ("-loadvm x", false),
            ("-name incoming", true),
        ] {
            assert_eq!(Words(&words(text)).check().is_ok(), good, "{text}");
        }
    }

    #[test]
    fn memory_in_a_file_that_was_used_is_told() {
        let file = tempfile::NamedTempFile::with_prefix("a,b").unwrap();
        let name = file.path().to_str().unwrap().replace(',', ",,");
        let object = |text: &str| vec![OsString::from("-object"), text.into()];
        let backend = |path: &str| object(&format!("memory-backend-file,mem-path={path},share=on"));
        let cases = |used| {
            [
                (backend(&name), used),
                (vec!["-mem-path".into(), file.path().into()], used),
                (backend("/no/such/file"), false),
                (backend("/tmp"), false),
                (backend("/dev/null"), true),
                (
                    object("{\"qom-type\": \"memory-backend-file\", \"mem-path\": \"x\"}"),
                    true,
                ),
                (object("memory-backend-ram,id=x"), false),
            ]
        };
        for used in [false, true] {
            if used {
                std::fs::write(file.path(), "x").unwrap();
            }
            for (words, expected) in cases(used) {
                assert_eq!(Words(&words).have_used_file(), expected, "{words:?}");
            }
        }
    }

    #[test]
    fn of_what_it_says_the_last_is_kept() {
        let said = std::sync::Mutex::new(Vec::new());
        let all: Vec<u8> = (0..super::MAX_SAID + 10)
            .map(|_| b'.')
            .chain(*b"end\n")
            .collect();
        super::listen(all.as_slice(), &said);
        let said = said.into_inner().unwrap();
        assert_eq!(said.len(), super::MAX_SAID);
        assert!(said.ends_with(b"end\n"));
    }

    #[test]
    fn a_program_that_ends_is_told_with_what_it_said() {
        let start = |program: &str, words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(Into::into).collect();
            Launched::start(program.as_ref(), &words, &[], None).unwrap_err()
        };
        let error = start("/bin/sh", &["-c", "echo no such machine >&2; exit 3", "sh"]);
        match error {
            QemuError::Ended { status, said } => {
                assert_eq!((status.code(), said.as_str()), (Some(3), "no such machine"));
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            start("/no/such/program", &[]),
            QemuError::Io { .. }
        ));
    }

    #[test]
    fn what_cannot_be_read_is_the_error_though_qemu_was_ended_for_it() {
        let gone = || {
            let mut child = Command::new("/bin/sh");
            let mut child = child.args(["-c", "exit 3"]).spawn().unwrap();
            child.wait().unwrap();
            Launched {
                child,
                said: Arc::default(),
                listening: None,
                guard: None,
            }
        };
        let pages = QemuError::Pages(ServeError::NotInSnapshot { at: Gpa::ZERO });
        assert!(matches!(gone().blame(pages), QemuError::Pages(_)));
        let other = QemuError::not_this("something else");
        assert!(matches!(gone().blame(other), QemuError::Ended { .. }));
    }
}
