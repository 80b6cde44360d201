//! The command's behaviour when the operating system says no: errors and short counts at every kind of
//! system call, a kill at any of them, files that change while they are read, crafted files that ask
//! for all of the memory or disk.
//!
//! By default a sample of it; `SONICSHOT_FAULT_ROUNDS=100` tries 100 points of each kind, which is
//! most of what there is: hours, so `SONICSHOT_FAULT_SHARE=2/8` takes the third of eight shares of
//! the jobs. `SONICSHOT_FAULT_ONLY` names the jobs, by a part of the name. What each job came to is
//! said as soon as it is known.
#![cfg(target_arch = "x86_64")]
#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests say so by panicking"
)]

mod bounds;
mod changes;
#[path = "../it/common.rs"]
mod common;
mod inject;
mod inputs;
mod kills;
mod made;
mod tracer;
