"""What a prune of a mapped-ram file costs beside makedumpfile, and what it brings QEMU."""

import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import machine
import peers
from errors import CheckFailed
from kernels import run
from matrix import allocated, call


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def mb(count):
    return f"{count / 1e6:,.1f} MB"


def prune(folder, tool, rounds):
    """Prune in place on tmpfs against makedumpfile's filter of the same guest, in turns."""
    peer = peers.makedumpfile()
    version = subprocess.run([*peer, "-v"], capture_output=True, text=True).stdout.split("\n")[0]
    names = ["`sonicshot prune --in-place`", f"`{version.replace(': ', ' ')} -d 17 -l`"]
    times, sizes = {name: [] for name in names}, {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        scratch = Path(scratch)
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


def restore(folder, tool, rounds):
    """What QEMU needs for the snapshot as it wrote it, and for the pruned one."""
    pruned = folder / "pruned.ram"
    report, refusal = call(tool, "inspect", folder / "mapped.ram")
    if refusal:
        raise CheckFailed(refusal)
    run(tool, "prune", folder / "mapped.ram", "-o", pruned, "--force")
    total = report["total_pages"] * 4096
    rows = [["all of RAM", mb(total), "", "", ""]]
    files = {"zero elision alone (as QEMU wrote it)": folder / "mapped.ram", "pruned": pruned}
    done = {name: [] for name in files}
    for file in files.values():
        # Not from the disk, as long as memory is enough.
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    for _ in range(rounds):
        for name, file in files.items():
            done[name].append(machine.restore(folder, None, None, migration=file))
    for name, file in files.items():
        load, beat, rss = (statistics.median(column) for column in zip(*done[name]))
        rows.append([name, mb(allocated(file)), f"{load:.2f} s", f"{load + beat:.2f} s",
                     f"{rss:,.0f} MiB"])
    pruned.unlink()
    return table(["", "size", "QEMU loads", "to the first heartbeat", "QEMU resident"], rows)


def bench(folder, tool, rounds):
    binary = folder / "sonicshot"
    shutil.copy(tool, binary)
    print(prune(folder, binary, rounds), flush=True)
    print()
    print(restore(folder, binary, max(3, rounds // 2)), flush=True)
    binary.unlink()
