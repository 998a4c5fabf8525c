"""Writes local files and directories that appear whole or not at all; the rest of the package does it through these."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bioscan_jax.errors import InputError


@contextmanager
def whole_file(path: str | os.PathLike[str], *, locked: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` on success and is removed after a failure.

    A link is followed, and a pipe or device such as /dev/stdout is written directly.

    Args:
        path: The file; its directory must exist.
        locked: The caller holds a lock that covers `path`: the temporary name is fixed, so that a run overwrites what
            a killed one left.

    Raises:
        OSError: It cannot be written; the caller names the flag.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial" if locked else f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        move_synced(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def move_synced(file: Path, path: Path) -> None:
    """Renames `file` to `path` on the same disk, once its bytes are on that disk.

    Raises:
        OSError: The disk is full or was removed.
    """
    _sync(file)
    os.replace(file, path)
    with suppress(OSError):  # not every file system can sync a directory
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `directory` on success and removed after a failure.

    Raises:
        InputError: `directory` exists and is not empty, is a file, or cannot be written.
    """
    directory = directory.absolute()
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory}: not empty; choose another --output or remove it")
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        os.rename(temporary, directory)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be written ({error.strerror or error}); free space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock of a file, created if absent; the kernel releases it if the process is killed.

    A file system without locks, such as some network mounts, lets all through: what is written in the block has to
    appear whole by itself.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def private_directory() -> Path:
    """Returns this user's directory for files that a later process finds again, below the system's temporary one.

    Raises:
        InputError: It cannot be made, or somebody else could have made it or write to it.
    """
    path = Path(tempfile.gettempdir()) / f"bioscan_jax-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; remove it, or set TMPDIR to another directory") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InputError(f"{path} is not a directory of yours alone; remove it, or set TMPDIR to another directory")
    return path
