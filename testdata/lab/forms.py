"""Migration files as QEMU writes them with more capabilities: of a background snapshot, with a disk's
bitmap, mapped-ram behind something else; and every form of a guest whose RAM is split in a place of its
own (`max-ram-below-4g`). Each is pruned, restored and stress-tested."""

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

import kernels
import matrix
from captures import FORMS, HOME, capture, restore
from command import command
from debian import install_tools
from errors import AlreadyTold, LabError
from host import LAB, allocated, run
from spec import GuestSpec
from tool import Refusal, call, find_tool, tool_argument

# What other commands do not take.
MORE = ("background", "bitmaps", "behind")
# MiB of a guest whose RAM is split where no machine has it, and where that is.
MEM, SPLIT = 512, 192


def in_place(tool: Path, folder: Path, name: str, work: Path) -> str:
    """The same pruned in the file itself."""
    placed = work / name
    run("cp", "--sparse=auto", folder / name, placed)
    before = allocated(placed)
    done = call(tool, "prune", placed, "--in-place")
    if isinstance(done, Refusal):
        raise LabError(f"in place: {done}")
    after = allocated(placed)
    restore(folder, None, migration=placed)
    placed.unlink()
    return f"in place {before >> 20} -> {after >> 20} MiB, stress test OK"


def split_raw(tool: Path, folder: Path, work: Path) -> str:
    """A raw file, of which only the guest tells where its RAM is split, pruned in the file itself; and
    what is wrongly said of it, which is refused."""
    ram = work / "ram.raw"
    run("cp", "--sparse=auto", folder / "ram.raw", ram)
    for wrong in ("flat", f"0-{SPLIT >> 1}M,4G-{4096 + MEM - (SPLIT >> 1)}M"):
        done = call(tool, "prune", ram, "--in-place", "--layout", wrong)
        if not isinstance(done, Refusal):
            raise LabError(f"--layout {wrong} is not refused")
    run("cmp", folder / "ram.raw", ram)
    before = allocated(ram)
    done = call(tool, "prune", ram, "--in-place")
    if isinstance(done, Refusal):
        raise LabError(f"raw: {done}")
    after = allocated(ram)
    restore(folder, ram)
    ram.unlink()
    return f"in place {before >> 20} -> {after >> 20} MiB, stress test OK; wrong layouts refused"


def split(tool: Path, kernel: str, work: Path, keep: bool) -> int:
    """How many forms failed of a guest whose RAM is split in a place of its own."""
    spec = GuestSpec(kernels.fetch(kernel), mem=MEM, split=SPLIT,
                     forms=("raw", "elf", "mapped", "stream"))
    folder = capture(spec, f"forms-{spec.name}")
    failed = 0
    for form in spec.forms:
        try:
            if form == "raw":
                said = split_raw(tool, folder, work)
            elif form == "elf":
                said = f"{split_elf(tool, folder, work):,} bytes, pruned as raw is"
            else:
                done = matrix.prune_and_restore(tool, folder, FORMS[form], work)
                if done.refused:
                    raise LabError(done.refused)
                said = f"{done.before >> 20} -> {(done.after or 0) >> 20} MiB, stress test OK"
            print(f"ok   split at {SPLIT} MiB, {form}, Linux {spec.kernel.release}: {said}",
                  flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL split, {form}: {error}", flush=True)
    if not keep:
        shutil.rmtree(HOME / folder.name, ignore_errors=True)
    return failed


def split_elf(tool: Path, folder: Path, work: Path) -> int:
    """How much of a core is dropped: what is of the raw file."""
    dropped = []
    for name in ("dump.elf", "ram.raw"):
        out = work / "out"
        done = call(tool, "prune", folder / name, "-o", out, "--drop", "free_buddy,free_pcp")
        if isinstance(done, Refusal):
            raise LabError(f"{name}: {done}")
        dropped.append(done["dropped_bytes"])
        out.unlink()
    if dropped[0] != dropped[1]:
        raise LabError(f"of the core {dropped[0]} bytes are dropped, of raw RAM {dropped[1]}")
    return dropped[0]


def forms_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--keep", action="store_true", help="keep the capture")
    tool_argument(parser)


@command("forms", "streams of background snapshots and with bitmaps, mapped-ram at an offset, RAM that "
         "is split elsewhere",
         forms_arguments)
def do_forms(args: Namespace) -> None:
    install_tools()
    tool = find_tool(args.sonicshot)
    spec = GuestSpec(kernels.fetch(args.kernel), mem=args.mem, forms=MORE)
    folder = capture(spec, f"forms-{spec.name}")
    work = LAB / "forms"
    work.mkdir(parents=True, exist_ok=True)
    failed = 0
    for form in MORE:
        name = FORMS[form]
        try:
            done = matrix.prune_and_restore(tool, folder, name, work)
            if done.refused:
                raise LabError(done.refused)
            said = f"{done.before >> 20} -> {(done.after or 0) >> 20} MiB, stress test OK"
            if form == "behind":
                said += f"; {in_place(tool, folder, name, work)}"
            print(f"ok   {form}, Linux {spec.kernel.release}: {said}", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {form}: {error}", flush=True)
    if not args.keep:
        shutil.rmtree(HOME / folder.name, ignore_errors=True)
    failed += split(tool, args.kernel, work, args.keep)
    if failed:
        raise AlreadyTold
