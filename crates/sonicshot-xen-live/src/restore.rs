//! What `xl restore` does, of a compressed image too.

use crate::LiveError;
use crate::copied::PIECE;
use crate::xl::Xl;
use rustix::pipe::fcntl_setpipe_size;
use sonicshot_offline::packed::{self, ImageCompression};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::process::Stdio;

/// What `xl` calls its own standard input.
const STDIN: &str = "/proc/self/fd/0";

/// Has `xl` restore the image at `path`, which [`save`](crate::save) may have compressed. `options`
/// go to `xl restore`, before its file.
///
/// # Errors
/// [`LiveError`] if the image cannot be read or decompressed, or what `xl` says.
pub fn restore(path: &Path, paused: bool, options: &[String]) -> Result<(), LiveError> {
    let reading = |source| LiveError::Io {
        action: "reading",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(reading)?;
    let mut start = [0; 4];
    file.read_exact(&mut start).map_err(reading)?;
    file.rewind().map_err(reading)?;
    let mut words = vec!["restore"];
    if paused {
        words.push("-p");
    }
    words.extend(options.iter().map(String::as_str));
    words.push(STDIN);
    let mut xl = Xl::new(&words)?;
    match packed::compression_of(start) {
        None => {
            xl.command.stdin(file);
            xl.run().map(drop)
        }
        Some(how) => unpack(xl, how, &file, reading),
    }
}

/// Gives `xl` the image decompressed, by a pipe.
fn unpack(
    mut xl: Xl,
    how: ImageCompression,
    file: &File,
    reading: impl Fn(io::Error) -> LiveError,
) -> Result<(), LiveError> {
    xl.command.stdin(Stdio::piped());
    let child = xl.command.spawn();
    let mut child = child.map_err(|source| xl.cannot_run(source))?;
    let unpacked = match child.stdin.take() {
        // Closed at the end of it, so that xl does not wait for more.
        Some(mut to) => {
            // Else it holds less, and whoever reads and who writes are woken more often.
            let _ = fcntl_setpipe_size(&to, PIECE);
            packed::decompress(how, file, &mut to)
        }
        None => Err(io::ErrorKind::BrokenPipe.into()),
    };
    let status = child.wait();
    let status = status.map_err(|source| xl.cannot_run(source))?;
    match unpacked {
        // It had enough: what it says counts.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(reading(error)),
        _ => xl.ended(status).map(drop),
    }
}
