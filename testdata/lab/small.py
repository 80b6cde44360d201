"""Guests of which little is known: kernels of sandboxes, and Debian's with their types hidden.

Each is captured, read by all that is known of it and by less, held against its own kernel, pruned by
less, and run on."""

import shutil
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import proof
import sandbox
from captures import HOME, Meta, capture, restore
from command import command
from debian import install_tools
from errors import AlreadyTold, CheckFailed, LabError
from frames import DROPPED, same_but_dropped
from host import Word, allocated, run
from levels import KNOWLEDGE, LEAST_IDLE, LevelPruner, Seen, below, look, processor, share
from spec import GuestSpec
from stress import stress
from tool import Refusal, find_tool, tool_argument


class Proof:
    """All checks on one capture."""

    def __init__(self, tool: Path, folder: Path) -> None:
        self.tool, self.folder = tool, folder
        self.meta = Meta.read(folder)
        self.processor = processor((folder / "registers").read_text())
        self.said: list[str] = []

    def given(self, form: str, level: str) -> list[Word]:
        """What raw RAM does not tell: of a large guest where it lies, and where nothing else is
        known what its processors run on."""
        if form != "ram.raw":
            return []
        place: list[Word] = ["--layout", "firecracker"] if self.meta.spec.mem > 3072 else []
        return place + (self.processor if level == KNOWLEDGE[-1] else [])

    def look(self, form: str, level: str) -> Seen:
        seen = look(self.tool, self.folder / form, level, self.folder / "pfns.tsv",
                    *self.given(form, level))
        if isinstance(seen, Refusal):
            raise CheckFailed(f"{form} by {level}: {seen}")
        return seen

    def known(self) -> str:
        """How much is known, of the file that tells of the processors."""
        seen = self.look("mapped.ram", KNOWLEDGE[0])
        if seen.report["kernel_release"] != self.meta.release:
            raise CheckFailed(f"kernel {seen.report['kernel_release']}")
        return seen.knowledge

    def levels(self, known: str) -> dict[tuple[str, str], Seen]:
        """Each form read by each level, against all that is known and the guest's own kernel."""
        found = {}
        for form in ("ram.raw", "mapped.ram"):
            most = self.look(form, known)
            for level in below(known):
                seen = self.look(form, level)
                part = share(most, seen)
                if seen.knowledge != level or part < LEAST_IDLE[level]:
                    raise CheckFailed(f"{form} by {seen.knowledge}: {part:.3f} % of {known}'s")
                found[form, level] = seen
                if form == "ram.raw":
                    # The other was taken a moment later.
                    self.against_kernel(seen, part)
        return found

    def against_kernel(self, seen: Seen, part: float) -> None:
        agreement = proof.against_kernel(self.folder, seen.runs, None)
        if agreement.unexplained or agreement.share < 99:
            raise CheckFailed(f"by {seen.knowledge}: {agreement}")
        self.said.append(f"by {seen.knowledge} {agreement.found}/{agreement.kpf_buddy} buddy frames "
                         f"({part:.3f} % of the most), {agreement.pcp} per-CPU")

    def raw_alone(self) -> None:
        """What is said of raw RAM by shape where nothing tells of the processors."""
        alone = look(self.tool, self.folder / "ram.raw", KNOWLEDGE[-1], self.folder / "pfns.tsv",
                     *self.given("ram.raw", ""))
        told = f"refused: {alone}" if isinstance(alone, Refusal) else "read"
        self.said.append(f"raw alone by shape {told}")

    def prune(self, form: str, level: str, seen: Seen, torture: bool) -> None:
        pruned = self.folder / "pruned"
        run("cp", "--sparse=auto", self.folder / form, pruned)
        before = allocated(pruned)
        run(self.tool, "prune", pruned, "--in-place", "--live-ok", "--min-hole", "0",
            "--at-most", level, *self.given(form, level))
        self.said.append(f"{form} by {level} {before >> 20} -> {allocated(pruned) >> 20} MiB")
        raw = form == "ram.raw"
        if raw:
            same_but_dropped(self.folder / form, pruned, seen.runs, self.meta.layout, DROPPED)
        if torture:
            restore(self.folder, pruned if raw else None, migration=None if raw else pruned)
            self.said.append("stress test OK")
        pruned.unlink()


def prove(tool: Path, folder: Path, known: str, torture: bool) -> str:
    """All checks; the raw RAM is pruned by the most that is tried, the mapped-ram file by the
    least, and the guest run on from each. A line of what was seen."""
    proof = Proof(tool, folder)
    found = proof.known()
    if known and found != known:
        raise CheckFailed(f"known by {found}, not by {known}")
    seen = proof.levels(found)
    proof.raw_alone()
    levels = below(found)
    for form, level in (("ram.raw", levels[0]), ("mapped.ram", levels[-1])):
        proof.prune(form, level, seen[form, level], torture)
    return "; ".join(proof.said)


def small_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=",".join(sandbox.ALL),
                        help="sandboxes' (firecracker and kata once they are built), or Debian's "
                             "(6.1), of which types are hidden")
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--smp", type=int, default=1)
    parser.add_argument("--cpu", default="qemu64")
    parser.add_argument("--machine", help="microvm, and pc for Debian's")
    parser.add_argument("--append", default="", help="kernel command line")
    parser.add_argument("--knowledge", default="", help="what must be known of them")
    parser.add_argument("--no-torture", action="store_true")
    parser.add_argument("--stops", type=int, default=0,
                        help="of a busy guest, whose RAM is pruned under it at each")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("small", "kernels of which little is known: capture, check, prune, restore, stress test",
         small_arguments)
def do_small(args: Namespace) -> None:
    install_tools()
    tool = find_tool(args.sonicshot)
    failed = 0
    for name in args.kernels.split(","):
        more = {"machine": args.machine} if args.machine else {}
        spec = sandbox.guest(name, mem=args.mem, cpu=args.cpu, smp=args.smp,
                             forms=("raw", "mapped"), append=args.append, **more)
        spec = replace(spec, append=f"no_timer_check {spec.append}".strip())
        try:
            said = prove(tool, capture(spec, spec.name), args.knowledge, not args.no_torture)
            print(f"ok   {spec.name}, Linux {spec.kernel.release}: {said}", flush=True)
            if args.stops:
                busy(tool, spec, args.stops)
        except LabError as error:
            failed += 1
            print(f"FAIL {spec.name}: {error}", flush=True)
        if not args.keep:
            shutil.rmtree(HOME / spec.name, ignore_errors=True)
    if failed:
        raise AlreadyTold


def busy(tool: Path, spec: GuestSpec, stops: int) -> None:
    seen = LevelPruner(tool)
    stress(spec, spec.name, stops, seen.at_stop)
    print(f"ok   {spec.name}, busy: {seen.check()}; stress test OK", flush=True)
