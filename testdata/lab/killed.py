"""Kills a prune in place at random moments: what is left must run, and a second prune must end
where an undisturbed one ends."""

import shutil
import statistics
import subprocess
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from random import Random

import captures
import kernels
import mapped
from command import command
from debian import install_tools
from errors import CheckFailed, CommandFailed, Differs
from host import LAB, allocated, run
from spec import PAGE, GuestSpec
from tool import find_tool, report_of, tool_argument

STEP = 8 << 20


def check_raw(original: Path, left: Path, pruned: Path) -> int:
    """Every page is as it was before or as it is in the end; returns how many of those that the
    prune changes it has changed."""
    changed = 0
    with open(original, "rb") as a, open(left, "rb") as b, open(pruned, "rb") as c:
        while before := a.read(STEP):
            now, after = b.read(STEP), c.read(STEP)
            if now in (before, after) and before == after:
                continue
            for at in range(0, len(before), PAGE):
                page = slice(at, at + PAGE)
                if now[page] == before[page]:
                    continue
                if now[page] != after[page]:
                    raise Differs(f"{left} holds at {a.tell() - len(before) + at:#x} "
                                         "neither the old page nor the new one")
                changed += 1
        if b.read(1) or c.read(1):
            raise Differs(f"{left} has grown")
    return changed


def kill(tool: Path, folder: Path, form: str, rounds: int, seed: int) -> str:
    """Returns a line that says how it went."""
    original = folder / form
    work = LAB / "kill" / f"{folder.name}-{form}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    pruned, file = work / "pruned", work / "file"
    prune = (tool, "prune", file, "--in-place", "--json")
    times = []
    for _ in range(3):
        run("cp", "--sparse=auto", original, file)
        started = time.monotonic()
        report = report_of(run(*prune))
        times.append(time.monotonic() - started)
    file.rename(pruned)
    whole = statistics.median(times)

    def check(done: bool) -> int:
        """Of the pages to drop, how many are gone."""
        if form == "mapped.ram":
            gone = mapped.check_pruned(original, file, alike=False)
            if done:
                mapped.check_pruned(pruned, file, alike=True)
            return sum(gone.values())
        if done:
            run("cmp", pruned, file)
        return check_raw(original, file, pruned)

    random = Random(seed)
    seen = {"before it changed anything": 0, "in the middle": 0, "when it was done": 0}
    tortured = 0
    for number in range(rounds):
        run("cp", "--sparse=auto", original, file)
        before = allocated(file)
        process = subprocess.Popen([str(word) for word in prune], stdout=subprocess.DEVNULL)
        # One in each of as many equal parts of its time, in the end a little beyond it.
        time.sleep(whole * 1.05 * (number + random.random()) / rounds)
        process.kill()
        ended = process.wait()
        if ended > 0:
            raise CommandFailed(f"round {number}: the prune itself failed with {ended}")
        gone = check(ended == 0)
        if ended == 0 or allocated(file) <= allocated(pruned):
            seen["when it was done"] += 1
        elif gone or allocated(file) != before:
            seen["in the middle"] += 1
        else:
            seen["before it changed anything"] += 1
        torture = number % 10 == 9
        tortured += torture
        if form == "mapped.ram":
            captures.restore(folder, None, "torture" if torture else "look", migration=file)
        else:
            # The guest runs in the file, so in a copy of it.
            copy = work / "running"
            run("cp", "--sparse=always", file, copy)
            captures.restore(folder, copy, "torture" if torture else "look")
            copy.unlink()
        run(*prune)
        check(True)
        # A block of the file system more or less is not ours.
        if abs(allocated(file) - allocated(pruned)) > 1 << 20:
            raise CheckFailed(f"round {number}: {allocated(file)} bytes on disk after the second "
                             f"prune, {allocated(pruned)} undisturbed")
    shutil.rmtree(work)
    where = ", ".join(f"{count} {name}" for name, count in seen.items())
    return (f"{form}, {report['kernel_release']}: {rounds} prunes of {whole:.3f} s killed ({where}): "
            f"each file restored and looked through, {tortured} of them stress-tested, "
            "each second prune ends where an undisturbed one does")


def kill_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    tool_argument(parser)


@command("kill", "kill prunes in place, run on from what is left", kill_arguments)
def do_kill(args: Namespace) -> None:
    """Kills prunes in place at random moments, and lets a guest run from what is left."""
    install_tools()
    tool = find_tool(args.sonicshot)
    spec = GuestSpec(kernels.fetch(args.kernel), forms=("raw", "mapped"))
    folder = captures.capture(spec, f"kill-{args.kernel}")
    for form in ("mapped.ram", "ram.raw"):
        print(kill(tool, folder, form, args.rounds, args.seed), flush=True)
