"""Snapshots as Firecracker and Cloud Hypervisor leave them, made of a real guest's RAM: neither
runs without KVM, but their files are guest RAM and no more. QEMU's `pc` splits RAM at 3 GiB as
both do, so the guest runs on from them in QEMU."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import machine
import proof
from errors import CheckFailed
from kernels import LAB, run

PAGE = 4096
# Every hole, so that the file is what a copy is.
IN_PLACE = ("--in-place", "--min-hole", "0", "--json")
# The number that a Firecracker state file begins with, since 1.15 behind a byte.
FIRECRACKER_STATE = b"\0" + struct.pack("<Q", 0x0710_1984_8664_0000) + b"\x0610.0.0" + bytes(999)


def capture(spec, name):
    """Boots a guest whose processes take and give back memory without rest, and stops it twice:
    its RAM at the first stop (a base), at the second, and QEMU's device state and the disks
    then."""
    folder = LAB / "captures" / name
    if (folder / "meta.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    machine.prepare(spec, folder, "lab.stress=2")
    ram = folder / "live.raw"
    guest = machine.Machine(spec, ram, folder)
    try:
        guest.wait("READY", 900)
        qmp = guest.qmp
        qmp.call("stop")
        run("cp", "--sparse=auto", ram, folder / "base.raw")
        qmp.call("cont")
        time.sleep(5)
        qmp.call("stop")
        qmp.capabilities("events", "x-ignore-shared")
        qmp.call("migrate", uri=f"file:{folder / 'device.state'}")
        qmp.migrated()
        run("cp", "--sparse=auto", ram, folder / "ram.raw")
        for disk in ("files.img", "records.img"):
            run("cp", "--sparse=always", folder / disk, folder / f"{disk}.stop")
    finally:
        guest.quit()
    ram.unlink()
    for disk in ("files.img", "records.img"):
        (folder / f"{disk}.stop").rename(folder / disk)
    meta = {"name": name, "spec": spec, "release": spec["kernel"]["release"],
            "layout": machine.layout(spec["machine"], spec["mem"])}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def write_diff(base, ram, diff):
    """The pages of `ram` that are not those of `base`, in a sparse file: what Firecracker's diff
    is when it tracks dirty pages. Returns how many."""
    changed = 0
    with open(base, "rb") as a, open(ram, "rb") as b, open(diff, "wb") as out:
        out.truncate(os.path.getsize(ram))
        while True:
            at = b.tell()
            old, new = a.read(1 << 20), b.read(1 << 20)
            if not new:
                return changed
            if old == new:
                continue
            for page in range(0, len(new), PAGE):
                if old[page:page + PAGE] != new[page:page + PAGE]:
                    out.seek(at + page)
                    out.write(new[page:page + PAGE])
                    changed += 1


def merge(base, diff):
    """Copies the data of `diff` over `base`, as Firecracker's tool does."""
    with open(base, "r+b") as out, open(diff, "rb") as data:
        size, at = os.path.getsize(diff), 0
        while at < size:
            try:
                at = os.lseek(data.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(data.fileno(), at, os.SEEK_HOLE)
            while at < end:
                step = min(end - at, 1 << 20)
                os.pwrite(out.fileno(), os.pread(data.fileno(), step, at), at)
                at += step


def firecracker(folder, memory):
    folder.mkdir()
    (folder / "vm.state").write_bytes(FIRECRACKER_STATE)
    run("cp", "--sparse=auto", memory, folder / "vm.mem")
    return folder


def cloud_hypervisor(folder, memory, layout):
    folder.mkdir()
    size = sum(part["len"] for part in layout)
    ranges = [{"gpa": part["gpa"], "length": part["len"]} for part in layout]
    state = {"memory_ranges": {"data": ranges}, "guest_ram_mappings": [], "boot_ram": size}
    (folder / "config.json").write_text(json.dumps(
        {"cpus": {"boot_vcpus": 1}, "memory": {"size": size, "shared": False, "zones": None}}))
    (folder / "state.json").write_text(json.dumps(
        {"snapshots": {"memory-manager": {"snapshots": {},
                                          "snapshot_data": {"state": json.dumps(state)}}},
         "snapshot_data": {"state": "{}"}}))
    run("cp", "--sparse=auto", memory, folder / "memory-ranges")
    return folder


def same(a, b):
    if proof.subprocess.run(["cmp", "-s", a, b]).returncode:
        raise CheckFailed(f"{a} and {b} differ")


def on_disk(path):
    return f"{path.stat().st_blocks >> 11} MiB"


def prove(tool, folder):
    """Prunes every kind of snapshot made of one guest in place and by copy, and runs the guest
    on. Returns a line of what it saw."""
    meta = json.loads((folder / "meta.json").read_text())
    work = LAB / "vmms" / meta["name"]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    ram, base = folder / "ram.raw", folder / "base.raw"
    said = []

    # What a plain prune of the second stop gives; every other way must give the same bytes.
    _, runs = proof.inspect(tool, ram, [], work / "pfns.tsv")
    pruned = work / "pruned.raw"
    run(tool, "prune", ram, "-o", pruned)
    proof.same_but_dropped(ram, pruned, runs, meta, proof.DROPPED)

    for make, name in ((firecracker, "vm.mem"), (cloud_hypervisor, "memory-ranges")):
        more = [meta["layout"]] if make is cloud_hypervisor else []
        snapshot = make(work / "snapshot", ram, *more)
        before = on_disk(snapshot / name)
        run(tool, "prune", snapshot, "-o", work / "copy", "--json")
        run(tool, "prune", snapshot, *IN_PLACE)
        for out in (snapshot, work / "copy"):
            same(out / name, pruned)
        for other in sorted(set(os.listdir(snapshot)) - {name}):
            same(snapshot / other, work / "copy" / other)
        said.append(f"{make.__name__} {before} -> {on_disk(snapshot / name)}")
        shutil.rmtree(snapshot)
        shutil.rmtree(work / "copy")

    _, base_runs = proof.inspect(tool, base, [], work / "pfns.tsv")
    free_in_base = proof.frames_of(base_runs, "free_buddy", "free_pcp", "offline")
    frames = {offset: start for start, _, offset in proof.ram_frames(meta)}

    def was_free(offset, before):
        part = max(known for known in frames if known <= offset)
        with open(base, "rb") as file:
            file.seek(offset)
            return frames[part] + (offset - part) // PAGE in free_in_base \
                and file.read(PAGE) == before

    # A diff, over its base.
    diff = work / "diff"
    diff.mkdir()
    (diff / "vm.state").write_bytes(FIRECRACKER_STATE)
    changed = write_diff(base, ram, diff / "vm.mem")
    alone = proof.subprocess.run([tool, "inspect", diff, "--json"], capture_output=True, text=True)
    if alone.returncode != 4 or "--base" not in alone.stderr:
        raise CheckFailed(f"a diff without its base: {alone.returncode} {alone.stderr}")
    _, over = proof.inspect(tool, diff, [], work / "pfns.tsv", ["--base", base])
    if over != runs:
        raise CheckFailed("diff and base read differently from the whole")
    run(tool, "prune", diff, "--base", base, "-o", work / "copy")
    same(work / "copy" / "vm.mem", pruned)
    shutil.rmtree(work / "copy")
    # In place, over the base as it is and over one that was pruned itself.
    for kind in ("plain", "pruned"):
        merged = work / "merged.raw"
        run("cp", "--sparse=auto", base, merged)
        if kind == "pruned":
            run(tool, "prune", merged, *IN_PLACE)
        file = work / "diff.mem"
        # Not by `cp`, which makes holes of zeroes even with --sparse=auto.
        with open(file, "wb") as empty:
            empty.truncate(os.path.getsize(ram))
        merge(file, diff / "vm.mem")
        size = on_disk(file)
        report = json.loads(run(tool, "prune", file, "--base", merged, *IN_PLACE))
        said.append(f"diff of {changed} pages, {kind} base: {size} -> {on_disk(file)}, "
                    f"{report['kept_for_base_bytes'] >> 10} KiB kept for the base")
        merge(merged, file)
        taken = kept_only(ram, merged, runs, meta, was_free if kind == "pruned" else None)
        if taken:
            said.append(f"{taken} pages taken but not written to since")
    # The guest on the pruned memory, and on the merged one.
    for memory in (pruned, merged):
        machine.restore(folder, memory)
    shutil.rmtree(work)
    return "; ".join(said) + "; torture OK twice"


def kept_only(ram, merged, runs, meta, base=None):
    """Every page that is not free is as it was, the zero ones too. One that the pruned `base` had
    free, and that was taken but not written to since, may be zero."""
    free = ("free_buddy", "free_pcp", "offline")
    taken = 0
    with open(ram, "rb") as a, open(merged, "rb") as b:
        for first, end, name in runs:
            if name in free:
                continue
            start = proof.offset_of(first, meta)
            for offset in range(start, start + (end - first + 1) * PAGE, PAGE):
                a.seek(offset)
                b.seek(offset)
                before, after = a.read(PAGE), b.read(PAGE)
                if before == after:
                    continue
                if not base or any(after) or not base(offset, before):
                    raise CheckFailed(f"{Path(merged).name} differs in {name} at {offset:#x}")
                taken += 1
    return taken
