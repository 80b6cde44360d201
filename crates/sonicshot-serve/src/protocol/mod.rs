//! The messages of VMMs on their memory: one message with a `userfaultfd`.
//!
//! Each form is in a file of its own, which makes a [`Handshake`] of the message. Nothing of a VMM
//! is known outside of these.

mod documented;
mod firecracker;
mod receive;

pub(crate) use self::documented::{is_documented, names_another};
pub(crate) use self::receive::{Received, receive, receive_rest};
use crate::address::HostAddress;
use crate::engine::{MAX_PAGE, MIN_PAGE, VmRegion, check_disjoint};
use crate::error::ServeError;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sonicshot::{Gpa, GpaRange, RamLayout};

/// Regions that a message may have: as many as a checkpoint.
const MAX_REGIONS: usize = 4096;

/// The place of a region in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// In a file that has all RAM, lowest first, without holes.
    Offset(u64),
    /// By its guest-physical address.
    Address(Gpa),
}

/// A range of a VMM's memory, as it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Its start in the VMM.
    pub host: HostAddress,
    /// Its length in bytes.
    pub len: u64,
    /// Its place in the guest.
    pub place: Place,
    /// The size of its pages in bytes.
    pub page: u64,
}

/// A message, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// The name of its form, for people.
    pub form: &'static str,
    /// The memory.
    pub mappings: Vec<Mapping>,
    /// Whether a second descriptor came, a pidfd: the sender is not the virtual machine itself.
    pub has_pidfd: bool,
    /// Whether the sender waits for an answer.
    pub answers: bool,
    /// Whether the VMM may give pages back, of which its `userfaultfd` must tell then
    /// (`EVENT_REMOVE`).
    pub needs_remove: bool,
}

/// The form of an object, told by the fields that it has.
#[derive(Deserialize)]
struct Object {
    sonicshot: Option<IgnoredAny>,
}

impl Handshake {
    /// Understands a message that came with so many descriptors.
    ///
    /// # Errors
    /// [`ServeError`] if it is of no form that is served, or cannot be.
    pub fn parse(message: &[u8], descriptors: usize) -> Result<Self, ServeError> {
        let begins = message.iter().find(|byte| !byte.is_ascii_whitespace());
        let handshake = if begins == Some(&b'{')
            && serde_json::from_slice::<Object>(message)?
                .sonicshot
                .is_some()
        {
            documented::parse(message)?
        } else {
            firecracker::parse(message, descriptors)?
        };
        let expected = if handshake.has_pidfd { 2 } else { 1 };
        if descriptors != expected {
            return Err(ServeError::Descriptors {
                found: descriptors,
                expected,
            });
        }
        let found = handshake.mappings.len();
        if found == 0 || found > MAX_REGIONS {
            return Err(ServeError::Regions {
                found,
                max: MAX_REGIONS,
            });
        }
        Ok(handshake)
    }

    /// The regions of all of the memory, in a guest of this layout. A range that goes on from one range
    /// of RAM to the next is one region for each.
    ///
    /// # Errors
    /// [`ServeError`] if a range is not memory of that guest, or two have memory in common.
    pub fn regions(&self, layout: &RamLayout) -> Result<Vec<VmRegion>, ServeError> {
        let mut out = Vec::new();
        for mapping in &self.mappings {
            mapping.regions(layout, &mut out)?;
            if out.len() > MAX_REGIONS {
                return Err(ServeError::Regions {
                    found: out.len(),
                    max: MAX_REGIONS,
                });
            }
        }
        check_disjoint(&out)?;
        Ok(out)
    }
}

