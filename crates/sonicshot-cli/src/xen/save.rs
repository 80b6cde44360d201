//! `sonicshot xen save`.

use crate::args::{Packing, XenSaveArgs};
use crate::error::CliError;
use crate::json::{OfXenSave, Version, XenSaveReport, line, path};
use crate::output::{named_images, overwrite};
use crate::progress::Phase;
use crate::report::{bytes_of, complain, count, note, percent, say, size, tell_notes};
use crate::save::{disks_json, search_json, search_text};
use sonicshot::PageSize;
use sonicshot_vmi::Note;
use sonicshot_xen_live::{AfterSave, Choice, ImageCompression, Look, SaveOptions, Saved};
use std::time::Duration;

const PAGE: PageSize = PageSize::SIZE_4K;

pub(crate) fn save(args: &XenSaveArgs) -> Result<(), CliError> {
    let mut options = SaveOptions::default();
    options.after = match (args.checkpoint, args.pause) {
        (true, _) => AfterSave::GoOn,
        (false, true) => AfterSave::Pause,
        (false, false) => AfterSave::Destroy,
    };
    options.compress = args.compress.map_or_else(Default::default, Into::into);
    options.copy_limit = args.copy_limit;
    options.overwrite = overwrite(args.force);
    options.symbols.clone_from(&args.symbols);
    let images = named_images(&args.disk)?.into_iter();
    options.disks = images.map(|(name, path)| (name.to_owned(), path)).collect();
    options.disk_hash = args.hash;
    let phase = Phase::begin("saving", args.json);
    options.progress = Some(phase.shown());
    let saved = sonicshot_xen_live::save(&args.domain, &args.file, &options);
    drop(phase);
    let outcome = Outcome::of(saved?);
    if args.json {
        outcome.print_json(args);
    } else {
        outcome.print_summary(args);
    }
    Ok(())
}

fn name_of(how: ImageCompression) -> &'static str {
    match how {
        ImageCompression::Zstd => "zstd",
        ImageCompression::Lz4 => "lz4",
        _ => "other",
    }
}

fn packed_by(how: Option<&str>) -> String {
    how.map_or_else(String::new, |how| format!(" ({how})"))
}

/// The measurements that the compression was chosen by.
fn told(choice: &Choice) -> String {
    let of = |took: Duration| format!("{:.0} ms", 1e3 * took.as_secs_f64());
    let (wrote, packed) = (of(choice.wrote), of(choice.packed));
    let sample = size(choice.sample);
    match choice.compression {
        Some(how) => format!(
            "compressed by {}: of {sample} the disk takes {wrote}, that {packed}; `xl restore` reads what \
             `--compress none` writes",
            name_of(how)
        ),
        None => format!("not compressed: of {sample} the disk takes {wrote}, lz4 {packed}"),
    }
}

/// The result of a save, for people.
struct Outcome {
    saved: Saved,
    look: Option<Look>,
    look_took: Option<Duration>,
    /// The reason why the image is a full one, if it is.
    reason: Option<String>,
}

impl Outcome {
    fn of(mut saved: Saved) -> Self {
        let looked = saved.looked.take();
        let look_took = looked.as_ref().map(|looked| looked.took);
        let (look, reason) = match looked.map(|looked| looked.result) {
            None => {
                let reason = "Xen's save helper did not ask for the types of frames";
                (None, Some(reason.into()))
            }
            Some(Ok(look)) => (Some(look), None),
            Some(Err(error)) => (None, Some(CliError::from(error).with_causes())),
        };
        Self {
            saved,
            look,
            look_took,
            reason,
        }
    }

    /// How the file is compressed.
    fn compression(&self, args: &XenSaveArgs) -> Option<&'static str> {
        match (&self.saved.checkpoint, args.compress) {
            (None, _) => self.saved.compression.map(name_of),
            (Some(_), Some(Packing::None)) => None,
            (Some(_), Some(Packing::Lz4)) => Some(name_of(ImageCompression::Lz4)),
            (Some(_), _) => Some(name_of(ImageCompression::Zstd)),
        }
    }

    fn print_json(&self, args: &XenSaveArgs) {
        let (saved, look) = (&self.saved, self.look.as_ref());
        let dropped = look.map_or(0, |look| look.frames.len());
        let of_disks = saved.checkpoint.as_ref();
        let notes = |look: &Look| look.notes.iter().map(Note::to_string).collect::<Vec<_>>();
        let report = XenSaveReport {
            version: Version::default(),
            kind: OfXenSave::default(),
            path: path(&args.file),
            domain: saved.domain.raw(),
            pruned: look.is_some(),
            reason: self.reason.clone(),
            kernel_release: look.map(|look| look.release.clone()),
            total_pages: look.map(|look| look.total_pages),
            dropped_pages: dropped,
            dropped_bytes: bytes_of(dropped, PAGE.bytes()),
            compression: self.compression(args),
            file_bytes: saved.file_bytes,
            seconds: saved.took.as_secs_f64(),
            suspended_seconds: saved.suspended.map(|time| time.as_secs_f64()),
            first_look_seconds: saved.first_look.took.as_secs_f64(),
            look_seconds: self.look_took.map(|time| time.as_secs_f64()),
            notes: look.map(notes),
            disks: of_disks.map_or_else(Vec::new, |saved| disks_json(&saved.info.disks)),
            disk_pages: of_disks.map_or(0, |saved| saved.stats.on_disk),
            disk_search: of_disks
                .and_then(|saved| saved.disk_search.as_ref())
                .map(search_json),
        };
        say!("{}", line(&report));
    }

    fn print_summary(&self, args: &XenSaveArgs) {
        if let Some(reason) = &self.reason {
            complain!("warning: nothing was left out, this is a full image: {reason}");
        }
        if let Some((look, took)) = self.look.as_ref().zip(self.look_took) {
            for note in &look.notes {
                note!("{note}");
            }
            let dropped = look.frames.len();
            say!(
                "Linux {}: left out {} of {} ({}), found in {:.2} s",
                look.release,
                size(bytes_of(dropped, PAGE.bytes())),
                size(bytes_of(look.total_pages, PAGE.bytes())),
                percent(dropped, look.total_pages),
                took.as_secs_f64()
            );
        }
        say!(
            "saved domain {} to {}: {}{}, {:.2} s",
            self.saved.domain,
            args.file.display(),
            size(self.saved.file_bytes),
            packed_by(self.compression(args)),
            self.saved.took.as_secs_f64()
        );
        if let Some(checkpoint) = &self.saved.checkpoint {
            tell_notes(&checkpoint.notes);
            let search = checkpoint.disk_search.as_ref().map(search_text);
            say!(
                "{} pages are on the disks, and not stored{}",
                count(checkpoint.stats.on_disk),
                search.unwrap_or_default()
            );
        }
        if let Some(choice) = &self.saved.choice {
            say!("{}", told(choice));
        }
    }
}
