//! A library with LibVMI's C interface over files, for the tests of what loads LibVMI.
//!
//! In file mode a guest is a file with its memory, as it is for LibVMI. In the other modes its name
//! is the path of a text that says what the guest is ([`Guest`] has the words). What is called is
//! written to the text's log, so that a test sees it also if the process was killed.
#![expect(unsafe_code, reason = "it has LibVMI's C interface")]

mod calls;
mod guest;

pub use guest::Guest;

use std::path::{Path, PathBuf};

/// The path of the library that Cargo has built with the tests of this process.
///
/// # Panics
/// If it is not where Cargo puts it.
#[must_use]
pub fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let mut folders = program.ancestors().skip(1).take(3);
    let there = folders.find_map(|folder| {
        let deps = [folder.to_owned(), folder.join("deps")];
        let mut files = deps.iter().map(|folder| folder.join("liblibvmi_fake.so"));
        files.find(|file| Path::exists(file))
    });
    assert!(
        there.is_some(),
        "no liblibvmi_fake.so beside {}",
        program.display()
    );
    there.unwrap_or_default()
}
