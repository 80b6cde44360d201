//! A checkpoint's pages, as they go into the blocks of a QEMU that is to run the guest.

use crate::error::QemuError;
use crate::find::Piece;
use crate::stream::{PAGE, Stream};
use sonicshot::work::map_in_order;
use sonicshot::{Gpa, GpaRange, PageSize, PhaseProgress, Progress, WorkPhase};
use sonicshot_serve::{Content, PageSource, ServeError};
use std::io::{self, Write};
use std::num::NonZeroUsize;

/// A range of the guest, and where a block has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub range: GpaRange,
    /// The number of the block among the guest's.
    pub block: usize,
    pub offset: u64,
}

/// The places of all of the guest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places {
    /// The names that QEMU has for the blocks now.
    pub names: Vec<String>,
    /// By their place in the guest.
    all: Vec<Place>,
}

impl Places {
    /// Adds a block that QEMU calls `name`.
    pub(crate) fn add(&mut self, name: &str, pieces: &[Piece]) -> Result<(), QemuError> {
        let block = self.names.len();
        self.names.push(name.to_owned());
        for piece in pieces {
            let range = GpaRange::with_len(Gpa::new(piece.gpa), piece.len);
            let range = range.ok_or_else(|| QemuError::not_this("RAM beyond 64 bits"))?;
            self.all.push(Place {
                range,
                block,
                offset: piece.offset,
            });
        }
        self.all.sort_by_key(|place| place.range.start());
        Ok(())
    }

    /// The first part of `range` in one block: how long it is, the block, and where it begins
    /// there.
    pub(crate) fn of(&self, range: &GpaRange) -> Option<(GpaRange, &str, u64)> {
        let above = self
            .all
            .partition_point(|place| place.range.start() <= range.start());
        let place = self.all.get(above.checked_sub(1)?)?;
        let part = range.intersection(&place.range);
        if part.is_empty() {
            return None;
        }
        let inside = part.start().offset_from(place.range.start())?;
        let name = self.names.get(place.block)?;
        Some((part, name, place.offset.checked_add(inside)?))
    }

    /// The addresses of a part of a block in the guest.
    pub(crate) fn gpa_of(&self, block: &str, offset: u64, len: u64) -> Option<GpaRange> {
        let number = self.names.iter().position(|name| name == block)?;
        let mut places = self.all.iter().filter(|place| place.block == number);
        places.find_map(|place| {
            let inside = offset.checked_sub(place.offset)?;
            let at = place.range.start().checked_add(inside)?;
            let range = GpaRange::with_len(at, len)?;
            (place.range.intersection(&range) == range).then_some(range)
        })
    }
}

/// A range of the guest, and what is there: bytes, or a word over and over.
pub(crate) type Found = (GpaRange, Content);

/// The ranges of `whole`, which is RAM, that are of one kind each.
pub(crate) fn runs(
    source: &dyn PageSource,
    whole: GpaRange,
) -> impl Iterator<Item = Result<Found, ServeError>> + '_ {
    let mut at = Some(whole.start());
    std::iter::from_fn(move || {
        let now = at.filter(|at| *at < whole.end())?;
        let found = source.run_at(now).and_then(|run| {
            let range = run.range.intersection(&GpaRange::new(now, whole.end()));
            if range.is_empty() {
                return Err(ServeError::NotInSnapshot { at: now });
            }
            Ok((range, run.content))
        });
        at = found.as_ref().ok().map(|(range, _)| range.end());
        Some(found)
    })
}

/// The bytes of a range, whatever it is.
pub(crate) fn bytes(source: &dyn PageSource, found: &Found) -> Result<Vec<u8>, ServeError> {
    let (range, content) = found;
    let len = usize::try_from(range.len());
    let len = len.map_err(|_| ServeError::NotInSnapshot { at: range.start() })?;
    match content {
        Content::Bytes => {
            let mut buffer = Vec::new();
            Ok(source.read(*range, &mut buffer)?.bytes().to_vec())
        }
        Content::Fill(word) => Ok(word.to_le_bytes().into_iter().cycle().take(len).collect()),
        // Of a kind that is not known here nothing is sent.
        _ => Err(ServeError::NotInSnapshot { at: range.start() }),
    }
}

