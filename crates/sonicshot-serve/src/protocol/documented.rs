//! The form for every VMM: `docs/serve.md`.

use super::{Handshake, Mapping, Place};
use crate::error::ServeError;
use crate::uffd::HostAddress;
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
    })
}
