//! Finds the kernel in guest memory with nothing to go by.
//!
//! Every Linux kernel with crash support keeps VMCOREINFO, a page of text that describes it
//! (`kernel/vmcore_info.c`), in a page of its own. It gives the top-level page table and the
//! displacement of the kernel image. But memory may hold many pages that begin so: of kernels
//! that ran before, in the buffers of whoever read it, or made by a process on purpose. So each
//! such page is a candidate only:
//!
//! 1. Its text must name page tables in RAM that map themselves where it says, and an
//!    `init_uts_ns` with its release. That takes microseconds, and nearly all end here.
//! 2. Candidates with the same page tables are one kernel, and one of them is its own: the page
//!    that a variable of the kernel's image points to.
//! 3. Each kernel is tried to the end, those that the guest's processors run on first.
//!
//! The search ends at a kernel that is proven to own the memory: by the processors, or where none
//! are told by the absence of traces that every later owner leaves. Where none can be proven, all
//! RAM is searched, for an earlier and a later kernel may both stand.

use crate::arch::x86_64::X86_64;
use crate::error::VmiError;
use crate::symbols::Vmcoreinfo;
use crate::{AddressSpace, KernelVa, VirtualMemory};
use sonicshot::{Gpa, GpaRange, GuestMemory, MemoryError, PageSize};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// `__START_KERNEL_map` (`arch/x86/include/asm/page_64_types.h`): an ABI of the kernel's own
/// linker script, the same since 2.6.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// `KERNEL_IMAGE_SIZE` is 1 GiB at most.
const MAX_IMAGE: u64 = 1 << 30;
/// VMCOREINFO is at most one page.
const MAX_VMCOREINFO: usize = 4096;
/// How long kernels are tried, all together: one takes some 50 ms.
const TRIES: Duration = Duration::from_secs(10);
/// So many of the candidates that failed are told of.
const MAX_TOLD: usize = 4;
/// What was tried where there is nothing at all.
pub(crate) const NO_PAGE: &str = "no page begins with VMCOREINFO";
/// How much is mapped at a time while searching.
const WINDOW: u64 = 2 << 20;
const _: () = assert!(WINDOW.is_power_of_two());

/// The page tables that a VMCOREINFO names: what tells one kernel from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Tables {
    /// `swapper_pg_dir`.
    pub page_table: KernelVa,
    /// Where that is in guest-physical memory.
    pub root: Gpa,
    pub five_levels: bool,
}

/// A kernel that was found, with its page tables confirmed.
#[derive(Debug)]
pub(crate) struct Found<'m> {
    pub space: AddressSpace<'m>,
    pub vmcoreinfo: Vmcoreinfo,
    /// What KASLR added to the linked addresses.
    pub kaslr: u64,
    /// Where VMCOREINFO came from.
    pub origin: String,
    /// Whether it is the note of a dump, and no page of memory.
    pub is_note: bool,
    /// The page tables that it names.
    pub tables: Tables,
}

/// What a kernel that was tried to the end turned out to be.
#[derive(Debug)]
pub(crate) struct Tried<T> {
    pub value: T,
    /// Whether it is certain that this kernel owns the memory.
    pub proven: bool,
}

/// All candidates for one kernel.
#[derive(Debug)]
struct Group {
    tables: Tables,
    note: bool,
    pages: Vec<Gpa>,
    /// The pages that the kernel's image points to, once they were looked for.
    pointed: Option<HashSet<Gpa>>,
    /// The texts that were tried.
    tried: HashSet<u64>,
    stands: bool,
}

