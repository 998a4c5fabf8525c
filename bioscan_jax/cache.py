"""The cache of what can be made or downloaded again: where it is, and its bound.

A download is a directory. Beside it stands a file that every process which uses it locks until it ends; the kernel
releases that lock even if the process is killed. What no process uses is removed, the longest unused first, until the
downloads take no more than the bound.
"""

import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from bioscan_jax.errors import InputError

BOUND = "BIOSCAN_CACHE_GB"
"""Environment variable: most GB (10^9 bytes) that downloads take."""
_DEFAULT_GB = 20.0
_DOWNLOAD = re.compile("[0-9a-f]{32}")
_held: dict[Path, int] = {}
"""The lock files that this process holds; never closed."""


def cache_directory() -> Path:
    """Returns the directory for what can be made or downloaded again: $XDG_CACHE_HOME/bioscan_jax, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bioscan_jax"


def downloads_directory() -> Path:
    """Returns the directory of the downloads from buckets and remotes."""
    return cache_directory() / "downloads"


def cache_bound() -> int:
    """Returns the most bytes that downloads take together; one that is larger stays as long as it is used.

    Raises:
        InputError: The environment variable is not a number.
    """
    given = os.environ.get(BOUND) or _DEFAULT_GB
    try:
        bound = float(given)
        if not 0 <= bound < float("inf"):
            raise ValueError
    except ValueError:
        raise InputError(f"{BOUND}={given} is not a number of GB; set it to one, such as {_DEFAULT_GB:g}") from None
    return int(bound * 1e9)


def hold(download: Path) -> None:
    """Keeps a download, which need not be there yet, from being removed while this process lives."""
    if download in _held:
        return
    descriptor = os.open(_lock_of(download), os.O_RDWR | os.O_CREAT, 0o644)
    with suppress(OSError):  # without locks nothing is removed
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(descriptor)
    _held[download] = descriptor


def prune(directory: Path, most: int) -> list[Path]:
    """Removes downloads that no process uses, the longest unused first, until all take at most `most` bytes.

    Returns:
        What was removed.
    """
    found = [path for path in directory.iterdir() if _DOWNLOAD.fullmatch(path.name)] if directory.is_dir() else []
    sizes = {path: bytes_below(path) for path in found}
    total, removed = sum(sizes.values()), []
    for path in sorted(found, key=_last_use):
        if total <= most:
            break
        if _remove(path):
            removed.append(path)
            total -= sizes[path]
    return removed


def bytes_below(directory: Path) -> int:
    """Returns the bytes of the files in a directory, links not followed; 0 if there is none."""
    total = 0
    for where, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _lock_of(download: Path) -> Path:
    return download.with_suffix(".used")


def _last_use(download: Path) -> float:
    try:
        return _lock_of(download).stat().st_mtime
    except OSError:
        return 0.0


def _remove(download: Path) -> bool:
    """Removes a download, or returns False if a process uses it."""
    try:
        descriptor = os.open(_lock_of(download), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = download.with_name(f".{download.name}.removed")  # so that no part of it is ever taken for the whole
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(download, gone)
        shutil.rmtree(gone, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
