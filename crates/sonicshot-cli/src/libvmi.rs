//! `--libvmi`: what is done with a guest that LibVMI reads, instead of a file.

mod inspect;
mod prune;
mod save;

pub(crate) use inspect::inspect;
pub(crate) use prune::prune;
pub(crate) use save::save;

use crate::args::{InputArgs, LibvmiArgs, LibvmiWatchdogArgs};
use crate::error::CliError;
use crate::json::LibVmiVersion;
use crate::progress::Phase;
use crate::report::complain;
use sonicshot::{ClassSet, GuestMemory, MemoryError, Processors, PrunePlan, RamLayout};
use sonicshot_libvmi::{
    Domain, LibVmi, LibVmiError, LibVmiGuest, LibVmiSymbols, PausedGuest, watch as watch_guest,
};
use sonicshot_offline::{LayoutSpec, OfflineError, check_droppable, check_unused};
use sonicshot_vmi::{
    Analysis, AnalysisOptions, GuestOptions, GuestOs, VmiError, analyze, open_guest,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The library to load, where `--libvmi-library` does not say it.
const LIBRARY: &str = "SONICSHOT_LIBVMI";

impl LibvmiArgs {
    /// The guest, if one is given.
    pub(crate) fn domain(&self) -> Option<Domain> {
        let domain = self.libvmi.clone()?;
        Some(match &self.kvmi_socket {
            Some(socket) => domain.at_socket(socket),
            None => domain,
        })
    }

    fn library(&self) -> Result<LibVmi, LibVmiError> {
        load(self.libvmi_library.as_deref())
    }

    /// This program again, to let the guest run on if this process is killed.
    fn watchdog(&self, domain: &Domain) -> Result<Command, CliError> {
        let program = std::env::current_exe().map_err(|source| CliError::Io {
            action: "looking for",
            path: "this program".into(),
            source,
        })?;
        let mut command = Command::new(program);
        command.args(["libvmi-watchdog", &domain.to_string()]);
        if let Some(library) = &self.libvmi_library {
            command.arg("--libvmi-library").arg(library);
        }
        if let Some(socket) = &self.kvmi_socket {
            command.arg("--kvmi-socket").arg(socket);
        }
        Ok(command)
    }
}

fn load(path: Option<&Path>) -> Result<LibVmi, LibVmiError> {
    let named = || std::env::var_os(LIBRARY).map(PathBuf::from);
    Ok(match path.map(Path::to_owned).or_else(named) {
        Some(path) => LibVmi::open(path)?,
        None => LibVmi::load()?,
    })
}

/// The other process's work.
pub(crate) fn watch(args: &LibvmiWatchdogArgs) -> Result<(), CliError> {
    let domain = match &args.kvmi_socket {
        Some(socket) => args.domain.clone().at_socket(socket),
        None => args.domain.clone(),
    };
    let library = || load(args.libvmi_library.as_deref());
    if watch_guest(std::io::stdin(), library, &domain)? {
        complain!("{domain} was left paused, and runs on now");
    }
    Ok(())
}

/// A guest that was paused and looked at, and is paused still.
struct Look {
    library: LibVmi,
    domain: Domain,
    guest: PausedGuest,
    since: Instant,
    analysis: Analysis,
    /// The options that the guest was looked for with.
    known: GuestOptions,
}

impl Look {
    /// Opens the guest, pauses it, and finds out what its pages are.
    fn at(
        args: &LibvmiArgs,
        domain: Domain,
        input: &InputArgs,
        zero_pages: bool,
        json: bool,
    ) -> Result<Self, CliError> {
        let library = args.library()?;
        let guest = LibVmiGuest::open(&library, &domain, layout(input)?)?;
        let watchdog = args.watchdog(&domain)?;
        let since = Instant::now();
        let paused = guest.pause(Some(watchdog))?;
        let phase = Phase::begin("opening", json);
        let mut known = GuestOptions::new();
        for path in &input.symbols {
            known = known.symbols(path);
        }
        if let Some(cr3) = input.cr3 {
            known = known.cr3(cr3);
        }
        if let Some(most) = input.at_most {
            known = known.at_most(most);
        }
        let symbols = LibVmiSymbols::new(&guest, args.libvmi_profile.clone());
        let known = known.fallback(Arc::new(symbols));
        let options = AnalysisOptions::new()
            .guest(known.clone())
            .on_inconsistency(input.on_inconsistency())
            .zero_pages(zero_pages)
            .progress(phase.shown());
        if let (Processors::NotTold(why), None) = (paused.processors(), input.cr3) {
            let what = format!(
                "whether the kernel of {domain} owns its memory is not known, for {why}: give --cr3"
            );
            return Err(CliError::Usage { what });
        }
        let analysis = analyze(&paused, &options);
        let analysis = analysis.map_err(|source| {
            is_gone(&paused).unwrap_or_else(|| {
                let path = domain.to_string().into();
                OfflineError::Guest { path, source }.into()
            })
        })?;
        drop(phase);
        Ok(Self {
            library,
            domain,
            guest: paused,
            since,
            analysis,
            known,
        })
    }

    /// The guest's own records, while it is paused.
    fn records<T>(
        &self,
        look: impl FnOnce(&dyn GuestOs) -> Result<T, VmiError>,
    ) -> Result<T, CliError> {
        let guest = open_guest(&self.guest, &self.known);
        let looked = guest.and_then(|guest| look(&*guest));
        looked.map_err(|source| {
            let path = self.domain.to_string().into();
            OfflineError::Guest { path, source }.into()
        })
    }

    /// Lets the guest run on; returns how long it was paused.
    fn resume(guest: PausedGuest, since: Instant) -> Result<Duration, CliError> {
        guest.resume()?;
        Ok(since.elapsed())
    }
}

/// The trouble with reading a guest that could be read before: that explains all else.
fn is_gone(guest: &PausedGuest) -> Option<CliError> {
    let first = guest.layout().regions().first()?;
    match guest.read(first.start(), &mut [0]) {
        Ok(()) => None,
        Err(MemoryError::Backend { range, source }) => {
            Some(match source.downcast::<LibVmiError>() {
                Ok(error) => (*error).into(),
                Err(source) => MemoryError::Backend { range, source }.into(),
            })
        }
        Err(error) => Some(error.into()),
    }
}

/// The way in which the guest is read, for people.
fn format(domain: &Domain) -> String {
    format!("LibVMI ({})", domain.driver())
}

/// The report on the library.
fn library_json(library: &LibVmi) -> LibVmiVersion {
    let version = library.version();
    LibVmiVersion {
        file: version.file.as_ref().map(|file| file.display().to_string()),
        version: version.number.clone(),
        events_version: version.events,
        maps_pages: version.maps_pages,
    }
}

/// The layout of RAM, if it is given.
fn layout(input: &InputArgs) -> Result<Option<RamLayout>, CliError> {
    match &input.layout {
        None => Ok(None),
        Some(LayoutSpec::Ranges(ranges)) => {
            RamLayout::new(ranges.clone())
                .map(Some)
                .map_err(|error| CliError::Usage {
                    what: format!("--layout: {error}"),
                })
        }
        Some(_) => Err(CliError::Usage {
            what: "of a guest that LibVMI reads, --layout says where RAM lies: START-END,..."
                .into(),
        }),
    }
}

/// Checks what is to be dropped.
fn check(drop: ClassSet, for_analysis: bool) -> Result<(), CliError> {
    check_droppable(drop)?;
    if !for_analysis {
        check_unused(drop)?;
    }
    Ok(())
}

/// The pages that go, by what put them there.
fn dropped_by_name(
    plan: &PrunePlan,
    analysis: &Analysis,
    drop: ClassSet,
) -> Vec<(&'static str, u64)> {
    plan.counts(analysis.pages()).by_name(drop).collect()
}

/// The notes on the guest's pages.
fn notes(analysis: &Analysis) -> Vec<String> {
    analysis.notes().iter().map(ToString::to_string).collect()
}
