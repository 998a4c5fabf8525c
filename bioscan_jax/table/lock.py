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
    """Returns the file that is locked while `table` is written.

    It is beside the table. For an object store it is in this machine's temporary directory and excludes writers on this
    machine only; writers elsewhere are detected by the row counts that the sink checks after each commit.
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
    except (ValueError, KeyError):  # the other process has the lock but has not written its name yet
        return "another process"


@contextmanager
def writer_lock(uri: str, table: str, *, kind: str = "table", flag: str = TABLE_FLAG) -> Iterator[None]:
    """Holds the lock of one table; the kernel releases it when the process ends, however it ends.

    Args:
        uri: Database directory, created if absent, or object-store URL.
        table: Name of the table, or of whatever else is written there.
        kind: What messages call it.
        flag: The flag that names the place.

    Raises:
        InputError: Another process, which the message names, holds the lock; or the file system has no locks or cannot
            be written.
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
                fix = "wait for it or stop it, then run the same command again"
                raise InputError(f"{uri}: {kind} {table} is being written by {_holder(descriptor)}; {fix}") from error
            fix = "write to a local disk, then copy"
            raise InputError(f"{path}: this file system has no locks ({error}); {fix}") from error
        command = shlex.join(sys.orig_argv)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "started": started}
        with storage_errors(str(path), flag=flag):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)
