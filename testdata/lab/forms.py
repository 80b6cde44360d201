"""Migration files as QEMU writes them with more capabilities: of a background snapshot, with a disk's
bitmap, mapped-ram behind something else. Each is pruned, restored and tortured."""

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
    return f"in place {before >> 20} -> {after >> 20} MiB, torture OK"


def forms_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.12")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--keep", action="store_true", help="keep the capture")
    tool_argument(parser)


@command("forms", "streams of background snapshots and with bitmaps, mapped-ram at an offset",
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
            said = f"{done.before >> 20} -> {(done.after or 0) >> 20} MiB, torture OK"
            if form == "behind":
                said += f"; {in_place(tool, folder, name, work)}"
            print(f"ok   {form}, Linux {spec.kernel.release}: {said}", flush=True)
        except LabError as error:
            failed += 1
            print(f"FAIL {form}: {error}", flush=True)
    if not args.keep:
        shutil.rmtree(HOME / folder.name, ignore_errors=True)
    if failed:
        raise AlreadyTold
