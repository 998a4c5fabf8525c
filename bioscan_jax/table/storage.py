"""Where a Lance table is stored, opening it, and one-line errors when the storage fails."""

import errno
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from bioscan_jax.errors import InputError
from bioscan_jax.location import local_directory

if TYPE_CHECKING:
    import lance

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_A_DIRECTORY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
TABLE_FLAG = "--sink.uri"
"""The flag that names the database, for messages."""


def table_path(uri: str, table: str) -> str:
    """Returns the path or URL at which the LanceDB database `uri` stores `table`."""
    directory = local_directory(uri)
    return f"{uri.rstrip('/')}/{table}.lance" if directory is None else str(directory / f"{table}.lance")


def lance_text(error: Exception) -> str:
    """Returns the text of an exception of Lance on one line, without the places in its source."""
    return " ".join(re.sub(r",? ?/\S+\.rs:\d+:\d+", "", str(error)).split())[:300]


def storage_error(where: str, error: Exception, safe_rows: int | None, flag: str = TABLE_FLAG) -> InputError:
    """Returns a storage failure as one line that says how to fix it.

    Args:
        where: The path or URL that was read or written.
        error: Python's OSError, or an exception of Lance, whose text contains `(os error N)`.
        safe_rows: Rows committed before the failure, None if not known.
        flag: The flag that names the place.
    """
    text = lance_text(error)
    found = re.search(r"\(os error (\d+)\)", text)
    code = int(found[1]) if found else getattr(error, "errno", None)
    safe = "what was committed is safe" if safe_rows is None else f"{safe_rows} rows are safe"
    again = f"run the same command again: {safe}"
    if code in _FULL:
        return InputError(f"{where}: the disk or quota is full; free space and {again} ({text})")
    if code == errno.EFBIG:
        return InputError(f"{where}: a file outgrew this process's limit; raise it (ulimit -f) and {again} ({text})")
    if code in _REFUSED:
        return InputError(f"{where}: not allowed; pass a {flag} that you may write ({text})")
    if code in _NOT_A_DIRECTORY:
        return InputError(f"{where}: a file stands where a directory is needed; pass another {flag} ({text})")
    return InputError(f"{where}: the storage failed; fix it and {again} ({text})")


@contextmanager
def storage_errors(where: str, safe_rows: int | None = None, *, flag: str = TABLE_FLAG) -> Iterator[None]:
    """Raises storage failures in its block as the InputError of `storage_error`.

    Args:
        where: The path or URL that is read or written.
        safe_rows: Rows committed before the failure, None if not known.
        flag: The flag that names the place.

    Raises:
        InputError: The storage failed.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise storage_error(where, error, safe_rows, flag) from error


def open_dataset(path: str) -> "lance.LanceDataset | None":
    """Opens the latest version of a table; None if there is no such table.

    Args:
        path: From `table_path`.

    Raises:
        InputError: The table cannot be read.
    """
    import lance

    with storage_errors(path):
        try:
            return lance.dataset(path, commit_lock=_commit_lock(path))
        except ValueError as error:
            if "was not found" in str(error):
                return None
            raise


def create_dataset(path: str, schema: pa.Schema) -> "lance.LanceDataset":
    """Creates a table without rows; the caller holds the table's lock."""
    import lance

    return lance.write_dataset(schema.empty_table(), path, mode="create", commit_lock=_commit_lock(path))


def _commit_lock(path: str) -> type[nullcontext] | None:
    """Returns the lock that Lance takes to commit: none where it commits by a hard link, which fails if another did.

    Mounts of Google Drive or of a bucket, and FAT32, have no hard links. There Lance renames the new version into
    place, and the writer's own lock is what keeps others out.
    """
    directory = local_directory(path)
    return nullcontext if directory is not None and not _has_hard_links(directory.parent) else None


@functools.cache
def _has_hard_links(directory: Path) -> bool:
    """Tries a hard link; a directory that is absent or may not be written counts as one that has them."""
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp", dir=directory) as scratch:
            file = Path(scratch) / "file"
            file.touch()
            try:
                os.link(file, file.with_name("link"))
            except OSError:
                return False
    except OSError:
        pass
    return True


def table_exists(uri: str, table: str) -> bool:
    """Returns whether the table exists; raises InputError if it cannot be read."""
    return open_dataset(table_path(uri, table)) is not None


def drop_if_empty(uri: str, table: str) -> None:
    """Removes a vector table and its rejects if neither has a row; the caller holds the table's lock."""
    import lance

    paths = table_path(uri, table), table_path(uri, f"{table}_rejects")
    found = {path: dataset for path in paths if (dataset := open_dataset(path)) is not None}
    with storage_errors(paths[0]):
        if not any(dataset.count_rows() for dataset in found.values()):
            for path in found:
                lance.LanceDataset.drop(path)


def sidecar_path(uri: str, table: str, kind: Literal["run", "calibration"]) -> str:
    """Returns the path or URL of the JSON file beside a table that holds its run record or calibration."""
    return f"{table_path(uri, table).removesuffix('.lance')}.{kind}.json"
