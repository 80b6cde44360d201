//! The messages of Cloud Hypervisor's migration protocol (`vm-migration/src/protocol.rs`), as far
//! as a sender on the same host needs them. Numbers are little-endian.
//!
//! | | | |
//! |---|---|---|
//! | request | `u16` command, 6 bytes (of `Start` a `u16` version: 0), `u64` length of what follows | 16 bytes |
//! | answer | `u16` status (1 well, 2 not), 6 bytes, `u64` length of what follows | 16 bytes |
//! | what is asked for | `u64` guest-physical address, `u64` length | 16 bytes |

use crate::error::ServeError;
use sonicshot::{Cursor, Gpa, GpaRange};

/// Bytes of a request, and of an answer.
pub(super) const HEADER: usize = 16;
const WELL: u16 = 1;
const NOT_WELL: u16 = 2;
const ABANDON: u16 = 6;
const PAGE_FAULT: u16 = 9;
/// Bytes of a range.
const RANGE: u64 = 16;
/// The role of a connection: page faults.
pub(super) const ROLE_FAULT: [u8; 2] = 2_u16.to_le_bytes();

/// The commands on the first connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Start,
    MemoryFd,
    Config,
    State,
    Complete,
    CompletePaused,
}

impl Command {
    const fn number(self) -> u16 {
        match self {
            Self::Start => 1,
            Self::Config => 2,
            Self::State => 3,
            Self::Complete => 5,
            Self::MemoryFd => 7,
            Self::CompletePaused => 8,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "Start",
            Self::MemoryFd => "MemoryFd",
            Self::Config => "Config",
            Self::State => "State",
            Self::Complete => "Complete",
            Self::CompletePaused => "CompletePaused",
        }
    }

    /// The request, of which `len` bytes follow.
    pub fn request(self, len: u64) -> [u8; HEADER] {
        header(self.number(), len)
    }

    /// Whether an answer to it says that it went well.
    pub fn check(self, answer: &[u8; HEADER]) -> Result<(), ServeError> {
        let command = self.name();
        match parts(answer) {
            (WELL, 0) => Ok(()),
            (NOT_WELL, _) => Err(ServeError::Rejected { command }),
            (status, len) => Err(ServeError::Answer {
                command,
                status,
                len,
            }),
        }
    }
}

/// The answer that all that was asked for is in the shared memory.
pub(super) fn well() -> [u8; HEADER] {
    header(WELL, 0)
}

fn header(first: u16, len: u64) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    let (head, tail) = out.split_at_mut(8);
    if let Some(head) = head.first_chunk_mut() {
        *head = first.to_le_bytes();
    }
    tail.copy_from_slice(&len.to_le_bytes());
    out
}

fn parts(header: &[u8; HEADER]) -> (u16, u64) {
    let [a, b, _, _, _, _, _, _, len @ ..] = header;
    (u16::from_le_bytes([*a, *b]), u64::from_le_bytes(*len))
}

/// A message of Cloud Hypervisor on the connection for page faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultRequest {
    /// It waits for these pages.
    Pages(GpaRange),
    /// It wants no more.
    Abandon,
}

impl FaultRequest {
    /// The longest one in bytes.
    pub const MAX: usize = 32;

