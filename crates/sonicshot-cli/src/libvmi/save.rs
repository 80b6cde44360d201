//! `sonicshot save --libvmi`.

use super::{Look, check, dropped_by_name, notes};
use crate::args::{SaveArgs, classes};
use crate::error::CliError;
use crate::json::{self, OfSave, SaveReport, Version, line, path};
use crate::output::{named_files, overwrite};
use crate::progress::Phase;
use crate::report::{bytes_of, mib, note};
use crate::save::{check_output, free_of, stats_json, stats_text, tell, writing};
use sonicshot::checkpoint::{CheckpointInfo, CheckpointWriter, SaveStats};
use sonicshot::{DropClasses, GuestMemory, PageClass, Progress, PrunePlan};
use sonicshot_dump::NewFile;
use sonicshot_libvmi::Domain;
use sonicshot_offline::OfflineError;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The blob that other readers of checkpoints look for.
const VMCOREINFO: &str = "vmcoreinfo";
/// The facts of it.
const ALONE: &str = "it holds the guest's memory alone: LibVMI tells no state of its devices, and its \
                     disks go on";

pub(crate) fn save(args: &SaveArgs, domain: Domain) -> Result<(), CliError> {
    let started = Instant::now();
    let drop = classes(&args.drop);
    check(drop, args.for_analysis)?;
    if args.keep_all {
        return Err(CliError::Usage {
            what: "--keep-all looks for no kernel, and --libvmi is for that".into(),
        });
    }
    check_output(args)?;
    let mut blobs = Vec::new();
    for (name, path) in named_files(&args.blob)? {
        let file = File::open(&path).map_err(crate::output::io("opening", &path))?;
        blobs.push((name, file));
    }
    // What is zero is found as it is written.
    let look = Look::at(&args.libvmi, domain, &args.input, false, args.json)?;
    let plan = look.analysis.plan(&DropClasses(drop));
    let source = Source {
        args,
        look: &look,
        plan: &plan,
        blobs: &blobs,
    };
    let phase = Phase::begin("saving", args.json);
    let (stats, file) = source.write(phase.shown())?;
    // The file is worth keeping also if the guest does not run on.
    let resumed = Look::resume(look.guest, look.since);
    let finish = |file: NewFile| file.finish_told(&Some(phase.shown()));
    let disk_bytes = file.map(finish).transpose();
    std::mem::drop(phase);
    let (paused, disk_bytes) = (resumed?, disk_bytes?);
    let left_out = dropped_by_name(&plan, &look.analysis, drop);
    let seconds = started.elapsed().as_secs_f64();
    let facts = look.analysis.facts();
    if args.json {
        let absent = look.analysis.counts().get(PageClass::Absent);
        let absent = bytes_of(absent, facts.page_size.bytes());
        let report = SaveReport {
            version: Version::default(),
            kind: OfSave::default(),
            path: look.domain.to_string(),
            output: path(&args.output),
            kernel_release: Some(facts.release.clone()),
            compression: args.compress.to_string(),
            disk_bytes,
            left_out: json::by_name(&left_out),
            for_analysis: args.for_analysis,
            disks: Vec::new(),
            disk_search: None,
            missing_bytes: absent,
            missing_mib: mib(absent),
            paused_seconds: Some(paused.as_secs_f64()),
            seconds,
            notes: notes(&look.analysis),
            devices: Some(ALONE.to_owned()),
            stored: stats_json(&stats, free_of(&left_out), facts.page_size.bytes()),
        };
        tell(args, &line(&report));
        return Ok(());
    }
    for note in look.analysis.notes() {
        note!("{note}");
    }
    let total = bytes_of(look.analysis.counts().total(), plan.page_size().bytes());
    tell(args, &stats_text(&stats, total, &left_out, seconds));
    let ms = paused.as_secs_f64() * 1000.0;
    tell(
        args,
        &format!("{} was paused for {ms:.0} ms; {ALONE}", look.domain),
    );
    Ok(())
}

/// The source of a save.
struct Source<'a> {
    args: &'a SaveArgs,
    look: &'a Look,
    plan: &'a PrunePlan,
    blobs: &'a [(&'a str, File)],
}

impl Source<'_> {
    /// To a file that has no name yet, or to standard output.
    fn write(&self, progress: Arc<dyn Progress>) -> Result<(SaveStats, Option<NewFile>), CliError> {
        if self.args.to_stdout() {
            let stats = self.write_to(io::stdout().lock(), Path::new("-"), progress)?;
            return Ok((stats, None));
        }
        let path: &PathBuf = &self.args.output;
        let file = NewFile::create_new(path, overwrite(self.args.force))?;
        let stats = self.write_to(file.file(), path, progress)?;
        Ok((stats, Some(file)))
    }

    fn write_to(
        &self,
        out: impl Write,
        path: &Path,
        progress: Arc<dyn Progress>,
    ) -> Result<SaveStats, CliError> {
        let failed = |source| OfflineError::Checkpoint {
            path: path.to_owned(),
            source,
        };
        let (analysis, facts) = (&self.look.analysis, self.look.analysis.facts());
        let layout = self.look.guest.layout().clone();
        let mut info = CheckpointInfo::new(layout, facts.page_size);
        info.architecture = facts.architecture;
        info.kernel_release = Some(facts.release.clone());
        info.build_id.clone_from(&facts.build_id);
        info.for_analysis =
            self.args.for_analysis && self.plan.used_by_guest(analysis.pages()).is_some();
        info.vmm.clone_from(&self.args.vmm);
        let writing = writing(self.args).progress(progress);
        let mut writer = CheckpointWriter::new(out, info, writing).map_err(failed)?;
        if let Some(text) = &facts.vmcoreinfo {
            writer.blob(VMCOREINFO, text.as_bytes()).map_err(failed)?;
        }
        for (name, file) in self.blobs {
            writer.blob(name, file).map_err(failed)?;
        }
        let written = writer.memory(&self.look.guest, analysis.pages(), self.plan);
        written.map_err(failed)?;
        let (_, stats) = writer.finish().map_err(failed)?;
        Ok(stats)
    }
}
