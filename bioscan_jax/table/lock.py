"""Lets one process at a time write a table: a file lock beside a local one, a lease in the bucket of a remote one."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bioscan_jax.errors import InputError
from bioscan_jax.location import Bucket, Location, local_directory
from bioscan_jax.output import private_directory
from bioscan_jax.table.lease import describe, held_lease, this_process
from bioscan_jax.table.storage import TABLE_FLAG, storage_errors

_HELD = {errno.EAGAIN, errno.EACCES}

Check = Callable[[], None]
"""Raises InputError if the lock was lost since; called before each commit."""


@contextmanager
def writer_lock(uri: str, table: str, *, kind: str = "table", flag: str = TABLE_FLAG) -> Iterator[Check]:
    """Holds the lock of one table.

    That of a local table is released by the kernel when the process ends, however it ends; that of a remote one lapses
    `lease.STALE_SECONDS` after its owner was last seen.

    Args:
        uri: Database directory, created if absent, or object-store URL.
        table: Name of the table, or of whatever else is written there.
        kind: What messages call it.
        flag: The flag that names the place.

    Raises:
        InputError: Another process, which the message names, holds the lock; or the file system has no locks or cannot
            be written.
    """
    directory, what = local_directory(uri, flag=flag.removeprefix("--")), f"{uri}: {kind} {table}"
    if directory is None:
        with held_lease(f"{uri.rstrip('/')}/.{table}.lease", what) as check:
            yield check
        return
    with storage_errors(str(directory), flag=flag):
        directory.mkdir(parents=True, exist_ok=True)
    with _file_lock(directory / f".{table}.lock", what, flag):
        yield lambda: None


@contextmanager
def machine_lock(name: str, what: str) -> Iterator[None]:
    """Holds a lock among this user's processes on this machine, for places that have no locks themselves.

    Args:
        name: What is locked.
        what: What messages call it.

    Raises:
        InputError: Another process holds the lock.
    """
    key = hashlib.sha256(name.encode()).hexdigest()
    with _file_lock(private_directory() / f"{key}.lock", what, "TMPDIR"):
        yield


@contextmanager
def place_lock(place: Location, name: str, what: str) -> Iterator[Check]:
    """Holds the lock of what is written to a place: a lease in a bucket, else a lock on this machine.

    Args:
        place: The place.
        name: What is written there; two locks with the same one exclude each other.
        what: What messages call it.

    Raises:
        InputError: Another process holds the lock.
    """
    if isinstance(place, Bucket):
        with held_lease(f"{place.name}/.{name}.lease", what) as check:
            yield check
        return
    with machine_lock(f"{place.name}/{name}", what):
        yield lambda: None


@contextmanager
def _file_lock(path: Path, what: str, flag: str) -> Iterator[None]:
    with storage_errors(str(path), flag=flag):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                fix = "wait for it or stop it, then run the same command again"
                raise InputError(f"{what} is being written by {_holder(descriptor)}; {fix}") from error
            fix = "write to a local disk, then copy"
            raise InputError(f"{path}: this file system has no locks ({error}); {fix}") from error
        with storage_errors(str(path), flag=flag):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        return describe(json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, KeyError):  # the other process has the lock but has not written its name yet
        return "another process"
