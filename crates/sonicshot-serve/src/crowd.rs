//! Who has connected: those whose message has not come whole, and the virtual machines that are served.
//!
//! Whoever says nothing takes no virtual machine's place. There are other places for those that have not said
//! all, and if they are full the one that has said nothing for longest goes: of the user who has most of
//! them, so that who connects often drives out nobody but himself.

use core::cmp::Reverse;
use core::time::Duration;
use sonicshot::to_u64;
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Connections that may wait at once, for the rest of their message or for a place.
pub(crate) const MAX_WAITING: u64 = 64;
/// The time that each has for its message whoever else comes: it may be on its way.
pub(crate) const GRACE: Duration = Duration::from_millis(100);

/// All who have connected.
#[derive(Debug)]
pub(crate) struct Crowd {
    /// Virtual machines that are served at once.
    most: usize,
    state: Mutex<State>,
    /// One has gone, or has another stage.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By their numbers, in the order in which they came.
    waiting: BTreeMap<usize, Waiting>,
    served: usize,
}

#[derive(Debug)]
struct Waiting {
    uid: Option<u32>,
    since: Instant,
    stream: Arc<UnixStream>,
    stage: Stage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its message has not come whole.
    Silent,
    /// The same, and it made place for another.
    SentAway,
    /// Its message has come, or is not waited for any more.
    Heard,
    /// It is to be served as soon as there is a place.
    Ready,
}

impl State {
    fn one_more_is_served(&mut self) {
        self.served = self.served.saturating_add(1);
    }

    /// Who goes if there is no place: it had its time, and of its user there are most.
    fn silent_for_longest(&mut self) -> Option<&mut Waiting> {
        let silent = self.waiting.iter().filter(|(_, one)| one.is_silent());
        let users: Vec<_> = silent.map(|(_, one)| one.uid).collect();
        let same = |uid: Option<u32>| users.iter().filter(|user| **user == uid).count();
        let had_time = |one: &Waiting| one.stage == Stage::Silent && one.since.elapsed() >= GRACE;
        let those = self.waiting.iter_mut().filter(|(_, one)| had_time(one));
        let longest = those.max_by_key(|(number, one)| (same(one.uid), Reverse(**number)));
        longest.map(|(_, one)| one)
    }

    /// Those that are to be served as soon as there is a place, in the order in which they came.
    fn ready(&self) -> impl Iterator<Item = usize> {
        let ready = self
            .waiting
            .iter()
            .filter(|(_, one)| one.stage == Stage::Ready);
        ready.map(|(number, _)| *number)
    }

    /// Whether there is a place for a virtual machine, behind those that are ready.
    fn has_place(&self, most: usize) -> bool {
        let taken = self.ready().count().checked_add(self.served);
        taken.is_some_and(|taken| taken < most)
    }
}

impl Waiting {
    fn is_silent(&self) -> bool {
        matches!(self.stage, Stage::Silent | Stage::SentAway)
    }
}

