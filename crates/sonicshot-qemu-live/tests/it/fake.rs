//! The monitor of a QEMU that is none.

use rustix::fd::OwnedFd;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};
use sonicshot::{Gpa, GuestBytes, MappedRegions};
use sonicshot_vmi::{GuestOptions, LinuxGuest};
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

/// The state of the devices, as QEMU writes it.
pub(crate) const DEVICES: &[u8] = b"QEVM\0\0\0\x03\x04the state of devices\0";
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The repository's guest.
pub(crate) fn ram() -> &'static [u8] {
    static RAM: OnceLock<Vec<u8>> = OnceLock::new();
    RAM.get_or_init(|| {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/guest-6.1-128m/ram.raw.zst");
        let mut reader = zstd::stream::read::Decoder::new(File::open(path).unwrap()).unwrap();
        reader.window_log_max(31).unwrap();
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// The firmware's block: a page of it is not zero.
pub(crate) fn bios() -> &'static [u8] {
    static BIOS: OnceLock<Vec<u8>> = OnceLock::new();
    BIOS.get_or_init(|| {
        let mut bytes = vec![0; 4 * 4096];
        bytes[2 * 4096..3 * 4096].fill(0xb1);
        bytes
    })
}

pub(crate) fn memory() -> MappedRegions<'static> {
    MappedRegions::new(vec![(Gpa::ZERO, GuestBytes::from_slice(ram()))]).unwrap()
}

/// The address of the guest's top-level page table.
pub(crate) fn root() -> u64 {
    static ROOT: OnceLock<u64> = OnceLock::new();
    *ROOT.get_or_init(|| {
        let memory = memory();
        let guest = LinuxGuest::open(&memory, &GuestOptions::new()).unwrap();
        let text = guest.vmcoreinfo().unwrap();
        let value = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_once('=').unwrap().1
        };
        let at = u64::from_str_radix(value("SYMBOL(swapper_pg_dir)"), 16).unwrap();
        let base: i64 = value("NUMBER(phys_base)").parse().unwrap();
        (at - START_KERNEL_MAP).wrapping_add(base.cast_unsigned())
    })
}

pub(crate) fn blocks() -> String {
    let line = |name: &str, bytes: &[u8]| {
        let (len, at) = (bytes.len(), bytes.as_ptr().addr());
        format!("{name} 4 KiB 0x0 {len:#x} {len:#x} {at:#x} rw\n")
    };
    format!(
        "Block Name PSize Offset Used Total HVA RO\n{}{}",
        line("pc.ram", ram()),
        line("pc.bios", bios())
    )
}

pub(crate) fn registers(cr3: u64) -> String {
    format!(
        "CPU#0\nRIP=0 RFL=00000246 [-] CPL=0 II=0 A20=1 SMM=0 HLT=1\n\
         CR0=80050033 CR2=0 CR3={cr3:x} CR4=000006f0\nEFER=0000000000000d01\n"
    )
}

/// The monitor's answer to a command.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Return(Value),
    Error(&'static str),
    /// The usual answer, but the guest is reset before.
    Reset,
    /// None, ever.
    Nothing,
    /// It closes its end.
    Close,
}

/// A change of the usual: a command, or a line for people; which time it comes, from 1; and what is
/// done then.
pub(crate) type Change = (&'static str, u32, Answer);

/// A monitor, until it is closed.
pub(crate) struct Fake {
    pub folder: tempfile::TempDir,
    heard: Arc<Mutex<Vec<String>>>,
    thread: JoinHandle<()>,
}

impl Fake {
    pub(crate) fn start(changes: Vec<Change>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hearing = Arc::clone(&heard);
        let thread = std::thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let mut monitor = Monitor {
                socket,
                changes,
                heard: hearing,
                fd: None,
                running: true,
            };
            monitor.serve();
        });
        Self {
            folder,
            heard,
            thread,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.folder.path().join("x.sonic")
    }

    /// All commands that it was given, once its client is gone.
    pub(crate) fn heard(self) -> Vec<String> {
        self.thread.join().unwrap();
        self.heard.lock().unwrap().clone()
    }
}

