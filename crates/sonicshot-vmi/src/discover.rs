//! Finds the kernel in guest memory with nothing to go by.
//!
//! Every Linux kernel with crash support keeps VMCOREINFO, a page of text that describes it
//! (`kernel/vmcore_info.c`), in a page of its own. It gives the top-level page table and the
//! displacement of the kernel image, which page tables and the running kernel's own
//! `init_uts_ns` must confirm: a stale copy (of an earlier boot, or in a file) does not pass.

use crate::error::VmiError;
use crate::paging::X86_64;
use crate::symbols::Vmcoreinfo;
use crate::{AddressSpace, KernelVa, VirtualMemory};
use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, PageSize};

/// `__START_KERNEL_map` (`arch/x86/include/asm/page_64_types.h`): an ABI of the kernel's own
/// linker script, the same since 2.6.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `KERNEL_IMAGE_SIZE` is 1 GiB at most.
const MAX_IMAGE: u64 = 1 << 30;
/// VMCOREINFO is at most one page.
const MAX_VMCOREINFO: usize = 4096;
/// Each copy found costs a look at page tables: more than this many are somebody's joke.
const MAX_CANDIDATES: usize = 64;
/// How much is mapped at a time while searching.
const WINDOW: u64 = 2 << 20;
const _: () = assert!(WINDOW.is_power_of_two());

/// A kernel that was found, with its page tables confirmed.
#[derive(Debug)]
pub(crate) struct Found<'m> {
    pub space: AddressSpace<'m>,
    pub vmcoreinfo: Vmcoreinfo,
    /// What KASLR added to the linked addresses.
    pub kaslr: u64,
    /// Where VMCOREINFO came from.
    pub origin: String,
}

/// Finds the kernel, by `given` VMCOREINFO (of a dump's note) or by searching all RAM.
pub(crate) fn find<'m>(
    memory: &'m dyn GuestMemory,
    given: Option<&[u8]>,
) -> Result<Found<'m>, VmiError> {
    let mut tried = Vec::new();
    if let Some(text) = given {
        match confirm(memory, text, "VMCOREINFO note".into()) {
            Ok(found) => return Ok(found),
            Err(why) => tried.push(format!("the dump's VMCOREINFO note: {why}")),
        }
    }
    let mut found = None;
    let mut candidates = 0_usize;
    search(memory, b"OSRELEASE=", &mut |at| {
        candidates = candidates.saturating_add(1);
        let mut text = vec![0; MAX_VMCOREINFO];
        if memory.read(at, &mut text).is_ok() {
            match confirm(memory, &text, format!("VMCOREINFO at {at}")) {
                Ok(kernel) => found = Some(kernel),
                Err(why) if tried.len() < 4 => tried.push(format!("VMCOREINFO at {at}: {why}")),
                Err(_) => {}
            }
        }
        found.is_none() && candidates < MAX_CANDIDATES
    })?;
    found.ok_or_else(|| VmiError::NoKernel {
        tried: if tried.is_empty() {
            "no page begins with VMCOREINFO".into()
        } else {
            tried.join("; ")
        },
    })
}

