"""Debian kernels, unpacked without being installed."""

import json
import lzma
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from command import command
from debian import Apt, install_tools
from errors import LabError
from host import LAB, Json, run

# Series -> suites to look in, the first that has it wins.
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "7.2": "sid"}
# As `--kernels` has them.
ALL = ",".join(SUITES)
MODULES = (
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "virtio_blk", "virtio_balloon", "qemu_fw_cfg", "virtio_mem", "ext4", "nd_e820", "nd_pmem",
)

# File systems whose modules a guest has only if its files are on one.
FILE_SYSTEMS = ("xfs", "btrfs")


@dataclass(frozen=True)
class Kernel:
    """A kernel that was unpacked. Files are told by their names in the lab's folder, so that a
    record is good wherever that is."""

    series: str
    release: str
    vmlinuz: str
    # In the order in which they load.
    modules: tuple[str, ...]
    packages: Mapping[str, str] = field(default_factory=dict)
    # The modules that were asked for when it was unpacked.
    wanted: tuple[str, ...] = ()
    config: str | None = None
    # With debug symbols alone.
    vmlinux: str | None = None
    system_map: str | None = None
    # What is loaded behind its modules for a file system.
    beyond: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return home_of(self.series)

    @property
    def image(self) -> Path:
        return LAB / self.vmlinuz

    @property
    def debug_image(self) -> Path:
        """The `vmlinux` with debug symbols."""
        if self.vmlinux is None:
            raise LabError(f"no debug symbols of {self.series}: run setup --debug-symbols")
        return LAB / self.vmlinux

    @property
    def symbol_table(self) -> Path:
        """System.map"""
        if self.system_map is None:
            raise LabError(f"no System.map of {self.series}: run setup --debug-symbols")
        return LAB / self.system_map

    def to_json(self) -> Json:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, record: Json) -> Self:
        known = {one.name for one in fields(cls)}
        if strange := record.keys() - known:
            raise LabError(f"the record of a kernel has {sorted(strange)}, which this lab does not")
        values = dict(record)
        for key in ("modules", "wanted"):
            values[key] = tuple(record.get(key, ()))
        return cls(**values)


def home_of(series: str) -> Path:
    return LAB / "kernels" / series


def fetch(series: str, symbols: bool = False) -> Kernel:
    """Unpacks the newest kernel of `series` and returns its record.

    `6.1` is the cloud kernel, `6.1-amd64` the general one (which has page poisoning)."""
    home = home_of(series)
    record = home / "meta.json"
    if record.exists():
        kernel = Kernel.from_json(json.loads(record.read_text()))
        if kernel.wanted == (*MODULES, *FILE_SYSTEMS) and (kernel.vmlinux or not symbols):
            return kernel
    number, _, flavour = series.partition("-")
    package = f"linux-image-{flavour or 'cloud-amd64'}"
    apt = Apt(SUITES[number])
    apt.update()
    image = next(p for p in apt.depends(package) if p.startswith("linux-image-"))
    packages = [image] + [p for p in apt.depends(image) if re.match(r"linux-(binary|modules)-", p)]
    if symbols:
        packages += [p for p in apt.depends(f"{package}-dbg")
                     if p.startswith("linux-image-")]
    work = home / "unpack"
    root = work / "root"
    versions = unpack(apt, packages, work, root)
    release = image.removeprefix("linux-image-")
    kernel = collect(series, release, versions, root, symbols)
    shutil.rmtree(work)
    record.write_text(json.dumps(kernel.to_json(), indent=1))
    return kernel


def unpack(apt: Apt, packages: Sequence[str], work: Path, root: Path) -> dict[str, str]:
    """Downloads and unpacks packages; their versions by name."""
    shutil.rmtree(work, ignore_errors=True)
    for package in packages:
        apt.download(package, work)
    versions = {}
    for deb in sorted(work.glob("*.deb")):
        name, version = run("dpkg-deb", "-W", deb).split()
        versions[name] = version
        run("dpkg", "-x", deb, root)
        deb.unlink()
    return versions


def collect(series: str, release: str, versions: Mapping[str, str], root: Path, symbols: bool
            ) -> Kernel:
    """Takes what the lab needs from the unpacked packages."""
    home = home_of(series)
    # 7.2 moved the kernel to usr/lib/modules/RELEASE, without the release in its name.
    vmlinuz = keep(files(root, "vmlinuz*")[0], home / "vmlinuz")
    configs = files(root, f"config-{release}") or files(root, "config")
    config = keep(configs[0], home / "config") if configs else None
    modules = home / "modules"
    shutil.rmtree(modules, ignore_errors=True)
    modules.mkdir()
    order = collect_modules(root, release, modules, MODULES)
    beyond = {}
    for file_system in FILE_SYSTEMS:
        whole = collect_modules(root, release, modules, (*MODULES, file_system))
        beyond[file_system] = [name for name in whole if name not in order]
    vmlinux = system_map = None
    if symbols:
        named = files(root, "vmlinux-*") or files(root, "vmlinux")
        vmlinux = keep(max(named, key=size_of), home / "vmlinux")
        # As distributed, with the release in its name: the file itself carries no version.
        system_map = keep(max(files(root, "System.map*"), key=size_of),
                          home / f"System.map-{release}")
    return Kernel(series, release, vmlinuz, tuple(order), versions, (*MODULES, *FILE_SYSTEMS),
                  config, vmlinux, system_map, beyond)


def files(root: Path, pattern: str) -> list[Path]:
    return [p for p in root.rglob(pattern) if p.is_file() and not p.is_symlink()]


def size_of(path: Path) -> int:
    return path.stat().st_size


def keep(path: Path, target: Path) -> str:
    shutil.move(path, target)
    return str(target.relative_to(LAB))


def collect_modules(root: Path, release: str, into: Path, wanted: Sequence[str]) -> list[str]:
    """Copies the modules the guest needs, uncompressed, and returns their load order."""
    found = {}
    for path in root.rglob("*.ko*"):
        if release in path.parts:
            found[re.sub(r"\.ko.*$", "", path.name).replace("-", "_")] = path
    order: list[str] = []

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in order or name not in found:
            return
        path = found[name]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        for needs in re.findall(rb"\0?depends=([^\0]*)\0", data):
            for below in needs.decode().split(","):
                if below:
                    add(below)
        (into / f"{name}.ko").write_bytes(data)
        order.append(name)

    for name in wanted:
        add(name)
    # ext4 checks its data with crc32c by name, which no `depends=` tells.
    for name in ("crc32c_generic", "crc32c_cryptoapi", "libcrc32c"):
        if name in found and name not in order:
            add(name)
            order.remove(name)
            order.insert(0, name)
    return order


def setup_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=ALL)
    parser.add_argument("--debug-symbols", action="store_true")


@command("setup", "install tools, download kernels", setup_arguments)
def do_setup(args: Namespace) -> None:
    install_tools()
    for series in args.kernels.split(","):
        print(series, fetch(series, args.debug_symbols).release)
