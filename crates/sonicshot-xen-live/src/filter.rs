//! Has an unchanged `xl save` leave frames out.
//!
//! A small library is preloaded into what `xl` starts for the memory part of a save (see
//! `shim/filter.rs`). When libxc first asks for the types of frames, the domain is suspended; the
//! library then asks this process which frames are to go, by a pipe, and waits for the answer by
//! another. What goes is a table in a memory file. Nothing of it has a name in a file system: the
//! library is found by `/proc`, for as long as this process lives. If it is gone, or if it says
//! that nothing is to go, the save is a full one.

use crate::{DomainId, LiveError};
use core::ops::Range;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use sonicshot::{Tally, to_u64};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, ExitStatus};
use std::thread;

const LIBRARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/filter.so"));
const PRELOAD: &str = "LD_PRELOAD";
// What these are called in the library.
const REQUEST: &str = "SONICSHOT_XEN_REQUEST";
const ANSWER: &str = "SONICSHOT_XEN_ANSWER";
const TABLE: &str = "SONICSHOT_XEN_TABLE";
/// Asked for when the save has ended, so that nobody waits any longer. No domain has this number.
const ENDED: u32 = u32::MAX;

/// Frames by the numbers that libxc has for them: runs that are sorted and do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FrameRuns(Vec<Range<u64>>);

impl FrameRuns {
    /// The number of frames.
    #[must_use]
    pub fn len(&self) -> u64 {
        let lens = self
            .0
            .iter()
            .filter_map(|run| run.end.checked_sub(run.start));
        lens.sum::<Tally>().get()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As the library reads them: the first and the first after the last of each run.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() << 4);
        for run in &self.0 {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend(run.end.to_le_bytes());
        }
        bytes
    }
}

/// Of runs in any order.
impl FromIterator<Range<u64>> for FrameRuns {
    fn from_iter<T: IntoIterator<Item = Range<u64>>>(runs: T) -> Self {
        let mut runs: Vec<Range<u64>> = runs.into_iter().collect();
        runs.sort_unstable_by_key(|run| (run.start, run.end));
        runs.dedup_by(|next, run| {
            let joins = next.start <= run.end;
            if joins {
                run.end = run.end.max(next.end);
            }
            joins
        });
        Self(runs)
    }
}

/// A save that leaves frames out.
///
/// ```no_run
/// use sonicshot_xen_live::SaveFilter;
/// use std::process::Command;
/// let filter = SaveFilter::new()?;
/// let mut save = Command::new("xl");
/// save.args(["save", "-p", "guest", "/srv/guest.xl"]);
/// filter.attach(&mut save);
/// let mut child = save.spawn()?;
/// // Looks into the domain, which is suspended now, and says which frames are to go.
/// let status = filter.serve(&mut child, |_domain| Default::default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SaveFilter {
    library: File,
    table: File,
    request: (PipeReader, PipeWriter),
    answer: (PipeReader, PipeWriter),
}

impl SaveFilter {
    /// Makes what a save needs.
    ///
    /// # Errors
    /// [`LiveError::Filter`] if the system gives no pipes or memory files.
    pub fn new() -> Result<Self, LiveError> {
        let make = || {
            Ok(Self {
                library: library()?,
                table: memory_file("sonicshot-xen-frames")?,
                request: io::pipe()?,
                answer: io::pipe()?,
            })
        };
        make().map_err(failed("making"))
    }

    /// Has `command`, an `xl save` without `-l`, ask [`serve`](Self::serve).
    pub fn attach(&self, command: &mut Command) {
        command
            .env(PRELOAD, preload(path_of(&self.library)))
            .env(REQUEST, path_of(&self.request.1))
            .env(ANSWER, path_of(&self.answer.0))
            .env(TABLE, path_of(&self.table));
    }

