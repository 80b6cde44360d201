//! A Linux guest: its kernel found, its symbols gathered, its pages classified.

mod classify;
mod features;
mod gather;
mod options;

use crate::analysis::{Analysis, AnalysisOptions, GuestFacts, Parts};
use crate::arch::{self, Owner};
use crate::deadline::Deadline;
use crate::discover::{self, Found, Tried};
use crate::error::VmiError;
use crate::kernel::Kernel;
use crate::knowledge::Knowledge;
use crate::mm::iomem;
use crate::mm::mem_map::MemMap;
use crate::mm::page::PageLayout;
use crate::mm::zone::Zones;
use crate::os::GuestOs;
use crate::owner;
use crate::owner::alive;
use crate::owner::processors::{Owners, Verdict};
use crate::place::{self, PlaceEvidence};
use crate::shape::{self, Shaped};
use crate::symbols::{self, SymbolSource};
use crate::{KernelVa, mark_zero_pages};
pub use classify::Classification;
pub use options::{GuestOptions, OnInconsistency};
use sonicshot::{GpaRange, GuestMemory, PageSize};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

/// A Linux guest whose kernel was found in its memory.
///
/// ```no_run
/// use sonicshot::{GuestMemory, PageClass};
/// use sonicshot_vmi::{GuestOptions, LinuxGuest, OnInconsistency};
///
/// fn free_pages(memory: &dyn GuestMemory) -> Result<u64, sonicshot_vmi::VmiError> {
///     let guest = LinuxGuest::open(memory, &GuestOptions::new())?;
///     let pages = guest.classify(OnInconsistency::Refuse)?;
///     Ok(pages.map.counts().get(PageClass::FreeBuddy))
/// }
/// ```
#[derive(Debug)]
pub struct LinuxGuest<'m> {
    pub(crate) kernel: Kernel<'m>,
    origin: String,
    banner: Option<String>,
    owners: Owners,
    /// What the memory shows of a later owner, where nothing is told of processors.
    traces: Option<Owner>,
    knowledge: Knowledge,
    /// The kernel's image, from its start as far as it is mapped.
    image: (KernelVa, KernelVa),
    /// Where it was found by shape.
    shaped: Option<Shaped>,
    /// How many threads look at struct pages.
    threads: Option<NonZeroUsize>,
    /// Symbol files that tell nothing of a kernel that was found by shape.
    unused_files: Vec<PathBuf>,
}

