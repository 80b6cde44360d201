//! `sonicshot qemu restore`.

use crate::args::QemuRestoreArgs;
use crate::error::CliError;
use crate::json::{OfQemuRestore, QemuRestoreReport, Version, line, path};
use crate::progress::{Phase, ProgressMode, talk};
use crate::qemu::save::this_program;
use crate::report::{complain, note, say};
use sonicshot_qemu_live::{LiveRestoreOptions, LiveRestored, RestoreHow};

pub(crate) fn restore(args: &QemuRestoreArgs) -> Result<(), CliError> {
    let Some((program, words)) = args.qemu.split_first() else {
        let what = "no QEMU to start: sonicshot qemu restore X.sonic -- qemu-system-x86_64 ...";
        return Err(CliError::Usage { what: what.into() });
    };
    let mut options = LiveRestoreOptions::default();
    options.how = match (&args.map, args.eager) {
        (Some(file), _) => RestoreHow::Map(file.clone()),
        (None, true) => RestoreHow::Eager,
        (None, false) => RestoreHow::Postcopy,
    };
    let disks = args.disks.disks()?;
    options.disks = disks.open()?;
    options.moved_on = disks.moved_on;
    options.guard = Some(this_program("qemu-guard")?);
    let phase = shown(&options.how).then(|| Phase::begin("restoring", args.json));
    options.progress = phase.as_ref().map(Phase::shown);
    let restored = sonicshot_qemu_live::restore(&args.file, program, words, options)?;
    drop(phase);
    tell(args, &restored);
    let status = restored.wait()?;
    if status.success() {
        return Ok(());
    }
    // It has said itself what went wrong.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Err(CliError::Reported {
        code: code.unwrap_or(1),
    })
}

/// Whether it is shown how far the restore is: not over the console of a guest that may run already,
/// unless that was asked for.
fn shown(how: &RestoreHow) -> bool {
    *how != RestoreHow::Postcopy || talk().mode != ProgressMode::Auto
}

/// The work of a second process.
pub(crate) fn guard() -> Result<(), CliError> {
    // Standard output is a descriptor of QEMU's process.
    if sonicshot_qemu_live::guard(&std::io::stdin(), &std::io::stdout())? {
        complain!("sonicshot qemu restore died before its guest had all pages: QEMU was ended");
    }
    Ok(())
}

/// On standard error: standard output may be the guest's console.
fn tell(args: &QemuRestoreArgs, restored: &LiveRestored) {
    let seconds = restored.took.as_secs_f64();
    let made = restored.made.map(|time| time.as_secs_f64());
    if args.json {
        let report = QemuRestoreReport {
            version: Version::default(),
            kind: OfQemuRestore::default(),
            path: path(&args.file),
            qemu: restored.qemu.to_string(),
            pid: restored.pid(),
            how: restored.how.to_owned(),
            why: restored.why.clone(),
            paused: restored.paused,
            ready_seconds: restored.ready.as_secs_f64(),
            seconds,
            raw_file_seconds: made,
        };
        say!("{}", line(&report));
        return;
    }
    if let Some(time) = made {
        complain!("made the raw file in {time:.2} s");
    }
    let state = if restored.paused { "is paused" } else { "runs" };
    if let Some(why) = &restored.why {
        note!("not by postcopy, all memory was put in place first: {why}");
    }
    complain!(
        "restored {} in QEMU {} ({}) in {:.2} s, all of it in {seconds:.2} s: it {state}",
        args.file.display(),
        restored.qemu,
        restored.how,
        restored.ready.as_secs_f64()
    );
}
