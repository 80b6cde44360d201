//! A domain's memory, mapped as it is looked at.

use crate::ffi::{DomainInfo, Foreign, Xen};
use crate::mappings::{Mappings, NOWHERE};
use crate::p2m_list;
use crate::{DomainId, FrameRuns, LiveError};
use core::fmt;
use sonicshot::{
    Gpa, GpaRange, GuestMemory, MAX_MAP, Mapped, MemoryError, P2m, PageSize, Pfn, PfnRange,
    PrunePlan, RamLayout, to_u64, to_usize,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Xen's page size, for every guest.
const PAGE: PageSize = P2m::PAGE;
/// `XEN_DOMINF_*` and `SHUTDOWN_suspend` (`xen/include/public/domctl.h`, `sched.h`).
const HVM: u32 = 1 << 1;
const SHUT_DOWN: u32 = 1 << 2;
const REASON_SHIFT: u32 = 16;
const REASON_MASK: u32 = 0xff;
const SUSPEND: u32 = 2;
/// `XEN_DOMCTL_PFINFO_NOTAB`.
const ORDINARY: u64 = 0;
/// libxc itself asks for the types of so many frames at a time.
const BATCH: usize = 1024;
/// libxc saves no guest with more frames.
const MAX_FRAME: u64 = 1 << 28;

/// Small reads map this many frames at once.
const WINDOW: u64 = 64;
/// So many windows are kept mapped: 256 MiB.
const MAX_WINDOWS: usize = 1024;

/// The memory of a domain that is suspended.
///
/// It is mapped piece by piece, read only. Of a paravirtualised domain the page tables hold the
/// machine's frame numbers, which [`p2m`](GuestMemory::p2m) translates.
///
/// ```no_run
/// use sonicshot::GuestMemory;
/// use sonicshot_xen_live::{DomainId, LiveDomain, Xen};
/// let xen = Xen::open()?;
/// let domain = LiveDomain::open(&xen, DomainId::new(3))?;
/// println!("{} bytes of RAM", domain.layout().bytes());
/// # Ok::<(), sonicshot_xen_live::LiveError>(())
/// ```
pub struct LiveDomain<'x> {
    mappings: Arc<Mappings<'x>>,
    layout: RamLayout,
    p2m: Option<P2m>,
    windows: Mutex<HashMap<u64, Arc<Foreign<'x>>>>,
}

impl fmt::Debug for LiveDomain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveDomain")
            .field("id", &self.mappings.domain)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl<'x> LiveDomain<'x> {
    /// Finds out where the memory of `id` is.
    ///
    /// # Errors
    /// [`LiveError::NotSuspended`] if it runs; others if Xen refuses, or if what the guest says of
    /// its frames cannot be.
    pub fn open(xen: &'x Xen, id: DomainId) -> Result<Self, LiveError> {
        Self::suspended(Arc::new(Mappings::new(xen, id)))
    }

    /// The domain that `mappings` are of, of which some were made before it was suspended. Those of a
    /// domain that has its own numbers for its frames do not count.
    pub(crate) fn suspended(mappings: Arc<Mappings<'x>>) -> Result<Self, LiveError> {
        let (xen, id) = (mappings.xen, mappings.domain);
        let info = xen.info(id)?;
        let reason = (info.flags >> REASON_SHIFT) & REASON_MASK;
        if info.flags & SHUT_DOWN == 0 || reason != SUSPEND {
            return Err(LiveError::NotSuspended {
                domain: id,
                flags: info.flags,
            });
        }
        let mappings = match info.flags & HVM {
            0 => mappings,
            _ => Arc::new(Mappings::new(xen, id)),
        };
        Self::as_it_is(mappings, &info)
    }

    /// The domain that `mappings` are of, whether it runs or not: what is read of one that runs is torn,
    /// and good for nothing but to know where to look once it is suspended.
    pub(crate) fn running(mappings: Arc<Mappings<'x>>) -> Result<Self, LiveError> {
        let info = mappings.xen.info(mappings.domain)?;
        Self::as_it_is(mappings, &info)
    }

    fn as_it_is(mappings: Arc<Mappings<'x>>, info: &DomainInfo) -> Result<Self, LiveError> {
        let (xen, id) = (mappings.xen, mappings.domain);
        let (frames, p2m) = if info.flags & HVM == 0 {
            let p2m = p2m_list::read(&*mappings, id, info)?;
            (p2m.frames().collect(), Some(p2m))
        } else {
            (own_frames(xen, id, info)?, None)
        };
        let ranges = frames
            .iter()
            .filter_map(|frames| frames.gpa_range(PAGE))
            .collect();
        let layout =
            RamLayout::new(ranges).map_err(|source| LiveError::Layout { domain: id, source })?;
        Ok(Self {
            mappings,
            layout,
            p2m,
            windows: Mutex::default(),
        })
    }

    /// The frames that `plan` drops and a save can leave out: those that may read as
    /// [anything](sonicshot::Fill::Any) after a restore. They are numbered as Xen and libxc know
    /// them: by the machine of a paravirtualised domain, by the guest itself of another. Frames
    /// that the guest does not have are left out.
    #[must_use]
    pub fn dropped(&self, plan: &PrunePlan) -> FrameRuns {
        let plan = plan.clone().any_filled_only();
        let frames = plan.runs().iter().map(|run| run.frames);
        let Some(p2m) = &self.p2m else {
            return frames
                .map(|run| run.start().raw()..run.end().raw())
                .collect();
        };
        let machine = frames.flat_map(|run| p2m.machine_runs(run));
        // What ends beyond 64 bits is no frame, and stays.
        let run = |first: u64, len| Some(first..first.checked_add(len)?);
        machine
            .filter_map(|(mfn, len)| run(mfn.raw(), len))
            .collect()
    }

    fn frame_of(&self, pfn: u64) -> Option<u64> {
        match &self.p2m {
            Some(p2m) => p2m.mfn(Pfn::new(pfn)).map(sonicshot::Mfn::raw),
            None => Some(pfn),
        }
    }

    fn map_frames(&self, first: u64, count: u64) -> Result<Arc<Foreign<'x>>, LiveError> {
        // Of a frame that the guest does not have nothing is mapped.
        let numbers: Vec<u64> = (0..count)
            .map(|inside| self.frame_of(first.checked_add(inside)?))
            .map(|frame| frame.unwrap_or(NOWHERE))
            .collect();
        self.mappings.of(&numbers)
    }

    /// The window with frame `pfn`.
    fn window(&self, pfn: u64) -> Result<(u64, Arc<Foreign<'x>>), LiveError> {
        let first = pfn & !(WINDOW - 1);
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(window) = windows.get(&first) {
            return Ok((first, Arc::clone(window)));
        }
        let window = self.map_frames(first, WINDOW)?;
        keep(&mut windows, first, Arc::clone(&window));
        Ok((first, window))
    }
}

