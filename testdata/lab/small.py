"""Kernels that tell little of themselves: those of sandboxes, without types, some without symbols.

libkrunfw's packages of PyPI and Debian hold a kernel's image in a shared library. As an ELF file with
the kernel's own PVH entry it boots in QEMU's microvm, from a root disk with the guest's program."""

import ctypes
import json
import re
import shutil
import struct
import sys
import zipfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

import kernels
import proof
from captures import HOME, Meta, capture, restore
from command import command
from debian import Apt, install_tools
from errors import AlreadyTold, CheckFailed, LabError
from frames import DROPPED, same_but_dropped
from host import LAB, Word, allocated, run
from kernels import Kernel
from spec import GuestSpec
from stress import Pruner, stress
from tool import find_tool, tool_argument


class Wheel(NamedTuple):
    """A package of PyPI, and the file in it that is the library or contains it."""

    package: str
    version: str
    library: str


WHEELS = {
    "microsandbox": Wheel("microsandbox", "0.7.11", "microsandbox/_bundled/lib/libkrunfw.so.5*"),
    "boxlite": Wheel("boxlite", "0.10.8", "boxlite/boxlite.*.so"),
    "smolmachines": Wheel("smolmachines", "1.32.2", "smol/libkrunfw.so.5"),
}
# Of Debian's sid.
DEBIAN = "libkrunfw5"
ALL = [*WHEELS, "libkrunfw"]
XEN_ELFNOTE_PHYS32_ENTRY = 18


def fetch(name: str) -> Kernel:
    """Takes a kernel out of its package; returns its record."""
    home = kernels.home_of(f"small-{name}")
    record = home / "meta.json"
    if record.exists():
        return Kernel.from_json(json.loads(record.read_text()))
    work = home / "unpack"
    root = work / "root"
    if name in WHEELS:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        package, version, pattern = WHEELS[name]
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "-d", work, f"{package}=={version}")
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            wheel.extractall(root)
        versions = {package: version}
    else:
        apt = Apt("sid")
        apt.update()
        versions = kernels.unpack(apt, [DEBIAN], work, root)
        pattern = "**/libkrunfw.so*"
    library = max((p for p in root.glob(pattern) if p.is_file()), key=kernels.size_of)
    bundle = bundle_of(library, work)
    found = re.search(rb"Linux version (\S+)", bundle.image)
    if not found:
        raise LabError(f"{library.name} holds no kernel")
    (home / "vmlinux").write_bytes(pvh_elf(bundle))
    kernel = Kernel(f"small-{name}", found[1].decode(),
                    str((home / "vmlinux").relative_to(LAB)), (), versions)
    shutil.rmtree(work)
    record.write_text(json.dumps(kernel.to_json(), indent=1))
    return kernel


class Bundle(NamedTuple):
    """A kernel's image, and the address that it wants to be at."""

    load: int
    image: bytes


def bundle_of(library: Path, work: Path) -> Bundle:
    """What a libkrunfw holds; it may be inside another library."""
    data = library.read_bytes()
    name = data.find(b"KERNEL_BUNDLE")
    # The last ELF header in front of the name is the library's own.
    start = data.rfind(b"\x7fELF\x02\x01\x01", 0, name)
    if name < 0 or start < 0:
        raise LabError(f"{library.name} is no libkrunfw")
    sections, = struct.unpack_from("<Q", data, start + 0x28)
    each, count = struct.unpack_from("<HH", data, start + 0x3A)
    inner = work / "inner.so"
    inner.write_bytes(data[start:start + sections + each * count])
    loaded = ctypes.CDLL(str(inner))
    load, entry, size = (ctypes.c_size_t() for _ in range(3))
    loaded.krunfw_get_kernel.restype = ctypes.c_void_p
    at = loaded.krunfw_get_kernel(ctypes.byref(load), ctypes.byref(entry), ctypes.byref(size))
    return Bundle(load.value, ctypes.string_at(at, size.value))


