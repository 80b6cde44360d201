"""EFI firmware out of Debian's packages, unpacked without being installed."""

import shutil
from pathlib import Path
from typing import NamedTuple

from debian import Apt
from host import LAB, run


class Firmware(NamedTuple):
    """Where a firmware is to be had, and what QEMU needs for it."""

    suite: str
    package: str
    # Its program, and the variables that it begins with.
    code: str = "OVMF_CODE_4M.fd"
    variables: str = "OVMF_VARS_4M.fd"
    options: tuple[str, ...] = ()


KNOWN = {
    "ovmf": Firmware("bookworm", "ovmf"),
    "ovmf-2m": Firmware("bookworm", "ovmf", "OVMF_CODE.fd", "OVMF_VARS.fd"),
    # Its variables are kept by SMM, which q35 alone has.
    "ovmf-smm": Firmware("bookworm", "ovmf", "OVMF_CODE_4M.secboot.fd",
                         options=("-global", "driver=cfi.pflash01,property=secure,value=on")),
    "ovmf-sid": Firmware("sid", "ovmf-generic"),
}


def fetch(name: str) -> tuple[Path, Path]:
    """The firmware's program, and its first variables."""
    firmware = KNOWN[name]
    home = LAB / "firmware" / name
    code, variables = home / firmware.code, home / firmware.variables
    if not (code.exists() and variables.exists()):
        apt = Apt(firmware.suite)
        apt.update()
        work = home / "unpack"
        shutil.rmtree(work, ignore_errors=True)
        apt.download(firmware.package, work)
        for deb in work.glob("*.deb"):
            run("dpkg", "-x", deb, work / "root")
        for part in (code, variables):
            shutil.copy(next((work / "root").rglob(part.name)), part)
        shutil.rmtree(work)
    return code, variables


def options_of(name: str, folder: Path) -> list[str | Path]:
    """For QEMU's command line; the guest's own variables are in `folder`."""
    code, first = fetch(name)
    variables = folder / "vars.fd"
    if not variables.exists():
        shutil.copy(first, variables)
    return ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}",
            "-drive", f"if=pflash,unit=1,format=raw,file={variables}",
            *KNOWN[name].options]


def sleep(machine: str, able: bool) -> tuple[str, ...]:
    """Whether the machine can go to sleep: if not, OVMF keeps no memory of its own for that."""
    chip = "PIIX4_PM" if machine == "pc" else "ICH9-LPC"
    return ("-global", f"{chip}.disable_s3={int(not able)}")
