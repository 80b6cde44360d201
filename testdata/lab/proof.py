"""Holds what sonicshot says of a captured guest against the guest's own kernel, against other
readers, and against the guest itself: restored from a pruned memory, it must pass its torture."""

import array
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
import machine
from errors import CheckFailed
from kernels import LAB, run

# Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h).
BITS = {"LRU": 5, "SLAB": 7, "BUDDY": 10, "MMAP": 11, "ANON": 12, "COMPOUND_HEAD": 15,
        "COMPOUND_TAIL": 16, "HUGE": 17, "THP": 22, "OFFLINE": 23, "PGTABLE": 26, "RESERVED": 32}
IN_USE = sum(1 << BITS[b] for b in ("LRU", "SLAB", "MMAP", "ANON", "COMPOUND_HEAD",
                                    "COMPOUND_TAIL", "HUGE", "THP", "PGTABLE", "RESERVED"))
PAGE = 4096
DROPPED = ("free_buddy", "free_pcp", "offline", "zero")


def words(path):
    data = array.array("Q")
    data.frombytes(path.read_bytes())
    return data


def read_tsv(path):
    """`--pfns`: sorted runs that cover every RAM frame once."""
    runs, last = [], -1
    for line in path.read_text().splitlines():
        first, end, name = line.split("\t")
        first, end = int(first), int(end)
        if first <= last or end < first:
            raise CheckFailed(f"{path.name}: run {first}-{end} after {last}")
        runs.append((first, end, name))
        last = end
    return runs


def inspect(tool, dump, symbols, out, more=()):
    command = [tool, "inspect", dump, "--json", "--pfns", out, "--force", *more]
    for file in symbols:
        command += ["--symbols", file]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise CheckFailed(f"inspect {dump.name}: {done.stderr.strip()}")
    return json.loads(done.stdout), read_tsv(out)


