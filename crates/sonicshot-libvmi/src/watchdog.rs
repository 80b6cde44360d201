//! A second process that lets the guest run on if the one that paused it is killed.
//!
//! It waits for what comes through its standard input: nothing more while the guest is paused, one
//! byte when that has run on. If the input ends without it, the process that paused the guest is gone,
//! and the other one opens the guest and resumes it. KVM's introspection resumes a guest by itself
//! when a connection ends, Xen does not.

use crate::instance::{Instance, LibVmi};
use crate::{Domain, LibVmiError};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

const DONE: u8 = b'D';

/// The end of the process that pauses.
#[derive(Debug)]
pub(crate) struct Watchdog {
    child: Child,
    input: ChildStdin,
}

impl Watchdog {
    /// Starts `command`, which must call [`watch`] and do nothing else. From then on the guest may be
    /// paused.
    pub(crate) fn start(mut command: Command) -> Result<Self, LibVmiError> {
        let failed = |source| LibVmiError::Watchdog {
            action: "starting it",
            source,
        };
        // A group of its own: what ends the pausing process from a terminal does not end it.
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let input = child.stdin.take();
        let input = input.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { child, input })
    }

    /// The guest runs on, as far as LibVMI says; else the other process is to try.
    pub(crate) fn end(mut self, resumed: bool) {
        if resumed {
            // If it cannot be told, the other process resumes what runs, which does nothing.
            let _ = self.input.write_all(&[DONE]);
        }
        drop(self.input);
        let _ = self.child.wait();
    }
}

/// Waits until the guest that another process has paused runs on, or that process is gone, and then
/// resumes it. `input` must be what that process writes to. Returns whether it was needed.
///
/// # Errors
/// [`LibVmiError`] if the guest cannot be opened or resumed.
pub fn watch(
    mut input: impl Read,
    library: impl FnOnce() -> Result<LibVmi, LibVmiError>,
    domain: &Domain,
) -> Result<bool, LibVmiError> {
    let mut said = [0];
    loop {
        match input.read(&mut said) {
            Ok(1) if said == [DONE] => return Ok(false),
            Ok(1) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    let instance = Instance::open(&library()?, domain)?;
    match instance.resume() {
        true => Ok(true),
        false => Err(LibVmiError::Resume {
            domain: domain.clone(),
        }),
    }
}
