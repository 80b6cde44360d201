"""Peers to measure against: makedumpfile of Debian's newest, run from a folder with its own libc."""

import statistics
import struct
import subprocess
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import captures
import kernels
from command import command
from debian import Apt, install_tools
from errors import CommandFailed
from host import LAB, Word, attempt, read_through, run
from spec import GuestSpec
from tool import find_tool, tool_argument

PACKAGES = ["makedumpfile", "libc6", "libelf1t64", "libdw1t64", "liblzo2-2", "libsnappy1v5",
            "zlib1g", "libzstd1", "libbz2-1.0", "liblzma5", "libstdc++6", "libgcc-s1"]
# Where x86-64 kernels without KASLR map all memory, by levels of the page table.
DIRECT_MAP = {4: 0xFFFF888000000000, 5: 0xFF11000000000000}


def makedumpfile() -> list[str]:
    """The command, as a list; downloaded and unpacked when it is missing."""
    root = LAB / "makedumpfile"
    if not (root / "done").exists():
        apt = Apt("sid")
        apt.update()
        packages = root / "packages"
        for package in PACKAGES:
            apt.download(package, packages)
        for deb in packages.glob("*.deb"):
            run("dpkg", "-x", deb, root)
        (root / "done").touch()
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = next(p for p in [root / "usr/lib64/ld-linux-x86-64.so.2",
                              libraries / "ld-linux-x86-64.so.2",
                              root / "lib64/ld-linux-x86-64.so.2"] if p.exists())
    program = next(p for p in [root / "usr/bin/makedumpfile", root / "usr/sbin/makedumpfile",
                               root / "bin/makedumpfile"] if p.exists())
    return [str(loader), "--library-path", str(libraries), str(program)]


def version(peer: Sequence[str]) -> str:
    """As makedumpfile has it."""
    return attempt(*peer, "-v").stdout.split("\n")[0]


def vmcore(ram: Path, vmcoreinfo: bytes, out: Path, levels: int = 4) -> None:
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


def vmcoreinfo(capture: Path, sonicshot: Path) -> bytes:
    """The guest kernel's VMCOREINFO, as a checkpoint carries it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        scratch = Path(shm)
        checkpoint, text = scratch / "first.sonic", scratch / "vmcoreinfo"
        timed([sonicshot, "save", capture / "ram.raw", "-o", checkpoint])
        timed([sonicshot, "restore", checkpoint, "-o", scratch / "raw", "--blob",
               f"vmcoreinfo={text}"])
        return text.read_bytes()


def timed(line: Sequence[Word]) -> float:
    """The seconds that a command took."""
    begin = time.monotonic()
    done = subprocess.run([str(word) for word in line], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CommandFailed(f"{line} failed:\n{done.stdout[-2000:]}")
    return time.monotonic() - begin


def compare(capture: Path, sonicshot: Path, rounds: int = 5) -> None:
    """One run: sonicshot's save against makedumpfile's, both into memory, caches warm."""
    peer = makedumpfile()
    name = version(peer)
    ram = capture / "ram.raw"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        core = capture / "vmcore"
        if not core.exists():
            vmcore(ram, vmcoreinfo(capture, sonicshot), core)
        for file in (ram, core):
            read_through(file)
        works: dict[str, Callable[[Path], list[Word]]] = {
            "sonicshot save, zstd": lambda out: [sonicshot, "save", ram, "-o", out],
            "sonicshot save, lz4": lambda out: [sonicshot, "save", ram, "-o", out,
                                                "--compress", "lz4"],
            f"{name} -d 17 -z": lambda out: [*peer, "-d", "17", "-z", core, out],
            f"{name} -d 17 -l": lambda out: [*peer, "-d", "17", "-l", core, out],
        }
        times: dict[str, list[float]] = {work: [] for work in works}
        sizes: dict[str, int] = {}
        for _ in range(rounds):
            for work, line in works.items():
                out = Path(shm) / "out"
                out.unlink(missing_ok=True)
                times[work].append(timed(line(out)))
                sizes[work] = out.stat().st_size
    for work in works:
        print(f"{work:<40} {sizes[work] / 1e6:8.1f} MB  {statistics.median(times[work]):6.2f} s")


def compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--mem", type=int, default=4096, help="MiB")
    tool_argument(parser)


@command("compare", "checkpoints against makedumpfile", compare_arguments)
def do_compare(args: Namespace) -> None:
    """Sizes and times of checkpoints beside makedumpfile's, of the same guest in one run."""
    install_tools()
    spec = GuestSpec(kernels.fetch(args.kernel), mem=args.mem, append="nokaslr", forms=("raw",))
    folder = captures.capture(spec, f"compare-{args.kernel}-{args.mem}")
    compare(folder, find_tool(args.sonicshot))