impl<'m> LinuxGuest<'m> {
    /// Finds the kernel that owns `memory` and gathers its symbols.
    ///
    /// Every page that may be a kernel's VMCOREINFO is tried to the end: its symbols are read, and
    /// its own records of itself must be whole. If all processors of which something is told run
    /// on its page tables, it is the one. If nothing is told, one that bears no trace of a later
    /// owner is, if a reset would have left one; else all memory is searched, and no other may
    /// stand.
    ///
    /// # Errors
    /// [`VmiError::NoKernel`] if there is none, [`VmiError::Stale`] if there is only what is left
    /// of one, [`VmiError::Undecided`] if there are several and nothing tells which runs,
    /// [`VmiError::WrongKernel`] if a symbol file is of another build, [`VmiError::Symbols`] if
    /// one cannot be read.
    pub fn open(memory: &'m dyn GuestMemory, options: &GuestOptions) -> Result<Self, VmiError> {
        let owners = || Owners::new(memory, options.cr3);
        let mut files: Vec<Arc<dyn SymbolSource>> = Vec::new();
        for path in &options.symbol_files {
            files.push(symbols::open_symbol_file(path)?.into());
        }
        let told = owners();
        let mut attempt = |found: Found<'m>| {
            let is_note = found.is_note;
            let (tables, info) = (found.tables, found.vmcoreinfo.clone());
            let mut guest = Self::gather(found, options, &files, owners())?;
            // Where symbols tell which VMCOREINFO is the kernel's own, that is seen below. A kernel
            // that crashed points to the copy beside the crash kernel, which no dump has.
            let of_crash = is_note && told.are_crashed();
            if guest.knowledge == Knowledge::Vmcoreinfo
                && !of_crash
                && !discover::is_own(memory, &tables, &info)
            {
                return Err(VmiError::Stale {
                    what: "types are missing, and nothing in the kernel's image points to this \
                           VMCOREINFO"
                        .into(),
                });
            }
            alive::check(&guest.kernel, is_note)?;
            let proven = if told.are_known() {
                guest.is_run_by_all()
            } else if told.are_crashed() {
                is_note
            } else {
                let types = guest.knowledge == Knowledge::Types;
                let owner = owner::look(&guest.kernel, types)?;
                let settled = arch::of(&guest.kernel)?.is_settled(&owner);
                guest.traces = Some(owner);
                settled
            };
            Ok(Tried {
                value: guest,
                proven,
            })
        };
        if options.at_most == Some(Knowledge::Shape) {
            return Self::by_shape(memory, owners(), options);
        }
        let standing = discover::find(
            memory,
            options.vmcoreinfo.as_deref(),
            told.are_crashed(),
            // Where nothing is told, any may be the one: each is tried where it is met.
            &|tables| told.is_unknown() || told.may_run_on(memory, tables),
            &mut attempt,
        );
        match standing? {
            discover::Search::Standing(standing) => Self::decide(standing),
            discover::Search::NoText(no_text) => {
                let mut guest =
                    Self::by_shape(memory, owners(), options).map_err(|why| no_text.and(why))?;
                if !told.are_known() {
                    guest.look_at_memory_alone()?;
                }
                Ok(guest)
            }
        }
    }

    /// The kernel that alone stands by the shape of its records.
    fn by_shape(
        memory: &'m dyn GuestMemory,
        owners: Owners,
        options: &GuestOptions,
    ) -> Result<Self, VmiError> {
        let (shaped, kernel, image) = shape::find(memory, &owners)?;
        Ok(Self {
            kernel,
            origin: shaped.origin(),
            banner: None,
            owners,
            traces: None,
            knowledge: Knowledge::Shape,
            image,
            shaped: Some(shaped),
            threads: options.threads,
            unused_files: options.symbol_files.clone(),
        })
    }

    /// Looks for a later owner where nothing tells of the processors and there is no VMCOREINFO. A
    /// firmware or the next kernel may have written over that of a kernel which is gone, and of its
    /// other records nothing: so the kernel must be one that writes none, and can start no other.
    fn look_at_memory_alone(&mut self) -> Result<(), VmiError> {
        let mut owner = owner::look(&self.kernel, false)?;
        if symbols::writes_vmcoreinfo(&self.kernel.space, self.image) {
            let why = "its VMCOREINFO is gone, so the kernel may be gone, too";
            owner.untold.get_or_insert_with(|| why.into());
        }
        self.traces = Some(owner);
        Ok(())
    }

    /// Of several kernels that stand, the one that alone can be classified.
    fn decide(mut standing: Vec<Self>) -> Result<Self, VmiError> {
        if standing.len() > 1 {
            let names: Vec<String> = standing.iter().map(Self::name).collect();
            standing.retain(|guest| guest.classify(OnInconsistency::Refuse).is_ok());
            if standing.len() != 1 {
                let mut names = names.into_iter();
                return Err(VmiError::Undecided {
                    first: names.next().unwrap_or_default(),
                    second: names.next().unwrap_or_default(),
                });
            }
        }
        standing.pop().ok_or_else(|| VmiError::NoKernel {
            tried: "none stands".into(),
        })
    }

    /// Which kernel it is, among several.
    fn name(&self) -> String {
        let root = self.kernel.symbol("swapper_pg_dir").ok().flatten();
        let root = root.and_then(|at| self.kernel.space.translate(at).ok());
        let at = root.map_or_else(String::new, |root| {
            format!(", its page tables at {}", root.at)
        });
        format!("{} ({}{at})", self.kernel.build.release, self.origin)
    }

    /// Whether all processors that count run on this kernel.
    fn is_run_by_all(&self) -> bool {
        let check = || {
            let (map, _, zones) = self.structures()?;
            self.owners.check(&self.kernel, &map, &zones)
        };
        matches!(check(), Ok(Verdict::Owner))
    }

    /// What is known of the kernel.
    #[must_use]
    pub fn knowledge(&self) -> Knowledge {
        self.knowledge
    }

    fn mem_map(&self) -> Result<MemMap<'m>, VmiError> {
        match &self.shaped {
            Some(shaped) => shaped.mem_map(&self.kernel, &Deadline::new()),
            None => MemMap::new(&self.kernel),
        }
    }

    /// The struct pages, what each says, and the zones, by whatever is known of them.
    fn structures(&self) -> Result<(MemMap<'m>, PageLayout, Zones), VmiError> {
        if let Some(shaped) = &self.shaped {
            return shaped.structures(&self.kernel, self.image, &Deadline::new());
        }
        let map = MemMap::new(&self.kernel)?;
        if self.knowledge == Knowledge::Types {
            let layout = PageLayout::new(&self.kernel, map.stride)?;
            let zones = Zones::new(&self.kernel)?;
            return Ok((map, layout, zones));
        }
        let layout = PageLayout::of_free_pages(&self.kernel, map.stride)?;
        let zones = shape::told_zones(&self.kernel, &map, &layout, self.image)?;
        Ok((map, layout, zones))
    }

    /// The kernel's release, such as `6.1.0-37-cloud-amd64`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.kernel.build.release
    }

    /// The kernel's banner (`Linux version …`), if it could be read.
    #[must_use]
    pub fn banner(&self) -> Option<&str> {
        self.banner.as_deref()
    }

    /// The kernel's VMCOREINFO: what a dump of this guest carries as a note.
    #[must_use]
    pub fn vmcoreinfo(&self) -> Option<&str> {
        self.kernel
            .vmcoreinfo
            .as_ref()
            .map(symbols::Vmcoreinfo::text)
    }

    /// The kernel's build ID, if it tells one (Linux 5.9 and later).
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.kernel.vmcoreinfo.as_ref()?.build_id()
    }

    /// The guest's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.kernel.build.page_size
    }

    /// Where VMCOREINFO came from, then every source of symbols and types in use.
    #[must_use]
    pub fn symbol_sources(&self) -> Vec<String> {
        let mut sources: Vec<String> = self
            .kernel
            .sources()
            .iter()
            .filter(|source| !source.is_vmcoreinfo())
            .map(|source| source.origin().to_owned())
            .collect();
        sources.insert(0, self.origin.clone());
        sources
    }

    /// Where the kernel's struct pages lie in guest-physical memory: what a classification reads.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's memory map cannot be read.
    pub fn struct_page_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        Ok(self.mem_map()?.own_memory().collect())
    }

    /// Usable RAM by the map that the firmware gave to the guest, if the symbols tell where it is:
    /// `e820_table_firmware`, which `mem=` and the like do not change, or where there is none
    /// `e820_table`.
    ///
    /// # Errors
    /// [`VmiError`] if the map cannot be read or is not one.
    pub fn e820(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        arch::of(&self.kernel)?.boot_ram(&self.kernel)
    }

    /// Where the kernel maps all of memory, from guest-physical 0 on, if its symbols tell
    /// (`page_offset_base`, with `CONFIG_RANDOMIZE_MEMORY`).
    ///
    /// # Errors
    /// [`VmiError`] if it cannot be read.
    pub fn direct_map(&self) -> Result<Option<KernelVa>, VmiError> {
        arch::of(&self.kernel)?.direct_map(&self.kernel)
    }

    /// What the content of each of `ranges` of memory says about whether it lies there: for a
    /// layout that somebody has given. The ranges must be disjoint.
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's page tables have memory elsewhere, or reading fails.
    pub fn evidence_of_places(&self, ranges: &[GpaRange]) -> Result<Vec<PlaceEvidence>, VmiError> {
        place::evidence(&self.kernel, self.direct_map()?, ranges)
    }

    /// The memory that has struct pages: all that the kernel has ever taken for memory, of whatever
    /// device, in whole sections (of 128 MiB on x86-64).
    ///
    /// # Errors
    /// [`VmiError`] if the kernel's memory map cannot be read.
    pub fn known_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        let mem_map = self.mem_map()?;
        let frames = mem_map.spans().iter().map(|span| span.frames);
        Ok(frames
            .filter_map(|f| f.gpa_range(self.kernel.build.page_size))
            .collect())
    }

    /// RAM by the kernel's own tree of resources (`System RAM` in `/proc/iomem`), memory that was
    /// plugged in included, each stretch as it was added; but not what belongs to a device, such
    /// as virtio-mem. `None` if the symbols or types do not tell where the tree is.
    ///
    /// # Errors
    /// [`VmiError`] if the tree cannot be read or is none.
    pub fn system_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        iomem::system_ram(&self.kernel)
    }
}

