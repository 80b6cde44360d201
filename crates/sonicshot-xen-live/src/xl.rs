//! Xen's own tool.

use crate::{DomainId, LiveError};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::{Command, ExitStatus, Stdio};

/// A call of `xl`. What it says is kept, and told if it fails.
pub(crate) struct Xl {
    pub command: Command,
    words: String,
    output: File,
}

impl Xl {
    pub(crate) fn new(words: &[&str]) -> Result<Self, LiveError> {
        let words_of = words.join(" ");
        let failed = |source| cannot_run(&words_of, source);
        // A pipe would have to be emptied while it runs.
        let output = tempfile::tempfile().map_err(failed)?;
        let mut command = Command::new("xl");
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output.try_clone().map_err(failed)?);
        Ok(Self {
            command,
            words: words_of,
            output,
        })
    }

    /// Runs it to its end. Returns what it said.
    pub(crate) fn run(mut self) -> Result<String, LiveError> {
        let status = self.command.status();
        let status = status.map_err(|source| self.cannot_run(source))?;
        self.ended(status)
    }

    pub(crate) fn cannot_run(&self, source: io::Error) -> LiveError {
        cannot_run(&self.words, source)
    }

    /// Its messages, once it has ended.
    pub(crate) fn ended(mut self, status: ExitStatus) -> Result<String, LiveError> {
        let mut output = Vec::new();
        let read = self.output.rewind();
        // Without its words there is still its status.
        let _ = read.and_then(|()| self.output.read_to_end(&mut output));
        let output = String::from_utf8_lossy(&output).into_owned();
        if status.success() {
            return Ok(output);
        }
        Err(LiveError::Xl {
            command: format!("xl {}", self.words),
            status,
            output,
        })
    }
}

fn cannot_run(words: &str, source: io::Error) -> LiveError {
    LiveError::Io {
        action: "running",
        path: format!("xl {words}").into(),
        source,
    }
}

impl DomainId {
    /// The domain that is called `name`, or has that number, as `xl` knows it. The one that saves
    /// the others is none.
    ///
    /// # Errors
    /// [`LiveError::NoNumber`], [`LiveError::IsDom0`], or why `xl` does not tell.
    pub fn find(name: &str) -> Result<Self, LiveError> {
        let number = match name.parse() {
            Ok(number) => number,
            Err(_) => {
                let said = Xl::new(&["domid", name])?.run()?;
                let said = said.trim();
                said.parse().map_err(|_| LiveError::NoNumber {
                    name: name.into(),
                    said: said.into(),
                })?
            }
        };
        if number == 0 {
            return Err(LiveError::IsDom0);
        }
        Ok(Self::new(number))
    }
}
