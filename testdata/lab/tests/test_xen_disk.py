import struct
import unittest
import zlib

import xen_disk
from tests import KERNEL
from xen import XenGuest
from xen_disk import HEAD, DiskRow, LiveDisk


class Tables(unittest.TestCase):
    def test_a_partition_of_a_pc(self) -> None:
        table = xen_disk.mbr(2048, 77)
        self.assertEqual((len(table), table[510:]), (512, b"\x55\xaa"))
        self.assertEqual((table[450], struct.unpack_from("<II", table, 454)), (0x83, (2048, 77)))
        self.assertEqual(table[462:510], bytes(48))

    def test_a_gpt_has_its_sums(self) -> None:
        table = xen_disk.gpt(2048, 77)
        self.assertEqual((table[450], table[512:520]), (0xEE, b"EFI PART"))
        head = bytearray(table[512:512 + 92])
        said = struct.unpack_from("<I", head, 16)[0]
        head[16:20] = bytes(4)
        self.assertEqual(zlib.crc32(head), said)
        at, count, size, entries = struct.unpack_from("<QIII", head, 72)
        self.assertEqual((at, len(table)), (2, 1024 + count * size))
        self.assertEqual(zlib.crc32(table[1024:]), entries)
        self.assertEqual(struct.unpack_from("<QQ", table, 1024 + 32), (2048, 2124))


class Rows(unittest.TestCase):
    def test_a_row_has_what_the_head_says(self) -> None:
        guest = XenGuest(KERNEL, 320, disk=154)
        live = LiveDisk(on_disk=19000, bytes=3 << 20, suspended=4.5, restore=6.5)
        row = DiskRow(guest, "gpt", cache=20000, explained=19500, streamed=False, on_disk=19125,
                      image_bytes=10 << 20, all_bytes=9 << 20, bytes=2 << 20, restore=1.25, live=live)
        line = row.line()
        self.assertEqual(line.count("|"), HEAD.splitlines()[0].count("|"))
        self.assertIn("| gpt | 20,000 | 19,500, not read whole | 19,125 | 10.0 | 9.0 | 2.0 | 1.2 s |", line)
        self.assertIn("19,000 pages on the disk, 3.0 MiB, suspended for 4.5 s", line)


if __name__ == "__main__":
    unittest.main()
