//! The candidates: pages that may be a kernel's VMCOREINFO, by the page tables that they name.

use super::image::pointed_to;
use super::{Found, origin, read_text};
use crate::arch::Tables;
use crate::error::VmiError;
use core::fmt::Display;
use sonicshot::{Gpa, GuestMemory, to_u64};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// The longest time for which kernels are tried, all together: one takes some 50 ms.
const TRIES: Duration = Duration::from_secs(10);
/// So many of the candidates that failed are told of.
const MAX_TOLD: usize = 4;

/// Keeps one more of what is told, if there is room.
fn tell(told: &mut Vec<String>, why: &dyn Display) {
    if told.len() < MAX_TOLD {
        told.push(why.to_string());
    }
}

/// The result of a search for kernels.
#[derive(Debug)]
pub(crate) enum Search<T> {
    /// These stand: at least one, and only one if it is proven.
    Standing(Vec<T>),
    /// No page has the VMCOREINFO of a kernel of this memory, whatever begins so. A kernel may be
    /// there all the same that has none.
    NoText(NoText),
}

/// The finding instead of a kernel's VMCOREINFO.
#[derive(Debug)]
pub(crate) struct NoText {
    /// Of the pages that begin so what is wrong with the first few.
    told: Vec<String>,
    /// A kernel of a machine that cannot be read.
    other: Option<VmiError>,
}

impl NoText {
    /// The error that no kernel is found, when `why` is the result of the search for one without
    /// VMCOREINFO.
    pub(crate) fn and(self, why: VmiError) -> VmiError {
        match (self.other, why) {
            (
                Some(other),
                VmiError::NoKernel { .. }
                | VmiError::NoTables { .. }
                | VmiError::TooMany { .. }
                | VmiError::OutOfTime { .. },
            ) => other,
            (_, VmiError::NoKernel { tried }) => VmiError::NoKernel {
                tried: format!("{}, and {tried}", Self::text(self.told)),
            },
            (
                _,
                VmiError::NoTables {
                    records, tables, ..
                },
            ) => VmiError::NoTables {
                records,
                tables,
                tried: Self::text(self.told),
            },
            (_, why) => why,
        }
    }

    fn text(mut told: Vec<String>) -> String {
        if told.is_empty() {
            told.push("no page begins with VMCOREINFO".into());
        }
        told.join("; ")
    }
}

/// The result of trying a kernel to the end.
#[derive(Debug)]
pub(crate) struct Tried<T> {
    pub value: T,
    /// Whether it is certain that this kernel owns the memory.
    pub proven: bool,
}

/// All candidates for one kernel.
#[derive(Debug)]
struct Group {
    tables: Tables,
    note: bool,
    pages: Vec<Gpa>,
    /// The pages that the kernel's image points to, once they were looked for.
    pointed: Option<HashSet<Gpa>>,
    /// The texts that were tried.
    tried: HashSet<u64>,
    stands: bool,
}

