//! Runs the command under `ptrace(2)`, lets one of its system calls fail or fall short, or stops
//! it there.
//!
//! Not a preloaded library: rustix makes its system calls without the C library. Calls are counted
//! from the `poll` on that Rust's runtime begins with, so that the loader's are not among them.
//! A filter (`seccomp(2)`) stops the process at the calls alone that may be the one: a stop takes
//! many times as long as a read, and a prune makes 200,000 of those.
#![allow(unsafe_code, reason = "ptrace(2) by way of the C library")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsString, c_void};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::mem::{MaybeUninit, size_of};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::ptr::null_mut;
use std::time::{Duration, Instant};
use std::{fmt, io};

/// A kind of system call, by what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Opens what is there.
    Open,
    /// Makes a file without a name.
    Nameless,
    /// Makes a file with a name.
    Create,
    Read,
    ReadAt,
    Write,
    WriteAt,
    /// Writes to standard output, and to standard error.
    Say,
    Complain,
    Seek,
    Stat,
    Map,
    List,
    Truncate,
    /// `fallocate`: punches a hole.
    Punch,
    CopyRange,
    /// Lets a range be shared with another file.
    Clone,
    Sync,
    Owner,
    Mode,
    Folder,
    Link,
    Rename,
    Unlink,
    Lease,
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// `FICLONE` and `FICLONERANGE` (`include/uapi/linux/fs.h`).
const FICLONE: [u64; 2] = [0x4004_9409, 0x4020_940d];

impl Kind {
    fn of(number: i64, args: [u64; 6]) -> Self {
        let opening = |flags: u64| {
            let has =
                |flag: i32| flags & u64::try_from(flag).unwrap() == u64::try_from(flag).unwrap();
            if has(libc::O_TMPFILE) {
                Self::Nameless
            } else if has(libc::O_CREAT) {
                Self::Create
            } else {
                Self::Open
            }
        };
        match number {
            libc::SYS_open => opening(args[1]),
            libc::SYS_openat => opening(args[2]),
            libc::SYS_read | libc::SYS_readv => Self::Read,
            libc::SYS_pread64 | libc::SYS_preadv => Self::ReadAt,
            libc::SYS_write | libc::SYS_writev => match args[0] {
                1 => Self::Say,
                2 => Self::Complain,
                _ => Self::Write,
            },
            libc::SYS_pwrite64 | libc::SYS_pwritev => Self::WriteAt,
            libc::SYS_lseek => Self::Seek,
            libc::SYS_stat
            | libc::SYS_fstat
            | libc::SYS_lstat
            | libc::SYS_newfstatat
            | libc::SYS_statx
            | libc::SYS_fstatfs => Self::Stat,
            // Of a file.
            libc::SYS_mmap if args[4] < 1 << 31 => Self::Map,
            libc::SYS_getdents64 => Self::List,
            libc::SYS_ftruncate | libc::SYS_truncate => Self::Truncate,
            libc::SYS_fallocate => Self::Punch,
            libc::SYS_copy_file_range => Self::CopyRange,
            libc::SYS_ioctl if FICLONE.contains(&args[1]) => Self::Clone,
            libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_sync_file_range => Self::Sync,
            libc::SYS_fchown | libc::SYS_fchownat => Self::Owner,
            libc::SYS_fchmod | libc::SYS_fchmodat => Self::Mode,
            libc::SYS_mkdir | libc::SYS_mkdirat | libc::SYS_rmdir => Self::Folder,
            libc::SYS_link | libc::SYS_linkat => Self::Link,
            libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => Self::Rename,
            libc::SYS_unlink | libc::SYS_unlinkat => Self::Unlink,
            libc::SYS_fcntl if [1024, 1025].contains(&args[1]) => Self::Lease,
            _ => Self::Other,
        }
    }

