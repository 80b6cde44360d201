"""What leaving out free pages saves under Xen, over the guest's memory and over what of it is in
use: `xl` beside `sonicshot xen`, the measurements of the paper's Figures 3 and 4."""

import json
import shutil
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import charts
import kernels
from command import command
from debian import install_tools
from errors import CheckFailed, GuestFailed
from host import LAB
from tool import find_tool, tool_argument
from xen import DOM0_MIB, Dom0, XenGuest

SERIES = "6.1"
# In use in every guest of the first figure, MiB.
LITTLE = 200
# Up to here every word of free memory is garbage before the first save; of larger guests one word of
# each page is, for emulated it takes minutes to write them all.
WHOLE_GARBAGE_MIB = 1024
WORDS_IN_PAGE = 512
# When the guest is stress-tested: after each restore, or once in the end. Else it reads again what it
# holds.
STRESS = ("each", "end")
TOOLS = {"xl": ("xl save", "xl restore"),
         "none": ("sonicshot xen save --json --compress none", "sonicshot xen restore"),
         "lz4": ("sonicshot xen save --json --compress lz4", "sonicshot xen restore")}
OURS = [name for name in TOOLS if name != "xl"]
FACTS = {"save": "save, s", "restore": "restore, s", "bytes": "image, GB",
         "suspended": "suspended, s"}
# Stock `xl` says when the guest is suspended, and ends as soon as it has gone on.
XL_SUSPENDED = r"""xl -vvv save -c lab /images/image 2>&1 | {
    grep -q -m 1 'guest has suspended' && now > /tmp/suspended; cat > /dev/null
}
echo "TIME suspended $(cat /tmp/suspended) $(now)"
rm /images/image /tmp/suspended"""


class Point(TypedDict):
    """A guest that was measured, as `results.json` has it."""

    memory: int
    used: int
    kernel: str
    guest_used: int
    cache: str
    # MB/s, to `write` and to `read`.
    disk: dict[str, float]
    # Of `STRESS`.
    stress: NotRequired[str]
    # Each: a fact's value by its name, for each of `TOOLS`.
    rounds: list[dict[str, dict[str, float]]]


def round_of(dom0: Dom0, tool: str, stress: str) -> dict[str, float]:
    """Saves the running guest and restores it; nothing is cached, and all is on the disk. Before,
    it is saved and goes on: how long that suspends it."""
    save, restore = TOOLS[tool]
    ours = tool in OURS
    pause = dom0.order(f"{save} -c lab /images/image\nrm /images/image" if ours else XL_SUSPENDED, 3600)
    done = dom0.order(f"timed save {save} lab /images/image\n"
                      "size image /images/image\n"
                      f"timed restore {restore} /images/image\n"
                      "rm /images/image\nask look LOOK-\nmemory", 3600)
    if not any(line.startswith("LOOK-OK") for line in done.lines):
        raise GuestFailed(f"the guest does not run on: {done.lines[-3:]}")
    if stress == "each":
        tortured(dom0)
    found = {**done.times, "bytes": done.sizes["image"], "memory": int(done.word("MEMORY"))}
    if not ours:
        return found | {"suspended": pause.times["suspended"]}
    report = done.json()
    if not report["pruned"]:
        raise CheckFailed(f"a full image: {report['reason']}")
    return found | {"suspended": pause.json()["suspended_seconds"]} | {
        name: report[name] for name in ("dropped_pages", "total_pages", "look_seconds")}


def disk_speed(dom0: Dom0) -> dict[str, float]:
    """What the disk of the images does without Xen, MB/s: written, read."""
    done = dom0.order("timed write dd if=/dev/zero of=/images/disk bs=1M count=512\n"
                      "timed read dd if=/images/disk of=/dev/null bs=1M\nrm /images/disk")
    return {way: (512 << 20) / 1e6 / done.times[way] for way in ("write", "read")}


def tortured(dom0: Dom0) -> None:
    said = dom0.order("ask torture TORTURE-", 3600).lines
    if "TORTURE-OK" not in said:
        raise GuestFailed(f"the guest does not run on: {said[-2:]}")