type Attempt<'a, 'm, T> = dyn FnMut(Found<'m>) -> Result<Tried<T>, VmiError> + 'a;

struct Search<'a, 'm, T> {
    memory: &'m dyn GuestMemory,
    given: Option<&'a [u8]>,
    attempt: &'a mut Attempt<'a, 'm, T>,
    groups: Vec<Group>,
    by_tables: HashMap<Tables, usize>,
    hasher: RandomState,
    /// What is left of [`TRIES`].
    left: Duration,
    /// Whether a candidate was not tried, for there was no time.
    out_of_time: bool,
    told: Vec<String>,
    error: Option<VmiError>,
    /// A kernel of a machine that cannot be read.
    other: Option<VmiError>,
    standing: Vec<T>,
}

/// Finds the kernels that stand when `attempt` tries them to the end, by `given` VMCOREINFO (of a
/// dump's note) and by searching RAM: at least one, and only one if it is proven. `runs` tells
/// whether a kernel with these page tables is worth a try as soon as it is met: some processor runs
/// on them, or nothing is told of any.
pub(crate) fn find<'a, 'm, T>(
    memory: &'m dyn GuestMemory,
    given: Option<&'a [u8]>,
    believe_note: bool,
    runs: &dyn Fn(&Tables) -> bool,
    attempt: &'a mut Attempt<'a, 'm, T>,
) -> Result<Vec<T>, VmiError> {
    let mut kernels = Search {
        memory,
        given,
        attempt,
        groups: Vec::new(),
        by_tables: HashMap::new(),
        hasher: RandomState::new(),
        left: TRIES,
        out_of_time: false,
        told: Vec::new(),
        error: None,
        other: None,
        standing: Vec::new(),
    };
    if let Some(text) = given {
        match confirm(memory, text) {
            Ok(tables) => {
                let number = kernels.group(tables);
                if let Some(group) = kernels.groups.get_mut(number) {
                    group.note = true;
                }
                if (believe_note || runs(&tables))
                    && let Some(proven) = kernels.try_text(number, text, None)
                {
                    return Ok(vec![proven]);
                }
            }
            Err(why) => kernels.unconfirmed("the dump's VMCOREINFO note", why),
        }
    }
    let mut proven = None;
    let mut text = [0; MAX_VMCOREINFO];
    search(memory, b"OSRELEASE=", &mut |at| {
        if memory.read(at, &mut text).is_err() {
            return true;
        }
        match confirm(memory, &text) {
            Ok(tables) => {
                let number = kernels.group(tables);
                if let Some(group) = kernels.groups.get_mut(number) {
                    group.pages.push(at);
                }
                if runs(&tables) && kernels.may_be_own(number, at) {
                    proven = kernels.try_text(number, &text, Some(at));
                }
            }
            Err(why) => kernels.unconfirmed(&format!("VMCOREINFO at {at}"), why),
        }
        proven.is_none()
    })?;
    if let Some(proven) = proven {
        return Ok(vec![proven]);
    }
    // The best evidence first; else in the order in which they were found.
    let mut order: Vec<usize> = (0..kernels.groups.len()).collect();
    order.sort_by_key(|number| {
        let group = kernels.groups.get(*number);
        !group.is_some_and(|group| runs(&group.tables))
    });
    for number in order {
        if let Some(proven) = kernels.try_group(number) {
            return Ok(vec![proven]);
        }
    }
    kernels.outcome()
}

impl<T> Search<'_, '_, T> {
    fn tell(&mut self, why: String) {
        if self.told.len() < MAX_TOLD {
            self.told.push(why);
        }
    }

    /// Notes why a text is not a kernel's of this memory. One of a machine of another kind says
    /// more than that there is no kernel.
    fn unconfirmed(&mut self, origin: &str, why: VmiError) {
        self.tell(format!("{origin}: {why}"));
        if matches!(why, VmiError::OtherMachine { .. }) && self.other.is_none() {
            self.other = Some(why);
        }
    }

    /// The number of the group with these page tables.
    fn group(&mut self, tables: Tables) -> usize {
        let next = self.groups.len();
        let number = *self.by_tables.entry(tables).or_insert(next);
        if number == next {
            self.groups.push(Group {
                tables,
                note: false,
                pages: Vec::new(),
                pointed: None,
                tried: HashSet::new(),
                stands: false,
            });
        }
        number
    }

    /// Whether the page `at` is worth a try while others of its group may follow: the first is,
    /// and those that the kernel's image points to.
    fn may_be_own(&mut self, number: usize, at: Gpa) -> bool {
        let Some(group) = self.groups.get_mut(number) else {
            return false;
        };
        if group.stands {
            return false;
        }
        if group.tried.is_empty() {
            return true;
        }
        let (memory, tables) = (self.memory, group.tables);
        let left = &mut self.left;
        let pointed = group
            .pointed
            .get_or_insert_with(|| timed(left, || pointed_to(memory, &tables)));
        pointed.contains(&at)
    }

    /// Tries one text to the end, unless the same was tried. `at` is its page, or it is the note.
    /// Returns the kernel if it is proven.
    fn try_text(&mut self, number: usize, text: &[u8], at: Option<Gpa>) -> Option<T> {
        let group = self.groups.get_mut(number)?;
        let end = memchr::memchr(0, text).unwrap_or(text.len());
        let text = text.get(..end).unwrap_or_default();
        if !group.tried.insert(self.hasher.hash_one(text)) {
            return None;
        }
        if self.left.is_zero() {
            self.out_of_time = true;
            return None;
        }
        let origin = match at {
            Some(at) => format!("VMCOREINFO at {at}"),
            None => "VMCOREINFO note".into(),
        };
        let memory = self.memory;
        let attempt = &mut *self.attempt;
        let tables = group.tables;
        let tried = timed(&mut self.left, || {
            let found = Found::new(memory, &tables, text, origin.clone(), at.is_none())?;
            attempt(found)
        });
        match tried {
            Ok(tried) if tried.proven => return Some(tried.value),
            Ok(tried) => {
                group.stands = true;
                self.standing.push(tried.value);
            }
            Err(why) => {
                self.tell(format!("{origin}: {why}"));
                // That a copy is none says less than what is wrong with the kernel's own.
                if matches!(self.error, None | Some(VmiError::Stale { .. })) {
                    self.error = Some(why);
                }
            }
        }
        None
    }

    /// Tries the candidates of a group until one stands. Returns the kernel if it is proven.
    fn try_group(&mut self, number: usize) -> Option<T> {
        let group = self.groups.get_mut(number)?;
        if group.stands {
            return None;
        }
        let note = self.given.filter(|_| group.note);
        let mut pages = core::mem::take(&mut group.pages);
        if pages.len() > 1 {
            let (memory, tables) = (self.memory, group.tables);
            let left = &mut self.left;
            let pointed = group
                .pointed
                .get_or_insert_with(|| timed(left, || pointed_to(memory, &tables)));
            // Only if none is the kernel's own, for whatever reason, may any be.
            if pages.iter().any(|page| pointed.contains(page)) {
                pages.retain(|page| pointed.contains(page));
            }
        }
        if let Some(text) = note
            && let Some(proven) = self.try_text(number, text, None)
        {
            return Some(proven);
        }
        let mut text = [0; MAX_VMCOREINFO];
        for page in pages {
            if self.groups.get(number)?.stands {
                break;
            }
            if self.memory.read(page, &mut text).is_ok()
                && let Some(proven) = self.try_text(number, &text, Some(page))
            {
                return Some(proven);
            }
        }
        None
    }

    fn outcome(self) -> Result<Vec<T>, VmiError> {
        let untried = || format!("candidates that {} s were too short for", TRIES.as_secs());
        match (
            self.standing.is_empty(),
            self.out_of_time,
            self.error.or(self.other),
        ) {
            (false, false, _) => Ok(self.standing),
            (false, true, _) => Err(VmiError::Undecided {
                first: "the one that was found".into(),
                second: untried(),
            }),
            // What is wrong with the only kernels there are says more than that there is none.
            (true, false, Some(error)) => Err(error),
            (true, out_of_time, _) => {
                let mut told = self.told;
                if out_of_time {
                    told.push(untried());
                }
                Err(VmiError::NoKernel {
                    tried: if told.is_empty() {
                        NO_PAGE.into()
                    } else {
                        told.join("; ")
                    },
                })
            }
        }
    }
}

/// Does `work`, and takes the time that it took from `left`.
fn timed<R>(left: &mut Duration, work: impl FnOnce() -> R) -> R {
    let started = Instant::now();
    let done = work();
    *left = left.saturating_sub(started.elapsed());
    done
}

impl<'m> Found<'m> {
    fn new(
        memory: &'m dyn GuestMemory,
        tables: &Tables,
        text: &[u8],
        origin: String,
        is_note: bool,
    ) -> Result<Self, VmiError> {
        let vmcoreinfo = Vmcoreinfo::parse(text)?;
        Ok(Self {
            space: tables.space(memory),
            kaslr: vmcoreinfo.kernel_offset().unwrap_or(0),
            vmcoreinfo,
            origin,
            is_note,
            tables: *tables,
        })
    }
}

/// Whether a variable in the image of the kernel with these page tables points to a page with this
/// VMCOREINFO: it is the kernel's own, whatever symbols are missing.
pub(crate) fn is_own(memory: &dyn GuestMemory, tables: &Tables, info: &Vmcoreinfo) -> bool {
    let text = info.text().as_bytes();
    let mut page = [0; MAX_VMCOREINFO];
    pointed_to(memory, tables).into_iter().any(|at| {
        memory.read(at, &mut page).is_ok() && {
            let end = memchr::memchr(0, &page).unwrap_or(page.len());
            let own = page.get(..end).filter(|own| !own.is_empty());
            // At a crash a line is added to the copy that becomes a dump's note.
            let added = own.and_then(|own| text.strip_prefix(own));
            added.is_some_and(|added| added.is_empty() || added.starts_with(b"CRASHTIME="))
        }
    })
}

impl Tables {
    fn space<'m>(&self, memory: &'m dyn GuestMemory) -> AddressSpace<'m> {
        AddressSpace::new(memory, Box::new(X86_64::new(self.root, self.five_levels)))
    }
}

