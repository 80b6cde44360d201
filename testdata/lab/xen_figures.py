"""What leaving out free pages saves under Xen, over the guest's memory and over what of it is in
use: `xl` beside `sonicshot xen`, the measurements of the paper's Figures 3 and 4."""

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import charts
import kernels
from errors import CheckFailed, GuestFailed
from kernels import LAB
from xen import DOM0_MIB, Dom0

SERIES = "6.1"
# In use in every guest of the first figure, MiB.
LITTLE = 200
# Larger guests take minutes, emulated, to fill all of their free memory with garbage, and to be
# tortured; they read again what they hold.
TORTURED_MIB = 1024
TOOLS = {"xl": ("xl save lab", "xl restore"),
         "sonicshot": ("sonicshot xen save lab", "sonicshot xen restore")}
FACTS = {"save": "save, s", "restore": "restore, s", "bytes": "image, GB"}


def round_of(dom0, tool):
    """Saves the running guest and restores it; nothing is cached, and all is on the disk."""
    save, restore = TOOLS[tool]
    option = "--json" if tool == "sonicshot" else ""
    done = dom0.order(f"timed save {save} /images/image {option}\n"
                      "size image /images/image\n"
                      f"timed restore {restore} /images/image\n"
                      "rm /images/image\nask look LOOK-\nmemory", 3600)
    if not any(line.startswith("LOOK-OK") for line in done.lines):
        raise GuestFailed(f"the guest does not run on: {done.lines[-3:]}")
    found = {**done.times, "bytes": done.sizes["image"], "memory": int(done.word("MEMORY"))}
    if option:
        report = done.json()
        if not report["pruned"]:
            raise CheckFailed(f"a full image: {report['reason']}")
        found |= {name: report[name] for name in ("dropped_pages", "total_pages", "look_seconds",
                                                  "suspended_seconds")}
    return found


def disk_speed(dom0):
    """What the disk of the images does without Xen, MB/s: written, read."""
    done = dom0.order("timed write dd if=/dev/zero of=/images/disk bs=1M count=512\n"
                      "timed read dd if=/images/disk of=/dev/null bs=1M\nrm /images/disk")
    return {way: (512 << 20) / 1e6 / done.times[way] for way in ("write", "read")}


def measure(tool, memory, used, rounds):
    """One guest of its own: saved and restored by both in turn."""
    kernel = kernels.fetch(SERIES, False)
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    small = memory <= TORTURED_MIB
    guest = {"kernel": kernel, "memory": memory,
             "append": f"lab.used={used} lab.garbage={int(small)}"}
    try:
        with Dom0(work, tool, guest) as dom0:
            ready = dom0.order("xl create /lab.cfg\nguest READY 0\ngrep '^USED' $log", 3600)
            point = {"memory": memory, "used": used, "kernel": kernel["release"],
                     "guest_used": int(ready.word("USED")), "cache": dom0.cache,
                     "disk": disk_speed(dom0)}
            point["rounds"] = [{name: round_of(dom0, name) for name in TOOLS}
                               for _ in range(rounds)]
            said = dom0.order("ask torture TORTURE-", 3600).lines if small else ["TORTURE-OK"]
            if "TORTURE-OK" not in said:
                raise GuestFailed(f"the guest does not run on: {said[-2:]}")
            return point
    finally:
        shutil.rmtree(work, ignore_errors=True)


def median(point, tool, fact):
    value = statistics.median(one[tool][fact] for one in point["rounds"])
    return value / 1e9 if fact == "bytes" else value


def change(point, fact):
    """What ours needs more than `xl`; below zero when less."""
    more = median(point, "sonicshot", fact) / median(point, "xl", fact) - 1
    return f"{100 * more:+.1f} %"


def size(mib):
    return f"{mib} MiB" if mib < 1024 else f"{mib / 1024:g} GiB"


def table(points):
    lines = ["| guest | in use | save, s | | restore, s | | image, GB | |",
             "|---|---:|---|---:|---|---:|---|---:|"]
    for point in points:
        cells = [size(point["memory"]), f"{point['guest_used']} MiB"]
        for fact in FACTS:
            both = [median(point, tool, fact) for tool in TOOLS]
            cells.append(" → ".join(f"{value:.{3 if fact == 'bytes' else 1}f}" for value in both))
            cells.append(change(point, fact))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(points, key, label, ticks, log):
    graphs = [(title, [[(point[key], median(point, tool, fact)) for point in points]
                       for tool in TOOLS]) for fact, title in FACTS.items()]
    return charts.svg(["xl", "sonicshot xen"], label, ticks, graphs, log)


