//! `sonicshot save`.

use crate::args::{SaveArgs, classes};
use crate::error::CliError;
use crate::inputs::Input;
use crate::json::{self, Disk, DiskSearchJson, OfSave, SaveReport, Stored, Version, line, path};
use crate::output::{blobs, named_images, overwrite};
use crate::progress::Phase;
use crate::report::{by_name, complain, count, lines, mib, percent, say, size, tell_notes};
use sonicshot::checkpoint::{DiskInfo, SaveOptions, SaveStats};
use sonicshot::{PageClass, Tally};
use sonicshot_offline::{
    CheckpointOptions, DiskSearch, Plan, Saved, Whole, check_droppable, check_unused,
};
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Instant;

pub(crate) fn run(args: &SaveArgs) -> Result<(), CliError> {
    #[cfg(feature = "libvmi")]
    if let Some(domain) = args.libvmi.domain() {
        if !args.disk.is_empty() {
            let what = "--disk is for the memory of a guest that was stopped before its disk was pinned: \
                        take that first, as a file";
            return Err(CliError::Usage { what: what.into() });
        }
        return crate::libvmi::save(args, domain);
    }
    let started = Instant::now();
    let drop = classes(&args.drop);
    check_droppable(drop)?;
    if !args.for_analysis {
        check_unused(drop)?;
    }
    let blobs = blobs(&args.blob)?;
    check_output(args)?;
    let mut options = CheckpointOptions::new(writing(args));
    options.vmm.clone_from(&args.vmm);
    for (name, path) in blobs {
        options = options.blob(name, path)?;
    }
    options.disk_hash = args.hash;
    options.scan_disks = args.scan;
    for (name, path) in named_images(&args.disk)? {
        options = options.disk(name, path)?;
    }
    // The command line has it, or a guest that was saved above.
    let file = args.file.as_deref().ok_or_else(|| CliError::Usage {
        what: "there is nothing to save".into(),
    })?;
    let input = Input::find(file, &args.input, args.json)?;
    let saved = if args.keep_all {
        write(args, &Source::Whole(&input.snapshot.keep_all()?), options)?
    } else {
        // What is zero is found as it is written.
        let analyze = args.input.analyze().zero_pages(false);
        let analyze = analyze.file_places(!args.disk.is_empty());
        let analyzed = input.analyze(&analyze)?;
        let plan = match args.for_analysis {
            true => analyzed.plan_for_analysis(drop)?,
            false => analyzed.plan(drop)?,
        };
        write(args, &Source::Planned(&plan), options)?
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        tell(args, &json_report(args, file, &saved, seconds));
        return Ok(());
    }
    tell_notes(&saved.notes);
    tell(args, &summary(&saved, seconds));
    Ok(())
}

impl SaveArgs {
    /// Whether the checkpoint goes to standard output.
    pub(crate) fn to_stdout(&self) -> bool {
        self.output.as_os_str() == "-"
    }
}

/// Before the work, not after it.
pub(crate) fn check_output(args: &SaveArgs) -> Result<(), CliError> {
    if args.to_stdout() {
        if io::stdout().is_terminal() {
            let what = "a checkpoint is not written to a terminal";
            return Err(CliError::Usage { what: what.into() });
        }
    } else if !args.force && args.output.exists() {
        let path = args.output.clone();
        return Err(CliError::Exists { path });
    }
    Ok(())
}

pub(crate) fn writing(args: &SaveArgs) -> SaveOptions {
    let mut options = SaveOptions::new(args.compress);
    options.chunk_size = args.chunk << 10;
    options.threads = args.threads;
    options
}

/// The source of a save.
enum Source<'a> {
    Whole(&'a Whole),
    Planned(&'a Plan<'a>),
}

fn write(
    args: &SaveArgs,
    source: &Source<'_>,
    mut options: CheckpointOptions,
) -> Result<Saved, CliError> {
    let phase = Phase::begin("saving", args.json);
    options.overwrite = overwrite(args.force);
    options.writing.progress = Some(phase.shown());
    let (out, options) = (&args.output, &options);
    let saved = match (source, args.to_stdout()) {
        (Source::Whole(all), false) => all.save(out, options),
        (Source::Whole(all), true) => all.save_to_writer(io::stdout().lock(), options),
        (Source::Planned(plan), false) => plan.save(out, options),
        (Source::Planned(plan), true) => plan.save_to_writer(io::stdout().lock(), options),
    }?;
    drop(phase);
    Ok(saved)
}

/// Says something, where the checkpoint is not.
pub(crate) fn tell(args: &SaveArgs, what: &str) {
    if args.to_stdout() {
        complain!("{what}");
    } else {
        say!("{what}");
    }
}