    /// The calls that may be of it.
    fn numbers(self) -> &'static [i64] {
        match self {
            Self::Open | Self::Nameless | Self::Create => &[libc::SYS_open, libc::SYS_openat],
            Self::Read => &[libc::SYS_read, libc::SYS_readv],
            Self::ReadAt => &[libc::SYS_pread64, libc::SYS_preadv],
            Self::Write | Self::Say | Self::Complain => &[libc::SYS_write, libc::SYS_writev],
            Self::WriteAt => &[libc::SYS_pwrite64, libc::SYS_pwritev],
            Self::Seek => &[libc::SYS_lseek],
            Self::Stat => &[
                libc::SYS_stat,
                libc::SYS_fstat,
                libc::SYS_lstat,
                libc::SYS_newfstatat,
                libc::SYS_statx,
                libc::SYS_fstatfs,
            ],
            Self::Map => &[libc::SYS_mmap],
            Self::List => &[libc::SYS_getdents64],
            Self::Truncate => &[libc::SYS_ftruncate, libc::SYS_truncate],
            Self::Punch => &[libc::SYS_fallocate],
            Self::CopyRange => &[libc::SYS_copy_file_range],
            Self::Clone => &[libc::SYS_ioctl],
            Self::Sync => &[
                libc::SYS_fsync,
                libc::SYS_fdatasync,
                libc::SYS_sync_file_range,
            ],
            Self::Owner => &[libc::SYS_fchown, libc::SYS_fchownat],
            Self::Mode => &[libc::SYS_fchmod, libc::SYS_fchmodat],
            Self::Folder => &[libc::SYS_mkdir, libc::SYS_mkdirat, libc::SYS_rmdir],
            Self::Link => &[libc::SYS_link, libc::SYS_linkat],
            Self::Rename => &[libc::SYS_rename, libc::SYS_renameat, libc::SYS_renameat2],
            Self::Unlink => &[libc::SYS_unlink, libc::SYS_unlinkat],
            Self::Lease => &[libc::SYS_fcntl],
            Self::Other => &[],
        }
    }

    const ALL: [Self; 25] = [
        Self::Open,
        Self::Nameless,
        Self::Create,
        Self::Read,
        Self::ReadAt,
        Self::Write,
        Self::WriteAt,
        Self::Say,
        Self::Complain,
        Self::Seek,
        Self::Stat,
        Self::Map,
        Self::List,
        Self::Truncate,
        Self::Punch,
        Self::CopyRange,
        Self::Clone,
        Self::Sync,
        Self::Owner,
        Self::Mode,
        Self::Folder,
        Self::Link,
        Self::Rename,
        Self::Unlink,
        Self::Lease,
    ];

    /// The offset in the file, of a call that has one.
    fn place(self, args: [u64; 6]) -> Option<u64> {
        matches!(self, Self::ReadAt | Self::WriteAt).then_some(args[3])
    }

    /// The argument that has the number of bytes; `None` where a call is not short.
    fn length(number: i64) -> Option<usize> {
        match number {
            libc::SYS_read | libc::SYS_write | libc::SYS_pread64 | libc::SYS_pwrite64 => Some(2),
            libc::SYS_copy_file_range => Some(4),
            _ => None,
        }
    }
}

/// An act on a call.
pub enum Act<'a> {
    /// It gives this error, and does nothing.
    Fail(i32),
    /// So does every later one of its kind.
    FailFromHere(i32),
    /// It gets or puts about half of what it should.
    Short,
    /// The process is killed before it.
    Kill,
    /// Something else happens before it.
    Do(&'a dyn Fn()),
}

/// One call: of those of this kind, at this place if there is one, the one of this number, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    pub kind: Kind,
    place: Option<u64>,
    number: u64,
}

impl At {
    fn is_at(self, kind: Kind, args: [u64; 6]) -> bool {
        let elsewhere = || self.place.is_some() && self.place != kind.place(args);
        self.kind == kind && !elsewhere()
    }

    /// The same, told by its number alone: so that what comes behind it is counted too.
    fn of_all(mut self, before: u64) -> Self {
        self.place = None;
        self.number = before;
        self
    }
}

