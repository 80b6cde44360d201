//! A kernel of which nothing is told: found by the shape of its records of free pages.

use super::heads::Heads;
use super::records::{self, STRIDE};
use super::roots::{self, Root};
use super::zones::{self, Exits};
use super::{Knowledge, cover, frames_of, percpu};
use crate::arch::x86_64::{Walk, X86_64};
use crate::discover::image_range;
use crate::error::VmiError;
use crate::kernel::{Build, Kernel};
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::zone::{AreaLayout, Zone, Zones};
use crate::owner::processors::Owners;
use crate::{AddressSpace, KernelVa, symbols};
use sonicshot::{Architecture, Gpa, GuestMemory, PageSize};

/// `NR_PAGE_ORDERS` of x86-64, where no config changes it.
const ORDERS: u64 = 11;
/// `MIGRATE_TYPES`.
const MIGRATE_TYPES: core::ops::RangeInclusive<u64> = 4..=8;
/// How much of a zone stands before its free areas, at most.
const ZONE_HEAD: u64 = 576;
/// How much of it is looked at behind them.
const ZONE_TAIL: u64 = 2048;
/// Kernels that stand, of which one is too many already.
const MAX_KERNELS: usize = 4;
/// Where x86-64 has the kernel's image (`__START_KERNEL_map`, 1 GiB at most).
const IMAGE: KernelVa = KernelVa::new(0xffff_ffff_8000_0000);
const IMAGE_END: KernelVa = KernelVa::new(0xffff_ffff_c000_0000);

/// A kernel that was found by shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shaped {
    root: Root,
    /// The word that says the buddy's type.
    buddy: u32,
}

/// What was found, and the zones, which show that it is a kernel.
struct Candidate<'m> {
    shaped: Shaped,
    kernel: Kernel<'m>,
    image: (KernelVa, KernelVa),
}

/// The kernel of which records of free blocks are in `memory`, with page tables that lead to them:
/// those that a processor runs on, or if none is told, any. Also its image.
///
/// # Errors
/// [`VmiError::NoKernel`] if there is none, [`VmiError::Undecided`] if there are several.
pub(crate) fn find<'m>(
    memory: &'m dyn GuestMemory,
    owners: &Owners,
) -> Result<(Shaped, Kernel<'m>, (KernelVa, KernelVa)), VmiError> {
    if memory.p2m().is_some() {
        return Err(nothing("a paravirtualised guest of Xen"));
    }
    let told = owners.roots(memory);
    let pass = records::find(memory, told.is_empty())?;
    let mut standing: Vec<Candidate<'m>> = Vec::new();
    let mut why = None;
    let mut seen: Vec<(KernelVa, Gpa)> = Vec::new();
    let anywhere = pass.tops.iter().flat_map(|at| [(*at, 4), (*at, 5)]);
    let places: Vec<(Gpa, u32)> = if told.is_empty() {
        anywhere.collect()
    } else {
        told
    };
    for records in &pass.records {
        for (at, levels) in &places {
            let Some(root) = roots::stands(memory, *at, *levels, records) else {
                continue;
            };
            // Every process has its own top table; all lead to the same struct pages.
            if seen.contains(&(root.vmemmap, root.there)) {
                continue;
            }
            let shaped = Shaped {
                root,
                buddy: records.buddy,
            };
            match candidate(memory, shaped) {
                Ok(found) => {
                    seen.push((root.vmemmap, root.there));
                    standing.push(found);
                }
                // A stale top table may still lead there, but to no zone.
                Err(error) => why = Some(error),
            }
            if standing.len() >= MAX_KERNELS {
                break;
            }
        }
    }
    let name = |found: &Candidate<'_>| {
        format!(
            "{} (by shape, its struct pages at {})",
            found.kernel.build.release, found.shaped.root.there
        )
    };
    if let [first, second, ..] = standing.as_slice() {
        return Err(VmiError::Undecided {
            first: name(first),
            second: name(second),
        });
    }
    match (standing.pop(), why) {
        (Some(found), _) => Ok((found.shaped, found.kernel, found.image)),
        (None, Some(why)) => Err(why),
        (None, None) if pass.records.is_empty() => Err(nothing(
            "no page begins with VMCOREINFO, and nothing looks like a free page's record: it is encrypted, or no Linux",
        )),
        (None, None) => Err(nothing(
            "no page begins with VMCOREINFO, and no page table leads to what looks like the records \
             of free pages",
        )),
    }
}

