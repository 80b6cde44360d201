//! A guest, found and paused.

use crate::instance::{Instance, LibVmi, PAGE};
use crate::watchdog::Watchdog;
use crate::{Domain, LibVmiError, processors, ram};
use core::fmt;
use sonicshot::{Gpa, GpaRange, GuestMemory, MAX_MAP, Mapped, MemoryError, Processors, RamLayout};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A guest that LibVMI reads, and that may run: its memory is there once it is
/// [paused](Self::pause).
#[derive(Clone)]
pub struct LibVmiGuest {
    inner: Arc<Inner>,
}

/// The state that a guest and its pauses share.
pub(crate) struct Inner {
    pub instance: Instance,
    domain: Domain,
    layout: RamLayout,
    /// Whether pages can be mapped, as far as is known.
    maps: AtomicBool,
}

impl fmt::Debug for LibVmiGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibVmiGuest")
            .field("domain", &self.inner.domain)
            .field("layout", &self.inner.layout)
            .finish_non_exhaustive()
    }
}

impl LibVmiGuest {
    /// Opens the guest, and finds out where its RAM lies, if `layout` does not say so: each page that
    /// it may have is tried. It is not paused for that.
    ///
    /// # Errors
    /// [`LibVmiError::Open`] if LibVMI does not open it, [`LibVmiError::NoMemory`] and
    /// [`LibVmiError::TooLarge`] if its RAM is not found.
    pub fn open(
        library: &LibVmi,
        domain: &Domain,
        layout: Option<RamLayout>,
    ) -> Result<Self, LibVmiError> {
        if let Domain::File(path) = domain {
            // LibVMI would say no more than that its driver does not start.
            std::fs::File::open(path).map_err(|source| LibVmiError::File {
                path: path.clone(),
                source,
            })?;
        }
        let instance = Instance::open(library, domain)?;
        let layout = match layout {
            Some(layout) => layout,
            None => ram::find(&instance, domain)?,
        };
        let maps = AtomicBool::new(instance.may_map());
        Ok(Self {
            inner: Arc::new(Inner {
                instance,
                domain: domain.clone(),
                layout,
                maps,
            }),
        })
    }

    /// The guest.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.inner.domain
    }

    /// The layout of its RAM.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.inner.layout
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Pauses the guest, and forgets what LibVMI remembers of its memory. It runs on when what is
    /// returned is dropped; and if this process is killed before, by `watchdog`: a command that calls
    /// [`watch`](crate::watch) and does nothing else.
    ///
    /// # Errors
    /// [`LibVmiError::Pause`] if LibVMI does not pause it, [`LibVmiError::Watchdog`].
    pub fn pause(&self, watchdog: Option<Command>) -> Result<PausedGuest, LibVmiError> {
        let watchdog = watchdog.map(Watchdog::start).transpose()?;
        if !self.inner.instance.pause() {
            if let Some(watchdog) = watchdog {
                // There is nothing to resume: somebody else may have paused it.
                watchdog.end(true);
            }
            return Err(LibVmiError::Pause {
                domain: self.inner.domain.clone(),
            });
        }
        // From here on it is resumed, whatever comes.
        let mut paused = PausedGuest {
            guest: self.clone(),
            processors: Processors::Unknown,
            is_resumed: false,
            watchdog,
        };
        paused.processors = processors::of(&self.inner.instance, &self.inner.domain);
        Ok(paused)
    }
}

/// The memory of a guest that is paused, and runs on when this is dropped.
#[derive(Debug)]
pub struct PausedGuest {
    guest: LibVmiGuest,
    processors: Processors,
    is_resumed: bool,
    watchdog: Option<Watchdog>,
}

impl PausedGuest {
    /// Lets the guest run on.
    ///
    /// # Errors
    /// [`LibVmiError::Resume`] if LibVMI does not: then it is paused still, or gone.
    pub fn resume(mut self) -> Result<(), LibVmiError> {
        match self.run_on() {
            true => Ok(()),
            false => Err(LibVmiError::Resume {
                domain: self.guest.inner.domain.clone(),
            }),
        }
    }

    /// Lets it run on, once.
    fn run_on(&mut self) -> bool {
        if self.is_resumed {
            return true;
        }
        self.is_resumed = true;
        let resumed = self.guest.inner.instance.resume();
        if let Some(watchdog) = self.watchdog.take() {
            // If it is not resumed, the other process tries it, too.
            watchdog.end(resumed);
        }
        resumed
    }

    /// The guest.
    #[must_use]
    pub fn guest(&self) -> &LibVmiGuest {
        &self.guest
    }

    fn whole(&self, at: Gpa, len: usize) -> Result<GpaRange, MemoryError> {
        let none = MemoryError::NotRam {
            range: GpaRange::new(at, at),
        };
        let Ok(len) = u64::try_from(len) else {
            return Err(none);
        };
        let range = GpaRange::with_len(at, len).ok_or(none)?;
        match self.guest.inner.layout.contains(at, len) {
            true => Ok(range),
            false => Err(MemoryError::NotRam { range }),
        }
    }
}

impl Drop for PausedGuest {
    fn drop(&mut self) {
        // Who wants to know has called `resume`.
        self.run_on();
    }
}

impl GuestMemory for PausedGuest {
    fn layout(&self) -> &RamLayout {
        &self.guest.inner.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = self.whole(at, buf.len())?;
        if buf.is_empty() {
            return Ok(());
        }
        let inner = &self.guest.inner;
        inner
            .instance
            .read(at, buf)
            .map_err(|read| MemoryError::Backend {
                range,
                source: Box::new(LibVmiError::Read {
                    domain: inner.domain.clone(),
                    at,
                    wanted: buf.len(),
                    read,
                }),
            })
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        self.whole(at, len)?;
        let inner = &self.guest.inner;
        if len == 0 || len > MAX_MAP || !inner.maps.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let place = || {
            let skew = at.raw() & PAGE.offset_mask();
            let start = Gpa::new(at.raw().checked_sub(skew)?);
            let bytes = skew.checked_add(u64::try_from(len).ok()?)?;
            let pages = usize::try_from(bytes.div_ceil(PAGE.bytes())).ok()?;
            Some((start, usize::try_from(skew).ok()?, pages))
        };
        let Some((start, skew, pages)) = place() else {
            return Ok(None);
        };
        let Some(pages) = inner.instance.map(start, pages) else {
            // Not with this driver. What is not there says so when it is read.
            inner.maps.store(false, Ordering::Relaxed);
            return Ok(None);
        };
        Ok(pages.held(skew, len))
    }

    fn processors(&self) -> Processors {
        self.processors.clone()
    }
}
