"""Every kind of guest on every kernel: its snapshots are pruned and restored by an unchanged QEMU."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess

import kernels
import machine
import mapped
import proof
from errors import CheckFailed, LabError
from kernels import LAB, run

# What makes a guest differ from the plain one (512 MiB, pc, one processor).
ROWS = {
    "plain": {},
    "4 GiB (PCI hole)": {"mem": 4096},
    "q35": {"machine": "q35"},
    "q35, 4 GiB": {"machine": "q35", "mem": 4096},
    "2 processors": {"smp": 2},
    "-cpu max (5-level)": {"cpu": "max"},
    "page_poison=1": {"append": "page_poison=1"},
    "init_on_free=1": {"append": "init_on_free=1"},
    "hugetlb, half of it in use": {"hugetlb": 32},
    "hugetlb without vmemmap": {"hugetlb": 32, "append": "hugetlb_free_vmemmap=on"},
    "balloon, 128 MiB taken": {"balloon": 128},
    "pc-dimm, 256 MiB": {"dimm": [256]},
    "pc-dimm, 2 x 128 MiB": {"dimm": [128, 128]},
    "pc-dimm, memmap on it": {"dimm": [256], "append": "memory_hotplug.memmap_on_memory=1"},
    "pc-dimm, 128 of 256 MiB offline": {"dimm": [256], "offline": 128},
    "pmem, 128 MiB": {"pmem": "128M!256M"},
    "pmem in half a section": {"pmem": "64M!256M"},
    "virtio-mem, 256 of 512 MiB": {"virtio_mem": [512, 256]},
    "virtio-mem, 200 of 512 MiB": {"virtio_mem": [512, 200]},
    "NUMA, 256 + 256 MiB": {"numa": [256, 256], "smp": 2},
    "NUMA, 192 + 320 MiB": {"numa": [192, 320], "smp": 2},
}
# Features that not every kernel has, by series.
NOT_IN = {"hugetlb without vmemmap": ["5.10"], "pc-dimm, memmap on it": ["5.10"]}


def allocated(path):
    return os.stat(path).st_blocks * 512


def mib(count):
    return f"{count / (1 << 20):.0f}"


def call(tool, *arguments):
    """Runs sonicshot with --json; returns its report, or its refusal as (code, reason)."""
    done = subprocess.run([str(a) for a in (tool, *arguments, "--json")],
                          capture_output=True, text=True)
    if done.returncode in (3, 4, 5):
        error = json.loads(done.stderr.splitlines()[-1])
        return None, f"{(error['causes'] or [error['error']])[-1]} (exit code {done.returncode})"
    if done.returncode:
        raise CheckFailed(f"{' '.join(map(str, arguments))}: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout), None


def prune_and_restore(tool, folder, form, work, *options):
    """One form of a snapshot: pruned, checked, restored, tortured."""
    original = folder / form
    before = allocated(original)
    row = {"before": before}
    out = work / form
    report, refusal = call(tool, "prune", original, "-o", out, *options)
    if refusal:
        if out.exists():
            raise CheckFailed(f"{form} refused, and yet there is {out}")
        row["refused"] = refusal
    if form == "mapped.ram":
        placed = work / "placed.ram"
        run("cp", "--sparse=auto", original, placed)
        in_place, why = call(tool, "prune", placed, "--in-place")
        if bool(why) != bool(refusal):
            raise CheckFailed(f"in place: {why}, by copy: {refusal}")
        if why:
            run("cmp", original, placed)
        else:
            row["left_out"] = mapped.check_pruned(original, placed)
            mapped.check_pruned(placed, out, alike=True)
            row["after_in_place"] = allocated(placed)
            report = in_place
            out.unlink()
            out = placed
    if refusal:
        return row
    row["after"] = allocated(out)
    row["report"] = report
    row["restored"] = machine.restore(folder, None, migration=out)
    out.unlink()
    return row


def one(tool, folder, work):
    """A row of the table from one captured guest."""
    row = {"forms": {}}
    report, refusal = call(tool, "inspect", folder / "mapped.ram", "--pfns", work / "pfns.tsv",
                           "--force")
    if refusal:
        row["inspect"] = refusal
    else:
        row["zero"] = report["zero_pages"] * 4096
        row["total"] = report["total_pages"] * 4096
        row["dropped"] = report["droppable_bytes"]
        row["kernel"] = proof.against_kernel(folder, proof.read_tsv(work / "pfns.tsv"), None)
    for form in ("mapped.ram", "stream.mig"):
        row["forms"][form] = prune_and_restore(tool, folder, form, work)
    return row


def outcome(row):
    """In a few words."""
    if row.get("failed"):
        return f"**FAILED**: {row['failed']}"
    said = []
    for form, done in row["forms"].items():
        if done.get("refused"):
            said.append(f"{form} refused: {done['refused']}")
        else:
            report = done["report"]
            if report.get("kept_for_fill_bytes"):
                said.append(f"{mib(report['kept_for_fill_bytes'])} MiB of free pages kept: "
                            "the guest checks their pattern")
            said += report.get("notes", []) + report.get("warnings", [])
    said = list(dict.fromkeys(said))
    if all(done.get("refused") for done in row["forms"].values()):
        return "; ".join(said)
    return "; ".join(["pruned, restored, torture OK", *said])


def table(rows):
    lines = ["| kernel | guest | RAM, MiB | zero elision alone leaves | dropped | "
             "mapped-ram on disk | stream | buddy pages found | outcome |",
             "|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for row in rows:
        sizes = []
        for form in ("mapped.ram", "stream.mig"):
            done = row.get("forms", {}).get(form, {})
            sizes.append(f"{mib(done['before'])} -> {mib(done['after'])}" if "after" in done
                         else "-")
        known = "total" in row
        lines.append("| " + " | ".join([
            row["series"], row["row"], mib(row["total"]) if known else "-",
            mib(row["total"] - row["zero"]) if known else "-",
            mib(row["dropped"]) if known else "-", *sizes,
            f"{row['kernel']['share']:.2f} %" if known else "-", outcome(row)]) + " |")
    return "\n".join(lines) + "\n"


def finished():
    file = LAB / "matrix.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write(row):
    """Puts a row among those that are there: two runs may be at work at once."""
    with open(LAB / "matrix" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [old for old in finished() if key(old) != key(row)] + [row]
        rows.sort(key=lambda r: (list(ROWS).index(r["row"]),
                                 [int(part) for part in r["series"].split("-")[0].split(".")]))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        for name, text in (("matrix.jsonl", lines), ("matrix.md", table(rows))):
            part = LAB / f"{name}.part"
            part.write_text(text)
            part.rename(LAB / name)


def key(row):
    return row["series"], row["row"]


def matrix(tool, series, names, keep, fresh):
    """Makes the rows that are missing, or, if `fresh`, all that another build of sonicshot made;
    returns how many failed."""
    (LAB / "matrix").mkdir(parents=True, exist_ok=True)
    # A copy: a rebuild in the middle of the run would mix two versions.
    binary = LAB / "matrix" / f"sonicshot-{os.getpid()}"
    shutil.copy(tool, binary)
    version = hashlib.sha256(binary.read_bytes()).hexdigest()[:12]
    failed = 0
    todo = [(s, name) for name in names for s in series if s not in NOT_IN.get(name, [])]
    try:
        for number, name in todo:
            # None of the cloud kernels has page poisoning.
            if name == "page_poison=1" and "-" not in number:
                number = f"{number}-amd64"
            row = {"series": number, "row": name, "tool": version}
            old = next((r for r in finished() if key(r) == key(row)), None)
            if old and not old.get("failed") and (
                    old["tool"] == version
                    or not fresh and not any(f.get("refused") for f in old["forms"].values())):
                continue
            spec = {"kernel": kernels.fetch(number, False), "mem": 512, "cpu": "qemu64", "smp": 1,
                    "machine": "pc", "garbage": "random", "forms": ["mapped", "stream"],
                    **ROWS[name]}
            work = LAB / "matrix" / f"{number}-{os.getpid()}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            # QEMU's options end at a comma.
            capture = re.sub("[^a-zA-Z0-9.]+", "-", f"matrix-{number}-{name}")
            try:
                folder = machine.capture(spec, capture)
                row.update(one(binary, folder, work))
            except LabError as error:
                row["failed"] = str(error)[:300].replace("\n", " ").replace("|", "/")
            shutil.rmtree(work, ignore_errors=True)
            if not keep and not row.get("failed"):
                shutil.rmtree(LAB / "captures" / capture, ignore_errors=True)
            failed += bool(row.get("failed"))
            write(row)
            print(f"{number}, {name}: {outcome(row)}", flush=True)
    finally:
        binary.unlink()
    return failed