fn nothing(tried: &str) -> VmiError {
    VmiError::NoKernel {
        tried: tried.into(),
    }
}

fn candidate(memory: &dyn GuestMemory, shaped: Shaped) -> Result<Candidate<'_>, VmiError> {
    let root = shaped.root;
    let space = AddressSpace::new(memory, Box::new(Walk::new(root.at, root.levels)));
    let start = cover::first_mapped(&space, IMAGE, IMAGE_END).ok_or_else(|| {
        nothing("the page tables that lead to records of free pages have no kernel image")
    })?;
    let image = image_range(&X86_64, &space, start);
    let build = Build {
        architecture: Architecture::X86_64,
        page_size: PageSize::SIZE_4K,
        release: release(&space, image),
        kaslr: 0,
    };
    let kernel = Kernel::new(space, build);
    shaped.structures(&kernel, image)?;
    Ok(Candidate {
        shaped,
        kernel,
        image,
    })
}

/// The release in the kernel's banner, which is in its image.
fn release(space: &AddressSpace<'_>, image: (KernelVa, KernelVa)) -> String {
    const BANNER: &[u8] = b"Linux version ";
    let mut found = None;
    symbols::scan(space, image, BANNER, &mut |at| {
        let text = at.checked_add(BANNER.len() as u64);
        let text = text.and_then(|at| space.read_str(at, 64).ok());
        let word = text.as_deref().and_then(|text| text.split(' ').next());
        // The format string has a `%s` here.
        found = word
            .filter(|word| word.starts_with(|c: char| c.is_ascii_digit()))
            .map(str::to_owned);
        found.is_none()
    });
    found.unwrap_or_else(|| "unknown".into())
}

impl Shaped {
    /// Where it was found, for reports.
    pub(crate) fn origin(&self) -> String {
        format!(
            "the shape of free pages' records, page tables at {}",
            self.root.at
        )
    }

    /// The struct pages.
    pub(crate) fn mem_map<'m>(&self, kernel: &Kernel<'m>) -> Result<MemMap<'m>, VmiError> {
        MemMap::by_vmemmap(
            &kernel.space,
            kernel.build.page_size,
            STRIDE,
            self.root.vmemmap,
        )
    }

    /// The struct pages, what each says, and the zones.
    ///
    /// # Errors
    /// [`VmiError::Unsupported`] if no zone stands.
    pub(crate) fn structures<'m>(
        &self,
        kernel: &Kernel<'m>,
        image: (KernelVa, KernelVa),
    ) -> Result<(MemMap<'m>, PageLayout, Zones), VmiError> {
        let map = self.mem_map(kernel)?;
        let layout = PageLayout::by_shape(kernel, self.buddy)?;
        let zones = zones_by_shape(kernel, &map, &layout, image)?;
        Ok((map, layout, zones))
    }
}

fn unsupported(what: &str) -> VmiError {
    VmiError::Unsupported { what: what.into() }
}

/// A zone that was found, and what its lists hold.
struct Listed {
    array: KernelVa,
    sums: zones::Sums,
}

fn zones_by_shape(
    kernel: &Kernel<'_>,
    map: &MemMap<'_>,
    layout: &PageLayout,
    image: (KernelVa, KernelVa),
) -> Result<Zones, VmiError> {
    let heads = Heads {
        space: &kernel.space,
        map,
        lru: layout.lru,
    };
    let exits = Exits::find(map, layout)?;
    let mut stands = None;
    for migrate_types in MIGRATE_TYPES {
        let lists = migrate_types.saturating_mul(16);
        let area = AreaLayout {
            free_area: ZONE_HEAD,
            orders: ORDERS,
            size: lists.saturating_add(8),
            migrate_types,
            nr_free: lists,
        };
        let arrays = exits.arrays(&heads, &area)?;
        if arrays.is_empty() {
            continue;
        }
        if stands.replace((area, arrays)).is_some() {
            return Err(unsupported(
                "free areas that look as if they had two numbers of migrate types",
            ));
        }
    }
    let (area, arrays) =
        stands.ok_or_else(|| unsupported("no list of free pages leads to a zone"))?;
    let frames = frames_of(map)?;
    let mut left = frames;
    let mut listed = Vec::new();
    for array in arrays {
        let sums = zones::sums(&heads, array, &area, &mut left)?;
        listed.push(Listed { array, sums });
    }
    let spanned_pages = spanned_pages(&heads, &listed, map)?;
    let mut found: Vec<Zone> = Vec::new();
    for zone in &listed {
        let words = zones::ZoneWords {
            spanned_pages,
            free_pages: None,
            index: 0,
        };
        found.push(zones::read(&kernel.space, zone.array, &area, words)?);
    }
    let per_cpu = percpu::find(&heads, &mut found, ZONE_HEAD, image, 0, frames)?;
    count(&heads, &area, &listed, &mut found)?;
    let mut zones = Zones::by_shape(
        area,
        found,
        per_cpu.offsets,
        per_cpu.lists,
        !per_cpu.with_deltas,
    );
    zones.knowledge = Knowledge::Shape;
    Ok(zones)
}