impl Mapping {
    fn regions(&self, layout: &RamLayout, out: &mut Vec<VmRegion>) -> Result<(), ServeError> {
        self.check()?;
        match self.place {
            Place::Address(at) => {
                let range = GpaRange::with_len(at, self.len);
                let guest = range.filter(|_| layout.contains(at, self.len));
                out.push(VmRegion {
                    guest: guest.ok_or_else(|| self.not_in_layout())?,
                    host: self.host,
                    page: self.page,
                });
            }
            Place::Offset(offset) => {
                let pieces = pieces(layout, offset, self.len);
                let mut host = self.host.raw();
                for guest in pieces.ok_or_else(|| self.not_in_layout())? {
                    out.push(VmRegion {
                        guest,
                        host: HostAddress::new(host),
                        page: self.page,
                    });
                    let next = host.checked_add(guest.len());
                    host = next.ok_or_else(|| self.unaligned())?;
                }
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ServeError> {
        if !self.page.is_power_of_two() || !(MIN_PAGE..=MAX_PAGE).contains(&self.page) {
            return Err(ServeError::PageSize {
                at: self.host,
                found: self.page,
                min: MIN_PAGE,
                max: MAX_PAGE,
            });
        }
        let host = self.host.raw();
        let whole = host.is_multiple_of(self.page) && self.len.is_multiple_of(self.page);
        if !whole || self.len == 0 || host.checked_add(self.len).is_none() {
            return Err(self.unaligned());
        }
        Ok(())
    }

    fn unaligned(&self) -> ServeError {
        ServeError::Unaligned {
            at: self.host,
            len: self.len,
            page: self.page,
        }
    }

    fn not_in_layout(&self) -> ServeError {
        let (what, at) = match self.place {
            Place::Offset(offset) => ("offset", offset),
            Place::Address(at) => ("address", at.raw()),
        };
        ServeError::NotInLayout {
            what,
            at,
            len: self.len,
        }
    }
}

/// The guest memory that is at `offset` in a file that has all RAM one after the other.
fn pieces(layout: &RamLayout, offset: u64, len: u64) -> Option<Vec<GpaRange>> {
    let mut out = Vec::new();
    let (mut inside, mut left) = (offset, len);
    for region in layout.regions() {
        if left == 0 {
            break;
        }
        if let Some(behind) = inside.checked_sub(region.len()) {
            inside = behind;
            continue;
        }
        let here = region.len().checked_sub(inside)?.min(left);
        out.push(GpaRange::with_len(
            region.start().checked_add(inside)?,
            here,
        )?);
        left = left.checked_sub(here)?;
        inside = 0;
    }
    (left == 0).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn layout() -> RamLayout {
        let range = |start: u64, len: u64| GpaRange::with_len(Gpa::new(start), len).unwrap();
        RamLayout::new(vec![range(0, 3 << 30), range(4 << 30, 1 << 30)]).unwrap()
    }

    fn mapping(host: u64, len: u64, place: Place, page: u64) -> Mapping {
        Mapping {
            host: HostAddress::new(host),
            len,
            place,
            page,
        }
    }

    fn parse(message: &Value, descriptors: usize) -> Result<Handshake, ServeError> {
        Handshake::parse(message.to_string().as_bytes(), descriptors)
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn every_form_of_the_message_is_understood() {
        let small = mapping(0x7f00_0000_0000, 128 * MIB, Place::Offset(MIB), 4096);
        let huge = Mapping {
            page: 2 * MIB,
            ..small
        };
        let base =
            json!({"base_host_virt_addr": 0x7f00_0000_0000_u64, "size": 128 * MIB, "offset": MIB});
        let with = |fields: &[(&str, u64)]| {
            let mut message = base.clone();
            for (name, value) in fields {
                message[*name] = (*value).into();
            }
            message
        };
        for (message, expected, form) in [
            // Firecracker 1.1 to 1.6; 1.7; 1.12; 2 and later.
            (json!([base.clone()]), small, "Firecracker's"),
            (
                json!([with(&[("page_size_kib", 4096)])]),
                small,
                "Firecracker's",
            ),
            (
                json!([with(&[("page_size_kib", 2 * MIB), ("page_size", 2 * MIB)])]),
                huge,
                "Firecracker's",
            ),
            (
                json!([with(&[("page_size", 2 * MIB)])]),
                huge,
                "Firecracker's",
            ),
            // Others add fields.
            (
                json!([with(&[("page_size", 4096), ("generation", 7)])]),
                small,
                "Firecracker's",
            ),
            (
                json!({"mappings": [{"base-host-virt-addr": 0x7f00_0000_0000_u64, "size": 128 * MIB, "offset": MIB, "page-size": 2 * MIB}]}),
                huge,
                "StratoVirt's",
            ),
            (
                json!({"mappings": [with(&[("page_size_kib", 4096)])]}),
                small,
                "StratoVirt's",
            ),
        ] {
            let handshake = parse(&message, 1).unwrap();
            assert_eq!(handshake.mappings, [expected], "{message}");
            assert_eq!(handshake.form, form);
            assert!(!handshake.answers && !handshake.has_pidfd);
            // Before 1.12 a Firecracker without a balloon asked for no events.
            let text = message.to_string();
            let older = message.is_array() && !text.contains("\"page_size\"");
            assert_eq!(handshake.needs_remove, !older, "{message}");
        }
        let own = json!({"sonicshot": 1, "regions": [{"host": 4096, "len": 8192, "gpa": MIB, "page": 4096}]});
        let handshake = parse(&own, 1).unwrap();
        let place = Place::Address(Gpa::new(MIB));
        assert_eq!(handshake.mappings, [mapping(4096, 8192, place, 4096)]);
        assert!(handshake.answers && !handshake.has_pidfd && handshake.needs_remove);
        let mut with_pidfd = own.clone();
        with_pidfd["pidfd"] = true.into();
        assert!(parse(&with_pidfd, 2).unwrap().has_pidfd);
        assert!(parse(&with_pidfd, 1).is_err() && parse(&own, 2).is_err());
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let base = json!({"base_host_virt_addr": 4096, "size": 4096, "offset": 0});
        let mut secret = base.clone();
        secret["gpa_start"] = 0.into();
        secret["is_guest_memfd"] = true.into();
        let form = |error: &ServeError| matches!(error, ServeError::Form { .. });
        assert!(form(&parse(&json!([secret]), 3).unwrap_err()));
        assert!(form(&parse(&json!([secret]), 1).unwrap_err()));
        let three = parse(&json!([base.clone()]), 3).unwrap_err();
        assert!(three.to_string().contains("secret-hiding"), "{three}");
        for descriptors in [0, 2, 4] {
            let error = parse(&json!([base.clone()]), descriptors).unwrap_err();
            assert!(
                matches!(error, ServeError::Descriptors { found, expected: 1 } if found == descriptors),
                "{error:?}"
            );
        }
        let many = |count: usize| parse(&Value::Array(vec![base.clone(); count]), 1);
        assert_eq!(many(4096).unwrap().mappings.len(), 4096);
        let error = many(4097).unwrap_err();
        assert!(
            matches!(
                error,
                ServeError::Regions {
                    found: 4097,
                    max: 4096
                }
            ),
            "{error:?}"
        );
        let mut two = base.clone();
        two["page_size"] = 4096.into();
        two["page_size_kib"] = (2 * MIB).into();
        let error = parse(&json!([two]), 1).unwrap_err();
        assert!(matches!(error, ServeError::PageSizes { .. }), "{error:?}");
        for message in [
            "",
            "[]",
            "{}",
            "[1]",
            "null",
            "[{}]",
            "{\"sonicshot\":1}",
            "\"x\"",
        ] {
            let error = Handshake::parse(message.as_bytes(), 1).unwrap_err();
            assert!(
                matches!(
                    error,
                    ServeError::Json(_) | ServeError::Regions { found: 0, .. }
                ),
                "{message}: {error:?}"
            );
        }
        let later = json!({"sonicshot": 2, "regions": [{"host": 4096, "len": 4096, "gpa": 0, "page": 4096}]});
        assert!(form(&parse(&later, 1).unwrap_err()));
        let unknown = json!({"sonicshot": 1, "regions": [{"host": 4096, "len": 4096, "gpa": 0, "page": 4096, "x": 1}]});
        assert!(matches!(
            parse(&unknown, 1).unwrap_err(),
            ServeError::Json(_)
        ));
    }

    #[test]
    fn regions_lie_in_the_guest_as_the_file_has_them() {
        const GIB: u64 = 1 << 30;
        let handshake = |mappings: &[Mapping]| Handshake {
            form: "a test's",
            mappings: mappings.to_vec(),
            has_pidfd: false,
            answers: false,
            needs_remove: true,
        };
        let at = |offset| Place::Offset(offset);
        // One mapping over the hole.
        let over = handshake(&[mapping(GIB, 4 * GIB, at(0), 2 * MIB)]);
        let regions = over.regions(&layout()).unwrap();
        let found: Vec<_> = regions
            .iter()
            .map(|r| (r.host.raw(), r.guest.start().raw(), r.guest.len()))
            .collect();
        assert_eq!(found, [(GIB, 0, 3 * GIB), (4 * GIB, 4 * GIB, GIB)]);
        type Check = fn(&ServeError) -> bool;
        let cases: [(Mapping, Check); 9] = [
            (mapping(GIB, GIB, at(0), 64 * MIB), |e| {
                matches!(e, ServeError::PageSize { .. })
            }),
            (mapping(GIB, 4 * GIB, at(4096), 4096), |e| {
                matches!(e, ServeError::NotInLayout { what: "offset", .. })
            }),
            (
                mapping(GIB, GIB, Place::Address(Gpa::new(5 * GIB / 2)), 4096),
                |e| {
                    matches!(
                        e,
                        ServeError::NotInLayout {
                            what: "address",
                            ..
                        }
                    )
                },
            ),
            (mapping(GIB, GIB, at(u64::MAX - 4095), 4096), |e| {
                matches!(e, ServeError::NotInLayout { .. })
            }),
            (mapping(GIB, GIB, at(0), 3 * MIB), |e| {
                matches!(e, ServeError::PageSize { .. })
            }),
            (mapping(GIB, GIB, at(0), 4), |e| {
                matches!(e, ServeError::PageSize { .. })
            }),
            (mapping(GIB + 4096, GIB, at(0), 2 * MIB), |e| {
                matches!(e, ServeError::Unaligned { .. })
            }),
            (mapping(GIB, 0, at(0), 4096), |e| {
                matches!(e, ServeError::Unaligned { .. })
            }),
            (mapping(u64::MAX - 4095, 4096, at(0), 4096), |e| {
                matches!(e, ServeError::Unaligned { .. })
            }),
        ];
        for (mapping, check) in cases {
            let error = handshake(&[mapping]).regions(&layout()).unwrap_err();
            assert!(check(&error), "{mapping:?}: {error:?}");
        }
        for (second, in_guest) in [
            (mapping(GIB + 4096, 4096, at(GIB), 4096), false),
            (mapping(3 * GIB, 4096, at(4096), 4096), true),
        ] {
            let first = mapping(GIB, 8192, at(0), 4096);
            let error = handshake(&[first, second]).regions(&layout()).unwrap_err();
            assert!(
                matches!(error, ServeError::Overlap { in_guest: found, .. } if found == in_guest),
                "{error:?}"
            );
        }
    }
}
