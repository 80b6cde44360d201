"""The small capture that `cargo test` uses."""

from argparse import ArgumentParser, Namespace

import captures
import kernels
from command import command
from debian import install_tools
from host import ROOT, relative, run
from spec import GuestSpec


def no_arguments(_: ArgumentParser) -> None:
    """It is always the same."""


@command("testdata", "make the capture that the tests use", no_arguments)
def do_testdata(_: Namespace) -> None:
    install_tools()
    spec = GuestSpec(kernels.fetch("6.1"), mem=128, garbage="compressible", forms=("raw",))
    folder = captures.capture(spec, "testdata")
    into = ROOT / "testdata" / "guest-6.1-128m"
    into.mkdir(exist_ok=True)
    for name in ("ram.raw", "kpageflags.bin", "kpagecount.bin"):
        run("zstd", "-q", "-f", "-19", "--long=27", "-T0", folder / name,
            "-o", into / f"{name}.zst")
    for name in ("zoneinfo", "buddyinfo", "iomem", "version", "cmdline"):
        (into / name).write_text((folder / name).read_text())
    print(relative(into))
