//! Existing memory dumps and VM snapshots, pruned, saved and converted: all that lies between the
//! name of a file and the file without its guest's free pages.
//!
//! ```no_run
//! use sonicshot::ClassSet;
//! use sonicshot_offline::{AnalyzeOptions, OpenOptions, PruneOptions, Snapshot};
//!
//! let snapshot = Snapshot::open("guest.raw", &OpenOptions::new())?;
//! let guest = snapshot.analyze(&AnalyzeOptions::new())?;
//! let plan = guest.plan(ClassSet::DEFAULT_DROP)?;
//! let stats = plan.prune_to("pruned.raw", &PruneOptions::new())?;
//! println!("Linux {}: {} bytes less", guest.facts().release, stats.dropped_bytes);
//! # Ok::<(), sonicshot_offline::OfflineError>(())
//! ```
//!
//! # The way of a prune
//!
//! 1. [`Snapshot::open`] tells what the path names: a file, a VMM's folder, a diff and its base.
//! 2. [`Snapshot::analyze`] finds the layout in which the guest's own memory map agrees with the
//!    file, the kernel that owns the memory, and the class of every page. It refuses a diff without
//!    its base, and keeps what it is not certain of.
//! 3. [`Analyzed::plan`] says which pages go.
//! 4. [`Plan::prune_to`], [`Plan::prune_in_place`], [`Plan::prune_to_writer`] or [`Plan::save`]
//!    writes what is left; each refuses what the VMM would not restore.
//!
//! [`Snapshot::convert`] writes all of the memory in another format, and [`CheckpointFile`] makes a
//! dump of a checkpoint again.
//!
//! Notes for a user on all that is a [`Note`].
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod analyze;
mod blobs;
mod checkpoint_file;
mod convert;
mod disk_options;
mod disks;
mod error;
mod lacking;
mod note;
mod options;
pub mod packed;
mod place;
mod plan;
mod records;
mod save;
mod share;
mod snapshot;
mod text;
mod untold;
mod whole;
mod zero;

pub use analyze::{Analyzed, Savings};
pub use checkpoint_file::{AttachOptions, CheckpointFile, RestoreOptions, RestoreTo, Restored};
pub use convert::{Converted, Target, Template};
pub use disk_options::RestoreDisks;
pub use disks::DiskSearch;
pub use error::OfflineError;
pub use note::Note;
pub use options::{AnalyzeOptions, OpenOptions};
pub use plan::{Plan, check_droppable, check_unused};
pub use save::{CheckpointOptions, Saved, Whole};
pub use snapshot::Snapshot;
pub use sonicshot_dump::{
    DumpFormat, Incomplete, KdumpCompression, LayoutSpec, Overwrite, PruneOptions, PruneStats,
    ShareOptions, ShareStats, WriteOptions,
};
pub use text::ByteSize;
