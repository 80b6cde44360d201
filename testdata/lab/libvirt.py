"""Guests under libvirt: saved by `virsh save` in each of its formats, restored by `virsh restore`.

libvirt and its QEMU are Debian 13's, unpacked into a folder of the lab and run from there in their
own mount and process namespaces: nothing is installed on the host, and no daemon outlives a run."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import kernels
import machine
from kernels import LAB, run

SUITE = "trixie"
ROOT = LAB / f"libvirt-{SUITE}"
IMAGES = LAB / "libvirt-images"
PACKAGES = ["libvirt-daemon-driver-qemu", "libvirt-daemon", "libvirt-clients", "qemu-system-x86",
            "gzip", "bzip2", "xz-utils", "lzop", "zstd"]
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

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive",
               "LC_ALL": "C"}


class Refused(Exception):
    """libvirt said no."""


def install():
    """Unpacks libvirt and its QEMU; returns their versions."""
    done = ROOT / "lab-done"
    if not done.exists():
        if not shutil.which("debootstrap"):
            run("apt-get", "update")
            run("apt-get", "install", "-y", "--no-install-recommends", "debootstrap")
        shutil.rmtree(ROOT, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--keyring={kernels.KEYRING}", SUITE, ROOT,
            kernels.mirror())
        # No package may start a daemon.
        policy = ROOT / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        inside("apt-get", "update")
        inside("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
        inside("apt-get", "clean")
        done.touch()
    (ROOT / "etc/libvirt/qemu.conf").write_text(QEMU_CONF)
    (ROOT / "etc/libvirt/libvirtd.conf").write_text(LIBVIRTD_CONF)
    versions = inside("dpkg-query", "-W", "-f", "${source:Package} ${source:Version}\n",
                      "libvirt-daemon-driver-qemu", "qemu-system-x86").split()
    return dict(zip(versions[::2], versions[1::2]))


def inside(*command):
    return run("chroot", ROOT, *command, env=ENVIRONMENT)


class Daemon:
    """libvirtd, and with it every guest it starts; ended with the block."""

    def __enter__(self):
        self.log = open(LAB / "libvirtd.log", "w")
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", START, "sh",
             ROOT, LAB], stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL)
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
        raise SystemExit(f"libvirtd did not start: {last}\n{(LAB / 'libvirtd.log').read_text()}")

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

    def virsh(self, *arguments, text=None):
        # Through /proc: the daemon's /run is its own.
        root = Path(f"/proc/{self.first_process()}/root")
        if not (root / "lab-done").exists():
            raise Refused("it is not running")
        done = subprocess.run(
            ["chroot", root, "virsh", "--quiet", "-c", "qemu:///system", *map(str, arguments)],
            input=text, capture_output=True, text=True, env=ENVIRONMENT)
        if done.returncode:
            raise Refused(f"virsh {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


def domain_xml(name, spec, folder, console):
    """A guest as libvirt's users describe it, with the lab's disks and console."""
    kernel = spec["kernel"]
    mib = spec["mem"]
    more, cells = "", ""
    if spec.get("cells"):
        each = mib // spec["cells"]
        cells = "".join(f"<cell id='{i}' cpus='{i}' memory='{each}' unit='MiB'/>"
                        for i in range(spec["cells"]))
        cells = f"<numa>{cells}</numa>"
    if spec.get("slots"):
        more = f"<maxMemory slots='4' unit='MiB'>{2 * mib + 1024}</maxMemory>"
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{folder / disk}'/><target dev='vd{'ab'[i]}' bus='virtio'/></disk>"
        for i, disk in enumerate(DISKS))
    return f"""<domain type='qemu'>
<name>{name}</name>
{more}
<memory unit='MiB'>{mib}</memory>
<vcpu>{max(spec['smp'], spec.get('cells', 1))}</vcpu>
<os><type arch='x86_64' machine='{spec['machine']}'>hvm</type>
<kernel>{LAB / kernel['vmlinuz']}</kernel>
<initrd>{machine.build_initramfs(kernel)}</initrd>
<cmdline>{spec['cmdline']}</cmdline></os>
<features><acpi/><apic/></features>
<cpu mode='custom' match='exact' check='none'><model>{spec['cpu']}</model>{cells}</cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
{disks}
<serial type='unix'><source mode='bind' path='{console}'/><target port='0'/></serial>
</devices></domain>
"""


class Guest(machine.Machine):
    """A domain of libvirt's, with the console of a lab guest."""

    def __init__(self, daemon, name, folder):
        # Nothing of `Machine.__init__`: libvirt starts QEMU.
        self.daemon, self.name, self.folder = daemon, name, folder
        self.process = daemon.process
        self.lines = []
        self.arrived = threading.Condition()
        self.console = None

    def listen(self):
        """Connects to the console of the domain, which was just started or restored."""
        self.lines = []
        with tempfile.TemporaryDirectory(prefix="sonicshot-") as short:
            # The names of sockets must be short.
            link = Path(short) / "s"
            link.symlink_to(self.folder)
            self.console = socket.socket(socket.AF_UNIX)
            self.console.connect(str(link / "console"))
        threading.Thread(target=self._listen, daemon=True).start()
