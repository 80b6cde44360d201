#!/usr/bin/env python3
"""A paravirtual guest under a real Xen: saved by `xl save`, pruned, restored by `xl restore`.

Xen, its tools and the kernels are Debian's packages, unpacked into a folder of the lab. Xen runs in
QEMU without KVM; dom0 is an initramfs that does its steps by itself. Images go in and out by disks.

    xen.py [--sonicshot BINARY] [--memory MIB] [--kernel SERIES] [--append WORDS] [--keep DIR]
"""

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kernels
from kernels import LAB, ROOT, Apt, run

HOME = LAB / "xen-4.17"
PACKAGES = """xen-hypervisor-4.17-amd64 xen-utils-4.17 xen-utils-common xenstore-utils libxenmisc4.17
libxenstore4 libxentoollog1 libxenevtchn1 libxencall1 libxenforeignmemory1 libxendevicemodel1
libxengnttab1 libxentoolcore1 libxenhypfs1 libyajl2 libnl-3-200 libnl-route-3-200 libaio1 libfdt1
libuuid1 libc6 libgcc-s1 zlib1g liblzma5 libzstd1 libbz2-1.0 liblzo2-2 libtinfo6 libncurses6
busybox-static""".split()
MODULES = ["xenfs", "xen-evtchn", "xen-privcmd", "xen-gntdev", "xen-gntalloc", "virtio_pci",
           "virtio_blk"]
TOOLS = ["xl", "libxl-save-helper", "xenstored", "xenconsoled", "xen-init-dom0", "xenconsole"]
DISK_MIB = 1024

