"""Saves of a paravirtual guest under a real Xen, full and pruned, restored and tortured."""

import filecmp
import shutil
import struct
import tempfile
from pathlib import Path

import kernels
from errors import CheckFailed
from kernels import LAB, run
from xen import Dom0

PAGE = 4096
XALLOC, XTAB = 0xE, 0xF


def expect(holds, what):
    if not holds:
        raise CheckFailed(what)


def tortured(dom0):
    said = dom0.order("ask torture TORTURE-").lines
    expect("TORTURE-OK" in said, f"the guest does not run on: {said[-2:]}")


def restored(dom0, command, memory):
    """Restores by a command, and checks that the guest has all its memory and runs on."""
    done = dom0.order(f"timed restore {command}\nmemory")
    expect(int(done.word("MEMORY")) == memory, f"after {command} the guest lacks memory: "
           f"{done.word('MEMORY')} of {memory} MiB")
    tortured(dom0)
    return done.times["restore"]


def cycle(tool, series, memory, append="", keep=None):
    """One guest: saved by xl, pruned offline, saved by sonicshot, each restored and tortured."""
    guest = {"kernel": kernels.fetch(series, False), "memory": memory, "append": append}
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    try:
        with Dom0(work, tool, guest) as dom0:
            row = {"kernel": guest["kernel"]["release"], "memory": memory, "append": append}
            row |= offline(dom0, tool, work, memory)
            row |= live(dom0, tool, work, memory)
            refusals(dom0)
            return row
    finally:
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for file in (*work.glob("*.xl"), *work.glob("*.log")):
                shutil.move(file, keep / file.name)
        shutil.rmtree(work, ignore_errors=True)


def offline(dom0, tool, work, memory):
    """A full image, and what `sonicshot prune` makes of it."""
    dom0.order("xl create /lab.cfg\nguest READY 0")
    done = dom0.order("timed save xl save lab /images/full\nsize full /images/full\n"
                      "grep '^FREE' $log | tail -n 1")
    full, pruned = (work / name for name in ("full.xl", "pruned.xl"))
    dom0.take("/images/full", full)
    dom0.check(full)
    run(tool, "inspect", full)
    report = kernels.json.loads(run(tool, "prune", full, "-o", pruned, "--json"))
    dom0.check(pruned)
    # By way of a checkpoint it is the same image.
    run(tool, "save", full, "-o", work / "full.sonic")
    run(tool, "restore", work / "full.sonic", "-o", work / "back.xl", "--to", "xl")
    expect(filecmp.cmp(pruned, work / "back.xl", shallow=False), "a checkpoint gives another image")
    full_restore = restored(dom0, "xl restore /images/full", memory)
    dom0.order("xl destroy lab\nrm /images/full")
    dom0.give(pruned, "/images/pruned")
    restore = restored(dom0, "xl restore /images/pruned", memory)
    dom0.order("rm /images/pruned")
    return {"full_bytes": full.stat().st_size, "full_save": done.times["save"],
            "full_restore": full_restore, "guest_free": int(done.word("FREE")),
            "pruned_bytes": pruned.stat().st_size, "pruned_pages": report["dropped_bytes"] // PAGE,
            "pruned_restore": restore}


def live(dom0, tool, work, memory):
    """The guest as it runs now, saved by `sonicshot xen save`."""
    row = {}
    for how in ("", "zstd", "lz4"):
        option = f"--compress {how}" if how else ""
        done = dom0.order("rm -f /images/live\n"
                          f"timed save sonicshot xen save lab /images/live --json {option}\n"
                          "size live /images/live\nxl list")
        report = done.json()
        expect(report["pruned"], f"a full image: {report['reason']}")
        expect(not any(line.startswith("lab ") for line in done.lines), "the guest still runs")
        row[f"live_{how or 'plain'}"] = {
            "save": done.times["save"], "bytes": done.sizes["live"],
            "pages": report["dropped_pages"], "look": report["look_seconds"],
            "suspended": report["suspended_seconds"]}
        if not how:
            image = dom0.take("/images/live", work / "live.xl")
            dom0.check(image)
            kept = run(tool, "prune", image, "--dry-run", "--json")
            expect(kernels.json.loads(kept)["total_pages"] == report["total_pages"],
                   "the image has other pages than the domain")
        row[f"live_{how or 'plain'}"]["restore"] = restored(
            dom0, "sonicshot xen restore /images/live", memory)
    return row


def refusals(dom0):
    """Saves that cannot be done: no file is left, and the guest runs on."""
    before = "set +e\nmkdir -p /small\nmountpoint -q /small || mount -t tmpfs -o size=40M x /small\n"
    for option in ("", "--compress lz4"):
        done = dom0.order(f"{before}sonicshot xen save lab /small/x {option}\n"
                          "echo CODE $?\necho LEFT $(ls -A /small | wc -l)")
        expect(done.word("CODE") == "1" and done.word("LEFT") == "0",
               f"a save into a full disk: {done.lines}")
        tortured(dom0)
    done = dom0.order(f"{before}echo mine > /images/mine\nsonicshot xen save lab /images/mine\n"
                      "echo CODE $?\necho HOLDS $(cat /images/mine)")
    expect(done.word("CODE") == "1" and done.word("HOLDS") == "mine", f"written over: {done.lines}")
    # Left running, and saved as it is then.
    done = dom0.order("sonicshot xen save -c lab /images/copy --json\nsize copy /images/copy")
    expect(done.json()["pruned"], "a full image")
    tortured(dom0)
    done = dom0.order("head -c $(($(stat -c %s /images/copy) / 2)) /images/copy > /images/cut\n"
                      "xl destroy lab\nset +e\nsonicshot xen restore /images/cut\necho CODE $?\n"
                      "xl list")
    expect(done.word("CODE") == "1", f"half an image was restored: {done.lines}")
    expect(not any(line.startswith("lab ") for line in done.lines), "half a guest is there")


