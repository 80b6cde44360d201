//! `sonicshot convert`.

use crate::args::{ConvertArgs, ConvertTo};
use crate::error::CliError;
use crate::inputs::Input;
use crate::json::{ConvertReport, OfConvert, Version, line, path, word};
use crate::output::overwrite;
use crate::report::{layout_arg, lines, mib, say, size, tell_notes};
use sonicshot_dump::DumpError;
use sonicshot_offline::{Converted, Target, Template, WriteOptions};
use std::path::Path;
use std::time::Instant;

pub(crate) fn run(args: &ConvertArgs) -> Result<(), CliError> {
    let started = Instant::now();
    check_output(args)?;
    let converted = convert(args, &target(args)?)?;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(args, &converted, seconds);
    } else {
        print_summary(args, &converted, seconds);
    }
    Ok(())
}

/// Before the work, not after it.
fn check_output(args: &ConvertArgs) -> Result<(), CliError> {
    if args.output == Path::new("-") {
        let what = "what is converted goes to a file, not to standard output: -o OUT";
        return Err(CliError::Usage { what: what.into() });
    }
    if !args.force && args.output.exists() {
        let path = args.output.clone();
        return Err(DumpError::Exists { path }.into());
    }
    Ok(())
}

fn target(args: &ConvertArgs) -> Result<Target, CliError> {
    if args.template.is_some() && args.to != ConvertTo::Xl {
        let what = "--template is for --to xl";
        return Err(CliError::Usage { what: what.into() });
    }
    if args.compress.is_some() && args.to != ConvertTo::Kdump {
        let what = "--compress is for --to kdump";
        return Err(CliError::Usage { what: what.into() });
    }
    Ok(match args.to {
        ConvertTo::Raw => Target::Raw,
        ConvertTo::Elf => Target::Elf,
        ConvertTo::Kdump => Target::Kdump(args.compress.map(Into::into).unwrap_or_default()),
        ConvertTo::Sonic => Target::Checkpoint,
        ConvertTo::MappedRam => Target::MappedRam,
        ConvertTo::Stream => Target::Stream,
        ConvertTo::Xl => Target::Xl(args.template.as_ref().map(Template::open).transpose()?),
    })
}

fn convert(args: &ConvertArgs, target: &Target) -> Result<Converted, CliError> {
    let Input {
        snapshot, phases, ..
    } = Input::find(&args.file, &args.input, args.json)?;
    let phase = phases.run("converting");
    let options = WriteOptions::new()
        .overwrite(overwrite(args.force))
        .progress(phase.shown());
    let converted = match snapshot.checkpoint()? {
        Some(checkpoint) => checkpoint.convert(target, &args.output, &options)?,
        None => snapshot.convert(target, &args.output, &options)?,
    };
    drop(phase);
    Ok(converted)
}

fn print_json(args: &ConvertArgs, converted: &Converted, seconds: f64) {
    let report = ConvertReport {
        version: Version::default(),
        kind: OfConvert::default(),
        path: path(&args.file),
        output: path(&args.output),
        format: word(converted.format),
        format_name: converted.format.to_string(),
        ram_bytes: converted.layout.bytes(),
        disk_bytes: converted.disk_bytes,
        missing_bytes: converted.missing_bytes,
        missing_mib: mib(converted.missing_bytes),
        for_analysis: converted.for_analysis,
        layout: (args.to == ConvertTo::Raw).then(|| layout_arg(&converted.layout)),
        seconds,
        notes: lines(&converted.notes),
    };
    say!("{}", line(&report));
}

fn print_summary(args: &ConvertArgs, converted: &Converted, seconds: f64) {
    tell_notes(&converted.notes);
    let ram = &converted.layout;
    say!(
        "converted {} of RAM from {}, {} on disk, in {seconds:.2} s",
        size(ram.bytes()),
        converted.format,
        size(converted.disk_bytes)
    );
    if args.to == ConvertTo::Raw && ram.regions().len() > 1 {
        say!("layout: {}", layout_arg(ram));
    }
}
