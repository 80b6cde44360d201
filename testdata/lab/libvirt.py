"""Guests under libvirt: saved by `virsh save` in each of its formats, restored by `virsh restore`.

libvirt and its QEMU are Debian 13's, unpacked into a folder of the lab and run from there in their
own mount and process namespaces: nothing is installed on the host, and no daemon outlives a run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import kernels
import machine
from errors import AlreadyTold, GuestFailed, LabError, Refused
from kernels import LAB, run

IMAGES = LAB / "libvirt-images"
PACKAGES = ["libvirt-daemon-driver-qemu", "libvirt-daemon", "libvirt-clients", "qemu-system-x86",
            "gzip", "bzip2", "xz-utils", "lzop", "zstd"]
ROOT = kernels.Root("libvirt-trixie", "trixie", PACKAGES)
DISKS = ("files.img", "records.img")
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

def install():
    """Unpacks libvirt and its QEMU; returns their versions."""
    ROOT.install()
    (ROOT.folder / "etc/libvirt/qemu.conf").write_text(QEMU_CONF)
    (ROOT.folder / "etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF)
    return ROOT.versions("libvirt-daemon-driver-qemu", "qemu-system-x86")


class Daemon:
    """libvirtd, and with it every guest it starts; ended with the block."""

    def __enter__(self):
        self.log = open(LAB / "libvirtd.log", "w")
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork",
             "--kill-child", "sh", "-c", START, "sh", ROOT.folder, LAB],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=ROOT.ENVIRONMENT)
        last = None
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

    def __exit__(self, *_):
        # The first process of the namespace takes all others with it.
        child = self.first_process()
        if child:
            os.kill(child, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def first_process(self):
        """Of the namespace: the daemon, once it has begun."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0]) if self.process.poll() is None else 0

    def virsh(self, *arguments):
        # Through /proc: the daemon's /run is its own.
        root = Path(f"/proc/{self.first_process()}/root")
        if not (root / "lab-done").exists():
            raise Refused("it is not running")
        done = subprocess.run(
            ["chroot", root, "virsh", "--quiet", "-c", "qemu:///system", *map(str, arguments)],
            capture_output=True, text=True, env=ROOT.ENVIRONMENT)
        if done.returncode:
            raise Refused(f"virsh {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def domain_xml(name, spec, folder):
    """A guest as libvirt's users describe it, with the lab's disks and console."""
    kernel, mib = spec["kernel"], spec["mem"]
    # libvirt plugs memory only into a guest with NUMA nodes.
    plugged = spec.get("dimm") or spec.get("cold_dimm")
    cells = spec.get("numa") or ([mib] if plugged else [])
    vcpus = max(spec["smp"], len(cells))
    room = f"<maxMemory slots='4' unit='MiB'>{2 * mib + 1024}</maxMemory>" if plugged else ""
    dimms = "".join(dimm_xml(mib) for mib in spec.get("cold_dimm", []))
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
<memory unit='MiB'>{mib + sum(spec.get("cold_dimm", []))}</memory>
<vcpu>{vcpus}</vcpu>
<os><type arch='x86_64' machine='{spec['machine']}'>hvm</type>
<kernel>{LAB / kernel['vmlinuz']}</kernel>
<initrd>{machine.build_initramfs(kernel)}</initrd>
<cmdline>{spec['cmdline']}</cmdline></os>
<features><acpi/><apic/></features>
<cpu mode='custom' match='exact' check='none'><model>{spec['cpu']}</model>{numa}</cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
{disks}{dimms}
<serial type='unix'><source mode='bind' path='{folder / "console"}'/><target port='0'/></serial>
</devices></domain>
"""


def dimm_xml(mib):
    return (f"<memory model='dimm'><target><size unit='MiB'>{mib}</size><node>0</node></target>"
            "</memory>\n")


class Guest(machine.Machine):
    """A domain that was just started or restored, with its console."""

    def __init__(self, daemon, name, folder):
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

    def rss_mib(self):
        found = re.search(r"^rss (\d+)", self.daemon.virsh("dommemstat", self.name), re.M)
        return int(found.group(1)) >> 10 if found else 0

    def quit(self):
        self.console.close()
        try:
            self.daemon.virsh("destroy", self.name)
        except Refused:
            # It has ended already: saved, or not there for the reason that is being reported.
            pass


def put_disks(folder):
    """The disks as they were when the guest was saved."""
    for disk in DISKS:
        run("cp", "--sparse=always", folder / f"{disk}.stop", folder / disk)


def capture(daemon, spec, name, formats):
    """Boots a guest, lets it fill its memory, and saves it in each format. All hold the same
    memory: what is saved first is restored without running, and saved in the next format."""
    folder = IMAGES / name
    first = folder / "raw.save"
    guest = machine.guest_program()
    meta = folder / "meta.json"
    if not meta.exists() or json.loads(meta.read_text())["guest"] != guest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        machine.prepare(spec, folder)
        if spec.get("cold_dimm"):
            # It comes after the PCI hole, and kpageflags counts from 0.
            os.truncate(folder / "records.img", 64 << 20)
        (folder / "domain.xml").write_text(domain_xml(name, spec, folder))
        daemon.virsh("create", folder / "domain.xml", "--paused")
        booted = Guest(daemon, name, folder)
        try:
            daemon.virsh("resume", name)
            if spec.get("dimm"):
                booted.wait("PLUG", 300)
                for mib in spec["dimm"]:
                    (folder / "dimm.xml").write_text(dimm_xml(mib))
                    daemon.virsh("attach-device", name, folder / "dimm.xml", "--live")
            booted.wait("READY", 900)
            save(daemon, name, first, "raw")
        finally:
            booted.quit()
        for disk in DISKS:
            run("cp", "--sparse=always", folder / disk, folder / f"{disk}.stop")
        machine.read_records(folder / "records.img.stop", folder)
        meta.write_text(json.dumps({"guest": guest, "spec": spec}, indent=1))
    for form in formats:
        image = folder / f"{form}.save"
        if image.exists():
            continue
        put_disks(folder)
        daemon.virsh("restore", first, "--paused")
        try:
            save(daemon, name, image, form)
        finally:
            try:
                daemon.virsh("destroy", name)
            except Refused:
                pass
    return folder


def save(daemon, name, image, form):
    part = image.with_suffix(".part")
    try:
        daemon.virsh("save", name, part, "--image-format", form, "--running")
        part.rename(image)
    finally:
        part.unlink(missing_ok=True)


def restore(daemon, name, folder, image, torture):
    """Runs a saved guest on. Returns seconds from the order to the first beat, and QEMU's
    resident memory then; raises if the torture finds anything."""
    put_disks(folder)
    started = time.monotonic()
    daemon.virsh("restore", image)
    guest = Guest(daemon, name, folder)
    try:
        guest.wait("BEAT [0-9]", 120)
        beat = time.monotonic() - started
        rss = guest.rss_mib()
        if torture:
            guest.send("torture")
            line = guest.wait("TORTURE-", 1200)
            if "TORTURE-OK" not in line:
                console = (folder / "console.log").read_text(errors="replace")
                said = [text.strip() for text in console.splitlines() if "LAB-" in text]
                raise GuestFailed(f"{line} {said[:4]}")
        return beat, rss
    finally:
        guest.quit()


def prune(tool, image, out, in_place):
    """Returns what sonicshot says when it refuses, or nothing."""
    if in_place:
        run("cp", "--sparse=auto", image, out)
        command = [tool, "prune", out, "--in-place"]
    else:
        command = [tool, "prune", image, "-o", out]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    return " ".join(done.stderr.split()) if done.returncode else ""


def on_disk(path):
    return path.stat().st_blocks * 512 >> 20


def row_of(name, form, **known):
    return {"guest": name, "form": form, "before": "", "after": "", "beat": "", "rss": "",
            "restored": "", "ok": False} | known


def prove(daemon, name, spec, forms, tool, torture):
    """One row for every form: saved, pruned (if there is a tool), restored, tortured."""
    rows = []
    folder = capture(daemon, spec, name, [form.partition("+")[0] for form in forms])
    for form in forms:
        kind, _, how = form.partition("+")
        image, out = folder / f"{kind}.save", folder / f"{form}.pruned"
        row = row_of(name, form, before=on_disk(image))
        rows.append(row)
        out.unlink(missing_ok=True)
        try:
            if tool:
                refused = prune(tool, image, out, how == "in-place")
                if refused:
                    row["restored"] = f"not pruned: {refused}"
                    continue
                row["after"] = on_disk(out)
                if description(daemon, image) != description(daemon, out):
                    row["restored"] = "libvirt reads another description from the pruned image"
                    continue
            beat, rss = restore(daemon, name, folder, out if tool else image, torture)
            row.update(beat=f"{beat:.1f} s", rss=rss, ok=True,
                       restored="torture OK" if torture else "runs")
        except LabError as error:
            row["restored"] = f"FAIL: {error}"
        finally:
            out.unlink(missing_ok=True)
            print(f"{'ok  ' if row['ok'] else 'FAIL'} {name} {form}: {row['before']} -> "
                  f"{row['after'] or '-'} MiB, {row['restored']}", flush=True)
    return rows


def description(daemon, image):
    return daemon.virsh("save-image-dumpxml", image)


def table(rows, versions):
    lines = [f"libvirt {versions['libvirt']}, QEMU {versions['qemu']}", "",
             "| guest | image | on disk, MiB | pruned, MiB | first beat | QEMU resident, MiB | "
             "restored |", "|---|---|---:|---:|---:|---:|---|"]
    lines += [f"| {r['guest']} | {r['form']} | {r['before'] or '-'} | {r['after'] or '-'} | "
              f"{r['beat'] or '-'} | {r['rss'] or '-'} | {r['restored']} |" for r in rows]
    return "\n".join(lines)


# What each has beside `--mem` MiB of memory.
GUESTS = {
    "pc": lambda mem: {},
    "q35": lambda mem: {"machine": "q35"},
    "numa": lambda mem: {"numa": [mem // 2, mem // 2], "smp": 2},
    # QEMU sorts memory by size: the second node comes first in the image.
    "uneven": lambda mem: {"numa": [mem * 3 // 8, mem * 5 // 8], "smp": 2},
    "dimm": lambda mem: {"dimm": [256]},
    # There at boot: the kernel puts page tables of its own image into it, so that nothing of the
    # guest can be read without knowing where the DIMM lies.
    "cold-dimm": lambda mem: {"cold_dimm": [256], "append": "memhp_default_state=online"},
}


def command(args):
    """`lab.py libvirt`"""
    kernels.install_tools()
    versions = install()
    tool = None if args.no_prune else args.find_tool(args.sonicshot)
    rows = []
    with Daemon() as daemon:
        for name in args.guests.split(","):
            spec = {"kernel": kernels.fetch(args.kernel, False), "mem": args.mem,
                    "cpu": "qemu64", "smp": 1, "machine": "pc", "garbage": args.garbage}
            spec |= GUESTS[name](args.mem)
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
                rows.append(row_of(title, "-", restored=f"FAIL: {error}"))
            if args.rm:
                shutil.rmtree(IMAGES / title, ignore_errors=True)
    text = table(rows, versions)
    (LAB / "libvirt.md").write_text(text + "\n")
    print(text)
    if not all(row["ok"] for row in rows):
        raise AlreadyTold


def add_command(commands, find_tool):
    parser = commands.add_parser("libvirt", help="virsh save, prune, virsh restore, torture")
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--guests", default=",".join(GUESTS))
    parser.add_argument("--formats", default="raw,gzip,zstd,sparse,sparse+in-place",
                        help=f"of {', '.join(FORMATS)}; +in-place to prune a copy in place")
    parser.add_argument("--garbage", default="random", choices=["random", "compressible"])
    parser.add_argument("--no-prune", action="store_true", help="restore what libvirt saved")
    parser.add_argument("--rm", action="store_true", help="delete each guest's images afterwards")
    parser.add_argument("--no-torture", action="store_true")
    parser.add_argument("--sonicshot", help="the binary; built if not given")
    parser.set_defaults(run=command, find_tool=find_tool)
