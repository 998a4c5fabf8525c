"""Finds input files: a file, a directory, a glob or an fsspec URL."""

import contextlib
import io
import os
import posixpath
import re
import zlib
from dataclasses import dataclass
from typing import Literal, cast

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from bioscan_jax.errors import InputError, one_line

_Kind = Literal["parquet", "fasta"]

_FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".fas", ".ffn", ".fsa", ".fastq", ".fq")
_ACCEPTED = f"Parquet (.parquet) or FASTA/FASTQ ({' '.join(_FASTA_SUFFIXES)}, plain or .gz)"


@dataclass(frozen=True)
class Files:
    """Input files of one kind, in reading order."""

    kind: _Kind
    paths: tuple[str, ...]
    """Absolute local paths, or paths within `filesystem`; sorted."""
    filesystem: AbstractFileSystem | None = None
    """Where the files are; None for the local disk."""

    @property
    def names(self) -> tuple[str, ...]:
        """Paths relative to the closest common directory, so that they do not change when it is moved."""
        parent = os.path.commonpath([posixpath.dirname(path) for path in self.paths])
        return tuple(path[len(parent) :].lstrip("/") for path in self.paths)

    def url(self, path: str) -> str:
        """Returns the path as a user would write it, for messages."""
        return path if self.filesystem is None else str(self.filesystem.unstrip_protocol(path))

    def open(self, path: str) -> io.IOBase:
        """Opens a file for reading bytes from front to back."""
        return open(path, "rb") if self.filesystem is None else cast(io.IOBase, self.filesystem.open(path, "rb"))

    def arrow_source(self, path: str, size: int) -> str | pa.PythonFile:
        """Returns what Arrow reads a file of `size` bytes from: the path if local, else a Python file."""
        return path if self.filesystem is None else pa.PythonFile(_Ranges(self.filesystem, path, size), mode="r")


class _Ranges(io.RawIOBase):
    """A remote file read by byte ranges: one request per read, no read-ahead, no state shared between threads."""

    def __init__(self, filesystem: AbstractFileSystem, path: str, size: int):
        self._filesystem, self._path, self._size, self._position = filesystem, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._position + size, self._size)
        data = b"" if end <= self._position else cast(bytes, self._filesystem.cat_file(self._path, self._position, end))
        self._position += len(data)
        return data


def find_files(path: str) -> Files:
    """Finds the files that `path` names, and their kind.

    A directory is searched recursively for the known extensions, in upper or lower case; a file of another extension
    that is named or matched by a glob is recognised by its first bytes. Files with a leading dot, directories with a
    leading dot or underscore, and markers such as `_SUCCESS` are skipped unless they are named.

    Args:
        path: File, directory, glob, or fsspec URL (gs://, s3://, memory://, file://) of any of these.

    Raises:
        InputError: Nothing is found, a file is of neither kind, both kinds are found, or the file system cannot be
            reached.
    """
    filesystem, root = _resolve(path)
    local = isinstance(filesystem, LocalFileSystem)
    try:
        sizes = _listing(filesystem, root, local)
        shown = root if local else path
        if not sizes:
            raise InputError(f"nothing found at {shown}; expected {_ACCEPTED}, a directory or a glob of such files")
        found = Files("parquet", tuple(sorted(sizes)), None if local else filesystem)
        kinds: dict[str, _Kind] = {file: _kind_of_name(file) or _kind_of_content(found, file) for file in found.paths}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; check the path and its permissions") from error
    except Exception as error:
        if local:
            raise
        # Each fsspec driver raises its own exceptions for a wrong bucket, missing credentials or no network.
        raise InputError(f"cannot read {path}: {one_line(error)}; check the URL and the credentials") from error
    first = {kind: file for file, kind in reversed(kinds.items())}
    if len(first) == 2:
        raise InputError(
            f"{shown} mixes Parquet ({found.url(first['parquet'])}) and FASTA ({found.url(first['fasta'])}); "
            "pass a glob that matches one kind"
        )
    return Files(kinds[found.paths[0]], found.paths, found.filesystem)


