"""Finding the kernel that owns the memory: among pages that pass for its VMCOREINFO, after reboots
that leave earlier kernels in memory, and by the page tables that its processors run on."""

import json
import re
import shutil
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import NamedTuple, Self

import captures
import kernels
import proof
import sandbox
from command import command
from debian import install_tools
from errors import CheckFailed
from frames import read_tsv
from host import LAB, Json, Word, attempt
from levels import KNOWLEDGE, processor
from machine import Machine, prepare, read_records
from proof import Agreement
from spec import GuestSpec
from tool import find_tool, limited, report_of, tool_argument


def spec_of(series: str, mem: int, cpu: str, smp: int, append: str) -> GuestSpec:
    # On a busy host an emulated timer may be too late for the kernel's test of it.
    return sandbox.guest(series, mem=mem, cpu=cpu, smp=smp,
                         append=f"no_timer_check {append}".strip())


class Look(NamedTuple):
    """What sonicshot said of a guest: its report and the seconds it took, or why there is none."""

    report: Json | None
    seconds: float
    error: str = ""


class Processor(NamedTuple):
    """What a processor of a stopped guest was at."""

    cr3: int
    ring: int
    halted: bool

    @property
    def where(self) -> str:
        return "user" if self.ring else "halted" if self.halted else "kernel"


def processors(registers: str) -> list[Processor]:
    """Of QEMU's `info registers -a`."""
    found = []
    for part in re.split(r"CPU#\d+", registers)[1:]:
        values = dict(re.findall(r"\b(CR3|CPL|HLT)=([0-9a-f]+)", part))
        try:
            found.append(Processor(int(values["CR3"], 16), int(values["CPL"]),
                                   values["HLT"] != "0"))
        except KeyError as missing:
            raise CheckFailed(f"QEMU tells of no {missing}:\n{part[:800]}") from None
    return found


class Guest:
    """A running guest whose RAM is a file."""

    def __init__(self, spec: GuestSpec, name: str) -> None:
        self.folder = LAB / "decoys" / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        prepare(spec, self.folder)
        self.ram = self.folder / "live.raw"
        self.machine = Machine(spec, self.ram, self.folder)
        self.qmp = self.machine.qmp
        # What is told of it beside its memory.
        self.given: list[Word] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.quit()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ready(self) -> None:
        self.machine.wait("READY", 900)

    def stop(self) -> None:
        self.qmp.call("stop")

    def go_on(self) -> None:
        self.qmp.call("cont")

    def inspect(self, tool: Path, *more: Word) -> Look:
        started = time.monotonic()
        done = attempt(tool, "inspect", self.ram, "--json", "--pfns", self.folder / "pfns.tsv",
                       "--force", *self.given, *more)
        took = time.monotonic() - started
        if done.returncode:
            error = json.loads(done.stderr.splitlines()[-1])
            said = "; ".join([error["error"], *error["causes"]])
            return Look(None, took, f"exit code {done.returncode}: {said}")
        return Look(report_of(done.stdout), took)

    def against_kernel(self) -> Agreement:
        """What is dropped, held against the guest's own word of a moment before."""
        read_records(self.folder / "records.img", self.folder)
        found = proof.against_kernel(self.folder, read_tsv(self.folder / "pfns.tsv"), None)
        if found.share < 99:
            raise CheckFailed(f"only {found.share:.2f} % of the free frames were found: {found}")
        return found

    def prune_and_torture(self, tool: Path) -> int:
        """Prunes the RAM under the stopped guest, which then must pass its stress test. The MiB that
        were dropped."""
        done = attempt(tool, "prune", self.ram, "--in-place", "--live-ok", "--json", *self.given)
        if done.returncode:
            raise CheckFailed(f"prune: {done.stderr.strip()[-600:]}")
        self.go_on()
        self.machine.wait("BEAT [0-9]", 120)
        self.machine.ask("torture")
        dropped: int = report_of(done.stdout)["dropped_bytes"]
        return dropped >> 20


def guest_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--cpu", default="qemu64")
    tool_argument(parser)


def decoys_arguments(parser: ArgumentParser) -> None:
    guest_arguments(parser)
    parser.add_argument("--count", type=int, default=10000)


