"""What a prune of a mapped-ram file costs beside makedumpfile, and what it brings QEMU."""

import shutil
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import captures
import kernels
import peers
from captures import Restored
from command import command
from debian import install_tools
from errors import CheckFailed
from host import allocated, read_through, run
from spec import GuestSpec
from tool import Refusal, call, find_tool, tool_argument


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def prune(folder: Path, tool: Path, rounds: int) -> str:
    """Prune in place on tmpfs against makedumpfile's filter of the same guest, in turns."""
    peer = peers.makedumpfile()
    version = peers.version(peer).replace(": ", " ")
    names = ["`sonicshot prune --in-place`", f"`{version} -d 17 -l`"]
    times: dict[str, list[float]] = {name: [] for name in names}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        scratch = Path(shm)
        core, file, out = scratch / "vmcore", scratch / "mapped.ram", scratch / "out"
        peers.vmcore(folder / "ram.raw", peers.vmcoreinfo(folder, tool), core)
        for _ in range(rounds):
            # The copy is made anew each time, and so is in memory as the core is.
            run("cp", "--sparse=auto", folder / "mapped.ram", file)
            before = allocated(file)
            times[names[0]].append(peers.timed([tool, "prune", file, "--in-place"]))
            sizes[names[0]] = allocated(file)
            times[names[1]].append(peers.timed([*peer, "-d", "17", "-l", core, out]))
            sizes[names[1]] = allocated(out)
            file.unlink()
            out.unlink()
    median = {name: statistics.median(times[name]) for name in names}
    rows = [["the file as QEMU wrote it (zero pages left out)", mb(before), "", ""]]
    rows += [[name, mb(sizes[name]), f"{median[name] * 1e3:.0f} ms",
              f"{min(times[name]) * 1e3:.0f}-{max(times[name]) * 1e3:.0f} ms"] for name in names]
    ratio = median[names[1]] / median[names[0]]
    return (table(["", "size", f"median of {rounds}", "from-to"], rows)
            + f"\n\nmakedumpfile takes {ratio:.1f} times as long.")


def restore(folder: Path, tool: Path, rounds: int) -> str:
    """What QEMU needs for the snapshot as it wrote it, and for the pruned one."""
    pruned = folder / "pruned.ram"
    report = call(tool, "inspect", folder / "mapped.ram")
    if isinstance(report, Refusal):
        raise CheckFailed(str(report))
    run(tool, "prune", folder / "mapped.ram", "-o", pruned, "--force")
    total = report["total_pages"] * report["page_size"]
    rows = [["all of RAM", mb(total), "", "", ""]]
    files = {"zero elision alone (as QEMU wrote it)": folder / "mapped.ram", "pruned": pruned}
    done: dict[str, list[Restored]] = {name: [] for name in files}
    for file in files.values():
        # Not from the disk, as long as memory is enough.
        read_through(file)
    for _ in range(rounds):
        for name, file in files.items():
            done[name].append(captures.restore(folder, None, None, migration=file))
    for name, file in files.items():
        load, beat, rss = (statistics.median(column) for column in zip(*done[name]))
        rows.append([name, mb(allocated(file)), f"{load:.2f} s", f"{load + beat:.2f} s",
                     f"{rss:,.0f} MiB"])
    pruned.unlink()
    return table(["", "size", "QEMU loads", "to the first heartbeat", "QEMU resident"], rows)


def bench(folder: Path, tool: Path, rounds: int) -> None:
    binary = folder / "sonicshot"
    shutil.copy(tool, binary)
    print(prune(folder, binary, rounds), flush=True)
    print()
    print(restore(folder, binary, max(3, rounds // 2)), flush=True)
    binary.unlink()


def bench_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--mem", type=int, default=4096, help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    tool_argument(parser)


@command("bench", "prune beside makedumpfile; QEMU's restore", bench_arguments)
def do_bench(args: Namespace) -> None:
    """Time of a prune in place beside makedumpfile, and what the smaller file brings QEMU."""
    install_tools()
    # Without KASLR: makedumpfile is given a core with the addresses that /proc/vmcore has.
    spec = GuestSpec(kernels.fetch(args.kernel), mem=args.mem, append="nokaslr lab.beat=100",
                     forms=("raw", "mapped"))
    folder = captures.capture(spec, f"bench-{args.kernel}-{args.mem}-nokaslr")
    bench(folder, find_tool(args.sonicshot), args.rounds)
