"""Streams of old QEMUs: each saves a guest, and restores what is left of it after a prune.

The QEMUs are those of older Debian releases, each unpacked into a folder of the lab."""

import shutil

import kernels
import machine
import matrix
import proof
from errors import AlreadyTold, LabError
from kernels import LAB

SUITES = {"5.2": "bullseye", "7.2": "bookworm"}
GUESTS = {
    "plain": {},
    "q35": {"machine": "q35"},
    "NUMA, 256 + 256 MiB": {"numa": [256, 256], "smp": 2},
    # Before QEMU 8 the device's state, which says where its memory is, comes behind all memory.
    "virtio-mem, 256 of 512 MiB": {"virtio_mem": [512, 256]},
    "virtio-mem, with --layout": {"virtio_mem": [512, 256],
                                  "layout": "ram0=0-512M;0000:00:02.0/vmem0=4G-4608M"},
    "busy, saved while it runs": {"live": True},
    # Not supported: refused.
    "busy, with deltas (xbzrle)": {"live": True, "capabilities": ["xbzrle"]},
    "compressed by QEMU": {"capabilities": ["compress"]},
}


def one(tool, root, spec, name, work, keep):
    """A row of the table: boot, save, inspect, prune, restore, torture."""
    spec = spec | {"qemu": root.shared("qemu-system-x86_64")}
    folder = machine.capture(spec, name)
    layout = ["--layout", spec["layout"]] if spec.get("layout") else []
    report, refusal = matrix.call(tool, "inspect", folder / "stream.mig", "--pfns",
                                  work / "pfns.tsv", "--force", *layout)
    row = {"total": 0}
    if not refusal:
        row = {"total": report["total_pages"] * 4096, "dropped": report["droppable_bytes"]}
        if not spec.get("live"):
            # Of a busy one the kernel's word is old.
            runs = proof.read_tsv(work / "pfns.tsv")
            row["kernel"] = proof.against_kernel(folder, runs, None)
    row["forms"] = {"stream.mig": matrix.prune_and_restore(tool, folder, "stream.mig", work,
                                                            *layout)}
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def table(rows):
    lines = ["| QEMU | guest | RAM whose place is known, MiB | dropped or zero | stream, MiB | "
             "buddy pages found | outcome |", "|---|---|---:|---:|---:|---:|---|"]
    mib = matrix.mib
    for row in rows:
        done = row.get("forms", {}).get("stream.mig", {})
        known = row.get("total")
        lines.append("| " + " | ".join([
            row["qemu"], row["guest"], mib(row["total"]) if known else "-",
            mib(row["dropped"]) if known else "-",
            f"{mib(done['before'])} -> {mib(done['after'])}" if "after" in done else "-",
            f"{row['kernel']['share']:.2f} %" if "kernel" in row else "-", matrix.outcome(row)]) + " |")
    return "\n".join(lines).replace(f"{LAB}/captures/", "")


def command(args):
    """`lab.py oldqemu`"""
    kernels.install_tools()
    tool = args.find_tool(args.sonicshot)
    work = LAB / "oldqemu"
    rows = []
    for number in args.qemu.split(","):
        root = kernels.Root(f"qemu-{number}", SUITES[number], ["qemu-system-x86"])
        root.install()
        version = root.versions("qemu-system-x86")["qemu"]
        for index, (guest, options) in enumerate(GUESTS.items()):
            if not any(part.strip() in guest for part in args.guests.split(";")):
                continue
            spec = {"kernel": kernels.fetch(args.kernel, False), "mem": 512, "cpu": "qemu64",
                    "smp": 1, "machine": "pc", "garbage": "random", "forms": ["stream"], **options}
            row = {"qemu": version, "guest": guest}
            rows.append(row)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                row |= one(tool, root, spec, f"oldqemu-{number}-{args.kernel}-{index}", work,
                           args.keep)
            except LabError as error:
                row["failed"] = str(error)[:600].replace("\n", " ").replace("|", "/")
            print(f"QEMU {number}, {guest}: {matrix.outcome(row)}", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    text = table(rows)
    (LAB / "oldqemu.md").write_text(text + "\n")
    print(text)
    if any(row.get("failed") for row in rows):
        raise AlreadyTold


def add_command(commands, find_tool):
    parser = commands.add_parser("oldqemu", help="streams of QEMU 5.2 and 7.2: prune and restore")
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--qemu", default=",".join(SUITES))
    parser.add_argument("--guests", default="", help="parts of their names, `;` between them")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    parser.add_argument("--sonicshot", help="the binary; built if not given")
    parser.set_defaults(run=command, find_tool=find_tool)
