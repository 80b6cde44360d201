//! The parts that every output has in common.

use crate::error::CliError;
use crate::progress::talk;
use crate::report::note;
use sonicshot_dump::Overwrite;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// The meaning of `--force`.
pub(crate) fn overwrite(force: bool) -> Overwrite {
    if force {
        Overwrite::Replace
    } else {
        Overwrite::Refuse
    }
}

/// The operating system's error while `action` was done.
pub(crate) fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> CliError {
    move |source| CliError::Io {
        action,
        path: path.into(),
        source,
    }
}

/// `NAME=FILE` of each `--blob` that is to be read. One may be a pipe, which is waited for until somebody
/// writes to it: where somebody looks on, or with `--verbose`, that is told.
pub(crate) fn blobs(args: &[String]) -> Result<Vec<(&str, PathBuf)>, CliError> {
    let blobs = named_files(args)?;
    for (_, path) in &blobs {
        let is_pipe = fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
        if is_pipe && (talk().verbose || io::stderr().is_terminal()) {
            note!(
                "{} is a pipe: it is waited for until somebody writes to it",
                path.display()
            );
        }
    }
    Ok(blobs)
}

/// `NAME=FILE` of each `--blob`.
pub(crate) fn named_files(args: &[String]) -> Result<Vec<(&str, PathBuf)>, CliError> {
    named(args, "NAME=FILE")
}

/// `NAME=IMAGE` of each `--disk`.
pub(crate) fn named_images(args: &[String]) -> Result<Vec<(&str, PathBuf)>, CliError> {
    named(args, "NAME=IMAGE")
}

/// `NAME=OVERLAY` of each `--disk` of a guest that runs.
pub(crate) fn named_overlays(args: &[String]) -> Result<Vec<(&str, PathBuf)>, CliError> {
    named(args, "NAME=OVERLAY")
}

fn named<'a>(args: &'a [String], form: &str) -> Result<Vec<(&'a str, PathBuf)>, CliError> {
    args.iter()
        .map(|arg| match arg.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name, file.into())),
            _ => Err(CliError::Usage {
                what: format!("`{arg}` is no {form}"),
            }),
        })
        .collect()
}