    /// Waits for the save to end. `choose` is called, at most once, when the domain that is saved
    /// is suspended; the frames that it gives are left out, if Xen calls them ordinary.
    ///
    /// # Errors
    /// [`LiveError::Filter`] if a pipe fails or the child cannot be waited for.
    pub fn serve(
        self,
        child: &mut Child,
        choose: impl FnOnce(DomainId) -> FrameRuns,
    ) -> Result<ExitStatus, LiveError> {
        let Self {
            library: _library,
            mut table,
            request: (mut asked, mut ended),
            answer: (_unread, answer),
        } = self;
        thread::scope(|scope| {
            // Closed when this ends, however it does: then nobody waits for it in vain.
            let mut answer = answer;
            let waiting = thread::Builder::new().spawn_scoped(scope, move || {
                let status = child.wait();
                // Whoever waits for a question gets this one.
                ended.write_all(&ENDED.to_le_bytes())?;
                status
            });
            let waiting = waiting.map_err(failed("waiting for"))?;
            let mut question = [0; 4];
            asked.read_exact(&mut question).map_err(failed("asking"))?;
            let domain = u32::from_le_bytes(question);
            if domain != ENDED {
                let frames = choose(DomainId::new(domain));
                let count = match table.write_all(&frames.to_bytes()) {
                    Ok(()) => to_u64(frames.0.len()),
                    Err(_) => 0,
                };
                let answered = answer.write_all(&count.to_le_bytes());
                answered.map_err(failed("answering"))?;
            }
            let status = waiting.join().unwrap_or(Err(io::ErrorKind::Other.into()));
            status.map_err(failed("waiting for"))
        })
    }
}

/// The library, in a memory file.
fn library() -> io::Result<File> {
    let mut library = memory_file("sonicshot-xen-filter")?;
    library.write_all(LIBRARY)?;
    Ok(library)
}

/// The value of `LD_PRELOAD`: the library at `path`, then what is preloaded already.
fn preload(path: String) -> OsString {
    let mut preload = OsString::from(path);
    if let Some(others) = std::env::var_os(PRELOAD) {
        preload.push(":");
        preload.push(others);
    }
    preload
}

/// Has `command`, an `xl restore`, and all that it starts, ask for memory by 2 MiB, for as long as it
/// is held. `xl` stays as long as its domain does, with this environment: so it has the library by a
/// descriptor of its own, and no path of a process that is gone, whose number another may have by then.
pub(crate) fn attach_large_pages(command: &mut Command) -> Result<OwnedFd, LiveError> {
    /// No script has descriptors of its own from here on.
    const HIGH: RawFd = 700;
    let make = || {
        let library = fcntl_dupfd_cloexec(library()?, HIGH)?;
        fcntl_setfd(&library, FdFlags::empty())?;
        Ok(library)
    };
    let library: OwnedFd = make().map_err(failed("making"))?;
    let path = format!("/proc/self/fd/{}", library.as_raw_fd());
    command.env(PRELOAD, preload(path));
    Ok(library)
}

pub(crate) fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?))
}

/// The path by which other processes of the same user can open an open file of this one, for as
/// long as it is open here.
#[must_use]
pub fn path_of(file: &impl AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> LiveError {
    move |source| LiveError::Filter { action, source }
}

#[cfg(test)]
mod tests {
    use super::{FrameRuns, SaveFilter};
    use crate::DomainId;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::process::Command;

    proptest! {
        #[test]
        fn runs_are_sorted_and_do_not_touch(runs in proptest::collection::vec((0_u64..99, 1_u64..9), 0..20)) {
            let frames: BTreeSet<u64> = runs.iter().flat_map(|(start, len)| *start..start + len).collect();
            let made: FrameRuns = runs.into_iter().map(|(start, len)| start..start + len).collect();
            let inside: Vec<u64> = made.0.iter().cloned().flatten().collect();
            prop_assert_eq!(&inside, &frames.into_iter().collect::<Vec<_>>());
            prop_assert!(made.0.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(made.len(), inside.len() as u64);
        }
    }

    #[test]
    fn a_program_that_asks_nothing_runs_as_it_would() {
        let filter = SaveFilter::new().unwrap();
        let mut command = Command::new("true");
        filter.attach(&mut command);
        let mut child = command.spawn().unwrap();
        let asked = std::cell::Cell::new(None);
        let status = filter.serve(&mut child, |domain: DomainId| {
            asked.set(Some(domain));
            FrameRuns::default()
        });
        assert!(status.unwrap().success());
        assert_eq!(asked.get(), None);
    }
}