def measure(tool: Path, memory: int, used: int, rounds: int, stress: str) -> Point:
    """One guest of its own: saved and restored by both in turn."""
    kernel = kernels.fetch(SERIES)
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    step = 1 if memory <= WHOLE_GARBAGE_MIB else WORDS_IN_PAGE
    guest = XenGuest(kernel, memory, f"lab.used={used} lab.garbage_step={step}")
    try:
        with Dom0(work, tool, guest) as dom0:
            ready = dom0.order("xl create /lab.cfg\nguest READY 0\ngrep '^USED' $log", 3600)
            point: Point = {
                "memory": memory, "used": used, "kernel": kernel.release,
                "guest_used": int(ready.word("USED")), "cache": dom0.cache,
                "disk": disk_speed(dom0), "stress": stress,
                "rounds": [{name: round_of(dom0, name, stress) for name in TOOLS}
                           for _ in range(rounds)]}
            tortured(dom0)
            return point
    finally:
        shutil.rmtree(work, ignore_errors=True)


def median(point: Point, tool: str, fact: str) -> float:
    value = statistics.median(one[tool][fact] for one in point["rounds"])
    return value / 1e9 if fact == "bytes" else value


def change(point: Point, fact: str, tool: str = OURS[0]) -> str:
    """What ours needs more than `xl`; below zero when less."""
    more = median(point, tool, fact) / median(point, "xl", fact) - 1
    return f"{100 * more:+.1f} %"


def size(mib: int) -> str:
    return f"{mib} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"


def table(points: Sequence[Point]) -> str:
    lines = ["| guest | in use | " + "".join(f"{fact} | | " for fact in FACTS.values()).strip(),
             "|---|---:|" + "---|---|" * len(FACTS)]
    for point in points:
        cells = [size(point["memory"]), f"{point['guest_used']} MiB"]
        for fact in FACTS:
            both = [median(point, tool, fact) for tool in TOOLS]
            xl, *ours = (f"{value:.{3 if fact == 'bytes' else 1}f}" for value in both)
            cells.append(f"{xl} → {', '.join(ours)}")
            cells.append(", ".join(change(point, fact, tool) for tool in OURS))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(places: Mapping[int, Point], label: str, ticks: Mapping[int, str], log: bool) -> str:
    """`places`: the points by where they are on the x axis."""
    graphs = [(title, [[(at, median(point, tool, fact)) for at, point in places.items()]
                       for tool in TOOLS]) for fact, title in FACTS.items()]
    names = ["xl", *(f"sonicshot xen, {tool}" for tool in OURS)]
    return charts.svg(names, label, ticks, graphs, log)


PAGE = """# Figures: Xen

What leaving out the free pages saves, over a guest's memory and over what of it is in use: the
measurements of Figures 3 and 4 of Yoshida and Kono's paper, made by `lab.py xen-figures`. Stock
`xl save` and `xl restore` are beside `sonicshot xen save` and `sonicshot xen restore`; both save
the same guest in turn, which runs on in between, in one run, on one disk: `xl` → `--compress none`,
`lz4`. *suspended* is of a save with `-c`, from when the guest is suspended until it goes on.

## {little} MiB in use

![Time to save, time to restore, and image size over the guest's memory](memory.svg)

{memory_table}

## A guest of {largest}

![Time to save, time to restore, and image size over the memory in use](used.svg)

{used_table}

## Beside the paper

| 8 GB, 200 MB in use | save | restore | image |
|---|---:|---:|---:|
| the paper | -94.2 % | -95.3 % | -96.9 % |
| here{here_note} | {here} |

## What was measured

Guests: Debian's {kernel}, paravirtual, one processor, Xen 4.17, dom0 with {dom0} MiB. *In use* is
MemTotal - MemFree; above what the system itself takes it is anonymous memory with data in it.
{rounds} of each{medians}. Every guest had garbage in its free memory (those of up to {whole} in every
word, larger ones in one word of each page) and all its memory back after each restore, and read all
its patterns and files again; {stressed}. `results.json` has all that was measured.

A save begins with nothing cached in dom0 and ends when the image is on the disk (`sync`); a restore
begins with nothing cached. The images lie on ext4 on a virtio disk that QEMU opens with
`cache={cache}`, so the host's page cache has no part in it where that is `none`. That disk alone
wrote {write} and read {read} MB/s.

**Xen and dom0 are emulated** (QEMU without KVM). What the processor does takes many times as long,
the disk is as fast as ever. That makes both slower, and hides how far a real machine's disk
bounds `xl`; what is proportional to the pages saved shrinks as they do, what is not (starting the
tools, suspending the guest, building the domain, looking for free pages) weighs more here than on
real hardware. Compare within a row.

The paper's figures are not reached here. Of the {save:.1f} s that the save of the largest guest
with {little} MiB in use took, finding its free pages was {look:.1f} s: its list of frames, its
records of pages, and the search for its kernel, all of it mapped by an emulated hypervisor. Asking
Xen for the type of every frame, free or not, is libxc's own part of the rest. The image holds what
the guest's own records of its pages take, 64 bytes a page, free or not, and its page tables: 1.8 %
of its memory.
"""


