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

mod candidates;
mod image;
mod other;
mod ram;

use crate::arch::{self, MIN_PAGE, Tables};
use crate::error::VmiError;
use crate::symbols::{Vmcoreinfo, VmcoreinfoLines};
use crate::{AddressSpace, VirtualMemory};
use candidates::{Attempt, Candidates};
pub(crate) use candidates::{Search, Tried};
pub(crate) use image::image_range;
pub(crate) use other::say_more;
use sonicshot::{Architecture, Gpa, GuestMemory, MemoryError, Progress};

/// The beginning of VMCOREINFO.
const MAGIC: &[u8; 10] = b"OSRELEASE=";

/// A kernel that was found, with its page tables confirmed.
#[derive(Debug)]
pub(crate) struct Found<'m> {
    pub architecture: Architecture,
    pub space: AddressSpace<'m>,
    pub vmcoreinfo: Vmcoreinfo,
    /// The offset that KASLR added to the linked addresses.
    pub kaslr: u64,
    /// The origin of VMCOREINFO.
    pub origin: String,
    /// The page of memory that it is; `None` if it is the note of a dump.
    pub at: Option<Gpa>,
    /// The page tables that it names.
    pub tables: Tables,
}

/// The name in messages of VMCOREINFO in the page `at`, or in a dump's note.
pub(crate) fn origin(at: Option<Gpa>) -> String {
    at.map_or_else(
        || "VMCOREINFO note".into(),
        |at| format!("VMCOREINFO at {at}"),
    )
}