/// The pages that the kernel with these page tables points to from the writable part of its
/// image, which begins with `swapper_pg_dir`: its own VMCOREINFO is one of them
/// (`vmcoreinfo_data`), a page of a process is not.
fn pointed_to(memory: &dyn GuestMemory, tables: &Tables) -> HashSet<Gpa> {
    const PIECE: usize = 64 << 10;
    let space = tables.space(memory);
    let (mut at, end) = image_range(&space, tables.page_table);
    let mut pointers = Vec::new();
    let mut buffer = vec![0; PIECE];
    while at < end {
        let there = space.translate(at).ok();
        let len = there.map_or(PageSize::SIZE_4K.bytes(), |there| there.len);
        let len = len.min(PIECE as u64).min(end.offset_from(at).unwrap_or(0));
        let part = usize::try_from(len).unwrap_or(0);
        if let Some(there) = there
            && let Some(part) = buffer.get_mut(..part)
            && memory.read(there.at, part).is_ok()
        {
            let (words, _) = part.as_chunks::<8>();
            pointers.extend(
                words
                    .iter()
                    .map(|word| u64::from_le_bytes(*word))
                    .filter(|word| {
                        word & 0xfff == 0 && *word >> 56 == 0xff && *word < START_KERNEL_MAP
                    }),
            );
        }
        at = match at.checked_add(len) {
            Some(next) if len > 0 => next,
            _ => break,
        };
    }
    pointers.sort_unstable();
    pointers.dedup();
    let there = |pointer| space.translate(KernelVa::new(pointer)).ok();
    pointers
        .into_iter()
        .filter_map(there)
        .map(|there| there.at)
        .collect()
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
        // Of each page a few bytes are looked at: even of a file that is quicker read than mapped
        // they are quicker seen than copied with all the rest.
        let mapped = memory.map(start, len)?;
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

/// The lines of a VMCOREINFO that decide whether it may be this memory's.
#[derive(Default)]
struct Head<'t> {
    release: Option<&'t [u8]>,
    page_table: Option<&'t [u8]>,
    init_uts_ns: Option<&'t [u8]>,
    phys_base: Option<&'t [u8]>,
    five_levels: Option<&'t [u8]>,
    sme_mask: Option<&'t [u8]>,
    is_arm64: bool,
    /// A symbol table that is not in the kernel's image.
    outside: bool,
}