def retyped(image, into, change):
    """Writes an image whose pages without data are changed: `change` makes the entry of one
    another entry, or None to leave it out."""
    data = Path(image).read_bytes()
    at = 48 + struct.unpack_from("<I", data, 44)[0] + 16 + 8 + 24 + 16
    out = bytearray(data[:at])
    while True:
        kind, length = struct.unpack_from("<II", data, at)
        body, end = at + 8, at + 8 + (length + 7) // 8 * 8
        if kind == 1:
            count = struct.unpack_from("<I", data, body)[0]
            entries = struct.unpack_from(f"<{count}Q", data, body + 8)
            entries = [change(e) if e >> 60 == XALLOC else e for e in entries]
            entries = [e for e in entries if e is not None]
            pages = data[body + 8 + count * 8:body + length]
            if entries:
                out += struct.pack("<IIII", 1, 8 + len(entries) * 8 + len(pages), len(entries), 0)
                out += struct.pack(f"<{len(entries)}Q", *entries) + pages
        else:
            out += data[at:end]
        at = end
        if kind == 0:
            break
    Path(into).write_bytes(bytes(out) + data[at:])


def give_back_later(tool, series, memory):
    """The paper's way, tried: frames that are left unpopulated in the image. What an unchanged
    `xl restore` and guest make of it."""
    guest = {"kernel": kernels.fetch(series, False), "memory": memory}
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    ways = {"type XTAB": lambda entry: entry | XTAB << 60, "left out": lambda entry: None}
    found = {}
    try:
        with Dom0(work, tool, guest) as dom0:
            dom0.order("xl create /lab.cfg\nguest READY 0\nsonicshot xen save lab /images/live")
            image = dom0.take("/images/live", work / "live.xl")
            for way, change in ways.items():
                retyped(image, work / "changed.xl", change)
                dom0.give(work / "changed.xl", "/images/changed")
                done = dom0.order("set +e\ntimed restore xl restore /images/changed\n"
                                  "echo CODE $?\nmemory\nask torture TORTURE-\nxl destroy lab")
                found[way] = done.lines
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def table(rows):
    text = ["| guest | free by its kernel, pages | dropped: offline, live | image, MB: full, offline, "
            "live, zstd, lz4 | save, s: full, live, zstd, lz4 | restore, s: full, offline, live, "
            "zstd, lz4 | runs on |",
            "|---|---:|---:|---|---|---|---|"]
    for row in rows:
        lives = [row[f"live_{how}"] for how in ("plain", "zstd", "lz4")]
        mb = ", ".join(f"{size / 1e6:.0f}" for size in (
            row["full_bytes"], row["pruned_bytes"], *(one["bytes"] for one in lives)))
        saves = ", ".join(f"{time:.1f}" for time in (
            row["full_save"], *(one["save"] for one in lives)))
        restores = ", ".join(f"{time:.1f}" for time in (
            row["full_restore"], row["pruned_restore"], *(one["restore"] for one in lives)))
        name = f"{row['kernel']}, {row['memory']} MiB" + (
            f", `{row['append']}`" if row["append"] else "")
        text.append(f"| {name} | {row['guest_free']:,} | {row['pruned_pages']:,}, "
                    f"{lives[0]['pages']:,} | {mb} | {saves} | {restores} | torture OK, 8 times |")
    return "\n".join(text)


def do_xen(args, find_tool):
    kernels.install_tools()
    tool = find_tool(args.sonicshot)
    if args.give_back:
        for way, lines in give_back_later(tool, "6.1", args.memory).items():
            print(f"{way}:", *lines, sep="\n  ")
        return
    rows = []
    for series in args.kernels.split(","):
        row = cycle(tool, series, args.memory, args.append, args.keep)
        rows.append(row)
        print(f"ok   {table([row]).splitlines()[-1]}", flush=True)
    text = table(rows) + "\n"
    (LAB / "xen.md").write_text(text)
    print(text)


def add_command(commands, find_tool):
    xen = commands.add_parser("xen", help="a real Xen: save, prune, save live, restore, torture")
    xen.add_argument("--kernels", default="5.10,6.1,6.12")
    xen.add_argument("--memory", type=int, default=512, help="of the guest, in MiB")
    xen.add_argument("--append", default="", help="to the guest's command line")
    xen.add_argument("--keep", type=Path, help="a folder for the images")
    xen.add_argument("--give-back", action="store_true",
                     help="try images with frames left unpopulated instead")
    xen.add_argument("--sonicshot", help="the binary; built if not given")
    xen.set_defaults(run=lambda args: do_xen(args, find_tool))
