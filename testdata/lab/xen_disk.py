"""A paravirtual guest with its files on an ext4 disk: its page cache left out of checkpoints of its Xen
image, and warm again from the disk."""

import filecmp
import shutil
import struct
import tempfile
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import kernels
from cache import clean_frames
from errors import CheckFailed
from host import LAB, attempt, run
from machine import build_files
from soft import MIB, refuse_changed
from tool import report_of
from xen import Dom0, XenGuest

# MiB of files, of the image with them, and what is before it where it is a partition.
FILES_MIB, BEFORE_MIB = 64, 1
LAYOUTS = ("whole", "mbr", "gpt")
# The checkpoint's name for the disk.
NAME = "root"


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise CheckFailed(what)


@dataclass(frozen=True)
class DiskRow:
    """What came of one guest: pages, bytes, seconds."""

    guest: XenGuest
    layout: str
    cache: int
    explained: int
    streamed: bool
    on_disk: int
    image_bytes: int
    all_bytes: int
    bytes: int
    restore: float
    live: "LiveDisk | None" = None

    def line(self) -> str:
        how = "read whole" if self.streamed else "not read whole"
        return (f"| {self.guest.kernel.release}, {self.guest.memory} MiB | {self.layout} | "
                f"{self.cache:,} | {self.explained:,}, {how} | {self.on_disk:,} | "
                f"{self.image_bytes / MIB:.1f} | {self.all_bytes / MIB:.1f} | {self.bytes / MIB:.1f} | "
                f"{self.restore:.1f} s | 0, stress test OK | refused | {self.live or '-'} |")


HEAD = ("| guest | ext4 on | page cache, frames | explained by the guest's records; the disk was "
        "| on the disk | image, MiB | checkpoint of all, MiB | with references, MiB | `xl restore` "
        "| reads of the disk for all files | ten blocks changed; the guest went on | `xen save --disk` |\n"
        "|---|---|---:|---|---:|---:|---:|---:|---:|---|---|---|")


@dataclass(frozen=True)
class LiveDisk:
    """A checkpoint by `sonicshot xen save --disk`: pages, bytes, seconds."""

    on_disk: int
    bytes: int
    suspended: float
    restore: float

    def __str__(self) -> str:
        return (f"{self.on_disk:,} pages on the disk, {self.bytes / MIB:.1f} MiB, suspended for "
                f"{self.suspended:.1f} s, restored in {self.restore:.1f} s; 0 reads, stress test OK")


def build_disk(layout: str, into: Path) -> Path:
    """An image of a disk with files on an ext4 with a journal: on all of it, or in a partition."""
    shutil.copy(build_files(FILES_MIB), into)
    run("tune2fs", "-O", "has_journal", into)
    if layout == "whole":
        return into
    part = into.with_suffix(".part")
    into.rename(part)
    with open(into, "wb") as disk, open(part, "rb") as source:
        first, length = BEFORE_MIB << 11, part.stat().st_size >> 9
        table = mbr(first, length) if layout == "mbr" else gpt(first, length)
        disk.write(table.ljust(BEFORE_MIB << 20, b"\0"))
        shutil.copyfileobj(source, disk, 1 << 20)
        disk.truncate(disk.tell() + (BEFORE_MIB << 20))
    part.unlink()
    return into


def mbr(first: int, length: int, kind: int = 0x83) -> bytes:
    """A PC's table of one partition; sectors."""
    entry = struct.pack("<B3sB3sII", 0, bytes(3), kind, bytes(3), first, length)
    return bytes(446) + entry.ljust(64, b"\0") + b"\x55\xaa"


def gpt(first: int, length: int) -> bytes:
    """The first sectors of a disk with one partition and a GPT, without the copy at the end."""
    linux = uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4").bytes_le
    entry = linux + uuid.uuid4().bytes_le + struct.pack("<QQQ", first, first + length - 1, 0)
    entries = entry.ljust(128 * 128, b"\0")
    last = first + length + (BEFORE_MIB << 11) - 1

    def header(crc: int) -> bytes:
        return struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, crc, 0, 1, last, 34, last - 33,
                           uuid.uuid5(uuid.NAMESPACE_OID, "disk").bytes_le, 2, 128, 128,
                           zlib.crc32(entries))

    head = header(zlib.crc32(header(0)))
    return mbr(1, last, 0xEE) + head.ljust(512, b"\0") + entries


