"""Lies of a guest's kernel: `fuzz`'s `mutate` on captured guests of every kernel."""

import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from pathlib import Path

import captures
import kernels
from command import command
from debian import install_tools
from errors import CheckFailed
from host import ROOT, Word
from spec import GuestSpec


def capture_of(series: str, mem: int, balloon: int) -> Path:
    spec = GuestSpec(kernels.fetch(series), mem=mem, balloon=balloon, forms=("raw",))
    name = f"mutate-{series}-{mem}"
    return captures.capture(spec, f"{name}-balloon{balloon}" if balloon else name)


def mutate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--kernels", default=kernels.ALL)
    parser.add_argument("--mem", type=int, default=128, help="MiB")
    parser.add_argument("--balloon", type=int, default=0, help="MiB to take from the guest")
    parser.add_argument("--rounds", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rm", action="store_true", help="delete each capture afterwards")


@command("mutate", "change one record of a guest after another", mutate_arguments)
def do_mutate(args: Namespace) -> None:
    """Changes one record after another of each capture; no frame in use may be dropped."""
    install_tools()
    failed = []
    for series in args.kernels.split(","):
        folder = capture_of(series, args.mem, args.balloon)
        # What it says is seen as it says it.
        mutate: list[Word] = ["cargo", "run", "--release", "--quiet", "--manifest-path",
                              ROOT / "fuzz" / "Cargo.toml", "--bin", "mutate", "--",
                              "--capture", folder, "--rounds", str(args.rounds),
                              "--seed", str(args.seed)]
        if subprocess.run(mutate).returncode:
            failed.append(series)
        if args.rm:
            shutil.rmtree(folder)
    if failed:
        raise CheckFailed(f"{', '.join(failed)}: something in use would have been dropped")