def stressed(points: Sequence[Point]) -> str:
    each = [point.get("stress") == "each" for point in points]
    if all(each):
        return "it was stress-tested after each"
    if any(each):
        return "some were stress-tested after each, all at the end"
    return "it was stress-tested at the end"


def page(points: Sequence[Point], memory_points: Sequence[Point], used_points: Sequence[Point]
         ) -> str:
    first, last = points[0], memory_points[-1]
    rounds = {len(point["rounds"]) for point in points}
    speeds = {way: [point["disk"][way] for point in points] for way in ("write", "read")}
    spread = {way: f"{min(all_):.0f} to {max(all_):.0f}" for way, all_ in speeds.items()}
    return PAGE.format(
        little=LITTLE, largest=size(last["memory"]), whole=size(WHOLE_GARBAGE_MIB), stressed=stressed(points),
        dom0=DOM0_MIB, kernel=first["kernel"],
        memory_table=table(memory_points), used_table=table(used_points),
        here=" | ".join(", ".join(change(last, fact, tool) for tool in OURS)
                        for fact in ("save", "restore", "bytes")),
        here_note="" if last["memory"] == 8192 else f", {size(last['memory'])}",
        medians="" if rounds == {1} else ", the medians",
        rounds=" or ".join(f"{count} round{'s' * (count > 1)}" for count in sorted(rounds)),
        cache=first["cache"], save=median(last, OURS[0], "save"),
        look=median(last, OURS[0], "look_seconds"), **spread)


def publish(points: Sequence[Point], into: Path) -> None:
    """The tables, the plots and the page, of what is measured so far."""
    little = sorted((p for p in points if p["used"] == LITTLE), key=lambda p: p["memory"])
    largest = little[-1]["memory"]
    used = sorted((p for p in points if p["memory"] == largest), key=lambda p: p["used"])
    if len(little) > 1:
        places = {p["memory"]: p for p in little}
        ticks = {at: size(at) for at in places}
        (into / "memory.svg").write_text(plot(places, "the guest's memory", ticks, True))
    if len(used) > 1:
        places = {p["used"]: p for p in used}
        ticks = {at: f"{at / 1024:.2g}" for at in places}
        (into / "used.svg").write_text(plot(places, "in use, GiB", ticks, False))
    (into / "README.md").write_text(page(points, little, used))


def mebibytes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def figures_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--memory", type=mebibytes, default=[256, 512, 1024, 2048, 4096, 8192],
                        help="of the guests with little in use, MiB")
    parser.add_argument("--used", type=mebibytes, default=[1024, 2048, 4096, 6144],
                        help="by the largest guest, MiB")
    parser.add_argument("--rounds", type=int, default=3, help="saves and restores by each")
    parser.add_argument("--stress", choices=STRESS, default=STRESS[0],
                        help="when the guest is stress-tested: after each restore, or once")
    parser.add_argument("--into", type=Path, help="a folder; points that it has are not made again")
    tool_argument(parser)


@command("xen-figures", "Xen: time and size, `xl` beside ours", figures_arguments)
def do_figures(args: Namespace) -> None:
    install_tools()
    tool = find_tool(args.sonicshot)
    into = args.into or LAB / "xen-figures"
    into.mkdir(parents=True, exist_ok=True)
    results = into / "results.json"
    points: list[Point] = json.loads(results.read_text()) if results.exists() else []
    done = {(point["memory"], point["used"]) for point in points}
    wanted = [(memory, LITTLE) for memory in args.memory]
    wanted += [(max(args.memory), used) for used in args.used]
    for memory, used in wanted:
        if (memory, used) in done:
            continue
        points.append(measure(tool, memory, used, args.rounds, args.stress))
        results.write_text(json.dumps(points, indent=1) + "\n")
        print(table(points[-1:]).splitlines()[-1], flush=True)
        publish(points, into)
    print(into / "README.md")