@command("decoys", "pages that pass for VMCOREINFO switch nothing off", decoys_arguments)
def do_decoys(args: Namespace) -> None:
    """A process fills memory with decoys; the kernel is found all the same, and fast."""
    install_tools()
    tool = find_tool(args.sonicshot)
    for series in args.kernels.split(","):
        took = {}
        for count in (0, args.count):
            spec = spec_of(series, args.mem, args.cpu, 1, f"lab.decoys={count}")
            with Guest(spec, f"decoys-{series}-{count}") as guest:
                guest.ready()
                guest.stop()
                looks = [guest.inspect(tool) for _ in range(5)]
                for look in looks:
                    if not look.report:
                        raise CheckFailed(f"{series}, {count} decoys: {look.error}")
                took[count] = min(look.seconds for look in looks)
                found = guest.against_kernel()
                dropped = guest.prune_and_torture(tool)
        cost = took[args.count] - took[0]
        print(f"ok   {series}: {args.count} decoys cost {cost:.3f} s of {took[args.count]:.3f} s; "
              f"{found.found}/{found.kpf_buddy} buddy frames, {found.changed} dropped in "
              f"use by kpageflags, {dropped} MiB pruned, stress test OK", flush=True)
        if cost >= 1:
            raise CheckFailed("too slow")


def nested_arguments(parser: ArgumentParser) -> None:
    guest_arguments(parser)
    parser.add_argument("--inner", type=int, default=160, help="MiB of the nested guest")
    parser.add_argument("--pool", action="store_true", help="its memory in hugetlb")
    parser.add_argument("--append", default="", help="kernel command line of both")
    parser.add_argument("--stops", type=int, default=3)


@command("nested", "a nested guest's memory and a copy of its dump: neither is the guest's kernel",
         nested_arguments)
def do_nested(args: Namespace) -> None:
    """A guest has all memory of another, with the same kernel, in huge pages and in the page cache:
    whatever is known of the kernel, what is free in that is not free."""
    install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for name in args.kernels.split(","):
        inner = spec_of(name, args.inner, args.cpu, 1, args.append)
        folder = captures.capture(inner.with_forms("raw"), f"inner-{inner.name}")
        outer = spec_of(name, args.mem, args.cpu, 1, f"{args.append} lab.pool={int(args.pool)}")
        outer = replace(outer, nested=str(folder / "ram.raw"))
        with Guest(outer, f"nested-{name}") as guest:
            guest.ready()
            for number in range(args.stops):
                if number:
                    guest.go_on()
                stop_as_recorded(guest, tool)
                failed += look_at_nested(guest, tool, f"{name}, stop {number}")
            guest.given = processor(guest.qmp.human("info registers -a"))
            dropped = guest.prune_and_torture(limited(tool, KNOWLEDGE[-1]))
        shutil.rmtree(folder)
        print(f"{'FAIL' if failed else 'ok  '} {name}: {args.stops} stops, {dropped} MiB pruned by "
              "shape at last, stress test OK", flush=True)
    if failed:
        raise CheckFailed(f"{failed} times refused, or frames in use dropped")


def stop_as_recorded(guest: Guest, tool: Path) -> None:
    """Stops a guest while what it has just recorded of its memory still holds: one with little free
    memory may be reclaiming some at any time, but not always."""
    said = ""
    for _ in range(5):
        guest.machine.send("record")
        guest.machine.wait("RECORDED", 900)
        guest.stop()
        look = guest.inspect(tool)
        if not look.report:
            raise CheckFailed(look.error)
        try:
            found = guest.against_kernel()
            if found.unexplained == 0:
                return
            said = str(found)
        except CheckFailed as failed:
            said = str(failed)
        print(f"     stopped once more, for the records may be old: {said}", flush=True)
        guest.go_on()
    raise CheckFailed(f"at five stops in a row: {said}")


def look_at_nested(guest: Guest, tool: Path, name: str) -> int:
    """Reads the stopped guest by each knowledge that there may be; how often that went wrong."""
    wrong, told, said = 0, processor(guest.qmp.human("info registers -a")), []
    for level in KNOWLEDGE:
        for given in ([], told):
            found = guest.inspect(limited(tool, level), *given)
            by = f"by {level}{' and CR3' if given else ''}"
            if not found.report:
                said.append(f"{by} refused: {found.error[:300]}")
                # Without types and processors only what does not stand may be said.
                wrong += bool(given)
                continue
            agreement = guest.against_kernel()
            wrong += agreement.unexplained > 0
            said.append(f"by {found.report['knowledge']}{' and CR3' if given else ''} "
                        f"{agreement.found}/{agreement.kpf_buddy}, {agreement.unexplained} in use "
                        f"dropped, {found.report['inconsistent_blocks']} blocks in question, "
                        f"{found.seconds:.1f} s")
    print(f"     {name}: " + "; ".join(said), flush=True)
    return wrong


def reboot_arguments(parser: ArgumentParser) -> None:
    guest_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the memory of each round")