def attach(dom0: Dom0, image: str) -> None:
    """Has the guest's disk be this image from now on."""
    dom0.order(f"losetup /dev/loop0 > /dev/null 2>&1 && losetup -d /dev/loop0\n"
               f"losetup /dev/loop0 {image}")


def warm(dom0: Dom0, told: str) -> None:
    """That the guest has all its files in its page cache, right, runs on, and reads its disk for them once
    they are evicted."""
    first = dom0.order("ask reads READS").word("READS")
    looked = dom0.order("ask look LOOK-").lines
    reads = dom0.order("ask reads READS").word("READS")
    expect("LOOK-OK " in looked or "LOOK-OK" in looked, f"{told}: {looked[-2:]}")
    expect(reads == first, f"{told}: the guest read its disk {int(reads) - int(first)} times for files "
           "that were in its page cache")
    done = dom0.order("ask torture TORTURE-").lines
    expect("TORTURE-OK" in done, f"{told}: {done[-2:]}")
    after = dom0.order("ask reads READS").word("READS")
    expect(int(after) > int(reads), f"{told}: the guest read its files again without reading its disk")


def offline(dom0: Dom0, tool: Path, work: Path, guest: XenGuest, layout: str) -> DiskRow:
    """`xl save`, then the disk pinned while the guest is paused, then a checkpoint that refers to it."""
    dom0.order("xl save -p lab /images/full\ncp /images/root /images/pinned")
    full = dom0.take("/images/full", work / "full.xl")
    disk = dom0.take("/images/pinned", work / "pinned")
    # The guest goes on with the disk.
    dom0.order("xl unpause lab\nask write WROTE\nxl destroy lab\nrm /images/full")
    moved = dom0.take("/images/root", work / "moved")
    whole, small, back, pruned = (work / name for name in ("all.sonic", "small.sonic", "back.xl",
                                                           "pruned.xl"))
    given = ("--disk", f"{NAME}={disk}")
    kept = report_of(run(tool, "save", full, "-o", whole, "--json"))
    saved = report_of(run(tool, "save", full, "-o", small, *given, "--json"))
    run(tool, "verify", small, *given, "--against", full)
    run(tool, "restore", small, "-o", back, "--to", "xl", *given)
    dom0.check(back)
    run(tool, "restore", whole, "-o", work / "without.xl", "--to", "xl")
    expect(filecmp.cmp(back, work / "without.xl", shallow=False),
           "with the disk another image is restored than without")
    # From a pruned image it is the same.
    run(tool, "prune", full, "-o", pruned)
    run(tool, "save", pruned, "-o", work / "less.sonic", *given)
    run(tool, "restore", work / "less.sonic", "-o", work / "less.xl", "--to", "xl", *given)
    expect(filecmp.cmp(back, work / "less.xl", shallow=False),
           "of a pruned image another one is restored")
    clean, dirty = clean_frames(tool, full)
    raw = work / "ram.raw"
    run(tool, "convert", full, "-o", raw, "--to", "raw")
    refuse_changed(tool, small, disk, clean, raw, NAME, "--to", "xl")
    out = work / "moved.xl"
    answer = attempt(tool, "restore", small, "-o", out, "--to", "xl", "--disk", f"{NAME}={moved}")
    expect(answer.returncode == 3 and "ext4's" in answer.stderr and not out.exists(),
           f"the guest went on with its disk, and restore says {answer.returncode}: {answer.stderr}")
    dom0.order("cp /images/pinned /images/root")
    attach(dom0, "/images/root")
    dom0.give(back, "/images/back")
    done = dom0.order("timed restore xl restore /images/back")
    warm(dom0, "xl restore")
    dom0.order("rm /images/back")
    row = DiskRow(guest, layout, len(clean) + dirty, saved["disk_search"]["explained_pages"],
                  saved["disk_search"]["streamed_bytes"] is not None, saved["disk_pages"],
                  full.stat().st_size, kept["file_bytes"], saved["file_bytes"], done.times["restore"])
    for file in work.iterdir():
        if file.suffix in (".xl", ".sonic", ".raw") or file in (disk, moved):
            file.unlink()
    return row


