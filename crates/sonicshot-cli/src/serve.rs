//! `sonicshot serve`.

use crate::args::{PrefetchKind, ServeArgs};
use crate::error::CliError;
use crate::log;
use crate::report::{complain, say, size};
use sonicshot_offline::OpenOptions;
use sonicshot_serve::{
    CloudHypervisor, CloudOptions, KeepOptions, Metrics, Migration, OpenedSource, PageSet,
    Prefetch, Recorder, Restored, Server, ServerOptions, VmOptions, Watcher,
    allow_many_descriptors, check_descriptors, expose, open_source,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

pub(crate) fn run(args: &ServeArgs) -> Result<(), CliError> {
    log::begin();
    let served = serve(args);
    log::end();
    served
}

fn serve(args: &ServeArgs) -> Result<(), CliError> {
    allow_many_descriptors();
    check_descriptors(match args.cloud_hypervisor.len() {
        0 => args.max_vms.map(Into::into),
        all => Some(all),
    })?;
    let metrics = Arc::new(Metrics::default());
    let mut open = OpenOptions::new();
    open.layout.clone_from(&args.layout);
    open.format = args.format;
    open.base.clone_from(&args.base);
    open.disks = args.disks.disks()?;
    // What cannot be restored is told before the work.
    let migration = match args.cloud_hypervisor.as_slice() {
        [] => None,
        _ => Some(Migration::open(&args.file)?),
    };
    let opened = open_source(&args.file, &open, args.cache, Arc::clone(&metrics))?;
    let vm = vm_options(args, &opened, &metrics)?;
    if let Some(address) = &args.metrics {
        expose(address, metrics)?;
    }
    match (migration, &args.socket) {
        (Some(migration), _) => restore(args, opened, migration, vm),
        (None, Some(socket)) => listen(args, socket, opened, vm),
        (None, None) => Err(CliError::Usage {
            what: "--socket or --cloud-hypervisor is needed".into(),
        }),
    }
}

/// Serves whoever connects.
fn listen(
    args: &ServeArgs,
    socket: &Path,
    opened: OpenedSource,
    vm: VmOptions,
) -> Result<(), CliError> {
    let mut options = ServerOptions::new(socket);
    options.owner = args.owner;
    options.allow.clone_from(&args.allow_uid);
    options.max_vms = args.max_vms.map(Into::into);
    options.record.clone_from(&args.record);
    options.keep = args.keep_fds.as_ref().map(|path| {
        let mut keep = KeepOptions::new(path);
        keep.limit = Duration::from_secs(args.keep_for);
        keep
    });
    options.vm = vm;
    let server = Server::bind(opened.source, options, Some(watcher()?))?;
    // Who started this may have VMMs connect from now on.
    say!("serving {} at {}", args.file.display(), socket.display());
    Ok(server.run(args.vms.map(Into::into))?)
}

/// Restores those that listen, all at once. One that cannot be does not keep the others.
fn restore(
    args: &ServeArgs,
    opened: OpenedSource,
    migration: Migration,
    vm: VmOptions,
) -> Result<(), CliError> {
    let mut options = CloudOptions::default();
    options.allow.clone_from(&args.allow_uid);
    options.paused = args.paused;
    options.vm = vm;
    let watcher = Arc::new(watcher()?);
    let cloud = CloudHypervisor::new(opened.source, migration, options, Some(watcher))?;
    let one = |path: &PathBuf| match cloud.restore(path) {
        Ok(Restored::Complete) => {
            say!("{} has all of its memory", path.display());
            true
        }
        Ok(_) => {
            complain!("{} ended before it had all of its memory", path.display());
            true
        }
        Err(error) => {
            complain!("{}: {}", path.display(), error.with_causes());
            false
        }
    };
    std::thread::scope(|scope| {
        let threads = args.cloud_hypervisor.iter();
        let threads: Vec<_> = threads
            .map(|path| Builder::new().spawn_scoped(scope, || one(path)))
            .collect();
        let ends: Vec<bool> = threads
            .into_iter()
            .zip(&args.cloud_hypervisor)
            .map(|(thread, path)| match thread {
                Ok(thread) => thread.join().unwrap_or(false),
                Err(error) => {
                    complain!("{}: no thread for it: {error}", path.display());
                    false
                }
            })
            .collect();
        match ends.contains(&false) {
            true => Err(CliError::Reported { code: 1 }),
            false => Ok(()),
        }
    })
}

fn vm_options(
    args: &ServeArgs,
    opened: &OpenedSource,
    metrics: &Arc<Metrics>,
) -> Result<VmOptions, CliError> {
    let layout = opened.source.layout();
    let mut vm = VmOptions::default();
    vm.metrics = Arc::clone(metrics);
    vm.around = args.around;
    let usual = match args.cloud_hypervisor.is_empty() {
        true => PrefetchKind::Set,
        false => PrefetchKind::All,
    };
    let prefetch = args.prefetch.unwrap_or(usual);
    vm.prefetch = match prefetch {
        PrefetchKind::Set => Prefetch::Set,
        PrefetchKind::All => Prefetch::Everything,
        PrefetchKind::None => Prefetch::Nothing,
    };
    let set = match &args.set {
        Some(path) => Some(PageSet::read(path, layout)?),
        // What is to be recorded must be asked for.
        None => opened.set.clone().filter(|_| args.record.is_none()),
    };
    if let Some(set) = set {
        if set.bytes() > layout.bytes() / 2 {
            complain!(
                "warning: the working set has {} of {}: clones will share little",
                size(set.bytes()),
                size(layout.bytes())
            );
        }
        vm.set = Arc::new(set);
    }
    if args.record.is_some() {
        if prefetch == PrefetchKind::All {
            let what = "--record notes what is asked for, of which --prefetch all leaves nothing";
            return Err(CliError::Usage { what: what.into() });
        }
        let limit = Duration::from_secs(args.record_for);
        let max = args.record_max.unwrap_or(u64::MAX);
        let recorder = Recorder::new(limit, max);
        vm.recorder = Some(Arc::new(recorder));
    }
    Ok(vm)
}

/// This program again, to end the virtual machines if this process dies.
fn watcher() -> Result<Watcher, CliError> {
    let program = std::env::current_exe().map_err(|source| CliError::Io {
        action: "looking for",
        path: "this program".into(),
        source,
    })?;
    let mut command = Command::new(program);
    command.arg("serve-watcher");
    Ok(Watcher::start(command)?)
}

/// The other process's work.
pub(crate) fn watch() -> Result<(), CliError> {
    log::begin();
    let ended = sonicshot_serve::watch(&std::io::stdin());
    log::end();
    let ended = ended?;
    if ended > 0 {
        complain!("sonicshot serve died: {ended} virtual machines were ended");
    }
    Ok(())
}
