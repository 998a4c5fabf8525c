"""Converts FASTA and FASTQ to Parquet, once: Parquet can be read from any row group, text only from the start."""

import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax.data.files import UNPACKING_ERRORS, Files
from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.output import whole_file

SCHEMA = pa.schema([("sequence_id", pa.string()), ("description", pa.string()), ("dna_sequence", pa.string())])
_ROW_GROUP_ROWS = 8192
# Chromosomes end a row group early, so that memory and 32-bit offsets suffice.
_ROW_GROUP_LETTERS = 64 << 20
_KEY = b"bioscan_jax.fasta"
_LAYOUT = 1

_WHITE = " \t\n\v\f\r\x1c\x1d\x1e\x1f"
"""White space that may stand around a header's words; a no-break space is part of a word."""
_GAP = re.compile(f"[{_WHITE}]+")
SIZE_COLUMN = "size"
SIZE_ANNOTATION = r"(?:^|;)size=(?P<size>[0-9]{1,18})(?:;|$)"
"""Regular expression of the abundance that USEARCH, VSEARCH and others write into the first word of a header."""


def transcode(found: Files, target: Path, *, on_rows: Callable[[int], None] | None = None) -> Path:
    """Writes the records of FASTA or FASTQ files, in order, to one Parquet file.

    Columns are `sequence_id` (first word of the header), `description` (the rest; null where there is none) and
    `dna_sequence`, unchanged. Headers are UTF-8; one that is not is read as Latin-1, with a warning. A byte order mark
    and blank lines between records are skipped. The file appears whole or not at all. It is kept if it exists and was
    made from the same files (names, sizes and modification times). Processes that share the directory wait for one
    another.

    Args:
        found: The FASTA or FASTQ files, plain or compressed.
        target: Parquet file to write; its directory is created.
        on_rows: Called after each row group with its number of rows.

    Returns:
        `target`.

    Raises:
        InputError: A file is malformed, truncated or unreadable, there are no records, or `target` cannot be written.
    """
    stamps = [_stamp(found, path, name) for path, name in zip(found.paths, found.names, strict=True)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            if _made_from(target) != stamps:
                with whole_file(target, locked=True) as partial:
                    _write(found, stamps, partial, on_rows)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free space or pass another place"
        ) from error
    return target


def fingerprint(found: Files) -> str:
    """Returns a name for the files that changes with their names, sizes and modification times."""
    stamps = [_stamp(found, path, name) for path, name in zip(found.paths, found.names, strict=True)]
    return hashlib.sha256(json.dumps([_LAYOUT, stamps]).encode()).hexdigest()[:32]


def read_origins(target: Path) -> list[dict[str, Any]]:
    """Returns the name, bytes, rows and sha256 of each FASTA file that `target` was made from.

    The hash covers headers and sequences, so that it depends on neither line breaks nor compression.
    """
    return json.loads(pq.read_metadata(target).metadata[_KEY])["origins"]


def has_sizes(target: Path) -> bool:
    """Returns whether an id of the FASTA files that `target` was made from has an abundance, such as `asv1;size=12;`."""
    return bool(json.loads(pq.read_metadata(target).metadata[_KEY]).get("sizes"))


