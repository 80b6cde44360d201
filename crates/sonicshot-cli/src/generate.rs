//! `sonicshot generate`: what a shell and `man` know of the command.

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::error::CliError;
use crate::output::io;
use clap::CommandFactory;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Writes what completes the command line to standard output.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sonicshot", &mut script);
    to_stdout(&script)
}

/// Writes the manual page to standard output, or a page for each command to a folder.
pub(crate) fn man(args: &ManArgs) -> Result<(), CliError> {
    let Some(folder) = &args.output else {
        let mut page = Vec::new();
        let rendered = clap_mangen::Man::new(Cli::command()).render(&mut page);
        rendered.map_err(io("writing to", Path::new("standard output")))?;
        return to_stdout(&page);
    };
    fs::create_dir_all(folder).map_err(io("creating", folder))?;
    clap_mangen::generate_to(Cli::command(), folder).map_err(io("writing to", folder))
}

fn to_stdout(bytes: &[u8]) -> Result<(), CliError> {
    match std::io::stdout().lock().write_all(bytes) {
        // Its reader wants no more.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(io("writing to", Path::new("standard output"))),
    }
}
