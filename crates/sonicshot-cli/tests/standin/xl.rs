//! Stands in for `xl`: saves the one domain as libxc would, asking for the types of frames, and
//! notes what it is asked to do.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::process::ExitCode;

unsafe extern "C" {
    fn xc_get_pfn_type_batch(xch: *mut c_void, domain: u32, count: u32, frames: *mut u64) -> i32;
}

fn record(out: &mut impl Write, kind: u32, body: &[u8]) -> std::io::Result<()> {
    out.write_all(&kind.to_le_bytes())?;
    out.write_all(&u32::try_from(body.len()).unwrap().to_le_bytes())?;
    out.write_all(body)?;
    out.write_all(&vec![0; body.len().next_multiple_of(8) - body.len()])
}

fn save(to: &str) -> std::io::Result<()> {
    let mut out = File::create(to)?;
    out.write_all(b"Xen saved domain, xl format\n \0 \r")?;
    out.write_all(&[4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0])?;
    out.write_all(b"{json:}LibxlFmt\0\0\0\x02\0\0\0\0")?;
    record(&mut out, 1, &[])?;
    out.write_all(&[0xff; 8])?;
    out.write_all(b"XENF\0\0\0\x03\0\0\0\0\0\0\0\0")?;
    out.write_all(&[2, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0])?;
    record(&mut out, 0x10, &[])?;
    let ram = std::fs::read(std::env::var("STANDIN_RAM").unwrap())?;
    for (number, pages) in ram.chunks(1024 * 4096).enumerate() {
        let first = number as u64 * 1024;
        let mut types: Vec<u64> = (first..first + pages.len() as u64 / 4096).collect();
        let count = types.len() as u32;
        let asked = unsafe {
            xc_get_pfn_type_batch(std::ptr::null_mut(), 5, count, types.as_mut_ptr())
        };
        assert_eq!(asked, 0);
        if number == 16 && std::env::var_os("STANDIN_FAILS").is_some() {
            return Err(std::io::Error::other("the disk is full"));
        }
        let mut body = [count.to_le_bytes(), [0; 4]].concat();
        for (pfn, kind) in (first..).zip(&types) {
            body.extend((pfn | kind << 32).to_le_bytes());
        }
        for (kind, page) in types.iter().zip(pages.chunks(4096)) {
            if *kind == 0 {
                body.extend(page);
            }
        }
        record(&mut out, 1, &body)?;
    }
    if let Some(path) = std::env::var_os("STANDIN_REMOVES") {
        std::fs::remove_file(path)?;
    }
    record(&mut out, 9, b"HVM context")?;
    record(&mut out, 0, &[])?;
    record(&mut out, 0, &[])
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let log = std::env::var("STANDIN_LOG").unwrap();
    let mut log = OpenOptions::new().create(true).append(true).open(log).unwrap();
    // Names of pipes and nameless files differ from run to run.
    let told: Vec<_> = words.iter().filter(|word| !word.contains('/')).copied().collect();
    writeln!(log, "{}", told.join(" ")).unwrap();
    let done = match words[..] {
        ["domid", "guest"] => {
            println!("5");
            Ok(())
        }
        ["save", _, "5", to] => save(to),
        ["restore", .., from] => std::fs::read(from)
            .and_then(|image| std::fs::write(std::env::var("STANDIN_RESTORED").unwrap(), image)),
        ["destroy" | "unpause", "5"] => Ok(()),
        _ => Err(std::io::Error::other("no such domain")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xl: {error}");
            ExitCode::FAILURE
        }
    }
}
