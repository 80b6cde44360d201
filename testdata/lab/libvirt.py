"""Guests under libvirt: saved by `virsh save` in each of its formats, restored by `virsh restore`.

libvirt and its QEMU are Debian 13's, unpacked into a folder of the lab and run from there in their
own mount and process namespaces: nothing is installed on the host, and no daemon outlives a run."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import captures
import kernels
from captures import Meta
from command import command
from debian import Root, install_tools
from errors import AlreadyTold, GuestFailed, LabError, Refused
from host import LAB, Word, allocated, attempt, run
from kernels import Kernel
from machine import DISKS, Machine, build_initramfs, guest_program, prepare, read_records
from spec import GuestSpec
from tool import find_tool, tool_argument

IMAGES = LAB / "libvirt-images"
PACKAGES = ["libvirt-daemon-driver-qemu", "libvirt-daemon", "libvirt-clients", "qemu-system-x86",
            "gzip", "bzip2", "xz-utils", "lzop", "zstd"]
ROOT = Root("libvirt-trixie", "trixie", PACKAGES)
FORMATS = ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"]

# No KVM (the folder's /dev has none), no cgroups, no confinement: the lab is root in a container.
QEMU_CONF = """security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
LIBVIRTD_CONF = """auth_unix_ro = "none"
auth_unix_rw = "none"
"""

# $1 the folder, $2 the lab: seen at the same place inside, so that names mean the same file. The
# shell stays as the first process, because libvirtd does not bury the QEMUs that it disowned, and
# then waits half a minute for each to be gone.
START = """set -e
mount -t proc proc "$1/proc"
mount -t sysfs -o ro sysfs "$1/sys"
mount -t devpts devpts "$1/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$1/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$1/run"
mkdir -p "$1/run/lock" "$1/run/libvirt" "$1/$2"
mount --bind "$2" "$1/$2"
exec chroot "$1" sh -c '/usr/sbin/libvirtd & wait'
"""


