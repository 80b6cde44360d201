//! A virtual machine whose page faults are served: a thread of its own, and nothing shared with
//! others but the source.
//!
//! That thread alone reads what the kernel tells and puts pages in place, one after the other, so
//! that what was given back is known before anything that is done later. Of each page there is
//! one bit: whether the source may still be asked for it. It is set when the page is put in place
//! and when it is given back; a page whose bit is set and that is missing reads as zero. So no
//! page comes from the source twice, and none after it was given back.

mod asks;
mod control;
#[expect(unsafe_code, reason = "memory that outlives the process")]
#[cfg_attr(
    not(feature = "server"),
    expect(dead_code, reason = "only a server has a successor")
)]
mod kept;
#[expect(unsafe_code, reason = "memory that outlives the process")]
mod kept_map;
mod machine;
mod plan;
mod region;

#[cfg(feature = "server")]
pub(crate) use self::asks::{Asked, Asks};
pub(crate) use self::control::Control;
#[cfg(feature = "server")]
pub(crate) use self::kept::Kept;
#[cfg(feature = "server")]
pub(crate) use self::machine::End;
pub(crate) use self::machine::Machine;
pub use self::region::VmRegion;
#[cfg(feature = "server")]
pub(crate) use self::region::{MAX_PAGE, MIN_PAGE, check_disjoint};
use crate::error::ServeError;
use crate::metrics::Metrics;
use crate::set::{PageSet, Recorder};
use crate::source::PageSource;
use crate::uffd::Uffd;
use std::sync::Arc;
use std::thread::JoinHandle;

/// The pages that are brought in before they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Prefetch {
    /// Nothing.
    Nothing,
    /// The working set, if there is one.
    #[default]
    Set,
    /// The working set, then all that is left. When all of it is in place the kernel need not
    /// ask any more.
    Everything,
}

/// Options for serving a virtual machine.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct VmOptions {
    /// The pages that are brought in before they are asked for.
    pub prefetch: Prefetch,
    /// The working set.
    pub set: Arc<PageSet>,
    /// The bytes around a page that is asked for that come in with it. 0: none.
    pub around: u64,
    /// The recorder that notes which pages are asked for.
    pub recorder: Option<Arc<Recorder>>,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Serve a source too of which pages that the guest uses are missing: they read as zero.
    pub for_analysis: bool,
}

impl VmOptions {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Says which pages are brought in before they are asked for.
    #[must_use]
    pub fn prefetch(mut self, pages: Prefetch) -> Self {
        self.prefetch = pages;
        self
    }

    /// Gives the working set.
    #[must_use]
    pub fn set(mut self, set: Arc<PageSet>) -> Self {
        self.set = set;
        self
    }

    /// Says how much around a page comes in with it, in bytes.
    #[must_use]
    pub fn around(mut self, bytes: u64) -> Self {
        self.around = bytes;
        self
    }

    /// Says who notes which pages are asked for.
    #[must_use]
    pub fn recorder(mut self, recorder: Arc<Recorder>) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// Says who counts.
    #[must_use]
    pub fn metrics(mut self, metrics: Arc<Metrics>) -> Self {
        self.metrics = metrics;
        self
    }

    /// Says whether a source is served that lacks pages that the guest uses.
    #[must_use]
    pub fn for_analysis(mut self, may_be: bool) -> Self {
        self.for_analysis = may_be;
        self
    }
}

/// A virtual machine of this process, whose memory comes in while it runs.
///
/// If a page cannot be read, whoever waits for it is ended by a signal (Linux 6.6 and later) or
/// waits for ever: a guest never gets to see bytes that are not its own. [`error`](Self::error)
/// tells. Dropping this before all pages are in place keeps the `userfaultfd` open for the same
/// reason; [`finish`](Self::finish) brings in the rest first.
#[derive(Debug)]
pub struct Vm {
    control: Arc<Control>,
    uffd: Arc<Uffd>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Begins to serve the page faults of `regions`, which are registered with `uffd`. Returns at
    /// once; the guest may run.
    ///
    /// # Errors
    /// [`CheckpointError::CannotRun`](sonicshot::checkpoint::CheckpointError::CannotRun) of a
    /// source that is for analysis, unless [`VmOptions::for_analysis`] says that this is known;
    /// [`ServeError`] if a region cannot be served from `source`, or nothing can be started.
    pub fn start(
        source: Arc<dyn PageSource>,
        uffd: Uffd,
        regions: &[VmRegion],
        options: VmOptions,
    ) -> Result<Self, ServeError> {
        let control = Arc::new(Control::new()?);
        let uffd = Arc::new(uffd);
        let mut machine = Machine::new(
            source,
            Arc::clone(&uffd),
            regions,
            options,
            Arc::clone(&control),
            None,
        )?;
        let thread = std::thread::Builder::new().name("sonicshot-fault".into());
        let thread = thread.spawn(move || drop(machine.run()));
        let thread = thread.map_err(|source| ServeError::System {
            operation: "starting a thread",
            source,
        })?;
        Ok(Self {
            control,
            uffd,
            thread: Some(thread),
        })
    }

    /// The reason why a page could not be brought in, if that happened.
    #[must_use]
    pub fn error(&self) -> Option<Arc<ServeError>> {
        self.control.outcome().error.clone()
    }

    /// Whether all pages are in place.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let outcome = self.control.outcome();
        outcome.complete && outcome.error.is_none()
    }

    /// Waits until all pages are in place, bringing in what is left.
    ///
    /// # Errors
    /// Why a page could not be brought in.
    pub fn finish(self) -> Result<(), Arc<ServeError>> {
        self.control.want_everything();
        self.control.wait()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.control.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if !self.is_complete() {
            // Closing it would let the guest read zeroes where its own bytes belong.
            core::mem::forget(Arc::clone(&self.uffd));
        }
    }
}
