"""What a guest of the lab is: its kernel, its machine, and what is done in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

from errors import LabError
from host import Json
from kernels import Kernel

PAGE = 4096


class VirtioMem(NamedTuple):
    """A virtio-mem device: the MiB that it can hold, and how many of them are plugged."""

    size: int
    plugged: int


class Part(NamedTuple):
    """A range of guest RAM, and where a file of raw RAM has it; bytes."""

    gpa: int
    len: int
    file_offset: int


Layout = Sequence[Part]


def layout(machine: str, mem: int, split: int = 0) -> tuple[Part, ...]:
    """RAM of `mem` MiB as QEMU lays it out, in the order of the file; `split` says where below 4 GiB it
    ends, if not where the machine has it."""
    size = mem << 20
    low_max, low_split = {"pc": (0xE0000000, 0xC0000000), "q35": (0xB0000000, 0x80000000),
                          "microvm": (0xC0000000, 0xC0000000)}[machine]
    if split:
        low_max = low_split = split << 20
    low = size if size < low_max else low_split
    parts = [Part(0, low, 0)]
    if size > low:
        parts.append(Part(1 << 32, size - low, low))
    return tuple(parts)


# What makes one guest different from the next in its name, as far as the command line has it.
NAMED = ("append", "split", "hugetlb", "balloon", "numa", "dimm", "virtio_mem", "offline", "pmem")
# In records of captures of earlier labs, and of no use to a restore.
GONE = {"layout"}


@dataclass(frozen=True)
class GuestSpec:
    """A guest. Sizes are MiB where nothing else is said."""

    kernel: Kernel
    mem: int = 512
    cpu: str = "qemu64"
    smp: int = 1
    machine: str = "pc"
    # Where its RAM below 4 GiB ends, if not where the machine has it.
    split: int = 0
    # What is left in free memory: `random`, or what is `compressible`.
    garbage: str = "random"
    # What a capture takes: `raw`, `elf`, `mapped` (mapped-ram), `stream`.
    forms: tuple[str, ...] = ()
    # To the kernel's command line.
    append: str = ""
    # 2 MiB pages of the pool; half of them used.
    hugetlb: int = 0
    # Taken from the guest.
    balloon: int = 0
    # What a balloon left it, before all was given back again.
    squeezed: int = 0
    # Of each node, which is a RAM block of its own.
    numa: tuple[int, ...] = ()
    # Of each DIMM that is plugged in after boot.
    dimm: tuple[int, ...] = ()
    # What its files are on.
    file_system: str = "ext4"
    # Its first disk is a Debian root, whose databases and runtimes run.
    apps: bool = False
    # How often memory was used up before the capture, so that page cache was evicted and read again.
    aged: int = 0
    # Its first disk is written to without rest.
    storm: bool = False
    # Of each DIMM that is there at boot; under libvirt alone.
    cold_dimm: tuple[int, ...] = ()
    virtio_mem: VirtioMem | None = None
    # Of what was plugged in, taken offline again.
    offline: int = 0
    # RAM to be persistent memory, as memmap= has it: 128M!256M
    pmem: str = ""
    # The command line of the kernel that the guest loads as its next one.
    next: str = ""
    # A file with another guest's memory, which this one holds as its own, in huge pages and in the
    # page cache.
    nested: str = ""
    # Of the migration to a stream.
    capabilities: tuple[str, ...] = ()
    # An EFI firmware of `firmware.KNOWN`; SeaBIOS if none is named.
    firmware: str = ""
    # The command that runs another QEMU than the host's, and more of its options.
    qemu: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    # Of its first disk.
    disk_format: str = "raw"
    # What its RAM is made of, one of `machine.BACKINGS`; of anonymous memory if nothing is said.
    backing: str = ""
    # Busy while QEMU saves it, in one form alone; not stopped.
    live: bool = False
    # Processes that take and give back memory without rest.
    stress: int = 0
    # Anonymous memory with patterns; 0: what fits `mem`.
    anon: int = 0
    seed: int = 1
    # The command line that a captured guest was booted with.
    booted: str = ""

    def __post_init__(self) -> None:
        if self.numa and sum(self.numa) != self.mem:
            raise LabError(f"nodes of {self.numa} MiB make no guest of {self.mem} MiB")

    @property
    def several_blocks(self) -> bool:
        """Whether its memory is no one file of raw RAM."""
        return bool(self.numa or self.dimm or self.virtio_mem)

    @property
    def plugged(self) -> int:
        """MiB that come to the guest after boot."""
        return sum(self.dimm) + (self.virtio_mem.plugged if self.virtio_mem else 0)

    @property
    def room(self) -> int:
        """MiB of guest-physical memory that the machine keeps for what can be plugged in."""
        return sum(self.dimm) + (self.virtio_mem.size if self.virtio_mem else 0)

    @property
    def layout(self) -> tuple[Part, ...]:
        """What is there at boot, as the file of raw RAM has it."""
        return layout(self.machine, self.mem, self.split)

    @property
    def files_mib(self) -> int:
        """Of files to fill the page cache with."""
        return 8 if self.mem < 256 else 64

    @property
    def anon_mib(self) -> int:
        if self.anon:
            return self.anon
        return 8 if self.mem < 256 else 24 if self.mem < 2048 else 96

    @property
    def records_bytes(self) -> int:
        """Of the disk that the guest writes its records to."""
        # What is plugged in comes after the PCI hole, and kpageflags counts from 0.
        if self.cold_dimm:
            return 64 << 20
        mib = self.mem + 4096 if self.plugged or self.split else 2 * self.mem
        return (8 << 20) + (mib << 20) // PAGE * 32

    @property
    def processes(self) -> int:
        """That take and give back memory without rest."""
        return self.stress or (2 * self.smp if self.live else 0)

    @property
    def cmdline(self) -> str:
        """The kernel's command line."""
        if self.booted:
            return self.booted
        console = "console=ttyS0" if self.machine != "microvm" else \
            "console=hvc0 root=/dev/vdc ro rootfstype=ext4 init=/init"
        words = [f"{console} quiet panic=-1", f"lab.anon={self.anon_mib}",
                 f"lab.seed={self.seed}",
                 f"lab.compressible={int(self.garbage == 'compressible')}",
                 f"lab.huge={self.hugetlb}", self.append]
        if self.processes:
            words.append(f"lab.stress={self.processes}")
        if self.apps:
            words.append(f"lab.apps=1 lab.aged={self.aged} lab.storm={int(self.storm)}")
        if self.plugged:
            words.append(f"lab.plug={self.plugged}")
        if self.pmem:
            # RAM that is called persistent memory, and used as such.
            words.append(f"memmap={self.pmem} lab.pmem=1")
        if self.nested:
            # The number of its disk.
            words.append(f"lab.nested={3 if self.machine == 'microvm' else 2}")
        if self.offline:
            # Plugged in, used, and taken offline again.
            words.append(f"lab.offline={self.offline} memhp_default_state=offline")
        return " ".join(word for word in words if word)

    @property
    def name(self) -> str:
        """What a capture of it is called."""
        parts = [self.kernel.series, str(self.mem), self.cpu]
        if self.machine != "pc":
            parts.append(self.machine)
        if self.smp != 1:
            parts.append(f"smp{self.smp}")
        for key in NAMED:
            value = getattr(self, key)
            if value:
                words = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                parts.append(key + re.sub("[^a-z0-9_.]+", "_", words).strip("_"))
        return "-".join(parts)

    def with_forms(self, *forms: str) -> Self:
        return replace(self, forms=forms)

    def to_json(self) -> Json:
        """As the record of a capture has it; what is as it always is, is not in it."""
        always = {"mem", "cpu", "smp", "machine", "garbage", "forms"}
        found: Json = {"kernel": self.kernel.to_json()}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("kernel", "booted") or one.name not in always and value == one.default:
                continue
            found[one.name] = list(value) if isinstance(value, tuple) else value
        return found | {"cmdline": self.cmdline}

    @classmethod
    def from_json(cls, record: Json) -> Self:
        values = {key: value for key, value in record.items() if key not in GONE}
        values["booted"] = values.pop("cmdline", "")
        values["kernel"] = Kernel.from_json(values["kernel"])
        known = {one.name: one for one in fields(cls)}
        if strange := values.keys() - known.keys():
            raise LabError(f"the record of a guest has {sorted(strange)}, which this lab does not")
        for key, value in values.items():
            if isinstance(value, list):
                values[key] = VirtioMem(*value) if key == "virtio_mem" else tuple(value)
        return cls(**values)
