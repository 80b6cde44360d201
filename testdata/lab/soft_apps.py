"""Guests whose root is Debian's, with databases and runtimes that run: page cache left out of their
checkpoints, and what else can be done with it."""

import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import kernels
from cache import clean_frames
from captures import capture
from command import command
from errors import CheckFailed
from host import LAB, allocated, run
from soft import MIB, Ran, control, refuse_changed, run_on
from spec import GuestSpec
from tool import find_tool, report_of, tool_argument

# Left by the balloon: what a guest of this lab needs, and some more.
SQUEEZED = 900
# Reads of the disk by a guest that has its files in its page cache: a program may look at one that was
# not there. Without them it is thousands.
FEW = 32
# Rounds of memory pressure of a guest that is aged.
AGED = 3


@dataclass(frozen=True)
class Way:
    """What came of one way to keep a guest."""

    name: str
    size: int
    save: float
    # From the restore's start to the guest's first beat.
    beat: float
    # Until the guest had read all of its files and asked all of its programs.
    look: float
    reads: int

    def line(self, guest: str) -> str:
        return (f"| {guest} | {self.name} | {self.size / MIB:.1f} MiB | {self.save:.1f} s | "
                f"{self.beat:.1f} s | {self.look:.1f} s | {self.reads:,} |")


HEAD = ("| guest | page cache | size | save | restore to first beat | all files and programs | reads "
        "of the disk for them |\n|---|---|---:|---:|---:|---:|---:|")


def restored(tool: Path, folder: Path, checkpoint: Path, disk: Path | None = None,
             torture: bool = False) -> tuple[float, Ran]:
    """Seconds of the restore to a raw file, and how the guest ran on in it."""
    back = folder / "back.raw"
    given = ("--disk", f"root={disk}") if disk else ()
    began = time.monotonic()
    run(tool, "restore", checkpoint, "-o", back, *given, "--force")
    seconds = time.monotonic() - began
    try:
        return seconds, run_on(folder, back, torture)
    finally:
        back.unlink()


def kept(tool: Path, folder: Path, name: str) -> Way:
    """All of it in a checkpoint."""
    checkpoint = folder / "all.sonic"
    report = report_of(run(tool, "save", folder / "ram.raw", "-o", checkpoint, "--json", "--force"))
    seconds, ran = restored(tool, folder, checkpoint)
    return Way(name, report["file_bytes"], report["seconds"], seconds + ran.beat, ran.look, ran.reads)


def referred(tool: Path, folder: Path) -> tuple[Way, str]:
    """References to the disk; and what was found there, and by what."""
    ram, disk, checkpoint = folder / "ram.raw", folder / "files.img", folder / "small.sonic"
    given = ("--disk", f"root={disk}")
    report = report_of(run(tool, "save", ram, "-o", checkpoint, *given, "--json", "--force"))
    run(tool, "verify", checkpoint, *given, "--against", ram)
    clean, dirty = clean_frames(tool, ram)
    refuse_changed(tool, checkpoint, disk, clean, ram, "root")
    seconds, ran = restored(tool, folder, checkpoint, disk, torture=True)
    search = report["disk_search"]
    found = (f"{len(clean) + dirty:,} frames of page cache, {search['explained_pages']:,} explained, "
             f"{report['disk_pages']:,} on the disk, which was "
             f"{'not ' if search['streamed_bytes'] is None else ''}read whole")
    return Way("referred to on the disk", report["file_bytes"], report["seconds"],
               seconds + ran.beat, ran.look, ran.reads), found


def shared(tool: Path, folder: Path) -> Way:
    """A raw file on an xfs that shares the disk's blocks; QEMU runs in it."""
    image = folder / "sharing.xfs"
    with open(image, "wb") as file:
        file.truncate(6 << 30)
    run("mkfs.xfs", "-q", image)
    at = Path(tempfile.mkdtemp(dir=LAB))
    run("mount", "-o", "loop", image, at)
    try:
        memory, disk = at / "ram.raw", at / "files.img"
        run(tool, "restore", folder / "all.sonic", "-o", memory)
        run("cp", "--sparse=always", folder / "files.img", disk)
        began = time.monotonic()
        report = report_of(run(tool, "share", memory, "--disk", disk, "--json"))
        seconds = time.monotonic() - began
        size = allocated(memory) - int(report["gained_bytes"])
        ran = run_on(folder, memory, False)
        return Way("shared with the disk, a raw file", size, seconds, ran.beat, ran.look, ran.reads)
    finally:
        run("umount", at)
        at.rmdir()
        image.unlink()


def prove(tool: Path, guest: str, spec: GuestSpec, keep: bool, whole: bool) -> list[str]:
    """The rows of one guest; those beside the references only if `whole`."""
    folder = capture(spec, f"apps-{guest.replace(', ', '-')}")
    way, found = referred(tool, folder)
    ways = [way]
    if whole:
        ways = [kept(tool, folder, "kept"), way, shared(tool, folder)]
    for way in ways:
        # What writes to the disk may have to read what describes it.
        if way.reads > FEW and not spec.storm:
            raise CheckFailed(f"{guest}: the guest read its disk {way.reads} times for files that "
                              "were in its page cache")
    if whole:
        run(tool, "restore", folder / "small.sonic", "-o", folder / "back.raw", "--disk",
            f"root={folder / 'files.img'}")
        print(f"{guest}: clean page cache zeroed: {control(tool, folder, folder / 'back.raw')}")
    print(f"{guest}: {found}; ten blocks changed: refused", flush=True)
    if not keep:
        shutil.rmtree(folder)
    return [way.line(guest) for way in ways]


def squeezed(tool: Path, guest: str, spec: GuestSpec, keep: bool) -> str:
    """The row of a guest whose page cache a balloon took."""
    folder = capture(spec, f"apps-{guest.replace(', ', '-')}-balloon")
    line = kept(tool, folder, f"taken by a balloon down to {spec.squeezed} MiB").line(guest)
    if not keep:
        shutil.rmtree(folder)
    return line


def soft_apps_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default="6.1,6.12")
    parser.add_argument("--file-systems", default=",".join(("ext4", *kernels.FILE_SYSTEMS)))
    parser.add_argument("--mem", type=int, default=2048, help="MiB")
    parser.add_argument("--only", default="", help="fresh, aged, storm, balloon, with commas between")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("soft-apps", "page cache of a Debian root with databases and runtimes", soft_apps_arguments)
def do_soft_apps(args: Namespace) -> None:
    tool = find_tool(args.sonicshot)
    rows: list[str] = []
    table = LAB / "soft-apps.md"
    for series in args.kernels.split(","):
        for file_system in args.file_systems.split(","):
            spec = GuestSpec(kernels.fetch(series), mem=args.mem, forms=("raw",), apps=True,
                             file_system=file_system)
            guest = f"{series}, {file_system}"
            kinds = {"fresh": (spec, True), "aged": (replace(spec, aged=AGED), True),
                     "storm": (replace(spec, storm=True), False),
                     "balloon": (replace(spec, squeezed=SQUEEZED), False)}
            for kind in (args.only or "fresh,aged,storm,balloon").split(","):
                of, whole = kinds[kind]
                name = guest if kind in ("fresh", "balloon") else f"{guest}, {kind}"
                lines = [squeezed(tool, name, of, args.keep)] if kind == "balloon" else \
                    prove(tool, name, of, args.keep, whole)
                rows += lines
                print("\n".join(lines), flush=True)
                table.write_text("\n".join([HEAD, *rows]) + "\n")
    print(table.read_text())
