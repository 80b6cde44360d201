"""Files that sonicshot wrote and pruned, opened by others: by Debian's crash and by drgn, which must
find in them what they find in the file that nothing was dropped of; and by makedumpfile, whose dumps of
them must hold the same memory."""

import hashlib
import json
import re
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

from command import command
from errors import CheckFailed, LabError
from host import LAB, ROOT, Json, Word, attempt, run
from proof import DRGN
from tool import find_tool, report_of, tool_argument

# What is written, and how.
FORMS: Mapping[str, tuple[str, ...]] = {
    "elf": ("--to", "elf"),
    "kdump-none": ("--to", "kdump", "--compress", "none"),
    "kdump-zlib": ("--to", "kdump", "--compress", "zlib"),
    "kdump-snappy": ("--to", "kdump", "--compress", "snappy"),
    "kdump-zstd": ("--to", "kdump", "--compress", "zstd"),
}

# Behind the free pages: processes.
TASKS = r"""
from drgn.helpers.linux.pid import for_each_task
tasks = sorted((t.pid.value_(), t.comm.string_().decode()) for t in for_each_task(prog))
json.dump({"buddy": len(buddy), "pcp": len(pcp), "tasks": tasks}, sys.stdout)
"""


def crash_of(program: Path, vmlinux: Path, dump: Path) -> str:
    """Free pages, processes and slabs by crash."""
    # Of a core without the processors' registers it does not take the kernel's offset.
    with open(dump, "rb") as file:
        offset = re.search(rb"^KERNELOFFSET=([0-9a-f]+)$", file.read(1 << 20), re.M)
    moved = ["--kaslr", f"0x{offset[1].decode()}"] if offset else []
    done = attempt(program, "-s", vmlinux, dump, *moved, text="kmem -f\nps\nkmem -s\nquit\n")
    free = re.findall(r"^nr_free_pages: (\d+)\s+\(verified\)", done.stdout, re.M)
    tasks = re.findall(r"^[> ] +(\d+) +\d+ +\d+ +[0-9a-f]{16} ", done.stdout, re.M)
    slabs = re.findall(r"^[0-9a-f]{16} +\d+ +\d+ +\d+ +\d+ +\d+k +\S+$", done.stdout, re.M)
    if done.returncode or not free or not tasks or not slabs:
        raise CheckFailed(f"crash on {dump.name}: {done.stdout[-800:]}{done.stderr[-800:]}")
    return json.dumps([free, tasks, slabs])


def drgn_of(program: Path, vmlinux: Path, dump: Path) -> str:
    """Free pages and processes by drgn."""
    script = DRGN[:DRGN.index("json.dump")] + TASKS
    done = attempt(program, "-c", script, dump, vmlinux)
    if done.returncode:
        raise CheckFailed(f"drgn on {dump.name}: {done.stderr[-1600:]}")
    return done.stdout


Reader = Callable[[Path, Path, Path], str]


def readers() -> list[tuple[str, Path, Reader]]:
    """Those that are here; what is not is said."""
    found: list[tuple[str, Path, Reader]] = []
    crash = shutil.which("crash")
    if crash:
        found.append(("crash", Path(crash), crash_of))
    else:
        print("skip: no crash here (apt-get install crash)")
    # The lab's own, or one of the machine.
    for python in (LAB / "drgn" / "bin" / "python", Path(shutil.which("python3") or "python3")):
        if python.exists() and attempt(python, "-c", "import drgn").returncode == 0:
            found.append(("drgn", python, drgn_of))
            break
    else:
        print("skip: no drgn here (pip install drgn)")
    return found


def call(tool: Path, *words: Word) -> Json:
    """A report of sonicshot."""
    done = attempt(tool, *words, "--json")
    if done.returncode:
        raise CheckFailed(f"{' '.join(map(str, words))}: {done.stderr.strip()[-600:]}")
    return report_of(done.stdout)


def prune_twice(tool: Path, whole: Path) -> None:
    """Makes `.pruned` of a file, and `.again` of that."""
    pruned, again = whole.with_suffix(".pruned"), whole.with_suffix(".again")
    call(tool, "prune", whole, "-o", pruned, "--force")
    call(tool, "prune", pruned, "-o", again, "--force")


