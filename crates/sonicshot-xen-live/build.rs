//! Builds the library that is preloaded into Xen's own save helper, to be part of this crate: it
//! must be a shared object of its own, and no file beside the program.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

const SOURCE: &str = "shim/filter.rs";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed={SOURCE}");
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("cargo::error=building {SOURCE}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let var = |name: &str| env::var_os(name).ok_or_else(|| format!("cargo gives no {name}"));
    let out = PathBuf::from(var("OUT_DIR")?).join("filter.so");
    let mut rustc = Command::new(var("RUSTC")?);
    rustc
        .args(["--edition", "2024", "--crate-name", "sonicshot_filter"])
        .args(["--crate-type", "cdylib", "-Cpanic=abort", "-Copt-level=2"])
        // It is loaded into a program of the system's, whatever this one is linked with.
        .args(["-Ctarget-feature=-crt-static", "-Cstrip=symbols"])
        .args(["-Clink-arg=-nostartfiles", "-Clink-arg=-nodefaultlibs"])
        .arg("--target")
        .arg(var("TARGET")?)
        .arg("-o")
        .arg(out)
        .arg(SOURCE);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        let mut option = std::ffi::OsString::from("-Clinker=");
        option.push(linker);
        rustc.arg(option);
    }
    let status = rustc.status().map_err(|error| error.to_string())?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{rustc:?}: {status}"))
    }
}
