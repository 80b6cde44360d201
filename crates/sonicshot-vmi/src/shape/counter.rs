//! The counters of the zones' free pages, of a kernel that tells nothing of itself.
//!
//! A word that is chosen because it says what the lists hold says nothing of them. So the place must
//! be told by more. It is the same in all zones, and in a kernel for several processors begins a line
//! of the cache (`CACHELINE_PADDING(_pad3_)`); what is behind it may be counters, too; and one such
//! place alone has a second record. That is either counters behind it that are not zero, or, in a
//! guest that has not yet counted anything else there, the kernel's own sums: whatever is added to a
//! zone's counters is added to those of all zones (`zone_page_state_add`, `include/linux/vmstat.h`),
//! which are in its image in the same order.

use super::heads::Look;
use super::kernel::Listed;
use super::percpu;
use super::words::each_page;
use crate::KernelVa;
use crate::error::VmiError;
use crate::mm::zone::{self, AreaLayout, Zone};
use sonicshot::to_u64;

/// The number of bytes of a zone that are looked at behind its free areas.
const ZONE_TAIL: u64 = 2048;
/// Of the counters behind the first so many are in every kernel.
const BEHIND: usize = 5;
/// The alignment of counters in a kernel for several processors.
const LINE: u64 = 64;

/// The first counters of a zone, or their sums.
type Row = [i64; BEHIND + 1];

fn no_counters() -> VmiError {
    VmiError::Unsupported {
        what: "zones without counters".into(),
    }
}

/// A place where every zone may have its counters.
#[derive(Debug)]
struct Place {
    /// The distance behind the beginning of each zone's free areas.
    offset: u64,
    /// The counters of each zone there.
    rows: Vec<Row>,
    /// The sums of those.
    sums: Row,
}

impl Place {
    fn new(offset: u64, rows: Vec<Row>) -> Option<Self> {
        let mut sums = Row::default();
        for row in &rows {
            for (sum, word) in sums.iter_mut().zip(row) {
                *sum = sum.checked_add(*word)?;
            }
        }
        Some(Self { offset, rows, sums })
    }

    /// The free pages of each zone.
    fn counts(&self) -> impl Iterator<Item = i64> {
        self.rows.iter().map(|[first, ..]| *first)
    }

    /// Whether something behind them is counted.
    fn counts_more(&self) -> bool {
        let mut behind = self.rows.iter().flat_map(|[_, behind @ ..]| behind);
        behind.any(|word| *word != 0)
    }
}

/// Adds `vm_stat[NR_FREE_PAGES]` to each zone's counter, which holds the per-CPU deltas.
///
/// # Errors
/// [`VmiError::Unsupported`] if it is not told where that is.
pub(super) fn add(
    look: &Look<'_, '_>,
    area: &AreaLayout,
    listed: &[Listed],
    zones: &mut [Zone],
    per_cpu: &percpu::PerCpu,
) -> Result<(), VmiError> {
    let processors = zone::processors(&per_cpu.offsets);
    let bound = area.orders.checked_sub(1);
    let bound =
        bound.and_then(|order| zone::counter_bound(order, processors, !per_cpu.with_deltas));
    let bound = bound.ok_or_else(no_counters)?;
    let has_lines = !per_cpu.offsets.is_empty() && per_cpu.offsets != [0];
    let place = |offset: u64| {
        let rows = listed.iter().zip(zones.iter()).map(|(zone, found)| {
            let at = zone.array.checked_add(offset)?;
            let row = row_at(look, at)?;
            let is_line = !has_lines || at.raw().is_multiple_of(LINE);
            (is_line && may_be_counters(&row, zone.sums.pages, found, bound)).then_some(row)
        });
        Place::new(offset, rows.collect::<Option<_>>()?)
    };
    let first = area.orders.checked_mul(area.size);
    let last = first.and_then(|first| first.checked_add(ZONE_TAIL));
    let (first, last) = first.zip(last).ok_or_else(no_counters)?;
    let places = (first..last).step_by(8);
    let places: Vec<Place> = places.filter_map(place).collect();
    let place = told(&places, |unsure| summed(look, listed, unsure, bound))?;
    for (zone, counted) in zones.iter_mut().zip(place.counts()) {
        zone.counter = zone.counter.checked_add(counted).ok_or_else(no_counters)?;
    }
    Ok(())
}

/// The words at `at`.
fn row_at(look: &Look<'_, '_>, at: KernelVa) -> Option<Row> {
    let mut row = Row::default();
    for (offset, word) in (0_u64..).step_by(8).zip(&mut row) {
        *word = look.heads.word(at.raw(), offset)?.cast_signed();
    }
    Some(row)
}

/// Whether `row` may be a zone's first counters, of which the first is of its free `pages`.
fn may_be_counters(row: &Row, pages: u64, zone: &Zone, bound: u64) -> bool {
    let [first, behind @ ..] = row;
    let range = || {
        let most = i64::try_from(zone.span.len().checked_add(bound)?).ok()?;
        Some(i64::try_from(bound).ok()?.checked_neg()?..=most)
    };
    let is_near = || {
        let counted = first.checked_add(zone.counter)?;
        Some(counted.abs_diff(i64::try_from(pages).ok()?) <= bound)
    };
    is_near() == Some(true) && range().is_some_and(|r| behind.iter().all(|word| r.contains(word)))
}

