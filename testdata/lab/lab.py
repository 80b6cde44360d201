#!/usr/bin/env python3
"""The lab: boots real Debian kernels under QEMU, captures their memory, restores and proves.

Everything it downloads or makes is under target/lab (or SONICSHOT_LAB_DIR)."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernels  # noqa: E402
import machine  # noqa: E402


def spec_of(args, series):
    meta = kernels.fetch(series, args.debug_symbols)
    spec = {"kernel": meta, "mem": args.mem, "cpu": args.cpu, "smp": args.smp,
            "machine": args.machine, "garbage": args.garbage}
    for key in ("append", "hugetlb", "balloon", "anon"):
        if getattr(args, key):
            spec[key] = getattr(args, key)
    if args.mapped_ram:
        spec["mapped_ram"] = True
    if args.stream:
        spec["stream"] = True
    return spec


def name_of(spec):
    parts = [spec["kernel"]["series"], str(spec["mem"]), spec["cpu"]]
    if spec["machine"] != "pc":
        parts.append(spec["machine"])
    if spec["smp"] != 1:
        parts.append(f"smp{spec['smp']}")
    for key in ("append", "hugetlb", "balloon"):
        if spec.get(key):
            parts.append(key + str(spec[key]).replace(" ", "_").replace("/", "_"))
    return "-".join(parts)


def do_setup(args):
    kernels.install_tools()
    for series in args.kernels.split(","):
        meta = kernels.fetch(series, args.debug_symbols)
        print(series, meta["release"])


def do_capture(args):
    kernels.install_tools()
    spec = spec_of(args, args.kernel)
    folder = machine.capture(spec, args.name or name_of(spec))
    print(machine.relative(folder))


def do_restore(args):
    folder = kernels.LAB / "captures" / args.capture
    beat, rss = machine.restore(folder, Path(args.ram).resolve(), args.torture)
    print(f"first beat after {beat:.2f} s, QEMU resident {rss} MiB"
          + (", TORTURE-OK" if args.torture else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)

    setup = commands.add_parser("setup", help="install tools, download kernels")
    setup.add_argument("--kernels", default=",".join(kernels.SUITES))
    setup.add_argument("--debug-symbols", action="store_true")
    setup.set_defaults(run=do_setup)

    capture = commands.add_parser("capture", help="boot a guest and take its memory")
    capture.add_argument("--kernel", default="6.1", choices=list(kernels.SUITES))
    capture.add_argument("--mem", type=int, default=512, help="MiB")
    capture.add_argument("--cpu", default="qemu64")
    capture.add_argument("--smp", type=int, default=1)
    capture.add_argument("--machine", default="pc", choices=["pc", "q35"])
    capture.add_argument("--append", default="", help="kernel command line")
    capture.add_argument("--hugetlb", type=int, default=0, help="pool size in 2 MiB pages; half used")
    capture.add_argument("--balloon", type=int, default=0, help="MiB to take from the guest")
    capture.add_argument("--anon", type=int, default=0, help="MiB of mlocked memory")
    capture.add_argument("--garbage", default="random", choices=["random", "compressible"])
    capture.add_argument("--name")
    capture.add_argument("--mapped-ram", action="store_true")
    capture.add_argument("--stream", action="store_true")
    capture.add_argument("--debug-symbols", action="store_true")
    capture.set_defaults(run=do_capture)

    restore = commands.add_parser("restore", help="run a captured guest on")
    restore.add_argument("--capture", required=True)
    restore.add_argument("--ram", required=True)
    restore.add_argument("--torture", action="store_true")
    restore.set_defaults(run=do_restore)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