/// The filter by which the kernel stops the process (`Documentation/userspace-api/seccomp_filter.rst`).
fn filter(numbers: &[i64], place: Option<u64>) -> Vec<libc::sock_filter> {
    const LOAD: u16 = 0x20;
    const JUMP_IF: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const RUNTIME_BEGINS: i64 = libc::SYS_poll;
    /// In `struct seccomp_data`: the halves of the fourth argument.
    const PLACE: [u32; 2] = [40, 44];
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut out = vec![step(LOAD, 0, 0, 0)];
    let trace = step(RETURN, 0, 0, libc::SECCOMP_RET_TRACE);
    let number = |number: i64| u32::try_from(number).unwrap();
    out.extend([step(JUMP_IF, 0, 1, number(RUNTIME_BEGINS)), trace]);
    for wanted in numbers {
        match place {
            None => out.extend([step(JUMP_IF, 0, 1, number(*wanted)), trace]),
            Some(place) => out.extend([
                step(JUMP_IF, 0, 6, number(*wanted)),
                step(LOAD, 0, 0, PLACE[0]),
                step(JUMP_IF, 0, 3, u32::try_from(place & 0xffff_ffff).unwrap()),
                step(LOAD, 0, 0, PLACE[1]),
                step(JUMP_IF, 0, 1, u32::try_from(place >> 32).unwrap()),
                trace,
                step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
            ]),
        }
    }
    out.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    out
}

/// A command line and its surroundings.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    pub args: Vec<OsString>,
    pub stdin: Option<PathBuf>,
    pub folder: PathBuf,
    pub env: Vec<(&'static str, OsString)>,
    /// The most memory that the process may have of its own, in bytes (`RLIMIT_DATA`).
    pub memory: Option<u64>,
    /// The longest file that it may write (`RLIMIT_FSIZE`): a write behind that is a signal.
    pub longest: Option<u64>,
    /// The time after which it is ended by force.
    pub patience: Option<Duration>,
    /// The file system knows no files without a name.
    pub names_only: bool,
}

/// The outcome for it.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// The calls that were made, and where in the file, if nothing was done to any.
    pub calls: Vec<(Kind, Option<u64>)>,
    /// The kind of the call that was acted on, if it came to that.
    pub hit: Option<Kind>,
    /// The most that was resident, in bytes.
    pub peak: u64,
    pub took: Duration,
    pub timed_out: bool,
}

/// The command: this build's, or another.
pub fn binary() -> OsString {
    let other = std::env::var_os("SONICSHOT_FAULT_BINARY");
    other.unwrap_or_else(|| env!("CARGO_BIN_EXE_sonicshot").into())
}

