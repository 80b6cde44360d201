//! The files and folders that a command is given.

use crate::analyze::Analysis;
use crate::args::InputArgs;
use crate::error::CliError;
use crate::report::{count, say};
use sonicshot::{GuestMemory, Processors};
use sonicshot_dump::{Dump, DumpError, LayoutSpec, SnapshotFiles, Spool, check_not_in_use};
use std::cell::RefCell;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One input, and how it is to be understood.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    /// As it was given.
    pub path: PathBuf,
    pub files: SnapshotFiles,
    pub how: &'a InputArgs,
    /// The content of what came through a pipe or was compressed, once it is there.
    spool: RefCell<Option<Spool>>,
}

/// Stands for standard input.
const PIPE: &str = "-";

impl<'a> Input<'a> {
    pub(crate) fn find(path: &Path, how: &'a InputArgs) -> Result<Self, CliError> {
        let (files, spool) = if path == Path::new(PIPE) {
            let name = Path::new("standard input");
            let spool = Spool::from_reader(name, io::stdin().lock())?;
            (SnapshotFiles::file(name, how.layout.as_ref()), Some(spool))
        } else {
            let files = SnapshotFiles::find(path, how.base.as_deref(), how.layout.as_ref())?;
            (files, None)
        };
        Ok(Self {
            path: path.into(),
            files,
            how,
            spool: RefCell::new(spool),
        })
    }

    /// The file with the guest's memory.
    pub(crate) fn memory(&self) -> &Path {
        self.files.memory()
    }

    /// Opens the memory, over its base if one was given, with what the VMM's state beside it tells
    /// of the processors.
    pub(crate) fn open(&self, layout: Option<&LayoutSpec>) -> Result<Dump, DumpError> {
        let dump = self.open_memory(layout)?;
        Ok(match self.files.processors() {
            Processors::Unknown => dump,
            told => dump.with_processors(told.clone()),
        })
    }

    fn open_memory(&self, layout: Option<&LayoutSpec>) -> Result<Dump, DumpError> {
        if let Some(base) = &self.how.base {
            return Dump::open_over(self.memory(), base, layout);
        }
        if let Some(spool) = &*self.spool.borrow() {
            return Dump::open_spooled(spool, layout);
        }
        let dump = Dump::open(self.memory(), layout)?;
        *self.spool.borrow_mut() = dump.spool().cloned();
        Ok(dump)
    }

    /// What to say of a file that somebody may be writing while it is read.
    pub(crate) fn in_use(&self) -> Option<String> {
        match check_not_in_use(self.memory()) {
            Err(error @ DumpError::InUse { .. }) => Some(format!(
                "{error}: what is read of it is torn unless its guest is stopped"
            )),
            _ => None,
        }
    }

    /// Whether it is standard input.
    pub(crate) fn is_pipe(&self) -> bool {
        self.path == Path::new(PIPE)
    }

    fn identity(&self) -> Option<(u64, u64)> {
        let metadata = fs::metadata(self.memory()).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    /// What the input is called where its copy is to have the same name.
    pub(crate) fn name(&self) -> Option<PathBuf> {
        let name = |path: &Path| path.file_name().map(PathBuf::from);
        // `.` and `..` have another name of their own.
        name(&self.path).or_else(|| name(&fs::canonicalize(&self.path).ok()?))
    }
}

/// Several inputs, each looked at once; those that could not be found out about too.
#[derive(Debug)]
pub(crate) struct Inputs<'a> {
    found: Vec<(PathBuf, Result<Input<'a>, CliError>)>,
    repeated: usize,
}

/// What became of several inputs.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    failed: usize,
    code: Option<u8>,
}

impl<'a> Inputs<'a> {
    pub(crate) fn find(paths: &[PathBuf], how: &'a InputArgs, json: bool) -> Self {
        let mut seen = HashSet::new();
        let mut repeated = 0_usize;
        let mut found = Vec::new();
        for path in paths {
            let input = Input::find(path, how);
            let identity = input.as_ref().ok().and_then(Input::identity);
            if identity.is_some_and(|identity| !seen.insert(identity)) {
                repeated = repeated.saturating_add(1);
                if !json {
                    eprintln!("note: {} was given already", path.display());
                }
                continue;
            }
            found.push((path.clone(), input));
        }
        Self { found, repeated }
    }

    /// Those that were found.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Input<'a>> {
        self.found
            .iter()
            .filter_map(|(_, input)| input.as_ref().ok())
    }

    /// Whether there is more than one, and so a line for each and a sum at the end.
    pub(crate) fn several(&self) -> bool {
        self.found.len().saturating_add(self.repeated) > 1
    }

    /// Does `work` on each. One that fails is reported, and the others go on; the first failure
    /// is that of the whole. `sum` is what all of them together have come to.
    pub(crate) fn each(
        self,
        json: bool,
        mut work: impl FnMut(&Input<'_>) -> Result<(), CliError>,
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
                Ok(()) => tally.done = tally.done.saturating_add(1),
                Err(error) => {
                    error.print_of(&path, json, several);
                    tally.failed = tally.failed.saturating_add(1);
                    tally.code.get_or_insert(error.code());
                }
            }
        }
        if several && !json {
            let given = match self.repeated {
                0 => String::new(),
                repeated => format!(", {} given again", count(repeated as u64)),
            };
            say!("");
            say!(
                "{} done, {} failed{given}; {}",
                count(tally.done as u64),
                count(tally.failed as u64),
                sum()
            );
        }
        match tally.code {
            Some(code) => Err(CliError::Reported { code }),
            None => Ok(()),
        }
    }
}

/// What to say of an output that has a guest's pages, but not which frames of the machine they are.
pub(crate) fn without_p2m(memory: &dyn GuestMemory) -> Option<String> {
    memory.p2m().map(|_| {
        "the page tables hold frame numbers of the machine, which only the core explains: no kernel \
         will be found in the output"
            .into()
    })
}

/// Puts what the files beside the memory say with the other notes.
pub(crate) fn add_notes(analysis: &mut Analysis, input: &Input<'_>) {
    let notes = &mut analysis.notes;
    notes.extend(input.files.notes().iter().cloned());
    notes.extend(input.in_use());
}