def install() -> dict[str, str]:
    """Unpacks libvirt and its QEMU; returns their versions."""
    ROOT.install()
    (ROOT.folder / "etc/libvirt/qemu.conf").write_text(QEMU_CONF)
    (ROOT.folder / "etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF)
    return ROOT.versions("libvirt-daemon-driver-qemu", "qemu-system-x86")


class Daemon:
    """libvirtd, and with it every guest it starts; ended with the block."""

    def __enter__(self) -> Self:
        self.log = open(LAB / "libvirtd.log", "w")
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork",
             "--kill-child", "sh", "-c", START, "sh", ROOT.folder, LAB],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=ROOT.ENVIRONMENT)
        last: Exception | None = None
        for _ in range(300):
            try:
                self.virsh("version")
                return self
            except (Refused, IndexError) as error:
                last = error
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        self.__exit__()
        raise GuestFailed(f"libvirtd did not start: {last}\n{(LAB / 'libvirtd.log').read_text()}")

    def __exit__(self, *_: object) -> None:
        # The first process of the namespace takes all others with it.
        child = self.first_process()
        if child:
            os.kill(child, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def first_process(self) -> int:
        """Of the namespace: the daemon, once it has begun."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0]) if self.process.poll() is None else 0

    def virsh(self, *arguments: Word) -> str:
        # Through /proc: the daemon's /run is its own.
        root = Path(f"/proc/{self.first_process()}/root")
        if not (root / "lab-done").exists():
            raise Refused("it is not running")
        done = attempt("chroot", root, "virsh", "--quiet", "-c", "qemu:///system", *arguments,
                       env=ROOT.ENVIRONMENT)
        if done.returncode:
            raise Refused(f"virsh {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def domain_xml(name: str, spec: GuestSpec, folder: Path) -> str:
    """A guest as libvirt's users describe it, with the lab's disks and console."""
    # libvirt plugs memory only into a guest with NUMA nodes.
    plugged = spec.dimm or spec.cold_dimm
    cells = spec.numa or ((spec.mem,) if plugged else ())
    vcpus = max(spec.smp, len(cells))
    room = f"<maxMemory slots='4' unit='MiB'>{2 * spec.mem + 1024}</maxMemory>" if plugged else ""
    dimms = "".join(map(dimm_xml, spec.cold_dimm))
    numa = "".join(f"<cell id='{i}' cpus='{i * vcpus // len(cells)}-"
                   f"{(i + 1) * vcpus // len(cells) - 1}' memory='{cell}' "
                   f"unit='MiB'/>" for i, cell in enumerate(cells))
    numa = f"<numa>{numa}</numa>" if cells else ""
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{folder / disk}'/><target dev='vd{letter}' bus='virtio'/></disk>"
        for disk, letter in zip(DISKS, "ab"))
    return f"""<domain type='qemu'>
<name>{name}</name>
{room}
<memory unit='MiB'>{spec.mem + sum(spec.cold_dimm)}</memory>
<vcpu>{vcpus}</vcpu>
<os><type arch='x86_64' machine='{spec.machine}'>hvm</type>
<kernel>{spec.kernel.image}</kernel>
<initrd>{build_initramfs(spec.kernel)}</initrd>
<cmdline>{spec.cmdline}</cmdline></os>
<features><acpi/><apic/></features>
<cpu mode='custom' match='exact' check='none'><model>{spec.cpu}</model>{numa}</cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
{disks}{dimms}
<serial type='unix'><source mode='bind' path='{folder / "console"}'/><target port='0'/></serial>
</devices></domain>
"""


def dimm_xml(mib: int) -> str:
    return (f"<memory model='dimm'><target><size unit='MiB'>{mib}</size><node>0</node></target>"
            "</memory>\n")


class Guest(Machine):
    """A domain that was just started or restored, with its console."""

    def __init__(self, daemon: Daemon, name: str, folder: Path) -> None:
        # Nothing of `Machine.__init__`: libvirt starts QEMU.
        self.daemon, self.name, self.folder = daemon, name, folder
        self.process = daemon.process
        self.lines = []
        self.arrived = threading.Condition()
        (folder / "console.log").write_bytes(b"")
        with tempfile.TemporaryDirectory(prefix="sonicshot-") as short:
            # The names of sockets must be short.
            link = Path(short) / "s"
            link.symlink_to(folder)
            self.console = socket.socket(socket.AF_UNIX)
            self.console.connect(str(link / "console"))
        threading.Thread(target=self._listen, daemon=True).start()

    def rss_mib(self) -> int:
        found = re.search(r"^rss (\d+)", self.daemon.virsh("dommemstat", self.name), re.M)
        return int(found.group(1)) >> 10 if found else 0

    def quit(self) -> None:
        self.console.close()
        destroy(self.daemon, self.name)


def destroy(daemon: Daemon, name: str) -> None:
    try:
        daemon.virsh("destroy", name)
    except Refused:
        # It has ended already: saved, or not there for the reason that is being reported.
        pass


def put_disks(folder: Path) -> None:
    """The disks as they were when the guest was saved."""
    for disk in DISKS:
        run("cp", "--sparse=always", folder / f"{disk}.stop", folder / disk)


def capture(daemon: Daemon, spec: GuestSpec, name: str, formats: Sequence[str]) -> Path:
    """Boots a guest, lets it fill its memory, and saves it in each format. All hold the same
    memory: what is saved first is restored without running, and saved in the next format."""
    folder = IMAGES / name
    first = folder / "raw.save"
    if not captures.is_there(folder):
        boot(daemon, spec, name, folder, first)
    for form in formats:
        image = folder / f"{form}.save"
        if image.exists():
            continue
        put_disks(folder)
        daemon.virsh("restore", first, "--paused")
        try:
            save(daemon, name, image, form)
        finally:
            destroy(daemon, name)
    return folder


def boot(daemon: Daemon, spec: GuestSpec, name: str, folder: Path, image: Path) -> None:
    """Boots a guest, lets it fill its memory, and saves it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(spec, folder)
    (folder / "domain.xml").write_text(domain_xml(name, spec, folder))
    daemon.virsh("create", folder / "domain.xml", "--paused")
    guest = Guest(daemon, name, folder)
    try:
        daemon.virsh("resume", name)
        if spec.dimm:
            guest.wait("PLUG", 300)
            for mib in spec.dimm:
                (folder / "dimm.xml").write_text(dimm_xml(mib))
                daemon.virsh("attach-device", name, folder / "dimm.xml", "--live")
        guest.wait("READY", 900)
        save(daemon, name, image, "raw")
    finally:
        guest.quit()
    captures.put_by_disks(folder)
    read_records(folder / "records.img.stop", folder)
    Meta(name, spec, spec.layout, guest_program()).write(folder)


def save(daemon: Daemon, name: str, image: Path, form: str) -> None:
    part = image.with_suffix(".part")
    try:
        daemon.virsh("save", name, part, "--image-format", form, "--running")
        part.rename(image)
    finally:
        part.unlink(missing_ok=True)


def restore(daemon: Daemon, name: str, folder: Path, image: Path, torture: bool
            ) -> tuple[float, int]:
    """Runs a saved guest on. Returns seconds from the order to the first beat, and QEMU's
    resident memory then, in MiB; raises if the stress test finds anything."""
    put_disks(folder)
    started = time.monotonic()
    daemon.virsh("restore", image)
    guest = Guest(daemon, name, folder)
    try:
        guest.wait("BEAT [0-9]", 120)
        beat = time.monotonic() - started
        rss = guest.rss_mib()
        if torture:
            guest.ask("torture")
        return beat, rss
    finally:
        guest.quit()


def prune(tool: Path, image: Path, out: Path, in_place: bool) -> str:
    """Returns what sonicshot says when it refuses, or nothing."""
    if in_place:
        run("cp", "--sparse=auto", image, out)
        done = attempt(tool, "prune", out, "--in-place")
    else:
        done = attempt(tool, "prune", image, "-o", out)
    return " ".join(done.stderr.split()) if done.returncode else ""


def on_disk(path: Path) -> int:
    """MiB."""
    return allocated(path) >> 20


@dataclass
class Row:
    """Of the table: a guest, one form of its image, and what became of it; MiB."""

    guest: str
    form: str
    before: int | None = None
    after: int | None = None
    beat: str = ""
    rss: int | None = None
    restored: str = ""
    ok: bool = False


def prove(daemon: Daemon, name: str, spec: GuestSpec, forms: Sequence[str], tool: Path | None,
          torture: bool) -> list[Row]:
    """One row for every form: saved, pruned (if there is a tool), restored, stress-tested."""
    rows = []
    folder = capture(daemon, spec, name, [form.partition("+")[0] for form in forms])
    for form in forms:
        row = Row(name, form)
        rows.append(row)
        try:
            prove_form(daemon, folder, row, tool, torture)
        except LabError as error:
            row.restored = f"FAIL: {error}"
        print(f"{'ok  ' if row.ok else 'FAIL'} {name} {form}: {row.before} -> "
              f"{row.after or '-'} MiB, {row.restored}", flush=True)
    return rows


def prove_form(daemon: Daemon, folder: Path, row: Row, tool: Path | None, torture: bool) -> None:
    kind, _, how = row.form.partition("+")
    image, out = folder / f"{kind}.save", folder / f"{row.form}.pruned"
    row.before = on_disk(image)
    out.unlink(missing_ok=True)
    try:
        if tool:
            refused = prune(tool, image, out, how == "in-place")
            if refused:
                row.restored = f"not pruned: {refused}"
                return
            row.after = on_disk(out)
            if description(daemon, image) != description(daemon, out):
                row.restored = "libvirt reads another description from the pruned image"
                return
        beat, row.rss = restore(daemon, row.guest, folder, out if tool else image, torture)
        row.beat = f"{beat:.1f} s"
        row.restored = "stress test OK" if torture else "runs"
        row.ok = True
    finally:
        out.unlink(missing_ok=True)


def description(daemon: Daemon, image: Path) -> str:
    return daemon.virsh("save-image-dumpxml", image)


def table(rows: Sequence[Row], versions: dict[str, str]) -> str:
    lines = [f"libvirt {versions['libvirt']}, QEMU {versions['qemu']}", "",
             "| guest | image | on disk, MiB | pruned, MiB | first beat | QEMU resident, MiB | "
             "restored |", "|---|---|---:|---:|---:|---:|---|"]
    lines += [f"| {r.guest} | {r.form} | {r.before or '-'} | {r.after or '-'} | "
              f"{r.beat or '-'} | {r.rss or '-'} | {r.restored} |" for r in rows]
    return "\n".join(lines)


# Each of so many MiB of memory, and what it has beside.
GUESTS: dict[str, Callable[[Kernel, int], GuestSpec]] = {
    "pc": lambda kernel, mem: GuestSpec(kernel, mem),
    "q35": lambda kernel, mem: GuestSpec(kernel, mem, machine="q35"),
    "numa": lambda kernel, mem: GuestSpec(kernel, mem, numa=(mem // 2, mem - mem // 2), smp=2),
    # QEMU sorts memory by size: the second node comes first in the image.
    "uneven": lambda kernel, mem: GuestSpec(kernel, mem, smp=2,
                                            numa=(mem * 3 // 8, mem - mem * 3 // 8)),
    "dimm": lambda kernel, mem: GuestSpec(kernel, mem, dimm=(256,)),
    # There at boot: the kernel puts page tables of its own image into it, so that nothing of the
    # guest can be read without knowing where the DIMM lies.
    "cold-dimm": lambda kernel, mem: GuestSpec(kernel, mem, cold_dimm=(256,),
                                               append="memhp_default_state=online"),
}


def libvirt_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--guests", default=",".join(GUESTS))
    parser.add_argument("--formats", default="raw,gzip,zstd,sparse,sparse+in-place",
                        help=f"of {', '.join(FORMATS)}; +in-place to prune a copy in place")
    parser.add_argument("--garbage", default="random", choices=["random", "compressible"])
    parser.add_argument("--no-prune", action="store_true", help="restore what libvirt saved")
    parser.add_argument("--rm", action="store_true", help="delete each guest's images afterwards")
    parser.add_argument("--no-torture", action="store_true")
    tool_argument(parser)


@command("libvirt", "virsh save, prune, virsh restore, stress test", libvirt_arguments)
def do_libvirt(args: Namespace) -> None:
    install_tools()
    versions = install()
    tool = None if args.no_prune else find_tool(args.sonicshot)
    kernel = kernels.fetch(args.kernel)
    rows = []
    with Daemon() as daemon:
        for name in args.guests.split(","):
            spec = replace(GUESTS[name](kernel, args.mem), garbage=args.garbage)
            forms = args.formats.split(",")
            if name != "pc":
                # What is in the image differs from guest to guest, how it is packed does not.
                forms = [form for form in forms if form.startswith(("raw", "sparse"))]
            parts = [args.kernel, str(args.mem), name]
            if args.garbage != "random":
                parts.append(args.garbage)
            title = "-".join(parts)
            try:
                rows += prove(daemon, title, spec, forms, tool, not args.no_torture)
            except LabError as error:
                print(f"FAIL {title}: {error}", flush=True)
                rows.append(Row(title, "-", restored=f"FAIL: {error}"))
            if args.rm:
                shutil.rmtree(IMAGES / title, ignore_errors=True)
    text = table(rows, versions)
    (LAB / "libvirt.md").write_text(text + "\n")
    print(text)
    if not all(row.ok for row in rows):
        raise AlreadyTold