PAGE = """# Figures: Xen

What leaving out the free pages saves, over a guest's memory and over what of it is in use: the
measurements of Figures 3 and 4 of Yoshida and Kono's paper, made by `lab.py xen-figures`. Stock
`xl save` and `xl restore` are beside `sonicshot xen save` and `sonicshot xen restore`; both save
the same guest in turn, which runs on in between, in one run, on one disk.

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
{rounds} of each{medians}. Every guest had all its memory back after each restore, and read all
its patterns and files again; those of up to {tortured} had garbage in their free memory and were
tortured in the end. `results.json` has all that was measured.

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


def page(points, memory_points, used_points):
    first, last = points[0], memory_points[-1]
    rounds = {len(point["rounds"]) for point in points}
    speeds = {way: [point["disk"][way] for point in points] for way in ("write", "read")}
    spread = {way: f"{min(all_):.0f} to {max(all_):.0f}" for way, all_ in speeds.items()}
    return PAGE.format(
        little=LITTLE, largest=size(last["memory"]), tortured=size(TORTURED_MIB),
        dom0=DOM0_MIB, kernel=first["kernel"],
        memory_table=table(memory_points), used_table=table(used_points),
        here=" | ".join(change(last, fact) for fact in FACTS),
        here_note="" if last["memory"] == 8192 else f", {size(last['memory'])}",
        medians="" if rounds == {1} else ", the medians",
        rounds=" or ".join(f"{count} round{'s' * (count > 1)}" for count in sorted(rounds)),
        cache=first["cache"], save=median(last, "sonicshot", "save"),
        look=median(last, "sonicshot", "look_seconds"), **spread)


def publish(points, into):
    """The tables, the plots and the page, of what is measured so far."""
    little = sorted((p for p in points if p["used"] == LITTLE), key=lambda p: p["memory"])
    largest = little[-1]["memory"]
    used = sorted((p for p in points if p["memory"] == largest), key=lambda p: p["used"])
    memory_ticks = {p["memory"]: size(p["memory"]) for p in little}
    used_ticks = {p["used"]: f"{p['used'] / 1024:.2g}" for p in used}
    if len(little) > 1:
        (into / "memory.svg").write_text(plot(little, "memory", "the guest's memory", memory_ticks,
                                              True))
    if len(used) > 1:
        (into / "used.svg").write_text(plot(used, "used", "in use, GiB", used_ticks, False))
    (into / "README.md").write_text(page(points, little, used))


def do_figures(args, find_tool):
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    into = args.into or LAB / "xen-figures"
    into.mkdir(parents=True, exist_ok=True)
    results = into / "results.json"
    points = json.loads(results.read_text()) if results.exists() else []
    done = {(point["memory"], point["used"]) for point in points}
    wanted = [(memory, LITTLE) for memory in args.memory]
    wanted += [(max(args.memory), used) for used in args.used]
    for memory, used in wanted:
        if (memory, used) in done:
            continue
        points.append(measure(tool, memory, used, args.rounds))
        results.write_text(json.dumps(points, indent=1) + "\n")
        print(table(points[-1:]).splitlines()[-1], flush=True)
        publish(points, into)
    print(into / "README.md")


def mebibytes(text):
    return [int(size) for size in text.split(",") if size]


def add_command(commands, find_tool):
    figures = commands.add_parser("xen-figures", help="Xen: time and size, `xl` beside ours")
    figures.add_argument("--memory", type=mebibytes, default=[256, 512, 1024, 2048, 4096, 8192],
                         help="of the guests with little in use, MiB")
    figures.add_argument("--used", type=mebibytes, default=[1024, 2048, 4096, 6144],
                         help="by the largest guest, MiB")
    figures.add_argument("--rounds", type=int, default=3, help="saves and restores by each")
    figures.add_argument("--into", type=Path, help="a folder; points that it has are not made again")
    figures.add_argument("--sonicshot", help="the binary; built if not given")
    figures.set_defaults(run=lambda args: do_figures(args, find_tool))
