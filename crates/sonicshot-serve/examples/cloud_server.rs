//! A Cloud Hypervisor restored page by page by another program: what `sonicshot serve
//! --cloud-hypervisor` is, without its options.
//!
//! ```console
//! $ ch-remote --api-socket /run/cloud.api receive-migration \
//!       receiver_url=unix:/run/cloud.pages,memory_mode=postcopy &
//! $ cloud_server /run/cloud.pages template.sonic
//! Complete
//! ```

use sonicshot_offline::OpenOptions;
use sonicshot_serve::{
    CloudHypervisor, CloudOptions, Migration, Prefetch, Watcher, open_source, watch,
};
use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let (socket, snapshot) = match args.as_slice() {
        // This program again, which ends the virtual machine if it dies.
        [only] if only == "watch" => {
            watch(&std::io::stdin())?;
            return Ok(());
        }
        [socket, snapshot] => (Path::new(socket), Path::new(snapshot)),
        _ => return Err("usage: cloud_server SOCKET SNAPSHOT".into()),
    };
    let mut watcher = Command::new(std::env::current_exe()?);
    watcher.arg("watch");
    let mut options = CloudOptions::default();
    // It asks for all of it, sooner or later.
    options.vm.prefetch = Prefetch::Everything;
    let metrics = Arc::clone(&options.vm.metrics);
    let opened = open_source(snapshot, &OpenOptions::new(), 256 << 20, metrics)?;
    let migration = Migration::open(snapshot)?;
    let watcher = Some(Arc::new(Watcher::start(watcher)?));
    let cloud = CloudHypervisor::new(opened.source, migration, options, watcher)?;
    println!("{:?}", cloud.restore(socket)?);
    Ok(())
}
