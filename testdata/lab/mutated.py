"""Lies of a guest's kernel: `fuzz`'s `mutate` on captured guests of every kernel."""

import subprocess

import kernels
import machine
from errors import CheckFailed


def capture_of(series, mem, more):
    spec = {"kernel": kernels.fetch(series, False), "mem": mem, "cpu": "qemu64", "smp": 1,
            "machine": "pc", "garbage": "random", "forms": ["raw"], **more}
    name = "-".join([f"mutate-{series}-{mem}", *(f"{key}{value}" for key, value in more.items())])
    return machine.capture(spec, name)


def do_mutate(args):
    """Changes one record after another of each capture; no frame in use may be dropped."""
    kernels.install_tools()
    failed = []
    for series in args.kernels.split(","):
        more = {"balloon": args.balloon} if args.balloon else {}
        folder = capture_of(series, args.mem, more)
        command = ["cargo", "run", "--release", "--quiet", "--manifest-path",
                   kernels.ROOT / "fuzz" / "Cargo.toml", "--bin", "mutate", "--",
                   "--capture", folder, "--rounds", str(args.rounds), "--seed", str(args.seed)]
        if subprocess.run(command).returncode:
            failed.append(series)
        if args.rm:
            kernels.shutil.rmtree(folder)
    if failed:
        raise CheckFailed(f"{', '.join(failed)}: something in use would have been dropped")


def add_command(commands):
    parser = commands.add_parser("mutate", help="change one record of a guest after another")
    parser.add_argument("--kernels", default=",".join(kernels.SUITES))
    parser.add_argument("--mem", type=int, default=128, help="MiB")
    parser.add_argument("--balloon", type=int, default=0, help="MiB to take from the guest")
    parser.add_argument("--rounds", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rm", action="store_true", help="delete each capture afterwards")
    parser.set_defaults(run=do_mutate)
