//! A page server in another program: what `sonicshot serve` is, without its options.
//!
//! ```console
//! $ page_server /run/template.sock template.sonic &
//! $ curl --unix-socket /run/firecracker.sock -X PUT http://localhost/snapshot/load -d '{
//!       "snapshot_path": "vm.state", "resume_vm": true,
//!       "mem_backend": {"backend_type": "Uffd", "backend_path": "/run/template.sock"}}'
//! ```

use sonicshot::checkpoint::CheckpointReader;
use sonicshot_serve::{CheckpointSource, KeepOptions, Server, ServerOptions, Watcher, watch};
use std::error::Error;
use std::process::Command;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let (socket, checkpoint) = match args.as_slice() {
        // This program again, which ends the virtual machines if it dies.
        [only] if only == "watch" => {
            watch(&std::io::stdin())?;
            return Ok(());
        }
        [socket, checkpoint, ..] => (socket, checkpoint),
        _ => return Err("usage: page_server SOCKET CHECKPOINT.sonic [KEEP]".into()),
    };
    let mut watcher = Command::new(std::env::current_exe()?);
    watcher.arg("watch");
    let mut options = ServerOptions::new(socket);
    // Should this program die, the next one that is started so goes on with its virtual machines.
    options.keep = args.get(2).map(KeepOptions::new);
    let metrics = Arc::clone(&options.vm.metrics);
    let checkpoint = CheckpointReader::open(checkpoint)?;
    // At most 256 MiB of decompressed pages, for all virtual machines together.
    let source = CheckpointSource::new(checkpoint, 256 << 20, metrics);
    let server = Server::bind(Arc::new(source), options, Some(Watcher::start(watcher)?))?;
    println!("ready");
    Ok(server.run(None)?)
}
