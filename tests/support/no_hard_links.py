"""Makes hard links fail for the rest of this process, as on mounts of Google Drive or of a bucket (Linux seccomp)."""

import ctypes
import errno
import platform
import struct

_LINK_CALLS = {"x86_64": (86, 265), "aarch64": (37,)}
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _IF_EQUAL, _RETURN, _ALLOW, _ERROR = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000


def forbid_hard_links() -> None:
    """Lets link and linkat fail with ENOSYS in every thread that this one starts later, and in this one."""
    calls = _LINK_CALLS[platform.machine()]
    program = [(_LOAD, 0, 0, 0)]
    program += [(_IF_EQUAL, len(calls) - at, 0, number) for at, number in enumerate(calls)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SECCOMP, _FILTER, header)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
