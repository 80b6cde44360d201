"""What goes wrong in the lab. `lab.py` prints the message, and ends with exit code 1."""


class LabError(Exception):
    """The root of all of them."""


class AlreadyTold(LabError):
    """What failed was printed as it failed: nothing is left to say."""


class CommandFailed(LabError):
    """A program of the host ended with an error, or what it needs is not there."""


class GuestFailed(LabError):
    """A guest, or the QEMU, Xen or libvirt that it runs under, did not do what was asked of it."""


class Refused(GuestFailed):
    """libvirt said no."""


class CheckFailed(LabError):
    """What was measured, read or compared is not what it must be."""


class Differs(CheckFailed):
    """Two files do not hold the same guest."""