/// Where in every zone its span stands: four words `zone_start_pfn`, `managed_pages`,
/// `spanned_pages`, `present_pages` that hold all its free blocks. Counted from [`ZONE_HEAD`] before
/// the free areas to the third.
fn spanned_pages(
    heads: &Heads<'_, '_>,
    listed: &[Listed],
    map: &MemMap<'_>,
) -> Result<u64, VmiError> {
    let last = map.spans().last().map_or(0, |span| span.frames.end().raw());
    let fits = |zone: &Listed, offset: u64| {
        let word = |number: u64| {
            let offset = number.checked_mul(8)?.checked_add(offset)?;
            heads.word(zone.array.raw().checked_sub(ZONE_HEAD)?, offset)
        };
        let (Some(start), Some(managed), Some(spanned), Some(present)) =
            (word(0), word(1), word(2), word(3))
        else {
            return false;
        };
        let sums = &zone.sums;
        start <= sums.first
            && start.checked_add(spanned).is_some_and(|end| end >= sums.end)
            // A section is always whole in struct pages, and no larger than this.
            && start.saturating_add(spanned) <= last.saturating_add(1 << 15)
            && sums.pages <= managed
            && managed <= present
            && present <= spanned
    };
    let last_word = ZONE_HEAD.saturating_sub(32);
    let mut offsets = (0..=last_word)
        .step_by(8)
        .filter(|offset| listed.iter().all(|zone| fits(zone, *offset)));
    match (offsets.next(), offsets.next()) {
        (Some(offset), None) => Ok(offset.saturating_add(16)),
        (None, _) => Err(unsupported("zones that do not say which frames they span")),
        _ => Err(unsupported("zones that say twice which frames they span")),
    }
}

/// Adds `vm_stat[NR_FREE_PAGES]` to each zone's counter, which holds the per-CPU deltas: it stands in
/// one place in all zones, and says as nearly as any word there how many pages the lists hold.
fn count(
    heads: &Heads<'_, '_>,
    area: &AreaLayout,
    listed: &[Listed],
    zones: &mut [Zone],
) -> Result<(), VmiError> {
    let first = area.orders.saturating_mul(area.size);
    let word = |zone: &Listed, offset: u64| heads.word(zone.array.raw(), offset);
    let mut best: Option<(u64, u64)> = None;
    for offset in (first..first.saturating_add(ZONE_TAIL)).step_by(8) {
        let mut off = Some(0_u64);
        for (zone, deltas) in listed.iter().zip(zones.iter()) {
            let counted =
                word(zone, offset).and_then(|word| word.cast_signed().checked_add(deltas.counter));
            let pages = i64::try_from(zone.sums.pages).ok();
            let apart = counted.zip(pages).map(|(a, b)| a.abs_diff(b));
            off = off
                .zip(apart)
                .and_then(|(sum, apart)| sum.checked_add(apart));
        }
        if let Some(off) = off
            && best.is_none_or(|(least, _)| off < least)
        {
            best = Some((off, offset));
        }
    }
    let (_, offset) = best.ok_or_else(|| unsupported("zones without counters"))?;
    for (zone, found) in listed.iter().zip(zones) {
        let counted = word(zone, offset).map(u64::cast_signed);
        let counter = counted.and_then(|counted| counted.checked_add(found.counter));
        found.counter = counter.ok_or_else(|| unsupported("zones without counters"))?;
    }
    Ok(())
}
