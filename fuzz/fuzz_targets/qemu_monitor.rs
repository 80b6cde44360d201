#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| sonicshot_fuzz::qemu_monitor(data));
