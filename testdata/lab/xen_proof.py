"""Saves of a paravirtual guest under a real Xen, full and pruned, restored and stress-tested."""

import filecmp
import shutil
import struct
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import kernels
import xen_disk
from command import command
from debian import install_tools
from errors import CheckFailed
from host import LAB, run
from spec import PAGE
from tool import find_tool, report_of, tool_argument
from xen import Dom0, XenGuest

XALLOC, XTAB = 0xE, 0xF


# How `sonicshot xen save` compresses.
COMPRESSIONS = ("plain", "zstd", "lz4")


@dataclass(frozen=True)
class Offline:
    """What `xl save` and then `sonicshot prune` made of a guest: bytes, seconds, pages."""

    full_bytes: int
    full_save: float
    full_restore: float
    guest_free: int
    pruned_bytes: int
    pruned_pages: int
    pruned_restore: float


@dataclass(frozen=True)
class Live:
    """A save by `sonicshot xen save`: bytes, seconds, pages."""

    save: float
    bytes: int
    pages: int
    restore: float


@dataclass(frozen=True)
class Row:
    """Of the table: a guest, and what became of it, saved live by each of `COMPRESSIONS`."""

    guest: XenGuest
    offline: Offline
    live: Sequence[Live]


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailed(what)


def tortured(dom0: Dom0) -> None:
    said = dom0.order("ask torture TORTURE-").lines
    if "TORTURE-OK" not in said:
        shown = "\n".join(dom0.order("tail -n 60 $log").lines)
        raise CheckFailed(f"the guest does not run on: {said[-2:]}\n{shown}")


def restored(dom0: Dom0, order: str, memory: int) -> float:
    """Restores by a command, and checks that the guest has all its memory and runs on. The
    seconds that it took."""
    done = dom0.order(f"timed restore {order}\nmemory")
    expect(int(done.word("MEMORY")) == memory, f"after {order} the guest lacks memory: "
           f"{done.word('MEMORY')} of {memory} MiB")
    tortured(dom0)
    return done.times["restore"]


def cycle(tool: Path, guest: XenGuest, keep: Path | None = None, kills: bool = True) -> Row:
    """One guest: saved by xl, pruned offline, saved by sonicshot, each restored and stress-tested."""
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    try:
        with Dom0(work, tool, guest) as dom0:
            row = Row(guest, offline(dom0, tool, work, guest.memory),
                      live(dom0, tool, work, guest.memory))
            if kills:
                killed(dom0)
            refusals(dom0, guest.memory)
            return row
    finally:
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for file in (*work.glob("*.xl"), *work.glob("*.log")):
                shutil.move(file, keep / file.name)
        shutil.rmtree(work, ignore_errors=True)