/// Keeps a window, or only this one if there is no room for more.
fn keep<T>(windows: &mut HashMap<u64, T>, first: u64, window: T) {
    if windows.len() >= MAX_WINDOWS {
        windows.clear();
    }
    windows.insert(first, window);
}

/// A domain's last frame, if it can have so many.
fn believed(id: DomainId, last: u64) -> Result<u64, LiveError> {
    if last < MAX_FRAME {
        return Ok(last);
    }
    Err(LiveError::Malformed {
        domain: id,
        what: "its last frame",
        value: last,
    })
}

/// The frames of a domain that has its own numbers for them: those that Xen calls ordinary.
fn own_frames(xen: &Xen, id: DomainId, info: &DomainInfo) -> Result<Vec<PfnRange>, LiveError> {
    let last = believed(id, xen.last_frame(id)?.raw())?;
    let mut runs: Vec<PfnRange> = Vec::new();
    let mut found = 0_u64;
    let mut first = 0_u64;
    let mut types = Vec::with_capacity(BATCH);
    while first <= last && found < info.pages {
        types.clear();
        types.extend((first..=last).take(BATCH));
        xen.types(id, &mut types)?;
        for (pfn, _) in (first..).zip(&types).filter(|(_, kind)| **kind == ORDINARY) {
            let Some(more) = found.checked_add(1) else {
                break;
            };
            found = more;
            let Some(one) = PfnRange::with_len(Pfn::new(pfn), 1) else {
                continue;
            };
            match runs.last_mut() {
                Some(run) if run.end() == one.start() => {
                    *run = PfnRange::new(run.start(), one.end());
                }
                _ => runs.push(one),
            }
        }
        let Some(next) = first.checked_add(to_u64(BATCH)) else {
            break;
        };
        first = next;
    }
    Ok(runs)
}

impl GuestMemory for LiveDomain<'_> {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let range = GpaRange::of_request(at, buf.len());
        if !self.layout.contains(at, to_u64(buf.len())) {
            return Err(MemoryError::NotRam { range });
        }
        let mut at = at.raw();
        let mut rest = buf;
        while !rest.is_empty() {
            let offset = at & PAGE.offset_mask();
            let len = to_usize(PAGE.left_in_page(at)).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            let pfn = at >> PAGE.shift();
            let (first, window) = self.window(pfn).map_err(|error| MemoryError::Backend {
                range,
                source: Box::new(error),
            })?;
            let copied = pfn
                .checked_sub(first)
                .and_then(|index| window.frames(to_usize(index), 1))
                .and_then(|page| page.get(to_usize(offset), len))
                .is_some_and(|bytes| bytes.copy_to(now));
            if !copied {
                return Err(MemoryError::Absent { range });
            }
            // At the end of all numbers there is nothing left.
            at = at.checked_add(to_u64(len)).unwrap_or(at);
            rest = later;
        }
        Ok(())
    }

    fn map(&self, at: Gpa, len: usize) -> Result<Option<Mapped<'_>>, MemoryError> {
        let range = GpaRange::of_request(at, len);
        if !self.layout.contains(at, to_u64(len)) {
            return Err(MemoryError::NotRam { range });
        }
        let skew = at.raw() & PAGE.offset_mask();
        if len == 0 || len > MAX_MAP {
            return Ok(None);
        }
        let Some(bytes) = skew.checked_add(to_u64(len)) else {
            return Ok(None);
        };
        let frames = bytes.div_ceil(PAGE.bytes());
        let Ok(foreign) = self.map_frames(at.pfn(PAGE).raw(), frames) else {
            return Ok(None);
        };
        Ok(Foreign::held(foreign, skew, len))
    }

    fn p2m(&self) -> Option<&P2m> {
        self.p2m.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_FRAME, MAX_WINDOWS, believed, keep};
    use crate::DomainId;
    use std::collections::HashMap;

    #[test]
    fn what_is_believed_and_kept_of_a_domain_is_bounded() {
        let id = DomainId::new(5);
        assert_eq!(believed(id, MAX_FRAME - 1).unwrap(), MAX_FRAME - 1);
        for last in [MAX_FRAME, u64::MAX] {
            let refused = believed(id, last).unwrap_err().to_string();
            assert!(refused.contains("its last frame"), "{refused}");
        }
        let mut windows = HashMap::new();
        for first in 0..MAX_WINDOWS as u64 {
            keep(&mut windows, first, ());
        }
        assert_eq!(windows.len(), MAX_WINDOWS);
        keep(&mut windows, u64::MAX, ());
        assert_eq!(windows.len(), 1);
    }
}
