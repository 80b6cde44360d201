#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sonicshot_fuzz::serve_cloud(data));
