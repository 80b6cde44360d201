"""What takes too long for the gate: each step run, and its last result kept in NIGHTLY.md."""

import os
import platform
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from command import command
from errors import AlreadyTold, CheckFailed, LabError
from host import LAB, ROOT, run
from tool import find_tool, tool_argument

RESULTS = ROOT / "testdata" / "lab" / "NIGHTLY.md"
NOT_YET = "not run yet"
HEAD = """# What takes too long for the gate

`testdata/lab/lab.py nightly` runs these steps and keeps how each of them ended the last time;
`--only NAME,NAME` runs some. A step that was not run keeps its line. Times are of two cores.

| step | what it holds | ended | took | date | commit | with |
|---|---|---|---:|---|---|---|
"""


@dataclass(frozen=True)
class Step:
    name: str
    holds: str
    words: tuple[str, ...]
    # The program under test is given by `--sonicshot`, as to the lab's commands.
    with_tool: bool = True
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Result:
    ended: str
    took: str = ""
    day: str = ""
    commit: str = ""
    versions: str = ""


def lab(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "testdata" / "lab" / "lab.py"), name, *words)


def faults(name: str, holds: str) -> Step:
    test = ("cargo", "test", "--release", "--locked", "-p", "sonicshot-cli", "--test", "faults", name)
    return Step(name, holds, test, False, (("SONICSHOT_FAULT_ROUNDS", "100"),))


STEPS = (
    Step("mutate", "half an hour of lies in a guest's records: nothing in use is dropped",
         ("cargo", "run", "--release", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--bin",
          "mutate", "--", "--seconds", "1800", "--at-least", "30000"), False),
    Step("fuzz", "a million mutations of the seeds of each parser",
         ("cargo", "test", "--release", "--locked", "--manifest-path", "fuzz/Cargo.toml"), False,
         (("SONICSHOT_FUZZ_ROUNDS", "1000000"),)),
    faults("errors_without_a_kernel", "system calls that fail, 100 points of each kind"),
    faults("errors_with_a_kernel", "the same, of commands that look into a guest"),
    faults("kills_without_a_kernel", "kills at 100 system calls of each job"),
    faults("kills_with_a_kernel", "the same, of commands that look into a guest"),
    faults("files_that_change", "files cut off and rewritten while they are read, 100 tries each"),
    faults("guests_that_change", "the same, of guests"),
    Step("matrix", "every kind of guest on every kernel: pruned, restored, stress test",
         lab("matrix")),
    Step("reset", "guests stopped after resets, kexec and crashes: what the next owner uses stays",
         lab("reset", "--mapped-ram")),
    Step("decoys", "pages that pass for a kernel's records switch nothing off", lab("decoys")),
    Step("nested", "a guest in the guest is not taken for it", lab("nested")),
    Step("kill", "50 prunes in place killed; what is left runs on", lab("kill", "--rounds", "50")),
    Step("small", "kernels of sandboxes, without types: restored, stress test", lab("small")),
    Step("serve", "guests run on in memory that is served", lab("serve")),
    Step("forms", "streams of background snapshots, with bitmaps, mapped-ram at an offset",
         lab("forms")),
    Step("readers", "pruned cores and kdumps in makedumpfile, crash and drgn", lab("readers")),
    Step("libvirt", "virsh save, prune, virsh restore, stress test", lab("libvirt")),
    Step("oldqemu", "streams of older QEMUs", lab("oldqemu")),
    Step("soft", "page cache left out, warm again from the disk", lab("soft")),
    Step("soft-apps", "the same of a Debian root whose databases and runtimes run",
         lab("soft-apps")),
    Step("live", "guests saved while they run, restored in each way; saves killed", lab("live")),
    Step("xen", "a real Xen: saved, pruned, saved live, killed, damaged; restored, stress test",
         lab("xen")),
    Step("xen-disk", "the same with a disk: page cache left out, warm again from it",
         lab("xen", "--disk")),
    Step("tasks", "a guest's processes read in its memory, as in its /proc", lab("tasks"), False),
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def results(text: str) -> dict[str, Result]:
    """What the table says of each step."""
    found = {}
    for line in text.splitlines():
        row = cells(line)
        if len(row) == 7 and row[0].strip("`") in {step.name for step in STEPS}:
            name, _, *rest = row
            found[name.strip("`")] = Result(*rest)
    return found


def table(of: dict[str, Result]) -> str:
    lines = []
    for step in STEPS:
        result = of.get(step.name, Result(NOT_YET))
        row = (f"`{step.name}`", step.holds, result.ended, result.took, result.day, result.commit,
               result.versions)
        lines.append(f"| {' | '.join(row)} |".replace("  ", " "))
    return HEAD + "\n".join(lines) + "\n"


def versions() -> str:
    """Of what the results depend on besides the commit."""
    rust = run("rustc", "--version").split()[1]
    found = [f"rustc {rust}", f"Linux {platform.release().split('-')[0]}"]
    qemus = sorted(LAB.glob("**/usr/bin/qemu-system-x86_64"))
    if qemus:
        told = subprocess.run([qemus[0], "--version"], capture_output=True, text=True, check=False)
        number = re.search(r"version (\S+)", told.stdout)
        if number:
            found.append(f"QEMU {number[1]}")
    return ", ".join(found)


def try_step(step: Step, tool: Path, log: Path) -> Result:
    words = [*step.words, *(["--sonicshot", str(tool)] if step.with_tool else [])]
    begun = time.monotonic()
    with open(log, "w") as out:
        done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, **dict(step.variables)})
    minutes = (time.monotonic() - begun) / 60
    ended = "OK" if done.returncode == 0 else f"**failed** ({done.returncode})"
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip()
    return Result(ended, f"{minutes:.0f} min", date.today().isoformat(), commit, versions())


def nightly_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--only", help="names of steps, with commas between them")
    parser.add_argument("--list", action="store_true", help="what there is, and no more")
    tool_argument(parser)


@command("nightly", "what takes too long for the gate; NIGHTLY.md keeps the results",
         nightly_arguments)
def do_nightly(args: Namespace) -> None:
    if args.list:
        print("\n".join(f"{step.name:24} {step.holds}" for step in STEPS))
        return
    names = args.only.split(",") if args.only else [step.name for step in STEPS]
    unknown = set(names) - {step.name for step in STEPS}
    if unknown:
        raise LabError(f"no such step: {', '.join(sorted(unknown))}; `--list` has them")
    tool, logs = find_tool(args.sonicshot), LAB / "nightly"
    logs.mkdir(parents=True, exist_ok=True)
    failed = []
    for step in (step for step in STEPS if step.name in names):
        log = logs / f"{step.name}.log"
        print(f"{step.name}: {step.holds} (log: {log})", flush=True)
        result = try_step(step, tool, log)
        print(f"  {result.ended}, {result.took}", flush=True)
        if result.ended != "OK":
            failed.append(step.name)
        # Kept at once: what comes after may be cut off.
        kept = results(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(table({**kept, step.name: result}))
    if failed:
        raise CheckFailed(f"failed: {', '.join(failed)}")