impl<'t> Head<'t> {
    fn read(text: &'t [u8]) -> Self {
        let end = memchr::memchr(0, text).unwrap_or(text.len());
        let mut head = Self::default();
        for line in text.get(..end).unwrap_or_default().split(|b| *b == b'\n') {
            let Some((key, value)) = memchr::memchr(b'=', line)
                .and_then(|at| line.split_at_checked(at))
                .and_then(|(key, value)| Some((key, value.get(1..)?.trim_ascii())))
            else {
                continue;
            };
            let field = match key {
                b"OSRELEASE" => &mut head.release,
                b"SYMBOL(swapper_pg_dir)" => &mut head.page_table,
                b"SYMBOL(init_uts_ns)" => &mut head.init_uts_ns,
                b"NUMBER(phys_base)" => &mut head.phys_base,
                b"NUMBER(pgtable_l5_enabled)" => &mut head.five_levels,
                b"NUMBER(sme_mask)" => &mut head.sme_mask,
                b"NUMBER(VA_BITS)" => {
                    head.is_arm64 = true;
                    continue;
                }
                _ => {
                    head.outside |= key.starts_with(b"SYMBOL(kallsyms_")
                        && hexadecimal(value).is_none_or(|at| !is_in_image(at));
                    continue;
                }
            };
            // The kernel writes each key once; of two, the first counts.
            field.get_or_insert(value);
        }
        head
    }
}