def _resolve(path: str) -> tuple[AbstractFileSystem, str]:
    if not path:
        raise InputError("--data.path is empty; pass a file, a directory, a glob or an fsspec URL")
    protocol = path.split("://")[0].split("::")[0]
    try:
        filesystem, root = url_to_fs(os.path.expanduser(path))
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", "fsspec")).split(".")[0]
        fix = f"pip install {package}" if package != "fsspec" else one_line(error)
        raise InputError(f"cannot read {path}: no driver for {protocol}://; {fix}") from error
    except ValueError as error:
        raise InputError(f"cannot read {path}: {one_line(error)}; use gs://, s3:// or a local path") from error
    return filesystem, root


def _listing(filesystem: AbstractFileSystem, root: str, local: bool) -> dict[str, int]:
    """Files that `root` names, with their sizes."""
    wildcard = re.search(r"[*?\[]", root)
    try:
        # Not isfile(), which reports a refused login as "no such file".
        info = filesystem.info(root)
    except FileNotFoundError:
        if wildcard is None:
            return {}
    else:
        return _walk(filesystem, root, local) if _is_directory(root, info, local) else {root: info["size"]}
    fixed = root.rfind("/", 0, wildcard.start()) + 1
    found: dict[str, int] = {}
    for path, info in cast(dict[str, dict], filesystem.glob(root, detail=True)).items():
        directory = _is_directory(path, info, local)
        if _is_hidden(path[fixed:] + "/" * directory):
            continue
        if directory:
            found |= _walk(filesystem, path, local)
        elif not _is_marker(path, info["size"]):
            found[path] = info["size"]
    return found


def _is_directory(path: str, info: dict, local: bool) -> bool:
    return os.path.isdir(path) if local else info["type"] == "directory"


def _walk(filesystem: AbstractFileSystem, root: str, local: bool) -> dict[str, int]:
    """Files with a known extension in and below a directory, with their sizes."""
    listed = {} if local else cast(dict[str, dict], filesystem.find(root, detail=True))
    sizes = _walk_local(root) if local else {path: info["size"] for path, info in listed.items()}
    return {
        path: size
        for path, size in sizes.items()
        if _kind_of_name(path) and not _is_hidden(path[len(root) :]) and not _is_marker(path, size)
    }


def _walk_local(root: str) -> dict[str, int]:
    """Files below a local directory; fsspec would silently skip a directory that it may not list."""

    def refuse(error: OSError) -> None:
        raise error

    sizes, seen = {}, set()
    for directory, below, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith((".", "_")))
        sizes |= {
            path: os.stat(path).st_size for name in names if _kind_of_name(path := posixpath.join(directory, name))
        }
    return sizes


def _is_hidden(relative: str) -> bool:
    """Whether a file has a leading dot or is below a directory such as .git, _temporary or _delta_log."""
    *directories, name = relative.lstrip("/").split("/")
    return name.startswith(".") or any(part.startswith((".", "_")) for part in directories)


def _is_marker(path: str, size: int) -> bool:
    """Whether a file is one that Spark and others write beside the data: _SUCCESS, _metadata."""
    return posixpath.basename(path).startswith("_") and (size == 0 or _kind_of_name(path) is None)


def _kind_of_name(path: str) -> _Kind | None:
    name = posixpath.basename(path).lower()
    if name.endswith(".parquet"):
        return "parquet"
    return "fasta" if name.removesuffix(".gz").endswith(_FASTA_SUFFIXES) else None


def _kind_of_content(found: Files, path: str) -> _Kind:
    with found.open(path) as stream:
        head = stream.read(512)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\x1f\x8b"):
        with contextlib.suppress(zlib.error):
            head = zlib.decompressobj(wbits=31).decompress(head)
    if head.startswith((b">", b"@")):
        return "fasta"
    raise InputError(f"{found.url(path)} is neither Parquet nor FASTA by its name or its first bytes; pass {_ACCEPTED}")
