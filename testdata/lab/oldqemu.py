"""Streams of old QEMUs: each saves a guest, and restores what is left of it after a prune.

The QEMUs are those of older Debian releases, each unpacked into a folder of the lab."""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import captures
import kernels
import matrix
import proof
from command import command
from debian import Root, install_tools
from errors import AlreadyTold, LabError
from frames import read_tsv
from host import LAB, Word
from kernels import Kernel
from matrix import Outcome, mib
from spec import GuestSpec, VirtioMem
from tool import Refusal, call, find_tool, tool_argument

SUITES = {"5.2": "bullseye", "7.2": "bookworm"}
STREAM = "stream.mig"


class Guest(NamedTuple):
    """A guest, and what sonicshot is told of where its memory is."""

    spec: Callable[[Kernel], GuestSpec]
    layout: str = ""


GUESTS = {
    "plain": Guest(GuestSpec),
    "q35": Guest(partial(GuestSpec, machine="q35")),
    "NUMA, 256 + 256 MiB": Guest(partial(GuestSpec, numa=(256, 256), smp=2)),
    # Before QEMU 8 the device's state, which says where its memory is, comes behind all memory.
    "virtio-mem, 256 of 512 MiB": Guest(partial(GuestSpec, virtio_mem=VirtioMem(512, 256))),
    "virtio-mem, with --layout": Guest(partial(GuestSpec, virtio_mem=VirtioMem(512, 256)),
                                       "ram0=0-512M;0000:00:02.0/vmem0=4G-4608M"),
    "busy, saved while it runs": Guest(partial(GuestSpec, live=True)),
    # Not supported: refused.
    "busy, with deltas (xbzrle)": Guest(partial(GuestSpec, live=True, capabilities=("xbzrle",))),
    "compressed by QEMU": Guest(partial(GuestSpec, capabilities=("compress",))),
}


@dataclass
class Row:
    """Of the table."""

    qemu: str
    guest: str
    outcome: Outcome = field(default_factory=Outcome)


def one(tool: Path, spec: GuestSpec, layout: str, name: str, work: Path, keep: bool) -> Outcome:
    """What becomes of a guest: boot, save, inspect, prune, restore, stress test."""
    folder = captures.capture(spec, name)
    options: list[Word] = ["--layout", layout] if layout else []
    outcome = Outcome()
    report = call(tool, "inspect", folder / STREAM, "--pfns", work / "pfns.tsv", "--force",
                  *options)
    if not isinstance(report, Refusal):
        outcome.total = report["total_pages"] * report["page_size"]
        outcome.dropped = report["droppable_bytes"]
        if not spec.live:
            # Of a busy one the kernel's word is old.
            outcome.kernel = proof.against_kernel(folder, read_tsv(work / "pfns.tsv"), None)
    outcome.forms[STREAM] = matrix.prune_and_restore(tool, folder, STREAM, work, *options)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def table(rows: Sequence[Row]) -> str:
    lines = ["| QEMU | guest | RAM whose place is known, MiB | dropped or zero | stream, MiB | "
             "buddy pages found | outcome |", "|---|---|---:|---:|---:|---:|---|"]
    for row in rows:
        done = row.outcome
        lines.append("| " + " | ".join([
            row.qemu, row.guest, mib(done.total), mib(done.dropped), done.sizes(STREAM),
            f"{done.kernel.share:.2f} %" if done.kernel else "-", done.words]) + " |")
    return "\n".join(lines).replace(f"{LAB}/captures/", "")


def oldqemu_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--qemu", default=",".join(SUITES))
    parser.add_argument("--guests", default="", help="parts of their names, `;` between them")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("oldqemu", "streams of QEMU 5.2 and 7.2: prune and restore", oldqemu_arguments)
def do_oldqemu(args: Namespace) -> None:
    install_tools()
    tool = find_tool(args.sonicshot)
    kernel = kernels.fetch(args.kernel)
    work = LAB / "oldqemu"
    rows = []
    for number in args.qemu.split(","):
        root = Root(f"qemu-{number}", SUITES[number], ["qemu-system-x86"])
        root.install()
        version = root.versions("qemu-system-x86")["qemu"]
        qemu = tuple(root.shared("qemu-system-x86_64"))
        for index, (name, guest) in enumerate(GUESTS.items()):
            if not any(part.strip() in name for part in args.guests.split(";")):
                continue
            spec = replace(guest.spec(kernel), qemu=qemu, forms=("stream",))
            row = Row(version, name)
            rows.append(row)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                row.outcome = one(tool, spec, guest.layout,
                                  f"oldqemu-{number}-{args.kernel}-{index}", work, args.keep)
            except LabError as error:
                row.outcome = Outcome.of_error(error)
            print(f"QEMU {number}, {name}: {row.outcome.words}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    text = table(rows)
    (LAB / "oldqemu.md").write_text(text + "\n")
    print(text)
    if any(row.outcome.failed for row in rows):
        raise AlreadyTold
