//! Formats of other tools that are known but not read: what they are, and what to do with such a
//! file. None of them is taken for raw RAM.
//!
//! Where the beginnings are said: VMware `vmss2core` and Volatility's `vmware.py`; Hyper-V
//! Microsoft's saved state library; VirtualBox `src/VBox/VMM/VMMR3/SSM.cpp`; Proxmox `vma.h`;
//! `sadump` and LKCD crash's `sadump.h` and `lkcd_common.h`; Windows Volatility's `crash.py` and
//! `hibernate.py`; Linux `kernel/power/swap.c`; disks QEMU's `block/`; the rest `file`'s `magic`.

mod disk;

use crate::DumpError;
use crate::backing::unpack;
use crate::format::kind::Source;
use crate::format::vmware;

/// A format that is not read.
pub(crate) struct Foreign {
    /// The offset of its mark.
    at: usize,
    mark: &'static [u8],
    /// Its name, for people.
    pub kind: &'static str,
    /// The way to go with such a file.
    pub instead: &'static str,
    /// The test that must hold besides, where the mark is not enough.
    is_one: fn(&Source<'_>) -> bool,
}

const fn begins(mark: &'static [u8], kind: &'static str, instead: &'static str) -> Foreign {
    marked(0, mark, kind, instead)
}

const fn marked(
    at: usize,
    mark: &'static [u8],
    kind: &'static str,
    instead: &'static str,
) -> Foreign {
    Foreign {
        at,
        mark,
        kind,
        instead,
        is_one: |_| true,
    }
}

/// The same of a mark that may stand in any memory, if `is_one` finds the rest as it must be.
const fn if_so(
    at: usize,
    mark: &'static [u8],
    kind: &'static str,
    instead: &'static str,
    is_one: fn(&Source<'_>) -> bool,
) -> Foreign {
    Foreign {
        is_one,
        ..marked(at, mark, kind, instead)
    }
}

const VMWARE: &str = "a VMware guest's state (vmss, vmsn)";
const GIVE_VMEM: &str = "it is read with the .vmem of the same name beside it, which is the guest's memory. Where that is \
     inside of the state, as ESX has it, VMware's `vmss2core -N FILE` writes a core, which is read";
const LKCD: &str = "an LKCD dump";
const OF_CRASH: &str = "only crash reads it: take the guest's memory in another format";
const WINDOWS_DUMP: &str = "a Windows crash dump";
const WINDOWS_HIBERNATION: &str = "a Windows hibernation file";
const OTHER_SYSTEM: &str = "it is of another system: only Linux guests are looked into";
const HIBERNATION: &str = "a swap area with a hibernated Linux in it";
const RESUME: &str = "resume the system in it, and take its memory then";
const EVIDENCE: &str = "an EnCase evidence file";
const EXPORT: &str = "`ewfexport` of libewf writes the raw memory that is in it";
const MACHO: &str = "a Mach-O file";
const DISK: &str = "it is a guest's disk, not its memory: give the file with the memory";
/// One compression is read, and no more.
const TWICE: &str = "decompress the file, and give what comes of it";
const UNPACK: &str = "unpack it, and give the memory that is in it";
const JOIN_PARTS: &str = "`zip -s 0 ARCHIVE.zip --out WHOLE.zip` joins the parts";
/// A part of an archive that begins as anything: its last bytes tell.
static LAST_PART: Foreign = begins(b"", "the last part of an archive (zip)", JOIN_PARTS);

/// All of them. A mark of few bytes stands last: what has two of them is the first.
const TABLE: &[Foreign] = &[
    begins(
        b"\x89SONIC\r\n",
        "a checkpoint",
        "`restore` makes a dump of it again; `inspect`, `verify` and `convert` take it as it is",
    ),
    begins(
        b"LibvirtQemudPart",
        "an unfinished libvirt save image",
        "it was never whole: save the guest again",
    ),
    begins(&vmware::STATE_0, VMWARE, GIVE_VMEM),
    begins(&vmware::STATE_1, VMWARE, GIVE_VMEM),
    begins(&vmware::STATE_2, VMWARE, GIVE_VMEM),
    begins(&vmware::STATE_3, VMWARE, GIVE_VMEM),
    begins(
        b"\x14\x20\x28\x01",
        "a Hyper-V saved state (vmrs)",
        "take the guest's memory from inside it, with AVML",
    ),
    begins(
        b"\x7fVirtualBox SavedState V",
        "a VirtualBox saved state (sav)",
        "of the running guest `VBoxManage debugvm NAME dumpvmcore --filename FILE` writes an ELF \
         core, which is read",
    ),
    begins(
        b"VMA\0",
        "a Proxmox backup (vma)",
        "`vma extract FILE FOLDER` takes it apart; of a snapshot with RAM the state is a migration \
         stream, which is read",
    ),
    begins(
        b"sadump\0\0",
        "an sadump",
        "`makedumpfile -x VMLINUX -d 0 FILE OUT` makes a kdump of it",
    ),
    begins(b"\xed\x23\x8f\x61\x73\x01\x19\xa8", LKCD, OF_CRASH),
    begins(b"\xa8\x19\x01\x73\x61\x8f\x23\xed", LKCD, OF_CRASH),
    begins(b"\xcd\x23\x8f\x61\x73\x01\x19\xa8", LKCD, OF_CRASH),
    begins(
        b"\xa8\x19\x01\x73\x61\x8f\x23\xfd",
        "an s390 standalone dump",
        OF_CRASH,
    ),
    begins(b"DISKDUMP", "a diskdump", OF_CRASH),
    begins(
        b"LinuxGuestRecord",
        "a save image of an old Xen (xm)",
        "restore the guest, and save it with `xl save`",
    ),
    begins(
        b"\xed\xeb\x0f\xf0",
        "a core of an old Xen (xm)",
        "dump the guest with `xl dump-core`",
    ),
    begins(b"PAGEDU64", WINDOWS_DUMP, OTHER_SYSTEM),
    begins(b"PAGEDUMP", WINDOWS_DUMP, OTHER_SYSTEM),
    begins(
        b"MDMP\x93\xa7",
        "a minidump of a process",
        "give a guest's whole memory",
    ),
    marked(4086, b"S1SUSPEND\0", HIBERNATION, RESUME),
    marked(4086, b"S2SUSPEND\0", HIBERNATION, RESUME),
    marked(4086, b"ULSUSPEND\0", HIBERNATION, RESUME),
    marked(4086, b"LINHIB0001", HIBERNATION, RESUME),
    marked(4086, b"SWAPSPACE2", "a swap area", DISK),
    begins(b"EVF\x09\r\n\xff\0", EVIDENCE, EXPORT),
    begins(b"LVF\x09\r\n\xff\0", EVIDENCE, EXPORT),
    begins(b"EVF2\r\n\x81\0", EVIDENCE, EXPORT),
    begins(
        b"AFF10\r\n\0",
        "an AFF evidence file",
        "`affcat` of afflib writes the raw memory that is in it",
    ),
    begins(b"HPAK", "an HBGary memory dump (hpak)", UNPACK),
    marked(
        4096,
        b"sadump\0\0",
        "an sadump (of a media backup)",
        "`makedumpfile -x VMLINUX -d 0 FILE OUT` makes a kdump of it",
    ),
    begins(
        b"\xa8\x19\x01\x73\x61\x8f\x23\xfe",
        "an s390 standalone dump",
        OF_CRASH,
    ),
    begins(
        b"\xee\xeb\x0f\xf0",
        "a core of an old Xen (xm)",
        "dump the guest with `xl dump-core`",
    ),
    begins(b"minidump FreeBSD/", "a FreeBSD dump", OTHER_SYSTEM),
    begins(b"\xed\xc8\xfe\xde", "a Solaris dump", OTHER_SYSTEM),
    begins(b"\xde\xfe\xc8\xed", "a Solaris dump", OTHER_SYSTEM),
    begins(b"\xf0\x0d\xf0\x0d", "an AIX dump", OTHER_SYSTEM),
    begins(
        b"\xbe\xba\xfe\xca\0\0\0\0",
        "a VMware disk image (vmdk)",
        DISK,
    ),
    begins(b"\xca\xfe\xba\xbe", MACHO, OTHER_SYSTEM),
    begins(b"\xbe\xba\xfe\xca", MACHO, OTHER_SYSTEM),
    begins(b"\xcf\xfa\xed\xfe", MACHO, OTHER_SYSTEM),
    begins(b"\xfe\xed\xfa\xcf", MACHO, OTHER_SYSTEM),
    begins(b"\xce\xfa\xed\xfe", MACHO, OTHER_SYSTEM),
    begins(b"\xfe\xed\xfa\xce", MACHO, OTHER_SYSTEM),
    begins(b"QED\0", "a QED disk image", DISK),
    begins(b"KDMV", "a VMware disk image (vmdk)", DISK),
    begins(b"COWD", "a VMware disk image (vmdk)", DISK),
    begins(b"# Disk DescriptorFile", "a VMware disk image (vmdk)", DISK),
    begins(b"vhdxfile", "a Hyper-V disk image (vhdx)", DISK),
    begins(b"conectix", "a Hyper-V disk image (vhd)", DISK),
    marked(
        64,
        b"\x7f\x10\xda\xbe",
        "a VirtualBox disk image (vdi)",
        DISK,
    ),
    begins(b"WithoutFreeSpace", "a Parallels disk image (hdd)", DISK),
    begins(b"WithouFreSpacExt", "a Parallels disk image (hdd)", DISK),
    begins(b"<<< ", "a VirtualBox disk image (vdi)", DISK),
    begins(b"%PDF", "a PDF document", "give a guest's memory"),
    begins(b"LUKS\xba\xbe", "an encrypted disk (LUKS)", DISK),
    marked(512, b"EFI PART", "a disk image", DISK),
    begins(b"\xeb\x52\x90NTFS    ", "a file system (ntfs)", DISK),
    begins(b"\xeb\x76\x90EXFAT   ", "a file system (exfat)", DISK),
    marked(82, b"FAT32   ", "a file system (fat)", DISK),
    marked(54, b"FAT16   ", "a file system (fat)", DISK),
    marked(54, b"FAT12   ", "a file system (fat)", DISK),
    marked(0x1_0034, b"ReIsEr2Fs", "a file system (reiserfs)", DISK),
    marked(0x1_0034, b"ReIsEr3Fs", "a file system (reiserfs)", DISK),
    marked(
        4096,
        b"\xfc\x4e\x2b\xa9\x01\0\0\0",
        "a part of a RAID (md)",
        DISK,
    ),
    if_so(
        1024,
        b"\x10\x20\xf5\xf2",
        "a file system (f2fs)",
        DISK,
        disk::is_f2fs,
    ),
    if_so(
        1080,
        b"\x53\xef",
        "a file system (ext2, ext3, ext4)",
        DISK,
        disk::is_ext,
    ),
    if_so(
        510,
        b"\x55\xaa",
        "a disk image (mbr)",
        DISK,
        disk::is_partitioned,
    ),
    marked(512, b"LABELONE", "a physical volume of LVM", DISK),
    marked(0x1_0040, b"_BHRfS_M", "a file system (btrfs)", DISK),
    begins(b"XFSB\0", "a file system (xfs)", DISK),
    marked(1024, b"\xe2\xe1\xf5\xe0", "a file system (erofs)", DISK),
    begins(b"Bochs Virtual HD Image", "a Bochs disk image", DISK),
    begins(b"#!/bin/sh\n#V2.0 Format\n", "a disk image (cloop)", DISK),
    begins(b"hsqs", "a file system (squashfs)", DISK),
    marked(0x8001, b"CD001", "an image of a CD", DISK),
    begins(
        unpack::ZSTD,
        "compressed with zstd inside of what is decompressed",
        TWICE,
    ),
    begins(
        unpack::XZ,
        "compressed with xz inside of what is decompressed",
        TWICE,
    ),
    begins(
        unpack::LZ4,
        "compressed with lz4 inside of what is decompressed",
        TWICE,
    ),
    begins(
        b"\x02\x21\x4c\x18",
        "compressed with lz4 (its old format)",
        "`lz4 -d FILE OUT` decompresses it",
    ),
    begins(
        unpack::LZOP,
        "compressed with lzop inside of what is decompressed",
        TWICE,
    ),
    begins(
        b"LZIP\x01",
        "compressed with lzip",
        "`lzip -dk FILE` decompresses it",
    ),
    begins(b"LRZI", "compressed with lrzip", UNPACK),
    begins(
        b"\xff\x06\0\0sNaPpY",
        "compressed with snappy",
        "`snzip -dk FILE` decompresses it",
    ),
    begins(
        b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff",
        "compressed with lzma",
        "`xz -dk --format=lzma FILE` decompresses it",
    ),
    begins(b"MSCF\0\0\0\0", "an archive (cab)", UNPACK),
    begins(b"MSWIM\0\0\0", "an archive (wim)", UNPACK),
    begins(b"xar!", "an archive (xar)", UNPACK),
    begins(b"!<arch>\n", "an archive (ar)", UNPACK),
    begins(b"7kSt", "an archive (zpaq)", UNPACK),
    begins(
        b"\x89PNG\r\n\x1a\n",
        "a picture (png)",
        "give a guest's memory",
    ),
    begins(b"7z\xbc\xaf\x27\x1c", "an archive (7z)", UNPACK),
    begins(b"Rar!\x1a\x07", "an archive (rar)", UNPACK),
    begins(
        unpack::ZIP,
        "an archive (zip) inside of what is decompressed",
        TWICE,
    ),
    begins(
        b"PK\x07\x08PK\x03\x04",
        "the first part of an archive (zip)",
        JOIN_PARTS,
    ),
    begins(
        b"PK\x05\x06\0\0\0\0\0\0",
        "an empty archive (zip)",
        "give a guest's memory",
    ),
    marked(257, b"ustar", "an archive (tar)", UNPACK),
    begins(b"070701", "an archive (cpio)", UNPACK),
    begins(b"hibr", WINDOWS_HIBERNATION, OTHER_SYSTEM),
    begins(b"HIBR", WINDOWS_HIBERNATION, OTHER_SYSTEM),
    begins(b"wake", WINDOWS_HIBERNATION, OTHER_SYSTEM),
    begins(b"WAKE", WINDOWS_HIBERNATION, OTHER_SYSTEM),
    begins(b"rstr", WINDOWS_HIBERNATION, OTHER_SYSTEM),
    begins(b"RSTR", WINDOWS_HIBERNATION, OTHER_SYSTEM),
    begins(
        unpack::BZIP2,
        "compressed with bzip2 inside of what is decompressed",
        TWICE,
    ),
    begins(
        unpack::GZIP,
        "compressed with gzip inside of what is decompressed",
        TWICE,
    ),
    begins(
        b"\x1f\x9d",
        "compressed with compress",
        "`gzip -dk FILE` decompresses it",
    ),
];

/// The foreign format that a file is of, if it is of one.
pub(crate) fn foreign(source: &Source<'_>) -> Option<&'static Foreign> {
    let is_one =
        |foreign: &&Foreign| source.has(foreign.at, foreign.mark) && (foreign.is_one)(source);
    let marked = TABLE.iter().find(is_one);
    marked.or_else(|| disk::ends_an_archive(source).then_some(&LAST_PART))
}

/// Whether a file that begins with `start` is of one.
pub(crate) fn begins_as_foreign(start: &[u8]) -> bool {
    let mut marks = TABLE.iter().filter(|foreign| foreign.at == 0);
    marks.any(|foreign| start.starts_with(foreign.mark))
}

impl Foreign {
    /// The refusal of a file of it.
    pub(crate) fn refusal(&self, source: &Source<'_>) -> DumpError {
        DumpError::NotRead {
            path: source.path.to_owned(),
            kind: self.kind,
            instead: self.instead,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{TABLE, begins_as_foreign};
    use crate::snapshot::START;

    /// A file with the mark of one is never called another.
    #[test]
    fn no_mark_hides_another() {
        for (number, foreign) in TABLE.iter().enumerate() {
            assert!(!foreign.mark.is_empty() && !foreign.instead.is_empty());
            // A file of a folder is told by as many bytes as are read of it.
            assert!(foreign.at > 0 || foreign.mark.len() as u64 <= START);
            let mut start = vec![0; foreign.at];
            start.extend(foreign.mark);
            let first = TABLE.iter().position(|other| {
                start
                    .get(other.at..)
                    .is_some_and(|there| there.starts_with(other.mark))
            });
            assert_eq!(first, Some(number), "{}", foreign.kind);
            assert_eq!(begins_as_foreign(&start), foreign.at == 0);
        }
        assert!(!begins_as_foreign(&[0; 64]));
    }
}
