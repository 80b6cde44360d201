//! Xen's files, which `sonicshot-xen` understands: `xl save` images, the streams in them, and
//! `xl dump-core` cores.

pub(crate) mod core;
pub(crate) mod image;
pub(crate) mod join;

use crate::DumpError;
use crate::format::kind::Source;
use crate::processors::{Halted, Registers, told};
use sonicshot::{GuestMemory, PageSize, Processor, Processors};
use sonicshot_xen::{DomainKind, ParseOptions, Vcpu, Vcpus, XenError};
use std::path::Path;

const PAGE: PageSize = PageSize::SIZE_4K;

/// Options for reading `source`, with whoever is told how far it is.
fn options(source: &Source<'_>) -> ParseOptions {
    let mut options = ParseOptions::new();
    options.progress.clone_from(&source.known.progress);
    options
}

fn failed(path: &Path) -> impl Fn(XenError) -> DumpError + use<'_> {
    move |source| DumpError::Xen {
        path: path.to_owned(),
        source,
    }
}

/// The processors of an image or a core: those that are down were never started or were taken
/// offline.
fn processors(
    vcpus: Result<Vcpus, XenError>,
    kind: DomainKind,
    memory: &dyn GuestMemory,
) -> Processors {
    let processor = |vcpu: &Vcpu| {
        let Some(cs_base) = vcpu.cs_base.filter(|_| kind == DomainKind::Hvm) else {
            return Processor::Started(vcpu.control);
        };
        let registers = Registers {
            control: vcpu.control,
            rip: vcpu.rip,
            rflags: vcpu.rflags,
            cs_selector: vcpu.cs_selector.into(),
            cs_base,
        };
        registers.processor(vcpu.id == 0, Halted::Untold(memory))
    };
    told(match vcpus {
        Ok(vcpus) => {
            let online = vcpus.online.iter().map(processor);
            let offline = std::iter::repeat_n(Processor::NotStarted, vcpus.offline);
            Ok(online.chain(offline).collect())
        }
        Err(_) => Err("its records of the processors are missing or damaged"),
    })
}