fn hexadecimal(value: &[u8]) -> Option<u64> {
    u64::from_str_radix(core::str::from_utf8(value).ok()?, 16).ok()
}

fn number(value: &[u8]) -> Option<i64> {
    crate::symbols::parse_number(core::str::from_utf8(value).ok()?)
}

fn is_in_image(at: u64) -> bool {
    at.checked_sub(START_KERNEL_MAP)
        .is_some_and(|offset| offset < MAX_IMAGE)
}

/// Holds what `text` says of its kernel's page tables and name against memory. It makes no
/// difference between a kernel's own VMCOREINFO and a copy, but it costs microseconds.
fn confirm(memory: &dyn GuestMemory, text: &[u8]) -> Result<Tables, VmiError> {
    let head = Head::read(text);
    let unsupported = |what: &str| VmiError::Unsupported { what: what.into() };
    let need = |value: Option<&[u8]>, name: &str| {
        value
            .and_then(hexadecimal)
            .ok_or_else(|| VmiError::Missing {
                what: format!("symbol {name}"),
                sources: "VMCOREINFO".into(),
            })
    };
    let other = |what: &'static str| VmiError::OtherMachine { what };
    if head.is_arm64 {
        return Err(other("an arm64 guest: only x86-64 is supported so far"));
    }
    if head.sme_mask.and_then(number).is_some_and(|mask| mask != 0) {
        return Err(other("a guest with encrypted memory (SME, SEV)"));
    }
    let page_table = need(head.page_table, "swapper_pg_dir")?;
    if head.release.is_some() && u32::try_from(page_table).is_ok() {
        return Err(other("a 32-bit x86 kernel: only x86-64 is supported"));
    }
    let uts = need(head.init_uts_ns, "init_uts_ns")?;
    let phys_base = head
        .phys_base
        .and_then(number)
        .ok_or_else(|| unsupported("VMCOREINFO without phys_base: not an x86-64 kernel"))?;
    if head.outside || !is_in_image(page_table) || !is_in_image(uts) {
        return Err(unsupported("VMCOREINFO with symbols outside the kernel"));
    }
    let root = Gpa::new(
        page_table
            .wrapping_sub(START_KERNEL_MAP)
            .wrapping_add(phys_base.cast_unsigned()),
    );
    if !memory.layout().contains(root, 4096) || root.raw() & 0xfff != 0 {
        return Err(unsupported(&format!(
            "a top-level page table at {root}, outside RAM"
        )));
    }
    let tables = Tables {
        page_table: KernelVa::new(page_table),
        root,
        five_levels: head.five_levels.and_then(number).is_some_and(|on| on != 0),
    };
    let space = tables.space(memory);
    let there = space
        .translate(tables.page_table)
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
    let release = head.release.unwrap_or_default();
    let mut names = [0; 1024];
    space
        .read(KernelVa::new(uts), &mut names)
        .map_err(VmiError::read("init_uts_ns"))?;
    if release.is_empty() || memchr::memmem::find(&names, release).is_none() {
        let release = String::from_utf8_lossy(release.get(..64).unwrap_or(release));
        return Err(unsupported(&format!(
            "VMCOREINFO of `{release}`, which is not what init_uts_ns holds"
        )));
    }
    Ok(tables)
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
