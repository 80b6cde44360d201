"""A busy guest, whose RAM is pruned under it again and again."""

import shutil
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import kernels
import proof
from command import command
from debian import install_tools
from errors import CheckFailed, CommandFailed
from frames import frames_of, read_tsv
from host import LAB, attempt, run
from machine import Machine, Monitor, prepare
from options import guest_arguments, guest_of
from spec import PAGE, GuestSpec
from tool import find_tool, report_of, tool_argument


def stress(spec: GuestSpec, name: str, stops: int,
           at_stop: Callable[[int, Path, Monitor, Path], None]) -> None:
    """Boots a guest whose processes take and give back memory without rest, stops it again and
    again at any instant, lets `at_stop` work on the RAM under it (the stop's number, RAM, QEMU, a
    folder), and lets it go on."""
    folder = LAB / "stress" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = replace(spec, stress=2 * spec.smp)
    prepare(spec, folder)
    ram = folder / "live.raw"
    machine = Machine(spec, ram, folder)
    random = Random(spec.seed)
    try:
        machine.wait("READY", 900)
        for number in range(stops):
            time.sleep(random.random())
            machine.qmp.call("stop")
            at_stop(number, ram, machine.qmp, folder)
            machine.qmp.call("cont")
        machine.wait("BEAT [0-9]", 120)
        machine.ask("torture")
    finally:
        machine.quit()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Pruner:
    """Prunes RAM at each stop, and counts what it saw."""

    tool: Path
    # Its `vmlinux`, where drgn is asked as well.
    vmlinux: Path | None
    pruned: int = 0
    refused: int = 0
    blocks: int = 0
    pages: int = 0
    left: int = 0
    agreed: int = 0

    def at_stop(self, number: int, ram: Path, qmp: Monitor, folder: Path) -> None:
        done = attempt(self.tool, "inspect", ram, "--json", "--pfns", folder / "pfns.tsv",
                       "--force")
        if done.returncode == 5:
            self.refused += 1
            print(f"stop {number}: refused: {done.stderr.strip()[:600]}", flush=True)
            return
        if done.returncode:
            raise CommandFailed(f"stop {number}: {done.stderr}")
        self.blocks += report_of(done.stdout)["inconsistent_blocks"]
        if self.vmlinux and number % 5 == 0:
            self.ask_drgn(number, self.vmlinux, qmp, folder)
        pruned = report_of(run(self.tool, "prune", ram, "--in-place", "--live-ok", "--json"))
        self.pruned += 1
        self.pages += pruned["dropped_bytes"] // PAGE
        self.left += pruned["left_bytes"] // PAGE

    def check(self) -> None:
        """Of a guest that is refused at each stop nothing is proved."""
        if not self.pruned or not self.pages:
            raise CheckFailed(f"pruned {self.pruned} times ({self.pages} pages), and refused at "
                              f"{self.refused} stops")

    def ask_drgn(self, number: int, vmlinux: Path, qmp: Monitor, folder: Path) -> None:
        """Of each frame that sonicshot calls free, whether drgn does."""
        qmp.call("dump-guest-memory", paging=False, protocol=f"file:{folder / 'dump.elf'}")
        runs = read_tsv(folder / "pfns.tsv")
        try:
            free = proof.drgn(folder, vmlinux)
        except CheckFailed as error:
            print(f"stop {number}: drgn cannot read it: {str(error)[-200:]}", flush=True)
        else:
            wrong = frames_of(runs, "free_buddy", "free_pcp") - (free.buddy | free.pcp)
            if wrong:
                raise CheckFailed(f"stop {number}: not free by drgn: {sorted(wrong)[:8]}")
            self.agreed += 1
        (folder / "dump.elf").unlink()


def stress_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--cpu", default="qemu64")
    guest_arguments(parser)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--oracle", default="", help="drgn")
    tool_argument(parser)
    parser.add_argument("--debug-symbols", action="store_true")


@command("stress", "prune the RAM of a busy guest, again and again", stress_arguments)
def do_stress(args: Namespace) -> None:
    """Stops a busy guest at any instant, prunes the RAM under it, and lets it run on."""
    install_tools()
    tool = find_tool(args.sonicshot)
    kernel = kernels.fetch(args.kernel, args.debug_symbols)
    spec = guest_of(args, kernel, args.mem, args.cpu)
    seen = Pruner(tool, kernel.debug_image if args.oracle == "drgn" else None)
    stress(spec, spec.name, args.stops, seen.at_stop)
    seen.check()
    print(f"{kernel.release}, {args.smp} processors: pruned under the running guest "
          f"{seen.pruned} times ({seen.pages} pages, {seen.left} of them in ranges "
          f"too short for a hole), refused {seen.refused} times, "
          f"{seen.blocks} blocks kept as in question, {seen.agreed} stops agreed with drgn; "
          "stress test OK")