impl Crowd {
    /// Nobody, of whom `most` will be served at once, or one.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is a place for a virtual machine, or `is_enough`. Who comes meanwhile is not taken
    /// in: should this process be gone before there is one, another takes him in.
    pub fn wait_for_place(&self, is_enough: impl Fn() -> bool) {
        let mut state = self.state();
        while !state.has_place(self.most) && !is_enough() {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until one more may wait; for that it sends away who says nothing.
    pub fn make_place(&self) {
        let mut state = self.state();
        while to_u64(state.waiting.len()) >= MAX_WAITING {
            if let Some(one) = state.silent_for_longest() {
                one.stage = Stage::SentAway;
                // Its thread is told of the end of what comes; that it is closed already does not matter.
                let _ = one.stream.shutdown(Shutdown::Read);
            }
            let waited = self.changed.wait_timeout(state, GRACE);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes in who has connected as this user, with a number above those of all before.
    pub fn enter(
        self: &Arc<Self>,
        number: usize,
        uid: Option<u32>,
        stream: &Arc<UnixStream>,
    ) -> Seat {
        let waiting = Waiting {
            uid,
            since: Instant::now(),
            stream: Arc::clone(stream),
            stage: Stage::Silent,
        };
        self.state().waiting.insert(number, waiting);
        Seat {
            crowd: Arc::clone(self),
            number: Some(number),
        }
    }

    /// Takes in a virtual machine that runs already.
    pub fn enter_served(self: &Arc<Self>) -> Seat {
        let mut state = self.state();
        state.one_more_is_served();
        drop(state);
        Seat {
            crowd: Arc::clone(self),
            number: None,
        }
    }

    /// Waits until nobody is there.
    pub fn wait_for_none(&self) {
        let mut state = self.state();
        while state.served > 0 || !state.waiting.is_empty() {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells those who wait that there may be something else to wait for.
    pub fn wake(&self) {
        // Nobody is between his look and his sleep.
        drop(self.state());
        self.changed.notify_all();
    }
}

/// A place in the crowd, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    crowd: Arc<Crowd>,
    /// The number of one that waits; one that is served has none.
    number: Option<usize>,
}

impl Seat {
    /// Nothing more is waited for. Says whether it was sent away meanwhile.
    pub fn heard(&self) -> bool {
        let stage = self.change(Stage::Heard);
        stage == Some(Stage::SentAway)
    }

    /// Gives it another stage, and says which it had.
    fn change(&self, stage: Stage) -> Option<Stage> {
        let mut state = self.crowd.state();
        let one = state.waiting.get_mut(&self.number?)?;
        Some(core::mem::replace(&mut one.stage, stage))
    }

    /// Takes a virtual machine's place, if there is one and nobody is before it. Says whether it has one.
    pub fn take_now(&mut self) -> bool {
        // It is late for whoever does not get one.
        self.take_unless(|| true)
    }

    /// Waits for one, in the order in which they came. Says whether it has one: not if it is too late
    /// before that.
    pub fn take(&mut self, is_late: impl Fn() -> bool) -> bool {
        !is_late() && self.take_unless(is_late)
    }

    /// Takes a place, unless there is none and no more is to be waited for.
    fn take_unless(&mut self, is_over: impl Fn() -> bool) -> bool {
        let Some(number) = self.number else {
            return true;
        };
        self.change(Stage::Ready);
        let mut state = self.crowd.state();
        let taken = loop {
            if state.served < self.crowd.most && state.ready().next() == Some(number) {
                state.waiting.remove(&number);
                state.one_more_is_served();
                break true;
            }
            if is_over() {
                break false;
            }
            let waited = self.crowd.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        };
        if taken {
            self.number = None;
        } else if let Some(one) = state.waiting.get_mut(&number) {
            one.stage = Stage::Heard;
        }
        drop(state);
        self.crowd.changed.notify_all();
        taken
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.crowd.state();
        match self.number {
            Some(number) => drop(state.waiting.remove(&number)),
            None => state.served = state.served.saturating_sub(1),
        }
        drop(state);
        self.crowd.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct One {
        far: UnixStream,
        seat: Seat,
    }

    fn enter(crowd: &Arc<Crowd>, number: usize, uid: u32) -> One {
        let (near, far) = UnixStream::pair().unwrap();
        let seat = crowd.enter(number, Some(uid), &Arc::new(near));
        One { far, seat }
    }

    #[test]
    fn who_connects_often_drives_out_himself() {
        let crowd = Arc::new(Crowd::new(1));
        let most = sonicshot::to_usize(MAX_WAITING);
        // One user's is the oldest; another has all the rest.
        let mut all = vec![enter(&crowd, 0, 7)];
        all.extend((1..most).map(|number| enter(&crowd, number, 8)));
        // Whose message is there is not sent away.
        assert!(!all[1].seat.heard());
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| crowd.make_place());
            let gone = loop {
                let sent_away = |one: &One| {
                    let state = crowd.state();
                    let number = one.seat.number.unwrap();
                    state.waiting[&number].stage == Stage::SentAway
                };
                if let Some(index) = all.iter().position(sent_away) {
                    break index;
                }
                assert!(start.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(1));
            };
            assert_eq!(gone, 2);
            assert!(start.elapsed() >= GRACE);
            let one = all.remove(gone);
            assert!(one.seat.heard());
            drop(one);
        });
        assert_eq!(crowd.state().waiting.len(), most - 1);
        // There is a place now: nobody else goes.
        crowd.make_place();
        let state = crowd.state();
        assert!(
            state
                .waiting
                .values()
                .all(|one| one.stage != Stage::SentAway || one.uid == Some(8))
        );
        drop(state);
        drop(all);
        crowd.wait_for_none();
    }

    #[test]
    fn places_are_taken_in_turn_by_those_who_have_said_all() {
        let crowd = Arc::new(Crowd::new(1));
        let silent = enter(&crowd, 1, 7);
        let mut first = enter(&crowd, 2, 7);
        let mut second = enter(&crowd, 3, 7);
        let late = AtomicBool::new(false);
        assert!(first.seat.take_now());
        crowd.wait_for_place(|| true);
        assert!(!crowd.state().has_place(1));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| second.seat.take(|| late.load(Ordering::Relaxed)));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished());
            drop(first);
            assert!(waits.join().unwrap());
        });
        let mut third = enter(&crowd, 4, 7);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| third.seat.take(|| late.load(Ordering::Relaxed)));
            late.store(true, Ordering::Relaxed);
            crowd.wake();
            assert!(!waits.join().unwrap());
        });
        drop((silent.seat, second, third));
        // Nothing holds on to the connection.
        let mut far = silent.far;
        assert_eq!(far.read(&mut [0]).unwrap(), 0);
        crowd.wait_for_none();
    }
}