/// The windows of all RAM, in the order in which the kernel's early allocations are likely to
/// be met: first the top of memory (of a paravirtualised guest the bottom, behind its image, and
/// then the top), then from both ends of every region inwards.
fn windows(memory: &dyn GuestMemory) -> impl Iterator<Item = GpaRange> + '_ {
    /// So many from the top, and from the bottom: 128 MiB.
    const FIRST: u64 = 64;
    let regions = memory.layout().regions();
    let last = regions.len().saturating_sub(1);
    let paravirtualised = memory.p2m().is_some();
    let parts = move |number: usize, region: &GpaRange| {
        let first = region.start().raw() & !(WINDOW - 1);
        let count = region.end().raw().saturating_sub(first).div_ceil(WINDOW);
        let top = if number == last { count.min(FIRST) } else { 0 };
        let above = count.saturating_sub(top);
        let bottom = number == 0 && paravirtualised;
        let below = if bottom { above.min(FIRST) } else { 0 };
        (first, below, above, count)
    };
    let window = |region: &GpaRange, first: u64, index: u64| {
        let start = first.saturating_add(index.saturating_mul(WINDOW));
        let end = start.saturating_add(WINDOW);
        GpaRange::new(Gpa::new(start), Gpa::new(end)).intersection(region)
    };
    let bottom = regions.first().into_iter().flat_map(move |region| {
        let (first, below, ..) = parts(0, region);
        (0..below).map(move |index| window(region, first, index))
    });
    let top = regions.last().into_iter().flat_map(move |region| {
        let (first, _, above, count) = parts(last, region);
        (above..count)
            .rev()
            .map(move |index| window(region, first, index))
    });
    let numbered = || regions.iter().enumerate();
    let length = move |(number, region)| {
        let (_, below, above, _) = parts(number, region);
        above.saturating_sub(below)
    };
    let most = numbered().map(length).max().unwrap_or(0);
    let inwards = (0..most.div_ceil(2)).flat_map(move |step| {
        numbered().flat_map(move |(number, region)| {
            let (first, below, above, _) = parts(number, region);
            let count = above.saturating_sub(below);
            let low = (step < count.div_ceil(2)).then_some(step);
            let high = count
                .checked_sub(step.saturating_add(1))
                .filter(|high| *high >= count.div_ceil(2));
            [high, low]
                .into_iter()
                .flatten()
                .map(move |index| window(region, first, below.saturating_add(index)))
        })
    });
    bottom.chain(top).chain(inwards)
}

/// Calls `visit` with each page that begins with `magic`, until it returns `false`.
fn search(
    memory: &dyn GuestMemory,
    magic: &[u8; 10],
    visit: &mut dyn FnMut(Gpa) -> bool,
) -> Result<(), MemoryError> {
    let [a, b, c, d, e, f, g, h, tail @ ..] = *magic;
    let first = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let second = u16::from_le_bytes(tail);
    let by_reading = memory.prefers_read();
    let mut buffer = Vec::new();
    for window in windows(memory) {
        let start = window.start();
        let is_data = memory
            .next_data(start)
            .is_some_and(|data| data.start() < window.end());
        if !is_data {
            continue;
        }
        let len = usize::try_from(window.len()).unwrap_or(0);
        let mapped = if by_reading {
            None
        } else {
            memory.map(start, len)?
        };
        let bytes = if let Some(mapped) = &mapped {
            mapped.bytes()
        } else {
            buffer.resize(len, 0);
            if memory.read(start, &mut buffer).is_err() {
                // A dump may lack pages; VMCOREINFO is then in another one or nowhere.
                continue;
            }
            sonicshot::GuestBytes::from_slice(&buffer)
        };
        // Page-aligned in the guest; a region may begin anywhere.
        let skew = usize::try_from(start.raw().wrapping_neg() & 0xfff).unwrap_or(0);
        for offset in (skew..len).step_by(4096) {
            if bytes.u64_at(offset) == Some(first)
                && bytes.u16_at(offset.saturating_add(8)) == Some(second)
            {
                let at = start.checked_add(offset as u64);
                if !at.is_none_or(&mut *visit) {
                    return Ok(());
                }
            }
        }
        drop(mapped);
        memory.release(window);
    }
    Ok(())
}

