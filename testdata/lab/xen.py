"""A real Xen: Debian's hypervisor, tools and kernels in QEMU, with a dom0 that does what it is told.

Everything is unpacked from packages into a folder of the lab. dom0 is an initramfs with Xen's tools,
the `sonicshot` to be tried, and one paravirtual guest. Images lie on a disk of its own that QEMU
opens without the host's page cache, so that reading and writing them costs what a disk costs."""

import gzip
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import kernels
from debian import Apt
from errors import CommandFailed, GuestFailed
from host import LAB, Json, pack, run
from kernels import Kernel
from tool import report_of

HOME = LAB / "xen-4.17"
PACKAGES = """xen-hypervisor-4.17-amd64 xen-utils-4.17 xen-utils-common xenstore-utils libxenmisc4.17
libxenstore4 libxentoollog1 libxenevtchn1 libxencall1 libxenforeignmemory1 libxendevicemodel1
libxengnttab1 libxentoolcore1 libxenhypfs1 libyajl2 libnl-3-200 libnl-route-3-200 libaio1 libfdt1
libuuid1 libc6 libgcc-s1 zlib1g liblzma5 libzstd1 libbz2-1.0 liblzo2-2 libtinfo6 libncurses6
busybox-static""".split()
MODULES = ["xenfs", "xen-evtchn", "xen-privcmd", "xen-gntdev", "xen-gntalloc", "virtio_pci",
           "virtio_blk", "ext4", "loop", "xen-blkback"]
TOOLS = ["xl", "libxl-save-helper", "xenstored", "xenconsoled", "xen-init-dom0", "xenconsole"]
# What a guest with a disk has beside its kernel.
GUEST_MODULES = ["xen-blkfront"]
# What `sonicshot` opens by name when it runs.
OPENED = ["libxenctrl.so.4.17", "libxenforeignmemory.so.1"]
# The disks, in order: vda has the images, vdb the orders, vdc files that go in or out.
ORDERS_MIB, FILES_MIB = 1, 2048
DOM0_MIB = 1536
# A guest's disk, for xl: whatever dom0 has attached there.
DISK = "format=raw,backendtype=phy,vdev=xvda,access=rw,target=/dev/loop0"

INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/lib/xen-4.17/bin LD_LIBRARY_PATH=/lib
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run/xen /run/xenstored /var/lib/xen /var/lock /var/log/xen/console /tmp
mkdir -p /etc/xen /images
touch /etc/xen/xl.conf
ln -s /run /var/run
mount -t devpts devpts /dev/pts
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t xenfs xenfs /proc/xen
fail() { echo "LAB-FAIL $*"; tail -n 20 /var/log/xen/*.log /var/log/xen/console/*.log; poweroff -f; }
mount -t ext4 /dev/vda /images || fail "the disk of the images"
xenstored || fail xenstored
for i in $(seq 100); do [ -S /run/xenstored/socket ] && break; sleep 0.1; done
xen-init-dom0 || fail xen-init-dom0
xenconsoled --log=all --log-dir=/var/log/xen/console || fail xenconsoled
sleep 1
pidof xenconsoled > /dev/null || fail "xenconsoled ended"
echo "LAB-END 0"
# What xl calls for a disk: Debian's wants bash and more. Of a block device xen-blkback needs the number.
mkdir -p /etc/xen/scripts
cat > /etc/xen/scripts/block << 'END'
#!/bin/busybox sh
[ "$1" = add ] || exit 0
device=$(xenstore-read $XENBUS_PATH/params)
xenstore-write $XENBUS_PATH/physical-device $(stat -L -c %t:%T $device)
xenstore-write $XENBUS_PATH/hotplug-status connected
END
chmod 755 /etc/xen/scripts/block
# Orders: a number in the first sector, then a script.
done=0
while :; do
    blockdev --flushbufs /dev/vdb
    next=$(head -c 16 /dev/vdb | sed -n 's/^GO \([0-9]*\).*/\1/p')
    if [ -n "$next" ] && [ "$next" != $done ]; then
        done=$next
        dd if=/dev/vdb bs=512 skip=1 count=64 2>/dev/null | tr -d '\000' > /tmp/order
        # A tool that crashed is told of by the kernel.
        (trap '[ $? = 0 ] || dmesg | tail -n 3' EXIT
         set -e; . /order.sh; . /tmp/order; echo DONE) < /dev/null 2>&1 | sed "s/^/LAB $done /"
        echo "LAB-END $done"
    fi
    sleep 0.2
done
"""

# What every order can use.
ORDER = r"""
log=/var/log/xen/console/guest-lab.log
now() { cut -d' ' -f1 /proc/uptime; }
cold() { sync; echo 3 > /proc/sys/vm/drop_caches; }
# TIME name from to: a command that begins with nothing cached and ends with all on the disk.
timed() {
    name=$1; shift
    cold
    from=$(now); "$@"; sync
    echo "TIME $name $from $(now)"
}
size() { echo "SIZE $1 $(stat -c %s $2)"; }
lines() { grep -c "$1" $log || true; }
# Waits for one more line of the guest that begins with $1 than the $2 that there are.
guest() {
    for i in $(seq 1800); do
        [ $(lines "^$1") -gt $2 ] && return 0
        sleep 0.5
    done
    echo "the guest did not say $1"; tail -n 5 $log; return 1
}
ask() {
    had=$(lines "^$2")
    echo $1 > $(xenstore-read /local/domain/$(xl domid lab)/console/tty)
    guest $2 $had
    grep "^$2" $log | tail -n 1
}
memory() { xl list lab | tail -n 1 | awk '{print "MEMORY", $3}'; }
"""


@dataclass(frozen=True)
class XenGuest:
    """A paravirtual guest; its memory in MiB, and what is added to its command line."""

    kernel: Kernel
    memory: int
    append: str = ""
    vcpus: int = 1
    # Of the image that it is given as its disk; 0 if it has none. dom0 has room for four.
    disk: int = 0


def install() -> tuple[Path, str]:
    """Unpacks the packages; returns the folder and dom0's kernel's release."""
    done = HOME / "release"
    root = HOME / "root"
    if done.exists():
        return root, done.read_text()
    apt = Apt("bookworm")
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


def libraries(root: Path, programs: Sequence[Path]) -> tuple[Path, dict[str, Path]]:
    """The libraries that programs need, all of them of the folder, and its loader."""
    folders = [root / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu",
               root / "usr/lib/xen-4.17/lib/x86_64-linux-gnu"]
    path = ":".join(map(str, folders))
    loader = next(folder / "ld-linux-x86-64.so.2" for folder in folders
                  if (folder / "ld-linux-x86-64.so.2").exists())
    found = {}
    for program in programs:
        text = run(loader, "--library-path", path, "--list", program)
        # The loader itself is listed by an absolute path, and must not be copied to that.
        for name, place in re.findall(r"^\s*([^/\s]+) => (/\S+)", text, re.M):
            file = Path(place)
            if root not in file.parents:
                raise CommandFailed(f"{program.name} wants {name}, which is not in the packages")
            found[name] = file
    # glibc opens it by name when a thread ends.
    found["libgcc_s.so.1"] = next(root.rglob("libgcc_s.so.1"))
    return loader, found


def guest_modules(kernel: Kernel) -> Path:
    """A folder with the modules of a guest with a disk, and the order in which they load. Packages of
    which the lab's other guests have no need are unpacked once more for them."""
    home = LAB / "xen-guest" / kernel.release
    if not home.exists():
        work = home.with_name("unpack")
        apt = Apt(kernels.SUITES[kernel.series.partition("-")[0]])
        kernels.unpack(apt, list(kernel.packages), work, work / "root")
        part = home.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        order = kernels.collect_modules(work / "root", kernel.release, part, GUEST_MODULES)
        (part / "order").write_text("".join(f"{name}.ko\n" for name in order))
        shutil.rmtree(work)
        part.rename(home)
    return home


def build_guest(work: Path, guest: XenGuest) -> Path:
    tree = work / "guest"
    for name in ("dev", "proc", "sys", "shm", "files"):
        (tree / name).mkdir(parents=True)
    run("gcc", "-O2", "-static", "-Wall", "-Wextra", "-o", tree / "init",
        Path(__file__).with_name("xenguest.c"))
    if guest.disk:
        shutil.copytree(guest_modules(guest.kernel), tree / "modules")
    pack(tree, work / "guest.cpio")
    return work / "guest.cpio"


def build_dom0(root: Path, release: str, work: Path, tool: Path, guest: XenGuest) -> Path:
    """dom0's initramfs: Xen's tools, `tool`, and the guest."""
    tree = work / "dom0"
    tools = tree / "usr/lib/xen-4.17/bin"
    for folder in (tools, tree / "bin", tree / "lib", tree / "lib64", tree / "modules",
                   *(tree / name for name in ("dev", "proc", "sys"))):
        folder.mkdir(parents=True)
    opened = [next(root.rglob(name)) for name in OPENED]
    programs = [root / "usr/lib/xen-4.17/bin" / name for name in TOOLS]
    programs += [root / "usr/bin" / name for name in ("xenstore-read", "xenstore-write")]
    for program in programs:
        shutil.copy(program, tools)
    shutil.copy(tool, tools / "sonicshot")
    programs.append(tool)
    loader, needed = libraries(root, [*programs, *opened])
    shutil.copy(loader, tree / "lib64/ld-linux-x86-64.so.2")
    for name, file in [*needed.items(), *((file.name, file) for file in opened)]:
        shutil.copy(file, tree / "lib" / name)
    shutil.copy(root / "bin/busybox", tree / "bin/busybox")
    order = kernels.collect_modules(root, release, tree / "modules", MODULES)
    (tree / "modules/order").write_text("".join(f"{name}.ko\n" for name in order))
    shutil.copy(guest.kernel.image, tree / "vmlinuz")
    shutil.copy(build_guest(work, guest), tree / "guest.cpio")
    disk = ("lab.disk=1 ", f'disk=["{DISK}"]\n') if guest.disk else ("", "")
    (tree / "lab.cfg").write_text(
        f'name="lab"\ntype="pv"\nmemory={guest.memory}\nvcpus={guest.vcpus}\n'
        f'kernel="/vmlinuz"\nramdisk="/guest.cpio"\n'
        f'extra="console=hvc0 {disk[0]}{guest.append}"\n{disk[1]}on_crash="preserve"\n')
    (tree / "order.sh").write_text(ORDER)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    pack(tree, work / "dom0.cpio")
    return work / "dom0.cpio"


def cache_of(disk: Path) -> str:
    """How QEMU opens a disk: without the host's page cache, if the host's file system can."""
    try:
        os.close(os.open(disk, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return "writethrough"
    return "none"


class Dom0:
    """QEMU with Xen and dom0 in it; to be used by `with`."""

    def __init__(self, work: Path, tool: Path, guest: XenGuest) -> None:
        root, release = install()
        self.root, self.orders = root, 0
        dom0 = build_dom0(root, release, work, tool, guest)
        self.log = work / "console.log"
        with gzip.open(root / "boot/xen-4.17-amd64.gz") as packed:
            (work / "xen.elf").write_bytes(packed.read())
        # The images of the whole guest, full and pruned, and of its disk.
        sizes = {"images": 2 * guest.memory + 512 + 4 * guest.disk, "orders": ORDERS_MIB,
                 "files": FILES_MIB}
        self.disks = {name: work / name for name in sizes}
        for name, mib in sizes.items():
            with open(self.disks[name], "wb") as file:
                file.truncate(mib << 20)
        run("mkfs.ext4", "-q", "-F", self.disks["images"])
        command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2",
                   "-m", f"{guest.memory + DOM0_MIB + 768}M",
                   "-display", "none", "-monitor", "none", "-no-reboot",
                   "-serial", f"file:{self.log}", "-kernel", str(work / "xen.elf"), "-append",
                   f"console=com1 com1=115200,8n1 dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M "
                   "dom0_max_vcpus=1 noreboot",
                   "-initrd", f"{root}/boot/vmlinuz-{release} console=hvc0 quiet,{dom0}"]
        self.cache = cache_of(self.disks["images"])
        for name, disk in self.disks.items():
            cache = self.cache if name == "images" else "writeback"
            command += ["-drive", f"file={disk},format=raw,if=virtio,cache={cache}"]
        self.qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.answer(0, 300)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.qemu.poll() is None:
            self.qemu.kill()
        self.qemu.wait()

    def answer(self, number: int, seconds: float) -> list[str]:
        """What dom0 says of an order, once it is done."""
        end, text = time.time() + seconds, ""
        while time.time() < end:
            text = self.log.read_text(errors="replace") if self.log.exists() else ""
            if re.search(rf"LAB-END {number}\s*$", text, re.M):
                return re.findall(rf"LAB {number} (.*?)\r?$", text, re.M)
            if "LAB-FAIL" in text or self.qemu.poll() is not None:
                break
            time.sleep(0.2)
        raise GuestFailed(f"Xen: order {number} came to no end:\n{text[-3000:]}")

    def order(self, script: str, seconds: float = 900) -> "Answer":
        """Has dom0 run a script. Its lines; times by name in seconds, sizes by name in bytes."""
        self.orders += 1
        with open(self.disks["orders"], "r+b") as disk:
            disk.seek(512)
            disk.write(script.encode().ljust(64 * 512, b"\0"))
            disk.seek(0)
            disk.write(f"GO {self.orders} ".encode())
        lines = self.answer(self.orders, seconds)
        if not lines or lines[-1] != "DONE":
            raise GuestFailed("Xen: an order failed:\n" + "\n".join([script, "---", *lines[-40:]]))
        return Answer(lines)

    def take(self, path: str, into: Path) -> Path:
        """Copies an image out of dom0."""
        done = self.order(f"size taken {path}\ndd if={path} of=/dev/vdc bs=1M 2>/dev/null\nsync")
        with open(self.disks["files"], "rb") as disk, open(into, "wb") as out:
            left = done.sizes["taken"]
            while left:
                piece = disk.read(min(left, 1 << 24))
                out.write(piece)
                left -= len(piece)
        return into

    def give(self, file: Path, path: str) -> None:
        """Copies a file into dom0."""
        with open(file, "rb") as source, open(self.disks["files"], "r+b") as disk:
            shutil.copyfileobj(source, disk, 1 << 24)
        self.order(f"blockdev --flushbufs /dev/vdc\n"
                   f"head -c {file.stat().st_size} /dev/vdc > {path}\nsync")

    def check(self, image: Path) -> None:
        """Xen's own checker of streams."""
        tools = self.root / "usr/lib/xen-4.17"
        run(sys.executable, tools / "bin/verify-stream-v2", "--in", image, "--format", "xl",
            env={**os.environ, "PYTHONPATH": str(tools / "lib/python")})


class Answer:
    """What dom0 said."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        words = [line.split() for line in lines]
        self.times = {w[1]: float(w[3]) - float(w[2]) for w in words if w[:1] == ["TIME"]}
        self.sizes = {w[1]: int(w[2]) for w in words if w[:1] == ["SIZE"]}

    def word(self, name: str) -> str:
        """The word behind `name` at the beginning of a line, the last time that it comes."""
        found = [line.split()[1] for line in self.lines if line.startswith(name + " ")]
        if not found:
            raise GuestFailed(f"Xen: no {name} in:\n" + "\n".join(self.lines[-20:]))
        return found[-1]

    def json(self) -> Json:
        """The last line that is JSON."""
        return report_of([line for line in self.lines if line.startswith("{")][-1])
