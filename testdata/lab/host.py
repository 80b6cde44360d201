"""The host: where the lab is, and commands that run on it."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import CommandFailed

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(os.environ.get("SONICSHOT_LAB_DIR", ROOT / "target" / "lab"))

# An object of JSON, as programs print it.
Json = dict[str, Any]
Word = str | Path


def run(*command: Word, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Runs a command; its output is returned, and shown only when it fails."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, cwd=cwd, env=env)
    if done.returncode:
        raise CommandFailed(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def attempt(*command: Word, text: str | None = None, env: Mapping[str, str] | None = None
            ) -> subprocess.CompletedProcess[str]:
    """Runs a command that may fail, with `text` as its input: how it ended is the caller's."""
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, input=text,
                          env=env)


def pack(tree: Path, archive: Path) -> None:
    """All of a folder as a cpio archive, as the kernel takes an initramfs."""
    names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*"))) + "\n"
    with open(archive, "wb") as out:
        done = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree,
                              input=names.encode(), stdout=out, stderr=subprocess.PIPE)
    if done.returncode:
        raise CommandFailed(f"cpio of {tree} failed:\n{done.stderr.decode(errors='replace')}")


def read_through(file: Path) -> None:
    """Brings a file into the page cache, as far as memory is enough."""
    with open(file, "rb") as source:
        while source.read(1 << 24):
            pass


def allocated(path: Path) -> int:
    """Bytes of a file that are on the disk."""
    return path.stat().st_blocks * 512


def relative(path: Path) -> str:
    return os.path.relpath(path, ROOT)