def live(dom0: Dom0) -> LiveDisk:
    """The guest as it runs on /images/root, saved by `sonicshot xen save --disk`, and restored over a copy."""
    save = f"sonicshot xen save lab /images/live --disk {NAME}="
    # It would write over what is referred to.
    for image in ("/images/root", "/dev/loop0"):
        done = dom0.order(f"set +e\n{save}{image} -c\necho CODE $?\n"
                          "echo LEFT $(ls -A /images | grep -c -e live -e sonicshot)")
        expect(done.word("CODE") == "6" and done.word("LEFT") == "0", f"-c and its disk: {done.lines}")
    killed(dom0, save + "/images/root")
    done = dom0.order(f"{save}/images/root --json\nsize live /images/live\nxl list")
    report = done.json()
    expect(report["pruned"], f"a full image: {report['reason']}")
    expect(not any(line.startswith("lab ") for line in done.lines), "the guest still runs")
    dom0.order("cp /images/root /images/other")
    attach(dom0, "/images/other")
    restore = dom0.order("timed restore sonicshot xen restore /images/live --disk "
                         f"{NAME}=/images/root\nmemory")
    warm(dom0, "sonicshot xen restore")
    # It runs on, over what was pinned, while it is saved once more.
    again = dom0.order(f"rm /images/live\n{save}/images/root -c --json").json()
    expect(again["disk_pages"] > 0, f"{again}")
    expect("TORTURE-OK" in dom0.order("ask torture TORTURE-").lines, "the guest does not run on")
    dom0.order(f"sonicshot verify /images/live --disk {NAME}=/images/root\nrm /images/live")
    return LiveDisk(report["disk_pages"], done.sizes["live"], report["suspended_seconds"],
                    restore.times["restore"])


def killed(dom0: Dom0, save: str) -> None:
    """Saves that are killed, before the guest is suspended, while it is and while the checkpoint is made:
    nothing is left, and the guest runs on."""
    for option, delays in (("", (2,)), ("-p", (2, 6, 10, 14))):
        for delay in delays:
            done = dom0.order(
                f"set +e\n{save} {option} > /dev/null 2>&1 & save=$!\n"
                f"sleep {delay}\nkill -9 $save 2> /dev/null && echo HIT\n"
                "left=300\nwhile ps w | grep -q '[x]l save'; do\n"
                "left=$((left - 1)); [ $left -gt 0 ] || { echo STAYS; break; }\nsleep 0.2\ndone\n"
                "sleep 1\necho LEFT $(ls -A /images | grep -c -e live -e sonicshot)\nxl list")
            if "HIT" not in done.lines:
                # It was faster.
                expect(option == "-p", "a save of two seconds")
                dom0.order("xl unpause lab\nrm /images/live")
                continue
            expect("STAYS" not in done.lines, f"xl does not end: {done.lines}")
            expect(done.word("LEFT") == "0", f"something is left: {done.lines}")
            expect("LOOK-OK " in dom0.order("ask look LOOK-").lines, "the guest does not run on")


def on_disk(dom0: Dom0, tool: Path, work: Path, guest: XenGuest, layout: str) -> DiskRow:
    """One guest, with the disk that dom0 has at /images/LAYOUT."""
    dom0.order(f"rm -f /images/root /images/pinned /images/other\nmv /images/{layout} /images/root")
    attach(dom0, "/images/root")
    dom0.order("had=$(lines ^READY)\nxl create /lab.cfg\nguest READY ${had:-0}")
    row = offline(dom0, tool, work, guest, layout)
    if layout == LAYOUTS[0]:
        row = replace(row, live=live(dom0))
    dom0.order("xl destroy lab")
    return row


def cycle(tool: Path, guest: XenGuest, layouts: Sequence[str], keep: Path | None) -> list[DiskRow]:
    work = Path(tempfile.mkdtemp(prefix="xen-", dir=LAB))
    rows = []
    try:
        with Dom0(work, tool, guest) as dom0:
            for layout in layouts:
                image = build_disk(layout, work / "disk")
                dom0.give(image, f"/images/{layout}")
                row = on_disk(dom0, tool, work, guest, layout)
                print(row.line(), flush=True)
                rows.append(row)
        return rows
    finally:
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            for file in (*work.glob("*.xl"), *work.glob("*.log"), *work.glob("pinned"),
                         *work.glob("*.sonic")):
                shutil.move(file, keep / file.name)
        shutil.rmtree(work, ignore_errors=True)


def prove(tool: Path, series: str, memory: int, append: str, keep: Path | None) -> None:
    """Every layout of a disk, with each kernel."""
    rows = []
    for one in series.split(","):
        guest = XenGuest(kernels.fetch(one), memory, append, disk=2 * FILES_MIB + 24 + 2 * BEFORE_MIB)
        rows += cycle(tool, guest, LAYOUTS, keep)
    text = "\n".join([HEAD, *(row.line() for row in rows)]) + "\n"
    (LAB / "xen-disk.md").write_text(text)
    print(text)
