"""Debian kernels, unpacked without being installed; and the host's tools."""

import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from errors import CommandFailed

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(os.environ.get("SONICSHOT_LAB_DIR", ROOT / "target" / "lab"))
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# Series -> suites to look in, the first that has it wins.
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie", "7.2": "sid"}
# Name -> suite and package of an EFI firmware, its code, its variables, and what QEMU needs for it.
SMM = ["-global", "driver=cfi.pflash01,property=secure,value=on"]
FIRMWARE = {
    "ovmf": ("bookworm", "ovmf", "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", []),
    "ovmf-2m": ("bookworm", "ovmf", "OVMF_CODE.fd", "OVMF_VARS.fd", []),
    "ovmf-smm": ("bookworm", "ovmf", "OVMF_CODE_4M.secboot.fd", "OVMF_VARS_4M.fd", SMM),
    "ovmf-sid": ("sid", "ovmf-generic", "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", []),
}
MODULES = [
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "virtio_blk", "virtio_balloon", "qemu_fw_cfg", "virtio_mem", "ext4", "nd_e820", "nd_pmem",
]


def run(*command, **kwargs):
    """Runs a command; its output is shown only when it fails."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **kwargs)
    if done.returncode:
        raise CommandFailed(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def mirror():
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

    def __init__(self, suite, base):
        self.folder = base / "apt" / suite
        for sub in ("lists/partial", "cache/archives/partial"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        source = self.folder / "sources.list"
        source.write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
        self.options = []
        for key, value in {
            "Dir::Etc::SourceList": source, "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": self.folder / "lists", "Dir::Cache": self.folder / "cache",
            "APT::Sandbox::User": "root", "Acquire::Retries": "3",
        }.items():
            self.options += ["-o", f"{key}={value}"]

    def update(self):
        run("apt-get", *self.options, "update")

    def show(self, package, field):
        text = run("apt-cache", *self.options, "show", "--no-all-versions", package)
        found = re.search(rf"^{field}: (.*)$", text, re.M)
        return found.group(1) if found else ""

    def depends(self, package):
        return [re.split(r"[ (|]", d.strip())[0] for d in self.show(package, "Depends").split(",")]

    def download(self, package, into):
        into.mkdir(parents=True, exist_ok=True)
        run("apt-get", *self.options, "download", package, cwd=into)


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

    def __init__(self, name, suite, packages):
        self.folder = LAB / name
        self.suite, self.packages = suite, packages

    def install(self):
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
        self.inside("apt-get", "update")
        self.inside("apt-get", "install", "-y", "--no-install-recommends", *self.packages)
        self.inside("apt-get", "clean")
        done.touch()

    def inside(self, *command):
        return run("chroot", self.folder, *command, env=self.ENVIRONMENT)

    def shared(self, *command):
        """The command line that runs a program of the folder on the lab's and temporary files."""
        return ["unshare", "--mount", "sh", "-c", self.SHARED, "sh", str(self.folder), str(LAB),
                tempfile.gettempdir(), *command]

    def versions(self, *packages):
        """Of the packages' sources, by name."""
        words = self.inside("dpkg-query", "-W", "-f", "${source:Package} ${source:Version}\n",
                            *packages).split()
        return dict(zip(words[::2], words[1::2]))


def install_tools():
    """Installs what the lab runs on the host, where it is missing."""
    wanted = {"gcc": "gcc", "mkfs.ext4": "e2fsprogs", "cpio": "cpio", "zstd": "zstd",
              "readelf": "binutils"}
    missing = [package for tool, package in wanted.items() if not shutil.which(tool)]
    if not Path("/usr/lib/x86_64-linux-gnu/libc.a").exists():
        missing.append("libc6-dev")
    if missing:
        run("apt-get", "update")
        run("apt-get", "install", "-y", "--no-install-recommends", *missing)
    if not shutil.which("qemu-system-x86_64") or qemu_version() < (9, 0):
        # The mapped-ram format needs QEMU 9; Debian 12 has 7.2 and the newer one in backports.
        apt = Apt("bookworm-backports", LAB)
        source = Path("/etc/apt/sources.list.d/sonicshot-lab.list")
        source.write_text((apt.folder / "sources.list").read_text())
        try:
            run("apt-get", "update")
            run("apt-get", "install", "-y", "--no-install-recommends",
                "-t", "bookworm-backports", "qemu-system-x86")
        finally:
            source.unlink()


def qemu_version():
    text = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    found = re.search(r"version (\d+)\.(\d+)", text.stdout)
    return tuple(map(int, found.groups())) if found else (0, 0)


