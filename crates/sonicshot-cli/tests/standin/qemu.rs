//! Stands in for a QEMU that is started to run a guest on: answers its monitor by a file of answers,
//! and takes the guest that it is sent.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[repr(C)]
struct Part {
    at: *mut u8,
    len: usize,
}

/// `struct msghdr`.
#[repr(C)]
struct Message {
    name: *mut u8,
    name_len: u32,
    parts: *mut Part,
    count: usize,
    control: *mut u8,
    control_len: usize,
    flags: i32,
}

/// `struct cmsghdr`, with room for a descriptor.
#[repr(C)]
#[derive(Default)]
struct Control {
    len: usize,
    level: i32,
    kind: i32,
    fd: i32,
    padding: i32,
}

unsafe extern "C" {
    fn recvmsg(socket: i32, message: *mut Message, flags: i32) -> isize;
}

/// What comes next, and a descriptor if one comes with it.
fn receive(socket: &UnixStream, into: &mut Vec<u8>) -> Option<Option<File>> {
    let mut bytes = [0; 4096];
    let mut control = Control::default();
    let mut part = Part {
        at: bytes.as_mut_ptr(),
        len: bytes.len(),
    };
    let mut message = Message {
        name: std::ptr::null_mut(),
        name_len: 0,
        parts: &mut part,
        count: 1,
        control: std::ptr::from_mut(&mut control).cast(),
        control_len: size_of::<Control>(),
        flags: 0,
    };
    let got = unsafe { recvmsg(socket.as_raw_fd(), &mut message, 0) };
    let got = usize::try_from(got).ok().filter(|got| *got > 0)?;
    into.extend_from_slice(&bytes[..got]);
    let has_fd = message.control_len > 0 && control.kind == 1;
    Some(has_fd.then(|| unsafe { File::from_raw_fd(control.fd) }))
}

/// The string or number behind `key`.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = line.rsplit_once(&format!("\"{key}\":"))?;
    let rest = rest.trim_start_matches('"');
    rest.split(['"', ',', '}']).next()
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if words.iter().any(|word| word == "--version") {
        println!("QEMU emulator version 10.0.2");
        return;
    }
    let fd = words.iter().find_map(|word| word.split_once(",fd=")).unwrap().1;
    let mut socket = unsafe { UnixStream::from_raw_fd(fd.parse().unwrap()) };
    let answers = std::fs::read_to_string(std::env::var("STANDIN_ANSWERS").unwrap()).unwrap();
    let answers: HashMap<&str, &str> = answers.lines().filter_map(|l| l.split_once('\t')).collect();
    let version = "{\"qemu\":{\"major\":10,\"minor\":0,\"micro\":2}}";
    writeln!(socket, "{{\"QMP\":{{\"version\":{version}}}}}").unwrap();
    // What was sent of the guest, in bytes, once all of it was.
    let taken = Arc::new(AtomicUsize::new(0));
    let (mut rest, mut file) = (Vec::new(), None);
    while let Some(fd) = receive(&socket, &mut rest) {
        file = fd.or(file);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let line = String::from_utf8(line).unwrap();
            let command = field(&line, "command-line").or(field(&line, "execute")).unwrap();
            let answer = match command {
                "migrate-incoming" => {
                    let (mut from, taken) = (file.take().unwrap(), Arc::clone(&taken));
                    std::thread::spawn(move || {
                        let mut all = Vec::new();
                        from.read_to_end(&mut all).unwrap();
                        assert!(all.starts_with(b"QEVM"));
                        taken.store(all.len(), Ordering::Release);
                    });
                    "{}"
                }
                "query-migrate" if taken.load(Ordering::Acquire) > 0 => "{\"status\":\"completed\"}",
                "query-migrate" => "{\"status\":\"active\"}",
                // What is not asked for it grants.
                "migrate-set-capabilities" if line.contains("\"state\":true") => {
                    "{\"class\":\"GenericError\",\"desc\":\"no postcopy here\"}"
                }
                command => answers.get(command).copied().unwrap_or("{}"),
            };
            let id = field(&line, "id").unwrap();
            // One that has a class is a refusal.
            let key = if answer.starts_with("{\"class\"") { "error" } else { "return" };
            writeln!(socket, "{{\"{key}\":{answer},\"id\":{id}}}").unwrap();
        }
    }
    // Nobody speaks to it any more: its guest has shut down.
}
