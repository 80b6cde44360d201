"""A guest under QEMU: its disks, its console, and its monitor."""

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
from pathlib import Path
from random import Random
from typing import NamedTuple

import kernels
from errors import GuestFailed, LabError
from kernels import LAB, ROOT, run

GUEST_SOURCE = Path(__file__).with_name("guest.c")


def build_initramfs(kernel):
    """The guest's program and its modules, as a cpio archive."""
    home = LAB / "kernels" / kernel["series"]
    modules = hashlib.sha256(" ".join(kernel["modules"]).encode()).hexdigest()[:8]
    archive = home / f"initramfs-{guest_program()}-{modules}"
    if archive.exists():
        return archive
    tree = Path(tempfile.mkdtemp(dir=home))
    for name in ("modules", "dev", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    run("gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", tree / "init", GUEST_SOURCE)
    run("strip", tree / "init")
    for name in kernel["modules"]:
        shutil.copy(home / "modules" / f"{name}.ko", tree / "modules")
    (tree / "modules" / "order").write_text("".join(f"{n}.ko\n" for n in kernel["modules"]))
    part = tree.with_suffix(".cpio")
    with open(part, "wb") as out:
        names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*"))) + "\n"
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(),
                       stdout=out, check=True)
    shutil.rmtree(tree)
    part.rename(archive)
    return archive


def guest_program():
    """What tells one version of the guest's program from another."""
    return hashlib.sha256(GUEST_SOURCE.read_bytes()).hexdigest()[:16]


