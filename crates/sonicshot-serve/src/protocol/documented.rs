//! The form for every VMM: `docs/serve.md`.

use super::{Handshake, Mapping, Place};
use crate::address::HostAddress;
use crate::error::ServeError;
use serde::Deserialize;
use sonicshot::Gpa;

#[derive(Deserialize)]
struct Version {
    sonicshot: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    #[serde(rename = "sonicshot")]
    _version: u64,
    regions: Vec<Region>,
    /// Whether the process with the memory comes as a second descriptor.
    #[serde(default)]
    pidfd: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    host: u64,
    len: u64,
    gpa: u64,
    page: u64,
}

/// The version that is understood.
const VERSION: u64 = 1;

pub(super) fn parse(message: &[u8]) -> Result<Handshake, ServeError> {
    let version: Version = serde_json::from_slice(message)?;
    if version.sonicshot != VERSION {
        return Err(ServeError::Form {
            form: "of another version of the documented form",
            why: "this server knows version 1",
        });
    }
    let message: Message = serde_json::from_slice(message)?;
    let mappings = message.regions.iter().map(|region| Mapping {
        host: HostAddress::new(region.host),
        len: region.len,
        place: Place::Address(Gpa::new(region.gpa)),
        page: region.page,
    });
    Ok(Handshake {
        form: "the documented one",
        mappings: mappings.collect(),
        has_pidfd: message.pidfd,
        answers: true,
        needs_remove: true,
    })
}

/// Whether a message is meant to be of this form, of whatever else it has: its sender waits for an
/// answer.
pub(crate) fn is_documented(message: &[u8]) -> bool {
    message.trim_ascii_start().starts_with(b"{") && behind(message, b"\"sonicshot\"").is_some()
}

/// Whether the sender says that he is not the virtual machine, in a message that need not be whole.
pub(crate) fn names_another(message: &[u8]) -> bool {
    let value = behind(message, b"\"pidfd\"").filter(|_| is_documented(message));
    let value = value.and_then(|rest| rest.trim_ascii_start().strip_prefix(b":"));
    value.is_some_and(|value| value.trim_ascii_start().starts_with(b"true"))
}

fn behind<'m>(message: &'m [u8], what: &[u8]) -> Option<&'m [u8]> {
    let at = message.windows(what.len()).position(|part| part == what)?;
    message.get(at.checked_add(what.len())?..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_meant_is_told_of_half_a_message() {
        for (message, documented, another) in [
            (&b" {\"sonicshot\": 1, \"pidfd\" : true"[..], true, true),
            (b"{\"pidfd\":true,\"sonicshot\":1,", true, true),
            (b"{\"sonicshot\":1,\"pidfd\":false}", true, false),
            (b"{\"sonicshot\":x", true, false),
            (b"{\"pidfd\":true}", false, false),
            (b"[{\"sonicshot\":1,\"pidfd\":true}]", false, false),
            (b"{\"mappings\":[]}", false, false),
            (b"", false, false),
        ] {
            let told = String::from_utf8_lossy(message);
            assert_eq!(is_documented(message), documented, "{told}");
            assert_eq!(names_another(message), another, "{told}");
        }
    }
}
