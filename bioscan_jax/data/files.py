"""Finds input files: a file, a directory, a glob or an fsspec URL."""

import bz2
import gzip
import io
import lzma
import os
import posixpath
import re
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, cast
from urllib.parse import unquote

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from bioscan_jax.errors import InputError, logger, one_line, printable

_Kind = Literal["parquet", "fasta"]

_PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
_FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".fas", ".ffn", ".fsa", ".fastq", ".fq")
_TEXT_SUFFIXES = (".seq", ".txt")
"""Of many formats: read in a directory only where the first line is a FASTA header and the second is DNA."""
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_ACCEPTED = (
    f"Parquet (.parquet) or FASTA/FASTQ ({' '.join(_FASTA_SUFFIXES)}, plain or {' '.join(_PACKED_SUFFIXES)}; "
    f"{' '.join(_TEXT_SUFFIXES)} where they hold FASTA)"
)
_FASTA_START = re.compile(
    rb"(\xef\xbb\xbf)?\s*>[^\r\n]*\S[^\r\n]*[\r\n]+[ACGTUNRYSWKMBDHVacgtunryswkmbdhv.*-]+\s*([\r\n]|$)"
)
_SNIFFED = 1 << 16
DEMO = "demo:coi"
"""Names the 560 COI barcodes of 297 species that come with the package: public records of the Barcode of Life Data
System, whose process ids are their `sequence_id`. None of them was in the training of the default model; most of
their species were."""
_DEMO_FILE = Path(__file__).parent / "demo_coi.parquet"
_NAMED = 5

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"ARROW1": "an Arrow (Feather) file",
    b"BAM\x01": "a BAM file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<!DOCTYPE": "a web page (a failed download?)",
    b"<!doctype": "a web page (a failed download?)",
    b"<html": "a web page (a failed download?)",
    b"<?xml": "an XML file",
    b"LOCUS  ": "a GenBank flat file",
    b"ID   ": "an EMBL flat file",
    b"#NEXUS": "a NEXUS file",
    b"CLUSTAL": "a Clustal alignment",
    b"PAR1": "a Parquet file",
    b"\xff\xfe\x00\x00": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_FIXES = {
    "a zip archive (or a spreadsheet)": "unpack it",
    "a tar archive": "unpack it (tar xf)",
    "UTF-16 text": "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    "UTF-32 text": "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    "a Parquet file": "name it .parquet",
}


@dataclass(frozen=True)
class Files:
    """Input files of one kind, in reading order."""

    kind: _Kind
    paths: tuple[str, ...]
    """Absolute local paths, or paths within `filesystem`; sorted."""
    filesystem: AbstractFileSystem | None = None
    """Where the files are; None for the local disk."""
    directory: str = ""
    """The directory that was named, or that of the file or glob that was."""

    @cached_property
    def _parent(self) -> str:
        """The closest common directory."""
        return os.path.commonpath([posixpath.dirname(path) for path in self.paths])

    @property
    def names(self) -> tuple[str, ...]:
        """Paths relative to the closest common directory, so that they do not change when it is moved."""
        return tuple(path[len(self._parent) :].lstrip("/") for path in self.paths)

    def url(self, path: str) -> str:
        """Returns the path as a user would write it, for messages."""
        return path if self.filesystem is None else str(self.filesystem.unstrip_protocol(path))

    def open(self, path: str) -> io.IOBase:
        """Opens a file for reading bytes from front to back."""
        return open(path, "rb") if self.filesystem is None else cast(io.IOBase, self.filesystem.open(path, "rb"))

    @contextmanager
    def open_text(self, path: str) -> Iterator[io.IOBase]:
        """Opens a file for reading bytes from front to back, unpacked: gzip, bzip2, xz and zstd by their first bytes.

        Raises:
            InputError: The file is something else than text; the message says what.
        """
        with self.open(path) as stream:
            packing = _packing(stream.read(8))
            stream.seek(0)
            with _unpacked(stream, packing) as text:
                reader = io.BufferedReader(cast(io.RawIOBase, text), _SNIFFED)
                what = _foreign(reader.peek(_SNIFFED), packing)
                if what is not None:
                    raise InputError(f"{self.url(path)} is {what[0]}, not FASTA or FASTQ; {what[1]}")
                yield reader

    def folders(self, path: str) -> dict[str, str | None]:
        """Returns names and values of a file's `key=value` folders; see `key_value_folders`."""
        return key_value_folders(path, self.directory)

    def arrow_source(self, path: str, size: int) -> str | pa.PythonFile:
        """Returns what Arrow reads a file of `size` bytes from: the path if local, else a Python file."""
        return path if self.filesystem is None else pa.PythonFile(_Ranges(self.filesystem, path, size), mode="r")