impl Spec {
    fn command(&self, stops: Option<Vec<libc::sock_filter>>) -> (Command, File, File) {
        let (stdout, stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut command = Command::new(binary());
        let stdin = self.stdin.as_ref().map(|path| File::open(path).unwrap());
        command
            .args(&self.args)
            .current_dir(&self.folder)
            .env_remove("TMPDIR")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(stdout.try_clone().unwrap())
            .stderr(stderr.try_clone().unwrap());
        let limits = [
            (libc::RLIMIT_DATA, self.memory),
            (libc::RLIMIT_FSIZE, self.longest),
            (libc::RLIMIT_CORE, Some(0)),
        ];
        let before = move || {
            for (what, limit) in limits {
                let Some(limit) = limit else { continue };
                let limit = libc::rlimit {
                    rlim_cur: limit,
                    rlim_max: limit,
                };
                // SAFETY: the structure is valid for the call.
                check(unsafe { libc::setrlimit(what, &raw const limit) }.into())?;
            }
            if let Some(stops) = &stops {
                let nothing = null_mut::<c_void>();
                // SAFETY: PTRACE_TRACEME takes no pointers.
                check(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, nothing, nothing) })?;
                let program = libc::sock_fprog {
                    len: u16::try_from(stops.len()).unwrap(),
                    filter: stops.as_ptr().cast_mut(),
                };
                // SAFETY: numbers alone.
                check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
                let (set, mode) = (libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER);
                // SAFETY: the program and its steps are valid for the call, and only read.
                check(unsafe { libc::prctl(set, mode, &raw const program) }.into())?;
            }
            Ok(())
        };
        // SAFETY: only system calls, and nothing is allocated but in an error.
        unsafe { command.pre_exec(before) };
        (command, stdout, stderr)
    }

    /// Runs it without a tracer.
    pub fn run(&self) -> Run {
        let (mut command, stdout, stderr) = self.command(None);
        let start = Instant::now();
        let pid = i32::try_from(command.spawn().unwrap().id()).unwrap();
        let mut timed_out = false;
        let mut status = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        loop {
            let flags = if self.patience.is_some() && !timed_out {
                libc::WNOHANG
            } else {
                0
            };
            // SAFETY: both are valid for the call.
            let waited = unsafe { libc::wait4(pid, &raw mut status, flags, usage.as_mut_ptr()) };
            if waited == pid {
                break;
            }
            assert_eq!(waited, 0);
            if self
                .patience
                .is_some_and(|patience| start.elapsed() > patience)
            {
                timed_out = true;
                // SAFETY: no pointers; it has not been waited for, so the number is still its own.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // SAFETY: all zeroes is a valid value, and the kernel has filled it in.
        let usage = unsafe { usage.assume_init() };
        let mut run = Run::of(status, stdout, stderr);
        run.peak = u64::try_from(usage.ru_maxrss).unwrap() * 1024;
        run.took = start.elapsed();
        run.timed_out = timed_out;
        run
    }

    /// Runs it, and does `act` to the call `at`.
    pub fn traced(&self, act: Option<(At, Act<'_>)>) -> Run {
        let mut kinds = match &act {
            Some((at, _)) => vec![at.kind],
            None => Kind::ALL.to_vec(),
        };
        if self.names_only {
            kinds.push(Kind::Nameless);
        }
        let numbers = kinds.iter().flat_map(|kind| kind.numbers().to_vec());
        let numbers: BTreeSet<_> = numbers.collect();
        let place = act.as_ref().and_then(|(at, _)| at.place);
        // A file without a name is made wherever that is.
        let place = place.filter(|_| !self.names_only);
        let numbers: Vec<_> = numbers.into_iter().collect();
        let (mut command, stdout, stderr) = self.command(Some(filter(&numbers, place)));
        let pid = i32::try_from(command.spawn().unwrap().id()).unwrap();
        let mut tracer = Tracer {
            pid,
            act,
            names_only: self.names_only,
            begun: false,
            count: 0,
            calls: Vec::new(),
            hit: None,
        };
        let status = tracer.follow();
        let mut run = Run::of(status, stdout, stderr);
        run.calls = tracer.calls;
        run.hit = tracer.hit;
        run
    }
}

impl Run {
    /// The number of calls of each kind.
    pub fn counts(&self) -> BTreeMap<Kind, u64> {
        let mut counts = BTreeMap::new();
        for (kind, _) in &self.calls {
            *counts.entry(*kind).or_default() += 1;
        }
        counts
    }

    /// The call of this number, of its kind or of all; and those behind it too.
    pub fn at(&self, kind: Option<Kind>, number: u64, lasting: bool) -> At {
        let calls = self.calls.iter().enumerate();
        let mut calls = calls.filter(|(_, (of, _))| kind.is_none_or(|kind| *of == kind));
        let (index, (kind, place)) = calls.nth(usize::try_from(number).unwrap()).unwrap();
        let before = self.calls[..index].iter();
        let same = before.clone().filter(|call| **call == (*kind, *place));
        let at = At {
            kind: *kind,
            place: *place,
            number: same.count() as u64,
        };
        if lasting {
            return at.of_all(before.filter(|call| call.0 == *kind).count() as u64);
        }
        at
    }

    fn of(status: i32, stdout: File, stderr: File) -> Self {
        let read = |mut file: File| {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        Self {
            code: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
            signal: libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
            stdout: read(stdout),
            stderr: String::from_utf8_lossy(&read(stderr)).into_owned(),
            calls: Vec::new(),
            hit: None,
            peak: 0,
            took: Duration::ZERO,
            timed_out: false,
        }
    }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

struct Tracer<'a> {
    pid: i32,
    act: Option<(At, Act<'a>)>,
    names_only: bool,
    begun: bool,
    /// The number of those that came and may be the one.
    count: u64,
    calls: Vec<(Kind, Option<u64>)>,
    hit: Option<Kind>,
}

/// `struct ptrace_syscall_info` (`include/uapi/linux/ptrace.h`), of an entry.
#[repr(C)]
struct SyscallInfo {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    at: [u64; 2],
    number: u64,
    args: [u64; 6],
    more: [u64; 2],
}

const PTRACE_GET_SYSCALL_INFO: u32 = 0x420e;
/// Of its `op`: stopped by a filter.
const SECCOMP: u8 = 3;

impl Tracer<'_> {
    /// Until the process ends; gives how.
    fn follow(&mut self) -> i32 {
        let (tid, status) = Self::wait(self.pid).unwrap();
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
        let options =
            libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESECCOMP | libc::PTRACE_O_TRACECLONE;
        // SAFETY: the options are a number.
        check(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options) }).unwrap();
        self.go_on(tid, 0);
        loop {
            // The children and tracees of this thread alone: other tests have theirs.
            let (tid, status) = Self::wait(-1).unwrap();
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                if tid == self.pid {
                    return status;
                }
                continue;
            }
            let signal = libc::WSTOPSIG(status);
            let at_call = libc::SIGTRAP | libc::PTRACE_EVENT_SECCOMP << 8;
            let deliver = match signal {
                _ if status >> 8 == at_call => {
                    self.at_call(tid);
                    0
                }
                // A new thread, and the stop that it begins with.
                libc::SIGTRAP | libc::SIGSTOP => 0,
                other => other,
            };
            self.go_on(tid, deliver);
        }
    }

    fn wait(pid: i32) -> io::Result<(i32, i32)> {
        let mut status = 0;
        // SAFETY: the status is valid for the call.
        let waited =
            unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        Ok((i32::try_from(check(waited.into())?).unwrap(), status))
    }

    fn go_on(&self, tid: i32, signal: i32) {
        // SAFETY: the signal is a number. A thread that was killed meanwhile is no failure.
        let _ = unsafe { libc::ptrace(libc::PTRACE_CONT, tid, 0, signal) };
    }

    fn at_call(&mut self, tid: i32) {
        let mut info = MaybeUninit::<SyscallInfo>::zeroed();
        let size = size_of::<SyscallInfo>();
        // SAFETY: so many bytes are there to be written.
        let got = unsafe { libc::ptrace(PTRACE_GET_SYSCALL_INFO, tid, size, info.as_mut_ptr()) };
        if got < 0 {
            // It was killed meanwhile.
            return;
        }
        // SAFETY: all zeroes is a valid value, and the kernel has filled it in.
        let info = unsafe { info.assume_init() };
        if info.op == SECCOMP {
            self.enter(tid, i64::try_from(info.number).unwrap_or(-1), info.args);
        }
    }

    fn fail(tid: i32, errno: i32) {
        change(tid, |regs| {
            // No call has this number: the kernel does nothing, and gives what is there.
            regs.orig_rax = u64::MAX;
            regs.rax = i64::from(-errno).cast_unsigned();
        });
    }

    fn enter(&mut self, tid: i32, number: i64, args: [u64; 6]) {
        if !self.begun {
            self.begun = number == libc::SYS_poll;
            return;
        }
        let kind = Kind::of(number, args);
        if self.names_only && kind == Kind::Nameless {
            Self::fail(tid, libc::EOPNOTSUPP);
            return;
        }
        let Some((at, act)) = &self.act else {
            if kind != Kind::Other {
                self.calls.push((kind, kind.place(args)));
            }
            return;
        };
        if !at.is_at(kind, args) {
            return;
        }
        let index = self.count;
        self.count += 1;
        let lasting = matches!(act, Act::FailFromHere(_)) && index > at.number;
        if index != at.number && !lasting {
            return;
        }
        self.hit = Some(kind);
        match act {
            Act::Fail(errno) | Act::FailFromHere(errno) => {
                Self::fail(tid, *errno);
            }
            Act::Short => match Kind::length(number) {
                Some(2) if args[2] > 1 => change(tid, |regs| regs.rdx = shorter(args[2])),
                Some(4) if args[4] > 1 => change(tid, |regs| regs.r8 = shorter(args[4])),
                _ => self.hit = None,
            },
            Act::Kill => {
                // SAFETY: no pointers.
                unsafe { libc::kill(self.pid, libc::SIGKILL) };
            }
            Act::Do(what) => what(),
        }
    }
}

/// No round number.
fn shorter(len: u64) -> u64 {
    (len / 2) | 1
}

fn change(tid: i32, edit: impl FnOnce(&mut libc::user_regs_struct)) {
    let mut regs = MaybeUninit::<libc::user_regs_struct>::zeroed();
    // SAFETY: the structure is the one that the request fills in.
    let got = unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, 0, regs.as_mut_ptr()) };
    if got < 0 {
        return;
    }
    // SAFETY: all zeroes is a valid value, and the kernel has filled it in.
    let mut regs = unsafe { regs.assume_init() };
    edit(&mut regs);
    // SAFETY: as above, to be read.
    let _ = unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, 0, &raw const regs) };
}