def pvh_elf(bundle: Bundle) -> bytes:
    """An ELF file with one segment, and the PVH entry that the kernel's own note names."""
    found = re.search(rb"\x04\0\0\0(\x04|\x08)\0\0\0\x12\0\0\0Xen\0", bundle.image)
    if not found:
        raise LabError("the kernel has no PVH entry")
    entry = int.from_bytes(bundle.image[found.end():found.end() + found[1][0]], "little")
    note = struct.pack("<III4sI", 4, 4, XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", entry)
    header, entries, first = 64, 2 * 56, 4096
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, header, 0, 0,
                      64, 56, 2, 0, 0, 0)
    size = len(bundle.image)
    elf += struct.pack("<IIQQQQQQ", 1, 7, first, bundle.load, bundle.load, size, size, 4096)
    elf += struct.pack("<IIQQQQQQ", 4, 4, header + entries, 0, 0, len(note), len(note), 4)
    return (elf + note).ljust(first, b"\0") + bundle.image


def prove(tool: Path, folder: Path, knowledge: str, torture: bool) -> str:
    """Holds what sonicshot says of a capture against the guest's own kernel, prunes its RAM and
    its mapped-ram file in place, and runs the guest on from each."""
    meta = Meta.read(folder)
    options: list[Word] = ["--layout", "firecracker"] if meta.spec.mem > 3072 else []
    report, runs = proof.inspect(tool, folder / "ram.raw", [], folder / "pfns.tsv", *options)
    if report["kernel_release"] != meta.release or report["knowledge"] != knowledge:
        raise CheckFailed(f"kernel {report['kernel_release']} by {report['knowledge']}")
    agreement = proof.against_kernel(folder, runs, None)
    if agreement.unexplained or agreement.share < 99.9:
        raise CheckFailed(f"{agreement}")
    pruned = folder / "pruned"
    sizes = []
    for form in ("ram.raw", "mapped.ram"):
        run("cp", "--sparse=auto", folder / form, pruned)
        before = allocated(pruned)
        run(tool, "prune", pruned, "--in-place", "--live-ok", "--min-hole", "0", *options)
        sizes.append(f"{before >> 20} -> {allocated(pruned) >> 20} MiB")
        if form == "ram.raw":
            same_but_dropped(folder / form, pruned, runs, meta.layout, DROPPED)
        if torture:
            raw = form == "ram.raw"
            restore(folder, pruned if raw else None, migration=None if raw else pruned)
        pruned.unlink()
    return (f"{agreement.found}/{agreement.kpf_buddy} buddy frames ({agreement.share:.3f} %), "
            f"{agreement.pcp} per-CPU; raw {sizes[0]}, mapped-ram {sizes[1]}"
            + (", torture OK" if torture else ""))


def small_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=",".join(ALL))
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--cpu", default="qemu64")
    parser.add_argument("--append", default="", help="kernel command line")
    parser.add_argument("--knowledge", default="vmcoreinfo", help="what must be known of them")
    parser.add_argument("--no-torture", action="store_true")
    parser.add_argument("--stops", type=int, default=0,
                        help="of a busy guest, whose RAM is pruned under it at each")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("small", "kernels without types: capture, check, prune, restore, torture", small_arguments)
def do_small(args: Namespace) -> None:
    install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for name in args.kernels.split(","):
        spec = GuestSpec(fetch(name), mem=args.mem, cpu=args.cpu, smp=args.smp,
                         machine="microvm", forms=("raw", "mapped"), append=args.append)
        try:
            folder = capture(spec, spec.name)
            said = prove(tool, folder, args.knowledge, not args.no_torture)
            print(f"ok   {spec.name}, Linux {spec.kernel.release}: {said}", flush=True)
            if args.stops:
                seen = Pruner(tool, None)
                stress(spec, spec.name, args.stops, seen.at_stop)
                seen.check()
                print(f"ok   {spec.name}, busy: pruned {seen.pruned} times ({seen.pages} pages), "
                      f"refused {seen.refused} times, {seen.blocks} blocks kept as in question, "
                      "torture OK", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {spec.name}: {error}", flush=True)
        if not args.keep:
            shutil.rmtree(HOME / spec.name, ignore_errors=True)
    if failed:
        raise AlreadyTold