def key_value_folders(path: str, parent: str) -> dict[str, str | None]:
    """Returns names and values of the `key=value` folders of a file, outermost first (Hive layout).

    Folders below `parent` count, and the unbroken run of such folders that ends in `parent`. Values are text as written,
    with %-escapes decoded; `__HIVE_DEFAULT_PARTITION__` is None.

    Example:
        >>> key_value_folders("/data/v=1/in/year=2021/marker=16S%20rRNA/x/a.parquet", "/data/v=1/in/year=2021")
        {'year': '2021', 'marker': '16S rRNA'}
    """
    above = [part.partition("=") for part in parent.split("/")]
    outside = next((i for i, (name, _, value) in enumerate(reversed(above)) if not (name and value)), len(above))
    below = [part.partition("=") for part in path[len(parent) :].split("/")[:-1]]
    pairs = [(name, value) for name, _, value in above[len(above) - outside :] + below if name and value]
    return {unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for name, value in pairs}


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
        data = (
            b""
            if end <= self._position
            else cast(bytes, self._filesystem.cat_file(self._path, start=self._position, end=end))
        )
        self._position += len(data)
        return data


def find_files(path: str) -> Files:
    """Finds the files that `path` names, and their kind.

    A directory is searched recursively for the known extensions, in upper or lower case (.seq and .txt only where they
    begin as FASTA does); a file of another extension that is named or matched by a glob is recognised by its first
    bytes. What is left out of a directory or a glob is named in a warning, but not files with a leading dot, directories
    with a leading dot or underscore, and markers such as `_SUCCESS`, which are skipped unless they are named.

    Args:
        path: File, directory, glob, or fsspec URL (gs://, s3://, memory://, file://) of any of these; or `DEMO`.

    Raises:
        InputError: Nothing is found, a file is of neither kind, both kinds are found, or the file system cannot be
            reached.
    """
    filesystem, root = _resolve(path)
    local = isinstance(filesystem, LocalFileSystem)
    try:
        sizes, walked = _listing(filesystem, root, local)
        shown = root if local else path
        if not sizes:
            raise InputError(f"nothing found at {shown}; expected {_ACCEPTED}, a directory or a glob of such files")
        found = Files("parquet", tuple(sorted(sizes)), None if local else filesystem, _directory(root, sizes))
        kinds, left = _kinds(found, walked, named=list(sizes) == [root])
        if not kinds:
            raise InputError(
                f"nothing found at {shown}; expected {_ACCEPTED}, a directory or a glob of such files ({_named(left)} "
                "cannot be read)"
            )
        if left:
            logger.warning(printable(f"{shown}: left out {_named(left)}; expected {_ACCEPTED}"))
        found = replace(found, paths=tuple(kinds))
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
    return replace(found, kind=kinds[found.paths[0]])


def _directory(root: str, paths: Collection[str]) -> str:
    """Returns the directory that `root` names; that of a file; or the one before the first wildcard of a glob."""
    if all(path.startswith(f"{root.rstrip('/')}/") for path in paths):
        return root.rstrip("/")
    wildcard = None if root in paths else re.search(r"[*?\[]", root)
    return posixpath.dirname(root if wildcard is None else root[: wildcard.start()])


def _kinds(found: Files, walked: set[str], *, named: bool) -> tuple[dict[str, _Kind], list[str]]:
    """Returns the kind of each file that can be read, and of a directory or glob the files that cannot.

    Raises:
        InputError: The one file that the user named cannot be read.
    """
    kinds: dict[str, _Kind] = {}
    left = []
    for file in found.paths:
        kind = _kind_of_name(file)
        if kind is None and file in walked:
            kind = _kind_in_directory(found, file)
        elif kind is None:
            try:
                kind = _kind_of_content(found, file)
            except InputError:
                if named or len(found.paths) == 1:
                    raise
        if kind is None:
            left.append(found.url(file))
        else:
            kinds[file] = kind
    return kinds, left


def _named(paths: list[str]) -> str:
    names = ", ".join(posixpath.basename(path) for path in paths[:_NAMED])
    return f"{len(paths)} file{'s' * (len(paths) > 1)}: {names}{', ...' if len(paths) > _NAMED else ''}"


def _resolve(path: str) -> tuple[AbstractFileSystem, str]:
    if not path:
        raise InputError("--data.path is empty; pass a file, a directory, a glob or an fsspec URL")
    if path == DEMO:
        return LocalFileSystem(), str(_DEMO_FILE)
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


def _listing(filesystem: AbstractFileSystem, root: str, local: bool) -> tuple[dict[str, int], set[str]]:
    """Files that `root` names, with their sizes; and those of them that are only found in a directory."""
    wildcard = re.search(r"[*?\[]", root)
    try:
        # Not isfile(), which reports a refused login as "no such file".
        info = filesystem.info(root)
    except FileNotFoundError:
        if wildcard is None:
            return {}, set()
    else:
        if not _is_directory(root, info, local):
            return {root: info["size"]}, set()
        below = _walk(filesystem, root, local)
        return below, set(below)
    fixed = root.rfind("/", 0, wildcard.start()) + 1
    found: dict[str, int] = {}
    walked: dict[str, int] = {}
    for path, info in cast(dict[str, dict], filesystem.glob(root, detail=True)).items():
        directory = _is_directory(path, info, local)
        if _is_hidden(path[fixed:] + "/" * directory):
            continue
        if directory:
            walked |= _walk(filesystem, path, local)
        elif not _is_marker(path, info["size"]):
            found[path] = info["size"]
    return walked | found, walked.keys() - found.keys()