def build_files(mib):
    """An ext4 image with files to fill the page cache with."""
    image = LAB / f"files-{mib}.img"
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
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", tree, part, f"{mib * 3 // 2 + 24}M")
    part.rename(image)
    shutil.rmtree(tree)
    return image


class Monitor:
    """QEMU's QMP socket."""

    def __init__(self, path, process):
        self.socket = socket.socket(socket.AF_UNIX)
        for _ in range(600):
            if process.poll() is not None:
                raise GuestFailed(f"QEMU ended at once: {process.args}")
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

    def read(self):
        line = self.file.readline()
        if not line:
            raise GuestFailed("QEMU closed its monitor")
        return json.loads(line)

    def call(self, command, **arguments):
        message = {"execute": command}
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

    def capabilities(self, *names):
        self.call("migrate-set-capabilities",
                  capabilities=[{"capability": n, "state": True} for n in names])

    def no_capabilities(self, *names):
        self.call("migrate-set-capabilities",
                  capabilities=[{"capability": n, "state": False} for n in names])

    def migrated(self):
        for _ in range(24000):
            status = self.call("query-migrate").get("status")
            if status == "completed":
                return
            if status == "failed":
                raise GuestFailed(f"migration failed: {self.call('query-migrate')}")
            time.sleep(0.005)
        raise GuestFailed("migration did not end")


def backend(name, mib):
    return ["-object", f"memory-backend-ram,id={name},size={mib}M"]


def memory(spec, ram, incoming):
    """The guest's memory for QEMU's command line: one file (`ram`) or anonymous memory, or a
    block for each NUMA node; and what is plugged in, which on a restore is there from the start."""
    if ram and any(spec.get(key) for key in ("numa", "dimm", "virtio_mem")):
        raise LabError("a guest with several RAM blocks has no raw RAM file")
    machine, size = spec["machine"], f"{spec['mem']}M"
    more = sum(spec.get("dimm", [])) + spec.get("virtio_mem", [0])[0]
    if more:
        size += f",slots=4,maxmem={spec['mem'] + more}M"
    if spec.get("numa"):
        options = ["-machine", machine, "-m", size]
        for node, mib in enumerate(spec["numa"]):
            last = spec["smp"] - 1 if node == len(spec["numa"]) - 1 else node
            options += backend(f"ram-node{node}", mib)
            options += ["-numa", f"node,nodeid={node},memdev=ram-node{node},cpus={node}-{last}"]
    else:
        options = ["-machine", f"{machine},memory-backend=ram0", "-m", size]
        options += ["-object", f"memory-backend-file,id=ram0,size={spec['mem']}M,"
                    f"mem-path={ram},share=on"] if ram else backend("ram0", spec["mem"])
    for number, mib in enumerate(spec.get("dimm", []) if incoming else []):
        options += backend(f"mem-dimm{number}", mib)
        options += ["-device", f"pc-dimm,id=dimm{number},memdev=mem-dimm{number}"]
    if spec.get("virtio_mem"):
        mib, plugged = spec["virtio_mem"]
        options += backend("vmem0", mib)
        device = f"virtio-mem-pci,id=vm0,memdev=vmem0,requested-size={plugged}M"
        if spec["kernel"]["series"].startswith("5.10"):
            # Linux 5.16 is the first that may be told to keep off what is not plugged in.
            device += ",unplugged-inaccessible=off"
        options += ["-device", device]
    return options


class Machine:
    """One QEMU process; `ram` names the file that is its memory, or None."""

    def __init__(self, spec, ram, folder, incoming=False):
        self.folder = folder
        self.lines = []
        self.arrived = threading.Condition()
        # Not in the folder: the names of sockets must be short.
        self.sockets = Path(tempfile.mkdtemp(prefix="sonicshot-"))
        console, monitor = self.sockets / "console", self.sockets / "qmp"
        kernel = spec["kernel"]
        command = [
            *spec.get("qemu", ["qemu-system-x86_64"]), "-accel", "tcg", "-nodefaults", "-no-user-config",
            "-display", "none", "-cpu", spec["cpu"], "-smp", str(spec["smp"]),
            *memory(spec, ram, incoming),
            "-kernel", LAB / kernel["vmlinuz"], "-initrd", build_initramfs(kernel),
            "-append", spec["cmdline"],
            "-device", "vmcoreinfo",
            "-drive", f"if=none,id=d0,format=raw,file={folder / 'files.img'}",
            "-device", "virtio-blk-pci,drive=d0",
            "-drive", f"if=none,id=d1,format=raw,file={folder / 'records.img'}",
            "-device", "virtio-blk-pci,drive=d1",
            "-chardev", f"socket,id=c0,path={console},server=on,wait=off",
            "-serial", "chardev:c0",
            "-qmp", f"unix:{monitor},server=on,wait=off",
        ]
        if (folder / "next.img").exists():
            command += ["-drive", f"if=none,id=d2,format=raw,file={folder / 'next.img'}",
                        "-device", "virtio-blk-pci,drive=d2"]
        if spec.get("firmware"):
            code, variables = kernels.fetch_firmware(spec["firmware"])
            if not (folder / "vars.fd").exists():
                shutil.copy(variables, folder / "vars.fd")
            command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}",
                        "-drive", f"if=pflash,unit=1,format=raw,file={folder / 'vars.fd'}",
                        *kernels.FIRMWARE[spec["firmware"]][-1]]
        command += spec.get("more", [])
        if spec.get("balloon"):
            command += ["-device", "virtio-balloon-pci"]
        if incoming:
            command += ["-incoming", "defer"]
        self.started = time.monotonic()
        self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL,
                                        stderr=open(folder / "qemu.log", "w"))
        self.qmp = Monitor(monitor, self.process)
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(str(console))
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
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

    def wait(self, pattern, seconds):
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
                    tail = (self.folder / "console.log").read_text(errors="replace")[-1500:]
                    raise GuestFailed(f"no `{pattern}` from the guest; its console ends:\n{tail}")
                self.arrived.wait(min(left, 1))

    def send(self, text):
        self.console.sendall(text.encode() + b"\n")

    def rss_mib(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) >> 10
        return 0

    def quit(self):
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


def blocks(qmp):
    """Where QEMU has each RAM block in guest-physical memory, by its own word."""
    def monitor(line):
        return qmp.call("human-monitor-command", command_line=line)

    names = [line.split()[0] for line in monitor("info ramblock").splitlines()[1:]]
    found, system = [], False
    for line in monitor("info mtree -f").splitlines():
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
        found.append({"block": name, "offset": offset, "gpa": first, "len": last + 1 - first})
    return {"blocks": found, "memory_devices": qmp.call("query-memory-devices"),
            "ramblock": monitor("info ramblock"), "mtree": monitor("info mtree -f")}


def layout(machine, mem):
    """Guest RAM as QEMU lays it out, in file order."""
    size = mem << 20
    low_max, low_split = (0xE0000000, 0xC0000000) if machine == "pc" else (0xB0000000, 0x80000000)
    low = size if size < low_max else low_split
    parts = [{"gpa": 0, "len": low, "file_offset": 0}]
    if size > low:
        parts.append({"gpa": 1 << 32, "len": size - low, "file_offset": low})
    return parts


