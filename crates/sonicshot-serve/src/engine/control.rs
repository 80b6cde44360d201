//! The signals between a thread that serves a virtual machine and who started it.

use crate::error::ServeError;
use core::sync::atomic::{AtomicBool, Ordering};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// All pages are in place.
    pub complete: bool,
    /// The thread has ended.
    pub ended: bool,
    pub error: Option<Arc<ServeError>>,
}

#[derive(Debug)]
pub(crate) struct Control {
    /// Readable when there is something to be looked at here.
    pub wake: OwnedFd,
    stopping: AtomicBool,
    everything: AtomicBool,
    outcome: Mutex<Outcome>,
    changed: Condvar,
}

impl Control {
    pub fn new() -> Result<Self, ServeError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            wake: wake.map_err(ServeError::system("eventfd"))?,
            stopping: AtomicBool::new(false),
            everything: AtomicBool::new(false),
            outcome: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn signal(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub fn seen(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
    }

    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.signal();
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Asks for all that is left.
    pub fn want_everything(&self) {
        self.everything.store(true, Ordering::Release);
        self.signal();
    }

    pub fn wants_everything(&self) -> bool {
        self.everything.swap(false, Ordering::AcqRel)
    }

    pub fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn tell(&self, change: impl FnOnce(&mut Outcome)) {
        change(&mut self.outcome());
        self.changed.notify_all();
    }

    /// Waits until all is in place, or it cannot be.
    pub fn wait(&self) -> Result<(), Arc<ServeError>> {
        let mut outcome = self.outcome();
        loop {
            if let Some(error) = &outcome.error {
                return Err(Arc::clone(error));
            }
            if outcome.complete || outcome.ended {
                return Ok(());
            }
            outcome = self
                .changed
                .wait(outcome)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
