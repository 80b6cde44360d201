//! The files and folders that a command is given.

use crate::args::InputArgs;
use crate::error::CliError;
use crate::progress::Phases;
use crate::report::{count, note, say};
use sonicshot::{FileId, to_u64};
use sonicshot_offline::{
    AnalyzeOptions, Analyzed, CheckpointFile, OfflineError, OpenOptions, Snapshot,
};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// One input, as it was given.
#[derive(Debug)]
pub(crate) struct Input {
    pub path: PathBuf,
    pub snapshot: Snapshot,
    /// The phases that are shown of what is done with it.
    pub phases: Phases,
}

/// Stands for standard input, and for standard output.
pub(crate) const PIPE: &str = "-";

/// The name of standard input in messages.
pub(crate) const STDIN: &str = "standard input";

/// Opens the checkpoint at `path`, or takes it from standard input, `max_size` bytes at most.
pub(crate) fn checkpoint(
    path: &Path,
    max_size: Option<u64>,
    phases: &Phases,
) -> Result<CheckpointFile, CliError> {
    Ok(if path == Path::new(PIPE) {
        let _phase = phases.run("taking in");
        let mut options = OpenOptions::new().progress(phases.shown());
        options.max_size = max_size;
        CheckpointFile::from_reader(STDIN, io::stdin().lock(), &options)?
    } else {
        CheckpointFile::open(path)?
    })
}

impl Input {
    pub(crate) fn find(path: &Path, how: &InputArgs, json: bool) -> Result<Self, CliError> {
        let phases = Phases::new(json);
        let _phase = phases.run("opening");
        let options = how.open().progress(phases.shown());
        let snapshot = if path == Path::new(PIPE) {
            take_in(&options)?
        } else {
            Snapshot::open(path, &options)?
        };
        Ok(Self {
            path: path.into(),
            snapshot,
            phases,
        })
    }

    /// Looks for its kernel and its free pages.
    pub(crate) fn analyze(&self, how: &AnalyzeOptions) -> Result<Analyzed, OfflineError> {
        let _phase = self.phases.run("opening");
        self.snapshot.analyze(how)
    }

    /// Whether it is standard input.
    pub(crate) fn is_pipe(&self) -> bool {
        self.path == Path::new(PIPE)
    }

    /// The file's identity, whatever name it was opened by.
    fn identity(&self) -> Option<FileId> {
        FileId::of_path(self.snapshot.memory_file()).ok()
    }

    /// Whether the name `path` leads to this input's memory.
    pub(crate) fn is_file_at(&self, path: &Path) -> bool {
        let identity = self.identity();
        identity.is_some() && identity == FileId::of_path(path).ok()
    }

    /// The name of the input where its copy is to have the same name.
    pub(crate) fn name(&self) -> Option<PathBuf> {
        let name = |path: &Path| path.file_name().map(PathBuf::from);
        // `.` and `..` have another name of their own.
        name(&self.path).or_else(|| name(&fs::canonicalize(&self.path).ok()?))
    }
}

/// Takes in standard input. If that is a file, it must stay as it is until all of it is read.
fn take_in(options: &OpenOptions) -> Result<Snapshot, CliError> {
    let name = Path::new(STDIN);
    let stdin = io::stdin().lock();
    let file = stdin.as_fd().try_clone_to_owned();
    let file = file.map_err(|source| CliError::Io {
        action: "reading",
        path: name.to_owned(),
        source,
    })?;
    Ok(Snapshot::from_file(name, &File::from(file), options)?)
}

/// Several inputs, each looked at once; those that could not be found out about too.
#[derive(Debug)]
pub(crate) struct Inputs {
    found: Vec<(PathBuf, Result<Input, CliError>)>,
    repeated: usize,
}

/// The outcome for several inputs.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    failed: usize,
    code: Option<u8>,
}

impl Inputs {
    pub(crate) fn find(paths: &[PathBuf], how: &InputArgs, json: bool) -> Self {
        let mut seen = HashSet::new();
        let mut repeated = 0_usize;
        let mut found = Vec::new();
        for path in paths {
            let input = Input::find(path, how, json);
            let identity = input.as_ref().ok().and_then(Input::identity);
            if identity.is_some_and(|identity| !seen.insert(identity)) {
                repeated += 1;
                if !json {
                    note!("{} was given already", path.display());
                }
                continue;
            }
            found.push((path.clone(), input));
        }
        Self { found, repeated }
    }

    /// Those that were found.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Input> {
        self.found
            .iter()
            .filter_map(|(_, input)| input.as_ref().ok())
    }

    /// Whether there is more than one, and so a line for each and a sum at the end.
    pub(crate) fn several(&self) -> bool {
        self.found.len() > 1 || self.repeated > 0
    }

    /// Does `work` on each. One that fails is reported, and the others go on; the first failure
    /// is that of the whole. `sum` is what all of them together have come to.
    pub(crate) fn each(
        self,
        json: bool,
        mut work: impl FnMut(&Input) -> Result<(), CliError>,
        sum: impl FnOnce() -> String,
    ) -> Result<(), CliError> {
        let several = self.several();
        let mut tally = Tally::default();
        let mut first = true;
        for (path, input) in self.found {
            if several && !json {
                if !first {
                    say!("");
                }
                first = false;
                say!("{}:", path.display());
            }
            match input.and_then(|input| work(&input)) {
                Ok(()) => tally.done += 1,
                Err(error) => {
                    error.print_of(&path, json, several);
                    tally.failed += 1;
                    tally.code.get_or_insert(error.code());
                }
            }
        }
        if several && !json {
            let given = match self.repeated {
                0 => String::new(),
                repeated => format!(", {} given again", count(to_u64(repeated))),
            };
            say!("");
            say!(
                "{} done, {} failed{given}; {}",
                count(to_u64(tally.done)),
                count(to_u64(tally.failed)),
                sum()
            );
        }
        match tally.code {
            Some(code) => Err(CliError::Reported { code }),
            None => Ok(()),
        }
    }
}
