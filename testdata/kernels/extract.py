#!/usr/bin/env python3
"""Takes the symbol table and the BTF out of a vmlinuz, for the test of the table of needs.

    extract.py VMLINUZ FOLDER

writes FOLDER/System.map, FOLDER/btf, and FOLDER/names: the strings that may be names in its
VMCOREINFO, a line each. Needs readelf, lz4 or zstd, and the program
kallsyms-finder of the package vmlinux-to-elf.
"""

import pathlib
import re
import struct
import subprocess
import sys
import tempfile

LZ4, ZSTD = b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"


def payload(image: bytes) -> bytes:
    """The compressed kernel in a bzImage (Documentation/arch/x86/boot.rst)."""
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    return image[start : start + length]


def decompress(data: bytes) -> bytes:
    """The kernel itself; its last four bytes in the image are its length."""
    if data.startswith(LZ4):
        command = ["lz4", "-d", "-q"]
    elif data.startswith(ZSTD):
        command = ["zstd", "-d", "-q"]
        data = data[:-4]
    else:
        sys.exit(f"unknown compression: {data[:4].hex()}")
    # lz4's old format ends with the length, which it reads as a block of no use.
    run = subprocess.run(command, input=data, stdout=subprocess.PIPE, check=False)
    if not run.stdout.startswith(b"\x7fELF"):
        sys.exit(f"{command[0]} gave no ELF file")
    return run.stdout


def main() -> None:
    """Writes both files."""
    image, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    kernel = decompress(payload(image.read_bytes()))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".elf") as elf:
        elf.write(kernel)
        elf.flush()
        sections = subprocess.run(
            ["readelf", "-SW", elf.name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        symbols = subprocess.run(
            ["kallsyms-finder", elf.name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    found = re.search(r"\] \.BTF +PROGBITS +\w+ (\w+) (\w+)", sections)
    if found is None:
        sys.exit("the kernel has no BTF")
    start, length = int(found[1], 16), int(found[2], 16)
    (folder / "btf").write_bytes(kernel[start : start + length])
    lines = [line for line in symbols.splitlines() if re.fullmatch(r"[0-9a-f]{16} \w \S+", line)]
    (folder / "System.map").write_text("\n".join(lines) + "\n")
    names = sorted(set(re.findall(rb"(?<=\0)[A-Za-z_][A-Za-z0-9_.]+(?=\0)", kernel)))
    (folder / "names").write_bytes(b"\n".join(names) + b"\n")


if __name__ == "__main__":
    main()
