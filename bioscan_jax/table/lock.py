"""What guards a table: one writer by a kernel lock, one plan; and one line when the storage says no."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bioscan_jax.errors import InputError

if TYPE_CHECKING:
    import lance

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_A_DIRECTORY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_HELD = {errno.EAGAIN, errno.EACCES}
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


@dataclass(frozen=True)
class Plan:
    """All that decides the rows of a table and their values."""

    facts: dict[str, Any]
    """What JSON can hold: input files, weights, pooling and so on, nested as you like."""

    @property
    def canonical(self) -> str:
        """The facts as JSON, keys sorted, no spaces."""
        return json.dumps(self.facts, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def sha256(self) -> str:
        """Digest of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of what a JSON value holds, each with its own JSON."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for position, item in enumerate(value):
            yield from _leaves(item, f"{name}[{position}]")
    else:
        yield name, json.dumps(value)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The dotted names of what differs between two plans' facts, with both values, as one line; "" if nothing."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]

    def short(value: str) -> str:
        return value if len(value) <= 60 else f"{value[:40]}...{value[-15:]}"

    shown = [f"{k} {short(before.get(k, 'absent'))} -> {short(after.get(k, 'absent'))}" for k in changed[:5]]
    return ", ".join(shown) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def check_origin(path: str, found: pa.Schema, wanted: pa.Schema, mend: str) -> None:
    """Compares a table that exists with the one that would be made now.

    Args:
        path: Where the table is.
        found: Its schema.
        wanted: The schema it would be made with; both have `plan`, `plan_facts`, `rows` and `block_rows`.
        mend: What the user can do about a difference.

    Raises:
        InputError: the table was made by something else, by another plan or with other columns.
    """
    old, new = ({k.decode(): v.decode() for k, v in (s.metadata or {}).items()} for s in (found, wanted))
    if not {"plan", "plan_facts", "rows", "block_rows"} <= old.keys():
        raise InputError(f"{path} was not made by bioscan_jax (it has no plan); {mend}")
    if any(old[key] != new[key] for key in ("plan", "rows", "block_rows")):
        facts = [
            {**json.loads(m["plan_facts"]), "table": {key: int(m[key]) for key in ("rows", "block_rows")}}
            for m in (old, new)
        ]
        raise InputError(f"{path} was made by another plan: {differences(facts[0], facts[1])}; {mend}")
    made = [field for field in found if b"annotated" not in (field.metadata or {})]
    types = [{field.name: str(field.type) for field in fields} for fields in (made, wanted)]
    if list(types[0].items()) != list(types[1].items()):
        changed = differences(types[0], types[1]) or "their order"
        raise InputError(f"{path} was made with other columns: {changed}; {mend}")
