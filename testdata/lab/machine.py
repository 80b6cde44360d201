"""A guest under QEMU: its disks, its console, and its monitor."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import firmware
from errors import GuestFailed, LabError
from file_systems import fill
from host import LAB, Json, pack, run
from kernels import Kernel
from roots import build_apps
from spec import GuestSpec

GUEST_SOURCE = Path(__file__).with_name("guest.c")
DISKS = ("files.img", "records.img")
# Of ext4: of a page, as a larger disk has them, and as a small one has them.
BLOCKS = {"ext4": "4096", "ext4-1k": "1024"}


def build_initramfs(kernel: Kernel, file_system: str = "ext4") -> Path:
    """The guest's program and its modules, as a cpio archive."""
    home = kernel.home
    names = (*kernel.modules, *kernel.beyond.get(file_system, ()))
    modules = hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
    archive = home / f"initramfs-{guest_program()}-{modules}"
    if archive.exists():
        return archive
    tree = Path(tempfile.mkdtemp(dir=home))
    for name in ("modules", "dev", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    run("gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", tree / "init", GUEST_SOURCE)
    run("strip", tree / "init")
    for name in names:
        shutil.copy(home / "modules" / f"{name}.ko", tree / "modules")
    (tree / "modules" / "order").write_text("".join(f"{n}.ko\n" for n in names))
    part = tree.with_suffix(".cpio")
    pack(tree, part)
    shutil.rmtree(tree)
    part.rename(archive)
    return archive


@contextmanager
def in_turn() -> Iterator[None]:
    """Labs that run beside each other make what they share one after the other."""
    LAB.mkdir(parents=True, exist_ok=True)
    with open(LAB / "making.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@in_turn()
def build_root() -> Path:
    """A file system with the guest's program as its init, for kernels that have all they need
    built in."""
    image = LAB / f"root-{guest_program()}.img"
    if image.exists():
        return image
    LAB.mkdir(parents=True, exist_ok=True)
    tree = Path(tempfile.mkdtemp(dir=LAB))
    for name in ("dev", "proc", "sys", "files", "shm", "modules"):
        (tree / name).mkdir()
    run("gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", tree / "init", GUEST_SOURCE)
    run("strip", tree / "init")
    part = image.with_suffix(".part")
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", tree, part, "8M")
    part.rename(image)
    shutil.rmtree(tree)
    return image


def microvm_devices() -> list[str]:
    """What a microvm has beside its memory: disks in the order of their names, and the console."""
    return ["-drive", f"if=none,id=d2,format=raw,readonly=on,file={build_root()}",
            *(word for disk in ("d0", "d1", "d2")
              for word in ("-device", f"virtio-blk-device,drive={disk}")),
            "-device", "virtio-serial-device", "-device", "virtconsole,chardev=c0"]


def guest_program() -> str:
    """What tells one version of the guest's program from another."""
    return hashlib.sha256(GUEST_SOURCE.read_bytes()).hexdigest()[:16]


@in_turn()
def build_files(mib: int, file_system: str = "ext4") -> Path:
    """An image with files to fill the page cache with."""
    image = LAB / f"files-{mib}.img"
    if file_system != "ext4":
        image = LAB / f"files-{mib}.{file_system}"
    if image.exists():
        return image
    tree = LAB / "files.d"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "src").mkdir(parents=True)
    total, number = 0, 0
    # Real text, cut to size: this project's toolchain or whatever documentation there is.
    sources = [p for base in ("/usr/share/doc", "/usr/share/perl", "/usr/lib/python3")
               for p in Path(base).rglob("*") if p.is_file() and not p.is_symlink()]
    sources.sort()
    while total < mib << 20:
        for path in sources or [GUEST_SOURCE]:
            data = path.read_bytes()[: 1 << 20]
            if not data:
                continue
            (tree / "src" / f"{number}").write_bytes(data)
            number += 1
            total += len(data)
            if total >= mib << 20:
                break
    image.parent.mkdir(parents=True, exist_ok=True)
    part = image.with_suffix(".part")
    if file_system in BLOCKS:
        run("mkfs.ext4", "-q", "-F", "-b", BLOCKS[file_system], "-O", "^has_journal", "-d", tree, part,
            f"{mib * 2 + 24}M")
    else:
        fill(file_system, tree, part, mib * 2 + 512)
    part.rename(image)
    shutil.rmtree(tree)
    return image


class Monitor:
    """QEMU's QMP socket."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        # What it has said unasked, and when: the host's clock, in seconds.
        self.events: list[tuple[str, float]] = []
        for _ in range(600):
            if process.poll() is not None:
                raise GuestFailed(f"QEMU ended at once: {process.args!r}")
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                time.sleep(0.05)
        else:
            raise GuestFailed("QEMU did not open its monitor")
        self.file = self.socket.makefile("rw")
        self.read()
        self.call("qmp_capabilities")

    def read(self) -> Json:
        line = self.file.readline()
        if not line:
            raise GuestFailed("QEMU closed its monitor")
        answer: Json = json.loads(line)
        if "event" in answer:
            at = answer["timestamp"]
            self.events.append((answer["event"], at["seconds"] + at["microseconds"] / 1e6))
        return answer

    def last(self, name: str, since: float) -> float | None:
        """When it last said this, if that is not longer ago."""
        return max((at for event, at in self.events if event == name and at >= since), default=None)

    def heard(self, name: str, since: float) -> float:
        """Waits until it says this, if it has not since; when it did."""
        self.socket.settimeout(60)
        try:
            while (at := self.last(name, since)) is None:
                self.read()
        except TimeoutError as error:
            raise GuestFailed(f"QEMU does not say {name}") from error
        self.socket.settimeout(None)
        return at

    def rest(self) -> None:
        """Hears what it had said when it was killed."""
        try:
            while True:
                self.read()
        except (GuestFailed, OSError, ValueError):
            return

    def call(self, command: str, **arguments: object) -> Any:
        """What the command returns; `_` in the arguments' names stands for `-`."""
        message: Json = {"execute": command}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()
        while True:
            answer = self.read()
            if "error" in answer:
                raise GuestFailed(f"QMP {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def capabilities(self, *names: str) -> None:
        self.call("migrate-set-capabilities",
                  capabilities=[{"capability": n, "state": True} for n in names])

    def no_capabilities(self, *names: str) -> None:
        self.call("migrate-set-capabilities",
                  capabilities=[{"capability": n, "state": False} for n in names])

    def human(self, line: str) -> str:
        """What QEMU's monitor for people says."""
        return str(self.call("human-monitor-command", command_line=line))

    def migrated(self) -> None:
        """Waits for the end of a migration."""
        for _ in range(24000):
            status = self.call("query-migrate").get("status")
            if status == "completed":
                return
            if status == "failed":
                raise GuestFailed(f"migration failed: {self.call('query-migrate')}")
            time.sleep(0.005)
        raise GuestFailed("migration did not end")


# What RAM may be made of, as the object's kind and what else it is told; `plain` is what QEMU takes
# if it is told nothing.
BACKINGS = {
    "": "memory-backend-ram",
    "memfd": "memory-backend-memfd,share=on",
    "file": "memory-backend-file,share=on,mem-path={folder}/ram-{name}",
    "private-file": "memory-backend-file,share=off,mem-path={folder}/ram-{name}",
    "huge": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
}


def backend(name: str, mib: int, kind: str = "", folder: Path = LAB) -> list[str]:
    words = BACKINGS[kind].format(folder=folder, name=name)
    return ["-object", f"{words},id={name},size={mib}M"]


def memory(spec: GuestSpec, ram: Path | None, incoming: bool, folder: Path = LAB) -> list[str]:
    """The guest's memory for QEMU's command line: one file (`ram`) or anonymous memory, or a
    block for each NUMA node; and what is plugged in, which on a restore is there from the start."""
    if ram and spec.several_blocks:
        raise LabError("a guest with several RAM blocks has no raw RAM file")
    size = f"{spec.mem}M"
    if spec.room:
        size += f",slots=4,maxmem={spec.mem + spec.room}M"
    if spec.numa:
        options = ["-machine", spec.machine, "-m", size]
        for node, mib in enumerate(spec.numa):
            last = spec.smp - 1 if node == len(spec.numa) - 1 else node
            options += backend(f"ram-node{node}", mib, spec.backing, folder)
            options += ["-numa", f"node,nodeid={node},memdev=ram-node{node},cpus={node}-{last}"]
    elif spec.backing == "plain":
        options = ["-machine", spec.machine, "-m", size]
    else:
        # With ACPI an initrd would be put over its tables, and there is none to be told of disks.
        # The clock chip, which under KVM is left out, tells a reset from none.
        machine = f"{spec.machine},acpi=off,rtc=on" if spec.machine == "microvm" else spec.machine
        options = ["-machine", f"{machine},memory-backend=ram0", "-m", size]
        options += ["-object", f"memory-backend-file,id=ram0,size={spec.mem}M,"
                    f"mem-path={ram},share=on"] if ram else \
            backend("ram0", spec.mem, spec.backing, folder)
    for number, mib in enumerate(spec.dimm if incoming else ()):
        options += backend(f"mem-dimm{number}", mib)
        options += ["-device", f"pc-dimm,id=dimm{number},memdev=mem-dimm{number}"]
    if spec.split:
        options += ["-machine", f"max-ram-below-4g={spec.split}M"]
    if spec.virtio_mem:
        options += backend("vmem0", spec.virtio_mem.size)
        device = f"virtio-mem-pci,id=vm0,memdev=vmem0,requested-size={spec.virtio_mem.plugged}M"
        if spec.kernel.series.startswith("5.10"):
            # Linux 5.16 is the first that may be told to keep off what is not plugged in.
            device += ",unplugged-inaccessible=off"
        options += ["-device", device]
    return options


def format_of(image: Path) -> str:
    """The format of an image that the lab has made."""
    with open(image, "rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


class Machine:
    """One QEMU process; `ram` names the file that is its memory, or None; `env` is added to its
    environment."""

    def __init__(self, spec: GuestSpec, ram: Path | None, folder: Path, incoming: bool = False,
                 env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.arrived = threading.Condition()
        # Not in the folder: the names of sockets must be short.
        self.sockets = Path(tempfile.mkdtemp(prefix="sonicshot-"))
        console, monitor = self.sockets / "console", self.sockets / "qmp"
        command = [
            *(spec.qemu or ("qemu-system-x86_64",)), "-accel", "tcg", "-nodefaults",
            "-no-user-config", "-display", "none", "-cpu", spec.cpu, "-smp", str(spec.smp),
            *memory(spec, ram, incoming, folder),
            "-kernel", spec.kernel.image, "-append", spec.cmdline,
            "-drive", f"if=none,id=d0,format={format_of(folder / 'files.img')},"
            f"file={folder / 'files.img'}",
            "-drive", f"if=none,id=d1,format=raw,file={folder / 'records.img'}",
            "-chardev", f"socket,id=c0,path={console},server=on,wait=off",
            "-qmp", f"unix:{monitor},server=on,wait=off",
            *(microvm_devices() if spec.machine == "microvm" else [
                "-initrd", build_initramfs(spec.kernel, spec.file_system), "-device", "vmcoreinfo",
                "-device", "virtio-blk-pci,drive=d0", "-device", "virtio-blk-pci,drive=d1",
                "-serial", "chardev:c0",
            ]),
        ]
        if (folder / "next.img").exists():
            command += ["-drive", f"if=none,id=d2,format=raw,file={folder / 'next.img'}",
                        "-device", "virtio-blk-pci,drive=d2"]
        if spec.nested:
            device = "virtio-blk-device" if spec.machine == "microvm" else "virtio-blk-pci"
            command += ["-drive", f"if=none,id=d3,format=raw,readonly=on,file={spec.nested}",
                        "-device", f"{device},drive=d3"]
        if spec.firmware:
            command += firmware.options_of(spec.firmware, folder)
        command += spec.more
        if spec.balloon or spec.squeezed:
            command += ["-device", "virtio-balloon-pci"]
        if incoming:
            command += ["-incoming", "defer"]
        self.started = time.monotonic()
        with open(folder / "qemu.log", "w") as log:
            self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                                            stderr=log, env={**os.environ, **(env or {})})
        self.qmp = Monitor(monitor, self.process)
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(str(console))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        rest = b""
        with open(self.folder / "console.log", "ab") as log:
            while True:
                try:
                    data = self.console.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    break
                log.write(data)
                log.flush()
                *whole, rest = (rest + data).split(b"\n")
                with self.arrived:
                    self.lines += [line.decode(errors="replace").strip() for line in whole]
                    self.arrived.notify_all()

    def wait(self, pattern: str, seconds: float) -> str:
        """Waits for a console line, from the last one seen on; returns it."""
        deadline = time.monotonic() + seconds
        with self.arrived:
            while True:
                while self.lines:
                    line = self.lines.pop(0)
                    if re.search(r"LAB-FAIL|BEAT-FAIL|Kernel panic", line):
                        raise GuestFailed(f"guest: {line}")
                    if re.search(pattern, line):
                        return line
                left = deadline - time.monotonic()
                if left <= 0 or self.process.poll() is not None:
                    raise GuestFailed(f"no `{pattern}` from the guest; its console ends:\n"
                                      f"{self.said()[-1500:]}")
                self.arrived.wait(min(left, 1))

    def send(self, text: str) -> None:
        self.console.sendall(text.encode() + b"\n")

    def said(self) -> str:
        """All of the console."""
        return (self.folder / "console.log").read_text(errors="replace")

    def ask(self, word: str, seconds: float = 1200) -> None:
        """Has the guest `torture` what it has, or only `look` at it; raises if it finds anything
        wrong."""
        self.send(word)
        answer = word.upper()
        line = self.wait(f"{answer}-|STRESS-FAIL", seconds)
        console = self.said()
        if f"{answer}-OK" not in line or "-FAIL" in console:
            found = [text.strip() for text in console.splitlines() if "LAB-" in text]
            raise GuestFailed(f"{self.folder.name}: {line} {found[:4]}")

    def rss_mib(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) >> 10
        return 0

    def quit(self) -> None:
        try:
            self.qmp.call("quit")
        except (LabError, OSError):
            pass
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)


class Block(NamedTuple):
    """A part of a RAM block, and where it is in guest-physical memory; bytes."""

    block: str
    offset: int
    gpa: int
    len: int


class Memory(NamedTuple):
    """A guest's memory by QEMU's own word."""

    blocks: Sequence[Block]
    memory_devices: Json
    # As QEMU's monitor for people has it.
    ramblock: str
    mtree: str

    def to_json(self) -> Json:
        return self._asdict() | {"blocks": [block._asdict() for block in self.blocks]}


def memory_of(qmp: Monitor) -> Memory:
    """Where QEMU has each RAM block in guest-physical memory."""
    ramblock, mtree = qmp.human("info ramblock"), qmp.human("info mtree -f")
    return Memory(blocks_of(ramblock, mtree), qmp.call("query-memory-devices"), ramblock, mtree)


def blocks_of(ramblock: str, mtree: str) -> list[Block]:
    """The blocks that `info ramblock` lists, where `info mtree -f` has them."""
    names = [line.split()[0] for line in ramblock.splitlines()[1:]]
    found, system = [], False
    for line in mtree.splitlines():
        if line.startswith("FlatView"):
            system = False
        elif line.startswith(" AS"):
            system |= '"memory"' in line
        at = re.match(r"  ([0-9a-f]+)-([0-9a-f]+) \(prio \S+ (ram|rom)\): (\S+)(?: @([0-9a-f]+))?",
                      line)
        if not system or not at:
            continue
        first, last, offset = (int(at[i] or "0", 16) for i in (1, 2, 5))
        name = next((n for n in names if n.split("/")[-1] == at[4]), at[4])
        found.append(Block(name, offset, first, last + 1 - first))
    return found


def read_records(disk: Path, folder: Path) -> None:
    """Takes the guest's records off its second disk."""
    with open(disk, "rb") as file:
        while True:
            header = file.read(4096).split(b"\n")[0].decode()
            name, length = header.split()
            if name == "end":
                return
            target = folder / (name + (".bin" if name.startswith("kpage") else ""))
            target.write_bytes(file.read((int(length) + 4095) // 4096 * 4096)[:int(length)])


def prepare(spec: GuestSpec, folder: Path) -> None:
    """Makes the disks of a guest."""
    files = build_apps(spec.file_system) if spec.apps else \
        build_files(spec.files_mib, spec.file_system)
    if spec.disk_format == "raw":
        shutil.copy(files, folder / "files.img")
    else:
        run("qemu-img", "convert", "-O", spec.disk_format, files, folder / "files.img")
    with open(folder / "records.img", "wb") as records:
        records.truncate(spec.records_bytes)
    if spec.next:
        write_next(spec, folder / "next.img")


def write_next(spec: GuestSpec, image: Path) -> None:
    """A disk with the kernel that the guest loads as its next one, and that one's command line."""
    kernel = spec.kernel.image.read_bytes()
    initrd = build_initramfs(spec.kernel, spec.file_system).read_bytes()
    header = f"{len(kernel)} {len(initrd)} {spec.next}\n".encode()
    with open(image, "wb") as disk:
        disk.write(header.ljust(4096, b"\0"))
        for part in (kernel, initrd):
            disk.write(part.ljust(-(-len(part) >> 20) << 20, b"\0"))


def copy_disks(folder: Path, into: Path) -> None:
    for disk in DISKS:
        run("cp", "--sparse=always", folder / disk, into / disk)


def inflate(qmp: Monitor, target: int) -> None:
    """Lets the balloon take the guest's memory down to `target` bytes."""
    balloon(qmp, target, lambda actual: actual <= target)


def deflate(qmp: Monitor, target: int) -> None:
    """Lets the balloon give back memory, up to `target` bytes."""
    balloon(qmp, target, lambda actual: actual >= target)


def balloon(qmp: Monitor, target: int, reached: Callable[[int], bool]) -> None:
    qmp.call("balloon", value=target)
    for _ in range(240):
        time.sleep(0.5)
        if reached(qmp.call("query-balloon")["actual"]):
            return
    raise GuestFailed(f"the balloon holds {qmp.call('query-balloon')}, not {target}")
