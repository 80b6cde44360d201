//! `sonicshot serve`.

use crate::args::{PrefetchKind, ServeArgs};
use crate::error::CliError;
use crate::report::{complain, say, size};
use sonicshot_offline::OpenOptions;
use sonicshot_serve::{
    Metrics, OpenedSource, PageSet, Prefetch, Recorder, Server, ServerOptions, Watcher,
    allow_many_descriptors, expose, open_source,
};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::filter::LevelFilter;

pub(crate) fn run(args: &ServeArgs) -> Result<(), CliError> {
    log(args.verbose);
    allow_many_descriptors();
    let metrics = Arc::new(Metrics::default());
    let mut open = OpenOptions::new();
    open.layout.clone_from(&args.layout);
    open.format = args.format;
    open.base.clone_from(&args.base);
    let opened = open_source(&args.file, &open, args.cache, Arc::clone(&metrics))?;
    let options = options(args, &opened, &metrics)?;
    if let Some(address) = &args.metrics {
        expose(address, metrics)?;
    }
    let server = Server::bind(opened.source, options, Some(watcher()?))?;
    // Who started this may have VMMs connect from now on.
    say!(
        "serving {} at {}",
        args.file.display(),
        args.socket.display()
    );
    Ok(server.run(args.vms.map(Into::into))?)
}

fn options(
    args: &ServeArgs,
    opened: &OpenedSource,
    metrics: &Arc<Metrics>,
) -> Result<ServerOptions, CliError> {
    let layout = opened.source.layout();
    let mut options = ServerOptions::new(&args.socket);
    options.owner = args.owner;
    options.allow.clone_from(&args.allow_uid);
    options.max_vms = args.max_vms.into();
    options.vm.metrics = Arc::clone(metrics);
    options.vm.around = args.around;
    options.vm.prefetch = match args.prefetch {
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
        options.vm.set = Arc::new(set);
    }
    if let Some(path) = &args.record {
        if args.prefetch == PrefetchKind::All {
            let what = "--record notes what is asked for, of which --prefetch all leaves nothing";
            return Err(CliError::Usage { what: what.into() });
        }
        let limit = Duration::from_secs(args.record_for);
        let max = args.record_max.unwrap_or(u64::MAX);
        let recorder = Recorder::new(limit, max);
        options.vm.recorder = Some(Arc::new(recorder));
        options.record = Some(path.clone());
    }
    Ok(options)
}

fn log(verbose: bool) {
    let level = if verbose {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr);
    builder.with_ansi(false).with_max_level(level).init();
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
    let ended = sonicshot_serve::watch(&std::io::stdin())?;
    if ended > 0 {
        complain!("sonicshot serve died: {ended} virtual machines were ended");
    }
    Ok(())
}