def check(tool: Path, vmlinux: Path, whole: Path, one: tuple[str, Path, Reader]) -> None:
    """What is pruned of a file, once and twice, is to a reader what it was before."""
    name, program, read = one
    pruned, again = whole.with_suffix(".pruned"), whole.with_suffix(".again")
    wanted = read(program, vmlinux, whole)
    for dump in (pruned, again):
        if read(program, vmlinux, dump) != wanted:
            raise CheckFailed(f"{name} reads {dump.name} otherwise than {whole.name}")
    seen = call(tool, "inspect", again)
    if seen["missing_in_use_pages"]:
        raise CheckFailed(f"{again.name} lacks {seen['missing_in_use_pages']} pages in use")
    sizes = [f"{file.stat().st_blocks >> 11}" for file in (whole, pruned, again)]
    print(f"ok   {whole.name}: {name} opens it, {' -> '.join(sizes)} MiB", flush=True)


# What makedumpfile makes of a file: all that is in it, as a kdump, also without zeroes; of a core
# another core, too.
REWRITES = (("-d", "0", "-c"), ("-d", "1", "-c"))
OF_CORES = (("-d", "0", "-E"),)


def memory_of(tool: Path, dump: Path) -> bytes:
    """The digest of a dump's memory; what the dump does not have is zero."""
    raw = dump.with_suffix(".memory")
    call(tool, "convert", dump, "-o", raw, "--to", "raw", "--force")
    with open(raw, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    raw.unlink()
    return digest


def check_rewrites(tool: Path, program: Path, whole: Path) -> None:
    """What makedumpfile makes of a pruned file has all of its memory."""
    made = whole.with_suffix(".made")
    for dump in (whole.with_suffix(".pruned"), whole.with_suffix(".again")):
        wanted = memory_of(tool, dump)
        for words in (*REWRITES, *(OF_CORES if whole.name == "elf" else ())):
            made.unlink(missing_ok=True)
            done = attempt(program, *words, dump, made)
            if done.returncode:
                said = done.stdout + done.stderr
                if "compression unsupported" in said:
                    print(f"skip {dump.name}: this makedumpfile has no such compression")
                    return
                raise CheckFailed(f"makedumpfile {' '.join(words)} {dump.name} ends with "
                                  f"{done.returncode}: {said[-300:]}")
            if memory_of(tool, made) != wanted:
                raise CheckFailed(f"makedumpfile {' '.join(words)} reads {dump.name} otherwise")
    print(f"ok   {whole.name}: makedumpfile reads it, pruned once and twice", flush=True)


def readers_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--ram", type=Path, help="raw RAM; if not given, the tests' capture")
    parser.add_argument("--vmlinux", type=Path, help="its kernel, with debug symbols")
    parser.add_argument("--forms", default=",".join(FORMS))
    tool_argument(parser)


@command("readers", "open pruned kdumps and cores in crash, drgn and makedumpfile", readers_arguments)
def do_readers(args: Namespace) -> None:
    """Writes a guest in every form, prunes it twice, and reads all of them."""
    here = []
    if args.vmlinux and args.vmlinux.exists():
        here = readers()
    else:
        print("skip: crash and drgn need the guest's vmlinux with debug symbols (--vmlinux)")
    makedumpfile = shutil.which("makedumpfile")
    if not makedumpfile:
        print("skip: no makedumpfile here (apt-get install makedumpfile)")
    if not here and not makedumpfile:
        raise LabError("no reader is here: nothing was read")
    tool = find_tool(args.sonicshot)
    with tempfile.TemporaryDirectory(dir=args.ram and args.ram.parent) as name:
        work = Path(name)
        ram = args.ram
        if not ram:
            ram = work / "ram.raw"
            packed = ROOT / "testdata" / "guest-6.1-128m" / "ram.raw.zst"
            run("zstd", "-q", "-d", "--long=27", packed, "-o", ram)
        for form in args.forms.split(","):
            whole = work / form
            call(tool, "convert", ram, "-o", whole, *FORMS[form])
            prune_twice(tool, whole)
            for one in here:
                check(tool, args.vmlinux, whole, one)
            if makedumpfile:
                check_rewrites(tool, Path(makedumpfile), whole)
            for file in work.glob(f"{form}*"):
                file.unlink()
