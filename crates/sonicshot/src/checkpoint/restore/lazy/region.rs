//! The stretches of memory whose faults are served, and which of their pages are in place.

use super::options::LazyRegion;
use crate::Gpa;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::wire::info::CheckpointInfo;
use crate::checkpoint::wire::layout::size;
use core::sync::atomic::{AtomicU64, Ordering};

pub(super) struct Region {
    pub at: LazyRegion,
    pub len: u64,
    shift: u32,
    /// A bit for each page: in place, as far as is known.
    pub present: Vec<AtomicU64>,
    /// A bit for each page: given back, zero from now on.
    pub removed: Vec<AtomicU64>,
}

fn bit(bits: &[AtomicU64], number: u64) -> Option<(&AtomicU64, u64)> {
    let word = bits.get(usize::try_from(number >> 6).ok()?)?;
    Some((word, 1 << (number & 63)))
}

pub(super) fn is_set(bits: &[AtomicU64], number: u64) -> bool {
    bit(bits, number).is_some_and(|(word, mask)| word.load(Ordering::Acquire) & mask != 0)
}

pub(super) fn set(bits: &[AtomicU64], number: u64) {
    if let Some((word, mask)) = bit(bits, number) {
        word.fetch_or(mask, Ordering::AcqRel);
    }
}

pub(super) fn clear(bits: &[AtomicU64], number: u64) {
    if let Some((word, mask)) = bit(bits, number) {
        word.fetch_and(!mask, Ordering::AcqRel);
    }
}

impl Region {
    /// A stretch of the checkpoint's memory, if it can be one.
    pub(super) fn new(at: LazyRegion, info: &CheckpointInfo) -> Result<Self, CheckpointError> {
        let len = at.guest.len();
        let host = at.host.raw() as u64;
        let mask = at.page.wrapping_sub(1);
        let aligned = at.page.is_power_of_two()
            && at.page >= info.page_size.bytes()
            && at.guest.start().raw() & info.page_size.offset_mask() == 0
            && (host | len) & mask == 0;
        let fits = info.layout.contains(at.guest.start(), len) && host.checked_add(len).is_some();
        if !aligned || !fits {
            return Err(CheckpointError::Layout {
                at: at.guest.start(),
            });
        }
        let shift = at.page.trailing_zeros();
        Ok(Self {
            at,
            len,
            shift,
            present: zeroed(len >> shift),
            removed: zeroed(len >> shift),
        })
    }

    /// Regions in the order of their host addresses, which must not overlap.
    pub(super) fn all(
        regions: Vec<LazyRegion>,
        info: &CheckpointInfo,
    ) -> Result<Vec<Self>, CheckpointError> {
        let all = regions.into_iter().map(|at| Self::new(at, info));
        let mut all = all.collect::<Result<Vec<_>, _>>()?;
        all.sort_by_key(|region| region.at.host);
        for pair in all.windows(2) {
            if let [a, b] = pair
                && a.end() > b.start()
            {
                return Err(CheckpointError::Layout {
                    at: b.at.guest.start(),
                });
            }
        }
        Ok(all)
    }

    /// Where it ends; its length was added when it was made.
    pub(super) fn end(&self) -> u64 {
        self.start().saturating_add(self.len)
    }

    /// Whether the host address is in it.
    pub(super) fn has(&self, host: u64) -> bool {
        self.start() <= host && host < self.end()
    }

    /// Where the host address is in the guest.
    pub(super) fn gpa(&self, host: u64) -> Option<Gpa> {
        let offset = host.checked_sub(self.start())?;
        self.at.guest.start().checked_add(offset)
    }

    pub(super) fn start(&self) -> u64 {
        self.at.host.raw() as u64
    }

    pub(super) fn host(&self, at: Gpa) -> Option<u64> {
        self.start()
            .checked_add(at.offset_from(self.at.guest.start())?)
    }

    pub(super) fn number(&self, host: u64) -> u64 {
        host.saturating_sub(self.start()) >> self.shift
    }

    /// Whether every page of the stretch is untouched, as far as is known.
    pub(super) fn untouched(&self, host: u64, len: u64) -> bool {
        let last = self.number(host.saturating_add(len.saturating_sub(1)));
        (self.number(host)..=last)
            .all(|page| !is_set(&self.present, page) && !is_set(&self.removed, page))
    }
}

/// So many bits, none of them set.
pub(super) fn zeroed(bits: u64) -> Vec<AtomicU64> {
    let words = size(bits.div_ceil(64));
    let mut out = Vec::new();
    out.resize_with(words, AtomicU64::default);
    out
}
