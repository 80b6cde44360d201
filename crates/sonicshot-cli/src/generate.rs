//! `sonicshot generate`: what a shell and `man` know of the command.

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::error::CliError;
use crate::output::io;
use clap::CommandFactory;
use sonicshot_dump::{NewFile, Overwrite};
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
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    pages(&command, folder)
}

/// Writes the page of a command, and those of the commands below it. Each appears whole or not at all.
fn pages(command: &clap::Command, folder: &Path) -> Result<(), CliError> {
    let shown = |of: &&clap::Command| !of.is_hide_set();
    for below in command.get_subcommands().filter(shown) {
        pages(below, folder)?;
    }
    let page = clap_mangen::Man::new(command.clone());
    let path = folder.join(page.get_filename());
    let file = NewFile::create_new(&path, Overwrite::Replace)?;
    page.render(&mut file.file())
        .map_err(io("writing to", &path))?;
    file.finish()?;
    Ok(())
}

fn to_stdout(bytes: &[u8]) -> Result<(), CliError> {
    match std::io::stdout().lock().write_all(bytes) {
        // Its reader wants no more.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(io("writing to", Path::new("standard output"))),
    }
}
