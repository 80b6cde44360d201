"""Images with a file system that only a mount can put files into."""

import tempfile
from pathlib import Path

from host import LAB, run


def fill(file_system: str, files: Path, image: Path, mib: int) -> None:
    """Makes an image of `mib` MiB with what the folder `files` has."""
    with open(image, "wb") as file:
        file.truncate(mib << 20)
    run(f"mkfs.{file_system}", "-q", image)
    # btrfs would have small files in its tree, where no block is one of them.
    options = {"btrfs": "loop,max_inline=0"}.get(file_system, "loop")
    folder = Path(tempfile.mkdtemp(dir=LAB))
    run("mount", "-t", file_system, "-o", options, image, folder)
    try:
        run("cp", "-a", f"{files}/.", folder)
    finally:
        run("umount", folder)
        folder.rmdir()
