//! `sonicshot`: looks into a guest's memory dump, and prunes it.

mod args;
mod attach;
mod convert;
mod demo;
mod error;
mod generate;
mod inputs;
mod inspect;
mod json;
#[cfg(feature = "libvmi")]
mod libvmi;
mod log;
mod output;
mod progress;
mod prune;
mod qemu;
mod report;
mod restore;
mod save;
mod serve;
mod share;
mod symbols;
mod xen;

use args::{Cli, Command, GenerateCommand, QemuCommand, SymbolsCommand, XenCommand};
use clap::Parser;
use error::CliError;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    // A file that grows beyond what the user may write (`ulimit -f`) is an error of the write, in words;
    // without this the signal ends the process. What is started from here has it as it was.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return error::of_command_line(error),
    };
    progress::set(cli.talk.talk());
    let (result, json) = match &cli.command {
        Command::Inspect(args) => (inspect::run(args), args.json),
        Command::Prune(args) => (prune::run(args), args.json),
        Command::Share(args) => (share::run(args), args.json),
        Command::Save(args) => (save::run(args), args.json),
        Command::Restore(args) => (restore::run(args), args.json),
        Command::Verify(args) => (restore::verify(args), args.json),
        Command::Attach(args) => (attach::run(args), args.json),
        Command::Convert(args) => (convert::run(args), args.json),
        Command::Symbols(SymbolsCommand::Make(args)) => (symbols::make(args), args.json),
        Command::Xen(XenCommand::Save(args)) => (xen::save(args), args.json),
        Command::Xen(XenCommand::Restore(args)) => (xen::restore(args), args.json),
        Command::Qemu(QemuCommand::Save(args)) => (qemu::save(args), args.json),
        Command::Qemu(QemuCommand::Restore(args)) => (qemu::restore(args), args.json),
        Command::QemuWatchdog => (qemu::watch(), false),
        #[cfg(feature = "libvmi")]
        Command::LibvmiWatchdog(args) => (libvmi::watch(args), false),
        Command::QemuGuard => (qemu::guard(), false),
        Command::Serve(args) => (serve::run(args), false),
        Command::ServeWatcher => (serve::watch(), false),
        Command::Demo(args) => (demo::run(args), false),
        Command::Generate(GenerateCommand::Completions(args)) => {
            (generate::completions(args), false)
        }
        Command::Generate(GenerateCommand::Man(args)) => (generate::man(args), false),
    };
    let result = result.and_then(|()| match report::output_error() {
        Some(error) => Err(CliError::Io {
            action: "writing to",
            path: "standard output".into(),
            source: error,
        }),
        None => Ok(()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.print(cli.command.input(), json);
            error.exit_code()
        }
    }
}

impl Command {
    /// The file that the command works on, if that is one.
    fn input(&self) -> Option<&Path> {
        match self {
            Self::Inspect(args) => one(&args.files),
            Self::Prune(args) => one(&args.files),
            Self::Share(args) => Some(&args.file),
            Self::Save(args) => args.file.as_deref(),
            Self::Restore(args) => Some(&args.file),
            Self::Verify(args) => Some(&args.file),
            Self::Attach(args) => Some(&args.checkpoint),
            Self::Convert(args) => Some(&args.file),
            Self::Symbols(SymbolsCommand::Make(args)) => one(&args.files),
            Self::Xen(XenCommand::Save(args)) => Some(&args.file),
            Self::Xen(XenCommand::Restore(args)) => Some(&args.file),
            Self::Qemu(QemuCommand::Save(args)) => Some(&args.output),
            Self::Qemu(QemuCommand::Restore(args)) => Some(&args.file),
            _ => None,
        }
    }
}

/// The one file, if it is no more.
fn one(files: &[PathBuf]) -> Option<&Path> {
    match files {
        [one] => Some(one),
        _ => None,
    }
}
