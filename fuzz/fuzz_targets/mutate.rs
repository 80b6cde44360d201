#![cfg_attr(feature = "libfuzzer", no_main)]
//! Mutations of a real guest: by libFuzzer, or without it the command that tries many.

#[cfg(feature = "libfuzzer")]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sonicshot_fuzz::mutate(data));

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::process::ExitCode {
    sonicshot_fuzz::mutate::command::main()
}