def ram_frames(meta):
    return [(part["gpa"] // PAGE, (part["gpa"] + part["len"]) // PAGE, part["file_offset"])
            for part in meta["layout"]]


def only_ram(runs, meta):
    """The runs clipped to the guest's RAM: an ELF dump also has firmware ROM."""
    clipped = []
    for first, end, name in runs:
        for start, stop, _ in ram_frames(meta):
            a, b = max(first, start), min(end, stop - 1)
            if a <= b:
                clipped.append((a, b, name))
    return clipped


def frames_of(runs, *names):
    found = set()
    for first, end, name in runs:
        if name in names:
            found.update(range(first, end + 1))
    return found


def against_kernel(folder, runs, free_at_stop):
    """Against /proc/kpageflags, written milliseconds before the stop."""
    flags = words(folder / "kpageflags.bin")
    counts = words(folder / "kpagecount.bin")
    buddy = {pfn for pfn, f in enumerate(flags) if f >> BITS["BUDDY"] & 1}
    ours = frames_of(runs, "free_buddy")
    pcp = frames_of(runs, "free_pcp")
    wrong = []
    for pfn in ours | pcp | frames_of(runs, "offline"):
        used = flags[pfn] & IN_USE or (pfn < len(counts) and counts[pfn])
        offline = flags[pfn] >> BITS["OFFLINE"] & 1
        if used and not offline and not flags[pfn] >> BITS["BUDDY"] & 1:
            wrong.append(pfn)
    # A frame that was in use when the flags were written and free at the stop is explained when
    # a second reader finds it free in the same dump.
    unexplained = [pfn for pfn in wrong if free_at_stop is None or pfn not in free_at_stop]
    found = len(buddy & ours)
    # Free when the flags were written, allocated before the stop: explained likewise.
    lost = buddy - ours - pcp
    missed = [pfn for pfn in lost if free_at_stop is not None and pfn in free_at_stop]
    return {"kpf_buddy": len(buddy), "found": found, "pcp": len(pcp),
            "changed": len(wrong), "unexplained": len(unexplained), "missed": len(missed),
            "share": 100 * found / max(1, len(buddy))}


def check_zero(folder, runs, meta):
    with open(folder / "ram.raw", "rb") as ram:
        zero = bytes(PAGE)
        for first, end, name in runs:
            if name != "zero":
                continue
            for pfn in range(first, end + 1):
                ram.seek(offset_of(pfn, meta))
                if ram.read(PAGE) != zero:
                    raise CheckFailed(f"frame {pfn} is called zero and is not")


def offset_of(pfn, meta):
    for start, stop, offset in ram_frames(meta):
        if start <= pfn < stop:
            return offset + (pfn - start) * PAGE
    raise CheckFailed(f"frame {pfn} is not RAM")


def same_but_dropped(before, after, runs, meta, dropped):
    """Every kept page is as it was, every dropped one is zero."""
    with open(before, "rb") as a, open(after, "rb") as b:
        for first, end, name in runs:
            offset = offset_of(first, meta)
            length = (end - first + 1) * PAGE
            while length:
                step = min(length, 8 << 20)
                a.seek(offset)
                b.seek(offset)
                want = bytes(step) if name in dropped else a.read(step)
                if b.read(step) != want:
                    raise CheckFailed(f"{after.name} differs in {name} at {offset:#x}")
                offset += step
                length -= step


DRGN = r"""
import sys, json
from drgn import Program
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import page_to_pfn
from drgn.helpers.linux.mmzone import for_each_online_pgdat
from drgn.helpers.linux.percpu import per_cpu_ptr
from drgn.helpers.linux.cpumask import for_each_possible_cpu
prog = Program()
prog.set_core_dump(sys.argv[1])
prog.load_debug_info([sys.argv[2]])
buddy, pcp = [], []
for pgdat in for_each_online_pgdat(prog):
    for zone in pgdat.node_zones:
        if not zone.spanned_pages.value_():
            continue
        for order in range(len(zone.free_area)):
            for head in zone.free_area[order].free_list:
                for page in list_for_each_entry("struct page", head.address_of_(), "lru"):
                    buddy.append((page_to_pfn(page).value_(), order))
        try:
            pageset, at = zone.per_cpu_pageset, lambda p: p
        except AttributeError:
            pageset, at = zone.pageset, lambda p: p.pcp.address_of_()
        for cpu in for_each_possible_cpu(prog):
            pages = at(per_cpu_ptr(pageset, cpu))
            n = len(pages.lists)
            for index in range(n):
                order = 0 if n <= 3 else index // 3 if index < 12 else 9
                for page in list_for_each_entry("struct page", pages.lists[index].address_of_(), "lru"):
                    pcp.append((page_to_pfn(page).value_(), order))
json.dump({"buddy": buddy, "pcp": pcp}, sys.stdout)
"""


def drgn(folder, vmlinux):
    """The free frames by drgn: those in the buddy allocator, those on per-CPU lists."""
    venv = LAB / "drgn"
    if not (venv / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", venv)
        run(venv / "bin" / "pip", "install", "-q", "drgn")
    done = subprocess.run([venv / "bin" / "python", "-c", DRGN, folder / "dump.elf", vmlinux],
                          capture_output=True, text=True)
    if done.returncode:
        raise CheckFailed(f"drgn: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return [{pfn + i for pfn, order in found[kind] for i in range(1 << order)}
            for kind in ("buddy", "pcp")]


def crash(folder, vmlinux, pruned):
    """Free pages by Debian's crash, on the dump and on the pruned one."""
    if not shutil.which("crash"):
        run("apt-get", "install", "-y", "--no-install-recommends", "crash")
    totals = []
    for dump in (folder / "dump.elf", pruned):
        done = subprocess.run(["crash", "-s", str(vmlinux), str(dump)], input="kmem -f\nquit\n",
                              capture_output=True, text=True)
        found = [int(n) for n in re.findall(r"^nr_free_pages: (\d+)\s+\(verified\)", done.stdout, re.M)]
        if not found:
            raise CheckFailed(f"crash on {dump.name}: {done.stdout[-800:]}{done.stderr[-800:]}")
        totals.append(sum(found))
    if totals[0] != totals[1]:
        raise CheckFailed(f"crash counts {totals[0]} free pages, after the prune {totals[1]}")
    return totals[0]


def prove(tool, folder, variants, torture=True, oracles=()):
    """All checks on one capture; returns a row of the table."""
    meta = json.loads((folder / "meta.json").read_text())
    kernel = meta["spec"]["kernel"]
    work = LAB / "prove" / meta["name"]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    files = {"none": []}
    if kernel.get("vmlinux"):
        vmlinux = LAB / kernel["vmlinux"]
        files["vmlinux"] = [vmlinux]
        files["map+vmlinux"] = [LAB / kernel["system_map"], vmlinux]
    row = {"kernel": meta["release"], "mem": meta["spec"]["mem"], "cpu": meta["spec"]["cpu"],
           "name": meta["name"], "symbols": []}
    reference = None
    for variant in variants:
        if variant not in files:
            raise CheckFailed(f"no debug symbols for `{variant}`: run setup --debug-symbols")
        for dump in ("ram.raw", "dump.elf"):
            report, runs = inspect(tool, folder / dump, files[variant], work / "pfns.tsv")
            if report["kernel_release"] != meta["release"]:
                raise CheckFailed(f"kernel {report['kernel_release']}, not {meta['release']}")
            runs = only_ram(runs, meta)
            covered = sum(end - first + 1 for first, end, _ in runs)
            if covered != sum(stop - start for start, stop, _ in ram_frames(meta)):
                raise CheckFailed(f"{dump}: {covered} frames covered")
            if reference is None:
                reference = runs
            elif runs != reference:
                raise CheckFailed(f"{dump} with symbols {variant} reads differently")
        row["symbols"].append(variant)
    runs = reference
    free_at_stop = None
    if "drgn" in oracles:
        buddy, pcp = drgn(folder, LAB / kernel["vmlinux"])
        ours, our_pcp = frames_of(runs, "free_buddy"), frames_of(runs, "free_pcp")
        if ours - buddy or our_pcp - pcp:
            raise CheckFailed(f"not free by drgn: {sorted((ours - buddy) | (our_pcp - pcp))[:8]}")
        row["drgn"] = f"{len(ours)}/{len(buddy)}, pcp {len(our_pcp)}/{len(pcp)}"
        free_at_stop = buddy | pcp
    row.update(against_kernel(folder, runs, free_at_stop))
    if row["unexplained"]:
        raise CheckFailed(f"{row['unexplained']} dropped frames are in use by kpageflags")
    if row["share"] < 99.9 and not (free_at_stop and row["missed"] == 0):
        raise CheckFailed(f"only {row['share']:.3f} % of kpageflags' buddy frames found")
    check_zero(folder, runs, meta)

    ram = work / "ram.raw"
    run("cp", "--sparse=auto", folder / "ram.raw", ram)
    before = ram.stat().st_blocks * 512
    stats = json.loads(run(tool, "prune", ram, "--in-place", "--min-hole", "0",
                           "--json"))
    after = ram.stat().st_blocks * 512
    # A guest with page_poison=1 wants its pattern back, and a hole cannot hold it.
    poisoned = "page_poison=1" in meta["spec"].get("append", "")
    if poisoned != (stats["kept_for_fill_bytes"] > 0):
        raise CheckFailed(f"page_poison: {poisoned}, kept for it: {stats['kept_for_fill_bytes']}")
    dropped = ("offline", "zero") if poisoned else DROPPED
    same_but_dropped(folder / "ram.raw", ram, runs, meta, dropped)
    again = json.loads(run(tool, "prune", ram, "--in-place", "--min-hole", "0", "--json"))
    if again["punched"] or ram.stat().st_blocks * 512 != after:
        raise CheckFailed("a second prune changed the file")
    copy = work / "copy.raw"
    run(tool, "prune", folder / "ram.raw", "-o", copy)
    run("cmp", ram, copy)
    copy.unlink()
    row["disk"] = f"{before >> 20} -> {after >> 20} MiB"

    pruned = work / "pruned.elf"
    run(tool, "prune", folder / "dump.elf", "-o", pruned)
    headers = run("readelf", "-lW", pruned)
    if "Error" in headers or "Warning" in headers:
        raise CheckFailed(f"readelf: {headers[:400]}")
    _, elf_runs = inspect(tool, pruned, [], work / "pfns.tsv")
    if only_ram(elf_runs, meta) != runs:
        raise CheckFailed("the pruned ELF core reads differently")
    row["elf"] = f"{(folder / 'dump.elf').stat().st_size >> 20} -> {pruned.stat().st_size >> 20} MiB"
    if "crash" in oracles:
        total = crash(folder, LAB / kernel["vmlinux"], pruned)
        ours = sum(1 for _ in frames_of(runs, "free_buddy"))
        if total != ours:
            raise CheckFailed(f"crash counts {total} free pages, we {ours}")
        row["crash"] = total
    sizes = []
    restored = work / "restored.raw"
    for how in ("none", "lz4", "zstd"):
        checkpoint = work / "guest.sonic"
        run(tool, "save", folder / "ram.raw", "-o", checkpoint, "--compress", how, "--force")
        run(tool, "verify", checkpoint, "--against", folder / "ram.raw")
        run(tool, "restore", checkpoint, "-o", restored, "--force")
        if poisoned:
            # Restored free pages hold the pattern, whatever they held before.
            run(tool, "verify", checkpoint, "--against", restored)
        else:
            run("cmp", ram, restored)
        sizes.append(f"{checkpoint.stat().st_size >> 20}")
    row["sonic"] = " / ".join(sizes) + " MiB"
    # Where the bytes are the same, one of both files is enough for the torture.
    ram = restored

    row["torture"] = "-"
    if torture:
        beat = machine.restore(folder, ram).beat
        row["torture"] = "OK"
        row["beat"] = f"{beat:.2f} s"
        ram.unlink()
        mapped = folder / "mapped.ram"
        if mapped.exists():
            # QEMU's own snapshot format: an unchanged QEMU loads the pruned file.
            file = work / "mapped.ram"
            run("cp", "--sparse=auto", mapped, file)
            before = file.stat().st_blocks * 512
            # Every page, as in a copy.
            run(tool, "prune", file, "--in-place", "--min-hole", "0")
            copy = work / "copy.ram"
            run(tool, "prune", mapped, "-o", copy)
            run("cmp", file, copy)
            copy.unlink()
            row["mapped"] = f"{before >> 20} -> {file.stat().st_blocks >> 11} MiB"
            machine.restore(folder, None, migration=file)
            file.unlink()
        stream = folder / "stream.mig"
        if stream.exists():
            file = work / "stream.mig"
            run(tool, "prune", stream, "-o", file)
            row["stream"] = f"{stream.stat().st_size >> 20} -> {file.stat().st_size >> 20} MiB"
            machine.restore(folder, None, migration=file)
    shutil.rmtree(work)
    return row


def table(rows):
    head = ["capture", "kernel", "symbols", "buddy by kpageflags", "found", "%", "per-CPU",
            "dropped in use", "changed before the stop", "drgn", "crash", "disk", "ELF",
            "checkpoint (none / lz4 / zstd)", "torture",
            "mapped-ram, torture too", "stream, torture too"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["name"], r["kernel"], ", ".join(r["symbols"]), r["kpf_buddy"], r["found"],
                 f"{r['share']:.3f}", r["pcp"], r["unexplained"], r["changed"],
                 r.get("drgn", "-"), r.get("crash", "-"), r["disk"], r["elf"],
                 r["sonic"], r["torture"], r.get("mapped", "-"),
                 r.get("stream", "-")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
