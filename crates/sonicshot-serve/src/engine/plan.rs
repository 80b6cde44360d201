//! The pages that come in before they are asked for, and when.

use crate::set::PageSet;
use core::time::Duration;
use sonicshot::{Gpa, GpaRange};
use std::sync::Arc;
use std::time::Instant;

/// The time without a fault before more is brought in than the set.
const QUIET: Duration = Duration::from_micros(200);
/// The time for which faults may keep it from going on at all.
const STARVED: Duration = Duration::from_millis(2);

/// The reason for bringing in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The guest is known to need it, zeroes as well: nothing is gained by waiting.
    Set,
    /// It is all the same when.
    Rest,
}

#[derive(Debug)]
pub(super) struct Plan {
    set: Arc<PageSet>,
    rest: Arc<[GpaRange]>,
    part: Part,
    /// The number of the range, and the place in it.
    number: usize,
    at: Option<Gpa>,
    /// Whether the end of the rest is the end of all.
    everything: bool,
    finished: bool,
    fault: Option<Instant>,
    /// Whether that was a moment ago: the clock need not be read again.
    just_now: bool,
    step: Option<Instant>,
}

/// The time to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Now,
    In(Duration),
    /// There is nothing to bring in.
    Never,
}

impl Plan {
    /// The set alone.
    pub fn new(set: Arc<PageSet>) -> Self {
        Self {
            set,
            everything: false,
            rest: Arc::default(),
            part: Part::Set,
            number: 0,
            at: None,
            finished: false,
            fault: None,
            just_now: false,
            step: None,
        }
    }

    /// All that is left, from now on.
    pub fn extend(&mut self, rest: Arc<[GpaRange]>) {
        if self.everything {
            return;
        }
        self.everything = true;
        self.rest = rest;
        if self.finished {
            (self.part, self.number, self.at) = (Part::Rest, 0, None);
            self.finished = false;
        }
    }

    /// Nothing more: what is left cannot be read.
    pub fn give_up(&mut self) {
        self.finished = true;
        self.everything = false;
    }

    pub fn is_finished(&self) -> bool {
        self.finished
    }

    pub fn is_everything(&self) -> bool {
        self.everything
    }

    /// A guest has waited until `now`.
    pub fn saw_fault(&mut self, now: Instant) {
        if !self.finished {
            self.fault = Some(now);
            self.just_now = true;
        }
    }

    /// The range that is next, and what for.
    pub fn next(&mut self) -> Option<(GpaRange, Part)> {
        while !self.finished {
            let ranges = match self.part {
                Part::Set => self.set.ranges(),
                Part::Rest => &self.rest,
            };
            if let Some(range) = ranges.get(self.number) {
                let start = self.at.unwrap_or(range.start()).max(range.start());
                if start < range.end() {
                    return Some((GpaRange::new(start, range.end()), self.part));
                }
                // There is one of this number.
                self.number = self.number.checked_add(1).unwrap_or(ranges.len());
                self.at = None;
            } else if self.part == Part::Set && self.everything {
                (self.part, self.number, self.at) = (Part::Rest, 0, None);
            } else {
                self.finished = true;
            }
        }
        None
    }

    /// All before `at` of the range that was next is done.
    pub fn go_on_at(&mut self, at: Gpa) {
        self.at = Some(at);
    }

    /// Whether it is time to go on.
    pub fn turn(&mut self) -> Turn {
        if self.next().is_none() {
            return Turn::Never;
        }
        if self.part == Part::Set {
            return Turn::Now;
        }
        let Some(fault) = self.fault else {
            return Turn::Now;
        };
        let now = match core::mem::take(&mut self.just_now) {
            true => fault,
            false => Instant::now(),
        };
        let quiet = now.duration_since(fault);
        let waited = self.step.map_or(STARVED, |step| now.duration_since(step));
        let left = QUIET.checked_sub(quiet).zip(STARVED.checked_sub(waited));
        let left = left.map(|(quiet, starved)| quiet.min(starved));
        match left.filter(|left| !left.is_zero()) {
            Some(left) => Turn::In(left),
            None => {
                self.step = Some(now);
                Turn::Now
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(list: &[(u64, u64)]) -> Vec<GpaRange> {
        let range = |&(start, end)| GpaRange::new(Gpa::new(start), Gpa::new(end));
        list.iter().map(range).collect()
    }

    /// Goes through a plan in steps of `step` bytes.
    fn walk(plan: &mut Plan, step: u64) -> Vec<(u64, Part)> {
        let mut out = Vec::new();
        while let Some((range, part)) = plan.next() {
            out.push((range.start().raw(), part));
            plan.go_on_at(range.start().checked_add(step).unwrap());
        }
        out
    }

    #[test]
    fn the_set_comes_first_then_the_rest() {
        let set = Arc::new(PageSet::from_ranges(ranges(&[(8, 12), (20, 24)])));
        let rest = ranges(&[(16, 24), (0, 4)]);
        let (s, r) = (Part::Set, Part::Rest);
        let mut plan = Plan::new(Arc::clone(&set));
        plan.extend(rest.clone().into());
        let all = [(8, s), (20, s), (16, r), (20, r), (0, r)];
        assert_eq!(walk(&mut plan, 4), all);
        assert!(plan.is_finished() && plan.turn() == Turn::Never);
        let mut plan = Plan::new(set);
        assert_eq!(walk(&mut plan, 4), [(8, s), (20, s)]);
        // More is asked for later.
        plan.extend(rest.into());
        assert_eq!(walk(&mut plan, 100), [(16, r), (0, r)]);
        plan.extend(ranges(&[(0, 100)]).into());
        assert!(plan.is_finished());
    }

    #[test]
    fn the_rest_stands_back_while_faults_come() {
        let mut plan = Plan::new(Arc::default());
        plan.extend(ranges(&[(0, 1 << 30)]).into());
        assert_eq!(plan.turn(), Turn::Now);
        plan.saw_fault(Instant::now());
        // Nothing was done for long: it is not starved.
        assert_eq!(plan.turn(), Turn::Now);
        plan.saw_fault(Instant::now());
        assert!(matches!(plan.turn(), Turn::In(wait) if wait <= QUIET));
        std::thread::sleep(QUIET);
        assert_eq!(plan.turn(), Turn::Now);
    }
}