def _is_directory(path: str, info: dict, local: bool) -> bool:
    return os.path.isdir(path) if local else info["type"] == "directory"


def _walk(filesystem: AbstractFileSystem, root: str, local: bool) -> dict[str, int]:
    """Files in and below a directory that are not hidden, with their sizes."""
    listed = {} if local else cast(dict[str, dict], filesystem.find(root, detail=True))
    sizes = _walk_local(root) if local else {path: info["size"] for path, info in listed.items()}
    return {
        path: size for path, size in sizes.items() if not _is_hidden(path[len(root) :]) and not _is_marker(path, size)
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
        for name in names:
            path = posixpath.join(directory, name)
            if _kind_of_name(path) or os.path.exists(path):
                sizes[path] = os.stat(path).st_size
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
    if name.endswith(_PARQUET_SUFFIXES):
        return "parquet"
    return "fasta" if _unpacked_name(name).endswith(_FASTA_SUFFIXES) else None


def is_text_table(path: str) -> bool:
    """Returns whether a file is named like a table of text: .csv, .tsv or .tab, plain or compressed."""
    return _unpacked_name(path.lower()).endswith((".csv", ".tsv", ".tab"))


def _unpacked_name(name: str) -> str:
    for suffix in _PACKED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _kind_in_directory(found: Files, path: str) -> _Kind | None:
    """The kind of a file whose extension is not known and that nobody named."""
    if not _unpacked_name(path.lower()).endswith(_TEXT_SUFFIXES) and "." in posixpath.basename(path):
        return None
    try:
        with found.open_text(path) as text:
            return "fasta" if _FASTA_START.match(text.read(_SNIFFED)) else None
    except (InputError, *UNPACKING_ERRORS):
        return None


def _kind_of_content(found: Files, path: str) -> _Kind:
    with found.open(path) as stream:
        head = stream.read(_SNIFFED)
    if head.startswith(b"PAR1"):
        return "parquet"
    packing = _packing(head)
    if packing is not None:
        try:
            with found.open_text(path) as text:
                head = text.read(512)
        except UNPACKING_ERRORS as error:
            raise InputError(
                f"{found.url(path)} is neither Parquet nor FASTA: it looks like {packing}, but cannot be unpacked "
                f"({one_line(error)}); get it again, or pass {_ACCEPTED}"
            ) from error
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b">", b"@")):
        return "fasta"
    what = _foreign(head, packing)
    if what is None and is_text_table(path):
        what = "a table of text", f"bioscan data parquet {found.url(path)} --output FILE.parquet makes Parquet of it"
    raise InputError(
        f"{found.url(path)} is neither Parquet nor FASTA by its name or its first bytes"
        f"{'' if what is None else f' but {what[0]}: {what[1]}'}; pass {_ACCEPTED}"
    )


UNPACKING_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, pa.ArrowException)
"""What reading a damaged compressed file may raise."""


def _packing(head: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


def _unpacked(stream: io.IOBase, packing: str | None) -> io.IOBase:
    binary = cast(BinaryIO, stream)
    if packing == "gzip":
        return cast(io.IOBase, gzip.open(binary))
    if packing == "bzip2":
        return cast(io.IOBase, bz2.open(binary))
    if packing == "xz":
        return cast(io.IOBase, lzma.open(binary))
    if packing == "zstd":
        return cast(io.IOBase, pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"))
    return stream


def _foreign(head: bytes, packing: str | None) -> tuple[str, str] | None:
    """Returns what a file is, if it is nothing that can be read, and how to fix that."""
    inner = _packing(head)
    if inner is not None:
        return f"compressed twice ({inner} within {packing})", "decompress it once"
    what = next((what for magic, what in _SIGNATURES.items() if head.startswith(magic)), None)
    if what is None and head[257:262] == b"ustar":
        what = "a tar archive"
    if what is None and b"\0" in head[:64]:
        start = head[: min(64, len(head) // 2 * 2)]
        zeros, others = sorted((start[0::2].count(0), start[1::2].count(0)), reverse=True)
        wide = zeros * 2.5 > len(start) and others * 10 < len(start)
        what = "UTF-16 text" if wide else "a binary file (it has zero bytes)"
    if what is None:
        return None
    packed = "" if packing is None else f" ({packing}-compressed)"
    return what + packed, _FIXES.get(what, "pass FASTA, FASTQ or Parquet")