/// Builds the address space that `text` describes, and checks it against the kernel in memory.
fn confirm<'m>(
    memory: &'m dyn GuestMemory,
    text: &[u8],
    origin: String,
) -> Result<Found<'m>, VmiError> {
    let info = Vmcoreinfo::parse(text)?;
    let unsupported = |what: &str| VmiError::Unsupported { what: what.into() };
    let need = |name: &str| {
        info.symbol(name).ok_or_else(|| VmiError::Missing {
            what: format!("symbol {name}"),
            sources: "VMCOREINFO".into(),
        })
    };
    if info.number("VA_BITS").is_some() {
        return Err(unsupported(
            "an arm64 guest: only x86-64 is supported so far",
        ));
    }
    if info.number("sme_mask").is_some_and(|mask| mask != 0) {
        return Err(unsupported("a guest with encrypted memory (SME, SEV)"));
    }
    let page_table = need("swapper_pg_dir")?;
    let phys_base = info
        .number("phys_base")
        .ok_or_else(|| unsupported("VMCOREINFO without phys_base: not an x86-64 kernel"))?;
    let root = Gpa::new(
        page_table
            .raw()
            .wrapping_sub(START_KERNEL_MAP)
            .wrapping_add(phys_base.cast_unsigned()),
    );
    if !memory.layout().contains(root, 4096) {
        return Err(unsupported(&format!(
            "a top-level page table at {root}, outside RAM"
        )));
    }
    let five_levels = info.number("pgtable_l5_enabled").is_some_and(|on| on != 0);
    let space = AddressSpace::new(memory, Box::new(X86_64::new(root, five_levels)));
    let there = space
        .translate(page_table)
        .map_err(VmiError::read("swapper_pg_dir"))?;
    if there.at != root {
        return Err(VmiError::Disagree {
            what: "swapper_pg_dir".into(),
            first: "phys_base".into(),
            first_value: root.raw(),
            second: "the page tables".into(),
            second_value: there.at.raw(),
        });
    }
    // The release in `init_uts_ns` is the running kernel's own.
    let release = info.osrelease().unwrap_or_default().to_owned();
    let uts = need("init_uts_ns")?;
    let mut names = [0; 1024];
    space
        .read(uts, &mut names)
        .map_err(VmiError::read("init_uts_ns"))?;
    if release.is_empty() || memchr::memmem::find(&names, release.as_bytes()).is_none() {
        return Err(unsupported(&format!(
            "VMCOREINFO of `{release}`, which is not what init_uts_ns holds"
        )));
    }
    let kaslr = info.kernel_offset().unwrap_or(0);
    Ok(Found {
        space,
        vmcoreinfo: info,
        kaslr,
        origin,
    })
}

/// The virtual addresses of the kernel's image, from its start as far as it is mapped.
pub(crate) fn image_range(space: &AddressSpace<'_>, stext: KernelVa) -> (KernelVa, KernelVa) {
    /// The image has unmapped gaps between its sections, of up to one large page each.
    const LARGEST_GAP: u64 = 8 << 20;
    let page = PageSize::SIZE_4K.bytes();
    let start = KernelVa::new(stext.raw() & !0x1f_ffff);
    let limit = start.checked_add(MAX_IMAGE).unwrap_or(start);
    let mut at = start;
    let mut end = start;
    while at < limit && at.offset_from(end).unwrap_or(0) <= LARGEST_GAP {
        let step = match space.translate(at) {
            Ok(there) => {
                let next = at.checked_add(there.len).unwrap_or(limit);
                end = next.min(limit);
                there.len
            }
            Err(_) => page,
        };
        at = at.checked_add(step).unwrap_or(limit);
    }
    (start, end)
}

#[cfg(test)]
mod tests {
    use super::{WINDOW, windows};
    use proptest::prelude::*;
    use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, P2m, RamLayout};

    struct Nothing(RamLayout, Option<P2m>);

    impl GuestMemory for Nothing {
        fn layout(&self) -> &RamLayout {
            &self.0
        }
        fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), MemoryError> {
            Ok(())
        }
        fn p2m(&self) -> Option<&P2m> {
            self.1.as_ref()
        }
    }

    proptest! {
        #[test]
        fn windows_cover_all_ram_once(
            regions in proptest::collection::vec((1_u64..9, 1_u64..0x2000_0000), 1..4),
            paravirtualised: bool,
        ) {
            let mut at = 0;
            let ranges = regions.into_iter().map(|(gap, len)| {
                let range = GpaRange::with_len(Gpa::new(at + gap * 0x3_1000), len).unwrap();
                at = range.end().raw();
                range
            }).collect();
            let p2m = paravirtualised.then(|| P2m::new([]).unwrap());
            let memory = Nothing(RamLayout::new(ranges).unwrap(), p2m);
            let mut all: Vec<_> = windows(&memory).collect();
            prop_assert!(all.iter().all(|window| !window.is_empty() && window.len() <= WINDOW));
            all.sort();
            let joined = RamLayout::new(all).unwrap();
            prop_assert_eq!(joined.regions(), memory.0.regions());
        }
    }
}
