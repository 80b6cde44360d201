//! `sonicshot xen restore`.

use super::xl::Xl;
use crate::args::XenRestoreArgs;
use crate::error::CliError;
use crate::report::say;
use serde_json::json;
use sonicshot_offline::packed::{self, ImageCompression};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::Stdio;
use std::time::Instant;

/// What `xl` calls its own standard input.
const STDIN: &str = "/proc/self/fd/0";

pub(crate) fn restore(args: &XenRestoreArgs) -> Result<(), CliError> {
    let reading = |source| CliError::Io {
        action: "reading",
        path: args.file.clone(),
        source,
    };
    let started = Instant::now();
    let mut file = File::open(&args.file).map_err(reading)?;
    let mut start = [0; 4];
    file.read_exact(&mut start).map_err(reading)?;
    file.rewind().map_err(reading)?;
    let how = packed::compression_of(start);
    let mut words = vec!["restore"];
    if args.pause {
        words.push("-p");
    }
    words.extend(args.xl.iter().map(String::as_str));
    words.push(STDIN);
    let mut xl = Xl::new(&words)?;
    match how {
        None => {
            xl.command.stdin(file);
            xl.run()?;
        }
        Some(how) => unpack(xl, how, &file).map_err(|error| match error {
            Unpack::Image(source) => reading(source),
            Unpack::Xl(error) => error,
        })?,
    }
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        say!(
            "{}",
            json!({"path": args.file.display().to_string(), "seconds": seconds})
        );
    } else {
        say!("restored {} in {seconds:.2} s", args.file.display());
    }
    Ok(())
}

enum Unpack {
    Image(io::Error),
    Xl(CliError),
}

/// Gives `xl` the image decompressed, by a pipe.
fn unpack(mut xl: Xl, how: ImageCompression, file: &File) -> Result<(), Unpack> {
    xl.command.stdin(Stdio::piped());
    let child = xl.command.spawn();
    let mut child = child.map_err(|source| Unpack::Xl(xl.cannot_run(source)))?;
    let unpacked = match child.stdin.take() {
        // Closed at the end of it, so that xl does not wait for more.
        Some(mut to) => packed::decompress(how, file, &mut to),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    };
    let status = child.wait();
    let status = status.map_err(|source| Unpack::Xl(xl.cannot_run(source)))?;
    match unpacked {
        // It had enough: what it says counts.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Unpack::Image(error)),
        _ => xl.ended(status).map(drop).map_err(Unpack::Xl),
    }
}
