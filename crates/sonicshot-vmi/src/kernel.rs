//! The kernel's symbols and types from all sources together.

use crate::VirtualMemory;
use crate::error::VmiError;
use crate::needs;
use crate::symbols::{Member, SymbolBase, SymbolSource, Vmcoreinfo};
use crate::{AddressSpace, KernelVa};
use sonicshot::{Architecture, GuestMemory, PageSize};
use std::sync::{Arc, OnceLock};

/// All sources of symbols of one running kernel, in order of precedence, and its memory.
#[derive(Debug)]
pub(crate) struct Kernel<'m> {
    pub(crate) space: AddressSpace<'m>,
    pub(crate) build: Build,
    sources: Vec<Arc<dyn SymbolSource>>,
    /// The kernel's own account of itself; also one of the sources.
    pub(crate) vmcoreinfo: Option<Vmcoreinfo>,
    /// The address of its log's ring in the image, once it was looked for by its shape.
    pub(crate) log_ring: OnceLock<KernelVa>,
}

/// The kernel's build, and the way it was started.
#[derive(Debug, Clone)]
pub(crate) struct Build {
    pub architecture: Architecture,
    /// The size of its pages.
    pub page_size: PageSize,
    /// The release, such as `6.1.0-37-cloud-amd64`.
    pub release: String,
    /// The offset that KASLR added to the linked addresses.
    pub kaslr: u64,
}

impl<'m> Kernel<'m> {
    pub(crate) fn new(space: AddressSpace<'m>, build: Build) -> Self {
        Self {
            space,
            build,
            sources: Vec::new(),
            vmcoreinfo: None,
            log_ring: OnceLock::new(),
        }
    }