impl GuestOs for LinuxGuest<'_> {
    fn facts(&self) -> GuestFacts {
        GuestFacts {
            os: "Linux",
            release: self.release().to_owned(),
            banner: self.banner().map(str::to_owned),
            vmcoreinfo: self.vmcoreinfo().map(str::to_owned),
            build_id: self.build_id().map(<[u8]>::to_vec),
            symbol_sources: self.symbol_sources(),
            knowledge: self.knowledge,
            architecture: Some(self.kernel.build.architecture),
            page_size: self.kernel.build.page_size,
        }
    }

    fn analyze(&self, options: &AnalysisOptions) -> Result<Analysis, VmiError> {
        let mut pages = self.classify(options.inconsistency())?;
        if options.looks_for_zero_pages() {
            mark_zero_pages(self.kernel.space.memory(), &mut pages.map)?;
        }
        Ok(Analysis::new(Parts {
            facts: self.facts(),
            pages,
            present: self.struct_page_memory()?,
            // A map that cannot be read confirms nothing.
            boot_ram: self.e820().ok().flatten(),
        }))
    }

    fn page_records(&self) -> Result<Vec<GpaRange>, VmiError> {
        self.struct_page_memory()
    }

    fn boot_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        self.e820()
    }

    fn system_ram(&self) -> Result<Option<Vec<GpaRange>>, VmiError> {
        LinuxGuest::system_ram(self)
    }

    fn known_memory(&self) -> Result<Vec<GpaRange>, VmiError> {
        LinuxGuest::known_memory(self)
    }

    fn direct_map(&self) -> Result<Option<KernelVa>, VmiError> {
        LinuxGuest::direct_map(self)
    }

    fn evidence_of_places(&self, ranges: &[GpaRange]) -> Result<Vec<PlaceEvidence>, VmiError> {
        LinuxGuest::evidence_of_places(self, ranges)
    }
}
