//! A page server: virtual machines run at once, and their memory comes in from a pruned snapshot
//! as they touch it.
//!
//! ```no_run
//! use sonicshot::checkpoint::CheckpointReader;
//! use sonicshot_serve::{CheckpointSource, Metrics, Server, ServerOptions};
//! use std::sync::Arc;
//!
//! let metrics = Arc::new(Metrics::default());
//! let checkpoint = CheckpointReader::open("template.sonic")?;
//! // At most 256 MiB of decompressed pages, for all virtual machines together.
//! let source = CheckpointSource::new(checkpoint, 256 << 20, Arc::clone(&metrics));
//! let mut options = ServerOptions::new("/run/template.sock");
//! options.vm.metrics = metrics;
//! Server::bind(Arc::new(source), options, None)?.run(None)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Design
//!
//! ```text
//!  source ─▶ cache ─▶ machine (a thread for each VM) ─▶ userfaultfd
//!  PageSource         Vm, or a Server's session          UFFDIO_COPY, ZEROPAGE
//!                         ▲
//!  protocol ──────────────┘ regions, descriptors        watcher: a process with duplicates
//! ```
//!
//! - **Source** ([`PageSource`]): what is at an address of the guest: kept bytes, or the word that
//!   a dropped page reads as. [`CheckpointSource`] is a `.sonic`, [`MemorySource`] any
//!   [`GuestMemory`](sonicshot::GuestMemory): a whole or pruned raw file, mapped-ram, a snapshot's
//!   folder.
//! - **Cache**: decompressed chunks, bounded, shared by all virtual machines of one source. It is
//!   the source's own, and what is stored as it is has none but the kernel's.
//! - **Machine**: one thread for each virtual machine reads its faults and places its pages, so
//!   that one that blocks (its `mmap` lock, its descriptor's flags) holds up nobody else, and that
//!   what was given back is known before anything is done later. One bit a page says whether the
//!   source may still be asked for it: a page comes from there at most once, and never after it
//!   was given back. The same thread prefetches, between faults. It knows nothing of any VMM.
//! - **Protocol**: what a VMM says of its memory, a file for each form: Firecracker's (and
//!   `StratoVirt`'s, e2b's …) and the documented one.
//! - **Cloud Hypervisor** ([`CloudHypervisor`]): the other way round, it listens. Its memory is
//!   shared with a process that asks for pages in words; the same machine places them.
//! - **Watcher** ([`Watcher`], [`watch`]): a second process that ends the virtual machines if the
//!   server dies, or gives them to the next one ([`KeepOptions`]).
//!
//! A VMM that embeds its own page server uses [`Vm`] alone, for which the crate without its default
//! features is enough.
//!
//! # Never a wrong byte
//!
//! A page that cannot be read (a damaged or changed file) ends the virtual machine, by the
//! descriptor of its process: poison alone is not enough, for KVM may turn it into something else.
//! The same goes for a virtual machine whose message cannot be served, once its `userfaultfd` has
//! come: if nobody kept that, it would read zeroes.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod address;
#[cfg(feature = "server")]
mod cloud_hypervisor;
#[cfg(feature = "server")]
mod crowd;
#[cfg(feature = "server")]
mod descriptors;
mod engine;
mod error;
#[cfg(feature = "server")]
mod exposition;
#[cfg(feature = "server")]
mod held;
mod metrics;
#[cfg(feature = "server")]
mod peer;
#[cfg(feature = "server")]
mod protocol;
#[cfg(feature = "server")]
mod server;
mod set;
#[cfg(feature = "server")]
mod socket;
mod source;
#[cfg(feature = "server")]
#[expect(unsafe_code, reason = "calls to the system without a safe wrapper")]
mod sys;
#[expect(unsafe_code, reason = "the edge to userfaultfd")]
mod uffd;
#[cfg(feature = "server")]
mod until;
#[cfg(feature = "vm-memory")]
mod vm_memory;
#[cfg(feature = "server")]
mod watch;

pub use address::HostAddress;
#[cfg(feature = "server")]
pub use cloud_hypervisor::{CloudHypervisor, CloudOptions, FaultRequest, Migration, Restored};
#[cfg(feature = "server")]
pub use descriptors::{allow_many_descriptors, check_descriptors};
pub use engine::{Prefetch, Vm, VmOptions, VmRegion};
pub use error::ServeError;
#[cfg(feature = "server")]
pub use exposition::expose;
pub use metrics::Metrics;
#[cfg(feature = "server")]
pub use protocol::{Handshake, Mapping, Place};
#[cfg(feature = "server")]
pub use server::{KeepOptions, Server, ServerOptions};
pub use set::{PageSet, Recorder};
pub use source::{CheckpointSource, Content, Look, MemorySource, PageSource, Piece, Run};
#[cfg(feature = "server")]
pub use source::{OpenedSource, open_source};
pub use uffd::{Registered, Uffd};
#[cfg(feature = "server")]
pub use watch::{Watcher, watch};