    /// The same kernel, read from `memory`, which is the same guest's.
    pub(crate) fn over<'n>(&self, memory: &'n dyn GuestMemory) -> Kernel<'n> {
        Kernel {
            space: self.space.over(memory),
            build: self.build.clone(),
            sources: self.sources.clone(),
            vmcoreinfo: self.vmcoreinfo.clone(),
            log_ring: self.log_ring.clone(),
        }
    }

    /// Room for a page of the guest.
    pub(crate) fn page_buffer(&self) -> Result<Vec<u8>, VmiError> {
        let bytes = self.build.page_size.bytes();
        let len = usize::try_from(bytes).map_err(|_| VmiError::Unsupported {
            what: format!("pages of {bytes} bytes"),
        })?;
        Ok(vec![0; len])
    }

    /// Whether the release is below `major.minor`; for labels only, since distributions
    /// backport.
    pub(crate) fn is_older_than(&self, major: u32, minor: u32) -> bool {
        let mut parts = self.build.release.split(['.', '-']).map(str::parse::<u32>);
        match (parts.next(), parts.next()) {
            (Some(Ok(a)), Some(Ok(b))) => (a, b) < (major, minor),
            _ => false,
        }
    }

    /// Adds a source; earlier ones take precedence.
    pub(crate) fn add(&mut self, source: Box<dyn SymbolSource>) {
        self.sources.push(source.into());
    }

    /// Adds one that other kernels that are tried have too.
    pub(crate) fn share(&mut self, source: &Arc<dyn SymbolSource>) {
        self.sources.push(Arc::clone(source));
    }

    pub(crate) fn sources(&self) -> &[Arc<dyn SymbolSource>] {
        &self.sources
    }

    pub(crate) fn missing(&self, what: String) -> VmiError {
        let sources: Vec<_> = self.sources.iter().map(|s| s.origin()).collect();
        VmiError::Missing {
            what,
            sources: sources.join(", "),
        }
    }

    /// The running address of `name` by one source.
    pub(crate) fn symbol_by(
        &self,
        source: &dyn SymbolSource,
        name: &str,
    ) -> Result<Option<KernelVa>, VmiError> {
        debug_assert!(needs::has_symbol(name), "{name}: no row of needs.rs");
        self.any_symbol_by(source, name)
    }

    /// The same of a name that somebody else asks for.
    fn any_symbol_by(
        &self,
        source: &dyn SymbolSource,
        name: &str,
    ) -> Result<Option<KernelVa>, VmiError> {
        let Some(at) = source.symbol(name)? else {
            return Ok(None);
        };
        // Where a per-CPU variable has its place in each area for a symbol, KASLR does not move it.
        let is_moved = source.base() == SymbolBase::Linked && self.space.is_pointer(at.raw());
        Ok(Some(match is_moved {
            true => at.moved_by(self.build.kaslr),
            false => at,
        }))
    }

    /// The running address of `name`, by the first source that knows it.
    pub(crate) fn symbol(&self, name: &str) -> Result<Option<KernelVa>, VmiError> {
        for source in &self.sources {
            if let Some(at) = self.symbol_by(source.as_ref(), name)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// The same of a name that somebody else asks for, by symbol tables first: VMCOREINFO gives the
    /// value of some pointers under their name.
    pub(crate) fn any_symbol(&self, name: &str) -> Result<Option<KernelVa>, VmiError> {
        for told in [false, true] {
            let sources = self.sources.iter().filter(|s| s.is_vmcoreinfo() == told);
            for source in sources {
                if let Some(at) = self.any_symbol_by(source.as_ref(), name)? {
                    return Ok(Some(at));
                }
            }
        }
        Ok(None)
    }

    /// The running address of the variable `name` by the first symbol table that knows it.
    /// VMCOREINFO is passed over: it gives the value of some pointers under their name.
    pub(crate) fn symbol_from_table(&self, name: &str) -> Result<Option<KernelVa>, VmiError> {
        for source in self.sources.iter().filter(|s| !s.is_vmcoreinfo()) {
            if let Some(at) = self.symbol_by(source.as_ref(), name)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    pub(crate) fn need_symbol(&self, name: &str) -> Result<KernelVa, VmiError> {
        self.symbol(name)?
            .ok_or_else(|| self.missing(format!("symbol {name}")))
    }

    /// The size of `struct name` by the first source that knows it; refused when another
    /// disagrees.
    pub(crate) fn type_size(&self, name: &str) -> Result<Option<u64>, VmiError> {
        debug_assert!(needs::has_structure(name), "{name}: no row of needs.rs");
        self.any_type_size(name)
    }

    /// The same of a name that somebody else asks for.
    pub(crate) fn any_type_size(&self, name: &str) -> Result<Option<u64>, VmiError> {
        let mut found: Option<(u64, &str)> = None;
        for source in &self.sources {
            match (source.type_size(name)?, found) {
                (Some(size), None) => found = Some((size, source.origin())),
                (Some(size), Some((first, origin))) if size != first => {
                    return Err(VmiError::Disagree {
                        what: format!("the size of struct {name}"),
                        first: origin.to_owned(),
                        first_value: first,
                        second: source.origin().to_owned(),
                        second_value: size,
                    });
                }
                _ => {}
            }
        }
        Ok(found.map(|(size, _)| size))
    }

    pub(crate) fn need_type_size(&self, name: &str) -> Result<u64, VmiError> {
        match self.type_size(name)? {
            Some(size) if size > 0 && size <= 1 << 24 => Ok(size),
            Some(size) => Err(VmiError::Unsupported {
                what: format!("struct {name} of {size} bytes"),
            }),
            None => Err(self.missing(format!("struct {name}"))),
        }
    }

    /// The member of the first source that knows it; refused when another disagrees on the
    /// offset, for then one of them is of another kernel.
    pub(crate) fn member(&self, name: &str, path: &str) -> Result<Option<Member>, VmiError> {
        debug_assert!(
            needs::has_member(name, path),
            "{name}.{path}: no row of needs.rs"
        );
        self.any_member(name, path)
    }

    /// The same of a name that somebody else asks for.
    pub(crate) fn any_member(&self, name: &str, path: &str) -> Result<Option<Member>, VmiError> {
        let mut found: Option<(Member, &str)> = None;
        for source in &self.sources {
            let Some(member) = source.member(name, path)? else {
                continue;
            };
            match &mut found {
                None => found = Some((member, source.origin())),
                Some((first, origin)) => {
                    if first.offset != member.offset {
                        return Err(VmiError::Disagree {
                            what: format!("the offset of {name}.{path}"),
                            first: (*origin).to_owned(),
                            first_value: first.offset,
                            second: source.origin().to_owned(),
                            second_value: member.offset,
                        });
                    }
                    if let (Some(ours), Some(theirs)) = (first.len, member.len)
                        && ours != theirs
                    {
                        return Err(VmiError::Disagree {
                            what: format!("the length of {name}.{path}"),
                            first: (*origin).to_owned(),
                            first_value: ours,
                            second: source.origin().to_owned(),
                            second_value: theirs,
                        });
                    }
                    first.size = first.size.or(member.size);
                    first.len = first.len.or(member.len);
                }
            }
        }
        Ok(found.map(|(member, _)| member))
    }

    pub(crate) fn need_member(&self, name: &str, path: &str) -> Result<Member, VmiError> {
        self.member(name, path)?
            .ok_or_else(|| self.missing(format!("member {name}.{path}")))
    }

    /// The constant by the first source that knows it; refused when another disagrees, for then
    /// one of them is of another kernel, or damaged.
    pub(crate) fn constant(&self, name: &str) -> Result<Option<i64>, VmiError> {
        debug_assert!(needs::has_constant(name), "{name}: no row of needs.rs");
        self.any_constant(name)
    }

    /// The same of a name that somebody else asks for.
    pub(crate) fn any_constant(&self, name: &str) -> Result<Option<i64>, VmiError> {
        let mut found: Option<(i64, &str)> = None;
        for source in &self.sources {
            match (source.constant(name)?, found) {
                (Some(value), None) => found = Some((value, source.origin())),
                (Some(value), Some((first, origin))) if value != first => {
                    return Err(VmiError::Disagree {
                        what: format!("the constant {name}"),
                        first: origin.to_owned(),
                        first_value: first.cast_unsigned(),
                        second: source.origin().to_owned(),
                        second_value: value.cast_unsigned(),
                    });
                }
                _ => {}
            }
        }
        Ok(found.map(|(value, _)| value))
    }

    pub(crate) fn need_constant(&self, name: &str) -> Result<i64, VmiError> {
        self.constant(name)?
            .ok_or_else(|| self.missing(format!("constant {name}")))
    }

    /// Whether some source holds data symbols, so that a symbol which none knows does not exist.
    pub(crate) fn knows_all_symbols(&self) -> Result<bool, VmiError> {
        for source in &self.sources {
            // `init_task` is in every kernel, and is data: kallsyms without CONFIG_KALLSYMS_ALL
            // and VMCOREINFO do not have it.
            if source.tells_all() && source.symbol("init_task")?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(crate) fn read_u64(&self, what: &'static str, at: KernelVa) -> Result<u64, VmiError> {
        self.space.read_u64(at).map_err(VmiError::read(what))
    }

    pub(crate) fn read_u32(&self, what: &'static str, at: KernelVa) -> Result<u32, VmiError> {
        self.space.read_u32(at).map_err(VmiError::read(what))
    }

    pub(crate) fn read_ptr(&self, what: &'static str, at: KernelVa) -> Result<KernelVa, VmiError> {
        self.read_u64(what, at).map(KernelVa::new)
    }

    /// The first of `names` that is a member of `ty`.
    pub(crate) fn first_member(
        &self,
        ty: &str,
        names: &[&str],
    ) -> Result<Option<Member>, VmiError> {
        for name in names {
            if let Some(member) = self.member(ty, name)? {
                return Ok(Some(member));
            }
        }
        Ok(None)
    }
}

/// `base + index * size + offset`, refused when it wraps.
pub(crate) fn element(
    what: &'static str,
    base: KernelVa,
    index: u64,
    size: u64,
    offset: u64,
) -> Result<KernelVa, VmiError> {
    index
        .checked_mul(size)
        .and_then(|bytes| bytes.checked_add(offset))
        .and_then(|bytes| base.checked_add(bytes))
        .ok_or(VmiError::Corrupt {
            what,
            at: base,
            value: index,
        })
}

/// A made-up kernel for tests of layouts that no real guest at hand has.
#[cfg(test)]
pub(crate) mod testing {
    use super::{Build, Kernel};
    use crate::KernelVa;
    use crate::arch::Tables;
    use crate::symbols::{Member, SymbolBase, SymbolError, SymbolSource};
    use sonicshot::{Architecture, Gpa, GuestBytes, MappedRegions, PageSize};
    use std::collections::HashMap;

    /// The address at which all of memory is mapped.
    pub(crate) const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

    /// Symbols, sizes, members and constants by name.
    #[derive(Debug, Default, Clone)]
    pub(crate) struct Facts {
        pub symbols: HashMap<&'static str, u64>,
        pub sizes: HashMap<&'static str, u64>,
        pub members: HashMap<(&'static str, &'static str), Member>,
        pub constants: HashMap<&'static str, i64>,
        /// Whether the symbols are a file's.
        pub linked: bool,
    }

    impl Facts {
        pub(crate) fn member(&mut self, ty: &'static str, name: &'static str, offset: u64) {
            let member = Member {
                offset,
                size: Some(8),
                len: None,
            };
            self.members.insert((ty, name), member);
        }
    }

    impl SymbolSource for Facts {
        fn origin(&self) -> &'static str {
            "a test"
        }
        fn base(&self) -> SymbolBase {
            match self.linked {
                true => SymbolBase::Linked,
                false => SymbolBase::Running,
            }
        }
        fn symbol(&self, name: &str) -> Result<Option<KernelVa>, SymbolError> {
            Ok(self.symbols.get(name).copied().map(KernelVa::new))
        }
        fn type_size(&self, name: &str) -> Result<Option<u64>, SymbolError> {
            Ok(self.sizes.get(name).copied())
        }
        fn member(&self, name: &str, path: &str) -> Result<Option<Member>, SymbolError> {
            let found = self
                .members
                .iter()
                .find(|((ty, member), _)| *ty == name && *member == path);
            Ok(found.map(|(_, member)| *member))
        }
        fn constant(&self, name: &str) -> Result<Option<i64>, SymbolError> {
            Ok(self.constants.get(name).copied())
        }
    }

    /// `struct page` as it is in every version: flags 0, lru 8, mapping 24, private 40,
    /// mapcount 48, refcount 52.
    pub(crate) fn page_facts() -> Facts {
        let mut facts = Facts::default();
        facts.sizes.insert("page", 64);
        for (name, offset) in [
            ("flags", 0),
            ("lru", 8),
            ("mapping", 24),
            ("private", 40),
            ("_mapcount", 48),
            ("_refcount", 52),
        ] {
            Facts::member(&mut facts, "page", name, offset);
        }
        let flags = [
            "PG_locked",
            "PG_writeback",
            "PG_referenced",
            "PG_uptodate",
            "PG_dirty",
            "PG_lru",
            "PG_head",
            "PG_waiters",
            "PG_active",
            "PG_workingset",
            "PG_private",
            "PG_private_2",
            "PG_reserved",
            "PG_swapbacked",
            "PG_hwpoison",
            "PG_slab",
            "PG_mappedtodisk",
            "PG_reclaim",
            "__NR_PAGEFLAGS",
        ];
        for (bit, name) in (0..).zip(flags) {
            facts.constants.insert(name, bit);
        }
        facts
    }

    /// Guest memory with its page tables: `len` bytes (at most 1 GiB), the tables in its last
    /// three pages, all of it mapped at [`DIRECT_MAP`].
    pub(crate) struct Ram(pub Vec<u8>);

    impl Ram {
        pub(crate) fn new(len: usize) -> Self {
            let mut ram = Self(vec![0; len]);
            let tables = len as u64 - 0x3000;
            ram.put(tables + 0x111 * 8, (tables + 0x1000) | 0x63);
            ram.put(tables + 0x1000, (tables + 0x2000) | 0x63);
            for large in 0..512 {
                ram.put(tables + 0x2000 + large * 8, (large << 21) | 0xe3);
            }
            ram
        }

        pub(crate) fn put(&mut self, at: u64, value: u64) {
            let at = usize::try_from(at).unwrap();
            self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }

        pub(crate) fn memory(&self) -> MappedRegions<'_> {
            MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(&self.0))]).unwrap()
        }
    }

    /// The page tables that a [`Ram`] of `len` bytes has.
    pub(crate) fn tables(len: u64) -> Tables {
        Tables {
            architecture: Architecture::X86_64,
            page_table: KernelVa::new(0),
            root: Gpa::new(len - 0x3000),
            levels: 4,
        }
    }

    pub(crate) fn kernel<'m>(memory: &'m MappedRegions<'_>, facts: Facts) -> Kernel<'m> {
        use sonicshot::GuestMemory;
        let space = tables(memory.layout().bytes()).space(memory).unwrap();
        let build = Build {
            architecture: Architecture::X86_64,
            page_size: PageSize::SIZE_4K,
            release: "6.1.0".into(),
            kaslr: 0,
        };
        let mut kernel = Kernel::new(space, build);
        kernel.add(Box::new(facts));
        kernel
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Facts, Ram, kernel};
    use crate::KernelVa;

    #[test]
    fn kaslr_moves_the_image_and_no_place_in_a_per_cpu_area() {
        let ram = Ram::new(8 << 20);
        let memory = ram.memory();
        let mut facts = Facts {
            linked: true,
            ..Facts::default()
        };
        facts.symbols.insert("init_task", 0xffff_ffff_8200_0000);
        facts.symbols.insert("this_cpu_off", 0x1_9168);
        let mut kernel = kernel(&memory, facts);
        kernel.build.kaslr = 0x16e0_0000;
        let at = |name| kernel.symbol(name).unwrap().map(KernelVa::raw);
        assert_eq!(at("init_task"), Some(0xffff_ffff_98e0_0000));
        assert_eq!(at("this_cpu_off"), Some(0x1_9168));
    }
}
