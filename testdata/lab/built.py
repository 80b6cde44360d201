"""Kernels built from Debian's source with what sandboxes choose, and Debian does not.

Nobody distributes these alone, so each is built once, by command: all options off but those that
are named here."""

import json
import re
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NamedTuple

import kernels
from command import command
from debian import Apt, install_packages, install_tools
from errors import LabError
from host import LAB, Word, run
from kernels import Kernel

SOURCE = "linux-source-6.1"
SUITE = "bookworm"
TOOLS = {"make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils",
         "/usr/include/libelf.h": "libelf-dev", "/usr/include/openssl/ssl.h": "libssl-dev"}

# What the lab's guest needs of any kernel: its disks and consoles in microvm and pc, its program,
# the kernel's word on its pages.
GUEST = """
    64BIT SMP PRINTK PRINTK_TIME MULTIUSER BINFMT_ELF BINFMT_SCRIPT BLOCK BLK_DEV BLK_DEV_INITRD
    FUTEX EPOLL ADVISE_SYSCALLS FILE_LOCKING POSIX_TIMERS HIGH_RES_TIMERS NO_HZ_IDLE UNIX NET
    TTY UNIX98_PTYS SERIAL_8250 SERIAL_8250_CONSOLE HYPERVISOR_GUEST PARAVIRT KVM_GUEST PVH
    ACPI PCI VIRTIO_MENU VIRTIO_PCI VIRTIO_MMIO VIRTIO_MMIO_CMDLINE_DEVICES VIRTIO_BLK
    VIRTIO_CONSOLE VIRTIO_BALLOON EXT4_FS SHMEM TMPFS PROC_FS PROC_SYSCTL SYSFS DEVTMPFS
    PROC_PAGE_MONITOR COMPACTION HUGETLBFS MAGIC_SYSRQ VM_EVENT_COUNTERS
"""
# The same in both: what decides how memory and addresses look.
SANDBOX = """
    NUMA X86_64_ACPI_NUMA KALLSYMS RELOCATABLE RANDOMIZE_BASE PAGE_TABLE_ISOLATION VMAP_STACK
    SPARSEMEM_VMEMMAP MEMORY_HOTPLUG CPU_MITIGATIONS RETPOLINE ZONE_DMA
"""


class Choice(NamedTuple):
    """Options of one sandbox: on beside the others', and what must come out off."""

    on: str
    off: str
    processors: int


CHOICES = {
    # VMCOREINFO by way of /proc/kcore and kexec_file_load; no symbols of data, no types.
    "firecracker": Choice(
        """RANDOMIZE_MEMORY TRANSPARENT_HUGEPAGE PROC_KCORE CRYPTO CRYPTO_SHA256 KEXEC_FILE SLUB SLAB_FREELIST_RANDOM
        SLAB_FREELIST_HARDENED SHUFFLE_PAGE_ALLOCATOR DEFERRED_STRUCT_PAGE_INIT PAGE_REPORTING
        MEMORY_HOTREMOVE AMD_NUMA SWAP KSM CGROUPS STACKPROTECTOR STACKPROTECTOR_STRONG""",
        "KALLSYMS_ALL DEBUG_INFO RTC_CLASS MODULES", 64),
    # Neither /proc/kcore nor kexec, so no VMCOREINFO.
    "kata": Choice(
        "MEMORY_HOTPLUG_DEFAULT_ONLINE PERF_EVENTS X86_MSR X86_X2APIC CGROUPS",
        "KALLSYMS_ALL DEBUG_INFO CRASH_CORE KEXEC_CORE PROC_KCORE RANDOMIZE_MEMORY "
        "TRANSPARENT_HUGEPAGE MODULES", 240),
}


def home_of(name: str) -> Path:
    return kernels.home_of(f"built-{name}")


def fetch(name: str) -> Kernel:
    """The record of a kernel that was built."""
    record = home_of(name) / "meta.json"
    if not record.exists():
        raise LabError(f"the kernel with {name}'s options is not there: run build --kernels {name}")
    return Kernel.from_json(json.loads(record.read_text()))


def source() -> tuple[Path, str]:
    """Debian's source, unpacked, and its version."""
    folder = LAB / "source"
    done = folder / "version"
    tree = folder / SOURCE
    if not done.exists():
        apt = Apt(SUITE)
        apt.update()
        work = folder / "unpack"
        versions = kernels.unpack(apt, [SOURCE], work, work / "root")
        run("tar", "-C", folder, "-xf", next((work / "root").rglob(f"{SOURCE}.tar.*")))
        shutil.rmtree(work)
        done.write_text(versions[SOURCE])
    return tree, done.read_text()


def configure(tree: Path, into: Path, choice: Choice) -> None:
    """Makes the configuration, and checks that it came out as it was chosen."""
    on = [word for part in (GUEST, SANDBOX, choice.on) for word in part.split()]
    lines = [f"CONFIG_{name}=y" for name in on]
    lines += [f"# CONFIG_{name} is not set" for name in choice.off.split()]
    lines.append(f"CONFIG_NR_CPUS={choice.processors}")
    wanted = into / "wanted"
    wanted.write_text("\n".join(lines) + "\n")
    run("make", "-C", tree, f"O={into}", f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig")
    text = (into / ".config").read_text()
    chosen = set(re.findall(r"^CONFIG_(\w+)=y$", text, re.M))
    lacking, surplus = set(on) - chosen, set(choice.off.split()) & chosen
    if lacking or surplus:
        raise LabError(f"the configuration lacks {sorted(lacking)} and has {sorted(surplus)}")


def build(name: str, jobs: int) -> Kernel:
    """Builds a kernel, if it is not there."""
    if name not in CHOICES:
        raise LabError(f"no options of `{name}` are known: {', '.join(CHOICES)}")
    home = home_of(name)
    record = home / "meta.json"
    if record.exists():
        return fetch(name)
    install_packages(TOOLS)
    tree, version = source()
    into = home / "build"
    into.mkdir(parents=True, exist_ok=True)
    configure(tree, into, CHOICES[name])
    make: list[Word] = ["make", "-C", tree, f"O={into}", "-s", f"-j{jobs}"]
    run(*make, "vmlinux")
    release = run(*make, "kernelrelease").split()[-1]
    image = home / "vmlinux"
    # As it is distributed: without what links it.
    run("strip", "-o", image, into / "vmlinux")
    shutil.copy(into / ".config", home / "config")
    shutil.rmtree(into)
    kernel = Kernel(f"built-{name}", release, str(image.relative_to(LAB)), (), {SOURCE: version},
                    config=str((home / "config").relative_to(LAB)))
    record.write_text(json.dumps(kernel.to_json(), indent=1))
    return kernel


def build_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=",".join(CHOICES))
    parser.add_argument("--jobs", type=int, default=2)


@command("build", "build kernels with the options of sandboxes, from Debian's source",
         build_arguments)
def do_build(args: Namespace) -> None:
    install_tools()
    for name in args.kernels.split(","):
        kernel = build(name, args.jobs)
        print(f"{name}: Linux {kernel.release}, {kernel.image}", flush=True)
