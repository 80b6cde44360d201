//! The command: mutations of one capture, as many as are wanted.

use super::anatomy::Kind;
use super::capture::Capture;
use super::{Report, Settings, Subject, run};
use sonicshot_vmi::Knowledge;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "mutate [--capture DIR] [--rounds N] [--seconds N] [--threads N] [--seed N] \
    [--kind 'struct page,zone,...'] [--all] [--named TEXT] [--lies N] [--at-least N] \
    [--knowledge types|vmcoreinfo|shape]";

/// Runs the command with the process's arguments.
pub fn main() -> ExitCode {
    match command(std::env::args().skip(1)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn command(args: impl Iterator<Item = String>) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let mut settings = Settings {
        threads: std::thread::available_parallelism().map_or(1, usize::from) as u64,
        ..Settings::default()
    };
    let mut folder = small_capture();
    let mut at_least = 0;
    let mut knowledge = Knowledge::Types;
    let mut args = args;
    while let Some(option) = args.next() {
        if option == "--all" {
            settings.all = true;
            continue;
        }
        let value = args.next().ok_or(USAGE)?;
        match option.as_str() {
            "--capture" => folder = value.into(),
            "--rounds" => settings.rounds = value.parse()?,
            "--seconds" => {
                settings.seconds = Some(value.parse()?);
                settings.rounds = u64::MAX;
            }
            "--threads" => settings.threads = value.parse()?,
            "--seed" => settings.seed = value.parse()?,
            "--lies" => settings.lies = value.parse()?,
            "--knowledge" => {
                let all = [Knowledge::Types, Knowledge::Vmcoreinfo, Knowledge::Shape];
                let found = all.into_iter().find(|level| level.name() == value);
                knowledge = found.ok_or(USAGE)?;
            }
            "--at-least" => at_least = value.parse()?,
            "--named" => settings.named = value,
            "--kind" => {
                for name in value.split(',') {
                    let kind = Kind::ALL.into_iter().find(|kind| kind.to_string() == name);
                    settings.kinds.push(kind.ok_or(USAGE)?);
                }
            }
            _ => return Err(USAGE.into()),
        }
    }
    let capture = Capture::load(&folder)?;
    let mut subject = Subject::new(&capture)?;
    if knowledge != Knowledge::Types {
        subject = subject.knowing(knowledge)?;
    }
    let report = run(&subject, &settings);
    print(&subject, &report);
    let total = report.total();
    if total.tried < at_least {
        return Err(format!("{} mutations, fewer than {at_least}", total.tried).into());
    }
    Ok(total.wrong == 0 && total.panicked == 0 && report.lies.panicked == 0)
}

/// The capture that is in the tree.
pub fn small_capture() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../testdata/guest-6.1-128m"
    ))
}

/// Prints what was tried and what came of it.
pub fn print(subject: &Subject<'_>, report: &Report) {
    println!(
        "{}, by {}: {:?}",
        subject.capture.name,
        subject.knowledge,
        subject.truth.counts()
    );
    println!("kind            tried  no kernel  refused  kept more  unmoved  wrong");
    let line = |name: &str, counts: &super::Counts| {
        println!(
            "{name:14} {:6} {:10} {:8} {:10} {:8} {:6}",
            counts.tried,
            counts.not_opened,
            counts.refused,
            counts.kept_more,
            counts.unmoved,
            counts.wrong + counts.panicked
        );
    };
    for (kind, counts) in &report.single {
        line(&kind.to_string(), counts);
    }
    line("several places", &report.lies);
    for (title, findings) in [
        ("WRONG", &report.findings),
        ("several places that agree", &report.lies_found),
    ] {
        for (key, finding) in findings {
            println!(
                "{title}: {key}: {} mutations, up to {} frames; {}",
                finding.mutations, finding.most_frames, finding.example
            );
        }
    }
    let mut words = BTreeMap::new();
    for (kind, records) in &subject.anatomy.records {
        for record in records {
            *words.entry((kind, record.name)).or_insert(0) += 1;
        }
    }
    if std::env::var_os("SONICSHOT_MUTATE_RECORDS").is_some() {
        for ((kind, name), count) in words {
            println!("{kind}: {} x {count}", subject.anatomy.names[name]);
        }
    }
    let total = report.total();
    println!(
        "{} mutations, wrong drops {}, refused {}, kept-more {}, panics {}; \
         lies in several places {}, wrong drops {}; {} zones walked, {:.1} s",
        total.tried,
        total.wrong,
        total.not_opened + total.refused,
        total.kept_more,
        total.panicked + report.lies.panicked,
        report.lies.tried,
        report.lies.wrong,
        report.zones,
        report.elapsed.as_secs_f64()
    );
}