fn json_report(args: &SaveArgs, input: &Path, saved: &Saved, seconds: f64) -> String {
    let free = free_of(&saved.left_out);
    line(&SaveReport {
        version: Version::default(),
        kind: OfSave::default(),
        path: path(input),
        output: path(&args.output),
        kernel_release: saved.info.kernel_release.clone(),
        compression: args.compress.to_string(),
        disk_bytes: saved.disk_bytes,
        left_out: json::by_name(&saved.left_out),
        for_analysis: saved.info.for_analysis,
        disks: disks_json(&saved.info.disks),
        disk_search: saved.disk_search.as_ref().map(search_json),
        missing_bytes: saved.missing_bytes,
        missing_mib: mib(saved.missing_bytes),
        paused_seconds: None,
        seconds,
        notes: lines(&saved.notes),
        devices: None,
        stored: stats_json(&saved.stats, free, saved.info.page_size.bytes()),
    })
}

/// The search for pages on the disks.
pub(crate) fn search_json(search: &DiskSearch) -> DiskSearchJson {
    DiskSearchJson {
        page_cache_pages: search.page_cache,
        told_pages: search.told,
        looked_at_pages: search.looked_at,
        right_pages: search.right,
        explained_pages: search.explained(),
        streamed_bytes: search.streamed,
    }
}

/// The same for people.
pub(crate) fn search_text(search: &DiskSearch) -> String {
    let (explained, all) = (search.explained(), search.page_cache);
    let told = format!(
        "of {} pages of page cache the guest's records explain {} ({})",
        count(all),
        count(explained),
        percent(explained, all)
    );
    match search.streamed {
        Some(bytes) => format!("\n{told}; {} of disks were looked through", size(bytes)),
        None => format!("\n{told}; the disks were not looked through"),
    }
}

/// The disks that pages are on.
pub(crate) fn disks_json(disks: &[DiskInfo]) -> Vec<Disk> {
    let disks = disks.iter().map(|disk| Disk {
        name: disk.name.clone(),
        bytes: disk.bytes,
        hash: disk.hash.name().to_string(),
        marks: disk
            .marks
            .iter()
            .map(|mark| mark.kind.name().to_string())
            .collect(),
    });
    disks.collect()
}

/// The classes of free pages.
pub(crate) const FREE: [PageClass; 2] = [PageClass::FreeBuddy, PageClass::FreePcp];

/// The number of the left out pages that are free.
pub(crate) fn free_of(left_out: &[(&'static str, u64)]) -> u64 {
    let is_free = |name| FREE.iter().any(|class| class.name() == name);
    let free = left_out.iter().filter(|(name, _)| is_free(*name));
    free.map(|(_, pages)| *pages).sum::<Tally>().get()
}

/// The content of a checkpoint; of the pages that were left out, `free` are free.
pub(crate) fn stats_json(stats: &SaveStats, free: u64, page_size: u64) -> Stored {
    Stored {
        page_size,
        data_pages: stats.data,
        duplicate_pages: stats.duplicate,
        zero_pages: stats.zero,
        fill_pages: stats.fill,
        left_out_pages: stats.free,
        free_pages: free,
        absent_pages: stats.absent,
        disk_pages: stats.on_disk,
        stored_bytes: stats.stored_bytes,
        file_bytes: stats.file_len,
        runs: stats.runs,
        digest: format!("{:032x}", stats.digest),
    }
}

fn summary(saved: &Saved, seconds: f64) -> String {
    let total = saved.info.layout.bytes();
    let search = saved.disk_search.as_ref().map(search_text);
    let stats = stats_text(&saved.stats, total, &saved.left_out, seconds);
    [Some(stats), search].into_iter().flatten().collect()
}

/// The content of a checkpoint of so many bytes of RAM, for people.
pub(crate) fn stats_text(
    stats: &SaveStats,
    total: u64,
    left_out: &[(&'static str, u64)],
    seconds: f64,
) -> String {
    let on_disks = match stats.on_disk {
        0 => String::new(),
        pages => format!(", {} on disks", count(pages)),
    };
    format!(
        "saved {} of RAM as {} ({}) in {seconds:.2} s\n\
         stored {} pages; left out {}, and what need not be stored: {} zero, {} filled with one \
         word, {} twice there{on_disks}",
        size(total),
        size(stats.file_len),
        percent(stats.file_len, total),
        count(stats.data),
        match by_name(left_out) {
            none if none.is_empty() => "nothing".into(),
            left_out => left_out,
        },
        count(stats.zero),
        count(stats.fill),
        count(stats.duplicate),
    )
}
