"""Kernels of sandboxes, which tell little of themselves: without types, some without symbols, some
without VMCOREINFO.

libkrunfw's packages of PyPI and Debian hold a kernel's image in a shared library. As an ELF file with
the kernel's own PVH entry it boots in QEMU's microvm, from a root disk with the guest's program. Those
with the options of Firecracker and Kata are built (`built.py`)."""

import ctypes
import json
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import built
import kernels
from debian import Apt
from errors import LabError
from host import LAB, run
from kernels import Kernel
from spec import GuestSpec


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


def is_sandbox(name: str) -> bool:
    return name in ALL or name in built.CHOICES


def kernel_of(name: str) -> Kernel:
    """A sandbox's kernel, or one of Debian's series."""
    if name in built.CHOICES:
        return built.fetch(name)
    return fetch(name) if name in ALL else kernels.fetch(name)


def guest(name: str, **fields: Any) -> GuestSpec:
    """A guest of a kernel, in the machine that boots it: a sandbox's in microvm."""
    fields.setdefault("machine", "microvm" if is_sandbox(name) else "pc")
    return GuestSpec(kernel_of(name), **fields)
