"""Debian's packages: installed on the host, or unpacked into folders of the lab."""

import fcntl
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from errors import CommandFailed
from host import LAB, Word, attempt, run

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def mirror() -> str:
    """The Debian mirror that the machine's own apt uses."""
    for file in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        if not file.is_file():
            continue
        for line in file.read_text(errors="replace").splitlines():
            found = re.match(r"(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)"
                             r"((?:https?|ftp|file|mirror\S*):\S+/debian)/?(?:\s|$)", line)
            if found:
                return found.group(1)
    raise CommandFailed("no Debian mirror in apt's sources")


class Apt:
    """A private apt configuration for one suite: nothing on the host changes but its cache."""

    def __init__(self, suite: str) -> None:
        self.folder = LAB / "apt" / suite
        for sub in ("lists/partial", "cache/archives/partial"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        source = self.folder / "sources.list"
        source.write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
        # What is installed here may be newer than what the suite has.
        status = self.folder / "status"
        status.touch()
        self.options: list[str] = []
        for key, value in {
            "Dir::Etc::SourceList": source, "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Status": status, "Dir::State::Lists": self.folder / "lists",
            "Dir::Cache": self.folder / "cache",
            "APT::Sandbox::User": "root", "Acquire::Retries": "3",
        }.items():
            self.options += ["-o", f"{key}={value}"]

    def command(self, *words: Word, cwd: Path | None = None) -> str:
        """One at a time: labs that run beside each other share what was downloaded."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            program, *rest = words
            return run(program, *self.options, *rest, cwd=cwd)

    def update(self) -> None:
        self.command("apt-get", "update")

    def show(self, package: str, field: str) -> str:
        text = self.command("apt-cache", "show", "--no-all-versions", package)
        found = re.search(rf"^{field}: (.*)$", text, re.M)
        return found.group(1) if found else ""

    def depends(self, package: str) -> list[str]:
        return [re.split(r"[ (|]", d.strip())[0] for d in self.show(package, "Depends").split(",")]

    def download(self, package: str, into: Path) -> None:
        into.mkdir(parents=True, exist_ok=True)
        self.command("apt-get", "download", package, cwd=into)


class Root:
    """A Debian suite with some packages, unpacked into a folder of the lab and run from there by
    chroot: nothing is installed on the host."""

    ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive",
                   "LC_ALL": "C"}
    # $1 the root, $2 and $3 what is seen at the same place inside, so that names mean the same
    # file; then the command.
    SHARED = """set -e
for folder in "$2" "$3"; do
    mkdir -p "$1/$folder"
    mount --bind "$folder" "$1/$folder"
done
root="$1"
shift 3
exec chroot "$root" "$@"
"""

    # $0 the root. Some packages ask /proc where they are.
    INSIDE = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'

    def __init__(self, name: str, suite: str, packages: list[str]) -> None:
        self.folder = LAB / name
        self.suite, self.packages = suite, packages

    def install(self) -> None:
        done = self.folder / "lab-done"
        if done.exists():
            return
        if not shutil.which("debootstrap"):
            run("apt-get", "update")
            run("apt-get", "install", "-y", "--no-install-recommends", "debootstrap")
        shutil.rmtree(self.folder, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--keyring={KEYRING}", self.suite, self.folder,
            mirror())
        # No package may start a daemon.
        policy = self.folder / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        # A mirror may be older than it says it is good for; what it has is signed all the same.
        self.inside("apt-get", "-o", "Acquire::Check-Valid-Until=false", "update")
        self.inside("apt-get", "install", "-y", "--no-install-recommends", *self.packages)
        self.inside("apt-get", "clean")
        done.touch()

    def inside(self, *command: Word) -> str:
        return run("unshare", "--mount", "sh", "-c", self.INSIDE, self.folder, *command,
                   env=self.ENVIRONMENT)

    def shared(self, *command: str) -> list[str]:
        """The command line that runs a program of the folder on the lab's and temporary files."""
        return ["unshare", "--mount", "sh", "-c", self.SHARED, "sh", str(self.folder), str(LAB),
                tempfile.gettempdir(), *command]

    def versions(self, *packages: str) -> dict[str, str]:
        """Of the packages' sources, by name."""
        words = self.inside("dpkg-query", "-W", "-f", "${source:Package} ${source:Version}\n",
                            *packages).split()
        return dict(zip(words[::2], words[1::2]))


def install_packages(wanted: Mapping[str, str]) -> None:
    """Installs the packages of programs, or of files by their full names, that are missing."""
    missing = [package for name, package in wanted.items()
               if not (Path(name).exists() if name.startswith("/") else shutil.which(name))]
    if missing:
        run("apt-get", "update")
        run("apt-get", "install", "-y", "--no-install-recommends", *missing)


def install_tools() -> None:
    """Installs what the lab runs on the host, where it is missing."""
    wanted = {"gcc": "gcc", "mkfs.ext4": "e2fsprogs", "cpio": "cpio", "zstd": "zstd",
              "readelf": "binutils"}
    wanted["/usr/lib/x86_64-linux-gnu/libc.a"] = "libc6-dev"
    install_packages(wanted)
    if not shutil.which("qemu-system-x86_64") or qemu_version() < (9, 0):
        # The mapped-ram format needs QEMU 9; Debian 12 has 7.2 and the newer one in backports.
        apt = Apt("bookworm-backports")
        source = Path("/etc/apt/sources.list.d/sonicshot-lab.list")
        source.write_text((apt.folder / "sources.list").read_text())
        try:
            run("apt-get", "update")
            run("apt-get", "install", "-y", "--no-install-recommends",
                "-t", "bookworm-backports", "qemu-system-x86")
        finally:
            source.unlink()


def qemu_version() -> tuple[int, int]:
    text = attempt("qemu-system-x86_64", "--version").stdout
    found = re.search(r"version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