pub(super) type Attempt<'a, 'm, T> = dyn FnMut(Found<'m>) -> Result<Tried<T>, VmiError> + 'a;

/// All candidates of a memory.
pub(super) struct Candidates<'a, 'm, T> {
    memory: &'m dyn GuestMemory,
    given: Option<&'a [u8]>,
    attempt: &'a mut Attempt<'a, 'm, T>,
    groups: Vec<Group>,
    by_tables: HashMap<Tables, usize>,
    hasher: RandomState,
    /// The rest of [`TRIES`].
    left: Duration,
    /// Whether a candidate was not tried, for there was no time.
    out_of_time: bool,
    told: Vec<String>,
    error: Option<VmiError>,
    /// A kernel of a machine that cannot be read.
    other: Option<VmiError>,
    standing: Vec<T>,
}

impl<'a, 'm, T> Candidates<'a, 'm, T> {
    /// None yet; `attempt` tries one to the end, and `given` is the text of a dump's note.
    pub(super) fn new(
        memory: &'m dyn GuestMemory,
        given: Option<&'a [u8]>,
        attempt: &'a mut Attempt<'a, 'm, T>,
    ) -> Self {
        Self {
            memory,
            given,
            attempt,
            groups: Vec::new(),
            by_tables: HashMap::new(),
            hasher: RandomState::new(),
            left: TRIES,
            out_of_time: false,
            told: Vec::new(),
            error: None,
            other: None,
            standing: Vec::new(),
        }
    }

    /// Notes why a text is not a kernel's of this memory. One of a machine of another kind says
    /// more than that there is no kernel.
    pub(super) fn unconfirmed(&mut self, origin: &dyn Display, why: VmiError) {
        self.tell(&format_args!("{origin}: {why}"));
        if matches!(why, VmiError::OtherMachine { .. }) && self.other.is_none() {
            self.other = Some(why);
        }
    }

    /// Keeps what is wrong with a candidate, of a few.
    fn tell(&mut self, why: &dyn Display) {
        tell(&mut self.told, why);
    }

    /// The number of the group with these page tables.
    fn group(&mut self, tables: Tables) -> usize {
        let next = self.groups.len();
        let number = *self.by_tables.entry(tables).or_insert(next);
        if number == next {
            self.groups.push(Group {
                tables,
                note: false,
                pages: Vec::new(),
                pointed: None,
                tried: HashSet::new(),
                stands: false,
            });
        }
        number
    }

    /// Takes the dump's note for a candidate; returns the number of its group.
    pub(super) fn add_note(&mut self, tables: Tables) -> usize {
        let number = self.group(tables);
        if let Some(group) = self.groups.get_mut(number) {
            group.note = true;
        }
        number
    }

    /// Takes the page `at` for a candidate; returns the number of its group.
    pub(super) fn add_page(&mut self, tables: Tables, at: Gpa) -> usize {
        let number = self.group(tables);
        if let Some(group) = self.groups.get_mut(number) {
            group.pages.push(at);
        }
        number
    }

    /// Whether the page `at` is worth a try while others of its group may follow: the first is,
    /// and those that the kernel's image points to.
    pub(super) fn may_be_own(&mut self, number: usize, at: Gpa) -> bool {
        let Some(group) = self.groups.get_mut(number) else {
            return false;
        };
        if group.stands {
            return false;
        }
        if group.tried.is_empty() {
            return true;
        }
        let (memory, tables) = (self.memory, group.tables);
        let left = &mut self.left;
        let pointed = group
            .pointed
            .get_or_insert_with(|| timed(left, || pointed_to(memory, &tables)));
        pointed.contains(&at)
    }

    /// Tries one text to the end, unless the same was tried. `at` is its page, or it is the note.
    /// Returns the kernel if it is proven.
    pub(super) fn try_text(&mut self, number: usize, text: &[u8], at: Option<Gpa>) -> Option<T> {
        let group = self.groups.get_mut(number)?;
        let end = memchr::memchr(0, text).unwrap_or(text.len());
        let (text, _) = text.split_at(end);
        if !group.tried.insert(self.hasher.hash_one(text)) {
            return None;
        }
        if self.left.is_zero() {
            self.out_of_time = true;
            return None;
        }
        let memory = self.memory;
        let attempt = &mut *self.attempt;
        let tables = group.tables;
        let tried = timed(&mut self.left, || {
            let found = Found::new(memory, &tables, text, at)?;
            attempt(found)
        });
        match tried {
            Ok(tried) if tried.proven => return Some(tried.value),
            Ok(tried) => {
                group.stands = true;
                self.standing.push(tried.value);
            }
            Err(why) => {
                self.tell(&format_args!("{}: {why}", origin(at)));
                // That a copy is none says less than what is wrong with the kernel's own.
                if matches!(self.error, None | Some(VmiError::Stale { .. })) {
                    self.error = Some(why);
                }
            }
        }
        None
    }

    /// Tries the groups: those with the best evidence (`runs`) first, else in the order in which they
    /// were found. Returns the kernel if one is proven.
    pub(super) fn try_groups(&mut self, runs: &dyn Fn(&Tables) -> bool) -> Option<T> {
        let mut order: Vec<usize> = (0..self.groups.len()).collect();
        order.sort_by_key(|number| {
            let group = self.groups.get(*number);
            !group.is_some_and(|group| runs(&group.tables))
        });
        order.into_iter().find_map(|number| self.try_group(number))
    }

    /// Tries the candidates of a group until one stands. Returns the kernel if it is proven.
    fn try_group(&mut self, number: usize) -> Option<T> {
        let group = self.groups.get_mut(number)?;
        if group.stands {
            return None;
        }
        let note = self.given.filter(|_| group.note);
        let mut pages = core::mem::take(&mut group.pages);
        if pages.len() > 1 {
            let (memory, tables) = (self.memory, group.tables);
            let left = &mut self.left;
            let pointed = group
                .pointed
                .get_or_insert_with(|| timed(left, || pointed_to(memory, &tables)));
            // Only if none is the kernel's own, for whatever reason, may any be.
            if pages.iter().any(|page| pointed.contains(page)) {
                pages.retain(|page| pointed.contains(page));
            }
        }
        if let Some(text) = note
            && let Some(proven) = self.try_text(number, text, None)
        {
            return Some(proven);
        }
        for page in pages {
            if self.groups.get(number)?.stands {
                break;
            }
            if let Some(text) = read_text(self.memory, page)
                && let Some(proven) = self.try_text(number, &text, Some(page))
            {
                return Some(proven);
            }
        }
        None
    }

    pub(super) fn outcome(self) -> Result<Search<T>, VmiError> {
        let untried = || format!("candidates that {} s were too short for", TRIES.as_secs());
        if self.groups.is_empty() {
            return Ok(Search::NoText(NoText {
                told: self.told,
                other: self.other,
            }));
        }
        match (self.standing.is_empty(), self.out_of_time, self.error) {
            (false, false, _) => Ok(Search::Standing(self.standing)),
            (false, true, _) => Err(VmiError::Undecided {
                first: "the one that was found".into(),
                second: untried(),
            }),
            // What is wrong with the only kernels there are says more than that there is none.
            (true, false, Some(error)) => Err(error),
            (true, true, _) => {
                let tried = self.groups.iter().filter(|group| !group.tried.is_empty());
                Err(VmiError::OutOfTime {
                    what: "pages that may be a kernel's VMCOREINFO",
                    done: to_u64(tried.count()),
                    all: to_u64(self.groups.len()),
                    seconds: TRIES.as_secs(),
                })
            }
            (true, false, _) => Err(VmiError::NoKernel {
                tried: self.told.join("; "),
            }),
        }
    }
}

/// Does `work`, and takes the time that it took from `left`.
fn timed<R>(left: &mut Duration, work: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let done = work();
    *left = left.saturating_sub(started.elapsed());
    done
}

#[cfg(test)]
mod tests {
    use super::{MAX_TOLD, tell};

    #[test]
    fn of_candidates_without_end_a_few_are_told_of() {
        let mut told = Vec::new();
        for number in 0..9_usize {
            tell(&mut told, &number);
            assert_eq!(told.len(), (number + 1).min(MAX_TOLD));
        }
        assert_eq!(told, ["0", "1", "2", "3"]);
    }
}
