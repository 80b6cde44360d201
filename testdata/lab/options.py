"""Arguments that several commands have, and the guest that they describe."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence

from kernels import Kernel
from spec import GuestSpec, VirtioMem


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def virtio_mem(text: str) -> VirtioMem:
    size, _, plugged = text.partition(",")
    if not (size.isdecimal() and plugged.isdecimal()):
        raise ArgumentTypeError(f"`{text}` is not two sizes in MiB")
    return VirtioMem(int(size), int(plugged))


def guest_arguments(parser: ArgumentParser) -> None:
    """What makes one guest different from the next."""
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--machine", default="pc", choices=["pc", "q35"])
    parser.add_argument("--append", default="", help="kernel command line")
    parser.add_argument("--hugetlb", type=int, default=0,
                        help="pool size in 2 MiB pages; half of it used")
    parser.add_argument("--balloon", type=int, default=0, help="MiB to take from the guest")
    parser.add_argument("--numa", type=sizes, default=(),
                        help="nodes, a RAM block each: how many, or the MiB of each (192,320)")
    parser.add_argument("--dimm", type=sizes, default=(),
                        help="MiB of memory plugged in after boot: 128,128")
    parser.add_argument("--offline", type=int, default=0,
                        help="MiB of what was plugged in to be taken offline again")
    parser.add_argument("--pmem", default="",
                        help="RAM to be persistent memory, as memmap= has it: 128M!256M")
    parser.add_argument("--virtio-mem", type=virtio_mem,
                        help="MiB of a virtio-mem device, and how much of it is plugged: 512,200")


def guest_of(args: Namespace, kernel: Kernel, mem: int, cpu: str, garbage: str = "random",
             forms: Sequence[str] = ()) -> GuestSpec:
    """The guest that `guest_arguments` describe."""
    numa: tuple[int, ...] = args.numa
    if len(numa) == 1:
        numa = (mem // numa[0],) * numa[0]
    return GuestSpec(kernel, mem=sum(numa) or mem, cpu=cpu, smp=max(args.smp, len(numa)),
                     machine=args.machine, garbage=garbage, forms=tuple(forms),
                     append=args.append, hugetlb=args.hugetlb, balloon=args.balloon, numa=numa,
                     dimm=args.dimm, offline=args.offline, pmem=args.pmem,
                     virtio_mem=args.virtio_mem)