def _stamp(found: Files, path: str, name: str) -> dict[str, str | int]:
    """Name, bytes and version (mtime in ns, or the file system's own key), which differ if the file changed."""
    if found.filesystem is None:
        status = os.stat(path)
        return {"name": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {"name": name, "bytes": found.filesystem.size(path) or 0, "ukey": str(found.filesystem.ukey(path))}


def _made_from(target: Path) -> list[dict[str, Any]] | None:
    """Stamps of the files that `target` was made from; None if it is absent, damaged or not made by `transcode`."""
    try:
        note = json.loads((pq.read_metadata(target).metadata or {}).get(_KEY, b"{}"))
    except (OSError, pa.ArrowException):
        return None
    return note.get("stamps") if note.get("layout") == _LAYOUT else None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a lock that the kernel releases even if the process is killed."""
    with (directory / ".lock").open("w") as handle:  # NFS locks only files that are open for writing
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(found: Files, stamps: list, partial: Path, on_rows: Callable[[int], None] | None) -> None:
    made: list[dict[str, str | int]] = []
    sizes = False
    columns: tuple[list, list, list] = ([], [], [])

    with pq.ParquetWriter(partial, SCHEMA, compression="zstd", use_dictionary=False) as writer:

        def flush() -> None:
            rows = len(columns[0])
            if rows:
                writer.write_table(pa.table(list(columns), schema=SCHEMA), row_group_size=rows)
                for column in columns:
                    column.clear()
                if on_rows is not None:
                    on_rows(rows)

        letters = 0
        for path, stamp in zip(found.paths, stamps, strict=True):
            digest, rows = hashlib.sha256(), 0
            for header, sequence in _records(found, path):
                words = _GAP.split(header.lstrip(_WHITE), maxsplit=1)
                if not words[0]:
                    raise InputError(f"{found.url(path)}: record {rows} (counted from 0) has no id after '>' or '@'")
                digest.update(f"{header}\n{sequence}\n".encode())
                rows += 1
                columns[0].append(words[0])
                sizes = sizes or ("size=" in words[0] and re.search(SIZE_ANNOTATION, words[0]) is not None)
                columns[1].append(words[1].rstrip(_WHITE) or None if len(words) == 2 else None)
                columns[2].append(sequence)
                letters += len(sequence)
                if len(columns[0]) == _ROW_GROUP_ROWS or letters >= _ROW_GROUP_LETTERS:
                    flush()
                    letters = 0
            made.append({"name": stamp["name"], "bytes": stamp["bytes"], "rows": rows, "sha256": digest.hexdigest()})
        flush()
        if not any(origin["rows"] for origin in made):
            raise InputError(f"no sequences in {found.url(found.paths[0])} (files looked at: {len(made)})")
        note = {"layout": _LAYOUT, "stamps": stamps, "origins": made} | ({"sizes": True} if sizes else {})
        writer.add_key_value_metadata({_KEY.decode(): json.dumps(note)})


def _records(found: Files, path: str) -> Iterator[tuple[str, str]]:
    """Yields header and sequence of each record; raises InputError for any malformed file.

    By hand, since dnaio reads ASCII only.
    """
    shown = found.url(path)
    latin: list[str] = []
    try:
        with found.open_text(path) as stream:
            lines = _Lines(io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8", errors="surrogateescape"), latin)
            first = lines.next_filled()
            if first is None:
                return
            if first.lstrip(_WHITE)[0] not in ">@#" and not _named_fasta(path):
                raise InputError(f"{shown} does not start with '>' (FASTA) or '@' (FASTQ); pass a FASTA or FASTQ file")
            first = first.lstrip(_WHITE)
            read = _fastq if first[0] == "@" and not _named_fasta(path) else _fasta
            yield from read(first, lines)
    except _FormatError as error:
        raise InputError(f"{shown} line {error.line}: {error}; fix that record or get the file again") from error
    except UNPACKING_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown} cannot be read to its end ({one_line(error)}); get the file again") from error
    if latin:
        logger.warning(f"{shown}: {len(latin)} headers are not UTF-8 and were read as Latin-1, first {latin[0][:60]!r}")


_FASTA_NAMES = (".fa", ".fasta", ".fna", ".fas", ".ffn")


def _named_fasta(path: str) -> bool:
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", path.lower()).endswith(_FASTA_NAMES)


class _FormatError(Exception):
    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


class _Lines:
    """The lines of a text, with their numbers."""

    def __init__(self, text: io.TextIOWrapper, latin: list[str]):
        self._text = text
        self._latin = latin
        self.number = 0

    def raw(self) -> str | None:
        """Returns the next line without its end; None after the last."""
        line = self._text.readline()
        if not line:
            return None
        self.number += 1
        return line.rstrip("\n").removeprefix("\ufeff")

    def next(self) -> str | None:
        """Returns the next line without white space around it; None after the last."""
        line = self.raw()
        return None if line is None else line.strip(_WHITE)

    def next_filled(self) -> str | None:
        """Returns the next line that is not blank; None at the end."""
        while (line := self.raw()) is not None and not line.strip(_WHITE):
            pass
        return line

    def header(self, line: str) -> str:
        """Returns a line as text where it was not UTF-8."""
        if line.isascii():
            return line
        raw = line.encode("utf-8", "surrogateescape")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._latin.append(raw.decode("latin-1"))
            return self._latin[-1]

    def sequence(self, line: str) -> str:
        """Returns a line of DNA.

        Raises:
            _FormatError: A character is not ASCII.
        """
        if line.isascii():
            return line
        letter = next(c for c in line if not c.isascii())
        shown = "" if "\ud800" <= letter <= "\udfff" else f" ({letter!r})"
        raise _FormatError(f"a character that is not ASCII{shown} in a sequence", self.number)


def _fasta(first: str, lines: _Lines) -> Iterator[tuple[str, str]]:
    name, parts, line = None, [], first
    while line is not None:
        line = line.rstrip(_WHITE)
        if line.startswith(">"):
            if name is not None:
                yield name, "".join(parts)
            name, parts = lines.header(line[1:]), []
        elif line and not line.startswith("#"):
            if name is None:
                raise _FormatError(f"Expected '>' at beginning of record, but got {line[:60]!r}", lines.number)
            parts.append(lines.sequence(line))
        line = lines.next()
    if name is not None:
        yield name, "".join(parts)


def _fastq(first: str, lines: _Lines) -> Iterator[tuple[str, str]]:
    line: str | None = first
    while line is not None:
        if not line.startswith("@"):
            raise _FormatError(f"Expected '@' at beginning of record, but got {line[:60]!r}", lines.number)
        name = lines.header(line[1:])
        sequence, plus, qualities = lines.raw(), lines.raw(), lines.raw()
        if sequence is None or plus is None or (qualities is None and sequence):
            raise _FormatError("Premature end of file encountered", lines.number + 1)
        if not plus.startswith("+"):
            raise _FormatError(
                f"Expected '+' at beginning of the third line of a record, but got {plus[:30]!r} (unwrap longer records, "
                "by `seqtk seq -l0`)",
                lines.number - 1,
            )
        if len(plus) > 1 and lines.header(plus[1:]) != name:
            raise _FormatError(f"the names of a record differ ({name[:60]!r} and {plus[1:61]!r})", lines.number - 1)
        if len(sequence) != len(qualities or ""):
            raise _FormatError(
                f"Length of sequence and qualities differ ({len(sequence)} and {len(qualities or '')})", lines.number
            )
        yield name, lines.sequence(sequence)
        line = lines.next_filled()
