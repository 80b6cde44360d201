"""Guests whose files lie on each file system: what is clean page cache by `inspect`, held against the
disk, block by block."""

import hashlib
import shutil
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import kernels
from captures import capture
from command import command
from errors import CheckFailed
from host import LAB, run
from spec import PAGE, GuestSpec
from tool import find_tool, tool_argument


def clean_frames(tool: Path, ram: Path) -> tuple[list[int], int]:
    """The frames of clean page cache, and how many there are of other page cache."""
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder, "pages.tsv")
        run(tool, "inspect", ram, "--pfns", frames)
        clean: list[int] = []
        dirty = 0
        for line in frames.read_text().splitlines():
            first, last, page_class = line.split("\t")[:3]
            if page_class == "page_cache_clean":
                clean += range(int(first), int(last) + 1)
            elif page_class == "page_cache_dirty":
                dirty += int(last) + 1 - int(first)
    return clean, dirty


def not_on_disk(ram: Path, frames: list[int], disk: Path) -> int:
    """How many of the frames are no block of the disk."""
    blocks = set()
    with open(disk, "rb") as file:
        while block := file.read(PAGE):
            blocks.add(hashlib.blake2b(block, digest_size=16).digest())
    missing = 0
    with open(ram, "rb") as file:
        for frame in frames:
            file.seek(frame * PAGE)
            page = file.read(PAGE)
            # A block of zeroes may be a hole of the file.
            if any(page) and hashlib.blake2b(page, digest_size=16).digest() not in blocks:
                missing += 1
    return missing


def cache_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--file-systems", default=",".join(("ext4", *kernels.FILE_SYSTEMS)))
    parser.add_argument("--mem", type=int, default=512, help="MiB")
    parser.add_argument("--keep", action="store_true", help="keep the captures")
    tool_argument(parser)


@command("cache", "clean page cache of each file system, held against the disk", cache_arguments)
def do_cache(args: Namespace) -> None:
    tool = find_tool(args.sonicshot)
    rows = []
    for series in args.kernels.split(","):
        for file_system in args.file_systems.split(","):
            spec = GuestSpec(kernels.fetch(series), mem=args.mem, forms=("raw",),
                             file_system=file_system)
            folder = capture(spec, f"cache-{series}-{file_system}")
            ram = folder / "ram.raw"
            clean, dirty = clean_frames(tool, ram)
            missing = not_on_disk(ram, clean, folder / "files.img")
            rows.append(f"| {series} | {file_system} | {len(clean):,} | {missing} | {dirty:,} |")
            print(f"{series}, {file_system}: {len(clean):,} frames of clean page cache, {missing} of "
                  f"them not on the disk; {dirty:,} of other page cache", flush=True)
            # All files are read before the stop.
            read = spec.files_mib << 20
            if missing or len(clean) * PAGE < read * 95 // 100:
                raise CheckFailed(f"{series}, {file_system}: {len(clean) * PAGE >> 20} MiB of clean "
                                  f"page cache where {read >> 20} MiB of files were read, {missing} "
                                  "frames not on the disk")
            if not args.keep:
                shutil.rmtree(folder)
    table = LAB / "cache.md"
    table.write_text("\n".join(["| kernel | file system | clean page cache, frames | not on the disk "
                                "| other page cache |", "|---|---|---:|---:|---:|", *rows]) + "\n")
    print(table.read_text())