# Steps are told apart by lines that begin with LAB.
DOM0 = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/lib/xen-4.17/bin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run/xen /run/xenstored /var/lib/xen /var/lock /var/log/xen/console /tmp
mkdir -p /etc/xen
touch /etc/xen/xl.conf
ln -s /run /var/run
mount -t devpts devpts /dev/pts
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t xenfs xenfs /proc/xen
fail() { echo "LAB-FAIL $*"; tail -n 20 /var/log/xen/*.log /var/log/xen/console/*.log; poweroff -f; }
now() { cut -d' ' -f1 /proc/uptime; }
log=/var/log/xen/console/guest-lab.log
# Waits for a line of the guest that begins with $1.
guest() {
    for i in $(seq 240); do
        grep -qs "$1" $log && return
        sleep 0.5
    done
    fail "the guest did not say $1"
}
xenstored || fail xenstored
for i in $(seq 100); do [ -S /run/xenstored/socket ] && break; sleep 0.1; done
xen-init-dom0 || fail xen-init-dom0
xenconsoled --log=all --log-dir=/var/log/xen/console || fail xenconsoled
sleep 1
pidof xenconsoled > /dev/null || fail "xenconsoled ended"
echo "LAB dom0 $(now)"
a=$(now); xl create /lab.cfg || fail create; b=$(now)
echo "LAB created $a $b"
guest READY
echo "LAB ready $(now)"
a=$(now); xl save lab /tmp/full || fail save; b=$(now)
echo "LAB saved $a $b"
size=$(stat -c %s /tmp/full)
dd if=/tmp/full of=/dev/vda bs=1M 2>/dev/null
sync
echo "LAB image $size"
a=$(now); xl restore /tmp/full || fail restore; b=$(now)
echo "LAB restored-full $a $b"
xl destroy lab
rm /tmp/full
while :; do
    blockdev --flushbufs /dev/vdc
    size=$(head -c 64 /dev/vdc | sed -n 's/^GO //p')
    [ -n "$size" ] && break
    sleep 0.5
done
head -c $size /dev/vdb > /tmp/pruned
a=$(now); xl restore /tmp/pruned || fail "restore of the pruned image"; b=$(now)
echo "LAB restored-pruned $a $b"
tty=$(xenstore-read /local/domain/$(xl domid lab)/console/tty)
echo torture > $tty
guest TORTURE-
grep TORTURE- $log | sed 's/^/LAB /'
a=$(now); xl save lab /tmp/again || fail "save of the pruned guest"; b=$(now)
echo "LAB saved-again $a $b $(stat -c %s /tmp/again)"
dd if=/tmp/again of=/dev/vda bs=1M 2>/dev/null
sync
echo "LAB done"
poweroff -f
"""


def install():
    """Unpacks the packages; returns the folder and dom0's kernel's release."""
    done = HOME / "release"
    root = HOME / "root"
    if done.exists():
        return root, done.read_text()
    apt = Apt("bookworm", LAB)
    apt.update()
    shutil.rmtree(HOME, ignore_errors=True)
    image = next(p for p in apt.depends("linux-image-amd64") if p.startswith("linux-image-"))
    for package in [*PACKAGES, image]:
        apt.download(package, HOME / "debs")
    for deb in (HOME / "debs").glob("*.deb"):
        run("dpkg", "-x", deb, root)
    shutil.rmtree(HOME / "debs")
    done.write_text(image.removeprefix("linux-image-"))
    return root, done.read_text()


def libraries(root, programs):
    """The libraries that programs of the folder need, by the folder's own loader."""
    folders = [root / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu",
               root / "usr/lib/xen-4.17/lib/x86_64-linux-gnu"]
    path = ":".join(map(str, folders))
    loader = next(folder / "ld-linux-x86-64.so.2" for folder in folders
                  if (folder / "ld-linux-x86-64.so.2").exists())
    found = {}
    for program in programs:
        text = run(loader, "--library-path", path, "--list", program)
        # The loader itself is listed by an absolute path, and must not be copied to that.
        for name, file in re.findall(r"^\s*([^/\s]+) => (/\S+)", text, re.M):
            if root not in Path(file).parents:
                raise SystemExit(f"{program.name} wants {name}, which is not in the packages")
            found[name] = Path(file)
    # glibc opens it by name when a thread ends.
    found["libgcc_s.so.1"] = next(root.rglob("libgcc_s.so.1"))
    return loader, found


def archive(tree, into):
    with open(into, "wb") as out:
        names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*"))) + "\n"
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(),
                       stdout=out, check=True)


def build_guest(work):
    tree = work / "guest"
    for name in ("dev", "proc", "sys", "shm", "files"):
        (tree / name).mkdir(parents=True)
    run("gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", tree / "init",
        Path(__file__).with_name("xenguest.c"))
    archive(tree, work / "guest.cpio")
    return work / "guest.cpio"


def build_dom0(root, release, work, kernel, memory, append):
    tree = work / "dom0"
    tools = tree / "usr/lib/xen-4.17/bin"
    for folder in (tools, tree / "bin", tree / "lib", tree / "lib64", tree / "modules",
                   *(tree / name for name in ("dev", "proc", "sys"))):
        folder.mkdir(parents=True)
    programs = [root / "usr/lib/xen-4.17/bin" / tool for tool in TOOLS]
    programs.append(root / "usr/bin/xenstore-read")
    for program in programs:
        shutil.copy(program, tools)
    loader, needed = libraries(root, programs)
    shutil.copy(loader, tree / "lib64/ld-linux-x86-64.so.2")
    for name, file in needed.items():
        shutil.copy(file, tree / "lib" / name)
    shutil.copy(root / "bin/busybox", tree / "bin/busybox")
    order = kernels.collect_modules(root, release, tree / "modules", MODULES)
    (tree / "modules/order").write_text("".join(f"{name}.ko\n" for name in order))
    shutil.copy(LAB / kernel["vmlinuz"], tree / "vmlinuz")
    shutil.copy(build_guest(work), tree / "guest.cpio")
    (tree / "lab.cfg").write_text(
        f'name="lab"\ntype="pv"\nmemory={memory}\nvcpus=1\nkernel="/vmlinuz"\n'
        f'ramdisk="/guest.cpio"\nextra="console=hvc0 {append}"\non_crash="preserve"\n')
    (tree / "init").write_text(DOM0)
    (tree / "init").chmod(0o755)
    archive(tree, work / "dom0.cpio")
    return work / "dom0.cpio"


class Xen:
    """QEMU with Xen in it, and what dom0 says."""

    def __init__(self, root, release, work, dom0):
        self.log = work / "console.log"
        with gzip.open(root / "boot/xen-4.17-amd64.gz") as packed:
            (work / "xen.elf").write_bytes(packed.read())
        self.disks = [work / name for name in ("out", "in", "go")]
        for disk, mib in zip(self.disks, (DISK_MIB, DISK_MIB, 1)):
            with open(disk, "wb") as file:
                file.truncate(mib << 20)
        command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "3G", "-smp", "2",
                   "-display", "none", "-monitor", "none", "-no-reboot",
                   "-serial", f"file:{self.log}", "-kernel", str(work / "xen.elf"), "-append",
                   "console=com1 com1=115200,8n1 dom0_mem=1536M,max:1536M dom0_max_vcpus=1 noreboot",
                   "-initrd", f"{root}/boot/vmlinuz-{release} console=hvc0 quiet,{dom0}"]
        for disk in self.disks:
            command += ["-drive", f"file={disk},format=raw,if=virtio"]
        self.qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def wait(self, word, seconds):
        """The line that dom0 says with this word."""
        end = time.time() + seconds
        while time.time() < end:
            text = self.log.read_text(errors="replace") if self.log.exists() else ""
            found = re.search(rf"LAB {word}(.*)", text)
            if found:
                return found.group(1).split()
            if "LAB-FAIL" in text or self.qemu.poll() is not None:
                break
            time.sleep(0.3)
        raise SystemExit(f"Xen: no `{word}`:\n{text[-3000:]}")

    def image(self, size, into):
        with open(self.disks[0], "rb") as disk, open(into, "wb") as out:
            out.write(disk.read(size))

    def give(self, image):
        shutil.copyfile(image, self.disks[1])
        with open(self.disks[1], "r+b") as disk:
            disk.truncate(DISK_MIB << 20)
        with open(self.disks[2], "r+b") as disk:
            disk.write(f"GO {image.stat().st_size}\n".encode())

    def stop(self):
        if self.qemu.poll() is None:
            self.qemu.kill()
        self.qemu.wait()


def check(root, image):
    """Xen's own checker of streams."""
    tools = root / "usr/lib/xen-4.17"
    run(sys.executable, tools / "bin/verify-stream-v2", "--in", image, "--format", "xl",
        env={**os.environ, "PYTHONPATH": str(tools / "lib/python")})


def took(times):
    return float(times[1]) - float(times[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sonicshot", default=ROOT / "target/release/sonicshot", type=Path)
    parser.add_argument("--memory", default=256, type=int, help="of the guest, in MiB")
    parser.add_argument("--kernel", default="6.1", help="the guest's")
    parser.add_argument("--append", default="", help="to the guest's command line")
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    args = parser.parse_args()
    kernels.install_tools()
    root, release = install()
    kernel = kernels.fetch(args.kernel, False)
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    xen = None
    try:
        dom0 = build_dom0(root, release, work, kernel, args.memory, args.append)
        xen = Xen(root, release, work, dom0)
        xen.wait("ready", 300)
        saved = took(xen.wait("saved", 120))
        full, pruned, again = (work / name for name in ("full.xl", "pruned.xl", "again.xl"))
        xen.image(int(xen.wait("image", 120)[0]), full)
        check(root, full)
        print(run(args.sonicshot, "inspect", full))
        report = json.loads(run(args.sonicshot, "prune", full, "-o", pruned, "--json"))
        check(root, pruned)
        full_restore = took(xen.wait("restored-full", 120))
        xen.give(pruned)
        pruned_restore = took(xen.wait("restored-pruned", 120))
        torture = xen.wait("TORTURE-", 300)
        times = xen.wait("saved-again", 120)
        xen.wait("done", 120)
        xen.image(int(times[2]), again)
        check(root, again)
        run(args.sonicshot, "inspect", again)
        print(f"Linux {kernel['release']}, {args.memory} MiB, PV: saved in {saved:.1f} s; "
              f"{full.stat().st_size / 1e6:.0f} -> {pruned.stat().st_size / 1e6:.0f} MB "
              f"({report['dropped_bytes'] >> 12} pages, {report['seconds']:.2f} s); restored in "
              f"{full_restore:.1f} -> {pruned_restore:.1f} s; torture {torture[0]}")
        if torture[0] != "OK":
            raise SystemExit("the guest does not run on")
    finally:
        if xen:
            xen.stop()
        if args.keep and work.exists():
            args.keep.mkdir(parents=True, exist_ok=True)
            for file in (*work.glob("*.xl"), *work.glob("*.log")):
                shutil.move(file, args.keep / file.name)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