def fetch(series, symbols):
    """Unpacks the newest kernel of `series` and returns its record.

    `6.1` is the cloud kernel, `6.1-amd64` the general one (which has page poisoning)."""
    number, _, flavour = series.partition("-")
    package = f"linux-image-{flavour or 'cloud-amd64'}"
    home = LAB / "kernels" / series
    record = home / "meta.json"
    if record.exists():
        meta = json.loads(record.read_text())
        if meta.get("wanted") == MODULES and (meta.get("vmlinux") or not symbols):
            return meta
    apt = Apt(SUITES[number], LAB)
    apt.update()
    image = next(p for p in apt.depends(package) if p.startswith("linux-image-"))
    packages = [image] + [p for p in apt.depends(image) if re.match(r"linux-(binary|modules)-", p)]
    if symbols:
        packages += [p for p in apt.depends(f"{package}-dbg")
                     if p.startswith("linux-image-")]
    work = home / "unpack"
    shutil.rmtree(work, ignore_errors=True)
    for package in packages:
        apt.download(package, work)
    versions = {}
    for deb in sorted(work.glob("*.deb")):
        name, version = run("dpkg-deb", "-W", deb).split()
        versions[name] = version
        run("dpkg", "-x", deb, work / "root")
        deb.unlink()
    root = work / "root"
    # 7.2 moved the kernel to usr/lib/modules/RELEASE, without the release in its name.
    release = image.removeprefix("linux-image-")
    vmlinuz = next(p for p in root.rglob("vmlinuz*") if p.is_file() and not p.is_symlink())
    meta = {"series": series, "release": release, "packages": versions, "wanted": MODULES,
            "vmlinuz": keep(vmlinuz, home / "vmlinuz")}
    config = next((p for name in (f"config-{release}", "config") for p in root.rglob(name)
                   if p.is_file() and not p.is_symlink()), None)
    if config:
        meta["config"] = keep(config, home / "config")
    modules = home / "modules"
    shutil.rmtree(modules, ignore_errors=True)
    modules.mkdir()
    meta["modules"] = collect_modules(root, release, modules)
    if symbols:
        vmlinux = max((p for p in root.rglob("vmlinux-*") if p.is_file() and not p.is_symlink()),
                      key=lambda p: p.stat().st_size, default=None) \
            or max((p for p in root.rglob("vmlinux") if p.is_file() and not p.is_symlink()),
                   key=lambda p: p.stat().st_size)
        meta["vmlinux"] = keep(vmlinux, home / "vmlinux")
        system_map = max((p for p in root.rglob("System.map*") if p.is_file()),
                         key=lambda p: p.stat().st_size)
        # As distributed, with the release in its name: the file itself carries no version.
        meta["system_map"] = keep(system_map, home / f"System.map-{release}")
    shutil.rmtree(work)
    record.write_text(json.dumps(meta, indent=1))
    return meta


def fetch_firmware(name):
    """Unpacks an EFI firmware and returns its code and the variables that it begins with."""
    suite, package, *parts, _ = FIRMWARE[name]
    home = LAB / "firmware" / name
    found = [home / part for part in parts]
    if not all(part.exists() for part in found):
        apt = Apt(suite, LAB)
        apt.update()
        work = home / "unpack"
        shutil.rmtree(work, ignore_errors=True)
        apt.download(package, work)
        for deb in work.glob("*.deb"):
            run("dpkg", "-x", deb, work / "root")
        for part in found:
            shutil.copy(next((work / "root").rglob(part.name)), part)
        shutil.rmtree(work)
    return found


def keep(path, target):
    shutil.move(path, target)
    return str(target.relative_to(LAB))


def collect_modules(root, release, into, wanted=None):
    """Copies the modules the guest needs, uncompressed, and returns their load order."""
    files = {}
    for path in root.rglob("*.ko*"):
        if release in path.parts:
            files[re.sub(r"\.ko.*$", "", path.name).replace("-", "_")] = path
    order = []

    def add(name):
        name = name.replace("-", "_")
        if name in order or name not in files:
            return
        path = files[name]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        for found in re.findall(rb"\0?depends=([^\0]*)\0", data):
            for below in found.decode().split(","):
                if below:
                    add(below)
        (into / f"{name}.ko").write_bytes(data)
        order.append(name)

    for name in wanted or MODULES:
        add(name)
    # ext4 checks its data with crc32c by name, which no `depends=` tells.
    for name in ("crc32c_generic", "crc32c_cryptoapi", "libcrc32c"):
        if name in files and name not in order:
            add(name)
            order.remove(name)
            order.insert(0, name)
    return order
