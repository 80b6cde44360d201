//! The preloaded library, in a program that asks for types as libxc does: of a stand-in for
//! libxenctrl, which calls every seventh frame a page table.

use sonicshot_xen_live::{FrameRuns, SaveFilter};
use std::path::Path;
use std::process::{Command, Stdio};

const LIBRARY: &str = r#"
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_get_pfn_type_batch(
    _: *mut u8, domain: u32, count: u32, frames: *mut u64,
) -> i32 {
    if domain == 9 {
        return -1;
    }
    // More than a page with libxencall's own 16 bytes.
    if count > 510 {
        return -2;
    }
    for frame in unsafe { std::slice::from_raw_parts_mut(frames, count as usize) } {
        *frame = if *frame % 7 == 0 { 1 << 28 } else { 0 };
    }
    0
}

/// The machine's frame of the guest's `frame`, of which there is no 2 MiB for what begins at 4096.
fn machine(frame: u64) -> u64 {
    frame + (1 << 20)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_populate_physmap(
    _: *mut u8, _: u32, count: u64, order: u32, flags: u32, frames: *mut u64,
) -> i32 {
    let first = unsafe { *frames };
    println!("{count} of order {order} at {first}, flags {flags}");
    if order == 9 && first == 4096 {
        return 0;
    }
    for frame in unsafe { std::slice::from_raw_parts_mut(frames, count as usize) } {
        *frame = machine(*frame);
    }
    count as i32
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_domain_populate_physmap_exact(
    xch: *mut u8, domain: u32, count: u64, order: u32, flags: u32, frames: *mut u64,
) -> i32 {
    if domain == 9 {
        return -1;
    }
    print!("exactly ");
    unsafe { xc_domain_populate_physmap(xch, domain, count, order, flags, frames) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn xc_report_progress_step(_: *mut u8, done: u64, _: u64) {
    println!("progress {done}");
}
"#;

/// Wants memory for frames as libxc does of a record, and prints what it gets.
const POPULATES: &str = r#"
#[link(name = "standin")]
unsafe extern "C" {
    fn xc_domain_populate_physmap_exact(
        xch: *mut u8, domain: u32, count: u64, order: u32, flags: u32, frames: *mut u64,
    ) -> i32;
}
fn populate(domain: u32, order: u32, frames: impl IntoIterator<Item = u64>) {
    let wanted: Vec<u64> = frames.into_iter().collect();
    let mut got = wanted.clone();
    let (at, count) = (got.as_mut_ptr(), got.len() as u64);
    let null = std::ptr::null_mut();
    let result = unsafe { xc_domain_populate_physmap_exact(null, domain, count, order, 5, at) };
    let right = got.iter().zip(&wanted).all(|(got, wanted)| *got == wanted + (1 << 20));
    println!("{result} {right}");
}
fn main() {
    // Whole, with a gap, with another order of frames, and begun elsewhere.
    populate(3, 0, 1024..2048);
    populate(3, 0, (0..1024).filter(|frame| *frame != 700));
    populate(3, 0, (1024..1536).rev());
    populate(3, 0, 1500..2100);
    // No such memory is left.
    populate(3, 0, 4096..4700);
    populate(3, 0, []);
    populate(3, 4, [64]);
    populate(9, 0, 1000..2048);
}
"#;

/// Asks for the types of 3000 frames from 5000 on, for each domain that it is given, and prints the
/// result and the frames that are not ordinary.
const PROGRAM: &str = r#"
#[link(name = "standin")]
unsafe extern "C" {
    fn xc_get_pfn_type_batch(xch: *mut u8, domain: u32, count: u32, frames: *mut u64) -> i32;
    fn xc_report_progress_step(xch: *mut u8, done: u64, total: u64);
}
fn main() {
    unsafe { xc_report_progress_step(std::ptr::null_mut(), 1, 2) };
    for domain in std::env::args().skip(1) {
        let mut frames: Vec<u64> = (5000..8000).collect();
        let number = domain.parse().unwrap();
        let at = frames.as_mut_ptr();
        let result = unsafe { xc_get_pfn_type_batch(std::ptr::null_mut(), number, 3000, at) };
        let other = frames.iter().zip(5000..).filter(|(kind, _)| **kind != 0);
        let other: Vec<_> = other.map(|(kind, frame)| format!("{frame}:{:x}", kind >> 28)).collect();
        println!("{domain} {result} {}", other.join(" "));
    }
}
"#;

fn build(folder: &Path, name: &str, source: &str, options: &[&str]) {
    std::fs::write(folder.join(name), source).unwrap();
    let done = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .args(["--edition", "2024", name])
        .args(options)
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
}

/// The lines that the program prints for each domain.
fn asked(folder: &Path, domains: &[&str], choose: impl FnOnce(u32) -> FrameRuns) -> Vec<String> {
    let filter = SaveFilter::new().unwrap();
    let mut command = Command::new(folder.join("program"));
    command
        .args(domains)
        .env("LD_LIBRARY_PATH", folder)
        .stdout(Stdio::piped());
    filter.attach(&mut command);
    let mut child = command.spawn().unwrap();
    // Read while it runs: a pipe holds less than it says.
    let out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(|| std::io::read_to_string(out).unwrap());
    let status = filter.serve(&mut child, |domain| choose(domain.raw()));
    assert!(status.unwrap().success());
    reader.join().unwrap().lines().map(str::to_owned).collect()
}

fn expected(domain: u32, dropped: impl Fn(u64) -> bool) -> String {
    let kinds = (5000..8000_u64).filter_map(|frame| match frame {
        frame if frame % 7 == 0 => Some(format!("{frame}:1")),
        frame if dropped(frame) => Some(format!("{frame}:e")),
        _ => None,
    });
    format!("{domain} 0 {}", kinds.collect::<Vec<_>>().join(" "))
}

#[test]
fn only_ordinary_frames_that_were_chosen_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    build(folder, "standin.rs", LIBRARY, &["--crate-type", "cdylib"]);
    build(folder, "program.rs", PROGRAM, &["-L."]);

    // Runs before, inside, across batches, and at the end; of the first domain alone.
    let runs = [1..21, 5000..5001, 5500..6400, 7999..8049];
    let lines = asked(folder, &["3", "3", "4"], |domain| {
        assert_eq!(domain, 3);
        runs.iter().cloned().collect()
    });
    let inside = |frame| runs.iter().any(|run| run.contains(&frame));
    let none = |_| false;
    assert_eq!(
        lines,
        [expected(3, inside), expected(3, inside), expected(4, none)]
    );

    // Nothing to leave out.
    let lines = asked(folder, &["3"], |_| FrameRuns::default());
    assert_eq!(lines, [expected(3, none)]);

    // What libxc's own function says goes through.
    let lines = asked(folder, &["9"], |_| std::iter::once(0..1 << 40).collect());
    assert!(lines[0].starts_with("9 -1 "), "{lines:?}");
}

#[test]
fn memory_is_asked_for_by_two_mebibytes_where_it_can_be() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    build(folder, "standin.rs", LIBRARY, &["--crate-type", "cdylib"]);
    build(folder, "program.rs", POPULATES, &["-L."]);
    let lines = asked(folder, &[], |_| FrameRuns::default());
    assert_eq!(
        lines,
        [
            "1 of order 9 at 1024, flags 5",
            "1 of order 9 at 1536, flags 5",
            "0 true",
            "1 of order 9 at 0, flags 5",
            "exactly 511 of order 0 at 512, flags 5",
            "0 true",
            "exactly 512 of order 0 at 1535, flags 5",
            "0 true",
            "exactly 36 of order 0 at 1500, flags 5",
            "1 of order 9 at 1536, flags 5",
            "exactly 52 of order 0 at 2048, flags 5",
            "0 true",
            "1 of order 9 at 4096, flags 5",
            "exactly 512 of order 0 at 4096, flags 5",
            "exactly 92 of order 0 at 4608, flags 5",
            "0 true",
            "0 true",
            "exactly 1 of order 4 at 64, flags 5",
            "0 true",
            "-1 false",
        ]
    );
}