@command("reboot", "guests that reboot in the same memory", reboot_arguments)
def do_reboot(args: Namespace) -> None:
    """Guests that reboot again and again in the same memory: the kernel that runs is found."""
    install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for series in args.kernels.split(","):
        for append in ("", "nokaslr"):
            told, bad = [], []
            # What earlier kernels left is not to be written over.
            spec = spec_of(series, args.mem, args.cpu, args.smp, f"lab.empty=1 {append}")
            with Guest(spec, f"reboot-{series}-{append or 'kaslr'}-{args.mem}") as guest:
                guest.ready()
                report = None
                for number in range(args.rounds):
                    if number % 2:
                        guest.machine.send("reboot")
                    else:
                        guest.qmp.call("system_reset")
                    guest.ready()
                    guest.stop()
                    report, _, error = guest.inspect(tool)
                    kept = LAB / f"{'reboot' if report else 'bad'}-{series}-{append}-{number}.raw"
                    if report:
                        told.append(guest.against_kernel().changed)
                    else:
                        bad.append(f"round {number}: {error}")
                    if args.keep:
                        shutil.copy(guest.ram, kept)
                    if number + 1 < args.rounds or not report:
                        guest.go_on()
                tortured = "not stress-tested"
                if report:
                    tortured = f"{guest.prune_and_torture(tool)} MiB pruned at last, stress test OK"
            failed += len(bad)
            print(f"{'FAIL' if bad else 'ok  '} {series} {append or 'KASLR'}: {args.rounds} reboots, "
                  f"{len(bad)} refused, {sum(told)} frames dropped in use by kpageflags, {tortured}",
                  *bad, sep="\n     ", flush=True)
    if failed:
        raise CheckFailed(f"{failed} refused")


class Kind(NamedTuple):
    """What processors do when they are stopped: by the kernel's command line, on a CPU."""

    append: str
    cpu: str = "qemu64"
    smp: int = 2


KINDS = {
    "idle": Kind(""),
    "busy": Kind("lab.stress=4"),
    "in user space, PTI": Kind("lab.spin=4 pti=on"),
    "in user space, no PTI": Kind("lab.spin=4 nopti"),
    "busy, PTI": Kind("lab.stress=4 pti=on"),
    "in user space, 5 levels": Kind("lab.spin=4", "max"),
    "in user space, 5 levels, PTI": Kind("lab.spin=2 lab.stress=2 pti=on", "max"),
}


@dataclass
class Seen:
    """Processors, by what they were at; those in user space whose CR3 had bit 12; and page
    tables."""

    where: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("user", "halted", "kernel"), 0))
    twins: int = 0
    roots: set[int] = field(default_factory=set)
    refused: int = 0

    def count(self, processor: Processor) -> None:
        self.where[processor.where] += 1
        self.twins += processor.where == "user" and processor.cr3 >> 12 & 1
        self.roots.add(processor.cr3 >> 12)


def look_at_processors(guest: Guest, tool: Path, stop: int, seen: Seen) -> None:
    """Gives each processor's CR3 to sonicshot, and one that is no page table."""
    for number, processor in enumerate(processors(guest.qmp.human("info registers -a"))):
        seen.count(processor)
        look = guest.inspect(tool, "--cr3", hex(processor.cr3))
        if not look.report:
            seen.refused += 1
            print(f"     stop {stop}, processor {number} ({processor.where}, CR3 "
                  f"{processor.cr3:#x}): {look.error}", flush=True)
    # A page that is no top-level page table.
    look = guest.inspect(tool, "--cr3", hex(0x100000))
    if look.report or "exit code 5" not in look.error:
        raise CheckFailed(f"CR3 0x100000 was believed: {look.report or look.error}")


def processors_arguments(parser: ArgumentParser) -> None:
    guest_arguments(parser)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="", help="parts of their names, `;` between them")


@command("processors", "each processor's CR3, whatever it does", processors_arguments)
def do_processors(args: Namespace) -> None:
    """Whatever a guest's processors do, each is known as the kernel's by its CR3; and not by
    another."""
    install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for series in args.kernels.split(","):
        for name, kind in KINDS.items():
            if args.kinds and not any(part in name for part in args.kinds.split(";")):
                continue
            if kind.cpu == "max" and series == "5.10":
                # Not built with five levels.
                continue
            random = Random(args.seed)
            seen = Seen()
            spec = spec_of(series, args.mem, kind.cpu, kind.smp, kind.append)
            with Guest(spec, f"processors-{series}") as guest:
                guest.ready()
                for number in range(args.stops):
                    time.sleep(random.random() / 2)
                    guest.stop()
                    look_at_processors(guest, tool, number, seen)
                    guest.go_on()
            failed += seen.refused
            print(f"{'FAIL' if seen.refused else 'ok  '} {series}, {name}: {args.stops} stops; "
                  f"{seen.where['user']} processors in user space ({seen.twins} with bit 12), "
                  f"{seen.where['kernel']} in the kernel, {seen.where['halted']} halted, "
                  f"{len(seen.roots)} page tables, {seen.refused} refused", flush=True)
    if failed:
        raise CheckFailed(f"{failed} refused")
