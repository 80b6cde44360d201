"""Peers to measure against: makedumpfile of Debian's newest, run from a folder with its own libc."""

import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import kernels
from errors import CommandFailed

PACKAGES = ["makedumpfile", "libc6", "libelf1t64", "libdw1t64", "liblzo2-2", "libsnappy1v5",
            "zlib1g", "libzstd1", "libbz2-1.0", "liblzma5", "libstdc++6", "libgcc-s1"]
# Where x86-64 kernels without KASLR map all memory, by levels of the page table.
DIRECT_MAP = {4: 0xFFFF888000000000, 5: 0xFF11000000000000}


def makedumpfile():
    """The command, as a list; downloaded and unpacked when it is missing."""
    root = kernels.LAB / "makedumpfile"
    if not (root / "done").exists():
        apt = kernels.Apt("sid", kernels.LAB)
        apt.update()
        packages = root / "packages"
        for package in PACKAGES:
            apt.download(package, packages)
        for package in packages.glob("*.deb"):
            kernels.run("dpkg", "-x", package, root)
        (root / "done").touch()
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = next(p for p in [root / "usr/lib64/ld-linux-x86-64.so.2",
                              libraries / "ld-linux-x86-64.so.2",
                              root / "lib64/ld-linux-x86-64.so.2"] if p.exists())
    program = next(p for p in [root / "usr/bin/makedumpfile", root / "usr/sbin/makedumpfile",
                               root / "bin/makedumpfile"] if p.exists())
    return [str(loader), "--library-path", str(libraries), str(program)]


def vmcore(ram, vmcoreinfo, out, levels=4):
    """Shapes raw RAM of a `pc` guest without KASLR as /proc/vmcore does."""
    size = ram.stat().st_size
    split = 3 << 30
    ranges = [(0, 0, size)] if size < 0xE0000000 else \
        [(0, 0, split), (1 << 32, split, size - split)]
    note = struct.pack("<III", 11, len(vmcoreinfo), 0) + b"VMCOREINFO\0\0" + vmcoreinfo
    note += b"\0" * (-len(note) % 4)
    start = 16384
    headers = [struct.pack("<IIQQQQQQ", 4, 0, 4096, 0, 0, len(note), len(note), 4)]
    for paddr, offset, length in ranges:
        headers.append(struct.pack("<IIQQQQQQ", 1, 7, start + offset,
                                   DIRECT_MAP[levels] + paddr, paddr, length, length, 4096))
    elf = b"\x7fELF\2\1\1" + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0)
    with open(out, "wb") as file:
        file.write(elf + b"".join(headers))
        file.seek(4096)
        file.write(note)
        file.seek(start)
        with open(ram, "rb") as source:
            while piece := source.read(1 << 24):
                file.write(piece)


def vmcoreinfo(capture, sonicshot):
    """The guest kernel's VMCOREINFO, as a checkpoint carries it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        checkpoint, text = Path(scratch) / "first.sonic", Path(scratch) / "vmcoreinfo"
        timed([sonicshot, "save", capture / "ram.raw", "-o", checkpoint])
        timed([sonicshot, "restore", checkpoint, "-o", Path(scratch) / "raw", "--blob",
               f"vmcoreinfo={text}"])
        return text.read_bytes()


def timed(command):
    begin = time.monotonic()
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CommandFailed(f"{command} failed:\n{done.stdout[-2000:]}")
    return time.monotonic() - begin


def compare(capture, sonicshot, rounds=5):
    """One run: sonicshot's save against makedumpfile's, both into memory, caches warm."""
    peer = makedumpfile()
    version = subprocess.run([*peer, "-v"], capture_output=True, text=True).stdout.split("\n")[0]
    ram = capture / "ram.raw"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        scratch = Path(scratch)
        core = capture / "vmcore"
        if not core.exists():
            vmcore(ram, vmcoreinfo(capture, sonicshot), core)
        for file in [ram, core]:
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
        works = {
            "sonicshot save, zstd": lambda out: [sonicshot, "save", ram, "-o", out],
            "sonicshot save, lz4": lambda out: [sonicshot, "save", ram, "-o", out,
                                                "--compress", "lz4"],
            f"{version} -d 17 -z": lambda out: [*peer, "-d", "17", "-z", core, out],
            f"{version} -d 17 -l": lambda out: [*peer, "-d", "17", "-l", core, out],
        }
        times = {name: [] for name in works}
        sizes = {}
        for _ in range(rounds):
            for name, command in works.items():
                out = scratch / "out"
                out.unlink(missing_ok=True)
                times[name].append(timed(command(out)))
                sizes[name] = out.stat().st_size
        for name in works:
            print(f"{name:<40} {sizes[name] / 1e6:8.1f} MB  {statistics.median(times[name]):6.2f} s")
        return {name: (sizes[name], statistics.median(times[name])) for name in works}
