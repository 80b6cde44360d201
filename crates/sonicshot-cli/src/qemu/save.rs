//! `sonicshot qemu save`.

use crate::args::{AfterSaveKind, QemuSaveArgs};
use crate::error::CliError;
use crate::json::{Block, OfQemuSave, PauseParts, PinnedJson, QemuSaveReport, Version, line, path};
use crate::output::{named_overlays, overwrite};
use crate::progress::Phase;
use crate::report::{complain, count, note, percent, say, size};
use sonicshot::checkpoint::SaveOptions;
use sonicshot_qemu_live::{AfterSave, LiveSaveOptions, LiveSaved, PinnedDisk};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;

const DISKS: &str = "the guest's disks are not in it: copy them, or take snapshots of them, as they \
                     were in the pause";

pub(crate) fn save(args: &QemuSaveArgs) -> Result<(), CliError> {
    let mut options = LiveSaveOptions::default();
    options.after = match args.then {
        AfterSaveKind::Resume => AfterSave::Resume,
        AfterSaveKind::Stop => AfterSave::Stop,
        AfterSaveKind::Quit => AfterSave::Quit,
    };
    options.writing = SaveOptions::new(args.compress);
    options.writing.threads = args.threads;
    options.overwrite = overwrite(args.force);
    options.symbols.clone_from(&args.symbols);
    options.max_pause = args.max_pause;
    options.copy_limit = args.copy_limit;
    options.pid = args.pid;
    options.watchdog = Some(this_program("qemu-watchdog")?);
    let overlays = named_overlays(&args.disk)?.into_iter();
    options.disks = overlays
        .map(|(name, path)| (name.to_owned(), path))
        .collect();
    options.disk_hash = args.hash;
    let phase = Phase::begin("saving", args.json);
    options.writing.progress = Some(phase.shown());
    let saved = sonicshot_qemu_live::save(&args.qmp, &args.output, options);
    drop(phase);
    let saved = saved?;
    if args.json {
        say!("{}", line(&report(args, &saved)));
    } else {
        summary(args, &saved);
    }
    Ok(())
}

/// This program again, for the work of a second process.
pub(super) fn this_program(work: &str) -> Result<Command, CliError> {
    let program = std::env::current_exe().map_err(|source| CliError::Io {
        action: "looking for",
        path: "this program".into(),
        source,
    })?;
    let mut command = Command::new(program);
    command.arg(work);
    Ok(command)
}

/// The other process's work.
pub(crate) fn watch() -> Result<(), CliError> {
    // Standard output is the monitor's socket.
    let monitor = std::io::stdout().as_fd().try_clone_to_owned();
    let monitor = UnixStream::from(monitor.map_err(|source| CliError::Io {
        action: "reading",
        path: "standard output".into(),
        source,
    })?);
    if sonicshot_qemu_live::watch(&std::io::stdin(), &monitor)? {
        complain!("sonicshot qemu save died: its guest runs on");
    }
    Ok(())
}

fn report(args: &QemuSaveArgs, saved: &LiveSaved) -> QemuSaveReport {
    let seconds = |time: std::time::Duration| time.as_secs_f64();
    let times = &saved.times;
    let ram = saved.ram.iter().map(|(name, bytes, kind)| Block {
        block: name.to_string(),
        bytes: *bytes,
        kind: kind.to_string(),
    });
    QemuSaveReport {
        version: Version::default(),
        kind: OfQemuSave::default(),
        path: path(&args.output),
        qemu: saved.qemu.to_string(),
        pid: saved.pid,
        machine: saved.machine.clone(),
        ram: ram.collect(),
        kernel_release: saved.release.clone(),
        ram_bytes: saved.ram_bytes,
        dropped_bytes: saved.dropped_bytes,
        file_bytes: saved.stats.file_len,
        found_paused: saved.found_paused,
        before_pause_seconds: seconds(saved.before_pause),
        pause_seconds: saved.paused.map(seconds),
        pause_parts: PauseParts::from([
            ("stop", seconds(times.stop)),
            ("pin", seconds(times.pin)),
            ("devices", seconds(times.devices)),
            ("reread", seconds(times.reread)),
            ("classify", seconds(times.classify)),
            ("copy", seconds(times.copy)),
            ("resume", seconds(times.resume)),
        ]),
        seconds: seconds(saved.took),
        first_look: saved.first_look.as_ref().map(ToString::to_string),
        notes: saved.notes.iter().map(ToString::to_string).collect(),
        disks: disks_text(&saved.disks),
        pinned_disks: saved.disks.iter().map(pinned_json).collect(),
        disk_pages: saved.stats.on_disk,
    }
}

fn pinned_json(disk: &PinnedDisk) -> PinnedJson {
    PinnedJson {
        name: disk.name.clone(),
        base: path(&disk.base),
        overlay: path(&disk.overlay),
    }
}

/// The places of the guest's disks, as text.
fn disks_text(pinned: &[PinnedDisk]) -> String {
    if pinned.is_empty() {
        return DISKS.into();
    }
    let each = pinned.iter().map(|disk| {
        format!(
            "the guest writes to {} since, over {}: keep that, and let nobody write to it",
            disk.overlay.display(),
            disk.base.display()
        )
    });
    each.collect::<Vec<_>>().join("\n")
}

fn summary(args: &QemuSaveArgs, saved: &LiveSaved) {
    for note in &saved.notes {
        note!("{note}");
    }
    if let Some(error) = &saved.first_look {
        note!("the first look, while the guest ran, failed ({error}): the pause was longer");
    }
    let kind = saved.ram.first().map_or("nothing", |(_, _, kind)| kind);
    say!(
        "Linux {} in QEMU {} ({kind}): left out {} of {} ({})",
        saved.release,
        saved.qemu,
        size(saved.dropped_bytes),
        size(saved.ram_bytes),
        percent(saved.dropped_bytes, saved.ram_bytes)
    );
    let pause = match (saved.paused, saved.found_paused) {
        (Some(time), _) => format!("paused for {:.0} ms", time.as_secs_f64() * 1000.0),
        (None, true) => "it was paused and still is".into(),
        (None, false) => "it does not run on".into(),
    };
    say!(
        "saved to {}: {}, {pause}, {:.2} s in all",
        args.output.display(),
        size(saved.stats.file_len),
        saved.took.as_secs_f64()
    );
    if saved.stats.on_disk > 0 {
        say!(
            "{} pages are on the disks, and not stored",
            count(saved.stats.on_disk)
        );
    }
    say!("{}", disks_text(&saved.disks));
}
