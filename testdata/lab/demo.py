"""The guest inside the command: the tests' capture, with every page that nothing looks at replaced
by a text, so that it is small."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path

from command import command
from errors import LabError
from host import ROOT, attempt, relative, run
from testdata import no_arguments

PAGE = 4096
TEXT = b"This page of the demo's guest is in use, and its content was replaced: nothing reads it.\n"
# Frames that are tried together; what cannot be replaced is halved down to these.
GROUP = 16
CHUNK = 32


def pages_of(ram: bytes) -> list[bytes]:
    return [ram[at:at + PAGE] for at in range(0, len(ram), PAGE)]


class Shrinking:
    """A guest's RAM, of which pages are replaced as long as `inspect` says the same of it."""

    def __init__(self, sonicshot: Path, ram: bytes, folder: Path) -> None:
        self.sonicshot = sonicshot
        self.original = pages_of(ram)
        self.file = folder / "ram.raw"
        self.file.write_bytes(ram)
        self.runs = folder / "runs.tsv"
        self.wanted = self.look()
        if self.wanted is None:
            raise LabError("the capture itself is not understood")

    def look(self) -> tuple[object, str] | None:
        """What `inspect` says of it."""
        said = attempt(self.sonicshot, "inspect", self.file, "--json", "--pfns", self.runs,
                       "--force")
        return None if said.returncode else (json.loads(said.stdout), self.runs.read_text())

    def put(self, chunks: list[list[int]], page_of: dict[int, bytes]) -> None:
        with self.file.open("r+b") as file:
            for frame in (frame for chunk in chunks for frame in chunk):
                file.seek(frame * PAGE)
                file.write(page_of[frame])

    def replace(self, chunks: list[list[int]]) -> None:
        """Replaces what can be of `chunks`."""
        fill = (TEXT * (PAGE // len(TEXT) + 1))[:PAGE]
        frames = [frame for chunk in chunks for frame in chunk]
        self.put(chunks, dict.fromkeys(frames, fill))
        if self.look() == self.wanted:
            return
        self.put(chunks, {frame: self.original[frame] for frame in frames})
        if len(chunks) > 1:
            half = len(chunks) // 2
            self.replace(chunks[:half])
            self.replace(chunks[half:])


@command("demo", "make the small guest that is inside the command, of the tests' capture; some "
                 "thousand looks at it", no_arguments)
def do_demo(_: Namespace) -> None:
    run("cargo", "build", "--release", "-p", "sonicshot-cli", cwd=ROOT)
    sonicshot = ROOT / "target" / "release" / "sonicshot"
    capture = ROOT / "testdata" / "guest-6.1-128m"
    into = ROOT / "crates" / "sonicshot-cli" / "demo"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole.raw"
        # Without holes: what is no diff.
        run("zstd", "-q", "-d", "--no-sparse", "--long=27", capture / "ram.raw.zst", "-o", whole)
        ram = whole.read_bytes()
        shrinking = Shrinking(sonicshot, ram, folder)
        chunks: dict[int, list[int]] = {}
        for frame, page in enumerate(shrinking.original):
            if any(page):
                chunks.setdefault(frame // CHUNK, []).append(frame)
        all_chunks = list(chunks.values())
        for at in range(0, len(all_chunks), GROUP):
            shrinking.replace(all_chunks[at:at + GROUP])
        if shrinking.look() != shrinking.wanted:
            raise LabError("the small guest is not as the whole one")
        run("zstd", "-q", "-f", "--ultra", "-21", "--long=27", shrinking.file,
            "-o", into / "ram.raw.zst")
    (into / "kpageflags.bin.zst").write_bytes((capture / "kpageflags.bin.zst").read_bytes())
    print(relative(into))
