//! File systems in files.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// A file system in a file, mounted for as long as it lives.
#[derive(Debug)]
pub struct Mounted(TempDir);

impl Mounted {
    /// One of 600 MiB, which `mkfs`, a program with its arguments, makes. The test ends without a result
    /// where not root runs it, or the program is not there.
    ///
    /// # Panics
    /// If there is no room for the file, and as [`has`](crate::has).
    #[must_use]
    #[allow(clippy::unwrap_used, reason = "tests say so by panicking")]
    pub fn new(mkfs: &[&str]) -> Option<Self> {
        let (program, arguments) = mkfs.split_first()?;
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(600 << 20).unwrap();
        let at = folder.path().join("at");
        fs::create_dir(&at).unwrap();
        let made = Command::new(program).args(arguments).arg(&image).output();
        let mounted = made.is_ok_and(|run| run.status.success())
            && Command::new("mount")
                .args(["-o", "loop"])
                .args([&image, &at])
                .output()
                .is_ok_and(|run| run.status.success());
        let what = format!("{program} and loop mounts of what it makes");
        crate::has(&what, mounted).then(|| Self(folder))
    }

    /// The path where it is mounted.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.0.path().join("at")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}