struct Monitor {
    socket: UnixStream,
    changes: Vec<Change>,
    heard: Arc<Mutex<Vec<String>>>,
    fd: Option<OwnedFd>,
    running: bool,
}

impl Monitor {
    fn serve(&mut self) {
        let greeting = json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}}});
        if writeln!(self.socket, "{greeting}").is_err() {
            return;
        }
        let mut rest = Vec::new();
        loop {
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if !self.answer(&serde_json::from_slice(&line).unwrap()) {
                    return;
                }
            }
            if !self.receive(&mut rest) {
                return;
            }
        }
    }

    fn receive(&mut self, into: &mut Vec<u8>) -> bool {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = recvmsg(
            &self.socket,
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let Ok(got) = got else { return false };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                self.fd = fds.next();
            }
        }
        into.extend_from_slice(&bytes[..got.bytes]);
        got.bytes > 0
    }

    fn answer(&mut self, message: &Value) -> bool {
        let mut name = message["execute"].as_str().unwrap();
        if name == "human-monitor-command" {
            name = message["arguments"]["command-line"].as_str().unwrap();
        }
        self.heard.lock().unwrap().push(name.to_owned());
        let times = self
            .heard
            .lock()
            .unwrap()
            .iter()
            .filter(|heard| *heard == name)
            .count();
        let change = self
            .changes
            .iter()
            .find(|(changed, time, _)| *changed == name && usize::try_from(*time) == Ok(times));
        let answer = match change {
            Some((_, _, Answer::Reset)) => {
                self.event("RESET", 7);
                Answer::Return(self.usual(name))
            }
            Some((_, _, answer)) => answer.clone(),
            None => Answer::Return(self.usual(name)),
        };
        let id = &message["id"];
        let line = match answer {
            Answer::Return(value) => json!({"return": value, "id": id}),
            Answer::Error(desc) => {
                json!({"error": {"class": "GenericError", "desc": desc}, "id": id})
            }
            Answer::Nothing | Answer::Reset => return true,
            Answer::Close => return false,
        };
        writeln!(self.socket, "{line}").is_ok()
    }

    fn event(&mut self, name: &str, seconds: u64) {
        let timestamp = json!({"seconds": seconds, "microseconds": 250_000});
        let event = json!({"event": name, "timestamp": timestamp});
        writeln!(self.socket, "{event}").unwrap();
    }

    fn usual(&mut self, name: &str) -> Value {
        match name {
            "query-status" => {
                json!({"status": if self.running { "running" } else { "paused" }})
            }
            "stop" => {
                self.running = false;
                self.event("STOP", 7);
                json!({})
            }
            "cont" => {
                self.running = true;
                self.event("RESUME", 8);
                json!({})
            }
            "query-memdev" => json!([{"id": "pc.ram", "size": ram().len()}]),
            "query-memory-devices" => json!([]),
            "qom-get" => {
                // First whether it is encrypted, then what machine it is.
                let asked = self.heard.lock().unwrap();
                let first = asked.iter().filter(|heard| *heard == "qom-get").count() == 1;
                json!(if first { "" } else { "pc-i440fx-10.0-machine" })
            }
            "add-fd" => json!({"fdset-id": 3, "fd": 9}),
            "xen-save-devices-state" => {
                let file = File::from(self.fd.as_ref().unwrap().try_clone().unwrap());
                (&file).write_all(DEVICES).unwrap();
                json!({})
            }
            "info ramblock" => json!(blocks()),
            "info mtree -f" => {
                let last = ram().len() - 1;
                json!(format!(
                    "FlatView #0\n AS \"memory\", root: system\n  0-9ffff (prio 0, ram): pc.ram\n  \
                     e0000-fffff (prio 1, rom): pc.bios\n  100000-{last:x} (prio 0, ram): pc.ram \
                     @100000\n"
                ))
            }
            "info registers -a" => json!(registers(root())),
            "info qtree" => json!("bus: main-system-bus\n  dev: hpet, id \"\"\n"),
            name if name.starts_with("gpa2hva ") => {
                let at = ram().as_ptr().addr();
                json!(format!(
                    "Host virtual address for 0x0 (pc.ram) is {at:#x}\n"
                ))
            }
            _ => json!({}),
        }
    }
}