    /// The request that `bytes` begin with, and its length in bytes; `None` if more have to come.
    ///
    /// # Errors
    /// [`ServeError::NoQuestion`] if it is another command, [`ServeError::Asked`] if it asks for
    /// nothing, or for what is behind the last address.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, ServeError> {
        let Some(head) = bytes.first_chunk() else {
            return Ok(None);
        };
        match parts(head) {
            (PAGE_FAULT, RANGE) => {}
            (ABANDON, 0) => return Ok(Some((Self::Abandon, HEADER))),
            (command, len) => return Err(ServeError::NoQuestion { command, len }),
        }
        let Some(range) = bytes.get(HEADER..Self::MAX) else {
            return Ok(None);
        };
        let mut words = Cursor::new(range);
        let (Ok(at), Ok(len)) = (words.le::<u64>(), words.le::<u64>()) else {
            return Ok(None);
        };
        let at = Gpa::new(at);
        match GpaRange::with_len(at, len).filter(|_| len > 0) {
            Some(range) => Ok(Some((Self::Pages(range), Self::MAX))),
            None => Err(ServeError::Asked { at, len }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_as_the_protocol_has_them() {
        for (command, len, expected) in [
            (Command::Start, 0, "01000000000000000000000000000000"),
            (Command::Config, 0x1234, "02000000000000003412000000000000"),
            (Command::State, 1 << 40, "03000000000000000000000000010000"),
            (Command::Complete, 0, "05000000000000000000000000000000"),
            (Command::MemoryFd, 4, "07000000000000000400000000000000"),
            (
                Command::CompletePaused,
                0,
                "08000000000000000000000000000000",
            ),
        ] {
            let hex: String = command
                .request(len)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(hex, expected, "{}", command.name());
        }
    }

    #[test]
    fn an_answer_is_well_or_an_error() {
        for (status, len, expected) in [
            (1, 0, None),
            (2, 0, Some("refused the command State")),
            (2, 9, Some("refused the command State")),
            (1, 9, Some("status 1 and 9 bytes")),
            (0, 0, Some("status 0")),
            (3, 0, Some("status 3")),
        ] {
            let told = Command::State.check(&header(status, len)).err();
            match (told, expected) {
                (None, None) => {}
                (Some(error), Some(words)) => {
                    assert!(error.to_string().contains(words), "{error}");
                }
                (told, _) => panic!("{status} {len}: {told:?}"),
            }
        }
    }

    fn question(command: u16, len: u64, at: u64, pages: u64) -> Vec<u8> {
        let mut out = header(command, len).to_vec();
        out.extend(at.to_le_bytes());
        out.extend(pages.to_le_bytes());
        out
    }

    #[test]
    fn what_is_asked_comes_in_pieces() {
        let whole = question(9, 16, 0x4000, 0x1000);
        for end in 0..whole.len() {
            assert!(FaultRequest::parse(&whole[..end]).unwrap().is_none());
        }
        let range = GpaRange::with_len(Gpa::new(0x4000), 0x1000).unwrap();
        let found = FaultRequest::parse(&[&whole[..], &[7]].concat()).unwrap();
        assert_eq!(found, Some((FaultRequest::Pages(range), 32)));
        let abandoned = FaultRequest::parse(&header(6, 0)).unwrap();
        assert_eq!(abandoned, Some((FaultRequest::Abandon, 16)));
    }

    #[test]
    fn what_is_no_question_is_refused() {
        for (bytes, words) in [
            (question(8, 16, 0, 4096), "command 8"),
            (question(9, 15, 0, 4096), "15 bytes"),
            (question(6, 1, 0, 4096), "command 6"),
            (question(9, 16, 0x1000, 0), "0x0 bytes"),
            (question(9, 16, u64::MAX - 4095, 8192), "0x2000 bytes"),
        ] {
            let error = FaultRequest::parse(&bytes).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    proptest! {
        #[test]
        fn questions_are_read_as_they_were_put(at in any::<u64>(), len in any::<u64>()) {
            let bytes = question(9, 16, at, len);
            match (FaultRequest::parse(&bytes), GpaRange::with_len(Gpa::new(at), len)) {
                (Ok(Some((FaultRequest::Pages(found), 32))), Some(range)) => prop_assert_eq!(found, range),
                (Err(ServeError::Asked { .. }), range) => prop_assert!(len == 0 || range.is_none()),
                (other, _) => panic!("{other:?}"),
            }
        }

        #[test]
        fn anything_may_come(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = FaultRequest::parse(&bytes);
        }
    }
}