/// Writes all pages that are not zero, and with `zeroes` the others too. `progress` is told of all of
/// them.
pub(crate) fn send_all(
    source: &dyn PageSource,
    places: &Places,
    stream: &mut Stream<impl Write>,
    zeroes: bool,
    threads: NonZeroUsize,
    progress: &dyn Progress,
) -> Result<(), QemuError> {
    /// The amount that is sent at once of a word over and over.
    const AT_ONCE: u64 = 1 << 20;
    let regions = source.layout().regions().to_vec();
    let all = regions.into_iter().flat_map(|region| runs(source, region));
    let parts = all.flat_map(|found| match found {
        Ok((range, content @ Content::Fill(word))) if word != 0 => {
            let mut at = range.start();
            let pieces = std::iter::from_fn(move || {
                let end = at
                    .checked_add(AT_ONCE)
                    .unwrap_or(range.end())
                    .min(range.end());
                let piece = GpaRange::between(at, end).filter(|piece| !piece.is_empty())?;
                at = end;
                Some(Ok((piece, content)))
            });
            Box::new(pieces) as Box<dyn Iterator<Item = _>>
        }
        other => Box::new(std::iter::once(other)),
    });
    let sending = QemuError::system("sending pages to QEMU");
    let total = source.layout().bytes();
    let mut phase = PhaseProgress::begin(progress, WorkPhase::Restoring, total);
    map_in_order(
        threads,
        parts,
        || (),
        |(), found| {
            let found = found?;
            let bytes = match found.1 {
                Content::Fill(0) => None,
                _ => Some(bytes(source, &found)?),
            };
            Ok::<_, ServeError>((found.0, bytes))
        },
        |done| {
            let (range, bytes) = done.map_err(QemuError::Pages)?;
            phase.add(range.len());
            match bytes {
                Some(bytes) => send_bytes(places, stream, range, &bytes).map_err(&sending),
                None if zeroes => send_zeroes(places, stream, range).map_err(&sending),
                None => Ok(()),
            }
        },
    )?;
    phase.end();
    Ok(())
}

fn nowhere(range: &GpaRange) -> io::Error {
    io::Error::other(format!(
        "guest memory at {range} is in none of QEMU's blocks"
    ))
}

/// Writes the pages of a range.
pub(crate) fn send_bytes(
    places: &Places,
    stream: &mut Stream<impl Write>,
    range: GpaRange,
    bytes: &[u8],
) -> io::Result<()> {
    let (mut range, mut rest) = (range, bytes);
    while !range.is_empty() {
        let (part, name, offset) = places.of(&range).ok_or_else(|| nowhere(&range))?;
        let len = usize::try_from(part.len()).map_err(io::Error::other)?;
        let (now, later) = rest.split_at_checked(len).ok_or_else(|| nowhere(&range))?;
        for (number, page) in (0_u64..).zip(now.chunks(PAGE)) {
            let at = number
                .checked_mul(4096)
                .and_then(|inside| offset.checked_add(inside));
            stream.page(name, at.ok_or_else(|| nowhere(&range))?, page)?;
        }
        range = GpaRange::new(part.end(), range.end());
        rest = later;
    }
    Ok(())
}

fn send_zeroes(
    places: &Places,
    stream: &mut Stream<impl Write>,
    range: GpaRange,
) -> io::Result<()> {
    for page in range.whole_frames(PageSize::SIZE_4K).iter() {
        let at = page.gpa(PageSize::SIZE_4K);
        let one = at.and_then(|at| GpaRange::with_len(at, 4096));
        let one = one.ok_or_else(|| nowhere(&range))?;
        let (_, name, offset) = places.of(&one).ok_or_else(|| nowhere(&range))?;
        stream.zero_page(name, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Piece, Places};
    use sonicshot::{Gpa, GpaRange};

    #[test]
    fn the_guest_is_where_its_blocks_are() {
        let piece = |offset, gpa, len| Piece { offset, gpa, len };
        let mut places = Places::default();
        places.add("b", &[piece(0, 0x5000, 0x3000)]).unwrap();
        places
            .add(
                "a",
                &[piece(0, 0, 0x5000), piece(0x5000, 0x10_0000, 0x1000)],
            )
            .unwrap();
        let range = |start, end| GpaRange::new(Gpa::new(start), Gpa::new(end));
        for (asked, expected) in [
            (range(0, 0x8000), Some((range(0, 0x5000), "a", 0))),
            (
                range(0x4000, 0x8000),
                Some((range(0x4000, 0x5000), "a", 0x4000)),
            ),
            (
                range(0x6000, 0x8000),
                Some((range(0x6000, 0x8000), "b", 0x1000)),
            ),
            (
                range(0x10_0000, 0x10_1000),
                Some((range(0x10_0000, 0x10_1000), "a", 0x5000)),
            ),
            (range(0x8000, 0x9000), None),
            (range(0x20_0000, 0x20_1000), None),
        ] {
            assert_eq!(places.of(&asked), expected, "{asked}");
        }
    }
}
