//! The symbols and types of a kernel that was found, gathered from its memory and from files.

use super::{GuestOptions, LinuxGuest};
use crate::KernelVa;
use crate::arch::{self, Arch};
use crate::discover::{self, Found};
use crate::error::VmiError;
use crate::kernel::{Build, Kernel};
use crate::knowledge::Knowledge;
use crate::owner::processors::Owners;
use crate::symbols::{self, Given, Kallsyms, SymbolSource};
use sonicshot::PageSize;
use std::sync::OnceLock;

impl<'m> LinuxGuest<'m> {
    /// Gathers the symbols and types of a kernel.
    pub(super) fn gather(
        found: Found<'m>,
        options: &GuestOptions,
        given: &Given,
        owners: Owners,
    ) -> Result<Self, VmiError> {
        let files = given.of_build(found.vmcoreinfo.build_id())?;
        let notes_of_files = given.notes(&files, found.vmcoreinfo.build_id());
        let hides_types = options.at_most.is_some_and(|most| most > Knowledge::Types);
        let arch = arch::by_name(found.architecture)?;
        let build = build_of(&found, arch)?;
        let stext = stext_of(&found)?;
        let Found {
            space,
            vmcoreinfo,
            origin,
            ..
        } = found;
        let image = discover::image_range(arch, &space, stext);
        let kallsyms = Kallsyms::find(&space, &vmcoreinfo, image);
        let has_no_kallsyms = vmcoreinfo.tells_of_no_kallsyms();
        let mut kernel = Kernel::new(space, build);
        for file in &files {
            kernel.share(file);
        }
        kernel.add(Box::new(vmcoreinfo.clone()));
        kernel.vmcoreinfo = Some(vmcoreinfo);
        let fallbacks = match kallsyms.is_err() && !hides_types {
            true => options.fallbacks.as_slice(),
            false => &[],
        };
        for source in fallbacks {
            kernel.share(source);
        }
        // Without symbols types tell of nothing where it is.
        let has_table = match kallsyms {
            Ok(kallsyms) if !hides_types => {
                kernel.add(Box::new(kallsyms));
                true
            }
            _ if kernel.symbol("linux_banner")?.is_some() => true,
            // A table that is gone is no table that never was: the kernel may be gone with it.
            Err(error) if !hides_types && !has_no_kallsyms => return Err(error.into()),
            _ => false,
        };
        let mut guest = Self {
            kernel,
            origin,
            banner: None,
            owners,
            traces: None,
            knowledge: Knowledge::Types,
            image,
            shaped: None,
            searched: OnceLock::new(),
            threads: options.threads,
            progress: options.progress.clone(),
            notes_of_files,
        };
        guest.read_banner()?;
        guest.check_files(files.len(), fallbacks.len())?;
        // Also beside a file's types: where both tell, they must agree.
        if has_table
            && let Some(btf) = symbols::find_btf(&guest.kernel.space, guest.btf_bounds()?, image)?
        {
            guest.kernel.add(Box::new(btf));
        }
        if !guest.has_types()? {
            guest.knowledge = Knowledge::Vmcoreinfo;
        }
        Ok(guest)
    }

    /// Whether some source tells types; VMCOREINFO tells neither of these.
    pub(super) fn has_types(&self) -> Result<bool, VmiError> {
        Ok(self.kernel.member("zone", "zone_start_pfn")?.is_some()
            || self.kernel.constant("__NR_PAGEFLAGS")?.is_some())
    }

    /// `__start_BTF` and `__stop_BTF`, if the symbols are known.
    pub(super) fn btf_bounds(&self) -> Result<Option<(KernelVa, KernelVa)>, VmiError> {
        Ok(self
            .kernel
            .symbol("__start_BTF")?
            .zip(self.kernel.symbol("__stop_BTF")?))
    }

    /// Reads `linux_banner` at the address that the guest's own tables give, not a file's.
    fn read_banner(&mut self) -> Result<(), VmiError> {
        for source in self.kernel.sources() {
            if source.base() == symbols::SymbolBase::Running
                && let Some(at) = source.symbol("linux_banner")?
                && let Ok(text) = self.kernel.space.read_str(at, 512)
            {
                self.banner = Some(text.trim_end().to_owned());
                return Ok(());
            }
        }
        Ok(())
    }

    /// Refuses symbol files of another build: by build-id, by banner, and by addresses; and sources
    /// that stand in for the kernel's own table, which come behind VMCOREINFO, likewise.
    fn check_files(&self, files: usize, fallbacks: usize) -> Result<(), VmiError> {
        let guest_name = || {
            self.banner
                .clone()
                .unwrap_or_else(|| self.kernel.build.release.clone())
        };
        let info = self.kernel.vmcoreinfo.as_ref();
        let sources = || self.kernel.sources().iter();
        let given = sources().take(files);
        // Between them stands the kernel's own.
        for source in given.chain(sources().skip(files).skip(1).take(fallbacks)) {
            let wrong = |file: String, guest: String| VmiError::WrongKernel {
                origin: source.origin().to_owned(),
                file,
                guest,
            };
            if let (Some(file), Some(guest)) = (
                source.build_id(),
                info.and_then(symbols::Vmcoreinfo::build_id),
            ) && file != guest
            {
                let name = source
                    .banner()
                    .map_or_else(String::new, |b| format!("{} ", b.trim()));
                return Err(wrong(
                    format!("{name}(build-id {})", symbols::hex(file)),
                    format!("{} (build-id {})", guest_name(), symbols::hex(guest)),
                ));
            }
            if let (Some(file), Some(guest)) = (source.banner(), &self.banner)
                && file.trim() != guest.trim()
            {
                return Err(wrong(file.trim().to_owned(), guest.clone()));
            }
            // A System.map carries no version: its addresses must be the guest's.
            for name in [
                "swapper_pg_dir",
                "_stext",
                "init_uts_ns",
                "node_data",
                "linux_banner",
            ] {
                let Some(file) = self.kernel.symbol_by(source.as_ref(), name)? else {
                    continue;
                };
                for other in sources().skip(files) {
                    if let Some(guest) = self.kernel.symbol_by(other.as_ref(), name)?
                        && guest != file
                    {
                        return Err(wrong(
                            format!("a kernel with {name} at {file} ({})", source.origin()),
                            format!("{} with {name} at {guest}", guest_name()),
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

/// The kernel's build, by its VMCOREINFO.
fn build_of(found: &Found<'_>, arch: &dyn Arch) -> Result<Build, VmiError> {
    let info = &found.vmcoreinfo;
    let bytes = info.page_size().ok_or_else(|| VmiError::Missing {
        what: "PAGESIZE".into(),
        sources: found.origin.clone(),
    })?;
    let page_size = PageSize::new(bytes)
        .filter(|size| arch.has_page_size(*size))
        .ok_or_else(|| VmiError::Unsupported {
            what: format!("pages of {bytes} bytes"),
        })?;
    Ok(Build {
        architecture: found.architecture,
        page_size,
        release: info.osrelease().unwrap_or("").to_owned(),
        kaslr: found.kaslr,
    })
}

/// An address at the beginning of the kernel's image.
fn stext_of(found: &Found<'_>) -> Result<KernelVa, VmiError> {
    let symbol = |name| found.vmcoreinfo.symbol(name);
    let stext = symbol("_stext").or_else(|| symbol("swapper_pg_dir"));
    stext.ok_or_else(|| VmiError::Missing {
        what: "symbol _stext".into(),
        sources: found.origin.clone(),
    })
}