def read_records(disk, folder):
    """Takes the guest's records off its second disk."""
    with open(disk, "rb") as file:
        while True:
            header = file.read(4096).split(b"\n")[0].decode()
            name, length = header.split()
            if name == "end":
                return
            length = int(length)
            target = folder / (name + (".bin" if name.startswith("kpage") else ""))
            target.write_bytes(file.read((length + 4095) // 4096 * 4096)[:length])


def prepare(spec, folder, more=""):
    """Makes the disks and the command line of a guest."""
    mem = spec["mem"]
    small = mem < 256
    plug = sum(spec.get("dimm", [])) + spec.get("virtio_mem", [0, 0])[1]
    if plug:
        more += f" lab.plug={plug}"
    if spec.get("pmem"):
        # RAM that is called persistent memory, and used as such.
        more += f" memmap={spec['pmem']} lab.pmem=1"
    if spec.get("offline"):
        # Plugged in, used, and taken offline again.
        more += f" lab.offline={spec['offline']} memhp_default_state=offline"
    shutil.copy(build_files(8 if small else 64), folder / "files.img")
    with open(folder / "records.img", "wb") as records:
        # What is plugged in comes after the PCI hole, and kpageflags counts from 0.
        records.truncate((8 << 20) + ((mem + 4096 if plug else 2 * mem) << 20) // 4096 * 32)
    if spec.get("next"):
        write_next(spec, folder / "next.img")
    spec["cmdline"] = (
        "console=ttyS0 quiet panic=-1 "
        f"lab.anon={spec.get('anon') or (8 if small else 24 if mem < 2048 else 96)} "
        f"lab.seed={spec.get('seed', 1)} "
        f"lab.compressible={int(spec.get('garbage') == 'compressible')} "
        f"lab.huge={spec.get('hugetlb', 0)} {spec.get('append', '')} {more}").strip()


def write_next(spec, image):
    """A disk with the kernel that the guest loads as its next one, and that one's command line."""
    kernel = (LAB / spec["kernel"]["vmlinuz"]).read_bytes()
    initrd = build_initramfs(spec["kernel"]).read_bytes()
    header = f"{len(kernel)} {len(initrd)} {spec['next']}\n".encode()
    with open(image, "wb") as disk:
        disk.write(header.ljust(4096, b"\0"))
        for part in (kernel, initrd):
            disk.write(part.ljust(-(-len(part) >> 20) << 20, b"\0"))


def capture(spec, name):
    """Boots a guest, lets it fill its memory, stops it, and takes everything at that instant. A
    guest that is `live` is not stopped: it is busy while QEMU saves it, in one form alone."""
    folder = LAB / "captures" / name
    guest = guest_program()
    if (folder / "meta.json").exists():
        # One of an older guest program would be tortured by that program.
        if json.loads((folder / "meta.json").read_text()).get("guest") == guest:
            return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    live = spec.get("live")
    prepare(spec, folder, f"lab.stress={2 * spec['smp']}" if live else "")
    # Raw RAM is one file, and QEMU writes the rest of its state beside it.
    ram = folder / "live.raw" if "raw" in spec["forms"] else None
    times, migrations = {}, 0
    machine = Machine(spec, ram, folder)
    try:
        qmp = machine.qmp
        if spec.get("dimm"):
            machine.wait("PLUG", 300)
            for number, mib in enumerate(spec["dimm"]):
                qmp.call("object-add", qom_type="memory-backend-ram", id=f"mem-dimm{number}",
                         size=mib << 20)
                qmp.call("device_add", driver="pc-dimm", id=f"dimm{number}",
                         memdev=f"mem-dimm{number}")
        machine.wait("READY", 900)
        times["ready"] = round(time.monotonic() - machine.started, 1)
        if spec.get("balloon"):
            inflate(qmp, (spec["mem"] - spec["balloon"]) << 20)
        if live:
            # Slow enough that the guest changes pages which have been saved.
            qmp.call("migrate-set-parameters", max_bandwidth=48 << 20, downtime_limit=100)
        else:
            qmp.call("stop")
            put_by_disks(folder)
        found = blocks(qmp)
        if "elf" in spec["forms"]:
            qmp.call("dump-guest-memory", paging=False, protocol=f"file:{folder / 'dump.elf'}")
        for form in ("raw", "mapped", "stream"):
            if form not in spec["forms"]:
                continue
            if migrations:
                # QEMU does not migrate a guest twice that did not run between.
                qmp.call("cont")
                time.sleep(0.2)
                qmp.call("stop")
                qmp.no_capabilities("x-ignore-shared", "mapped-ram")
            migrations += 1
            qmp.capabilities("events", *{"raw": ["x-ignore-shared"], "mapped": ["mapped-ram"],
                                         "stream": spec.get("capabilities", [])}[form])
            file = folder / {"raw": "device.state", "mapped": "mapped.ram",
                             "stream": "stream.mig"}[form]
            qmp.call("migrate", uri=f"exec:cat > {file}" if form == "stream" else f"file:{file}")
            if live:
                time.sleep(12)
                qmp.call("migrate-set-parameters", downtime_limit=100_000)
            qmp.migrated()
            if form == "raw":
                run("cp", "--sparse=auto", ram, folder / "ram.raw")
        if live:
            put_by_disks(folder)
    finally:
        machine.quit()
    read_records(folder / "records.img.stop", folder)
    (folder / "live.raw").unlink(missing_ok=True)
    for disk in ("files.img", "records.img"):
        (folder / f"{disk}.stop").rename(folder / disk)
    meta = {"name": name, "guest": guest, "spec": spec, "release": spec["kernel"]["release"],
            "layout": layout(spec["machine"], spec["mem"]), "times": times, **found}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def put_by_disks(folder):
    for disk in ("files.img", "records.img"):
        run("cp", "--sparse=always", folder / disk, folder / f"{disk}.stop")


def begins_with_capability(migration, name):
    with open(migration, "rb") as file:
        return name in file.read(4096)


def inflate(qmp, target):
    """Lets the balloon take the guest's memory down to `target` bytes."""
    qmp.call("balloon", value=target)
    for _ in range(240):
        time.sleep(0.5)
        if qmp.call("query-balloon")["actual"] <= target:
            return
    raise GuestFailed(f"the balloon holds {qmp.call('query-balloon')}, not {target}")


class Restored(NamedTuple):
    """Seconds that QEMU loaded, seconds from then to the guest's first beat, and the MiB that
    QEMU had resident then."""

    load: float
    beat: float
    rss: int


def restore(capture_folder, ram, ask="torture", seconds=1200, migration=None):
    """Runs the captured guest on with `ram` as its memory, or, if `ram` is None, with fresh
    memory and the migration file at `migration`, mapped-ram or a stream. Raises if the guest,
    asked to `torture` or only to `look` (or not asked at all), finds anything wrong."""
    meta = json.loads((capture_folder / "meta.json").read_text())
    folder = LAB / "restore" / f"{meta['name']}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for disk in ("files.img", "records.img"):
        run("cp", "--sparse=always", capture_folder / disk, folder / disk)
    machine = Machine(meta["spec"], ram, folder, incoming=True)
    try:
        qmp = machine.qmp
        if ram:
            qmp.capabilities("events", "x-ignore-shared")
            migration = capture_folder / "device.state"
        elif begins_with_capability(migration, b"mapped-ram"):
            qmp.capabilities("events", "mapped-ram")
        else:
            qmp.capabilities("events")
        started = time.monotonic()
        # Before 8.2 there is no `file:`.
        how = "exec:cat " if "qemu" in meta["spec"] else "file:"
        qmp.call("migrate-incoming", uri=f"{how}{migration}")
        qmp.migrated()
        loaded = time.monotonic()
        qmp.call("cont")
        machine.wait("BEAT [0-9]", 120)
        done = Restored(loaded - started, time.monotonic() - loaded, machine.rss_mib())
        if ask:
            machine.send(ask)
            line = machine.wait(f"{ask.upper()}-", seconds)
            console = (folder / "console.log").read_text(errors="replace")
            if f"{ask.upper()}-OK" not in line or "-FAIL" in console:
                said = [text.strip() for text in console.splitlines() if "LAB-" in text]
                raise GuestFailed(f"{meta['name']}: {line} {said[:4]}")
        return done
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


def stress(spec, name, stops, at_stop):
    """Boots a guest whose processes take and give back memory without rest, stops it again and
    again at any instant, lets `at_stop` work on the RAM under it, and lets it go on."""
    folder = LAB / "stress" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(spec, folder, f"lab.stress={2 * spec['smp']}")
    ram = folder / "live.raw"
    machine = Machine(spec, ram, folder)
    random = Random(spec.get("seed", 1))
    try:
        machine.wait("READY", 900)
        for number in range(stops):
            time.sleep(random.random())
            machine.qmp.call("stop")
            at_stop(number, ram, machine.qmp, folder)
            machine.qmp.call("cont")
        machine.wait("BEAT [0-9]", 120)
        machine.send("torture")
        line = machine.wait("TORTURE-|STRESS-FAIL", 1200)
        console = (folder / "console.log").read_text(errors="replace")
        if "TORTURE-OK" not in line or "-FAIL" in console:
            raise GuestFailed(f"{name}: {line}")
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


def relative(path):
    return os.path.relpath(path, ROOT)
