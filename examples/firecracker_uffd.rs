//! Restores Firecracker microVMs from a checkpoint, page by page as they are touched.
//!
//! ```console
//! $ firecracker_uffd /run/vm.uffd vm.sonic &
//! $ curl --unix-socket /run/firecracker.sock -X PUT http://localhost/snapshot/load -d '{
//!       "snapshot_path": "vm.state", "resume_vm": true,
//!       "mem_backend": {"backend_type": "Uffd", "backend_path": "/run/vm.uffd"}}'
//! ```
//!
//! Serves one microVM, and ends with it.

use sonicshot::checkpoint::{CheckpointReader, LazyOptions};
use sonicshot_examples::firecracker::serve;
use std::error::Error;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("firecracker_uffd: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(socket), Some(checkpoint), None) = (args.next(), args.next(), args.next()) else {
        return Err("usage: firecracker_uffd SOCKET CHECKPOINT.sonic".into());
    };
    let checkpoint = Arc::new(CheckpointReader::open(checkpoint)?);
    let listener = UnixListener::bind(&socket)?;
    let (stream, _) = listener.accept()?;
    // Nobody else is served, and the next handler can use the name.
    drop(listener);
    std::fs::remove_file(&socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;

    let stats = serve(&stream, checkpoint, LazyOptions::default())?;
    println!(
        "served {} faults; {} MiB on demand, {} MiB in the background, {} MiB given back",
        stats.faults,
        stats.faulted_bytes >> 20,
        stats.prefetched_bytes >> 20,
        stats.removed_bytes >> 20
    );
    Ok(())
}