def offline(dom0: Dom0, tool: Path, work: Path, memory: int) -> Offline:
    """A full image, and what `sonicshot prune` makes of it."""
    dom0.order("xl create /lab.cfg\nguest READY 0")
    done = dom0.order("timed save xl save lab /images/full\nsize full /images/full\n"
                      "grep '^FREE' $log | tail -n 1")
    full, pruned = (work / name for name in ("full.xl", "pruned.xl"))
    dom0.take("/images/full", full)
    dom0.check(full)
    run(tool, "inspect", full)
    report = report_of(run(tool, "prune", full, "-o", pruned, "--json"))
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
    return Offline(full_bytes=full.stat().st_size, full_save=done.times["save"],
                   full_restore=full_restore, guest_free=int(done.word("FREE")),
                   pruned_bytes=pruned.stat().st_size,
                   pruned_pages=report["dropped_bytes"] // PAGE, pruned_restore=restore)


def live(dom0: Dom0, tool: Path, work: Path, memory: int) -> list[Live]:
    """The guest as it runs now, saved by `sonicshot xen save`."""
    saves = []
    for how in COMPRESSIONS:
        option = f"--compress {'none' if how == 'plain' else how}"
        done = dom0.order("rm -f /images/live\n"
                          f"timed save sonicshot xen save lab /images/live --json {option}\n"
                          "size live /images/live\nxl list")
        report = done.json()
        expect(report["pruned"], f"a full image: {report['reason']}")
        expect(not any(line.startswith("lab ") for line in done.lines), "the guest still runs")
        if how == "plain":
            image = dom0.take("/images/live", work / "live.xl")
            dom0.check(image)
            kept = report_of(run(tool, "prune", image, "--dry-run", "--json"))
            expect(kept["total_pages"] == report["total_pages"],
                   "the image has other pages than the domain")
        restore = restored(dom0, "sonicshot xen restore /images/live", memory)
        saves.append(Live(done.times["save"], done.sizes["live"], report["dropped_pages"],
                          restore))
    return saves


def killed(dom0: Dom0) -> None:
    """Saves that are killed, from before the guest is suspended until its memory is written: no image
    is left, and the guest runs on."""
    for option in ("--compress none", "--compress lz4", "-p --compress none", "-c --compress none",
                   "-c --compress lz4", ""):
        # It looks at the guest for some seconds before that is suspended.
        for delay in (1, 3, 6):
            done = dom0.order(
                f"set +e\nsonicshot xen save lab /images/killed {option} > /dev/null 2>&1 & save=$!\n"
                f"sleep {delay}\nkill -9 $save 2> /dev/null && echo HIT\n"
                # Not the xl that waits for the domain's end.
                "left=300\nwhile ps w | grep -q '[x]l save'; do\n"
                "left=$((left - 1)); [ $left -gt 0 ] || { echo STAYS; break; }\nsleep 0.2\ndone\n"
                "sleep 1\n"
                "echo LEFT $(ls -A /images | grep -c -e killed -e sonicshot)\nxl list")
            if "HIT" not in done.lines:
                # It was faster. What it left is an image, of a guest that is gone, paused, or runs on.
                if "-p" in option:
                    dom0.order("xl unpause lab")
                elif "-c" not in option:
                    dom0.order("sonicshot xen restore /images/killed")
                dom0.order("rm -f /images/killed")
            else:
                expect("STAYS" not in done.lines, f"xl does not end: {done.lines}")
                expect(done.word("LEFT") == "0", f"something is left: {done.lines}")
            tortured(dom0)


def refusals(dom0: Dom0, memory: int) -> None:
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
    # Left running, and saved as it is then: with all of it in memory first, and with next to nothing.
    for limit in ("", "--copy-limit 4M"):
        for how in ("none", "lz4"):
            done = dom0.order("rm -f /images/copy\nsonicshot xen save -c lab /images/copy --json "
                              f"--compress {how} {limit}\nsize copy /images/copy")
            report = done.json()
            expect(report["pruned"], "a full image")
            expect(report["compression"] == (None if how == "none" else how), f"{report}")
            expect(0 < report["suspended_seconds"] <= report["seconds"], f"{report}")
            tortured(dom0)
    dom0.order("xl destroy lab")
    restored(dom0, "sonicshot xen restore /images/copy", memory)
    # The disk decides how it is compressed.
    done = dom0.order("rm /images/copy\nsonicshot xen save -c lab /images/copy --json")
    expect(done.json()["compression"] in (None, "lz4"), f"{done.lines}")
    tortured(dom0)
    done = dom0.order("head -c $(($(stat -c %s /images/copy) / 2)) /images/copy > /images/cut\n"
                      "xl destroy lab\nset +e\nsonicshot xen restore /images/cut\necho CODE $?\n"
                      "xl list")
    expect(done.word("CODE") == "1", f"half an image was restored: {done.lines}")
    expect(not any(line.startswith("lab ") for line in done.lines), "half a guest is there")


def retyped(image: Path, into: Path, change: Callable[[int], int | None]) -> None:
    """Writes an image whose pages without data are changed: `change` makes the entry of one
    another entry, or None to leave it out."""
    data = image.read_bytes()
    at = 48 + struct.unpack_from("<I", data, 44)[0] + 16 + 8 + 24 + 16
    out = bytearray(data[:at])
    while True:
        kind, length = struct.unpack_from("<II", data, at)
        body, end = at + 8, at + 8 + (length + 7) // 8 * 8
        if kind == 1:
            count = struct.unpack_from("<I", data, body)[0]
            entries = list(struct.unpack_from(f"<{count}Q", data, body + 8))
            changed = [change(e) if e >> 60 == XALLOC else e for e in entries]
            entries = [e for e in changed if e is not None]
            pages = data[body + 8 + count * 8:body + length]
            if entries:
                out += struct.pack("<IIII", 1, 8 + len(entries) * 8 + len(pages), len(entries), 0)
                out += struct.pack(f"<{len(entries)}Q", *entries) + pages
        else:
            out += data[at:end]
        at = end
        if kind == 0:
            break
    into.write_bytes(bytes(out) + data[at:])


def give_back_later(tool: Path, guest: XenGuest) -> dict[str, list[str]]:
    """The paper's way, tried: frames that are left unpopulated in the image. What an unchanged
    `xl restore` and guest make of it."""
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    ways: dict[str, Callable[[int], int | None]] = {
        "type XTAB": lambda entry: entry | XTAB << 60, "left out": lambda entry: None}
    found = {}
    try:
        with Dom0(work, tool, guest) as dom0:
            dom0.order("xl create /lab.cfg\nguest READY 0\n"
                       "sonicshot xen save lab /images/live --compress none")
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


def table(rows: Sequence[Row]) -> str:
    text = ["| guest | free by its kernel, pages | dropped: offline, live | image, MB: full, offline, "
            "live, zstd, lz4 | save, s: full, live, zstd, lz4 | restore, s: full, offline, live, "
            "zstd, lz4 | runs on |",
            "|---|---:|---:|---|---|---|---|"]
    for row in rows:
        off = row.offline
        mb = ", ".join(f"{size / 1e6:.0f}" for size in (
            off.full_bytes, off.pruned_bytes, *(one.bytes for one in row.live)))
        saves = ", ".join(f"{time:.1f}" for time in (
            off.full_save, *(one.save for one in row.live)))
        restores = ", ".join(f"{time:.1f}" for time in (
            off.full_restore, off.pruned_restore, *(one.restore for one in row.live)))
        name = f"{row.guest.kernel.release}, {row.guest.memory} MiB" + (
            f", `{row.guest.append}`" if row.guest.append else "")
        text.append(f"| {name} | {off.guest_free:,} | {off.pruned_pages:,}, "
                    f"{row.live[0].pages:,} | {mb} | {saves} | {restores} | stress test OK, 8 times |")
    return "\n".join(text)


def xen_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default="5.10,6.1,6.12")
    parser.add_argument("--memory", type=int, default=512, help="of the guest, in MiB")
    parser.add_argument("--append", default="", help="to the guest's command line")
    parser.add_argument("--keep", type=Path, help="a folder for the images")
    parser.add_argument("--no-kills", action="store_true", help="kill no saves")
    parser.add_argument("--disk", action="store_true",
                        help="guests whose files are on a disk, and checkpoints that refer to it, instead")
    parser.add_argument("--give-back", action="store_true",
                        help="try images with frames left unpopulated instead")
    tool_argument(parser)


@command("xen", "a real Xen: save, prune, save live, restore, stress test", xen_arguments)
def do_xen(args: Namespace) -> None:
    install_tools()
    tool = find_tool(args.sonicshot)
    if args.give_back:
        guest = XenGuest(kernels.fetch("6.1"), args.memory)
        for way, lines in give_back_later(tool, guest).items():
            print(f"{way}:", *lines, sep="\n  ")
        return
    if args.disk:
        xen_disk.prove(tool, args.kernels, args.memory, args.append, args.keep)
        return
    rows = []
    for series in args.kernels.split(","):
        row = cycle(tool, XenGuest(kernels.fetch(series), args.memory, args.append), args.keep,
                    not args.no_kills)
        rows.append(row)
        print(f"ok   {table([row]).splitlines()[-1]}", flush=True)
    text = table(rows) + "\n"
    (LAB / "xen.md").write_text(text)
    print(text)
