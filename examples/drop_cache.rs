//! Saves a guest without an application's cache: by the application's word, never by default.
//!
//! ```console
//! $ cargo run --release -p sonicshot-examples --example drop_cache -- \
//!       guest.raw 417 0x7f0000000000-0x7f0040000000
//! cache-server: 262130 pages can go; kept are 12 that are not there, 0 of huge pages, 2 others
//! ```
//!
//! The ranges come from whoever knows them: a server that tells its host where its cache is, and that
//! checks an entry before it believes it, so that one that is zero is a miss. After a restore each page
//! of them is zero.

use sonicshot::checkpoint::{CheckpointInfo, CheckpointWriter, Compression, SaveOptions};
use sonicshot::{DropClasses, GuestMemory};
use sonicshot_dump::{Dump, LayoutSpec};
use sonicshot_vmi::{AnalysisOptions, GuestOptions, GuestOs, LinuxGuest};
use std::error::Error;
use std::fs::File;
use std::ops::Range;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: drop_cache GUEST.raw PID START-END...";
    let (file, pid) = (args.next().ok_or(usage)?, args.next().ok_or(usage)?);
    let pid: u32 = pid.parse()?;
    let ranges = args
        .map(|range| parse(&range))
        .collect::<Result<Vec<_>, _>>()?;

    let memory = Dump::open(&file, Some(&LayoutSpec::Pc))?;
    let guest = LinuxGuest::open(&memory, &GuestOptions::new())?;
    let mut analysis = guest.analyze(&AnalysisOptions::new().zero_pages(false))?;

    let tasks = guest.tasks()?.collect::<Result<Vec<_>, _>>()?;
    let task = tasks
        .iter()
        .find(|task| task.pid == pid)
        .ok_or("no such process")?;
    let process = task.memory.ok_or("the process has no memory of its own")?;
    let given_up = guest.give_up(process, &ranges, analysis.pages())?;
    analysis.give_up(&given_up);

    let plan = analysis.plan(&DropClasses::default());
    let mut info = CheckpointInfo::new(memory.layout().clone(), analysis.pages().page_size());
    info.kernel_release = Some(analysis.facts().release.clone());
    info.architecture = analysis.facts().architecture;
    let out = File::create_new("guest.sonic")?;
    let mut writer = CheckpointWriter::new(out, info, SaveOptions::new(Compression::Lz4))?;
    writer.memory(&memory, analysis.pages(), &plan)?;
    writer.finish()?;
    let kept = given_up.kept();
    println!(
        "{}: {} pages can go; kept are {} that are not there, {} of huge pages, {} others",
        task.name,
        given_up.pages(),
        kept.not_there,
        kept.huge,
        kept.other
    );
    Ok(())
}

/// `START-END`, hexadecimal.
fn parse(range: &str) -> Result<Range<u64>, Box<dyn Error>> {
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
    let (start, end) = range.split_once('-').ok_or("START-END")?;
    Ok(number(start)?..number(end)?)
}