/// The place that has a second record; `summed` tells of each whether the kernel's sums are one. If
/// several have, all must say the same.
fn told(
    places: &[Place],
    summed: impl FnOnce(&[Place]) -> Result<Vec<bool>, VmiError>,
) -> Result<&Place, VmiError> {
    let mut counting = places.iter().filter(|place| place.counts_more());
    if let (Some(place), None) = (counting.next(), counting.next()) {
        return Ok(place);
    }
    let is_summed = summed(places)?;
    let summed = places.iter().zip(is_summed).filter(|(_, is)| *is);
    let summed: Vec<&Place> = summed.map(|(place, _)| place).collect();
    match summed.split_first() {
        Some((first, rest)) if rest.iter().all(|place| place.counts().eq(first.counts())) => {
            Ok(first)
        }
        _ => Err(VmiError::Unsupported {
            what: format!(
                "zones that may count their free pages in {} places, of which the kernel's sums of all \
                 zones are the same as {}: one must be told",
                places.len(),
                summed.len()
            ),
        }),
    }
}

/// Of each of `places` whether the kernel's image has the sums of what the zones have there, in
/// another place. Few free pages say nothing: such numbers are anywhere.
fn summed(
    look: &Look<'_, '_>,
    listed: &[Listed],
    places: &[Place],
    bound: u64,
) -> Result<Vec<bool>, VmiError> {
    let mut found = vec![false; places.len()];
    let says_some = |place: &Place| {
        place
            .sums
            .first()
            .is_some_and(|sum| sum.unsigned_abs() > bound)
    };
    if !places.iter().any(says_some) {
        return Ok(found);
    }
    let mut seen = Window::default();
    each_page(look, &mut |page, words| {
        for (offset, word) in (0_u64..).step_by(8).zip(words) {
            let at = page.checked_add(offset);
            let Some((start, row)) = at.and_then(|at| seen.push(at, u64::from_le_bytes(*word)))
            else {
                continue;
            };
            for (place, found) in places.iter().zip(&mut found) {
                let is_own = || {
                    let mut arrays = listed.iter().map(|zone| zone.array);
                    arrays.any(|array| array.checked_add(place.offset) == Some(start))
                };
                *found |= row == place.sums && says_some(place) && !is_own();
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// The last words of those that follow each other.
#[derive(Debug, Default)]
struct Window {
    row: Row,
    /// Their number.
    len: usize,
    /// The address of the next one.
    next: Option<KernelVa>,
}

impl Window {
    /// The row that ends with `word` at `at`, and where it begins.
    fn push(&mut self, at: KernelVa, word: u64) -> Option<(KernelVa, Row)> {
        self.len = if self.next == Some(at) { self.len } else { 0 };
        self.next = at.checked_add(8);
        self.row.rotate_left(1);
        *self.row.last_mut()? = word.cast_signed();
        if self.len < self.row.len() {
            self.len = self.len.checked_add(1)?;
        }
        let before = to_u64(self.row.len()).checked_sub(1)?.checked_mul(8)?;
        let start = KernelVa::new(at.raw().checked_sub(before)?);
        (self.len == self.row.len()).then_some((start, self.row))
    }
}

#[cfg(test)]
mod tests {
    use super::{Place, Row, Window, told};
    use crate::KernelVa;

    const PLAIN: Row = [500, 0, 0, 0, 0, 0];
    const MORE: Row = [500, 3, 0, 0, 0, 0];

    #[test]
    fn a_place_needs_a_second_record() {
        /// The counters of zones at each place, whether the sums are that, and the number of the
        /// right place.
        type Case<'a> = (&'a [&'a [Row]], &'a [bool], Option<u64>);
        let cases: [Case<'_>; 9] = [
            (&[], &[], None),
            // Counters behind it.
            (&[&[MORE]], &[false], Some(0)),
            (&[&[PLAIN], &[MORE]], &[false, false], Some(1)),
            // Of a guest that counts nothing else, the sums in the image.
            (&[&[PLAIN]], &[false], None),
            (&[&[PLAIN]], &[true], Some(0)),
            (&[&[MORE], &[MORE]], &[false, true], Some(1)),
            // Several that say the same.
            (&[&[PLAIN], &[PLAIN]], &[true, true], Some(0)),
            // Several that do not.
            (&[&[PLAIN], &[[501, 0, 0, 0, 0, 0]]], &[true, true], None),
            (
                &[&[PLAIN, [7, 0, 0, 0, 0, 0]], &[[7, 0, 0, 0, 0, 0], PLAIN]],
                &[true, true],
                None,
            ),
        ];
        for (number, (rows, summed, want)) in cases.into_iter().enumerate() {
            let places = (0_u64..).zip(rows);
            let places: Vec<Place> = places
                .map(|(at, rows)| Place::new(at, rows.to_vec()).unwrap())
                .collect();
            let found = told(&places, |_| Ok(summed.to_vec()));
            assert_eq!(found.ok().map(|place| place.offset), want, "{number}");
        }
    }

    #[test]
    fn a_row_is_of_words_that_follow_each_other() {
        let mut window = Window::default();
        let mut push = |at: u64, word| window.push(KernelVa::new(at), word);
        for number in 0..5 {
            assert_eq!(push(0x1000 + number * 8, number), None);
        }
        let row = (KernelVa::new(0x1000), [0, 1, 2, 3, 4, 5]);
        assert_eq!(push(0x1028, 5), Some(row));
        assert_eq!(push(0x1030, 6).unwrap().1, [1, 2, 3, 4, 5, 6]);
        // A gap.
        for number in 0..5 {
            assert_eq!(push(0x2000 + number * 8, 9), None);
        }
        assert_eq!(push(0x2028, 9).unwrap().0, KernelVa::new(0x2000));
    }
}
