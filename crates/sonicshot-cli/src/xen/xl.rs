//! Xen's own tool.

use crate::error::CliError;
use sonicshot_xen_live::DomainId;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::{Command, ExitStatus, Stdio};

/// A call of `xl`. What it says is kept, and told if it fails.
pub(super) struct Xl {
    pub command: Command,
    words: String,
    output: File,
}

impl Xl {
    pub(super) fn new(words: &[&str]) -> Result<Self, CliError> {
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
    pub(super) fn run(mut self) -> Result<String, CliError> {
        let status = self.command.status();
        let status = status.map_err(|source| self.cannot_run(source))?;
        self.ended(status)
    }

    pub(super) fn cannot_run(&self, source: io::Error) -> CliError {
        cannot_run(&self.words, source)
    }

    /// What it said, once it has ended.
    pub(super) fn ended(mut self, status: ExitStatus) -> Result<String, CliError> {
        let mut output = Vec::new();
        let read = self.output.rewind();
        // Without its words there is still its status.
        let _ = read.and_then(|()| self.output.read_to_end(&mut output));
        let output = String::from_utf8_lossy(&output).into_owned();
        if status.success() {
            return Ok(output);
        }
        Err(CliError::Xl {
            command: format!("xl {}", self.words),
            status,
            output,
        })
    }
}

fn cannot_run(words: &str, source: io::Error) -> CliError {
    CliError::Io {
        action: "running",
        path: format!("xl {words}").into(),
        source,
    }
}

/// The number of the domain that is called `name`, or has that number. dom0 is none to be saved.
pub(super) fn domain_of(name: &str) -> Result<DomainId, CliError> {
    let number = match name.parse() {
        Ok(number) => number,
        Err(_) => {
            let said = Xl::new(&["domid", name])?.run()?;
            let said = said.trim();
            said.parse().map_err(|_| CliError::Usage {
                what: format!("xl does not know the number of {name}: {said}"),
            })?
        }
    };
    if number == 0 {
        let what = "domain 0 cannot be saved: it is the one that saves the others";
        return Err(CliError::Usage { what: what.into() });
    }
    Ok(DomainId::new(number))
}
