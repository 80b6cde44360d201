//! How many files this process may have open, and how many virtual machines that is enough for.

use crate::crowd::MAX_WAITING;
use crate::error::ServeError;
use rustix::process::{Resource, getrlimit, setrlimit};
use sonicshot::{Tally, to_u64, to_usize};

/// Virtual machines that are served at once if nobody says how many.
const USUAL: u64 = 1024;
/// Descriptors that each takes: its connection, two that come with it, its process, what its thread
/// is woken by, what is kept, and one to look at another with. Of whoever sends more some may be lost: he
/// is refused anyway.
const EACH: u64 = 7;
/// The same of one whose message is waited for, which has no thread to be woken and nothing kept.
const WAITING: u64 = 5;
/// Those that the process has beside, with connections of who wants its counters.
const OTHERS: u64 = 128;
/// All that are no virtual machine's.
const BESIDE: u64 = MAX_WAITING * WAITING + OTHERS;

/// Lets this process have as many descriptors as it may.
pub fn allow_many_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If not there are fewer, and whoever needs more says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Refuses to serve so many virtual machines at once, or a single one, if this process may not have
/// as many descriptors as that needs: of one too many those that came with it would be lost.
///
/// # Errors
/// [`ServeError::FewDescriptors`].
pub fn check_descriptors(max_vms: Option<usize>) -> Result<(), ServeError> {
    most_served(max_vms).map(drop)
}

/// The number that may be served at once.
pub(crate) fn most_served(max_vms: Option<usize>) -> Result<usize, ServeError> {
    most_below(getrlimit(Resource::Nofile).current, max_vms.map(to_u64)).map(to_usize)
}

fn most_below(limit: Option<u64>, wanted: Option<u64>) -> Result<u64, ServeError> {
    let (least, most) = match wanted {
        Some(wanted) => (wanted, wanted),
        None => (1, USUAL),
    };
    let Some(limit) = limit else {
        return Ok(most);
    };
    let room = match limit.checked_sub(BESIDE) {
        Some(rest) => rest / EACH,
        None => 0,
    };
    if room >= least {
        return Ok(room.min(most));
    }
    Err(ServeError::FewDescriptors {
        limit,
        vms: least,
        needed: Tally::new(least).times(EACH).and(BESIDE).get(),
        each: EACH,
        beside: BESIDE,
        room,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_served_as_there_are_descriptors_for() {
        let beside = 64 * 5 + 128;
        for (limit, wanted, most) in [
            (None, None, 1024),
            (None, Some(5000), 5000),
            (Some(1 << 20), None, 1024),
            (Some(beside + 7), None, 1),
            (Some(beside + 7 * 10 + 6), None, 10),
            (Some(beside + 7 * 10), Some(10), 10),
            (Some(beside + 7 * 10), Some(1), 1),
        ] {
            let found = most_below(limit, wanted).unwrap();
            assert_eq!(found, most, "{limit:?} {wanted:?}");
        }
        for (limit, wanted, vms) in [
            (0, None, 1),
            (beside + 6, None, 1),
            (beside + 69, Some(10), 10),
            (1024, Some(u64::MAX), u64::MAX),
        ] {
            let error = most_below(Some(limit), wanted).unwrap_err();
            let ServeError::FewDescriptors { needed, room, .. } = error else {
                panic!("{error:?}");
            };
            assert!(needed > limit && room < vms, "{limit} {wanted:?}");
        }
    }
}
