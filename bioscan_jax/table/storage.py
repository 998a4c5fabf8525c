"""Where a Lance table is stored, opening it, and one-line errors when the storage fails."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bioscan_jax.errors import InputError

if TYPE_CHECKING:
    import lance

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_A_DIRECTORY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
TABLE_FLAG = "--sink.uri"
"""Says where a table is, on the command line."""


def local_directory(uri: str, *, flag: str = TABLE_FLAG) -> Path | None:
    """The directory a URI names, or None if it names an object store (`gs://`, `s3://`, ...).

    It is absolute, since Lance takes the start of a relative `a:b` for a URL's scheme.

    Raises:
        InputError: the URI is empty; `flag` is how it was given.
    """
    if not uri:
        raise InputError(f"{flag} is empty; pass a directory or an object-store URL")
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri).expanduser().absolute()


def table_path(uri: str, table: str) -> str:
    """Where the LanceDB database at `uri` keeps `table`."""
    directory = local_directory(uri)
    return f"{uri.rstrip('/')}/{table}.lance" if directory is None else str(directory / f"{table}.lance")


def storage_error(where: str, error: Exception, safe_rows: int | None, flag: str = TABLE_FLAG) -> InputError:
    """Makes one line with the mend of what the storage, or Lance for it, complains about.

    Args:
        where: The path or URL that was read or written.
        error: Python's OSError, or Lance's exception whose text holds `(os error N)`.
        safe_rows: Rows that were committed before, None if that is not known.
        flag: Says where to write.

    Returns:
        The error to raise.
    """
    text = " ".join(re.sub(r",? ?/\S+\.rs:\d+:\d+", "", str(error)).split())[:300]
    found = re.search(r"\(os error (\d+)\)", text)
    code = int(found[1]) if found else getattr(error, "errno", None)
    safe = "what was committed is safe" if safe_rows is None else f"{safe_rows} rows are safe"
    again = f"run the same command again: {safe}"
    if code in _FULL:
        return InputError(f"{where}: the disk or quota is full; free space and {again} ({text})")
    if code == errno.EFBIG:
        return InputError(f"{where}: a file outgrew this process's limit; raise it (ulimit -f) and {again} ({text})")
    if code in _REFUSED:
        links = ", on a disk with hard links (FAT and exFAT have none)" if code == errno.EPERM else ""
        return InputError(f"{where}: not allowed; pass a {flag} that you may write{links} ({text})")
    if code in _NOT_A_DIRECTORY:
        return InputError(f"{where}: a file stands where a directory is needed; pass another {flag} ({text})")
    return InputError(f"{where}: the storage failed; mend it and {again} ({text})")


@contextmanager
def storage_errors(where: str, safe_rows: int | None = None, *, flag: str = TABLE_FLAG) -> Iterator[None]:
    """Turns what fails inside into `storage_error`; an InputError passes through.

    Args:
        where: The path or URL that is read or written.
        safe_rows: Rows that were committed before, None if that is not known.
        flag: Says where to write.

    Raises:
        InputError: the storage failed.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise storage_error(where, error, safe_rows, flag) from error


def open_dataset(path: str) -> "lance.LanceDataset | None":
    """The latest version of a table, or None if there is none.

    Args:
        path: From `table_path`.

    Raises:
        InputError: there is something that cannot be read.
    """
    import lance

    with storage_errors(path):
        try:
            return lance.dataset(path)
        except ValueError as error:
            if "was not found" in str(error):
                return None
            raise


def table_exists(uri: str, table: str) -> bool:
    """Whether there is such a table, of whatever origin; an InputError if it cannot be read."""
    return open_dataset(table_path(uri, table)) is not None


def drop_empty(uri: str, table: str) -> None:
    """Removes a vector table and its rejects if neither has a row; the caller holds the lock of the table."""
    import lance

    paths = table_path(uri, table), table_path(uri, f"{table}_rejects")
    found = {path: dataset for path in paths if (dataset := open_dataset(path)) is not None}
    with storage_errors(paths[0]):
        if not any(dataset.count_rows() for dataset in found.values()):
            for path in found:
                lance.LanceDataset.drop(path)