/// Finds the kernels that stand when `attempt` tries them to the end, by `given` VMCOREINFO (of a
/// dump's note), by the page that is `likely` one, and by searching RAM. `runs` tells
/// whether a kernel with these page tables is worth a try as soon as it is met: some processor runs
/// on them, or nothing is told of any.
pub(crate) fn find<'a, 'm, T>(
    (memory, progress): (&'m dyn GuestMemory, &dyn Progress),
    given: Option<&'a [u8]>,
    likely: Option<Gpa>,
    believe_note: bool,
    runs: &dyn Fn(&Tables) -> bool,
    attempt: &'a mut Attempt<'a, 'm, T>,
) -> Result<Search<T>, VmiError> {
    let mut kernels = Candidates::new(memory, given, attempt);
    if let Some(text) = given {
        match confirm(memory, text) {
            Ok(tables) => {
                let number = kernels.add_note(tables);
                if (believe_note || runs(&tables))
                    && let Some(proven) = kernels.try_text(number, text, None)
                {
                    return Ok(Search::Standing(vec![proven]));
                }
            }
            Err(why) => kernels.unconfirmed(&"the dump's VMCOREINFO note", why),
        }
    }
    let mut proven = None;
    let mut visit = |at| {
        let Some(text) = read_text(memory, at) else {
            return true;
        };
        match confirm(memory, &text) {
            Ok(tables) => {
                let number = kernels.add_page(tables, at);
                if runs(&tables) && kernels.may_be_own(number, at) {
                    proven = kernels.try_text(number, &text, Some(at));
                }
            }
            Err(why) => kernels.unconfirmed(&format_args!("VMCOREINFO at {at}"), why),
        }
        proven.is_none()
    };
    // A page that begins otherwise by now is none, and all is searched.
    let is_likely = likely.filter(|at| begins_as_text(memory, *at));
    if is_likely.is_none_or(&mut visit) {
        ram::search(memory, progress, MAGIC, &mut visit)?;
    }
    if let Some(proven) = proven.or_else(|| kernels.try_groups(runs)) {
        return Ok(Search::Standing(vec![proven]));
    }
    kernels.outcome()
}

fn begins_as_text(memory: &dyn GuestMemory, at: Gpa) -> bool {
    let mut start = [0; MAGIC.len()];
    at.raw().is_multiple_of(MIN_PAGE as u64)
        && memory.read(at, &mut start).is_ok()
        && start == *MAGIC
}

/// Finds a page of `memory` with VMCOREINFO that fits page tables and a kernel's name there, whether that
/// kernel owns the memory or not: where to look [first](crate::GuestOptions::vmcoreinfo_at) once a guest
/// that runs is paused. `progress` is told as of the phase
/// [`FindingKernel`](sonicshot::WorkPhase::FindingKernel).
///
/// # Errors
/// [`MemoryError`] if the memory cannot be read.
pub fn find_vmcoreinfo(
    memory: &dyn GuestMemory,
    progress: &dyn Progress,
) -> Result<Option<Gpa>, MemoryError> {
    let mut found = None;
    ram::search(memory, progress, MAGIC, &mut |at| {
        let fits = read_text(memory, at).is_some_and(|text| confirm(memory, &text).is_ok());
        found = fits.then_some(at);
        !fits
    })?;
    Ok(found)
}

/// The page of text at `at`: VMCOREINFO is at most one page of the guest's.
fn read_text(memory: &dyn GuestMemory, at: Gpa) -> Option<Vec<u8>> {
    /// arm64 has pages of up to 64 KiB.
    const MAX_PAGE: usize = 64 << 10;
    let mut text = vec![0; MIN_PAGE];
    memory.read(at, &mut text).ok()?;
    let page_size = VmcoreinfoLines::new(&text).number("PAGESIZE");
    if let Some(page_size) = page_size.and_then(|size| usize::try_from(size).ok())
        && (MIN_PAGE + 1..=MAX_PAGE).contains(&page_size)
        && !text.contains(&0)
    {
        text.resize(page_size, 0);
        memory.read(at, &mut text).ok()?;
    }
    Some(text)
}

impl<'m> Found<'m> {
    fn new(
        memory: &'m dyn GuestMemory,
        tables: &Tables,
        text: &[u8],
        at: Option<Gpa>,
    ) -> Result<Self, VmiError> {
        let vmcoreinfo = Vmcoreinfo::parse(text)?;
        Ok(Self {
            architecture: tables.architecture,
            space: tables.space(memory)?,
            kaslr: vmcoreinfo.displacement()?,
            vmcoreinfo,
            origin: origin(at),
            at,
            tables: *tables,
        })
    }
}

/// Whether a variable in the image of the kernel with these page tables points to a page with this
/// VMCOREINFO: it is the kernel's own, whatever symbols are missing.
pub(crate) fn is_own(memory: &dyn GuestMemory, tables: &Tables, info: &Vmcoreinfo) -> bool {
    let text = info.text().as_bytes();
    image::pointed_to(memory, tables).into_iter().any(|at| {
        read_text(memory, at).is_some_and(|page| {
            let end = memchr::memchr(0, &page).unwrap_or(page.len());
            let own = page.get(..end).filter(|own| !own.is_empty());
            // At a crash a line is added to the copy that becomes a dump's note.
            let added = own.and_then(|own| text.strip_prefix(own));
            added.is_some_and(|added| added.is_empty() || added.starts_with(b"CRASHTIME="))
        })
    })
}

/// Holds what `text` says of its kernel's page tables and name against memory. It makes no
/// difference between a kernel's own VMCOREINFO and a copy, but it costs microseconds.
fn confirm(memory: &dyn GuestMemory, text: &[u8]) -> Result<Tables, VmiError> {
    let text = VmcoreinfoLines::new(text);
    let tables = arch::tables(memory, text)?;
    let space = tables.space(memory)?;
    let there = space
        .translate(tables.page_table)
        .map_err(VmiError::read("swapper_pg_dir"))?;
    if there.at != tables.root {
        return Err(VmiError::Disagree {
            what: "swapper_pg_dir".into(),
            first: "VMCOREINFO".into(),
            first_value: tables.root.raw(),
            second: "the page tables".into(),
            second_value: there.at.raw(),
        });
    }
    // The release in `init_uts_ns` is the running kernel's own.
    let release = text.value("OSRELEASE").unwrap_or(&[]);
    let mut names = [0; 1024];
    space
        .read(arch::need_address(text, "init_uts_ns")?, &mut names)
        .map_err(VmiError::read("init_uts_ns"))?;
    if release.is_empty() || memchr::memmem::find(&names, release).is_none() {
        let release = String::from_utf8_lossy(release.get(..64).unwrap_or(release));
        return Err(VmiError::Unsupported {
            what: format!("VMCOREINFO of `{release}`, which is not what init_uts_ns holds"),
        });
    }
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::read_text;
    use sonicshot::{Gpa, GuestBytes, MappedRegions};

    #[test]
    fn a_page_of_text_is_no_longer_than_any_page() {
        let mut ram = vec![b'x'; 1 << 18];
        for (page_size, len) in [
            (4096, 4096),
            (16384, 16384),
            (65536, 65536),
            (131_072, 4096),
        ] {
            let text = format!("OSRELEASE=6.1\nPAGESIZE={page_size}\n");
            ram[..text.len()].copy_from_slice(text.as_bytes());
            let regions = vec![(Gpa::ZERO, GuestBytes::from_slice(&ram))];
            let memory = MappedRegions::new(regions).unwrap();
            assert_eq!(
                read_text(&memory, Gpa::ZERO).unwrap().len(),
                len,
                "{page_size}"
            );
        }
    }
}
