"""A lock that lets one process at a time write a table."""

import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from bioscan_jax.errors import InputError
from bioscan_jax.table.storage import TABLE_FLAG, local_directory, storage_errors

_HELD = {errno.EAGAIN, errno.EACCES}


def lock_path(uri: str, table: str) -> Path:
    """The file that is locked while `table` is written.

    It lies beside the table. For an object store it lies in the temporary directory of this machine and guards
    this machine alone; the counts that the sink checks after each commit guard the rest.
    """
    directory = local_directory(uri)
    if directory is not None:
        return directory / f".{table}.lock"
    key = hashlib.sha256(f"{uri.rstrip('/')}/{table}".encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"bioscan_jax-{key}.lock"


def _holder(descriptor: int) -> str:
    try:
        held = json.loads(os.pread(descriptor, 1 << 16, 0))
        return f"process {held['pid']} on {held['host']} since {held['started']} ({held['command'][:200]})"
    except (ValueError, KeyError):  # the holder has the lock and has not written its name yet
        return "another process"


@contextmanager
def writer_lock(uri: str, table: str, *, kind: str = "table", flag: str = TABLE_FLAG) -> Iterator[None]:
    """Holds the lock of one table; the kernel lets go of it when the process ends, however it ends.

    Args:
        uri: Database directory, made if absent, or object-store URL.
        table: Name of the vector table, or of what else is written there.
        kind: What messages call it.
        flag: Says where it is.

    Raises:
        InputError: another process holds it (named), or the file system has no locks or cannot be written.
    """
    path = lock_path(uri, table)
    with storage_errors(str(path), flag=flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                mend = "wait for it or stop it, then run the same command again"
                raise InputError(f"{uri}: {kind} {table} is being written by {_holder(descriptor)}; {mend}") from error
            mend = "write to a local disk, then copy"
            raise InputError(f"{path}: this file system has no locks ({error}); {mend}") from error
        command = shlex.join(sys.orig_argv)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "started": started}
        with storage_errors(str(path), flag=flag):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)
